"""Depthwise convolution: channels on the lanes, taps or sums in registers, one row of one vector of channels a run.

Both kernels are emitted by one generator, for tiles of pixels that lie side by side:

- `correlate` (forward; the input gradient phase by phase): the sums of a tile's outputs stay in registers while the
  rows of taps pass by. A row's taps are loaded, then each column of x once, and used for all of its taps.
- `weight_grad`: the sums of some rows of taps stay in registers over whole rows of pixels. A tile's dy is loaded, then
  each column of x once, and used for all of its taps.

A tile's columns are known when it is emitted where stride and dilation are ("literal"); otherwise each tap loads its
own. Rows of taps outside of x are skipped by the caller. Columns outside are told apart tile by tile: the tiles of a
row whose columns are all inside load without asking, the others load such columns from a vector of zeros.

A row of taps is some chunks of Q1 taps and some of Q2, which covers kernels of any size and the two lengths that the
phases of a stride have. With a channel multiplier, x is gathered through a table of channel offsets.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import prange
from numba.core import cgutils, types
from numba.extending import intrinsic

from .. import machine
from .geometry import Fields, inside
from .jit import Kernel, kernel
from .simd import I64, Emitter, add_rows, fill_zero, i64, index, pointer
from .tasks import next_task

__all__ = ["CORRELATE", "WEIGHT_GRAD", "correlate", "weight_grad"]

#: Prefetched lines go to L2 (`prefetcht1`): a row ahead is too much for L1.
LOCALITY = 2

CORRELATE = Fields(
    # sizes: x, its channels, those of y, their padded number
    "h w c d padded "
    # rows of taps; chunks of Q1 and of Q2 in a row; taps of a row; channels of x that are summed (multiplier backwards)
    "R chunks_1 chunks_2 Q M "
    # how x is read: stride and dilation of columns in pixels; the offset of a channel's n-th row of taps is n * w_r ...
    "stride_h stride_w dilation_h dilation_w top left x_r "
    # where taps lie in the packed weights
    "w_0 w_r w_q w_m "
    # the grid of outputs, and where they lie in y, in elements
    "p q y_0 y_n y_p y_q "
    # one task: block_p rows of an image
    "block_p blocks tasks"
)

WEIGHT_GRAD = Fields(
    # sizes: images, x, its channels, those of y, their padded number, outputs
    "n h w c d padded p q "
    # rows of taps; chunks of Q1 and of Q2 in a row, taps of a row
    "R chunks_1 chunks_2 Q "
    # how x is read; from one row of taps, and of outputs, to the next
    "stride_h stride_w dilation_h dilation_w top left x_r x_p y_p "
    # slices of the rows of all images; rows that are summed in registers; channels of a task; numbers of a part
    "slices lines block_d part part_r tasks"
)


def tiles() -> tuple[int, ...]:
    """Return the numbers of pixels of a tile, largest first; any row is some of each."""
    return (14, 7, 4, 2, 1) if machine.registers() == 32 else (7, 4, 2, 1)


def sum_rows(Q: int) -> int:
    """Return how many rows of Q taps have their sums in registers at a time in the weight gradient."""
    # Of 32 registers, 14 hold dy; of 16, 7. Kernels of three rows are the common case: no sums idle there.
    return max(1, min(3, (15 if machine.registers() == 32 else 7) // Q))


class _Rows:
    """Emits a function that works on rows of pixels for one vector of channels."""

    def __init__(self, module, dtype, name, pointers, numbers, fields, geometry, literal):
        scalar = ir.FloatType() if dtype == types.float32 else ir.DoubleType()
        kind = ir.FunctionType(
            ir.VoidType(),
            [scalar.as_pointer()] * len(pointers) + [I64.as_pointer()] * 2 + [I64] * len(numbers),
        )
        self.function = ir.Function(module, kind, name)
        self.function.linkage = "internal"
        self.function.attributes.add("noinline")
        self.builder = builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.emitter = Emitter(builder, dtype)
        arguments = self.function.args
        self.at = dict(zip(pointers, arguments, strict=False))
        table, record, *rest = arguments[len(pointers) :]
        self.value = dict(zip(numbers, rest, strict=True))
        for field in fields:
            self.value[field] = builder.load(builder.gep(record, [i64(geometry.names.index(field))]))
        self.stride, self.dilation, self.gather = literal
        #: vectors of x, new to a row, that an output adds
        self.lines = max(1, self.stride * self.stride)
        emit, value = self.emitter, self.value
        self.mask = emit.first_lanes(value["channels"])
        self.full = builder.icmp_signed(">=", value["channels"], i64(emit.lanes))
        if self.gather:
            offsets = builder.bitcast(table, ir.VectorType(I64, emit.lanes).as_pointer())
            self.offsets = builder.load(offsets, align=8)

    def columns(self, pixels, taps):
        """Return the columns that a tile reads, in order: (stride steps, dilation steps, the (pixel, tap) pairs)."""
        if not self.stride:
            return [(i, s, [(i, s)]) for i in range(pixels) for s in range(taps)]
        found: dict[int, list[tuple[int, int]]] = {}
        for i in range(pixels):
            for s in range(taps):
                found.setdefault(i * self.stride + s * self.dilation, []).append((i, s))
        return [(column, 0, found[column]) for column in sorted(found)]

    def steps(self):
        """Return the pixels that one step of stride and one of dilation move; literal columns are counted in ones."""
        return (i64(1), i64(1)) if self.stride else (self.value["stride_w"], self.value["dilation_w"])

    def load_x(self, address, column, careful):
        """Load a vector of x; where `careful`, zeros if the column is outside, and only the channels there are."""
        builder, emit = self.builder, self.emitter
        if not careful:
            return emit.load(address)
        inside = builder.icmp_unsigned("<", column, self.value["w"])
        address = builder.select(inside, address, self.at["zero"])
        return emit.load(address, self.mask)

    def gather_x(self, address, column, careful):
        """Load the elements of x that the table of channel offsets names."""
        builder, emit = self.builder, self.emitter
        mask = self.mask
        if careful:
            inside = builder.icmp_unsigned("<", column, self.value["w"])
            mask = builder.and_(mask, emit.splat(inside))
        base = emit.splat(builder.ptrtoint(address, I64))
        places = builder.add(base, builder.mul(self.offsets, emit.splat(i64(emit.itemsize))))
        pointers = builder.inttoptr(places, ir.VectorType(ir.PointerType(), emit.lanes))
        args = [pointers, ir.Constant(ir.IntType(32), emit.itemsize), mask, emit.zero]
        return emit._call(f"llvm.masked.gather.{emit.name}.v{emit.lanes}p0", emit.vector, args)

    def each_column(self, address, first, pixels, taps, careful, action, rows=(0,)):
        """Load each column of a tile and call ``action(x, pairs, row)`` for some rows of x, so many elements apart.

        `address` is that of column `first`. The rows of a column follow one another, so that their sums, which do not
        wait for one another, keep the multiply-adds busy.
        """
        builder, pitch = self.builder, self.value["c"]
        stride, dilation = self.steps()
        load = self.gather_x if self.gather else self.load_x
        near, far = builder.mul(stride, pitch), builder.mul(dilation, pitch)
        a, b = 0, 0
        start, column_start = address, first
        for i, s, pairs in self.columns(pixels, taps):
            if i != a:
                start = builder.gep(start, [builder.mul(i64(i - a), near)])
                column_start = builder.add(column_start, builder.mul(i64(i - a), stride))
                address, column, a, b = start, column_start, i, 0
            if s != b:
                address, column, b = builder.gep(address, [far]), builder.add(column, dilation), s
            if (i, s) == (0, 0):
                column = column_start
            for row, offset in enumerate(rows):
                action(load(builder.gep(address, [offset]) if row else address, column, careful), pairs, row)

    def prefetch(self, ahead, pixel, pixels, lines=0):
        """Ask for some vectors a pixel of what the next rows read, in the order of memory.

        The processor's own prefetcher follows this order, and not that in which tiles read: it cannot tell where a
        vector of channels goes on.
        """
        builder, emit, lines = self.builder, self.emitter, lines or self.lines
        start = builder.gep(ahead, [builder.mul(pixel, i64(lines * emit.lanes))])
        how = [ir.Constant(ir.IntType(32), v) for v in (0, LOCALITY, 1)]  # to read, how near, data
        for line in range(pixels * lines):
            emit._call("llvm.prefetch.p0", ir.VoidType(), [builder.gep(start, [i64(line * emit.lanes)]), *how])

    def each_tile(self, count, reach, body):
        """Cut `count` pixels into tiles: ``body(pixel, column, P, careful)``; `reach` is a pixel's last column."""
        builder, value = self.builder, self.value
        done = cgutils.alloca_once(builder, I64)
        builder.store(i64(0), done)
        for pixels in tiles():
            head = builder.append_basic_block(f"tiles_{pixels}")
            tile = builder.append_basic_block(f"tile_{pixels}")
            after = builder.append_basic_block(f"after_{pixels}")
            builder.branch(head)
            builder.position_at_end(head)
            pixel = builder.load(done)
            end = builder.add(pixel, i64(pixels))
            builder.cbranch(builder.icmp_signed("<=", end, count), tile, after)
            builder.position_at_end(tile)
            stride = i64(self.stride) if self.stride else value["stride_w"]
            column = builder.add(builder.mul(pixel, stride), value["first"])
            last = builder.add(column, builder.add(builder.mul(i64(pixels - 1), stride), reach))
            inside = builder.and_(builder.icmp_signed(">=", column, i64(0)), builder.icmp_signed("<", last, value["w"]))
            with builder.if_else(builder.and_(inside, self.full)) as (plain, careful):
                with plain:
                    body(pixel, column, pixels, False)
                with careful:
                    body(pixel, column, pixels, True)
            builder.store(end, done)
            builder.branch(head)
            builder.position_at_end(after)


