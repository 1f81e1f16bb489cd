"""Records that a replay keeps: seconds and bytes by kind of work, memory over time, the peak."""

from __future__ import annotations

from dataclasses import dataclass, field

from tightfit.planner.schema import TimelinePoint

POINTS = 600
"""timeline points kept per phase"""


@dataclass(kw_only=True)
class ReplayTotals:
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


class Timeline:
    """Memory over time in at most `POINTS` points: of each stretch of a replay's `moments` the one with most bytes in
    use.
    """

    def __init__(self, moments: int) -> None:
        self.stride = -(-moments // POINTS)
        self.left = 0
        """moments until the next stretch begins"""
        self.most = -1
        """bytes in use at the fullest moment of this stretch"""
        self._kept: list[tuple[int, float, int, dict[str, int]]] = []

    @property
    def points(self) -> list[TimelinePoint]:
        return [
            TimelinePoint(
                instruction=instruction,
                seconds=seconds,
                bytes=total,
                by_kind={kind: size for kind, size in by_kind.items() if size},
            )
            for instruction, seconds, total, by_kind in self._kept
        ]

    def fuller(self, used: int) -> bool:
        """Count a moment at which `used` bytes are in use; whether it is the fullest of its stretch so far, and so has
        to be `put`.
        """
        if not self.left:
            self.left, self.most = self.stride, -1
        self.left -= 1
        return used > self.most

    def put(self, used: int, *, instruction: int, seconds: float, total: int, by_kind: dict[str, int]) -> None:
        """Record a moment in place of the one recorded last in this stretch; `total`: bytes of the whole process."""
        if self.most >= 0:
            self._kept.pop()
        self.most = used
        self._kept.append((instruction, seconds, total, by_kind))
