"""Ctrl-C, at any line that runs."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn


class Interrupt:
    """A trace function that lists the lines that run in some files, and raises KeyboardInterrupt at one of them."""

    def __init__(self, files: Sequence[Path], at: int | None = None):
        self.files, self.at, self.lines = tuple(map(str, files)), at, []

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.lines.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if len(self.lines) - 1 == self.at:
                raise KeyboardInterrupt
        return self

    @contextlib.contextmanager
    def running(self):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        except KeyboardInterrupt:
            assert self.at is not None
        finally:
            sys.settrace(before)


def moments_of(lines: list, extra: int = 40) -> list[int]:
    """The first time that each line runs, and some more, spread over all that run."""
    first = {line: moment for moment, line in reversed(list(enumerate(lines)))}
    return sorted({*first.values(), *range(0, len(lines), max(1, len(lines) // extra))})


def each_interrupt(
    files: Sequence[Path], make: Callable[[], nn.Module], action: Callable[[nn.Module], None]
) -> Iterator[tuple[nn.Module, str]]:
    """Run the action on a new model once for each moment; yields the model after it, and where it was interrupted."""
    counting = Interrupt(files)
    model = make()
    with counting.running():
        action(model)
    assert counting.lines, "none of these lines runs"
    for moment in moments_of(counting.lines):
        model, interrupt = make(), Interrupt(files, moment)
        with interrupt.running():
            action(model)
        torch.set_grad_enabled(True)  # lost where a line is the end of a `with torch.no_grad()`, as in PyTorch itself
        yield model, "{}:{}".format(*counting.lines[moment])


@contextlib.contextmanager
def explained_by(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"after an interrupt at {place}: {error}") from error
