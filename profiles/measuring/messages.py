"""What the measuring process tells the one that started it: a JSON object a line."""

from __future__ import annotations

import json
import sys
from typing import Any


def send(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Steps:
    """The steps of measuring, of which each is told once it is done."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done = total, done

    def take(self) -> None:
        self.done += 1
        send(stage="measure", done=self.done, total=self.total)