# --------------------------------------------------------------------------------------------- correlate

_C_POINTERS = ("x", "taps", "start", "zero", "ahead", "y")
_C_NUMBERS = ("rows", "channels", "stream")
_C_FIELDS = (
    "w", "c", "chunks_1", "chunks_2", "Q", "M", "stride_w", "dilation_w", "left", "x_r", "w_r", "w_q", "w_m", "q",
    "y_q",
)  # fmt: skip


@intrinsic(prefer_literal=True)
def correlate_row(
    typingctx, Q1, Q2, stride, dilation, gather, x, x_0, ahead, packed, taps, start, zero, y, y_0, table, t_0,
    geometry, phase, rows, channels, stream,
):  # fmt: skip
    """Compute a row of outputs for one vector of channels, of which `channels` exist.

    `rows` rows of taps are inside; `x_0` is the offset of column 0 of the first of them, `taps` that of its taps,
    `start` that of what the sums start from, `zero` that of a vector of zeros, `y_0` that of the row's first output.
    """
    literal = [v.literal_value for v in (Q1, Q2, stride, dilation, gather)]
    signature = types.void(
        Q1, Q2, stride, dilation, gather, x, x_0, ahead, packed, taps, start, zero, y, y_0, table, t_0,
        geometry, phase, rows, channels, stream,
    )  # fmt: skip

    def codegen(context, builder, sig, args):
        arrays = [
            "x",
            "x_0",
            "ahead",
            "packed",
            "taps",
            "start",
            "zero",
            "y",
            "y_0",
            "table",
            "t_0",
            "geometry",
            "phase",
        ]
        names = [*arrays, *_C_NUMBERS]
        kind, value = dict(zip(names, sig.args[5:], strict=True)), dict(zip(names, args[5:], strict=True))

        def number(name):
            return index(context, builder, kind[name], value[name])

        def place(array, offset):
            return pointer(context, builder, kind[array], value[array], number(offset))

        function = _correlate_function(builder.module, kind["y"].dtype, *literal)
        record = builder.bitcast(place("geometry", "phase"), I64.as_pointer())
        pairs = ["x x_0", "packed taps", "packed start", "packed zero", "x ahead", "y y_0"]
        addresses = [place(*pair.split()) for pair in pairs]
        builder.call(function, [*addresses, place("table", "t_0"), record, *(number(n) for n in _C_NUMBERS)])

    return signature, codegen


