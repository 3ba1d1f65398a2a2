"""What the examples' commands have in common: flags, devices, checkpoints, and one line in place of a traceback for what a user can put
right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class CommandError(Exception):
    """Something that a user can put right, in one line."""


class SettingError(CommandError, ValueError):
    """A setting that is impossible."""


class MissingPackage(CommandError, ImportError):
    """A package that is needed for what was asked for."""


class DataError(CommandError, ValueError):
    """Something is wrong with the data; the message begins with the file."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


def at_least(low: int) -> tyro.constructors.PrimitiveConstructorSpec[int | None]:
    """For the annotation of a flag that takes a whole number from `low` on; smaller ones are refused with the usage."""

    def read(words: list[str]) -> int:
        if (number := int(words[0])) < low:
            raise ValueError(f"expected at least {low}, got {number}")
        return number

    return tyro.constructors.PrimitiveConstructorSpec(1, "INT", read, lambda default: True, lambda default: [str(default)])


Positive = Annotated[int, at_least(1)]
PositiveOrNone = Annotated[int | None, at_least(1)]


def cli(command: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Call a function by the command line, or by `arguments`: each of its arguments is a flag, with the help that its docstring has.

    Where it fails by a CommandError, or for a file that the system refuses, it ends with one line instead of a traceback.
    """
    try:
        tyro.cli(command, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    except CommandError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        if error.filename is None:
            raise
        raise SystemExit(f"{error.filename}: {error.strerror}") from None


def checked_device(name: str) -> str:
    """The device that --device names. Raises SettingError where the machine or this torch does not have it."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise SettingError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


def read_checkpoint(path: Path, device: str, *parts: str) -> dict[str, Any]:
    """What examples/shared/resumable.py saved. Raises DataError where the file is missing, or has not all these parts."""
    if not path.exists():
        raise DataError(path, "no such checkpoint")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises what its parts happen to raise
        raise DataError(path, f"not a checkpoint: {str(error).splitlines()[0]}") from error
    missing = [part for part in parts if not isinstance(saved, dict) or part not in saved]
    if missing:
        raise DataError(path, f"not a checkpoint: it has no {missing[0]!r}")
    return saved


@contextmanager
def of_this_system(path: Path) -> Iterator[None]:
    """Make a DataError of what goes wrong where a model is built by the words of a checkpoint, and filled with its weights."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(path, f"not a checkpoint of this system: {str(error).splitlines()[0]}") from error
