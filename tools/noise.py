"""Record one commit twice, and print what its recordings differ by: the thresholds for asv.conf.json.

    python tools/noise.py                        # the last commit, all benchmarks
    python tools/noise.py --bench layers.Time    # some of them; whatever else is given goes to asv run

A class of benchmarks gets the largest difference that any of its times or sizes shows, rounded up to a whole percent,
and at least asv's default of 5%. Differences of the machine's own making, not of ours, are below it from then on.
Nothing is left in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from asv.results import Results

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / ".asv" / "noise"
#: asv's own threshold, where none is set.
LEAST = 0.05


def record(commit: str, run: int, arguments: list[str]) -> Path:
    """Run the benchmarks of a commit, and return the folder of the results."""
    folder = SCRATCH / str(run)
    config = ROOT / ".asv.noise.json"
    text = (ROOT / "asv.conf.json").read_text(encoding="utf-8")
    config.write_text(text.replace('"benchmarks/results"', json.dumps(str(folder))), encoding="utf-8")
    command = [sys.executable, "-m", "asv", "run", "--config", str(config), "--show-stderr", *arguments]
    try:
        subprocess.run([*command, f"{commit}^!"], check=True, cwd=ROOT)
    finally:
        config.unlink()
    return folder


def values(folder: Path) -> dict[tuple[str, int], float]:
    """Return what each benchmark gave, by its name and the place of its parameters."""
    found = {}
    for file in folder.glob("*/*.json"):
        if file.name != "machine.json":
            results = Results.load(str(file), file.parent.name)
            for key in results.get_all_result_keys():
                for place, value in enumerate(results.get_result_value(key, results.get_result_params(key))):
                    if value is not None and not math.isnan(value):
                        found[key, place] = value
    return found


def thresholds(recordings: Iterable[dict[tuple[str, int], float]]) -> dict[str, float]:
    """Return, by a pattern for each class, the largest difference between recordings, and at least asv's own."""
    recordings = list(recordings)
    found: dict[str, float] = {}
    for key in set.intersection(*(set(recording) for recording in recordings)):
        seen = [recording[key] for recording in recordings]
        if min(seen) > 0:
            pattern = f"^{re.escape(key[0].rpartition('.')[0])}\\."
            found[pattern] = max(found.get(pattern, LEAST), max(seen) / min(seen) - 1)
    return {pattern: math.ceil(100 * found[pattern] - 1e-9) / 100 for pattern in sorted(found)}


def main() -> None:
    """Record, and print the thresholds as they stand in asv.conf.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("--runs", type=int, default=2)
    known, rest = parser.parse_known_args()
    shutil.rmtree(SCRATCH, ignore_errors=True)
    found = thresholds(values(record(known.commit, run, rest)) for run in range(known.runs))
    print(f'"regressions_thresholds": {json.dumps(found, indent=4)}')


if __name__ == "__main__":
    main()