def _correlate_function(module, dtype, q1, q2, stride, dilation, gather):
    """Return the LLVM function of `correlate_row`, emitted into `module` on first use."""
    name = f"nhwconv_depthwise_{dtype}_{q1}_{q2}_{stride}_{dilation}_{gather}"
    if name in module.globals:
        return module.globals[name]
    rows = _Rows(module, dtype, name, _C_POINTERS, _C_NUMBERS, _C_FIELDS, CORRELATE, (stride, dilation, gather))
    builder, emit, value, at = rows.builder, rows.emitter, rows.value, rows.at
    dilation_step = i64(dilation) if dilation else value["dilation_w"]
    value["first"] = builder.neg(value["left"])
    start = emit.load(at["start"])
    reach = builder.mul(builder.sub(value["Q"], i64(1)), dilation_step)

    def body(pixel, column, pixels, careful):
        sums = [cgutils.alloca_once_value(builder, start) for _ in range(pixels)]
        x = builder.gep(at["x"], [builder.mul(column, value["c"])])
        rows.prefetch(at["ahead"], pixel, pixels)

        def chunk(x, column, taps, count):
            """Add the products of `count` taps."""
            tap = [emit.load(builder.gep(taps, [builder.mul(i64(s), value["w_q"])])) for s in range(count)]

            def add(vector, pairs, _):
                for i, s in pairs:
                    builder.store(emit.multiply_add(vector, tap[s], builder.load(sums[i])), sums[i])

            rows.each_column(x, column, pixels, count, careful, add)

        def tap_row(x, taps):
            if not q2:
                chunk(x, column, taps, q1)
                return
            moving = cgutils.alloca_once_value(builder, x), cgutils.alloca_once_value(builder, taps)
            where = cgutils.alloca_once_value(builder, column)
            builder.store(x, moving[0])
            builder.store(taps, moving[1])
            builder.store(column, where)
            for count, times in ((q1, "chunks_1"), (q2, "chunks_2")):
                with cgutils.for_range(builder, value[times]):
                    x, taps, here = builder.load(moving[0]), builder.load(moving[1]), builder.load(where)
                    chunk(x, here, taps, count)
                    columns = builder.mul(i64(count), dilation_step)
                    builder.store(builder.gep(x, [builder.mul(columns, value["c"])]), moving[0])
                    builder.store(builder.gep(taps, [builder.mul(i64(count), value["w_q"])]), moving[1])
                    builder.store(builder.add(here, columns), where)

        def tap_rows(x, taps):
            with cgutils.for_range(builder, value["rows"]) as loop:
                tap_row(
                    builder.gep(x, [builder.mul(loop.index, value["x_r"])]),
                    builder.gep(taps, [builder.mul(loop.index, value["w_r"])]),
                )

        if gather:
            with cgutils.for_range(builder, value["M"]) as loop:
                tap_rows(builder.gep(x, [loop.index]), builder.gep(at["taps"], [builder.mul(loop.index, value["w_m"])]))
        else:
            tap_rows(x, at["taps"])
        y = builder.gep(at["y"], [builder.mul(pixel, value["y_q"])])
        places = [builder.gep(y, [builder.mul(i64(i), value["y_q"])]) for i in range(pixels)]
        if careful:
            for s, place in zip(sums, places, strict=True):
                emit.store(builder.load(s), place, rows.mask)
            return
        with builder.if_else(builder.icmp_signed("!=", value["stream"], i64(0))) as (streamed, ordinary):
            with streamed:
                for s, place in zip(sums, places, strict=True):
                    emit.stream(builder.load(s), place)
            with ordinary:
                for s, place in zip(sums, places, strict=True):
                    emit.store(builder.load(s), place)

    rows.each_tile(value["q"], reach, body)
    builder.ret_void()
    return rows.function


