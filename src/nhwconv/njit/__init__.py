"""The public functions inside a user's own `@njit`: what Numba compiles into it, and who answers it.

- `layout`: the words in memory in which compiled code asks, and what it is answered;
- `calls`: what is compiled into users' functions;
- `functions`: what can be called, by the arrays that it takes and gives;
- `kinds`: what types tell of a call, as code is compiled;
- `overloads`, `plans`: the functions and plans, made known to Numba;
- `table`: what was answered before, found and run without Python;
- `answers`: Python's side: checks, plans, and errors in the words of the public functions.

What is compiled into a user's function may be kept by Numba (``cache=True``) for a version of nhwconv to come. So it
holds no address, and knows of the package this module, `serve`, `planned` and `layout` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..planning import Plan

__all__ = ["planned", "register", "serve"]


def register() -> None:
    """Teach Numba the public functions; it calls this once, by the entry point `numba_extensions`."""
    from . import overloads  # noqa: F401 - registered as it is imported


def planned(number: int) -> Plan:
    """Return the plan that compiled code knows by a number."""
    from . import answers

    return answers.plans[number]


def serve(layout: int, request: int, question: int, entry: int) -> int:
    """Answer compiled code, whose errors this raises.

    Parameters
    ----------
    layout : int
        The version of the layout that the code was compiled for.
    request : int
        What it wants: one of `nhwconv.njit.layout.REQUESTS`.
    question, entry : int
        Addresses of what it asks, and of what it was answered.

    Returns
    -------
    int
        An address, or 0 where none is asked for.

    Raises
    ------
    RuntimeError
        Where the code was compiled for another layout.
    """
    from . import answers

    return answers.serve(layout, request, question, entry)
