"""One dimension and transposed convolution in PyTorch's adapter: what `test_torch` has for `conv2d`, for all kinds."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import nhwconv.torch
from nhwconv.program import ARRAYS
from nhwconv.runtime import executor
from nhwconv.strategies import REGISTRY
from nhwconv.torch import Conv1d, ConvTranspose1d, ConvTranspose2d, _engine, _left, replace_conv, restore_conv
from tolerance import PROMISE

KINDS = ("conv1d", "conv_transpose1d", "conv_transpose2d")
LAYERS = {"conv1d": Conv1d, "conv_transpose1d": ConvTranspose1d, "conv_transpose2d": ConvTranspose2d}


def functions(name: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Return ours and PyTorch's."""
    return getattr(nhwconv.torch, name), getattr(functional, name)


def sizes(name: str) -> int:
    return int(name[-2])


def tensors(name: str, dtype: torch.dtype = torch.float64, n: int = 2, groups: int = 1, grad: bool = True) -> Any:
    """Return input, weight and bias, from 4 to 8 channels."""
    generator = torch.Generator().manual_seed(0)
    size, kernel = (7, 6)[: sizes(name)], (3, 2)[: sizes(name)]
    weight = (4, 8 // groups, *kernel) if "transpose" in name else (8, 4 // groups, *kernel)
    shapes = (n, 4, *size), weight, (8,)
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(grad) for shape in shapes]


