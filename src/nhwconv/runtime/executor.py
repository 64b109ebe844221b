"""The executor: the one function that runs programs, in parallel, and its serial twin.

It is compiled twice, from one body. In parallel, each step is a launch of its workers; the twin does the same in the
calling thread, and runs where a launch could not survive or would not pay:

- in a child forked after GNU OpenMP started, which would be killed at its first launch;
- while another thread is inside a launch under the workqueue layer, which aborts on concurrent entry;
- for programs of one worker.

Both give the same bits, since a task's result depends on no worker.

Addresses are all that goes in. Where a caller has NumPy arrays, it passes ``id(array)``, and the address of the data is
read from the array itself: `HEADER` bytes behind its start, as NumPy's C API has it. Any way to ask for it from Python
takes longer than a small convolution.
"""

from __future__ import annotations

import os
import sys
import threading
from time import perf_counter
from types import FrameType
from typing import Any

import numpy as np
from numba import prange
from numba.np.ufunc import parallel
from numba.np.ufunc.parallel import threading_layer

from ..codegen.simd import integers, stack
from . import arrays, machine
from .jit import Entry, call_body, compiler_lock, device
from .tasks import clear_queue, next_task

__all__ = ["ADDRESSES", "HEADER", "STACK", "launch", "run", "run_calls", "start"]

#: Where the address of its data is in a NumPy array: PyArrayObject_fields of ndarrayobject.h, behind Python's header.
HEADER = object.__basicsize__
#: Addresses, not arrays.
ADDRESSES = -1
#: Whether each call writes a line to standard error, as `nhwconv.verbose` has it.
VERBOSE = os.environ.get("NHWCONV_VERBOSE") == "1"
#: Bytes of scratch up to which it is on the stack: memory of its own takes longer than the least programs do.
STACK = 16 * 1024
_ROOM = STACK + 64

# ------------------------------------------------------------------------------------------- native code


@device
def _address(operand, header):
    """Return the address of an operand's data."""
    return operand if header < 0 or operand == 0 else integers(operand + header)[0]


@device
def _work(body, operands, geometry, tasks, queue, worker, workers):
    """Do tasks until none is left: the loop of every body."""
    fresh = 1
    while True:
        task = next_task(queue, worker, workers, tasks)
        if task >= tasks:
            break
        call_body(body, operands, geometry, worker, task, fresh)
        fresh = 0


@device
def _fill_table(image, base, header, table, a0, a1, a2, a3, a4, a5, a6, a7):
    """Write the addresses of all arrays and parts; return where the steps begin in the image."""
    slot = 0
    for operand in (a0, a1, a2, a3, a4, a5, a6, a7):
        table[slot] = _address(operand, header)
        slot += 1
    for part in range(image[1]):
        table[slot + part] = base + image[3 + part]
    return slot + image[1], 3 + image[1]


@device
def _bind(image, step, table, operands):
    """Write the addresses of a step's operands; return where the next step begins."""
    count = image[step + 4]
    for i in range(count):
        place = step + 5 + 2 * i
        operands[i] = table[image[place]] + image[place + 1]
    return step + 5 + 2 * count


def execute(program, scratch, header, a0, a1, a2, a3, a4, a5, a6, a7):
    """Run the program whose image is at an address, with this scratch (an array, or 0) and these operands."""
    image = integers(program)
    base = (_address(scratch, HEADER) if scratch else stack(_ROOM)) + 63 & -64
    slots, step = _fill_table(image, base, header, integers(base), a0, a1, a2, a3, a4, a5, a6, a7)
    operands = base + 8 * slots
    queue = operands + 64
    for _ in range(image[0]):
        following = _bind(image, step, integers(base), integers(operands))
        body, geometry, tasks, workers = image[step], image[step + 1], image[step + 2], image[step + 3]
        if workers == 1:
            for task in range(tasks):
                call_body(body, operands, geometry, 0, task, task == 0)
        else:
            clear_queue(queue, workers)
            for worker in prange(workers):
                _work(body, operands, geometry, tasks, queue, worker, workers)
        step = following


in_parallel = Entry(execute, machine.threads, parallel=True)  # its code names functions of Numba's threads
in_series = Entry(execute)


# --------------------------------------------------------------------------------------- threads and forks


