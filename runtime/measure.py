"""Measures operators, unpacking, updates and channels for a profile: ``python -m runtime.measure`` (JSON in, JSON lines out).

It runs in the environment of a run and calls operators through the runtime's own `compile_operator`. One program's
tensors are in memory at a time; weights of equal shape share one buffer, since only their size matters.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from runtime.kernels import kernel_bytes
from runtime.process import child_environment, command, memory, trim_heap

ROUNDS = (4, 40)
PROGRAM_SECONDS = 1.5  # time spent on a program beyond the first rounds
CHANNEL_SIZES = (64 << 10, 512 << 10, 4 << 20)
SCRATCH_BYTES = 64 << 20
GATHERED_ROWS = 8192
SLOWDOWN_SECONDS = 0.1
SLOWDOWN_TURNS = 9
MARK = "TIGHTFIT_MEASURE"


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    if os.environ.get(MARK) is None:  # begin again in the environment of a run
        text = sys.stdin.read()
        threads = int(json.loads(text)["threads"])
        done = subprocess.run(
            [sys.executable, "-X", "utf8", "-m", "runtime.measure"],
            input=text,
            text=True,
            env=child_environment(threads) | {MARK: "1"},
            check=False,
        )
        return done.returncode
    request = json.load(sys.stdin)
    import torch

    torch.set_num_threads(request["threads"])
    with torch.no_grad():
        say(result=measure(request))
    return 0


def measure(request: dict[str, Any]) -> dict[str, Any]:
    programs = request["programs"]
    total = len(programs) + len(request["weights"]) + len(request["updates"]) + 2
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        say(stage="measure", done=done, total=total)

    result: dict[str, Any] = {"floor": floor(request["threads"])}
    result["floor"]["resident_bytes"] += kernel_bytes(programs, request["threads"])
    step()
    result["operators"] = {}
    for program in programs:
        result["operators"][program["name"]] = measure_program(program, Path(request["scratch"]))
        gc.collect()
        trim_heap()
        step()
    result["unpack"] = []
    for key in request["weights"]:
        result["unpack"].append(measure_unpack(*key))
        step()
    result["update"] = []
    for elements in request["updates"]:
        result["update"].append(measure_update(elements))
        step()
    result |= measure_channels(Path(request["scratch"]), request["compute_dtype"])
    step()
    return result


def floor(threads: int) -> dict[str, int]:
    """What an idle runtime process holds, asked of one."""
    done = subprocess.run(
        command("--floor"), capture_output=True, text=True, env=child_environment(threads), check=False
    )
    if done.returncode:
        raise SystemExit(f"the runtime process does not start: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def measure_program(program: dict[str, Any], scratch: Path) -> list[list[float]]:
    """[seconds, workspace bytes] per operator: operators run in order, round after round, as they do in a step."""
    from profiles.store import Store
    from runtime.compiled import compile_operator

    values = {value["name"]: value for value in program["values"]}
    if not program["operators"]:
        return []
    tensors = _make_tensors(values, program["operators"])
    gathered = {name for operator in program["operators"] for name in operator["gathers"]}
    store = None
    if gathered:
        path = _scratch_store(scratch, {name: values[name] for name in gathered})
        store = Store.open(path)
        path.unlink()
        tensors |= {name: name for name in gathered}
    calls: list[Callable[[], None]] = []
    for operator in program["operators"]:
        outputs = [None if name is None else tensors[name] for name in operator["outputs"]]
        calls.append(partial(compile_operator(operator, values).run, tensors, outputs, store))
    times: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    for turn in range(ROUNDS[1]):
        for call, taken in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
        if turn >= ROUNDS[0] and time.perf_counter() - started > PROGRAM_SECONDS:
            break
    workspaces = [_workspace(call) for call in calls]
    if store is not None:
        store.close()
    # The first two rounds fault pages in and build kernels.
    return [[statistics.median(taken[2:]), workspace] for taken, workspace in zip(times, workspaces, strict=True)]


def _make_tensors(values: dict[str, dict[str, Any]], operators: list[dict[str, Any]]) -> dict[str, Any]:
    """Plausible contents, so that no operator meets denormals, NaN or an index out of range."""
    import torch

    generator = torch.Generator().manual_seed(0)
    gathered = {name for operator in operators for name in operator["gathers"]}
    rows = GATHERED_ROWS if gathered else 2  # labels and indices are in range of anything
    shared: dict[tuple[Any, ...], Any] = {}
    tensors = {}
    for name, value in values.items():
        if name in gathered:
            continue
        dtype, shape, stride = getattr(torch, value["dtype"]), value["shape"], value["stride"]
        key = (*shape, value["dtype"])
        if value["kind"] == "weight" and key in shared:
            tensors[name] = shared[key]
            continue
        tensor = torch.empty_strided(shape, stride, dtype=dtype)
        if dtype.is_floating_point:
            tensor.normal_(0.0, 0.05, generator=generator)
        elif dtype is torch.bool:
            tensor.fill_(True)
        else:
            tensor.random_(0, rows, generator=generator)
        if value["kind"] == "weight":
            shared[key] = tensor
        tensors[name] = tensor
    return tensors


def _scratch_store(folder: Path, tables: dict[str, dict[str, Any]]) -> Path:
    """A store with short tables, so that gathering rows is timed with its reads."""
    import torch

    from profiles.describe import packed_entry
    from profiles.pack import StoreWriter

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"measure-{os.getpid()}.store"
    entries = [packed_entry(name, (GATHERED_ROWS, table["shape"][1]), "q4") for name, table in tables.items()]
    with StoreWriter(path, entries, name="measure", config={}, source={}) as writer:
        for entry in entries:
            writer.write(entry.name, [torch.zeros(entry.rows, entry.row_bytes, dtype=torch.uint8)])
    return path


def _workspace(call: Callable[[], None]) -> int:
    """Heap bytes that a call takes beyond its inputs and outputs: the rise of the kernel's peak counter, from a trimmed heap."""
    rises = []
    for _ in range(2):
        trim_heap()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present
        before = memory().resident
        call()
        rises.append(memory().peak - before)
    return max(0, *rises)


