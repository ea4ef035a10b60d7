"""What only the Triton kernels can get wrong; `test_ops.py` compares their results.

Both run natively on CUDA. Elsewhere a process of its own runs them in Triton's interpreter, which must be switched on
before anything imports triton. How compiled kernels are launched again is tested without any, on the CPU.
"""

import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smt_peft import ops
from smt_peft.ops import reference

pytest.importorskip("triton")
NATIVE = torch.cuda.is_available()
RUNS_HERE = NATIVE or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if NATIVE else "cpu"
here = pytest.mark.skipif(not RUNS_HERE, reason="runs in the process of test_in_the_interpreter")
compiling = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_in_the_interpreter():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"]
    command += [folder / "test_ops.py", __file__]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]


@pytest.fixture
def kernels(monkeypatch):
    from smt_peft.ops import triton_kernels

    monkeypatch.setattr(triton_kernels, "_ready", {})  # else what one test has made ready runs in the next
    monkeypatch.setattr(triton_kernels, "_tuned_adds", set())
    return triton_kernels


class Watch(TorchDispatchMode):
    """Fills uninitialised memory with NaN, and fails where the host would wait for the device."""

    SYNCHRONOUS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.SYNCHRONOUS), f"{name} waits for the device"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask waits"
        result = func(*args, **(kwargs or {}))
        if name in ("empty", "new_empty", "empty_like", "empty_strided") and result.is_floating_point():
            result.fill_(float("nan"))
        return result


def watched(function, *args):
    if NATIVE:
        function(*args)  # tuning waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Watch(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", None)  # does not pass the dispatcher
            return function(*args)
    finally:
        if NATIVE:
            torch.cuda.set_sync_debug_mode("default")


def lists_of(side, block_size, lines):
    """The same blocks on features at random."""
    features = torch.randperm(lines * block_size, generator=torch.Generator().manual_seed(lines)).to(DEVICE)
    at = features.view(lines, block_size)[side.at]
    return side._replace(at=at, place=side.member, features=at[side.member].flatten())


def features_of(side, block_size):
    """[n, b]: the features of each block."""
    at = side.at if side.at.ndim == 2 else side.at[:, None] * block_size + torch.arange(block_size, device=DEVICE)
    return at[side.member]


