"""What computes: tensors in, tensors out, without autograd. All contact to nhwconv's inside is in this file.

Whatever can be known of a convolution before its data is a `Call`, made once and found by shapes, strides, dtypes and
options. Results are PyTorch's own memory: nhwconv writes into tensors that are allocated here, at their addresses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.nn import functional

from .. import checks, ops
from ..checks import words_of
from ..layouts import Layout
from ..planning import Backward, Plan
from ..program import ARRAYS, Program
from ..runtime import executor, machine
from ._left import left_to_torch
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

    __slots__ = (
        "_forward", "_gradients", "_lies", "_make_backward", "empty", "geometry", "kind", "left", "options", "plan",
        "refused", "shape", "strides",
    )  # fmt: skip

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, options: Options) -> None:
        self.kind, self.options = options.kind, options
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
            #: Of the forward pass.
            self.plan: Plan = make(*arguments, options.strategies)
        #: Why PyTorch does this where gradients are recorded, if it does.
        self.left: str | None = None
        if options.strategy == "auto" and not self.kind.transposed:
            self.left = left_to_torch(self.plan.problem)
        self._make_backward = partial(make_backward, *arguments, strategy=options.strategies)
        n, *size, d = self.plan.result_shape
        y = room_for_result((n, d, *size), gives_channels_last(x, w), device="meta")
        #: The result's.
        self.shape, self.strides = y.shape, y.stride()
        #: Whether there are no images.
        self.empty = not n
        gradients = (torch.empty_like(t, device="meta") for t in (x, w))
        self._lies = tuple(map(_lie, (x, w, y, *gradients)))
        self._forward: _Way | None = None
        self._gradients: dict[tuple[tuple[bool, ...], str], _Way] = {}

    def forward(self, bias: bool) -> _Way:
        """Return how the forward pass runs."""
        if self._forward is None:
            x, w, y, _, _ = self._lies
            self._forward = _Way(self.plan, partial(self.plan.program, bias), (x, w, _LAST), (y,))
        return self._forward

    def backward(self, needs: tuple[bool, ...], dy: Tensor) -> _Way:
        """Return how these gradients are made of that of the result."""
        x, w, y, *gradients = self._lies
        lie = y if dy.stride() == self.strides else _lie(dy)
        found = self._gradients.get((needs, lie))
        if found is None:
            names = tuple(name for name, needed in zip(ops.Gradients._fields, needs, strict=True) if needed)
            with words_of(self.kind.name):
                plan = self._make_backward(needs=names)
            found = _Way(plan, partial(plan.program, False), (x, w, lie), (*gradients, _LAST))
            self._gradients[needs, lie] = found
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


def _forget() -> None:
    """Ask for plans anew: those that were made are forgotten."""
    global _calls
    _calls = {}


ops.forgetting.append(_forget)


def call_for(x: Tensor, w: Tensor, b: Tensor | None, options: Options) -> Call:
    """Return what is known of this convolution, remembered."""
    calls = _calls  # a plan that is being made while others are forgotten is forgotten with them
    bias = None if b is None else (b.shape, b.dtype)
    key = options, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype, bias
    call = calls.get(key)
    if call is None:
        if len(calls) > 4096:
            calls.clear()
        call = calls[key] = Call(x, w, b, options)
    return call


# ---------------------------------------------------------------------------------------------- results


def room_for_result(shape: Sequence[Any], channels_last: bool, **options: Any) -> Tensor:
    """Return memory for a result of this shape."""
    if not channels_last:
        return torch.empty(shape, **options)
    if len(shape) == 4:
        return torch.empty(shape, memory_format=torch.channels_last, **options)
    _, d, length = shape
    return torch.empty_strided(shape, (d * length, 1, d), **options)


#: How a tensor lies: dense with its channels last, as nhwconv has it, or first, as PyTorch has it; or in another way.
_LAST, _FIRST, _OTHER = "last", "first", "other"


def _lie(t: Tensor) -> str:
    """Return how a tensor lies; one of one pixel or one channel lies in both ways, and so as nhwconv has it."""
    if t.is_contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.transpose(1, 2).is_contiguous():
        return _LAST
    return _FIRST if t.is_contiguous() else _OTHER


def _converted(t: Tensor) -> Tensor:
    """Return a tensor with the same numbers that lies as nhwconv has it."""
    t = t.detach()
    if t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _room(t: Tensor) -> Tensor:
    """Return a tensor for the same numbers that lies so."""
    if t.dim() == 4:
        return torch.empty_like(t, memory_format=torch.channels_last)
    return torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _array(t: Tensor) -> npt.NDArray[Any]:
    """Return the array that a tensor is, with its channels last."""
    array: npt.NDArray[Any] = (t.movedim(1, -1) if t.dim() > 1 else t).numpy(force=True)
    return array


def _threads() -> int:
    """Return the threads that a call may use: PyTorch's setting, which is 1 in a DataLoader's worker, and Numba's."""
    return min(int(torch.get_num_threads()), machine.threads())


