"""The optimizer and its parts: terms, estimator, placements."""

from zorba.optim.estimator import finite_differences
from zorba.optim.placement import InplacePlacement, Placement
from zorba.optim.reuse import PrefixReuse
from zorba.optim.scratch import ScratchPlacement, UnreachedParameterError
from zorba.optim.select import active_parameters, active_table
from zorba.optim.sgd import Recorder, StepReport, ZerothOrderSGD, step_seed
from zorba.optim.terms import NoiseTerms

__all__ = [
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
    "step_seed",
]
