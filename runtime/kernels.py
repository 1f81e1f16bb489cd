"""What the operators of a model leave behind in a lean process: ``python -m runtime.kernels`` (JSON programs in, bytes out).

oneDNN builds a kernel for every shape of a matrix product and keeps it (about half a MiB each in bfloat16), and code is
mapped when it first runs. Both stay for the life of the process whatever the plan, as do the operators made ready to be
called and the holes that reading them leaves in the heap, so they belong to its floor.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from typing import Any

from profiles.errors import InputError, RunError
from runtime import lean_torch
from runtime.job import program_header, program_values
from runtime.process import child_environment, leave, memory, trim_heap

INFERENCE = "--inference"


def kernel_bytes(programs: list[dict[str, Any]], threads: int, *, backward: bool = True) -> int:
    """Resident bytes that stay once every operator of `programs` (profile programs as dicts) has run, above the floor.

    Without `backward` above that of a process which runs none. Raises InputError for an operator that cannot be run, RunError where the process does not start.
    """
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "runtime.kernels", *([] if backward else [INFERENCE])],
        input=json.dumps([program_header(program) for program in programs]),
        text=True,
        capture_output=True,
        env=child_environment(threads),
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if done.returncode == InputError.exit_code:
            raise InputError(last)
        if done.returncode == RunError.exit_code:
            raise RunError(last)
        raise SystemExit(f"the operators do not run in the runtime process: {last}")
    return int(json.loads(done.stdout)["bytes"])


def main() -> int:
    lean_torch.load()
    from runtime.warm import SIZE, prepare, warm

    warm(prepare(), SIZE, backward=INFERENCE not in sys.argv)  # the state in which the floor is measured
    from runtime.arena import Arena
    from runtime.executor import bind

    before = _resident()
    programs = json.load(sys.stdin)
    arena = Arena(1 << 20)
    kept = [bind(program, arena, None) for program in programs]
    while programs:
        _run_once(programs.pop())
    sys.stdout.write(json.dumps({"bytes": max(0, _resident() - before)}) + "\n")
    del kept
    return 0


def _run_once(program: dict[str, Any]) -> None:
    import torch

    from runtime.compiled import compile_operator

    values = program_values(program)
    compiled = [compile_operator(operator, values) for operator in program["operators"]]
    touched = [
        [
            *(operand["value"] for *_, operand in (*ready.slots, *ready.gathers)),
            *(name for name in operator["outputs"] if name is not None),
        ]
        for ready, operator in zip(compiled, program["operators"])
    ]
    left = Counter(name for names in touched for name in set(names))
    tensors: dict[str, Any] = {}
    for operator, names in zip(program["operators"], touched):
        ready = compiled.pop(0)  # it holds the tensors of its last call
        if not ready.gathers:
            for name in names:
                if name not in tensors:
                    value = values[name]
                    tensors[name] = torch.empty_strided(
                        value["shape"], value["stride"], dtype=getattr(torch, value["dtype"])
                    ).zero_()
            try:
                ready.run(tensors, [None if name is None else tensors[name] for name in operator["outputs"]])
            except (RuntimeError, TypeError) as error:
                if "alloc" in str(error):  # torch has no MemoryError
                    raise
                first = str(error).splitlines()[0]
                raise InputError(
                    f"operator {ready.name} is not supported ({first}); use other layers in the model"
                ) from error
        for name in set(names):
            left[name] -= 1
            if not left[name]:
                tensors.pop(name, None)


def _resident() -> int:
    gc.collect()
    trim_heap()
    return memory().resident


if __name__ == "__main__":
    leave(main)
