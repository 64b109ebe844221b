"""Programs: everything about a pass that is known before its arrays.

A `Step` is one compiled body with its geometry, its tasks, and the operands that it takes. A `Program` is some steps,
one after another, and the scratch that they share. Nothing here computes: `nhwconv.runtime.executor` runs programs, and
whoever wants to know what one takes adds up its steps.

Operands have names where they are a caller's arrays (`ARRAYS`), and are a `Part` where they are scratch. So programs
are joined by joining their steps, and a program serves as a part of another one when its arrays are given other places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from .problem import ConvProblem, Pass
from .runtime import arrays
from .runtime.jit import Body
from .runtime.records import Record, pack
from .runtime.tasks import COUNTERS_APART

__all__ = ["ALIGNMENT", "ARRAYS", "AnyStep", "Call", "Part", "Place", "Program", "Step", "calls", "places"]

#: The arrays that a caller may pass, in the order in which the executor takes them.
ARRAYS = ("x", "w", "b", "y", "dy", "dx", "dw", "db")
#: Scratch starts at multiples of this.
ALIGNMENT = 64
#: Operands of a step at most.
OPERANDS = 8
_WORD = 8


@dataclass(frozen=True, eq=False)
class Part:
    """Scratch of one program; it holds anything when a step first sees it.

    Attributes
    ----------
    nbytes : int
        For all workers together.
    name : str
        What it holds.
    """

    nbytes: int
    name: str = "scratch"


class Place(NamedTuple):
    """Where an operand is: an array's name or a part, and how many bytes into it."""

    source: str | Part
    offset: int = 0


def places(*sources: str | Part | Place) -> tuple[Place, ...]:
    """Return operands: arrays by name, parts, or places in one of them."""
    return tuple(s if isinstance(s, Place) else Place(s) for s in sources)


@dataclass(frozen=True, eq=False)
class Step:
    """A body, and what it works on.

    Attributes
    ----------
    body : Body
        What does a task.
    records : tuple of Record
        Its geometry: what it reads of the problem.
    tasks : int
        How many there are; any worker may do any of them.
    places : tuple of Place
        The operands, in the order in which the body takes them.
    cycles : float
        What all tasks together take one core, as predicted.
    """

    body: Body
    records: tuple[Record, ...]
    tasks: int
    places: tuple[Place, ...]
    cycles: float = 0.0

    compiled: ClassVar[bool] = True

    @cached_property
    def geometry(self) -> npt.NDArray[Any]:
        """The records in memory; native functions that they name are compiled now."""
        return pack(self.records)


