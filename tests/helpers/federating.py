"""Federated rounds on this machine: the processes of `tightfit fleet federate`, and the adapter that they have to come
to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load

from tightfit.runtime.common import interpreter
from tightfit.runtime.federated import aggregate
from tightfit.runtime.federated.device import DeviceSettings, take_part
from tightfit.runtime.federated.messages import Order

LIMIT = 240.0
"""Seconds that rounds may take."""
RATE = 1e-2
WEIGHTS = "adapter_model.safetensors"


def adapter_of_rounds(plan, devices, steps, work):
    """The adapter after two rounds, by running each device's part here and averaging. `plan`: of a device, `devices`:
    (plan's file, data) by name, `steps`: number of steps by name.
    """
    current = aggregate.started(aggregate.shapes_of(plan), 0)
    for number in (1, 2):
        order = Order(
            round=number, steps=json.dumps(steps), lr=RATE, weight_decay=0.0, seed=number, seconds=LIMIT
        )  # fmt: skip
        parts = []
        for name, (file, data) in devices.items():
            device = DeviceSettings(
                member=name, plan=str(file), rank=4, data=str(data), work=str(work / name), cgroup=False
            )  # fmt: skip
            answer, trained = take_part(device, order, lambda current=current: aggregate.closed(current))
            assert not answer.error
            parts.append(aggregate.DeviceContribution(tensors=load(trained), tokens=answer.tokens))
        current = aggregate.averaged(parts, current)
    return aggregate.closed(current)


@dataclass
class Running:
    """A process, and where it writes what it says."""

    process: subprocess.Popen
    log: Path

    def said(self):
        return self.log.read_text(errors="replace")

    def kill(self):
        """Kill it as the machine would lose it: no word to anybody."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def processes(folder) -> Iterator:
    """start(name, *words) runs `tightfit fleet federate` and writes what it says in `folder`; all are ended in the
    end.
    """
    running = []

    def start(name, *words):
        log = folder / f"{name}-{len(running)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                interpreter.command("tightfit.runtime.cli.main", "fleet", "federate", *map(str, words)),
                env=os.environ | {"PYTHONPATH": interpreter.python_path()},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running.append(Running(process, log))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.terminate()
    for one in running:
        one.process.wait(60)


def until(done, *running):
    limit = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < limit, "\n".join(one.said()[-2000:] for one in running)
        time.sleep(0.2)


def ended(server, *devices):
    """Wait for the server, which has to end well."""
    until(lambda: server.process.poll() is not None, server, *devices)
    assert server.process.returncode == 0, server.said()[-3000:]


def adapter(out):
    return (out / "adapter" / WEIGHTS).read_bytes()


def lines(out):
    """What a server has written of its rounds."""
    path = out / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
