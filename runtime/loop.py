"""The loop of a run: evaluate, train, save, evaluate. Sends what happens to the parent and keeps ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from profiles.errors import InputError, RunError
from profiles.files import sync_directory
from runtime import checkpoint
from runtime.batches import open_batches
from runtime.channels import Channel
from runtime.job import Job
from runtime.process import memory
from runtime.training import Training
from runtime.warm import settle, tidy

Send = Callable[..., None]
INTERRUPTED = 4


def run(job: Job, channel: Channel, send: Send, stopping: Callable[[], bool]) -> int:
    """Carry out a job; returns the exit code. `stopping` tells between steps whether to save and end."""
    header = job.header
    out: str = header["out"]
    training = Training(job, channel, out)
    conditions = {**header["conditions"], "data": training.batches.fingerprint}
    held_out = _fingerprint(header)
    found = checkpoint.load_latest(out, conditions) if header["resume"] else None
    done, path = (found.step, found.path) if found else (0, "")
    before = _evaluated_before(found.state) if found else {}
    # Data that were not evaluated before step 1 are, by a resumed run, with the model as it was then.
    begun = done > 0 and (held_out is None or before.get("data") == held_out)
    if found:
        send("resumed", step=done, checkpoint=found.path)
    if found and begun:
        training.load_state(found.path, found.state)
        if held_out is not None:
            send("evaluated", when="before", data=held_out, **before["result"])
    else:
        training.initialise()
    metrics = Metrics(os.path.join(out, "metrics.jsonl"), done)
    settle()
    peaks = {"load": training.meter.check_peak()}
    send(
        "loaded",
        step=done,
        peak_bytes=peaks["load"],
        resident_bytes=memory().resident,
        spill_bytes=job.header["spill_bytes"],
    )

    def evaluating(when: str, batch: int, batches: int) -> None:
        send("evaluating", when=when, done=batch, total=batches)
        if stopping():
            raise _Stopped

    def evaluate(when: str) -> None:
        if header["evaluation"]:
            result = training.evaluate(header["evaluation"], partial(evaluating, when))
            peaks[f"evaluate {when}"] = training.meter.check_peak()
            settle()
            if when == "before":
                before.update(data=held_out, result=result, answers="right")
            send("evaluated", when=when, data=held_out, **result, peak_bytes=peaks[f"evaluate {when}"])

    def save(step: int) -> str:
        def fill(path: str) -> dict[str, Any]:
            return {"evaluated before": before, **training.save_state(path)}

        path = checkpoint.save(out, step, conditions, fill, header["keep_checkpoints"])
        peaks["checkpoint"] = training.meter.check_peak()
        settle()  # code that only saving needs
        send("checkpoint", step=step, path=path, peak_bytes=peaks["checkpoint"])
        return path

    saved, every = (done if header["resume"] else -1), header["checkpoint_every"]
    # The first step that is like those after it, and of several that make an update the last.
    later = -(-(done + 3) // header["accumulate"]) * header["accumulate"]
    watched = {done + 1: "first", min(header["steps"], later): "later"}
    try:
        if not begun:
            evaluate("before")
            if found:
                training.load_state(found.path, found.state)
        for step in range(done + 1, header["steps"] + 1):
            _step(training, step, watched.get(step), metrics, peaks, send)
            done, last = step, step == header["steps"]
            if last or (every and step % every == 0):
                path, saved = save(step), step
            if stopping() and not last:
                raise _Stopped
        evaluate("after")
    except _Stopped:
        if saved != done:
            path = save(done)
        send("interrupted", step=done, checkpoint=path)
        training.close()
        return INTERRUPTED
    trained = os.path.join(out, "adapter" if header["lora"] else "model")
    send("saved", path=_save_trained(training, trained))
    training.close()
    send("done", peak_bytes=training.meter.check_peak(), peaks=peaks)
    return 0


def _evaluated_before(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint has of the first evaluation, but for a loss of questions that older versions mixed with wrong answers."""
    before: dict[str, Any] = state.get("evaluated before", {})
    comparable = not before or before["result"]["accuracy"] is None or before.get("answers") == "right"
    return before if comparable else {}


def _fingerprint(header: dict[str, Any]) -> str | None:
    """Of the data to evaluate on."""
    if not header["evaluation"]:
        return None
    batches = open_batches(header["evaluation"], header["seed"])
    batches.close()
    return batches.fingerprint


class _Stopped(Exception):  # noqa: N818  not an error
    """A signal asked to save and end."""


def _step(
    training: Training, step: int, watched: str | None, metrics: Metrics, peaks: dict[str, int], send: Send
) -> None:
    """One step, measured; with a timeline under the name `watched`."""
    detailed = watched == "later" and training.header["profile_step"]
    if watched:
        training.meter.watch(training.header["expected_seconds"])
    if detailed:
        training.executor.detail = {}
    before = time.perf_counter()
    loss = training.step(step)
    seconds = time.perf_counter() - before
    tidy()
    if watched:
        send("timeline", which=watched, samples=training.meter.stop())
    if detailed:
        send(
            "profiled",
            step=step,
            seconds=seconds,
            calls=training.executor.detail,
            stall=training.executor.seconds["stall"],
        )
        training.executor.detail = None
    peaks["train"] = training.meter.check_peak()
    told = {"loss": loss, "seconds": seconds, "resident_bytes": memory().resident, "peak_bytes": peaks["train"]}
    metrics.add(step=step, **told)
    send("step", step=step, **told, spent=training.executor.seconds)
    if not math.isfinite(loss):
        rate = training.header["optimizer"]["lr"]
        raise InputError(
            f"the loss of step {step} is not a number; lower the learning rate (lr {rate}) or check the data"
        )


def _save_trained(training: Training, path: str) -> str:
    """The result, under its own name, whole or not at all."""
    partial = f"{path}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        training.channel.drain()
        training.save_trained(partial)
        sync_directory(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"saving {path} failed: {error.strerror}; the last checkpoint holds the same tensors; free disk space and continue with --resume"
        ) from error
    return path


class Metrics:
    """``metrics.jsonl``: one line per step. Lines after the resumed step are dropped, those before are kept."""

    def __init__(self, path: str, done: int) -> None:
        kept = _lines_until(path, done) if done else b""
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(kept)
        os.replace(temporary, path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, **line: Any) -> None:
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


def _lines_until(path: str, step: int) -> bytes:
    kept = []
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a kill
    except FileNotFoundError:
        pass
    return b"".join(kept)
