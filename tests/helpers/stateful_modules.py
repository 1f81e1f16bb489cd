"""Modules whose forward keeps something from one call to the next, or draws random numbers, and what becomes of each:
tests go through them, and docs/python.md has them as a table.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Keeping(nn.Module):
    """Two layers, what `setup` adds, and a loss of `call(self, x)`."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], setup: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(8, 8), nn.Linear(8, 8), call
        setup(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)

    def loss(self, hidden: Tensor) -> Tensor:
        return self.b(hidden.tanh()).square().mean()


def attribute(**values: Any) -> Callable[[Any], None]:
    return lambda module: vars(module).update(values)


def clamped(module, x):
    with torch.no_grad():
        module.a.weight.clamp_(-0.1, 0.1)
    return module.loss(module.a(x))


def clamped_by_data(module, x):
    module.a.weight.data.clamp_(-0.1, 0.1)
    return module.loss(module.a(x))


def clipped(module, x):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter * (1 / parameter.norm()).clamp(max=1))
    return module.loss(module.a(x))


def add_teacher(module):
    module.teacher = nn.Linear(8, 8).requires_grad_(False)


def followed(module, x):
    with torch.no_grad():
        for teacher, student in zip(module.teacher.parameters(), module.a.parameters(), strict=True):
            teacher.mul_(0.9).add_(student, alpha=0.1)
    return (module.b(module.a(x)) - module.teacher(x)).square().mean()


def carried(module, x):
    hidden = module.a(x) if module.hidden is None else module.a(x) + module.b(module.hidden)
    module.hidden = hidden.detach()
    return module.loss(hidden)


def carried_in_a_list(module, x):
    hidden = module.a(x) + sum(module.b(one) for one in module.hidden[-1:])
    module.hidden.append(hidden.detach())
    return module.loss(hidden)


def annealed(module, x):
    module.step += 1
    return module.loss(module.a(x)) * min(1.0, module.step / 10)


def switched(module, x):
    module.step += 1
    return module.loss(module.a(x)) * (1 if module.step < 1000 else 2)


def averaged(module, x):
    loss = module.loss(module.a(x))
    module.mean = 0.9 * module.mean + 0.1 * loss.detach()
    return loss / module.mean


COUNT = {"calls": 0}


class Schedule:
    temperature = 5.0


def cooled(module, x):
    module.schedule.temperature *= 0.9
    return module.loss((module.a(x) / module.schedule.temperature).softmax(-1))


def counted_globally(module, x):
    COUNT["calls"] += 1
    return module.loss(module.a(x)) * COUNT["calls"]


@functools.lru_cache(maxsize=2)
def remembered(number: int) -> float:
    return time.perf_counter() % 1


def looked_up(module, x):
    COUNT["calls"] += 1
    return module.loss(module.a(x)) * (1 + remembered(COUNT["calls"]))


def banked(module, x):
    hidden = module.a(x)
    loss = module.loss(hidden) + sum((hidden - one).square().mean() for one in module.bank)
    module.bank = [*module.bank[-3:], hidden.detach()]
    return loss


def queued(module, x):
    keys = module.a(x)
    loss = functional.cross_entropy(keys @ module.queue.clone().T, torch.arange(16))
    with torch.no_grad():
        module.queue.copy_(torch.cat([keys, module.queue[:16]]))
    return loss


def quantised(module, x):
    hidden = module.a(x)
    nearest = torch.cdist(hidden, module.book).argmin(1)
    made = hidden + (module.book[nearest] - hidden).detach()
    with torch.no_grad():
        module.book.mul_(0.9).add_(0.1 * functional.one_hot(nearest, 4).float().T @ hidden)
    return module.loss(made)


def mixed(module, x):
    share = np.random.beta(0.4, 0.4)  # noqa: NPY002  as people write it
    return module.loss(module.a(share * x + (1 - share) * x.flip(0)))


def masked(module, x):
    kept = np.random.rand(16, 8) < 0.8  # noqa: NPY002  as people write it
    return module.loss(module.a(x * torch.from_numpy(kept)))


def drawn_from_its_own(module, x):
    return module.loss(module.a(x) * float(module.generator.random()))


def drawn_from_a_new_one(module, x):
    return module.loss(module.a(x) * float(np.random.default_rng().random()))


def left_out(module, x):
    hidden = module.a(x)
    return module.loss(hidden if random.random() < 0.1 else hidden + module.b(hidden))


def seeded(module, x):
    torch.manual_seed(3)
    return module.loss(module.a(x * torch.rand(8)))


def drawn_from_torchs(module, x):
    return module.loss(module.a(x * torch.rand(8, generator=module.generator)))


def timed(module, x):
    return module.loss(module.a(x)) * (1 + time.perf_counter() % 1)


def made_once(module, x):
    if module.mask is None:
        module.mask = torch.linspace(0, 1, 8)
    return module.loss(module.a(x) * module.mask)


def logged(module, x):
    module.step += 1
    loss = module.loss(module.a(x))
    module.last = loss.detach()
    return loss


def changing_its_batch(module, x):
    return module.loss(module.a(x.mul_(2)))


def drawn_by_torch(module, x):
    hidden = module.a(functional.dropout(x, 0.3))
    return module.loss(hidden + module.b(hidden) * (torch.rand(16, 1) < 0.5))


