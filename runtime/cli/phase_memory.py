"""What a command itself holds in each of its phases, beside the processes that it starts: known before a phase begins.

Each figure is what Python, pydantic and the modules of a phase take once they are imported, and how much the files that
it reads become as Python's objects. Planning counts for itself (`tightfit.planner.solve.planning_memory`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tightfit.profiles.worker_process import expect
from tightfit.runtime.common.units import MIB
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
    ANSWERING: 100 * MIB,
}
"""of the process once all is imported"""
BYTES_PER_JSON = {READING: 0, PROFILING: 12, REHEARSING: 15, LEARNING: 8, PREPARING: 16, ASKING: 20, ANSWERING: 12}
"""that each byte of a profile or a plan becomes"""
INSTEAD = "end other programs, or give more memory"


def expect_phase(doing: str, phase: str, files: Iterable[Path]) -> None:
    """Note what this process is going to hold while it is `doing` a phase in which it reads these files. Raises
    InputError where that is not free.
    """
    whole = LOADED_BYTES[phase] + BYTES_PER_JSON[phase] * sum(file.stat().st_size for file in files if file.exists())
    expect(doing, whole - memory().resident, INSTEAD)
