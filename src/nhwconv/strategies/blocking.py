"""How sizes are cut into blocks: the same for whoever plans and for the bodies, which call these functions too."""

from __future__ import annotations

import math

from ..runtime.jit import ceil_div, device

__all__ = ["channel_block", "channel_blocks", "equal_blocks", "inside", "largest_block", "point_pitch"]


def equal_blocks(size: int, parts: int, multiple: int = 1) -> int:
    """Return the block that cuts `size` into about `parts` equal blocks, a multiple of `multiple`."""
    block = math.ceil(size / max(parts, 1))
    return min(math.ceil(block / multiple) * multiple, math.ceil(size / multiple) * multiple)


def largest_block(size: int, limit: int, multiple: int = 1) -> int:
    """Return the block that cuts `size` into equal blocks of about `limit` at most, a multiple of `multiple`."""
    return math.ceil(size / math.ceil(size / limit) / multiple) * multiple


@device
def inside(first, size, step, count):
    """Return which places, from and up to, are inside: those whose ``first + i * step`` is in ``[0, size)``."""
    low = (step - 1 - first) // step if first < 0 else 0
    high = (size - 1 - first) // step + 1 if first < size else 0
    return low, max(low, min(count, high))


@device
def channel_blocks(size, block, lanes):
    """Return the number of blocks of channels; the last takes a rest of fewer than `lanes` with it."""
    return max(1, ceil_div(size - lanes + 1, block))


@device
def channel_block(number, size, block, lanes):
    """Return the first channel of a block, and its channels."""
    first = number * block
    return first, (size if number == channel_blocks(size, block, lanes) - 1 else first + block) - first


@device
def point_pitch(size, lanes):
    """Return the distance of one point's data from the next: an odd number of vectors.

    A Winograd transform touches all points at once. At a distance of a large power of two they would all fall into the
    same few sets of the caches.
    """
    return (ceil_div(size, lanes) | 1) * lanes
