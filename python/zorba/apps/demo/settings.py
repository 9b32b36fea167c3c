"""DemoSettings: the knobs of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zorba.apps.reviews.settings import ReviewSettings


@dataclass(frozen=True)
class DemoSettings(ReviewSettings):
    """Fine-tune SmolLM2-135M on film reviews, as a federation of 8 clients in one process.

    Trains on Rotten Tomatoes, split unevenly over the clients, and evaluates on SST-2. Each client
    has its own memory budget and so its own active blocks; only seeds and scalars travel.

    Attributes:
        out: Folder for the run, its summary and its pictures.
    """

    out: Path = Path("runs/demo")

    def sits_out(self, round_number: int) -> bool:
        """Whether the client with its own replica is away in a round: the middle half.

        Args:
            round_number: counted from 1.
        """
        return self.rounds / 4 < round_number <= 3 * self.rounds / 4
