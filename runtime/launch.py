"""The parent of a run: checks the plan against model, data and machine, starts the lean child under the cap, and reports.

The parent may import what it likes; only the child is capped.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from planner.schema import Plan
from profiles.errors import CapError, InputError, RunError, TightfitError
from profiles.units import format_size
from runtime import adapter
from runtime import job as jobs
from runtime.admission import Stages, check_machine, check_options, check_schedule, conditions, find_store
from runtime.batches import write_batches
from runtime.cgroup import MemoryCgroup, in_memory
from runtime.checkpoint import find_checkpoints
from runtime.interrupts import GivenUp, passed_on
from runtime.optimizer import OPTIMIZERS
from runtime.output import finished_report, locked, staged, to_be_replaced, writing_to
from runtime.process import child_environment, command
from runtime.report import Observed, build_report

Progress = Callable[[int, float, float, int, int], None]
"""progress(step, loss, seconds, resident bytes, peak bytes) after every step, counted from 1."""
Data = str | os.PathLike[str] | Iterable[Sequence[torch.Tensor]]
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
    profile_step: bool = False,
    progress: Progress | None = None,
    stages: Stages | None = None,
) -> dict[str, Any]:
    """Train `steps` steps (a multiple of those of an update) as planned, under the plan's budget, and return the report (also written to ``out/report.json``).

    `data` is a JSON-lines file, a directory of them, ``random``, or, for a module, an iterable of batches (tuples of tensors), of
    which each step takes the next and begins again after the last: all of one that has a length, of another as many as there are
    steps. They are written to the disk first. With `eval_data`, which must end, the model is evaluated before and after.
    `cgroup=False` leaves enforcement to the meter. With `resume`, a run that has taken all `steps` already answers with its report
    and changes nothing but for what other `eval_data` bring.
    `profile_step` adds to the report where the seconds of the third step went, or of the next that ends an update, operator by
    operator.

    Raises InputError for a plan that does not fit model, data or machine, InfeasibleError for a plan without a schedule,
    CapError where the measured memory passes the budget, RunError where the disk fills up, the child dies or the run is
    interrupted; the message then says where the last checkpoint lies.

    Called in the main thread, it is interrupted by Ctrl-C, and by SIGTERM and SIGHUP where nothing else handles them: the
    step is finished and saved, and the RunError is `interrupted`, on which a program should end, as the signal is used up.
    A handler of the program's own is left in place; the run saves and ends if that, `progress` or `stages` raises.
    """
    directory = Path(out).absolute()
    check_options(plan, steps, schedule, lr)
    name = os.fspath(data) if isinstance(data, str | os.PathLike) else "the batches given"
    if not isinstance(data, str | os.PathLike) and _length(data) is None:
        name += f" (the first {steps} of an iterator without a length; give a list to go on with more steps)"
        data = itertools.islice(data, steps)
    check_machine(plan)
    check_schedule(plan)
    store = find_store(plan, stages)
    with locked(directory) as lock, staged(directory) as staging:
        replaced = to_be_replaced(directory, steps, resume=resume, overwrite=overwrite)
        train = _prepare(plan, data, staging, "train", truncate=truncate, seed=seed, stages=stages)
        evaluation = (
            None
            if eval_data is None
            else _prepare(plan, eval_data, staging, "evaluate", truncate=truncate, seed=seed, stages=stages)
        )
        optimizer = OPTIMIZERS[plan.optimizer.get("name", "adamw")](
            lr=lr,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
            total_steps=0 if schedule == "constant" else steps,
        )
        settings = {
            "store": str(store) if store else None,
            "data": str(directory / "data" / train.name),
            "evaluation": str(directory / "data" / evaluation.name) if evaluation else None,
            "out": str(directory),
            "steps": steps,
            "seed": seed,
            "resume": resume,
            "checkpoint_every": checkpoint_every,
            "keep_checkpoints": keep_checkpoints,
            "optimizer": asdict(optimizer),
            "base_model": plan.model.source,
            "state_dict": plan.model.config.get("state_dict"),
            "adapter_body": plan.model.config.get("adapter_body", adapter.BODY),
            "expected_seconds": plan.step_seconds,
            "profile_step": profile_step,
            "conditions": conditions(plan, asdict(optimizer), seed),
        }
        finished, evaluated = finished_report(directory, settings, train, evaluation, name) if resume else (None, False)
        if finished and evaluated:
            return finished
        compiled = jobs.compile_job(plan.model_dump(), settings)
        for old in replaced:  # only now: data or a plan that are refused must not cost an earlier run
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        with writing_to(directory):
            (directory / "data").mkdir(exist_ok=True)
            for file in staging.iterdir():
                file.replace(directory / "data" / file.name)
            staging.rmdir()  # a run that is killed from here on leaves nothing behind
        path = directory / "job"
        try:
            with writing_to(directory):
                compiled.write(str(path))
            group = MemoryCgroup.create(plan.budget_bytes) if cgroup else None
            try:
                observed = _watch(plan, path, group, progress, stages, lock)
            finally:
                if group:
                    group.remove()
        finally:
            path.unlink(missing_ok=True)
        report = build_report(plan, observed, directory, enforced_by="cgroup" if group else "meter")
        if finished:  # what its steps measured stays
            report = finished | {"evaluation": report["evaluation"]}
        with writing_to(directory):
            (directory / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        return report


def _watch(
    plan: Plan, path: Path, group: MemoryCgroup | None, progress: Progress | None, stages: Stages | None, lock: int
) -> Observed:
    """Run the child and follow its messages. Raises what its end means."""
    read, write = os.pipe()
    arguments = command(str(path), "--messages", str(write))
    observed = Observed()
    with tempfile.TemporaryFile() as words, passed_on() as passing:
        try:
            try:
                child = subprocess.Popen(
                    group.enter(arguments) if group else arguments,
                    pass_fds=(write, lock),  # orphaned, it still saves: the directory stays locked until it has
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    env=child_environment(plan.device.threads),
                    start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on
                )
            finally:
                os.close(write)
            passing.to(child)
            try:
                _follow(read, observed, progress, stages)
            except GivenUp:
                raise
            except BaseException:
                child.terminate()  # progress that cannot be shown any more must not cost the steps made
                child.wait()
                raise
        finally:
            os.close(read)
        code = child.wait()
        words.seek(0)
        last = words.read().decode(errors="replace").strip().splitlines()
    if group:
        observed.cgroup_peak_bytes = group.peak_bytes()
    try:
        _raise_for(code, observed, plan, group, last, path.parent)
    except RunError as error:
        error.interrupted = passing.asked
        raise
    return observed


def _follow(read: int, observed: Observed, progress: Progress | None, stages: Stages | None) -> None:
    buffer = b""
    while data := os.read(read, 1 << 16):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            observed.take(message)
            if message["event"] == "step" and progress:
                progress(
                    message["step"],
                    message["loss"],
                    message["seconds"],
                    message["resident_bytes"],
                    message["peak_bytes"],
                )
            elif message["event"] == "evaluating" and stages:
                stages(f"evaluating {message['when']}", message["done"], message["total"])


def _raise_for(
    code: int, observed: Observed, plan: Plan, group: MemoryCgroup | None, last: list[str], directory: Path
) -> None:
    if observed.error:
        raise ERRORS.get(observed.error["kind"], RunError)(observed.error["message"])
    if observed.interrupted:
        raise RunError(
            f"interrupted after step {observed.interrupted['step']}; everything is saved in {observed.interrupted['checkpoint']}, continue with --resume"
        )
    if code == 0:
        return
    checkpoints = find_checkpoints(str(directory))
    saved = (
        f"the last checkpoint is {checkpoints[-1][1]}, continue with --resume"
        if checkpoints
        else "no checkpoint was saved yet, start again with --overwrite"
    )
    if code == -signal.SIGKILL and group and group.oom_kills():
        way = "profile again on this machine and plan anew"
        if in_memory(directory):
            way = f"{directory} lies in memory (tmpfs), where all that a run writes counts against the cap: choose an output directory on a disk; or else {way}"
        peak = max((observed.peak_bytes, observed.cgroup_peak_bytes or 0))
        raise CapError(
            f"the kernel ended the run at its cap of {format_size(plan.budget_bytes)}: the process had reached {format_size(peak)}, "
            f"predicted were {format_size(plan.peak_bytes)}; {way}; {saved}"
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    words = f": {last[-1]}" if last else ""
    raise RunError(f"the training process {how}{words}; {saved}")


def _prepare(
    plan: Plan, data: Data, folder: Path, purpose: Any, *, truncate: bool, seed: int, stages: Stages | None
) -> Path:
    """Data as a file of fixed-shape records in `folder`."""
    from runtime.data import RANDOM, prepare

    folder.mkdir(exist_ok=True)
    if plan.model.kind == "module":
        return _prepare_module(plan, data, folder, purpose, stages)
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
    return records.path


def _length(batches: Iterable[object]) -> int | None:
    """None where there is none: a DataLoader has `__len__`, and no length where its data set has none."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _prepare_module(plan: Plan, data: Data, folder: Path, purpose: str, stages: Stages | None) -> Path:
    """Batches of a module: those given, or its factory's sample batch."""
    from profiles.factory_source import as_trained, build_module

    if isinstance(data, str | os.PathLike):
        if os.fspath(data) != "random":
            raise InputError(
                f"a module trains on batches of tensors (from Python) or on 'random', its sample batch; got {os.fspath(data)!r}"
            )
        data = [build_module(plan.model.source)[1]]
    # The plan has the tensors that are used, in the order of their first use.
    planned = {int(t.name.removeprefix("batch")): (t.dtype, t.shape) for t in plan.tensors if t.kind == "batch"}

    length = _length(data)

    def checked() -> Iterator[list[torch.Tensor]]:
        for number, given in enumerate(data):
            batch = as_trained(given)
            found = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in batch]
            if max(planned, default=0) >= len(batch) or any(found[at] != wanted for at, wanted in planned.items()):
                wanted = [planned[at] for at in sorted(planned)]
                raise InputError(
                    f"batch {number} has tensors {found}, the plan was made for {wanted}; profile with a batch of that shape"
                )
            if stages:
                stages("writing batches down", number + 1, length or number + 1)
            yield [batch[at] for at in planned]

    return Path(write_batches(str(folder / f"{purpose}.batches"), checked()))
