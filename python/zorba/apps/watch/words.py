"""A run in words: how it goes, its figures, and its events. Page and terminal show the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone

import numpy as np

from zorba.apps.watch.fields import Event
from zorba.apps.watch.state import RunState
from zorba.sizes import show_bytes

Fact = tuple[str, str, str]
"""Name, figure and note."""


def duration(seconds: float) -> str:
    """Returns a time in words: ``0.31 s``, ``42 s``, ``0:03:05``, ``3 days, 4:00:00``."""
    if seconds < 10:
        return f"{max(0.0, seconds):.2f} s"
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def decimal(value: float) -> str:
    """Returns a loss or a score in words; an absurd one stays short."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.2e}"


def metric(name: str) -> str:
    """Returns the name of a score as it is shown."""
    return "AUC" if name == "auc" else name.replace("_", " ")


def usual_range(values: Sequence[float], reach: float = 20.0) -> tuple[float, float]:
    """Returns the range that a picture shows: all values, except those far from all others.

    Args:
        values: at least one.
        reach: how far the range goes beyond nine tenths of the values, in widths of theirs.
    """
    # A client may report any finite loss, and one that comes back after a month gets a month's
    # log. Neither should flatten the rest of a picture.
    low = float(np.quantile(values, 0.05, method="higher"))
    high = float(np.quantile(values, 0.95, method="lower"))
    room = reach * max(abs(high - low), 0.05 * abs(high))
    return max(min(values), min(low, high) - room), min(max(values), max(low, high) + room)


def status(state: RunState, now: datetime) -> tuple[str, str]:
    """Returns how the run goes: good, warn or bad, and a sentence."""
    if not state.starts:
        return "warn", "No server has started this run."
    if state.problem:
        return "bad", f"Stopped after round {state.round}: {state.problem}"
    if state.end is None:
        words = f"Round {state.round} of {max(state.last_round, state.round)}"
        silence = state.silence(now)
        if silence is None:
            return "good", f"{words}, under way."
        return "warn", f"{words}, no event for {duration(silence)}: it waits, or was killed."
    if not state.identical:
        return "bad", f"Ended after round {state.round}, and the replicas are not all identical."
    return "good", f"Ended after round {state.round}, all replicas identical."


def facts(state: RunState) -> list[Fact]:
    """Returns the figures of a run that come first."""
    found = [("rounds", f"{state.round:,} of {max(state.last_round, state.round):,}", "")]
    if state.starts and state.starts[0][0] and state.last_event:
        took = (state.last_event - state.starts[0][0]).total_seconds()
        pace = "" if state.pace is None else f"{duration(state.pace)} a round lately"
        if state.pace is not None and state.end is None:
            pace += f", {duration(state.pace * (state.last_round - state.round))} left"
        found.append(("took", duration(took), pace))
    losses = [r.loss for r in state.rounds if r.loss is not None]
    if losses:
        tenth = max(1, len(losses) // 10)
        means = [sum(some) / tenth for some in (losses[:tenth], losses[-tenth:])]
        figure = " → ".join(map(decimal, means))
        found.append(("loss", figure, "first and last tenth of the rounds"))
    for name in list(dict.fromkeys(n for _, scores in state.evaluations for n in scores))[:3]:
        seen = [(at, scores[name]) for at, scores in state.evaluations if name in scores]
        ends = list(dict.fromkeys((seen[0], seen[-1])))
        figure = " → ".join(decimal(score) for _, score in ends)
        title = "evaluation loss" if name == "loss" else metric(name)
        found.append((title, figure, "after round " + " and ".join(str(at) for at, _ in ends)))
    if state.rounds:
        asked = max(1, sum(r.asked for r in state.rounds))
        measured = sum(c.rounds_measured for c in state.clients.values())
        up, down = sum(r.bytes_up for r in state.rounds), sum(r.bytes_down for r in state.rounds)
        for way, total, count in (("up", up, measured), ("down", down, asked)):
            mean = f"{total / max(1, count):,.0f} B"
            note = f"a client and round; {show_bytes(total)} in all"
            found.append((way, mean, note))
        coverage = state.rounds[-1].coverage
        if len(coverage):
            figure = f"{coverage.min()} to {coverage.max()}"
            found.append(("coverage", figure, "clients a block in the last round"))
        answered = f"{measured / asked:.1%} of the requests were measured"
        found.append(("clients", f"{len(state.clients):,}", answered))
    if state.fingerprints:
        same = "equal" if state.identical else "NOT equal"
        found.append(("fingerprints", same, _fingerprints(state)))
    last = max(state.faults, key=lambda fault: fault.rounds[-1], default=None)
    note = f"last in round {last.rounds[-1]}: {last.words}" if last else ""
    count = sum(len(fault.rounds) for fault in state.faults)
    return [*found, ("faults", f"{count:,}", note)]


def event_line(event: Event, state: RunState) -> str | None:
    """Returns an event as a line of text; None for one without news.

    Args:
        event: the last that ``state`` took.
        state: of the run.
    """
    kind = event["event"]
    if kind == "start":
        begun = f"{state.job}: rounds {state.starts[-1][1] + 1} to {state.last_round}"
        return f"{begun}, {len(state.clients)} clients, {len(state.plan.blocks)} blocks"
    if kind == "round":
        last = state.rounds[-1]
        did = Counter(client.status for client in state.clients.values())
        words = ", ".join(f"{count} {status.words}" for status, count in sorted(did.items()))
        bare = int((last.coverage == 0).sum())
        words += f", {bare} of {len(last.coverage)} blocks not covered" if bare else ""
        loss = "no loss" if last.loss is None else f"loss {decimal(last.loss)}"
        traffic = f"{show_bytes(last.bytes_up)} up, {show_bytes(last.bytes_down)} down"
        took = duration(last.seconds)
        return f"round {last.number}/{state.last_round}: {loss}, {words}, {traffic}, {took}"
    if kind == "evaluation" and state.evaluations:
        at, scores = state.evaluations[-1]
        return f"round {at}: {scores_words(scores)}"
    if kind == "end":
        words = f" Fingerprints: {_fingerprints(state)}." if state.fingerprints else ""
        return status(state, state.last_event or datetime.now(timezone.utc))[1] + words
    return None


def scores_words(scores: Mapping[str, float]) -> str:
    """Returns scores in words: ``accuracy 0.752, AUC 0.834``."""
    return ", ".join(f"{metric(name)} {decimal(value)}" for name, value in scores.items())


def _fingerprints(state: RunState) -> str:
    return ", ".join(state.fingerprints[:4]) + (", ..." if len(state.fingerprints) > 4 else "")
