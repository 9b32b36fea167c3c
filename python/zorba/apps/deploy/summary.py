"""What a run came to, out of its events."""

from __future__ import annotations

from typing import Any

from zorba.apps.watch.state import RunState


def summarise(state: RunState) -> dict[str, Any]:
    """Returns what ``summary.json`` holds, over all starts of the server.

    Args:
        state: of the run's events, the end among them.
    """
    end = state.end or {}
    asked = max(1, sum(r.asked for r in state.rounds))
    losses = [r.loss for r in state.rounds if r.loss is not None]
    tenth = max(1, len(losses) // 10)
    return {
        "job": state.job,
        "final_round": end.get("round", state.round),
        "replicas_identical": end.get("replicas_identical", False),
        "fingerprints": end.get("fingerprints", {}),
        "failures": end.get("failures", {}),
        "privacy": end.get("privacy", {}),
        "loss_first_tenth": sum(losses[:tenth]) / tenth if losses else None,
        "loss_last_tenth": sum(losses[-tenth:]) / tenth if losses else None,
        "round_seconds": sum(r.seconds for r in state.rounds) / max(1, len(state.rounds)),
        "train_seconds": sum(r.seconds for r in state.rounds),
        "bytes_up_per_site_round": sum(r.bytes_up for r in state.rounds) / asked,
        "bytes_down_per_site_round": sum(r.bytes_down for r in state.rounds) / asked,
        "server_starts": len(state.starts),
        "faults": sum(len(fault.rounds) for fault in state.faults),
        "sites": {
            name: {"rounds_measured": c.rounds_measured, "rounds_failed": c.rounds_failed}
            for name, c in state.clients.items()
        },
        "evaluations": [{"round": r, **scores} for r, scores in state.evaluations],
        "settings": state.settings,
        "machine": state.machine,
    }


def lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns name and value of each line of the summary's table."""
    s = summary
    rows = []
    if s["loss_first_tenth"] is not None:
        first, last = s["loss_first_tenth"], s["loss_last_tenth"]
        rows.append(("training loss", f"{first:.4f} in the first tenth, {last:.4f} in the last"))
    if s["evaluations"]:
        first, last = s["evaluations"][0], s["evaluations"][-1]
        rows += [
            (name, f"{first[name]:.3f} before, {last[name]:.3f} after")
            for name in first
            if name != "round" and name in last
        ]
    measured = ", ".join(f"{n} {c['rounds_measured']}" for n, c in s["sites"].items())
    same = "equal" if s["replicas_identical"] else "DIFFERENT, or not all told"
    values = ", ".join(sorted(set(s["fingerprints"].values()))) or "none"
    rows += [
        ("rounds", f"{s['final_round']}, {s['round_seconds']:.2f} s each"),
        ("rounds measured", measured),
        ("up, a site and round", f"{s['bytes_up_per_site_round']:.0f} B as encoded"),
        ("down, a site and round", f"{s['bytes_down_per_site_round']:.0f} B as encoded"),
        ("fingerprints", f"{same}: {values}"),
    ]
    rows += [
        (
            f"{name} has told",
            f"epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g}, of each {spent['unit']}",
        )
        for name, spent in s.get("privacy", {}).items()  # older runs have none
    ]
    if s["faults"] or s["server_starts"] > 1:
        rows.append(("faults", f"{s['faults']}; the server was started {s['server_starts']} times"))
    if s["failures"]:
        rows.append(("at the end", "; ".join(f"{n}: {t}" for n, t in s["failures"].items())))
    if s["machine"]:
        rows.append(("server", f"{s['machine']['cpu']}, {s['machine']['threads']} threads"))
    return rows
