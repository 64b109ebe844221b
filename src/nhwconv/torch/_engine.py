"""What computes: tensors in, tensors out, without autograd. All contact to nhwconv's inside is in this file.

Whatever can be known of a convolution before its data is a `Call`, made once and found by shapes, strides, dtypes and
options. Results are PyTorch's own memory: nhwconv writes into tensors that are allocated here, through NumPy's views.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from .. import checks, ops
from ..checks import words_of
from ..layouts import Layout
from ..planning import Backward, Plan
from ..program import ARRAYS, Program
from ..runtime import executor, machine
from ._options import Options

__all__ = [
    "Call",
    "backward",
    "call_for",
    "forward",
    "gives_channels_last",
    "pytorchs_backward",
    "pytorchs_forward",
    "refusal",
    "room_for_result",
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


class Call:
    """What is known of a convolution before its data."""

    __slots__ = ("_backwards", "_make_backward", "channels_last", "forward", "geometry", "kind", "refused", "shape")

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, options: Options) -> None:
        self.kind = options.kind
        #: Why nhwconv doesn't do this, where it doesn't.
        self.refused: str | None = refusal(x, w, b, options)
        if self.refused is not None:
            return
        #: The operators' last arguments.
        self.geometry = options.geometry(w.shape[2:])
        make, make_backward = _PLANS[self.kind.transposed]
        dtype = np.dtype(str(x.dtype).removeprefix("torch."))
        try:
            with words_of(self.kind.name):
                arguments = _shape(x), _shape(w), dtype, _checked(options, w)
                make(*arguments, "auto")
        except ValueError as error:
            self.refused = str(error)
            return
        with words_of(self.kind.name):  # an error here is the strategy's, and the caller's
            self.forward: Plan = make(*arguments, options.strategies)
        self._make_backward = partial(make_backward, *arguments, strategy=options.strategies)
        self._backwards: dict[tuple[str, ...], Backward] = {}
        n, *size, d = self.forward.result_shape
        #: The result's.
        self.shape = n, d, *size
        #: Whether the result has its channels last.
        self.channels_last = gives_channels_last(x, w)

    def backward(self, needs: tuple[str, ...]) -> Backward:
        """Return the plan of these gradients."""
        found = self._backwards.get(needs)
        if found is None:
            with words_of(self.kind.name):
                found = self._backwards[needs] = self._make_backward(needs=needs)
        return found


#: What makes the plans of a convolution, and of a transposed one: of the forward pass, and of all gradients.
_PLANS: tuple[tuple[Any, Any], ...] = (
    (ops.forward_plan, ops.backward_plan),
    (ops.transposed_plan, ops.transposed_backward_plan),
)


def _shape(t: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape with its channels last."""
    first, channels, *size = t.shape
    return first, *size, channels


def _checked(options: Options, w: Tensor) -> checks.Options:
    """Return the options as nhwconv has them."""
    pads: Any = options.pads(w.shape[2:])
    if options.kind.dimensions == 2:
        pads = pads[:2], pads[2:]
    more = options.output_padding if options.kind.transposed else None
    layout = Layout(dimensions=options.kind.dimensions)
    return checks.Options.of(options.stride, pads, options.dilation, options.groups, layout, more)


def refusal(x: Any, w: Any, b: Any, options: Options) -> str | None:
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
    rank = options.kind.dimensions + 2
    if x.dim() != rank or w.dim() != rank or min(w.shape) < 1:
        return f"input has {x.dim()} axes and weight the shape {tuple(w.shape)}"
    groups = options.groups
    c, d = options.kind.channels(w.shape, groups)
    if x.shape[1] != c or w.shape[0] % groups or (b is not None and tuple(b.shape) != (d,)):
        return f"shapes do not go together: {tuple(x.shape)} and {tuple(w.shape)} in {groups} groups"
    if min(options.output_size(x.shape[2:], w.shape[2:])) < 1:
        return "the kernel is larger than the padded input"
    return None


def gives_channels_last(x: Tensor, w: Tensor) -> bool:
    """Return whether PyTorch's convolution would have a result with its channels last.

    In one dimension, where it has no name for that, only the weights decide.
    """
    if x.dim() == 3:
        return x.shape[0] > 0 and _is_channels_last(w.unsqueeze(2))
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


def room_for_result(shape: Sequence[Any], channels_last: bool, **options: Any) -> Tensor:
    """Return memory for a result of this shape."""
    if not channels_last:
        return torch.empty(shape, **options)
    if len(shape) == 4:
        return torch.empty(shape, memory_format=_LAST, **options)
    _, d, length = shape
    return torch.empty_strided(shape, (d * length, 1, d), **options)


def _flat(t: Tensor) -> Tensor:
    """Return a tensor of two dimensions, of one row where it has one."""
    return t if t.dim() != 3 else t.unsqueeze(2)


def _converted(t: Tensor) -> Tensor:
    """Return a tensor in channels_last, which is nhwconv's NHWC: itself where it is."""
    t = _flat(t)
    return t if t.is_contiguous(memory_format=_LAST) else t.detach().contiguous(memory_format=_LAST)


