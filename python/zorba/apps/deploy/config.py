"""The settings of the server and of each site: ``server.yaml`` and ``site.yaml``.

It imports no torch: the processes that only start and watch others read these files too.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from zorba.apps.deploy.yaml_file import ConfigError as ConfigError
from zorba.apps.deploy.yaml_file import Section
from zorba.defaults import Directions, Distribution, Estimator

# Numbers are strict: True is no number, and "16" is text.
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Uint64 = Annotated[int, Field(strict=True, ge=0, lt=1 << 64)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(coerce_numbers_to_str=True)]  # a label may be 0 or 1
Blocks = Annotated[Text, Field(pattern=r"^(all|last:[1-9][0-9]*)$")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Name = Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Rounding = Literal["nearest", "stochastic"]


def about(description: str, default: Any = ..., **bounds: Any) -> Any:
    """Returns a field whose description is the comment in the file; required without a default."""
    return Field(default, description=description, **bounds)


class PrivacySection(Section):
    """``zorba.federated.Privacy`` by field."""

    unit: Literal["example", "client"] = about("whom epsilon protects")
    clip: Positive = about("L2 norm of a vector of P differences")
    noise_multiplier: Positive = about("noise, in units of the sensitivity")
    delta: float = about("at which epsilon is told", strict=True, gt=0, lt=1)
    max_epsilon: float = about("that the site never exceeds", math.inf, strict=True, gt=0)


class SiteConfig(Section):
    """Settings of a site. Nobody but the site reads this file."""

    file: ClassVar[str] = "site.yaml"

    name: Name = about("name of the site, as its certificate has it")
    model: Text = about("local folder or hub name of the model", min_length=1)
    data: Text = about("JSONL, CSV or TSV file; a relative path starts at this folder")
    template: Text = about("prompt, a format string over the fields of a row")
    words: tuple[Text, ...] = about("label words, as labels; empty to learn the template's text")
    label: Text = about("field of a row's label")
    labels: tuple[Text, ...] = about("values of the label, as words; empty for the sorted ones")
    blocks: Blocks = about("blocks that are trained: all, or last:N; the same at every site")
    dtype: Dtype = about("of the weights; auto for that of the checkpoint")
    device: Text | None = about("cpu, cuda or cuda:1; null for a GPU if there is one")
    offload: Flag = about("whether blocks that this site does not activate wait on the host")
    batch_size: Count = about("rows of a batch")
    # A batch that is not balanced measures above all which label it has more of.
    balanced: Flag = about("with label words: as many rows of each label in a batch", True)
    max_length: int = about("tokens of a row at most", strict=True, ge=2)
    seed: Uint64 = about("of the choice of batches")
    checkpoint_every: Count = about("rounds between two checkpoints", 50)
    threads: Natural = about("CPU threads; 0 for torch's own choice", 0)
    distribution: Distribution = about("of the noise; the job's")
    rounding: Rounding = about("of 16-bit weights; the job's")
    privacy: PrivacySection | None = about(
        "null, or under it unit, clip, noise_multiplier, delta, max_epsilon: docs/security.md", None
    )

    @field_validator("privacy")
    @classmethod
    def _check_batches(cls, privacy: Any, info: ValidationInfo) -> Any:
        balanced = info.data.get("words") and info.data.get("balanced")
        if privacy is not None and privacy.unit == "example" and balanced:
            raise ValueError(
                "privacy.unit is example, but balanced is true: the label of one example then "
                "decides which others are in a batch, and epsilon would not hold. Set "
                "balanced: false, or take the unit client"
            )
        return privacy


class Identity(Section):
    """``zorba.federated.ModelIdentity`` by field."""

    # Written by init from the model; nothing that people edit, so nothing is explained.
    origin: Uint64
    start: Uint64
    layout: Uint64
    num_weights: Count
    num_blocks: Count


class RoundSettings(Section):
    """Fields of ``zorba.federated.FederationSettings``, by the same names."""

    # No defaults: init writes those of the core, and a project keeps them when they change.
    lr: float = about("learning rate of the first round", strict=True, ge=0, allow_inf_nan=False)
    num_perturbations: Count = about("P, finite differences of a local step")
    local_steps: Count = about("K, local steps of a round")
    eps: Positive = about("distance at which losses are taken")
    estimator: Estimator = about("kind of finite difference")
    distribution: Distribution = about("of the noise; it stays, and the rounding, with the log")
    rounding: Rounding = about("of 16-bit weights in an update")
    clip: Positive | None = about("largest absolute value of a scalar; null for none")
    clients_per_round: Count | None = about("sites in a round; null for all")
    weighting: Literal["examples", "uniform"] = about("by a site's examples, or all sites alike")
    directions: Directions | None = about(
        "own: each site measures P of its own; shared: all the same; null: own for few sites"
    )
    own_up_to: Count = about("sites in a round up to which null means own")
    part_bound: float | None = about(
        "own: most that a site moves the weights, in units of the median site's; null for no limit",
        strict=True,
        ge=1,
        allow_inf_nan=False,
    )
    aggregation: Literal["mean", "median", "trimmed"] = about("of a block's scalars; shared alone")
    trim: float = about("share that trimmed leaves out at each end", strict=True, ge=0, lt=0.5)


class ServerConfig(Section):
    """Settings of the server, which has no model and no data."""

    file: ClassVar[str] = "server.yaml"

    job: Text = about("name of the job; the seed belongs to it", pattern="^[A-Za-z0-9._+-]{1,64}$")
    seed: Uint64 = about("from which every seed of the job is derived")
    rounds: Count = about("of the run")
    identity: Identity = about("of the model; a site with another one is refused")
    blocks: tuple[Text, ...] = about("names of the trained blocks", min_length=1)
    sites: dict[Name, tuple[Text, ...]] = about("the blocks that each activates", min_length=1)
    settings: RoundSettings = about("of the rounds")
    lr_decay: Literal["linear", "constant"] = about("linear: lr falls to 0 in the end", "linear")
    timeout: Positive = about("seconds that a round waits for an answer")
    ask_timeout: Positive = about("seconds after which a site asks for a message again", 20.0)
    quorum: Natural = about("sites that a round waits for; 0 for all", 0)
    rejoin_seconds: Positive = about(
        "seconds at least between two jobs of the engine for sites that come back", 60.0
    )

    # A validator sees the fields in front of its own, of those the valid ones.
    @field_validator("sites")
    @classmethod
    def _check_sites(cls, sites: Any, info: ValidationInfo) -> Any:
        if "server" in sites:
            raise ValueError("a site is called server; take another name")
        for name, active in sites.items():
            for block in set(active).difference(info.data.get("blocks", active)):
                raise ValueError(f"site {name} activates {block}, which is no trained block")
        return sites

    @field_validator("quorum")
    @classmethod
    def _check_quorum(cls, quorum: int, info: ValidationInfo) -> int:
        sites = info.data.get("sites", {})
        if sites and quorum > len(sites):
            raise ValueError(f"quorum is {quorum}; there are {len(sites)} sites")
        return quorum
