"""Folders that are written as a whole: what stops the writing changes nothing that was there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

# What a crash may leave: a folder of this name in the one that was written to. Trainer pushes nothing that begins so.
UNFINISHED = "_saving-"
NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EXDEV)  # where there is no such call


@contextlib.contextmanager
def written_whole(folder: Path, only_new: bool = False) -> Iterator[Path]:
    """Yield a new folder inside `folder`. On exit its files are flushed to disk, then all move to their places in
    `folder`; with `only_new`, ValueError is raised instead if `folder` has got other content meanwhile."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=UNFINISHED, dir=folder, ignore_cleanup_errors=True) as name:
            new = Path(name, "new")  # one level down: a folder with weights in a checkpoint is an adapter for Trainer
            new.mkdir()
            (plain := Path(name, "plain")).touch()
            yield new
            written = sorted((file for file in new.rglob("*") if file.is_file()), key=_order)
            for file in written:
                _finish(file, plain.stat().st_mode)
            if only_new:
                _refuse_what_is_there(folder)
            for file in written:
                place = folder / file.relative_to(new)
                place.parent.mkdir(parents=True, exist_ok=True)
                _move(file, place)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_is_new(folder: Path) -> None:
    """Raise ValueError where there is a folder with something in it, or what is no folder, and where none can be
    written."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to nothing; name another folder, or make what it links to.")
    if folder.exists():
        _refuse_what_is_there(folder)
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "may not be written to" if parent.is_dir() else "is no folder"
        raise ValueError(f"{folder} cannot be written: {parent} {why}; name another folder.")
    for left in folder.glob(f"{UNFINISHED}*"):
        warnings.warn(
            f"{left} was left by a run that was ended, unless one is writing there now: remove it, it may be large."
        )


def _refuse_what_is_there(folder: Path) -> None:
    if not folder.is_dir() or any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name another folder, or empty it.")


def _order(file: Path) -> tuple[bool, bool, bool]:
    """Sort key: an adapter's weights, then its config: loading compares them and notices a stop in between. A model's
    config comes last: without it, nothing is taken for a model."""
    return file.name == "config.json", file.name != SAFETENSORS_WEIGHTS_NAME, file.name != CONFIG_NAME


def _finish(file: Path, mode: int) -> None:
    """Let those read it who may read others, unlike what safetensors writes; and have a full disk say so now."""
    try:
        file.chmod(mode)
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise


def _move(file: Path, place: Path) -> None:
    try:
        file.replace(place)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        shutil.copyfile(file, place)


def refuse_same_folder(out: str | Path, folders: Sequence[str | Path]) -> None:
    """Raise ValueError where what is read would be written over."""
    if any(Path(out).resolve() == Path(folder).resolve() for folder in folders):
        raise ValueError(f"{out} is one of the inputs; write into another folder.")
