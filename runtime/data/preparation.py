"""What the process that prepares a run may hold: tokenising has a peak of its own, which the run's budget bounds too.

It is stated in the report (`preparation_bytes`). What imports PyTorch before the run is stated there and not refused: building
a module of one's own, and packing the random weights of a bare config for the first time.
"""

from __future__ import annotations

import sys

from tightfit.runtime.common.errors import CapError
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start.process import trim_heap

BYTES_PER_BYTE = 448
"""The most that is held for each byte of a line while it is tokenised: measured 433 where every digit is a token (a megabyte of
digits with SmolLM2's tokenizer), 70 to 185 for texts in English, Japanese and JSON's escapes."""
LOOKED_AT = 64
"""samples between two looks at the memory"""


class Preparation:
    """Watches this process against `budget_bytes`."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes

    def check(self, what: str) -> None:
        """Raises CapError where this process has held more than the budget; `what` was done last."""
        if "torch" in sys.modules:
            return
        peak = memory().peak
        if peak > self.budget_bytes:
            enough = format_size(-(-peak // MIB + 1) * MIB)
            raise CapError(
                f"{what} took {format_size(peak)} in the process that prepares the run, and the plan's budget is"
                f" {format_size(self.budget_bytes)}; plan with at least {enough}"
            )

    def longest_line(self) -> int:
        """Bytes of the longest line that can be tokenised within what the budget leaves now."""
        trim_heap()
        return max(0, self.budget_bytes - memory().resident) // BYTES_PER_BYTE
