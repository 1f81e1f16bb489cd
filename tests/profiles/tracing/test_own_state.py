"""What a forward changes in Python is refused and named, wherever it lies, or let through by name."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from beside_pytorch import compared
from stateful_modules import Keeping, attribute
from torch import nn

from tightfit.profiles.tracing.eager_steps import EagerSteps
from tightfit.runtime.common.errors import InputError

GLOBAL = {"calls": 0}


class Counted:
    calls = 0


def counted():
    GLOBAL["calls"] += 1
    return GLOBAL["calls"]


def of_class():
    Counted.calls += 1
    return Counted.calls


def closure():
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return calls

    return count


def defaulted(kept=[]):  # noqa: B006  as people write it
    kept.append(0)
    return len(kept)


def grown(module):
    module.held.append(0)
    return len(module.held)


def added(module, amount=1):
    module.n += amount
    return module.n


def added_in_a_dict(module):
    module.stats["n"] = module.stats.get("n", 0) + 1
    return module.stats["n"]


def added_in_an_object(module):
    module.space.inner.n += 1
    return module.space.inner.n


COUNTERS = {
    "attribute": (added, lambda: {"n": 0}, "n"),
    "float": (lambda m: added(m, 0.5), lambda: {"n": 0.0}, "n"),
    "dict": (added_in_a_dict, lambda: {"stats": {}}, "stats"),
    "list": (grown, lambda: {"held": []}, "held"),
    "object": (added_in_an_object, lambda: {"space": types.SimpleNamespace(inner=types.SimpleNamespace(n=0))}, "space.inner.n"),
    "itertools.count": (lambda m: next(m.numbers), lambda: {"numbers": itertools.count(1)}, "numbers"),
    "itertools.cycle": (lambda m: next(m.numbers), lambda: {"numbers": itertools.cycle([1, 1, 1, 4])}, "numbers"),
    "iterator": (lambda m: next(m.numbers), lambda: {"numbers": iter(range(1, 99))}, "numbers"),
    "generator": (lambda m: next(m.numbers), lambda: {"numbers": (one for one in range(1, 99))}, "numbers"),
    "closure": (lambda m: m.count(), lambda: {"count": closure()}, "count.calls"),
    "default": (lambda m: defaulted(), dict, "defaulted"),
    "global": (lambda m: counted(), dict, "GLOBAL"),
    "class": (lambda m: of_class(), dict, "Counted.calls"),
}  # fmt: skip
"""place -> what counts there and returns the count, attributes, words that name the place"""
USES = {
    "unused": lambda n: 1.0,
    "period": lambda n: 2.0 if n % 4 == 0 else 1.0,
    "window": lambda n: 2.0 if 5 <= n < 50 else 1.0,
    "far": lambda n: 2.0 if n > 10_000 else 1.0,
}


def module_of(place, use):
    count, attributes, _ = COUNTERS[place]
    return Keeping(lambda m, x: m.loss(m.a(x)) * USES[use](count(m)), attribute(**attributes()))


def take(module, ignored=()):
    batch = (torch.randn(16, 8),)
    return EagerSteps("own.module", module, batch, ignored=ignored).take()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("place", COUNTERS)
def test_a_counter_is_refused_wherever_it_lies_and_whatever_is_done_with_it(place, use):
    with pytest.raises(InputError) as raised:
        take(module_of(place, use))
    assert COUNTERS[place][2] in str(raised.value)


@pytest.mark.parametrize("place", ["attribute", "dict", "list", "itertools.count", "closure", "global", "class"])
def test_what_only_counts_is_let_through_by_name(place):
    name = {"closure": "calls", "class": "Counted.calls"}.get(place, COUNTERS[place][2])
    assert take(module_of(place, "unused"), ignored=(name,)) == 3


def test_what_the_first_call_fills_depends_on_nothing_or_is_refused(tmp_path):
    def call(module, x):
        if module.kept is None:
            module.kept = module.fill(x)
        return module.loss(module.a(x) * module.kept)

    batch = (torch.randn(16, 8),)
    table = Keeping(call, attribute(kept=None, fill=lambda x: torch.linspace(0, 1, x.shape[1])))
    assert "its forward fills kept in the first call" in compared(table, batch, tmp_path)
    scale = Keeping(call, attribute(kept=None, fill=lambda x: x.detach().std(0)))
    with pytest.raises(InputError, match="fills kept in the first call, with what depends on the batch"):
        take(scale)


def test_a_function_s_class_and_a_hook_are_looked_at():
    class Scaled(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            Scaled.calls += 1
            return gradient

    with pytest.raises(InputError, match=r"Scaled\.calls"):
        take(Keeping(lambda m, x: m.loss(Scaled.apply(m.a(x))), attribute()))
    seen = []
    module = Keeping(lambda m, x: m.loss(m.a(x)), attribute())
    module.a.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(InputError, match="seen"):
        take(module)


def test_a_module_without_a_memory_passes():
    module = Keeping(
        lambda m, x: m.loss(m.stack(m.a(x))), lambda m: m.add_module("stack", nn.TransformerEncoderLayer(8, 2))
    )
    assert take(module) == 3
