"""Events of a run: JSON lines, appended as things happen and read while they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from zorba.federated.errors import RunFolderError

EVENT_SCHEMA = 1  # version of the events; the first line of a file carries it


class EventWriter:
    """Appends events to a file, each a line that is with the system when ``write`` returns.

    An existing file is continued, RunFolderError where it holds no events of this schema. Only one
    writer may have it open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lost = 0
        existing = self.path.read_bytes() if self.path.exists() else b""
        # What follows the last end of a line is the torn line of a kill: nobody can use it, and the
        # next event must not be glued to it.
        self._end = existing.rfind(b"\n") + 1
        if self._end:
            _check_first(_parse(existing[: existing.index(b"\n")]), self.path)
        elif existing[:1] not in (b"", b"{"):
            raise RunFolderError(f"{self.path} holds no events: it is left as it is")
        # Unbuffered, and one write a line: a kill between two events loses neither.
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(self._end)

    def write(self, event: str, fields: Mapping[str, Any] | None = None) -> None:
        """Appends an event of a kind; numbers that are not finite become null."""
        # Events are telemetry, the log is the state: a full disk loses events and does not end the
        # run. The next event that can be written is preceded by one that says how many were lost.
        if self._lost and self._append("lost", {"events": self._lost}):
            self._lost = 0
        if not self._append(event, fields or {}):
            self._lost += 1

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, event: str, fields: Mapping[str, Any]) -> bool:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        schema = {} if self._end else {"schema": EVENT_SCHEMA}
        text = json.dumps({"event": event, "time": now, **schema, **fields}, default=_plain)
        # JSON has no nan: with it, strict readers would refuse the whole line.
        record = json.loads(text, parse_constant=lambda _: None)
        # The end of the line is written with it: what has no end is torn, for every reader.
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError("the line was written in part")
        except OSError:  # a part of a line would spoil the next one
            self._file.truncate(self._end)
            return False
        self._end += len(line)
        return True


class EventReader:
    """Reads events, also of a file that grows; ``damaged`` counts lines that hold none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged = 0
        self._offset = 0
        self._file_id = -1

    def poll(self) -> list[dict[str, Any]]:
        """Returns events since the last call, of another file from its start; or RunFolderError."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            # Another inode, or a shorter file, is another run's: the old position means nothing.
            status = os.fstat(file.fileno())
            if status.st_ino != self._file_id or status.st_size < self._offset:
                self._file_id, self._offset, self.damaged = status.st_ino, 0, 0
            file.seek(self._offset)
            data = file.read()
        # A last line without its end is still being written: it is left for the next call.
        whole = data[: data.rfind(b"\n") + 1]
        lines = [_parse(line) for line in whole.split(b"\n")[:-1]]
        if self._offset == 0 and lines:
            _check_first(lines[0], self.path)
        self._offset += len(whole)
        events = [line for line in lines if line is not None]
        self.damaged += len(lines) - len(events)
        return events


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # deep brackets are a line like any other damaged one
        return None
    return record if isinstance(record, dict) and isinstance(record.get("event"), str) else None


def _check_first(record: dict[str, Any] | None, path: Path) -> None:
    if record is None or "schema" not in record:
        raise RunFolderError(f"{path} holds no events: its first line names no schema")
    if (schema := record["schema"]) != EVENT_SCHEMA:
        told = f"{path} holds events of schema {schema!r}, this package reads {EVENT_SCHEMA}"
        raise RunFolderError(told)


def _plain(value: Any) -> Any:
    """A value that JSON has not: a number of numpy as Python's, anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)
