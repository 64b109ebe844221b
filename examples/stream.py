"""The gradient of a layer over a file that is larger than the memory that the program may have.

    python examples/stream.py
    python examples/stream.py --samples 20000 --memory 512

A gradient is a sum over samples, so it can be taken in batches: ``accumulate=True`` adds each batch to what is there.
The images lie in a file that NumPy maps into memory, and the operating system brings in the pages that a batch reads.
On Linux the program limits its own memory (RLIMIT_DATA, which mapped files do not count towards), and shows first that
the file as a whole does not fit.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

import nhwconv as nc

Array = npt.NDArray[Any]

MIB = 2**20


def write_images(path: Path, samples: int, size: int, channels: int, batch: int) -> None:
    """Write a file of random images, a batch at a time."""
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(path, "w+", np.float32, (samples, size, size, channels))
    for start in range(0, samples, batch):
        part = images[start : start + batch]
        part[...] = rng.standard_normal(part.shape, np.float32)
    images.flush()


def limit_memory(mib: int) -> None:
    """Let this process have so much more memory than it has now."""
    used = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    limit = int(used) * 1024 + mib * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def gradients(images: Array, w: Array, batch: int) -> tuple[Array, Array]:
    """Return the gradients of ``(y**2).sum() / 2``, y being the layer's output for all images."""
    dw, db = np.zeros_like(w), np.zeros(w.shape[0], w.dtype)
    for start in range(0, len(images), batch):
        x = images[start : start + batch]
        y = nc.conv2d(x, w, padding=1)  # and dy: the derivative of a square's half
        out = nc.Gradients(dw=dw, db=db)
        nc.conv2d_backward(x, w, y, needs=("dw", "db"), padding=1, out=out, accumulate=True)
    return dw, db


def main() -> None:
    """Write the file, limit the memory, stream."""
    parser = argparse.ArgumentParser(description="Gradients over a file larger than memory.")
    parser.add_argument("--samples", type=int, default=8192, help="images in the file (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="their height and width (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=256, help="MiB that may be allocated (default: %(default)s)")
    arguments = parser.parse_args()
    channels = 8
    w = np.random.default_rng(1).standard_normal((16, 3, 3, channels)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npy")
        write_images(path, arguments.samples, arguments.size, channels, arguments.batch)
        images = np.load(path, mmap_mode="r")
        gradients(images[:1], w, 1)  # compiles, and starts the threads
        print(f"{path.stat().st_size / MIB:.0f} MiB of images, {arguments.memory} MiB of memory")
        if sys.platform == "linux":
            limit_memory(arguments.memory)
            try:
                np.array(images)
            except MemoryError:
                print("the file does not fit")
        start = perf_counter()
        dw, db = gradients(images, w, arguments.batch)
        print(f"streamed in {perf_counter() - start:.1f} s")
        print(f"|dw| = {np.linalg.norm(dw):.6g}, |db| = {np.linalg.norm(db):.6g}")


if __name__ == "__main__":
    main()