def measure_unpack(kind: str, group: int, rows: int, columns: int, dtype: str) -> float:
    """Seconds to unpack rows x columns, from buffers that have left the cache as freshly read ones have."""
    import torch

    from profiles.store import Entry, unpack

    entry = Entry(name="weight", shape=(rows, columns), format=kind, group=group)
    copies = max(2, min(8, (32 << 20) // max(1, entry.bytes)))
    packed = torch.randint(0, 64, (copies, entry.bytes), dtype=torch.uint8)
    out = torch.empty(rows, columns, dtype=getattr(torch, dtype))
    return _median(lambda turn: unpack(entry, packed[turn % copies], out))


def measure_update(elements: int) -> float:
    import torch

    from runtime.optimizer import AdamW, Update

    update = Update(AdamW())
    update.begin(1)
    tensors = [torch.full((elements,), 1e-3) for _ in range(4)]
    return _median(lambda turn: update.apply(*tensors))


def _median(call: Callable[[int], None], seconds: float = 0.2) -> float:
    times: list[float] = []
    started = time.perf_counter()
    turn = 0
    while turn < 5 or (turn < 200 and time.perf_counter() - started < seconds):
        begin = time.perf_counter()
        call(turn)
        times.append(time.perf_counter() - begin)
        turn += 1
    return statistics.median(times[1:])


def measure_channels(folder: Path, dtype: str) -> dict[str, dict[str, float]]:
    """Bandwidth and latency of direct reads and writes as the runtime makes them, and what they cost a busy computation."""
    import mmap

    from runtime.spill import SpillFile

    folder.mkdir(parents=True, exist_ok=True)
    file = SpillFile(str(folder), SCRATCH_BYTES)
    try:
        buffer = mmap.mmap(-1, CHANNEL_SIZES[-1])
        view = memoryview(buffer)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        for start in range(0, CHANNEL_SIZES[-1], 1 << 16):
            buffer[start : start + (1 << 16)] = os.urandom(1 << 16)
        for offset in range(0, SCRATCH_BYTES, CHANNEL_SIZES[-1]):
            file.write(address, CHANNEL_SIZES[-1], offset)
        transfers: dict[str, Callable[[int, int], object]] = {
            "write": lambda offset, count: file.write(address, count, offset),
            "read": lambda offset, count: os.preadv(file.descriptor, [view[:count]], offset),
        }
        return {name: _channel(transfer, SCRATCH_BYTES, dtype) for name, transfer in transfers.items()}
    finally:
        file.close()


def _channel(transfer: Callable[[int, int], object], size: int, dtype: str) -> dict[str, float]:
    seconds = {}
    for count in CHANNEL_SIZES:
        offsets = range(0, size - count + 1, count)[:32]
        times = []
        for offset in offsets:
            begin = time.perf_counter()
            transfer(offset, count)
            times.append(time.perf_counter() - begin)
        seconds[count] = statistics.median(times)
    small, large = CHANNEL_SIZES[0], CHANNEL_SIZES[-1]
    per_byte = max((seconds[large] - seconds[small]) / (large - small), 1e-12)
    return {
        "bytes_per_second": 1.0 / per_byte,
        "latency_seconds": max(0.0, seconds[small] - per_byte * small),
        "compute_seconds_per_byte": _slowdown(transfer, size, dtype),
    }


def _slowdown(transfer: Callable[[int, int], object], size: int, dtype: str) -> float:
    """Seconds that computing loses per byte moved beside it: the median over turns alone and turns together.

    The thread that moves bytes needs a core for copies and system calls, and an operator waits for its slowest core.
    Computing is a layer's mix: a large matrix product, a pass over memory that is larger than the cache, narrow products.
    """
    import torch

    left, right = torch.randn(512, 1024).to(getattr(torch, dtype)), torch.randn(1024, 1024).to(getattr(torch, dtype))
    out = torch.empty(512, 1024, dtype=left.dtype)
    passed = [torch.zeros(4 << 20, dtype=left.dtype) for _ in range(3)]
    narrow = [torch.zeros(shape, dtype=left.dtype) for shape in ((512, 512), (512, 8), (512, 8))]
    moving, stop, moved = threading.Event(), threading.Event(), 0

    def move() -> None:
        nonlocal moved
        offset = 0
        while not stop.is_set():
            moving.wait()
            transfer(offset, CHANNEL_SIZES[1])
            moved += CHANNEL_SIZES[1]
            offset = (offset + CHANNEL_SIZES[1]) % (size - CHANNEL_SIZES[1])

    def compute(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            torch.mm(left, right, out=out)
            torch.add(passed[0], passed[1], out=passed[2])
            for _ in range(12):
                torch.mm(narrow[0], narrow[1], out=narrow[2])
        return time.perf_counter() - begin

    compute(5)
    count = max(10, int(SLOWDOWN_SECONDS / compute(20) * 20))
    thread = threading.Thread(target=move)
    thread.start()
    losses = []
    for _ in range(SLOWDOWN_TURNS):
        alone = compute(count)
        before = moved
        moving.set()
        together = compute(count)
        moving.clear()
        losses.append((together - alone) / max(1, moved - before))
    stop.set()
    moving.set()
    thread.join()
    return max(0.0, statistics.median(losses))


if __name__ == "__main__":
    sys.exit(main())
