"""How `grouped` cuts its work, and what it is expected to take."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CUT", "Cut"]


@dataclass(frozen=True)
class Cut:
    """Tasks, slices, and prices."""

    #: Tasks that a pass is cut into where it is large enough: fine enough for any number of threads to share.
    tasks: int = 32
    #: Channels of a group at most, of x and of y; more make better use of a register tile of many channels.
    most_channels: int = 32
    #: Cycles of a vector of products in a correlation and in a weight gradient, of a load or a shuffle, and of a vector
    #: of outputs. Of several channels a group, sixteen registers hold too few sums that do not wait for one another,
    #: and not those of a weight gradient beside dy.
    product: float = 0.5
    product_in_16: float = 0.8
    sum: float = 0.55
    sum_in_16: float = 0.85
    move: float = 0.1
    output: float = 3
    #: Cycles of a chunk of taps, where a row of them is several.
    chunk: int = 4
    #: Loads of a number of x from which on its rows are copied with their padding; bytes of the rows of a task, which
    #: stay in L2, and of those that one row of outputs may need.
    gather: int = 8
    scratch: int = 2**18
    most_scratch: int = 2**19
    #: Weight gradient: pixels whose products are summed in registers.
    sum_pixels: int = 128
    #: Weight gradient: least vectors of products of a slice, most slices, and most numbers of all their parts; and the
    #: tasks at least, of vectors where there are few slices.
    slice_products: int = 50_000
    least_tasks: int = 4
    most_slices: int = 16
    parts_limit: int = 2**20


CUT = Cut()
