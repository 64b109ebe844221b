"""JAX: the convolutions of `nhwconv`, NHWC and OHWI, under all of JAX's transformations, on the CPU.

In one dimension they are those of images of one row, and transposed ones are input gradients. The three passes are
primitives of JAX, each linear in each of its two arguments, and each one's derivatives are the other two. So all orders
of derivatives, forwards and backwards, come from one rule; a mapped axis joins an axis that the arrays have; and all
that is specific to a machine is one call (`_call`), which XLA makes with its own buffers.
"""

from __future__ import annotations

import ast
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numba
import numpy as np
import numpy.typing as npt
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from . import checks, one_dimension, ops, transposed, xla
from .checks import Options, no_samples, stand_in, words_of
from .layouts import WEIGHTS, Layout
from .ops import Padding, Size, StrategyName
from .problem import ConvProblem
from .runtime import machine

__all__ = ["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"]

Array = npt.NDArray[Any]

#: Axes of the arrays of each kind, where g counts groups and the axis behind it one group's channels.
_AXES = {"x": "nhwgc", "w": "gdklc", "y": "nopgd"}


class _Options(NamedTuple):
    """What is known of a call before its arrays: plain values, so that equal calls are one program to JAX."""

    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int
    strategy: Any
    threads: int


class _Pass(NamedTuple):
    """One of the three passes: nhwconv's function, the kinds of its arguments and result, and its sizes' name."""

    function: str
    first: str
    second: str
    result: str
    size: str


_FORWARD = _Pass("conv2d", "x", "w", "y", "")
_INPUT_GRAD = _Pass("conv2d_input_grad", "y", "w", "x", "input_size")
_WEIGHT_GRAD = _Pass("conv2d_weight_grad", "x", "y", "w", "kernel_size")
_PASSES = (_FORWARD, _INPUT_GRAD, _WEIGHT_GRAD)


def conv2d(
    x: npt.ArrayLike | jax.Array,
    w: npt.ArrayLike | jax.Array,
    b: npt.ArrayLike | jax.Array | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
    w_layout: str = "OHWI",
) -> jax.Array:
    """Convolve a batch of NHWC images with D kernels and add a bias, as a JAX operation with derivatives.

    Differentiable in both modes, any number of times. `vmap` over x, w or both stays one call. Under `jit`, images that
    are sharded over N stay where they are.

    Parameters
    ----------
    x : array_like
        Images ``(N, H, W, C)``. N may be a symbolic size of `jax.export`.
    w : array_like
        Kernels ``(D, KH, KW, C/groups)``, or as `w_layout` says.
    b : array_like, optional
        Bias ``(D,)``.
    stride, padding, dilation, groups, strategy
        As in `nhwconv.conv2d`; static under `jit`. "SAME" and "VALID" are taken as well.
    w_layout : {"OHWI", "HWIO"}
        "HWIO" takes kernels ``(KH, KW, C/groups, D)``, as Flax has them. They are transposed.

    Returns
    -------
    jax.Array
        ``(N, OH, OW, D)``.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv2d`, while JAX traces.

    Notes
    -----
    Calls use as many threads as `numba.set_num_threads` allows the thread that traces them: a function under `jit`
    keeps the number that it was traced with.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, nhwconv.jax
    >>> x, w = jnp.ones((8, 28, 28, 3)), jnp.ones((16, 3, 3, 3))
    >>> nhwconv.jax.conv2d(x, w).shape
    (8, 26, 26, 16)
    >>> jax.grad(lambda w: nhwconv.jax.conv2d(x, w).sum())(w).shape
    (16, 3, 3, 3)
    """
    return _convolve(ops, "conv2d", x, w, b, stride, padding, dilation, groups, strategy, w_layout)


