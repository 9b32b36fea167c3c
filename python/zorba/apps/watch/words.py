"""A run in words: how it goes, its figures, and its events. Page and terminal show the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta

from zorba.apps.watch.events import Event, Status
from zorba.apps.watch.state import Fault, RunState
from zorba.sizes import show_bytes

_SILENT_SECONDS = 30.0


def duration(seconds: float) -> str:
    """Returns a time in words: ``0.31 s``, ``42 s``, ``0:03:05``, ``3 days, 4:00:00``."""
    if seconds < 10:
        return f"{max(0.0, seconds):.2g} s"
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def decimal(value: float) -> str:
    """Returns a loss or a score in words; an absurd one stays short."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.2e}"


def metric(name: str) -> str:
    """Returns the name of a score as it is shown."""
    return "AUC" if name == "auc" else name.replace("_", " ")


def tally(statuses: Iterable[Status]) -> str:
    """Returns how many clients did what: ``5 measured, 1 failed``."""
    return ", ".join(f"{count} {s.words}" for s, count in sorted(Counter(statuses).items()))


def fault_line(fault: Fault) -> str:
    """Returns when a fault was last seen, of whom, and what it is."""
    return f"round {fault.rounds[-1]}: " + f"{fault.client} {fault.kind}: {fault.text}".lstrip()


def status(state: RunState, now: datetime) -> tuple[str, str]:
    """Returns how the run goes: good, warn or bad, and a sentence."""
    if not state.starts:
        return "warn", "No server has started this run."
    if state.end is None:
        words = f"Round {state.round} of {state.last_round}"
        silent = (now - (state.last_event or now)).total_seconds()
        # A run may have rounds of an hour, so a pause is measured in rounds, not in seconds alone.
        if silent < max(_SILENT_SECONDS, 5 * (state.pace or 0.0)):
            return "good", f"{words}, under way."
        return "warn", f"{words}, no event for {duration(silent)}: it waits, or was killed."
    if state.end.problem:
        return "bad", f"Stopped after round {state.round}: {state.end.problem}"
    if state.identical:
        return "good", f"Ended after round {state.round}, all replicas identical."
    return "bad", f"Ended after round {state.round}, and the replicas are not all identical."


def facts(state: RunState) -> list[tuple[str, str, str]]:
    """Returns the figures of a run that come first: name, figure and note of each."""
    found = [("rounds", f"{state.round:,} of {state.last_round:,}", "")]
    if state.starts and state.last_event:
        pace = "" if state.pace is None else f"{duration(state.pace)} a round lately"
        if state.pace is not None and state.end is None:
            pace += f", {duration(state.pace * (state.last_round - state.round))} left"
        took = (state.last_event - state.starts[0].time).total_seconds()
        found.append(("took", duration(took), pace))
    if losses := [r.loss for r in state.rounds if r.loss is not None]:
        tenth = max(1, len(losses) // 10)
        first, last = (decimal(sum(part) / tenth) for part in (losses[:tenth], losses[-tenth:]))
        found.append(("loss", f"{first} → {last}", "first and last tenth of the rounds"))
    for name in list(dict.fromkeys(n for _, scores in state.evaluations for n in scores))[:3]:
        seen = {at: decimal(scores[name]) for at, scores in state.evaluations if name in scores}
        ends = sorted({min(seen), max(seen)})
        title = "evaluation loss" if name == "loss" else metric(name)
        note = "after round " + " and ".join(map(str, ends))
        found.append((title, " → ".join(seen[at] for at in ends), note))
    if state.rounds:
        asked = max(1, sum(r.asked for r in state.rounds))
        measured = sum(client.rounds_measured for client in state.clients.values())
        up, down = sum(r.bytes_up for r in state.rounds), sum(r.bytes_down for r in state.rounds)
        for way, total, count in (("up", up, max(1, measured)), ("down", down, asked)):
            note = f"a client and round; {show_bytes(total)} in all"
            found.append((way, f"{total / count:,.0f} B", note))
        if covered := state.coverage:
            note = "clients a block in the last round"
            found.append(("coverage", f"{min(covered)} to {max(covered)}", note))
        answered = f"{measured / asked:.1%} of the requests were measured"
        found.append(("clients", f"{len(state.clients):,}", answered))
    if state.end and state.end.fingerprints:
        same = "equal" if state.identical else "NOT equal"
        found.append(("fingerprints", same, _fingerprints(state.end)))
    faults = sorted(state.faults.values(), key=lambda fault: fault.rounds[-1])
    note = f"last in {fault_line(faults[-1])}" if faults else ""
    return [*found, ("faults", f"{sum(len(fault.rounds) for fault in faults):,}", note)]


def event_line(event: Event, state: RunState) -> str | None:
    """Returns the last event of a state as a line of text; None for one without news."""
    match event.event:
        case "start":
            words = f"{event.job}: rounds {event.round + 1} to {event.last_round}"
            return f"{words}, {len(state.clients)} clients, {len(event.plan.blocks)} blocks"
        case "round":
            words = "no loss" if event.loss is None else f"loss {decimal(event.loss)}"
            words += ", " + tally(client.status for client in state.clients.values())
            if bare := state.coverage.count(0):
                words += f", {bare} of {len(state.plan.blocks)} blocks not covered"
            up, down = (show_bytes(sum(b.values())) for b in (event.bytes_up, event.bytes_down))
            words += f", {up} up, {down} down, {duration(event.seconds)}"
            return f"round {event.round}/{state.last_round}: {words}"
        case "evaluation" if event.scores:
            words = ", ".join(f"{metric(name)} {decimal(x)}" for name, x in event.scores.items())
            return f"round {event.round}: {words}"
        case "end":
            words = f" Fingerprints: {_fingerprints(event)}." if event.fingerprints else ""
            return status(state, event.time)[1] + words
    return None


def _fingerprints(end: Event) -> str:
    found = sorted(set(end.fingerprints.values()))
    return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
