"""The PyTorch adapter against PyTorch's own convolution, in every way that a model uses one."""

from __future__ import annotations

import ast
import copy
import itertools
import logging
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import child
import nhwconv as nc
import nhwconv.torch
from nhwconv import choices
from nhwconv.program import ARRAYS
from nhwconv.runtime import executor
from nhwconv.strategies import AUTO
from nhwconv.torch import Conv2d, conv2d, replace_conv2d, restore_conv2d
from rigged import FAST, SLOW, W, X, rig
from tolerance import PROMISE

#: (stride, padding, dilation, groups)
GRID = [
    (stride, padding, dilation, groups)
    for stride, padding, dilation, groups in itertools.product(
        (1, (2, 1), (3,)), (0, (1, 2), "same", "valid"), (1, (1, 2)), (1, 2, 4)
    )
    if padding != "same" or stride == 1
]


def tensors(
    dtype: torch.dtype = torch.float64, n: int = 2, size: tuple[int, int] = (7, 6), c: int = 4, d: int = 8,
    kernel: tuple[int, int] = (3, 3), groups: int = 1, grad: bool = True, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return input, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, c, *size), (d, c // groups, *kernel), (d,)
    x, w, b = (torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(grad) for shape in shapes)
    return x, w, b


def close(got: torch.Tensor, expected: torch.Tensor, absolute: torch.Tensor, what: object = "") -> None:
    """Hold two results, PyTorch's and ours, to the promised error each: `absolute` is their sum of absolute values."""
    assert got.shape == expected.shape, what
    assert got.dtype is expected.dtype
    promise = PROMISE[np.dtype(str(got.dtype).removeprefix("torch."))]
    error = torch.linalg.vector_norm((got - expected).detach().double())
    assert error <= 2 * promise * torch.linalg.vector_norm(absolute.detach().double()), f"{what}: {error}"


def results(function: Any, arrays: Any, *options: Any) -> list[torch.Tensor]:
    """Return y, and the gradients of its product with fixed numbers."""
    leaves = [a.detach().requires_grad_() for a in arrays]
    y = function(*leaves, *options)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad(y, leaves, dy if arrays[0].min() < 0 else dy.abs())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", GRID, ids=str)
def test_results_and_gradients_are_pytorchs(options: Any, dtype: torch.dtype) -> None:
    arrays = tensors(dtype, groups=options[3])
    absolute = results(functional.conv2d, [a.detach().abs() for a in arrays], *options)
    for name, got, expected, size in zip(
        ("y", "dx", "dw", "db"),
        results(conv2d, arrays, *options),
        results(functional.conv2d, arrays, *options),
        absolute,
        strict=True,
    ):
        close(got, expected, size, name)


@pytest.mark.parametrize("options", GRID, ids=str)
def test_gradcheck_and_gradgradcheck(options: Any) -> None:
    arrays = tensors(n=1, size=(5, 5), d=4, kernel=(3, 2), groups=options[3])

    def function(*arrays: torch.Tensor) -> torch.Tensor:
        return conv2d(*arrays, *options)

    assert torch.autograd.gradcheck(function, arrays, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arrays, fast_mode=True)


@pytest.mark.parametrize("needed", [p for p in itertools.product((False, True), repeat=3) if any(p)], ids=str)
def test_gradgradcheck_for_every_set_of_gradients(needed: tuple[bool, ...]) -> None:
    arrays = [a.detach().requires_grad_(n) for a, n in zip(tensors(n=1, size=(4, 4), c=2, d=2), needed, strict=True)]
    assert torch.autograd.gradcheck(conv2d, arrays)
    if sum(needed[:2]):  # the bias alone has a gradient that depends on nothing but dy
        assert torch.autograd.gradgradcheck(conv2d, arrays)


@pytest.mark.parametrize("options", [([1, 1], [0, 0, 0, 0], [1, 1], 1), ([2, 1], [1, 1, 0, 1], [1, 2], 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (1, 4, 5, 5), (2, 4, 5, 4)], ids=str)
def test_opcheck(options: Any, shape: tuple[int, ...]) -> None:
    x, w, b = tensors(n=shape[0], size=shape[2:], groups=options[3])
    y = torch.ops.nhwconv.conv2d(x, w, b, *options)
    torch.library.opcheck(torch.ops.nhwconv.conv2d.default, (x, w, b, *options))
    torch.library.opcheck(torch.ops.nhwconv.conv2d.default, (x, w, None, *options))
    for needs in ([True, True, True], [False, True, False], [True, False, True]):
        dy = y.detach().requires_grad_()
        torch.library.opcheck(torch.ops.nhwconv.conv2d_backward.default, (dy, x, w, *options, needs))


@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (1, 1, 5, 5), (3, 1, 1, 1), (2, 4, 1, 1), (0, 4, 5, 5)], ids=str)
def test_fake_results_have_the_real_strides(shape: tuple[int, ...]) -> None:
    kernel = (min(3, shape[2]), 1)
    x, w, _ = tensors(n=shape[0], size=shape[2:], c=shape[1], kernel=kernel, grad=False)
    geometry = [1, 1], [0, 0, 0, 0], [1, 1], 1
    y = torch.ops.nhwconv.conv2d(x, w, None, *geometry)
    real = [y, *torch.ops.nhwconv.conv2d_backward(y, x, w, *geometry, [True, True, True])]
    x, w, y = x.to("meta"), w.to("meta"), y.to("meta")
    fake = [torch.ops.nhwconv.conv2d(x, w, None, *geometry)]
    fake += torch.ops.nhwconv.conv2d_backward(y, x, w, *geometry, [True, True, True])
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("w_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dense_tensors_pass_as_they_lie(x_format: Any, w_format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that nhwconv gets are the tensors', of inputs and of results: nothing is converted on the way."""
    x, w, b = (t.detach() for t in tensors(torch.float32))
    x, w = (t.contiguous(memory_format=f).requires_grad_() for t, f in ((x, x_format), (w, w_format)))
    seen: list[int] = []
    run = executor.run

    def watched(program: Any, *operands: int) -> None:
        *addresses, header = operands
        assert header == executor.ADDRESSES
        seen.extend(address for address in addresses if address)
        run(program, *operands)

    monkeypatch.setattr(executor, "run", watched)
    y = conv2d(x, w, b, padding=1)
    dy = torch.ones_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    expected = [t.data_ptr() for t in (x, w, b, y)] + [t.data_ptr() for t in (x, w, dy, dx, dw)]
    assert seen == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bits_do_not_depend_on_how_tensors_lie(groups: int, dtype: torch.dtype) -> None:
    arrays = [t.detach().to(dtype) for t in tensors(groups=groups)]
    last, first, other = (
        [change(t) if t.dim() == 4 else t for t in arrays]
        for change in (
            lambda t: t.contiguous(memory_format=torch.channels_last),
            lambda t: t,
            lambda t: torch.stack([t, t], 4)[..., 1],
        )
    )
    expected = results(conv2d, last, 1, 1, 1, groups)
    for given in (first, other, [first[0], *last[1:]], [last[0], *first[1:]], [other[0], *last[1:]]):
        for got, wanted in zip(results(conv2d, given, 1, 1, 1, groups), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded", "offset", "flipped"])
def test_other_layouts_are_converted_and_inputs_are_left_alone(layout: str) -> None:
    x, w, b = (t.detach() for t in tensors(n=4, size=(8, 8)))
    x = {
        "contiguous": lambda: x,
        "strided": lambda: x[::2, :, ::2, 1:],
        "expanded": lambda: x[:1].expand(3, -1, -1, -1),
        "offset": lambda: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
        "flipped": lambda: x.flip(2).transpose(2, 3),
    }[layout]()
    before = [t.clone() for t in (x, w, b)]
    got, expected = results(conv2d, (x, w, b)), results(functional.conv2d, (x, w, b))
    for a, e, s in zip(got, expected, results(functional.conv2d, [t.abs() for t in (x, w, b)]), strict=True):
        close(a, e, s)
    assert all(torch.equal(t, old) for t, old in zip((x, w, b), before, strict=True))


def test_only_what_is_needed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = executor.run

    def watch(program: Any, *operands: int) -> None:
        given = dict(zip(ARRAYS, operands, strict=False))
        if not given["y"]:
            asked.append(tuple(name for name in ("dx", "dw", "db") if given[name]))
        run(program, *operands)

    monkeypatch.setattr(executor, "run", watch)
    for needed in itertools.product((False, True), repeat=3):
        if any(needed):
            arrays = [a.detach().requires_grad_(n) for a, n in zip(tensors(), needed, strict=True)]
            conv2d(*arrays).sum().backward()
            names = tuple(name for name, n in zip(("dx", "dw", "db"), needed, strict=True) if n)
            assert asked.pop() == names
            assert [a.grad is not None for a in arrays] == list(needed)
    assert not asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 6, 6), (8, 4, 3, 3), 1), ((2, 4, 6, 6), (8, 2, 3, 3), 2), ((2, 4, 6, 6), (4, 1, 3, 3), 4),
        ((2, 4, 6, 6), (8, 4, 1, 1), 1), ((2, 1, 6, 6), (8, 1, 3, 3), 1), ((2, 4, 1, 1), (8, 4, 1, 1), 1),
        ((2, 4, 3, 3), (8, 4, 3, 3), 1), ((1, 1, 3, 3), (1, 1, 3, 3), 1), ((0, 4, 6, 6), (8, 4, 3, 3), 1),
    ],
    ids=str,
)  # fmt: skip
def test_results_have_pytorchs_strides_and_gradients_their_tensors(shapes: Any, dtype: torch.dtype) -> None:
    for x_format, w_format in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        x = torch.ones(shapes[0], dtype=dtype).to(memory_format=x_format).requires_grad_()
        w = torch.ones(shapes[1], dtype=dtype).to(memory_format=w_format).requires_grad_()
        y, expected = (f(x, w, None, groups=shapes[2]) for f in (conv2d, functional.conv2d))
        assert y.stride() == expected.stride(), (x.stride(), w.stride())
        y.backward(torch.ones_like(y))
        assert x.grad.stride() == x.stride()
        assert w.grad.stride() == w.stride()
        fake = torch.ops.nhwconv.conv2d(
            x.detach().to("meta"), w.detach().to("meta"), None, [1, 1], [0] * 4, [1, 1], shapes[2]
        )
        assert fake.stride() == y.stride()


