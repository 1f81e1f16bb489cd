"""When a step of a device and a server is done, between which messages pass one way.

The device has two messages to send from, and begins a forward once the message before the previous one has left; the server
has two to receive into, and a message starts once the one before the previous one has been trained. (The runtime waits a
little later, at the first operator that needs the buffer, so that a step takes no longer than is said here.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tightfit.planner.fleet.schema import Link, Span

BUFFERS = 2
"""messages on either side"""


@dataclass(frozen=True, kw_only=True)
class OneWay:
    """A device, its link to a server, and the server, by the seconds that each takes for a micro-batch."""

    device_seconds: float
    server_seconds: float
    message_bytes: int
    device_link: Link
    server_link: Link

    @property
    def link_seconds(self) -> float:
        """For which a message occupies the slower side of the link."""
        return self.message_bytes / min(self.device_link.up_bytes_per_second, self.server_link.down_bytes_per_second)

    @property
    def latency_seconds(self) -> float:
        """From one to the other."""
        return self.device_link.latency_seconds + self.server_link.latency_seconds

    def least_seconds(self, micro_batches: int) -> float:
        """No order of the same parts takes less: all micro-batches on the slowest part, the first one's way there and the
        last one's from there, and the word that the step is done, there and back.
        """
        parts = self.device_seconds, self.link_seconds, self.server_seconds
        way = sum(parts) + self.latency_seconds
        return way + (micro_batches - 1) * max(parts) + 2 * self.latency_seconds

    def play(self, micro_batches: int, names: tuple[str, str]) -> tuple[float, list[Span]]:
        """The seconds of a step, and what device, link and server do when."""
        device, server = names
        computed = trained = 0.0
        left: list[float] = []
        ends: list[float] = []
        spans: list[Span] = []
        for number in range(micro_batches):
            begun = max(computed, left[number - BUFFERS] if number >= BUFFERS else 0.0)
            computed = begun + self.device_seconds
            spans.append(_span(device, "forward", begun, computed, number))
            room = ends[number - BUFFERS] if number >= BUFFERS else 0.0
            started = max(computed, left[-1] if left else 0.0, room)
            left.append(started + self.link_seconds)
            spans.append(_span(f"{device} → {server}", "send", started, left[-1], number))
            arrived = max(trained, left[-1] + self.latency_seconds)
            trained = arrived + self.server_seconds
            ends.append(trained)
            spans.append(_span(server, "compute", arrived, trained, number))
        return trained + 2 * self.latency_seconds, spans


def _span(lane: str, what: Literal["forward", "send", "compute"], begin: float, end: float, number: int) -> Span:
    return Span(lane=lane, what=what, begin_seconds=begin, end_seconds=end, micro_batch=number)
