"""A device and a server that trains a side network for it: messages pass one way, the labels first, and no gradient
comes back.

The device has the data and knows the results of evaluations, for which the server sends it the losses of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tightfit.runtime.engine.fleet.stage import CLOSE, PipelineStage

if TYPE_CHECKING:
    from torch import Tensor

DEVICE, SERVER = 0, 1
"""places of the two members in the chain"""


class OneWayStage(PipelineStage):
    """The role of the device, and of the server that trains a side network for it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._judge = DEVICE
        if self._last:
            self.received = ReceivedBatches(self)

    def data(self, fingerprint: str, held_out: str | None) -> tuple[str, str | None]:
        """Those that the device tells."""
        told, evaluated = self._told_by_device([fingerprint, held_out])
        return told, evaluated

    def count(self, batches: int) -> int:
        return int(self._told_by_device(batches))

    def _told_by_device(self, own: Any) -> Any:
        if not self._first:
            return self.transport.receive_json(DEVICE)
        self.transport.send_json(own, SERVER)
        return own

    def labels(self, out: Tensor) -> None:
        """Put the labels of the current micro-batch into `out`; waits until they are there."""
        assert self._from_below
        self._from_below.take(self._up, 0, out)

    def losses(self, made: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        import torch

        if made is None:
            made = torch.empty(inputs[1].numel(), dtype=torch.float32)
            self.transport.receive(made, SERVER, CLOSE).wait()
        else:
            self.transport.send(made, DEVICE, CLOSE).wait()
        return made


class ReceivedBatches:
    """The batches of a server that trains a side network: the labels that a device sends. Of the tensors of a batch the
    first, tokens, stays as it is: the device keeps them.
    """

    fingerprint = ""
    """the device's data have one, which it tells (`OneWayStage.data`)"""
    samples: int | None = None

    def __init__(self, stage: OneWayStage) -> None:
        self._stage = stage

    def training(self, step: int, inputs: Sequence[Tensor]) -> None:
        self._stage.labels(inputs[1])

    def epoch_steps(self, batch: int, epochs: float = 1.0) -> float:
        raise NotImplementedError

    def evaluation_count(self, inputs: Sequence[Tensor]) -> int:
        """The device knows how many there are (`OneWayStage.count`)."""
        return 0

    def evaluation(self, number: int, inputs: Sequence[Tensor]) -> list[Any]:
        self._stage.labels(inputs[1])
        return []

    def close(self) -> None:
        """Nothing is open."""
