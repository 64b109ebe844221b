"""The micro-kernel alone, on operands that stay in L1."""

from .common import DTYPES, THREADS, limit_threads, roofline


class MicroKernel:
    params = (DTYPES, THREADS)
    param_names = ("dtype", "threads")

    def setup(self, dtype, threads):
        import nhwconv  # noqa: F401 - without it nothing can be measured, which is no reason to skip

        peak_call = roofline().peak_call
        import numpy as np

        limit_threads(threads)
        self.call, _ = peak_call(np.dtype(dtype), threads)
        self.call()

    def time_tiles(self, dtype, threads):
        self.call()
