"""The loop of a run: evaluate, train, save, evaluate. Sends what happens to the parent and keeps ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from profiles.errors import InputError
from runtime import checkpoint
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
    done = 0
    if header["resume"]:
        found = checkpoint.load_latest(out, conditions)
        training.load_state(found.path, found.state["checksums"])
        done = found.step
        send("resumed", step=done, checkpoint=found.path)
    else:
        training.initialise()
    metrics = Metrics(os.path.join(out, "metrics.jsonl"), done)
    settle()
    peaks = {"load": training.meter.check_peak()}
    send("loaded", step=done, peak_bytes=peaks["load"], resident_bytes=memory().resident, spill_bytes=job.header["spill_bytes"])

    def evaluate(when: str) -> None:
        if header["evaluation"] and len(job.evaluate):
            result = training.evaluate(header["evaluation"])
            peaks[f"evaluate {when}"] = training.meter.check_peak()
            tidy()
            send("evaluated", when=when, **result, peak_bytes=peaks[f"evaluate {when}"])

    def save(step: int) -> str:
        path = checkpoint.save(out, step, conditions, training.save_state, header["keep_checkpoints"])
        peaks["checkpoint"] = training.meter.check_peak()
        send("checkpoint", step=step, path=path, peak_bytes=peaks["checkpoint"])
        return path

    if not done:
        evaluate("before")
    steps, every, saved = header["steps"], header["checkpoint_every"], done
    watched = {done + 1: "first", min(steps, done + 3): "later"}
    for step in range(done + 1, steps + 1):
        if step in watched:
            training.meter.watch(header["expected_seconds"])
        before = time.perf_counter()
        loss = training.step(step)
        seconds = time.perf_counter() - before
        tidy()
        if step in watched:
            send("timeline", which=watched[step], samples=training.meter.stop())
        peaks["train"] = training.meter.check_peak()
        spent = training.executor.seconds
        metrics.add(step=step, loss=loss, seconds=seconds, resident_bytes=memory().resident, peak_bytes=peaks["train"])
        send("step", step=step, loss=loss, seconds=seconds, peak_bytes=peaks["train"], resident_bytes=memory().resident, spent=spent)
        if loss != loss:
            raise InputError(f"the loss of step {step} is not a number; lower the learning rate (lr {header['optimizer']['lr']}) or check the data")
        stop = stopping()
        if step == steps or stop or (every and step % every == 0):
            path, saved = save(step), step
        if stop and step < steps:
            send("interrupted", step=step, checkpoint=path)
            training.close()
            return INTERRUPTED
    if saved < steps:
        save(steps)
    if steps > 0:
        evaluate("after")
    trained = os.path.join(out, "adapter" if header["lora"] else "model")
    send("saved", path=_save_trained(training, trained))
    training.close()
    send("done", peak_bytes=training.meter.check_peak(), peaks=peaks)
    return 0


def _save_trained(training: Training, path: str) -> str:
    """The result, under its own name, whole or not at all."""
    import shutil

    from profiles.errors import RunError

    partial = f"{path}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        training.channel.drain()
        training.save_trained(partial)
        checkpoint.sync_directory(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"saving {path} failed: {error.strerror}; the last checkpoint holds the same tensors; free disk space and continue with --resume") from error
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
