"""The public functions and plans, made known to Numba: the types of a call, and its code.

Numba's `overload` would compile a function around each call, and a signature of its own would have to be written for
each; these take the public ones.
"""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.core.typing.templates import AbstractTemplate, Signature, infer_global
from numba.extending import lower_builtin

from . import plans  # noqa: F401 - registered as it is imported
from .calls import lower
from .functions import FUNCTIONS, Function
from .kinds import typed

__all__: list[str] = []


def _register(function: Function) -> None:
    """Make a public function known."""

    class Call(AbstractTemplate):
        """The types of its calls."""

        key = function.public
        prefer_literal = True

        def generic(self, args: Any, kws: Any) -> Signature:
            """Return a call's signature."""
            return typed(function, args, kws)

    infer_global(function.public, types.Function(Call))
    lower_builtin(function.public, types.VarArg(types.Any))(lower(function))


for _function in FUNCTIONS.values():
    _register(_function)
