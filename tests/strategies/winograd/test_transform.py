"""The three transforms: what a matrix from both sides gives, for tiles that lie partly outside, of any channels."""

from functools import cache

import numpy as np
import pytest

from nhwconv import planning
from nhwconv.codegen.simd import integers, numbers
from nhwconv.program import Program, Step, places
from nhwconv.runtime import machine
from nhwconv.runtime.jit import Body
from nhwconv.runtime.records import Record, record
from nhwconv.strategies.winograd.points import matrices
from nhwconv.strategies.winograd.transform import Added, Tile, Within, transform, transforms

FORMS = [(4, 3, 4, 3), (2, 3, 4, 3), (4, 2, 3, 3), (4, 3, 4, 1), (1, 3, 6, 3)]


class Call(Record):
    """What `transform` takes; all strides are those of ``(rows, columns, channels)``."""

    function: int
    row: int
    column: int
    row_0: int
    row_1: int
    column_0: int
    column_1: int
    t_row: int
    t_column: int
    channels: int
    add: int
    e_row: int
    e_column: int


@cache
def body(ITEMSIZE):
    def body(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Call)
        table = integers(operands)
        source, target = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        transform(
            g.function,
            Tile(source, g.row, g.column),
            Tile(target, g.t_row, g.t_column),
            Within(g.row_0, g.row_1, g.column_0, g.column_1),
            g.channels,
            Added(g.add != 0, Tile(numbers(table[2], ITEMSIZE), g.e_row, g.e_column)),
        )

    return Body(body)


def run(dtype, name, form, x, within, channels, e=None):
    """Transform a tile, and compare; elements that do not exist are read as zero, or not written."""
    which = ("input", "weights", "output").index(name)
    high, wide = (np.array(matrices(*form[i : i + 2])[which], float) for i in (0, 2))
    y = np.full((len(high), len(wide), channels), 77, dtype)
    strides = [[s // a.itemsize for s in a.strides] for a in (x, y)]
    e_strides = [0, 0] if e is None or e.ndim == 1 else [s // e.itemsize for s in e.strides]
    g = Call(
        function=transforms(np.dtype(dtype).name, *form)[f"{name}_transform"], row=strides[0][0],
        column=strides[0][1], row_0=within[0], row_1=within[1], column_0=within[2], column_1=within[3],
        t_row=strides[1][0], t_column=strides[1][1], channels=channels,
        add=e is not None, e_row=e_strides[0], e_column=e_strides[1],
    )  # fmt: skip
    more = {} if e is None else {"b": e}
    step = Step(body(y.itemsize), (g,), 1, places("x", "y", "x" if e is None else "b"))
    planning.execute(Program((step,)), x=x, y=y, **more)
    exists = np.zeros((y if name == "output" else x).shape[:2], bool)
    exists[within[0] : max(within[1], 0), within[2] : max(within[3], 0)] = True
    inner = x.astype(float) if name == "output" else np.where(exists[..., None], x.astype(float), 0)
    expected = np.einsum("ai,ijc,bj->abc", high, inner, wide)
    scale = np.einsum("ai,ijc,bj->abc", abs(high), abs(inner), abs(wide))
    if e is not None:
        expected, scale = expected + e, scale + np.abs(e)
    written = np.ones(y.shape, bool)
    if name == "output":
        written &= exists[..., None]
    assert (y[~written] == 77).all()
    error = np.abs(y - expected)[written]
    assert (error <= 40 * np.finfo(dtype).eps * scale[written] + 1e-300).all(), (name, form, within, channels)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", ["input", "weights", "output"])
def test_transforms_are_their_matrices(name, form, dtype):
    """Whole tiles, and tiles of which some elements are outside, or some results are not wanted."""
    lanes, rng = machine.lanes(np.dtype(dtype).itemsize), np.random.default_rng(0)
    which = ("input", "weights", "output").index(name)
    high, wide = (matrices(*form[i : i + 2])[which] for i in (0, 2))
    rows, columns = (len(high), len(wide)) if name == "output" else (len(high[0]), len(wide[0]))
    for channels in (lanes, lanes + 1, 2 * lanes, 3 * lanes - 1):
        x = rng.standard_normal((len(high[0]), len(wide[0]), channels)).astype(dtype)
        whole = (0, rows, 0, columns)
        for within in (whole, (1, rows, 0, columns - 1), (0, rows - 1, 1, columns), (rows, rows, 0, 0)):
            run(dtype, name, form, x, within, channels)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outputs_are_added_to(dtype):
    """A bias, the same for every output; or what is there, of every output its own."""
    lanes, rng, form = machine.lanes(np.dtype(dtype).itemsize), np.random.default_rng(0), FORMS[0]
    for channels in (lanes, 2 * lanes):
        x = rng.standard_normal((6, 6, channels)).astype(dtype)
        for rows, columns in ((4, 4), (3, 4), (1, 2)):
            within = 0, rows, 0, columns
            run(dtype, "output", form, x, within, channels, rng.standard_normal(channels).astype(dtype))
            run(dtype, "output", form, x, within, channels, rng.standard_normal((4, 4, channels)).astype(dtype))


def test_forms_of_as_many_points_share_the_input_transform():
    """So a weight gradient, and kernels of other sizes, compile one less; a single tap transforms nothing."""
    forward, weight_grad, other, copied = (
        transforms("float32", *form) for form in ((4, 3, 4, 3), (3, 4, 3, 4), (2, 5, 5, 2), (4, 3, 6, 1))
    )
    names = [found["input_transform"].name for found in (forward, weight_grad, other, copied)]
    assert names[0] == names[1] == names[2] != names[3]
    assert len({found["output_transform"].name for found in (forward, weight_grad, other, copied)}) == 4
