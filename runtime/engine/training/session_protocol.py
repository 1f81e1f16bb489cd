"""The requests that a Session sends to the training process through a pipe: take a step, compute a loss, save, finish.

A request is one byte for its kind, the learning rate as a float64 (nan: that of the run) and, for a step or a loss, the
bytes of the batch's tensors in the plan's order. A pipe that is closed without `FINISH` means: save a checkpoint and
end, the run may be resumed later.
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
"""event of the message with which the training process answers each kind"""
_HEAD = struct.Struct("<cd")
PATIENCE = 0.2
"""seconds of waiting for a request after which `stopping` is asked again"""


@dataclass(frozen=True, kw_only=True)
class Request:
    kind: bytes
    lr: float | None


class Gone(Exception):  # noqa: N818  not an error
    """The pipe was closed without FINISH, or the run is to stop."""


class Requests:
    """The training process's end of the pipe. Also the source of training batches: each comes with its request."""

    fingerprint = STEP_BY_STEP
    samples: int | None = None

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._readable = select.poll()
        self._readable.register(descriptor, select.POLLIN)
        self.stopping: Callable[[], bool] = lambda: False
        """whether to stop waiting for requests; it must be polled, because a signal does not end a read by itself and a
        fork of the asking process may hold the pipe open
        """

    def next(self) -> Request | None:
        """Wait for the next request, up to its tensors; None: the pipe was closed, or the run is to stop."""
        head = bytearray(_HEAD.size)
        if not self._read(memoryview(head)):
            return None
        kind, lr = _HEAD.unpack(head)
        return Request(kind=kind, lr=None if math.isnan(lr) else lr)

    def training(self, step: int, inputs: Sequence[Tensor]) -> None:
        """Fill `inputs` with the batch of the latest request. Raises Gone if the pipe or the run ends within it."""
        for tensor in inputs:
            size = tensor.numel() * tensor.element_size()
            if size and not self._read(memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")):
                raise Gone

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self, view: memoryview) -> bool:
        """Fill `view`; False if the pipe is closed or the run is to stop before that."""
        while view and not self.stopping():
            if self._readable.poll(PATIENCE * 1e3):
                count = os.readv(self._descriptor, [view])
                if not count:
                    break
                view = view[count:]
        return not view


def ask(descriptor: int, kind: bytes, lr: float | None = None, tensors: Sequence[Tensor] = ()) -> None:
    """Write a request with its contiguous `tensors`. Raises BrokenPipeError if the training process has closed the
    pipe.
    """
    write_all(descriptor, _HEAD.pack(kind, float("nan") if lr is None else lr))
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if size:
            write_all(descriptor, memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B"))
