"""How `loop` cuts its work, and why so."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CUT", "Cut"]


@dataclass(frozen=True)
class Cut:
    """Sizes of blocks and tasks."""

    #: Output pixels of one task: enough to use a panel of weights many times, few enough for its x to stay in L2.
    task_pixels: int = 1024
    #: Tasks that a pass is cut into where it is large enough: fine enough for any number of threads to share.
    tasks: int = 64
    #: Least output pixels of a task, where there are too few tasks; below that its output channels are split.
    least_pixels: int = 256
    #: Bytes of x that a task keeps in L2 while it walks over the output channels, beside what they are read from.
    task_bytes: int = 384 * 1024
    #: Products that are summed in one go: a running sum of so many equal numbers in float32 errs by 8.6e-6 at most,
    #: whichever number it is. The bound is 1e-5.
    sum_steps: int = 576
    #: Least bytes of a way of the L1 cache, and least ways, among the processors of the day.
    l1_way: int = 4096
    l1_ways: int = 8
    #: What gathering an element costs, in elements read; the cycles of a copy, and its bytes a cycle.
    gather: int = 3
    copy: int = 16
    copy_bytes: int = 16
    #: Tiles whose sums are kept from block to block of the sum: a strip of them stays in L1.
    strip_tiles: int = 6
    #: Weight gradient: tasks; pixels of a block, whose x and dy stay in cache, and least pixels of a slice.
    sum_tasks: int = 16
    block_pixels: int = 256
    slice_pixels: int = 1024
    #: Weight gradient: channels of x and of y that a task gathers where there are more: rows then lie close together.
    block_channels: int = 256
    #: Weight gradient: bytes from one pixel of x to the next from which on blocks are copied.
    far: int = 1024
    #: Weight gradient: the part of its cycles that it has to come down to for its two sides to change places.
    swap: float = 0.95
    #: Weight gradient: most elements of all slices' parts.
    parts_limit: int = 2 * 2**20


CUT = Cut()
