"""Time layers and networks against PyTorch and JAX; fill docs/performance.md and README.md, and draw docs/report.svg.

    make report                                                # all of it: about an hour
    make report ARGS="--short"                                 # fewer networks and layers, float32: eight minutes
    make report ARGS="--dtypes float32 --networks torch:resnet18 --workloads resnet50"
    make report ARGS="--from docs/report.json"                 # print and draw what was measured before

Layers are timed by `nhwconv compare`, each library in a process of its own; networks by tools/networks.py, each in a
process of its own, with the framework's convolutions and nhwconv's in turns. What was measured, with machine and
versions, is kept in docs/report.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

WORKLOADS = [
    "lenet5", "cifar", "alexnet", "vgg16", "resnet50", "mobilenetv2", "resnext50", "convnext", "unet", "deeplab",
]  # fmt: skip
NETWORKS = [
    "torch:resnet18", "torch:resnet50", "torch:mobilenet_v2", "torch:convnext_tiny", "torch:densenet121",
    "jax:resnet18",
]  # fmt: skip
DTYPES = ["float32", "float64"]
#: What `--short` takes, where nothing else is asked for.
SHORT = {
    "workloads": ["lenet5", "resnet50", "mobilenetv2", "resnext50", "convnext"],
    "networks": ["torch:resnet18", "torch:mobilenet_v2", "torch:convnext_tiny", "jax:resnet18"],
    "dtypes": ["float32"],
    "seconds": 0.05,
    "network_seconds": 5.0,
}
PEERS = {"torch": "PyTorch", "jax": "JAX"}
PASSES = {"forward": "forward", "weight_grad": "weight gradient", "input_grad": "input gradient"}

#: One measurement: kind ("layer" or "network"), name, pass, dtype, and seconds by contender.
Row = dict[str, Any]


# --------------------------------------------------------------------------------------------- measuring


#: The command, as the environment has it that this runs in.
NHWCONV = Path(sys.executable).with_name("nhwconv")


def run(program: object, *arguments: object, **environment: str) -> str:
    """Run a program, untuned; return what it prints."""
    environment = {**os.environ, "NHWCONV_TUNING": "off", **environment}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"this failed: {' '.join(command)}")
    return done.stdout


def machine() -> dict[str, str]:
    """Return what `nhwconv info` says of this machine, and the versions of the others."""
    facts = [re.split(r"  +", line, maxsplit=1) for line in run(NHWCONV, "info").splitlines()]
    found = {name: text for name, text in facts if name in ("nhwconv", "Python", "NumPy", "Numba", "CPU", "threads")}
    peaks = [text for name, text in facts if name == "peak"]
    versions = {PEERS[name]: metadata.version(name) for name in PEERS}
    return {**found, "peak": "; ".join(peaks), **versions, "date": datetime.date.today().isoformat()}


def layers(workloads: list[str], dtype: str, seconds: float) -> Iterator[Row]:
    """Yield a row for each pass of each layer."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        names = [option for name in workloads for option in ("--workload", name)]
        run(NHWCONV, "compare", *names, "--strategies", "depthwise,loop,winograd", "--against",
            ",".join(PEERS), "--dtype", dtype, "--seconds", seconds, "--json", file)  # fmt: skip
        timed: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        for row in json.loads(file.read_text(encoding="utf-8")):
            contender = "nhwconv" if row["chosen"] else row["strategy"]  # what "auto" takes is what a user gets
            if contender in ("nhwconv", *PEERS):
                timed[row["layer"], row["pass"]][contender] = row["seconds"]
    for (name, pass_), times in timed.items():
        yield {"kind": "layer", "name": name, "pass": pass_, "dtype": dtype, "seconds": times}


