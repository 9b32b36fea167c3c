"""The optimizer and its parts: terms, estimator, placements."""

from zorba.optim.estimator import Evaluate, finite_differences, one_by_one
from zorba.optim.placement import InplacePlacement, Placement
from zorba.optim.reuse import PrefixReuse
from zorba.optim.scratch import ScratchPlacement, UnreachedParameterError
from zorba.optim.select import active_parameters, active_table
from zorba.optim.sgd import Recorder, StepReport, ZerothOrderSGD
from zorba.optim.terms import NoiseTerms, step_seed

__all__ = [
    "Evaluate",
    "InplacePlacement",
    "NoiseTerms",
    "Placement",
    "PrefixReuse",
    "Recorder",
    "ScratchPlacement",
    "StepReport",
    "UnreachedParameterError",
    "ZerothOrderSGD",
    "active_parameters",
    "active_table",
    "finite_differences",
    "one_by_one",
    "step_seed",
]
