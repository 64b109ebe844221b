"""SciPy's tests of `scipy.signal.convolve2d` and `correlate2d`, on `nhwconv.conv2d`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import signal
from scipy.signal.tests import test_signaltools as upstream

import nhwconv as nc

NOT_APPLICABLE = {"test_fillvalue_errors": "how SciPy checks an argument that conv2d does not have"}
_seen: list[str] = []


def _correlate(x: Any, w: Any) -> Any:
    """Return a valid correlation of images of any numbers."""
    if np.iscomplexobj(x) or np.iscomplexobj(w):
        return (_correlate(x.real, w.real) - _correlate(x.imag, w.imag)) + 1j * (
            _correlate(x.real, w.imag) + _correlate(x.imag, w.real)
        )
    return nc.conv2d(x.astype(float), w.astype(float), strategy="loop")


def convolve2d(in1: Any, in2: Any, mode: str = "full", boundary: str = "fill", fillvalue: Any = 0) -> Any:
    """Do what SciPy does: a correlation of what is padded, as `boundary` says, with what is turned round."""
    _seen.append("convolve2d")
    x, w = np.asarray(in1), np.asarray(in2)
    if x.ndim != 2 or w.ndim != 2:
        raise ValueError("two dimensions are expected")
    dtype = np.result_type(x, w)
    if mode == "valid":
        if any(a < b for a, b in zip(x.shape, w.shape, strict=True)):
            x, w = w, x
        y = _correlate(x, w[::-1, ::-1])
    else:
        pads = [(size - 1, size - 1) for size in w.shape]
        kind: Any = {"fill": "constant", "wrap": "wrap", "symm": "symmetric"}[boundary]
        padded = np.pad(x, pads, kind, **({"constant_values": fillvalue} if boundary == "fill" else {}))
        y = _correlate(padded, w[::-1, ::-1])
        if mode == "same":
            first = [(size - 1) // 2 for size in w.shape]
            y = y[first[0] : first[0] + x.shape[0], first[1] : first[1] + x.shape[1]]
    return y.astype(dtype) if dtype.kind in "fc" else np.rint(y).astype(dtype)


def correlate2d(in1: Any, in2: Any, mode: str = "full", boundary: str = "fill", fillvalue: Any = 0) -> Any:
    """Do what SciPy does."""
    w = np.conj(np.asarray(in2))[::-1, ::-1]
    y = convolve2d(in1, w, mode, boundary, fillvalue)
    if mode == "same":
        # The middle of a correlation is the other one of an even kernel's two.
        full = convolve2d(in1, w, "full", boundary, fillvalue)
        first = [size // 2 for size in w.shape]
        shape = np.asarray(in1).shape
        return full[first[0] : first[0] + shape[0], first[1] : first[1] + shape[1]]
    return y


@pytest.fixture
def xp() -> Any:
    return np


@pytest.fixture(autouse=True)
def nhwconvs_functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (signal, upstream):
        monkeypatch.setattr(module, "convolve2d", convolve2d)
        monkeypatch.setattr(module, "correlate2d", correlate2d)
    _seen.clear()
    yield
    assert _seen, "a case that does not call what it is here for"


class TestConvolve2d(upstream.TestConvolve2d):
    test_large_array = None  # 2 GiB for SciPy's own indices, which SciPy's runs leave out as well

    def test_same_with_boundary(self, func: Any, boundary: Any, expected: Any, xp: Any) -> None:
        ours = {"convolve2d": convolve2d, "correlate2d": correlate2d}[func.__name__]  # SciPy's are parameters
        super().test_same_with_boundary(ours, boundary, expected, xp)

    test_same_with_boundary.pytestmark = upstream.TestConvolve2d.test_same_with_boundary.pytestmark  # type: ignore[attr-defined]


class TestCorrelate2d(upstream.TestCorrelate2d):
    test_consistency_correlate_funcs = None  # of `scipy.signal.correlate` alone
