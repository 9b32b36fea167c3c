"""Parts of settings that become options of a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec


def by_commas(parse: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """Annotates a field whose value is one argument with commas.

    Args:
        parse: makes the value of the text; a ValueError ends the command with its message.
        metavar: shown in the help in place of the value.
    """
    # tyro itself takes an argument for each value, as --words a b.
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda arguments: parse(arguments[0]),
        is_instance=lambda value: isinstance(value, tuple | dict),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def check_at_least(settings: Any, **least: int) -> None:
    """Refuses settings with a number below its least value; None is no number.

    Raises:
        ValueError: there is one; the message names it.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} is {value}; expected at least {bound}")
