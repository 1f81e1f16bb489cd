"""The process that measures operators, unpacking, updates and channels for a profile.

Called as ``python -m tightfit.profiles.measuring.worker THREADS``: a request in as JSON, messages and the result out as
JSON lines. It is a process like that of a run, with PyTorch's kernels and without PyTorch's Python, and calls operators
through the runtime's own `compile_operator`. One program's tensors are in memory at a time, placed by their lifetimes
(`tightfit.profiles.measuring.placement`); how large other buffers are is said by the request. Once all else is measured
it becomes the process that measures the floor (`tightfit.profiles.measuring.floor`).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.measuring import floor
from tightfit.profiles.measuring.cpu_load import OtherPrograms
from tightfit.profiles.measuring.cpu_quota import QuotaClock
from tightfit.profiles.measuring.kept_figures import KeptFigures
from tightfit.profiles.measuring.memory import (
    BETWEEN_BYTES,
    GATHERED_ROWS,
    MOST_CALLS,
    adafactor_buffers,
    clipped_buffers,
    likeness,
    unpack_buffers,
    update_buffers,
)
from tightfit.profiles.measuring.messages import Steps
from tightfit.profiles.measuring.placement import Placement, place
from tightfit.profiles.measuring.sample import sample, work
from tightfit.profiles.worker_process import send
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.common.parent import end_with_parent
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import lean_torch
from tightfit.runtime.engine.start.process import child_environment, leave, trim_heap
from tightfit.runtime.engine.training.job import EXPERTS_AT

if TYPE_CHECKING:
    from tightfit.profiles.measuring.guard import OutputGuard

ROUNDS = (4, 40)
GATHERED_BLOCKS = 64  # in which a table that rows are gathered from is written
FIGURE_SECONDS = 0.1  # spent on a figure of unpacking or updating
PASSES = 3
"""over all programs; of seconds the middle figure counts: disturbances by other work come in bursts, and the lowest
figure is that of a moment in which the machine was faster than it is on the whole
"""
WORKSPACE_CALLS = 4  # calls per operator and pass of which the lowest workspace counts
PROGRAM_SECONDS = 0.7  # time spent on a program in a pass, beyond the first rounds
WHOLE_SHARE = 0.1  # of the step: a program that takes less of it gets so much less of that time
SLOW_PASS_SECONDS = 20.0  # of a program that is steady enough after one pass
SLOW_SECONDS = 0.05  # of a call that is long enough for fewer calls to be as steady
SLOW_PROGRAM_SECONDS = 1.5  # the same of the first rounds of a program
DISTURBED = 1.5  # times the median: what took longer was interrupted
CONTENTS = ("normal", "probabilities")
"""Contents of floating-point tensors while operators are measured, tried in this order. Some operators, such as binary
cross entropy, need values between 0 and 1: "probabilities"."""


class ScratchStores:
    """A folder for stores with tables of `GATHERED_ROWS` rows, so that gathering rows is timed including its reads."""

    def __init__(self, folder: Path, tables: Iterable[Sequence[Any]] = ()) -> None:
        """`tables` are (shape, format, group) of the model's matrices; a table of no such shape is in q4."""
        self.folder = folder
        self._formats = {tuple(shape): (kind, group) for shape, kind, group in tables}
        self._opened: dict[str, Any] = {}

    def form(self, shape: Sequence[int]) -> tuple[str, int]:
        """(format, group) of a table of this shape."""
        kind, group = self._formats.get(tuple(shape), ("q4", 0))
        return kind, group

    def opened(self, shapes: Mapping[str, Sequence[int]]) -> Any:
        """A `WeightStore` with a table for each name, in the format of the model's matrix of that shape. It is written
        once, and closed when these stores are.
        """
        from tightfit.runtime.engine.weights.store import WeightStore

        key = json.dumps(shapes)
        if key not in self._opened:
            path = self._write(shapes)
            self._opened[key] = WeightStore.open(path)
            path.unlink()
        return self._opened[key]

    def __del__(self) -> None:
        for store in self._opened.values():
            store.close()

    def _write(self, shapes: Mapping[str, Sequence[int]]) -> Path:
        import torch

        from tightfit.profiles.weights.describe import packed_entry
        from tightfit.profiles.weights.store_file import StoreWriter
        from tightfit.runtime.engine.weights.store import Entry

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"measure-{os.getpid()}.store"
        entries = []
        for name, shape in shapes.items():
            form, group = self.form(shape)
            rows = (GATHERED_ROWS, shape[1])
            entry = Entry(name=name, shape=rows, format=form, group=group) if group else packed_entry(name, rows, form)
            entries.append(entry)
        with StoreWriter(path, entries, name="measure", config={}, source={}) as writer:
            for entry in entries:
                block = torch.zeros(entry.rows // GATHERED_BLOCKS, entry.row_bytes, dtype=torch.uint8)
                writer.write(entry.name, itertools.repeat(block, GATHERED_BLOCKS))
        return path


class HighWater:
    """The most that this process has held, over the resets of VmHWM by which workspaces are measured."""

    def __init__(self) -> None:
        self._earlier = 0

    @property
    def bytes(self) -> int:
        return max(self._earlier, memory().peak)

    def reset(self) -> None:
        """Set VmHWM to the present resident set."""
        self._earlier = self.bytes
        Path("/proc/self/clear_refs").write_text("5")


HIGH_WATER = HighWater()


def main(arguments: list[str]) -> int:
    end_with_parent(signal.SIGKILL)
    if arguments:  # started by `measure`: restart this process in the environment of a run
        worker_command = interpreter.command("tightfit.profiles.measuring.worker")
        os.execve(worker_command[0], worker_command, child_environment(int(arguments[0])))  # noqa: S606  no shell is wanted
    lean_torch.load()
    from tightfit.runtime.engine.start.kernel_warmup import prepare

    prepare().close()
    request = json.load(sys.stdin)
    steps = Steps(_steps(request))
    try:
        result = measure(request, steps)
        floor.become(request["scratch"], request, result, HIGH_WATER.bytes, steps)
    except TightfitError as error:
        failure = error
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error) and not isinstance(error, MemoryError):  # torch has no MemoryError
            raise
        failure = RunError(
            f"measuring ran out of memory ({str(error).splitlines()[0]}); a layer must fit into memory while it is"
            " measured, try a smaller batch or sequence"
        )
    except OSError as error:
        if error.filename is None:
            raise
        failure = RunError(
            f"{error.filename}: {error.strerror}; set TIGHTFIT_CACHE to a writable directory with free space"
        )
    send(failure=str(failure))
    return failure.exit_code