def normalised_again(module, x):
    return module.loss(checkpoint(lambda x: module.norm(module.a(x)), x, use_reentrant=False))


AS_PYTORCH = "loss and gradients are PyTorch's in 3 steps of AdamW on different batches, exactly"
CHANGES = "its forward changes "
AGAIN = "the same step gives other results when it is taken again"
KINDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Any], str]] = {
    "a weight clamped in place under `no_grad`": (clamped, attribute(), "changes the parameter a.weight in its forward"),
    "the same by `weight.data`": (clamped_by_data, attribute(), "changes the parameter a.weight in its forward"),
    "weights clipped at the start of forward": (clipped, attribute(), "changes the parameter a.weight and 3 more in its forward"),
    "a frozen teacher that follows the student (EMA, BYOL)": (followed, add_teacher, "changes the parameter teacher.weight and 1 more in its forward"),
    "a hidden state carried from batch to batch": (carried, attribute(hidden=None), CHANGES + "hidden"),
    "the same in a list": (carried_in_a_list, lambda m: setattr(m, "hidden", []), CHANGES + "hidden"),
    "a counter in Python that anneals a loss": (annealed, attribute(step=0), CHANGES + "step"),
    "a curriculum that changes after a thousand steps": (switched, attribute(step=0), CHANGES + "step"),
    "a loss divided by its running mean, an attribute": (averaged, attribute(mean=torch.ones(())), CHANGES + "mean"),
    "a temperature in an object of one's own": (cooled, lambda m: setattr(m, "schedule", Schedule()), CHANGES + "schedule.temperature"),
    "global variables": (counted_globally, attribute(), AGAIN),
    "`functools.lru_cache` of what changes": (looked_up, attribute(), AGAIN),
    "a clock": (timed, attribute(), AGAIN),
    "a memory bank, a list": (banked, lambda m: setattr(m, "bank", []), CHANGES + "bank"),
    "a queue of keys, a buffer (MoCo)": (queued, lambda m: m.register_buffer("queue", torch.randn(32, 8)), "changes the buffer queue in its forward"),
    "a codebook's running mean, a buffer (VQ-VAE)": (quantised, lambda m: m.register_buffer("book", torch.randn(4, 8)), "changes the buffer book in its forward"),
    "spectral norm": (lambda m, x: m.loss(m.a(x)), lambda m: nn.utils.parametrizations.spectral_norm(m.a), "changes the buffer a.parametrizations.weight.0._u in its forward"),
    "mixup by NumPy": (mixed, attribute(), "draws random numbers of NumPy (RandomState) in its forward"),
    "a mask by NumPy (SpecAugment)": (masked, attribute(), "draws random numbers of NumPy (RandomState) in its forward"),
    "stochastic depth by `random`": (left_out, attribute(), "draws random numbers of Python's random in its forward"),
    "a generator of NumPy, held by the module": (drawn_from_its_own, attribute(generator=np.random.default_rng(0)), "draws random numbers of NumPy (PCG64) in its forward"),
    "the same, made anew in each call": (drawn_from_a_new_one, attribute(), "draws random numbers of NumPy (a new generator without a seed)"),
    "a `torch.Generator` of its own": (drawn_from_torchs, attribute(generator=torch.Generator()), "uses an object in its forward that a trace cannot hold"),
    "`torch.manual_seed` in forward": (seeded, attribute(), "forward seeds PyTorch's generator (torch.manual_seed)"),
    "dropout, `torch.rand`": (drawn_by_torch, attribute(), AS_PYTORCH),
    "weight norm": (lambda m, x: m.loss(m.a(x)), lambda m: nn.utils.parametrizations.weight_norm(m.a), AS_PYTORCH),
    "running statistics of batch normalisation": (lambda m, x: m.loss(m.norm(m.a(x))), lambda m: m.add_module("norm", nn.BatchNorm1d(8)), AS_PYTORCH),
    "the same under `torch.utils.checkpoint`": (normalised_again, lambda m: m.add_module("norm", nn.BatchNorm1d(8)), "under torch.utils.checkpoint PyTorch changes the running statistics of norm twice in a step"),
    "a table made in the first call and kept": (made_once, attribute(mask=None), AS_PYTORCH),
    "counters and losses kept for a log": (logged, attribute(step=0, last=None), "let through by name"),
    "a batch changed in place": (changing_its_batch, attribute(), AS_PYTORCH),
}  # fmt: skip
"""kind -> forward, what the module has beside two layers, and words of the refusal or of `Model.compared`."""


def stateful(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module of the kind and a sample batch."""
    torch.manual_seed(0)
    call, setup, _ = KINDS[kind]
    return Keeping(call, setup), (torch.randn(16, 8),)


def refused(words: str) -> bool:
    return words != AS_PYTORCH and not words.startswith("under torch.utils.checkpoint")


def table() -> list[str]:
    rows = []
    for kind, (_, _, words) in KINDS.items():
        said = "refused" if refused(words) else "as in PyTorch"
        rows.append(f"| {kind} | {said}{'' if words == AS_PYTORCH else f': “… {words} …”'} |")
    return ["| forward keeps or draws | what becomes of it |", "|---|---|", *rows]
