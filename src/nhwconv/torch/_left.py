"""Which convolutions are left to PyTorch, because it does them sooner: a rule on the problem, never a clock.

PyTorch sums few pixels of a single image in C++ from end to end, without oneDNN, and records and computes its gradients
before nhwconv, whose part of that is in Python, has begun. With more images, groups or a larger kernel PyTorch prepares
calls of oneDNN, which take longer than all of nhwconv's. Where nothing is recorded, there is nothing to gain.
"""

from __future__ import annotations

from ..problem import ConvProblem

__all__ = ["left_to_torch"]

#: Most pixels of the result, most products, and largest kernel of what is left.
PIXELS = 64
PRODUCTS = 2**19
KERNEL = 3


def left_to_torch(problem: ConvProblem) -> str | None:
    """Return why PyTorch does a convolution and its gradients, or None where nhwconv does."""
    pixels = problem.oh * problem.ow
    small = (
        problem.n == 1 and pixels <= PIXELS and pixels * problem.d * problem.kh * problem.kw * problem.cg <= PRODUCTS
    )
    if small and problem.groups == 1 and min(problem.kh, problem.kw) <= KERNEL:
        return f"one image of {pixels} pixels is sooner computed than called for"
    return None
