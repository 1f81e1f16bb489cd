"""The process that measures operators, unpacking, updates and channels for a profile.

Called as ``python -m tightfit.profiles.measuring.worker THREADS``: a request in as JSON, messages and the result out as
JSON lines. It runs in the environment of a run and calls operators through the runtime's own `compile_operator`. One
program's tensors are in memory at a time; weights of equal shape share a few buffers, since only their size matters.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.measuring.cpu_load import OtherPrograms
from tightfit.profiles.measuring.cpu_quota import QuotaClock
from tightfit.profiles.measuring.kernels import kernel_bytes
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.common.parent import end_with_parent
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start.floor import HOLES_PER_WORKSPACE
from tightfit.runtime.engine.start.process import child_environment, trim_heap
from tightfit.runtime.supervision.supervisor import command as supervisor_command
from tightfit.runtime.supervision.training_process import command

if TYPE_CHECKING:
    from tightfit.profiles.measuring.guard import OutputGuard

ROUNDS = (4, 40)
WEIGHT_BUFFERS = 4  # buffers that all weights of one shape share
UNPACKED_BYTES = 192 << 20  # total size of the outputs that unpacking is timed on in turn: larger than most caches
UPDATED_BYTES = 64 << 20  # the same of parameters and states that are updated in turn
CLIPPED_SECONDS = 0.1  # spent on each of the figures of clipping
BETWEEN_BYTES = 4 << 20  # of each of three tensors that are added between calls: more than a core caches by itself
ADAFACTOR_SECONDS = 0.1  # spent on an update by Adafactor of each shape
MOST_CALLS = 200  # calls timed for one figure, at most
PASSES = 3  # over all programs; of seconds the middle figure counts: disturbances by other work come in bursts, and the lowest
# figure is that of a moment in which the machine was faster than it is on the whole
WORKSPACE_CALLS = 4  # calls per operator and pass of which the lowest workspace counts
PROGRAM_SECONDS = 0.7  # time spent on a program in a pass, beyond the first rounds
SLOW_SECONDS = 0.05  # of a call that is long enough for fewer calls to be as steady
SLOW_PROGRAM_SECONDS = 1.5  # the same of the first rounds of a program
DISTURBED = 1.5  # times the median: what took longer was interrupted
GATHERED_ROWS = 8192
CONTENTS = ("normal", "probabilities")
"""Contents of floating-point tensors while operators are measured, tried in this order. Some operators, such as binary
cross entropy, need values between 0 and 1: "probabilities"."""


class ScratchStores:
    """A folder for stores with tables of `GATHERED_ROWS` rows, so that gathering rows is timed including its reads."""

    def __init__(self, folder: Path, tables: Iterable[Sequence[Any]] = ()) -> None:
        """`tables` are (shape, format, group) of the model's matrices; a table of no such shape is in q4."""
        self.folder = folder
        self._formats = {tuple(shape): (kind, group) for shape, kind, group in tables}

    def store(self, shapes: Mapping[str, Sequence[int]]) -> Path:
        """Path of a new store with a table for each name, in the format of the model's matrix of that shape."""
        import torch

        from tightfit.profiles.weights.describe import packed_entry
        from tightfit.profiles.weights.pack import StoreWriter
        from tightfit.runtime.engine.weights.store import Entry

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"measure-{os.getpid()}.store"
        entries = []
        for name, shape in shapes.items():
            form, group = self._formats.get(tuple(shape), ("q4", 0))
            rows = (GATHERED_ROWS, shape[1])
            entry = Entry(name=name, shape=rows, format=form, group=group) if group else packed_entry(name, rows, form)
            entries.append(entry)
        with StoreWriter(path, entries, name="measure", config={}, source={}) as writer:
            for entry in entries:
                writer.write(entry.name, [torch.zeros(entry.rows, entry.row_bytes, dtype=torch.uint8)])
        return path


