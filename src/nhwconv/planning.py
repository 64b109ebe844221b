"""Which strategy runs, and why: (problem, pass) -> `Plan`. A plan keeps its programs, and can be called."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, lru_cache, partial
from typing import Any

import numpy as np

from . import checks, choices
from .checks import fail, words_of
from .layouts import Form, Layout
from .names import suggestion
from .problem import ConvProblem, Pass, half
from .program import ARRAYS, Call, Place, Program, places
from .runtime import arrays, executor, jit, machine
from .runtime.arrays import Array
from .strategies import AUTO, HWIO, REGISTRY, Wanted
from .strategies import half as halves
from .strategies.bias import SERIAL, bias_steps, sum_pixels
from .strategies.turning import with_images, with_weights

__all__ = ["Backward", "Form", "Plan", "bias_program", "bias_program_of", "execute", "make_plan", "strategy_names"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What runs for one pass of one problem, and why. `print` it, or call it.

    ``plan(x, w, b)`` is what a forward pass computes, ``plan(x, dy)`` a weight gradient and ``plan(dy, w)`` an input
    gradient: with less to check than the public functions have, and for arrays of these shapes and this dtype alone.
    Any number of threads may call it. It pickles, and plans anew where it is unpickled.

    Attributes
    ----------
    pass_ : str
        "forward", "weight_grad" or "input_grad".
    problem : ConvProblem
        The convolution.
    strategy : str
        The name of the strategy that runs.
    reason : str
        Why this one.
    form : Form
        The shapes of the arrays x (or dx), w (or dw), y (or dy) and b, and how they lie.
    costs : tuple of (str, float)
        The candidates, and the cycles of one core that each is predicted to take.
    refused : tuple of (str, str)
        The strategies that were allowed but cannot do the problem, and why.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> p = nc.plan("forward", (8, 28, 28, 3), (16, 3, 3, 3), padding=1)
    >>> p(np.ones((8, 28, 28, 3), np.float32), np.ones((16, 3, 3, 3), np.float32)).shape
    (8, 28, 28, 16)
    """

    pass_: Pass
    problem: ConvProblem
    strategy: str
    reason: str
    form: Form
    costs: tuple[tuple[str, float], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    # ----------------------------------------------------------------------------------------- programs

    @cached_property
    def _programs(self) -> dict[tuple[bool, bool, int, frozenset[str]], Program]:
        return {}

    @cached_property
    def cost(self) -> float:
        """The predicted cycles of one core."""
        return dict(self.costs).get(self.strategy, math.inf)

    @cached_property
    def serial(self) -> bool:
        """Whether one thread is done before several are started."""
        return self.cost < machine.SERIAL_CYCLES

    def program(
        self, bias: bool = False, accumulate: bool = False, threads: int = 0, first: frozenset[str] = frozenset()
    ) -> Program:
        """Return what runs: with a bias, which a weight gradient's program makes as well; added to what is there.

        On so many threads at most, where they are worth it; 0 for as many as Numba uses. Arrays whose names are in
        `first` have their channels first, whatever the plan's layout is.
        """
        key = bias, accumulate, _workers(self, threads), first  # a plain tuple: this is looked up at every call
        found = self._programs.get(key)
        if found is None:
            wanted = Wanted(*key[:3])
            made = _with_layout(self.of_so_many_images, self.problem, wanted, self.form.layout, first)
            found = self._programs[key] = made
        return found

    def of_so_many_images(self, images: int, wanted: Wanted) -> Program:
        """Return the program for so many images with their channels last, and weights in the plan's layout."""
        problem = replace(self.problem, n=images)
        weights, strategy = self.form.layout.weights, REGISTRY[self.strategy]
        if weights == "HWIO" and self.strategy in HWIO:
            weights, wanted = "OHWI", wanted._replace(weights="HWIO")
        if half(problem.dtype) and jit.disabled():
            program = halves.program_without_compiler(strategy, problem, self.pass_, wanted)
        elif half(problem.dtype):
            program = halves.program(strategy, REGISTRY["loop"], problem, self.pass_, wanted)
        else:
            program = strategy.program(problem, self.pass_, wanted)
        program = replace(program, ran=((self.pass_, self.strategy),), problem=problem)
        return with_weights(program, problem, weights, wanted)

    @property
    def workspace(self) -> int:
        """Extra memory of a call, in bytes, with as many threads as there are now."""
        return self.program(self.pass_ == "forward").workspace if self.problem.n else 0

    # ------------------------------------------------------------------------------------ in compiled code

    @cached_property
    def _numba_type_(self) -> Any:
        """Its type in users' compiled functions, where Numba looks for it."""
        from .njit import plans  # what few plans need

        return plans.kind_of(self)

    @cached_property
    def _number(self) -> int:
        """What it is in users' compiled functions."""
        from .njit import answers

        return answers.number(self)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # programs are this process's

    # -------------------------------------------------------------------------------------------- calls

    @cached_property
    def _shapes(self) -> tuple[Shape, Shape, Shape, Shape]:
        """The shapes of the two operands, of a bias, and of the result."""
        x, w, y, bias, _ = self.form
        return {"forward": (x, w, bias, y), "weight_grad": (x, y, bias, w), "input_grad": (y, w, bias, x)}[self.pass_]

    def __call__(
        self, first: Any, second: Any, b: Any = None, *, out: Array | None = None, accumulate: bool = False
    ) -> Array:
        """Run the pass on arrays that fit the plan: (x, w, b), (x, dy) or (dy, w).

        Parameters
        ----------
        first, second : array_like
            Of the plan's shapes and dtype.
        b : array_like, optional
            The bias of a forward pass, ``(D,)``.
        out : ndarray, optional
            Where the result goes, as in the public functions.
        accumulate : bool
            Add a weight gradient to `out` instead of overwriting it.

        Raises
        ------
        ValueError, TypeError
            Where arrays do not fit the plan.
        """
        plain = accumulate is False and (b is None or self.pass_ == "forward") and self.fits(first, second, b)
        if not plain or (out is not None and not self.takes(out, first, second, b)):
            with words_of("plan"):
                inputs = self.check(first, second, b, out, accumulate)
                first, second, *bias = (checks.prepare(a, self.problem.dtype, a.shape) for a in inputs.values())
                b = bias[0] if bias else None
        if out is None:
            return self.unchecked(first, second, b)
        self.run(first, second, b, out, accumulate)
        return out

    def unchecked(self, first: Array, second: Array, b: Array | None) -> Array:
        """Return the result of the pass on arrays that fit."""
        result = arrays.empty(self._shapes[3], self.problem.dtype)
        self.run(first, second, b, result)
        return result

    @property
    def result_shape(self) -> Shape:
        """The shape of what comes out."""
        return self._shapes[3]

    @property
    def operands(self) -> tuple[str, ...]:
        """What the program calls the two operands, a bias, and the result."""
        return _OPERANDS[self.pass_]

    def fits(self, first: Any, second: Any, b: Any) -> bool:
        """Whether these are arrays that can be used as they are."""
        dtype, shapes = self.problem.dtype, self._shapes
        return (
            type(first) is type(second) is np.ndarray
            and first.shape == shapes[0]
            and second.shape == shapes[1]
            and (first.dtype is dtype or first.dtype == dtype)
            and (second.dtype is dtype or second.dtype == dtype)
            and _readable(first)
            and _readable(second)
            and (b is None or (type(b) is np.ndarray and b.shape == shapes[2] and b.dtype == dtype and _readable(b)))
        )

    def takes(self, out: Any, first: Array, second: Array, b: Array | None) -> bool:
        """Whether a result can be written to this as it is, beside operands that fit."""
        return (
            type(out) is np.ndarray
            and out.shape == self._shapes[3]
            and out.dtype == self.problem.dtype
            and out.flags.carray
            and not np.may_share_memory(out, first)
            and not np.may_share_memory(out, second)
            and (b is None or not np.may_share_memory(out, b))
        )

    def check(self, first: Any, second: Any, b: Any, out: Any, accumulate: Any) -> dict[str, Array]:
        """Return the operands by their names, or refuse them in words."""
        names = {"forward": ("x", "w"), "weight_grad": ("x", "dy"), "input_grad": ("dy", "w")}[self.pass_]
        if b is not None and self.pass_ != "forward":
            fail(f"b is given, but {_a(self.pass_)} has no bias")
        if accumulate is not False:
            checks.check_accumulate(accumulate, out)
            if accumulate and self.pass_ != "weight_grad":
                fail(f"accumulate is True, but only a weight_grad is added to what is there, not {_a(self.pass_)}")
        given = dict(zip((*names, "b"), (first, second, b), strict=True))
        inputs: dict[str, Array] = {}
        for (name, value), shape in zip(given.items(), self._shapes[:3], strict=True):
            if value is not None:
                inputs[name] = checks.as_planned(name, value, shape, self.problem.dtype)
        if out is not None:
            checks.as_out("out", out, self._shapes[3], self.problem.dtype, inputs)
        return inputs

    def run(self, first: Array, second: Array, b: Array | None, result: Array, accumulate: bool = False) -> None:
        """Run the pass on arrays that are as programs want them: of the plan's sizes, C-contiguous, aligned."""
        if not self.problem.n:
            if self.pass_ == "weight_grad" and not accumulate:
                result[...] = 0
            return
        program = self.program(b is not None, accumulate)
        if not program.native:
            executor.run_calls(program, _named(zip(self.operands, (first, second, b, result), strict=True)))
        elif self.pass_ == "forward":
            executor.run(program, id(first), id(second), 0 if b is None else id(b), id(result), 0, 0, 0, 0)
        elif self.pass_ == "weight_grad":
            executor.run(program, id(first), 0, 0, 0, id(second), 0, id(result), 0)
        else:
            executor.run(program, 0, id(second), 0 if b is None else id(b), 0, id(first), id(result), 0, 0)

    def __str__(self) -> str:
        problem = self.problem
        return "\n".join(
            (
                f"{self.pass_} of {problem}",
                f"  strategy   {self.strategy}: {self.reason}",
                *(f"  layout     {line}" for line in _layout_lines(self.form.layout)),
                f"  work       {problem.flops / 1e9:.3g} GFLOP over {problem.bytes / 1e6:.3g} MB of x, w and y",
                f"  workspace  {self.workspace / 2**20:.3g} MiB",
                *(f"  candidate  {name}: {cost / 1e6:.3g} million cycles predicted" for name, cost in self.costs),
                *(f"  refused    {name}: {refusal}" for name, refusal in self.refused),
            )
        )


def _a(pass_: Pass) -> str:
    """Return a pass's name behind its article."""
    return f"{'an' if pass_.startswith('i') else 'a'} {pass_}"


def _layout_lines(layout: Layout) -> tuple[str, ...]:
    """Return what a plan prints of a layout that is not the usual one."""
    if layout == Layout(dimensions=layout.dimensions):
        return ()
    turned = "; images are turned before and after, weights too" if layout.images != "NHWC" else ""
    return (f"{layout}{turned}",)


#: The arrays of each pass, in the order of `Plan.run`.
_OPERANDS: dict[Pass, tuple[str, ...]] = {
    "forward": ("x", "w", "b", "y"),
    "weight_grad": ("x", "dy", "b", "dw"),
    "input_grad": ("dy", "w", "b", "dx"),
}


#: The arrays x, w, dy, dx, dw and db of a convolution's gradients, and of a transposed one's.
_BACKWARD = ("x", "w", "dy", "dx", "dw", "db")
_TRANSPOSED = ("dy", "w", "x", "y", "dw", "db")


def _readable(array: Array) -> bool:
    """Whether programs can read an array as it is; `carray`, of what can be written too, is the soonest answer."""
    flags = array.flags
    return flags.carray or (flags.c_contiguous and flags.aligned)


def _named(pairs: Iterable[tuple[str, Array | None]]) -> dict[str, Array]:
    return {name: array for name, array in pairs if array is not None}


def execute(program: Program, **named: Array) -> None:
    """Run a program on arrays by name, which are as programs want them."""
    if program.native:
        executor.run(program, *(id(named[name]) if name in named else 0 for name in ARRAYS))
    else:
        executor.run_calls(program, named)


class Backward:
    """All gradients that one call wants, as one program: dw and db together, then dx.

    Those of a transposed convolution come from the same passes: its x is the output of the convolution whose transpose
    it is, and its dy that one's input. So dw is the weight gradient with x and dy exchanged, and dx a forward pass.
    """

    def __init__(self, weight_grad: Plan, input_grad: Plan, needs: tuple[str, ...], transposed: bool = False) -> None:
        self.weight_grad, self.input_grad, self.needs, self.transposed = weight_grad, input_grad, needs, transposed
        self.problem, self.form = weight_grad.problem, weight_grad.form
        self.x, self.dy = (self.form.y, self.form.x) if transposed else (self.form.x, self.form.y)
        self.shapes: dict[str, Shape] = {"dx": self.x, "dw": self.form.w, "db": self.form.b}
        #: What the program calls x, w, dy, dx, dw and db.
        self.operands = _TRANSPOSED if transposed else _BACKWARD
        self._programs: dict[tuple[bool, int, frozenset[str]], Program] = {}

    def fits(self, x: Any, w: Any, dy: Any) -> bool:
        """Whether these are arrays that can be used as they are; x and w are of the plan's shapes."""
        dtype = self.problem.dtype
        return (
            dy.shape == self.dy
            and (x.dtype is dtype or x.dtype == dtype)
            and (w.dtype is dtype or w.dtype == dtype)
            and (dy.dtype is dtype or dy.dtype == dtype)
            and _readable(x)
            and _readable(w)
            and _readable(dy)
        )

    def run(self, x: Array, w: Array, dy: Array, dx: Any, dw: Any, db: Any, accumulate: bool = False) -> None:
        """Run on arrays that are as programs want them; of the gradients, those that are not needed are None."""
        program = self.program(accumulate)
        if not program.native:
            executor.run_calls(program, _named(zip(self.operands, (x, w, dy, dx, dw, db), strict=True)))
            return
        to_dx, to_dw = 0 if dx is None else id(dx), 0 if dw is None else id(dw)
        to_db = 0 if db is None else id(db)
        if self.transposed:
            executor.run(program, id(dy), id(w), 0, to_dx, id(x), 0, to_dw, to_db)
        else:
            executor.run(program, id(x), id(w), 0, 0, id(dy), to_dx, to_dw, to_db)

    @cached_property
    def serial(self) -> bool:
        """Whether one thread is done before several are started."""
        passes = {"dw": self.weight_grad, "dx": self.input_grad}
        return sum(plan.cost for name, plan in passes.items() if name in self.needs) < machine.SERIAL_CYCLES

    def program(self, accumulate: bool, threads: int = 0, first: frozenset[str] = frozenset()) -> Program:
        """Return what runs, on so many threads at most; 0 for as many as Numba uses; `first` as in a plan's program."""
        key = accumulate, _workers(self, threads), first
        found = self._programs.get(key)
        if found is None:
            wanted = Wanted(False, *key[:2])
            made = _with_layout(self._of_so_many_images, self.problem, wanted, self.form.layout, first)
            found = self._programs[key] = made
        return found

    def _of_so_many_images(self, images: int, wanted: Wanted) -> Program:
        return Program.joined(self._parts(images, wanted))

    def _parts(self, images: int, wanted: Wanted) -> Iterable[Program]:
        together = "dw" in self.needs and "db" in self.needs and not self.transposed
        if "dw" in self.needs:
            yield self.weight_grad.of_so_many_images(images, wanted._replace(bias=together))
        if "db" in self.needs and not together:
            _, h, w, channels = self.problem.x_shape if self.transposed else self.problem.y_shape
            program = bias_program(images * h * w, channels, self.problem.dtype, wanted.accumulate)
            yield program.moved({"dy": Place("x")}) if self.transposed else program
        if "dx" in self.needs:
            yield self.input_grad.of_so_many_images(images, Wanted(workers=wanted.workers))


def _workers(plan: Plan | Backward, threads: int) -> int:
    """Return how many threads run a plan's program."""
    return 1 if plan.serial else threads or machine.threads()


#: Arrays of images, and of weights.
_IMAGES, _WEIGHTS = frozenset(("x", "dx", "dy", "y")), frozenset(("w", "dw"))


def _with_layout(
    make: Callable[[int, Wanted], Program], problem: ConvProblem, wanted: Wanted, layout: Layout, first: frozenset[str]
) -> Program:
    """Return a program for images of a layout, and for arrays that have their channels first besides."""

    def block(images: int, accumulate: bool) -> Program:
        return make(images, wanted._replace(accumulate=accumulate))

    x, y, itemsize = problem.x_shape, problem.y_shape, problem.dtype.itemsize
    shapes, names = {"x": x, "dx": x, "dy": y, "y": y}, first if layout.images == "NHWC" else first | _IMAGES
    least = 4 * math.prod(problem.w_shape) * itemsize  # each block adds to a gradient of weights
    made = replace(with_images(block, shapes, names, itemsize, wanted.accumulate, least), problem=problem)
    return with_weights(made, problem, "OIHW", wanted, first & _WEIGHTS)


def bias_program(pixels: int, d: int, dtype: np.dtype[Any], accumulate: bool) -> Program:
    """Return the bias gradient alone: the sum of ``dy (pixels, d)`` over its pixels."""
    workers = 1 if pixels * d < SERIAL or half(dtype) else machine.threads()
    return _bias_program(pixels, d, dtype, accumulate, workers)


def bias_program_of(shape: Shape, dtype: np.dtype[Any], accumulate: bool, images: str = "NHWC") -> Program:
    """Return the bias gradient alone, for ``dy (n, oh, ow, d)`` that lies as this layout says."""
    _, h, w, d = shape

    def block(images: int, accumulate: bool) -> Program:
        return bias_program(images * h * w, d, dtype, accumulate)

    return with_images(block, {"dy": shape}, () if images == "NHWC" else ("dy",), dtype.itemsize, accumulate)


@lru_cache(maxsize=1024)
def _bias_program(pixels: int, d: int, dtype: np.dtype[Any], accumulate: bool, workers: int) -> Program:
    if jit.disabled():
        step = Call(partial(sum_pixels, accumulate), places("dy", "db"), ((pixels, d), (d,)), dtype)
        return Program((step,))
    if half(dtype):
        return halves.bias_program(pixels, d, dtype, accumulate)
    return Program(tuple(bias_steps(pixels, d, dtype.itemsize, accumulate)), workers)


def strategy_names(strategy: object) -> tuple[str, ...]:
    """Return the names that may be chosen from: `strategy` is a name, "auto", or a tuple of names."""
    if strategy == "auto":
        return AUTO
    names = strategy if isinstance(strategy, tuple) else (strategy,)
    if not names:
        fail("strategy is an empty tuple, expected at least one name")
    for name in names:
        if not isinstance(name, str):
            fail(f"strategy is {strategy!r}, expected a name or a tuple of names", TypeError)
        if name == "auto":
            fail(f'strategy is {strategy!r}, but "auto" cannot be one of several names')
        if name not in REGISTRY:
            known = ", ".join(f'"{n}"' for n in REGISTRY)
            hint = suggestion(name, [*REGISTRY, "auto"])
            fail(f'there is no strategy "{name}", expected "auto" or one of {known}{hint}')
    return names


_NOT_COMPILED = "NUMBA_DISABLE_JIT is set, and it is compiled by Numba"


def _refusal(name: str, problem: ConvProblem, pass_: Pass) -> str | None:
    if jit.disabled() and REGISTRY[name].compiled:
        return _NOT_COMPILED
    return REGISTRY[name].supports(problem, pass_)


def _allowed(strategy: object) -> tuple[str, ...]:
    """Return the names to choose from; what "auto" chooses from needs Numba's compiler."""
    names = strategy_names(strategy)
    if strategy == "auto" and jit.disabled():
        _warn_of_tensordot()
        return ("tensordot",)
    return names


@cache
def _warn_of_tensordot() -> None:
    """Warn, once a process."""
    warnings.warn(
        "nhwconv: NUMBA_DISABLE_JIT is set, so tensordot, which is slow, stands in for compiled strategies",
        RuntimeWarning,
        stacklevel=4,
    )


def make_plan(problem: ConvProblem, pass_: Pass, strategy: object, form: Form | None = None) -> Plan:
    """Choose, of the allowed strategies that can do the problem, the one that was tuned, or that of least cost."""
    allowed = _allowed(strategy)
    sizes = problem if problem.n else replace(problem, n=1)  # an empty batch is planned as one image; nothing runs
    refusals = {n: _refusal(n, sizes, pass_) for n in REGISTRY if n in allowed}
    costs = {n: _cost(n, sizes, pass_) for n, refusal in refusals.items() if refusal is None}
    if not costs:
        reasons = "; ".join(f"{n}: {refusal}" for n, refusal in refusals.items())
        fail(f"no allowed strategy can do the {pass_} of {problem} ({reasons})")
    name = min(costs, key=lambda n: costs[n])  # of equals the first in the registry
    tuned = choices.lookup(pass_, problem) if len(costs) > 1 and problem.n else None
    if len(allowed) == 1 and strategy != "auto":
        reason = "it was asked for"
    elif len(costs) == 1:
        reason = "no other strategy that may be chosen can do it"
    elif tuned in costs:
        name, reason = tuned, "it was measured to be the fastest here by nhwconv.tune"
    else:
        second = min((n for n in costs if n != name), key=lambda n: costs[n])
        reason = f"its predicted cost is {costs[name] / max(costs[second], 1):.2f} of that of {second}"
    refused = tuple((n, refusal) for n, refusal in refusals.items() if refusal is not None)
    form = form or Form(problem.x_shape, problem.w_shape, problem.y_shape, (problem.d,))
    return Plan(pass_, problem, name, reason, form, tuple(costs.items()), refused)


def _cost(name: str, problem: ConvProblem, pass_: Pass) -> float:
    """Return the predicted cycles of one core, in the dtype of the arithmetic."""
    single = replace(problem, dtype=problem.compute_dtype)
    return REGISTRY[name].program(single, pass_, Wanted()).cycles
