"""The optimizer and its parts: terms, estimator, placements."""

from zorba.optim.estimator import finite_differences
from zorba.optim.placement import InplacePlacement, Placement
from zorba.optim.scratch import ScratchPlacement, UnreachedParameterError, active_table
from zorba.optim.sgd import StepReport, ZerothOrderSGD, step_seed
from zorba.optim.terms import NoiseTerms

__all__ = [
    "InplacePlacement",
    "NoiseTerms",
    "Placement",
    "ScratchPlacement",
    "StepReport",
    "UnreachedParameterError",
    "ZerothOrderSGD",
    "active_table",
    "finite_differences",
    "step_seed",
]