def conv1d(
    x: npt.ArrayLike | jax.Array,
    w: npt.ArrayLike | jax.Array,
    b: npt.ArrayLike | jax.Array | None = None,
    *,
    stride: int = 1,
    padding: one_dimension.Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
    w_layout: str = "OHWI",
) -> jax.Array:
    """Convolve a batch of sequences with D kernels and add a bias: `conv2d` of images of one row.

    Parameters
    ----------
    x : array_like
        Sequences ``(N, L, C)``.
    w : array_like
        Kernels ``(D, K, C/groups)``, or as `w_layout` says.
    b : array_like, optional
        Bias ``(D,)``.
    stride, padding, dilation, groups, strategy
        As in `nhwconv.conv1d`; static under `jit`. "SAME" and "VALID" are taken as well.
    w_layout : {"OHWI", "HWIO"}
        "HWIO" takes kernels ``(K, C/groups, D)``, as Flax has them.

    Returns
    -------
    jax.Array
        ``(N, OL, D)``.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv1d`, while JAX traces.

    Examples
    --------
    >>> import jax.numpy as jnp, nhwconv.jax
    >>> nhwconv.jax.conv1d(jnp.ones((8, 100, 3)), jnp.ones((16, 5, 3)), padding="same").shape
    (8, 100, 16)
    """
    return _convolve(one_dimension, "conv1d", x, w, b, stride, padding, dilation, groups, strategy, w_layout)


def conv_transpose2d(
    x: npt.ArrayLike | jax.Array,
    w: npt.ArrayLike | jax.Array,
    b: npt.ArrayLike | jax.Array | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size | None = None,
    dilation: Size = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
    w_layout: str = "OHWI",
) -> jax.Array:
    """Convolve a batch of images by the transpose of a convolution: its input gradient, with a bias.

    `jax.lax.conv_transpose` computes the same with ``transpose_kernel=True``.

    Parameters
    ----------
    x : array_like
        Images ``(N, H, W, C)``.
    w : array_like
        Kernels ``(C, KH, KW, D/groups)``, those of the convolution whose transpose this is, or as `w_layout` says.
    b : array_like, optional
        Bias ``(D,)``.
    stride, padding, output_padding, dilation, groups, strategy
        As in `nhwconv.conv_transpose2d`; static under `jit`. "SAME" and "VALID" are taken as well.
    w_layout : {"OHWI", "HWIO"}
        "HWIO" takes kernels ``(KH, KW, D/groups, C)``, as Keras has them.

    Returns
    -------
    jax.Array
        ``(N, OH, OW, D)``.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv_transpose2d`, while JAX traces.

    Examples
    --------
    >>> import jax.numpy as jnp, nhwconv.jax
    >>> nhwconv.jax.conv_transpose2d(jnp.ones((8, 14, 14, 32)), jnp.ones((32, 2, 2, 16)), stride=2).shape
    (8, 28, 28, 16)
    """
    return _convolve(
        transposed, "conv_transpose2d", x, w, b, stride, padding, dilation, groups, strategy, w_layout, output_padding
    )


def conv_transpose1d(
    x: npt.ArrayLike | jax.Array,
    w: npt.ArrayLike | jax.Array,
    b: npt.ArrayLike | jax.Array | None = None,
    *,
    stride: int = 1,
    padding: one_dimension.Padding = 0,
    output_padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
    w_layout: str = "OHWI",
) -> jax.Array:
    """Convolve a batch of sequences by the transpose of a convolution: `conv_transpose2d` in one dimension.

    Parameters
    ----------
    x : array_like
        Sequences ``(N, L, C)``.
    w : array_like
        Kernels ``(C, K, D/groups)``, or as `w_layout` says.
    b : array_like, optional
        Bias ``(D,)``.
    stride, padding, output_padding, dilation, groups, strategy
        As in `nhwconv.conv_transpose1d`; static under `jit`. "SAME" and "VALID" are taken as well.
    w_layout : {"OHWI", "HWIO"}
        "HWIO" takes kernels ``(K, D/groups, C)``.

    Returns
    -------
    jax.Array
        ``(N, OL, D)``.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv_transpose1d`, while JAX traces.

    Examples
    --------
    >>> import jax.numpy as jnp, nhwconv.jax
    >>> nhwconv.jax.conv_transpose1d(jnp.ones((8, 100, 16)), jnp.ones((16, 4, 3)), stride=2, padding=1).shape
    (8, 200, 3)
    """
    return _convolve(
        one_dimension, "conv_transpose1d", x, w, b, stride, padding, dilation, groups, strategy, w_layout,
        output_padding,
    )  # fmt: skip


