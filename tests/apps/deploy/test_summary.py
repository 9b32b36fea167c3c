"""What the summary of a run says."""

from __future__ import annotations

from zorba.apps.deploy.summary import lines, summarise
from zorba.apps.watch.state import RunState


def test_summary_of_a_run_from_before_sites_told_epsilon_is_shown() -> None:
    content = summarise(RunState())
    assert content.pop("privacy") == {}
    assert ("rounds measured", "") in lines(content)
