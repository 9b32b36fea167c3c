"""Plans which client activates which blocks, under each client's memory budget."""

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
from zorba.planning.program import PlanSolverError

__all__ = [
    "BlockPlan",
    "IdlePolicy",
    "InfeasiblePlanError",
    "MemoryModel",
    "ParetoPoint",
    "PlanSolverError",
    "draw_plan",
    "mask_version",
    "model_weights_memory",
    "plan_blocks",
    "weights_memory",
]
