"""What has to hold on a GPU, checked on the CPU too where it can be: all of it against dense autograd or a twin run.

    python -m pytest tests/test_gpu.py -m gpu           with a GPU; needs only torch, transformers, peft and triton

Nothing here is timed. The slowest come first, so that processes side by side end together.
"""

import threading
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from dense_truth import dense_of, in_place
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from smt_peft import SMTConfig, SMTWarmupCallback, select_blocks

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTHS = {16: (64, 96), 48: (192, 288), 64: (256, 384), 256: (1024, 768)}  # block size: hidden and intermediate size
# Of a matrix, beside dense float32; with 16 bits mostly the rounding of activations, 1.7e-2 in dense training, too.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")],
)


@pytest.fixture(params=["cpu", GPU])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[GPU])
def gpu(request) -> str:
    """For what only a GPU has."""
    return request.param


@pytest.fixture(autouse=True)
def same_precision_afterwards():
    """Trainer has float32 multiplied as TF32 where it compiles, and a compiler writes that down for CUDA alone."""
    places = [place for place in (torch.backends, torch.backends.cuda.matmul) if hasattr(place, "fp32_precision")]
    before = [place.fp32_precision for place in places]
    yield
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


@pytest.fixture
def base(make_llama):
    """A LLaMA with grouped-query attention whose matrices are grids of at least 2 x 4 blocks."""

    def make(device: str, block_size: int = 16, dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
        hidden, intermediate = WIDTHS[block_size]
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "initializer_range": hidden**-0.5 / 2}
        layers = {"num_hidden_layers": 1 if block_size == 256 else 2}
        return make_llama(**{**sizes, **layers, **changes}).to(device, dtype)

    return make


