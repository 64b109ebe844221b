"""The ordered registry of strategies: one place each, one line here.

Planner, tests, `nhwconv compare` and the benchmarks all loop over `REGISTRY`. The planner takes the one with the least
predicted cost; of equals, the first.
"""

from __future__ import annotations

from .base import Strategy, Wanted
from .direct import Loop
from .grouped import Grouped
from .im2col import Im2col
from .plain import Plain
from .tensordot import Tensordot
from .winograd import Winograd

__all__ = ["AUTO", "HWIO", "REGISTRY", "Strategy", "Wanted"]

REGISTRY: dict[str, Strategy] = {s.name: s for s in (Grouped(), Loop(), Winograd(), Im2col(), Plain(), Tensordot())}

#: What "auto" chooses from: strategies whose bits depend on nothing but the problem and the CPU model.
AUTO: tuple[str, ...] = ("depthwise", "loop", "winograd")

#: Strategies that take weights as "HWIO"; for others, the planner has them turned.
HWIO: tuple[str, ...] = ("loop", "winograd")