def last(t: torch.Tensor) -> torch.Tensor:
    """Return the same with channels last in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def grid(name: str) -> list[dict[str, Any]]:
    """Return combinations of options."""
    found = []
    for stride, padding, dilation, groups in itertools.product((1, 2, 3), (0, 1, "same"), (1, 2), (1, 2, 4)):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if "transpose" in name:
            if padding == "same":
                options["padding"] = 1
                options["output_padding"] = max(stride, dilation) - 1
        elif padding == "same" and stride > 1:
            continue
        found.append(options)
    return found


CASES = [pytest.param(name, options, id=f"{name}-{options}") for name in KINDS for options in grid(name)]


def results(function: Any, arrays: Any, options: Any) -> list[torch.Tensor]:
    """Return y, and the gradients of its product with fixed numbers."""
    leaves = [a.detach().requires_grad_() for a in arrays]
    y = function(*leaves, **options)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad(y, leaves, dy if arrays[0].min() < 0 else dy.abs())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_results_and_gradients_are_pytorchs(name: str, options: Any, dtype: torch.dtype) -> None:
    arrays = tensors(name, dtype, groups=options["groups"])
    ours, theirs = functions(name)
    absolute = results(theirs, [a.detach().abs() for a in arrays], options)
    promise = PROMISE[np.dtype(str(dtype).removeprefix("torch."))]
    for got, expected, size in zip(
        results(ours, arrays, options), results(theirs, arrays, options), absolute, strict=True
    ):
        assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
        error = torch.linalg.vector_norm((got - expected).detach().double())
        assert error <= 2 * promise * torch.linalg.vector_norm(size.detach().double())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of what PyTorch's forward mode scripts
@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradcheck_and_gradgradcheck(name: str, options: Any) -> None:
    arrays = tensors(name, n=1, groups=options["groups"])
    ours = functions(name)[0]

    def function(*arrays: torch.Tensor) -> torch.Tensor:
        return ours(*arrays, **options)

    assert torch.autograd.gradcheck(function, arrays, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arrays, fast_mode=True)


def geometry(name: str) -> list[Any]:
    """Return an operator's last arguments, with a padding that PyTorch hasn't."""
    n = sizes(name)
    found: list[Any] = [[2, 1][:n], [1, 0, 0, 1][: 2 * n], [1, 2][:n], 2]
    return [*found, [1, 0][:n]] if "transpose" in name else found


@pytest.mark.parametrize("name", KINDS)
def test_opcheck(name: str) -> None:
    arrays = tensors(name, groups=2)
    forward, backward = (getattr(torch.ops.nhwconv, n).default for n in (name, f"{name}_backward"))
    y = forward(*arrays, *geometry(name))
    torch.library.opcheck(forward, (*arrays, *geometry(name)))
    torch.library.opcheck(forward, (*arrays[:2], None, *geometry(name), "loop"))
    dy = y.detach().requires_grad_()
    for needs in ([True, True, True], [False, True, False], [True, False, True]):
        torch.library.opcheck(backward, (dy, *arrays[:2], *geometry(name), needs))


@pytest.mark.parametrize("name", ["conv2d", *KINDS])
def test_operators_refuse_a_gradient_that_is_not_the_results(name: str) -> None:
    x, w, b = tensors(name, grad=False)
    options = [[1] * sizes(name), [0] * 2 * sizes(name), [1] * sizes(name), 1]
    options += [[0] * sizes(name)] if "transpose" in name else []
    y = getattr(torch.ops.nhwconv, name)(x, w, b, *options)
    for grad in (y[..., :-1], y[:, :4], y.float()):
        with pytest.raises(RuntimeError, match=f"nhwconv::{name}_backward: grad is "):
            getattr(torch.ops.nhwconv, f"{name}_backward")(grad, x, w, *options, [True] * 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_operators_pad_as_they_say(name: str, dtype: torch.dtype) -> None:
    """Paddings that differ at the two ends, by nhwconv, and by PyTorch for what nhwconv does not do."""
    n = sizes(name)
    theirs = functions(name)[1]
    x, w, b = (t.detach().to(dtype).requires_grad_() for t in tensors(name, groups=2))
    stride, _, dilation, groups, *more = geometry(name)
    if "transpose" in name:
        expected = theirs(x, w, b, stride, 0, *more, groups, dilation)[:, :, 1:]
        expected = expected[..., :-1] if n == 2 else expected
    else:
        expected = theirs(functional.pad(x, [0, 1, 1, 0][-2 * n :]), w, b, stride, 0, dilation, groups)
    got = getattr(torch.ops.nhwconv, name)(x, w, b, *geometry(name))
    assert (got.stride(), got.dtype) == (expected.contiguous().stride(), dtype)
    torch.testing.assert_close(
        (got, *torch.autograd.grad(got.square().sum(), (x, w, b))),
        (expected, *torch.autograd.grad(expected.square().sum(), (x, w, b))),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_results_have_pytorchs_strides_and_gradients_their_tensors(name: str, dtype: torch.dtype) -> None:
    ours, theirs = functions(name)
    n = sizes(name)
    for channels, kernel, batch in itertools.product((1, 4), (1, 3), (0, 1, 2)):
        weight = (channels, 8) if "transpose" in name else (8, channels)
        for turn_x, turn_w in itertools.product((False, True), repeat=2):
            x, w = torch.ones(batch, channels, *(6,) * n, dtype=dtype), torch.ones(*weight, *(kernel,) * n, dtype=dtype)
            x, w = (last(x) if turn_x else x).requires_grad_(), (last(w) if turn_w else w).requires_grad_()
            y, expected = ours(x, w), theirs(x, w)
            assert (y.shape, y.stride()) == (expected.shape, expected.stride()), (x.stride(), w.stride())
            assert y._base is None
            y.backward(torch.ones_like(y))
            assert (x.grad.stride(), w.grad.stride()) == (x.stride(), w.stride())
            fake = ours(x.detach().to("meta"), w.detach().to("meta"))
            assert (fake.shape, fake.stride()) == (y.shape, y.stride())


@pytest.mark.parametrize("lie", [last, torch.Tensor.contiguous])
@pytest.mark.parametrize("name", KINDS)
def test_dense_tensors_pass_as_they_lie(name: str, lie: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = (t.detach() for t in tensors(name, torch.float32))
    x, w = lie(x).requires_grad_(), lie(w).requires_grad_()
    seen: list[Any] = []
    run = executor.run

    def watched(program: Any, *operands: int) -> None:
        seen.append({name for name, address in zip(ARRAYS, operands, strict=False) if address})
        addresses.extend(address for address in operands[:-1] if address)
        run(program, *operands)

    addresses: list[int] = []
    monkeypatch.setattr(executor, "run", watched)
    y = functions(name)[0](x, w, b, padding=1)
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert set(addresses) >= {t.data_ptr() for t in (x, w, b, y, dx, dw)}
    # A transposed convolution is an input gradient, and its gradients are a forward pass and a weight gradient.
    assert seen == (
        [{"dy", "w", "b", "dx"}, {"dy", "w", "x", "y", "dw"}]
        if "transpose" in name
        else [{"x", "w", "b", "y"}, {"x", "w", "dy", "dx", "dw"}]
    )


@pytest.mark.parametrize("name", KINDS)
def test_one_sample_an_empty_batch_and_results_in_place(name: str) -> None:
    ours, theirs = functions(name)
    x, w, b = tensors(name)
    assert torch.equal(ours(x[0], w, b), ours(x[:1], w, b)[0])
    y = ours(x[:0], w, b)
    assert y.shape == theirs(x[:0], w, b).shape
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), (w, b)))
    found = []
    for function in (ours, theirs):
        y = function(x, w, b)
        y += 1
        y[:, 0].mul_(2)
        found.append(torch.autograd.grad(y.relu_().view(2, -1).square().sum(), (x, w)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strategy", [n for n in REGISTRY if n not in ("depthwise", "winograd")])
@pytest.mark.parametrize("name", KINDS)
def test_every_strategy(name: str, strategy: str) -> None:
    """Those that call BLAS from Python get arrays instead of addresses."""
    arrays = tensors(name)
    ours, theirs = functions(name)
    got = results(lambda *a: ours(*a, stride=2, strategy=strategy), arrays, {})
    torch.testing.assert_close(got, results(theirs, arrays, {"stride": 2}), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"stride": 0}, {"dilation": 0}, {"padding": -1}, {"padding": "around"}, {"padding": 9}, {"groups": 3},
        {"groups": 0}, {"stride": (1, 1, 1)}, {"stride": True}, {"stride": 1.0}, {"output_padding": 1},
        {"output_padding": -1}, {"output_padding": (1, 1, 1)}, {"padding": "valid"}, {"padding": 2**40},
    ],
    ids=str,
)  # fmt: skip
def test_errors_are_pytorchs(name: str, change: Any) -> None:
    ours, theirs = functions(name)
    x, w, b = tensors(name, grad=False)
    ours(x, w, b)

    def outcome(function: Any) -> Any:
        try:
            return function(x, w, b, **change)
        except (RuntimeError, TypeError, ValueError) as error:
            return type(error), "" if isinstance(error, TypeError) else str(error)

    got, expected = outcome(ours), outcome(theirs)
    if isinstance(expected, torch.Tensor):  # some of these one kind takes
        torch.testing.assert_close(got, expected)
    else:
        assert got == expected


@pytest.mark.parametrize("name", KINDS)
def test_shapes_that_do_not_go_together_are_pytorchs_errors(name: str) -> None:
    ours, theirs = functions(name)
    x, w, b = tensors(name, grad=False)
    for arguments in ((x[:, :3], w, b), (x, w, b[:5]), (x, w[:, :0], b), (x, w.float(), b), (x[0, 0], w, b), (x, w[0])):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
            theirs(*arguments)
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            ours(*arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_compiled(name: str, dynamic: bool) -> None:
    x, w, b = tensors(name)
    ours, theirs = functions(name)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: ours(*a, stride=2, padding=1), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for n in (2, 1):
        got = results(compiled, (x[:n], w, b), {})
        torch.testing.assert_close(got, results(theirs, (x[:n], w, b), {"stride": 2, "padding": 1}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_autocast_and_other_dtypes_are_pytorchs(name: str, dtype: torch.dtype) -> None:
    ours, theirs = functions(name)
    arrays = tensors(name, torch.float32, grad=False)
    with torch.autocast("cpu", dtype):
        assert torch.equal(ours(*arrays), theirs(*arrays))
    arrays = [a.bfloat16() for a in arrays]
    assert torch.equal(ours(*arrays), theirs(*arrays))


# ------------------------------------------------------------------------------------ what is left to PyTorch


def ran(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether nhwconv computes anything in this."""
    found = []
    own = executor.run

    def watched(program: Any, *operands: int) -> None:
        found.append(program)
        own(program, *operands)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "run", watched)
        run()
    return bool(found)


