"""im2col and col2im: the patches that output pixels read, as rows of a matrix, and their sum back into pixels.

``patches[pixel, r, s, k]`` is what tap ``(r, s)`` of an output pixel reads in channel ``k`` of a group; zero outside.
"""

from __future__ import annotations

from functools import cache

from ...codegen.simd import at, copy, fill_zero, integers, numbers
from ...runtime.jit import Body
from ...runtime.records import Record, record

__all__ = ["Patches", "col2im", "im2col"]


class Patches(Record):
    """The patches of some images, for one group."""

    n: int  #: images, and rows from one to the next; rows, columns and channels of x
    pitch: int
    h: int
    w: int
    c: int
    c_0: int  #: the first channel of the group, and the channels of it
    cg: int
    p: int  #: rows and columns of outputs
    q: int
    R: int  #: taps, and how they read x
    Q: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    left: int
    add_bias: int  #: whether pixels that patches are summed into start from a bias


@cache
def im2col(ITEMSIZE: int) -> Body:
    """Make the body that gathers patches; it takes x and them. A task is one row of outputs."""

    def im2col(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Patches)
        table = integers(operands)
        x, patches = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        n, p = task // g.p, task % g.p
        target = at(patches, task * g.q * g.R * g.Q * g.cg)
        for q in range(g.q):
            for r in range(g.R):
                i = p * g.stride_h - g.top + r * g.dilation_h
                for s in range(g.Q):
                    j = q * g.stride_w - g.left + s * g.dilation_w
                    if 0 <= i < g.h and 0 <= j < g.w:
                        copy(target, at(x, ((n * g.pitch + i) * g.w + j) * g.c + g.c_0), g.cg)
                    else:
                        fill_zero(target, g.cg)
                    target = at(target, g.cg)

    return Body(im2col)


@cache
def col2im(ITEMSIZE: int) -> Body:
    """Make the body that sums patches into x; it takes them, it and the bias.

    A task is one row of x, each pixel written once.
    """

    def col2im(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Patches)
        table = integers(operands)
        patches, x, bias = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE), numbers(table[2], ITEMSIZE)
        n, i = task // g.h, task % g.h
        for j in range(g.w):
            pixel = at(x, ((n * g.pitch + i) * g.w + j) * g.c + g.c_0)
            if g.add_bias:
                copy(pixel, at(bias, g.c_0), g.cg)
            else:
                fill_zero(pixel, g.cg)
            for r in range(g.R):
                up = i + g.top - r * g.dilation_h
                if up < 0 or up % g.stride_h or up // g.stride_h >= g.p:
                    continue
                for s in range(g.Q):
                    back = j + g.left - s * g.dilation_w
                    if back < 0 or back % g.stride_w or back // g.stride_w >= g.q:
                        continue
                    row = (n * g.p + up // g.stride_h) * g.q + back // g.stride_w
                    source = at(patches, ((row * g.R + r) * g.Q + s) * g.cg)
                    for k in range(g.cg):
                        pixel[k] += source[k]

    return Body(col2im)
