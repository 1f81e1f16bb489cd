"""What the lean process itself occupies, measured in one: the constant of every prediction."""

from __future__ import annotations

import importlib
from typing import Any

from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.process import trim_heap

INSTRUCTION_BYTES = 50
"""int32 words of an average instruction, and the numbers and names of its tensors."""
HEAP_SLACK_BYTES = 5 << 18
"""What a run holds beyond this floor, its kernels and operators, its arena and the largest workspace: the job's own tables
and small holes in the heap; the same from the second step on, because free pages are given back after every step. Runs of
Qwen2.5-0.5B, 1.5B and 3B and Gemma3-4B (24 to 36 layers) needed up to 0.4 of these 1.25 MiB, a small model of 80 layers 0.9."""
INFERENCE_SLACK_BYTES = 1 << 20
"""The same once more for a step of forwards alone: its floor has less code that a run can do without, and it evaluates as well."""
HOLES_PER_WORKSPACE = 0.3
"""Further holes, as a part of the largest workspace of an operator that is not ours: what its buffers leave free is not always
where the next one's need it. Ours take nearly all of their workspace at once."""
IMPORT_SLACK_BYTES = 2 << 20
"""How much the peak of the start varies with what the page cache holds."""


def measure_floor() -> dict[str, Any]:
    """Bytes: `import_peak_bytes` VmHWM after the start, `resident_bytes` with kernels warm, clean file pages released and those that a step needs mapped again, `inference_resident_bytes` with those that a step without a backward needs."""
    import torch

    importlib.import_module("tightfit.runtime.engine.training.loop")  # everything that a run imports
    from tightfit.runtime.engine.start.kernel_warmup import SIZE, prepare, warm_up
    from tightfit.runtime.engine.start.lean_torch import mode

    channel = prepare()
    start = memory()
    warm_up(channel, SIZE, backward=False)
    trim_heap()
    inference = memory()
    warm_up(channel, SIZE)
    trim_heap()  # buffers of operators are their workspace, which plans count
    resident = memory()
    return {
        "import_peak_bytes": start.peak + IMPORT_SLACK_BYTES,
        "resident_bytes": resident.resident + HEAP_SLACK_BYTES,
        "inference_resident_bytes": inference.resident + HEAP_SLACK_BYTES + INFERENCE_SLACK_BYTES,
        "instruction_bytes": INSTRUCTION_BYTES,
        "tables_on_disk": page_out.in_use() and mode() == "lean",
        "cuda_stubs": cuda_stubs.in_use() and mode() == "lean",
        "anonymous_bytes": resident.anonymous,
        "file_bytes": resident.file,
        "torch": mode(),
        "torch_version": torch.__version__,
    }
