"""Random problems against the oracle for as long as wanted; a failing one is reduced and kept.

    python tests/support/soak.py                          # ten minutes, from a new seed
    python tests/support/soak.py --seconds 60 --seed 7    # the same problems each time
    python tests/support/soak.py --again soak-7.txt       # the failing problem that a soak kept

Every problem runs through every pass and strategy, in a dtype of its own. Exit code 1 means that one failed.
"""

from __future__ import annotations

import argparse
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cases import PASSES, Case, cases, draw_data, exact, run, supporting
from tolerance import assert_close

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
#: Problems of one run of Hypothesis; after each the clock is read.
BATCH = 200


@dataclass(frozen=True)
class Problem:
    """What is tried."""

    case: Case
    dtype: str
    seed: int


def check(problem: Problem) -> int:
    """Compare every pass and strategy with the oracle; return how many there were."""
    case, dtype = problem.case, DTYPES[problem.dtype]
    data, count = draw_data(case, dtype, problem.seed), 0
    for pass_ in PASSES:
        expected = exact(case, data, pass_)
        for strategy in supporting(case, pass_, dtype=dtype):
            got = run(case, data, pass_, strategy)
            assert_close(got, *expected, case.length(pass_), strategy, problem)
            count += 1
    return count


class Soak:
    """Batches of problems; remembers how many there were, and the last one."""

    def __init__(self) -> None:
        self.problems = self.results = 0
        self.last: Problem | None = None

    def batch(self, number: int) -> None:
        """Try some problems; of a failing one, Hypothesis tries the smallest last."""

        @seed(number)
        @settings(
            max_examples=BATCH, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck), derandomize=False,
        )  # fmt: skip
        @given(st.builds(Problem, cases(), st.sampled_from(list(DTYPES)), st.integers(0, 999)))
        def every(problem: Problem) -> None:
            self.last = problem
            self.results += check(problem)
            self.problems += 1

        every()


def main(arguments: list[str] | None = None, say: Callable[[str], Any] = print) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long, 600 where it is not given")
    parser.add_argument("--seed", type=int, default=None, help="of the problems; a random one where it is not given")
    parser.add_argument("--folder", type=Path, default=Path(), help="where a failing problem is kept")
    parser.add_argument("--again", type=Path, metavar="FILE", help="run the problem that a soak kept")
    options = parser.parse_args(arguments)
    if options.again:
        problem = eval(options.again.read_text())
        say(f"again: {problem}")
        check(problem)
        say("it is right now")
        return 0
    first = secrets.randbelow(10**6) if options.seed is None else options.seed
    say(f"seed {first}")
    soak, number, end = Soak(), 0, time.monotonic() + options.seconds
    while not number or time.monotonic() < end:
        try:
            soak.batch(first * 10**6 + number)
        except Exception as error:  # of whatever kind: it is kept, and said
            kept = options.folder / f"soak-{first}.txt"
            kept.write_text(f"{soak.last!r}\n")
            say(f"failed, kept in {kept}: {soak.last}\n{type(error).__name__}: {error}")
            return 1
        number += 1
    say(f"{soak.problems} problems, {soak.results} results, all of them right")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
