"""What bodies know of a problem: 64-bit integers in records, a class for each kind with a comment for each field.

A class inherits the fields of the classes that it is made of. Its instances have them as attributes, for whoever
predicts costs; `pack` lays some of them out in memory, and a body reads them there by `record`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, SupportsInt

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, typeof_impl
from numba.np.numpy_support import from_dtype

from .jit import device

__all__ = ["Record", "RecordKind", "Share", "as_kind", "pack", "record", "record_of_task"]


class RecordKind(type):
    """The class of the classes of records: collects their fields, and is what compiled code knows of them."""

    names: tuple[str, ...]
    dtype: np.dtype[Any]

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        fields = [field for base in reversed(cls.__mro__) for field in inspect.get_annotations(base)]
        cls.names = tuple(dict.fromkeys(fields))
        cls.dtype = np.dtype([(field, np.int64) for field in cls.names])


class Record(metaclass=RecordKind):
    """Named integers; every field must be given, and no other. A native function stands for its address."""

    def __init__(self, **values: SupportsInt) -> None:
        if values.keys() != set(type(self).names):
            raise TypeError(f"{type(self).__name__}: fields differ: {sorted(values.keys() ^ set(type(self).names))}")
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:  # for type checkers: fields are in __dict__
        raise AttributeError(name)


class Share(Record):
    """One of several records of a step: each has tasks of its own, one record's after another's."""

    records: int  #: of the step
    first_task: int


def pack(records: Iterable[Record]) -> np.ndarray[Any, Any]:
    """Return records of one kind, one behind the other, as bodies read them."""
    records = list(records)
    kind = type(records[0])
    return np.array([tuple(int(r.__dict__[name]) for name in kind.names) for r in records], kind.dtype)


@typeof_impl.register(RecordKind)
def _typeof_kind(kind: RecordKind, context: Any) -> types.Type:
    return types.DType(from_dtype(kind.dtype))


@lower_constant(types.DType)
def _lower_kind(context: Any, builder: Any, ty: Any, value: Any) -> Any:
    return context.get_dummy_value()


@intrinsic
def record(typingctx, address, index, kind):
    """Return record `index` of those that lie at an address."""
    signature = kind.dtype(types.intp, types.intp, kind)

    def codegen(context, builder, sig, args):
        address, index, _ = args
        size = ir.Constant(ir.IntType(64), sig.return_type.size)
        place = builder.add(address, builder.mul(index, size))
        return builder.inttoptr(place, context.get_value_type(sig.return_type))

    return signature, codegen


@intrinsic
def as_kind(typingctx, one, kind):
    """Return a record as one of a kind that its class is made of first, so that functions of that kind are shared."""
    signature = kind.dtype(one, kind)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return signature, codegen


@device
def record_of_task(geometry, task, kind):
    """Return the number of the record, of a kind of `Share`, that a task belongs to."""
    i = 0
    while i + 1 < record(geometry, 0, kind).records and task >= record(geometry, i + 1, kind).first_task:
        i += 1
    return i
