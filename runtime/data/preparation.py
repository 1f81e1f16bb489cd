"""Limits the memory of the processes that prepare a run (tokenising has one of its own) to the run's budget.

The report states their peak (`preparation_bytes`). A process that has imported PyTorch, to build a user's module or to
pack random weights for a bare config the first time, is not held to the budget; its peak is stated all the same.
"""

from __future__ import annotations

import sys

from tightfit.runtime.common.errors import CapError
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start.process import trim_heap

BYTES_PER_BYTE = 512
"""Most bytes of memory that tokenising takes for each byte of a line: measured 501 where every digit is a token (a
megabyte of digits with SmolLM2's tokenizer), 115 to 260 for texts in English and Japanese."""
LOOKED_AT = 64
"""samples between two checks of the memory"""


def held_to_budget() -> bool:
    """Whether the memory of this process counts while it prepares a run."""
    return "torch" not in sys.modules


class Preparation:
    """Checks the memory of this process, and of one that holds `beside_bytes` meanwhile, against `budget_bytes`."""

    def __init__(self, budget_bytes: int, beside_bytes: int = 0) -> None:
        self.budget_bytes, self.beside_bytes = budget_bytes, beside_bytes

    def check(self, what: str) -> None:
        """Raise CapError if this process's peak is above the budget; `what` names the work done last, for the message.

        Does nothing once PyTorch is imported.
        """
        if not held_to_budget():
            return
        peak = self.beside_bytes + memory().peak
        if peak > self.budget_bytes:
            enough = format_size(-(-peak // MIB + 1) * MIB)
            raise CapError(
                f"{what} took {format_size(peak)} in the processes that prepare the run, and the plan's budget is"
                f" {format_size(self.budget_bytes)}; plan with at least {enough}"
            )

    def longest_line(self) -> int | None:
        """Length in bytes, at least 1, of the longest line that can be tokenised in what is left of the budget now;
        None once PyTorch is imported.
        """
        if not held_to_budget():
            return None
        trim_heap()
        return max(1, (self.budget_bytes - self.beside_bytes - memory().resident) // BYTES_PER_BYTE)
