"""Logs: a fine-tune or a federation as its base model and entries of seeds and coefficients.

A step of an optimizer and a round of a federation are the same entry, in one file format with one
reader. See ``docs/log.md``.
"""

from zorba.log.entry import LogEntry, decode_entries, encode_entry
from zorba.log.errors import DamagedLogError, LogError, WrongBaseError
from zorba.log.file import LogFile
from zorba.log.header import LogHeader, Parameter
from zorba.log.reader import Log
from zorba.log.replay import ReplayReport, apply_entries, check_base, replay
from zorba.log.trajectory import SUFFIX, TrajectoryWriter

__all__ = [
    "SUFFIX",
    "DamagedLogError",
    "Log",
    "LogEntry",
    "LogError",
    "LogFile",
    "LogHeader",
    "Parameter",
    "ReplayReport",
    "TrajectoryWriter",
    "WrongBaseError",
    "apply_entries",
    "check_base",
    "decode_entries",
    "encode_entry",
    "replay",
]
