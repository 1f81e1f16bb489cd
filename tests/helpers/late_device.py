"""A test device that works later than it is asked, as an accelerator does, and at the worst moments.

Operators wait in a queue and run in its order; copies run beside them. Whatever may run by the marks that the engine
gave may run at any moment, or not before somebody waits for it: a seed draws which. Between two of them the arena holds
garbage, so that what the engine reads or writes there without asking the device is wrong or lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from apart import GARBAGE, Apart
from torch import Tensor

from tightfit.runtime.engine.device.device import Mark
from tightfit.runtime.engine.device.meter import Meter
from tightfit.runtime.engine.training.executor import BoundOperator, Executor


class Work:
    """Something that the device was asked for; as a `Mark`, its end."""

    def __init__(self, device: Late, run: Callable[[], object], after: Iterable[Mark]) -> None:
        self.device, self.run, self.done = device, run, False
        self.after = [mark for mark in after if isinstance(mark, Work) and not mark.done]

    def wait(self) -> None:
        while not self.done:
            self.device.work()

    @property
    def ready(self) -> bool:
        return all(one.done for one in self.after)


class Late(Apart):
    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, Meter(1 << 60))
        self._truth = self._memory.bytes.clone()
        self._random = random.Random(seed)
        self._pending: list[Work] = []
        self._latest: Work | None = None
        """operator that was asked for last"""
        self._followed: list[Mark] = []
        self.most_behind = 0
        """most works that were pending at once"""

    def take_over(self, executor: Executor) -> None:
        """Have the operators and updates of a job run when the device gets to them."""
        for operator in executor.operators():
            operator.call = self._later(operator)
        maker = executor.updates._maker
        for owner, names in ((maker, ("apply", "add", "apply_sum", "shift")), (executor.store, ("unpack",))):
            for name in names:
                if hasattr(owner, name):
                    setattr(owner, name, self._asked(getattr(owner, name)))

    def mark(self) -> Mark:
        return super().mark() if self._latest is None else self._latest

    def follow(self, mark: Mark) -> None:
        self._followed.append(mark)

    def put(self, at: int, host: Tensor, after: Mark) -> Mark:
        return self._add(lambda: Apart.put(self, at, host, after), [after])

    def get(self, at: int, host: Tensor, after: Mark) -> Mark:
        return self._add(lambda: Apart.get(self, at, host, after), [after])

    def work(self) -> None:
        """Do one of the things that may be done now."""
        chosen = self._random.choice([one for one in self._pending if one.ready])
        self._pending.remove(chosen)
        self._memory.bytes.copy_(self._truth)
        chosen.run()
        self._truth.copy_(self._memory.bytes)
        self._memory.bytes.fill_(GARBAGE)
        chosen.done = True

    def _ask(self, run: Callable[[], object]) -> None:
        """Queue an operator behind those before it and what it was told to follow."""
        before = [] if self._latest is None else [self._latest]
        self._latest = self._add(run, [*before, *self._followed])
        self._followed = []

    def _asked(self, function: Callable[..., object]) -> Callable[..., None]:
        return lambda *arguments: self._ask(lambda: function(*arguments))

    def _add(self, run: Callable[[], object], after: Iterable[Mark]) -> Work:
        work = Work(self, run, after)
        self._pending.append(work)
        self.most_behind = max(self.most_behind, len(self._pending))
        # Now and then the device keeps up, for a while.
        if self._random.random() < 0.05:
            for _ in range(self._random.randrange(len(self._pending) + 1)):
                self.work()
        return work

    def _later(self, operator: BoundOperator) -> Callable[[list[Any]], None]:
        call = operator.call

        def ask(outputs: list[Any]) -> None:
            # The operator's slots are filled anew for the next layer before this call runs.
            slots = [(one.container, one.key) for one in operator.reads] + [one[:2] for one in operator.gathers]
            operands, taken = [container[key] for container, key in slots], list(outputs)

            def run() -> None:
                present = [container[key] for container, key in slots]
                for (container, key), operand in zip(slots, operands, strict=True):
                    container[key] = operand
                call(taken)
                for (container, key), operand in zip(slots, present, strict=True):
                    container[key] = operand

            self._ask(run)

        return ask
