"""Where rows of x are read: as they lie, or in scratch, where they are copied with their padding and then read often.

In scratch no column is outside, so that no tile has to ask, and pixels lie an odd number of vectors apart. That is
worth a copy where every number is loaded often: for every row of taps and every channel of a group.
"""

from __future__ import annotations

from ...codegen.simd import at
from ...problem import ConvProblem
from ...runtime import arrays
from ...runtime.jit import device
from ..axes import Axis
from ..blocking import point_pitch
from ..direct.correlate import collide
from ..direct.gather import Gathered, copy_cycles, gather_block
from .constants import CUT
from .lanes import Lanes, Spread

__all__ = ["Rows", "View", "left_behind", "source_of_rows"]


class Rows(Lanes, Gathered):
    """Images, and where their rows are read."""

    n: int  #: images; rows, columns and channels of x
    h: int
    w: int
    c: int
    columns: int  #: of a row where it is read; pixels are `pixel` elements apart
    above: int  #: what is copied for the first row of outputs: its first row and column, and rows
    before: int
    held: int


class View:
    """Where the rows are read that some phases of a correlation need: `channels` channels of them at a time.

    Of x, `pixels` pixels are read for a tile.
    """

    def __init__(
        self,
        problem: ConvProblem,
        spread: Spread,
        phases: list[tuple[Axis, Axis]],
        backward: bool,
        channels: int,
        pixels: int = 1,
    ) -> None:
        self.spread, self.itemsize, self.channels = spread, problem.dtype.itemsize, channels
        self.rows = [r for r, q in phases if r.taps * q.taps]
        used = [q for r, q in phases if r.taps * q.taps]
        w, c = (problem.ow, problem.d) if backward else (problem.w, problem.c)
        self.above = max((r.before for r in self.rows), default=0)
        strides = phases[0][0].stride * phases[0][1].stride
        loads = problem.kh * spread.cg / strides
        if spread.cg > 1 and collide(c, problem, pixels):
            loads *= 2  # those for the next channel of a group do not find in L1 what the last has read
        self.gather = loads >= CUT.gather and any(q.padded for q in used)
        self.columns, self.pixel, self.before, self.c = w, c, 0, c
        if self.gather:
            self.before = max(q.before for q in used)
            ends = ((q.out - 1) * q.stride - q.before + (q.taps - 1) * q.dilation + 1 for q in used)
            self.columns, self.pixel = self.before + max(ends), point_pitch(channels, spread.lanes)
        if self.gather and self._held(1) * self.columns * self.pixel * self.itemsize > CUT.most_scratch:
            self.gather, self.columns, self.pixel, self.before = False, w, c, 0

    def _held(self, lines: int) -> int:
        """Return the rows of x that so many rows of outputs need."""
        ends = ((lines - 1) * r.stride - r.before + (r.taps - 1) * r.dilation + 1 for r in self.rows)
        return self.above + max(ends, default=0)

    def fit(self, lines: int) -> int:
        """Return how many of these lines a task can have whose rows of x stay in L2."""
        while self.gather and lines > 1 and self._held(lines) * self.columns * self.pixel * self.itemsize > CUT.scratch:
            lines -= 1
        return lines

    def copies(self, lines: int) -> float:
        """Return the cycles of the copies for a task of so many lines."""
        if not self.gather:
            return 0.0
        together = self.pixel == self.channels == self.c
        return copy_cycles(self._held(lines), self.columns, self.channels, together, self.itemsize)

    def fields(self, lines: int) -> dict[str, int]:
        """Return the fields of `Rows` that say it, for tasks of so many lines."""
        held = self._held(lines)
        scratch = held * self.columns * self.pixel + self.spread.fields()["reach"] + self.spread.lanes
        return dict(
            gather=self.gather, step_h=1, step_w=1, pixel=self.pixel, columns=self.columns, above=self.above,
            before=self.before, held=held, scratch=arrays.apart(scratch, self.itemsize) if self.gather else 0,
        )  # fmt: skip


@device
def source_of_rows(g, first, image, channels, scratch):
    """Return where row 0 of an image is, were it all there: `image`, or scratch with the rows of a task from now on."""
    if not g.gather:
        return image
    row = first - g.above
    gather_block(g, image, row, g.held, -g.before, g.columns, channels, scratch)
    return at(scratch, -row * g.columns * g.pixel)


@device
def left_behind(g, n, row):
    """Return how many elements may be read from the first channel of the last pixel of a row on."""
    return g.pixel + g.reach if g.gather else (g.n * g.h - (n * g.h + row + 1)) * g.w * g.c + g.c
