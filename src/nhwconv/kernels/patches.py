"""im2col and col2im: the patches that output pixels read, as rows of a matrix, and their sum back into pixels.

``patches[pixel, r, s, k]`` is what tap ``(r, s)`` of an output pixel reads in channel ``k`` of a group; zero outside.
"""

from __future__ import annotations

from functools import cache

from numba import prange

from .geometry import Fields
from .jit import Kernel, kernel
from .simd import copy, fill_zero
from .tasks import next_task

__all__ = ["PATCHES", "col2im", "im2col"]

#: sizes, the first channel of the group and the channels of it, taps, and the rows of tasks: of y, or of x.
PATCHES = Fields("n h w c c_0 cg p q R Q stride_h stride_w dilation_h dilation_w top left tasks")


@cache
def im2col() -> Kernel:
    """Make the kernel that gathers patches; a task is one row of outputs."""

    def im2col(x, patches, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                n, p = task // g.p, task % g.p
                target = task * g.q * g.R * g.Q * g.cg
                for q in range(g.q):
                    for r in range(g.R):
                        i = p * g.stride_h - g.top + r * g.dilation_h
                        for s in range(g.Q):
                            j = q * g.stride_w - g.left + s * g.dilation_w
                            if 0 <= i < g.h and 0 <= j < g.w:
                                copy(patches, target, x, ((n * g.h + i) * g.w + j) * g.c + g.c_0, g.cg)
                            else:
                                fill_zero(patches, target, g.cg)
                            target += g.cg

    return kernel(im2col)


@cache
def col2im() -> Kernel:
    """Make the kernel that sums patches into x; a task is one row of x, and every pixel is written once."""

    def col2im(patches, x, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                n, i = task // g.h, task % g.h
                for j in range(g.w):
                    pixel = (task * g.w + j) * g.c + g.c_0
                    fill_zero(x, pixel, g.cg)
                    for r in range(g.R):
                        up = i + g.top - r * g.dilation_h
                        if up < 0 or up % g.stride_h or up // g.stride_h >= g.p:
                            continue
                        for s in range(g.Q):
                            back = j + g.left - s * g.dilation_w
                            if back < 0 or back % g.stride_w or back // g.stride_w >= g.q:
                                continue
                            row = (n * g.p + up // g.stride_h) * g.q + back // g.stride_w
                            source = ((row * g.R + r) * g.Q + s) * g.cg
                            for k in range(g.cg):
                                x[pixel + k] += patches[source + k]

    return kernel(col2im)
