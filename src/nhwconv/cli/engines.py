"""Convolutions computed in processes of their own: other libraries, and first calls with nothing compiled.

Thread pools of two libraries in one process spin and disturb one another, so each peer has a process. It makes the same
arrays from the same seed, and answers over a pipe: to a problem with a result, then to each request with times.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from ..problem import ConvProblem, Pass
from ..runtime import machine
from ..runtime.arrays import Array
from ..timing import call_twice, other_data, public_call, time_calls, time_cold
from ..workloads import Data, make_data
from . import peers
from .peers import Calls
from .threads import set_threads

__all__ = ["PEERS", "Engine", "EngineError", "EngineProcess", "first_call_in_new_process"]

#: Given a problem, a pass and a number of threads: how it is computed.
Build = Callable[[ConvProblem, Pass, int], Calls]

#: What a library raises where it cannot do a problem; anything else ends its process, with a traceback.
REFUSALS = (RuntimeError, ValueError, TypeError, MemoryError)


class EngineError(Exception):
    """An engine cannot do a problem, or its process is gone; the text says why."""


@dataclass(frozen=True)
class Engine:
    """A library: the module that it needs, the extra that installs it, and how it computes a pass."""

    module: str
    extra: str
    build: Build

    def installed(self) -> bool:
        """Return whether its module can be found; it is not imported."""
        return importlib.util.find_spec(self.module) is not None


#: The libraries that strategies can be compared with.
PEERS: dict[str, Engine] = {
    "torch": Engine("torch", "torch", peers.torch_calls),
    "jax": Engine("jax", "jax", peers.jax_calls),
}


class EngineProcess:
    """One engine in a process, which starts at the first problem and ends with the ``with`` block.

    Parameters
    ----------
    build : callable
        A function at the top level of a module, so that it can be named in the other process.
    environment : dict, optional
        Environment variables of the process, beside this one's.
    """

    def __init__(self, build: Build, environment: dict[str, str] | None = None) -> None:
        self._build, self._environment = build, environment or {}
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()

    def begin(self, problem: ConvProblem, pass_: Pass) -> tuple[Array, float]:
        """Call twice; return a result, and how much longer the first call took than the second.

        Raises
        ------
        EngineError
            Where the engine cannot do it.
        """
        answer: tuple[Array, float] = self._ask((problem, pass_, machine.threads()))
        return answer

    def time(self, seconds: float) -> list[float]:
        """Time calls of the last problem for so many seconds.

        Raises
        ------
        EngineError
            Where the engine's process is gone.
        """
        times: list[float] = self._ask(_Time(seconds, cold=False))
        return times

    def time_cold(self, seconds: float) -> list[float]:
        """Time calls of the last problem, each with other arrays, for so many seconds.

        Raises
        ------
        EngineError
            Where the engine's process is gone, or has no room for so many arrays.
        """
        times: list[float] = self._ask(_Time(seconds, cold=True))
        return times

    def _ask(self, request: object) -> Any:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")  # a fork would inherit Numba's threads, dead
            self._pipe, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(self._build, self._environment, there), daemon=True)
            with _all_processors():
                self._process.start()
            there.close()
        assert self._process is not None
        try:
            self._pipe.send(request)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise EngineError(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise EngineError(answer)
        return answer


@contextmanager
def _all_processors() -> Iterator[None]:
    """Let a process that starts here use the processors of all threads of this one.

    OpenMP may have bound this thread to a single processor, and a new process inherits that.
    """
    if sys.platform != "linux":
        yield
        return
    here = os.sched_getaffinity(0)
    os.sched_setaffinity(0, here.union(*(os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task"))))
    try:
        yield
    finally:
        os.sched_setaffinity(0, here)


@dataclass(frozen=True)
class _Time:
    """The request to time calls of the last problem."""

    seconds: float
    cold: bool


def _serve(build: Build, environment: dict[str, str], pipe: Connection) -> None:
    """Answer requests until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ.update(environment)
    running: _Running | None = None
    with suppress(EOFError):
        while True:
            request = pipe.recv()
            try:
                if isinstance(request, _Time):
                    assert running is not None, "a problem comes first"
                    answer: object = running.time(request)
                else:
                    running = _Running(build, *request)
                    answer = running.begin()
            except REFUSALS as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                answer = lines[0]
            pipe.send(answer)


class _Running:
    """The problem that an engine's process is at."""

    def __init__(self, build: Build, problem: ConvProblem, pass_: Pass, threads: int) -> None:
        self.calls, self.data = build(problem, pass_, threads), make_data(problem)
        self.call = self._on(self.data)

    def _on(self, data: Data) -> Callable[[], Any]:
        return partial(self.calls.call, *self.calls.prepare(data))

    def begin(self) -> tuple[Array, float]:
        result, compiling = call_twice(self.call)
        return self.calls.to_numpy(result), compiling

    def time(self, request: _Time) -> list[float]:
        return time_cold(self.cold, request.seconds) if request.cold else time_calls(self.call, request.seconds)

    @cached_property
    def cold(self) -> list[Callable[[], Any]]:
        """The call on other arrays, and others again."""
        return [self._on(data) for data in other_data(self.data)]


# ------------------------------------------------------------------------------------------ first calls


@dataclass(frozen=True)
class _Strategy:
    """Builds the public call with one strategy, in another process."""

    name: str

    def __call__(self, problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
        set_threads(threads)
        return Calls(lambda data: (data,), lambda data: public_call(problem, pass_, data, self.name)(), _same)


def _same(result: Array) -> Array:
    return result


def first_call_in_new_process(problem: ConvProblem, pass_: Pass, strategy: str) -> float:
    """Return how much longer a strategy's first call takes than the second, in a process with nothing compiled."""
    with tempfile.TemporaryDirectory() as folder:
        empty = {"NHWCONV_CACHE_DIR": folder}
        with EngineProcess(_Strategy(strategy), empty) as process:
            return process.begin(problem, pass_)[1]
