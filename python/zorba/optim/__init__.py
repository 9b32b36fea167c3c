"""The optimizer and its parts: terms, estimator, placements."""

from zorba.optim.options import active_parameters, active_table
from zorba.optim.placement import InplacePlacement, Placement
from zorba.optim.reuse import PrefixReuse
from zorba.optim.scratch import ScratchPlacement
from zorba.optim.sgd import Recorder, StepReport, ZerothOrderSGD
from zorba.optim.terms import Evaluate, NoiseTerms, one_by_one, step_seed

__all__ = [
    "Evaluate",
    "InplacePlacement",
    "NoiseTerms",
    "Placement",
    "PrefixReuse",
    "Recorder",
    "ScratchPlacement",
    "StepReport",
    "ZerothOrderSGD",
    "active_parameters",
    "active_table",
    "one_by_one",
    "step_seed",
]
