"""What a command itself holds in each of its phases, beside the processes that it starts: known before a phase begins.

Each figure is what Python, pydantic and the modules of a phase take once they are imported, and how much the files that it reads become as
Python's objects. Planning counts for itself (`tightfit.planner.solve.planning_memory`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from tightfit.profiles.worker_process import expect
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.units import MIB
from tightfit.runtime.data.preparation import BYTES_PER_BYTE
from tightfit.runtime.data.samples import data_files
from tightfit.runtime.data.tables import kind_of, open_data
from tightfit.runtime.data.tokenization import PREPARED, RANDOM
from tightfit.runtime.engine.device.resident import memory

READING, PROFILING, REHEARSING, LEARNING = "reading", "profiling", "rehearsing", "learning"
PREPARING, ASKING, ANSWERING = "preparing", "asking a service", "answering"
LOADED_BYTES = {
    READING: 46 * MIB,
    PROFILING: 64 * MIB,
    REHEARSING: 61 * MIB,
    LEARNING: 67 * MIB,
    PREPARING: 55 * MIB,
    ASKING: 86 * MIB,
    ANSWERING: 108 * MIB,
}
"""of the process once all is imported"""
BYTES_PER_JSON = {READING: 0, PROFILING: 12, REHEARSING: 15, LEARNING: 8, PREPARING: 16, ASKING: 20, ANSWERING: 12}
"""that each byte of a profile or a plan becomes"""
TOKENIZER_BYTES = 21 * MIB
"""the `tokenizers` library and a vocabulary's table; one that is small is made meanwhile"""
BLOCK = 1 << 20
INSTEAD = "end other programs, or give more memory"


def expect_phase(doing: str, phase: str, files: Iterable[Path], data: Iterable[str | None] = ()) -> None:
    """Note what this process is going to hold while it is `doing` a phase in which it reads these files, and tokenises `data`. Raises
    InputError where that is not free, a long line of the data left out.
    """
    try:
        lines = [_longest_line(name) for name in data if name is not None and name != RANDOM]
    except (TightfitError, OSError, EOFError, zlib.error):  # whoever reads the data says what is wrong with them
        return
    if None in lines:
        return
    whole = LOADED_BYTES[phase] + BYTES_PER_JSON[phase] * sum(file.stat().st_size for file in files if file.exists())
    whole += TOKENIZER_BYTES if lines else 0
    longest = BYTES_PER_BYTE * max((line or 0 for line in lines), default=0)
    # Whoever tokenises a line that has no place refuses it, with its number and what to do.
    expect(doing, whole - memory().resident, INSTEAD, judged_later_bytes=longest)


def _longest_line(name: str) -> int | None:
    """Bytes of the longest line of data; None for tables without lines: what their library takes depends on what is packed in them."""
    if name.endswith(PREPARED):
        return 0
    longest = length = 0
    for file in data_files(name):
        if kind_of(file) not in {None, "CSV"}:
            return None
        with open_data(file) as content:
            while block := content.read(BLOCK):
                first, *others = block.split(b"\n")
                length += len(first)
                for line in others:
                    longest, length = max(longest, length), len(line)
        longest = max(longest, length)
    return longest
