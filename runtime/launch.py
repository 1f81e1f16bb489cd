"""The parent of a run: checks the plan against model, data and machine, starts the lean child under the cap, and reports.

The parent may import what it likes; only the child is capped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from planner.schema import Plan
from profiles.errors import CapError, InfeasibleError, InputError, RunError, TightfitError
from profiles.store import Store
from profiles.units import format_size
from runtime import job as jobs
from runtime.batches import write_batches
from runtime.cgroup import MemoryCgroup
from runtime.checkpoint import find_checkpoints, partial_directories
from runtime.optimizer import SCHEDULES, AdamW
from runtime.process import child_environment, command
from runtime.report import Observed, build_report

Progress = Callable[[int, float, float, int, int], None]
"""progress(step, loss, seconds, resident bytes, peak bytes) after every step, counted from 1."""
Stages = Callable[[str, int, int], None]
"""stages(what, done, total) while something is prepared."""
Data = str | os.PathLike[str] | Iterable[Sequence[torch.Tensor]]
OWN = ("metrics.jsonl", "report.json", "adapter", "model", "data", "job")
ERRORS: dict[str, type[TightfitError]] = {"InputError": InputError, "RunError": RunError, "CapError": CapError}


def run(
    plan: Plan,
    data: Data,
    *,
    steps: int,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    lr: float = 2e-4,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup_steps: int = 0,
    seed: int = 0,
    checkpoint_every: int = 50,
    keep_checkpoints: int = 2,
    eval_data: Data | None = None,
    truncate: bool = False,
    cgroup: bool = True,
    progress: Progress | None = None,
    stages: Stages | None = None,
) -> dict[str, Any]:
    """Train `steps` steps as planned, under the plan's budget, and return the report (also written to ``out/report.json``).

    `data` is a JSON-lines file, a directory of them, ``random``, or, for a module, an iterable of batches (tuples of
    tensors). With `eval_data`, the model is evaluated before and after. `cgroup=False` leaves enforcement to the meter.

    Raises InputError for a plan that does not fit model, data or machine, InfeasibleError for a plan without a schedule,
    CapError where the measured memory passes the budget, RunError where the disk fills up, the child dies or the run is
    interrupted; the message then says where the last checkpoint lies.
    """
    directory = Path(out).absolute()
    _check_options(steps, schedule, lr)
    _check_machine(plan)
    _check_schedule(plan)
    store = _find_store(plan, stages)
    _open_directory(directory, resume=resume, overwrite=overwrite)
    train = _prepare(plan, data, directory, "train", truncate=truncate, seed=seed, stages=stages)
    evaluation = None if eval_data is None else _prepare(plan, eval_data, directory, "evaluate", truncate=truncate, seed=seed, stages=stages)
    if evaluation and plan.evaluate is None:
        raise InputError("the plan has no evaluation phase; plan again, or leave out the evaluation data")
    optimizer = AdamW(
        lr=lr, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps, total_steps=0 if schedule == "constant" else steps
    )
    settings = {
        "store": str(store) if store else None,
        "data": train,
        "evaluation": evaluation,
        "out": str(directory),
        "steps": steps,
        "seed": seed,
        "resume": resume,
        "checkpoint_every": checkpoint_every,
        "keep_checkpoints": keep_checkpoints,
        "optimizer": asdict(optimizer),
        "base_model": plan.model.source,
        "expected_seconds": plan.step_seconds,
        "conditions": _conditions(plan, asdict(optimizer), seed),
    }
    compiled = jobs.compile_job(plan.model_dump(), settings)
    path = directory / "job"
    try:
        with _disk(directory):
            compiled.write(str(path))
        group = MemoryCgroup.create(plan.budget_bytes) if cgroup else None
        try:
            observed = _watch(plan, path, group, progress, stages, steps)
        finally:
            if group:
                group.remove()
    finally:
        path.unlink(missing_ok=True)
    report = build_report(plan, observed, directory, enforced_by="cgroup" if group else "meter")
    with _disk(directory):
        (directory / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


@contextmanager
def _disk(directory: Path) -> Iterator[None]:
    """What the disk refuses is a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"writing to {directory} failed: {error.strerror}; free disk space and continue with --resume") from error


