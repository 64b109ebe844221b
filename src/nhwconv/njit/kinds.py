"""What types tell of a call, as code is compiled: its results, or why it is refused.

Everything else is refused as code runs, by the public functions' checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from numba.core import errors, types
from numba.core.typing.templates import Signature, signature

from ..checks import Refusal, as_layout
from ..layouts import IMAGES, WEIGHTS
from ..results import Gradients
from .functions import Function
from .layout import DB, DW, DX, IMAGES_SHIFT, OUT, WEIGHTS_SHIFT

__all__ = ["Resolved", "is_none", "items_of", "resolve", "typed", "value_of"]

_BITS = {"dx": DX, "dw": DW, "db": DB}
_FLOATS = types.float32, types.float64
_SCALARS = types.Float, types.Integer


def value_of(kind: Any) -> Any:
    """Return the value of an argument that is known as code is compiled, otherwise what is no argument's."""
    return kind.value if isinstance(kind, types.Omitted) else getattr(kind, "literal_value", ...)


def is_none(kind: Any) -> bool:
    """Whether an argument is None."""
    return isinstance(kind, types.NoneType) or value_of(kind) is None


def items_of(kind: Any) -> tuple[Any, ...] | None:
    """Return the types in a tuple's; None for any other."""
    items: Any = kind
    return tuple(items) if isinstance(kind, types.BaseTuple) else None


class _Check:
    """The types of one call's arguments."""

    def __init__(self, function: Function, kinds: Mapping[str, Any]) -> None:
        self.function, self.kinds = function, kinds

    def refuse(self, message: str) -> NoReturn:
        """Refuse the call."""
        raise errors.TypingError(f"{self.function.name}: {message}")

    def given(self, name: str) -> bool:
        """Whether there is such an argument, and it is not None."""
        return name in self.kinds and not is_none(self.kinds[name])

    # ------------------------------------------------------------------------------------------ arrays

    def array(self, name: str, kind: Any) -> None:
        """Refuse what is no array that can be computed with."""
        if not isinstance(kind, types.Array):
            self.refuse(f"{name} is {kind}, expected an array of float32 or float64")
        if kind.dtype not in _FLOATS:
            self.refuse(
                f"{name} has dtype {kind.dtype}, expected float32 or float64; half types are computed outside compiled "
                "functions only, where Numba has arrays of them"
            )
        most = 2 + self.function.dimensions
        if kind.ndim > most:
            self.refuse(f"{name} has {kind.ndim} axes, expected at most {most}")

    def inputs(self) -> dict[str, Any]:
        """Return the types of the arrays that there are; a bias may be a number."""
        found = {}
        for name in self.function.inputs:
            if name == "b" and (not self.given(name) or isinstance(self.kinds[name], _SCALARS)):
                continue
            self.array(name, self.kinds[name])
            found[name] = self.kinds[name]
        return found

    def out(self) -> dict[str, Any]:
        """Return the types of the results that the caller gives."""
        if not self.given("out"):
            return {}
        kind, names = self.kinds["out"], self.function.results
        if len(names) == 1:
            self.array("out", kind)
            return {names[0]: kind}
        items = items_of(kind) or ()
        if len(items) != len(names):
            self.refuse(f"out is of type {kind}, expected Gradients(dx, dw, db)")
        found = {name: item for name, item in zip(names, items, strict=True) if not is_none(item)}
        for name, item in found.items():
            self.array(f"out.{name}", item)
        return found

    def needs(self) -> tuple[str, ...]:
        """Return the results that are needed; they are written out."""
        if "needs" not in self.kinds:
            return self.function.results
        kind = self.kinds["needs"]
        items = items_of(kind)
        value = value_of(kind) if items is None else tuple(map(value_of, items))
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            self.refuse(f"needs is {kind}, expected names that are written out")
        for name in names:
            if name not in _BITS:
                self.refuse(f'needs has {name!r}, expected any of "dx", "dw", "db"')
        return names

    # ----------------------------------------------------------------------------------------- options

    def integer(self, name: str, kind: Any) -> None:
        """Refuse what is no integer."""
        if not isinstance(kind, (types.Integer, types.Omitted)):
            self.refuse(f"{name} is {kind}, expected an integer")

    def pair(self, name: str, kind: Any, pairs: bool = True) -> None:
        """Refuse what is neither an integer nor as many of them as there are dimensions, or two."""
        items = items_of(kind)
        if items is None:
            self.integer(name, kind)
            return
        wanted = 2 if pairs else 1
        if len(items) != wanted:
            self.refuse(f"{name} has {len(items)} values, expected an int{' or a pair' * pairs}")
        for item in items:
            self.integer(name, item)

    def padding(self, kind: Any) -> None:
        """Refuse what is no padding."""
        if isinstance(kind, (types.UnicodeType, types.StringLiteral)):
            return
        items = items_of(kind) or ()
        pairs = [items_of(item) for item in items]
        if self.function.dimensions == 1 and len(items) == 1:
            self.pair("padding", items[0])
        elif self.function.dimensions == 1 or not any(pair is not None for pair in pairs):
            self.pair("padding", kind)
        elif len(pairs) != 2 or not all(pair is not None and len(pair) == 2 for pair in pairs):
            self.refuse(f"padding is {kind}, expected ((top, bottom), (left, right))")
        else:
            for item in items:
                self.pair("padding", item)

    def strategy(self, kind: Any) -> None:
        """Refuse what is no strategy."""
        names = items_of(kind) or (kind,)
        known = isinstance(kind, types.Omitted) or all(isinstance(name, types.StringLiteral) for name in names)
        if not known and not isinstance(kind, types.UnicodeType):
            self.refuse(f"strategy is {kind}, expected a name or a tuple of names, which are written out")

    def options(self) -> None:
        """Refuse what is no option."""
        for name, kind in self.kinds.items():
            if name in ("stride", "dilation") or (
                name in ("kernel_size", "input_size", "output_padding") and not is_none(kind)
            ):
                self.pair(name, kind, self.function.dimensions == 2)
            elif name == "groups":
                self.integer(name, kind)
            elif name == "padding":
                self.padding(kind)
            elif name == "strategy":
                self.strategy(kind)
            elif name == "accumulate" and not isinstance(kind, (types.Boolean, types.Omitted)):
                self.refuse(f"accumulate is {kind}, expected True or False")

    def layout(self) -> int:
        """Return the flags of the order of axes, which is written out."""
        found: dict[str, Any] = {"layout": IMAGES[0], "w_layout": None}
        for name in found:
            if self.given(name):
                kind = self.kinds[name]
                value = value_of(kind)
                if not isinstance(value, str):
                    self.refuse(f"{name} is {kind}, expected a name that is written out")
                found[name] = value
        try:
            as_layout(found["layout"], found["w_layout"])
        except Refusal as refusal:
            self.refuse(str(refusal))
        weights = 0 if found["w_layout"] is None else 1 + WEIGHTS.index(found["w_layout"])
        return IMAGES.index(found["layout"]) << IMAGES_SHIFT | weights << WEIGHTS_SHIFT


