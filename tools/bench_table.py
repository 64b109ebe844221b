"""Print what changed between two recorded commits beyond noise, as Markdown: for a person, a job's summary, a comment.

    python tools/bench_table.py main HEAD --factor 1.1

asv decides what is noise: a change counts where it is larger than the factor and the samples tell the two apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from asv.machine import Machine

ROOT = Path(__file__).resolve().parents[1]

#: asv's marks, and what they mean, in the order in which a reader wants them.
MARKS = {"!": "fails now", "+": "slower", "-": "faster", "*": "works now", "x": "not comparable: other code"}
#: As many rows of a kind are shown.
MOST = 40


@dataclass(frozen=True)
class Row:
    """One benchmark with one set of parameters, as asv prints it."""

    mark: str
    before: str
    after: str
    ratio: str
    name: str


def compared(base: str, head: str, factor: float, machine: str, config: Path) -> list[Row]:
    """Return every benchmark that both commits have."""
    command = [sys.executable, "-m", "asv", "compare", "--config", str(config), "--machine", machine]
    done = subprocess.run(
        [*command, "--factor", str(factor), "--sort", "ratio", base, head], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return rows(done.stdout)


def rows(text: str) -> list[Row]:
    """Return the rows of asv's table, which is Markdown itself."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [Row(*row) for row in cells if len(row) == len(Row.__match_args__) and len(row[0]) <= 1]


def markdown(found: list[Row], base: str, head: str, factor: float) -> str:
    """Return a sentence of what changed, and a table of each kind of change."""
    kinds = {mark: [row for row in found if row.mark == mark] for mark in MARKS}
    counts = ", ".join(f"{len(kind)} {MARKS[mark]}" for mark, kind in kinds.items() if kind) or "nothing changed"
    lines = [
        f"### Benchmarks: {counts}",
        "",
        f"`{head[:12]}` against `{base[:12]}`, {len(found)} benchmarks; changes by more than {factor:g} times that the "
        "samples tell from noise.",
    ]
    for mark, kind in kinds.items():
        if kind:
            lines += ["", f"#### {MARKS[mark].capitalize()}", ""]
            lines += ["| ratio | before | after | benchmark |", "|---:|---:|---:|---|"]
            lines += [f"| {row.ratio} | {row.before} | {row.after} | `{row.name}` |" for row in kind[:MOST]]
        if len(kind) > MOST:
            lines += ["", f"and {len(kind) - MOST} more"]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument("--factor", type=float, default=1.1)
    parser.add_argument("--machine", default=Machine.get_unique_machine_name(), help="whose results")
    parser.add_argument("--config", type=Path, default=ROOT / "asv.conf.json")
    a = parser.parse_args()
    print(markdown(compared(a.base, a.head, a.factor, a.machine, a.config), a.base, a.head, a.factor))


if __name__ == "__main__":
    main()
