"""What is compiled into users' functions: questions, results, and calls of what answers them.

It goes wherever the user's code goes: into files that Numba keeps, and into other versions' hands. So it holds no
address of anything: those are found by way of the state, whose address each library asks Python for once.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import impl_ret_new_ref
from numba.np.arrayobj import load_item, make_array, populate_array, store_item
from numba.np.numpy_support import as_dtype

from . import layout
from .functions import Function
from .kinds import Resolved, is_none, items_of, resolve, value_of

__all__ = ["lower", "number_of", "write"]

_MODULE = "nhwconv.njit"
_I64 = ir.IntType(64)
_POINTER = _I64.as_pointer()
#: Scratch and results begin at multiples of this.
_ALIGNMENT = 64


def _i64(value: int) -> Any:
    return ir.Constant(_I64, value)


class _Words:
    """Words in memory, as code is generated."""

    def __init__(self, builder: Any, address: Any) -> None:
        self.builder = builder
        known = isinstance(address.type, ir.PointerType)
        self.first = builder.bitcast(address, _POINTER) if known else builder.inttoptr(address, _POINTER)

    def place(self, index: int) -> Any:
        """Return a pointer to a word."""
        return self.builder.gep(self.first, [_i64(index)])

    def __getitem__(self, index: int) -> Any:
        return self.builder.load(self.place(index))

    def __setitem__(self, index: int, value: Any) -> None:
        self.builder.store(_i64(value) if isinstance(value, int) else value, self.place(index))


# ---------------------------------------------------------------------------------------------- Python


def _define_serve(context: Any, builder: Any) -> Any:
    """Return this module's function that calls `nhwconv.njit.serve`; it returns -1 where that raised."""
    kind = ir.FunctionType(_I64, [_I64, _I64, _I64])
    function = cgutils.get_or_insert_function(builder.module, kind, "nhwconv_serve")
    if not function.is_declaration:
        return function
    function.linkage = "internal"
    inner = ir.IRBuilder(function.append_basic_block())
    api = context.get_python_api(inner)
    answer = cgutils.alloca_once_value(inner, _i64(-1))
    gil = api.gil_ensure()
    module = api.import_module(context.insert_const_string(inner.module, _MODULE))
    with inner.if_then(cgutils.is_not_null(inner, module)):
        serve = api.object_getattr_string(module, "serve")
        with inner.if_then(cgutils.is_not_null(inner, serve)):
            numbers = [api.long_from_longlong(n) for n in (_i64(layout.VERSION), *function.args)]
            answered = api.call_function_objargs(serve, numbers)
            with inner.if_then(cgutils.is_not_null(inner, answered)):
                inner.store(api.long_as_longlong(answered), answer)
                api.decref(answered)
            for number in (*numbers, serve):
                api.decref(number)
        api.decref(module)
    api.gil_release(gil)
    inner.ret(inner.load(answer))
    return function


def _serve(context: Any, builder: Any, request: int, question: Any, entry: Any) -> Any:
    """Ask Python."""
    return builder.call(_define_serve(context, builder), [_i64(request), question, entry])


def _leave_where_python_raised(context: Any, builder: Any, answer: Any) -> None:
    with builder.if_then(builder.icmp_signed("<", answer, _i64(0)), likely=False):
        context.call_conv.return_exc(builder)


def _state(context: Any, builder: Any, question: Any) -> Any:
    """Return the state's address; each library asks for it once."""
    name = "nhwconv_state"
    kept = builder.module.globals.get(name)
    if kept is None:
        kept = cgutils.add_global_variable(builder.module, _I64, name)
        kept.linkage, kept.initializer = "internal", _i64(0)
    state = cgutils.alloca_once_value(builder, builder.load_atomic(kept, "acquire", 8))
    with builder.if_then(builder.icmp_signed("==", builder.load(state), _i64(0)), likely=False):
        found = _serve(context, builder, layout.STATE, question, _i64(0))
        _leave_where_python_raised(context, builder, found)
        builder.store_atomic(found, kept, "release", 8)
        builder.store(found, state)
    return builder.load(state)


def _call(builder: Any, state: Any, function: int, question: Any, entry: Any) -> None:
    """Call a function that the state names."""
    kind = ir.FunctionType(ir.VoidType(), [_I64] * 5).as_pointer()
    address = builder.inttoptr(_Words(builder, state)[function], kind)
    builder.call(address, [question, state, entry, _i64(0), _i64(0)])


