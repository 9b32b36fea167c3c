"""Settings in a YAML file: pydantic models that are read from one, and written with comments.

Whatever a file holds, reading ends in the model or in one sentence that names file, line, key,
value, and the values that are allowed.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import textwrap
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

Kind = TypeVar("Kind", bound="Section")
Location = tuple[int | str, ...]  # keys and positions that lead to a value
Lines = dict[Location, int]  # the line of each value

_YAML = "tag:yaml.org,2002:"
_VALUES = tuple(_YAML + name for name in ("int", "float", "bool", "null"))
# No setting is a date, and a label may look like one: "=" and "<<" are text as well.
_TEXTS = tuple(_YAML + name for name in ("str", "timestamp", "value", "merge"))


class ConfigError(ValueError):
    """A setting, or a file of settings, is missing or makes no sense."""


class Section(BaseModel):
    """Keys and values; others than the fields are refused."""

    # A misspelt key would otherwise leave its setting at the default, in silence.
    model_config = ConfigDict(extra="forbid", frozen=True)
    file: ClassVar[str]  # its name, where it is a file of its own

    @classmethod
    def make(cls: type[Kind], content: Any, lines: Lines | None = None, file: str = "") -> Kind:
        """Returns a section of plain values; ConfigError tells the first that does not fit."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            # A key that is misspelt is unknown, and also missing: only the first says why.
            first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        at = first["loc"]
        while lines and at not in lines:  # a missing key has no line: the section above it has
            at = at[:-1]
        raise ConfigError((f"{file}, line {lines[at]}: " if lines else "") + _sentence(cls, first))

    @classmethod
    def read(cls: type[Kind], folder: Path) -> Kind:
        """Returns what the file in a folder holds; ConfigError where that makes no sense."""
        path, lines = folder / cls.file, Lines()
        content = _load(path, lines)
        if isinstance(content, dict):
            return cls.make(content, lines, str(path))
        raise ConfigError(f"{path} must hold keys and values, as 'rounds: 100'")

    def write(self, folder: Path) -> None:
        """Writes the file in a folder, with the description of each field above it."""
        text = _comment(type(self).__doc__) + self._text()
        (folder / self.file).write_text(text, encoding="utf-8")

    def _text(self) -> str:
        text = ""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            text += _comment(field.description)
            if isinstance(value, Section):
                text += f"{name}:\n" + textwrap.indent(value._text(), "  ")
            else:
                text += yaml.dump({name: value}, Dumper=_Dumper, allow_unicode=True)
        return text


def _comment(text: str | None) -> str:
    return "".join(f"# {row}\n" for row in textwrap.wrap(" ".join((text or "").split()), 98))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    def compose_node(self, parent: Any, index: Any) -> Any:
        # Refused before anything is built: a few lines of them stand for billions of values.
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            _refuse(event, f"*{event.anchor} is an alias; write the value itself")
        return super().compose_node(parent, index)


for _side in (_Loader, _Dumper):
    # People write 1e-3; YAML 1.1 takes that for text.
    _number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    _side.add_implicit_resolver(_YAML + "float", _number, list("-+0123456789"))


def _refuse(at: Any, reason: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=reason, problem_mark=at.start_mark)


def _load(path: Path, lines: Lines) -> Any:
    """Returns the plain values of a file, and notes the line of each."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
        root = yaml.compose(text, Loader=_Loader)
        return None if root is None else _plain(root, (), lines)
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}: zorba federate init writes it") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n")
        reason = f"byte {data[error.start]:#04x}; expected UTF-8"
    except yaml.reader.ReaderError as error:
        line, reason = text[: error.position].count("\n"), f"no YAML: {error.reason}"
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line
        # Errors of our own are of the plain class, those of YAML of others.
        own = type(error) is yaml.MarkedYAMLError
        reason = str(error.problem) if own else f"no YAML: {error.problem}"
    except RecursionError:
        line, reason = 0, "too many lists or sections inside each other"
    raise ConfigError(f"{path}, line {line + 1}: {reason}")


def _plain(node: yaml.Node, at: Location, lines: Lines) -> Any:
    """Returns a node as dict, list or scalar."""
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*at, n), lines) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        content: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a list or section; expected a key")
            place = (*at, key.value)
            # YAML takes the last of two, and people look at the first.
            if key.value in content:
                _refuse(key, f"{key.value} again; line {lines[place]} has it")
            lines[place] = key.start_mark.line + 1
            content[key.value] = _plain(value, place, lines)
        return content
    if node.tag in _TEXTS:
        return node.value
    if node.tag not in _VALUES:
        _refuse(node, f"the tag {node.tag}; expected a plain value")
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, KeyError):  # "!!bool 7", or a number of thousands of digits
        _refuse(node, f"{reprlib.repr(node.value)} is no {node.tag.removeprefix(_YAML)}")


def _sentence(kind: type[Section], error: ErrorDetails) -> str:
    """Returns what pydantic refused, and what it would have taken."""
    location = [str(step) for step in error["loc"] if step != "[key]"]
    for step in location:
        annotation = kind.model_fields[step].annotation if step in kind.model_fields else None
        for part in (annotation, *get_args(annotation)):
            kind = part if isinstance(part, type) and issubclass(part, Section) else kind
    key, known = ".".join(location), ", ".join(kind.model_fields)
    match error["type"]:
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case "missing":
            return f"there is no {key}; expected all of {known}"
        case "extra_forbidden":
            near = difflib.get_close_matches(location[-1], kind.model_fields, 1)
            meant = f"did you mean {near[0]}?" if near else f"expected any of {known}"
            return f"there is no setting {key}; {meant}"
        case "model_type":
            wanted = f"keys and values under it: {known}"
        case _:
            wanted = re.sub(r"^\w+ should (be |have )?", "", error["msg"])
            wanted = wanted.replace("match", "text of the")
    return f"{key} is {reprlib.repr(error['input'])}; expected {wanted}"
