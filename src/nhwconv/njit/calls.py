"""What is compiled into users' functions: questions, results, and calls of what answers them.

It goes wherever the user's code goes: into files that Numba keeps, and into other versions' hands. So it holds no
address of anything: those are found by way of the state, whose address each library asks Python for once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import as_dtype

from . import layout

__all__ = ["consult", "items_of", "result", "run"]

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


def _is_none(kind: Any) -> bool:
    return isinstance(kind, types.NoneType) or (isinstance(kind, types.Omitted) and kind.value is None)


def items_of(kind: Any) -> tuple[Any, ...] | None:
    """Return the types in a tuple's; None for any other."""
    items: Any = kind
    return tuple(items) if isinstance(kind, types.BaseTuple) else None


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
        if _is_none(kind):
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
    """Return the hash of a text of one byte a character."""
    h = _BASIS
    for byte in text.encode("latin-1"):
        h = (h ^ byte) * _PRIME % 2**64
    h |= 1
    return h - 2**64 if h >= 2**63 else h


def _text_of(kind: Any) -> str | None:
    """Return a text, or names as one text, where it is known as code is compiled."""
    value = kind.value if isinstance(kind, types.Omitted) else getattr(kind, "literal_value", None)
    items = items_of(kind)
    if items is not None and all(isinstance(item, types.StringLiteral) for item in items):
        value = "".join(item.literal_value + layout.SEPARATOR for item in items)
    return value if isinstance(value, str) else None


@intrinsic(prefer_literal=True)
def consult(
    typingctx: Any, function: Any, flags: Any, accumulate: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    size: Any, strategy: Any, x: Any, w: Any, b: Any, y: Any, dy: Any, dx: Any, dw: Any, db: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Return the address of a question that is answered; where it is refused, Python's error is on its way."""
    kinds = (function, flags, accumulate, stride, padding, dilation, groups, size, strategy, x, w, b, y, dy, dx, dw, db)
    scalar = as_dtype(w.dtype).itemsize if isinstance(w, types.Array) else 0

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = _Words(builder, cgutils.alloca_once(builder, ir.ArrayType(_I64, layout.QUESTION)))
        writer = _Writer(context, builder, words)
        given = dict(zip(("function", "flags", "accumulate", "stride", "padding", "dilation", "groups", "size",
                          "strategy", *layout.ARRAYS), zip(sig.args, args, strict=True), strict=True))  # fmt: skip
        added = builder.and_(writer.number(*given["accumulate"]), _i64(1))
        writer.put(layout.FUNCTION, writer.number(*given["function"]))
        writer.put(layout.FLAGS, builder.or_(writer.number(*given["flags"]), added))
        writer.put(layout.STRIDE, *writer.pair(*given["stride"]))
        writer.padding(*given["padding"])
        writer.put(layout.DILATION, *writer.pair(*given["dilation"]))
        writer.put(layout.GROUPS, writer.number(*given["groups"]))
        none = _is_none(sig.args[7])
        writer.put(layout.SIZED, int(not none), *([_i64(0)] * 2 if none else writer.pair(*given["size"])))
        writer.text(*given["strategy"], layout.STRATEGY, layout.TEXT_OF_STRATEGY)
        for role, name in enumerate(layout.ARRAYS):
            writer.array(*given[name], role, scalar)
        question = builder.ptrtoint(words.first, _I64)
        _answer(context, builder, words, question)
        return question

    return types.intp(*kinds), codegen


def _answer(context: Any, builder: Any, words: _Words, question: Any) -> None:
    """Have a question answered: by the table, or by Python."""
    _call(builder, _state(context, builder, question), layout.FIND, question, _i64(0))
    with builder.if_then(builder.icmp_signed("==", words[layout.ANSWER], _i64(0)), likely=False):
        entry = _serve(context, builder, layout.PLAN, question, _i64(0))
        _leave_where_python_raised(context, builder, entry)
        words[layout.ANSWER] = entry


# ------------------------------------------------------------------------------------------ what answers


@intrinsic(prefer_literal=True)
def result(typingctx: Any, question: Any, index: Any, axes: Any, like: Any) -> tuple[Any, Any]:
    """Return a new array for a result: of so many axes, and of the elements of a type."""
    kind = types.Array(like.dtype, axes.literal_value, "C")
    place = layout.RESULTS + layout.AXES * index.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        entry = _Words(builder, _Words(builder, args[0])[layout.ANSWER])
        shape = [entry[place + axis] for axis in range(kind.ndim)]
        strides = [_i64(as_dtype(kind.dtype).itemsize)]
        for size in reversed(shape):
            strides.insert(0, builder.mul(strides[0], size))
        nbytes, *strides = strides
        meminfo = context.nrt.meminfo_alloc_aligned(builder, nbytes, _ALIGNMENT)
        array = make_array(kind)(context, builder)
        data = context.nrt.meminfo_data(builder, meminfo)
        populate_array(
            array,
            data=builder.bitcast(data, context.get_data_type(kind.dtype).as_pointer()),
            shape=cgutils.pack_array(builder, shape, ty=_I64),
            strides=cgutils.pack_array(builder, strides, ty=_I64),
            itemsize=_i64(as_dtype(kind.dtype).itemsize),
            meminfo=meminfo,
        )
        return array._getvalue()

    return kind(question, index, axes, like), codegen


@intrinsic
def run(
    typingctx: Any, question: Any, x: Any, w: Any, b: Any, y: Any, dy: Any, dx: Any, dw: Any, db: Any
) -> tuple[Any, Any]:
    """Run what a question was answered, on arrays that are C-contiguous and of one dtype."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        question, words = args[0], _Words(builder, args[0])
        for role, (kind, value) in enumerate(zip(sig.args[1:], args[1:], strict=True)):
            data: Any = 0
            if not _is_none(kind):
                data = builder.ptrtoint(make_array(kind)(context, builder, value).data, _I64)
            words[layout.OPERANDS + role] = data
        entry = words[layout.ANSWER]
        nbytes = _Words(builder, entry)[layout.NBYTES]
        scratch = cgutils.alloca_once_value(builder, ir.Constant(cgutils.voidptr_t, None))
        with builder.if_then(builder.icmp_signed(">", nbytes, _i64(0))):
            meminfo = context.nrt.meminfo_alloc(builder, builder.add(nbytes, _i64(_ALIGNMENT)))
            builder.store(meminfo, scratch)
            words[layout.SCRATCH] = builder.ptrtoint(context.nrt.meminfo_data(builder, meminfo), _I64)
        _call(builder, _state(context, builder, question), layout.RUN, question, entry)
        status = cgutils.alloca_once_value(builder, _i64(0))
        with builder.if_then(builder.icmp_signed("!=", words[layout.ANSWER], _i64(0)), likely=False):
            builder.store(_serve(context, builder, layout.PERFORM, question, entry), status)
        context.nrt.decref(builder, types.MemInfoPointer(types.voidptr), builder.load(scratch))  # nothing, for null
        _leave_where_python_raised(context, builder, builder.load(status))
        return context.get_dummy_value()

    return types.none(question, x, w, b, y, dy, dx, dw, db), codegen