def _watch(
    plan: Plan, path: Path, group: MemoryCgroup | None, progress: Progress | None, stages: Stages | None, steps: int
) -> Observed:
    """Run the child and follow its messages. Raises what its end means."""
    read, write = os.pipe()
    arguments = command(str(path), "--messages", str(write))
    observed = Observed()
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(
            group.enter(arguments) if group else arguments,
            pass_fds=(write,),
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env=child_environment(plan.device.threads),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on
        )
        os.close(write)
        try:
            _follow(child, read, observed, progress, stages, steps)
        except BaseException:
            child.kill()
            raise
        finally:
            os.close(read)
            code = child.wait()
        words.seek(0)
        last = words.read().decode(errors="replace").strip().splitlines()
    if group:
        observed.cgroup_peak_bytes = group.peak_bytes()
    _raise_for(code, observed, plan, group, last)
    return observed


def _follow(
    child: subprocess.Popen[bytes], read: int, observed: Observed, progress: Progress | None, stages: Stages | None, steps: int
) -> None:
    buffer = b""
    interrupted = 0
    while True:
        try:
            data = os.read(read, 1 << 16)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                observed.take(message)
                if message["event"] == "step" and progress:
                    progress(message["step"], message["loss"], message["seconds"], message["resident_bytes"], message["peak_bytes"])
                elif message["event"] == "evaluating" and stages:
                    stages(f"evaluating {message['when']}", message["done"], message["total"])
        except KeyboardInterrupt:
            interrupted += 1
            if interrupted > 2:
                raise
            child.send_signal(signal.SIGINT if interrupted == 1 else signal.SIGKILL)


