"""What a training step costs beside the floor: FLOPs, bytes saved for backward, operators, host syncs.

The floor is the same model, frozen, with gradients flowing down to the outputs of the lowest trained layers: no method
that trains inside the layers can be cheaper. All figures here are counted, not timed: the same on every machine.
"""

import contextlib
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from smt_peft import SMTConfig, select_blocks
from smt_peft.layer import Linear

BLOCK = 16
TARGETS = ["q_proj", "k_proj", "v_proj"]
ARRANGEMENTS = pytest.mark.parametrize("arrangement", ["tiles", "sorted"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EVEN = {"selection": "random", "scope": "module"}
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}


def adapt(llama, num_blocks=20, block_size=BLOCK, **config):
    """Train `num_blocks` random blocks of a LLaMA, or the `selected_blocks`."""
    if "selected_blocks" not in config:
        config = {"num_blocks": num_blocks, "selection": "random", **config}
    return get_peft_model(llama, SMTConfig(block_size=block_size, **config)).train()


def chosen(model) -> dict[str, list[list[int]]]:
    return model.base_model.model.smt_bank["default"].selected_blocks()


@contextlib.contextmanager
def floor_of(model, trained=None):
    """The floor of an adapted model: adapters taken off, gradients down to the outputs of the trained layers."""
    trained = trained or chosen(model)
    base = model.unload().requires_grad_(False).train()
    layers = [module for name, module in base.named_modules() if name in trained]
    hooks = [layer.register_forward_hook(_require_gradient) for layer in layers]
    yield base
    for hook in hooks:
        hook.remove()


def _require_gradient(module, args, output):
    return output if output.requires_grad else output.requires_grad_()


def loss_of(model, batch):
    return model(**batch, use_cache=False).loss


def flops(model, batch) -> int:
    loss_of(model, batch).backward()  # once, so that only what every step does is counted
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch).backward()
    return counter.get_total_flops()


def saved_bytes(model, batch, loss=loss_of) -> int:
    """Bytes of the distinct storages, other than parameters, that the graph of a forward keeps alive."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address is used twice
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, batch)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


def column_bytes(model, tokens, itemsize, block_size=BLOCK) -> int:
    """Bytes of the input columns that each layer's blocks read, or where q, k and v of one layer read as much as their
    input has or more, of this input, once for all three."""
    read: dict[str, list[int]] = {}
    for name, places in chosen(model).items():
        read.setdefault(name.rpartition(".")[0], []).append(len({str(column) for _, column in places}))
    total = model.config.hidden_size // block_size
    return sum(min(sum(columns), total) for columns in read.values()) * block_size * tokens * itemsize


class Operators(TorchDispatchMode):
    """Lists what is launched: the operators that do more than make a view."""

    def __init__(self):
        super().__init__()
        self.launched: list[str] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # it keeps nothing, so that what is changed in place may be

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.launched.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(function, *args) -> list[str]:
    with Operators() as seen:
        function(*args)
    return seen.launched


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("ratio", [0.001, 0.0086, 0.05])
@ARRANGEMENTS
def test_a_step_costs_the_floor_plus_three_products_with_each_block(
    make_llama, batches, arrangement, ratio, block_size
):
    """Forward, gradient of the input, gradient of the block; the lowest layer's input needs no gradient."""
    llama = make_llama(**WIDE)
    num_blocks = max(1, round(ratio * sum(p.numel() for p in llama.parameters()) / block_size**2))
    model = adapt(llama, num_blocks, block_size, arrangement=arrangement)
    measured = flops(model, batches[0])
    products = sum((2 if ".layers.0." in name else 3) * len(places) for name, places in chosen(model).items())
    with floor_of(model) as floor:
        exact = flops(floor, batches[0]) + 2 * batches[0]["input_ids"].numel() * products * block_size**2
    assert measured == exact


@pytest.mark.parametrize("num_blocks", [1, 5, 20, 64])
@DTYPES
@ARRANGEMENTS
def test_backward_keeps_the_columns_that_are_read_or_the_input_once(
    make_llama, batches, arrangement, dtype, num_blocks
):
    model = adapt(make_llama().to(dtype), num_blocks, arrangement=arrangement)
    expected = column_bytes(model, batches[0]["input_ids"].numel(), dtype.itemsize)
    measured = saved_bytes(model, batches[0])
    with floor_of(model) as floor:
        assert measured <= saved_bytes(floor, batches[0]) + expected


