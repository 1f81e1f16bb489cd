"""Measures the floor of runs, in processes started for it, and sends the result of measuring.

The process that has measured everything else becomes this one (``python -m tightfit.profiles.measuring.floor
DESCRIPTOR``, exec), so that none of its memory is held beside theirs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from tightfit.profiles.measuring.kept_figures import KeptFigures
from tightfit.profiles.measuring.kernels import kernel_bytes
from tightfit.profiles.measuring.messages import Steps
from tightfit.profiles.worker_process import send
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.children import own_environment
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.files import nameless_file, write_all
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start.floor import HOLES_PER_WORKSPACE
from tightfit.runtime.engine.start.process import child_environment, leave
from tightfit.runtime.engine.training.job import program_headers
from tightfit.runtime.supervision.supervisor import command as supervisor_command
from tightfit.runtime.supervision.training_process import command


def become(folder: str, request: dict[str, Any], result: dict[str, Any], held_bytes: int, steps: Steps) -> NoReturn:
    """Go on as the process that measures the floor and sends the `result` with it. `request` is the worker's, with what
    was found about its operators; `held_bytes` what this process has held so far.
    """
    state = [request, result, held_bytes, steps.done, steps.total]
    descriptor = nameless_file(folder)
    write_all(descriptor, json.dumps(state).encode())
    os.set_inheritable(descriptor, True)
    sys.stdout.flush()
    words = interpreter.command("tightfit.profiles.measuring.floor", str(descriptor))
    os.execve(words[0], words, os.environ)  # noqa: S606  no shell is wanted


def main() -> int:
    descriptor = int(sys.argv[1])
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, encoding="utf-8") as file:
        request, result, held_bytes, done, total = json.load(file)
    result["floor"] = measure_floor(request, result["operators"], Steps(total, done))
    child_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    beside_bytes = memory().peak + request["floor_children"] * child_bytes
    held = {"held_bytes": max(held_bytes, beside_bytes)}
    send(result=result | held, **held)
    return 0


def measure_floor(request: dict[str, Any], figures: dict[str, list[list[float]]], steps: Steps) -> dict[str, Any]:
    """`Floor` fields in bytes: of an idle run, with what the operators of all programs leave behind. `figures` are
    theirs.
    """
    programs, threads = request["programs"], request["threads"]
    kept = KeptFigures.of_request(request)

    def lasting_bytes(chosen: list[dict[str, Any]], *, backward: bool = True) -> int:
        """What the operators of these programs leave behind (`kernel_bytes`)."""
        key = [program_headers(chosen), backward]
        return kept.of("kernels", key, lambda: kernel_bytes(chosen, threads, backward=backward))

    forwards = [
        {**program, "operators": [program["operators"][position] for position in positions]}
        for program, positions in zip(programs, request["inference"], strict=True)
    ]
    with ThreadPoolExecutor(request["floor_children"]) as pool:
        idle = pool.submit(kept.of, "floor", [], lambda: idle_floor(threads))
        kernels = pool.submit(lasting_bytes, programs)
        inference_kernels = pool.submit(lasting_bytes, forwards, backward=False)
        fields: dict[str, Any] = dict(idle.result())
        steps.take()
        fields["resident_bytes"] += kernels.result()
        steps.take()
        fields["inference_resident_bytes"] += inference_kernels.result()
        steps.take()
    kept.save()  # bytes do not depend on what else the cores do

    def largest_workspace(chosen: Callable[[int, int], bool]) -> float:
        """Of the operators of PyTorch's own among those that are chosen by the indices of their program and of
        themselves.
        """
        return max(
            (
                figures[program["name"]][index][1]
                for number, program in enumerate(programs)
                for index, operator in enumerate(program["operators"])
                if not operator["target"].startswith("tightfit.") and chosen(number, index)
            ),
            default=0.0,
        )

    forward = [set(positions) for positions in request["inference"]]
    fields["resident_bytes"] += round(HOLES_PER_WORKSPACE * largest_workspace(lambda number, index: True))
    fields["inference_resident_bytes"] += round(
        HOLES_PER_WORKSPACE * largest_workspace(lambda number, index: index in forward[number])
    )
    return fields


def idle_floor(threads: int) -> dict[str, Any]:
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
    supervisor = subprocess.run(
        supervisor_command("--measure"), capture_output=True, text=True, env=own_environment(), check=False
    )
    if supervisor.returncode:
        raise SystemExit(f"the supervisor of runs does not start: {supervisor.stderr.strip() or supervisor.returncode}")
    return measured | {"supervisor_bytes": int(supervisor.stdout)}


if __name__ == "__main__":
    leave(main)
