"""Groups that are transformed together: bundles of them, of equal or nearly equal size."""

from __future__ import annotations

import numpy as np
import pytest

import checked
import nhwconv as nc
from cases import DTYPES, PASSES, Case
from nhwconv.runtime import machine
from nhwconv.strategies import REGISTRY

PAD1 = ((1, 1), (1, 1))
#: Channels of x and of y in a group, in quarters of a vector; groups; the kernel's size; the stride.
GROUPS = (
    (4, 4, 6, 3, 1), (3, 3, 5, 3, 1), (4, 7, 5, 3, 1), (6, 4, 7, 3, 1), (3, 5, 4, 5, 1), (4, 4, 12, 3, 2),
    (4, 8, 3, 2, 1),
)  # fmt: skip


def bundled(cg: int, dg: int, groups: int, k: int, s: int, dtype: np.dtype) -> Case:
    """Return a case of many tiles, without which each group would be a task of its own."""
    lanes = machine.lanes(np.dtype(dtype).itemsize)
    c, d = (groups * quarters * lanes // 4 for quarters in (cg, dg))
    pads = ((k // 2, k // 2), (k // 2, k // 2))
    return Case(n=2, h=39, w=38, c=c, d=d, kh=k, kw=k, stride=(s, s), padding=pads, groups=groups)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_bundles_of_groups(sizes, dtype, pass_):
    """Each pass equals the oracle where several groups are a task; nothing of an `out` full of NaN is left."""
    case = bundled(*sizes, dtype)
    x, w = case.x_shape, case.w_shape
    try:
        plan = nc.plan(pass_, x, w, **case.options, dtype=dtype, strategy="winograd")
    except ValueError as refusal:
        assert "channels" in str(refusal)  # noqa: PT017 - of few channels not every pass is done
        assert min(sizes[:2]) < 4
        return
    products = [step for step in plan.program().steps if hasattr(step.records[0], "bundles")]
    assert products
    assert all(step.records[0].bundles < case.groups for step in products)
    checked.overwritten(case, dtype, pass_, "winograd")


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_channels_a_group(dtype):
    """Three quarters of a vector are enough forward and back, where the groups together fill one."""
    lanes, winograd = machine.lanes(np.dtype(dtype).itemsize), REGISTRY["winograd"]
    for channels, groups, able in ((lanes * 3 // 4, 4, True), (lanes * 3 // 4, 1, False), (lanes // 4, 4, False)):
        problem = nc.plan("forward", (1, 12, 12, groups * channels), (groups * channels, 3, 3, channels),
                          padding=1, groups=groups, dtype=dtype).problem  # fmt: skip
        assert (winograd.supports(problem, "forward") is None) == able
        assert (winograd.supports(problem, "input_grad") is None) == able
        refusal = winograd.supports(problem, "weight_grad")
        assert refusal is not None
        assert f"{lanes} channels" in refusal
