"""Arrays whose first or last byte touches a page without access, and a process that runs problems on them.

A kernel under an intrinsic has no bounds check. Here a read or write past an array's end kills the process, a write
into the rest of its first or last page is found afterwards, and inputs are read-only for the processor itself.
Workspaces, which come from `nhwconv.arrays.empty`, are guarded as well.

``serve()`` is what the test starts in a process of its own: it reads problems, a line each, and answers "ok"; a problem
that touches what it should not ends the process.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import signal
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

import nhwconv as nc
from cases import PASSES, Case, Data, draw_data, refusal
from nhwconv import arrays, machine, storage
from nhwconv.strategies import REGISTRY
from tolerance import assert_close

PAGE = mmap.PAGESIZE
NO_ACCESS, READ_ONLY = 0, 1
CANARY = 0xA5

_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """An uninitialised array between two pages without access: it touches the second one, or `at_start` the first.

    With an `alignment` its end may stay up to that many bytes before the page.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, at_start: bool, alignment: int = 1) -> None:
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        self.pages = max(1, -(-size // PAGE)) * PAGE
        self.memory = mmap.mmap(-1, self.pages + 2 * PAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.bytes[:] = CANARY
        self.first = PAGE if at_start else (PAGE + self.pages - size) // alignment * alignment
        self.last = self.first + size
        self.array = np.ndarray(shape, dtype, self.memory, self.first)
        self._protect(0, PAGE, NO_ACCESS)
        self._protect(PAGE + self.pages, PAGE, NO_ACCESS)

    def _protect(self, offset: int, size: int, access: int) -> None:
        if _mprotect(self.bytes.ctypes.data + offset, size, access):
            raise OSError(ctypes.get_errno(), "mprotect")

    def make_read_only(self) -> None:
        """Let the processor refuse writes."""
        self._protect(PAGE, self.pages, READ_ONLY)

    def check(self) -> None:
        """Raise where something was written beside the array."""
        before, after = self.bytes[PAGE : self.first], self.bytes[self.last : PAGE + self.pages]
        if (before != CANARY).any() or (after != CANARY).any():
            raise AssertionError(f"written beside an array of shape {self.array.shape}")


def _workspaces(at_start: bool) -> list[Guarded]:
    """Guard what `arrays.empty` returns from now on; return the list in which it will be."""
    made: list[Guarded] = []

    def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        made.append(Guarded(shape, dtype, at_start, arrays.ALIGNMENT))
        made[-1].array.view(np.uint8).fill(0xFF)  # NaN: nothing may depend on what a workspace held
        return made[-1].array

    arrays.empty = empty
    arrays.PAGE = 0  # the scratch of two workers side by side: what is written past the one's end shows in the other
    return made


def _strides(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of an array of this shape."""
    wide = list(shape)
    if layout == "gaps":  # after every pixel, row and image
        wide = [size + gap for size, gap in zip(shape, (0, 1, 2, 3)[4 - len(shape) :], strict=True)]
    strides = [math.prod(wide[i + 1 :]) for i in range(len(shape))]
    if layout == "every second":
        strides = [2 * s for s in strides]
    if layout == "backwards":
        strides = [-s for s in strides]
    if layout == "Fortran":
        strides = [math.prod(shape[:i]) for i in range(len(shape))]
    if layout == "repeated":  # one image, or one kernel, again and again
        strides[0] = 0
    return tuple(strides)


LAYOUTS = ("contiguous", "every second", "backwards", "Fortran", "gaps", "repeated")
DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Problem:
    """What is run: every pass and strategy that can do it, with arrays of these strides at both ends of their pages."""

    case: Case
    dtype: str = "float32"
    layout: str = "contiguous"
    seed: int = 0
    stream: bool = False  # results past the caches, from the first byte on
    strip: int = storage.STRIP  # elements of half types that are converted at a time


def _inputs(problem: Problem, at_start: bool) -> tuple[Any, list[Guarded]]:
    """Return x, w, b and dy, read-only, and what guards them."""
    guarded, views = [], []
    data = draw_data(problem.case, nc.checks.as_dtype("guarded", problem.dtype), problem.seed)
    for value in data:
        strides = _strides(problem.layout, value.shape)
        reach = [(size - 1) * stride for size, stride in zip(value.shape, strides, strict=True)]
        extent = sum(map(abs, reach)) + 1 if value.size else 0
        g = Guarded((extent,), value.dtype, at_start)
        first = g.array[-sum(r for r in reach if r < 0) :]
        view = np.lib.stride_tricks.as_strided(first, value.shape, [value.itemsize * s for s in strides])
        view[...] = value
        g.make_read_only()
        guarded.append(g)
        views.append(view)
    return type(data)(*views), guarded


def _run_pass(problem: Problem, pass_: str, strategy: str, at_start: bool) -> np.ndarray:
    case, accumulate = problem.case, at_start
    data, guarded = _inputs(problem, at_start)
    options = {**case.options, "strategy": strategy}
    shape = {"forward": case.y_shape, "weight_grad": case.w_shape, "input_grad": case.x_shape}[pass_]
    results = [Guarded(s, data.x.dtype, at_start) for s in (shape, (case.d,))]
    out, db = (r.array for r in results)
    out.fill(0 if accumulate else np.nan)
    workspaces = _workspaces(at_start)
    if pass_ == "forward":
        nc.conv2d(data.x, data.w, data.b, **options, out=out)
    elif pass_ == "weight_grad":
        size = case.kh, case.kw
        nc.conv2d_weight_grad(data.x, data.dy, size, **options, out=out, accumulate=accumulate)
        nc.conv2d_bias_grad(data.dy, out=db)
    else:
        nc.conv2d_input_grad(data.dy, data.w, (case.h, case.w), **options, out=out)
    for g in guarded + results + workspaces:
        g.check()
    return out.copy()


_ORDINARY = arrays.empty


def _reference(case: Case, data: Any, pass_: str) -> np.ndarray:
    """Return the result on ordinary arrays, by what is itself tested against the oracle."""
    arrays.empty = _ORDINARY
    options = {**case.options, "strategy": "tensordot"}
    if pass_ == "forward":
        return nc.conv2d(data.x, data.w, data.b, **options)
    if pass_ == "weight_grad":
        return nc.conv2d_weight_grad(data.x, data.dy, (case.kh, case.kw), **options)
    return nc.conv2d_input_grad(data.dy, data.w, (case.h, case.w), **options)


def run(problem: Problem) -> int:
    """Run a problem; print what is about to run, and return how often something ran."""
    case, count = problem.case, 0
    machine.STREAM_BYTES = 0 if problem.stream else 2**40
    storage.STRIP = problem.strip
    for pass_ in PASSES:
        wide = [view.astype(np.float64) for view in _inputs(problem, True)[0]]
        expected = _reference(case, Data(*wide), pass_)
        absolute = _reference(case, Data(*map(np.abs, wide)), pass_)
        for strategy in REGISTRY:
            if refusal(case, pass_, strategy, problem.dtype) is not None:
                continue
            for at_start in (False, True):
                print(f"{pass_} {strategy} at the {'start' if at_start else 'end'}: {problem!r}", flush=True)
                got = _run_pass(problem, pass_, strategy, at_start)
                # Twice the length: the reference has rounding errors, too.
                assert_close(got, expected, absolute, 2 * case.length(pass_) + 2, strategy, case)
                count += 1
    return count


def serve() -> None:
    """Run the problems that come in, a line of Python each; a minute is enough for any of them."""
    for line in sys.stdin:
        signal.alarm(60)
        count = run(eval(line))
        signal.alarm(0)
        print("ok", count, flush=True)
