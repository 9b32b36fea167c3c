"""Names of version 0.1.0 for a fine-tune's log; new code imports them from ``zorba.log``."""

from zorba.log import (
    SUFFIX,
    DamagedLogError,
    Log,
    LogError,
    LogHeader,
    Parameter,
    ReplayReport,
    TrajectoryWriter,
    WrongBaseError,
    check_base,
    replay,
)

DamagedError = DamagedLogError
Trajectory = Log
TrajectoryError = LogError
TrajectoryHeader = LogHeader

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
