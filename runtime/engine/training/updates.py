"""What becomes of gradients: how a plan's UPDATE, ACCUMULATE and PERTURB instructions change what is trained.

A way to update is a class of `Updates`: at once, clipped, handed to a fleet, or from two losses (MeZO). `updates_of`
chooses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tightfit.runtime.engine.kernels.optimizer import (
    ClippedUpdate,
    Exact,
    GradientUpdate,
    MeZO,
    Perturbation,
    Rates,
    state_shape,
)
from tightfit.runtime.engine.training.job import STATES
from tightfit.runtime.engine.training.job_tables import TensorPlace, Trainable

if TYPE_CHECKING:
    from torch import Tensor

    from tightfit.runtime.engine.fleet.exchange import Exchange
    from tightfit.runtime.engine.training.storage import Storage


class Tensors(Protocol):
    """The tensors of a job while its instructions are carried out
    (`tightfit.runtime.engine.training.executor.Executor`).
    """

    trainables: Sequence[Trainable]
    states: Sequence[str]
    """what the optimizer's states of a trainable are called"""
    forwards: list[float]
    """losses of the step's forwards so far"""

    def resident(self, number: int, shape: Sequence[int], at: int | None = None) -> Tensor:
        """Tensor `number`, float32, in the arena, at offset `at` if it is new there; waits until it has arrived."""
        ...


class SavedState(NamedTuple):
    """A state of the optimizer, float32, as a checkpoint has it."""

    key: str
    shape: tuple[int, ...]
    place: TensorPlace
    """of a tensor with as many bytes"""
    chunks: Callable[[], Iterable[memoryview]]
    """its bytes, in parts"""
    keep: Callable[[Tensor], None]
    """puts a value in its place"""


