"""The Dask adapter: against NumPy, on a cluster of processes, with a worker that dies, beyond the workers' memory."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numba
import numpy as np
import pytest
from distributed import Client, LocalCluster, wait

import child
import nhwconv as nc
import nhwconv.dask
from cases import Case, draw_data, exact
from tolerance import assert_close

CASES = [
    Case(n=10, h=9, w=8, c=6, d=8, kh=3, kw=2, stride=(1, 2), padding=((1, 0), (2, 1)), groups=2),
    Case(n=7, h=13, w=11, c=32, d=32, padding=((1, 1), (1, 1))),
    Case(n=5, h=9, w=9, c=16, d=16, groups=16, dilation=(2, 1)),
]
#: Larger than what a worker may hold.
MEMORY = 400 * 2**20


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_nhwconvs(case: Case, chunk: int, dtype: Any) -> None:
    data = draw_data(case, dtype)
    x, dy = (da.from_array(a, chunks=(chunk, -1, -1, -1)) for a in (data.x, data.dy))
    options = case.options
    y = nc.dask.conv2d(x, data.w, data.b, **options)
    dx, dw, db = nc.dask.conv2d_backward(x, data.w, dy, **options)
    assert y.chunks[0] == x.chunks[0] == dx.chunks[0]
    assert (dw.npartitions, db.npartitions) == (1, 1)
    for lazy, shape in ((y, case.y_shape), (dx, case.x_shape), (dw, case.w_shape), (db, (case.d,))):
        assert (lazy.shape, lazy.dtype) == (shape, dtype)
    y, dx, dw, db = dask.compute(y, dx, dw, db, scheduler="threads")
    for start in range(0, case.n, chunk):  # each is planned by itself, so bits are those of its own call
        of = slice(start, start + chunk)
        np.testing.assert_array_equal(y[of], nc.conv2d(data.x[of], data.w, data.b, **options))
        alone = nc.conv2d_backward(data.x[of], data.w, data.dy[of], needs="dx", **options).dx
        np.testing.assert_array_equal(dx[of], alone)
    length = case.length("weight_grad")
    assert_close(dw, *exact(case, data, "weight_grad"), length, "auto", "dw")
    absolute = np.abs(data.dy.astype(np.float64)).sum((0, 1, 2))
    assert_close(db, data.dy.astype(np.float64).sum((0, 1, 2)), absolute, length, "tensordot", "db")


#: Of each other convolution: the shapes of its arrays, and its options.
OTHERS = {
    "conv1d": ((10, 13, 6), (8, 3, 3), {"stride": 2, "padding": (2, 1), "groups": 2}),
    "conv_transpose2d": (
        (10, 5, 4, 6), (6, 3, 2, 4), {"stride": (2, 1), "padding": 1, "output_padding": (1, 0), "groups": 2},
    ),
    "conv_transpose1d": ((10, 7, 6), (6, 4, 4), {"stride": 3, "padding": (1, 0), "output_padding": 2, "groups": 2}),
}  # fmt: skip


def whole_numbers(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Return arrays whose sums are exact in any order."""
    rng = np.random.default_rng(0)
    return [rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_nhwconvs(name: str, known: bool) -> None:
    x_shape, w_shape, options = OTHERS[name]
    options = {**options, "strategy": ("depthwise", "loop")}
    d = w_shape[0] if name == "conv1d" else w_shape[-1] * options["groups"]
    keep = np.arange(x_shape[0]) % 3 != 0
    x, w, b = whole_numbers(x_shape, w_shape, (d,))
    expected = getattr(nc, name)(x[keep], w, b, **options)
    (dy,) = whole_numbers((x_shape[0], *expected.shape[1:]))
    gradients = getattr(nc, f"{name}_backward")(x[keep], w, dy[keep], **options)
    lazy_x, lazy_dy = chosen(x, keep, known), chosen(dy, keep, known)
    y = getattr(nc.dask, name)(lazy_x, w, b, **options)
    g = getattr(nc.dask, f"{name}_backward")(lazy_x, w, lazy_dy, **options)
    np.testing.assert_array_equal([y.chunks[0], g.dx.chunks[0]], [lazy_x.chunks[0]] * 2)  # which takes NaN for NaN
    assert y.shape[1:] == expected.shape[1:]
    assert [a.shape for a in g[1:]] == [a.shape for a in gradients[1:]]
    for found, right in zip(dask.compute(y, *g), (expected, *gradients), strict=True):
        assert found.dtype == right.dtype
        np.testing.assert_array_equal(found, right)


def test_each_gradient_reads_what_it_depends_on() -> None:
    """Chunks of x cannot be computed: dx and db are."""
    x = da.ones((4, 5, 5, 3), chunks=(2, -1, -1, -1)).map_blocks(lambda block: 1 / 0, meta=np.empty((0,) * 4))
    w, dy = np.ones((4, 3, 3, 3)), da.ones((4, 3, 3, 4), chunks=(2, -1, -1, -1))
    g = nc.dask.conv2d_backward(x, w, dy)
    dx, db = dask.compute(g.dx, g.db)
    np.testing.assert_array_equal(dx, nc.conv2d_input_grad(dy.compute(), w))
    np.testing.assert_array_equal(db, np.full(4, 36))
    with pytest.raises(ZeroDivisionError):
        g.dw.compute()


def test_dtypes_meet_as_they_do_in_numpy() -> None:
    x, w, dy = whole_numbers((4, 5, 5, 3), (4, 3, 3, 3), (4, 3, 3, 4))
    x = x.astype(np.float64)
    lazy = [da.from_array(a, chunks=(2, -1, -1, -1)) for a in (x, dy)]
    for found, right in zip(nc.dask.conv2d_backward(lazy[0], w, lazy[1]), nc.conv2d_backward(x, w, dy), strict=True):
        assert found.dtype == found.compute().dtype == right.dtype == np.float64


def test_weights_may_be_dask_arrays_and_needs_are_kept() -> None:
    case = CASES[0]
    data = draw_data(case, np.float64)
    x, dy = da.from_array(data.x, chunks=(4, -1, -1, -1)), da.from_array(data.dy, chunks=(5, -1, -1, -1))
    w, b = da.from_array(data.w, chunks=(2, 1, 1, 1)), da.from_array(data.b, chunks=3)
    y = nc.dask.conv2d(x, w, b, **case.options)
    np.testing.assert_array_equal(y, nc.conv2d(data.x, data.w, data.b, **case.options))
    g = nc.dask.conv2d_backward(x, w, dy, needs="dw", **case.options)
    assert (g.dx, g.db) == (None, None)
    assert g.dw.compute().shape == case.w_shape


def test_a_block_runs_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*arrays: Any, **options: Any) -> Any:
        seen.append(numba.get_num_threads())
        return np.zeros((1, 1, 1, 1))

    before = numba.get_num_threads()
    nhwconv.dask._block(np.zeros(1), function=watched)
    assert seen == [1]
    assert numba.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        nhwconv.dask._block(np.zeros(1), function=lambda _: 1 / 0)
    assert numba.get_num_threads() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((2, 5, 5, 3))}, "x is of type ndarray, expected a dask.array.Array"),
        ({"x": da.ones((5, 5, 3))}, r"x has shape \(5, 5, 3\), expected four axes"),
        ({"x": da.ones((2, 5, 5, 3), chunks=(1, 5, 5, 1))}, r"x has \(2, 1, 1, 3\) blocks"),
        ({"w": np.ones((4, 3, 3, 2))}, "w has 2 input channels per group, but x has 3 channels"),
        ({"w": np.ones((4, 3, 3, 3), int)}, "w has dtype int64"),
        ({"stride": 0}, "stride"),
    ],
)
def test_errors_come_before_any_work(change: dict[str, Any], message: str) -> None:
    arguments = {"x": da.ones((2, 5, 5, 3), chunks=(1, -1, -1, -1)), "w": np.ones((4, 3, 3, 3))} | change
    with pytest.raises((ValueError, TypeError), match=f"^conv2d: {message}"):
        nc.dask.conv2d(**arguments)
    with pytest.raises((ValueError, TypeError), match=f"^conv2d_backward: {message}"):
        nc.dask.conv2d_backward(**arguments, dy=da.ones((2, 3, 3, 4), chunks=(1, -1, -1, -1)))


