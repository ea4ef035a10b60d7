"""What puts things back as they were, for the warm-up leaves no trace: generators, counters, modules, records."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from itertools import chain
from types import NoneType

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader

HAVING_GENERATORS = ("batch_sampler", "sampler", "dataset", "collate_fn", "data_collator")  # parts of a dataloader
LARGEST_COUNTER = 2**16  # elements of a buffer of integers; one that is larger is a weight
CONTAINERS = (list, deque, set, dict)
LARGEST_RECORD = 10_000  # values; a list that is longer is data


@contextlib.contextmanager
def put_back_afterwards(undo: Iterable[Callable[[], object]]) -> Iterator[None]:
    """Call all of these in the end, and once more: an interrupt may have fallen into the first time."""
    try:
        try:
            yield
        finally:
            _call(undo)
    finally:
        _call(undo)


def _call(undo: Iterable[Callable[[], object]]) -> None:
    for change_back in undo:
        change_back()


def random_states() -> list[Callable[[], object]]:
    """What puts all random states back: Python's, NumPy's, PyTorch's on the CPU and on the device."""
    undo = [partial(random.setstate, random.getstate()), partial(numpy.random.set_state, numpy.random.get_state())]
    undo += [partial(torch.set_rng_state, torch.get_rng_state())]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        device = torch.get_device_module(accelerator)
        which = "rng_state_all" if hasattr(device, "get_rng_state_all") else "rng_state"  # MPS is one device
        if getattr(device, "is_initialized", lambda: True)():
            undo += [partial(getattr(device, f"set_{which}"), getattr(device, f"get_{which}")())]
    return undo


@contextlib.contextmanager
def same_order_afterwards(dataloader: Iterable) -> Iterator[None]:
    """Put generators and counters of a dataloader's own parts back, or training would shuffle and mask otherwise."""
    owners = [dataloader]
    for owner in owners:  # accelerate and transformers put layers between them
        parts = [getattr(owner, name, None) for name in HAVING_GENERATORS]
        owners += [part for part in parts if all(part is not one for one in (None, *owners))]
    undo: list[Callable[[], object]] = []
    for owner in owners:
        held = [*getattr(owner, "__dict__", {}).values(), getattr(owner, "generator", None)]
        undo += filter(None, map(_generator_as_before, held))
        if not hasattr(type(owner), "__getitem__"):  # else it is data, which may count what it has read
            undo.append(counters_as_before(owner))
    without = [owner for owner in owners if getattr(owner, "generator", ...) is None]
    try:
        with put_back_afterwards(undo):
            yield
    finally:
        for owner in without:
            if owner.generator is not None:
                owner.generator = None  # a collator makes its own with the first batch


def apart(dataloader: Iterable) -> Iterable:
    """A copy of PyTorch's: one that keeps its workers would draw no seed for them when training asks it again."""
    if isinstance(dataloader, DataLoader):
        dataloader = copy.copy(dataloader)
        if hasattr(dataloader, "base_dataloader"):  # accelerate's
            dataloader.base_dataloader = apart(dataloader.base_dataloader)
    return dataloader


def _generator_as_before(generator: object) -> Callable[[], object] | None:
    """What puts a generator of Python's, NumPy's or PyTorch's back; None of what is none, or has no state."""
    if isinstance(generator, numpy.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, (torch.Generator, numpy.random.RandomState)):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return partial(generator.setstate, generator.getstate())
    return None


def counters_as_before(owner: object) -> Callable[[], object]:
    """What puts the numbers back that an object holds."""
    held = getattr(owner, "__dict__", {})
    held = held if isinstance(held, dict) else {}  # a class has none of its own
    return partial(held.update, {name: value for name, value in held.items() if type(value) in (int, float)})


def module_as_before(module: nn.Module, own: Container[int] = ()) -> list[Callable[[], object]]:
    """What puts a module's mode, counters and buffers back, but for buffers whose ids are in `own`."""
    undo = [partial(setattr, module, "training", module.training)]
    undo.append(counters_as_before(module))  # dynamic RoPE counts, in step with a buffer
    for name, buffer in module._buffers.items():
        if buffer is not None and id(buffer) not in own and buffer.device.type != "meta" and not _is_packed(buffer):
            undo += [partial(module._buffers.__setitem__, name, buffer), partial(_set, buffer, buffer.clone())]
    return undo


def _is_packed(buffer: torch.Tensor) -> bool:
    """Whether it is a quantised weight, which nothing changes, and not a statistic or a counter."""
    return not buffer.is_floating_point() and buffer.numel() > LARGEST_COUNTER


def as_before(value: object) -> list[Callable[[], object]]:
    """What puts a record, the numbers of a plain object, or the modes, counters and buffers of a module back."""
    if isinstance(value, nn.Module):
        return [
            change_back
            for module in value.modules()
            for change_back in (*module_as_before(module), *_records_of(module))
        ]
    if is_record(value):
        return _contents_as_before(value)
    held = [] if isinstance(value, type) else list(getattr(value, "__dict__", {}).values())
    is_plain = all(isinstance(part, (NoneType, int, float, str)) or is_record(part) for part in held)
    return [counters_as_before(value), *_records_of(value)] if held and is_plain else []


def _records_of(value: object) -> list[Callable[[], object]]:
    of_every_module = vars(nn.Module()) if isinstance(value, nn.Module) else ()
    own = (part for name, part in vars(value).items() if name not in of_every_module and is_record(part))
    return [change_back for part in own for change_back in _contents_as_before(part)]


def _contents_as_before(part: object) -> list[Callable[[], object]]:
    if isinstance(part, CONTAINERS):
        parts = part.values() if isinstance(part, dict) else part
        return [partial(refill, part, copy.copy(part)), *chain.from_iterable(map(_contents_as_before, parts))]
    if isinstance(part, numpy.ndarray):
        return [partial(numpy.copyto, part, part.copy())]
    return [partial(_set, part, part.detach().clone())] if isinstance(part, torch.Tensor) else []


def refill(container: list | deque | set | dict, contents: list | deque | set | dict) -> None:
    """Give a container these contents and no others; none is missing meanwhile, but in a deque."""
    if isinstance(container, dict):
        for key in container.keys() - contents.keys():
            del container[key]
        container.update(contents)
    elif isinstance(container, set):
        container.intersection_update(contents)
        container.update(contents)
    elif isinstance(container, list):
        container[:] = contents
    else:
        container.clear()
        container.extend(contents)


@torch.no_grad()
def _set(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if not torch.equal(tensor, value):
        tensor.copy_(value)


def is_record(value: object) -> bool:
    """Whether it is what a loss of one's own may append to or count in: a container of numbers and texts, no data."""
    waiting, seen = [value] if isinstance(value, CONTAINERS) else [...], 0
    while waiting:
        part, seen = waiting.pop(), seen + 1
        if isinstance(part, CONTAINERS):
            waiting.extend(part.values() if isinstance(part, dict) else part)
        elif not (isinstance(part, (NoneType, int, float, str)) or getattr(part, "ndim", None) == 0):
            return False
        if seen + len(waiting) > LARGEST_RECORD:  # or it holds itself
            return False
    return True
