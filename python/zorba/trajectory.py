"""Names of version 0.1.0 for a fine-tune's log; new code imports them from ``zorba.log``."""

from zorba import log
from zorba.log import SUFFIX as SUFFIX
from zorba.log import Parameter as Parameter
from zorba.log import ReplayReport as ReplayReport
from zorba.log import TrajectoryWriter as TrajectoryWriter
from zorba.log import WrongBaseError as WrongBaseError
from zorba.log import check_base as check_base
from zorba.log import replay as replay

DamagedError = log.DamagedLogError
Trajectory = log.Log
TrajectoryError = log.LogError
TrajectoryHeader = log.LogHeader