# ------------------------------------------------------------------------------------------- the question


class _Writer:
    """Writes a question."""

    def __init__(self, context: Any, builder: Any, words: _Words) -> None:
        self.context, self.builder, self.words = context, builder, words

    def number(self, kind: Any, value: Any) -> Any:
        """Return an integer argument."""
        if isinstance(kind, types.Omitted):
            return _i64(int(kind.value))
        if isinstance(kind, (types.IntegerLiteral, types.BooleanLiteral)):
            return _i64(int(kind.literal_value))
        return self.context.cast(self.builder, value, kind, types.int64)

    def pair(self, kind: Any, value: Any) -> list[Any]:
        """Return an int, or a pair of them, as a pair."""
        items = items_of(kind)
        if items is None:
            return [self.number(kind, value)] * 2
        if len(items) == 1:
            return self.pair(items[0], self.builder.extract_value(value, 0))
        return [self.number(item, self.builder.extract_value(value, i)) for i, item in enumerate(items)]

    def put(self, at: int, *values: Any) -> None:
        """Write words."""
        for i, value in enumerate(values):
            self.words[at + i] = value

    def padding(self, kind: Any, value: Any) -> None:
        """Write a padding, in numbers or as a text."""
        text = _text_of(kind)
        if text is not None or isinstance(kind, types.UnicodeType):
            self.put(layout.PADDING, 0, 0, 0, 0)
            self.text(kind, value, layout.PADDING_TEXT, layout.TEXT_OF_PADDING)
            return
        items = items_of(kind) or ()
        if len(items) == 1:
            self.padding(items[0], self.builder.extract_value(value, 0))
            return
        if any(items_of(item) is not None for item in items):
            pads = [self.pair(item, self.builder.extract_value(value, i)) for i, item in enumerate(items)]
        else:
            rows, columns = self.pair(kind, value)
            pads = [[rows, rows], [columns, columns]]
        self.put(layout.PADDING, *pads[0], *pads[1], 0)

    def text(self, kind: Any, value: Any, at: int, text_at: int) -> None:
        """Write a text's hash, and where it is."""
        text = _text_of(kind)
        if text is not None:
            value = self.context.get_constant_generic(self.builder, types.unicode_type, text)
        string = cgutils.create_struct_proxy(types.unicode_type)(self.context, self.builder, value)
        # Numba numbers the kinds of strings as Python does: by the bytes of a character.
        size = self.builder.zext(string.kind, _I64)
        data = self.builder.ptrtoint(string.data, _I64)
        self.put(text_at, data, string.length, size)
        if text is not None:
            self.put(at, _i64(_hash_of(text)))
        else:
            self.put(at, self._hash(string.data, self.builder.mul(string.length, size)))

    def _hash(self, data: Any, count: Any) -> Any:
        """Return the hash of so many bytes: `_hash_of`, as it is compiled."""
        builder = self.builder
        h = cgutils.alloca_once_value(builder, _i64(_BASIS))
        with cgutils.for_range(builder, count) as loop:
            byte = builder.zext(builder.load(builder.gep(data, [loop.index])), _I64)
            builder.store(builder.mul(builder.xor(builder.load(h), byte), _i64(_PRIME)), h)
        return builder.or_(builder.load(h), _i64(1))

    def array(self, kind: Any, value: Any, role: int, scalar: int) -> None:
        """Write what is known of an array; a number has no axes and `scalar` bytes."""
        at = layout.BLOCKS + role * layout.BLOCK
        if is_none(kind):
            self.put(at + layout.CODE, 0)
            return
        code = layout.PRESENT
        if not isinstance(kind, types.Array):
            self.put(at + layout.CODE, code | scalar << layout.ITEMSIZE_SHIFT)
            self.put(at + layout.SHAPE, *[0] * layout.AXES)
            self.put(at + layout.DATA, 0)
            return
        code |= kind.ndim << layout.AXES_SHIFT | as_dtype(kind.dtype).itemsize << layout.ITEMSIZE_SHIFT
        code |= 0 if kind.mutable else layout.READ_ONLY
        code |= 0 if kind.aligned else layout.MISALIGNED
        array = make_array(kind)(self.context, self.builder, value)
        none = [_i64(0)] * (layout.AXES - kind.ndim)
        shape = cgutils.unpack_tuple(self.builder, array.shape, kind.ndim)
        strides = cgutils.unpack_tuple(self.builder, array.strides, kind.ndim)
        self.put(at + layout.CODE, code)
        self.put(at + layout.SHAPE, *shape, *none)
        self.put(at + layout.STRIDES, *strides, *none)
        self.put(at + layout.DATA, self.builder.ptrtoint(array.data, _I64))