def test_results_are_pytorchs_own_memory() -> None:
    """In-place operations work on them, also where autograd watches, and `view` does what it does after PyTorch's."""
    x, w, b = tensors()
    found = []
    for function in (conv2d, functional.conv2d):
        y = function(x, w, b)
        assert y._base is None
        assert y.is_contiguous()
        assert y.untyped_storage().resizable()
        y += 1
        y[:, 0].mul_(2)
        y.relu_()
        found.append(torch.autograd.grad(y.view(2, -1).square().sum(), (x, w, b)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_the_choice_of_tune_is_obeyed_from_the_next_call_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "folder", lambda: tmp_path / "tuning")
    monkeypatch.setattr(choices, "_tuned", {})
    (n, h, width, c), (d, kh, kw, _) = X, W
    x, w = torch.ones(n, c, h, width), torch.ones(d, c, kh, kw)
    for name in ("loop", "winograd", "loop"):
        rig(monkeypatch.setattr, **{n: FAST if n == name else SLOW for n in ("loop", "winograd")})
        nc.tune("forward", X, W, padding=1, seconds=0.01)
        assert AUTO[int(conv2d(x, w, padding=1)[0, 0, 0, 0])] == name
    monkeypatch.undo()
    nc.ops.forget_plans()


# ------------------------------------------------------------------------------- falling through, and errors


def records(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "nhwconv.torch"]


def test_what_nhwconv_does_not_do_is_pytorchs_with_a_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nhwconv.torch")
    x, w, b = (t.detach().to(torch.bfloat16) for t in tensors())
    assert torch.equal(conv2d(x, w, b), functional.conv2d(x, w, b))
    assert records(caplog) == ["input has dtype torch.bfloat16: PyTorch's own convolution runs"]
    caplog.clear()

    layer = Conv2d(4, 8, 3, padding=1, padding_mode="circular")
    assert torch.equal(layer(x.float()), nn.Conv2d.forward(layer, x.float()))
    assert records(caplog)[0] == "padding_mode is 'circular': PyTorch's own convolution runs"
    caplog.clear()

    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x.float(), w.float()).dtype is torch.bfloat16
    assert records(caplog) == ["autocast is on: PyTorch's own convolution runs"]
    caplog.clear()

    conv2d(x.float(), w.float(), b.float())
    assert not records(caplog)


