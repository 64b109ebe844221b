"""The micro-kernel alone, on operands that stay in L1."""

from .common import DTYPES, THREADS, limit_threads, roofline


class MicroKernel:
    params = (DTYPES, THREADS)
    param_names = ("dtype", "threads")
    #: That of the series' beginning: what is timed has stayed the same, though not the code around it.
    version = "21f8962f284eeccd0245cb4faf23fc7aa3821a1324d4974cc9e25050cdf3a03b"

    def setup(self, dtype, threads):
        import nhwconv  # noqa: F401 - without it nothing can be measured, which is no reason to skip

        peak_call = roofline().peak_call
        import numpy as np

        limit_threads(threads)
        self.call, _ = peak_call(np.dtype(dtype), threads)
        self.call()

    def time_tiles(self, dtype, threads):
        self.call()