class _Launcher:
    """Knows whether a parallel launch is safe now."""

    def __init__(self) -> None:
        self.inside: dict[str, list[int]] = {}  # "launch": the thread that is inside a workqueue launch
        self.layer: str | None = None  # unknown until the first launch
        self.orphaned = False  # forked after OpenMP started

    def start(self) -> str:
        """Start Numba's threading layer, if it isn't running, and return its name."""
        if self.layer is None:
            machine.threads()
            self.layer = str(threading_layer())
        return self.layer

    def enter(self) -> bool:
        """Claim workqueue for a launch; False where another one is under way, in whichever thread.

        Python runs handlers of signals between any two steps, so a claim of this thread that is found here is one of
        two things. A call that a handler interrupted has it, still goes on, and will give it back. Or Ctrl-C struck
        between a claim and the `try` that gives it back: it is nobody's, and goes with the call that finds it.
        """
        claim = [threading.get_ident()]
        found = self.inside.setdefault("launch", claim)  # one step, whichever threads are about
        return found is claim or (found == claim and not _interrupts_a_launch())

    def leave(self) -> None:
        """Give workqueue back."""
        self.inside.pop("launch", None)

    def before_fork(self) -> None:
        """Wait for whoever compiles: a child made then would find locks held by nobody, and LLVM halfway through."""
        compiler_lock.acquire()

    def after_fork(self) -> None:
        """In a forked child: nobody is inside a launch or compiles; remember whether OpenMP had been used."""
        compiler_lock.release()
        self.inside = {}
        # Numba's own state, too: another user of Numba may have started OpenMP.
        self.orphaned = self.orphaned or (parallel._is_initialized and threading_layer() == "omp")


launcher = _Launcher()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=launcher.before_fork, after_in_parent=compiler_lock.release, after_in_child=launcher.after_fork
    )


def start() -> str:
    """Start Numba's threads and return the name of their layer."""
    return launcher.start()


def _interrupts_a_launch() -> bool:
    """Return whether another launch goes on below the one that asks, in its thread."""
    frame: FrameType | None = sys._getframe(3)  # this function, `enter` and `launch`
    while frame is not None and frame.f_code is not launch.__code__:
        frame = frame.f_back
    return frame is not None


def launch(parallel_form: Any, serial_form: Any, workers: int, *arguments: Any) -> None:
    """Call a compiled function in the form that can run now: in parallel where that is worth it, and safe."""
    if workers <= 1 or launcher.orphaned:
        serial_form(*arguments)
    elif launcher.start() != "workqueue":
        parallel_form(*arguments)
    elif launcher.enter():
        try:
            parallel_form(*arguments)
        finally:
            launcher.leave()
    else:
        serial_form(*arguments)


def run(
    program: Any, a0: int, a1: int, a2: int, a3: int, a4: int, a5: int, a6: int, a7: int, header: int = HEADER
) -> None:
    """Run a program of compiled steps.

    Parameters
    ----------
    program : Program
        What runs.
    a0, ..., a7 : int
        For each name of `nhwconv.program.ARRAYS` the ``id`` of an array, or 0; with a `header` of `ADDRESSES` the
        address of its data instead.
    """
    start = perf_counter() if VERBOSE else 0.0
    scratch = None if program.nbytes <= STACK else arrays.scratch(program.nbytes)
    place = 0 if scratch is None else id(scratch)
    arguments = program.address, place, header, a0, a1, a2, a3, a4, a5, a6, a7
    if program.workers <= 1:
        in_series.call(*arguments)
    else:
        launch(in_parallel.call, in_series.call, program.workers, *arguments)
    if VERBOSE:
        _tell(program, perf_counter() - start)


def _tell(program: Any, seconds: float) -> None:
    """Write the line of a call to standard error, where it is one of a pass."""
    from ..verbose import line  # reads layers' notation, too, which few programs need

    if program.problem is not None and program.ran:
        print(line(dict(program.ran), program.problem, seconds), file=sys.stderr)


def run_calls(program: Any, named: dict[str, arrays.Array]) -> None:
    """Run a program some of whose steps are Python calls, on arrays by name, which are as programs want them."""
    start = perf_counter() if VERBOSE else 0.0
    scratch = arrays.scratch(program.nbytes)
    base = -arrays.address(scratch) % arrays.ALIGNMENT
    offsets = dict(zip(program.parts, program.behind_header, strict=True))
    operands = [id(named[name]) if name in named else 0 for name in program.names]
    for step in program.steps:
        if step.compiled:
            image = program.image(program.behind_header, step)
            in_series.call(arrays.address(image), id(scratch), HEADER, *operands)
            continue
        views = []
        for place, shape in zip(step.places, step.shapes, strict=True):
            if place.source in offsets:
                at = base + offsets[place.source] + place.offset
                views.append(np.ndarray(shape, step.dtype, scratch, at))
            else:
                views.append(named[place.source].reshape(shape))
        step.function(*views)
    if VERBOSE:
        _tell(program, perf_counter() - start)
