"""What server and devices tell each other in a round: an order with the fleet's adapter, an answer with the trained
one.

Both are flat records of texts and numbers, as Flower's `ConfigRecord` holds them; the adapter travels beside them as
the bytes of its safetensors file. The standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

Word = str | int | float | bool
ORDER, ANSWER, ADAPTER = "order", "answer", "adapter"
"""names of the records in a message"""
HELLO, OVER = 0, -1
"""numbers of orders that are of no round: say who you are; the rounds are over"""
STYPE = "safetensors"
"""how the adapter's bytes are said to be serialised"""


class _Words:
    """A record of which every field is a word."""

    def words(self) -> dict[str, Word]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def of(cls, words: Mapping[str, object]) -> Self:
        """The record that another process sent; what a newer one says beside is left out. Raises KeyError, ValueError
        or TypeError for words that are missing or no such thing.
        """
        kinds = {"str": str, "int": int, "float": float, "bool": bool}
        return cls(**{one.name: kinds[str(one.type)](words[one.name]) for one in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Order(_Words):
    """What a device is asked to do in a round; in round 0, to say who it is and which labels its data have."""

    round: int
    """counted from 1"""
    steps: str = "{}"
    """local steps by member, as JSON; a member that is not named takes no part"""
    lr: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0
    """of the order of the data in this round"""
    seconds: float
    """that the device has until its answer has to be there"""

    port: int = 0
    """of the server, where it computes the upper layers: its run of these listens there for this device"""
    labels: str = "{}"
    """in round 0: sha256 of the labels that the server has, by member, as JSON"""

    def steps_of(self, member: str) -> int:
        return int(json.loads(self.steps).get(member, 0))

    def knows(self, member: str, digest: str) -> bool:
        return bool(json.loads(self.labels).get(member) == digest)


@dataclass(frozen=True, kw_only=True)
class Answer(_Words):
    """What a device says of its part of a round. With `error` there is no adapter beside it."""

    round: int
    member: str
    steps: int = 0
    tokens: int = 0
    """that the adapter was trained on, without padding"""
    loss: float = 0.0
    """mean over the steps"""
    seconds: float = 0.0
    """of the device, from the order to the answer"""
    peak_bytes: int = 0
    """of the run's processes, as measured; Flower's own are not among them"""
    flower_bytes: int = 0
    """of the process that talks to Flower, resident while the run trained"""
    error: str = ""
    """why there is no result; empty: there is one"""
