"""What computes: tensors in, tensors out, without autograd. All contact to nhwconv's inside is in this file.

Whatever can be known of a convolution before its data is a `Call`, made once and found by shapes, strides, dtypes and
options. Results are PyTorch's own memory: nhwconv writes into tensors that are allocated here, through NumPy's views.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from .. import ops, planning
from ..checks import words_of
from ..planning import Backward, Plan
from ..problem import Pass
from ..program import ARRAYS, Program
from ..runtime import executor, machine

if TYPE_CHECKING:
    from ._options import Options

__all__ = [
    "Call",
    "backward",
    "call_for",
    "check_strategy",
    "forward",
    "gives_channels_last",
    "output_size",
    "pytorchs_backward",
    "pytorchs_forward",
    "refusal",
]

#: Tensors of these dtypes are NumPy arrays that nhwconv takes; NumPy has no bfloat16.
DTYPES = frozenset((torch.float32, torch.float64, torch.float16))


# ---------------------------------------------------------------------------------------------- threads


def _start_threads() -> None:
    """Start Numba's threads: OpenMP's, unless the user or an earlier call chose otherwise.

    PyTorch and Numba then share one libgomp and its pool, whichever was loaded first. A pool of its own, such as tbb's,
    would have to wait for PyTorch's threads, which spin for milliseconds after each operation. And a forked child can
    tell from the started layer that OpenMP would not survive in it.

    """
    config: Any = numba.config
    priority = config.THREADING_LAYER_PRIORITY
    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        config.THREADING_LAYER_PRIORITY = ["omp", *(name for name in priority if name != "omp")]
    try:
        machine.threads()
    finally:
        config.THREADING_LAYER_PRIORITY = priority


_start_threads()


# ------------------------------------------------------------------------------------------------- calls


def check_strategy(strategy: Any) -> None:
    """Raise nhwconv's error where there is no such strategy."""
    with words_of("conv2d"):
        planning.strategy_names(strategy)


class Call:
    """What is known of a convolution before its data."""

    __slots__ = ("_backwards", "_plans", "channels_last", "geometry", "keywords", "refused", "shape")

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, options: Options) -> None:
        #: Why nhwconv doesn't do this, where it doesn't.
        self.refused: str | None = refusal(x, w, b, options)
        if self.refused is not None:
            return
        pads = options.pads(w.shape[2:])
        #: The operators' last arguments.
        self.geometry = options.stride, pads, options.dilation, options.groups, options.strategy
        #: nhwconv's options.
        self.keywords: dict[str, Any] = {
            "stride": options.stride,
            "padding": (pads[:2], pads[2:]),
            "dilation": options.dilation,
            "groups": options.groups,
        }
        self.refused = _refused_by_nhwconv(x, w, self.keywords)
        if self.refused is not None:
            return
        self.keywords["strategy"] = options.strategies
        #: The plan of each pass; an error here is the strategy's, and the caller's.
        self._plans: dict[Pass, Plan] = {"forward": _plan("forward", x, w, **self.keywords)}
        self._backwards: dict[tuple[str, ...], Backward] = {}
        #: The result's.
        self.shape = (x.shape[0], w.shape[0], *output_size(x, w, options.stride, pads, options.dilation))
        #: Whether the result is channels_last.
        self.channels_last = gives_channels_last(x, w)

    @property
    def forward(self) -> Plan:
        """The plan of the forward pass."""
        return self._plans["forward"]

    def backward(self, needs: tuple[str, ...]) -> Backward:
        """Return the plan of these gradients."""
        found = self._backwards.get(needs)
        if found is None:
            form, dtype = self.forward.form, self.forward.problem.dtype
            weight_grad, input_grad = (
                ops.plan(pass_, form.x, form.w, dtype=dtype, **self.keywords) for pass_ in ("weight_grad", "input_grad")
            )
            found = self._backwards[needs] = Backward(weight_grad, input_grad, needs)
        return found