def check(kernels, block_size, grid, tokens, dtype=torch.float32, lists=False):
    """All operations against dense float64 ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, size * block_size) for size in grid]
    dy, x = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    # The last block row is empty; the first has the most blocks, two of them at one place.
    rows, cols = torch.tensor([0, max(grid[0] - 2, 0), 0, 0]), torch.tensor([0, grid[1] - 1, 0, 1])
    out, inner = ops.plan(rows, cols, keep_input=True, device=DEVICE)[:2]
    if lists:
        out, inner = (lists_of(side, block_size, size) for side, size in zip((out, inner), grid, strict=True))
    place = features_of(out, block_size)[:, :, None], features_of(inner, block_size)[:, None, :]
    dense = dy.double().T @ x.double()
    for side in (out, inner):
        lines = features_of(side._replace(member=torch.arange(len(side.at))), block_size).flatten()
        matrix = dy if side is out else x
        assert torch.equal(watched(kernels.gather, matrix, side.at, block_size), matrix[:, lines])
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * (1 + tokens) ** 0.5, "check_dtype": False}
    narrow = {"rtol": 2e-2 if dtype != torch.float32 else 1e-4, "atol": 1e-2, "check_dtype": False}

    gradient = watched(kernels.block_grad, dy, x, out, inner, block_size)
    torch.testing.assert_close(gradient, dense[place], **tolerance)

    delta = torch.randn(4, block_size, block_size, device=DEVICE).to(dtype).float()
    weight = torch.zeros_like(dense).index_put(place, delta.double(), accumulate=True)
    y = watched(lambda: (sums := dy.clone(), kernels.block_add_(sums, x, delta, out, inner))[0])
    torch.testing.assert_close(y, dy.double() + x.double() @ weight.T, **narrow)
    untouched = torch.ones(dy.shape[1], dtype=torch.bool, device=DEVICE)
    untouched[place[0].flatten()] = False
    assert torch.equal(y[:, untouched], dy[:, untouched])
    dx = watched(lambda: (sums := torch.zeros_like(x), kernels.block_add_(sums, dy, delta.mT, inner, out))[0])
    torch.testing.assert_close(dx, dy.double() @ weight, **narrow)

    for score in ops.SCORES:
        scores = watched(kernels.block_scores, dy, x, block_size, score)
        torch.testing.assert_close(scores, ops.reduce_blocks(dense, block_size, score), **tolerance)


@here
@pytest.mark.parametrize(("block_size", "tokens"), [(16, 20), (48, 5), (128, 9), (160, 20)])
@pytest.mark.parametrize("lists", [False, True])
def test_every_element_is_written_and_nothing_waits(kernels, block_size, tokens, lists):
    check(kernels, block_size, (3, 2), tokens, lists=lists)


@here
@pytest.mark.parametrize("config", range(4))
@pytest.mark.parametrize(
    ("block_size", "lists", "rounded"), [(16, True, False), (96, False, True), (256, False, False)]
)
def test_every_tuning_choice_computes_the_same(kernels, monkeypatch, config, block_size, lists, rounded):
    monkeypatch.setattr(kernels, "_CAST_PRODUCTS", 0 if rounded else 1 << 62)
    for kernel, configs in [
        (kernels._block_add_kernel, kernels._ADD_CONFIGS),
        (kernels._block_grad_kernel, kernels._GRAD_CONFIGS),
        (kernels._block_scores_kernel, kernels._SCORE_CONFIGS),
    ]:
        rows, cols, step, warps, stages = configs[config]
        shape = {"ROWS": rows, "COLS": cols, "STEP": step}
        choice = kernels.triton.Config(shape, num_warps=warps, num_stages=stages)
        monkeypatch.setattr(kernel, "configs", [choice])
    check(kernels, block_size, (2, 3), 70, torch.float16, lists)


@here
@pytest.mark.parametrize("tuned", [False, True])
def test_rounding_deltas_once_changes_nothing(kernels, monkeypatch, tuned):
    if tuned:  # also for each dtype of deltas apart
        choose_of_two(kernels, monkeypatch)
    side = ops.plan(torch.tensor([0]), torch.tensor([0]), keep_input=True).out
    side = side._replace(**{name: tensor.to(DEVICE) for name, tensor in side._asdict().items()})
    x, delta = torch.randn(20, 16, device=DEVICE).half(), torch.randn(1, 16, 16, device=DEVICE)
    results = []
    for products in (0, 1 << 62):
        monkeypatch.setattr(kernels, "_CAST_PRODUCTS", products)
        results.append(torch.zeros(20, 16, device=DEVICE))
        kernels.block_add_(results[-1], x, delta, side, side)
    assert torch.equal(*results)


@here
@pytest.mark.parametrize(("tokens", "split_tokens"), [(70, 16), (5, 1), (64, 16)])
def test_tokens_are_split_without_loss(kernels, monkeypatch, tokens, split_tokens):
    """Ragged runs, and at 5 tokens for 4 programs an empty one."""
    monkeypatch.setattr(kernels, "_SPLIT_TOKENS", split_tokens)
    launch, splits = kernels._launch, []
    monkeypatch.setattr(
        kernels, "_launch", lambda *args: splits.append(args[-1]({"ROWS": 64, "COLS": 64})[2]) or launch(*args)
    )
    check(kernels, 16, (2, 2), tokens)
    assert max(splits) == 4


@pytest.mark.parametrize("tokens", [1, 2**22, 2**22 + 1, 2**24 + 5])
def test_launches_are_within_what_cuda_allows(kernels, monkeypatch, tokens):
    """All but the first axis of a grid end at 65,535."""
    sides = ops.plan(torch.tensor([0, 1]), torch.tensor([0, 0]), keep_input=True)[:2]
    y, x = (torch.empty(1, width).expand(tokens, width) for width in (32, 16))
    for rows in (64, 128):
        launched = []
        launch = partial(lambda grids, meta, *args: grids.append(args[-1](meta)), launched, {"ROWS": rows, "COLS": 64})
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_launch", launch)
            patch.setattr(torch.autograd.graph, "increment_version", lambda tensor: None)
            kernels.block_add_(y, x, torch.empty(2, 16, 16), *sides)
            kernels.block_grad(y, x, *sides, 16)
            kernels.block_scores(y, x, 16, "l1")
        assert all(max(grid[1:]) <= 65535 for grid in launched)
        lines, tiles, more = launched[0]
        assert lines == 2 and tiles * (more - 1) * rows < tokens <= tiles * more * rows


@here
def test_tokens_beyond_one_axis_of_the_grid_are_reached(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_MOST_TILES", 2)
    check(kernels, 16, (3, 2), 330)


@here
def test_offsets_beyond_int32(kernels):
    """The last token lies 2^31 elements behind the first; hardly any of the memory between is touched."""
    tokens, stride, size = 33, 2**26, 16
    memory = torch.empty((tokens - 1) * stride + size, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((tokens, size), (stride, 1)).copy_(torch.randn(tokens, size))
    near, place, delta = far.clone(), torch.zeros(1, dtype=torch.int64), torch.ones(1, size, size, device=DEVICE)
    out, inner = ops.plan(place, place, keep_input=True, device=DEVICE)[:2]
    results = []
    for x in (near, far):
        gradient = kernels.block_grad(x, x, out, inner, size)
        y = torch.zeros(tokens, size, device=DEVICE)
        kernels.block_add_(y, x, delta, out, inner)
        results.append((gradient, y, kernels.block_scores(x, x, size, "l1")))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    operand = near.clone()
    for y in (near, far):
        kernels.block_add_(y, operand, delta, out, inner)
    assert torch.equal(near, far)


@here
def test_features_beyond_int32(kernels):
    """The last feature lies 2^31 elements behind the first, as in a transposed matrix of many tokens."""
    tokens, stride, size = 3, 2**26, 16
    memory = torch.empty(48 * stride + tokens, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((tokens, 48), (1, stride))
    near, delta = torch.randn(tokens, 48, device=DEVICE).half(), torch.ones(1, size, size, device=DEVICE)
    far.copy_(near)
    out, inner = ops.plan(torch.tensor([2]), torch.tensor([2]), keep_input=True, device=DEVICE)[:2]
    lists = [lists_of(side, size, 3) for side in (out, inner)]
    for sides in ((out, inner), lists):
        assert torch.equal(kernels.block_grad(near, near, *sides, size), kernels.block_grad(far, far, *sides, size))
        operand = near.clone()
        for y in (near, far):
            kernels.block_add_(y, operand, delta, *sides)
        assert torch.equal(near, far)


def choose_of_two(kernels, monkeypatch):
    """Have the tuner choose."""
    configs = [kernels.triton.Config({"ROWS": edge, "COLS": edge, "STEP": 32}) for edge in (64, 128)]
    monkeypatch.setattr(kernels._block_add_kernel, "configs", configs)
    monkeypatch.setattr(kernels._block_add_kernel, "cache", {})
    bench = "do_bench"  # a property that Triton keeps
    monkeypatch.setitem(vars(kernels._block_add_kernel), bench, lambda call, quantiles: [call() or call() or 1.0] * 3)


@here
def test_tuning_adds_only_once(kernels, monkeypatch):
    """A tuner calls the kernel many times; here without the clocks of a GPU, which the interpreter does not have."""
    choose_of_two(kernels, monkeypatch)
    check(kernels, 16, (2, 2), 20)
    assert kernels._block_add_kernel.cache


@here
def test_batches_of_similar_length_share_a_tuning(kernels):
    assert kernels._bucket(1) == kernels._bucket(1024) == 1024
    assert kernels._bucket(1025) == kernels._bucket(1999) == 2048


# --- Launching again ------------------------------------------------------------------------------------------------


class Kernel:
    """In place of a tuned kernel: compiles nothing, but notes what Triton would compile for and launch."""

    def __init__(self, kernels, name, monkeypatch, names_constants=True):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        kernel = getattr(kernels, name)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.fn.signature, kernel.fn.params, backend)
        self.arg_names, self.best_config, self.configs = kernel.arg_names, kernel.configs[0], kernel.configs[:1]
        self.names_constants = names_constants  # in the signature of what is compiled: from Triton 3.3 on
        self.asked, self.launched = [], []
        monkeypatch.setattr(kernels, name, self)
        monkeypatch.setattr(kernels, "CompiledKernel", Compiled)
        monkeypatch.setattr(kernels, "_ready", {})

    def __getitem__(self, grid):
        def launch(*args, **constants):
            bound, *specialization = self.bind(*args, **constants, **self.best_config.kwargs)
            values = list(bound.values())[: None if self.names_constants else len(args)]
            values = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
            # The first argument is mostly a new tensor in every call.
            self.asked.append((str(specialization[:2]), grid(self.best_config.kwargs), values[1:]))
            return Compiled(self, self.asked[-1][0], len(values))

        return launch


class Compiled:
    def __init__(self, kernel, specialization, parameters):
        self.kernel, self.specialization, self.src = kernel, specialization, self
        self.signature = range(parameters)

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((self.specialization, grid, list(args[1:])))


def check_launches(kernels, kernel, calls):
    """The second time, and between all others, each call must launch what Triton would if it were asked."""
    for call in calls:
        call()
        kernels._ready.clear()
    for call in calls * 2:
        call()
    assert kernel.launched[-len(calls) :] == kernel.asked[: len(calls)]


def matrices(dtype=torch.bfloat16):
    """[3, 64]; of their address, row stride and feature stride 16 divides all, or not one of them, or one is 1."""
    memory = torch.zeros(1100, dtype=dtype)
    return [
        memory.as_strided((3, 64), strides, offset)
        for strides, offset in [((64, 1), 0), ((64, 1), 1), ((72, 1), 0), ((1, 1), 0), ((1, 16), 0), ((1, 17), 0)]
    ]


def namings(side):
    """The same lines as tiles, as lists and at addresses that 16 does not divide."""
    shifted = [torch.cat([tensor[:1], tensor])[1:] for tensor in side]
    return [side, lists_of(side, 16, 4), side._make(shifted)]


@pytest.fixture
def sides():
    return ops.plan(torch.tensor([0, 2]), torch.tensor([3, 0]), keep_input=True)[:2]


@pytest.fixture
def uncopied(kernels, monkeypatch):
    """For what copies lines first: they are at one address in all calls."""
    monkeypatch.setattr(kernels, "gather", lambda matrix, at, block_size: matrix)
    monkeypatch.setattr(kernels, "_copy", lambda *_, back: None)


def each_varied(call, **options):
    """Calls with the first of all options, and with each other option alone."""
    base = {name: values[0] for name, values in options.items()}
    varied = [{**base, name: value} for name, values in options.items() for value in values[1:]]
    return [lambda chosen=chosen: call(**chosen) for chosen in [base, *varied]]


@compiling
@pytest.mark.parametrize("names_constants", [True, False])
def test_what_is_added_is_launched_as_compiled(kernels, monkeypatch, sides, uncopied, names_constants):
    kernel = Kernel(kernels, "_block_add_kernel", monkeypatch, names_constants)
    deltas = torch.zeros(1000)
    deltas = [deltas[offset : 512 + offset].view(2, 16, 16) for offset in (0, 1)]
    deltas += [deltas[0].mT, deltas[0].half(), torch.zeros(2, 32, 32), deltas[0][:1].expand(2, 16, 16)]
    wide = [*matrices(), *matrices(torch.float32), matrices(torch.float16)[0]]

    def add(y, x, delta, out, inner, precision):
        monkeypatch.setattr(kernels, "_precision", lambda dtype: precision)
        kernels.block_add_(y, x, delta, out, inner)

    out, inner = map(namings, sides)
    options = {"y": wide, "x": wide, "delta": deltas, "out": out, "inner": inner, "precision": ["ieee", "tf32"]}
    check_launches(kernels, kernel, each_varied(add, **options))


@compiling
def test_gradients_and_scores_are_launched_as_compiled(kernels, monkeypatch, sides, uncopied):
    out, inner = map(namings, sides)
    options = {"dy": matrices(), "x": matrices(), "block_size": [16, 32]}
    kernel = Kernel(kernels, "_block_grad_kernel", monkeypatch)
    calls = each_varied(kernels.block_grad, **options, out=out, inner=inner)
    half = matrices(torch.float16)[0]
    check_launches(kernels, kernel, [*calls, lambda: kernels.block_grad(half, half, *sides, 16)])
    kernel = Kernel(kernels, "_block_scores_kernel", monkeypatch)
    check_launches(kernels, kernel, each_varied(kernels.block_scores, **options, score=["l1", "l2"]))


@compiling
def test_gathers_are_launched_as_compiled(kernels, monkeypatch, sides):
    kernel = Kernel(kernels, "_copy_kernel", monkeypatch)
    options = {"matrix": [*matrices(), *matrices(torch.float32)], "at": [side.at for side in namings(sides[0])]}
    check_launches(kernels, kernel, each_varied(kernels.gather, **options, block_size=[16, 8]))


@compiling
def test_other_batches_are_launched_as_compiled(kernels, monkeypatch, sides):
    """Up to the length for which they share a tuning, and with a grid of their own."""
    kernel = Kernel(kernels, "_block_add_kernel", monkeypatch)
    memory, delta = torch.zeros(1500, 64), torch.zeros(2, 16, 16)
    calls = [lambda tokens=tokens: kernels.block_add_(memory[:tokens], memory[:tokens], delta, *sides)
             for tokens in (1, 16, 17, 1024, 1025, 1500)]  # fmt: skip
    check_launches(kernels, kernel, calls)
    assert len(kernel.asked) == len(calls) + 2
    assert len({grid for _, grid, _ in kernel.asked}) > 2


@compiling
def test_every_device_has_launches_of_its_own(kernels, monkeypatch, sides):
    kernel = Kernel(kernels, "_copy_kernel", monkeypatch)
    state = {"current": 0, "tensor": 0}

    @contextlib.contextmanager
    def device(index):
        before, state["current"] = state["current"], index
        yield
        state["current"] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state["current"])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(Tensor, "get_device", lambda tensor: state["tensor"])
    places = []
    monkeypatch.setattr(Compiled, "__getitem__", lambda *_: lambda *args: places.append(state["current"]))
    for state["tensor"] in (0, 1, 0, 1):
        kernels.gather(matrices()[0], sides[0].at, 16)
    assert len(kernel.asked) == 2
    assert places == [0, 1]


@compiling
def test_what_is_kept_ready_has_a_bound(kernels, monkeypatch, sides):
    """The stride of a transposed matrix is its number of tokens, of which there are many."""
    Kernel(kernels, "_copy_kernel", monkeypatch)
    monkeypatch.setattr(kernels, "_MOST_READY", 3)
    for tokens in range(1, 9):
        kernels.gather(torch.zeros(64, tokens).T, sides[0].at, 16)
        assert 1 <= len(kernels._ready) <= 3


@here
def test_kernels_are_called_as_operators_where_something_looks_on(kernels, monkeypatch):
    monkeypatch.setattr(ops, "interpret", True)
    x, seen = torch.randn(3, 64, device=DEVICE), []
    assert ops._functions(16, x) == (kernels.gather, kernels.block_add_, kernels.block_grad)
    seen.append(ops._functions(16, torch.nn.Parameter(x)))
    torch.jit.trace(lambda x: seen.append(ops._functions(16, x)) or x + 1, x, check_trace=False)
    with Watch():
        seen.append(ops._functions(16, x))
    with torch.autocast(DEVICE):
        seen.append(ops._functions(16, x))
    assert seen == [(reference.gather, ops.block_add_, ops.block_grad)] * 4