class Resolved(NamedTuple):
    """What types tell of a call.

    Attributes
    ----------
    dtype : type
        In which its arrays meet.
    flags : int
        Of its question.
    given : dict
        By their names the types of results that the caller gives.
    results : dict
        By their names the types of all results that are needed.
    returned : type
        What is returned.
    """

    dtype: Any
    flags: int
    given: dict[str, Any]
    results: dict[str, Any]
    returned: Any


def resolve(function: Function, kinds: Mapping[str, Any], new: Any = None) -> Resolved:
    """Check the types of a call's arguments, by their names, and return what they tell.

    `new` is the type of a new result, where it does not follow from them.
    """
    check = _Check(function, kinds)
    arrays = check.inputs()
    given = check.out()
    check.options()
    flags, needs = check.layout() | (OUT if given else 0), check.needs()
    if "needs" in kinds:
        flags |= sum(_BITS[name] for name in set(needs))
    dtype = types.float64 if any(kind.dtype == types.float64 for kind in arrays.values()) else types.float32
    ranks = {name: kind.ndim for name, kind in arrays.items()}
    results = {}
    for name in function.results:
        if name in needs:
            like = new or types.Array(dtype, function.rank(name, ranks), "C")
            results[name] = given.get(name, like)
    if len(function.results) == 1:
        return Resolved(dtype, flags, given, results, results[function.results[0]])
    items = [results.get(name, types.none) for name in Gradients._fields]
    return Resolved(dtype, flags, given, results, types.NamedTuple(items, Gradients))


def typed(function: Function, args: Any, kws: Any, plan: Any = None) -> Signature:
    """Return the signature of a call with arguments of these types; that of a plan has one, too."""
    try:
        bound = function.parameters.bind(*args, **kws)
    except TypeError as error:
        raise errors.TypingError(f"{function.name}: {error}") from None
    folded = function.folded
    kinds = [bound.arguments.get(name, types.Omitted(each.default)) for name, each in folded.parameters.items()]
    named = dict(zip(function.names, kinds, strict=True))
    resolved = resolve(function, named, None if plan is None else plan.result)
    return signature(resolved.returned, *kinds, recvr=plan).replace(pysig=folded)
