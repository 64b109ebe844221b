"""The public functions: check, plan, run. No arithmetic happens here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from . import checks, planning
from .checks import Options, words_of
from .layouts import PLAIN, Layout
from .planning import Backward, Plan
from .problem import PASSES, Pass
from .program import Program
from .results import Gradients, check_gradients, check_needs, run_gradients
from .runtime import arrays
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
_NHWC = "NHWC"
Size = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] | str
StrategyName = str | tuple[str, ...]


def conv2d(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    b: npt.ArrayLike | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
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
    layout : {"NHWC", "NCHW"}
        "NCHW": x is ``(N, C, H, W)``, w ``(D, C/groups, KH, KW)`` and the result ``(N, D, OH, OW)``, in memory as
        well. x and w are copied to be turned, and so is the result: that takes memory for all of them, and as long as
        moving them does.
    w_layout : {"OHWI", "HWIO"}, optional
        "HWIO": w is ``(KH, KW, C/groups, D)``, as TensorFlow, Keras and Flax have it. Bits are those of "OHWI".
    strategy : str or tuple of str
        A name from `strategies`, a tuple of names to choose from, or "auto". Floats that hold integers are summed
        exactly by ``("depthwise", "loop")``, up to 2^24 in float32; "auto" may take Winograd, which rounds.
    out : ndarray, optional
        Where the result goes: of its shape and dtype, C-contiguous, writable, apart from the inputs.

    Returns
    -------
    ndarray
        ``(N, OH, OW, D)``, or ``(OH, OW, D)`` and ``(OH, OW)`` for the smaller forms; `out` where it was given.
        A new one of 1 MiB or more is a view of memory that is used again: it has a `base`, and cannot be resized in
        place. `.copy()`, or an `out`, owns its data.

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
    return forward(CONV2D, x, w, b, stride, padding, dilation, groups, layout, w_layout, strategy, out)


def conv2d_weight_grad(
    x: npt.ArrayLike,
    dy: npt.ArrayLike,
    kernel_size: Size | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
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
    stride, padding, dilation, groups, layout, w_layout, strategy
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
    if layout is _NHWC and w_layout is None and accumulate is False and (out is None or kernel_size is not None):
        given = stride, padding, dilation, groups, None
        plans = "conv2d_weight_grad", _weight_grad_plan, x, dy, strategy, PLAIN, given
        result = _run_known(_known(*plans, kernel_size, checks.kernel_size_key), x, dy, None, out)
        if result is not None:
            return result
    with words_of("conv2d_weight_grad"):
        options = Options.of(stride, padding, dilation, groups, checks.as_layout(layout, w_layout))
        plan, inputs = check_weight_grad(x, dy, kernel_size, options, strategy, out, accumulate)
        return _run_pass(plan, inputs, out, bool(accumulate))


def conv2d_bias_grad(
    dy: npt.ArrayLike, *, layout: str = "NHWC", out: Array | None = None, accumulate: bool = False
) -> Array:
    """Return the gradient of a convolution's bias: ``db = dy.sum((0, 1, 2))``.

    Parameters
    ----------
    dy : array_like
        Gradient of the output ``(N, OH, OW, D)``; also ``(OH, OW, D)`` and ``(OH, OW)``.
    layout : {"NHWC", "NCHW"}
        "NCHW": dy is ``(N, D, OH, OW)`` or ``(D, OH, OW)``, and is turned first.
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
    with words_of("conv2d_bias_grad"):
        of = checks.as_layout(layout, None)
        dy, shape, program = check_bias_grad(dy, of, out, accumulate)
        db = arrays.empty(shape, checks.native(dy.dtype)) if out is None else out
        if program is not None:
            planning.execute(program, dy=checks.prepare(dy, db.dtype, dy.shape), db=db)
        elif not accumulate:
            db[...] = 0
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
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
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
    stride, padding, dilation, groups, layout, w_layout, strategy
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
    if layout is _NHWC and w_layout is None and (out is None or input_size is not None):
        given = stride, padding, dilation, groups, None
        plans = "conv2d_input_grad", _input_grad_plan, dy, w, strategy, PLAIN, given
        result = _run_known(_known(*plans, input_size, _input_size), dy, w, None, out)
        if result is not None:
            return result
    with words_of("conv2d_input_grad"):
        options = Options.of(stride, padding, dilation, groups, checks.as_layout(layout, w_layout))
        plan, inputs = check_input_grad(dy, w, input_size, options, strategy, out)
        return _run_pass(plan, inputs, out)


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
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
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
    stride, padding, dilation, groups, layout, w_layout, strategy
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
    return backward(
        CONV2D, x, w, dy, needs, stride, padding, dilation, groups, layout, w_layout, strategy, out, accumulate
    )


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
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
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
    stride, padding, dilation, groups, layout, w_layout, strategy
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
    with words_of("plan"):
        of = checks.as_layout(layout, w_layout)
        return plan_for(pass_, x_shape, w_shape, dtype, stride, padding, dilation, groups, strategy, of)


