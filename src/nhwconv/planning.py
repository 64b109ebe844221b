"""Which strategy runs, and why: (problem, pass) -> `Plan`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import choices
from .checks import fail
from .names import suggestion
from .problem import ConvProblem, Pass
from .strategies import AUTO, REGISTRY

__all__ = ["Plan", "make_plan", "strategy_names"]


@dataclass(frozen=True)
class Plan:
    """What runs for one pass of one problem, and why. `print` it.

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
    workspace : int
        Extra memory of a call, in bytes.
    costs : tuple of (str, float)
        The candidates, and the cycles of one core that each is predicted to take.
    refused : tuple of (str, str)
        The strategies that were allowed but cannot do the problem, and why.
    """

    pass_: Pass
    problem: ConvProblem
    strategy: str
    reason: str
    workspace: int
    costs: tuple[tuple[str, float], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        problem = self.problem
        return "\n".join(
            (
                f"{self.pass_} of {problem}",
                f"  strategy   {self.strategy}: {REGISTRY[self.strategy].summary}",
                f"  because    {self.reason}",
                f"  work       {problem.flops / 1e9:.3g} GFLOP over {problem.bytes / 1e6:.3g} MB of x, w and y",
                f"  workspace  {self.workspace / 2**20:.3g} MiB",
                *(f"  candidate  {name}: {cost / 1e6:.3g} million cycles predicted" for name, cost in self.costs),
                *(f"  refused    {name}: {refusal}" for name, refusal in self.refused),
            )
        )


def strategy_names(function: str, strategy: object) -> tuple[str, ...]:
    """Return the names that may be chosen from: `strategy` is a name, "auto", or a tuple of names."""
    if strategy == "auto":
        return AUTO
    names = strategy if isinstance(strategy, tuple) else (strategy,)
    if not names:
        fail(function, "strategy is an empty tuple, expected at least one name")
    for name in names:
        if not isinstance(name, str):
            fail(function, f"strategy is {strategy!r}, expected a name or a tuple of names", TypeError)
        if name == "auto":
            fail(function, f'strategy is {strategy!r}, but "auto" cannot be one of several names')
        if name not in REGISTRY:
            known = ", ".join(f'"{n}"' for n in REGISTRY)
            hint = suggestion(name, [*REGISTRY, "auto"])
            fail(function, f'there is no strategy "{name}", expected "auto" or one of {known}{hint}')
    return names


def make_plan(function: str, problem: ConvProblem, pass_: Pass, strategy: object) -> Plan:
    """Choose, of the allowed strategies that can do the problem, the one that was tuned, or that of least cost."""
    allowed = strategy_names(function, strategy)
    sizes = problem if problem.n else replace(problem, n=1)  # an empty batch is planned as one image; nothing runs
    refusals = {n: REGISTRY[n].supports(sizes, pass_) for n in REGISTRY if n in allowed}
    costs = {n: REGISTRY[n].cost(sizes, pass_) for n, refusal in refusals.items() if refusal is None}
    if not costs:
        reasons = "; ".join(f"{n}: {refusal}" for n, refusal in refusals.items())
        fail(function, f"no allowed strategy can do the {pass_} of {problem} ({reasons})")
    name = min(costs, key=lambda n: costs[n])  # of equals the first in the registry
    tuned = choices.lookup(function, pass_, problem) if len(costs) > 1 and problem.n else None
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
    return Plan(pass_, problem, name, reason, REGISTRY[name].workspace(problem, pass_), tuple(costs.items()), refused)