def _room(t: Tensor) -> Tensor:
    """Return memory for a result: the result's own where that is channels_last."""
    t = _flat(t)
    return t if t.is_contiguous(memory_format=_LAST) else torch.empty_like(t, memory_format=_LAST)


def _fill(t: Tensor | None, room: Tensor | None) -> None:
    """Copy a result from where it was written, if that is not its own memory."""
    if t is not None and room is not None and room.data_ptr() != t.data_ptr():
        _flat(t).copy_(room)


def _array(t: Tensor) -> npt.NDArray[Any]:
    """Return the array that a tensor is: NHWC where it has four axes."""
    array: npt.NDArray[Any] = (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).numpy(force=True)
    return array


def _threads() -> int:
    """Return the threads that a call may use: PyTorch's setting, which is 1 in a DataLoader's worker, and Numba's."""
    return min(int(torch.get_num_threads()), machine.threads())


def _run(program: Program, names: Sequence[str], *tensors: Tensor | None) -> None:
    """Run a program on tensors, by the names that its arrays have."""
    named = dict(zip(names, tensors, strict=True))
    if program.native:
        x, w, b, y, dy, dx, dw, db = (0 if t is None else t.data_ptr() for t in map(named.get, ARRAYS))
        executor.run(program, x, w, b, y, dy, dx, dw, db, executor.ADDRESSES)
    else:
        executor.run_calls(program, {name: _array(t) for name, t in named.items() if t is not None})


def forward(call: Call, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return the convolution, in PyTorch's memory format."""
    plan = call.forward
    y = room_for_result(call.shape, call.channels_last, dtype=x.dtype)
    if not plan.problem.n:
        return y
    room, b = _room(y), b if b is None or b.is_contiguous() else b.contiguous()
    _run(plan.program(b is not None, threads=_threads()), plan.operands, _converted(x), _converted(w), b, room)
    _fill(y, room)
    return y


def backward(
    call: Call, x: Tensor, w: Tensor, dy: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias, each with its tensor's strides; None where not needed."""
    dx = torch.empty_like(x) if needs[0] else None
    dw = torch.empty_like(w) if needs[1] else None
    db = torch.empty(call.shape[1], dtype=w.dtype) if needs[2] else None
    plan = call.backward(tuple(name for name, needed in zip(ops.Gradients._fields, needs, strict=True) if needed))
    if not plan.problem.n:
        return dx, None if dw is None else dw.zero_(), None if db is None else db.zero_()
    to_dx, to_dw = (None if t is None else _room(t) for t in (dx, dw))
    _run(plan.program(False, _threads()), plan.operands, *map(_converted, (x, w, dy)), to_dx, to_dw, db)
    _fill(dx, to_dx)
    _fill(dw, to_dw)
    return dx, dw, db


# ----------------------------------------------------------------------------------- PyTorch's, instead


def _around(t: Tensor, pads: Sequence[int]) -> Tensor:
    """Return a tensor with so many zeros around it, before and behind in each dimension."""
    return functional.pad(t, [n for i in range(len(pads) - 2, -1, -2) for n in pads[i : i + 2]])


def _within(t: Tensor, pads: Sequence[int]) -> Tensor:
    """Undo that."""
    for i in range(len(pads) // 2):
        before, behind = pads[2 * i : 2 * i + 2]
        t = t.narrow(2 + i, before, t.shape[2 + i] - before - behind)
    return t


def pytorchs_forward(x: Tensor, w: Tensor, b: Tensor | None, options: Options) -> Tensor:
    """Return PyTorch's own convolution; its padding may differ before and behind."""
    kind, pads = options.kind, options.pads(w.shape[2:])
    given = {name: getattr(options, name) for name in kind.arguments} | {"padding": pads[::2]}
    if pads[::2] == pads[1::2]:
        return kind.own(x, w, b, **given)
    given["padding"] = 0
    return _within(kind.own(x, w, b, **given), pads) if kind.transposed else kind.own(_around(x, pads), w, b, **given)


def pytorchs_backward(
    x: Tensor, w: Tensor, dy: Tensor, needs: Sequence[bool], options: Options
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of PyTorch's own convolution."""
    kind, pads = options.kind, options.pads(w.shape[2:])
    around = x if kind.transposed else _around(x, pads)
    dx, dw, db = torch.ops.aten.convolution_backward(
        _around(dy, pads) if kind.transposed else dy, around, w, [dy.shape[1]], options.stride,
        [0] * kind.dimensions, options.dilation, kind.transposed, options.output_padding, options.groups, list(needs),
    )  # fmt: skip
    if dx is not None and not kind.transposed:
        dx = _within(dx, pads)
    found = [
        gradient if gradient is None else torch.empty_like(like).copy_(gradient)
        for gradient, like in ((dx, x), (dw, w), (db, db))
    ]
    return found[0], found[1], found[2]
