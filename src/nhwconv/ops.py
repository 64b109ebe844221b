"""The public functions: check, plan, run. No arithmetic happens here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from . import arrays, bias, checks, planning, storage
from .planning import Plan
from .problem import PASSES, Pass
from .strategies import REGISTRY

__all__ = [
    "Gradients",
    "conv2d",
    "conv2d_backward",
    "conv2d_bias_grad",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "plan",
    "strategies",
    "warmup",
]

Array = npt.NDArray[Any]
Size = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] | str
Strategy = str | tuple[str, ...]


class Gradients(NamedTuple):
    """The gradients of one convolution; None where one was not asked for.

    Attributes
    ----------
    dx : ndarray or None
        Gradient of the input, in x's shape.
    dw : ndarray or None
        Gradient of the weights, in w's shape.
    db : ndarray or None
        Gradient of the bias, ``(D,)``; 0-d where w has no D axis.
    """

    dx: Array | None = None
    dw: Array | None = None
    db: Array | None = None


def conv2d(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    b: npt.ArrayLike | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: Strategy = "auto",
    out: Array | None = None,
) -> Array:
    """Convolve a batch of NHWC images with D kernels and add a bias.

    ``y[n, i, j, d] = b[d] + sum over h, v, c of x[n, i*stride + h*dilation - top, j*stride + v*dilation - left, c] *
    w[d, h, v, c]``: a cross-correlation, as every deep-learning library means by convolution.

    Parameters
    ----------
    x : array_like
        Images ``(N, H, W, C)``; also ``(H, W, C)`` and ``(H, W)``. float32, float64, float16 or bfloat16. An
        array that is not C-contiguous is copied.
    w : array_like
        Kernels ``(D, KH, KW, C/groups)``; with an x of three axes also ``(KH, KW, C)``, with one of two axes
        ``(KH, KW)``.
    b : array_like, optional
        Bias ``(D,)``; 0-d where w has no D axis.
    stride, dilation : int or pair
        For rows and columns.
    padding : int, pair, pair of pairs, "valid" or "same"
        Zeros around each image: all sides, (rows, columns), ((top, bottom), (left, right)), none, or as many as
        give ``ceil(size / stride)`` outputs (TensorFlow's rule).
    groups : int
        Output channels ``[g*D/groups, (g+1)*D/groups)`` see input channels ``[g*C/groups, (g+1)*C/groups)`` only.
        ``groups=C`` is a depthwise convolution.
    strategy : str or tuple of str
        A name from `strategies`, a tuple of names to choose from, or "auto".
    out : ndarray, optional
        Where the result goes: of its shape and dtype, C-contiguous, writable, apart from the inputs.

    Returns
    -------
    ndarray
        ``(N, OH, OW, D)``, or ``(OH, OW, D)`` and ``(OH, OW)`` for the smaller forms; `out` where it was given.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together, or the strategy cannot do the problem.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Notes
    -----
    The forward pass of the article whose gradient is `conv2d_weight_grad`; ``docs/derivation.md`` derives all of
    them.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> x = np.ones((8, 28, 28, 3), np.float32)
    >>> w = np.ones((16, 3, 3, 3), np.float32)
    >>> nc.conv2d(x, w, padding="same").shape
    (8, 28, 28, 16)
    >>> float(nc.conv2d(x, w)[0, 0, 0, 0])
    27.0
    """
    me = "conv2d"
    x, w = checks.as_input(me, "x", x), checks.as_input(me, "w", w)
    b = None if b is None else checks.as_bias(me, b, w)
    inputs = {"x": x, "w": w} if b is None else {"x": x, "w": w, "b": b}
    dtype = checks.common_dtype(me, **inputs)
    plan = _cached(_forward_plan, me, x.shape, w.shape, dtype, stride, padding, dilation, groups, strategy=strategy)
    problem = plan.problem
    if b is not None:
        checks.check_bias(me, b, problem, w.ndim)
    y = _result(me, "out", out, checks.output_shape(problem, x.ndim, w.ndim), dtype, inputs)
    if problem.n:
        storage.forward(
            plan,
            checks.prepare(x, dtype, problem.x_shape),
            checks.prepare(w, dtype, problem.w_shape),
            None if b is None else checks.prepare(b, dtype, (problem.d,)),
            y.reshape(problem.y_shape),
        )
    return y


def conv2d_weight_grad(
    x: npt.ArrayLike,
    dy: npt.ArrayLike,
    kernel_size: Size | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: Strategy = "auto",
    out: Array | None = None,
    accumulate: bool = False,
) -> Array:
    """Return the gradient of a convolution's weights.

    ``dw[:, h, v, :] = tensordot(dy, x[:, h:h+oh, v:v+ow, :], ([0, 1, 2], [0, 1, 2]))``: the article's fourth step;
    its first three are the smaller forms of `x` and `dy`.

    Parameters
    ----------
    x : array_like
        Images ``(N, H, W, C)``; also ``(H, W, C)`` and ``(H, W)``.
    dy : array_like
        Gradient of the output, the article's eta: ``(N, OH, OW, D)``; also ``(OH, OW, D)`` and ``(OH, OW)``.
    kernel_size : int or pair, optional
        (KH, KW). Inferred from `out`, or from the shapes where stride and dilation are 1 and padding is not "same".
    stride, padding, dilation, groups, strategy
        As in `conv2d`.
    out : ndarray, optional
        Where the result goes: of its shape and dtype, C-contiguous, writable, apart from the inputs.
    accumulate : bool
        Add to `out` instead of overwriting it.

    Returns
    -------
    ndarray
        ``(D, KH, KW, C/groups)``; ``(KH, KW, C)`` or ``(KH, KW)`` where dy has no D axis.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together, or the kernel's size is ambiguous.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> x = np.ones((8, 28, 28, 3), np.float32)
    >>> dy = np.ones((8, 26, 26, 16), np.float32)
    >>> nc.conv2d_weight_grad(x, dy).shape
    (16, 3, 3, 3)
    """
    me = "conv2d_weight_grad"
    x, dy = checks.as_input(me, "x", x), checks.as_input(me, "dy", dy)
    _check_accumulate(me, accumulate, out)
    dtype = checks.common_dtype(me, x=x, dy=dy)
    out_shape = out.shape if isinstance(out, np.ndarray) else None
    plan, shape = _cached(
        _weight_grad_plan, me, x.shape, dy.shape, dtype, stride, padding, dilation, groups, kernel_size, out_shape,
        strategy=strategy,
    )  # fmt: skip
    dw = _result(me, "out", out, shape, dtype, {"x": x, "dy": dy})
    _run_weight_grad(plan, x, dy, dw, accumulate)
    return dw


def conv2d_bias_grad(dy: npt.ArrayLike, *, out: Array | None = None, accumulate: bool = False) -> Array:
    """Return the gradient of a convolution's bias: ``db = dy.sum((0, 1, 2))``.

    Parameters
    ----------
    dy : array_like
        Gradient of the output ``(N, OH, OW, D)``; also ``(OH, OW, D)`` and ``(OH, OW)``.
    out : ndarray, optional
        Where the result goes: of its shape and dtype, C-contiguous, writable, apart from dy.
    accumulate : bool
        Add to `out` instead of overwriting it.

    Returns
    -------
    ndarray
        ``(D,)``; 0-d where dy has no D axis.

    Raises
    ------
    ValueError
        Where dy has another number of axes, or `out` does not fit.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> nc.conv2d_bias_grad(np.ones((2, 5, 5, 3)))
    array([50., 50., 50.])
    """
    me = "conv2d_bias_grad"
    dy = checks.as_input(me, "dy", dy)
    if dy.ndim not in (2, 3, 4):
        checks.fail(me, f"dy has shape {dy.shape}, expected (N, OH, OW, D), (OH, OW, D) or (OH, OW)")
    _check_accumulate(me, accumulate, out)
    dtype = checks.common_dtype(me, dy=dy)
    db = _result(me, "out", out, dy.shape[-1:] if dy.ndim > 2 else (), dtype, {"dy": dy})
    _run_bias_grad(dy, db, accumulate)
    return db


def conv2d_input_grad(
    dy: npt.ArrayLike,
    w: npt.ArrayLike,
    input_size: Size | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: Strategy = "auto",
    out: Array | None = None,
) -> Array:
    """Return the gradient of a convolution's input.

    ``dx[n, i, j, c]`` is the sum of ``dy[n, p, q, :] . w[:, h, v, c]`` over every output ``(p, q)`` and kernel
    position ``(h, v)`` that read pixel ``(i, j)``.

    Parameters
    ----------
    dy : array_like
        Gradient of the output ``(N, OH, OW, D)``; also ``(OH, OW, D)`` and ``(OH, OW)``.
    w : array_like
        Kernels ``(D, KH, KW, C/groups)``; with a dy of two axes ``(KH, KW, C)`` or ``(KH, KW)``.
    input_size : int or pair, optional
        (H, W). The smallest that gives this dy where it is not given.
    stride, padding, dilation, groups, strategy
        As in `conv2d`.
    out : ndarray, optional
        Where the result goes: of its shape and dtype, C-contiguous, writable, apart from the inputs.

    Returns
    -------
    ndarray
        ``(N, H, W, C)``, or ``(H, W, C)`` and ``(H, W)`` for the smaller forms.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> dy = np.ones((8, 26, 26, 16), np.float32)
    >>> w = np.ones((16, 3, 3, 3), np.float32)
    >>> nc.conv2d_input_grad(dy, w).shape
    (8, 28, 28, 3)
    """
    me = "conv2d_input_grad"
    dy, w = checks.as_input(me, "dy", dy), checks.as_input(me, "w", w)
    dtype = checks.common_dtype(me, dy=dy, w=w)
    if input_size is None and isinstance(out, np.ndarray) and out.ndim == {4: 4, 3: 3}.get(dy.ndim, w.ndim):
        input_size = out.shape[1:3] if out.ndim == 4 else out.shape[:2]
    plan, shape = _cached(
        _input_grad_plan, me, dy.shape, w.shape, dtype, stride, padding, dilation, groups, input_size,
        strategy=strategy,
    )  # fmt: skip
    dx = _result(me, "out", out, shape, dtype, {"dy": dy, "w": w})
    _run_input_grad(plan, dy, w, dx)
    return dx


def conv2d_backward(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    dy: npt.ArrayLike,
    *,
    needs: Iterable[str] = ("dx", "dw", "db"),
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: Strategy = "auto",
    out: Gradients | None = None,
    accumulate: bool = False,
) -> Gradients:
    """Return the gradients of a convolution's input, weights and bias together.

    Parameters
    ----------
    x, w : array_like
        What the forward pass was given, as in `conv2d`.
    dy : array_like
        Gradient of its output: ``(N, OH, OW, D)``, or as the smaller forms have it.
    needs : iterable of {"dx", "dw", "db"}
        Which gradients to compute.
    stride, padding, dilation, groups, strategy
        As in `conv2d`.
    out : Gradients, optional
        Where results go; None in it allocates.
    accumulate : bool
        Add dw and db to `out` instead of overwriting them. dx is always overwritten.

    Returns
    -------
    Gradients
        ``(dx, dw, db)``, None where not needed.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> x, w = np.ones((8, 28, 28, 3)), np.ones((16, 3, 3, 3))
    >>> g = nc.conv2d_backward(x, w, nc.conv2d(x, w), needs=("dw", "db"))
    >>> g.dx is None, g.dw.shape, g.db.shape
    (True, (16, 3, 3, 3), (16,))
    """
    me = "conv2d_backward"
    needs = _check_needs(me, needs)
    x, w, dy = checks.as_input(me, "x", x), checks.as_input(me, "w", w), checks.as_input(me, "dy", dy)
    out = _check_gradients(me, out, needs)
    for name in ("dw", "db"):
        if name in needs:
            _check_accumulate(me, accumulate, getattr(out, name), f"out.{name}")
    dtype = checks.common_dtype(me, x=x, w=w, dy=dy)
    arguments = (me, x.shape, w.shape, dtype, stride, padding, dilation, groups)
    # Both plans are made, or refused, before anything is written.
    dw_plan = _cached(_forward_plan, *arguments, strategy=strategy, pass_="weight_grad")
    dx_plan = _cached(_forward_plan, *arguments, strategy=strategy, pass_="input_grad") if "dx" in needs else dw_plan
    checks.check_dy(me, dy.shape, dw_plan.problem, x.ndim, w.ndim)
    inputs = {"x": x, "w": w, "dy": dy}
    shapes = {"dx": x.shape, "dw": w.shape, "db": (w.shape[0],) if w.ndim == 4 else ()}
    results: dict[str, Array] = {}
    for name in needs:
        given = getattr(out, name)
        results[name] = _result(me, f"out.{name}", given, shapes[name], dtype, inputs)
        if given is not None:
            inputs[f"out.{name}"] = given
    if "dw" in results:
        _run_weight_grad(dw_plan, x, dy, results["dw"], accumulate, results.get("db"))
    elif "db" in results:
        _run_bias_grad(dy, results["db"], accumulate)
    if "dx" in results:
        _run_input_grad(dx_plan, dy, w, results["dx"])
    return Gradients(**results)


def plan(
    pass_: str,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    *,
    dtype: npt.DTypeLike = np.float32,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: Strategy = "auto",
) -> Plan:
    """Return what would run for a pass of a problem, and why; nothing is computed.

    Parameters
    ----------
    pass_ : {"forward", "weight_grad", "input_grad"}
        The pass.
    x_shape, w_shape : tuple of int
        Shapes of x and w, in any form that `conv2d` takes.
    dtype : dtype_like
        Of the arrays.
    stride, padding, dilation, groups, strategy
        As in `conv2d`.

    Returns
    -------
    Plan
        With `.strategy`, `.reason` and `.workspace` (bytes); it prints well.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together, or no allowed strategy can do the problem.

    Examples
    --------
    >>> import nhwconv as nc
    >>> nc.plan("weight_grad", (8, 56, 56, 64), (64, 3, 3, 64), padding=1, strategy="tensordot").strategy
    'tensordot'
    """
    return plan_for("plan", pass_, x_shape, w_shape, dtype, stride, padding, dilation, groups, strategy)


def plan_for(
    me: str, pass_: Any, x_shape: Any, w_shape: Any, dtype: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    strategy: Any,
) -> Plan:  # fmt: skip
    """Check the arguments of `plan` and make it; `me` is the function whose arguments they are."""
    if pass_ not in PASSES:
        checks.fail(me, f"pass_ is {pass_!r}, expected one of {', '.join(PASSES)}")
    dtype = checks.as_dtype(me, dtype)
    shapes = checks.as_shape(me, "x_shape", x_shape), checks.as_shape(me, "w_shape", w_shape)
    return _cached(_forward_plan, me, *shapes, dtype, stride, padding, dilation, groups, strategy=strategy, pass_=pass_)


def strategies() -> tuple[str, ...]:
    """Return the names of all strategies, in the order in which they are considered.

    Examples
    --------
    >>> import nhwconv as nc
    >>> "tensordot" in nc.strategies()
    True
    """
    return tuple(REGISTRY)


def warmup(
    passes: Iterable[str] = PASSES,
    dtypes: Iterable[npt.DTypeLike] = (np.float32,),
    *,
    strategy: Strategy = "auto",
) -> None:
    """Compile, or load from the cache, what these passes need, so that no later call pays for it.

    Parameters
    ----------
    passes : iterable of {"forward", "weight_grad", "input_grad"}
        Which passes.
    dtypes : iterable of dtype_like
        For arrays of which dtypes.
    strategy : str or tuple of str
        As in `conv2d`.

    Raises
    ------
    ValueError, TypeError
        Where a pass, dtype or strategy is not known.

    Examples
    --------
    >>> import nhwconv as nc
    >>> nc.warmup(["forward"], strategy="tensordot")
    """
    me = "warmup"
    passes = (passes,) if isinstance(passes, str) else tuple(passes)
    dtypes = [
        checks.as_dtype(me, dtype) for dtype in ((dtypes,) if isinstance(dtypes, (str, type, np.dtype)) else dtypes)
    ]
    for pass_ in passes:
        if pass_ not in PASSES:
            checks.fail(me, f"passes has {pass_!r}, expected any of {', '.join(PASSES)}")
    planning.strategy_names(me, strategy)
    for dtype in dtypes:
        x, w = np.ones((2, 16, 16, 16), dtype), np.ones((16, 3, 3, 16), dtype)
        for pass_ in passes:
            if pass_ == "forward":
                conv2d(x, w, w[:, 0, 0, 0], padding=1, strategy=strategy)
            elif pass_ == "weight_grad":
                conv2d_weight_grad(x, x, 3, padding=1, strategy=strategy)
                conv2d_bias_grad(x)
            else:
                conv2d_input_grad(x, w, padding=1, strategy=strategy)


# ------------------------------------------------------------------------------------------------ plans

T = TypeVar("T")
_plans: dict[Any, Any] = {}


def _cached(make: Callable[..., T], me: str, first: Any, second: Any, dtype: Any, *options: Any, **more: Any) -> T:
    """Return ``make(me, first, second, dtype, *options, **more)``, remembered; `first` and `second` are shapes.

    Of the options the key has the text, because 1, True and 1.0 are equal but not equally welcome.
    """
    try:
        key = make, me, first, second, dtype, repr((options, more))
    except ValueError:  # an integer too long to be printed, which the checks refuse in words
        return make(me, first, second, dtype, *options, **more)
    plans = _plans
    found = plans.get(key)
    if found is None:
        if len(plans) > 4096:
            plans.clear()
        found = plans[key] = make(me, first, second, dtype, *options, **more)
    return cast("T", found)


def forget_plans() -> None:
    """Plan anew from now on: what was tuned has changed."""
    global _plans
    _plans = {}  # a new one: a plan that another thread is making goes to the old one


def _forward_plan(
    me: str, x: Any, w: Any, dtype: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    strategy: Any, pass_: Pass = "forward",
) -> Plan:  # fmt: skip
    form = checks.geometry(me, stride, padding, dilation, groups)
    return planning.make_plan(me, checks.problem_for(me, x, w, form, dtype), pass_, strategy)


def _weight_grad_plan(
    me: str, x: Any, dy: Any, dtype: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    kernel_size: Any, out_shape: Any, strategy: Any,
) -> tuple[Plan, tuple[int, ...]]:  # fmt: skip
    form = checks.geometry(me, stride, padding, dilation, groups)
    problem, shape = checks.weight_grad_problem(me, x, dy, kernel_size, out_shape, form, dtype)
    return planning.make_plan(me, problem, "weight_grad", strategy), shape


def _input_grad_plan(
    me: str, dy: Any, w: Any, dtype: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    input_size: Any, strategy: Any,
) -> tuple[Plan, tuple[int, ...]]:  # fmt: skip
    form = checks.geometry(me, stride, padding, dilation, groups)
    problem, shape = checks.input_grad_problem(me, dy, w, input_size, form, dtype)
    return planning.make_plan(me, problem, "input_grad", strategy), shape


# -------------------------------------------------------------------------------------- results and runs


def _result(
    me: str, name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: dict[str, Array]
) -> Array:
    if out is None:
        return arrays.empty(shape, dtype)
    checks.as_out(me, name, out, shape, dtype, inputs)
    return cast("Array", out)


def _check_accumulate(me: str, accumulate: object, out: object, name: str = "out") -> None:
    if not isinstance(accumulate, (bool, np.bool_)):
        checks.fail(me, f"accumulate is {accumulate!r}, expected True or False", TypeError)
    if accumulate and out is None:
        checks.fail(me, f"accumulate=True needs {name} to add to")


def _check_needs(me: str, needs: object) -> tuple[str, ...]:
    names = (needs,) if isinstance(needs, str) else tuple(needs) if isinstance(needs, Iterable) else (needs,)
    for name in names:
        if name not in Gradients._fields:
            checks.fail(me, f'needs has {name!r}, expected any of "dx", "dw", "db"')
    return tuple(name for name in Gradients._fields if name in names)


def _check_gradients(me: str, out: object, needs: tuple[str, ...]) -> Gradients:
    if out is None:
        return Gradients()
    if not isinstance(out, tuple) or len(out) != 3:
        checks.fail(me, f"out is of type {type(out).__name__}, expected Gradients(dx, dw, db)", TypeError)
    out = Gradients(*out)
    for name in Gradients._fields:
        if getattr(out, name) is not None and name not in needs:
            checks.fail(me, f"out.{name} is given, but {name} is not in needs")
    return out


def _run_weight_grad(plan: Plan, x: Array, dy: Array, dw: Array, accumulate: bool, db: Array | None = None) -> None:
    problem = plan.problem
    if problem.n:
        x4 = checks.prepare(x, problem.dtype, problem.x_shape)
        dy4 = checks.prepare(dy, problem.dtype, problem.y_shape)
        storage.weight_grad(plan, x4, dy4, dw.reshape(problem.w_shape), bool(accumulate),
                            None if db is None else db.reshape(problem.d))  # fmt: skip
    elif not accumulate:
        dw[...] = 0
        if db is not None:
            db[...] = 0


def _run_bias_grad(dy: Array, db: Array, accumulate: bool) -> None:
    d = db.size
    pixels = dy.size // d if d else 0
    if pixels:
        bias.bias_grad(checks.prepare(dy, db.dtype, (pixels, d)), db.reshape(d), bool(accumulate))
    elif not accumulate:
        db[...] = 0


def _run_input_grad(plan: Plan, dy: Array, w: Array, dx: Array) -> None:
    problem = plan.problem
    if problem.n:
        dy4 = checks.prepare(dy, problem.dtype, problem.y_shape)
        w4 = checks.prepare(w, problem.dtype, problem.w_shape)
        storage.input_grad(plan, dy4, w4, dx.reshape(problem.x_shape))
