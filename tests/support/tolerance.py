"""How far a result may be from the exact one: what the arithmetic allows, and never what happened to pass.

A sum of ``k`` products, computed in any order and with or without fused multiply-adds, satisfies

    |computed - exact| <= gamma_k * sum |products|,   gamma_k = k u / (1 - k u),   u = eps / 2

(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The oracle is such a sum itself, in float64.
Half types are computed in float32 and rounded once more when they are stored.

Winograd computes other sums, so `assert_close` holds it, and every strategy that "auto" may choose, to the package's
promise: ``||computed - exact|| <= B * || |x| (*) |w| ||`` in l2, B = 1e-5 in float32 and 1e-13 in float64.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nhwconv.strategies import AUTO

#: Strategies whose results are the defining sum, in some order.
DIRECT = ("loop", "depthwise", "im2col", "plain", "tensordot")
#: The package's promise for whatever "auto" chooses.
PROMISE = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-13}


def gamma(length: int, dtype: np.dtype) -> float:
    """Return the relative error that a sum of `length` products may have."""
    rounding = length * np.finfo(dtype).eps / 2
    return float(rounding / (1 - rounding))


def computed_in(dtype: np.dtype) -> np.dtype:
    """Return the dtype of the arithmetic for arrays of this dtype."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def bound(exact: np.ndarray, absolute: np.ndarray, length: int, dtype: np.dtype) -> np.ndarray:
    """Return the error that each element of a direct sum of `length` products may have."""
    allowed = (gamma(length, computed_in(dtype)) + gamma(length, np.dtype(np.float64))) * absolute
    if dtype.itemsize < 4:  # rounded once more, where subnormal numbers have an absolute error
        info = ml_dtypes.finfo(dtype)
        allowed = allowed + float(info.eps) / 2 * (np.abs(exact) + allowed) + float(info.smallest_subnormal) / 2
    return allowed


def error_norm(strategy: str, absolute: np.ndarray, length: int, dtype: np.dtype) -> float:
    """Return the l2 norm of the error that a strategy's result may have."""
    relative = gamma(length, dtype) if strategy in DIRECT else PROMISE[dtype]
    return relative * float(np.linalg.norm(absolute))


def assert_close(
    got: npt.NDArray, exact: np.ndarray, absolute: np.ndarray, length: int, strategy: str, what: object = ""
) -> None:
    """Check a result against the oracle's, for a sum of `length` products whose absolute values sum to `absolute`."""
    dtype = got.dtype
    assert got.shape == exact.shape, f"{strategy}: shape {got.shape}, expected {exact.shape}: {what}"
    error = np.abs(got.astype(np.float64) - exact)
    if strategy in DIRECT:
        wrong = ~(error <= bound(exact, absolute, max(length, 1), dtype))  # a NaN is wrong
        assert not wrong.any(), (
            f"{strategy}, {dtype}: {wrong.sum()} of {wrong.size} elements are wrong, the first at "
            f"{tuple(int(i) for i in np.argwhere(wrong)[0])}: got {got[wrong][0]}, expected {exact[wrong][0]}: {what}"
        )
    if strategy in AUTO or strategy not in DIRECT:
        promise = PROMISE[computed_in(dtype)] * np.linalg.norm(absolute)
        if dtype.itemsize < 4:
            promise += np.linalg.norm(bound(exact, absolute, 0, dtype))
        assert np.linalg.norm(error) <= promise, (
            f"{strategy}, {dtype}: error {np.linalg.norm(error):.3g}, promised {promise:.3g}: {what}"
        )
