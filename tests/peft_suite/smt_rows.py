"""Pytest plugin: PEFT's own test suite, with rows for SMT in place of its rows for every other method.

PEFT's parametrised tests take their rows from lists at the top of each file. Here each list is swapped for the SMT
rows of the same shape, and every test without an SMT row is left out. Run by ../test_peft_suite.py.
"""

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import save_tiny_models

from smt_peft import SMTConfig

# Rules that need no data: PEFT's tests know no warm-up.
RANDOM = {"selection": "random", "num_blocks": 10}
DIAGONAL = {"selection": "diagonal", "num_blocks": 5}
BY_SIZE = {"selection": "magnitude", "scope": "module", "trainable_ratio": 0.03}

CUSTOM_MODELS = [
    (f"{name} SMT", model, SMTConfig, options)
    for name, model, options in [
        ("MLP one target", "MLP", {**RANDOM, "target_modules": "lin0"}),
        ("MLP two targets", "MLP", {**RANDOM, "target_modules": ["lin0", "lin1"]}),
        ("MLP ratio", "MLP", {"selection": "random", "trainable_ratio": 0.3, "target_modules": ["lin0", "lin1"]}),
        ("MLP diagonal", "MLP", {**DIAGONAL, "target_modules": ["lin0"]}),
        ("MLP magnitude", "MLP", {"selection": "magnitude", "num_blocks": 10, "target_modules": ["lin0", "lin1"]}),
        ("MLP per module", "MLP", {**RANDOM, "scope": "module", "target_modules": ["lin0", "lin1"]}),
        (
            "MLP own budgets",
            "MLP",
            {**RANDOM, "num_blocks_pattern": {"lin1": 4}, "target_modules": ["lin0", "lin1"]},
        ),
        ("MLP all blocks", "MLP", {"selection": "random", "num_blocks": 10, "target_modules": ["lin1"]}),
        ("MLP large blocks", "MLP", {**DIAGONAL, "num_blocks": 1, "block_size": 10, "target_modules": ["lin0"]}),
        ("MLP given blocks", "MLP", {"selected_blocks": {"lin0": [[0, 0], [9, 4]]}, "target_modules": ["lin0"]}),
        ("MLP modules_to_save", "MLP", {**RANDOM, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("Embedding and Conv1D", "EmbConv1D", {**RANDOM, "num_blocks": 3, "target_modules": ["conv1d", "lin0"]}),
        ("Conv2d beside a Linear", "Conv2d", {**DIAGONAL, "num_blocks": 1, "target_modules": ["lin0"]}),
    ]
]


def _two_adapters(first: list[str], second: list[str]) -> list[dict]:
    """Arguments of two adapters with blocks of their own."""
    options = {**RANDOM, "init_weights": False}
    return [{**options, "target_modules": first}, {**options, "target_modules": second, "seed": 1}]


def _transformers_rows(task_type: str, *more: dict) -> list[tuple]:
    return [
        (SMTConfig, {"task_type": task_type, "target_modules": None, "block_size": 8, **options})
        for options in ({**RANDOM, "num_blocks": 30}, *more)
    ]


ROWS = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM_MODELS,
        "ALL_PEFT_CONFIG_CLASSES": [SMTConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            ("SMT same", "smt", SMTConfig, *_two_adapters(["lin0"], ["lin0"])),
            ("SMT different", "smt", SMTConfig, *_two_adapters(["lin0"], ["lin1"])),
            ("SMT overlapping", "smt", SMTConfig, *_two_adapters(["lin0"], ["lin0", "lin1"])),
        ],
        "MIXED_ADAPTER_TEST_CASES": [
            ("SMT same", *(SMTConfig(**options) for options in _two_adapters(["lin0"], ["lin0"]))),
            ("SMT overlapping", *(SMTConfig(**options) for options in _two_adapters(["lin0"], ["lin0", "lin1"]))),
        ],
    },
    "test_decoder_models": {"ALL_CONFIGS": _transformers_rows("CAUSAL_LM")},
    "test_encoder_decoder_models": {"ALL_CONFIGS": _transformers_rows("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": _transformers_rows("FEATURE_EXTRACTION", BY_SIZE)},
    "test_seq_classifier": {"ALL_CONFIGS": _transformers_rows("SEQ_CLS")},
    "test_config": {"ALL_CONFIG_CLASSES": [(SMTConfig, {})], "LAYER_INDEXING_CONFIG_CLASSES": [(SMTConfig, {})]},
}

# Tests whose assumption does not hold for SMT: a regular expression for their names -> why. They must fail (xfail,
# strict), so that no entry outlives its reason.
NOT_APPLICABLE = {
    r"test_adapter_dtype_autocast\[(True|False)-False-dtype[01]-": "the delta is float32 whatever the base's dtype",
    r"test_add_adapter_no_autocast_adapter_dtype\[(?!dtype0-.*T5)": "the delta is float32 whatever the base's dtype",
    r"test_training.*_layer_indexing\[": "counts tensors; the bank is one tensor for any number of layers",
    r"test_from_pretrained_config_construction\[": "wants the user's config object itself; SMT resolves a copy of it",
    r"test_lora_conversion\[.*OPT": "looks for a name in the config's target_modules, which are left to the defaults",
}


def pytest_configure() -> None:
    """Put tiny models where the tests look for hub models."""
    save_tiny_models(Path.cwd())
    with _diffusers_or_stub():
        importlib.import_module("tests.testing_common")


@contextlib.contextmanager
def _diffusers_or_stub() -> Iterator[None]:
    """Stand in for diffusers where it is missing: of it, the tests only need the name of one class."""
    if importlib.util.find_spec("diffusers") is not None:
        yield
        return
    stub = sys.modules["diffusers"] = ModuleType("diffusers")
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    yield
    del sys.modules["diffusers"]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Swap the lists of rows."""
    module, original = metafunc.module, metafunc.parametrize
    rows = {id(getattr(module, name)): rows for name, rows in ROWS[module.__name__.split(".")[-1]].items()}

    def parametrize(argnames, argvalues, *args, **options):
        original(argnames, rows.get(id(argvalues), argvalues), *args, **options)

    metafunc.parametrize = parametrize


@pytest.fixture(autouse=True)
def _do_not_skip_what_smt_can(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's tests name the methods that can do a thing, and skip all others."""
    common = sys.modules["tests.testing_common"]
    monkeypatch.setattr(common, "_skip_if_conv1d_not_supported", lambda *_: None)
    # Meant for BEFT, this one skips models without biases for every method.
    monkeypatch.setattr(request.module, "check_beft_config", lambda *_: None, raising=False)
    if "mixed_adapter_batches" in request.node.name:
        for module in (common, request.module):
            monkeypatch.setattr(module, "LoraConfig", SMTConfig)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests with an SMT row, and expect those to fail that cannot hold for SMT."""
    items[:] = [item for item in items if _is_for_smt(item)]
    for item in items:
        for name, reason in NOT_APPLICABLE.items():
            if re.match(name, item.name):
                item.add_marker(pytest.mark.xfail(raises=(AssertionError, TypeError), strict=True, reason=reason))


def _is_for_smt(item: pytest.Item) -> bool:
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is SMTConfig or isinstance(value, SMTConfig) for value in values)
