"""What the measuring process tells the one that started it while it goes on."""

from __future__ import annotations

from tightfit.profiles.worker_process import send


class Steps:
    """The steps of measuring, of which each is told once it is done."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done = total, done

    def take(self) -> None:
        self.done += 1
        send(stage="measure", done=self.done, total=self.total)
