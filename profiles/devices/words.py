"""What messages and reports call the parts of a device, by its kind: a new kind of device is a row here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tightfit.profiles.schema import DeviceFigures, Model


@dataclass(frozen=True, kw_only=True)
class DeviceWords:
    """Names, as they stand within a sentence."""

    budget: str
    """what a budget limits"""
    whole: str
    """the same with what is inside"""
    floor: str
    """what is there before any model is"""
    elsewhere: str
    """where tensors lie that are not resident"""
    threaded: bool
    """whether the number of compute threads is worth saying"""


PROCESS = DeviceWords(
    budget="the whole process",
    whole="the whole process, Python and PyTorch included",
    floor="Python and PyTorch",
    elsewhere="disk",
    threaded=True,
)
CARD = DeviceWords(
    budget="the card's memory",
    whole="the card's memory",
    floor="the CUDA context",
    elsewhere="host memory",
    threaded=False,
)
BY_DEVICE = {"cpu": PROCESS, "cuda": CARD}
LIVE_BYTES = "the bytes that are live"
"""what the budget of a bare graph limits: it has no process and no card"""


def words_of(device: DeviceFigures, model: Model | None = None) -> DeviceWords:
    """The words for a plan or profile of `model` on `device`; without `model`, those for the device alone."""
    words = BY_DEVICE[device.kind]
    graph = model is not None and model.is_bare_graph
    return replace(words, budget=LIVE_BYTES, whole=LIVE_BYTES) if graph else words
