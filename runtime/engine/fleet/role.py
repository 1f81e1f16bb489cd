"""What a run does in a fleet: training and its loop ask a role at every point where a fleet's members differ from a run
by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tightfit.runtime.engine.fleet.exchange import Exchange
    from tightfit.runtime.engine.fleet.one_way import ReceivedBatches
    from tightfit.runtime.engine.fleet.transport import Transport
    from tightfit.runtime.engine.weights.safetensors_file import TensorItem


@dataclass(frozen=True, kw_only=True)
class Share:
    """What of a step a member computes."""

    first: int
    """number of its first micro-batch, from 0"""
    count: int
    micro_batches: int
    """of the step, all members together"""

    def steps(self, done: int) -> range:
        """Numbers, from 1, of the micro-batches that the member computes after the first `done` of the run."""
        return range(done + self.first + 1, done + self.first + self.count + 1)


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What the members told each other about a step."""

    losses: list[float]
    """of all micro-batches, in order"""
    labels: float
    """over how many labels the mean gradient is; for a module, micro-batches"""
    stop: bool
    """whether some member was asked to end, so that all of them save and end"""
    exchange_seconds: float
    update_seconds: float


class FleetRole:
    """The role of a run by itself, which has nobody to wait for; `JoinedRole` is that of one of several members."""

    share = Share(first=0, count=1, micro_batches=1)
    joined = False
    """whether there are other members"""
    exchange: Exchange | None = None
    """takes the gradients of this run and makes its updates; None: it updates by itself"""
    received: ReceivedBatches | None = None
    """the batches that another member sends; None: this run has data"""
    knows_losses = True
    """whether the loss of a micro-batch is known as soon as it is taken"""

    # --- before the first step -------------------------------------------------------------------------------------

    def data(self, fingerprint: str, held_out: str | None) -> tuple[str, str | None]:
        """Fingerprints of the data that are trained and evaluated on, of which this run has those given."""
        return fingerprint, held_out

    def agree(self, settings: Mapping[str, Any], held_out: str | None, out: str, *, resume: bool) -> None:
        """Compare the settings with those of the other members, and with `resume` see to it that the newest checkpoint
        in `out` is the one that all go on from. Raises InputError where settings differ or there is no such checkpoint.
        """

    def watched(self, done: int, steps: int | None, accumulate: int) -> dict[int, str]:
        """The steps after the first `done` whose timelines the report shows, and what it calls them. The second one is
        that of step 3 after the start, the first one without the start's extra work; where several steps make an
        update, it is that of the next step that ends one.
        """
        later = -(-(done + 3) // accumulate) * accumulate
        return {done + 1: "first", min(steps or later, later): "later"}

    # --- in a step -------------------------------------------------------------------------------------------------

    def passes(self, step: int) -> Iterator[tuple[int, bool]]:
        """What is due with `step`, in order: numbers of micro-batches, and whether each is trained or its forward alone
        runs.
        """
        yield step, True

    def send(self, tensor: Tensor, direction: Any, number: int) -> None:
        """Send a tensor of the current micro-batch, by its place in the message "up" or "down"."""
        raise NotImplementedError

    def receive(self, out: Tensor, direction: Any, number: int) -> None:
        """Put a tensor of the current micro-batch, by its place in the message, into `out`; waits until it is there."""
        raise NotImplementedError

    def told(self, loss: float) -> None:
        """Note the loss of the micro-batch that was taken last."""

    def finish(self, step: int, *, stop: bool) -> Exchanged | None:
        """End a step of the fleet, after the last of this member's micro-batches; `step` are those of all members since
        the run began, and `stop` says that this one was asked to end. None: there is nobody to tell.
        """
        return None

    # --- in an evaluation ------------------------------------------------------------------------------------------

    def count(self, batches: int) -> int:
        """The number of batches of an evaluation, of which this run's data have `batches`."""
        return batches

    def begin_evaluation(self) -> None:
        """Begin a batch of an evaluation."""

    def losses(self, made: Tensor | None, inputs: Sequence[Tensor]) -> Tensor | None:
        """The losses of the tokens of a batch, of which this run has `made` what it could."""
        return made

    def agreed(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result of an evaluation, from the member that knows it."""
        return result

    # --- at the end ------------------------------------------------------------------------------------------------

    def gathered(self, items: Callable[[], Iterator[TensorItem]]) -> list[TensorItem]:
        """The trained tensors of the other members that this one saves beside its own, which are `items()`."""
        return []

    def leave(self, why: str) -> None:
        """Tell the other members that this one ends, and why, unless one of them has ended already."""

    def close(self) -> None:
        """The run is over, as planned."""


class JoinedRole(FleetRole):
    """The role of one of several members, which have met."""

    joined = True
    apart = False
    """whether the members train tensors of their own, so that each has checkpoints of its own"""

    def __init__(self, transport: Transport, *, exact: bool) -> None:
        """`exact`: whether all members must round alike."""
        self.transport, self._exact = transport, exact

    def agree(self, settings: Mapping[str, Any], held_out: str | None, out: str, *, resume: bool) -> None:
        from tightfit.runtime.engine.fleet.agreement import agree

        said = {**settings, "plan of the fleet": self.transport.plan}
        try:
            agree(self.transport, said, out, resume=resume, exact=self._exact, apart=self.apart)
        except BaseException:
            self.transport.hang_up()  # the others have been told why
            raise

    def watched(self, done: int, steps: int | None, accumulate: int) -> dict[int, str]:
        """Of the first step of the fleet the first of this member's micro-batches, and the last."""
        own = self.share.steps(done)
        return {own[0]: "first", own[-1]: "later"} if len(own) > 1 else {own[0]: "later"}

    def leave(self, why: str) -> None:
        self.transport.leave(why)
        self.transport.hang_up()

    def close(self) -> None:
        self.transport.close()
