"""Watching a run: what its events add up to, a live view in the terminal, and a page.

See ``docs/watching.md``.
"""

from zorba.apps.watch.events import Status
from zorba.apps.watch.state import Follower, RunState

__all__ = ["Follower", "RunState", "Status"]