def _steps(request: dict[str, Any]) -> int:
    """Number of steps in which a request is carried out, those of the floor included."""
    return (
        (PASSES + 1) * len(request["programs"])
        + len(request["weights"])
        + 2 * len(request["updates"])
        + len(request["shapes"])
        + 4
    )


def measure(request: dict[str, Any], steps: Steps) -> dict[str, Any]:
    """What `tightfit.profiles.measuring.measure.measure` returns, but for the floor. Operators of the request get their
    `copied`.
    """
    from tightfit.profiles.measuring.bandwidth import measure_channels, reference_seconds
    from tightfit.profiles.measuring.guard import OutputGuard
    from tightfit.runtime.engine.start.kernel_warmup import settle

    load, kept = OtherPrograms(), KeptFigures.of_request(request, turning_bytes=request["turning_bytes"])
    kept.check(reference_seconds())
    trim_heap()
    programs = request["programs"]
    guard, contents = OutputGuard(), {}
    scratch = ScratchStores(Path(request["scratch"]), request["tables"])
    for program in programs:
        contents[program["name"]] = settle_operators(program, guard, scratch, request["turning_bytes"])
        settle()
        steps.take()
    if request.get("step"):
        take_steps(request["step"], programs)
        send(stage="computed")
    result: dict[str, Any] = {
        "copied": {program["name"]: [op["copied"] for op in program["operators"]] for program in programs},
        "operators": measure_operators(request, scratch, contents, steps, kept),
    }
    turning_bytes, accumulate = request["turning_bytes"], request["accumulate"]

    def figure(kind: str, key: Any, measure_it: Callable[..., Any], *arguments: Any) -> Any:
        value = kept.of(kind, key, lambda: measure_it(*arguments, turning_bytes))
        trim_heap()
        return value

    result["unpack"] = []
    for weight in request["weights"]:
        result["unpack"].append(figure("unpack", weight, measure_unpack, *weight))
        steps.take()
    result |= {"update": [], "accumulate": [], "clipped": [], "perturb": []}
    for elements in request["updates"]:
        sizes = [elements, accumulate]
        result["update"].append(figure("update", sizes, measure_update, *sizes))
        add_seconds, update_seconds = figure("clipped", sizes, measure_clipped, *sizes)
        result["accumulate"].append(add_seconds)
        result["clipped"].append(update_seconds)
        steps.take()
        result["perturb"].append(figure("perturb", elements, measure_perturb, elements))
        steps.take()
    result["adafactor"] = []
    for shape in request["shapes"]:
        result["adafactor"].append(figure("adafactor", shape, measure_adafactor, shape))
        steps.take()
    disk = [request["compute_dtype"], Path(request["scratch"]).stat().st_dev]
    result |= kept.of("channels", disk, lambda: measure_channels(scratch.folder, request["compute_dtype"]))
    steps.take()
    busy_cores = load.taken(request["threads"])
    kept.save(busy_cores, request["threads"])
    return result | {"busy_cores": busy_cores}