def test_float16_is_stored_as_such() -> None:
    x, w, b = (t.detach().half() for t in tensors())
    y, exact = conv2d(x, w, b), functional.conv2d(x.double(), w.double(), b.double())
    assert y.dtype is torch.float16
    size = functional.conv2d(x.double().abs(), w.double().abs(), b.double().abs())
    assert ((y.double() - exact).abs() <= torch.finfo(torch.float16).eps * size).all()


IMAGES, KERNELS = torch.ones(1, 3, 5, 5), torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((IMAGES, torch.ones(4, 2, 3, 3)), {}),
        ((IMAGES, torch.ones(4, 3, 7, 7)), {}),
        ((IMAGES, KERNELS, torch.ones(3)), {}),
        ((IMAGES, KERNELS.double()), {}),
        ((IMAGES, KERNELS), {"stride": 0}),
        ((IMAGES, KERNELS), {"dilation": 0}),
        ((IMAGES, KERNELS), {"padding": -1}),
        ((IMAGES, KERNELS), {"padding": "around"}),
        ((IMAGES, KERNELS), {"padding": "same", "stride": 2}),
        ((IMAGES, KERNELS), {"groups": 2}),
        ((IMAGES, KERNELS), {"groups": 0}),
        ((IMAGES, KERNELS), {"stride": (1, 1, 1)}),
        ((IMAGES, KERNELS), {"stride": True}),
        ((IMAGES, KERNELS), {"stride": (True, 1)}),
        ((IMAGES, KERNELS), {"stride": 1.0}),
        ((IMAGES, KERNELS), {"groups": True}),
        ((IMAGES, KERNELS), {"padding": 2**40}),
        ((IMAGES[:, :, :0], KERNELS), {"padding": 2}),
        ((IMAGES[0, 0], KERNELS), {}),
        ((3, KERNELS), {}),
    ],
)
def test_errors_are_pytorchs(arguments: Any, options: Any) -> None:
    conv2d(IMAGES, KERNELS)  # what is remembered of valid arguments answers for no others, equal as they may be
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        functional.conv2d(*arguments, **options)
    with pytest.raises(theirs.type) as ours:
        conv2d(*arguments, **options)
    if theirs.type is not TypeError:  # a TypeError lists the arguments as they were passed
        assert str(ours.value) == str(theirs.value)


