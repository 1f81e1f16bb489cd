"""What a replay writes down as it goes: time spent, memory after each instruction, the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.schema import TimelinePoint

POINTS = 600
"""timeline points kept per phase"""


@dataclass(kw_only=True)
class Moment:
    """After one instruction."""

    instruction: int
    seconds: float
    by_kind: dict[str, int]
    bytes: int


@dataclass(kw_only=True)
class Totals:
    compute: float = 0.0
    recompute: float = 0.0
    unpack: float = 0.0
    stall: float = 0.0
    read_bytes: int = 0
    write_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ReplayPeak:
    bytes: int = -1
    instruction: int = -1
    tensors: tuple[str, ...] = field(default=())


def timeline(moments: Sequence[Moment]) -> list[TimelinePoint]:
    """At most POINTS moments, the fullest of each stretch of instructions."""
    stride = max(1, -(-len(moments) // POINTS))
    result = []
    for start in range(0, len(moments), stride):
        moment = max(moments[start : start + stride], key=lambda m: m.bytes - m.by_kind.get("fragmentation", 0))
        result.append(
            TimelinePoint(
                instruction=max(0, moment.instruction),
                seconds=moment.seconds,
                bytes=moment.bytes,
                by_kind=moment.by_kind,
            )
        )
    return result
