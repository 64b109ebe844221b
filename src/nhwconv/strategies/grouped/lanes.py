"""How the channels of groups lie on the lanes of vectors.

A vector of y holds as many whole groups as fit, side by side as in memory; of a group with more channels than lanes it
holds a part. So all vectors of y are alike: lane i belongs to group ``i // dg`` of its vector, and what it reads of x,
the k-th channel of this group, lies ``i // dg * cg`` elements behind the k-th channel of the first group.

For every k that is the same pattern, k elements further on. There are three ways to bring it in:

* one load of all channels of the groups, aligned as the groups are, and a permutation that depends on k, where the CPU
  takes the order of lanes from a register: for who loads much;
* loads of whole vectors, k elements on, and shuffles that are known when code is emitted: none with one channel a
  group, one where as many channels come in as go out, more where more come in;
* broadcasts, where a vector of y holds one group, or two and shuffles across a whole vector are slow.
"""

from __future__ import annotations

from typing import NamedTuple

from ...runtime import machine
from ...runtime.jit import device
from ...runtime.records import Record

__all__ = ["Lanes", "Pattern", "Spread", "vector"]


class Spread(NamedTuple):
    """The vectors of ``groups`` groups, with `cg` channels of x and `dg` of y each."""

    groups: int
    cg: int
    dg: int
    lanes: int
    permuted: bool = False  #: where that can be

    @property
    def whole(self) -> int:
        """The groups of a vector."""
        return max(1, self.lanes // self.dg)

    @property
    def pieces(self) -> int:
        """The vectors of a group."""
        return -(-self.dg // self.lanes)

    @property
    def vectors(self) -> int:
        """All vectors."""
        return -(-self.groups // self.whole) * self.pieces

    @property
    def pattern(self) -> Pattern:
        """What is emitted; it is the same for all groups that fill a vector by themselves."""
        if self.whole == 1:
            return Pattern(1, 0, 0)
        possible = self.cg > 1 and self.whole * self.cg <= self.lanes and machine.permutes()
        return Pattern(self.whole, self.cg, self.dg, self.permuted and possible)

    def fields(self) -> dict[str, int]:
        """Return the fields of `Lanes`."""
        last = self.pattern.loads(self.lanes)[-1]
        reach = last.offset + last.width + (0 if self.pattern.permuted else self.cg - 1)
        return dict(
            groups=self.groups, cg=self.cg, dg=self.dg, whole=self.whole, pieces=self.pieces, vectors=self.vectors,
            reach=reach,
        )  # fmt: skip


class Load(NamedTuple):
    """A load: how many elements on, of how many, and which of them goes to which lane; one is broadcast."""

    offset: int
    width: int
    taken: dict[int, int]

    @property
    def turned(self) -> bool:
        """Whether an element that is loaded has to change its lane."""
        return self.width > 1 and any(lane != element for lane, element in self.taken.items())


class Pattern(NamedTuple):
    """What the lanes of a vector read: lane i element ``i // dg * cg``, of `whole` groups; of one, all the same.

    `permuted` says that a load brings in all channels of these groups, each of which a permutation takes to its lanes.
    """

    whole: int
    cg: int
    dg: int
    permuted: bool = False

    def loads(self, lanes: int) -> list[Load]:
        """Return the loads that bring in a channel of every group: each of as many groups as it reaches."""
        if self.whole == 1:
            return [Load(0, 1, dict.fromkeys(range(lanes), 0))]
        broadcast = self.whole == 2 and not (machine.permutes() and 2 * self.cg <= lanes)
        each, width = (1, 1) if broadcast else ((lanes - 1) // self.cg + 1, lanes)
        found = []
        for first in range(0, self.whole, each):
            groups = {i: i // self.dg - first for i in range(self.whole * self.dg)}
            found.append(Load(first * self.cg, width, {i: g * self.cg for i, g in groups.items() if g in range(each)}))
        return found

    def moves(self, lanes: int) -> int:
        """Return how many loads and shuffles bring them to their lanes."""
        loads = self.loads(lanes)
        return len(loads) + max(len(loads) - 1, int(loads[0].turned))


class Lanes(Record):
    """How channels lie on vectors."""

    groups: int
    cg: int  #: channels of x and of y in a group
    dg: int
    whole: int  #: groups of a vector, vectors of a group, and all vectors
    pieces: int
    vectors: int
    reach: int  #: elements, from the first channel of a vector's groups on, that loads of whole vectors touch


class Vector(NamedTuple):
    """A vector: its first channel in x and in y, the channels of y that exist, and the elements of x that they need."""

    x: int
    y: int
    channels: int
    elements: int


@device
def vector(g, number, LANES):
    """Return the places of a vector."""
    group, piece = number * g.whole, 0
    if g.pieces > 1:  # a division for every row would be dear
        group, piece = number // g.pieces * g.whole, number % g.pieces
    groups = min(g.whole, g.groups - group)
    return Vector(
        group * g.cg, group * g.dg + piece * LANES, min(LANES, groups * g.dg - piece * LANES), (groups - 1) * g.cg + 1
    )