def test_what_nhwconv_refuses_and_pytorch_does_is_pytorchs() -> None:
    x, w = torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3)
    assert torch.equal(conv2d(x, w, stride=2**31), functional.conv2d(x, w, stride=2**31))
    assert conv2d(x[:, :0], w[:, :0], padding=2).shape == functional.conv2d(x[:, :0], w[:, :0], padding=2).shape
    assert torch.equal(conv2d(x.long(), w.long()), functional.conv2d(x.long(), w.long()))
    # The operators do so themselves, since a graph may be run with other sizes than it was made with.
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = torch.ops.nhwconv.conv2d(*leaves, None, [2**31, 1], [1, 0, 2, 1], [1, 1], 1)
    expected = functional.conv2d(functional.pad(leaves[0], (2, 1, 1, 0)), leaves[1], stride=(2**31, 1))
    assert torch.equal(y, expected)
    for got, wanted in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert torch.equal(got, wanted)


class Index:
    """A number by `__index__` alone, which may change."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("number", [np.int64, lambda n: [n], lambda n: torch.Size((n, n)), lambda n: (n,)])
def test_numbers_of_other_kinds(number: Any) -> None:
    x, w, b = tensors(grad=False)
    for n in (1, 2, 1):
        expected = functional.conv2d(x, w, b, number(n), padding=number(n - 1))
        torch.testing.assert_close(conv2d(x, w, b, number(n), padding=number(n - 1)), expected)


def test_options_that_change_are_looked_at_again() -> None:
    x, w, b = tensors(grad=False)
    stride, index = [1, 1], Index(1)
    for n in (1, 2):
        stride[:] = [n, n]
        torch.testing.assert_close(conv2d(x, w, b, stride), functional.conv2d(x, w, b, n))
        index.value = n
        for function in (functional.conv2d, conv2d):
            with pytest.raises((TypeError, RuntimeError)):
                function(x, w, b, index)


def test_views_that_negate() -> None:
    x = torch.randn(1, 4, 5, 5, dtype=torch.complex128).conj().imag
    w = tensors(grad=False)[1]
    assert x.is_neg()
    torch.testing.assert_close(conv2d(x, w), functional.conv2d(x, w))


def sample_inputs(name: str, dtype: torch.dtype) -> Any:
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (o for o in op_db if o.name == f"nn.functional.{name}")
    errors = info.error_inputs("cpu") if info.error_inputs_func else ()
    return info.sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point), errors


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"])
def test_pytorchs_own_samples(name: str, dtype: torch.dtype) -> None:
    """All that PyTorch tests its convolutions with, errors included."""
    samples, errors = sample_inputs(name, dtype)
    conv, theirs_conv = getattr(nhwconv.torch, name), getattr(functional, name)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.int64: 0}.get(dtype, 1e-2)
    count = 0
    for sample in samples:
        arguments, options = (sample.input, *sample.args), sample.kwargs
        y, expected = conv(*arguments, **options), theirs_conv(*arguments, **options)
        assert (y.stride(), y.dtype, y.requires_grad) == (expected.stride(), expected.dtype, expected.requires_grad)
        results = [(y, expected)]
        leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
        if leaves:
            grad = torch.ones_like(y)
            results += zip(*(torch.autograd.grad(r, leaves, grad) for r in (y, expected)), strict=True)
        for got, wanted in results:
            error = torch.linalg.vector_norm((got - wanted).double())
            assert error <= 20 * tolerance * max(torch.linalg.vector_norm(wanted.double()), 1), (options, error)
        count += 1
    assert count > 5
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type) as theirs:
            theirs_conv(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(error.error_type) as ours:
            conv(sample.input, *sample.args, **sample.kwargs)
        assert str(ours.value) == str(theirs.value)


# ------------------------------------------------------------------------------------- who looks at calls


class Tagged(torch.Tensor):
    """A subclass that notes which functions it sees."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("which", [0, 1, 2])