def plan_for(
    pass_: Any,
    x_shape: Any,
    w_shape: Any,
    dtype: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    strategy: Any,
    layout: Layout = PLAIN,
) -> Plan:
    """Check the arguments of `plan` and make it."""
    if pass_ not in PASSES:
        checks.fail(f"pass_ is {pass_!r}, expected one of {', '.join(PASSES)}")
    dtype = checks.as_dtype(dtype)
    shapes = checks.as_shape("x_shape", x_shape), checks.as_shape("w_shape", w_shape)
    return _plan(pass_, *shapes, dtype, Options.of(stride, padding, dilation, groups, layout), strategy)


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
    strategy: StrategyName = "auto",
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
    with words_of("warmup"):
        passes = (passes,) if isinstance(passes, str) else tuple(passes)
        given = (dtypes,) if isinstance(dtypes, (str, type, np.dtype)) else dtypes
        dtypes = [checks.as_dtype(dtype) for dtype in given]
        for pass_ in passes:
            if pass_ not in PASSES:
                checks.fail(f"passes has {pass_!r}, expected any of {', '.join(PASSES)}")
        planning.strategy_names(strategy)
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
#: What was planned, by what the checks made of the arguments.
_plans: dict[Any, Any] = {}
#: The same, by the arguments of calls whose options are ints themselves: `True` and `1.0` are equal to 1, not as
#: welcome.
_calls: dict[Any, Any] = {}
#: Called where plans are forgotten, by whoever keeps some.
forgetting: list[Callable[[], None]] = []


def _remember(found: dict[Any, Any], key: Any, value: T) -> T:
    if len(found) > 4096:
        found.clear()
    found[key] = value
    return value


def _remembered(make: Callable[..., T], *checked: Any) -> T:
    """Return ``make(*checked)``, remembered."""
    plans = _plans
    try:
        found = plans.get((make, checked))
    except TypeError:  # a strategy that cannot be looked up, which is refused in words
        return make(*checked)
    return cast("T", found) if found is not None else _remember(plans, (make, checked), make(*checked))


def forget_plans() -> None:
    """Plan anew from now on: what was tuned has changed."""
    global _plans, _calls
    _plans, _calls = {}, {}  # new ones: a plan that another thread is making goes to the old ones
    for forget in forgetting:
        forget()


def _plan(pass_: Pass, x: Any, w: Any, dtype: Any, options: Options, strategy: Any) -> Plan:
    return _remembered(_make_plan, pass_, x, w, dtype, options, strategy)


def _make_plan(pass_: Pass, x: Any, w: Any, dtype: Any, options: Options, strategy: Any) -> Plan:
    problem, form = checks.forward_problem(x, w, options, dtype)
    return planning.make_plan(problem, pass_, strategy, form)


