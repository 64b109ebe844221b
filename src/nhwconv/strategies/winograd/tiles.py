"""The grid of tiles: which outputs a tile has, which pixels it reads, and its transforms at all points.

A dilated correlation has stride one on each of ``grids`` interleaved grids of outputs, so tiles are numbered by image,
grid, and place on it.
"""

from __future__ import annotations

from ...codegen.simd import at, prefetch
from ...runtime.jit import ceil_div, device
from ..axes import Correlation
from .transform import Added, Tile, Within, nothing, transform

__all__ = ["Tiles", "groups_of", "points_of", "tiles_of", "transform_filters", "transform_inputs", "transform_outputs"]


class Tiles(Correlation):
    """Sizes, the grid of tiles, and the form F(m_h, r_h) x F(m_w, r_w) that they have."""

    stride_h: int
    stride_w: int
    grids_h: int  #: interleaved grids of outputs, and tiles of each
    grids_w: int
    tiles_h: int
    tiles_w: int
    m_h: int
    r_h: int
    m_w: int
    r_w: int
    block_t: int  #: a block's tiles, channels of x and channels of y
    block_k: int
    block_d: int
    bundles: int  #: of groups; those of a bundle are transformed together
    input_transform: int  #: native functions: the transforms and the micro-kernel
    weights_transform: int
    output_transform: int
    tile: int
    scratch: int  #: elements from one worker's scratch to the next


@device
def tiles_of(g):
    """Return the number of tiles."""
    return g.n * g.grids_h * g.grids_w * g.tiles_h * g.tiles_w


@device
def points_of(g):
    """Return the number of points."""
    return (g.m_h + g.r_h - 1) * (g.m_w + g.r_w - 1)


@device
def groups_of(g, number):
    """Return the first group of a bundle, and how many there are in it."""
    first = number * g.groups // g.bundles
    return first, (number + 1) * g.groups // g.bundles - first


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
    """Return the range of ``i`` below `count` for which ``0 <= first + i*step < size``; it may be empty anywhere."""
    return min(max(0, ceil_div(-first, step)), count), max(0, min(count, ceil_div(size - first, step)))


@device
def _at_points(g, target, apart):
    """Return the elements of a transformed tile: one for each point."""
    return Tile(target, (g.m_w + g.r_w - 1) * apart, apart)


@device
def _ask_for_next(tile, row_0, row_1, column, columns, channels):
    """Ask for what the next tile of a row reads or writes that this one does not: `columns` columns of it.

    The processor does not see it coming: it lies in as many places as there are rows, and each takes up a few lines.
    """
    for i in range(row_0, row_1):
        for j in range(column, column + columns):
            prefetch(at(tile.at, i * tile.row + j * tile.column), channels)


@device
def transform_weights(g, source, s_tap, target, apart, count):
    """Transform `count` numbers of every tap, side by side, to every point."""
    taps = Tile(source, g.r_w * s_tap, s_tap)
    within = Within(0, g.r_h, 0, g.r_w)
    transform(g.weights_transform, taps, _at_points(g, target, apart), within, count, nothing(source))


@device
def transform_inputs(g, step_h, step_w, x, channels, tile, tiles, target, apart):
    """Transform some channels of some tiles of x, step_h x step_w outputs apart; x points to the first channel.

    Written as ``(points, tiles, channels)``, points so far apart; so are all transformed data.
    """
    down, right = g.grids_h * g.stride_h, g.grids_w * g.stride_w
    n, u, v, i, j = _first_tile(g, tile)
    for t in range(tiles):
        row, column = u * g.stride_h + i * step_h * down - g.top, v * g.stride_w + j * step_w * right - g.left
        row_0, row_1 = _inside(row, down, g.h, g.m_h + g.r_h - 1)
        column_0, column_1 = _inside(column, right, g.w, g.m_w + g.r_w - 1)
        pixels = Tile(at(x, ((n * g.h + row) * g.w + column) * g.c), down * g.w * g.c, right * g.c)
        within, points = Within(row_0, row_1, column_0, column_1), _at_points(g, at(target, t * channels), apart)
        _ask_for_next(pixels, row_0, row_1, g.m_w + g.r_w - 1, step_w, channels)
        transform(g.input_transform, pixels, points, within, channels, nothing(x))
        n, u, v, i, j = _next_tile(g, n, u, v, i, j)


@device
def transform_filters(g, dy, channels, tile, tiles, target, apart):
    """Transform `channels` channels of `tiles` tiles of dy, r_h x r_w pixels each; dy points to the first of them."""
    n, u, v, i, j = _first_tile(g, tile)
    c = g.groups * g.dg
    for t in range(tiles):
        p, q = u + i * g.r_h * g.grids_h, v + j * g.r_w * g.grids_w
        pixels = Tile(at(dy, ((n * g.p + p) * g.q + q) * c), g.grids_h * g.q * c, g.grids_w * c)
        within = Within(0, ceil_div(g.p - p, g.grids_h), 0, ceil_div(g.q - q, g.grids_w))
        points = _at_points(g, at(target, t * channels), apart)
        _ask_for_next(pixels, 0, g.r_h, g.r_w, g.r_w, channels)
        transform(g.weights_transform, pixels, points, within, channels, nothing(dy))
        n, u, v, i, j = _next_tile(g, n, u, v, i, j)


@device
def transform_outputs(g, source, apart, tile, tiles, width, again, add_bias, bias, y):
    """Transform the products of `tiles` tiles back; add the bias, or what y has (`again`); write outputs that exist.

    `bias` and y point to the first of `width` channels.
    """
    down, right = g.grids_h * g.y_p, g.grids_w * g.y_q
    n, u, v, i, j = _first_tile(g, tile)
    for t in range(tiles):
        p, q = u + i * g.m_h * g.grids_h, v + j * g.m_w * g.grids_w
        within = Within(0, ceil_div(g.p - p, g.grids_h), 0, ceil_div(g.q - q, g.grids_w))
        outputs = Tile(at(y, g.y_0 + n * g.y_n + p * g.y_p + q * g.y_q), down, right)
        added = Added(True, outputs) if again else Added(add_bias, Tile(bias, 0, 0))
        products = _at_points(g, at(source, t * width), apart)
        _ask_for_next(outputs, 0, g.m_h, g.m_w, g.m_w, width)
        transform(g.output_transform, products, outputs, within, width, added)
        n, u, v, i, j = _next_tile(g, n, u, v, i, j)
