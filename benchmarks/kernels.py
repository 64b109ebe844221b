"""The micro-kernel alone, on operands that stay in L1."""

from .common import DTYPES, THREADS


class MicroKernel:
    params = (DTYPES, THREADS)
    param_names = ("dtype", "threads")

    def setup(self, dtype, threads):
        import nhwconv  # noqa: F401 - without it nothing can be measured, which is no reason to skip

        try:
            from nhwconv.compare.roofline import peak_call
        except ImportError:
            raise NotImplementedError from None
        import numba
        import numpy as np

        if threads > numba.config.NUMBA_NUM_THREADS:
            raise NotImplementedError
        numba.set_num_threads(threads)
        self.call, _ = peak_call(np.dtype(dtype), threads)
        self.call()

    def time_tiles(self, dtype, threads):
        self.call()
