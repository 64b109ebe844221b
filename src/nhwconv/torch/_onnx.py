"""What a call of an operator is in ONNX: its own `Conv` or `ConvTranspose`, where a trace or a script is exported.

Other models never come here: while `torch.onnx.export` traces them, their convolutions are PyTorch's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.onnx import symbolic_helper

from ._options import KINDS, Kind, Options

#: Of ONNX's operators: what is registered for it holds for all that PyTorch exports to.
_VERSION = 9


def _add_node(kind: Kind, graph: Any, input: Any, weight: Any, bias: Any, *geometry: Any) -> Any:
    """Add a node to a graph, for an operator's arguments as its values, and return its result."""
    names = "stride", "padding", "dilation", "groups", *["output_padding"] * kind.transposed, "strategy"
    forms = {"groups": "i", "strategy": "s"}  # all others are lists of int
    numbers = [
        symbolic_helper._parse_arg(value, forms.get(name, "is"), name, kind.operator)
        for name, value in zip(names, geometry, strict=True)
    ]
    options = Options.of(kind, numbers)
    attributes = {
        "strides_i": options.stride,
        "pads_i": (*options.padding[::2], *options.padding[1::2]),  # before, in all dimensions, and then behind
        "dilations_i": options.dilation,
        "group_i": options.groups,
    }
    if any(options.output_padding):
        attributes["output_padding_i"] = options.output_padding
    shape = weight.type().sizes()
    if shape is not None:
        attributes["kernel_shape_i"] = shape[2:]
    inputs = (input, weight) if symbolic_helper._is_none(bias) else (input, weight, bias)
    return graph.op("ConvTranspose" if kind.transposed else "Conv", *inputs, **attributes)


for _kind in KINDS.values():
    torch.onnx.register_custom_op_symbolic(_kind.operator, partial(_add_node, _kind), _VERSION)