@pytest.mark.parametrize(
    ("x", "w", "options", "left"),
    [
        ((1, 4, 8, 8), (8, 4, 3, 3), {"padding": 1}, True),
        ((1, 4, 8, 8), (8, 4, 3, 5), {"padding": (1, 2)}, True),
        ((1, 4, 64), (8, 4, 3), {"padding": 1}, True),
        ((1, 4, 16, 16), (8, 4, 3, 3), {"padding": 1, "stride": 2}, True),
        ((1, 4, 8, 9), (8, 4, 3, 3), {"padding": 1}, False),  # 72 pixels
        ((2, 4, 4, 4), (8, 4, 3, 3), {"padding": 1}, False),
        ((1, 4, 8, 8), (8, 2, 3, 3), {"padding": 1, "groups": 2}, False),
        ((1, 4, 8, 8), (8, 4, 5, 5), {"padding": 2}, False),
        ((1, 64, 4, 4), (64, 64, 3, 3), {"padding": 1}, False),  # 590 thousand products
        ((1, 4, 8, 8), (8, 4, 3, 3), {"padding": 1, "strategy": "loop"}, False),
        ((1, 4, 8, 8), (8, 4, 3, 3), {"padding": 1, "strategy": ("depthwise", "loop", "winograd")}, False),
    ],
)
def test_small_single_images_are_left_to_pytorch(
    x: Any, w: Any, options: Any, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gradients are recorded, and they are PyTorch's to the bit; what is asked for by name is never overruled."""
    monkeypatch.setattr(_left, "PIXELS", 64)
    monkeypatch.setattr(_engine, "_calls", {})
    name = f"conv{len(w) - 2}d"
    ours, theirs = functions(name)
    arrays = [torch.randn(shape) for shape in (x, w, w[:1])]
    got: list[torch.Tensor] = []
    assert ran(lambda: got.extend(results(ours, arrays, options)), monkeypatch) is not left
    assert ran(lambda: ours(*arrays, **options), monkeypatch)
    expected = results(theirs, arrays, {key: value for key, value in options.items() if key != "strategy"})
    torch.testing.assert_close(got, expected, rtol=0 if left else 1e-3, atol=0 if left else 1e-3)


def test_transposed_convolutions_of_small_images_are_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_left, "PIXELS", 64)
    arrays = tensors("conv_transpose2d", n=1)
    assert ran(lambda: nhwconv.torch.conv_transpose2d(*arrays), monkeypatch)