def forward_plan(x: Any, w: Any, dtype: Any, options: Options, strategy: Any) -> Plan:
    """Return the plan of a forward pass."""
    return _plan("forward", x, w, dtype, options, strategy)


def _weight_grad_plan(x: Any, dy: Any, dtype: Any, options: Options, sizes: Any, strategy: Any) -> Plan:
    problem, form = checks.weight_grad_problem(x, dy, sizes[0], sizes[1], options, dtype)
    return planning.make_plan(problem, "weight_grad", strategy, form)


def _input_grad_plan(dy: Any, w: Any, dtype: Any, options: Options, sizes: Any, strategy: Any) -> Plan:
    problem, form = checks.input_grad_problem(dy, w, sizes, options, dtype)
    return planning.make_plan(problem, "input_grad", strategy, form)


def backward_plan(x: Any, w: Any, dtype: Any, options: Options, needs: Any, strategy: Any) -> Backward:
    """Return the plan of a convolution's gradients."""
    weight_grad = _plan("weight_grad", x, w, dtype, options, strategy)
    input_grad = _plan("input_grad", x, w, dtype, options, strategy) if "dx" in needs else weight_grad
    return Backward(weight_grad, input_grad, needs)


def transposed_plan(x: Any, w: Any, dtype: Any, options: Options, strategy: Any) -> Plan:
    """Return the plan of a transposed convolution: an input gradient, with a bias."""
    problem, form = checks.transposed_problem(x, w, options, dtype)
    return planning.make_plan(problem, "input_grad", strategy, form)


def transposed_backward_plan(x: Any, w: Any, dtype: Any, options: Options, needs: Any, strategy: Any) -> Backward:
    """Return the plan of a transposed convolution's gradients: a weight gradient, and a forward pass."""
    problem, form = checks.transposed_problem(x, w, options, dtype)
    weight_grad = planning.make_plan(problem, "weight_grad", strategy, form)
    input_grad = planning.make_plan(problem, "forward", strategy, form) if "dx" in needs else weight_grad
    return Backward(weight_grad, input_grad, needs, transposed=True)


# ------------------------------------------------------------------------------------- calls seen before


class Convolution(NamedTuple):
    """One of the public convolutions: its name, what plans it and its gradients, and its dimensions."""

    name: str
    plan: Callable[..., Plan]
    backward_plan: Callable[..., Backward]
    layout: Layout = PLAIN


CONV2D = Convolution("conv2d", forward_plan, backward_plan)


def _exact(*options: Any) -> bool:
    """Whether options are ints, strings or tuples of them themselves, and can be looked up as they are."""
    for option in options:
        kind = type(option)
        if kind is not int and kind is not str and option is not None and not (kind is tuple and _exact(*option)):
            return False
    return True


def _known(
    name: str, make: Callable[..., T], first: Any, second: Any, strategy: Any, layout: Layout, options: tuple[Any, ...],
    more: Any = (), check: Callable[[Any], Any] | None = None,
) -> T | None:  # fmt: skip
    """Return the plan of a call that needs no checks, because one like it went through them; None for any other.

    The plan is made of two arrays' shapes, of options, of what ``check(more)`` makes of one more, if there is a check,
    and of the strategy.
    """
    if not (type(first) is type(second) is np.ndarray and _exact(strategy, more, *options)):
        return None
    key = name, first.shape, second.shape, first.dtype, strategy, options, more
    found: T | None = _calls.get(key)
    if found is None:
        if first.dtype not in checks.NATIVE:
            return None
        with words_of(name):
            stride, padding, dilation, groups, output_padding = options
            checked = Options.of(stride, padding, dilation, groups, layout, output_padding)
            added = () if check is None else (check(more),)
            dtype = checks.native(first.dtype)
            found = _remembered(make, first.shape, second.shape, dtype, checked, *added, strategy)
        _remember(_calls, key, found)
    return found


