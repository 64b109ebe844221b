"""Vector instructions and memory moves for bodies, written as LLVM IR.

Bodies work on typed pointers: ``numbers(address, ITEMSIZE)`` makes one of an address, ``at(x, offset)`` moves it by so
many elements, and ``x[offset]`` is an element. **Nothing is bounds-checked**: every intrinsic says which elements it
touches, and its callers keep to that.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..runtime import machine

__all__ = [
    "Emitter",
    "add_rows",
    "at",
    "copy",
    "copy_rows",
    "fetch_add",
    "fill_zero",
    "integers",
    "numbers",
    "prefetch",
    "stack",
    "transpose",
    "transpose_exact",
]

I64 = ir.IntType(64)
I1 = ir.IntType(1)
SCALARS = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
_SUFFIX = {"float32": "f32", "float64": "f64"}
#: What x86 calls them in the names of its instructions, by their size.
_SUFFIX_X86 = {4: "sf", 8: "df"}
_ITEMSIZE = {"float32": 4, "float64": 8}


def i64(value):
    """Return an integer constant."""
    return ir.Constant(I64, value)


#: What `numbers` makes of an address, by the size of an element. Half types are integers here.
_POINTERS = {
    2: types.CPointer(types.uint16),
    4: types.CPointer(types.float32),
    8: types.CPointer(types.float64),
}


def _address(context, builder, sig, args):
    return builder.inttoptr(args[0], context.get_value_type(sig.return_type))


@intrinsic(prefer_literal=True)
def numbers(typingctx, address, itemsize):
    """Return an address as a pointer to numbers of this size."""
    return _POINTERS[itemsize.literal_value](types.intp, itemsize), _address


@intrinsic
def integers(typingctx, address):
    """Return an address as a pointer to 64-bit integers."""
    return types.CPointer(types.int64)(types.intp), _address


@intrinsic(prefer_literal=True)
def stack(typingctx, nbytes):
    """Return the address of so many bytes, a number known now, on the stack of the function that asks."""

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():  # without Numba's helper, which fills it with zeros
            memory = builder.alloca(ir.IntType(8), size=sig.args[0].literal_value)
        return builder.ptrtoint(memory, I64)

    return types.intp(nbytes), codegen


@intrinsic
def at(typingctx, pointer, offset):
    """Return a pointer to the element that lies so many elements further on."""
    signature = pointer(pointer, types.intp)

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return signature, codegen


class Emitter:
    """Emits vector instructions for one scalar type at this machine's width."""

    def __init__(self, builder, dtype):
        dtype = str(dtype)
        self.builder = builder
        self.scalar = SCALARS[dtype]
        self.itemsize = _ITEMSIZE[dtype]
        self.lanes = machine.lanes(self.itemsize)
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.mask_type = ir.VectorType(I1, self.lanes)
        self.name = f"v{self.lanes}{_SUFFIX[dtype]}"
        self.zero = ir.Constant(self.vector, None)

    def call(self, name, result, args):
        """Call one of LLVM's own functions."""
        kind = ir.FunctionType(result, [a.type for a in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)

    def _as_vector(self, address):
        return self.builder.bitcast(address, self.vector.as_pointer())

    def load(self, address, mask=None):
        """Load a vector; lanes outside `mask` are zero and not read."""
        if mask is None:
            return self.builder.load(self._as_vector(address), align=self.itemsize)
        args = [self._as_vector(address), ir.Constant(ir.IntType(32), self.itemsize), mask, self.zero]
        return self.call(f"llvm.masked.load.{self.name}.p0", self.vector, args)

    def store(self, value, address, mask=None):
        """Store a vector; lanes outside `mask` are not written."""
        if mask is None:
            self.builder.store(value, self._as_vector(address), align=self.itemsize)
            return
        args = [value, self._as_vector(address), ir.Constant(ir.IntType(32), self.itemsize), mask]
        self.call(f"llvm.masked.store.{self.name}.p0", ir.VoidType(), args)

    def splat(self, scalar):
        """Return a vector whose lanes all hold `scalar`."""
        builder = self.builder
        kind = ir.VectorType(scalar.type, self.lanes)
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None)
        return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def prefetch(self, address):
        """Ask for the cache line at an address, which need not exist, in L2."""
        number = ir.IntType(32)
        line = self.builder.bitcast(address, ir.IntType(8).as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), [line, number(0), number(2), number(1)])

    def stream(self, value, address):
        """Store a vector at a multiple of its size past the caches.

        Such stores are drained by the next atomic operation, which is how every worker ends.
        """
        builder = self.builder
        instruction = builder.store(value, self._as_vector(address), align=self.lanes * self.itemsize)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))

    def constant(self, value):
        """Return a vector whose lanes all hold a number known now."""
        return ir.Constant(self.vector, [ir.Constant(self.scalar, float(value))] * self.lanes)

    def broadcast(self, address):
        """Load one number into all lanes."""
        return self.splat(self.builder.load(address))

    def multiply_add(self, a, b, c):
        """Return ``a * b + c``, fused where the CPU can."""
        # fmuladd, not fma: without the instruction, fma would become one library call a lane.
        return self.call(f"llvm.fmuladd.{self.name}", self.vector, [a, b, c])

    def opaque(self, value):
        """Return the same value, which the optimiser can no longer relate to others."""
        kind = ir.FunctionType(value.type, [value.type])
        return self.builder.asm(kind, "", "=r,0", [value], side_effect=False)

    def first_lanes(self, count):
        """Return the mask of lanes below `count`, which may be zero, negative or more than there are."""
        positions = ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", positions, self.splat(count))

    def permute(self, value, order):
        """Return ``value[order[i]]`` in lane i; `order` is a vector of integers of the numbers' size."""
        return self.call(f"llvm.x86.avx512.permvar.{_SUFFIX_X86[self.itemsize]}.512", self.vector, [value, order])

    def concatenate(self, addresses):
        """Load a vector in pieces of 16 bytes from these addresses."""
        count = 16 // self.itemsize
        kind = ir.VectorType(self.scalar, count)
        parts = [self.builder.load(self.builder.bitcast(a, kind.as_pointer()), align=self.itemsize) for a in addresses]
        while len(parts) > 1:
            count *= 2
            order = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(count)))
            parts = [self.builder.shuffle_vector(a, b, order) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def interleave_pieces(self, a, b, upper):
        """Interleave as `interleave`, but each piece of 16 bytes by itself."""
        piece = 16 // self.itemsize
        order = []
        for start in range(0, self.lanes, piece):
            half = start + (piece // 2 if upper else 0)
            order += [half + i // 2 + (i % 2) * self.lanes for i in range(piece)]
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), order))

    def interleave(self, a, b, upper):
        """Return ``a[i], b[i], a[i+1], b[i+1], ...`` from the lower or the upper halves."""
        start = self.lanes // 2 if upper else 0
        order = [start + i // 2 + (i % 2) * self.lanes for i in range(self.lanes)]
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), order))


