"""Winograd convolution: transforms vectorised over channels, and a matrix product for each point between them.

A tile of ``m_h x m_w`` outputs is computed as ``A^T ((G w G^T) * (B^T x B)) A``; the products of all tiles, channels
and kernels at one of the ``alpha_h * alpha_w`` points are a matrix product, which the micro-kernel does. A task works
on a block of tiles whose transformed data stay in L2, and transforms the weights it needs beside them, unless they are
shared by so many tasks that they were transformed before.

The weight gradient is the same with other roles: dw is the correlation of x with dy, so dy's tiles are the filter, and
the products are summed over tiles before the inverse transform.
"""

from __future__ import annotations

from functools import cache, reduce
from itertools import chain

from llvmlite import ir
from numba import prange
from numba.core import cgutils, types
from numba.extending import intrinsic

from .geometry import Fields
from .jit import Kernel, ceil_div, device, kernel
from .native import call, native
from .points import matrices
from .simd import I1, I64, SCALARS, Emitter, i64, pointer
from .tasks import next_task
from .tile import tile_product

__all__ = ["WINOGRAD", "WINOGRAD_WEIGHT_GRAD", "winograd_correlate", "winograd_weight_grad", "winograd_weights"]

# ------------------------------------------------------------------------------------------- transforms

OUTPUT = 2  # the place of A^T among a form's matrices

_INTS = (
    "s_row", "s_column", "row_0", "row_1", "column_0", "column_1", "t_row", "t_column", "rows", "columns", "count",
    "e_row", "e_column",
)  # fmt: skip


@cache
def transforms(dtype: str, mh: int, rh: int, mw: int, rw: int) -> dict[str, int]:
    """Return the addresses of the three transforms of F(mh, rh) x F(mw, rw)."""
    names = ("input", "weights", "output")
    return {f"{name}_transform": _transform(dtype, which, mh, rh, mw, rw) for which, name in enumerate(names)}


@intrinsic
def transform(
    typingctx, address, source, s0, s_row, s_column, row_0, row_1, column_0, column_1,
    target, t0, t_row, t_column, rows, columns, count, add, e, e0, e_row, e_column,
):  # fmt: skip
    """Transform a tile of `count` channels, side by side from the offsets on; `address` says which way.

    The transforms are ``B^T x B`` (input), ``G w G^T`` (weights) and ``A^T m A`` (output). Element ``(i, j)`` of a tile
    is read at ``s0 + i*s_row + j*s_column`` where ``row_0 <= i < row_1`` and ``column_0 <= j < column_1``, and is zero
    elsewhere; results are written at ``t0 + i*t_row + j*t_column`` where ``i < rows`` and ``j < columns``. Where `add`,
    the output transform adds element ``e0 + i*e_row + j*e_column`` of e. ``count`` is at least LANES: the last vector
    overlaps the one before; where e is what is written, LANES divides it.
    """
    kinds = {name: kind for name, kind in locals().items() if name != "typingctx"}
    signature = types.void(*kinds.values())

    def codegen(context, builder, sig, args):
        kind, value = dict(zip(kinds, sig.args, strict=True)), dict(zip(kinds, args, strict=True))

        def number(name):
            return context.cast(builder, value[name], kind[name], types.intp)

        addresses = [
            pointer(context, builder, kind[v], value[v], number(o))
            for v, o in (("source", "s0"), ("target", "t0"), ("e", "e0"))
        ]
        added = context.cast(builder, value["add"], kind["add"], types.boolean)
        arguments = [*addresses, added, *(number(n) for n in _INTS)]
        call(builder, number("address"), _kind(SCALARS[str(kind["source"].dtype)]), arguments)

    return signature, codegen


def _kind(scalar):
    """Return the type of an emitted transform."""
    return ir.FunctionType(ir.VoidType(), [scalar.as_pointer()] * 3 + [I1] + [I64] * len(_INTS))


def _transform(dtype, which, mh, rh, mw, rw):
    """Return the address of one transform."""
    high, wide = matrices(mh, rh)[which], matrices(mw, rw)[which]

    def emit(module, name):
        _Transform(module, name, dtype, high, wide, which == OUTPUT).emit()

    return native(f"nhwconv_transform_{dtype}_{('input', 'weights', 'output')[which]}_{mh}_{rh}_{mw}_{rw}", emit)


