"""Copies of parts of images, for whoever cannot read them as they lie: padded, or pixels that lie far apart."""

from __future__ import annotations

from ...codegen.simd import at, copy, copy_rows, fill_zero
from ...runtime.jit import ceil_div, device
from ...runtime.records import Record
from .constants import CUT

__all__ = ["Gathered", "copy_cycles", "gather_block"]


class Gathered(Record):
    """How a block of x is copied: every step-th row and column, pixels so many elements apart."""

    gather: int  #: whether it is
    step_h: int
    step_w: int
    pixel: int
    scratch: int  #: elements from one worker's scratch to the next


def copy_cycles(rows: float, columns: int, channels: int, together: bool, itemsize: int) -> float:
    """Return the cycles in which a part of an image is copied; `together` says that a row's pixels are one run."""
    runs = rows if together else rows * columns
    return runs * CUT.copy + rows * columns * channels * itemsize / CUT.copy_bytes


@device
def _gather_row(g, x_row, first, count, channels, target):
    """Copy `count` columns of a row of x from `first` on, some channels of each, zeros where they are outside."""
    before = min(max(ceil_div(-first, g.step_w), 0), count)
    inside = max(min(ceil_div(g.w - first, g.step_w), count) - before, 0)
    after = count - before - inside
    fill_zero(target, before * g.pixel)
    target = at(target, before * g.pixel)
    source, step = at(x_row, (first + before * g.step_w) * g.c), g.step_w * g.c
    if channels == step and channels == g.pixel:
        copy(target, source, inside * channels)
    elif channels < 8:
        for i in range(inside):
            for k in range(channels):
                target[i * g.pixel + k] = source[i * step + k]
    else:
        copy_rows(target, g.pixel, source, step, inside, channels)
    fill_zero(at(target, inside * g.pixel), after * g.pixel)


@device
def gather_block(g, image, row, rows, column, columns, channels, target):
    """Copy a part of an image to `target`, as ``(rows, columns, pixel)``: zeros for columns outside, nothing for rows.

    `image` points to the first channel that is wanted of the image's first pixel.
    """
    pitch = columns * g.pixel
    for i in range(rows):
        source = row + i * g.step_h
        if 0 <= source < g.h:
            _gather_row(g, at(image, source * g.w * g.c), column, columns, channels, at(target, i * pitch))