def refusal(x: Any, w: Any, b: Any, options: Options | str) -> str | None:
    """Return why PyTorch is asked instead, as far as dtypes, ranks and shapes tell; None if nhwconv may do it."""
    for name, tensor in (("input", x), ("weight", w), ("bias", b)):
        if tensor is None and name == "bias":
            continue
        if (
            not isinstance(tensor, Tensor)
            or tensor.device.type not in ("cpu", "meta")
            or tensor.layout != torch.strided
        ):
            return f"{name} is not a dense tensor on the CPU"
        if tensor.dtype not in DTYPES or tensor.dtype != x.dtype:
            return f"{name} has dtype {tensor.dtype}"
    if isinstance(options, str):
        return options
    if x.dim() != 4 or w.dim() != 4 or min(w.shape) < 1:
        return f"input has {x.dim()} axes and weight the shape {tuple(w.shape)}"
    d, c, kh, kw = w.shape
    groups = options.groups
    if x.shape[1] != c * groups or d % groups or (b is not None and tuple(b.shape) != (d,)):
        return f"shapes do not go together: {tuple(x.shape)} and {tuple(w.shape)} in {groups} groups"
    size = output_size(x, w, options.stride, options.pads((kh, kw)), options.dilation)
    if min(size) < 1:
        return "the kernel is larger than the padded input"
    return None


def _refused_by_nhwconv(x: Tensor, w: Tensor, keywords: dict[str, Any]) -> str | None:
    try:
        _plan("forward", x, w, **keywords)
    except ValueError as error:
        return str(error)
    return None


def _plan(pass_: Pass, x: Tensor, w: Tensor, **options: Any) -> Plan:
    """Let nhwconv check and plan a problem; nothing is computed."""
    (n, c, h, width), (d, cg, kh, kw) = x.shape, w.shape
    return ops.plan(pass_, (n, h, width, c), (d, kh, kw, cg), dtype=str(x.dtype).removeprefix("torch."), **options)


def output_size(x: Tensor, w: Tensor, stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int]) -> Any:
    """Return (OH, OW), below 1 where the kernel is larger than the padded input."""
    top, bottom, left, right = pads
    height = x.shape[2] + top + bottom - dilation[0] * (w.shape[2] - 1) - 1
    width = x.shape[3] + left + right - dilation[1] * (w.shape[3] - 1) - 1
    return height // stride[0] + 1, width // stride[1] + 1


def gives_channels_last(x: Tensor, w: Tensor) -> bool:
    """Return whether PyTorch's convolution would have a result in channels_last."""
    return x.shape[0] > 0 and (_is_channels_last(x) or _is_channels_last(w))