def network(name: str, dtype: str, given: argparse.Namespace) -> Row:
    """Return the row of a training step of one network."""
    framework, model = name.split(":")
    options = ["--dtype", dtype, "--batch", given.batch, "--size", given.size, "--seconds", given.network_seconds]
    # Two libraries take turns in this process: bound, the threads of both would wait on the same cores.
    printed = run(sys.executable, ROOT / "tools" / "networks.py", framework, model, *options, OMP_PROC_BIND="false")
    return {"kind": "network", "name": name, "pass": "step", "dtype": dtype, "seconds": json.loads(printed)}


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what has been measured so far, after each network and dtype; say on standard error what comes next."""
    command = f'make report ARGS="{given.given}"' if given.given else "make report"
    found: dict[str, Any] = {"machine": machine(), "command": command, "images": [given.batch, given.size], "rows": []}
    for dtype in given.dtypes:
        for name in given.networks:
            print(f"{name}, {dtype}", file=sys.stderr)
            found["rows"].append(network(name, dtype, given))
            yield found
        if given.workloads:
            print(f"layers, {dtype}", file=sys.stderr)
            found["rows"] += layers(given.workloads, dtype, given.seconds)
            yield found


# ---------------------------------------------------------------------------------------------- printing


def gain(row: Row, peer: str) -> float | None:
    """Return how many times as long as nhwconv a peer took; None where either has no time."""
    times = row["seconds"]
    return times[peer] / times["nhwconv"] if peer in times and "nhwconv" in times else None


def mean(gains: Iterable[float | None]) -> float | None:
    """Return the geometric mean of those that are known."""
    known = [math.log(g) for g in gains if g is not None]
    return math.exp(sum(known) / len(known)) if known else None


def times_as_fast(value: float | None) -> str:
    """Write a ratio."""
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def milliseconds(seconds: float | None) -> str:
    """Write a time."""
    return "-" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """Return a table; all columns but the first two are numbers."""
    rule = ["---", "---", *["--:"] * (len(header) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def title(name: str) -> str:
    """Return what people call a network of NETWORKS: "resnet18 in PyTorch"."""
    framework, model = name.split(":")
    return f"{model} in {PEERS[framework]}"


def tables(found: dict[str, Any]) -> str:
    """Return the whole report as Markdown."""
    rows = found["rows"]
    batch, size = found["images"]
    steps = [
        [title(row["name"]), row["dtype"], milliseconds(row["seconds"][peer]), milliseconds(row["seconds"]["nhwconv"]),
         times_as_fast(gain(row, peer))]
        for row in rows if row["kind"] == "network" for peer in row["seconds"] if peer != "nhwconv"
    ]  # fmt: skip
    single = [row for row in rows if row["kind"] == "layer"]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in single:
        groups[row["pass"], row["dtype"]].append(row)
    means = [
        [PASSES[p], dtype, *(times_as_fast(mean(gain(row, peer) for row in of)) for peer in PEERS)]
        for (p, dtype), of in groups.items()
    ]
    each = [
        [row["name"], f"{PASSES[row['pass']]}, {row['dtype']}",
         *(milliseconds(row["seconds"].get(name)) for name in ("nhwconv", *PEERS)),
         *(times_as_fast(gain(row, peer)) for peer in PEERS)]
        for row in single
    ]  # fmt: skip
    versus = [f"times as fast as {label}" for label in PEERS.values()]
    return "\n\n".join((
        f"**A training step, {batch} images of {size} x {size}:** the framework's own convolutions, and nhwconv's in "
        "their place. Milliseconds, medians.",
        markdown(["network", "dtype", "as it is", "with nhwconv", "times as fast"], steps),
        "**Layers,** geometric means over all of those below:",
        markdown(["pass", "dtype", *versus], means),
        "**Each layer.** Milliseconds, 20th percentiles:",
        markdown(["layer", "pass", "nhwconv", *PEERS.values(), *versus], each),
        f"**Measured** by `{found['command']}` **on:** "
        + "; ".join(f"{name} {text}" for name, text in found["machine"].items()) + ".",
    ))  # fmt: skip


def summary(rows: list[Row]) -> str:
    """Return what the README says: the networks in PyTorch, in float32."""
    found = [
        row for row in rows if row["kind"] == "network" and row["dtype"] == "float32" and "torch" in row["seconds"]
    ]
    names = [row["name"].split(":")[1] for row in found]
    gains = [times_as_fast(gain(row, "torch")) for row in found]
    return markdown(["a training step in PyTorch", *names], [["times as fast with nhwconv", *gains]])


def fill(page: Path, text: str) -> None:
    """Put the report into its place in a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- make report: begin -->\n")
    _, mark, after = rest.partition("<!-- make report: end -->\n")
    if not mark:
        raise SystemExit(f"{page} has no place for the report")
    page.write_text(f"{before}<!-- make report: begin -->\n\n{text}\n\n{mark}{after}", encoding="utf-8")


