"""Triton's interpreter, without a search that takes half of its time."""

from __future__ import annotations

from collections.abc import Callable

from triton import language
from triton.language import core
from triton.runtime import interpreter


def search_once() -> None:
    """Have the interpreter look for the builtins of triton.language once a launch, and not again in every call of a helper.

    A launch puts its own functions in place of all builtins that the kernel sees. A helper that sees no other has nothing left to replace.
    These functions are private to Triton. Where a version has them under other names, the interpreter stays as it is.
    """
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return
    patch: Callable[..., object] = interpreter._patch_lang

    def patch_unless_done(function: Callable[..., object]) -> object:
        modules = [value for value in function.__globals__.values() if value is language or value is core]
        done = modules and not any(core.is_builtin(module.load) for module in modules)
        return interpreter._LangPatchScope() if done else patch(function)

    interpreter._patch_lang = patch_unless_done
