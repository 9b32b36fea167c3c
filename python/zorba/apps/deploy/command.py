"""``zorba federate``: settings of each subcommand, and the function that takes them.

The functions raise RuntimeError, ValueError or OSError with a sentence for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction

from zorba.apps.command import Command
from zorba.apps.finetune.settings import Labels, Words
from zorba.defaults import DISTRIBUTION, EPS, NUM_PERTURBATIONS, Directions, Distribution


# The comment of a field is its help on the command line.
@dataclass(frozen=True)
class InitSettings:
    """Write a project: certificates, and a file each for the server and the sites.

    The folder sites/NAME goes to the machine of that site, server to the server's; authority
    holds the key that signs certificates and stays where it is. Edit model and data in a site's
    site.yaml, rounds and learning rate in server.yaml.
    """

    folder: Positional[Path]  # Folder for the project; new or empty.
    # A site, with the memory that its weights may use: ada=2GiB. One each.
    site: UseAppendAction[tuple[str, ...]]
    model: str  # Local folder or hub name of the model.
    data: str  # JSONL, CSV or TSV file of a site; {site} stands for its name.
    template: str = "{text}"  # Prompt over the fields of a row: "{sentence} It was".
    words: Words = ()  # Label words with the space in front, by commas: " terrible, great".
    label: str = "label"  # Field of the label.
    labels: Labels = ()  # Its values in the order of the words, by commas.
    blocks: str = "all"  # Blocks to train: all, or last:N.
    address: str = "localhost:8002"  # Host and port that sites reach the server at.
    job: str = "federation"  # Name of the job.
    rounds: int = 100  # Rounds.
    lr: float = 1e-2  # Learning rate; falls linearly to 0.
    eps: float = EPS  # Distance at which losses are taken.
    perturbations: int = NUM_PERTURBATIONS  # P: finite differences a site measures in a step.
    local_steps: int = 1  # K: local steps in a round.
    clip: float | None = None  # Largest absolute value of a scalar.
    distribution: Distribution = DISTRIBUTION  # Distribution of the noise.
    # Whether sites measure directions of their own; by default, if they are few.
    directions: Directions | None = None
    # Whether sites weigh by their examples or all alike.
    weighting: Literal["examples", "uniform"] = "examples"
    batch_size: int = 16  # Rows in a batch.
    max_length: int = 256  # Tokens of a row at most.
    # Of the weights; auto for the checkpoint's.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None  # cpu, cuda or cuda:1; a GPU where there is one by default.
    offload: bool = False  # Keep blocks that a site does not activate off its device.
    timeout: float = 600.0  # Seconds that a round waits for an answer.
    seed: int = 0  # Of noise and batches.


@dataclass(frozen=True)
class StatusSettings:
    """Show the parties of a project that run here; zorba watch FOLDER/server/run shows the run."""

    folder: Positional[Path]  # Project, or the folder of the server or a site.
    only: UseAppendAction[tuple[str, ...]] = ()  # server or a site; may be given again.


@dataclass(frozen=True)
class StopSettings(StatusSettings):
    """Stop the parties of a project that run here; start goes on where they stopped."""


@dataclass(frozen=True)
class StartSettings(StatusSettings):
    """Start the parties of a project on this machine, and show the run to its end.

    Ctrl-C ends the watching, not the run. A run that was killed or stopped goes on where its log
    and its checkpoints end. When the rounds are done the server stops, and so do the sites that
    this command started.
    """

    detach: bool = False  # Return at once; see status and stop.


@dataclass(frozen=True)
class FederateDemoSettings:
    """Fine-tune SmolLM2-135M on film reviews with a server and 3 sites as processes, over TLS."""

    rounds: int = 40  # Rounds.
    seed: int = 1  # Of data split, batches and noise.
    lr: float = 4e-3  # Learning rate of the first round; falls linearly to 0.
    address: str = "localhost:8002"  # Host and port of the server.
    out: Path = Path("runs/federate-demo")  # Folder for the project; new or empty.
    cache: Path = Path(".cache")  # Folder for model and data.


_NEEDS = (
    *("greenlet", "matplotlib", "nvflare", "pydantic", "rich", "safetensors", "scipy"),
    *("transformers", "yaml"),
)
_DEMO_NEEDS = (*_NEEDS, "accelerate", "filelock", "gguf", "jinja2", "pyarrow")
COMMANDS = {
    "init": Command(InitSettings, "deploy.project:run_init", "nvflare", _NEEDS),
    "start": Command(StartSettings, "deploy.control:run_start", "nvflare", _NEEDS),
    "status": Command(StatusSettings, "deploy.control:run_status", "nvflare", _NEEDS),
    "stop": Command(StopSettings, "deploy.control:run_stop", "nvflare", _NEEDS),
    "demo": Command(FederateDemoSettings, "deploy.demo:run_demo", "demo,nvflare", _DEMO_NEEDS),
}
