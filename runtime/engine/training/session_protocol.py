"""What a training loop of one's own asks of the lean process: a step, a loss, a checkpoint, one after the other.

A request is its kind, the learning rate (nan: that of the run) and, for a step or a loss, the bytes of the batch's tensors in
the order of the plan. Whoever asks closes the pipe without `FINISH` where the run is to be gone on with later.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.runtime.common.files import write_all
from tightfit.runtime.engine.training.checkpoint import STEP_BY_STEP

if TYPE_CHECKING:
    from torch import Tensor

STEP, EVALUATE, SAVE, FINISH = b"s", b"e", b"c", b"f"
ANSWERS = {STEP: "step", EVALUATE: "loss", SAVE: "checkpoint"}
"""the message that answers each"""
_HEAD = struct.Struct("<cd")
PATIENCE = 0.2
"""seconds between two looks at whether to end, while nothing is asked"""


@dataclass(frozen=True, kw_only=True)
class Request:
    kind: bytes
    lr: float | None


class Gone(Exception):  # noqa: N818  not an error
    """Nobody asks any more."""


class Requests:
    """The end of the pipe in the lean process; as its batches it hands out the one that the latest request brought."""

    fingerprint = STEP_BY_STEP

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._readable = select.poll()
        self._readable.register(descriptor, select.POLLIN)
        self.stopping: Callable[[], bool] = lambda: False
        """whether to wait for nothing more: a signal alone ends no read, and a copy of the asking process may hold the pipe open"""

    def next(self) -> Request | None:
        """What is asked next; None: nothing any more, or the run is to stop."""
        head = bytearray(_HEAD.size)
        if not self._read(memoryview(head)):
            return None
        kind, lr = _HEAD.unpack(head)
        return Request(kind=kind, lr=None if math.isnan(lr) else lr)

    def training(self, step: int, inputs: Sequence[Tensor]) -> None:
        """Fill `inputs`. Raises Gone where the batch ends in the middle."""
        for tensor in inputs:
            size = tensor.numel() * tensor.element_size()
            if size and not self._read(memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")):
                raise Gone

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self, view: memoryview) -> bool:
        """Fill `view`; False where the pipe or the run ends before that."""
        while view and not self.stopping():
            if self._readable.poll(PATIENCE * 1e3):
                count = os.readv(self._descriptor, [view])
                if not count:
                    break
                view = view[count:]
        return not view


def ask(descriptor: int, kind: bytes, lr: float | None = None, tensors: Sequence[Tensor] = ()) -> None:
    """Write a request; `tensors` are contiguous. Raises BrokenPipeError where nobody reads it any more."""
    write_all(descriptor, _HEAD.pack(kind, float("nan") if lr is None else lr))
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if size:
            write_all(descriptor, memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B"))
