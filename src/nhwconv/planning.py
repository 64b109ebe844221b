"""Which strategy runs, and why: (problem, pass) -> `Plan`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from .checks import fail
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
    """

    pass_: Pass
    problem: ConvProblem
    strategy: str
    reason: str
    workspace: int

    def __str__(self) -> str:
        problem = self.problem
        return "\n".join(
            (
                f"{self.pass_} of {problem}",
                f"  strategy   {self.strategy}: {REGISTRY[self.strategy].summary}",
                f"  because    {self.reason}",
                f"  work       {problem.flops / 1e9:.3g} GFLOP over {problem.bytes / 1e6:.3g} MB of x, w and y",
                f"  workspace  {self.workspace / 2**20:.3g} MiB",
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
            near = difflib.get_close_matches(name, [*REGISTRY, "auto"], 1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            known = ", ".join(f'"{n}"' for n in REGISTRY)
            fail(function, f'there is no strategy "{name}", expected "auto" or one of {known}{hint}')
    return names


def make_plan(function: str, problem: ConvProblem, pass_: Pass, strategy: object) -> Plan:
    """Choose the first of the allowed strategies, in the registry's order, that supports the problem."""
    allowed = strategy_names(function, strategy)
    refusals = []
    for name, candidate in REGISTRY.items():
        if name not in allowed:
            continue
        refusal = candidate.supports(problem, pass_)
        if refusal is None:
            reason = "it was asked for" if len(allowed) == 1 and strategy != "auto" else "the first that supports it"
            return Plan(pass_, problem, name, reason, candidate.workspace(problem, pass_))
        refusals.append(f"{name}: {refusal}")
    fail(function, f"no allowed strategy can do the {pass_} of {problem} ({'; '.join(refusals)})")
