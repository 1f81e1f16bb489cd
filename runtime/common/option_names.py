"""How messages spell an option: as the user has to write it, in Python or on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Naming = Callable[[str, Any], str]


def in_python(name: str, value: Any = None) -> str:
    """An option, or one with a value, as Python and JSON have it: ``eval_every``, ``seq=64``."""
    return name if value is None else f"{name}={value!r}"


def on_command_line(name: str, value: Any = None) -> str:
    """An option, or one with a value, as a command line has it: ``--eval-every``, ``--seq 64``, ``--resume``,
    ``--columns a=b``.
    """
    word = f"--{name.replace('_', '-')}"
    if isinstance(value, dict):
        value = ",".join(f"{key}={item}" for key, item in value.items())
    return word if value is None or value is True else f"{word} {value}"


_naming: ContextVar[Naming] = ContextVar("naming", default=in_python)


@contextmanager
def named_as(naming: Naming) -> Iterator[None]:
    """While entered, messages spell options as `naming` does."""
    token = _naming.set(naming)
    try:
        yield
    finally:
        _naming.reset(token)


def on_the_command_line() -> bool:
    """Whether messages are for somebody at the command line; other processes have to be told."""
    return spelled("x", True) == on_command_line("x", True)


def spelled(name: str, value: Any = None) -> str:
    """What a message calls the option `name`, or this option with a value; see `named_as`."""
    return _naming.get()(name, value)
