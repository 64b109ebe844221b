"""Which convolutions there are, and their options, as PyTorch takes them, in one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from .. import planning
from ..checks import words_of

__all__ = ["KINDS", "Kind", "Options", "check_strategy", "options_for", "parse", "unique"]


class Kind:
    """One of PyTorch's convolutions: what tells it from the others.

    Attributes
    ----------
    name : str
        That of PyTorch's function and of ours.
    operator : str
        That of the operator.
    dimensions : int
        Those that are convolved.
    transposed : bool
        Whether it is a transposed convolution. Its weights are (C, D/groups, ...), those of the convolution whose
        transpose it is.
    arguments : tuple of str
        What PyTorch's function takes after input, weight and bias, in its order.
    own : callable
        PyTorch's function.
    public : callable
        Ours.
    """

    def __init__(self, dimensions: int, transposed: bool = False) -> None:
        self.name = f"conv{'_transpose' * transposed}{dimensions}d"
        self.operator = f"nhwconv::{self.name}"
        self.dimensions, self.transposed = dimensions, transposed
        self.arguments = (
            ("stride", "padding", "output_padding", "groups", "dilation")
            if transposed
            else ("stride", "padding", "dilation", "groups")
        )
        self.own: Callable[..., torch.Tensor] = getattr(functional, self.name)
        self.public: Callable[..., torch.Tensor] = self.own

    def channels(self, weight: Sequence[Any], groups: Any) -> tuple[Any, Any]:
        """Return the channels of the input and of the output that go with weights of this shape."""
        outside, inside = weight[0], weight[1] * groups
        return (outside, inside) if self.transposed else (inside, outside)


#: All of them, by name.
KINDS = {kind.name: kind for kind in (Kind(1), Kind(2), Kind(1, transposed=True), Kind(2, transposed=True))}


class Options:
    """The options of a convolution, each a tuple over its dimensions; two that are equal are one object."""

    __slots__ = ("dilation", "groups", "kind", "output_padding", "padding", "strategy", "stride")

    def __init__(
        self,
        kind: Kind,
        stride: tuple[int, ...],
        padding: tuple[int, ...] | str,
        dilation: tuple[int, ...],
        groups: int,
        strategy: str,
        output_padding: tuple[int, ...] | None = None,
    ) -> None:
        self.kind = kind
        self.stride = stride
        #: Before and behind, for each dimension in turn: (top, bottom, left, right). Or "same".
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        #: Names of strategies with commas between them, since operators take no tuples of them.
        self.strategy = strategy
        #: Of a transposed convolution.
        self.output_padding = output_padding or (0,) * kind.dimensions

    @classmethod
    def of(cls, kind: Kind, geometry: Sequence[Any]) -> Options:
        """Return what the last arguments of an operator say."""
        stride, padding, dilation, groups, *more, strategy = geometry
        return cls(kind, tuple(stride), tuple(padding), tuple(dilation), groups, strategy, *map(tuple, more))

    def geometry(self, kernel: Sequence[int]) -> tuple[Any, ...]:
        """Return the last arguments of an operator."""
        more = (self.output_padding,) if self.kind.transposed else ()
        return self.stride, self.pads(kernel), self.dilation, self.groups, *more, self.strategy

    @property
    def strategies(self) -> str | tuple[str, ...]:
        """The strategies as nhwconv takes them: one name, or a tuple of several."""
        names = tuple(self.strategy.split(","))
        return names[0] if len(names) == 1 else names

    def pads(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """Return the padding in numbers."""
        if not isinstance(self.padding, str):
            return self.padding
        totals = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
        return tuple(number for total in totals for number in (total // 2, total - total // 2))

    def output_size(self, size: Sequence[Any], kernel: Sequence[Any]) -> tuple[Any, ...]:
        """Return the sizes of the output, without channels; below 1 where there is none."""
        pads = self.pads(kernel)
        found = []
        for i, (length, taps) in enumerate(zip(size, kernel, strict=True)):
            reach, cut = self.dilation[i] * (taps - 1) + 1, pads[2 * i] + pads[2 * i + 1]
            if self.kind.transposed:
                found.append((length - 1) * self.stride[i] + reach - cut + self.output_padding[i])
            else:
                found.append((length + cut - reach) // self.stride[i] + 1)
        return tuple(found)


#: By the identities of the arguments, and by what they mean. An entry of the first holds its arguments, so that no
#: identity is given away again: 1 and True, which are equal, are two of them.
_by_identity: dict[tuple[int, ...], tuple[Options | str, tuple[Any, ...]]] = {}
_by_value: dict[tuple[Any, ...], Options] = {}


def options_for(kind: Kind, arguments: tuple[Any, ...], strategy: Any) -> Options | str:
    """Return the options, or why nhwconv doesn't take them. A strategy that there isn't is an error.

    The arguments are those that `kind` names.
    """
    key = id(kind), id(strategy), *map(id, arguments)
    found = _by_identity.get(key)
    if found is not None:
        return found[0]
    options = parse(kind, arguments, strategy)
    if isinstance(options, Options):
        options = unique(options)
    if _is_immutable((*arguments, strategy)):
        if len(_by_identity) > 4096:
            _by_identity.clear()
        _by_identity[key] = options, (*arguments, strategy)
    return options


def unique(options: Options) -> Options:
    """Return the one object of all that are equal to this."""
    value = tuple(getattr(options, name) for name in Options.__slots__)
    if len(_by_value) > 4096:
        _by_value.clear()
    return _by_value.setdefault(value, options)


def _is_immutable(argument: Any) -> bool:
    if type(argument) is tuple:
        return all(map(_is_immutable, argument))
    return type(argument) in (int, str, bool)


def check_strategy(strategy: Any, function: str = "conv2d") -> None:
    """Raise nhwconv's error where there is no such strategy."""
    with words_of(function):
        planning.strategy_names(strategy)


