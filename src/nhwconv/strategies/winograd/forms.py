"""Which form F(m, r) each correlation of a pass takes: where it saves products, and keeps rounding within the bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from ...codegen import tile
from ...codegen.native import Native
from ...problem import ConvProblem, Pass
from ...runtime import machine
from ..axes import Axis, forward_axes, input_grad_axes, tap_phases
from .constants import CUT
from .transform import transforms

__all__ = ["Filtered", "Form", "bundles_of", "cycles", "filtered", "lies_apart"]


@dataclass(frozen=True)
class Form:
    """F(m_h, r_h) x F(m_w, r_w)."""

    m_h: int
    r_h: int
    m_w: int
    r_w: int

    @property
    def points(self) -> int:
        """The products of a tile."""
        return (self.m_h + self.r_h - 1) * (self.m_w + self.r_w - 1)

    @property
    def transposed(self) -> Form:
        """Outputs and taps with changed places: a weight gradient's kernel is what comes out."""
        return Form(self.r_h, self.m_h, self.r_w, self.m_w)

    def fields(self, dtype: str) -> dict[str, int | Native]:
        """Return the form, and its transforms, as the geometry has them."""
        sizes = {"m_h": self.m_h, "r_h": self.r_h, "m_w": self.m_w, "r_w": self.r_w}
        return {**sizes, **transforms(dtype, *sizes.values())}


@dataclass(frozen=True)
class Filtered:
    """One correlation of stride 1, on its grids, and its form; or one phase of a sum of them."""

    rows: Axis
    columns: Axis
    form: Form

    @property
    def tiles(self) -> tuple[int, int]:
        """The tiles of one grid of one image, down and across."""
        return math.ceil(self.rows.outputs / self.form.m_h), math.ceil(self.columns.outputs / self.form.m_w)

    @property
    def all_tiles(self) -> int:
        """The tiles of one image."""
        return math.prod(self.tiles) * self.rows.grids * self.columns.grids

    @property
    def grid(self) -> dict[str, int]:
        """The grids and their tiles, as the geometry has them."""
        rows, columns, (tiles_h, tiles_w) = self.rows, self.columns, self.tiles
        return {
            "stride_h": rows.stride, "stride_w": columns.stride, "grids_h": rows.grids, "grids_w": columns.grids,
            "tiles_h": tiles_h, "tiles_w": tiles_w,
        }  # fmt: skip

    @property
    def products(self) -> int:
        """The products of all tiles of an image, for each pair of channels."""
        return self.form.points * self.all_tiles

    @property
    def direct(self) -> int:
        """The same without a form."""
        return self.rows.taps * self.columns.taps * self.rows.out * self.columns.out


def _outputs(taps: list[int], outputs: int, alone: bool) -> int | None:
    """Return the outputs of a tile of one axis, for correlations of so many taps that share it; None without a form.

    `alone` says that the kernel has one row or one column.
    """
    most = max(taps)
    if min(taps) == 0:
        return None
    if most == 1:
        return 1 if alone else min(CUT.single, key=lambda m: math.ceil(outputs / m) * m)

    def price(m: int) -> float:
        # A single tap needs no transform.
        sizes = [(m + t - 1) * (1 + CUT.price * (m + t - 1) ** 2) if t > 1 else m for t in taps]
        return math.ceil(outputs / m) * sum(sizes)

    sizes = CUT.alone if alone else CUT.both
    return min((size - most + 1 for size in sizes if size > most), key=price, default=None)


@lru_cache(maxsize=1024)
def filtered(problem: ConvProblem, pass_: Pass) -> list[Filtered]:
    """Return the correlations that a pass consists of; none where they save no products.

    Those of a strided forward pass are added, tile by tile, so their tiles have the same outputs.
    """
    if pass_ == "input_grad":
        pairs = input_grad_axes(problem)
    else:
        rows, columns = map(tap_phases, forward_axes(problem))
        pairs = list(product(rows, columns))
    alone = min(problem.kh, problem.kw) == 1
    found = []
    for pair in pairs:
        together = pairs if pass_ == "forward" else [pair]
        m_h, m_w = (_outputs([axes[i].taps for axes in together], pair[i].outputs, alone) for i in (0, 1))
        if m_h is None or m_w is None:
            return []
        found.append(Filtered(*pair, Form(m_h, pair[0].taps, m_w, pair[1].taps)))
    return found if sum(c.products for c in found) < sum(c.direct for c in found) else []


def bundles_of(groups: int, channels: tuple[int, ...], lanes: int, least: int = 1) -> int:
    """Return into how many bundles groups of these channels, of x and of y, are cut: `least`, where they allow it.

    There is a vector in each at least.
    """
    bundles = max(least, math.ceil(groups * max(channels) / CUT.bundle_channels))
    return min(bundles, groups // math.ceil(lanes / min(channels)))


def lies_apart(problem: ConvProblem) -> bool:
    """Return whether the lines of memory that a phase reads or writes lie apart."""
    return problem.groups > 1 and problem.stride != (1, 1)


def cycles(g, vectors, moved, weights, shape):
    """Return the cycles of a correlation: its products', and its transforms'.

    These are counted in vectors: of a tile's channels that go in and come out, and of weights. `moved` of a tile's
    vectors come from lines of memory that lie apart, or go there.
    """
    points = (g.m_h + g.r_h - 1) * (g.m_w + g.r_w - 1)
    tiles = g.n * g.grids_h * g.grids_w * g.tiles_h * g.tiles_w
    products = tile.cycles(tiles, g.dg, g.cg, shape) * CUT.product
    lines = moved * machine.vector_bytes() / machine.LINE
    transforms = CUT.transform * (tiles * vectors + weights) + CUT.apart * tiles * lines
    return float(g.groups * points * (products + transforms))