@cache
def correlate(Q1: int, Q2: int, STRIDE: int, DILATION: int, GATHER: int, LANES: int) -> Kernel:
    """Make the kernel for rows of taps in chunks of Q1 and Q2; STRIDE of 0 means that stride and dilation vary."""

    def correlate(x, packed, y, table, stream, queue, workers, geometry):
        for worker in prange(workers):
            while True:
                task = next_task(queue, worker, workers, geometry[0].tasks)
                if task >= geometry[0].tasks:
                    break
                # All phases of a block of rows: they read the same rows of x and write the same lines of y.
                for phase in range(geometry.size):
                    g = geometry[phase]
                    n, block = task // g.blocks, task % g.blocks
                    start = packed.size - 2 * g.padded
                    zero = packed.size - g.padded
                    for p in range(block * g.block_p, min((block + 1) * g.block_p, g.p)):
                        row = p * g.stride_h - g.top
                        r_0, r_1 = inside(row, g.h, g.dilation_h, g.R)
                        x_0 = (n * g.h + row + r_0 * g.dilation_h) * g.w * g.c
                        w_0 = g.w_0 + r_0 * g.w_r
                        ahead = (n * g.h + row + (g.R - 1) * g.dilation_h + 1) * g.w * g.c
                        y_0 = g.y_0 + n * g.y_n + p * g.y_p
                        for j in range(0, g.d, LANES):
                            channel, t_0 = (0, j) if GATHER else (j, 0)
                            correlate_row(
                                Q1, Q2, STRIDE, DILATION, GATHER, x, x_0 + channel, ahead + j * g.w * g.stride_h,
                                packed, w_0 + j, start + j, zero, y, y_0 + j, table, t_0, geometry, phase,
                                r_1 - r_0, g.d - j, stream,
                            )  # fmt: skip

    return kernel(correlate)


