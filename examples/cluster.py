"""The gradients of a layer on a Dask cluster of processes, with its dashboard and a progress bar.

    python examples/cluster.py
    python examples/cluster.py --samples 50000    # more than the workers' memory: blocks come and go

A worker process has one thread, and a task computes one block of samples with it.
Needs ``pip install 'nhwconv[dask]'``.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import dask.array as da
import numpy as np
from distributed import Client, LocalCluster, progress

import nhwconv.dask


def main() -> None:
    """Start a cluster, compute, and say how fast it was."""
    parser = argparse.ArgumentParser(description="Gradients of a layer on a Dask cluster.")
    parser.add_argument("--samples", type=int, default=4096, help="images (default: %(default)s)")
    parser.add_argument("--block", type=int, default=64, help="images a block (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument("--memory", default="1GiB", help="memory of a worker (default: %(default)s)")
    arguments = parser.parse_args()
    with (
        LocalCluster(n_workers=arguments.workers, threads_per_worker=1, memory_limit=arguments.memory) as cluster,
        Client(cluster) as client,
    ):
        print(f"dashboard: {client.dashboard_link}")
        generator = da.random.default_rng(0)
        chunks = (arguments.block, -1, -1, -1)
        x, dy = (
            generator.standard_normal((arguments.samples, 56, 56, channels), chunks=chunks).astype(np.float32)
            for channels in (16, 32)
        )
        w = np.random.default_rng(1).standard_normal((32, 3, 3, 16)).astype(np.float32)
        g = nhwconv.dask.conv2d_backward(x, w, dy, needs=("dw", "db"), padding=1)
        start = perf_counter()
        futures = client.compute([g.dw, g.db])
        progress(futures, notebook=False)
        dw, db = client.gather(futures)
        print(f"\n{(x.nbytes + dy.nbytes) / 2**20:.0f} MiB of images and gradients in {perf_counter() - start:.1f} s")
        print(f"|dw| = {np.linalg.norm(dw):.6g}, |db| = {np.linalg.norm(db):.6g}")


if __name__ == "__main__":
    main()
