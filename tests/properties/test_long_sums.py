"""Accuracy where sums are long: the error bound of the README on constant data, and on the layers of networks.

||got - exact|| <= B * || |x| (*) |w| || for any data, and <= B * ||exact|| on standard-normal data; B = 1e-5.
"""

import numpy as np
import pytest

import nhwconv as nc
from cases import PASSES, Case, Data, draw_data, run, supporting
from extent import amount
from nhwconv.codegen.simd import integers, numbers
from nhwconv.runtime import jit
from nhwconv.strategies import AUTO
from nhwconv.workloads import WORKLOADS, workload
from tolerance import PROMISE

B = PROMISE[np.dtype(np.float32)]
LAYERS = [layer for name in WORKLOADS for layer in workload(name)]
PAD1 = ((1, 1), (1, 1))


def reference(case, data, pass_):
    """Return a pass in float64; tensordot is checked against the oracle, which would take minutes here."""
    return run(case, Data(*(a.astype(np.float64) for a in data)), pass_, "tensordot")


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_workloads(layer):
    """On standard-normal data every pass of every layer, of one image, errs by less than B relative to the result."""
    p = layer.problem()
    # Large images are cropped: sums over channels and kernel positions stay, those over pixels are tested below.
    size = tuple(min(whole, max(k + 1, amount(28, 56))) for whole, k in ((p.h, p.kh), (p.w, p.kw)))
    case = Case(1, *size, p.c, p.d, p.kh, p.kw, p.stride, p.padding, p.dilation, p.groups)
    data = draw_data(case, np.float32)
    for pass_ in PASSES:
        exact = reference(case, data, pass_)
        for strategy in [name for name in supporting(case, pass_) if name in AUTO]:
            error = np.linalg.norm(run(case, data, pass_, strategy) - exact) / np.linalg.norm(exact)
            assert error <= B, (pass_, strategy)


#: Rounding errors of a running sum of equal numbers all have one sign: nothing cancels. (case, the pass with long sums)
CONSTANT = [
    (Case(n=1, h=20, w=20, c=64, d=32, padding=PAD1), "forward"),
    (Case(n=1, h=20, w=20, c=512, d=32, padding=PAD1), "forward"),
    (Case(n=1, h=20, w=20, c=3, d=32, kh=7, kw=7), "forward"),
    (Case(n=1, h=20, w=20, c=4096, d=32, kh=1, kw=1), "forward"),
    (Case(n=1, h=20, w=20, c=32, d=64, padding=PAD1), "input_grad"),
    (Case(n=1, h=20, w=20, c=32, d=1024, padding=PAD1), "input_grad"),
    (Case(n=1, h=20, w=20, c=3, d=512, padding=PAD1), "input_grad"),
    (Case(n=8, h=112, w=112, c=16, d=16, kh=1, kw=1), "weight_grad"),
    (Case(n=8, h=112, w=112, c=3, d=32, padding=PAD1), "weight_grad"),
    (Case(n=8, h=112, w=112, c=16, d=3, padding=PAD1), "weight_grad"),
    (Case(n=8, h=112, w=112, c=32, d=32, groups=32, padding=PAD1), "weight_grad"),
    (Case(n=2, h=112, w=112, c=32, d=32, padding=PAD1), "weight_grad"),
]


@pytest.mark.parametrize("value", [0.1, 0.7, 1.3313724])  # the square of the last is the worst for sums of 576
@pytest.mark.parametrize(("case", "pass_"), CONSTANT, ids=str)
def test_constant_data(case, pass_, value):
    """The promise holds for data that make the errors of long sums add up."""
    shapes = case.x_shape, case.w_shape, (case.d,), case.y_shape
    data = Data(*(np.full(shape, value, np.float32) for shape in shapes))
    exact = reference(case, data, pass_)
    errors = {
        strategy: float(np.linalg.norm(run(case, data, pass_, strategy) - exact) / np.linalg.norm(exact))
        for strategy in supporting(case, pass_)
        if strategy in AUTO
    }
    assert max(errors.values()) <= B, errors


@pytest.mark.parametrize("case", [c[0] for c in CONSTANT if isinstance(c, tuple) and c[1] == "weight_grad"], ids=str)
def test_bias_gradient_of_constant_data(case):
    """The bias gradient keeps the promise, whether alone or summed on the way of a weight gradient."""
    x, dy, w = (np.full(shape, 0.1, np.float32) for shape in (case.x_shape, case.y_shape, case.w_shape))
    exact = np.float64(np.float32(0.1)) * case.length("weight_grad")
    np.testing.assert_allclose(nc.conv2d_bias_grad(dy), np.full(case.d, exact), rtol=B)
    errors = {}
    for strategy in supporting(case, "weight_grad"):
        db = nc.conv2d_backward(x, w, dy, **case.options, needs=("dw", "db"), strategy=strategy).db
        errors[strategy] = float(np.abs(db / exact - 1).max())
    assert max(errors.values()) <= B, errors


def total(operands, geometry, worker, task, fresh):
    table = integers(operands)
    terms, result = numbers(table[0], 8), numbers(table[1], 8)
    for i in range(task):
        result[0] += terms[i]


def test_compilers_may_not_reorder_sums(tmp_path, monkeypatch):
    """Bodies are compiled without fastmath, whose additions LLVM may reorder, and whose NaNs it need not keep."""
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))  # compiled now, so that its code can be looked at
    body = jit.Body(total)
    assert body.address
    code = body._code.get_llvm_str()
    assert "fadd double" in code
    assert "fadd fast" not in code
