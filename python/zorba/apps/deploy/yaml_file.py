"""Reads a pydantic model from a YAML file, and writes one with a comment above each key.

Whatever the file holds, reading ends in the model or in one sentence that names file, line, key,
value, and the values that are allowed.
"""

from __future__ import annotations

import difflib
import re
import textwrap
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[int | str, ...]
"""Keys and positions that lead to a value."""
Model = TypeVar("Model", bound=BaseModel)

_WIDTH = 98
_MOST_BYTES = 1 << 20
_DEEPEST = 8  # sections and lists inside each other; ours need four
_LONGEST_VALUE = 60  # characters of a value in an error
_YAML = "tag:yaml.org,2002:"
_CONSTRUCTED = tuple(_YAML + name for name in ("int", "float", "bool", "null"))
# No setting is a date, and a label may look like one: "=" and "<<" are text as well.
_TEXTS = tuple(_YAML + name for name in ("str", "timestamp", "value", "merge"))


class ConfigError(ValueError):
    """A setting, or a file of settings, is missing or makes no sense."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, in C where there is one."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """The safe dumper; it quotes text that ``_Loader`` would take for a number."""


for _side in (_Loader, _Dumper):
    # People write 1e-3; YAML 1.1 takes that for text.
    _side.add_implicit_resolver(
        _YAML + "float",
        re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def read_model(kind: type[Model], path: Path) -> Model:
    """Returns the model that a YAML file holds.

    Raises:
        ConfigError: the file is not there, is no YAML, or does not fit the model.
    """
    lines: dict[Location, int] = {}
    content = _read_yaml(path, lines)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, as 'rounds: 100'")

    def place(location: Location) -> str:
        # A missing key has no line: the section that lacks it has one.
        while location and location not in lines:
            location = location[:-1]
        return f"{path}, line {lines.get(location, 1)}: "

    return make_model(kind, content, place)


def make_model(
    kind: type[Model], content: Any, place: typing.Callable[[Location], str] = lambda _: ""
) -> Model:
    """Returns a model of plain values.

    Args:
        kind: of the model.
        content: its fields by name.
        place: tells where a value is from; errors begin with it.

    Raises:
        ConfigError: a value does not fit its field, the first that does not.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # A key that is misspelt is unknown, and also missing: only the first says why.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    raise ConfigError(place(first["loc"]) + _sentence(kind, first))


def write_model(model: BaseModel, path: Path) -> None:
    """Writes a model as YAML, with the description of each field above it."""
    head = _comment(type(model).__doc__ or "")
    path.write_text("\n".join([*head, *_section(model)]) + "\n", encoding="utf-8")


def _section(model: BaseModel, comments: bool = True) -> list[str]:
    """Returns the lines of a model, not indented."""
    lines = []
    for name, field in type(model).model_fields.items():
        lines += _comment(field.description or "") if comments else []
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            lines += [f"{name}:", *_indented(_section(value, comments))]
        elif isinstance(value, dict):
            lines.append(f"{name}:")
            for number, (key, part) in enumerate(value.items()):
                # Sections of one kind are explained once.
                inner = _section(part, comments and number == 0)
                lines += _indented([f"{key}:", *_indented(inner)])
        else:
            lines += yaml.dump({name: value}, Dumper=_Dumper, allow_unicode=True).splitlines()
    return lines


def _comment(text: str) -> list[str]:
    return [f"# {row}" for row in textwrap.wrap(" ".join(text.split()), _WIDTH)]


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _read_yaml(path: Path, lines: dict[Location, int]) -> Any:
    """Returns plain values, and notes the line of each in ``lines``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}: zorba federate init writes it") from None
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{path} has {len(data):,} bytes; expected at most {_MOST_BYTES:,}")
    try:
        text = data.decode("utf-8")
        _check_shape(text, path)
        node = yaml.compose(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = data[error.start]
        raise ConfigError(f"{path}, line {line}: byte {byte:#04x}; expected UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}, line {mark.line + 1}: no YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{path}, line {line}: no YAML: {error.reason}") from None
    # An empty file has no node.
    return None if node is None else _plain(node, (), path, lines)


def _check_shape(text: str, path: Path) -> None:
    """Refuses aliases and deep nesting, before anything is built of them.

    A few lines of aliases stand for billions of values, and a thousand brackets for a recursion
    that Python does not survive.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        place = f"{path}, line {event.start_mark.line + 1}: "
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{place}*{event.anchor} is an alias; write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ConfigError(f"{place}more than {_DEEPEST} lists or sections inside each other")


def _plain(node: yaml.Node, at: Location, path: Path, lines: dict[Location, int]) -> Any:
    """Returns a node as dict, list or scalar."""
    lines.setdefault(at, node.start_mark.line + 1)
    place = f"{path}, line {node.start_mark.line + 1}: "
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*at, n), path, lines) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        content: dict[str, Any] = {}
        for key_node, value in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"{path}, line {line}: a list or section; expected a key")
            # YAML takes the last of two, and people look at the first.
            if key in content:
                first = lines[(*at, key)]
                raise ConfigError(f"{path}, line {line}: {key} again; line {first} has it")
            lines[(*at, key)] = line
            content[key] = _plain(value, (*at, key), path, lines)
        return content
    if node.tag in _TEXTS:
        return node.value
    if node.tag not in _CONSTRUCTED:
        raise ConfigError(f"{place}the tag {node.tag}; expected a plain value")
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, KeyError, yaml.YAMLError):
        raise ConfigError(f"{place}{_shown(node.value)} is no {node.tag[18:]}") from None


def _sentence(kind: type[BaseModel], error: ErrorDetails) -> str:
    """Returns what pydantic refused, and what it would have taken."""
    location = tuple(step for step in error["loc"] if step != "[key]")
    key = ".".join(map(str, location))
    reason = error["msg"]
    if error["type"] == "value_error":
        return reason.removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"there is no {key}; expected all of {', '.join(_keys_at(kind, location[:-1]))}"
    if error["type"] == "extra_forbidden":
        known = _keys_at(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, 1)
        meant = f"did you mean {near[0]}?" if near else f"expected any of {', '.join(known)}"
        return f"there is no setting {key}; {meant}"
    if error["type"] in ("model_type", "dict_type"):
        wanted = "keys and values under it: " + ", ".join(_keys_at(kind, location))
    else:
        wanted = re.sub(r"^\w+ should (be |have )?", "", reason).replace("match", "text of the")
    return f"{key} is {_shown(error['input'])}; expected {wanted}"


def _keys_at(kind: type[BaseModel], location: Location) -> list[str]:
    """Returns the keys of the section at a location."""
    for step in location:
        field = kind.model_fields.get(str(step))
        kind = next(iter(_models_in(field.annotation)), kind) if field else kind
    return list(kind.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _shown(value: Any) -> str:
    # Values may be as long as the file, and an error is one line.
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