def test_subclasses_of_tensors_see_one_call(which: int) -> None:
    arrays = list(tensors(grad=False))
    expected = functional.conv2d(*arrays, padding=1)
    arrays[which] = arrays[which].as_subclass(Tagged)
    Tagged.seen.clear()
    y = conv2d(*arrays, padding=1)
    assert Tagged.seen == [conv2d]
    assert type(y) is Tagged
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)


def test_modes_see_calls() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: ClassVar[list[Any]] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x, w, b = tensors()
    outside = conv2d(x, w, b)
    with Functions():
        conv2d(x, w, b)
    assert seen == [conv2d]
    seen.clear()
    with Operators():
        y = conv2d(x, w, b)
        torch.autograd.grad(y, (x, w), torch.ones_like(outside))
        torch.autograd.grad(outside, (x, w), torch.ones_like(outside))
    ops = torch.ops.nhwconv
    assert [f for f in seen if f.namespace == "nhwconv"] == [ops.conv2d.default, *[ops.conv2d_backward.default] * 2]


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w, b = torch.empty(2, 4, 7, 6), torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.empty(8)
        y = conv2d(x, w, b, padding=1)
        assert (tuple(y.shape), y.stride()) == ((2, 8, 7, 6), (336, 1, 48, 8))


def test_one_image_and_an_empty_batch() -> None:
    x, w, b = tensors()
    assert torch.equal(conv2d(x[0], w, b), conv2d(x[:1], w, b)[0])
    y = conv2d(x[:0], w, b)
    assert y.shape == functional.conv2d(x[:0], w, b).shape
    grads = torch.autograd.grad(y.sum(), (w, b))
    assert all(not g.any() for g in grads)


