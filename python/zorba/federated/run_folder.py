"""A run's folder: the log that is its state, and what people and programs read to watch it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from zorba import machine
from zorba.federated.events import EventWriter
from zorba.federated.loop import FederationResult
from zorba.federated.round import RoundReport
from zorba.federated.server import Server
from zorba.federated.settings import FederationSettings
from zorba.files import write_whole
from zorba.log import encode_entry

if TYPE_CHECKING:
    from zorba.planning import BlockPlan

MAX_TEXT = 500
"""Characters kept of a text that came from a client: a failure or the reason of a refusal."""


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

    ::

        folder = RunFolder("runs/reviews")
        server = Server(settings, identity, names, masks, folder.log)
        with RunRecorder(folder, server, rounds=100, plan=plan) as recorder:
            result = run_federation(server, transport, 100, on_round=recorder.round)
            recorder.end(result)

    Leaving the block through an exception is written as the run's end, with the reason. A server
    that was killed leaves no end; the next one on the same folder goes on with a start of its own.

    Args:
        folder: of the run; made where there is none.
        server: of the job.
        rounds: to run now.
        plan: that the masks come from; None where they were given by hand.
        settings: more than the server's to tell of, by name.
    """

    def __init__(
        self,
        folder: RunFolder,
        server: Server,
        rounds: int,
        plan: BlockPlan | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self._server = server
        self._plan = plan
        self._ended = False
        folder.path.mkdir(parents=True, exist_ok=True)
        # The lock of the server's log, which is in the folder, keeps a second writer away.
        self._events = EventWriter(folder.events)
        record = _plan_record(server, plan)
        self._events.write(
            "start",
            {
                "job": server.settings.job,
                "round": server.log.last,
                "last_round": server.log.last + rounds,
                "settings": {**_settings_record(server, rounds), **(settings or {})},
                "plan": record,
                "machine": machine.describe(),
            },
        )
        self._write_plan(record)
        # An entry that was cut was never told to anyone; still, a crash happened, and is shown.
        if cut := server.log.torn_bytes:
            self.fault(f"the log ended with a torn entry of {cut} bytes, which was cut")

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

    def memory(self, measured: Mapping[str, int]) -> None:
        """Writes how many bytes clients took, by client, as measured there."""
        self._events.write("memory", {"bytes": measured})

    def fault(self, text: str, client: str | None = None, round_number: int | None = None) -> None:
        """Writes a fault that no round tells of: a process that died, a machine that is gone."""
        fields = {"round": round_number, "client": client, "text": text[:MAX_TEXT]}
        self._events.write("fault", fields)

    def replan(self, plan: BlockPlan | None, reason: str) -> None:
        """Writes the masks that the server has from the next round on, and why.

        ``plan`` is the one that they come from; None where they were given by hand.
        """
        self._plan = plan or self._plan
        record = _plan_record(self._server, self._plan)
        fields = {"round": self._server.log.last, "reason": reason, "plan": record}
        self._events.write("replan", fields)
        self._write_plan(record)

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
        """Returns the recorder itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file; tells the exception that ended the run, if one did."""
        # An exception after the end, in whatever follows the run, did not end it.
        if error is not None and not self._ended:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            self._events.write("end", {"problem": reason[:MAX_TEXT]})
        self._events.close()

    def _write_plan(self, record: Mapping[str, Any]) -> None:
        # The events have it too.
        with contextlib.suppress(OSError):
            _write_json(self.folder.plan, record)


def _plan_record(server: Server, plan: BlockPlan | None) -> dict[str, Any]:
    """Who activates what, as ``plan.json`` has it: the server's masks, and what is known of them.

    Of a plan that they are not, or no longer, only names of blocks and budgets are told.
    """
    masks = server.masks
    rows = ["".join("1" if active else "0" for active in row) for row in masks.values()]
    blocks = [f"block-{b}" for b in range(server.identity.num_blocks)]
    record: dict[str, Any] = {"clients": list(masks), "blocks": blocks, "mask": rows}
    if plan is None:
        return record
    budgets = dict(zip(plan.clients, plan.budgets, strict=True))
    record |= {"blocks": plan.blocks, "budgets": [budgets.get(name) for name in masks]}
    # Memory and front belong to the plan's own masks; beside others they would be wrong numbers.
    if dict(zip(plan.clients, map(tuple, plan.mask.tolist()), strict=True)) == masks:
        memory = dict(zip(plan.clients, plan.memory, strict=True))
        record |= {
            "version": f"{plan.version:016x}",
            "memory": [memory[name] for name in masks],
            "front": [{"f1": point.f1, "f2": point.f2} for point in plan.front],
            "chosen": plan.chosen,
        }
    return record


def _settings_record(server: Server, rounds: int) -> dict[str, Any]:
    """Settings by name; a schedule is told by its rates at the ends of the run."""
    settings: FederationSettings = server.settings
    # A schedule is a function, which JSON has not: its ends say most of it.
    record = {f.name: getattr(settings, f.name) for f in fields(settings)}
    if callable(settings.lr):
        first, last = server.round, server.log.last + max(1, rounds)
        ends = [f"{settings.lr_at(r):.4g} in round {r}" for r in dict.fromkeys((first, last))]
        record["lr"] = ", ".join(ends)
    return record


def _cut(texts: Mapping[str, str]) -> dict[str, str]:
    # A client writes these texts: without a bound it could fill the server's disk with them.
    return {name: text[:MAX_TEXT] for name, text in texts.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, default=str) + "\n")