def test_autocast_keeps_the_selected_columns_in_its_own_dtype(llama, batches):
    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)

    model = adapt(llama, num_blocks=5)
    expected = column_bytes(model, batches[0]["input_ids"].numel(), 2)
    measured = saved_bytes(model, batches[0], loss)
    with floor_of(model) as floor:
        assert measured <= saved_bytes(floor, batches[0], loss) + expected


@pytest.mark.parametrize("names", ["q_proj v_proj", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"])
@DTYPES
@ARRANGEMENTS
def test_backward_keeps_no_more_than_loras_at_equal_parameters(make_llama, batches, arrangement, dtype, names):
    targets = {"target_modules": names.split()}
    num_blocks = {2: 14, 7: 58}[len(names.split())]
    ours = SMTConfig(block_size=BLOCK, num_blocks=num_blocks, arrangement=arrangement, **targets, **EVEN)
    configs = LoraConfig(r=8, **targets), ours
    trained, saved = [], []
    for config in configs:
        model = get_peft_model(make_llama().to(dtype), config, autocast_adapter_dtype=False).train()
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        saved.append(saved_bytes(model, batches[0]))
    lora, smt = saved
    assert trained[0] == trained[1] and smt <= lora


def test_layers_without_blocks_keep_nothing(llama, batches):
    """One block in the last layer: neither the layers below nor q and k beside it cost a byte."""
    model = adapt(llama, selected_blocks={"model.layers.1.self_attn.v_proj": [[0, 0]]}, target_modules=TARGETS)
    measured = saved_bytes(model, batches[0])
    with floor_of(model) as floor:
        assert measured == saved_bytes(floor, batches[0]) + batches[0]["input_ids"].numel() * BLOCK * 4


def test_q_k_and_v_share_their_input_where_they_read_as_much_as_it_has(make_llama, batches):
    def cost(columns, *names):
        blocks = {f"model.layers.0.self_attn.{name}": [[0, column] for column in columns] for name in names}
        model = adapt(make_llama(), selected_blocks=blocks, target_modules=TARGETS)
        measured = saved_bytes(model, batches[0])
        with floor_of(model) as floor:
            return measured - saved_bytes(floor, batches[0])

    column = batches[0]["input_ids"].numel() * BLOCK * 4
    assert cost([1], *TARGETS) == 3 * column
    assert cost([1, 2], *TARGETS) == cost([0, 1, 2, 3], *TARGETS) == 4 * column


def test_warmup_keeps_each_input_once(llama, batches):
    config = SMTConfig(block_size=BLOCK, num_blocks=4, warmup_steps=1, target_modules=TARGETS)
    model, measured = get_peft_model(llama, config), []

    def loss(model, batch):
        measured.append(saved_bytes(model, batch))
        return loss_of(model, batch)

    select_blocks(model, batches, loss_function=loss, progress_bar=False)
    targets = [name for name, module in llama.named_modules() if isinstance(module, Linear)]
    inputs = llama.config.num_hidden_layers * batches[0]["input_ids"].numel() * llama.config.hidden_size * 4
    with floor_of(model, targets) as floor:
        assert measured[0] <= saved_bytes(floor, batches[0]) + inputs


@pytest.mark.parametrize("grad", [True, False])
def test_layers_without_blocks_launch_what_the_base_model_does(llama, batches, grad):
    model = adapt(llama, selected_blocks={"model.layers.1.self_attn.v_proj": [[0, 0]]}, target_modules=TARGETS)
    first = model.base_model.model.model.layers[0]
    hidden, position = torch.randn(2, 8, 64), llama.model.rotary_emb(torch.randn(2, 8, 64), torch.arange(8)[None])
    with torch.set_grad_enabled(grad):
        adapted = operators(lambda: first(hidden, position_embeddings=position))
        model.unload()
        assert adapted == operators(lambda: first(hidden, position_embeddings=position))


class Siblings(nn.Module):
    """Layers that read one input, not all in every forward, and whose outputs are changed in place."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(64, 32, bias=name != "b", dtype=torch.float64) for name in "abc"})

    def read(self, x, names):
        return sum(self.layers[name](x).clamp_(-1, 1).mul_(0.5) for name in names)

    def forward(self, x, names, checkpointed):
        return checkpoint(self.read, x, names, use_reentrant=False) if checkpointed else self.read(x, names)


@pytest.mark.parametrize("adapters", [["default"], ["default", "other"]], ids=len)
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("x_has_gradient", [True, False])
def test_gradients_are_right_whoever_reads_an_input_beside_whom(checkpointed, x_has_gradient, adapters):
    """With a bias that is trained, one that is not, and two forwards before each backward."""
    torch.manual_seed(0)
    dense = Siblings()
    config = {"block_size": 8, "selection": "random", "target_modules": ["a", "b", "c"], "init_weights": False}
    model = get_peft_model(deepcopy(dense), SMTConfig(num_blocks=20, **config))
    model.add_adapter("other", SMTConfig(num_blocks=30, seed=1, **config))
    model.base_model.set_adapter(adapters)
    banks, linears = [model.base_model.model.smt_bank[name] for name in adapters], list(dense.layers.values())
    layers = list(model.base_model.model.layers.values())
    layers[0].bias.requires_grad_()
    for layer, linear in zip(layers, linears, strict=True):
        linear.weight.data += sum(layer.get_delta_weight(name) for name in adapters)
    for names in ("ab", "ab", "abc", "abc", "a", "ca", "ab"):  # each time twice, for two inputs
        for one in (model, dense):
            one.zero_grad(set_to_none=False)
            inputs = [torch.linspace(-end, end, 640).double().view(2, 5, 64) for end in (1, 2)]
            outputs = [one(x.requires_grad_(x_has_gradient), names, checkpointed) for x in inputs]
            sum(y.square().sum() for y in outputs).backward()
        torch.testing.assert_close(layers[0].bias.grad, linears[0].bias.grad)
        for bank in banks:
            for gradient, (target, row, col) in zip(bank.weight.grad, bank.index.tolist(), strict=True):
                expected = linears[target].weight.grad
                expected = 0 if expected is None else expected.unfold(0, 8, 8).unfold(1, 8, 8)[row, col].float()
                torch.testing.assert_close(gradient, gradient * 0 + expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("x_has_gradient", [True, False])
def test_the_gradient_of_an_input_that_needs_none_is_not_computed(x_has_gradient):
    """Nor for layers beside it, though they have blocks. As LoRA; the matmul for it would be the whole weight's."""
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 32)})
    model.forward = lambda x: (model["a"](x) * model["b"](x)).sum()
    selected = {"a": [[0, 0]], "b": [[1, 0], [1, 3]]}
    adapted = get_peft_model(model, SMTConfig(block_size=16, selected_blocks=selected, target_modules=["a", "b"]))
    x = torch.randn(10, 64, requires_grad=x_has_gradient)
    with FlopCounterMode(display=False) as counter:
        adapted(x).backward()
    dense = 2 * 10 * 64 * 32 * 2  # one matmul with each weight
    assert counter.get_total_flops() == dense * (1 + x_has_gradient) + 2 * 10 * 3 * 16**2 * (2 + x_has_gradient)


