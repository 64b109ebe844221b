"""What a call costs besides its arithmetic: on the article's example, in a new process, at import."""

from .common import Calls

#: Written out, as in `common`: asv knows a parameter by its place.
STRATEGIES = ["auto", "loop", "tensordot"]


class Article:
    """One image of 4 x 4, one kernel of 2 x 2: a few dozen multiplications, so the time is the call's own."""

    params = STRATEGIES
    param_names = ("strategy",)

    def setup(self, strategy):
        self.calls = Calls("article.4x4", strategy)
        self.calls.forward()
        self.calls.weight_grad()
        self.calls.input_grad()

    def time_forward(self, strategy):
        self.calls.forward()

    def time_weight_grad(self, strategy):
        self.calls.weight_grad()

    def time_input_grad(self, strategy):
        self.calls.input_grad()


class _NewProcess:
    """asv runs the code of a ``timeraw_`` benchmark in a process of its own, and times its last part."""

    number = 1
    repeat = 3
    rounds = 1
    warmup_time = 0
    timeout = 300


_BACKWARD = """
import numpy as np, nhwconv
x, w = np.ones((2, 16, 16, 16), np.float32), np.ones((16, 3, 3, 16), np.float32)
"""

_EMPTY_CACHE = """
import os, tempfile
folder = tempfile.TemporaryDirectory()
os.environ["NUMBA_CACHE_DIR"] = os.environ["NHWCONV_CACHE_DIR"] = folder.name
"""


class FirstCall(_NewProcess):
    """The first backward pass of a process: with nothing compiled yet, and with kernels in the cache."""

    params = STRATEGIES
    param_names = ("strategy",)

    def setup(self, strategy):
        Calls("lenet5.2", strategy)  # skips what a commit does not have
        exec(_BACKWARD + self._call(strategy), {})  # so that the cache holds what the warm one needs

    def _call(self, strategy):
        return f"nhwconv.conv2d_backward(x, w, x, padding=1, strategy='{strategy}')"

    def timeraw_cold(self, strategy):
        return self._call(strategy), _EMPTY_CACHE + _BACKWARD

    def timeraw_warm(self, strategy):
        return self._call(strategy), _BACKWARD


class Import(_NewProcess):
    def timeraw_import(self):
        return "import nhwconv"
