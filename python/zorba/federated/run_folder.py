"""A run's folder: the log that is its state, and what people and programs read to watch it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zorba import machine
from zorba.federated.events import EventWriter
from zorba.federated.loop import FederationResult
from zorba.federated.round import RoundReport
from zorba.federated.server import Server
from zorba.files import write_whole
from zorba.log import encode_entry

if TYPE_CHECKING:
    from zorba.planning import BlockPlan

MAX_TEXT = 500  # characters kept of a text that came from a client: why it failed or was refused


class RunFolder:
    """Paths of a run: its folder, and the files in it that ``docs/watching.md`` lists."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log = self.path / "federation.log"
        self.events = self.path / "events.jsonl"
        self.plan = self.path / "plan.json"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"

    def clear(self) -> None:
        """Removes what an earlier run left; makes the folder where there is none."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Only files of a run: whatever else somebody put into the folder stays.
        for file in (self.log, self.events, self.plan, self.summary, self.report):
            file.unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json``."""
        _write_json(self.summary, summary)


# The log is the state; everything else in the folder is for people and for programs that watch. So
# nothing here is read back, and a disk that is too full for it does not end the run.
class RunRecorder:
    """Writes the events of a run; its ``round`` is the ``on_round`` of ``run_federation``.

    Leaving the block through an exception is written as the run's end, with the reason. A server
    that was killed leaves no end; the next one on the same folder goes on with a start of its own.
    ValueError: the server has other masks than the plan.
    """

    def __init__(
        self,
        folder: RunFolder,  # made where there is none
        server: Server,
        rounds: int,  # to run now
        plan: BlockPlan | None = None,  # that the masks come from; None where they are by hand
        settings: Mapping[str, Any] | None = None,  # more than the server's to tell of, by name
    ) -> None:
        self._server = server
        self._ended = False
        record = _plan_record(server, plan)
        folder.path.mkdir(parents=True, exist_ok=True)
        # The lock of the server's log, which is in the folder, keeps a second writer away.
        self._events = EventWriter(folder.events)
        job, last = server.settings, server.log.last
        told = asdict(job)
        if callable(job.lr):  # a function, which JSON has not: its ends say most of it
            ends = dict.fromkeys((last + 1, last + max(1, rounds)))
            told["lr"] = ", ".join(f"{job.lr_at(r):.4g} in round {r}" for r in ends)
        self._events.write(
            "start",
            {
                "job": job.job,
                "round": last,
                "last_round": last + rounds,
                "settings": {**told, **(settings or {})},
                "plan": record,
                "machine": machine.describe(),
            },
        )
        with contextlib.suppress(OSError):  # the events have it too
            _write_json(folder.plan, record)
        # An entry that was cut was never told to anyone; still, a crash happened, and is shown.
        if cut := server.log.torn_bytes:
            text = f"the log ended with a torn entry of {cut} bytes, which was cut"
            self._events.write("fault", {"round": None, "client": None, "text": text})

    def round(self, report: RoundReport) -> None:
        """Writes what a round did."""
        entry = report.entry
        record = {f.name: getattr(report, f.name) for f in fields(report) if f.name != "entry"}
        # Fingerprints as text: numbers above 2**53 lose bits in many readers of JSON.
        record |= {
            "failures": _cut(report.failures),
            "refusals": _cut(report.refusals),
            "entry_bytes": len(encode_entry(entry, self._server.settings.job_id)),
            "uncovered": entry.uncovered(),
            "base_fingerprint": None if entry.base is None else f"{entry.base:016x}",
        }
        self._events.write("round", record)

    def evaluation(self, round_number: int, **scores: float | None) -> None:
        """Writes scores of the weights after a round, by name; round 0 is the run's start."""
        self._events.write("evaluation", {"round": round_number, **scores})

    def end(self, result: FederationResult) -> None:
        """Writes what the run came to."""
        # Before the event: a Ctrl-C in the middle of it must not write a second end.
        self._ended = True
        self._events.write(
            "end",
            {
                "round": result.final_round,
                "replicas_identical": result.replicas_identical,
                "fingerprints": {n: f"{f:016x}" for n, f in sorted(result.fingerprints.items())},
                "flush_bytes_down": result.flush_bytes_down,
                "failures": _cut(result.failures),
                "privacy": {name: asdict(spent) for name, spent in result.privacy.items()},
            },
        )

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes the file; tells the exception that ended the run, if one did."""
        # An exception after the end, in whatever follows the run, did not end it.
        if error is not None and not self._ended:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            self._events.write("end", {"problem": reason[:MAX_TEXT]})
        self._events.close()


def _plan_record(server: Server, plan: BlockPlan | None) -> dict[str, Any]:
    """Who activates what, as ``plan.json`` has it, and what the plan knows of it."""
    masks = server.masks
    if plan is None:
        blocks = [f"block-{b}" for b in range(server.identity.num_blocks)]
        rows = ["".join("01"[active] for active in row) for row in masks.values()]
        return {"clients": list(masks), "blocks": blocks, "mask": rows}
    if dict(zip(plan.clients, map(tuple, plan.mask.tolist()), strict=True)) != masks:
        raise ValueError("the server's masks are not those of the plan")
    return plan.record()


def _cut(texts: Mapping[str, str]) -> dict[str, str]:
    # A client writes these texts: without a bound it could fill the server's disk with them.
    return {name: text[:MAX_TEXT] for name, text in texts.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, default=str) + "\n")