class _Transform:
    """Emits the function that multiplies tiles by `high` from the left and by `wide` from the right."""

    def __init__(self, module, name, dtype, high, wide, adds):
        scalar = SCALARS[dtype]
        function = ir.Function(module, _kind(scalar), name)
        self.source, self.target, self.e, self.add, *numbers = function.args
        self.value = dict(zip(_INTS, numbers, strict=True))
        self.high, self.wide, self.adds = high, wide, adds
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.emitter = Emitter(self.builder, dtype)
        zeros = cgutils.alloca_once_value(self.builder, self.emitter.zero)
        self.zeros = self.builder.bitcast(zeros, scalar.as_pointer())
        waste = cgutils.alloca_once(self.builder, self.emitter.vector)
        self.waste = self.builder.bitcast(waste, scalar.as_pointer())

    def emit(self):
        """Whole tiles are the rule, and have a loop without selections of their own."""
        value, within = self.value, self._within
        read = [within("row_0", "row_1", len(self.high[0])), within("column_0", "column_1", len(self.wide[0]))]
        kept = [within(None, "rows", len(self.high)), within(None, "columns", len(self.wide))]
        source = self._chain(self.source, value["s_row"], value["s_column"], self.high[0], self.wide[0])
        target = self._chain(self.target, value["t_row"], value["t_column"], self.high, self.wide)
        added = self._added()
        whole = reduce(self.builder.and_, chain(*read, *kept))
        with self.builder.if_else(whole) as (then, otherwise):
            with then:
                self._loop(source, target, added)
            with otherwise:
                self._loop(
                    self._selected(source, read, self.zeros),
                    self._selected(target, kept, self.waste),
                    self._selected(added, kept, self.zeros),
                )
        self.builder.ret_void()

    def _within(self, low, limit, count):
        """Return, for each of `count` places, whether it is in the range of these arguments."""
        builder, value = self.builder, self.value
        flags = [builder.icmp_signed("<", i64(i), value[limit]) for i in range(count)]
        if low is not None:
            flags = [builder.and_(f, builder.icmp_signed(">=", i64(i), value[low])) for i, f in enumerate(flags)]
        return flags

    def _chain(self, base, row, column, rows, columns):
        """Return a function of a channel that gives the addresses of a tile's elements, one step after another."""

        def addresses(channel):
            builder, start, table = self.builder, self.builder.gep(base, [channel]), []
            for _ in rows:
                table.append([start])
                for _ in columns[1:]:
                    table[-1].append(builder.gep(table[-1][-1], [column]))
                start = builder.gep(start, [row])
            return table

        return addresses

    def _added(self):
        """Return the same of what is added; where nothing is, it is zero for every element and channel."""
        builder, nothing = self.builder, i64(0)
        base = builder.select(self.add, self.e, self.zeros)
        row, column = (builder.select(self.add, self.value[name], nothing) for name in ("e_row", "e_column"))
        places = self._chain(base, row, column, self.high, self.wide)
        return lambda channel: places(builder.select(self.add, channel, nothing))

    def _selected(self, places, flags, otherwise):
        """Return the same, with another address for elements that do not exist."""

        def addresses(channel):
            builder, (row, column) = self.builder, flags
            return [
                [builder.select(builder.and_(row[i], column[j]), a, otherwise) for j, a in enumerate(line)]
                for i, line in enumerate(places(channel))
            ]

        return addresses

    def _loop(self, source, target, added):
        """Transform vector after vector of channels."""
        builder, emit, count = self.builder, self.emitter, self.value["count"]
        vectors = builder.sdiv(builder.add(count, i64(emit.lanes - 1)), i64(emit.lanes))
        last = builder.sub(count, i64(emit.lanes))
        with cgutils.for_range(builder, vectors) as loop:
            channel = builder.mul(loop.index, i64(emit.lanes))
            channel = builder.select(builder.icmp_signed("<", channel, last), channel, last)
            tile = [[emit.load(a) for a in line] for line in source(channel)]
            half = [_apply(emit, self.high, list(column)) for column in zip(*tile, strict=True)]
            places, summands = target(channel), added(channel)
            for i, line in enumerate(places):
                results = _apply(emit, self.wide, [column[i] for column in half])
                if self.adds:
                    results = [builder.fadd(r, emit.load(e)) for r, e in zip(results, summands[i], strict=True)]
                for result, address in zip(results, line, strict=True):
                    emit.store(result, address)