def smt(model: nn.Module, block_size: int = 16, **options) -> PeftModel:
    """A third of the blocks of each linear layer, selected at random, with deltas that are not zero."""
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in LINEAR]
    blocks = sum(layer.weight.numel() for layer in layers) // block_size**2
    defaults = {"selection": "random", "scope": "module", "num_blocks": blocks // 3, "target_modules": LINEAR}
    return get_peft_model(model, SMTConfig(block_size=block_size, **{**defaults, **options})).train()


def bank(model: PeftModel) -> nn.Parameter:
    return model.base_model.model.smt_bank["default"].weight


def tokens(device: str, batch: int = 3, length: int = 37) -> torch.Tensor:
    """Their number fits no tile of a kernel."""
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def checkpoint(model: nn.Module, mode: str) -> None:
    if mode != "none":
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def backward(model: nn.Module, ids: torch.Tensor, autocast: torch.dtype | None = None) -> torch.Tensor:
    """One step's gradients; returns the inputs' gradient."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autocast(ids.device.type, autocast) if autocast else nullcontext():
        loss = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
    loss.backward()
    return embedded.grad


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """With the whole mask given: without one, transformers waits for the device to see if sequences are packed."""
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss


def train(model: nn.Module, ids: torch.Tensor, steps: int, **options) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4, **options)
    for _ in range(steps):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# --- Trainer -----------------------------------------------------------------------------------------------------


def run_trainer(model: nn.Module, device: str, folder, **options) -> tuple[list[float], torch.Tensor]:
    """Losses of a run with warm-up, and the index that it selected."""
    data = [{"input_ids": row, "labels": row} for row in tokens("cpu", batch=16, length=16)]
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=device == "cpu",
        **{**quiet, **options},
    )  # fmt: skip
    callback = SMTWarmupCallback()
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], callback.selection.index


def test_trainer_with_torch_compile_equals_trainer_without(base, device, tmp_path):
    torch.compiler.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "inductor" if device == "cuda" else "aot_eager"}
    results = []
    for options in ({}, compiled):
        model = smt(base(device, num_hidden_layers=1), selection="gradient", scope="model", warmup_steps=3)
        results.append(run_trainer(model, device, tmp_path, bf16=True, **options))
    (eager, index), (losses, same_index) = results
    assert losses == pytest.approx(eager, rel=5e-2) and losses[-1] < losses[0]
    if device == "cpu":  # elsewhere bfloat16 is rounded at other places, and near ties go the other way
        assert torch.equal(index, same_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_trainer_warms_up_and_trains_in_bfloat16(base, device, tmp_path, dtype):
    model = smt(base(device, dtype=dtype), selection="gradient", scope="model", warmup_steps=3)
    losses, index = run_trainer(model, device, tmp_path, bf16=dtype == torch.float32)
    assert losses[-1] < losses[0] and bank(model).dtype == torch.float32
    assert len(index.unique(dim=0)) == len(bank(model)) and (bank(model).abs().amax((1, 2)) > 0).all()


# --- gradients ---------------------------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "autocast")
CASES = [
    *[(block_size, dtype, "none", "tiles") for block_size in (16, 64, 256) for dtype in DTYPES],
    *[(block_size, dtype, "none", "sorted") for block_size in (16, 48, 64) for dtype in DTYPES[:2]],
    (48, "bfloat16", "none", "tiles"),  # no power of two
    *[(64, dtype, mode, "tiles") for dtype in DTYPES for mode in ("non-reentrant", "reentrant")],
]


@pytest.mark.parametrize(("block_size", "dtype", "checkpointing", "arrangement"), CASES)
def test_gradients_equal_dense_autograd(base, device, block_size, dtype, checkpointing, arrangement):
    """Of the bank and of the model's input, beside a dense float32 model whose weights hold the deltas."""
    held = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    frozen = base(device, block_size, held)
    model = smt(deepcopy(frozen), block_size, init_weights=False, arrangement=arrangement)
    dense = dense_of(frozen.float(), model)
    ids = tokens(device)
    checkpoint(model, checkpointing)
    found = backward(model, ids, torch.bfloat16 if dtype == "autocast" else None)
    expected = backward(dense, ids)
    limit = LIMITS[torch.float32 if dtype == "float32" else torch.bfloat16]
    assert error(found, expected) < limit
    chosen = in_place(model, torch.ones_like(bank(model)))
    for name, gradient in in_place(model, bank(model).grad).items():
        truth = dense.get_submodule(name).weight.grad * chosen[name]
        assert 0 < chosen[name].mean() < 1 and error(gradient, truth) < limit, name


def test_tokens_that_one_axis_of_the_grid_does_not_hold(base, gpu, monkeypatch):
    """Their tiles go on along another; here from the third on, not from the 65,536th."""
    from smt_peft.ops import triton_kernels

    model = smt(base(gpu), init_weights=False)
    ids = tokens(gpu, batch=7)
    expected = backward(model, ids), bank(model).grad.clone()
    model.zero_grad()
    monkeypatch.setattr(triton_kernels, "_MOST_TILES", 2)
    assert error(backward(model, ids), expected[0]) < 1e-6 and error(bank(model).grad, expected[1]) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_equal_those_of_the_dequantised_model(base, device, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_module_weight
    from transformers import BitsAndBytesConfig

    base("cpu", 64).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    options = {"dtype": torch.float32, "device_map": {"": 0} if device == "cuda" else "cpu"}
    frozen = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, **options)
    dense = LlamaForCausalLM.from_pretrained(tmp_path, **options)
    layers = [name for name, _ in dense.named_modules() if name.rpartition(".")[2] in LINEAR]
    with torch.no_grad():
        for name in layers:
            dense.get_submodule(name).weight.copy_(dequantize_module_weight(frozen.get_submodule(name)))
    model = get_peft_model(frozen, SMTConfig(block_size=64, num_blocks=60, selection="random", scope="module",
                                             target_modules=LINEAR))  # fmt: skip
    ids, twin = tokens(device), smt(deepcopy(dense), 64, num_blocks=60)
    assert twin.peft_config["default"].selected_blocks == model.peft_config["default"].selected_blocks
    assert error(backward(model.train(), ids), backward(twin, ids)) < 0.1
    assert error(bank(model).grad, bank(twin).grad) < (1e-3 if bits == 4 else 0.1)  # 8 bits round activations, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
def test_scores_of_the_warm_up_are_means_of_dense_gradients(base, device, block_size, dtype):
    frozen = base(device, block_size, dtype)
    dense = deepcopy(frozen).float().requires_grad_()
    model = smt(frozen, block_size, selection="gradient", scope="model", warmup_steps=2)
    batches = [{"input_ids": ids, "labels": ids} for ids in (tokens(device), tokens(device, length=21))]
    selection = select_blocks(model, batches, progress_bar=False)
    expected = {}
    for batch in batches:
        dense.zero_grad()
        dense(**batch).loss.backward()
        for name in selection.names:
            gradient = dense.get_submodule(name).weight.grad.abs()
            means = gradient.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size)).mean((1, 3))
            expected[name] = expected.get(name, 0) + means / 2
    for name, scores in zip(selection.names, selection.scores, strict=True):
        assert error(scores.to(device), expected[name]) < LIMITS[dtype], name


