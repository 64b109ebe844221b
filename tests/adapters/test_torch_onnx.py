"""Models in ONNX: what is exported, as it is or after a trace or a script, is what PyTorch exports of its own layers.

Its numbers are those of ONNX's own evaluator, in float64.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import op_conv_transpose
from torch import nn

import nhwconv.torch
from models import MODELS, batch, build
from nhwconv.torch import replace_conv, replace_conv2d

#: What is exported, of a model.
FORMS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "eager": lambda model, _: model,
    "traced": torch.jit.trace,
    "scripted": lambda model, _: torch.jit.script(model),
}

#: Layers, each with the shape of a sample of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 8, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 3), groups=2, bias=False), (4, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 8, 9)),
    "same": (lambda: nn.Conv2d(3, 6, (2, 4), padding="same"), (3, 8, 9)),
    "valid": (lambda: nn.Conv2d(3, 6, (2, 4), padding="valid"), (3, 8, 9)),
    "sequences": (lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), (3, 9)),
    "sequences, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", groups=2, dilation=3), (4, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2), (4, 5, 6)),
    "transposed, plain": (lambda: nn.ConvTranspose2d(3, 6, 3), (3, 5, 6)),
    "transposed sequences": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, dilation=2), (4, 5)),
}

#: Models that torch.jit.script doesn't take, or that can't be exported then: an output_size isn't a constant.
NOT_SCRIPTED = "Shared", "Derived", "Waves", "Generator"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TorchScript as a whole, and of this exporter
    pytest.mark.filterwarnings("ignore:no signature found:UserWarning"),  # of every trace
    pytest.mark.filterwarnings("ignore:Constant folding:UserWarning"),  # of borders
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),  # of PyTorch's own convolution
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of sizes that a model looks at
]


class ConvTranspose(op_conv_transpose.ConvTranspose):
    """The evaluator's own, for each group by itself: it has no right weights for groups of several channels."""

    op_domain = ""

    def _run(self, x: Any, w: Any, b: Any = None, *, group: int, **attributes: Any) -> Any:
        split = [np.split(x, group, 1), np.split(w, group), [None] * group if b is None else np.split(b, group)]
        found = [super(ConvTranspose, self)._run(*one, group=1, **attributes) for one in zip(*split, strict=True)]
        return (np.concatenate([y for (y,) in found], 1),)


def export(model: Any, *inputs: torch.Tensor, **options: Any) -> onnx.ModelProto:
    """Return a model, a trace or a script in ONNX."""
    file = io.BytesIO()
    names = [f"input_{i}" for i in range(len(inputs))]
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, **options)
    found = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(found, full_check=True)
    return found


def evaluate(model: onnx.ModelProto, *inputs: torch.Tensor) -> torch.Tensor:
    """Return the one result."""
    named = {f"input_{i}": t.numpy() for i, t in enumerate(inputs)}
    (y,) = ReferenceEvaluator(model, new_ops=[ConvTranspose]).run(None, named)
    return torch.from_numpy(y)


def operators(model: onnx.ModelProto) -> list[str]:
    return sorted(node.op_type for node in model.graph.node)


def convolutions(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Return the convolutions' attributes, in some order, but for the padding, which has a name or numbers."""
    found = [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name not in ("auto_pad", "pads")}
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
    ]
    return sorted(found, key=str)


def agree(got: Any, expected: Any) -> None:
    """Hold numbers of float64 to what rounding leaves of sums that are computed in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_become_onnx_convolutions(name: str, form: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh()).double()
    x, more = (torch.randn(n, *shape, dtype=torch.float64) for n in (2, 5))
    y = model(more).detach()
    theirs = export(model, x, dynamic_axes={"input_0": {0: "n"}})
    assert replace_conv(model) == ["0"]
    ours = export(FORMS[form](model, x), x, dynamic_axes={"input_0": {0: "n"}})
    assert operators(ours) == operators(theirs) == [f"Conv{'Transpose' * ('transposed' in name)}", "Tanh"]
    assert convolutions(ours) == convolutions(theirs)
    agree(evaluate(ours, more), y)


@pytest.mark.parametrize("form", FORMS)
def test_one_image_in_onnx(form: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3)).double()
    x = batch()[0][0]
    y = model(x).detach()
    replace_conv(model)
    found = export(FORMS[form](model, x), x)
    assert operators(found).count("Conv") == 1
    agree(evaluate(found, x), y)


@pytest.mark.parametrize(
    ("name", "form"), [(n, f) for n in MODELS for f in FORMS if f != "scripted" or n not in NOT_SCRIPTED]
)
def test_networks_become_what_pytorch_makes_of_its_own(name: str, form: str) -> None:
    model = build(name).eval()
    x, _ = batch()
    y = model(x).detach()
    theirs = export(FORMS[form](model, x), x)
    assert replace_conv(model)
    ours = export(FORMS[form](model, x), x)
    assert operators(ours) == operators(theirs)
    assert convolutions(ours) == convolutions(theirs)
    agree(evaluate(ours, x), y)


@pytest.mark.parametrize("version", [9, 11, 20])
@pytest.mark.parametrize("form", FORMS)
def test_every_version_of_onnx(form: str, version: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3)).double()
    x, _ = batch()
    y = model(x).detach()
    replace_conv(model)
    found = export(FORMS[form](model, x), x, opset_version=version)
    assert operators(found) == ["Conv", "ConvTranspose", "Relu"]
    agree(evaluate(found, x), y)


def test_kernels_of_a_size_that_is_not_known() -> None:
    def convolve(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return nhwconv.torch.conv2d(x, w, stride=2)

    x, _ = batch()
    w, larger = (torch.randn(2, 3, k, 3, dtype=torch.float64) for k in (2, 4))
    found = export(torch.jit.trace(convolve, (x, w)), x, w, dynamic_axes={"input_1": {2: "rows"}})
    assert [set(c) for c in convolutions(found)] == [{"strides", "dilations", "group"}]
    agree(evaluate(found, x, larger), convolve(x, larger))


def test_saved_traces_are_exported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).double().eval()
    x, _ = batch()
    y = model(x).detach()
    replace_conv2d(model)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    found = export(torch.jit.load(file), x)
    assert operators(found) == ["Conv"]  # the normalisation is in its weights
    agree(evaluate(found, x), y)


def test_what_the_other_exporter_sees_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Unet").eval()
    expected = torch.export.export(model, batch()[:1])
    replace_conv(model)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # as while it calls torch.export
    found = torch.export.export(model, batch()[:1])
    assert [node.target for node in found.graph.nodes] == [node.target for node in expected.graph.nodes]
