"""The NumPy functions on the cases that ONNX and PyTorch test their convolutions with, in every layout."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx.backend.test.case.node as onnx_cases
import pytest
import torch
from onnx import helper
from torch.nn import functional

import nhwconv as nc
from tolerance import PROMISE


def in_every_layout(name: str, x: Any, w: Any, b: Any, **options: Any) -> Iterator[Any]:
    """Give results as NCHW, from arrays that lie as each layout has them."""
    function = getattr(nc, name)
    yield function(x, w, b, **options, layout="NCHW")
    last, inputs_last = np.moveaxis(x, 1, -1), np.moveaxis(w, 1, -1)
    yield np.moveaxis(function(last, inputs_last, b, **options), -1, 1)
    yield np.moveaxis(function(last, np.moveaxis(inputs_last, 0, -1), b, **options, w_layout="HWIO"), -1, 1)


def check(got: Any, expected: Any, absolute: Any) -> None:
    """Hold a result to twice the promised error, since what is expected may have as much."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert np.linalg.norm(got - expected) <= 2 * PROMISE[got.dtype] * np.linalg.norm(absolute)


# ---------------------------------------------------------------------------------------------------- ONNX


def onnx_node_cases() -> list[Any]:
    """Return ONNX's cases of one or two dimensions."""
    for module in ("conv", "convtranspose"):
        importlib.import_module(f"{onnx_cases.__name__}.{module}")
    mine = [c for c in onnx_cases._NodeTestCases if c.model.graph.node[0].op_type in ("Conv", "ConvTranspose")]
    return [pytest.param(c, id=c.name) for c in mine if c.data_sets[0][0][0].ndim < 5]


def options_of(attributes: dict[str, Any], x: Any, w: Any) -> tuple[dict[str, Any], Any]:
    """Return the options that a node's attributes mean, and the output padding."""
    n = x.ndim - 2
    stride, dilation = (list(attributes.get(name, [1] * n)) for name in ("strides", "dilations"))
    more = attributes.get("output_padding", [0] * n)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, w.shape[2:], strict=True)]
    pads = list(zip(*np.reshape(attributes.get("pads", [0] * 2 * n), (2, n)).tolist(), strict=True))
    if "output_shape" in attributes:  # what is missing is added at the end
        spans = [(size - 1) * s + r for size, s, r in zip(x.shape[2:], stride, reach, strict=True)]
        more = [size - span for size, span in zip(attributes["output_shape"], spans, strict=True)]
    padding: Any = pads[0] if n == 1 else tuple(pads)
    if attributes.get("auto_pad") == b"SAME_UPPER":
        padding, more = "same", None
    if attributes.get("auto_pad") == b"SAME_LOWER":  # with the odd zero in front
        padding = tuple(
            (total - total // 2, total // 2)
            for size, s, r in zip(x.shape[2:], stride, reach, strict=True)
            for total in [(-(-size // s) - 1) * s + r - size]
        )
    found = {"stride": stride, "padding": padding, "dilation": dilation, "groups": attributes.get("group", 1)}
    return found, more


@pytest.mark.parametrize("case", onnx_node_cases())
def test_onnx(case: Any) -> None:
    (node,) = case.model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    ((inputs, (expected,)),) = case.data_sets
    x, w, b = (*inputs, None, None)[:3]
    assert min(x.min(), w.min()) >= 0  # so that what is expected is its own sum of absolute values
    options, more = options_of(attributes, x, w)
    name = f"{'conv_transpose' if node.op_type == 'ConvTranspose' else 'conv'}{x.ndim - 2}d"
    if node.op_type == "ConvTranspose":
        options["output_padding"] = more
    for got in in_every_layout(name, x, w, b, **options):
        check(got, expected, expected)


def test_all_of_onnxs_cases_but_that_of_three_dimensions_are_here() -> None:
    assert len(onnx_node_cases()) == 16


# ------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"])
def test_pytorchs_samples(name: str) -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (o for o in op_db if o.name == f"nn.functional.{name}")
    own, count = getattr(functional, name), 0
    order = ("stride", "padding", "output_padding", "groups", "dilation")
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=False):
        w, b, *rest = *sample.args, *[None] * (2 - len(sample.args))
        options = {**dict(zip(order, rest, strict=False)), **sample.kwargs}
        if sample.input.dim() != w.dim():
            continue  # without an axis for samples, whose place `in_every_layout` knows
        x, w, b = (None if t is None else t.numpy() for t in (sample.input, w, b))
        expected = own(sample.input, *sample.args, **sample.kwargs).numpy()
        absolute = own(*(None if t is None else t.abs() for t in (sample.input, *sample.args)), **sample.kwargs)
        for got in in_every_layout(name, x, w, b, **options):
            check(got, expected, absolute.numpy())
        count += 1
    assert count > 3