# FNV-1a, of the bytes of a text; never 0, which stands for no text.
_BASIS, _PRIME = 0x4BF29CE484222325, 0x100000001B3


def _hash_of(text: str) -> int:
    """Return the hash of a text as Python has it in memory, with as many bytes a character as the last one needs."""
    most, order = max(map(ord, text), default=0), "le" if sys.byteorder == "little" else "be"
    h = _BASIS
    for byte in text.encode("latin-1" if most < 256 else f"utf-16-{order}" if most < 65536 else f"utf-32-{order}"):
        h = (h ^ byte) * _PRIME % 2**64
    h |= 1
    return h - 2**64 if h >= 2**63 else h


def _text_of(kind: Any) -> str | None:
    """Return a text, or names as one text, where it is known as code is compiled."""
    value = value_of(kind)
    items = items_of(kind)
    if items is not None and all(isinstance(item, types.StringLiteral) for item in items):
        value = "".join(item.literal_value + layout.SEPARATOR for item in items)
    return value if isinstance(value, str) else None


def _answer(context: Any, builder: Any, words: _Words, question: Any) -> None:
    """Have a question answered: by the table, or by Python."""
    _call(builder, _state(context, builder, question), layout.FIND, question, _i64(0))
    with builder.if_then(builder.icmp_signed("==", words[layout.ANSWER], _i64(0)), likely=False):
        entry = _serve(context, builder, layout.PLAN, question, _i64(0))
        _leave_where_python_raised(context, builder, entry)
        words[layout.ANSWER] = entry


# ---------------------------------------------------------------------------------------------- the call


class _Value(NamedTuple):
    """A value and its type."""

    kind: Any
    value: Any = None


#: What a function has for options that it does not take.
_DEFAULTS = {
    name: _Value(types.Omitted(default))
    for name, default in (
        ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1), ("strategy", "auto"), ("accumulate", False)
    )
}  # fmt: skip
_SIZES = "kernel_size", "input_size", "output_padding"
_NONE = _Value(types.none)