# -------------------------------------------------------------------------------------------------- layers


def layer(name: str, cls: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    theirs = getattr(nn, LAYERS[name].__name__)
    return (cls or theirs)(4, 8, 3, dtype=torch.float64, **options)


@pytest.mark.parametrize("name", KINDS)
def test_layers_have_the_state_and_the_results_of_pytorchs(name: str) -> None:
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    if "transpose" in name:
        options["output_padding"] = 1
    theirs, ours = layer(name, **options), layer(name, LAYERS[name], **options)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = tensors(name)[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours(x[0]), theirs(x[0]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["conv_transpose1d", "conv_transpose2d"])
def test_output_size(name: str) -> None:
    theirs, ours = layer(name, stride=3), layer(name, LAYERS[name], stride=3)
    x = tensors(name)[0]
    for size in range(21, 24):
        sizes_ = [size, size - 3][: sizes(name)]
        for given in (sizes_, [2, 8, *sizes_], torch.Size(sizes_)):
            assert list(ours(x, output_size=given).shape[2:]) == sizes_
            torch.testing.assert_close(ours(x, given), theirs(x, given), rtol=1e-11, atol=1e-11)
    for given in ([20] * sizes(name), [24] * sizes(name), [21] * 5):
        with pytest.raises(ValueError, match="output") as expected:
            theirs(x, given)
        with pytest.raises(ValueError, match=re.escape(str(expected.value))):
            ours(x, given)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", KINDS)
def test_scripted_and_traced_layers(name: str) -> None:
    x = tensors(name, grad=False)[0]
    for options in (
        [{"stride": 3, "padding": 2, "output_padding": 1, "groups": 2}, {}]
        if "transpose" in name
        else [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"padding": 2, "groups": 2}]
    ):
        theirs, ours = layer(name, **options), layer(name, LAYERS[name], **options)
        scripted = torch.jit.script(ours)
        for images in (x, x[0]):
            torch.testing.assert_close(scripted(images), theirs(images), rtol=1e-11, atol=1e-11)
        assert f"nhwconv::{name}" in str(scripted.inlined_graph)
        traced = torch.jit.trace(ours, x)
        torch.testing.assert_close(traced(2 * x), theirs(2 * x), rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_layers_take_an_output_size() -> None:
    for name in ("conv_transpose1d", "conv_transpose2d"):
        x = tensors(name, grad=False)[0]
        scripted = torch.jit.script(layer(name, LAYERS[name], stride=2))
        given = [16, 14][: sizes(name)]
        torch.testing.assert_close(scripted(x, given), layer(name, stride=2)(x, given), rtol=1e-11, atol=1e-11)


class Doubled(nn.ConvTranspose2d):
    """A class of somebody's own."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return super().forward(2 * input, output_size)


def test_replaced_layers_of_all_kinds() -> None:
    model = nn.ModuleDict({name: layer(name) for name in KINDS} | {"own": Doubled(4, 8, 3, dtype=torch.float64)})
    expected = {name: m(tensors(name if name in KINDS else KINDS[2])[0]) for name, m in model.items()}
    assert replace_conv(model, strategy="loop") == [*KINDS, "own"]
    assert [type(model[name]) for name in KINDS] == list(LAYERS.values())
    assert isinstance(model["own"], Doubled)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in (model, *copies):
        for name, m in other.items():
            x = tensors(name if name in KINDS else KINDS[2])[0]
            torch.testing.assert_close(m(x), expected[name], rtol=1e-11, atol=1e-11)
            assert m.strategy == "loop"
    assert restore_conv(model) == [*KINDS, "own"]
    assert [type(m) for m in model.values()] == [nn.Conv1d, nn.ConvTranspose1d, nn.ConvTranspose2d, Doubled]


@pytest.mark.parametrize("name", KINDS)
def test_unknown_strategies_are_refused_in_the_words_of_the_function(name: str) -> None:
    with pytest.raises(ValueError, match=f'^{name}: there is no strategy "looop"'):
        functions(name)[0](*tensors(name), strategy="looop")
    with pytest.raises(ValueError, match=f'^{LAYERS[name].__name__}: there is no strategy "looop"'):
        LAYERS[name](1, 1, 1, strategy="looop")
