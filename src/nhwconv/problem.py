"""One convolution, described: a frozen, hashable record and all that follows from it.

The letters are the article's: ``x (n, h, w, c)``, ``w (d, kh, kw, c / groups)``, ``y`` and ``dy (n, oh, ow, d)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

__all__ = ["PASSES", "ConvProblem", "Pass", "Strip", "half", "name_of", "output_size", "same_padding"]

Pass = Literal["forward", "weight_grad", "input_grad"]
PASSES: tuple[Pass, ...] = get_args(Pass)

#: Two numbers before and after, for rows and for columns: ``((top, bottom), (left, right))``.
Padding = tuple[tuple[int, int], tuple[int, int]]


def half(dtype: np.dtype[Any]) -> bool:
    """Return whether this is a half type, which is stored as it is and computed in float32."""
    return dtype.itemsize < 4


@cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Return a dtype's name; NumPy imports something to tell it, which it cannot do as Python ends."""
    return dtype.name


def output_size(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> int:
    """Return how many output positions one dimension has; zero or less where the kernel does not fit."""
    return (size + padding[0] + padding[1] - (dilation * (kernel - 1) + 1)) // stride + 1


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return TensorFlow's "same" padding: ``ceil(size / stride)`` outputs, the odd zero after the end."""
    out = -(-size // stride)
    total = max((out - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def _apart(size: int, out: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> bool:
    """Whether outputs read pixels of their own, one beside another, and together all of them."""
    return size == out * kernel and padding == (0, 0) and dilation == 1 and (stride == kernel or out == 1)


@dataclass(frozen=True)
class ConvProblem:
    """One batched NHWC convolution: sizes, stride, padding, dilation, groups and dtype.

    It is checked where it is made (`nhwconv.checks`), so everything that receives one may trust it.
    """

    n: int
    h: int
    w: int
    c: int
    d: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: np.dtype = np.dtype(np.float32)  # noqa: RUF009 - a dtype is immutable

    @property
    def dtype_name(self) -> str:
        """What the dtype is called."""
        return name_of(self.dtype)

    @cached_property
    def _hash(self) -> int:
        return hash((self.x_shape, self.w_shape, self.stride, self.padding, self.dilation, self.groups, self.dtype))

    def __hash__(self) -> int:
        return self._hash  # problems are looked up at every call

    @cached_property
    def oh(self) -> int:
        """Rows of the output."""
        return output_size(self.h, self.kh, self.stride[0], self.padding[0], self.dilation[0])

    @cached_property
    def ow(self) -> int:
        """Columns of the output."""
        return output_size(self.w, self.kw, self.stride[1], self.padding[1], self.dilation[1])

    @cached_property
    def cg(self) -> int:
        """Input channels of one group."""
        return self.c // self.groups

    @cached_property
    def dg(self) -> int:
        """Output channels of one group."""
        return self.d // self.groups

    @cached_property
    def x_shape(self) -> tuple[int, int, int, int]:
        """``(n, h, w, c)``."""
        return self.n, self.h, self.w, self.c

    @cached_property
    def w_shape(self) -> tuple[int, int, int, int]:
        """``(d, kh, kw, c / groups)``."""
        return self.d, self.kh, self.kw, self.cg

    @cached_property
    def y_shape(self) -> tuple[int, int, int, int]:
        """``(n, oh, ow, d)``."""
        return self.n, self.oh, self.ow, self.d

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of a direct pass, a multiply and an add each; the same for all three."""
        return 2 * self.n * self.oh * self.ow * self.d * self.cg * self.kh * self.kw

    @property
    def bytes(self) -> int:
        """Bytes of x, w and y together: what any algorithm must at least move."""
        x, w, y = (math.prod(s) for s in (self.x_shape, self.w_shape, self.y_shape))
        return (x + w + y) * self.dtype.itemsize

    @property
    def compute_dtype(self) -> np.dtype:
        """The dtype of the arithmetic: float32 for the half types, otherwise the problem's own."""
        return np.dtype(np.float32) if half(self.dtype) else self.dtype

    @cached_property
    def folded(self) -> ConvProblem:
        """The same sums on the same memory, in which pixels that one output reads alone are channels of one pixel.

        Kernels as wide as their stride, without padding, read each pixel of a row once: ``(w, c)`` is then as well
        ``(ow, kw*c)``. So it is with a single output. Where a row has become one pixel, this holds for rows, too.
        """
        if self.groups > 1:  # whose channels would not lie side by side
            return self
        found = self
        if self.kw > 1 and _apart(self.w, self.ow, self.kw, self.stride[1], self.padding[1], self.dilation[1]):
            found = replace(
                self, w=self.ow, c=self.kw * self.c, kw=1, stride=(self.stride[0], 1), dilation=(self.dilation[0], 1)
            )
        one = found.kh > 1 and found.w == found.kw == 1 and found.padding[1] == (0, 0)
        if one and _apart(found.h, found.oh, found.kh, found.stride[0], found.padding[0], found.dilation[0]):
            found = replace(found, h=found.oh, c=found.kh * found.c, kh=1, stride=(1, 1), dilation=(1, 1))
        return found

    def __str__(self) -> str:
        (top, bottom), (left, right) = self.padding
        pad = f"{top}" if top == bottom == left == right else f"(({top}, {bottom}), ({left}, {right}))"

        def pair(p: tuple[int, int]) -> str:
            return f"{p[0]}" if p[0] == p[1] else f"{p[0]}x{p[1]}"

        parts = [f"x {self.n}x{self.h}x{self.w}x{self.c}", f"w {self.d}x{self.kh}x{self.kw}x{self.cg}"]
        parts += [f"stride {pair(self.stride)}"] if self.stride != (1, 1) else []
        parts += [f"padding {pad}"] if pad != "0" else []
        parts += [f"dilation {pair(self.dilation)}"] if self.dilation != (1, 1) else []
        parts += [f"groups {self.groups}"] if self.groups != 1 else []
        return f"{', '.join(parts)}, {self.dtype_name}"

    def strips(self, pass_: Pass, limit: int) -> Iterator[Strip]:
        """Cut a pass into smaller problems of about `limit` elements of x and y each.

        Whole images where they are small enough, otherwise strips of rows: of y for forward and weight_grad
        (whose results are then summed), of x for input_grad.
        """
        image = self.h * self.w * self.c + self.oh * self.ow * self.d
        images = max(1, limit // image)
        of_x = pass_ == "input_grad"
        strip = self._x_strip if of_x else self._y_strip
        rows, (low, high) = (self.h, (0, self.h)) if of_x else (self.oh, self._rows_of_y_that_see_x())
        step = rows if images > 1 else max(1, min(rows, rows * limit // image))
        cuts = [0, *(r for r in range(step, rows, step) if low < r <= high), rows]
        for n0 in range(0, self.n, images):
            for r0, r1 in pairwise(cuts):
                yield strip(n0, min(n0 + images, self.n), r0, r1)

    def _rows_of_y_that_see_x(self) -> tuple[int, int]:
        """First and last row of y whose window is not padding alone: each strip of y needs one."""
        top, stride, reach = self.padding[0][0], self.stride[0], (self.kh - 1) * self.dilation[0]
        return max(0, -((reach - top) // stride)), min((self.h - 1 + top) // stride, self.oh - 1)

    def _y_strip(self, n0: int, n1: int, o0: int, o1: int) -> Strip:
        """Rows ``o0:o1`` of y, and the rows of x that they read."""
        first = o0 * self.stride[0] - self.padding[0][0]
        end = (o1 - 1) * self.stride[0] - self.padding[0][0] + (self.kh - 1) * self.dilation[0] + 1
        if end <= 0:  # all of y lies in the padding above x, so there is one strip
            return self._strip((n0, n1), (0, self.h), (o0, o1), self.padding[0])
        i0, i1 = max(first, 0), min(end, self.h)
        return self._strip((n0, n1), (i0, i1), (o0, o1), (i0 - first, end - i1))

    def _x_strip(self, n0: int, n1: int, i0: int, i1: int) -> Strip:
        """Rows ``i0:i1`` of x, and the rows of y that depend on them."""
        top, stride, reach = self.padding[0][0], self.stride[0], (self.kh - 1) * self.dilation[0]
        o0 = min(-(-(i0 + top - reach) // stride), (i0 + top) // stride)
        o0 = min(max(o0, 0), self.oh - 1)
        o1 = max(min((i1 - 1 + top) // stride + 1, self.oh), o0 + 1)
        before = top + i0 - o0 * stride
        after = (o1 - o0 - 1) * stride + reach + 1 - before - (i1 - i0)  # less than zero: rows that y does not read
        return self._strip((n0, n1), (i0, i1), (o0, o1), (before, after))

    def _strip(self, n: tuple[int, int], i: tuple[int, int], o: tuple[int, int], rows: tuple[int, int]) -> Strip:
        problem = replace(self, n=n[1] - n[0], h=i[1] - i[0], padding=(rows, self.padding[1]))
        return Strip(problem, (slice(*n), slice(*i)), (slice(*n), slice(*o)))


@dataclass(frozen=True)
class Strip:
    """A part of a larger problem: the smaller problem, and where its images and rows lie in x and in y."""

    problem: ConvProblem
    x: tuple[slice, slice]
    y: tuple[slice, slice]
