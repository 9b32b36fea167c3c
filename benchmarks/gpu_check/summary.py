"""The end of the output: what passed, what was measured, which targets are met."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.report import short


def lines(result: dict[str, Any]) -> list[str]:
    """The summary of a run, a line each."""
    return [
        "",
        *measures(result["stages"]),
        *targets(result["stages"]),
        *stages(result["stages"]),
        f"{'PASSED' if result['passed'] else 'FAILED'} in {result['seconds']:.0f} s",
    ]


def stages(rows: list[dict[str, Any]]) -> list[str]:
    """A line a stage, and one for each failed check."""
    out = [f"{'stage':<12}{'outcome':<12}{'seconds':>8}{'checks':>8}"]
    for row in rows:
        checks = row.get("checks", [])
        good = sum(check["passed"] for check in checks)
        count = f"{good}/{len(checks)}" if checks else ""
        out.append(f"{row['name']:<12}{row['outcome']:<12}{row['seconds']:>8.1f}{count:>8}")
        out += [f"    FAILED {check['name']}" for check in checks if not check["passed"]]
        left_out = {
            k: v for k, v in row.get("notes", {}).items() if "left_out" in k or "left out" in k
        }
        left_out |= {"skipped": row["reason"]} if "reason" in row else {}
        out += [f"    {key}: {first_line(str(value))}" for key, value in left_out.items()]
    return [*out, ""]


def first_line(text: str) -> str:
    """Of what may be a long message, or an empty one."""
    return next(iter(text.strip().splitlines()), "")


def measures(rows: list[dict[str, Any]]) -> list[str]:
    """A table a group of measures."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for measure in row.get("measures", []):
            groups.setdefault(measure["group"], []).append(measure)
    out = []
    for group, members in groups.items():
        columns = [key for key in members[0] if key not in ("group", "name", "least_ms", "most_ms")]
        wide = max(len(member["name"]) for member in members) + 2
        out += [group, "  " + " " * wide + "".join(f"  {key:>10}" for key in columns)]
        for member in members:
            cells = (f"  {short(member.get(key, '')):>{max(len(key), 10)}}" for key in columns)
            out.append(f"  {member['name']:<{wide}}" + "".join(cells))
        out.append("")
    return out


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """A line a target. None of them decides whether the run passed."""
    out = ["targets, for an H200"]
    for row in rows:
        for t in row.get("targets", []):
            bound = f"at least {t['least']}" if "least" in t else f"at most {t['most']}"
            met = "met    " if t["met"] else "NOT MET"
            out.append(f"  {met} {t['name']}: {short(t['figure'])} {t['unit']}, wanted {bound}")
    return [*out, ""]