@pytest.mark.parametrize("name", OTHERS)
def test_errors_of_other_convolutions_are_in_their_words(name: str) -> None:
    x_shape, w_shape, _ = OTHERS[name]
    x, w = da.ones(x_shape, chunks={0: 5}), np.ones(w_shape)
    rank = len(x_shape)
    axes, auto = {3: "three", 4: "four"}[rank], r"\('auto'" + (rank - 1) * ", -1" + r"\)"
    for function, more in ((name, ()), (f"{name}_backward", (x,))):
        call = getattr(nc.dask, function)
        with pytest.raises(ValueError, match=rf"^{function}: x has shape .*, expected {axes}"):
            call(x[0], w, *more)
        with pytest.raises(ValueError, match=rf"^{function}: x has .* blocks, .*rechunk\({auto}\)"):
            call(x.rechunk(2), w, *more)
        with pytest.raises(ValueError, match=rf"^{function}: stride is 0"):
            call(x, w, *more, stride=0)


def test_dy_must_have_as_many_samples() -> None:
    x, dy = da.ones((2, 5, 5, 3), chunks=(1, -1, -1, -1)), da.ones((3, 3, 3, 4), chunks=(1, -1, -1, -1))
    with pytest.raises(ValueError, match=r"^conv2d_backward: dy has 3 samples, but x has 2"):
        nc.dask.conv2d_backward(x, np.ones((4, 3, 3, 3)), dy)


# -------------------------------------------------------------------------------- chunks of unknown sizes