def _convolve(
    module: Any, name: str, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    strategy: Any, w_layout: Any, output_padding: Any = None,
) -> jax.Array:  # fmt: skip
    """Do what the function of this name does, with JAX's operations."""
    is_transposed, dimensions = "transpose" in name, int(name[-2])
    x, w = jnp.asarray(x), jnp.asarray(w)
    b = None if b is None else jnp.asarray(b)
    if isinstance(padding, str) and padding in ("SAME", "VALID"):
        padding = padding.lower()
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if is_transposed:
        options["output_padding"] = output_padding
    with words_of(name):
        w = _as_nhwconv_has_it(x, w, w_layout, Layout("NHWC", "OHWI", dimensions), is_transposed)
        # All is checked on a batch of no samples; what is refused is refused here.
        given = no_samples(x), stand_in(w), None if b is None else stand_in(b)
        like = getattr(module, name)(*given, **options, strategy=strategy)
        checked = Options.of(**options, layout=Layout("NHWC", "OHWI", dimensions))
        make = checks.transposed_problem if is_transposed else checks.forward_problem
        problem, _ = make(given[0].shape, w.shape, checked, like.dtype)
    x, w = (a.astype(like.dtype) if dimensions == 2 else a.astype(like.dtype)[:, None] for a in (x, w))
    y = _transposed(x, w, problem, strategy) if is_transposed else _forward(x, w, problem, strategy)
    y = y if dimensions == 2 else y[:, 0]
    return y if b is None else y + b.astype(like.dtype)


def _as_nhwconv_has_it(x: Any, w: Any, w_layout: Any, layout: Layout, is_transposed: bool) -> Any:
    """Return weights as OHWI has them, where they and x have an axis for everything."""
    if w_layout not in WEIGHTS:
        checks.fail(f"w_layout is {w_layout!r}, expected {' or '.join(map(repr, WEIGHTS))}")
    if layout.rank(x.shape) != 4 or layout.rank(w.shape) != 4:
        letters = layout._replace(weights=w_layout).letters("w", 4, is_transposed)
        checks.fail(f"x has shape {x.shape} and w {w.shape}, expected {layout.letters('x', 4)} and {letters}")
    if any(map(jax.export.is_symbolic_dim, (*x.shape[1:], *w.shape))):
        checks.fail(f"x has shape {x.shape} and w {w.shape}; only the number of samples may be symbolic")
    return jnp.moveaxis(w, -1, 0) if w_layout == "HWIO" else w


def _forward(x: Any, w: Any, problem: ConvProblem, strategy: Any) -> Any:
    return _bind(_FORWARD, x, w, _options(problem, problem.padding, strategy), (problem.oh, problem.ow))


def _transposed(x: Any, w: Any, problem: ConvProblem, strategy: Any) -> Any:
    """Return an input gradient. What the convolution does not read at the end of its input is zero."""
    unread = [max(0, -after) for _, after in problem.padding]
    rows, columns = ((before, max(0, after)) for before, after in problem.padding)
    size = problem.h - unread[0], problem.w - unread[1]
    y = _bind(_INPUT_GRAD, x, w, _options(problem, (rows, columns), strategy), size)
    return jnp.pad(y, ((0, 0), (0, unread[0]), (0, unread[1]), (0, 0))) if any(unread) else y


def _options(problem: ConvProblem, padding: Any, strategy: Any) -> _Options:
    """Return what all passes of a call are told."""
    names = strategy if isinstance(strategy, str) else tuple(strategy)
    return _Options(problem.stride, padding, problem.dilation, problem.groups, names, _thread_limit())


def _thread_limit() -> int:
    """Return how many threads Numba's setting allows; 0 for all, also those of another machine's."""
    threads = machine.threads()
    return 0 if threads == numba.config.NUMBA_NUM_THREADS else threads  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------- primitives


def _bind(this: _Pass, first: Any, second: Any, options: _Options, size: tuple[int, int]) -> Any:
    """Apply a pass; `size` is the rows and columns of its result.

    Within `shard_map` both arguments must vary over the same axes of the mesh, as the result does.
    """
    axes = _varying(first) | _varying(second)
    first, second = (
        jax.lax.pcast(array, tuple(sorted(axes - _varying(array))), to="varying") if axes - _varying(array) else array
        for array in (first, second)
    )
    return _PRIMITIVES[this].bind(first, second, options=options, size=size)


def _varying(array: Any) -> frozenset[str]:
    kind = jax.typeof(array)  # JAX 0.10 renamed the attribute
    return frozenset(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)


def _shape(this: _Pass, first: Any, second: Any, options: _Options, size: tuple[int, int]) -> tuple[Any, ...]:
    match this.result:
        case "y":
            return first.shape[0], *size, second.shape[0]
        case "x":
            return first.shape[0], *size, second.shape[3] * options.groups
        case _:
            return second.shape[3], *size, first.shape[3] // options.groups


