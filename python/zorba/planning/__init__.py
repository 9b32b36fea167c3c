"""Plans which client activates which blocks, under each client's memory budget."""

from zorba.planning.highs import PlanSolverError
from zorba.planning.importance import estimate_importance
from zorba.planning.memory import (
    IdlePolicy,
    MemoryModel,
    model_weights_memory,
    weights_memory,
)
from zorba.planning.picture import draw_plan
from zorba.planning.plan import BlockPlan, ParetoPoint, mask_version
from zorba.planning.planner import plan_blocks
from zorba.planning.problem import InfeasiblePlanError

__all__ = [
    "BlockPlan",
    "IdlePolicy",
    "InfeasiblePlanError",
    "MemoryModel",
    "ParetoPoint",
    "PlanSolverError",
    "draw_plan",
    "estimate_importance",
    "mask_version",
    "model_weights_memory",
    "plan_blocks",
    "weights_memory",
]