# --------------------------------------------------------------------------------------------- the chart

#: A card with colours of its own for the light and the dark, so that it can be read on whatever page it lies.
STYLE = """
.card { fill: #ffffff; stroke: #d0d7de } text { fill: #30343b; font: 12px system-ui, sans-serif }
.head { font-weight: 600 } .grid { stroke: #e4e7eb } .even { stroke: #57606a; stroke-dasharray: 4 3 }
.quiet { fill: #57606a }
.torch { fill: #2563a8; stroke: #2563a8 } .jax { fill: #b5541b; stroke: #b5541b } .float64 { fill: #ffffff }
@media (prefers-color-scheme: dark) {
.card { fill: #161b22; stroke: #30363d } text { fill: #e6edf3 } .grid { stroke: #2a313a } .even { stroke: #9aa4af }
.quiet { fill: #9aa4af } .torch { fill: #6cb0f5; stroke: #6cb0f5 } .jax { fill: #f0965c; stroke: #f0965c }
.float64 { fill: #161b22 } }
"""
LEFT, RIGHT, TOP = 190, 640, 84
#: The height of a dot with its line, and of what is between the chart's rows.
LANE, GAP = 9, 12
EMPTY = "No figures yet: make report draws this chart."

#: The smallest gain, their geometric mean, and the largest.
Range = tuple[float, float, float]


def chart_rows(rows: list[Row]) -> dict[str, dict[tuple[str, str], Range]]:
    """Return the chart's rows: for each network, and the layers of each workload, the gains by (dtype, peer)."""
    gains: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        name = title(row["name"]) if row["kind"] == "network" else f"layers of {row['name'].split('.')[0]}"
        for peer in PEERS:
            if (value := gain(row, peer)) is not None:
                gains[name][peer, row["dtype"]].append(value)
    return {name: {key: (min(of), mean(of) or 0, max(of)) for key, of in by.items()} for name, by in gains.items()}


