"""The events of a run as views read them: of the right types, with texts that are safe to show."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, Field, model_validator

MAX_TEXT = 500


def clean(value: Any) -> str:
    """Returns text that is safe to show: one line, no control and no direction characters.

    Markup stays in it: whoever writes HTML or rich's markup must escape it.
    """
    shown = str(value)[:MAX_TEXT]
    if shown.isprintable():  # as nearly all are: a page reads hundreds of thousands
        return shown
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in shown)


# Clients say what they are called and why they failed: all that may be theirs is cleaned.
Text = Annotated[str, BeforeValidator(clean)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Status(IntEnum):
    """What a client did in a round; the worse, the higher."""

    SITS_OUT = 0
    MEASURED = 1
    JOINED = 2
    NOT_USED = 3
    FAILED = 4
    REFUSED = 5

    @property
    def words(self) -> str:
        """How it is shown."""
        return self.name.lower().replace("_", " ")


class Plan(BaseModel):
    """Who activates what; bytes are of each client, and empty where they are unknown."""

    clients: list[Text] = []
    blocks: list[Text] = []
    mask: list[Annotated[str, Field(pattern="^[01]*$")]] = []  # a row of 0 and 1 for each client
    budgets: list[Count | None] = []
    memory: list[Count] = []  # predicted

    @model_validator(mode="after")
    def _check_sizes(self) -> Plan:
        if [len(row) for row in self.mask] != [len(self.blocks)] * len(self.clients):
            raise ValueError("the mask is not of the size clients by blocks")
        return self


class Event(BaseModel):
    """An event of any kind; ``docs/watching.md`` says which fields a kind has."""

    event: str  # the kind
    time: AwareDatetime
    round: Count = 0
    job: Text = ""
    last_round: Count = 0
    settings: dict[Text, Any] = {}
    machine: dict[Text, Any] = {}
    plan: Plan = Plan()
    loss: Number | None = None
    seconds: Number = 0.0
    clients: set[Text] = set()
    losses: dict[Text, Number | None] = {}
    bytes_up: dict[Text, Count] = {}
    bytes_down: dict[Text, Count] = {}
    failures: dict[Text, Text] = {}
    refusals: dict[Text, Text] = {}
    problem: Text = ""
    scores: dict[Text, Number] = {}  # of an evaluation, where every other number is a score
    client: Text = ""
    text: Text = ""
    events: Count = 0
    replicas_identical: bool = False
    fingerprints: dict[Text, Text] = {}
    privacy: dict[Text, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, record: dict[str, Any]) -> dict[str, Any]:
        known = {name: value for name, value in record.items() if value is not None}
        if known.get("event") == "evaluation":
            numbers = {n: known[n] for n in known if isinstance(known[n], int | float)}
            known["scores"] = {n: numbers[n] for n in numbers if n not in ("round", "schema")}
        return known
