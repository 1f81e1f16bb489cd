"""A device's part of a round: starts `tightfit run` from the fleet's adapter, under the device's cap, and reads the
result.

The process that calls this waits beside the training process and counts against the device's budget, so that it lives
of the standard library; `node`, which talks to Flower, calls `take_part`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tightfit.runtime.common import children, interpreter
from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.federated.adapter_file import AdapterFile
from tightfit.runtime.federated.messages import HELLO, OVER, Answer, Order
from tightfit.runtime.supervision.failure import last_message

MODULE = "tightfit.runtime.cli.main"
SETTINGS = "device.json"
WEIGHTS = "adapter_model.safetensors"
ENDING_SECONDS = 20.0
"""that a run which is asked to end has for it; then it is killed"""
SENDING_SHARE = 0.1
"""of a round's seconds: left for sending the answer"""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """What a device needs to know to take part, as its settings file has it."""

    member: str
    plan: str
    """path of its own plan"""
    rank: int
    """of the adapter that this plan trains"""
    data: str
    work: str
    """folder for its runs; what a round leaves there is replaced by the next"""
    truncate: bool = False
    cgroup: bool = True
    fleet: str = ""
    """where a server computes the upper layers: folder of the fleet's plan"""
    labels: str = ""
    """where a server computes the upper layers: file of the labels of the device's data"""
    server: str = ""
    """where a server computes the upper layers: host at which its runs listen"""

    def write(self) -> str:
        """Write the settings into the device's folder; returns their path."""
        os.makedirs(self.work, exist_ok=True)
        path = os.path.join(self.work, SETTINGS)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
        return path

    @classmethod
    def read(cls, path: str) -> DeviceSettings:
        try:
            with open(path, encoding="utf-8") as file:
                return cls(**json.load(file))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: not the settings of a device ({error}); `tightfit fleet federate join` writes them"
            ) from error


def take_part(device: DeviceSettings, order: Order, adapter: Callable[[], bytes]) -> tuple[Answer, bytes]:
    """Carry out a device's part of a round; the answer, and the trained adapter's file (empty where there is none).

    `adapter` fetches the file of the fleet's adapter. Nothing of it is held in memory while the run trains.
    """
    if order.round == OVER:
        return Answer(round=OVER, member=device.member), b""
    if order.round == HELLO:
        return _hello(device, order)
    began = time.monotonic()
    steps = order.steps_of(device.member)
    try:
        if not steps:
            raise InputError(f"member {device.member!r} takes no part in the fleet's rounds")
        out = os.path.join(device.work, "run")
        given = os.path.join(device.work, "given")
        _write_given(given, adapter, device.rank)
        _run(_command(device, order, given, out), device, order.seconds * (1 - SENDING_SHARE))
        waiting_bytes = memory().resident  # what lived beside the training process
        report = report_of(out)
        with open(os.path.join(out, "adapter", WEIGHTS), "rb") as file:
            trained = file.read()
        tokens = _tokens(os.path.join(out, "metrics.jsonl"))
    except (TightfitError, OSError) as error:
        refused = Answer(round=order.round, member=device.member, error=str(error), seconds=time.monotonic() - began)
        return refused, b""
    answer = Answer(
        round=order.round,
        member=device.member,
        steps=steps,
        tokens=tokens,
        loss=sum(report["loss"]) / len(report["loss"]),
        seconds=time.monotonic() - began,
        peak_bytes=report["peak_bytes"]["measured"],
        flower_bytes=waiting_bytes,
    )
    return answer, trained


def _write_given(folder: str, adapter: Callable[[], bytes], rank: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with open(os.path.join(folder, WEIGHTS), "wb") as file:
        file.write(AdapterFile.read(adapter(), "the fleet's adapter").cut(rank))
    give_back()  # the memory through which it came


def give_back() -> None:
    """Give free memory back to the system, where the C library can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _hello(device: DeviceSettings, order: Order) -> tuple[Answer, bytes]:
    """Who this device is, and the labels of its data, if the server needs them and has not got them."""
    if not device.labels:
        return Answer(round=HELLO, member=device.member), b""
    try:
        with open(device.labels, "rb") as file:
            labels = file.read()
    except OSError as error:
        told = f"{device.labels}: {error.strerror}; join again with --data"
        return Answer(round=HELLO, member=device.member, error=told), b""
    known = order.knows(device.member, hashlib.sha256(labels).hexdigest())
    give_back()
    return Answer(round=HELLO, member=device.member), b"" if known else labels


def _command(device: DeviceSettings, order: Order, given: str, out: str) -> list[str]:
    """The command of a run from the adapter in the folder `given`; where a server computes the upper layers, of the
    first stage.
    """
    own = ["--truncate"] * device.truncate + ["--no-cgroup"] * (not device.cgroup)
    if not device.labels:
        arguments = ["run", device.plan, "--overwrite", "--checkpoint-every", "0"]
        arguments += _training(order, device.member, device.data, given, out)
        return interpreter.command(MODULE, *arguments, *own)
    if not order.port:
        raise InputError(f"round {order.round}: the order names no port of the server")
    arguments = stage_arguments(device.fleet, device.member, order, device.server, device.data, given, out)
    return interpreter.command(MODULE, *arguments, *own)


def stage_arguments(fleet: str, member: str, order: Order, host: str, data: str, given: str, out: str) -> list[str]:
    """The arguments of the command that runs a stage of the device `member`, on whichever side."""
    arguments = ["fleet", "federate", "stage", fleet, "--member", member, "--at", f"{host}:{order.port}"]
    return [*arguments, "--timeout", repr(order.seconds), *_training(order, member, data, given, out)]


def _training(order: Order, member: str, data: str, given: str, out: str) -> list[str]:
    arguments = ["--data", data, "--steps", str(order.steps_of(member)), "-o", out, "--adapter", given]
    arguments += ["--lr", repr(order.lr), "--weight-decay", repr(order.weight_decay), "--seed", str(order.seed)]
    return [*arguments, "--json"]


def _run(command: list[str], device: DeviceSettings, seconds: float) -> None:
    """Run a command to its end, which comes after `seconds` at the latest. It also ends if this process is killed."""
    log = os.path.join(device.work, "run.log")
    child = start(command, log)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        end(child)
        raise RunError(f"the round's {seconds:.0f} seconds were over before the run had ended") from None
    except BaseException:
        end(child)
        raise
    if code:
        raise RunError(f"the run ended with code {code}: {last_message(log)}")


def start(
    command: Sequence[str],
    log: str,
    environment: Mapping[str, str] | None = None,
    orphaned: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a command that writes what it says to the file `log`. The kernel sends it the signal `orphaned` when this
    process ends, however it does.
    """
    with open(log, "wb") as file:
        return children.start(
            command,
            environment=environment,
            orphaned=orphaned,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(child: subprocess.Popen[bytes]) -> None:
    """Ask a run to end, and kill it where it does not."""
    child.terminate()
    try:
        child.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def report_of(out: str) -> dict[str, Any]:
    with open(os.path.join(out, "report.json"), encoding="utf-8") as file:
        report: dict[str, Any] = json.load(file)
    return report


def _tokens(metrics: str) -> int:
    with open(metrics, encoding="utf-8") as file:
        return sum(json.loads(line)["tokens"] for line in file)