class Synchronisations(TorchFunctionMode):
    """Lists the Python calls that make the host wait for a GPU: values read back, or sent over in between."""

    NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "tensor")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.NAMES or (name == "to" and any(isinstance(a, str) for a in args)):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def synchronisations(model, batches, optimizer=None) -> list[str]:
    """Those of the fourth step: the first three plan. (transformers has some of its own.)"""
    with contextlib.ExitStack() as watch:
        for number, batch in enumerate(batches):
            if number == 3:
                waits, launched = watch.enter_context(Synchronisations()), watch.enter_context(Operators())
            loss_of(model, batch).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
    reads = ("aten._local_scalar_dense", "aten.nonzero")  # what is behind such calls, also in C++
    return waits.seen + [name for name in launched.launched if name.startswith(reads)]


def test_a_step_waits_for_the_device_no_more_than_the_floor_does(llama, batches):
    model = adapt(llama)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    adapted = synchronisations(model, batches, optimizer)
    with floor_of(model) as floor:
        assert adapted == synchronisations(floor, batches)


def test_an_index_that_is_written_anew_keeps_its_plans(llama):
    """As DDP of PyTorch 2.7 does with every buffer at every forward; other values need other plans."""
    bank = adapt(llama).base_model.model.smt_bank["default"]
    target = int(bank.index[0, 0])
    plan = bank.plan(target, bank.index.device)
    bank.index.copy_(bank.index.clone())
    assert bank.plan(target, bank.index.device) is plan
    other = bank.index.clone()
    other[0, 1:] = next(
        torch.tensor([row, col])
        for row in range(bank.targets[target].rows)
        for col in range(bank.targets[target].cols)
        if not (bank.index == torch.tensor([target, row, col])).all(1).any()
    )
    bank.index.copy_(other)
    assert bank.plan(target, bank.index.device) is not plan