def parse(kind: Kind, arguments: tuple[Any, ...], strategy: Any) -> Options | str:
    """Return the options anew; sizes may be symbolic."""
    check_strategy(strategy, kind.name)
    given = dict(zip(kind.arguments, arguments, strict=True))
    number, groups = kind.dimensions, given["groups"]
    stride, dilation = _each(given["stride"], 1, number), _each(given["dilation"], 1, number)
    more = _each(given["output_padding"], 0, number) if kind.transposed else None
    if stride is None or dilation is None or not _is_int(groups) or groups < 1 or (kind.transposed and more is None):
        return "stride, dilation, output_padding or groups is not what nhwconv takes"
    pads = _padding(given["padding"], kind)
    if pads is None or (pads == "same" and any(step != 1 for step in stride)):
        return f"padding is {given['padding']!r}"
    names = strategy if isinstance(strategy, str) else ",".join(strategy)
    return Options(kind, stride, pads, dilation, groups, names, more)


def _padding(value: Any, kind: Kind) -> Any:
    """Return (top, bottom, left, right), (before, behind), or "same"; None for anything else."""
    if isinstance(value, str) and not kind.transposed:
        return {"valid": (0,) * 2 * kind.dimensions, "same": "same"}.get(value)
    pads = _each(value, 0, kind.dimensions)
    return None if pads is None else tuple(number for pad in pads for number in (pad, pad))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)


def _each(value: Any, least: int, number: int) -> tuple[int, ...] | None:
    """Return an int for each dimension from one, alone or in a sequence, or from as many; None for anything else."""
    given = value if isinstance(value, (tuple, list)) else (value,)
    if len(given) not in (1, number) or any(not _is_int(v) or v < least for v in given):
        return None
    numbers = tuple(int(v) if isinstance(v, np.integer) else v for v in given)
    return numbers if len(numbers) == number else numbers * number
