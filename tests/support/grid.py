"""The sizes at which kernels go wrong, and which random problems the tests try beside them."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np

import nhwconv as nc
from cases import CHANNELS, PASSES, Case, problem_of, refusal
from extent import FORM
from nhwconv.strategies.winograd.forms import filtered

PAD1 = ((1, 1), (1, 1))

GRID = [
    # rows of 1 to 17 outputs, and longer ones: whole register tiles, and every rest
    *(Case(n=1, h=3, w=w + 2, c=5, d=17) for w in range(1, 18)),
    *(Case(n=1, h=2, w=w, c=16, d=32, kh=1, kw=1) for w in (13, 14, 15, 27, 28, 29, 42, 57)),
    *(Case(n=1, h=4, w=w, c=3, d=33, padding=PAD1) for w in (7, 14, 15, 28, 31)),
    # channels around vectors and panels, in both orders
    *(Case(n=1, h=4, w=6, c=c, d=d) for c, d in zip(CHANNELS, reversed(CHANNELS), strict=True)),
    *(Case(n=1, h=3, w=5, c=c, d=c, padding=PAD1) for c in CHANNELS),
    *(Case(n=2, h=3, w=5, c=c, d=3, kh=1, kw=1) for c in (1, 31, 65)),
    Case(n=1, h=3, w=3, c=130, d=129),
    # kernel shapes: rows, columns, even sizes, as large as the input
    *(Case(h=9, w=11, kh=kh, kw=kw) for kh, kw in ((1, 5), (5, 1), (2, 2), (2, 3), (4, 1), (7, 7), (9, 11))),
    # H, W, N, C, D of 1, and no images
    Case(n=1, h=1, w=9, kh=1, kw=3),
    Case(n=1, h=9, w=1, kh=3, kw=1),
    Case(n=1, h=1, w=1, kh=1, kw=1, c=1, d=1),
    Case(n=1, h=1, w=1, kh=3, kw=3, padding=PAD1),
    Case(n=3, h=6, w=6, c=1, d=1),
    Case(n=2, h=6, w=6, c=1, d=6, kh=5, kw=5),
    Case(n=0),
    Case(n=0, c=6, d=6, groups=3, padding=PAD1),
    # strides, larger than the kernel too, with inputs that they do not divide
    *(Case(h=11, w=14, stride=s) for s in ((2, 2), (1, 2), (2, 1), (3, 3), (5, 4), (20, 20))),
    *(Case(h=9, w=13, kh=1, kw=1, stride=s, c=16, d=8) for s in ((2, 2), (3, 2), (1, 3))),
    Case(h=8, w=29, c=16, d=17, stride=(2, 2), padding=PAD1),
    Case(h=23, w=23, c=3, d=32, kh=7, kw=7, stride=(2, 2), padding=((3, 3), (3, 3))),
    # dilation, alone and with strides: with a common factor, and without
    *(Case(h=13, w=15, dilation=(lh, lw)) for lh, lw in ((2, 2), (1, 3), (4, 1))),
    *(
        Case(h=17, w=19, dilation=dilation, stride=stride, padding=((2, 1), (0, 3)))
        for dilation in ((2, 2), (4, 6), (3, 2))
        for stride in ((2, 2), (4, 3), (6, 4))
    ),
    # padding: asymmetric, larger than the kernel, all there is of a window
    Case(padding=((2, 0), (0, 3))),
    Case(padding=((0, 1), (2, 0)), stride=(2, 3)),
    Case(h=3, w=2, kh=2, kw=2, padding=((5, 4), (6, 3))),
    Case(h=2, w=3, kh=3, kw=3, padding=((7, 7), (7, 7)), stride=(3, 2), dilation=(2, 2)),
    Case(h=4, w=4, kh=1, kw=1, padding=((2, 1), (3, 0)), stride=(2, 2)),
    # groups, depthwise, depthwise with a channel multiplier
    Case(c=6, d=4, groups=2),
    Case(c=32, d=48, groups=2, padding=PAD1, stride=(2, 2)),
    Case(c=15, d=51, groups=3, dilation=(2, 1)),
    Case(n=1, c=64, d=64, groups=4, padding=PAD1),
    *(Case(h=6, w=9, c=c, d=c, groups=c, padding=PAD1) for c in (2, 7, 16, 17, 33, 64)),
    *(Case(h=6, w=9, c=c, d=c * m, groups=c, padding=PAD1) for c, m in ((3, 2), (16, 3), (5, 17))),
    Case(h=9, w=9, c=8, d=8, groups=8, stride=(2, 2), padding=((0, 1), (0, 1))),
    Case(h=9, w=12, c=8, d=8, groups=8, kh=7, kw=7, padding=((3, 3), (3, 3)), dilation=(1, 2)),
    # what Winograd takes: outputs around its tiles, channels around its vectors, other kernels than 3x3
    *(Case(n=1, h=h, w=w, c=17, d=18, padding=PAD1) for h, w in ((3, 4), (5, 6), (7, 8), (9, 10), (13, 4), (6, 17))),
    *(Case(n=2, h=9, w=8, c=c, d=d, padding=PAD1) for c, d in ((16, 16), (31, 33), (64, 48), (130, 20))),
    *(
        Case(n=1, h=14, w=17, c=16, d=24, kh=kh, kw=kw)
        for kh, kw in ((2, 2), (3, 2), (4, 3), (5, 5), (6, 6), (3, 1), (1, 5), (7, 1), (1, 9))
    ),
    Case(n=1, h=12, w=13, c=20, d=24, dilation=(2, 3), padding=((2, 1), (3, 4))),
    Case(n=1, h=10, w=10, c=36, d=40, groups=2, padding=PAD1),
    # with a stride: phases of several taps and of one, of no outputs, and on grids of the dilation
    *(
        Case(n=2, h=h, w=17, c=20, d=32, kh=kh, kw=kw, stride=stride, padding=((1, 2), (0, 1)))
        for h, kh, kw, stride in ((14, 3, 3, (2, 2)), (13, 4, 4, (2, 2)), (14, 5, 3, (3, 1)), (13, 2, 5, (1, 2)))
    ),
    Case(n=1, h=4, w=9, c=16, d=16, stride=(3, 2)),
    Case(n=2, h=25, w=27, c=16, d=16, kh=7, kw=7, stride=(2, 2), padding=((3, 3), (3, 3))),
    Case(n=1, h=15, w=18, c=16, d=16, stride=(2, 2), dilation=(3, 1), padding=((2, 1), (3, 4))),
    # few output channels: pixels on the lanes
    *(Case(n=1, h=4, w=w, c=c, d=d) for w in (17, 18, 19, 34, 50, 67) for c, d in ((1, 6), (3, 2))),
    Case(n=2, h=5, w=40, c=7, d=1, kh=1, kw=1),
    # enough work to be cut into tasks, blocks and slices
    Case(n=4, h=20, w=20, c=32, d=64, padding=PAD1),
    Case(n=1, h=40, w=40, c=8, d=8, padding=PAD1),
    Case(n=9, h=7, w=7, c=40, d=40, padding=PAD1),
    # enough slices of the weight gradient that a task has several rows of taps, and these apart
    Case(n=9, h=36, w=34, c=4, d=18, dilation=(2, 1)),
    Case(n=9, h=36, w=34, c=4, d=18, dilation=(2, 1), padding=PAD1),
]


def _forms(case: Case, pass_: str, dtype: np.dtype) -> set[tuple[Any, ...]]:
    """Return Winograd's forms for a pass, which compiles transforms for each."""
    return {(pass_ == "weight_grad", c.form) for c in filtered(problem_of(case, dtype), pass_)}


@cache
def _forms_of_the_grid(dtype: np.dtype) -> set[tuple[Any, ...]]:
    found = set()
    for case, pass_ in product(GRID, PASSES):
        if case.n and refusal(case, pass_, "winograd", dtype) is None:
            found |= _forms(case, pass_, dtype)
    return found


def is_tried(case: Case, pass_: str, strategy: str, dtype: Any) -> bool:
    """Whether the tests try a random problem that a strategy can do.

    Winograd compiles three functions for each of its forms, of which there are some hundreds. In the short form of the
    tests random problems have those that the grid needs as well, with any sizes, channels and borders.
    """
    if strategy != "winograd" or FORM == "nightly":
        return True
    dtype = nc.checks.as_dtype(dtype)
    computed = np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    return _forms(case, pass_, computed) <= _forms_of_the_grid(computed)
