"""Trajectories: a fine-tune as its base model and a log of seeds and coefficients.

See ``docs/trajectory.md``.
"""

from zorba.log.errors import DamagedError, TrajectoryError, WrongBaseError
from zorba.log.file import SUFFIX, Trajectory
from zorba.log.header import Parameter, TrajectoryHeader
from zorba.log.record import Step
from zorba.log.replay import ReplayReport, check_base, replay
from zorba.log.writer import TrajectoryWriter

__all__ = [
    "SUFFIX",
    "DamagedError",
    "Parameter",
    "ReplayReport",
    "Step",
    "Trajectory",
    "TrajectoryError",
    "TrajectoryHeader",
    "TrajectoryWriter",
    "WrongBaseError",
    "check_base",
    "replay",
]