def _is_channels_last(t: Tensor) -> bool:
    """Return what ``suggest_memory_format`` of PyTorch's C++ says: strides that could be either are contiguous.

    They need not be dense: what counts is that the channels' is the least, the columns' the next and so on.
    """
    sizes, strides = t.shape, t.stride()
    if strides[1] == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if sizes[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * (sizes[axis] if sizes[axis] > 1 else 1)
    return True


_calls: dict[Any, Call] = {}


def call_for(x: Tensor, w: Tensor, b: Tensor | None, options: Options) -> Call:
    """Return what is known of this convolution, remembered."""
    bias = None if b is None else (b.shape, b.dtype)
    key = options, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype, bias
    call = _calls.get(key)
    if call is None:
        if len(_calls) > 4096:
            _calls.clear()
        call = _calls[key] = Call(x, w, b, options)
    return call


# ---------------------------------------------------------------------------------------------- results

_LAST = torch.channels_last


def _converted(t: Tensor) -> Tensor:
    """Return a tensor in channels_last, which is nhwconv's NHWC: itself where it is."""
    return t if t.is_contiguous(memory_format=_LAST) else t.detach().contiguous(memory_format=_LAST)


def _room(t: Tensor) -> Tensor:
    """Return memory for a result: the result's own where that is channels_last."""
    return t if t.is_contiguous(memory_format=_LAST) else torch.empty_like(t, memory_format=_LAST)


def _array(t: Tensor) -> npt.NDArray[Any]:
    """Return the array that a tensor is: NHWC where it has four axes."""
    array: npt.NDArray[Any] = (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).numpy(force=True)
    return array


def _threads() -> int:
    """Return the threads that a call may use: PyTorch's setting, which is 1 in a DataLoader's worker, and Numba's."""
    return min(int(torch.get_num_threads()), machine.threads())


def _run(program: Program, named: dict[str, Tensor | None]) -> None:
    """Run a program on tensors by the names of their arrays."""
    if program.native:
        x, w, b, y, dy, dx, dw, db = (0 if t is None else t.data_ptr() for t in map(named.get, ARRAYS))
        executor.run(program, x, w, b, y, dy, dx, dw, db, executor.ADDRESSES)
    else:
        executor.run_calls(program, {name: _array(t) for name, t in named.items() if t is not None})


def forward(call: Call, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return the convolution, in PyTorch's memory format."""
    plan = call.forward
    y = torch.empty(call.shape, dtype=x.dtype, memory_format=_LAST if call.channels_last else torch.contiguous_format)
    if not plan.problem.n:
        return y
    room, x, w = _room(y), _converted(x), _converted(w)
    b = b if b is None or b.is_contiguous() else b.contiguous()
    program = plan.program(b is not None, threads=_threads())
    _run(program, {"x": x, "w": w, "b": b, "y": room})
    return y if room is y else y.copy_(room)


def backward(
    call: Call, x: Tensor, w: Tensor, dy: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias, each with its tensor's strides; None where not needed."""
    dx = torch.empty_like(x) if needs[0] else None
    dw = torch.empty_like(w) if needs[1] else None
    db = torch.empty(w.shape[0], dtype=w.dtype) if needs[2] else None
    plan = call.backward(tuple(name for name, needed in zip(ops.Gradients._fields, needs, strict=True) if needed))
    if not plan.problem.n:
        return dx, None if dw is None else dw.zero_(), None if db is None else db.zero_()
    to_dx, to_dw = (None if t is None else _room(t) for t in (dx, dw))
    x, w, dy = map(_converted, (x, w, dy))
    program = plan.program(False, _threads())
    _run(program, {"x": x, "w": w, "dy": dy, "dx": to_dx, "dw": to_dw, "db": db})
    for gradient, room in ((dx, to_dx), (dw, to_dw)):
        if gradient is not None and room is not None and room is not gradient:
            gradient.copy_(room)
    return dx, dw, db


# ----------------------------------------------------------------------------------- PyTorch's, instead


def pytorchs_forward(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Any, pads: Any, dilation: Any, groups: int
) -> Tensor:
    """Return PyTorch's own convolution; its padding may differ before and behind, as (top, bottom, left, right)."""
    top, bottom, left, right = pads
    if (top, left) == (bottom, right):
        return functional.conv2d(x, w, b, stride, (top, left), dilation, groups)
    return functional.conv2d(functional.pad(x, (left, right, top, bottom)), w, b, stride, 0, dilation, groups)


def pytorchs_backward(
    x: Tensor, w: Tensor, dy: Tensor, needs: Sequence[bool], stride: Any, pads: Any, dilation: Any, groups: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of PyTorch's own convolution."""
    top, bottom, left, right = pads
    padded = functional.pad(x, (left, right, top, bottom))
    dx, dw, db = torch.ops.aten.convolution_backward(
        dy, padded, w, [w.shape[0]], stride, [0, 0], dilation, False, [0, 0], groups, list(needs)
    )
    if dx is not None:
        dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    found = [
        gradient if gradient is None else torch.empty_like(like).copy_(gradient)
        for gradient, like in ((dx, x), (dw, w), (db, db))
    ]
    return found[0], found[1], found[2]