class _Call:
    """The code of one call."""

    def __init__(self, context: Any, builder: Any, function: Function, given: dict[str, _Value], new: Any) -> None:
        self.context, self.builder, self.function, self.given = context, builder, function, given
        self.resolved: Resolved = resolve(function, {name: value.kind for name, value in given.items()}, new)
        self.words = _Words(builder, cgutils.alloca_once(builder, ir.ArrayType(_I64, layout.QUESTION)))
        self.question = builder.ptrtoint(self.words.first, _I64)
        self.new: list[_Value] = []  #: arrays that only this code knows

    def _argument(self, name: str) -> _Value:
        return self.given.get(name) or _DEFAULTS.get(name, _NONE)

    def _out(self, name: str) -> _Value:
        """Return a result that the caller gives, or none."""
        if name not in self.resolved.given:
            return _NONE
        value = self.given["out"].value
        if len(self.function.results) > 1:
            value = self.builder.extract_value(value, self.function.results.index(name))
        return _Value(self.resolved.given[name], value)

    def ask(self, plan: Any) -> None:
        """Write the question, and have it answered."""
        writer, function = _Writer(self.context, self.builder, self.words), self.function
        added = self.builder.and_(writer.number(*self._argument("accumulate")), _i64(layout.ACCUMULATE))
        writer.put(layout.FUNCTION, function.number)
        writer.put(layout.FLAGS, self.builder.or_(_i64(self.resolved.flags), added))
        writer.put(layout.STRIDE, *writer.pair(*self._argument("stride")))
        writer.padding(*self._argument("padding"))
        writer.put(layout.DILATION, *writer.pair(*self._argument("dilation")))
        writer.put(layout.GROUPS, writer.number(*self._argument("groups")))
        size = next((self.given[name] for name in _SIZES if name in self.given), _NONE)
        none = is_none(size.kind)
        writer.put(layout.SIZED, int(not none), *([_i64(0)] * 2 if none else writer.pair(*size)))
        if plan is not None:
            writer.put(layout.SIZE, plan)
        writer.text(*self._argument("strategy"), layout.STRATEGY, layout.TEXT_OF_STRATEGY)
        arrays = {function.role(name): self.given[name] for name in function.inputs}
        arrays |= {function.role(name): self._out(name) for name in function.results}
        w = self.given.get("w", _NONE).kind
        scalar = as_dtype(w.dtype).itemsize if isinstance(w, types.Array) else 0
        for role in range(len(layout.ARRAYS)):
            writer.array(*arrays.get(role, _NONE), role, scalar)
        _answer(self.context, self.builder, self.words, self.question)

    # ------------------------------------------------------------------------------------------ operands

    def _number(self, kind: Any, value: Any) -> Any:
        """Return where a number is, in the dtype of the arithmetic; a Python number takes w's dtype first."""
        if not isinstance(kind, types.Array):
            w = self.given["w"].kind.dtype
            kind, value = w, self.context.cast(self.builder, value, kind, w)
        else:
            array = make_array(kind)(self.context, self.builder, value)
            kind, value = kind.dtype, self.context.unpack_value(self.builder, kind.dtype, array.data)
        return cgutils.alloca_once_value(
            self.builder, self.context.cast(self.builder, value, kind, self.resolved.dtype)
        )

    def _operand(self, kind: Any, value: Any) -> Any:
        """Return the address of an array as programs take it: C-contiguous, and of the dtype of the arithmetic."""
        array = isinstance(kind, types.Array)
        dtype = self.resolved.dtype
        if not array or (kind.ndim == 0 and kind.dtype != dtype):
            return self.builder.ptrtoint(self._number(kind, value), _I64)
        if kind.dtype != dtype or (kind.ndim and kind.layout != "C") or not kind.aligned:
            value = self._copy(kind, value)
            kind = types.Array(dtype, kind.ndim, "C")
            self.new.append(_Value(kind, value))
        return self.builder.ptrtoint(make_array(kind)(self.context, self.builder, value).data, _I64)

    def _copy(self, kind: Any, value: Any) -> Any:
        """Return a copy that is contiguous and of the dtype of the arithmetic.

        `copy[...] = a` does the same, and takes Numba seconds to compile.
        """
        context, builder, dtype = self.context, self.builder, self.resolved.dtype
        array = make_array(kind)(context, builder, value)
        shape, strides = (cgutils.unpack_tuple(builder, each, kind.ndim) for each in (array.shape, array.strides))
        to = types.Array(dtype, kind.ndim, "C")
        copy = _empty(context, builder, to, shape)
        copied = make_array(to)(context, builder, copy)
        to_strides = cgutils.unpack_tuple(builder, copied.strides, kind.ndim)
        with cgutils.loop_nest(builder, shape, _I64) as places:
            source = cgutils.get_item_pointer2(context, builder, array.data, shape, strides, "A", places)
            place = cgutils.get_item_pointer2(context, builder, copied.data, shape, to_strides, "C", places)
            item = load_item(context, builder, kind, source)
            store_item(context, builder, to, context.cast(builder, item, kind.dtype, dtype), place)
        return copy

    def _result(self, name: str) -> _Value:
        """Return where a result goes: what the caller gave, or a new array."""
        kind, given = self.resolved.results[name], self._out(name)
        if not is_none(given.kind):
            self.context.nrt.incref(self.builder, kind, given.value)
            return given
        place = layout.RESULTS + layout.AXES * self.function.results.index(name)
        entry = _Words(self.builder, self.words[layout.ANSWER])
        return _Value(kind, _empty(self.context, self.builder, kind, [entry[place + i] for i in range(kind.ndim)]))

    # ----------------------------------------------------------------------------------------------- run

    def run(self) -> Any:
        """Run what answers, and return the results."""
        operands: list[Any] = [0] * len(layout.ARRAYS)
        for name in self.function.inputs:
            if not is_none(self.given[name].kind):
                operands[self.function.role(name)] = self._operand(*self.given[name])
        results = {name: self._result(name) for name in self.resolved.results}
        for name, (kind, value) in results.items():
            data = make_array(kind)(self.context, self.builder, value).data
            operands[self.function.role(name)] = self.builder.ptrtoint(data, _I64)
        for role, operand in enumerate(operands):
            self.words[layout.OPERANDS + role] = operand
        status = self._perform()
        for kind, value in self.new:
            self.context.nrt.decref(self.builder, kind, value)
        with self.builder.if_then(self.builder.icmp_signed("<", status, _i64(0)), likely=False):
            for kind, value in results.values():
                self.context.nrt.decref(self.builder, kind, value)
            self.context.call_conv.return_exc(self.builder)
        if len(self.function.results) == 1:
            return next(iter(results.values())).value
        none = self.context.get_dummy_value()
        items = [results[name].value if name in results else none for name in self.function.results]
        return self.context.make_tuple(self.builder, self.resolved.returned, items)

    def _perform(self) -> Any:
        """Run what answers: in native code, or in Python; return what is negative where that raised."""
        context, builder, words = self.context, self.builder, self.words
        entry = words[layout.ANSWER]
        nbytes = _Words(builder, entry)[layout.NBYTES]
        scratch = cgutils.alloca_once_value(builder, ir.Constant(cgutils.voidptr_t, None))
        with builder.if_then(builder.icmp_signed(">", nbytes, _i64(0))):
            meminfo = context.nrt.meminfo_alloc(builder, builder.add(nbytes, _i64(_ALIGNMENT)))
            builder.store(meminfo, scratch)
            words[layout.SCRATCH] = builder.ptrtoint(context.nrt.meminfo_data(builder, meminfo), _I64)
        _call(builder, _state(context, builder, self.question), layout.RUN, self.question, entry)
        status = cgutils.alloca_once_value(builder, _i64(0))
        with builder.if_then(builder.icmp_signed("!=", words[layout.ANSWER], _i64(0)), likely=False):
            builder.store(_serve(context, builder, layout.PERFORM, self.question, entry), status)
        context.nrt.decref(builder, types.MemInfoPointer(types.voidptr), builder.load(scratch))  # nothing, for null
        return builder.load(status)


