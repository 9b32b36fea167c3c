"""Watching a run, from its events, in a terminal and as a page: see ``docs/watching.md``."""

from zorba.apps.watch.events import Status
from zorba.apps.watch.state import Follower, RunState

__all__ = ["Follower", "RunState", "Status"]
