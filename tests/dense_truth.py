"""The dense truth that an adapter is compared with: the plain model whose target weights hold base and deltas.

LoRA is the control. What it cannot pass is no fair test of an adapter, so most tests run with both methods.
"""

from copy import deepcopy

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_peft import SMTConfig

METHODS = ["lora", "smt", "sorted"]  # the last is SMT with arrangement="sorted"
QKV = ["q_proj", "k_proj", "v_proj"]
SCORES = {  # of blocks of a gradient, [block rows, b, block columns, b]
    "abs_mean": lambda g: g.abs().mean((1, 3)),
    "mean_abs": lambda g: g.mean((1, 3)).abs(),
    "l1": lambda g: g.abs().sum((1, 3)),
    "l2": lambda g: g.square().sum((1, 3)).sqrt(),
}


def make_config(method: str = "smt", budget: int = 20, **options) -> PeftConfig:
    """An adapter whose delta is not zero from the start; `budget` is in blocks of 16, five of them for a rank."""
    if method == "lora":
        rank = max(1, budget // 5)
        defaults = {"target_modules": QKV, "r": rank, "lora_alpha": 2 * rank, "init_lora_weights": False}
        ours = {"block_size", "seed", "scope", "selection", "arrangement"}
        return LoraConfig(**{**defaults, **{name: value for name, value in options.items() if name not in ours}})
    defaults = {"target_modules": QKV, "block_size": 16, "selection": "random", "init_weights": False}
    arrangement = "sorted" if method == "sorted" else "tiles"
    return SMTConfig(**{**defaults, "arrangement": arrangement, "num_blocks": budget, **options})


def wrap(base: nn.Module, method: str = "smt", adapter_name: str = "default", **options) -> PeftModel:
    """Put an adapter into a copy of the base model, so that the base is there to compare with."""
    torch.manual_seed(1)
    return get_peft_model(deepcopy(base), make_config(method, **options), adapter_name).to(dtype_of(base)).train()


def add_adapter(model: PeftModel, name: str, **options) -> None:
    """Add an adapter of the model's own method, that of the first adapter unless told otherwise."""
    config = model.peft_config[model.active_adapter]
    method = "lora" if config.peft_type == "LORA" else {"tiles": "smt", "sorted": "sorted"}[config.arrangement]
    model.add_adapter(name, make_config(method, **options))
    model.to(dtype_of(model))


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


CHECKPOINTING = ["off", "non-reentrant", "reentrant"]


def enable_checkpointing(mode: str, *models: nn.Module) -> None:
    for model in models if mode != "off" else ():
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()


def layers_of(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that stand in for target modules, by the name of what they replace."""
    root = model.base_model.model if isinstance(model, PeftModel) else model
    layers = {name: module for name, module in root.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: layer for name, layer in layers.items() if not isinstance(layer, TrainableTokensLayer)}


def bank_of(model: nn.Module, adapter: str = "default") -> nn.Module:
    root = model.base_model.model if isinstance(model, PeftModel) else model
    return root.smt_bank[adapter]


def is_smt(model: nn.Module) -> bool:
    root = model.base_model.model if isinstance(model, PeftModel) else model
    return hasattr(root, "smt_bank")


def in_place(model: nn.Module, blocks: torch.Tensor, adapter: str = "default") -> dict[str, torch.Tensor]:
    """A tensor like the bank's, scattered into matrices of the target weights' shapes."""
    bank, layers = bank_of(model, adapter), layers_of(model)
    size, index = bank.block_size, bank.index.tolist()
    matrices = {name: blocks.new_zeros(layer.out_features, layer.in_features) for name, layer in layers.items()}
    for block, (target, *place) in zip(blocks.detach(), index, strict=True):
        if len(place) == 2:
            rows, cols = (range(at * size, (at + 1) * size) for at in place)
        else:
            rows, cols = place[:size], place[size:]
        matrices[bank.targets[target].name][torch.tensor(rows)[:, None], torch.tensor(cols)] = block
    return {name: as_stored(matrix, layers[name]) for name, matrix in matrices.items()}


def as_stored(matrix: torch.Tensor, layer: BaseTunerLayer) -> torch.Tensor:
    """[out, in] as the base layer holds it, and back."""
    return matrix.T if isinstance(layer.get_base_layer(), Conv1D) else matrix


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight for name, layer in layers_of(model).items()}


@torch.no_grad()
def deltas_of(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The delta of every target that has the adapter, from the adapter's parameters alone."""
    if is_smt(model):
        return in_place(model, bank_of(model, adapter).weight, adapter)
    layers = {name: layer for name, layer in layers_of(model).items() if adapter in layer.lora_A}
    return {
        name: as_stored(layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter], layer)
        for name, layer in layers.items()
    }


def dense_of(base: nn.Module, model: nn.Module, *adapters: str) -> nn.Module:
    """A plain copy of the base whose target weights hold the deltas, and are trainable."""
    dense = deepcopy(base).requires_grad_(False)
    for adapter in adapters or ("default",):
        for name, delta in deltas_of(model, adapter).items():
            weight = dense.get_submodule(name).weight.requires_grad_()
            weight.data += delta.to(weight)
    return dense.train()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Close for float64; a block that is left out or taken twice is off by far more."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8, check_dtype=False)


def assert_same_gradients(model: nn.Module, dense: nn.Module, adapter: str = "default") -> None:
    """The adapter's gradient is the full weight's, at its blocks, or by the chain rule through LoRA's factors."""
    compared = 0
    for name, full in gradients_of(dense).items():
        if name not in layers_of(model):
            continue
        layer = layers_of(model)[name]
        if is_smt(model):
            bank = bank_of(model, adapter)
            found, mask = (in_place(model, of, adapter)[name] for of in (bank.weight.grad, bank.weight * 0 + 1))
            assert_close(found, full * mask)
            compared += int(mask.any() and full.any())
        elif adapter in layer.lora_A:
            a, b, scale = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
            full = as_stored(full, layer)
            assert_close(filled(a), scale * b.T @ full)
            assert_close(filled(b), scale * full @ a.T)
            compared += int(full.any())
    assert compared, "nothing was compared"


def assert_right(model: PeftModel, base: nn.Module, batch: dict[str, torch.Tensor], adapter: str = "default") -> None:
    """Outputs and gradients are those of base and delta, and the delta is not zero."""
    assert any(delta.any() for delta in deltas_of(model, adapter).values()), "the delta is zero"
    model.zero_grad()
    dense = dense_of(base, model, adapter)
    assert_close(outputs(model, batch), outputs(dense, batch))
    model.train()(**batch).loss.backward()
    dense(**batch).loss.backward()
    assert_same_gradients(model, dense, adapter)
    model.zero_grad()


def state_of(model: nn.Module) -> dict[str, object]:
    """What a user could notice a change in."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return {"flags": flags, "values": values, "modules": [name for name, _ in model.named_modules()]}


def assert_same_state(found: dict[str, object], expected: dict[str, object]) -> None:
    appeared = set(found["modules"]) ^ set(expected["modules"])
    assert found["modules"] == expected["modules"], f"modules that came or went: {sorted(appeared)}"
    moved = {name for name, _ in set(found["flags"].items()) ^ set(expected["flags"].items())}
    assert not moved, f"parameters that came, went or changed requires_grad: {sorted(moved)}"
    entries = set(found["values"]) ^ set(expected["values"])
    assert not entries, f"state that came or went: {sorted(entries)}"
    for name, value in expected["values"].items():
        assert torch.equal(found["values"][name], value), f"{name} has changed"


def filled(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def gradients_of(dense: nn.Module) -> dict[str, torch.Tensor]:
    """Of every trainable weight, by the name of its module; zero where nothing came."""
    weights = {name: module.weight for name, module in dense.named_modules() if hasattr(module, "weight")}
    return {name: filled(weight) for name, weight in weights.items() if weight.requires_grad}


def assert_base_untouched(model: nn.Module, base: nn.Module) -> None:
    """Every weight of the base is there bit for bit, in the layers and in all other modules."""
    found = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    for name, weight in base.named_parameters():
        assert torch.equal(found[prefix + name], weight), f"{name} is not the base's"


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits in eval mode; the model is left in the mode it was in."""
    mode = model.training
    logits = model.eval()(input_ids=batch["input_ids"]).logits
    model.train(mode)
    return logits


def train(model: nn.Module, batches: list[dict[str, torch.Tensor]], steps: int = 2, rate: float = 0.05) -> None:
    """Plain gradient descent."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def with_everything_trainable(model: PeftModel) -> PeftModel:
    """All adapters trainable, whichever is active: PEFT freezes one when it activates another."""
    for name, parameter in model.named_parameters():
        if f".{model.base_model.prefix}" in name:
            parameter.requires_grad_(True)
    return model


def dense_gradients(base, names, batches) -> list[dict[str, torch.Tensor]]:
    """Per batch, the gradient of each target's full weight."""
    dense, found = deepcopy(base).train().requires_grad_(), []
    for batch in batches:
        dense.zero_grad()
        dense(**batch).loss.backward()
        found.append({name: dense.get_submodule(name).weight.grad for name in names})
    return found
