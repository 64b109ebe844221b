"""Stride, padding, dilation, groups and strategy, as PyTorch takes them, in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ._engine import check_strategy

__all__ = ["Options", "options_for", "parse", "unique"]


class Options:
    """The options of a convolution; two that are equal are one object."""

    __slots__ = ("dilation", "groups", "padding", "strategy", "stride")

    def __init__(self, stride: Any, padding: Any, dilation: Any, groups: int, strategy: str) -> None:
        self.stride: tuple[int, int] = stride
        #: (top, bottom, left, right), or "same".
        self.padding: tuple[int, int, int, int] | str = padding
        self.dilation: tuple[int, int] = dilation
        self.groups = groups
        #: Names of strategies with commas between them, since operators take no tuples of them.
        self.strategy = strategy

    @property
    def strategies(self) -> str | tuple[str, ...]:
        """The strategies as nhwconv takes them: one name, or a tuple of several."""
        names = tuple(self.strategy.split(","))
        return names[0] if len(names) == 1 else names

    def pads(self, kernel: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the padding as (top, bottom, left, right)."""
        if isinstance(self.padding, str):
            rows, columns = (d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True))
            return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2
        return self.padding


#: By the identities of the arguments, and by what they mean. An entry of the first holds its arguments, so that no
#: identity is given away again: 1 and True, which are equal, are two of them.
_by_identity: dict[tuple[int, ...], tuple[Options | str, tuple[Any, ...]]] = {}
_by_value: dict[tuple[Any, ...], Options] = {}


def options_for(stride: Any, padding: Any, dilation: Any, groups: Any, strategy: Any) -> Options | str:
    """Return the options, or why nhwconv doesn't take them. A strategy that there isn't is an error."""
    found = _by_identity.get((id(stride), id(padding), id(dilation), id(groups), id(strategy)))
    if found is not None:
        return found[0]
    arguments = stride, padding, dilation, groups, strategy
    options = parse(*arguments)
    if isinstance(options, Options):
        options = unique(options)
    if all(map(_is_immutable, arguments)):
        if len(_by_identity) > 4096:
            _by_identity.clear()
        _by_identity[tuple(map(id, arguments))] = options, arguments
    return options


def unique(options: Options) -> Options:
    """Return the one object of all that are equal to this."""
    value = options.stride, options.padding, options.dilation, options.groups, options.strategy
    if len(_by_value) > 4096:
        _by_value.clear()
    return _by_value.setdefault(value, options)


def _is_immutable(argument: Any) -> bool:
    if type(argument) is tuple:
        return all(map(_is_immutable, argument))
    return type(argument) in (int, str, bool)


def parse(stride: Any, padding: Any, dilation: Any, groups: Any, strategy: Any) -> Options | str:
    """Return the options anew; sizes may be symbolic."""
    check_strategy(strategy)
    strides, dilations = _pair(stride, 1), _pair(dilation, 1)
    if strides is None or dilations is None or not _is_int(groups) or groups < 1:
        return "stride, dilation or groups is not what nhwconv takes"
    pads = _padding(padding)
    if pads is None or (pads == "same" and strides != (1, 1)):
        return f"padding is {padding!r}"
    return Options(strides, pads, dilations, groups, strategy if isinstance(strategy, str) else ",".join(strategy))


def _padding(value: Any) -> Any:
    """Return (top, bottom, left, right) or "same"; None for anything else."""
    if isinstance(value, str):
        return {"valid": (0, 0, 0, 0), "same": "same"}.get(value)
    pair = _pair(value, 0)
    return None if pair is None else (pair[0], pair[0], pair[1], pair[1])


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)


def _pair(value: Any, least: int) -> tuple[int, int] | None:
    """Return a pair of ints from an int, one or two of them; None for anything else."""
    both = value if isinstance(value, (tuple, list)) else (value,)
    if len(both) not in (1, 2) or any(not _is_int(v) or v < least for v in both):
        return None
    rows, columns = (int(v) if isinstance(v, np.integer) else v for v in (both[0], both[-1]))
    return rows, columns
