"""ONNX's cases for convolutions, and those models of its backends' suite that have any: with its own evaluator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import nhwconv as nc

NOT_APPLICABLE = {
    f"test_models[{name}]": "three dimensions"
    for name in (
        "test_convtranspose_3d", "test_Conv3d", "test_Conv3d_dilated", "test_Conv3d_dilated_strided",
        "test_Conv3d_groups",
        "test_Conv3d_no_bias", "test_Conv3d_stride", "test_Conv3d_stride_padding",
    )
}  # fmt: skip


def _pads(auto_pad: str, pads: Any, dimensions: int) -> Any:
    assert auto_pad in ("NOTSET", "VALID"), auto_pad
    pads = [0] * 2 * dimensions if pads is None or auto_pad == "VALID" else pads
    each = tuple(zip(pads[:dimensions], pads[dimensions:], strict=True))
    return each if dimensions == 2 else each[0]


def _sizes(value: Any, dimensions: int) -> Any:
    value = tuple(value or (1,) * dimensions)
    return value if dimensions == 2 else value[0]


class Conv(OpRun):
    """Theirs, on nhwconv."""

    op_domain = ""

    def _run(self, x: Any, w: Any, b: Any = None, auto_pad: Any = None, dilations: Any = None, group: Any = None,
             kernel_shape: Any = None, pads: Any = None, strides: Any = None) -> Any:  # fmt: skip
        dimensions = x.ndim - 2
        ours = {1: nc.conv1d, 2: nc.conv2d}[dimensions]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            pads, auto_pad = self._same(x, w, auto_pad, strides, dilations), "NOTSET"
        return (
            ours(
                x, w, b, layout="NCHW", stride=_sizes(strides, dimensions), dilation=_sizes(dilations, dimensions),
                padding=_pads(auto_pad or "NOTSET", pads, dimensions), groups=group or 1,
            ),
        )  # fmt: skip

    @staticmethod
    def _same(x: Any, w: Any, auto_pad: str, strides: Any, dilations: Any) -> Any:
        """Return the padding, of which one end has the larger half."""
        lower, upper = [], []
        for i, size in enumerate(x.shape[2:]):
            stride, reach = (strides or [1, 1])[i], (w.shape[2 + i] - 1) * (dilations or [1, 1])[i] + 1
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            lower.append(total // 2)
            upper.append(total - total // 2)
        return [*lower, *upper] if auto_pad == "SAME_UPPER" else [*upper, *lower]


class ConvTranspose(OpRun):
    """Theirs, on nhwconv."""

    op_domain = ""

    def _run(self, x: Any, w: Any, b: Any = None, auto_pad: Any = None, dilations: Any = None, group: Any = None,
             kernel_shape: Any = None, output_padding: Any = None, output_shape: Any = None, pads: Any = None,
             strides: Any = None) -> Any:  # fmt: skip
        dimensions = x.ndim - 2
        ours = {1: nc.conv_transpose1d, 2: nc.conv_transpose2d}[dimensions]
        stride, dilation = _sizes(strides, dimensions), _sizes(dilations, dimensions)
        more = tuple(output_padding or (0,) * dimensions)
        if output_shape is not None or (auto_pad or "NOTSET").startswith("SAME"):
            pads, more = self._of_shape(x, w, auto_pad, output_shape, strides, dilations, more)
            auto_pad = "NOTSET"
        padding = _pads(auto_pad or "NOTSET", pads, dimensions)
        more = more if dimensions == 2 else more[0]
        y = ours(x, w, b, layout="NCHW", stride=stride, dilation=dilation, padding=padding, groups=group or 1,
                 output_padding=more)  # fmt: skip
        return (y,)

    @staticmethod
    def _of_shape(x: Any, w: Any, auto_pad: Any, shape: Any, strides: Any, dilations: Any, more: Any) -> Any:
        """Return the padding that gives a shape, as ONNX's operators are described."""
        count = x.ndim - 2
        strides, dilations = strides or [1] * count, dilations or [1] * count
        before, after, extra = [], [], []
        for i in range(count):
            size, stride = x.shape[2 + i], strides[i]
            wanted = size * stride if shape is None else shape[i]
            total = stride * (size - 1) + more[i] + (w.shape[2 + i] - 1) * dilations[i] + 1 - wanted
            extra.append(more[i] + max(-total, 0))
            total = max(total, 0)
            before.append(total // 2 if auto_pad != "SAME_LOWER" else total - total // 2)
            after.append(total - before[-1])
        return [*before, *after], tuple(extra)


def _has_convolutions(model: Any) -> bool:
    return any(node.op_type in ("Conv", "ConvTranspose") for node in model.graph.node)


def _cases() -> Iterator[Any]:
    for case in collect_testcases(""):
        if case.model is not None and _has_convolutions(case.model):
            yield pytest.param(case.model, case.data_sets, id=case.name)
    for kind in ("pytorch-converted", "pytorch-operator", "simple"):
        for case in load_model_tests(kind=kind):
            model = onnx.load(f"{case.model_dir}/model.onnx")
            if _has_convolutions(model):
                yield pytest.param(model, _data_of(case.model_dir), id=case.name)


def _data_of(folder: str) -> list[Any]:
    from pathlib import Path

    found = []
    for place in sorted(Path(folder).glob("test_data_set_*")):
        arrays = []
        for name in ("input", "output"):
            files = sorted(place.glob(f"{name}_*.pb"), key=lambda file: int(file.stem.rpartition("_")[2]))
            arrays.append([onnx.numpy_helper.to_array(onnx.load_tensor(file)) for file in files])
        found.append(tuple(arrays))
    return found


@pytest.mark.parametrize(("model", "data_sets"), list(_cases()))
def test_models(model: Any, data_sets: Any) -> None:
    evaluator = ReferenceEvaluator(model, new_ops=[Conv, ConvTranspose])
    names = [i.name for i in model.graph.input]
    assert data_sets
    for inputs, outputs in data_sets:
        got = evaluator.run(None, dict(zip(names, inputs, strict=False)))
        for one, other in zip(got, outputs, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)  # what ONNX's own runner asks
