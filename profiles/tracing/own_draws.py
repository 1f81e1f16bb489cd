"""Refuses a forward that draws random numbers which are not PyTorch's, or seeds PyTorch's generator: a trace keeps what
was drawn once.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import random
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from tightfit.profiles.tracing.own_code import is_own_code
from tightfit.runtime.common.errors import InputError


@contextlib.contextmanager
def draws_watched() -> Iterator[list[str]]:
    """The list that it gives says, once this context is left, which generators of random numbers of Python and NumPy
    were advanced within it, whoever holds them, or were made from the machine's entropy.
    """
    states = [(generator, _state(generator)) for generator in _generators()]
    drawn: list[str] = []
    seeds = sys.modules.get("numpy.random.bit_generator")

    def entropy(bits: int) -> int:
        drawn.append("NumPy (a new generator without a seed)")
        return secrets.randbits(bits)

    try:
        with mock.patch.object(seeds, "randbits", entropy) if hasattr(seeds, "randbits") else contextlib.nullcontext():
            yield drawn
    finally:
        for generator, state in states:
            if _state(generator) != state:
                kind = type(generator)
                drawn.append("Python's random" if issubclass(kind, random.Random) else f"NumPy ({kind.__name__})")


def refuse_draws(module: nn.Module, drawn: Sequence[str]) -> None:
    """Raise InputError if the module's forward has `drawn` from generators that are not PyTorch's."""
    if drawn:
        raise InputError(
            f"{type(module).__name__} draws random numbers of {drawn[0]} in its forward: every step would repeat those"
            " that were drawn when it was traced. Draw with PyTorch (torch.rand, torch.randint, torch.distributions),"
            " which draws anew in every step, and multiply by what was drawn in place of a branch; or draw outside and"
            " hand the result over as a tensor of the batch"
        )


@contextlib.contextmanager
def seeding_refused() -> Iterator[None]:
    """Within this context a module that seeds PyTorch's generator raises InputError."""

    def refusing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def seed(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if not is_own_code(caller.f_code.co_filename):
                return call(*args, **kwargs)
            raise InputError(
                f"at {caller.f_code.co_filename}:{caller.f_lineno} forward seeds PyTorch's generator ({name}), which a"
                " traced step leaves out: it draws anew in every step. For the same numbers in every step, draw them"
                " in __init__ and register them as a buffer"
            )

        return seed

    with contextlib.ExitStack() as stack:
        for name in ("manual_seed", "seed"):
            stack.enter_context(mock.patch.object(torch, name, refusing(f"torch.{name}", getattr(torch, name))))
        yield


def generator_kinds() -> tuple[type, ...]:
    """The classes of the generators of random numbers of Python and NumPy."""
    numpy = sys.modules.get("numpy.random")
    return (random.Random,) if numpy is None else (random.Random, numpy.BitGenerator, numpy.RandomState)


def _generators() -> list[Any]:
    """The generators that are alive."""
    kinds = generator_kinds()
    return [
        instance
        for instance in gc.get_objects()
        if issubclass(type(instance), kinds) and not issubclass(type(instance), random.SystemRandom)
    ]


def _state(generator: Any) -> bytes:
    for name in ("getstate", "get_state"):
        if hasattr(generator, name):
            return pickle.dumps(getattr(generator, name)())
    return pickle.dumps(generator.state)
