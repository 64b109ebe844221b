"""What a call costs besides its arithmetic: on the article's example, through each door, first, at import."""

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


def _function(nhwconv, x, w, dy):
    return lambda: nhwconv.conv2d(x, w, padding=1)


def _backward(nhwconv, x, w, dy):
    return lambda: nhwconv.conv2d_backward(x, w, dy, padding=1)


def _called_plan(nhwconv, x, w, dy):
    plan = nhwconv.plan("forward", x.shape, w.shape, dtype=x.dtype, padding=1)
    if not callable(plan):
        raise NotImplementedError
    return lambda: plan(x, w)


def _njit(nhwconv, x, w, dy):
    import numba

    @numba.njit
    def call(x, w):
        return nhwconv.conv2d(x, w, padding=1)

    try:
        call(x, w)
    except numba.errors.TypingError:  # an older commit's functions are Python's
        raise NotImplementedError from None
    return lambda: call(x, w)


def _torch(nhwconv, x, w, dy):
    torch, conv2d = _adapter()
    x, w = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in (x, w))
    return lambda: conv2d(x, w, padding=1)


def _torch_step(nhwconv, x, w, dy):
    torch, conv2d = _adapter()
    x, w, dy = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in (x, w, dy))
    x, w = (tensor.requires_grad_() for tensor in (x, w))
    return lambda: torch.autograd.grad(conv2d(x, w, padding=1), (x, w), dy)


def _adapter():
    """Return PyTorch and the adapter's conv2d, where both are there."""
    try:
        import torch

        from nhwconv.torch import conv2d
    except ImportError:
        raise NotImplementedError from None
    return torch, conv2d


class Doors:
    """The same few multiplications through every door of the package: what is timed is the door."""

    #: Written out, as in `common`: asv knows a parameter by its place.
    doors = {
        "function": _function,
        "backward": _backward,
        "called plan": _called_plan,
        "njit": _njit,
        "torch": _torch,
        "torch forward and backward": _torch_step,
    }
    params = list(doors)
    param_names = ("door",)
    timeout = 120

    def setup(self, door):
        import numpy as np

        import nhwconv

        x, w = np.ones((1, 8, 8, 4), np.float32), np.ones((8, 3, 3, 4), np.float32)
        self.call = self.doors[door](nhwconv, x, w, np.ones((1, 8, 8, 8), np.float32))
        self.call()

    def time_call(self, door):
        self.call()


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