def measure_operators(
    request: dict[str, Any], scratch: ScratchStores, contents: Mapping[str, str], steps: Steps, kept: KeptFigures
) -> dict[str, list[list[float]]]:
    """[seconds, workspace bytes] of every operator by program. Those that are `kept` are not measured.

    Operators that are equal, and stand in different programs, are measured in one of them. In the first pass a program
    runs a few rounds, which tell how long it takes; in the others for as long as its share of the step, what it has to
    measure, is worth.
    """
    from tightfit.runtime.engine.start.kernel_warmup import settle

    programs = request["programs"]
    counts = request.get("counts") or [1] * len(programs)
    between = [sample(program).between for program in programs]
    keys = [
        {index: key for index, key in enumerate(_occurrences(program, scratch)) if index not in inferred}
        for program, inferred in zip(programs, between, strict=True)
    ]
    rarest_first = sorted(range(len(programs)), key=lambda number: (counts[number], -number))
    chosen = {key: number for number in rarest_first for key in keys[number].values()}
    """the program in which an operator is measured: that with the most layers"""
    firsts = [{key: index for index, key in reversed(of_program.items())} for of_program in keys]
    """by program: where each of its different operators stands first"""
    likenesses = [
        {index: likeness(program, program["operators"][index]) for index in of_program}
        for program, of_program in zip(programs, keys, strict=True)
    ]
    passes: dict[tuple[str, int], list[float]] = {}
    workspaces: dict[str, int] = {}
    for key in chosen:
        if (seconds_known := kept.known("operator", key)) is not None:
            passes[key] = [seconds_known]
    for alike in itertools.chain.from_iterable(of_program.values() for of_program in likenesses):
        if (workspace_known := kept.known("workspace", alike)) is not None:
            workspaces[alike] = workspace_known
    seconds_kept, workspaces_kept = set(passes), set(workspaces)
    worth = [0.0] * len(programs)
    slow = [False] * len(programs)
    for turn in range(PASSES):
        tried = set(workspaces_kept)
        for number, program in enumerate(programs):
            own = {
                key: index for key, index in firsts[number].items() if chosen[key] == number and key not in seconds_kept
            }
            fresh = {alike: index for index, alike in likenesses[number].items() if alike not in tried}
            tried.update(fresh)
            if (own or fresh) and not slow[number]:
                started = time.perf_counter()
                seconds, needed = measure_program(
                    program,
                    scratch,
                    contents[program["name"]],
                    turning_bytes=request["turning_bytes"],
                    seconds=PROGRAM_SECONDS * worth[number],
                    workspaces_of=fresh.values(),
                    timed=firsts[number].values(),
                )
                slow[number] = time.perf_counter() - started > SLOW_PASS_SECONDS
                for key, index in own.items():
                    passes.setdefault(key, []).append(seconds[index])
                for alike, index in fresh.items():
                    workspaces[alike] = min(needed[index], workspaces.get(alike, needed[index]))
            settle()
            steps.take()
        if not turn:
            # Of the step: the seconds of those operators that are measured in a program, for each operator that is
            # equal to one.
            share = [0.0] * len(programs)
            for number, count in enumerate(counts):
                for key in keys[number].values():
                    share[chosen[key]] += count * passes[key][0]
            worth = [min(1.0, part / max(sum(share), 1e-9) / WHOLE_SHARE) for part in share]
    for key in passes.keys() - seconds_kept:
        kept.note("operator", key, statistics.median(passes[key]))
    for alike in workspaces.keys() - workspaces_kept:
        kept.note("workspace", alike, workspaces[alike])
    figures = {}
    for number, program in enumerate(programs):
        seconds = {index: statistics.median(passes[key]) for index, key in keys[number].items()}
        taken = {index: float(workspaces[alike]) for index, alike in likenesses[number].items()}
        for index, ends in between[number].items():
            seconds[index], taken[index] = ends.of(seconds), max(taken[ends.shorter], taken[ends.longer])
        figures[program["name"]] = [[seconds[index], taken[index]] for index in range(len(program["operators"]))]
    return figures


