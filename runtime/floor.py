"""What the lean process itself occupies, measured in one: the constant of every prediction."""

from __future__ import annotations

from typing import Any

from runtime.process import memory, trim_heap

INSTRUCTION_BYTES = 350
"""Measured: a job of 9000 instructions, 210 weights and 420 trainables takes 3.1 MiB in the child (int32 words, tables, names)."""
HEAP_SLACK_BYTES = 3 << 20
"""What holes between long-lived blocks cost the heap beyond the largest workspace. Measured on a decoder of 30 layers:
1.7 to 2.4 MiB, the same from the second step on because free pages are given back after every step."""


def measure_floor() -> dict[str, Any]:
    """Bytes: `import_peak_bytes` VmHWM after the start, `resident_bytes` with kernels warm, clean file pages released and those that a step needs mapped again."""
    import torch

    from runtime import loop  # noqa: F401: everything that a run imports
    from runtime.lean_torch import mode
    from runtime.warm import SIZE, prepare, warm

    channel = prepare()
    start = memory()
    warm(channel, SIZE)
    trim_heap()  # buffers of operators are their workspace, which plans count
    resident = memory()
    return {
        "import_peak_bytes": start.peak,
        "resident_bytes": resident.resident + HEAP_SLACK_BYTES,
        "instruction_bytes": INSTRUCTION_BYTES,
        "anonymous_bytes": resident.anonymous,
        "file_bytes": resident.file,
        "torch": mode(),
        "torch_version": torch.__version__,
    }