def _run_known(found: Plan | None, first: Any, second: Any, b: Any, out: Any) -> Array | None:
    """Return the result of a plan on arrays that can be used as they are; None where they cannot."""
    if found is None or not found.fits(first, second, b):
        return None
    if out is None:
        return found.unchecked(first, second, b)
    if not found.takes(out, first, second, b):
        return None
    found.run(first, second, b, out)
    result: Array = out
    return result


def forward(
    of: Convolution, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    layout: Any, w_layout: Any, strategy: Any, out: Any, output_padding: Any = None,
) -> Array:  # fmt: skip
    """Do what one of the public convolutions does."""
    if layout is _NHWC and w_layout is None:
        given = stride, padding, dilation, groups, output_padding
        result = _run_known(_known(of.name, of.plan, x, w, strategy, of.layout, given), x, w, b, out)
        if result is not None:
            return result
    with words_of(of.name):
        lie = checks.as_layout(layout, w_layout, of.layout.dimensions)
        options = Options.of(stride, padding, dilation, groups, lie, output_padding)
        return _run_pass(*check_forward(of.plan, x, w, b, options, strategy, out), out)


def backward(
    of: Convolution, x: Any, w: Any, dy: Any, needs: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    layout: Any, w_layout: Any, strategy: Any, out: Any, accumulate: Any, output_padding: Any = None,
) -> Gradients:  # fmt: skip
    """Do what the backward pass of one of the public convolutions does."""
    if layout is _NHWC and w_layout is None and out is None and accumulate is False:
        given = stride, padding, dilation, groups, output_padding
        name = f"{of.name}_backward"
        found = _known(name, of.backward_plan, x, w, strategy, of.layout, given, needs, check_needs)
        if found is not None and found.fits(x, w, dy):
            return run_gradients(found, x, w, dy, {}, False)
    with words_of(f"{of.name}_backward"):
        lie = checks.as_layout(layout, w_layout, of.layout.dimensions)
        options = Options.of(stride, padding, dilation, groups, lie, output_padding)
        plan, inputs, results = check_backward(of.backward_plan, x, w, dy, needs, options, strategy, out, accumulate)
        x, w, dy = (checks.prepare(array, plan.problem.dtype, array.shape) for array in inputs.values())
        return run_gradients(plan, x, w, dy, results, bool(accumulate))


# ------------------------------------------------------------------------------------------------ checks
# Each returns a plan and its inputs, of which nothing has been converted yet; compiled code asks for the same.


def check_forward(
    make: Callable[..., Plan], x: Any, w: Any, b: Any, options: Options, strategy: Any, out: Any
) -> tuple[Plan, dict[str, Array]]:
    """Check the arrays of a forward pass, whose plan ``make`` makes."""
    x, w = checks.as_input("x", x), checks.as_input("w", w)
    b = None if b is None else checks.as_bias(b, w)
    inputs = {"x": x, "w": w} if b is None else {"x": x, "w": w, "b": b}
    dtype = checks.common_dtype(**inputs)
    plan = _remembered(make, x.shape, w.shape, dtype, options, strategy)
    if b is not None:
        checks.check_bias(b, plan.form.b)
    if out is not None:
        checks.as_out("out", out, plan.result_shape, dtype, inputs)
    return plan, inputs


def check_weight_grad(
    x: Any, dy: Any, kernel_size: Any, options: Options, strategy: Any, out: Any, accumulate: Any
) -> tuple[Plan, dict[str, Array]]:
    """Check the arrays of a weight gradient."""
    x, dy = checks.as_input("x", x), checks.as_input("dy", dy)
    checks.check_accumulate(accumulate, out)
    inputs = {"x": x, "dy": dy}
    dtype = checks.common_dtype(**inputs)
    sizes = checks.kernel_size_key(kernel_size, out.shape if isinstance(out, np.ndarray) else None)
    plan = _remembered(_weight_grad_plan, x.shape, dy.shape, dtype, options, sizes, strategy)
    if out is not None:
        checks.as_out("out", out, plan.form.w, dtype, inputs)
    return plan, inputs


