"""Which machine a run ran on, and how much memory it took."""

from zorba.machine.description import describe as describe
from zorba.machine.description import version_of as version_of
from zorba.machine.memory import GIVING_BACK as GIVING_BACK
from zorba.machine.memory import Apart as Apart
from zorba.machine.memory import anonymous_memory as anonymous_memory
from zorba.machine.memory import peak_memory as peak_memory
from zorba.machine.memory import reset_peak_memory as reset_peak_memory
from zorba.machine.memory import run_apart as run_apart
