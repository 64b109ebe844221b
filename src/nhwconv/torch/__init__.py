"""PyTorch: the convolutions of `torch.nn` in one and two dimensions, on nhwconv's kernels, on the CPU.

Images and weights are NCHW in meaning and channels_last in memory, which is nhwconv's NHWC: they pass as they lie,
in both directions. What nhwconv doesn't do (other dtypes, devices, padding modes), and what is wrong, goes to PyTorch's
own convolution, so that results and errors are PyTorch's; the logger ``nhwconv.torch`` says why, at level DEBUG.

Import this module before the first convolution of the process, so that it can choose OpenMP for Numba's threads: they
are then PyTorch's. Two pools would stall each other. ``torch.set_num_threads`` holds for nhwconv too.
"""

from . import _onnx as _onnx
from ._function import conv1d, conv2d, conv_transpose1d, conv_transpose2d
from ._layers import (
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    Replaced,
    _new_routed,
    replace_conv,
    replace_conv2d,
    restore_conv,
    restore_conv2d,
)

__all__ = [
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "Replaced",
    "conv1d",
    "conv2d",
    "conv_transpose1d",
    "conv_transpose2d",
    "replace_conv",
    "replace_conv2d",
    "restore_conv",
    "restore_conv2d",
]

# What is pickled, traced and printed has the public names, and doctest looks into other files for those alone that are
# listed here.
__test__ = {name: globals()[name] for name in __all__}
for _public in (*__test__.values(), _new_routed):
    _public.__module__ = __name__
del _public
