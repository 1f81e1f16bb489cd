"""Carries out a run of a plan: starts tightfit's command line as a process and reports the steps that it writes down.

The device's lock file is held by the run itself too, so that the next run waits even where this worker was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tightfit.planner.io import parse_plan
from tightfit.planner.plan_result import sealed
from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row, file_row
from tightfit.planner.service.jobs.work.inputs import placed
from tightfit.planner.service.wire.objects import CHUNK, ObjectStore
from tightfit.planner.service.wire.redaction import with_paths
from tightfit.profiles.option_fields import options_of, word_of
from tightfit.runtime.common.children import last_words, start
from tightfit.runtime.common.errors import CapError, InfeasibleError, InputError, RunError
from tightfit.runtime.common.new_lines import NewLines
from tightfit.runtime.session.options import RunOptions
from tightfit.runtime.supervision.contention import crowding_of
from tightfit.runtime.supervision.progress import stage_of

LOOK_SECONDS = 0.2
UPLOADS = "uploads"
"""folder beside the run's, with data that were uploaded"""
TRAINING, BEFORE = "training", "evaluating before"
"""stages of a run"""
ERRORS = {kind.exit_code: kind for kind in (InputError, InfeasibleError, RunError, CapError)}


class RunClock:
    """Seconds of this machine's clock that a run's progress goes with, so that whoever begins to look knows how fast it
    goes.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._stage, self._began = "", 0.0
        self._evaluation_seconds: float | None = None
        self._others_cores = 0.0

    def hear(self, line: str) -> None:
        """Take note of what the run says of other programs."""
        cores = crowding_of(line)
        self._others_cores = self._others_cores if cores is None else cores

    def at(self, stage: str, step: Mapping[str, float] | None = None) -> Row:
        """`at`: now; `began`: when the stage was first heard of; `evaluation_seconds`: what the evaluation before the
        first step took, where there was one; `others_cores`: that other programs use, as the run has said.
        """
        now = self._now()
        if stage != self._stage:
            if self._stage == BEFORE and stage == TRAINING and step is not None:
                self._evaluation_seconds = max(0.0, now - self._began - step["seconds"])
            self._stage, self._began = stage, now
        return {
            "at": now,
            "began": self._began,
            "evaluation_seconds": self._evaluation_seconds,
            "others_cores": self._others_cores,
        }


def do(order: JobOrder, events: EventWriter) -> Row:
    """Carry out a plan and keep its report, its steps and its adapter; goes on from a checkpoint where there is one."""
    objects = ObjectStore(Path(order.objects))
    folder = Path(order.folder)
    out = folder / "out"
    plan = folder / "plan.json"
    folder.mkdir(parents=True, exist_ok=True)
    with device(order, events) as lock:
        stored = parse_plan(order.content(order.request["plan"]), f"the stored plan {order.request['plan']}")
        unredacted = sealed(stored.model_copy(update={"model": with_paths(stored.model, order.paths)}))
        plan.write_text(unredacted.model_dump_json())
        if out.exists():
            events.progress(always=True, stage="waiting for what an earlier attempt still saves")
        _wait_for_orphan(out, sys.stdin.fileno())
        events.progress(always=True, stage="preparing")
        code, output, last = _run_to_end(_command(order, plan, out), lock, out, events)
    try:
        report = json.loads(output)
    except ValueError:
        report = {}
    if code or not report:
        raise failure_of(code, report, f"the run {{}}: {last}")
    report["plan_fingerprint"] = stored.fingerprint
    return _store_results(objects, order, out, report)


def failure_of(code: int, printed: Row, otherwise: str) -> Exception:
    """What a command of tightfit failed with, by its exit code and the JSON that it has `printed`; `otherwise` is said
    of how it ended where it has printed none.
    """
    ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    message = printed.get("error", {}).get("message") or otherwise.format(ending)
    return ERRORS.get(code, RunError)(message)


@contextmanager
def device(order: JobOrder, events: EventWriter) -> Iterator[int]:
    """While this machine's device is this job's alone: the descriptor of its lock. Raises RunError where the job ends
    while it waits.
    """
    assert order.lock is not None
    events.progress(always=True, stage="waiting for the device")
    with Path(order.lock).open("w") as lock:
        _wait_for(lock.fileno(), sys.stdin.fileno())
        yield lock.fileno()


def _wait_for(lock: int, orders: int) -> None:
    """Take a lock. Raises RunError where `orders`, standard input, closes first: cancelled, or the service has
    ended.
    """
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if select.select([orders], [], [], LOOK_SECONDS)[0]:
                raise RunError(
                    "it was ended while it waited for another that uses the device; ask again, or resume the run"
                ) from None


def _wait_for_orphan(out: Path, orders: int) -> None:
    """Wait until the training process of a run that was killed has saved and ended; until then it holds the lock of its
    folder.
    """
    if out.exists():
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _wait_for(descriptor, orders)
        finally:
            os.close(descriptor)


def _command(order: JobOrder, plan: Path, out: Path) -> list[str]:
    uploads = plan.parent / UPLOADS
    request = order.request | {
        name: placed(order, data, uploads)
        for name in ("data", "eval_data")
        if (data := order.request.get(name)) is not None
    }
    arguments = [*order.command, "run", str(plan), "--data", request["data"], "--output", str(out), "--json"]
    for name, option in options_of(RunOptions).items():
        if (value := request.get(name)) is not None:
            arguments += _arguments(word_of(name, option), value)
    arguments.append("--resume" if any(out.glob("checkpoint-*")) else "--overwrite")
    return arguments


def _arguments(option: str, value: Any) -> list[str]:
    """The words that give `tightfit run` an option."""
    if isinstance(value, bool):
        return [option if value else f"--no-{option.removeprefix('--')}"]
    if isinstance(value, dict):
        value = ",".join(f"{name}={item}" for name, item in value.items())
    return [f"{option}={value}"]


def _run_to_end(command: list[str], lock: int, out: Path, events: EventWriter) -> tuple[int, bytes, str]:
    """Exit code, standard output and last words of the run."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        # Asked to save and end when this process is killed.
        child = start(command, stdout=stdout, stderr=stderr, pass_fds=(lock,), orphaned=signal.SIGTERM)
        threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
        steps, told, clock = NewLines(out / "metrics.jsonl", skip=True), 0, RunClock()

        def report() -> None:
            nonlocal told
            for line in os.pread(stderr.fileno(), CHUNK, told).splitlines(keepends=True):
                if line.endswith(b"\n"):
                    told += len(line)
                    text = line.decode(errors="replace")
                    clock.hear(text)
                    if (stage := stage_of(text)) is not None:
                        events.progress(always=True, **stage, clock=clock.at(stage["stage"]))
            for step in steps:
                stage_name = TRAINING if "loss" in step else "evaluated"
                events.progress(always=True, stage=stage_name, **step, clock=clock.at(stage_name, step))

        while child.poll() is None:
            time.sleep(LOOK_SECONDS)
            report()
        report()
        stdout.seek(0)
        return child.returncode, stdout.read(), last_words(stderr)


