"""One column of tile products, as a step: for tests of the micro-kernel's contract.

``serve()`` is what a test runs in a process of its own: operands lie against pages without access.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np

from guarded import Guarded
from nhwconv import planning
from nhwconv.codegen.simd import integers, numbers
from nhwconv.codegen.tile import Operand, Prefetch, Rows, Sum, column_tile, panel_tile, tile_product, tile_shape
from nhwconv.program import Program, Step, places
from nhwconv.runtime.jit import Body
from nhwconv.runtime.records import Record, record

SUMS = ((1, 1, 1), (1, 1, 17), (2, 3, 5), (3, 1, 2), (1, 4, 3), (0, 2, 3), (2, 0, 3), (2, 3, 0))
#: What E is: nothing, one row for all, or what is continued.
ADDS = ("nothing", "a row", "C")
KINDS = ("panel", "column")


class Column(Record):
    """What `tile_product` takes, but for the operands."""

    tile: int
    rows: int
    columns: int
    outer: int
    inner: int
    steps: int
    a_outer: int
    a_inner: int
    a_row: int
    a_step: int
    b_outer: int
    b_inner: int
    b_step: int
    add: int
    e_row: int
    c_row: int
    stream: int
    ahead: int
    ahead_tile: int
    ahead_step: int


@cache
def column(ITEMSIZE: int) -> Body:
    """Make the body; it takes A, B, E and C."""

    def column(operands, geometry, worker, task, fresh):  # type: ignore[no-untyped-def]
        g = record(geometry, 0, Column)
        table = integers(operands)
        tile_product(
            g.tile,
            g.rows,
            g.columns,
            Sum(g.outer, g.inner, g.steps),
            Operand(numbers(table[0], ITEMSIZE), g.a_outer, g.a_inner, g.a_row, g.a_step),
            Operand(numbers(table[1], ITEMSIZE), g.b_outer, g.b_inner, 0, g.b_step),
            g.add != 0,
            Rows(numbers(table[2], ITEMSIZE), g.e_row),
            Rows(numbers(table[3], ITEMSIZE), g.c_row),
            g.stream,
            Prefetch(numbers(g.ahead, ITEMSIZE), g.ahead_tile, g.ahead_step),
        )

    return Body(column)


class Product:
    """A product of one kind and size, with operands that hold nothing but what it may read.

    A is ``(outer, inner, rows, steps)`` for a panel tile, with rows and steps changed for a column tile. B is ``(outer,
    inner, steps, width)``: exactly the columns, or whole vectors.
    """

    def __init__(self, dtype: Any, kind: str, rows: int, columns: int, sums: tuple[int, int, int], seed: int = 0):
        self.dtype, self.kind, self.rows, self.columns, self.sums = np.dtype(dtype), kind, rows, columns, sums
        rng = np.random.default_rng(seed)
        mr, nr, lanes = tile_shape(self.dtype.itemsize)
        outer, inner, steps = sums
        panel = kind == "panel"
        self.tile = (panel_tile if panel else column_tile)(self.dtype.name, mr, nr)
        width = -(-columns // lanes) * lanes if panel else columns
        self.a = rng.standard_normal((outer, inner, *((rows, steps) if panel else (steps, rows)))).astype(dtype)
        self.b = rng.standard_normal((outer, inner, steps, width)).astype(dtype)
        self.b[..., columns:] = np.nan
        self.bias = rng.standard_normal(columns).astype(dtype)
        self.before = rng.standard_normal((rows, columns)).astype(dtype)

    def exact(self, add: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the result in float64, and the sum of absolute values."""
        a, b = self.a.astype(np.float64), self.b[..., : self.columns].astype(np.float64)
        terms = "oimk,oikj->mj" if self.kind == "panel" else "oikm,oikj->mj"
        e = {"nothing": np.zeros(1), "a row": self.bias, "C": self.before}[add].astype(np.float64)
        return np.einsum(terms, a, b) + e, np.einsum(terms, np.abs(a), np.abs(b)) + np.abs(e)

    def run(self, add: str, c: np.ndarray, a: Any = None, b: Any = None, e: Any = None, **more: int) -> np.ndarray:
        """Compute into C, whose rows may be apart; operands may lie elsewhere, where they hold the same."""
        a, b = (self.a if a is None else a), (self.b if b is None else b)
        e = (self.bias if add == "a row" else c) if e is None else e
        outer, inner, steps = self.sums
        c_row = c.strides[0] // c.itemsize if self.rows > 1 else self.columns
        a_strides = [s // a.itemsize for s in a.strides]
        b_strides = [s // b.itemsize for s in b.strides]
        row, step = (2, 3) if self.kind == "panel" else (3, 2)
        g = Column(
            **{
                "tile": self.tile, "rows": self.rows, "columns": self.columns, "outer": outer, "inner": inner,
                "steps": steps, "a_outer": a_strides[0], "a_inner": a_strides[1], "a_row": a_strides[row],
                "a_step": a_strides[step], "b_outer": b_strides[0], "b_inner": b_strides[1], "b_step": b_strides[2],
                "add": add != "nothing", "e_row": c_row if add == "C" else 0, "c_row": c_row, "stream": 0, "ahead": 0,
                "ahead_tile": 0, "ahead_step": 0, **more,
            }
        )  # fmt: skip
        program = Program((Step(column(self.dtype.itemsize), (g,), 1, places("x", "w", "b", "y")),))
        planning.execute(program, x=a, w=b, b=e, y=c)
        return c


def sizes(itemsize: int) -> list[tuple[int, int]]:
    """Return rows and columns around register tiles and vectors."""
    mr, nr, lanes = tile_shape(itemsize)
    rows = sorted({1, 2, mr - 1, mr, mr + 1, 2 * mr - 1, 2 * mr, 2 * mr + 3, 5 * mr + 1})
    columns = sorted({1, 2, lanes - 1, lanes, lanes + 1, nr * lanes - 1, nr * lanes})
    return list(product(rows, columns))


def serve() -> None:
    """Compute products whose operands end, or start, at pages without access; print how many there were."""
    count = 0
    for dtype, kind, at_start in product((np.float32, np.float64), KINDS, (False, True)):
        for (rows, columns), sums, add in product(sizes(np.dtype(dtype).itemsize), SUMS, ADDS):
            p = Product(dtype, kind, rows, columns, sums)
            guarded = [Guarded(v.shape, dtype, at_start) for v in (p.a, p.b, p.bias, p.before)]
            for g, value in zip(guarded, (p.a, p.b, p.bias, p.before), strict=True):
                g.array[...] = value
            for g in guarded[:3]:
                g.make_read_only()
            a, b, e, c = (g.array for g in guarded)
            print(dtype, kind, at_start, rows, columns, sums, add, flush=True)
            p.run(add, c, a, b, e if add == "a row" else None)
            for g in guarded:
                g.check()
            count += 1
    print(count)
