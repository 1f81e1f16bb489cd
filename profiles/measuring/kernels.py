"""Measures the memory that a model's operators leave behind in a process once they have run: kernels, code, heap holes.

Its process is ``python -m tightfit.profiles.measuring.kernels``: programs in as JSON, a number of bytes out.

oneDNN builds a kernel for every shape of a matrix product and keeps it (about half a MiB each in bfloat16), and library
code is mapped when it first runs. Both stay for the life of the process whatever the plan, as do the compiled calls of
operators and the heap holes left by reading the job, so all of them count towards the floor.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from typing import Any

from tightfit.runtime.common.children import last_words
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import lean_torch
from tightfit.runtime.engine.start.process import child_environment, leave, trim_heap
from tightfit.runtime.engine.training.job import program_headers, program_values

INFERENCE = "--inference"


def kernel_bytes(programs: list[dict[str, Any]], threads: int, *, backward: bool = True) -> int:
    """Resident bytes above the floor that stay once every operator of `programs` (profile programs as dicts) has run.

    Without `backward`, the floor is that of a process that runs no backward. Raises InputError for an operator that
    cannot be run, RunError if the process does not start.
    """
    process = subprocess.run(
        command("tightfit.profiles.measuring.kernels", *([] if backward else [INFERENCE])),
        input=json.dumps(program_headers(programs)),
        text=True,
        capture_output=True,
        env=child_environment(threads),
        check=False,
    )
    if process.returncode:
        last_line = last_words(process.stderr, f"exit status {process.returncode}")
        if process.returncode == InputError.exit_code:
            raise InputError(last_line)
        if process.returncode == RunError.exit_code:
            raise RunError(last_line)
        raise RunError(f"the operators do not run in the runtime process: {last_line}")
    return int(json.loads(process.stdout)["bytes"])


def main() -> int:
    lean_torch.load()
    from tightfit.runtime.engine.start.kernel_warmup import SIZE, prepare, settle, warm_up

    channel = prepare()
    backward = INFERENCE not in sys.argv
    warm_up(channel, SIZE, backward=backward)  # brings the process into the state in which the floor is measured
    from tightfit.runtime.engine.cpu.cpu import Cpu
    from tightfit.runtime.engine.device.meter import Meter
    from tightfit.runtime.engine.training.executor import BoundOperator, bind
    from tightfit.runtime.engine.training.operator_warmup import warm_up_operators

    before = _resident()
    programs = json.load(sys.stdin)
    device = Cpu(max(map(_bytes, programs), default=0), Meter(sys.maxsize))
    operators: list[BoundOperator] = [operator for bound in bind(programs, device, None) for operator in bound]
    warm_up_operators(operators, device)
    settle()
    # Maps again the pages that a step needs, but not those that only building kernels needed.
    warm_up(channel, SIZE, backward=backward)
    warm_up_operators(operators, device)
    sys.stdout.write(json.dumps({"bytes": _resident() - before}) + "\n")
    return 0


def _bytes(program: dict[str, Any]) -> int:
    """Bytes of address space for all tensors of a program at once; it takes memory only where tensors are written."""
    import torch

    return sum(
        math.prod(value["shape"]) * getattr(torch, value["dtype"]).itemsize + 64
        for value in program_values(program).values()
    )


def _resident() -> int:
    gc.collect()
    trim_heap()
    return memory().resident


if __name__ == "__main__":
    leave(main)
