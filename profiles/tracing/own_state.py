"""Finds what a module's forward keeps from one call to the next, or draws, beside its parameters, its buffers and
PyTorch's generator: a trace has none of it.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import random
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tightfit.profiles.tracing.own_code import is_own_code
from tightfit.runtime.common.errors import InputError

_STANDARD = frozenset(vars(nn.Module()))
_NOTHING = object()
DEEPEST = 5
"""How deep attributes of attributes are compared."""


def state_copy(module: nn.Module) -> nn.Module | None:
    """A copy of all that the module holds but its parameters and buffers, which it shares; None if it cannot be
    copied.
    """
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        # What autograd made, such as the weight of `nn.utils.weight_norm`, cannot be copied, and each call makes it
        # anew.
        memo |= {id(value): value for value in vars(part).values() if isinstance(value, Tensor) and not value.is_leaf}
    try:
        return copy.deepcopy(module, memo)
    except Exception:
        return None


def changed_attributes(before: nn.Module, after: nn.Module) -> list[str]:
    """Names of attributes, other than parameters, buffers and modules, that differ between two copies of a module."""
    names = []
    for (name, old), (_, new) in zip(before.named_modules(), after.named_modules(), strict=False):
        for key, value in vars(new).items():
            if key not in _STANDARD and not _same(vars(old).get(key, _NOTHING), value):
                names.append(f"{name}.{key}" if name else key)
    return names


def advance_counters(before: nn.Module, after: nn.Module, times: int) -> bool:
    """Change each integer attribute that grew from `before` to `after` as if it had grown `times` as much; False if
    none did.
    """
    counters = [
        (new, key, value, vars(old)[key])
        for old, new in zip(before.modules(), after.modules(), strict=False)
        for key, value in vars(new).items()
        if type(value) is int and type(vars(old).get(key)) is int and value != vars(old)[key]
    ]
    for part, key, value, start in counters:
        setattr(part, key, start + times * (value - start))
    return bool(counters)


def _same(one: Any, other: Any, depth: int = 0) -> bool:
    """Whether two values are equal, as far as can be seen: objects that hold nothing, or lie `DEEPEST` in others, are
    taken to be.
    """
    if one is other or depth == DEEPEST:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, (bool, int, float, complex, str, bytes, set)):
        return bool(one == other)
    if hasattr(one, "tobytes"):  # an array of NumPy
        return bool(one.tobytes() == other.tobytes())
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(_same(*pair, depth + 1) for pair in zip(one, other, strict=True))
    if not isinstance(one, dict):
        one, other = getattr(one, "__dict__", {}), getattr(other, "__dict__", {})
    return one.keys() == other.keys() and all(_same(one[key], other[key], depth + 1) for key in one)


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


def _generators() -> list[Any]:
    """The generators of random numbers of Python and NumPy that are alive."""
    kinds: tuple[type, ...] = (random.Random,)
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        kinds += (numpy.BitGenerator, numpy.RandomState)
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