def draw(rows: list[Row]) -> str:
    """Return an SVG: a dot for each network, and one with a line for the layers of one, on a logarithmic axis."""
    lines = chart_rows(rows)
    values = [g for by in lines.values() for gains in by.values() for g in gains] or [1.0]
    low, high = math.floor(math.log2(min(*values, 0.5))), math.ceil(math.log2(max(*values, 4.0)))
    low -= low % 2 if high - low >= 8 else 0  # a grid of every other power has to meet 1
    bottom = TOP + max(sum(GAP + LANE * len(by) for by in lines.values()), 60)

    def x_of(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (math.log2(value) - low) / (high - low)

    parts = [f'<rect class="card" x=".5" y=".5" width="{RIGHT + 29}" height="{bottom + 33}" rx="8"/>', *_head(lines)]
    for power in range(low, high + 1, 1 if high - low < 8 else 2):
        x, kind = f"{x_of(2.0**power):.1f}", "grid" if power else "even"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{TOP - 8}" y2="{bottom}"/>')
        parts.append(f'<text class="quiet" x="{x}" y="{bottom + 18}" text-anchor="middle">{2.0**power:g}</text>')
    if not lines:
        parts.append(f'<text class="quiet" x="{LEFT}" y="{TOP + 20}">{EMPTY}</text>')
    y = TOP + GAP / 2
    for name, by in lines.items():
        middle = y + LANE * len(by) / 2
        parts.append(f'<text x="{LEFT - 14}" y="{middle + 4}" text-anchor="end">{name}</text>')
        for at, ((peer, dtype), (least, centre, most)) in enumerate(sorted(by.items(), key=_order)):
            lane = y + LANE * (at + 0.5)
            if least < most:
                parts.append(
                    f'<line class="{peer}" x1="{x_of(least):.1f}" x2="{x_of(most):.1f}" y1="{lane}" y2="{lane}"/>'
                )
            parts.append(_dot(x_of(centre), lane, peer, dtype))
        y += GAP + LANE * len(by)
    body = "\n".join(parts)
    label = "How many times as fast networks and layers are with nhwconv"
    box = f'viewBox="0 0 {RIGHT + 30} {bottom + 34}" width="{RIGHT + 30}" role="img" aria-label="{label}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'


def _order(item: tuple[tuple[str, str], Range]) -> tuple[int, str]:
    """Sort by library, then by dtype."""
    (peer, dtype), _ = item
    return list(PEERS).index(peer), dtype


def _head(lines: dict[str, dict[tuple[str, str], Range]]) -> list[str]:
    """Return the chart's title and key, which explains float64's dots where there are any."""
    parts = [f'<text class="head" x="{LEFT}" y="24">Times as fast, with nhwconv\'s convolutions</text>']
    keys = [("torch", "", "than PyTorch's"), ("jax", "", "than JAX's"), ("torch", "float64", "hollow: float64")]
    double = any(dtype == "float64" for by in lines.values() for _, dtype in by)
    for at, (peer, dtype, label) in enumerate(keys if double else keys[:2]):
        parts.append(_dot(LEFT + 5 + 120 * at, 42, peer, dtype))
        parts.append(f'<text class="quiet" x="{LEFT + 14 + 120 * at}" y="46">{label}</text>')
    words = "Networks: a training step. Layers: the mean, from least to most."
    return [*parts, f'<text class="quiet" x="{LEFT}" y="66">{words}</text>']


def _dot(x: float, y: float, peer: str, dtype: str) -> str:
    kind = f"{peer} float64" if dtype == "float64" else peer
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5" stroke-width="1.5"/>'


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, help="a report.json; nothing is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder of performance.md; default: docs")
    parser.add_argument("--short", action="store_true", help="fewer networks and layers, in float32, for shorter times")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--workloads", nargs="*", default=WORKLOADS, help="layers, as nhwconv compare has them")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="framework:network, such as torch:resnet18")
    parser.add_argument("--batch", type=int, default=8, help="images of a network's step")
    parser.add_argument("--size", type=int, default=224, help="their rows and columns")
    parser.add_argument("--seconds", type=float, default=0.2, help="how long each contender is timed on a pass")
    parser.add_argument("--network-seconds", type=float, default=15, help="how long each contender steps")
    if parser.parse_known_args(given)[0].short:
        parser.set_defaults(**SHORT)
    found = parser.parse_args(given)
    found.given = " ".join(sys.argv[1:] if given is None else given)
    return found


def main() -> None:
    """Measure, or read what was measured; print, fill in and draw."""
    given = arguments()
    source = given.source or given.out / "report.json"
    if not given.source:
        for found in measure(given):  # what was measured is kept, whatever happens to the rest
            source.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(source.read_text(encoding="utf-8"))
    text = tables(found)
    print(text)
    fill(given.out / "performance.md", text)
    if given.out == ROOT / "docs":
        fill(ROOT / "README.md", summary(found["rows"]))
    (given.out / "report.svg").write_text(draw(found["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main()
