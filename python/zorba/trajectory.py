"""Names of version 0.1.0 for a fine-tune's log; new code imports them from ``zorba.log``."""

from zorba.log import (
    SUFFIX,
    Parameter,
    ReplayReport,
    TrajectoryWriter,
    WrongBaseError,
    check_base,
    replay,
)
from zorba.log import DamagedLogError as DamagedError
from zorba.log import Log as Trajectory
from zorba.log import LogError as TrajectoryError
from zorba.log import LogHeader as TrajectoryHeader

__all__ = [
    "SUFFIX",
    "DamagedError",
    "Parameter",
    "ReplayReport",
    "Trajectory",
    "TrajectoryError",
    "TrajectoryHeader",
    "TrajectoryWriter",
    "WrongBaseError",
    "check_base",
    "replay",
]