class _Way:
    """How a pass runs on tensors that lie in one way.

    Those with their channels last are read and written as they lie. What lies channels first is turned by the program's
    own steps, so that one entry into native code does it all; any other tensor is converted by PyTorch.
    """

    __slots__ = ("_direct", "_in_order", "_inputs", "_make", "_names", "_programs", "_serial", "_through", "_turned")

    def __init__(
        self, plan: Plan | Backward, make: Callable[..., Program], inputs: Sequence[str], results: Sequence[str]
    ) -> None:
        lies = *inputs, *results
        self._make, self._serial, self._inputs, self._names = make, plan.serial, len(inputs), plan.operands
        native = make(threads=1).native
        named = dict(zip(plan.operands, lies, strict=True))
        #: What the program turns, and which tensors PyTorch converts.
        self._turned = frozenset(name for name, lie in named.items() if native and lie == _FIRST)
        self._through = tuple(lie != _LAST and not (native and lie == _FIRST) for lie in lies)
        #: Whether there is nothing but to pass addresses.
        self._direct = native and not any(self._through)
        #: Brings addresses, with a zero and what says that they are some behind them, into the order of the executor.
        order = [plan.operands.index(name) if name in named else len(named) for name in ARRAYS]
        self._in_order = itemgetter(*order, len(named) + 1)
        self._programs: dict[int, Program] = {}

    def run(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Run the pass on its inputs and results."""
        if self._direct:
            self._run(tensors)
            return
        used = [
            t if t is None or not through else _converted(t) if i < self._inputs else _room(t)
            for i, (t, through) in enumerate(zip(tensors, self._through, strict=True))
        ]
        self._run(used)
        for t, room in zip(tensors[self._inputs :], used[self._inputs :], strict=True):
            if t is not None and room is not None and room is not t:
                t.copy_(room)

    def _run(self, tensors: Sequence[Tensor | None]) -> None:
        """Run the program on tensors that it can use."""
        threads = 1 if self._serial else _threads()
        program = self._programs.get(threads)
        if program is None:
            program = self._programs[threads] = self._make(threads=threads, first=self._turned)
        if program.native:
            try:
                addresses = [0 if t is None else t.data_ptr() for t in tensors]
            except RuntimeError:  # what outlives a transform of torch.func is a wrapper without memory
                addresses = [0 if t is None else unwrap_if_dead(t).data_ptr() for t in tensors]
            addresses += 0, executor.ADDRESSES
            executor.run(program, *self._in_order(addresses))
        else:
            named = zip(self._names, tensors, strict=True)
            executor.run_calls(program, {name: _array(t) for name, t in named if t is not None})


def forward(call: Call, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return the convolution, in PyTorch's memory format."""
    y = torch.empty_strided(call.shape, call.strides, dtype=x.dtype)
    if not call.empty:
        way = call.forward(b is not None)
        way.run((x, w, b if b is None or b.is_contiguous() else b.contiguous(), y))
    return y


def backward(
    call: Call, x: Tensor, w: Tensor, dy: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias, each with its tensor's strides; None where not needed."""
    dx = torch.empty_like(x) if needs[0] else None
    dw = torch.empty_like(w) if needs[1] else None
    db = torch.empty(call.shape[1], dtype=w.dtype) if needs[2] else None
    if call.empty:
        return dx, None if dw is None else dw.zero_(), None if db is None else db.zero_()
    call.backward(needs, dy).run((x, w, dy, dx, dw, db))
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
