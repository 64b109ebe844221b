"""Plans in compiled code: arguments of users' functions, and globals, which can be called.

In compiled code a plan is a number, by which this process knows it; its type says what calls of it return.
"""

from __future__ import annotations

import pickle
from typing import Any

from llvmlite import ir
from numba.core import errors, types
from numba.core.imputils import lower_constant
from numba.core.typing.templates import Signature
from numba.extending import NativeValue, box, lower_builtin, models, register_model, unbox

from ..planning import Plan
from .calls import number_of, write
from .functions import PLANS
from .kinds import typed

__all__ = ["PlanType", "kind_of"]

_CALL = "nhwconv.plan"


class PlanType(types.Callable, types.Opaque):  # what Numba keeps of users' functions names it: it stays here
    """The type of plans of a pass, for one dtype and one rank of results."""

    def __init__(self, pass_: Any, dtype: Any, rank: int) -> None:
        self.pass_, self.dtype, self.rank = pass_, dtype, rank
        super().__init__(f"nhwconv.Plan({pass_}, {dtype}, {rank})")

    @property
    def result(self) -> types.Array:
        """The type of a new result."""
        return types.Array(self.dtype, self.rank, "C")

    def get_call_type(self, context: Any, args: Any, kws: Any) -> Signature:
        """Return the signature of a call."""
        return typed(PLANS[self.pass_], args, kws, self)

    def get_call_signatures(self) -> tuple[list[Any], bool]:
        """Return what Numba prints of calls."""
        return [], True

    def get_impl_key(self, sig: Any) -> str:
        """Return where the code of calls is."""
        return _CALL


def kind_of(plan: Plan) -> PlanType:
    """Return the type of a plan."""
    name = plan.problem.dtype_name
    if name not in ("float32", "float64"):
        raise errors.TypingError(f"plan: the plan is for {name}, expected float32 or float64")
    return PlanType(plan.pass_, getattr(types, name), len(plan.result_shape))


register_model(PlanType)(lambda manager, kind: models.PrimitiveModel(manager, kind, ir.IntType(64)))


@lower_builtin(_CALL, PlanType, types.VarArg(types.Any))
def _call(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    plan, *kinds = sig.args
    return write(context, builder, PLANS[plan.pass_], sig.replace(args=tuple(kinds)), args[1:], args[0], plan.result)


@lower_constant(PlanType)
def _constant(context: Any, builder: Any, kind: Any, plan: Plan) -> Any:
    return number_of(context, builder, pickle.dumps(plan))


@unbox(PlanType)
def _unbox(kind: Any, plan: Any, c: Any) -> NativeValue:
    number = c.pyapi.object_getattr_string(plan, "_number")
    value = c.pyapi.long_as_longlong(number)
    c.pyapi.decref(number)
    return NativeValue(value, is_error=c.pyapi.c_api_error())


@box(PlanType)
def _box(kind: Any, value: Any, c: Any) -> Any:
    module = c.pyapi.import_module(c.context.insert_const_string(c.builder.module, "nhwconv.njit"))
    number = c.pyapi.long_from_longlong(value)
    plan = c.pyapi.call_method(module, "planned", (number,))
    c.pyapi.decref(number)
    c.pyapi.decref(module)
    return plan
