"""What the server and each site are told, as YAML files that people edit."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from zorba.privacy import Privacy

SERVER_FILE = "server.yaml"
SITE_FILE = "site.yaml"
T = TypeVar("T")


class ConfigError(ValueError):
    """A file says something that makes no sense, or does not say what it must."""


@dataclass(frozen=True)
class SiteConfig:
    """What a site holds; nobody but the site reads its file.

    Attributes:
        name: of the site, as its certificate has it.
        model: local folder or hub name of the model.
        data: JSONL, CSV or TSV file to measure on; a relative path starts at the file's folder.
        template: prompt, a format string over the fields of a row.
        words: label words in the order of ``labels``; empty to learn the text of the template.
        label: field of a row's label.
        labels: its values in the order of ``words``; empty for the sorted values.
        blocks: "all" blocks are trained, or "last:N"; the same at every site.
        dtype: of the weights: "auto" for that of the checkpoint, "float32", "bfloat16", "float16".
        device: "cpu", "cuda" or "cuda:1"; none for a GPU where there is one.
        offload: whether blocks that this site does not activate wait on the host.
        batch_size: rows of a batch.
        balanced: whether a batch has as many rows of each label as of the others, where there are
            label words: without, a batch measures most of all which label it has more of.
        max_length: tokens of a row at most.
        seed: of the batches.
        checkpoint_every: rounds between checkpoints.
        threads: CPU threads; 0 for torch's own choice.
        distribution: of the noise; the job's.
        rounding: of 16-bit weights; the job's.
        privacy: ``Privacy`` by field: what hides the site's examples in its scalars; none for
            plain scalars.
    """

    name: str
    model: str
    data: str
    template: str = "{text}"
    words: tuple[str, ...] = ()
    label: str = "label"
    labels: tuple[str, ...] = ()
    blocks: str = "all"
    dtype: str = "auto"
    device: str | None = None
    offload: bool = False
    batch_size: int = 16
    balanced: bool = True
    max_length: int = 256
    seed: int = 0
    checkpoint_every: int = 50
    threads: int = 0
    distribution: str = "rademacher"
    rounding: str = "stochastic"
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        """Checks what belongs together."""
        of_examples = self.privacy is not None and self.privacy.unit == "example"
        if of_examples and self.words and self.balanced:
            raise ConfigError(
                "privacy.unit is example, but balanced is true: the label of one example then "
                "decides which others are in a batch, and epsilon would not hold. Set "
                "balanced: false, or take the unit client"
            )

    @staticmethod
    def read(folder: Path) -> SiteConfig:
        """Reads ``site.yaml`` of a site's folder.

        Raises:
            ConfigError: it is not there, or something in it makes no sense.
        """
        return _build(SiteConfig, _load(folder / SITE_FILE), folder / SITE_FILE)

    def write(self, folder: Path) -> None:
        """Writes ``site.yaml``."""
        _dump(folder / SITE_FILE, asdict(self))


@dataclass(frozen=True)
class SiteEntry:
    """What the server knows of a site.

    Attributes:
        active: names of the blocks that it activates.
        budget: bytes that its device may use; 0 where it was not planned.
        memory: bytes that the plan predicts.
    """

    active: tuple[str, ...]
    budget: int = 0
    memory: int = 0


@dataclass(frozen=True)
class ServerConfig:
    """What the server holds; it has no model and no data.

    Attributes:
        job: name of the job.
        seed: from which every seed of the job is derived.
        rounds: of the run.
        address: host and port that sites connect to.
        identity: of the model, ``ModelIdentity`` by field.
        blocks: names of the trained blocks, in order.
        sites: by name.
        settings: other fields of ``FederationSettings``, by name.
        lr_decay: "linear": the learning rate falls to 0 over the rounds; or "constant".
        timeout: seconds that a round waits for an answer.
        ask_timeout: seconds that a site waits for the message it asked for, before it asks again.
        quorum: sites that a round waits for before it begins; 0 for all.
        rejoin_seconds: at most this often the engine's job is started again for a site whose whole
            machine was away.
    """

    job: str
    seed: int
    rounds: int
    address: str
    identity: dict[str, int]
    blocks: tuple[str, ...]
    sites: dict[str, SiteEntry]
    settings: dict[str, Any] = field(default_factory=dict)
    lr_decay: str = "linear"
    timeout: float = 600.0
    ask_timeout: float = 20.0
    quorum: int = 0
    rejoin_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Checks what belongs together."""
        for name, entry in self.sites.items():
            unknown = [block for block in entry.active if block not in self.blocks]
            if unknown:
                raise ConfigError(f"site {name} activates {unknown[0]}, which is no trained block")
        if self.lr_decay not in ("linear", "constant"):
            raise ConfigError(f"lr_decay is {self.lr_decay!r}; expected linear or constant")
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}; expected at least 1")
        if not 0 <= self.quorum <= len(self.sites):
            raise ConfigError(f"quorum is {self.quorum}; there are {len(self.sites)} sites")

    @staticmethod
    def read(folder: Path) -> ServerConfig:
        """Reads ``server.yaml`` of the server's folder.

        Raises:
            ConfigError: it is not there, or something in it makes no sense.
        """
        return _build(ServerConfig, _load(folder / SERVER_FILE), folder / SERVER_FILE)

    def write(self, folder: Path) -> None:
        """Writes ``server.yaml``."""
        _dump(folder / SERVER_FILE, asdict(self))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}: zorba federate init writes it") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold names and values, as 'rounds: 100'")
    return content


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True, width=100)
    path.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Returns the value with lists for tuples, which YAML knows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _build(kind: type[T], content: Mapping[str, Any], path: Path) -> T:
    """Makes a dataclass of a file's content; every value must be of its field's type."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for name in content:
        if name not in known:
            raise ConfigError(f"{path} has {name!r}; expected any of {', '.join(known)}")
    for name, f in known.items():
        if name not in content and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{path} has no {name!r}")
    values = {name: _value(content[name], hints[name], f"{path}, {name}") for name in content}
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _value(value: Any, kind: Any, what: str) -> Any:
    """Returns the value as the type; YAML reads 1e-3 as text, which is a number here."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _number(value) if isinstance(value, str) else value
    if origin is types.UnionType or origin is typing.Union:
        return None if value is None else _value(value, arguments[0], what)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(item, arguments[0], what) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(k): _value(item, arguments[1], f"{what}.{k}") for k, item in value.items()}
    if hasattr(kind, "__dataclass_fields__") and isinstance(value, dict):
        return _build(kind, value, Path(what))
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        value = _number(value) if isinstance(value, str) else float(value)
    if (
        isinstance(kind, type)
        and isinstance(value, kind)
        and (kind is bool) == (isinstance(value, bool))
    ):
        return value
    raise ConfigError(f"{what} is {value!r}; expected {_expected(kind)}")


def _expected(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(typing.get_args(kind))
    if hasattr(kind, "__dataclass_fields__"):
        return "names and values under it: " + ", ".join(f.name for f in fields(kind))
    return str(getattr(kind, "__name__", kind))


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
