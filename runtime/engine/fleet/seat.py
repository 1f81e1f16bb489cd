"""A member's seat in a fleet: where the members meet, and what this one does there; taking it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.runtime.engine.fleet.exchange import Exchange, ExchangePart, Trained
from tightfit.runtime.engine.fleet.keys import read_keys
from tightfit.runtime.engine.fleet.message import Passing
from tightfit.runtime.engine.fleet.one_way import OneWayStage
from tightfit.runtime.engine.fleet.role import JoinedRole
from tightfit.runtime.engine.fleet.stage import Boundary, PipelineStage, StagePart
from tightfit.runtime.engine.fleet.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What a training process must know to take part; it stands in the job's header."""

    members: list[str]
    """names of those that compute, in the order of the chain"""
    rank: int
    """this member's place in it, from 0"""
    address: str
    port: int
    """where the members meet: one of them listens there"""
    timeout: float
    """seconds to wait for the others to appear, and later for one message"""
    micro_batches: int
    """of a step of the fleet"""
    part: ExchangePart | StagePart
    exact: bool
    """whether all members must round alike, so that results are those of one process to the bit"""
    key: str
    """path of the file with the keys by which the members know each other"""
    plan: str = ""
    """fingerprint of the fleet's plan"""
    listens: int = 0
    """place in the chain of the member that listens where they meet"""

    @property
    def in_turn(self) -> bool:
        """Whether the members compute layers of one model, one after the other."""
        return isinstance(self.part, StagePart)

    def take(self, trained: Trained, stopping: Callable[[], bool], say: Callable[[str], None]) -> JoinedRole:
        """Meet the other members, and make room for what passes between them. `trained`: what this member trains.

        Raises RunError where they do not meet, or `stopping` says so meanwhile, or the disk lacks the space; `say` is
        told who is waited for.
        """
        transport = Transport(
            self.members,
            self.rank,
            self.address,
            self.port,
            keys=read_keys(self.key, self.members, self.rank),
            timeout=self.timeout,
            plan=self.plan,
            listens=self.listens,
            stopping=stopping,
            say=say,
        )
        if isinstance(self.part, StagePart):
            stage = OneWayStage if self.part.one_way else PipelineStage
            return stage(transport, self.part, self.micro_batches, exact=self.exact)
        return Exchange(transport, self.part, trained, self.micro_batches, exact=self.exact)


def seat_of(header: Mapping[str, Any]) -> Seat:
    """The seat that a job's header holds as a dict."""
    part = header["part"]
    made: ExchangePart | StagePart
    if "gradients" in part:
        made = ExchangePart(**part)
    else:
        made = StagePart(**{**part, "below": _boundary(part["below"]), "above": _boundary(part["above"])})
    return Seat(**{**header, "part": made})


def _boundary(said: Mapping[str, Any] | None) -> Boundary | None:
    if said is None:
        return None

    def passing(listed: Sequence[Mapping[str, Any]]) -> tuple[Passing, ...]:
        return tuple(Passing(shape=tuple(one["shape"]), dtype=one["dtype"]) for one in listed)

    return Boundary(up=passing(said["up"]), down=passing(said["down"]))