@words_of("conv2d")
def _abstract(this: _Pass, first: Any, second: Any, *, options: _Options, size: tuple[int, int]) -> Any:
    """Return the type of a result: its shape, and where it lies."""
    samples = first.sharding.spec[0]
    for kind, array in ((this.first, first), (this.second, second)):
        expected = (None if kind == "w" else samples, None, None, None)
        if tuple(array.sharding.spec) != expected:
            checks.fail(
                f"an array is sharded as {array.sharding.spec}, expected samples alone, and alike; use jax.reshard",
            )
    spec = PartitionSpec(None if this.result == "w" else samples, None, None, None)
    return first.update(
        shape=_shape(this, first, second, options, size), weak_type=False, sharding=first.sharding.update(spec=spec)
    )


@partial(jax.jit, static_argnums=(0, 3, 4))
def _compiled(this: _Pass, first: Any, second: Any, options: _Options, size: tuple[int, int]) -> Any:
    return _PRIMITIVES[this].bind(first, second, options=options, size=size)


def _eager(this: _Pass, first: Any, second: Any, *, options: _Options, size: tuple[int, int]) -> Any:
    with jax.disable_jit(False):
        return _compiled(this, first, second, options, size)


def _rows_and_columns(argument: Any) -> tuple[int, int]:
    rows, columns = argument.aval.shape[1:3]
    return rows, columns


def _transpose(
    of: str, this: _Pass, cotangent: Any, first: Any, second: Any, *, options: _Options, size: tuple[int, int]
) -> Any:
    """Return the cotangent of a pass's argument of this kind: the pass whose result is of that kind has the others."""
    (that,) = (p for p in _PASSES if p.result == of)
    arrays = {this.first: first, this.second: second, this.result: cotangent}
    return _bind(that, arrays[that.first], arrays[that.second], options, _rows_and_columns(arrays[of]))


# ------------------------------------------------------------------------------------------ mapped axes
# A mapped axis, b, is more samples, output channels or input channels where only one argument has it: the axis that
# this argument and the result have and the other argument hasn't. Where both have it, it is more groups.


def _batch(this: _Pass, arrays: Any, mapped: Any, *, options: _Options, size: tuple[int, int]) -> Any:
    kinds = this.first, this.second
    shared = set(_AXES[this.result])
    match mapped:
        case (int(), int()):
            joined = "g"
        case (int(), _):
            (joined,) = shared & set(_AXES[this.first]) - set(_AXES[this.second])
        case _:
            (joined,) = shared & set(_AXES[this.second]) - set(_AXES[this.first])
    (count,) = {array.shape[axis] for array, axis in zip(arrays, mapped, strict=True) if axis is not None}
    first, second = (
        array if axis is None else _join(jnp.moveaxis(array, axis, 0), _AXES[kind], joined, options.groups)
        for array, axis, kind in zip(arrays, mapped, kinds, strict=True)
    )
    groups = options.groups * (count if joined == "g" else 1)
    y = _bind(this, first, second, options._replace(groups=groups), size)
    return _part(y, _AXES[this.result], joined, options.groups, count), 0


def _join(array: Any, axes: str, joined: str, groups: int) -> Any:
    """Return an array of axis b and four others with b merged into one of these."""
    front, *four = array.shape
    five = _split(four, axes, groups)
    at = axes.index(joined)
    array = jnp.moveaxis(array.reshape(front, *five), 0, at)
    five[at] *= front
    return array.reshape(_merged(five, axes))


def _part(array: Any, axes: str, joined: str, groups: int, count: int) -> Any:
    """Undo `_join`."""
    five = _split(array.shape, axes, groups * (count if joined == "g" else 1))
    at = axes.index(joined)
    five[at] //= count
    array = jnp.moveaxis(array.reshape(*five[:at], count, *five[at:]), at, 0)
    return array.reshape(count, *_merged(five, axes))


