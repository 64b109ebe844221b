"""Which passes are left to PyTorch, because it does them sooner: a table of rules on the problem, never a clock.

A rule holds on processors whose vectors have its width, since both libraries choose their kernels by that. A pass that
is left costs nothing: results lie in memory as PyTorch's anyway, and each pass goes its own way. So a rule that is
wrong somewhere costs what nhwconv would have gained there, and no more. A strategy that somebody asks for is never
overruled.
"""

from __future__ import annotations

from typing import NamedTuple

from ..problem import ConvProblem, Pass
from ..runtime import machine

__all__ = ["RULES", "Rule", "left_of_layer", "left_to_torch"]

#: What no problem exceeds.
MANY = 2**31


class Rule(NamedTuple):
    """A kind of problem of which PyTorch does a pass sooner.

    Attributes
    ----------
    pass_ : str
        The pass, of the convolution: what a transposed one computes is another pass of it.
    reason : str
        Which layers, in words, and what was measured.
    vectors : int
        The bytes of the processor's vectors.
    dtype : str
        Of the arrays.
    groups, channels, pixels : range
        The groups, the input channels of one, and the output's pixels of one image.
    """

    pass_: Pass
    reason: str
    vectors: int
    dtype: str = "float32"
    groups: range = range(1, MANY)
    channels: range = range(1, MANY)
    pixels: range = range(1, MANY)

    def has_layer(self, groups: int, channels: int, dtype: str) -> bool:
        """Whether this is about layers of so many groups and input channels of each, on this processor."""
        return (
            self.vectors == machine.vector_bytes()
            and dtype == self.dtype
            and groups in self.groups
            and channels in self.channels
        )


#: All of them, each with the speed of nhwconv's pass in PyTorch's. There is none so far: where nhwconv was slower, by a
#: third of a millisecond at most, it was faster with other batches, kernels or numbers of channels (weight gradients of
#: 3x3 over 960 groups at 7x7, AVX2: 0.73 of PyTorch's speed with 8 images, 1.29 with 1, 1.03 with 32, and 4.5 for 5x5).
RULES: tuple[Rule, ...] = ()


def left_to_torch(problem: ConvProblem, pass_: Pass) -> str | None:
    """Return why PyTorch does a pass of a convolution, or None where nhwconv does it."""
    for rule in RULES:
        if (
            rule.pass_ == pass_
            and rule.has_layer(problem.groups, problem.cg, problem.dtype.name)
            and problem.oh * problem.ow in rule.pixels
        ):
            return rule.reason
    return None


def left_of_layer(groups: int, channels: int, dtype: str) -> dict[Pass, str]:
    """Return the passes of a layer that PyTorch does, and why, for images of some sizes at least."""
    return {rule.pass_: rule.reason for rule in RULES if rule.has_layer(groups, channels, dtype)}