def _bytes(ty):
    """Return the size of what a pointer points to."""
    return ty.dtype.bitwidth // 8


@intrinsic
def prefetch(typingctx, pointer, count):
    """Ask for the cache lines of `count` numbers, which need not exist, in L2."""
    signature = types.void(pointer, types.intp)

    def codegen(context, builder, sig, args):
        emit = Emitter(builder, sig.args[0].dtype)
        line = i64(machine.LINE // emit.itemsize)
        lines = builder.sdiv(builder.add(args[1], builder.sub(line, i64(1))), line)
        with cgutils.for_range(builder, lines) as loop:
            emit.prefetch(builder.gep(args[0], [builder.mul(loop.index, line)]))

    return signature, codegen


@intrinsic
def copy(typingctx, target, source, count):
    """Copy `count` elements; the two must not overlap."""
    signature = types.void(target, source, types.intp)

    def codegen(context, builder, sig, args):
        cgutils.raw_memcpy(builder, *args, _bytes(sig.args[0]), align=1)

    return signature, codegen


@intrinsic
def copy_rows(typingctx, target, t_row, source, s_row, rows, columns):
    """Copy `rows` rows of `columns` numbers: ``target[r*t_row + j] = source[r*s_row + j]``; they must not overlap.

    Short rows are copied in less time than it takes to call what copies bytes.
    """
    signature = types.void(target, types.intp, source, *[types.intp] * 3)

    def codegen(context, builder, sig, args):
        to, t_row, of, s_row, rows, columns = args
        emit = Emitter(builder, sig.args[0].dtype)
        whole = builder.sdiv(columns, i64(emit.lanes))
        # The last vector begins where it ends with the row, over what is copied already; or it is the only one.
        short = builder.icmp_signed("<", columns, i64(emit.lanes))
        rest = builder.icmp_signed("!=", builder.mul(whole, i64(emit.lanes)), columns)
        last = builder.sub(columns, i64(emit.lanes))
        mask = emit.first_lanes(columns)

        def copy_vector(to, of, place, mask=None):
            emit.store(emit.load(builder.gep(of, [place]), mask), builder.gep(to, [place]), mask)

        with cgutils.for_range(builder, rows) as row:
            source = builder.gep(of, [builder.mul(row.index, s_row)])
            target = builder.gep(to, [builder.mul(row.index, t_row)])
            with cgutils.for_range(builder, whole) as vector:
                copy_vector(target, source, builder.mul(vector.index, i64(emit.lanes)))
            with builder.if_then(rest), builder.if_else(short) as (then, otherwise):
                with then:
                    copy_vector(target, source, i64(0), mask)
                with otherwise:
                    copy_vector(target, source, last)

    return signature, codegen


@intrinsic
def fill_zero(typingctx, target, count):
    """Set `count` elements to zero."""
    signature = types.void(target, types.intp)

    def codegen(context, builder, sig, args):
        target, count = args
        cgutils.memset(builder, target, builder.mul(count, i64(_bytes(sig.args[0]))), 0)

    return signature, codegen


@intrinsic
def fetch_add(typingctx, counters, i):
    """Add one to ``counters[i]`` atomically and return what it was."""
    signature = types.int64(counters, types.intp)

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), i64(1), "monotonic")

    return signature, codegen


