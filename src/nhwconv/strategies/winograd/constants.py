"""How `winograd` chooses its tiles and cuts its work, and why so."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CUT", "Cut"]


@dataclass(frozen=True)
class Cut:
    """Points of tiles, sizes of blocks, and prices."""

    #: Points of a tile's side that keep rounding errors within the bound: where both sides have taps, so that their
    #: errors multiply, and where the kernel has one row or one column. Nine points round as much as ten.
    both: tuple[int, ...] = (3, 4, 5, 6, 7)
    alone: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 10)
    #: Outputs of a tile's side that has a single tap, a phase of several: the first that wastes least. They are copied
    #: and multiplied as they are, in fewer and larger tiles.
    single: tuple[int, ...] = (4, 3, 2, 1)
    #: A product costs more by this, times the square of the points of its tile's side: longer transforms, larger
    #: errors.
    price: float = 0.005
    #: Elements of transformed weights up to which they are made once, for all tasks, where more blocks of tiles than
    #: `shared` read them. More of them come so slowly from the last-level cache that each task rather makes its own.
    shared_weights: int = 1536 * 1024
    shared: int = 4
    #: Tiles of a block, and channels of x, with shared weights; points of a block, and channels of x, without: so that
    #: transformed x stays in L2.
    shared_tiles: int = 28
    shared_channels: int = 128
    own_points: int = 2048
    own_channels: int = 64
    #: Channels of the groups that are transformed together, at most: enough for whole cache lines one behind the other.
    bundle_channels: int = 64
    #: Channels of y of a block; fewer, where there would be fewer tasks than this.
    block_channels: int = 128
    least_tasks: int = 8
    #: The price of a product here, where sums are short, beside that of one in a long sum, and the cycles in which a
    #: transform makes a vector.
    product: float = 1.1
    transform: int = 4
    #: The cycles for a cache line of a pixel, where there are groups and a stride: each phase reads or writes every
    #: second pixel, and of it the lines of few groups.
    apart: int = 4
    #: The cycles in which a register tile fetches and stores a vector of its sums, which matters where these are short.
    continued: int = 1
    #: Weight gradient: tiles of a block, and bytes of its channels in one pixel; slices, and elements of all their
    #: parts.
    sum_tiles: int = 56
    sum_bytes: int = 512
    slices: int = 4
    parts_limit: int = 4 * 2**20
    #: Weight gradient: where there would be fewer tasks than this, slices are shorter, down to so many tiles.
    sum_tasks: int = 4
    least_tiles: int = 14
    #: Weight gradient: most bytes of all workers' scratch; where they would be more, or tasks fewer than two a worker,
    #: blocks have fewer channels, down to so many. That changes no bit: a sum is the same in any block.
    scratch_limit: int = 32 * 2**20
    least_channels: int = 32


CUT = Cut()