@dataclass(frozen=True, eq=False)
class Call:
    """A step in Python: ``function(*operands)``, on arrays of these shapes and dtype."""

    function: Callable[..., None]
    places: tuple[Place, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype[Any]
    cycles: float = 0.0

    compiled: ClassVar[bool] = False


AnyStep = Step | Call


class _Span(NamedTuple):
    """A part, and the first and the last step that use it."""

    part: Part
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Program:
    """Some steps, and how many workers they are meant for.

    Attributes
    ----------
    steps : tuple of Step or Call
        One after another.
    workers : int
        How many threads it may use; scratch is for so many.
    extra : int
        Bytes that its calls allocate themselves.
    ran : tuple of (str, str)
        The passes that it computes, and their strategies: what ``NHWCONV_VERBOSE=1`` tells.
    problem : ConvProblem, optional
        The convolution.
    """

    steps: tuple[AnyStep, ...]
    workers: int = 1
    extra: int = 0
    ran: tuple[tuple[Pass, str], ...] = ()
    problem: ConvProblem | None = None
    _images: dict[Any, Any] = field(default_factory=dict, repr=False)

    names: ClassVar[tuple[str, ...]] = ARRAYS

    @staticmethod
    def joined(programs: Iterable[Program]) -> Program:
        """Return the steps of all of them, one program after another."""
        programs = list(programs)
        steps = tuple(step for program in programs for step in program.steps)
        ran = tuple(pair for program in programs for pair in program.ran)
        problem = next((p.problem for p in programs if p.problem is not None), None)
        workers, extra = (max((getattr(p, name) for p in programs), default=0) for name in ("workers", "extra"))
        return Program(steps, max(workers, 1), extra, ran, problem)

    def moved(self, new: Mapping[str, Place]) -> Program:
        """Return this program on other places instead of these arrays."""

        def moved(place: Place) -> Place:
            found = new.get(place.source) if isinstance(place.source, str) else None
            return place if found is None else Place(found.source, found.offset + place.offset)

        steps = tuple(replace(step, places=tuple(map(moved, step.places))) for step in self.steps)
        return replace(self, steps=steps, _images={})

    @property
    def cycles(self) -> float:
        """The predicted cycles of one core."""
        return float(sum(step.cycles for step in self.steps))

    @property
    def native(self) -> bool:
        """Whether all steps are compiled."""
        return all(step.compiled for step in self.steps)

    # ------------------------------------------------------------------------------------------- scratch

    @cached_property
    def _spans(self) -> tuple[_Span, ...]:
        """Every part, from its first step to its last, in the order of the first."""
        found: dict[Part, tuple[int, int]] = {}
        for i, step in enumerate(self.steps):
            for place in step.places:
                if isinstance(place.source, Part):
                    found[place.source] = found.get(place.source, (i, i))[0], i
        return tuple(_Span(part, *steps) for part, steps in found.items())

    @property
    def parts(self) -> tuple[Part, ...]:
        """The scratch that the steps use."""
        return tuple(span.part for span in self._spans)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each part starts, in bytes from the first; parts that no step uses together may share memory."""
        placed: list[tuple[_Span, int, int]] = []
        for span in self._spans:
            start = 0
            taken = sorted((a, b) for other, a, b in placed if other.last >= span.first and span.last >= other.first)
            size = -(-span.part.nbytes // ALIGNMENT) * ALIGNMENT
            for a, b in taken:
                if start + size <= a:
                    break
                start = max(start, b)
            placed.append((span, start, start + size))
        return tuple(start for _, start, _ in placed)

    @cached_property
    def workspace(self) -> int:
        """The bytes of all parts, and of what calls allocate."""
        ends = [start + span.part.nbytes for span, start in zip(self._spans, self.offsets, strict=True)]
        return max(ends, default=0) + self.extra

    @cached_property
    def header(self) -> int:
        """The bytes before the first part: the table of addresses, a step's operands, and the queue."""
        words = len(ARRAYS) + len(self.parts) + OPERANDS + self.workers * COUNTERS_APART
        return -(-words * _WORD // ALIGNMENT) * ALIGNMENT

    @cached_property
    def nbytes(self) -> int:
        """The bytes of scratch that a run needs, from a multiple of `ALIGNMENT` on."""
        return self.header + self.workspace - self.extra

    # --------------------------------------------------------------------------------------------- image

    @cached_property
    def address(self) -> int:
        """Where the program's image is, as the executor reads it."""
        return arrays.address(self.image(self.behind_header))

    @cached_property
    def behind_header(self) -> tuple[int, ...]:
        """Where each part starts in the scratch of a run."""
        return tuple(self.header + offset for offset in self.offsets)

    def image(self, offsets: tuple[int, ...], only: Step | None = None) -> npt.NDArray[np.int64]:
        """Return the steps, or only one, as integers, with parts so many bytes from the start of scratch on.

        ``steps, parts, workers, offset of each part``; then for each step ``body, geometry, tasks, workers, operands``,
        and for each of these its place in the table of addresses and an offset.
        """
        found = self._images.get((offsets, only))
        if found is None:
            steps = self.steps if only is None else (only,)
            slots: dict[str | Part, int] = {name: i for i, name in enumerate(ARRAYS)}
            slots |= {part: len(ARRAYS) + i for i, part in enumerate(self.parts)}
            numbers = [len(steps), len(offsets), self.workers, *offsets]
            for step in steps:
                assert isinstance(step, Step)
                workers = max(1, min(self.workers, step.tasks))
                numbers += [step.body.address, arrays.address(step.geometry), step.tasks, workers, len(step.places)]
                for place in step.places:
                    numbers += [slots[place.source], place.offset]
            found = self._images[offsets, only] = np.array(numbers, np.int64)
        return found


def calls(
    function: Callable[..., None], problem: ConvProblem, pass_: Pass, bias: bool, cycles: float, extra: int
) -> Program:
    """Return the program of one call of Python code, which takes the arrays of a pass: with a bias, that one last."""
    arrays: dict[Pass, dict[str, tuple[int, ...]]] = {
        "forward": {"x": problem.x_shape, "w": problem.w_shape, "y": problem.y_shape},
        "weight_grad": {"x": problem.x_shape, "dy": problem.y_shape, "dw": problem.w_shape},
        "input_grad": {"dy": problem.y_shape, "w": problem.w_shape, "dx": problem.x_shape},
    }
    operands = arrays[pass_]
    if bias:
        operands["db" if pass_ == "weight_grad" else "b"] = (problem.c if pass_ == "input_grad" else problem.d,)
    step = Call(function, places(*operands), tuple(operands.values()), problem.dtype, cycles)
    return Program((step,), extra=extra)