def _end_with_input(child: subprocess.Popen[bytes]) -> None:
    """Ask a cancelled or orphaned run to save a checkpoint and end; kill it a minute later."""
    sys.stdin.buffer.read()
    child.terminate()  # Ctrl-C may be ignored here, and what ignores it starts others that do
    time.sleep(60)
    child.kill()


def _store_results(objects: ObjectStore, order: JobOrder, out: Path, report: Row) -> Row:
    identity, redaction = Path(order.folder).name, order.redaction()
    result = {
        name: report.get(name)
        for name in ("budget_bytes", "enforced_by", "peak_bytes", "step_seconds", "tokens", "evaluation")
    }
    result["steps"] = len(report["loss"])
    result["loss"] = [report["loss"][0], report["loss"][-1]] if report["loss"] else []
    files = []
    for kind, content in (
        ("report", json.dumps(redaction.value(report)).encode()),
        ("metrics", (out / "metrics.jsonl").read_bytes()),
    ):
        files.append(file_row(kind, identity, objects.put(content), name=f"{kind} of {identity}", summary={}))
    adapter = out / "adapter"
    if adapter.is_dir():
        with tempfile.TemporaryFile(dir=objects.temporary) as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                for path in sorted(adapter.iterdir()):
                    if path.suffix == ".json":
                        path.write_text(json.dumps(redaction.value(json.loads(path.read_bytes())), indent=2))
                    archive.add(path, arcname=f"adapter/{path.name}")
            packed.seek(0)
            written = objects.put_chunks(iter(lambda: packed.read(CHUNK), b""))
        files.append(file_row("adapter", identity, written, name=f"adapter of {identity}", summary={}))
    shutil.rmtree(out)
    shutil.rmtree(out.with_name(UPLOADS), ignore_errors=True)
    return {"result": {"report": result}, "files": files}
