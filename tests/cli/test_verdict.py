"""Who wins, by how much, and why: on comparisons whose times are known."""

from __future__ import annotations

import numpy as np
import pytest

from nhwconv.cli.cases import Case
from nhwconv.cli.measure import Comparison
from nhwconv.cli.verdict import headline, standings, verdicts
from nhwconv.problem import Pass
from nhwconv.workloads import parse_layer
from pretend import LIMITS, Seconds, pretend

DENSE, THIN, TINY = "n8h28w28c128d128k3p1", "n8h56w56c64d64k3p1g64", "n1h4w4c1d1k2"
STRATEGIES = ("loop", "winograd", "im2col", "tensordot")


def compared(
    monkeypatch: pytest.MonkeyPatch, seconds: Seconds, *cases: tuple[str, Pass], cold: bool = False
) -> list[Comparison]:
    pretend(monkeypatch.setattr, seconds)
    found = [Comparison(Case(parse_layer(n), p), STRATEGIES, np.dtype(np.float32), cold=cold) for n, p in cases]
    for comparison in found:
        for _ in comparison.steps(0.01):
            pass
    return found


def times(**factors: float) -> Seconds:
    """As many times as long as the roofline has it."""
    return lambda problem, pass_, strategy, cold: factors[strategy] * LIMITS.seconds(problem)


def test_the_fastest_wins_and_the_lead_is_that_over_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = times(loop=1.25, winograd=0.5, im2col=2, tensordot=5)
    (verdict,) = verdicts(compared(monkeypatch, seconds, (DENSE, "forward")))
    assert (verdict.winner.strategy, verdict.second and verdict.second.strategy) == ("winograd", "loop")
    assert verdict.lead == pytest.approx(2.5)
    assert verdict.cold_winner is None
    assert verdict.why == (
        "fewer multiplications: as fast as 2.0 times the peak of a direct convolution; "
        "loop multiplies directly, at 80% of the peak"
    )


@pytest.mark.parametrize(
    ("notation", "factors", "why"),
    [
        (
            DENSE,
            {"loop": 1.25, "im2col": 2},
            "80% of the peak of multiply-adds, which limit this pass; im2col reaches 50%",
        ),
        (THIN, {"loop": 1.25, "im2col": 2}, "80% of the bandwidth of memory, which limits this pass; im2col reaches"),
        (THIN, {"loop": 0.8, "im2col": 2}, "memory would limit this pass, but its arrays stay in a cache; im2col"),
        (TINY, {"loop": 1e4, "im2col": 2e4}, "the call itself takes longer than its arithmetic; im2col"),
    ],
)
def test_reasons_are_what_limits_and_how_near_one_comes(
    notation: str, factors: dict[str, float], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (verdict,) = verdicts(compared(monkeypatch, times(winograd=9e4, tensordot=9e4, **factors), (notation, "forward")))
    assert verdict.winner.strategy == "loop"
    assert verdict.why.startswith(why)


def test_memory_of_its_own_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (comparison,) = compared(monkeypatch, times(loop=1, im2col=2, tensordot=9, winograd=9), (DENSE, "forward"))
    start = comparison._starts["im2col"]
    comparison._starts["im2col"] = type(start)(start.error, start.compile_seconds, 12 * 2**20)
    (verdict,) = verdicts([comparison])
    assert verdict.why.endswith("; im2col moves 12.0 MiB of its own, loop 0.0")


def test_what_the_spread_leaves_open_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (comparison,) = compared(monkeypatch, times(loop=1, im2col=2, tensordot=9, winograd=9), (DENSE, "forward"))
    second = LIMITS.seconds(comparison.problem)
    comparison.times["loop"] = [second, second, 3 * second, 3 * second]
    (verdict,) = verdicts([comparison])
    assert "open which is faster: the spread is larger than the lead over im2col" in verdict.why


def test_cold_calls_have_a_winner_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(problem: object, pass_: str, strategy: str, cold: bool) -> float:
        return {"loop": 2e-3, "winograd": 3e-3 if cold else 1e-3}.get(strategy, 9e-3)

    comparisons = compared(monkeypatch, seconds, (DENSE, "forward"), cold=True)
    (verdict,) = verdicts(comparisons)
    assert (verdict.winner.strategy, verdict.cold_winner) == ("winograd", "loop")
    standing = {s.name: s for s in standings(comparisons)}
    assert (standing["winograd"].hot, standing["winograd"].cold) == (1, pytest.approx(1.5))
    assert (standing["loop"].hot, standing["loop"].cold) == (pytest.approx(2), 1)


def test_standings_count_wins_and_take_geometric_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(problem: object, pass_: str, strategy: str, cold: bool) -> float:
        loop = 1e-3 if pass_ == "input_grad" else 4e-3
        return {"loop": loop, "winograd": 2e-3}.get(strategy, 8e-3)

    comparisons = compared(monkeypatch, seconds, (DENSE, "forward"), (DENSE, "weight_grad"), (DENSE, "input_grad"))
    found = standings(comparisons)
    assert [(s.name, s.wins, s.of) for s in found] == [
        ("winograd", 2, 3), ("loop", 1, 3), ("im2col", 0, 3), ("tensordot", 0, 3),
    ]  # fmt: skip
    assert found[0].hot == pytest.approx(2 ** (1 / 3))
    assert found[1].hot == pytest.approx(4 ** (1 / 3))
    assert "minimal filtering" in found[0].how


def test_the_headline_says_who_wins_and_whether_the_planner_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Comparison(Case(parse_layer(DENSE), "forward"), STRATEGIES, np.dtype(np.float32)).chosen
    other = "im2col"
    comparisons = compared(
        monkeypatch,
        lambda problem, pass_, strategy, cold: {chosen: 2e-3, other: 1e-3 if pass_ == "input_grad" else 3e-3}.get(
            strategy, 8e-3
        ),
        (DENSE, "forward"), (DENSE, "input_grad"),
    )  # fmt: skip
    first, planner = headline(comparisons)
    assert first.startswith("im2col is the fastest on 1 of 2 passes, 2 times as fast as the next")
    assert first.endswith(f"; {chosen} on 1.")
    assert planner == (
        "The planner chose the fastest strategy on 1 of 2 passes; elsewhere its choice takes up to 2.00 times as long."
    )


def test_other_libraries_are_measured_by_the_planners_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = compared(monkeypatch, times(loop=1, winograd=1, im2col=2, tensordot=9), (DENSE, "forward"))
    comparisons[0].peers["torch"] = None  # type: ignore[assignment]
    comparisons[0].times["torch"] = [2 * LIMITS.seconds(comparisons[0].problem)] * 3
    comparisons[0].cold_times["torch"] = []
    comparisons[0]._starts["torch"] = comparisons[0]._starts["loop"]
    assert headline(comparisons)[-1] == (
        "The planner's choice is 2.00 times as fast as torch, geometric mean, and slower on 0 of 1 pass."
    )
    assert [s.how for s in standings(comparisons) if s.name == "torch"] == [""]