def _empty(context: Any, builder: Any, kind: Any, shape: list[Any]) -> Any:
    """Return a new array."""
    itemsize = as_dtype(kind.dtype).itemsize
    strides = [_i64(itemsize)]
    for size in reversed(shape):
        strides.insert(0, builder.mul(strides[0], size))
    nbytes, *strides = strides
    meminfo = context.nrt.meminfo_alloc_aligned(builder, nbytes, _ALIGNMENT)
    data = context.nrt.meminfo_data(builder, meminfo)
    array = make_array(kind)(context, builder)
    populate_array(
        array,
        data=builder.bitcast(data, context.get_data_type(kind.dtype).as_pointer()),
        shape=cgutils.pack_array(builder, shape, ty=_I64),
        strides=cgutils.pack_array(builder, strides, ty=_I64),
        itemsize=_i64(itemsize),
        meminfo=meminfo,
    )
    return array._getvalue()


def lower(function: Function) -> Any:
    """Return what writes the code of a function's calls, as Numba wants it."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return write(context, builder, function, sig, args)

    return code


def write(
    context: Any, builder: Any, function: Function, sig: Any, args: Any, plan: Any = None, new: Any = None
) -> Any:
    """Write the code of a call, or of one of a plan by its number, whose new result is of a type."""
    values = map(_Value, sig.args, args)
    call = _Call(context, builder, function, dict(zip(function.names, values, strict=True)), new)
    call.ask(plan)
    return impl_ret_new_ref(context, builder, sig.return_type, call.run())


def number_of(context: Any, builder: Any, pickled: bytes) -> Any:
    """Return the number of a plan that the code has as bytes; Python is asked for it once."""
    kept = cgutils.add_global_variable(builder.module, _I64, "nhwconv_plan")
    kept.linkage, kept.initializer = "internal", _i64(0)
    number = cgutils.alloca_once_value(builder, builder.load_atomic(kept, "acquire", 8))
    with builder.if_then(builder.icmp_signed("==", builder.load(number), _i64(0)), likely=False):
        data = cgutils.global_constant(builder, "nhwconv_pickled", cgutils.make_bytearray(pickled))
        found = _serve(context, builder, layout.NUMBER, builder.ptrtoint(data, _I64), _i64(len(pickled)))
        _leave_where_python_raised(context, builder, found)
        builder.store_atomic(found, kept, "release", 8)
        builder.store(found, number)
    return builder.load(number)