def _input_size(size: Any) -> tuple[int, int] | None:
    return None if size is None else checks.pair("input_size", size, 1)


def check_input_grad(
    dy: Any, w: Any, input_size: Any, options: Options, strategy: Any, out: Any
) -> tuple[Plan, dict[str, Array]]:
    """Check the arrays of an input gradient."""
    dy, w = checks.as_input("dy", dy), checks.as_input("w", w)
    inputs = {"dy": dy, "w": w}
    dtype = checks.common_dtype(**inputs)
    if input_size is None and isinstance(out, np.ndarray) and out.ndim == {4: 4, 3: 3}.get(dy.ndim, w.ndim):
        input_size = options.layout.batched_images(out.shape)[1:3]
    sizes = _input_size(input_size)
    plan = _remembered(_input_grad_plan, dy.shape, w.shape, dtype, options, sizes, strategy)
    if out is not None:
        checks.as_out("out", out, plan.form.x, dtype, inputs)
    return plan, inputs


def check_bias_grad(dy: Any, of: Layout, out: Any, accumulate: Any) -> tuple[Array, tuple[int, ...], Program | None]:
    """Check the arrays of a bias gradient; return dy, the shape of the result, and what runs where there are sums."""
    dy = checks.as_input("dy", dy)
    ranks = (4, 3, 2) if of.images == "NHWC" else (4, 3)
    if dy.ndim not in ranks:
        known = [of.letters("dy", rank) for rank in ranks]
        checks.fail(f"dy has shape {dy.shape}, expected {', '.join(known[:-1])} or {known[-1]}")
    checks.check_accumulate(accumulate, out)
    dtype = checks.common_dtype(dy=dy)
    batched = of.batched_images(dy.shape)
    shape = batched[3:] if dy.ndim > 2 else ()
    if out is not None:
        checks.as_out("out", out, shape, dtype, {"dy": dy})
    some = all(batched)
    return dy, shape, planning.bias_program_of(batched, dtype, bool(accumulate), of.images) if some else None


def check_backward(
    make: Callable[..., Backward],
    x: Any,
    w: Any,
    dy: Any,
    needs: Any,
    options: Options,
    strategy: Any,
    out: Any,
    accumulate: Any,
) -> tuple[Backward, dict[str, Array], dict[str, Array]]:
    """Check the arrays of a backward pass, whose plan ``make`` makes; return those results that are given, too."""
    needs = check_needs(needs)
    x, w, dy = checks.as_input("x", x), checks.as_input("w", w), checks.as_input("dy", dy)
    out = check_gradients(out, needs)
    for name in ("dw", "db"):
        if name in needs:
            checks.check_accumulate(accumulate, getattr(out, name), f"out.{name}")
    dtype = checks.common_dtype(x=x, w=w, dy=dy)
    # All plans are made, or refused, before anything is written.
    plan = _remembered(make, x.shape, w.shape, dtype, options, needs, strategy)
    checks.check_dy(dy.shape, plan.dy, options.layout)
    inputs = {"x": x, "w": w, "dy": dy}
    results: dict[str, Array] = {}
    for name in needs:
        given = getattr(out, name)
        if given is not None:
            taken = inputs | {f"out.{other}": array for other, array in results.items()}
            checks.as_out(f"out.{name}", given, plan.shapes[name], dtype, taken)
            results[name] = given
    return plan, inputs, results


# ------------------------------------------------------------------------------------------------- runs


def _run_pass(plan: Plan, inputs: dict[str, Array], out: Any, accumulate: bool = False) -> Array:
    """Run the plan of a pass on its inputs, which are checked."""
    dtype = plan.problem.dtype
    result: Array = arrays.empty(plan.result_shape, dtype) if out is None else out
    first, second, *b = (checks.prepare(array, dtype, array.shape) for array in inputs.values())
    plan.run(first, second, b[0] if b else None, result, accumulate)
    return result
