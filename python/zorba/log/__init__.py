"""Logs: a fine-tune or a federation as its base model and entries of seeds and coefficients.

A step of an optimizer and a round of a federation are the same entry. See ``docs/log.md``.
"""

from zorba.log.binary import DamagedLogError, LogError
from zorba.log.entry import LogEntry, decode_entries, encode_entry
from zorba.log.file import Log, LogFile
from zorba.log.header import LogHeader, Parameter
from zorba.log.replay import ReplayReport, WrongBaseError, apply_entries, check_base, replay
from zorba.log.trajectory import SUFFIX, TrajectoryWriter

__all__ = [
    "SUFFIX", "DamagedLogError", "Log", "LogEntry", "LogError", "LogFile", "LogHeader",
    "Parameter", "ReplayReport", "TrajectoryWriter", "WrongBaseError", "apply_entries",
    "check_base", "decode_entries", "encode_entry", "replay",
]  # fmt: skip