def _split(four: Any, axes: str, groups: int) -> list[Any]:
    """Return a shape with the axis of groups apart."""
    at = axes.index("g")
    return [*four[:at], groups, four[at] // groups, *four[at + 1 :]]


def _merged(five: list[Any], axes: str) -> tuple[Any, ...]:
    at = axes.index("g")
    return (*five[:at], five[at] * five[at + 1], *five[at + 2 :])


# ------------------------------------------------------------------------------------------ many devices
# XLA's partitioner asks how a pass may be cut. Samples may: they are independent in the output and in the input's
# gradient, and the weights' gradient is a sum over them. Whatever else is sharded is gathered.


def _lower(cut: Any, context: Any, first: Any, second: Any, *, options: _Options, size: tuple[int, int]) -> Any:
    axes = context.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext) and set(axes.manual_axes) != set(axes.mesh.axis_names):
        message = "conv2d within shard_map needs all axes of the mesh to be manual: leave out shard_map's axis_names"
        raise NotImplementedError(message)  # XLA's partitioner would crash
    lower = mlir.lower_fun(lambda first, second: cut(first, second, options, size), multiple_results=False)
    return lower(context, first, second)


def _sharding_rule(this: _Pass, *_: Any) -> Any:
    names = {"x": "n h w c", "w": "d k l e", "y": "n o p f"}
    rule = f"{names[this.first]}, {names[this.second]} -> {names[this.result]}"
    summed = ("n",) if this.result == "w" else ()
    whole = dict.fromkeys(name for name in rule if name.isalpha() and name != "n")  # each once, in the rule's order
    return rule, {"need_replication_factors": tuple(whole), "reduction_factors": summed}


def _partition(
    this: _Pass, options: _Options, size: tuple[int, int], mesh: Any, arguments: Any, result: Any
) -> tuple[Any, Any, NamedSharding, tuple[NamedSharding, ...]]:
    axes = arguments[0].sharding.spec[0]
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    if arguments[0].shape[0] % int(np.prod([mesh.shape[name] for name in names])):
        names = ()  # XLA would fill up the last part with anything
    samples, whole = (NamedSharding(mesh, PartitionSpec(first, None, None, None)) for first in (names or None, None))

    def part(first: Any, second: Any) -> Any:
        local = _call(this, first, second, options, size)
        return jax.lax.psum(local, names) if this.result == "w" and names else local

    first, second, to = (whole if kind == "w" else samples for kind in (this.first, this.second, this.result))
    return mesh, part, to, (first, second)


# ------------------------------------------------------------------------------------------------ calls

_TARGET = "nhwconv"


def _call(this: _Pass, first: Any, second: Any, options: _Options, size: tuple[int, int]) -> Any:
    """Call a function of nhwconv from within XLA's program."""
    arguments = options._asdict()
    if this.size:
        arguments[this.size] = size
    result = jax.ShapeDtypeStruct(_shape(this, first, second, options, size), first.dtype)
    # Text, not a number of something here: XLA may keep its program for other processes.
    return jax.ffi.ffi_call(_TARGET, result)(first, second, call=repr((this.function, arguments)))


@lru_cache(maxsize=1024)
def _decode(call: str) -> Any:
    return ast.literal_eval(call)


def _on_host(call: str, arguments: list[Array], results: list[Array]) -> None:
    """Do a call: what XLA's program says of it, what it reads and what it writes."""
    name, options = _decode(call)
    options = dict(options)
    threads = options.pop("threads") or machine.threads()
    with machine.at_most_threads(threads):
        getattr(ops, name)(*arguments, **options, out=results[0])


jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(xla.handler(_on_host, jax.ffi.include_dir())), platform="cpu")


def _primitive(this: _Pass) -> Primitive:
    """Make a pass known to JAX."""
    primitive = Primitive(f"nhwconv_{this.function}")
    primitive.def_impl(partial(_eager, this))
    primitive.def_abstract_eval(partial(_abstract, this))
    ad.defbilinear(primitive, *(partial(_transpose, of, this) for of in (this.first, this.second)))
    batching.primitive_batchers[primitive] = partial(_batch, this)

    @partial(custom_partitioning, static_argnums=(2, 3))
    def cut(first: Any, second: Any, options: _Options, size: tuple[int, int]) -> Any:
        return _call(this, first, second, options, size)

    cut.def_partition(partial(_partition, this), sharding_rule=partial(_sharding_rule, this))
    mlir.register_lowering(primitive, partial(_lower, cut), platform="cpu")
    # A partitioner must know the devices. JAX has no public name for this.
    prim_requires_devices_during_lowering.add(primitive)
    return primitive


_PRIMITIVES = {this: _primitive(this) for this in _PASSES}