# ------------------------------------------------------------------------------------------- weight_grad

_W_POINTERS = ("x", "dy", "ahead_x", "ahead_dy", "zero", "part")
_W_NUMBERS = ("taps", "rows", "lines", "first", "channels")
_W_FIELDS = ("w", "c", "d", "padded", "stride_w", "dilation_w", "q", "x_r", "x_p", "y_p", "part_r")


@intrinsic(prefer_literal=True)
def sum_products(
    typingctx, Q1, Q2, stride, dilation, gather, x, x_0, ahead_x, dy, dy_0, ahead_dy, parts, zero, part, table, t_0,
    geometry, taps, rows, lines, first, channels,
):  # fmt: skip
    """Add to a part the products of `lines` rows of dy with x, for one vector of channels, of which `channels` exist.

    For `taps` (Q1 or Q2) taps of each of `rows` (one, or `sum_rows`) rows of taps. `x_0` is the offset of column 0 of
    the first row of x, `first` the column that the first output meets with the first tap, `dy_0` the offset of that
    output, `part` that of the first tap's sums, and `zero` that of a vector of zeros in `parts`.
    """
    literal = [v.literal_value for v in (Q1, Q2, stride, dilation, gather)]
    signature = types.void(
        Q1, Q2, stride, dilation, gather, x, x_0, ahead_x, dy, dy_0, ahead_dy, parts, zero, part, table, t_0,
        geometry, taps, rows, lines, first, channels,
    )  # fmt: skip

    def codegen(context, builder, sig, args):
        arrays = ["x", "x_0", "ahead_x", "dy", "dy_0", "ahead_dy", "parts", "zero", "part", "table", "t_0", "geometry"]
        names = [*arrays, *_W_NUMBERS]
        kind, value = dict(zip(names, sig.args[5:], strict=True)), dict(zip(names, args[5:], strict=True))

        def number(name):
            return index(context, builder, kind[name], value[name])

        def place(array, offset):
            return pointer(context, builder, kind[array], value[array], number(offset))

        function = _sum_function(builder.module, kind["dy"].dtype, *literal)
        record = pointer(context, builder, kind["geometry"], value["geometry"], i64(0))
        record = builder.bitcast(record, I64.as_pointer())
        pairs = ["x x_0", "dy dy_0", "x ahead_x", "dy ahead_dy", "parts zero", "parts part"]
        addresses = [place(*pair.split()) for pair in pairs]
        builder.call(function, [*addresses, place("table", "t_0"), record, *(number(n) for n in _W_NUMBERS)])

    return signature, codegen


def _sum_function(module, dtype, q1, q2, stride, dilation, gather):
    """Return the LLVM function of `sum_products`, emitted into `module` on first use."""
    name = f"nhwconv_depthwise_sums_{dtype}_{q1}_{q2}_{stride}_{dilation}_{gather}"
    if name in module.globals:
        return module.globals[name]
    emitted = _Rows(module, dtype, name, _W_POINTERS, _W_NUMBERS, _W_FIELDS, WEIGHT_GRAD, (stride, dilation, gather))
    builder, value = emitted.builder, emitted.value
    done = builder.append_basic_block("done")
    case = builder.add(builder.mul(value["taps"], i64(8)), value["rows"])
    switch = builder.switch(case, done)
    for taps in {q1, q2} - {0}:
        for rows in {1, sum_rows(taps)}:
            block = builder.append_basic_block(f"sums_{rows}x{taps}")
            switch.add_case(i64(taps * 8 + rows), block)
            builder.position_at_end(block)
            _emit_sums(emitted, taps, rows)
            builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()
    return emitted.function


