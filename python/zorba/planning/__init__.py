"""Plans which client activates which blocks, under each client's memory budget."""

from zorba.planning.memory import IdlePolicy as IdlePolicy
from zorba.planning.memory import MemoryModel as MemoryModel
from zorba.planning.memory import model_weights_memory as model_weights_memory
from zorba.planning.picture import draw_plan as draw_plan
from zorba.planning.plan import BlockPlan as BlockPlan
from zorba.planning.plan import ParetoPoint as ParetoPoint
from zorba.planning.planner import plan_blocks as plan_blocks
from zorba.planning.problem import InfeasiblePlanError as InfeasiblePlanError
from zorba.planning.program import PlanSolverError as PlanSolverError
