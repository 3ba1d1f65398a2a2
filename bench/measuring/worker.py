"""Calls in a process that may be lost. A kernel that reads where it must not leaves its process without a GPU, and a kernel may never end.

Only the one call is then lost: the next begins in a new process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

SILENCE = 150.0  # seconds without a word, longer than any peer takes to compile
_reports: list[Connection] = []  # In a Worker's process this has the connection to the process that asked.


class Lost(RuntimeError):
    """The process had to be given up. `at` is the last thing that it said it would do."""

    def __init__(self, at: str, why: str) -> None:
        super().__init__(why)
        self.at = at


def at(what: str) -> None:
    """Say what comes next, so that the asking process knows it if the process is lost."""
    for report in _reports:
        report.send(("at", what))


def still_usable(error: Exception) -> None:
    """Raise Unusable if, after this error, the process can do nothing more on its GPU."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        raise Unusable(in_a_line(error)) from error


class Unusable(BaseException):
    """A BaseException, so that `except Exception` does not swallow it."""


def in_a_line(error: BaseException) -> str:
    """The first line of its message, or its type where there is no message."""
    return f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__


class Worker:
    """One process, which is started anew after each loss. silence: seconds without a word after which it counts as lost."""

    def __init__(self, silence: float = SILENCE) -> None:
        self._silence = silence
        self._process: Any = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), all picklable. Raises RuntimeError with the message of what the function raised, and Lost."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=False)
            self._process.start()
            theirs.close()
        said, why = "", f"nothing was heard of it for {self._silence:.0f} s"
        try:
            self._connection.send((function, args))
            while self._connection.poll(self._silence):
                kind, value = self._connection.recv()
                if kind == "done":
                    return value
                if kind == "raised":
                    raise RuntimeError(value)
                if kind == "lost":
                    why = value
                    break
                said = value
        except (EOFError, OSError):
            self._process.join()
            why = f"its process ended with exit code {self._process.exitcode}"
        self.close()
        raise Lost(said, why)

    def close(self, patience: float = 0.0) -> None:
        """End the process, whatever it is doing. patience: seconds in which one that is idle ends by itself, and cleans up."""
        if self._process is not None:
            self._connection.close()
            self._process.join(patience)
            self._process.kill()
            self._process.join()
            self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(patience=2.0)


def _serve(connection: Connection) -> None:
    _reports.append(connection)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:  # The process that asked is gone.
            return
        try:
            try:
                answer = ("done", function(*args))
            except Exception as error:
                still_usable(error)
                answer = ("raised", f"{type(error).__name__}: {in_a_line(error)}")
        except Unusable as error:
            answer = ("lost", in_a_line(error))
        connection.send(answer)