def _apply(emit, matrix, vectors):
    """Multiply a small constant matrix by a column of vectors; rows of opposite points share their halves."""
    results = [None] * len(matrix)
    for i, row in enumerate(matrix):
        if results[i] is not None:
            continue
        twin = next((k for k in range(i + 1, len(matrix)) if _are_twins(row, matrix[k])), None)
        if twin is None:
            results[i] = _combine(emit, row, vectors)
            continue
        same = [c if c == d else 0 for c, d in zip(row, matrix[twin], strict=True)]
        opposite = [c if c != d else 0 for c, d in zip(row, matrix[twin], strict=True)]
        even, odd = _combine(emit, same, vectors), _combine(emit, opposite, vectors)
        results[i], results[twin] = emit.builder.fadd(even, odd), emit.builder.fsub(even, odd)
    return results


def _are_twins(row, other):
    """Whether two rows agree up to signs, and differ in some and agree in others."""
    pairs = [(c, d) for c, d in zip(row, other, strict=True) if c or d]
    signs = {c == d for c, d in pairs}
    return all(abs(c) == abs(d) for c, d in pairs) and signs == {True, False}


def _combine(emit, coefficients, vectors):
    """Sum of coefficients times vectors; a term with coefficient one comes first, and costs nothing."""
    terms = sorted(((c, v) for c, v in zip(coefficients, vectors, strict=True) if c), key=lambda t: t[0] != 1)
    if not terms:
        return emit.zero
    (first, vector), *rest = terms
    builder = emit.builder
    total = vector if first == 1 else builder.fmul(emit.constant(first), vector)
    for coefficient, vector in rest:
        if coefficient == 1:
            total = builder.fadd(total, vector)
        elif coefficient == -1:
            total = builder.fsub(total, vector)
        else:
            total = emit.multiply_add(emit.constant(coefficient), vector, total)
    return total


# ------------------------------------------------------------------------------------------------ tiles


@device
def _first_tile(g, tile):
    """Decode a tile's number: its image, grid, and place on it."""
    j, rest = tile % g.tiles_w, tile // g.tiles_w
    i, rest = rest % g.tiles_h, rest // g.tiles_h
    v, rest = rest % g.grids_w, rest // g.grids_w
    return rest // g.grids_h, rest % g.grids_h, v, i, j


@device
def _next_tile(g, n, u, v, i, j):
    """Step to the next tile without a division."""
    j += 1
    if j == g.tiles_w:
        j, i = 0, i + 1
        if i == g.tiles_h:
            i, v = 0, v + 1
            if v == g.grids_w:
                v, u = 0, u + 1
                if u == g.grids_h:
                    u, n = 0, n + 1
    return n, u, v, i, j


@device
def _inside(first, step, size, count):
    """Return the range of ``i`` below `count` for which ``0 <= first + i*step < size``."""
    return min(max(0, ceil_div(-first, step)), count), max(0, min(count, ceil_div(size - first, step)))


@device
def _channel_blocks(size, block, LANES):
    """Number of blocks of channels; the last takes a rest of fewer than LANES with it, so that none is too small."""
    return ceil_div(size - LANES + 1, block)


@device
def _channel_block(number, size, block, LANES):
    """First channel of a block, and its channels."""
    first = number * block
    return first, (size if number == _channel_blocks(size, block, LANES) - 1 else first + block) - first


@device
def _point_pitch(size, LANES):
    """Return the distance of one point's data from the next: an odd number of vectors.

    A transform touches all points at once. At a distance of a large power of two they would all fall into the same few
    sets of the caches.
    """
    return (ceil_div(size, LANES) | 1) * LANES


@device
def _points(g):
    return (g.m_h + g.r_h - 1) * (g.m_w + g.r_w - 1)