def _occurrences(program: dict[str, Any], scratch: ScratchStores) -> list[tuple[str, int]]:
    """For each operator what it does (`work`, with the formats of tables whose rows it gathers), and how many like it
    stand before it in the program, or, in a program of several tiles, in its tile.
    """
    values = {value["name"]: value for value in program["values"]}
    before: dict[str, int] = {}
    keys = []
    for operator in program["operators"]:
        tables = [scratch.form(values[name]["shape"]) for name in operator["gathers"]]
        key = json.dumps([work(operator, values), tables, operator["copied"]])
        before[key] = before.get(key, -1) + 1
        keys.append((key, before[key]))
    tiles = program.get("tiles", 1)
    in_tile = {key: (last + 1) // tiles if (last + 1) % tiles == 0 else last + 1 for key, last in before.items()}
    return [(key, number % in_tile[key]) for key, number in keys]


def take_steps(step: dict[str, Any], programs: list[dict[str, Any]]) -> None:
    """Run whole steps, each on the tensors in the file `given` with its number and, where that lacks some, on those in
    `given0`; write its loss, gradients and statistics, and the loss of an evaluation before it, to the file `traced`
    with its number.
    """
    from tightfit.profiles.measuring.whole_step import run_step
    from tightfit.profiles.tracing.tensor_files import EVALUATION, read_tensors, write_tensors

    folder, by_name = Path(step["folder"]), {program["name"]: program for program in programs}
    first = read_tensors(folder / "given0")
    for number in range(step["steps"]):
        tensors = first | read_tensors(folder / f"given{number}")
        loss = run_step(step["layers"], by_name, dict(tensors), [step["loss"]], seed=number, evaluate=True)
        results = run_step(step["layers"], by_name, tensors, step["wanted"], seed=number)
        results[EVALUATION] = loss[step["loss"]]
        write_tensors(folder / f"traced{number}", results)
        tensors.clear()
        results.clear()
    first.clear()
    gc.collect()
    trim_heap()


def settle_operators(
    program: dict[str, Any], guard: OutputGuard, scratch: ScratchStores, turning_bytes: int | None = None
) -> str:
    """Set `copied` on the operators of a program, for those that have to be run by their functional form.

    Returns the first of `CONTENTS` with which all operators run. Raises InputError if they run with none of them.
    """
    from tightfit.profiles.measuring.guard import check_program

    failure: InputError | None = None
    for contents in CONTENTS:
        tensors, store = _filled(program, scratch, contents, turning_bytes)
        try:
            copied_flags = check_program(program, tensors, guard, store, stand_in=sample(program).stand_in)
        except InputError as error:
            failure = failure or error
            continue
        finally:
            del tensors
        for operator, copied in zip(program["operators"], copied_flags, strict=True):
            operator["copied"] = copied
        return contents
    assert failure is not None
    raise failure


def _filled(
    program: dict[str, Any], scratch: ScratchStores, contents: str, turning_bytes: int | None
) -> tuple[dict[str, Any], Any]:
    """(tensors of a program by name, a temporary store with the tables that operators gather rows from, or None)."""
    values = {value["name"]: value for value in program["values"]}
    gathered = {name: values[name]["shape"] for operator in program["operators"] for name in operator["gathers"]}
    store = scratch.opened(gathered) if gathered else None
    tensors = _make_tensors(program, place(program, turning_bytes), contents)
    return tensors | {name: name for name in gathered}, store


def measure_program(
    program: dict[str, Any],
    scratch: ScratchStores,
    contents: str = "normal",
    *,
    turning_bytes: int | None = None,
    seconds: float = PROGRAM_SECONDS,
    workspaces_of: Collection[int] = (),
    timed: Collection[int] | None = None,
) -> tuple[dict[int, float], dict[int, int]]:
    """(seconds of the operators `timed`, by default of all; workspace bytes of those with the numbers `workspaces_of`).
    They run in order, round after round, as in a step, for about `seconds` beyond the first rounds; what others make is
    there from a round of all, but for those that others stand for (`tightfit.profiles.measuring.sample`).
    """
    if not program["operators"]:
        return {}, {}
    tensors, store = _filled(program, scratch, contents, turning_bytes)
    calls = _calls(program, tensors, store)
    chosen = sample(program)
    run = [number for number in range(len(calls)) if chosen.stand_in(number) is None]
    numbers = run if timed is None else sorted(timed)
    if len(numbers) < len(run):
        for number in run:
            calls[number]()
    times = dict(zip(numbers, _timed([calls[index] for index in numbers], seconds), strict=True))
    workspaces = {}
    if workspaces_of:
        # One more round, in order: an operator's inputs may have made room for others by the end of the round before.
        for index in run:
            if index in workspaces_of:
                calls_made = WORKSPACE_CALLS // (2 if min(times.get(index, [0.0])) > SLOW_SECONDS else 1)
                with _crowded(program["operators"][index], tensors):
                    workspaces[index] = _workspace(calls[index], calls_made)
            else:
                calls[index]()
    # The first two rounds are left out: they fault pages in and build kernels.
    return {index: typical(call_seconds[2:]) for index, call_seconds in times.items()}, workspaces


def _calls(program: dict[str, Any], tensors: dict[str, Any], store: Any) -> list[Callable[[], None]]:
    from tightfit.runtime.engine.cpu.cpu import KERNELS
    from tightfit.runtime.engine.kernels.compiled import compile_operator

    values = {value["name"]: value for value in program["values"]}
    calls: list[Callable[[], None]] = []
    for operator in program["operators"]:
        outputs = [None if name is None else tensors[name] for name in operator["outputs"]]
        calls.append(partial(_run, compile_operator(operator, values, KERNELS), tensors, outputs, store))
    return calls


def _timed(calls: Sequence[Callable[[], None]], seconds: float) -> list[list[float]]:
    """The seconds of the calls, made in order round after round, for about so many seconds in all beyond the first
    rounds.
    """
    times: list[list[float]] = [[] for _ in calls]
    clock = QuotaClock(torch_threads())
    started = time.perf_counter()
    for turn in range(ROUNDS[1]):
        for call, call_seconds in zip(calls, times, strict=True):
            start = clock()
            call()
            call_seconds.append(clock() - start)
        spent = time.perf_counter() - started
        if (turn >= ROUNDS[0] and spent > seconds) or (
            turn == ROUNDS[0] - 1 and (spent > SLOW_PROGRAM_SECONDS or not seconds)
        ):
            break
    return times


def typical(call_seconds: Sequence[float]) -> float:
    """The mean of the seconds of calls that were not interrupted. A step is a sum of calls, so their mean tells its
    time; the median is below, since times are not symmetric. Negative ones, of which there are some under a quota
    (`QuotaClock`), are of no call.
    """
    counted = [seconds for seconds in call_seconds if seconds >= 0] or [0.0]
    longest = DISTURBED * statistics.median(counted)
    return statistics.fmean(seconds for seconds in counted if seconds <= longest)


def _run(operator: Any, tensors: Mapping[str, Any], outputs: Sequence[Any], store: Any) -> None:
    """Run an operator (`CompiledOperator`) on views of its outputs that are made for this call, as in a run."""
    operator.run(tensors, [None if out is None else out.as_strided(out.shape, out.stride()) for out in outputs], store)


def _make_tensors(program: dict[str, Any], placement: Placement, contents: str = "normal") -> dict[str, Any]:
    """The tensors of a program by name. Those that no operator makes are filled so that no operator meets denormals,
    NaN or an index out of range.
    """
    import torch

    from tightfit.runtime.engine.cpu.arena import Arena
    from tightfit.runtime.engine.training.job import POSITIONS_AT

    arena, generator = Arena(placement.bytes), torch.Generator().manual_seed(0)
    operators = program["operators"]
    gathered = any(operator["gathers"] for operator in operators)
    rows = GATHERED_ROWS if gathered else 2  # 0 and 1 are valid labels and indices everywhere
    places = [
        (operator["args"], POSITIONS_AT[operator["target"]])
        for operator in operators
        if operator["target"] in POSITIONS_AT
    ]
    positions = {args[index]["operand"]["value"] for args, index in places if args[index] is not None}

    def fill(tensor: Any) -> None:
        if tensor.dtype.is_complex:
            tensor = torch.view_as_real(tensor)
        if tensor.dtype.is_floating_point and contents == "normal":
            tensor.normal_(0.0, 0.05, generator=generator)
        elif tensor.dtype.is_floating_point:
            tensor.uniform_(0.05, 0.95, generator=generator)
        elif tensor.dtype is torch.bool:
            tensor.fill_(True)
        else:
            tensor.random_(0, rows, generator=generator)

    for pool in placement.pools:
        fill(arena.window(pool.dtype)(pool.offset, pool.bytes // getattr(torch, pool.dtype).itemsize))
    tensors = {}
    for value in program["values"]:
        name = value["name"]
        if name not in placement.offsets:
            continue
        elements = value["bytes"] // getattr(torch, value["dtype"]).itemsize
        tensor = arena.window(value["dtype"])(placement.offsets[name], elements)
        tensors[name] = tensor.as_strided(value["shape"], value["stride"])
        if name in positions:
            tensors[name].copy_(torch.arange(value["shape"][-1]))  # rows of one sample each, which take longest
        elif name in placement.kept:
            fill(tensor)
    return tensors


@contextlib.contextmanager
def _crowded(operator: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[None]:
    """Within this context all rows go through the first of the experts that an operator has, if it has any: with as
    many rows as there are it needs the most memory.
    """
    if operator["target"] not in EXPERTS_AT:
        yield
        return
    at, _, first = EXPERTS_AT[operator["target"]]
    operand = operator["args"][at]["operand"]
    held = tensors[operand["value"]]
    index = held.as_strided(operand["size"], operand["stride"], held.storage_offset() + operand.get("offset", 0))
    before = index.clone()
    index.fill_(-1)
    index[:, 0].fill_(operator["args"][first])
    try:
        yield
    finally:
        index.copy_(before)


def _workspace(call: Callable[[], None], calls: int) -> int:
    """Heap bytes that a call takes beyond its inputs and outputs: the rise of VmHWM above the resident set of a trimmed
    heap.

    Of so many calls the lowest counts: in some, a buffer does not fit into the heap hole of the call before,
    which adds as much as 40 %. The floor accounts for such holes
    (`tightfit.runtime.engine.start.floor.HEAP_SLACK_BYTES`, `HOLES_PER_WORKSPACE`).
    """
    rises = []
    for _ in range(calls):
        trim_heap()
        HIGH_WATER.reset()
        before = memory().resident
        call()
        rises.append(memory().peak - before)
    return max(0, min(rises))


def measure_unpack(kind: str, group: int, rows: int, columns: int, dtype: str, turning_bytes: int) -> float:
    """Seconds to unpack a weight [rows, columns], from and into buffers that are not in the cache, as in a step. Those
    have `turning_bytes`; of a weight that is larger so many rows are unpacked as they have room for.
    """
    import torch

    from tightfit.runtime.engine.weights.store import Entry, unpack

    buffers = unpack_buffers(turning_bytes, kind, group, rows, columns, dtype)
    entry = Entry(name="weight", shape=(buffers.rows, columns), format=kind, group=group)
    packed = torch.empty(buffers.copies, entry.bytes, dtype=torch.uint8).random_(0, 64)
    outs = torch.zeros(buffers.copies, buffers.rows, columns, dtype=getattr(torch, dtype))

    def unpack_next(turn: int) -> None:
        unpack(entry, packed[turn % buffers.copies], outs[turn % buffers.copies])

    return _seconds_of(unpack_next, other_work()) * rows / buffers.rows


def measure_update(elements: int, accumulate: int, turning_bytes: int) -> float:
    """Seconds per step for a trainable of `elements`: those of one optimizer update, averaged over its `accumulate`
    steps. Its tensors are in no cache, as in a step.
    """
    import torch

    from tightfit.runtime.engine.kernels.optimizer import AdamW, GradientUpdate

    update = GradientUpdate(AdamW(), accumulate)
    measured, copies, element_bytes = update_buffers(turning_bytes, elements, accumulate)
    sets, between = torch.full((copies, element_bytes // 4, measured), 1e-3), other_work()

    def seconds_at(step: int) -> float:
        update.begin(step)
        return _seconds_of(lambda turn: update.apply(step, *sets[turn % copies].unbind()), between)

    seconds = (seconds_at(accumulate) + ((accumulate - 1) * seconds_at(1) if accumulate > 1 else 0.0)) / accumulate
    return seconds * elements / measured


def measure_clipped(elements: int, accumulate: int, turning_bytes: int) -> tuple[float, float]:
    """Seconds, for a trainable of `elements` whose gradients are clipped, to add one to their sum, averaged over the
    `accumulate` steps of an update, and of the update from the sum.

    The updates of all trainables follow one another, so that none finds its tensors in a cache; sums are not there
    either, but the gradient that is added has just been made.
    """
    import torch

    from tightfit.runtime.engine.kernels.optimizer import AdamW, ClippedUpdate

    update = ClippedUpdate(AdamW(), 1e-6, accumulate)
    measured, copies, element_bytes = clipped_buffers(turning_bytes, elements)
    gradient, sets = torch.full((measured,), 1e-3), torch.full((copies, element_bytes // 4, measured), 1e-3)
    between = other_work()

    def adding(step: int) -> float:
        update.begin(step)
        return _seconds_of(lambda turn: update.add(gradient, sets[turn % copies, 3]), between)

    steps = {step: adding(step) for step in dict.fromkeys((1, min(2, accumulate), accumulate))}
    middle = steps[min(2, accumulate)]
    whole = steps[1] + (accumulate - 2) * middle + steps[accumulate] if accumulate > 1 else steps[1]
    update.norm()
    update_seconds = _seconds_of(lambda turn: update.apply_sum(accumulate, *sets[turn % copies].unbind()))
    return whole / accumulate * elements / measured, update_seconds * elements / measured


def measure_adafactor(shape: Sequence[int], turning_bytes: int) -> float:
    """Seconds of one update by Adafactor of a trainable of this shape."""
    import torch

    from tightfit.runtime.engine.kernels.optimizer import FACTORED, Adafactor, GradientUpdate, state_shape

    update = GradientUpdate(Adafactor())
    update.begin(1)
    measured = adafactor_buffers(turning_bytes, shape).rows
    part = (measured, *shape[1:]) if shape else ()
    parameter, gradient = (torch.full(part, 1e-3) for _ in range(2))
    state = torch.full(state_shape(FACTORED, part), 1e-6)
    seconds = _seconds_of(lambda turn: update.apply(1, parameter, gradient, state), other_work())
    return seconds * (shape[0] if shape else 1) / measured


def measure_perturb(elements: int, turning_bytes: int) -> float:
    import torch

    from tightfit.runtime.engine.kernels.optimizer import MeZO, Perturbation

    perturbation = Perturbation(MeZO(), 0)
    measured = update_buffers(turning_bytes, elements).rows
    parameter = torch.full((measured,), 1e-3)
    seconds = _seconds_of(lambda turn: perturbation.shift("p", parameter, 1), other_work())
    return seconds * elements / measured


def other_work() -> Callable[[], None]:
    """A call that computes something, as a step does between the calls that are timed: meanwhile caches fill with other
    data and code, and threads without work may fall asleep.
    """
    import torch

    left, right, total = torch.ones(3, BETWEEN_BYTES // 4)

    def add() -> None:
        torch.add(left, right, out=total)

    return add


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _seconds_of(call: Callable[[int], None], between: Callable[[], None] | None = None) -> float:
    """Seconds that `call` takes, which is given the number of the call, measured for about `FIGURE_SECONDS`. `between`
    is called before each call and not timed.
    """
    clock = QuotaClock(torch_threads())
    times: list[float] = []
    started = time.perf_counter()
    number = 0
    while number < 5 or (number < MOST_CALLS and time.perf_counter() - started < FIGURE_SECONDS):
        if between:
            between()
        start = clock()
        call(number)
        times.append(clock() - start)
        number += 1
    return typical(times[1:])


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