# --------------------------------------------------------------------------------------------- models


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a small network with one of each kind of layer."""
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False), nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.Conv2d(16, 4, (1, 3), dilation=(1, 2)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ]  # fmt: skip
    return nn.Sequential(*layers).to(dtype)


def test_replace_and_restore_change_classes_and_nothing_else() -> None:
    model = network()
    before = list(model.children()), [id(p) for p in model.parameters()], copy.deepcopy(model.state_dict())
    assert replace_conv2d(model) == ["0", "3", "4", "7"]
    assert [type(model[i]) for i in (0, 3, 4, 6, 7)] == [Conv2d, Conv2d, Conv2d, nn.Conv2d, Conv2d]
    assert replace_conv2d(model) == []
    assert restore_conv2d(model) == ["0", "3", "4", "7"]
    assert list(model.children()) == before[0]
    assert [id(p) for p in model.parameters()] == before[1]
    assert {type(m) for m in model} & {Conv2d} == set()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[2][name])
    layer = nn.Conv2d(1, 1, 1)
    assert replace_conv2d(layer) == [""]
    assert type(layer) is Conv2d


def test_a_layer_has_the_state_and_the_results_of_pytorchs() -> None:
    options = {"stride": 2, "padding": (1, 0), "dilation": (1, 2), "groups": 2, "dtype": torch.float64}
    theirs, ours = nn.Conv2d(4, 8, 3, **options), Conv2d(4, 8, 3, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    x = tensors()[0]
    expected = theirs(x)
    with torch.no_grad():
        for p in theirs.parameters():
            p.abs_()
    close(ours(x), expected, theirs(x.abs()))


def train(model: nn.Module, steps: int, run: Any = None, dtype: torch.dtype = torch.float64) -> list[float]:
    """Return the losses of some steps of gradient descent."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 3, 12, 12, dtype=dtype, generator=generator)
        target = torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        loss = functional.cross_entropy((run or model)(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_curves_match() -> None:
    """In float64, 50 steps amplify what rounding leaves, 1e-16, by far less than 1e6."""
    stock, ours = network(), network()
    replace_conv2d(ours)
    expected = train(stock, 50)
    np.testing.assert_allclose(train(ours, 50), expected, rtol=1e-10)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert expected[-1] != expected[0]


def test_a_models_gradients_agree_before_and_after() -> None:
    model = network()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = []
    for change in (lambda m: None, replace_conv2d, restore_conv2d):
        change(model)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for stock, ours, again in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(again, stock, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_models_train_alike_without_graph_breaks(dynamic: bool) -> None:
    model, eager = network(), network()
    for m in (model, eager):
        replace_conv2d(m)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    np.testing.assert_allclose(train(model, 3, compiled), train(eager, 3), rtol=1e-12)


def test_data_parallel_without_devices_is_the_model() -> None:
    model = network()
    expected = nn.DataParallel(model)(tensors(c=3, size=(12, 12))[0])
    replace_conv2d(model)
    torch.testing.assert_close(nn.DataParallel(model)(tensors(c=3, size=(12, 12))[0]), expected, rtol=1e-11, atol=1e-11)


def test_no_grad_and_frozen_layers() -> None:
    x, w, b = tensors()
    with torch.no_grad():
        assert not conv2d(x, w, b).requires_grad
    with torch.inference_mode():
        assert conv2d(x, w, b).is_inference()
    assert torch.equal(conv2d(x, w, b), conv2d(x.detach(), w.detach(), b.detach()))


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous_format"])
def test_memory_does_not_grow_over_200_steps(memory_format: str) -> None:
    """Were a step to leak one output of its layers, 4 MiB, 200 steps would hold 800; a plan a step were found, too."""
    code = """
import resource, sys, torch
from torch import nn
from nhwconv.runtime import arrays
from nhwconv.torch import _engine, replace_conv
lie = getattr(torch, sys.argv[1])
model = nn.Sequential(
    nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1, groups=16),
    nn.ConvTranspose2d(16, 16, 1), nn.Conv2d(16, 4, 3, stride=2, bias=False),
).to(memory_format=lie)
assert len(replace_conv(model)) == 4
x = torch.randn(4, 16, 128, 128).to(memory_format=lie)
def step():
    model.zero_grad()
    model(x).square().mean().backward()
def state():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return peak, len(_engine._calls), arrays._scratch.nbytes() + arrays._buffers.nbytes()
for _ in range(20):
    step()
before = state()
for _ in range(200):
    step()
print([a - b for a, b in zip(state(), before)])
"""
    peak, calls, unused = ast.literal_eval(child.run(code, memory_format))
    assert peak < 64
    assert (calls, unused) == (0, 0)


# ----------------------------------------------------------------------------------- processes and threads

_LOADER = """
import os, sys, torch
from nhwconv.torch import conv2d
torch.set_num_threads(2)
w = torch.ones(8, 8, 3, 3)
torch.relu(torch.ones(2**20))  # OpenMP has run: a child must not use it
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return conv2d(torch.full((1, 8, 96, 96), float(i)), w)[0, 0, 1:2, 1:2]
loader = torch.utils.data.DataLoader(Data(), 2, num_workers=2, multiprocessing_context=sys.argv[1])
if __name__ == "__main__":
    print([int(v) for batch in loader for v in batch.flatten()])
"""


@pytest.mark.parametrize("used", [False, True])
def test_dataloader_workers(used: bool) -> None:
    code = _LOADER.replace("if __name__", f"{'conv2d(torch.ones(4, 8, 96, 96), w)' if used else ''}\nif __name__")
    assert child.run(code, "fork") == f"{[72 * i for i in range(8)]}\n"


_DDP = """
import os, sys, warnings, torch, torch.distributed as dist
from torch import nn
from nhwconv.torch import replace_conv2d
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
model = model.to(memory_format=torch.channels_last)
if len(sys.argv) > 3: replace_conv2d(model)
parallel = nn.parallel.DistributedDataParallel(model)
x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
for _ in range(3):
    parallel.zero_grad()
    parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
grads = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
model(x).square().mean().backward()
for a, p in zip(grads, model.parameters()):
    torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-12)
print("agree")
dist.destroy_process_group()
"""


def test_ddp_on_gloo(tmp_path: Any) -> None:
    processes = [child.start(_DDP, rank, tmp_path / "store", "replace") for rank in (0, 1)]
    for process in processes:
        status, out, err = child.finish(process)
        assert (status, out) == (0, "agree\n"), err


def test_calls_are_told_as_those_of_arrays_are() -> None:
    code = """
import torch
from nhwconv.torch import conv2d, conv_transpose2d
x, w = torch.ones(2, 4, 9, 8, requires_grad=True), torch.ones(4, 4, 3, 3, requires_grad=True)
conv2d(x, w, stride=2, padding=1, strategy="loop").sum().backward()
conv_transpose2d(x, w, strategy="loop")
"""
    status, _, err = child.finish(child.start(code, NHWCONV_VERBOSE=1))
    assert status == 0, err
    layer, up = "n2h9w8c4d4k3s2p1", "n2h11w10c4d4k3"
    assert [line.rpartition(",")[0] for line in err.splitlines()] == [
        f"nhwconv,forward,{layer},float32,loop",
        f"nhwconv,weight_grad+input_grad,{layer},float32,loop+loop",
        f"nhwconv,input_grad,{up},float32,loop",
    ]


def test_pytorchs_number_of_threads_holds() -> None:
    code = """
import numba, torch
torch.set_num_threads(2)
import nhwconv.torch
from nhwconv.runtime import executor
seen, run = [], executor.run
def watched(program, *operands):
    seen.append(program.workers)
    return run(program, *operands)
executor.run = watched
x, w = torch.ones(4, 16, 32, 32), torch.ones(16, 16, 3, 3)
assert torch.get_num_threads() == 2, torch.get_num_threads()
for n in (2, 1, 3, 2):
    torch.set_num_threads(n)
    nhwconv.torch.conv2d(x, w)
    assert torch.get_num_threads() == n
print(seen, numba.get_num_threads(), numba.threading_layer())
"""
    assert child.run(code, NUMBA_NUM_THREADS=4) == "[2, 1, 3, 2] 4 omp\n"


def test_no_call_changes_pytorchs_number_of_threads_in_any_thread() -> None:
    code = """
import threading
import numpy as np, torch
torch.set_num_threads(1)
import nhwconv as nc, nhwconv.torch
array, weights = np.ones((4, 64, 64, 32), np.float32), np.ones((32, 3, 3, 32), np.float32)
def call(number):
    assert torch.get_num_threads() == number
    nc.conv2d(array, weights)
    nc.conv2d_backward(array, weights, nc.conv2d(array, weights))
    nhwconv.torch.conv2d(torch.ones(4, 32, 64, 64), torch.ones(32, 32, 3, 3, requires_grad=True)).sum().backward()
    assert torch.get_num_threads() == number
def both(number):
    call(number)
    thread = threading.Thread(target=lambda: (call(number), done.append(number)))
    thread.start()
    thread.join()
done = []
for number in (1, 2, 1):
    torch.set_num_threads(number)
    both(number)
print(done)
"""
    assert child.run(code, NUMBA_NUM_THREADS=2) == "[1, 2, 1]\n"


@pytest.mark.parametrize("first", ["torch", "nhwconv"])
def test_one_pool_of_threads(first: str) -> None:
    """Taking turns, both runtimes together keep two threads busy: the main one and one worker."""
    code = """
import os, sys
import numpy as np
def use_torch():
    import torch
    torch.set_num_threads(2)
    torch.relu(torch.ones(2**22))
def use_nhwconv():
    import nhwconv as nc
    nc.conv2d(np.ones((4, 64, 64, 64), np.float32), np.ones((64, 3, 3, 64), np.float32))
def ticks():
    found = {}
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/stat") as file:
                found[task] = int(file.read().rsplit(")")[1].split()[11])
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return found
(use_torch if sys.argv[1] == "torch" else use_nhwconv)()
import nhwconv.torch
use_torch()
use_nhwconv()
before = ticks()
for _ in range(100):
    use_torch()
    use_nhwconv()
spent = [after - before.get(t, 0) for t, after in ticks().items()]
print(sum(n > max(spent) / 10 for n in spent))
"""
    assert child.run(code, first, NUMBA_NUM_THREADS=2) == "2\n"


def test_torch_is_imported_by_its_adapter_alone() -> None:
    code = "import sys, nhwconv; print({'torch', 'jax', 'dask'} & set(sys.modules))"
    assert child.run(code) == "set()\n"