class Updates(ABC):
    """A way to update. A plan has instructions of its own way alone."""

    def __init__(self, maker: GradientUpdate | Perturbation | Exchange, steps: int) -> None:
        self._maker: Any = maker
        self.steps = steps
        """whose gradients make one update"""

    @property
    def optimizer(self) -> Rates:
        """The optimizer's settings, of which those of the rate may be replaced between steps."""
        rates: Rates = self._maker.optimizer
        return rates

    @optimizer.setter
    def optimizer(self, settings: Rates) -> None:
        self._maker.optimizer = settings

    def begin(self, step: int, weight: Callable[[], int]) -> None:
        """Begin step `step`, counted from 1; `weight()` is over how many terms its gradients are means."""
        self._maker.begin(step, weight())

    @abstractmethod
    def update(self, tensors: Tensors, trainable: int, count: int) -> None:
        """Carry out update number `count`, from 1, of a trainable."""

    def accumulate(self, tensors: Tensors, trainable: int, at: int) -> None:
        """Add the gradient of a trainable to its sum, which lies at offset `at` of the arena."""
        raise NotImplementedError

    def perturb(self, tensors: Tensors, trainable: int, times: int) -> None:
        """Move a trainable by so many times its noise."""
        raise NotImplementedError

    def norm(self) -> float | None:
        """The norm of all gradients of the update that the step which began last completes, before they are clipped;
        the job's `update` is to follow. None: gradients are not clipped, or the update is not complete yet.
        """
        return None

    def initialise(self, storage: Storage) -> None:
        """Make the optimizer's states what they are before step 1, zero."""
        for one in storage.trainables:
            for place in one.states:
                storage.zero(place)

    def saved_states(self, storage: Storage, states: Sequence[str]) -> Iterator[SavedState]:
        """The optimizer's states that a checkpoint has, of each trainable those called `states`."""
        for one in storage.trainables:
            for state, place in zip(states, one.states):
                yield SavedState(
                    key=f"{state}:{one.name}",
                    shape=state_shape(state, one.shape),
                    place=place,
                    chunks=partial(storage.chunks, place),
                    keep=partial(storage.keep, place),
                )

    def progress(self) -> dict[str, Any]:
        """Entries of a checkpoint's ``state.json`` that say how far an update of several steps is."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:  # noqa: B027  some ways have nothing to go on from
        """Go on from a checkpoint with these entries."""


class AtOnce(Updates):
    """Each trainable is updated, or its gradient added to those of earlier steps, as soon as its gradient is
    complete.
    """

    def __init__(self, maker: GradientUpdate) -> None:
        super().__init__(maker, maker.accumulate)

    def update(self, tensors: Tensors, trainable: int, count: int) -> None:
        one = tensors.trainables[trainable]
        value, gradient = (tensors.resident(number, one.shape) for number in (one.value.number, one.gradient))
        self._maker.apply(count, value, gradient, *_states(tensors, one))

    def progress(self) -> dict[str, Any]:
        return {"summed": self._maker.summed}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._maker.summed = state.get("summed", 0.0)


class Clipped(AtOnce):
    """Gradients are summed up, and all trainables updated once their norm is known."""

    _maker: ClippedUpdate

    def accumulate(self, tensors: Tensors, trainable: int, at: int) -> None:
        one = tensors.trainables[trainable]
        total = tensors.resident(one.states[-1].number, one.shape, at)
        self._maker.add(tensors.resident(one.gradient, one.shape), total)

    def update(self, tensors: Tensors, trainable: int, count: int) -> None:
        one = tensors.trainables[trainable]
        value = tensors.resident(one.value.number, one.shape)
        self._maker.apply_sum(count, value, *_states(tensors, one))

    def norm(self) -> float | None:
        return self._maker.norm() if self._maker.due else None

    def saved_states(self, storage: Storage, states: Sequence[str]) -> Iterator[SavedState]:
        """All but the sums where the next step begins them anew."""
        return super().saved_states(storage, states if self._maker.sums else states[:-1])

    def progress(self) -> dict[str, Any]:
        return {"sums": self._maker.sums, **super().progress()}

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self._maker.sums = state["sums"]


class TwoSided(Updates):
    """MeZO: trainables are moved along a noise and back, and updated from the losses there."""

    def __init__(self, maker: Perturbation) -> None:
        super().__init__(maker, steps=1)

    def begin(self, step: int, weight: Callable[[], int]) -> None:
        self._maker.begin(step)

    def perturb(self, tensors: Tensors, trainable: int, times: int) -> None:
        one = tensors.trainables[trainable]
        self._maker.shift(one.name, tensors.resident(one.value.number, one.shape), times)

    def update(self, tensors: Tensors, trainable: int, count: int) -> None:
        one = tensors.trainables[trainable]
        value = tensors.resident(one.value.number, one.shape)
        self._maker.apply(one.name, value, *tensors.forwards)


class Handed(Updates):
    """Gradients are handed to a fleet's exchange, which updates once it has those of all members."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange, exchange.share.micro_batches)

    def update(self, tensors: Tensors, trainable: int, count: int) -> None:
        one = tensors.trainables[trainable]
        self._maker.apply(trainable, tensors.resident(one.gradient, one.shape))

    def initialise(self, storage: Storage) -> None:
        self._maker.states.zero()

    def saved_states(self, storage: Storage, states: Sequence[str]) -> Iterator[SavedState]:
        """Those of a process that accumulates gradients, whose sum is zero after an update."""
        for number, one in enumerate(storage.trainables):
            for row, state in enumerate(STATES):
                yield SavedState(
                    key=f"{state}:{one.name}",
                    shape=one.shape,
                    place=one.value,
                    chunks=partial(self._maker.state_chunks, row, number),
                    keep=partial(self._maker.set_state, row, number),
                )

    def progress(self) -> dict[str, Any]:
        """Between the updates of a fleet nothing is summed up."""
        return {"summed": 0.0}


def updates_of(header: Mapping[str, Any], optimizer: Exact | MeZO, exchange: Exchange | None) -> Updates:
    """The way to update of a job with this header; `exchange` takes the gradients of a fleet's member, of whom none
    clips.
    """
    if isinstance(optimizer, MeZO):
        return TwoSided(Perturbation(optimizer, header["seed"]))
    if exchange is not None:
        return Handed(exchange)
    steps, limit = header["accumulate"], header["max_grad_norm"]
    return (
        AtOnce(GradientUpdate(optimizer, steps)) if limit is None else Clipped(ClippedUpdate(optimizer, limit, steps))
    )


def _states(tensors: Tensors, one: Trainable) -> list[Tensor]:
    """The optimizer's states of a trainable, in the order of the plan."""
    return [
        tensors.resident(place.number, state_shape(state, one.shape))
        for state, place in zip(tensors.states, one.states, strict=True)
    ]