def chosen(array: np.ndarray, keep: np.ndarray, known: bool) -> da.Array:
    """Return the kept samples of an array, in blocks of what is kept of every four."""
    if not known:
        return da.from_array(array, chunks={0: 4})[da.from_array(keep, chunks=4)]
    return da.from_array(array[keep], chunks={0: tuple(int(keep[i : i + 4].sum()) for i in range(0, len(keep), 4))})


@pytest.mark.parametrize(("x_known", "dy_known"), [(False, False), (True, False), (False, True)])
def test_sizes_of_chunks_may_be_unknown(x_known: bool, dy_known: bool) -> None:
    case = CASES[0]
    data = draw_data(case, np.float64)
    keep = np.arange(case.n) % 3 != 0
    x, dy = chosen(data.x, keep, x_known), chosen(data.dy, keep, dy_known)
    y = nc.dask.conv2d(x, data.w, data.b, **case.options)
    g = nc.dask.conv2d_backward(x, data.w, dy, **case.options)
    np.testing.assert_array_equal(g.dx.chunks[0], x.chunks[0])  # which takes NaN for NaN
    assert (g.dw.shape, g.db.shape) == (data.w.shape, data.b.shape)
    y, *g = dask.compute(y, *g)
    np.testing.assert_array_equal(y, nc.conv2d(data.x[keep], data.w, data.b, **case.options))
    for found, expected in zip(g, nc.conv2d_backward(data.x[keep], data.w, data.dy[keep], **case.options), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_chunks_of_unknown_sizes_that_differ() -> None:
    case = CASES[0]
    data = draw_data(case, np.float64)
    keep = np.arange(case.n) % 3 != 0
    x = chosen(data.x, keep, known=False)
    with pytest.raises(ValueError, match=r"^conv2d_backward: dy has 1 chunks of samples, but x has 3, and not all of"):
        nc.dask.conv2d_backward(x, data.w, da.from_array(data.dy), **case.options)
    g = nc.dask.conv2d_backward(x, data.w, chosen(data.dy, ~keep, known=False), **case.options)
    with pytest.raises(ValueError, match=r"^conv2d_backward: dy has shape"):
        dask.compute(g.dw)


def test_the_page_of_dask_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "dask.md").read_text("utf-8")
    blocks = re.findall(r"^```python dask\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 2
    child.run("\n".join(blocks))


# -------------------------------------------------------------------------------------------- a cluster


@pytest.fixture
def client() -> Iterator[Client]:
    """Two worker processes of one thread each, which may hold `MEMORY` bytes each."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, memory_limit=MEMORY, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def random_images(samples: int, chunk: int, shape: tuple[int, ...]) -> da.Array:
    """Whole numbers, so that sums are exact in float32 in any order."""
    generator = da.random.default_rng(0)
    return generator.integers(-2, 3, (samples, *shape), chunks=(chunk, -1, -1, -1)).astype(np.float32)


def exact_gradients(x: da.Array, dy: da.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return dw and db by blocks, in this process."""
    dw, db = np.zeros((8, 3, 3, 8)), np.zeros(8)
    for i in range(x.numblocks[0]):
        a, b = dask.compute(x.blocks[i], dy.blocks[i], scheduler="sync")
        dw += nc.conv2d_weight_grad(a.astype(np.float64), b.astype(np.float64), 3, padding=1, strategy="loop")
        db += b.sum((0, 1, 2), np.float64)
    return dw, db


def test_arrays_larger_than_the_workers_memory(client: Client) -> None:
    x, dy = random_images(3328, 64, (64, 64, 8)), random_images(3328, 64, (64, 64, 8)) + 1
    assert x.nbytes + dy.nbytes > 2 * MEMORY  # of both workers together
    w = np.ones((8, 3, 3, 8), np.float32)
    g = nc.dask.conv2d_backward(x, w, dy, needs=("dw", "db"), padding=1, strategy="loop")
    got = client.gather(client.compute([g.dw, g.db]))
    for a, b in zip(got, exact_gradients(x, dy), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(limit["memory_limit"] == MEMORY for limit in client.scheduler_info(-1)["workers"].values())


def test_a_worker_killed_in_the_middle(client: Client) -> None:
    x, dy = random_images(240, 4, (64, 64, 8)), random_images(240, 4, (64, 64, 8)) + 1
    expected = exact_gradients(x, dy)
    pids = client.run(os.getpid)
    g = nc.dask.conv2d_backward(x, np.ones((8, 3, 3, 8), np.float32), dy, padding=1, strategy="loop")
    futures = client.compute([g.dw, g.db])
    while not any(client.has_what().values()):  # until it holds results that will have to be computed again
        time.sleep(0.01)
    assert not all(f.done() for f in futures)
    os.kill(next(iter(pids.values())), signal.SIGKILL)
    wait(futures)
    for a, b in zip(client.gather(futures), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(client.run(os.getpid).values()) != set(pids.values())
