"""A hash of the result of every pass and strategy that promises its bits, for some 200 problems.

``python tests/properties/bits.py FILE`` writes them; ``--against FILE`` compares with what another version of the
package wrote **on the same machine**, and names what differs. The problems are the random ones that the tests have, and
layers of networks, cut down; each runs in float32 and float64, some in half types, and so does `conv2d_backward`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "support")]

import nhwconv as nc
from cases import PASSES, Case, draw_data, random_case, run
from nhwconv.workloads import WORKLOADS, workload

AUTO = ("depthwise", "loop", "winograd")
#: Elements of x that a layer is cut down to, in images and rows.
SMALL = 400_000


def layers() -> Iterator[Case]:
    """Yield the layers of networks, of fewer images and rows where they are large."""
    for layer in (layer for name in WORKLOADS for layer in workload(name)):
        n = max(1, min(layer.n, 2))
        rows = max(layer.kh * layer.dilation[0] + 8, min(layer.h, SMALL // (n * layer.w * layer.c)))
        (top, left) = layer.padding
        yield Case(n, min(rows, layer.h), layer.w, layer.c, layer.d, layer.kh, layer.kw, layer.stride,
                   ((top, top), (left, left)), layer.dilation, layer.groups)  # fmt: skip


def problems() -> list[tuple[Case, Any]]:
    """Return the problems and the dtype of each."""
    rng = np.random.default_rng(11)
    some = [replace(random_case(rng), n=int(rng.integers(1, 4))) for _ in range(110)]
    found = [(case, dtype) for case in dict.fromkeys([*some, *layers()]) for dtype in (np.float32, np.float64)]
    return found + [(case, dtype) for case in some[:12] for dtype in (np.float16, ml_dtypes.bfloat16)]


def hashed(*arrays: np.ndarray) -> str:
    """Return a hash of the bits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def bits() -> dict[str, str]:
    """Return the hashes by what was computed."""
    found = {}
    for case, dtype in problems():
        data = draw_data(case, dtype)
        for pass_ in PASSES:
            for strategy in AUTO:
                try:
                    nc.plan(pass_, case.x_shape, case.w_shape, dtype=dtype, **case.options, strategy=strategy)
                except ValueError:  # it cannot do this one
                    continue
                more = {"b": data.b} if pass_ == "forward" else {}
                got = run(case, data, pass_, strategy, **more)
                found[f"{case} {np.dtype(dtype).name} {pass_} {strategy}"] = hashed(got)
        got = nc.conv2d_backward(data.x, data.w, data.dy, **case.options)
        found[f"{case} {np.dtype(dtype).name} backward"] = hashed(*got)
        again = nc.conv2d_backward(data.x, data.w, data.dy, **case.options, out=got, accumulate=True)
        found[f"{case} {np.dtype(dtype).name} accumulated"] = hashed(*again)
    return found


def main() -> None:
    """Write the hashes, or compare with those of another version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", help="where the hashes go")
    parser.add_argument("--against", help="hashes that another version wrote")
    arguments = parser.parse_args()
    found = bits()
    if arguments.file:
        Path(arguments.file).write_text(json.dumps(found, indent=0))
    if arguments.against:
        before = json.loads(Path(arguments.against).read_text())
        differ = [name for name in before if found.get(name) != before[name]]
        print(*differ, sep="\n")
        print(f"{len(differ)} of {len(before)} differ, {len(found.keys() - before.keys())} are new")
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