def _emit_sums(emitted, taps, rows):
    """Emit the sums of ``rows x taps`` taps over all lines."""
    builder, emit, value, at = emitted.builder, emitted.emitter, emitted.value, emitted.at
    sums = [[cgutils.alloca_once(builder, emit.vector) for _ in range(taps)] for _ in range(rows)]
    for s in (s for row in sums for s in row):
        builder.store(emit.zero, s)
    reach = builder.mul(i64(taps - 1), i64(emitted.dilation) if emitted.dilation else value["dilation_w"])
    with cgutils.for_range(builder, value["lines"]) as loop:
        x_line = builder.gep(at["x"], [builder.mul(loop.index, value["x_p"])])
        dy_line = builder.gep(at["dy"], [builder.mul(loop.index, value["y_p"])])
        pixels_before = builder.mul(loop.index, value["q"])
        x_ahead = builder.gep(at["ahead_x"], [builder.mul(pixels_before, i64(emitted.lines * emit.lanes))])
        dy_ahead = builder.gep(at["ahead_dy"], [builder.mul(pixels_before, i64(emit.lanes))])

        def body(pixel, column, pixels, careful):
            dy = builder.gep(dy_line, [builder.mul(pixel, value["d"])])
            factors = [
                emit.load(builder.gep(dy, [builder.mul(i64(i), value["d"])]), emitted.mask if careful else None)
                for i in range(pixels)
            ]
            x = builder.gep(x_line, [builder.mul(column, value["c"])])
            if taps <= 3:  # more taps have work enough to hide the memory behind
                emitted.prefetch(x_ahead, pixel, pixels)
                emitted.prefetch(dy_ahead, pixel, pixels, 1)

            def add(vector, pairs, row):
                for i, s in pairs:
                    total = sums[row][s]
                    builder.store(emit.multiply_add(vector, factors[i], builder.load(total)), total)

            x_rows = [builder.mul(i64(row), value["x_r"]) for row in range(rows)]
            emitted.each_column(x, column, pixels, taps, careful, add, x_rows)

        emitted.each_tile(value["q"], reach, body)
    for r, row in enumerate(sums):
        for s, total in enumerate(row):
            offset = builder.add(builder.mul(i64(r), value["part_r"]), builder.mul(i64(s), value["padded"]))
            address = builder.gep(at["part"], [offset])
            emit.store(builder.fadd(emit.load(address), builder.load(total)), address)


@cache
def weight_grad(Q1: int, Q2: int, STRIDE: int, DILATION: int, GATHER: int, LANES: int) -> Kernel:
    """Make the kernel for rows of taps in chunks of Q1 and Q2; STRIDE of 0 means that stride and dilation vary."""
    ROWS_1, ROWS_2 = sum_rows(Q1), sum_rows(max(Q2, 1))

    def weight_grad(x, dy, parts, bias_parts, table, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            zero = g.slices * g.part
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                # the task: a slice of the rows of all images, some of the channels
                piece, d_0 = task % g.slices, task // g.slices * g.block_d
                d_1 = min(d_0 + g.block_d, g.d)
                line, last = piece * g.n * g.p // g.slices, (piece + 1) * g.n * g.p // g.slices
                part = piece * g.part
                width = min(g.block_d, g.padded - d_0)
                for tap in range(g.R * g.Q):
                    fill_zero(parts, part + tap * g.padded + d_0, width)
                while line < last:
                    n, p = line // g.p, line % g.p
                    row = p * g.stride_h - g.top
                    r_0, r_1 = inside(row, g.h, g.dilation_h, g.R)
                    # lines that meet the same rows of taps are summed together
                    lines = 1
                    while lines < min(g.lines, last - line, g.p - p):
                        low, high = inside(row + lines * g.stride_h, g.h, g.dilation_h, g.R)
                        if low != r_0 or high != r_1:
                            break
                        lines += 1
                    if bias_parts.size:
                        add_rows(dy, line * g.q * g.d + d_0, g.d, lines * g.q, d_1 - d_0, bias_parts, piece * g.d + d_0)
                    ahead_x = (n * g.h + row + (g.R - 1) * g.dilation_h + 1 + (lines - 1) * g.stride_h) * g.w * g.c
                    ahead_dy = (line + lines) * g.q * g.d
                    for j in range(d_0, d_1, LANES):
                        channel, t_0 = (0, j) if GATHER else (j, 0)
                        dy_0 = line * g.q * g.d + j
                        tap = 0
                        for chunk in range(g.chunks_1 + g.chunks_2):
                            taps, most = (Q1, ROWS_1) if chunk < g.chunks_1 else (Q2, ROWS_2)
                            first = tap * g.dilation_w - g.left
                            r = r_0
                            while r < r_1:
                                rows = most if r + most <= r_1 else 1
                                x_0 = (n * g.h + row + r * g.dilation_h) * g.w * g.c + channel
                                sum_products(
                                    Q1, Q2, STRIDE, DILATION, GATHER, x, x_0, ahead_x + j * lines * g.w * g.stride_h,
                                    dy, dy_0, ahead_dy + j * lines * g.q,
                                    parts, zero, part + (r * g.Q + tap) * g.padded + j, table, t_0, geometry,
                                    taps, rows, lines, first, g.d - j,
                                )  # fmt: skip
                                r += rows
                            tap += taps
                    line += lines

    return kernel(weight_grad)
