"""Trajectories: a fine-tune as its base model and a log of seeds and coefficients.

See ``docs/trajectory.md``.
"""

from zorba.trajectory.errors import DamagedError, TrajectoryError, WrongBaseError
from zorba.trajectory.file import SUFFIX, Trajectory
from zorba.trajectory.header import Parameter, TrajectoryHeader
from zorba.trajectory.record import Step
from zorba.trajectory.replay import ReplayReport, check_base, replay
from zorba.trajectory.writer import TrajectoryWriter

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
