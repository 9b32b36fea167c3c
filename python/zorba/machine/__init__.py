"""Which machine a run ran on, and how much memory it took."""

from zorba.machine.apart import GIVING_BACK as GIVING_BACK
from zorba.machine.apart import Apart as Apart
from zorba.machine.apart import run_apart as run_apart
from zorba.machine.description import describe as describe
from zorba.machine.description import version_of as version_of
from zorba.machine.peak import PeakAnonymous as PeakAnonymous
from zorba.machine.peak import anonymous_memory as anonymous_memory
from zorba.machine.peak import peak_memory as peak_memory
from zorba.machine.peak import reset_peak_memory as reset_peak_memory
