"""Arrays whose first or last byte touches a page without access, and a process that runs problems on them.

A kernel under an intrinsic has no bounds check. Here a read or write past an array's end kills the process, a write
into the rest of its first or last page is found afterwards, and inputs are read-only for the processor itself.
So is the scratch of programs: each part lies in pages of its own.

``serve()`` is what the test starts in a process of its own: it reads problems, a line each, and answers "ok"; a problem
that touches what it should not ends the process.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fresh
import nhwconv as nc
import threaded
from cases import PASSES, Case, Data, draw_data, refusal
from grid import is_tried
from nhwconv.program import Program
from nhwconv.runtime import arrays, executor, machine
from nhwconv.strategies import REGISTRY, half
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


class Scratch:
    """Stands for the executor's two entries: the scratch of a program is guarded, each part and the header by itself.

    Its programs run as they are, with other offsets in their images; afterwards all of `made` can be checked.
    """

    def __init__(self, at_start: bool) -> None:
        self.at_start, self.made = at_start, list[Guarded]()
        # The scratch of two workers side by side: what is written past the one's end shows in the other.
        arrays.PAGE = 0
        executor.run, executor.run_calls = self.run, self.run_calls  # type: ignore[assignment]

    def _guard(self, nbytes: int) -> np.ndarray:
        self.made.append(Guarded((nbytes,), np.uint8, self.at_start, arrays.ALIGNMENT))
        self.made[-1].array.fill(0xFF)  # NaN: nothing may depend on what scratch held
        return self.made[-1].array

    def _place(self, program: Program) -> tuple[np.ndarray, list[np.ndarray], tuple[int, ...]]:
        """Return the header's memory, that of each part, and how far from the header it is."""
        header, parts = self._guard(program.header), [self._guard(part.nbytes) for part in program.parts]
        base = -(-header.ctypes.data // arrays.ALIGNMENT) * arrays.ALIGNMENT
        assert base == header.ctypes.data
        return header, parts, tuple(part.ctypes.data - base for part in parts)

    def run(self, program: Program, *operands: int, header: int = executor.HEADER) -> None:
        """Run a program of compiled steps."""
        scratch, _, offsets = self._place(program)
        image = program.image(offsets)
        program._images.clear()  # these pages are never met again
        forms = executor.in_parallel.call, executor.in_series.call
        executor.launch(*forms, program.workers, image.ctypes.data, id(scratch), header, *operands)

    def run_calls(self, program: Program, named: dict[str, np.ndarray]) -> None:
        """Run a program with Python calls among its steps."""
        scratch, parts, offsets = self._place(program)
        memory = {**named, **dict(zip(program.parts, parts, strict=True))}
        operands = [id(named[name]) if name in named else 0 for name in program.names]
        for step in program.steps:
            if step.compiled:
                image = program.image(offsets, step)
                executor.in_series.call(image.ctypes.data, id(scratch), executor.HEADER, *operands)
                continue
            arguments = []
            for place, shape in zip(step.places, step.shapes, strict=True):
                array = memory[place.source]
                if isinstance(place.source, str):
                    arguments.append(array.reshape(shape))
                else:
                    arguments.append(np.ndarray(shape, step.dtype, array.data, place.offset))
            step.function(*arguments)
        program._images.clear()


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
    strip: int = half.STRIP  # elements of half types that are converted at a time


def _inputs(problem: Problem, at_start: bool) -> tuple[Any, list[Guarded]]:
    """Return x, w, b and dy, read-only, and what guards them."""
    guarded, views = [], []
    data = draw_data(problem.case, nc.checks.as_dtype(problem.dtype), problem.seed)
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


def _is_biased(problem: Problem, pass_: str, at_start: bool) -> bool:
    """Whether an input gradient is computed by its other name, a transposed convolution, which has a bias."""
    return pass_ == "input_grad" and (problem.seed + at_start) % 2 == 1


def _bias_of(case: Case) -> np.ndarray:
    """Return the bias of a transposed convolution, of numbers that every dtype holds."""
    return np.arange(case.c) % 7 + 1.0


def _run_pass(problem: Problem, pass_: str, strategy: str, at_start: bool) -> np.ndarray:
    case, accumulate = problem.case, at_start
    data, guarded = _inputs(problem, at_start)
    options = {**case.options, "strategy": strategy}
    shape = case.shape(pass_)
    results = [Guarded(s, data.x.dtype, at_start) for s in (shape, (case.d,))]
    out, db = (r.array for r in results)
    out.fill(0 if accumulate else np.nan)
    scratch = Scratch(at_start)
    if pass_ == "forward":
        nc.conv2d(data.x, data.w, data.b, **options, out=out)
    elif pass_ == "weight_grad" and (problem.seed + at_start) % 2:
        both = nc.Gradients(None, out, db)
        db.fill(0)
        nc.conv2d_backward(data.x, data.w, data.dy, needs=("dw", "db"), **options, out=both, accumulate=accumulate)
    elif pass_ == "weight_grad":
        size = case.kh, case.kw
        nc.conv2d_weight_grad(data.x, data.dy, size, **options, out=out, accumulate=accumulate)
        nc.conv2d_bias_grad(data.dy, out=db)
    elif _is_biased(problem, pass_, at_start):
        bias = Guarded((case.c,), data.x.dtype, at_start)
        bias.array[:] = _bias_of(case)
        bias.make_read_only()
        options["output_padding"] = case.output_padding
        nc.conv_transpose2d(data.dy, data.w, bias.array, **options, out=out)
    else:
        nc.conv2d_input_grad(data.dy, data.w, (case.h, case.w), **options, out=out)
    assert scratch.made or not case.n
    for g in guarded + results + scratch.made:
        g.check()
    return out.copy()


_ORDINARY = executor.run, executor.run_calls


def _reference(case: Case, data: Any, pass_: str) -> np.ndarray:
    """Return the result on ordinary arrays, by what is itself tested against the oracle."""
    executor.run, executor.run_calls = _ORDINARY  # type: ignore[assignment]
    options = {**case.options, "strategy": "tensordot"}
    if pass_ == "forward":
        return nc.conv2d(data.x, data.w, data.b, **options)
    if pass_ == "weight_grad":
        return nc.conv2d_weight_grad(data.x, data.dy, (case.kh, case.kw), **options)
    return nc.conv2d_input_grad(data.dy, data.w, (case.h, case.w), **options)


def run(problem: Problem, wanted: Callable[..., bool] = is_tried) -> int:
    """Run what is wanted of a problem; print what is about to run, and return how often something ran."""
    case, count = problem.case, 0
    machine.STREAM_BYTES = 0 if problem.stream else 2**40
    half.STRIP = problem.strip
    fresh.forget()
    for pass_ in PASSES:
        wide = [view.astype(np.float64) for view in _inputs(problem, True)[0]]
        expected = _reference(case, Data(*wide), pass_)
        absolute = _reference(case, Data(*map(np.abs, wide)), pass_)
        for strategy in REGISTRY:
            able = refusal(case, pass_, strategy, problem.dtype) is None
            if not (able and wanted(case, pass_, strategy, problem.dtype)):
                continue
            for at_start in (False, True):
                print(f"{pass_} {strategy} at the {'start' if at_start else 'end'}: {problem!r}", flush=True)
                got = _run_pass(problem, pass_, strategy, at_start)
                more = _bias_of(case) if _is_biased(problem, pass_, at_start) else 0
                # Twice the length: the reference has rounding errors, too.
                assert_close(got, expected + more, absolute + more, 2 * case.length(pass_) + 2, strategy, case)
                count += 1
    return count


def serve() -> None:
    """Run the problems that come in, a line of Python each; five minutes are enough for any, busy as a machine is."""
    for line in sys.stdin:
        signal.alarm(300)
        count = run(eval(line))
        signal.alarm(0)
        print("ok", count, flush=True)


def vectors() -> str:
    """Return what kernels depend on: bytes, registers, fused multiply-adds, and the lanes of both dtypes."""
    found = machine.vector_bytes(), machine.registers(), machine.has_fma(), machine.lanes(4), machine.lanes(8)
    return " ".join(map(str, found))


def check_target(own: str) -> None:
    """Print what Numba compiles for; compare every pass with the oracle, inside guard pages as well.

    Where that is the machine's `own`, all other tests do so.
    """
    print(vectors(), flush=True)
    if vectors() == own:
        return
    some = [
        *threaded.LARGE,
        threaded.SMALL,
        *(Case(n=1, h=3, w=w, c=c, d=c, kh=1, kw=3) for w, c in zip(range(3, 12), range(1, 19, 2), strict=True)),
        Case(n=2, h=9, w=11, c=6, d=10, stride=(3, 2), padding=((2, 0), (1, 4)), dilation=(2, 3), groups=2),
    ]
    for case in some:
        for dtype in (np.float32, np.float64):
            for strategy in ("auto", "im2col"):
                threaded.check(case, dtype, strategy)
    for case in some:
        run(Problem(case), lambda *_: True)