def _raise_for(code: int, observed: Observed, plan: Plan, group: MemoryCgroup | None, last: list[str]) -> None:
    if observed.error:
        raise ERRORS.get(observed.error["kind"], RunError)(observed.error["message"])
    if observed.interrupted:
        raise RunError(
            f"interrupted after step {observed.interrupted['step']}; everything is saved in {observed.interrupted['checkpoint']}, continue with --resume"
        )
    if code == 0:
        return
    saved = f"the last checkpoint is {observed.checkpoint}, continue with --resume" if observed.checkpoint else "no checkpoint was saved yet"
    if code == -signal.SIGKILL and group and group.oom_kills():
        peak = max((observed.peak_bytes, observed.cgroup_peak_bytes or 0))
        raise CapError(
            f"the kernel ended the run at its cap of {format_size(plan.budget_bytes)}: the process had reached {format_size(peak)}, "
            f"predicted were {format_size(plan.peak_bytes)}; profile again on this machine and plan anew; {saved}"
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    words = f": {last[-1]}" if last else ""
    raise RunError(f"the training process {how}{words}; {saved}")


def _check_options(steps: int, schedule: str, lr: float) -> None:
    if steps < 1:
        raise InputError(f"steps {steps}: give at least 1")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {schedule!r} is not known; choose one of {', '.join(SCHEDULES)}")
    if not 0 <= lr < float("inf"):
        raise InputError(f"lr {lr}: give a finite number of at least 0")


def _check_machine(plan: Plan) -> None:
    """Refuse a plan for another device, thread count or torch."""
    device = plan.device
    if device.kind != "cpu":
        raise InputError(f"the plan is for a {device.kind} device ({device.name}); this runtime executes plans for cpu, profile this machine")
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.threads > present:
        raise InputError(f"the plan uses {device.threads} threads and this process may use {present}; profile and plan on this machine")
    if device.torch_version and device.torch_version != torch.__version__:
        raise InputError(f"the plan was made with torch {device.torch_version} and torch {torch.__version__} is installed; profile and plan again")


def _check_schedule(plan: Plan) -> None:
    """Refuse a plan without a schedule, or with one that breaks an invariant."""
    if plan.status == "infeasible" or plan.train is None:
        raise InfeasibleError(
            f"the plan is infeasible at {format_size(plan.budget_bytes)}"
            + (f"; the smallest budget is {format_size(plan.minimum_budget_bytes)}" if plan.minimum_budget_bytes else ""),
            plan.minimum_budget_bytes,
        )
    from planner.simulate import simulate

    simulate(plan)


def _find_store(plan: Plan, stages: Stages | None) -> Path | None:
    """The weight store of the plan, made now for a model without weights. Raises InputError where it is another model's."""
    from profiles.pack import build_store
    from profiles.sources import cache_directory, resolve

    weights = [t for t in plan.tensors if t.kind in ("weight", "constant")]
    if plan.model.store is None:
        source = resolve(plan.model.source)
        path = build_store(source, cache_directory() / "stores", lambda done, total, name: stages("packing random weights", done, total) if stages else None)
    else:
        path = Path(plan.model.store)
    with Store.open(path) as store:
        if plan.model.store_fingerprint and store.fingerprint != plan.model.store_fingerprint:
            raise InputError(f"{path} holds other weights than the plan was made for (fingerprint {store.fingerprint[:12]}, planned {plan.model.store_fingerprint[:12]}); profile and plan again")
        for tensor in weights:
            if tensor.kind == "weight" and store.packed_bytes(tensor.name) != tensor.packed_bytes:
                raise InputError(f"{path}: {tensor.name} is packed in {store.packed_bytes(tensor.name)} bytes and the plan expects {tensor.packed_bytes}; the plan is for another model, profile and plan again")
    return path


def _open_directory(directory: Path, *, resume: bool, overwrite: bool) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        found = [name for name in OWN if (directory / name).exists()] + [path for _, path in find_checkpoints(str(directory))]
        if found and not resume:
            if not overwrite:
                raise InputError(f"{directory} holds an earlier run ({Path(found[0]).name}); continue it with --resume, replace it with --overwrite, or choose another directory")
            for name in found:
                path = directory / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for partial in list(partial_directories(str(directory))):
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{directory}: {error.strerror}; choose another output directory") from error


def _prepare(plan: Plan, data: Data, directory: Path, purpose: Any, *, truncate: bool, seed: int, stages: Stages | None) -> str:
    """Data as a file of fixed-shape records in ``out/data``."""
    from runtime.data import RANDOM, prepare

    folder = directory / "data"
    folder.mkdir(exist_ok=True)
    if plan.model.kind == "module":
        return _prepare_module(plan, data, folder, purpose)
    if not isinstance(data, str | os.PathLike):
        raise InputError("a language model trains on a JSON-lines file, a directory of them, or 'random'")
    from profiles.sources import resolve

    assert plan.seq is not None
    text = os.fspath(data)
    vocabulary = None if text == RANDOM else resolve(plan.model.source).vocabulary()
    records = prepare(
        text,
        vocabulary,
        folder,
        seq=plan.seq,
        vocab_size=plan.model.config["vocab_size"],
        purpose=purpose,
        too_long="truncate" if truncate else "refuse",
        seed=seed,
        progress=(lambda done: stages(f"tokenising {text}", done, done)) if stages else None,
    )
    records.close()
    return str(records.path)


def _prepare_module(plan: Plan, data: Data, folder: Path, purpose: str) -> str:
    """Batches of a module: those given, or its factory's sample batch."""
    if isinstance(data, str | os.PathLike):
        if os.fspath(data) != "random":
            raise InputError(f"a module trains on batches of tensors (from Python) or on 'random', its sample batch; got {os.fspath(data)!r}")
        from profiles.factory_source import build_module

        data = [build_module(plan.model.source)[1]]
    batches = [tuple(batch) for batch in data]
    planned = [(t.dtype, t.shape) for t in plan.tensors if t.kind == "batch"]
    for number, batch in enumerate(batches):
        found = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in batch]
        if found != planned:
            raise InputError(f"batch {number} has tensors {found}, the plan was made for {planned}; profile with a batch of that shape")
    return write_batches(str(folder / f"{purpose}.batches"), batches)


def _conditions(plan: Plan, optimizer: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What must be the same for a run to continue bit-identically. The budget and the schedule are not among it."""
    untimed = [
        {"values": [v.model_dump() for v in p.values], "operators": [o.model_dump(exclude={"seconds", "workspace_bytes", "flops"}) for o in p.operators]}
        for p in plan.programs
    ]
    graph = [untimed, [layer.model_dump() for layer in plan.layers], [[t.name, t.kind, t.shape, t.dtype] for t in plan.tensors]]
    return {
        "model": plan.model.name,
        "weights": plan.model.store_fingerprint,
        "graph": hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest(),
        "batch": plan.batch,
        "seq": plan.seq,
        "lora": plan.model.lora,
        "optimizer": dict(optimizer),
        "seed": seed,
        "threads": plan.device.threads,
        "torch": torch.__version__,
    }
