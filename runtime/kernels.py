"""What the operators of a model leave behind in a lean process: ``python -m runtime.kernels`` (JSON programs in, bytes out).

oneDNN builds a kernel for every shape of a matrix product and keeps it (about half a MiB each in bfloat16), and code is
mapped when it first runs. Both stay for the life of the process whatever the plan, as do the operators themselves, made
ready to be called (about a KiB each), so they belong to its floor.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import Any

from runtime import lean_torch
from runtime.process import child_environment, memory, trim_heap


def kernel_bytes(programs: list[dict[str, Any]], threads: int) -> int:
    """Resident bytes that stay once every operator of `programs` (profile programs as dicts) has run, above the floor."""
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "runtime.kernels"],
        input=json.dumps(programs),
        text=True,
        capture_output=True,
        env=child_environment(threads),
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SystemExit(f"the operators do not run in the runtime process: {last}")
    return int(json.loads(done.stdout)["bytes"])


def main() -> int:
    lean_torch.load()
    from runtime.warm import SIZE, prepare, warm

    warm(prepare(), SIZE)  # the state in which the floor is measured
    programs = json.load(sys.stdin)
    before = _resident()
    kept = [_run_once(program) for program in programs]
    sys.stdout.write(json.dumps({"bytes": max(0, _resident() - before)}) + "\n")
    del kept
    return 0


def _run_once(program: dict[str, Any]) -> list[Any]:
    """The operators, ready to be called."""
    import torch

    from runtime.compiled import compile_operator

    values = {value["name"]: value for value in program["values"]}
    left = {name: sum(name in (*op["inputs"], *op["outputs"]) for op in program["operators"]) for name in values}
    tensors: dict[str, Any] = {}
    ready = []
    for operator in program["operators"]:
        names = [name for name in (*operator["inputs"], *operator["outputs"]) if name is not None]
        if not operator["gathers"]:
            for name in names:
                if name not in tensors:
                    value = values[name]
                    tensors[name] = torch.empty_strided(
                        value["shape"], value["stride"], dtype=getattr(torch, value["dtype"])
                    ).zero_()
            outputs = [None if name is None else tensors[name] for name in operator["outputs"]]
            compile_operator(operator, values).run(tensors, outputs)
        ready.append(compile_operator(operator, values))  # one that holds no tensor
        for name in dict.fromkeys(names):
            left[name] -= 1
            if left[name] <= 0:
                tensors.pop(name, None)
    return ready


def _resident() -> int:
    gc.collect()
    trim_heap()
    return memory().resident


if __name__ == "__main__":
    sys.exit(main())
