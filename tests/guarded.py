"""Arrays whose first or last byte touches a page without access, and a run of random problems on them.

A kernel under an intrinsic has no bounds check. Here a read or write past an array's end kills the process, a write
into the rest of its first or last page is found afterwards, and inputs are read-only for the processor itself.
Workspaces, which come from `nhwconv.arrays.empty`, are guarded as well.

``run(seed, count)`` is what the test starts in a process of its own; it prints each problem before it is run.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from typing import Any

import numpy as np

import nhwconv as nc
from cases import DTYPES, PASSES, draw_data, random_case, refusal
from nhwconv import arrays
from nhwconv.strategies import REGISTRY, depthwise, loop
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
    return made


def _run_pass(case: Any, data: Any, pass_: str, strategy: str, at_start: bool, accumulate: bool) -> np.ndarray:
    guarded = []

    def put(value: np.ndarray, writable: bool = False) -> np.ndarray:
        g = Guarded(value.shape, value.dtype, at_start)
        g.array[...] = value
        if not writable:
            g.make_read_only()
        guarded.append(g)
        return g.array

    workspaces = _workspaces(at_start)
    options = {**case.options, "strategy": strategy}
    shape = {"forward": case.y_shape, "weight_grad": case.w_shape, "input_grad": case.x_shape}[pass_]
    out = put(np.full(shape, 0 if accumulate else np.nan, data.x.dtype), writable=True)
    if pass_ == "forward":
        nc.conv2d(put(data.x), put(data.w), put(data.b), **options, out=out)
    elif pass_ == "weight_grad":
        size = case.kh, case.kw
        nc.conv2d_weight_grad(put(data.x), put(data.dy), size, **options, out=out, accumulate=accumulate)
        db = put(np.full(case.d, np.nan, data.x.dtype), writable=True)
        nc.conv2d_bias_grad(put(data.dy), out=db)
    else:
        nc.conv2d_input_grad(put(data.dy), put(data.w), (case.h, case.w), **options, out=out)
    for g in guarded + workspaces:
        g.check()
    return out.copy()


def run(seed: int, count: int) -> None:
    """Run random problems, each strategy and pass, arrays at the ends and at the starts of their pages."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        case, dtype = random_case(rng), DTYPES[rng.integers(2)]
        data = draw_data(case, dtype, int(rng.integers(1000)))
        stream = int(rng.integers(2)) * 2**40  # from the first byte on, or never
        loop.STREAM_BYTES = depthwise.STREAM_BYTES = stream
        for pass_ in PASSES:
            # The reference runs on ordinary arrays, and is itself tested against the oracle.
            wide = type(data)(*(a.astype(np.float64) for a in data))
            expected = _reference(case, wide, pass_)
            absolute = _reference(case, type(data)(*(np.abs(a) for a in wide)), pass_)
            for strategy in REGISTRY:
                if refusal(case, pass_, strategy, dtype) is not None:
                    continue
                for at_start in (False, True):
                    place = "start" if at_start else "end"
                    print(f"{pass_} {strategy} {np.dtype(dtype)} at the {place}: {case!r}", flush=True)
                    got = _run_pass(case, data, pass_, strategy, at_start, accumulate=at_start)
                    # Twice the length: the reference has rounding errors, too.
                    assert_close(got, expected, absolute, 2 * case.length(pass_) + 2, strategy, case)


_ORDINARY = arrays.empty


def _reference(case: Any, data: Any, pass_: str) -> np.ndarray:
    arrays.empty = _ORDINARY
    options = {**case.options, "strategy": "tensordot"}
    if pass_ == "forward":
        return nc.conv2d(data.x, data.w, data.b, **options)
    if pass_ == "weight_grad":
        return nc.conv2d_weight_grad(data.x, data.dy, (case.kh, case.kw), **options)
    return nc.conv2d_input_grad(data.dy, data.w, (case.h, case.w), **options)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
