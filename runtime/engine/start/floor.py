"""Measures the floor: the memory that an idle training process holds, which every predicted peak includes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.process import trim_heap

if TYPE_CHECKING:
    from tightfit.runtime.engine.device.channels import TransferChannel

INSTRUCTION_BYTES = 50
"""Bytes that a job's tables take for each instruction on average: its int32 words, and numbers and names of its
tensors."""
HEAP_SLACK_BYTES = 12 << 18
"""Allowance for what a run holds beyond the idle process, its kernels and operators, its arena and the largest
workspace: the job's own tables and small holes in the heap. It does not grow after the second step, because free pages
are given back after every step. Runs of Qwen2.5-0.5B, 1.5B and 3B and Gemma3-4B (24 to 36 layers) needed up to 0.4 of
these 3 MiB, a small model of 80 layers 0.9; with 1.25 MiB Qwen2.5-0.5B in 320 MiB, whose plan used its budget to the
last KiB, met its cap. Writing a checkpoint takes 0.4 MiB more than a step; with 1.75 MiB that put twelve of twelve runs
of SmolLM2-135M's shape 0.01 to 0.22 MiB above their prediction, and one run in fifteen of Qwen2.5-0.5B in 200 MiB met
its cap. The views of operands that are kept from step to step are 0.9 MiB of Qwen2.5-0.5B's.
"""
INFERENCE_SLACK_BYTES = 3 << 19
"""Further allowance for steps without a backward: their floor includes less code that a run can do without, and the run
evaluates too. A run of MeZO that held 145 MiB, its buffers between small blocks of the heap, needed 2.5 MiB of both
allowances together, once beside other work 2.8.
"""
HOLES_PER_WORKSPACE = 0.3
"""Further holes in the heap, as a fraction of the largest workspace of an operator of PyTorch's own: the space that its
freed buffers leave is not always where the next operator's buffers need it. tightfit's own operators allocate nearly
all of their workspace at once."""
EXCHANGE_SLACK_BYTES = 4 << 20
"""Allowance for the code that exchanging gradients maps, for messages that are not pieces of gradients, and for the
chunks that are under way to a member on either side and from it (`tightfit.runtime.engine.fleet.transport.WINDOW`)."""
LOCAL, EXCHANGE_SECONDS = "127.0.0.1", 30.0
"""longest time in which two members of a fleet that are both in this process connect to each other"""
IMPORT_SLACK_BYTES = 10 << 20
"""By how much the peak of the start varies, depending on how files lie in the page cache: libraries are loaded before
their mappings can be split. With all of PyTorch's in folios of 2 MiB it was 5.6 MiB higher than with small ones, once
beside a run of all tests 8.0.
"""


def exchange_bytes(channel: TransferChannel) -> int:
    """Resident bytes that talking to the other members of a fleet adds to this process, whose kernels are warm;
    measured with two members that are both in this process, as many as a member has on its two sides, the allowance for
    messages included.
    """
    before = memory().resident
    import threading

    from tightfit.runtime.engine.fleet.keys import Keys, new_pairs
    from tightfit.runtime.engine.fleet.meeting import listening
    from tightfit.runtime.engine.fleet.transport import Transport
    from tightfit.runtime.engine.start.kernel_warmup import SIZE, settle, warm_up

    for name in ("agreement", "seat"):  # everything that the member of a fleet imports on top
        importlib.import_module(f"tightfit.runtime.engine.fleet.{name}")
    with listening(LOCAL, 0) as free:
        port = free.getsockname()[1]
    members = ["one", "other"]
    pairs = new_pairs(members)
    transports: list[Transport] = []

    def meet(rank: int) -> None:
        keys = Keys.of(pairs, members, rank)
        transports.append(Transport(members, rank, LOCAL, port, keys=keys, timeout=EXCHANGE_SECONDS))

    thread = threading.Thread(target=meet, args=(1,))
    thread.start()
    meet(0)
    thread.join()
    first, second = sorted(transports, key=lambda transport: transport.rank)
    for sender, receiver in ((first, second), (second, first)):
        sender.send_json("this is said", receiver.rank)
        receiver.receive_json(sender.rank)
    settle()  # as a run does once it is loaded: most of the code that meeting the others takes is not needed again
    warm_up(channel, SIZE)
    trim_heap()
    added = memory().resident - before
    for transport in transports:
        transport.close()
    return max(0, added) + EXCHANGE_SLACK_BYTES


def measure_floor(tell: Callable[[dict[str, Any]], None]) -> None:
    """Measure the floor in this process, which must be a fresh lean process, and `tell` its figures; all sizes are in
    bytes. Then `tell` `exchange_bytes` too: that comes last, so that where the members of a fleet cannot meet one
    device still trains.

    `import_peak_bytes` is VmHWM after the start. `resident_bytes` is the resident set once kernels are warm, clean file
    pages are released, and the pages that a step needs are mapped again; `inference_resident_bytes` the same with the
    pages that a step without a backward needs. The allowances above are included.
    """
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
    trim_heap()  # gives back the operators' buffers, which plans count as workspace
    resident = memory()
    figures = {
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
    tell(figures)
    tell({"exchange_bytes": exchange_bytes(channel)})