def send(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    end_with_parent(signal.SIGKILL)
    if arguments:  # started by `measure`: restart this process in the environment of a run
        worker_command = interpreter.command("tightfit.profiles.measuring.worker")
        os.execve(worker_command[0], worker_command, child_environment(int(arguments[0])))  # noqa: S606  no shell is wanted
    request = json.load(sys.stdin)
    import torch

    torch.set_num_threads(request["threads"])
    with torch.no_grad():
        try:
            send(result=measure(request))
            return 0
        except TightfitError as error:
            failure = error
        except (MemoryError, RuntimeError) as error:
            if "alloc" not in str(error) and not isinstance(error, MemoryError):  # torch has no MemoryError
                raise
            failure = RunError(
                f"measuring ran out of memory ({str(error).splitlines()[0]}); a layer must fit into memory while it is measured,"
                " try a smaller batch or sequence"
            )
        except OSError as error:
            if error.filename is None:
                raise
            failure = RunError(
                f"{error.filename}: {error.strerror}; set TIGHTFIT_CACHE to a writable directory with free space"
            )
    sys.stderr.write(f"{failure}\n")
    return failure.exit_code


def measure(request: dict[str, Any]) -> dict[str, Any]:
    from tightfit.profiles.measuring.bandwidth import measure_channels
    from tightfit.profiles.measuring.guard import OutputGuard
    from tightfit.runtime.engine.cpu.operators import OPERATORS

    load = OtherPrograms()
    programs = request["programs"]
    total = (PASSES + 1) * len(programs) + len(request["weights"]) + 2 * len(request["updates"])
    total += len(request["shapes"]) + 3
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        send(stage="measure", done=done, total=total)

    guard, contents = OutputGuard(), {}
    scratch = ScratchStores(Path(request["scratch"]), request["tables"])
    for program in programs:
        contents[program["name"]] = settle_operators(program, guard, scratch)
        gc.collect()
        trim_heap()
        step()
    if request.get("step"):
        take_steps(request["step"], programs)
        send(stage="computed")
    copied = {program["name"]: [op["copied"] for op in program["operators"]] for program in programs}
    forwards = [
        {**program, "operators": [program["operators"][position] for position in positions]}
        for program, positions in zip(programs, request["inference"], strict=True)
    ]
    result: dict[str, Any] = {"copied": copied, "floor": floor(request["threads"])}
    kernels = kernel_bytes(programs, request["threads"])
    result["floor"]["resident_bytes"] += kernels
    if len(programs) > request["whole"]:
        kernels_of_whole = kernel_bytes(programs[: request["whole"]], request["threads"])
        result["floor"]["shorter_bytes"] = max(0, kernels - kernels_of_whole)
    step()
    result["floor"]["inference_resident_bytes"] += kernel_bytes(forwards, request["threads"], backward=False)
    step()
    passes: dict[str, list[list[list[float]]]] = {}
    for program in programs * PASSES:
        passes.setdefault(program["name"], []).append(measure_program(program, scratch, contents[program["name"]]))
        gc.collect()
        trim_heap()
        step()
    result["operators"] = {
        name: [
            [statistics.median(seconds for seconds, _ in figures), min(workspace for _, workspace in figures)]
            for figures in zip(*repeated, strict=True)
        ]
        for name, repeated in passes.items()
    }
    least_workspace: dict[str, float] = {}
    for program in programs:
        for operator, (_, workspace) in zip(program["operators"], result["operators"][program["name"]], strict=True):
            key = _likeness(program, operator)
            least_workspace[key] = min(workspace, least_workspace.get(key, workspace))
    for program in programs:
        for operator, figures in zip(program["operators"], result["operators"][program["name"]], strict=True):
            figures[1] = least_workspace[_likeness(program, operator)]
    workspaces = [
        [
            0.0 if operator["target"] in OPERATORS else workspace
            for operator, (_, workspace) in zip(program["operators"], result["operators"][program["name"]], strict=True)
        ]
        for program in programs
    ]
    forward = [
        [row[index] for index in positions] for row, positions in zip(workspaces, request["inference"], strict=True)
    ]
    for figure, rows in (("resident_bytes", workspaces), ("inference_resident_bytes", forward)):
        result["floor"][figure] += round(HOLES_PER_WORKSPACE * max(itertools.chain(*rows), default=0))
    result["unpack"] = []
    for key in request["weights"]:
        result["unpack"].append(measure_unpack(*key))
        step()
    result |= {"update": [], "accumulate": [], "clipped": [], "perturb": []}
    for elements in request["updates"]:
        result["update"].append(measure_update(elements, request["accumulate"]))
        add_seconds, update_seconds = measure_clipped(elements, request["accumulate"])
        result["accumulate"].append(add_seconds)
        result["clipped"].append(update_seconds)
        step()
        result["perturb"].append(measure_perturb(elements))
        step()
    result["adafactor"] = []
    for shape in request["shapes"]:
        result["adafactor"].append(measure_adafactor(shape))
        step()
    result |= measure_channels(scratch.folder, request["compute_dtype"])
    step()
    return result | {"busy_cores": load.taken(request["threads"])}


def take_steps(step: dict[str, Any], programs: list[dict[str, Any]]) -> None:
    """Run whole steps, each on the tensors in the file `given` with its number and, where that lacks some, on those in `given0`; write
    its loss, gradients and statistics to the file `traced` with its number.
    """
    import torch

    from tightfit.profiles.measuring.whole_step import run_step

    folder, by_name = Path(step["folder"]), {program["name"]: program for program in programs}
    first = torch.load(folder / "given0", weights_only=True)
    for number in range(step["steps"]):
        tensors = first | torch.load(folder / f"given{number}", weights_only=True)
        results = run_step(step["layers"], by_name, tensors, step["wanted"], seed=number)
        torch.save(results, folder / f"traced{number}")
        tensors.clear()
        results.clear()
    first.clear()
    gc.collect()
    trim_heap()


def floor(threads: int) -> dict[str, Any]:
    """`Floor` fields in bytes, reported by an idle training process and an idle supervisor started for this.

    Raises RunError.
    """
    # Pages of freshly installed libraries cannot be released until they are written to disk, and would add up to 16 MiB
    # that no later run holds.
    os.sync()
    training = subprocess.run(
        command("--floor"), capture_output=True, text=True, env=child_environment(threads), check=False
    )
    if training.returncode == RunError.exit_code:
        raise RunError(training.stderr.strip())
    lines = training.stdout.splitlines()
    if not lines:
        raise SystemExit(f"the runtime process does not start: {training.stderr.strip() or training.returncode}")
    measured: dict[str, Any] = {}
    for line in lines:  # the second one, `exchange_bytes`, is missing where a process cannot meet another
        measured |= json.loads(line)
    environment = os.environ | {"PYTHONPATH": interpreter.python_path()}
    supervisor = subprocess.run(
        supervisor_command("--measure"), capture_output=True, text=True, env=environment, check=False
    )
    if supervisor.returncode:
        raise SystemExit(f"the supervisor of runs does not start: {supervisor.stderr.strip() or supervisor.returncode}")
    return measured | {"supervisor_bytes": int(supervisor.stdout)}


def _likeness(program: dict[str, Any], operator: dict[str, Any]) -> str:
    """A key that is equal for operators with the same target and shapes, whose workspace is therefore the same."""
    values = {value["name"]: value for value in program["values"]}
    names = [*operator["inputs"], None, *operator["outputs"]]
    shapes = [None if name is None else (values[name]["dtype"], values[name]["shape"]) for name in names]
    return json.dumps([operator["target"], shapes])


def settle_operators(program: dict[str, Any], guard: OutputGuard, scratch: ScratchStores) -> str:
    """Set `copied` on the operators of a program, for those that have to be run by their functional form.

    Returns the first of `CONTENTS` with which all operators run. Raises InputError if they run with none of them.
    """
    from tightfit.profiles.measuring.guard import check_program

    failure: InputError | None = None
    for contents in CONTENTS:
        with _filled(program, scratch, contents) as (tensors, store):
            try:
                copied_flags = check_program(program, tensors, guard, store)
            except InputError as error:
                failure = failure or error
                continue
        for operator, copied in zip(program["operators"], copied_flags, strict=True):
            operator["copied"] = copied
        return contents
    assert failure is not None
    raise failure


@contextlib.contextmanager
def _filled(program: dict[str, Any], scratch: ScratchStores, contents: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yields (tensors of a program by name, a temporary store with the tables that operators gather rows from, or
    None).
    """
    from tightfit.runtime.engine.weights.store import WeightStore

    values = {value["name"]: value for value in program["values"]}
    gathered = {name for operator in program["operators"] for name in operator["gathers"]}
    tensors = _make_tensors(values, program["operators"], contents)
    if not gathered:
        yield tensors, None
        return
    path = scratch.store({name: values[name]["shape"] for name in gathered})
    store = WeightStore.open(path)
    path.unlink()
    try:
        yield tensors | {name: name for name in gathered}, store
    finally:
        store.close()


def measure_program(program: dict[str, Any], scratch: ScratchStores, contents: str = "normal") -> list[list[float]]:
    """[seconds, workspace bytes] per operator. All operators run in order, round after round, as in a step."""
    if not program["operators"]:
        return []
    with _filled(program, scratch, contents) as (tensors, store):
        return _measure_program(program, tensors, store)


def _measure_program(program: dict[str, Any], tensors: dict[str, Any], store: Any) -> list[list[float]]:
    from tightfit.runtime.engine.cpu.cpu import KERNELS
    from tightfit.runtime.engine.kernels.compiled import compile_operator

    values = {value["name"]: value for value in program["values"]}
    calls: list[Callable[[], None]] = []
    for operator in program["operators"]:
        outputs = [None if name is None else tensors[name] for name in operator["outputs"]]
        calls.append(partial(_run, compile_operator(operator, values, KERNELS), tensors, outputs, store))
    times: list[list[float]] = [[] for _ in calls]
    clock = QuotaClock(torch_threads())
    started = time.perf_counter()
    for turn in range(ROUNDS[1]):
        for call, seconds in zip(calls, times, strict=True):
            start = clock()
            call()
            seconds.append(clock() - start)
        spent = time.perf_counter() - started
        if (turn >= ROUNDS[0] and spent > PROGRAM_SECONDS) or (turn == ROUNDS[0] - 1 and spent > SLOW_PROGRAM_SECONDS):
            break
    workspaces = [
        _workspace(call, WORKSPACE_CALLS // (2 if min(seconds) > SLOW_SECONDS else 1))
        for call, seconds in zip(calls, times, strict=True)
    ]
    # The first two rounds are left out: they fault pages in and build kernels.
    return [[typical(seconds[2:]), workspace] for seconds, workspace in zip(times, workspaces, strict=True)]


def typical(call_seconds: Sequence[float]) -> float:
    """The mean of the seconds of calls that were not interrupted. A step is a sum of calls, so their mean tells its time; the
    median is below, since times are not symmetric.
    """
    longest = DISTURBED * statistics.median(call_seconds)
    return statistics.fmean(seconds for seconds in call_seconds if seconds <= longest)


def _run(operator: Any, tensors: Mapping[str, Any], outputs: Sequence[Any], store: Any) -> None:
    """Run an operator (`CompiledOperator`) on views of its outputs that are made for this call, as in a run."""
    operator.run(tensors, [None if out is None else out.as_strided(out.shape, out.stride()) for out in outputs], store)


def _make_tensors(
    values: dict[str, dict[str, Any]], operators: list[dict[str, Any]], contents: str = "normal"
) -> dict[str, Any]:
    """The tensors of a program by name, filled so that no operator meets denormals, NaN or an index out of range."""
    import torch

    from tightfit.runtime.engine.cpu.arena import Arena
    from tightfit.runtime.engine.device.device import aligned
    from tightfit.runtime.engine.training.job import POSITIONS_AT

    arena, end = Arena(sum(aligned(value["bytes"]) for value in values.values())), 0
    generator = torch.Generator().manual_seed(0)
    gathered = {name for operator in operators for name in operator["gathers"]}
    rows = GATHERED_ROWS if gathered else 2  # 0 and 1 are valid labels and indices everywhere
    read = {name for operator in operators for name in operator["inputs"]}
    places = [
        (operator["args"], POSITIONS_AT[operator["target"]])
        for operator in operators
        if operator["target"] in POSITIONS_AT
    ]
    positions = {args[index]["operand"]["value"] for args, index in places if args[index] is not None}
    unread_outputs = {
        name: index
        for operator in operators
        for index, name in enumerate(operator["outputs"])
        if name is not None and name not in read
    }
    shared_buffers: dict[tuple[Any, ...], list[Any]] = {}
    occurrences: Counter[tuple[Any, ...]] = Counter()
    tensors = {}
    for name, value in values.items():
        if name in gathered:
            continue
        dtype, shape, stride = getattr(torch, value["dtype"]), value["shape"], value["stride"]
        # Weights of one shape take turns on a few buffers, each of which has left the cache when its turn comes.
        # Scratch outputs that no operator reads reuse one buffer, as in a step.
        buffers = WEIGHT_BUFFERS if value["kind"] == "weight" else 1
        shares = value["kind"] == "weight" or name in unread_outputs
        key = (*shape, value["dtype"], unread_outputs.get(name))
        occurrences[key] += shares
        if shares and occurrences[key] > buffers:
            tensors[name] = shared_buffers[key][occurrences[key] % buffers]
            continue
        tensor = arena.window(value["dtype"])(end, value["bytes"] // dtype.itemsize).as_strided(shape, stride)
        end += aligned(value["bytes"])
        if dtype.is_floating_point and contents == "normal":
            tensor.normal_(0.0, 0.05, generator=generator)
        elif dtype.is_floating_point:
            tensor.uniform_(0.05, 0.95, generator=generator)
        elif dtype is torch.bool:
            tensor.fill_(True)
        elif name in positions:
            tensor.copy_(torch.arange(shape[-1]))  # rows of one sample each, which take longest
        else:
            tensor.random_(0, rows, generator=generator)
        if shares:
            shared_buffers.setdefault(key, []).append(tensor)
        tensors[name] = tensor
    return tensors


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
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
        before = memory().resident
        call()
        rises.append(memory().peak - before)
    return max(0, min(rises))


def measure_unpack(kind: str, group: int, rows: int, columns: int, dtype: str) -> float:
    """Seconds to unpack a weight [rows, columns], from and into buffers that are not in the cache, as in a step."""
    import torch

    from tightfit.runtime.engine.weights.store import Entry, unpack

    entry = Entry(name="weight", shape=(rows, columns), format=kind, group=group)
    element = getattr(torch, dtype)
    copies = max(1, min(MOST_CALLS, UNPACKED_BYTES // (rows * columns * element.itemsize)))
    packed = torch.randint(0, 64, (entry.bytes,), dtype=torch.uint8).repeat(copies, 1)
    outs = torch.zeros(copies, rows, columns, dtype=element)
    return _seconds_of(lambda turn: unpack(entry, packed[turn % copies], outs[turn % copies]), between=other_work())


def measure_update(elements: int, accumulate: int) -> float:
    """Seconds per step for a trainable of `elements`: those of one optimizer update, averaged over its `accumulate`
    steps. Its tensors are in no cache, as in a step.
    """
    import torch

    from tightfit.runtime.engine.kernels.optimizer import AdamW, GradientUpdate

    update, count = GradientUpdate(AdamW(), accumulate), 4 + (accumulate > 1)
    copies = max(1, min(MOST_CALLS, UPDATED_BYTES // (4 * count * elements)))
    sets, between = torch.full((copies, count, elements), 1e-3), other_work()

    def seconds_at(step: int) -> float:
        update.begin(step)
        return _seconds_of(lambda turn: update.apply(step, *sets[turn % copies].unbind()), between=between)

    return (seconds_at(accumulate) + ((accumulate - 1) * seconds_at(1) if accumulate > 1 else 0.0)) / accumulate


def measure_clipped(elements: int, accumulate: int) -> tuple[float, float]:
    """Seconds, for a trainable of `elements` whose gradients are clipped, to add one to their sum, averaged over the
    `accumulate` steps of an update, and of the update from the sum.

    The updates of all trainables follow one another, so that none finds its tensors in a cache; sums are not there either, but
    the gradient that is added has just been made.
    """
    import torch

    from tightfit.runtime.engine.kernels.optimizer import AdamW, ClippedUpdate

    update = ClippedUpdate(AdamW(), 1e-6, accumulate)
    copies = max(1, min(MOST_CALLS, UPDATED_BYTES // (4 * 4 * elements)))
    gradient, sets = torch.full((elements,), 1e-3), torch.full((copies, 4, elements), 1e-3)

    def adding(step: int) -> float:
        update.begin(step)
        return _seconds_of(lambda turn: update.add(gradient, sets[turn % copies, 3]), CLIPPED_SECONDS, other_work())

    steps = {step: adding(step) for step in dict.fromkeys((1, min(2, accumulate), accumulate))}
    middle = steps[min(2, accumulate)]
    whole = steps[1] + (accumulate - 2) * middle + steps[accumulate] if accumulate > 1 else steps[1]
    update.norm()
    return whole / accumulate, _seconds_of(
        lambda turn: update.apply_sum(accumulate, *sets[turn % copies].unbind()), CLIPPED_SECONDS
    )


def measure_adafactor(shape: Sequence[int]) -> float:
    """Seconds of one update by Adafactor of a trainable of this shape."""
    import torch

    from tightfit.runtime.engine.kernels.optimizer import FACTORED, Adafactor, GradientUpdate, state_shape

    update = GradientUpdate(Adafactor())
    update.begin(1)
    parameter, gradient = (torch.full(tuple(shape), 1e-3) for _ in range(2))
    state = torch.full(state_shape(FACTORED, shape), 1e-6)
    return _seconds_of(lambda turn: update.apply(1, parameter, gradient, state), ADAFACTOR_SECONDS, other_work())


def measure_perturb(elements: int) -> float:
    import torch

    from tightfit.runtime.engine.kernels.optimizer import MeZO, Perturbation

    perturbation = Perturbation(MeZO(), 0)
    parameter = torch.full((elements,), 1e-3)
    return _seconds_of(lambda turn: perturbation.shift("p", parameter, 1), between=other_work())


def other_work() -> Callable[[], None]:
    """A call that computes something, as a step does between the calls that are timed: meanwhile caches fill with other data and
    code, and threads without work may fall asleep.
    """
    import torch

    left, right, total = torch.ones(3, BETWEEN_BYTES // 4)

    def add() -> None:
        torch.add(left, right, out=total)

    return add


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _seconds_of(call: Callable[[int], None], seconds: float = 0.2, between: Callable[[], None] | None = None) -> float:
    """Seconds that `call` takes, which is given the number of the call, measured for about `seconds`. `between` is called before
    each call and not timed.
    """
    clock = QuotaClock(torch_threads())
    times: list[float] = []
    started = time.perf_counter()
    number = 0
    while number < 5 or (number < MOST_CALLS and time.perf_counter() - started < seconds):
        if between:
            between()
        start = clock()
        call(number)
        times.append(clock() - start)
        number += 1
    return typical(times[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