#: Common to both kernels: sizes, and the grid of tiles.
_TILES = (
    "n groups h w c cg dg stride_h stride_w grids_h grids_w top left p q tiles_h tiles_w m_h r_h m_w r_w "
    "block_t block_k block_d "
)
_ADDRESSES = "input_transform weights_transform output_transform tile "

WINOGRAD = Fields(
    # where outputs lie in y; shared: the weights are transformed already; where they start, and offsets into a worker's
    # scratch
    _TILES + _ADDRESSES + "y_0 y_n y_p y_q shared add_bias packed_0 transformed_0 s_u s_m scratch tasks"
)


@cache
def winograd_weights(WIDTH: int, LANES: int) -> Kernel:
    """Make the kernel that transforms packed weights: their taps become points, and all else keeps its order."""

    def winograd_weights(packed, transformed, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            padded, panels = ceil_div(g.dg, LANES) * LANES, ceil_div(g.dg, WIDTH)
            blocks = _channel_blocks(g.cg, g.block_k, LANES)
            tasks = g.groups * panels * blocks
            while True:
                task = next_task(queue, worker, workers, tasks)
                if task >= tasks:
                    break
                (k, channels), rest = _channel_block(task % blocks, g.cg, g.block_k, LANES), task // blocks
                j, group = rest % panels * WIDTH, rest // panels
                width = min(WIDTH, padded - j)
                source = g.packed_0 + (group * padded + j) * g.r_h * g.r_w * g.cg + k * width
                apart = _point_pitch(g.cg * WIDTH, LANES)
                target = g.transformed_0 + (group * panels + j // WIDTH) * _points(g) * apart + k * width
                _transform_weights(g, packed, source, g.cg * width, transformed, target, apart, channels * width)

    return kernel(winograd_weights)


@device
def _transform_weights(g, packed, source, s_tap, transformed, target, t_point, count):
    """Transform `count` numbers of every tap, side by side, to every point."""
    transform(
        g.weights_transform, packed, source, g.r_w * s_tap, s_tap, 0, g.r_h, 0, g.r_w,
        transformed, target, (g.m_w + g.r_w - 1) * t_point, t_point, g.m_h + g.r_h - 1, g.m_w + g.r_w - 1, count,
        False, packed, 0, 0, 0,
    )  # fmt: skip


@device
def _transform_inputs(g, step_h, step_w, x, channel, channels, tile, tiles, scratch, target, point):
    """Transform `channels` channels of `tiles` tiles of x, step_h x step_w outputs apart.

    Written as ``(points, tiles, channels)``, points `point` numbers apart; so are all transformed data.
    """
    down, right = g.grids_h * g.stride_h, g.grids_w * g.stride_w
    n, u, v, i, j = _first_tile(g, tile)
    for t in range(tiles):
        row, column = u * g.stride_h + i * step_h * down - g.top, v * g.stride_w + j * step_w * right - g.left
        row_0, row_1 = _inside(row, down, g.h, g.m_h + g.r_h - 1)
        column_0, column_1 = _inside(column, right, g.w, g.m_w + g.r_w - 1)
        transform(
        g.input_transform, x, ((n * g.h + row) * g.w + column) * g.c + channel,
            down * g.w * g.c, right * g.c, row_0, row_1, column_0, column_1,
            scratch, target + t * channels, (g.m_w + g.r_w - 1) * point, point,
            g.m_h + g.r_h - 1, g.m_w + g.r_w - 1, channels,
            False, x, 0, 0, 0,
        )  # fmt: skip
        n, u, v, i, j = _next_tile(g, n, u, v, i, j)


@device
def _transform_outputs(g, scratch, source, point, tile, tiles, width, accumulate, bias, y, channel):
    """Transform the products of `tiles` tiles back; add the bias, or what y has; write the outputs that exist."""
    down, right = g.grids_h * g.y_p, g.grids_w * g.y_q
    n, u, v, i, j = _first_tile(g, tile)
    for t in range(tiles):
        p, q = u + i * g.m_h * g.grids_h, v + j * g.m_w * g.grids_w
        rows, columns = ceil_div(g.p - p, g.grids_h), ceil_div(g.q - q, g.grids_w)
        target = g.y_0 + n * g.y_n + p * g.y_p + q * g.y_q + channel
        transform(
        g.output_transform, scratch, source + t * width, (g.m_w + g.r_w - 1) * point, point,
            0, g.m_h + g.r_h - 1, 0, g.m_w + g.r_w - 1, y, target, down, right, rows, columns, width,
            accumulate or g.add_bias, y if accumulate else bias, target if accumulate else channel,
            down if accumulate else 0, right if accumulate else 0,
        )  # fmt: skip
        n, u, v, i, j = _next_tile(g, n, u, v, i, j)


@cache
def winograd_correlate(WIDTH: int, LANES: int) -> Kernel:
    """Make the kernel of the forward pass, and of one phase of the input gradient.

    A strided forward pass is a sum over phases: one record of the geometry each, all with the same tiles and blocks.
    """

    def winograd_correlate(x, weights, bias, y, scratch, queue, workers, geometry):
        for worker in prange(workers):
            cut = geometry[0]
            padded, panels = ceil_div(cut.dg, LANES) * LANES, ceil_div(cut.dg, WIDTH)
            all_tiles = cut.n * cut.grids_h * cut.grids_w * cut.tiles_h * cut.tiles_w
            blocks_t = ceil_div(all_tiles, cut.block_t)
            blocks_k = _channel_blocks(cut.cg, cut.block_k, LANES)
            blocks_d = _channel_blocks(cut.dg, cut.block_d, LANES)
            s_v = worker * cut.scratch
            s_u, s_m = s_v + cut.s_u, s_v + cut.s_m
            while True:
                task = next_task(queue, worker, workers, cut.tasks)
                if task >= cut.tasks:
                    break
                # the task: a block of tiles, and channels d_0:d_1 of a group
                block, rest = task % blocks_t, task // blocks_t
                d_0, width_d = _channel_block(rest % blocks_d, cut.dg, cut.block_d, LANES)
                group, d_1 = rest // blocks_d, d_0 + width_d
                tile = block * all_tiles // blocks_t
                tiles = (block + 1) * all_tiles // blocks_t - tile
                m_apart = _point_pitch(tiles * width_d, LANES)
                for phase in range(len(geometry)):
                    g = geometry[phase]
                    points = _points(g)
                    for block_k in range(blocks_k):
                        k, channels = _channel_block(block_k, g.cg, g.block_k, LANES)
                        v_apart = _point_pitch(tiles * channels, LANES)
                        _transform_inputs(
                            g, g.m_h, g.m_w, x, group * g.cg + k, channels, tile, tiles, scratch, s_v, v_apart
                        )
                        for j in range(d_0, d_1, WIDTH):
                            width = min(WIDTH, padded - j)
                            if g.shared:
                                u, u_apart = weights, _point_pitch(g.cg * WIDTH, LANES)
                                u_0 = g.transformed_0 + (group * panels + j // WIDTH) * points * u_apart + k * width
                            else:
                                u, u_0, u_apart = scratch, s_u, _point_pitch(channels * width, LANES)
                                source = g.packed_0 + (group * padded + j) * g.r_h * g.r_w * g.cg + k * width
                                _transform_weights(
                                    g, weights, source, g.cg * width, scratch, s_u, u_apart, channels * width
                                )
                            for point in range(points):
                                m_0 = s_m + point * m_apart + j - d_0
                                tile_product(
                                    g.tile, tiles, min(WIDTH, d_1 - j), 1, 1, channels,
                                    scratch, s_v + point * v_apart, 0, 0, channels, 1,
                                    u, u_0 + point * u_apart, 0, 0, width,
                                    k > 0, scratch, m_0, width_d, scratch, m_0, width_d, 0, scratch, 0, 0, 0,
                                )  # fmt: skip
                    _transform_outputs(
                        g, scratch, s_m, m_apart, tile, tiles, width_d, phase > 0, bias, y, group * g.dg + d_0
                    )

    return kernel(winograd_correlate)


WINOGRAD_WEIGHT_GRAD = Fields(
    # slices of the tiles, each of which has a part of `part` numbers; where the taps lie in dw; offsets into a worker's
    # scratch
    _TILES + _ADDRESSES + "slices part w_0 w_d w_r w_q s_dy s_m scratch tasks"
)


@device
def _transform_filters(g, dy, channel, channels, tile, tiles, scratch, target, point):
    """Transform `channels` channels of `tiles` tiles of dy, r_h x r_w pixels each."""
    n, u, v, i, j = _first_tile(g, tile)
    c = g.groups * g.dg
    for t in range(tiles):
        p, q = u + i * g.r_h * g.grids_h, v + j * g.r_w * g.grids_w
        transform(
        g.weights_transform, dy, ((n * g.p + p) * g.q + q) * c + channel, g.grids_h * g.q * c, g.grids_w * c,
            0, ceil_div(g.p - p, g.grids_h), 0, ceil_div(g.q - q, g.grids_w),
            scratch, target + t * channels, (g.m_w + g.r_w - 1) * point, point,
            g.m_h + g.r_h - 1, g.m_w + g.r_w - 1, channels,
            False, dy, 0, 0, 0,
        )  # fmt: skip
        n, u, v, i, j = _next_tile(g, n, u, v, i, j)


@cache
def winograd_weight_grad(WIDTH: int, LANES: int) -> Kernel:
    """Make the kernel of the weight gradient: ``m_h x m_w`` is a phase of the kernel, ``r_h x r_w`` a tile of dy."""

    def winograd_weight_grad(x, dy, parts, scratch, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            points = _points(g)
            all_tiles = g.n * g.grids_h * g.grids_w * g.tiles_h * g.tiles_w
            blocks_k = _channel_blocks(g.cg, g.block_k, LANES)
            blocks_d = _channel_blocks(g.dg, g.block_d, LANES)
            s_v = worker * g.scratch
            s_dy, s_m = s_v + g.s_dy, s_v + g.s_m
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                # the task: d channels of y and k of x, from d_0 and k_0 of a group on, and a slice of the tiles
                (d_0, d), rest = _channel_block(task % blocks_d, g.dg, g.block_d, LANES), task // blocks_d
                (k_0, k), rest = _channel_block(rest % blocks_k, g.cg, g.block_k, LANES), rest // blocks_k
                group, piece = rest % g.groups, rest // g.groups
                first, last = piece * all_tiles // g.slices, (piece + 1) * all_tiles // g.slices
                blocks_t = ceil_div(last - first, g.block_t)
                m_apart = _point_pitch(d * k, LANES)
                for block in range(blocks_t):
                    tile = first + block * (last - first) // blocks_t
                    tiles = first + (block + 1) * (last - first) // blocks_t - tile
                    v_apart, dy_apart = _point_pitch(tiles * k, LANES), _point_pitch(tiles * d, LANES)
                    _transform_inputs(g, g.r_h, g.r_w, x, group * g.cg + k_0, k, tile, tiles, scratch, s_v, v_apart)
                    _transform_filters(g, dy, group * g.dg + d_0, d, tile, tiles, scratch, s_dy, dy_apart)
                    for point in range(points):
                        for j in range(0, k, WIDTH):
                            c_0 = s_m + point * m_apart + j
                            tile_product(
                                g.tile, d, min(WIDTH, k - j), 1, 1, tiles,
                                scratch, s_dy + point * dy_apart, 0, 0, 1, d,
                                scratch, s_v + point * v_apart + j, 0, 0, k,
                                block > 0, scratch, c_0, k, scratch, c_0, k, 0, scratch, 0, 0, 0,
                            )  # fmt: skip
                for m in range(d):
                    target = piece * g.part + g.w_0 + (group * g.dg + d_0 + m) * g.w_d + k_0
                    transform(
        g.output_transform, scratch, s_m + m * k, (g.m_w + g.r_w - 1) * m_apart, m_apart,
                        0, g.m_h + g.r_h - 1, 0, g.m_w + g.r_w - 1,
                        parts, target, g.w_r, g.w_q, g.m_h, g.m_w, k, False, parts, 0, 0, 0,
                    )  # fmt: skip

    return kernel(winograd_weight_grad)