def _transposed_part(emit, of, s_row, rows, columns):
    """Return the columns of a block that may be smaller than LANES x LANES, zeros outside."""
    builder, n = emit.builder, emit.lanes
    block = []
    for r in range(n):
        valid = builder.select(builder.icmp_signed("<", i64(r), rows), columns, i64(0))
        block.append(emit.load(builder.gep(of, [builder.mul(i64(r), s_row)]), emit.first_lanes(valid)))
    # Interleaving row i with row i + n/2 moves one bit of the row number into the lane number; once for each bit, and
    # rows and lanes have changed places.
    for _ in range(n.bit_length() - 1):
        block = [emit.interleave(block[i // 2], block[i // 2 + n // 2], upper=bool(i % 2)) for i in range(n)]
    return block


def _transposed_block(emit, of, s_row):
    """Return the columns of a whole block: gathered in pieces of 16 bytes, which then only turn in place."""
    builder, n = emit.builder, emit.lanes
    piece = 16 // emit.itemsize
    columns = []
    for c in range(0, n, piece):
        # Vector r holds, one piece each, columns c : c + piece of rows r, r + piece, r + 2 * piece, ...
        turn = [
            emit.concatenate(
                [builder.gep(of, [builder.add(builder.mul(i64(q), s_row), i64(c))]) for q in range(r, n, piece)]
            )
            for r in range(piece)
        ]
        for _ in range(piece.bit_length() - 1):
            turn = [
                emit.interleave_pieces(turn[i // 2], turn[i // 2 + piece // 2], upper=bool(i % 2)) for i in range(piece)
            ]
        columns += turn
    return columns


@intrinsic
def transpose(typingctx, source, s_row, rows, columns, target, t_row):
    """Write the transpose of a block of up to LANES x LANES numbers.

    Reads ``source[r*s_row + k]`` for ``r < rows``, ``k < columns``; writes ``target[k*t_row + r]`` for ``k < columns``
    and **all** ``r < LANES``, zeros where ``r >= rows``.
    """
    signature = types.void(source, *[types.intp] * 3, target, types.intp)

    def codegen(context, builder, sig, args):
        of, s_row, rows, columns, to, t_row = args
        emit = Emitter(builder, sig.args[0].dtype)
        full = builder.icmp_signed("==", builder.add(rows, columns), i64(2 * emit.lanes))
        with builder.if_else(full) as (then, otherwise):
            with then:
                for k, row in enumerate(_transposed_block(emit, of, s_row)):
                    emit.store(row, builder.gep(to, [builder.mul(i64(k), t_row)]))
            with otherwise:
                for k, row in enumerate(_transposed_part(emit, of, s_row, rows, columns)):
                    with builder.if_then(builder.icmp_signed("<", i64(k), columns)):
                        emit.store(row, builder.gep(to, [builder.mul(i64(k), t_row)]))

    return signature, codegen


@intrinsic
def transpose_exact(typingctx, source, s_row, rows, columns, add, e, target, t_row):
    """Write the transpose of up to LANES x LANES numbers, and nothing beside it.

    Reads ``source[r*s_row + k]`` and writes ``target[k*t_row + r]`` for ``r < rows``, ``k < columns``; where `add`,
    ``e[r]`` is added.
    """
    signature = types.void(source, *[types.intp] * 3, types.boolean, e, target, types.intp)

    def codegen(context, builder, sig, args):
        of, s_row, rows, columns, add, e, to, t_row = args
        emit = Emitter(builder, sig.args[0].dtype)
        valid = emit.first_lanes(rows)
        none = ir.Constant(emit.mask_type, None)
        more = emit.load(e, builder.select(add, valid, none))
        for k, row in enumerate(_transposed_part(emit, of, s_row, rows, columns)):
            exists = builder.icmp_signed("<", i64(k), columns)
            address = builder.gep(to, [builder.mul(i64(k), t_row)])
            emit.store(builder.fadd(row, more), address, builder.select(exists, valid, none))

    return signature, codegen


@intrinsic
def add_rows(typingctx, source, s_row, rows, columns, target):
    """Add `rows` rows of `columns` numbers to one: ``target[j] += sum over r of source[r*s_row + j]``."""
    signature = types.void(source, *[types.intp] * 3, target)

    def codegen(context, builder, sig, args):
        of, s_row, rows, columns, to = args
        emit = Emitter(builder, sig.args[0].dtype)

        def add(first, vectors, mask):
            """Sum `vectors` vectors side by side, two rows at a time: additions need not wait for one another."""
            sums = [[cgutils.alloca_once_value(builder, emit.zero) for _ in range(vectors)] for _ in range(2)]
            pairs = builder.sdiv(builder.add(rows, i64(1)), i64(2))
            with cgutils.for_range(builder, pairs) as loop:
                for i in range(2):
                    row = builder.add(builder.mul(loop.index, i64(2)), i64(i))
                    exists = builder.icmp_signed("<", row, rows)
                    # The last row of an odd number is added once and its twin, itself, times zero lanes.
                    row = builder.select(exists, row, builder.sub(rows, i64(1)))
                    valid = builder.select(exists, mask, ir.Constant(emit.mask_type, None))
                    start = builder.gep(of, [builder.add(first, builder.mul(row, s_row))])
                    for v in range(vectors):
                        address = builder.gep(start, [i64(v * emit.lanes)])
                        total = builder.fadd(builder.load(sums[i][v]), emit.load(address, valid))
                        builder.store(total, sums[i][v])
            for v in range(vectors):
                address = builder.gep(to, [builder.add(first, i64(v * emit.lanes))])
                total = builder.fadd(builder.load(sums[0][v]), builder.load(sums[1][v]))
                emit.store(builder.fadd(emit.load(address, mask), total), address, mask)

        wide = 4 * emit.lanes
        blocks = builder.sdiv(columns, i64(wide))
        with cgutils.for_range(builder, blocks) as block:
            add(builder.mul(block.index, i64(wide)), 4, ir.Constant(emit.mask_type, [1] * emit.lanes))
        done = builder.mul(blocks, i64(wide))
        left = builder.sub(columns, done)
        vectors = builder.sdiv(builder.add(left, i64(emit.lanes - 1)), i64(emit.lanes))
        with cgutils.for_range(builder, vectors) as rest:
            first = builder.add(done, builder.mul(rest.index, i64(emit.lanes)))
            add(first, 1, emit.first_lanes(builder.sub(columns, first)))

    return signature, codegen