def test_float16_trains_with_a_gradient_scaler(base, device):
    frozen = base(device, 64, torch.float16)
    model = smt(deepcopy(frozen), 64)
    dense = frozen.float().requires_grad_()  # the deltas are zero
    ids, scaler = tokens(device), torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer, losses = torch.optim.AdamW([bank(model)], lr=1e-2), []
    backward(dense, ids)
    chosen = in_place(model, torch.ones_like(bank(model)))
    for step in range(5):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for name, gradient in in_place(model, bank(model).grad).items() if step == 0 else ():
            assert error(gradient, dense.get_submodule(name).weight.grad * chosen[name]) < LIMITS[torch.float16], name
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and bank(model).isfinite().all()


# --- files and merging -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_reloaded_and_merged_adapter_computes_the_same(base, device, tmp_path, dtype):
    frozen = base(device, 64, dtype)
    untouched, ids = deepcopy(frozen), tokens(device)
    model = smt(frozen, 64)
    train(model, ids, 5)
    model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(deepcopy(untouched), tmp_path).eval()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(reloaded(ids).logits, expected)
        assert error(expected, untouched.eval()(ids).logits) > 0.1, "it has learnt something"
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, untouched(ids).logits)
        model.merge_adapter()
        assert error(model(ids).logits, expected) < LIMITS[dtype]
        model.unmerge_adapter()
        merged = reloaded.merge_and_unload()
        assert error(merged(ids).logits, expected) < LIMITS[dtype]
    for name, weight in model.unload().state_dict().items():
        assert torch.equal(weight, untouched.state_dict()[name]), name


# --- the host and the device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_the_host_never_waits_in_a_step(base, gpu, block_size, checkpointing):
    model, ids = smt(base(gpu, block_size, torch.bfloat16), block_size), tokens(gpu)
    checkpoint(model, checkpointing)
    optimizer = train(model, ids, 3, fused=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shared", [False, True], ids=["own weights", "shared weights"])
@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "two threads"])
def test_two_models_on_two_streams_compute_what_they_compute_alone(base, device, threads, shared):
    frozen = base(device, 64)
    weights = {id(p): p for p in frozen.parameters()} if shared else {}
    models = [smt(deepcopy(frozen, dict(weights)), 64, seed=seed, init_weights=False) for seed in (0, 1)]
    ids = [tokens(device), tokens(device, length=21)]
    expected = []
    for model, its_ids in zip(models, ids, strict=True):
        for _ in range(2):
            loss_of(model, its_ids).backward()
        expected.append(bank(model).grad.clone())
        bank(model).grad = None
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in models]
    if device == "cuda":
        torch.cuda.synchronize()

    def on_stream(number: int, action):
        with torch.cuda.stream(streams[number]):  # does nothing where the stream is None
            return action()

    def run(number: int) -> None:
        for _ in range(2):
            on_stream(number, lambda: loss_of(models[number], ids[number]).backward())

    if threads:
        workers = [threading.Thread(target=run, args=[number]) for number in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    else:
        for _ in range(2):
            losses = [on_stream(number, lambda n=number: loss_of(models[n], ids[n])) for number in (0, 1)]
            for number in (1, 0):
                on_stream(number, losses[number].backward)
    if device == "cuda":
        torch.cuda.synchronize()
    for model, gradient in zip(models, expected, strict=True):
        assert error(bank(model).grad, gradient) < 1e-5


@pytest.mark.parametrize("method", ["lora", "tiles", "sorted"])
def test_a_captured_step_replays_as_eager_steps(base, gpu, method):
    """Forward, backward and AdamW in one CUDA graph, after a step on another stream; LoRA shows what is PyTorch's and
    transformers' part in it."""
    frozen, ids = base(gpu, 64, torch.bfloat16), tokens(gpu)
    if method == "lora":
        torch.manual_seed(0)
        model = get_peft_model(frozen, LoraConfig(r=8, target_modules=LINEAR)).train()
    else:
        model = smt(frozen, 64, arrangement=method)
    eager = deepcopy(model)
    options = {"fused": True, "capturable": True}
    for one in (eager, model):
        train(one, ids, 1, **options)
    train(eager, ids, 3 + 4, **options)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer = train(model, ids, 3, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loss_of(model, ids).backward()
            optimizer.step()
    except BaseException:
        torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails stays on its own
        raise
    for _ in range(4):
        graph.replay()
    torch.cuda.synchronize()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trained:
        assert error(parameter, eager.get_parameter(name)) < 2e-2, name
