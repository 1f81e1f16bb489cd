"""Puts one fault after another into the code, and says which quick test fails by it: what `make test` has to catch.

    python tests/benchmarks/faults.py [--only NAME,...]

Each fault replaces a line of a file while the quick tests of some folders run, up to the first that fails; the file is
then as it was. A file with changes that are not committed is left alone. Exits with 1 if a fault is caught by no test.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`right`, which stands once in `file`, becomes `wrong`; `tests` are the folders or files whose quick tests are
    run.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


ENGINE = ("tests/runtime/engine",)
FAULTS = (
    Fault(
        name="an operator does not wait for its inputs from the disk",
        file="runtime/engine/training/executor.py",
        right="                if arriving:\n                    for number in operator.inputs:",
        wrong="                if False:\n                    for number in operator.inputs:",
        tests=ENGINE,
    ),
    Fault(
        name="a tensor is written to disk before the device has copied it",
        file="runtime/engine/training/executor.py",
        right="self.device.get(at, host, after).wait()",
        wrong="self.device.get(at, host, after)",
        tests=ENGINE,
    ),
    Fault(
        name="the simulator counts no workspace",
        file="planner/simulation/replay.py",
        right="        return operator.workspace_bytes",
        wrong="        return 0",
        tests=("tests/planner/simulation",),
    ),
    Fault(
        name="Lion's steps have the other sign",
        file="runtime/engine/kernels/optimizer.py",
        right="sign_(), alpha=-rate)",
        wrong="sign_(), alpha=rate)",
        tests=ENGINE,
    ),
    Fault(
        name="dropout draws the same numbers in every step",
        file="runtime/engine/device/draws.py",
        right='identity = f"{self.seed}:{self.step}:{self.layer}:{site}"',
        wrong='identity = f"{self.seed}:{self.layer}:{site}"',
        tests=("tests/runtime/engine", "tests/whole/test_lora_dropout.py", "tests/whole/test_own_dropout.py"),
    ),
    Fault(
        name="an output folder is never locked",
        file="runtime/session/output.py",
        right="            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            return True",
        wrong="            return True",
        tests=("tests/runtime/session",),
    ),
    Fault(
        name="the meter lets a process pass its cap",
        file="runtime/engine/device/meter.py",
        right="if instruction % EVERY == 0 and self._resident() > self.cap_bytes:",
        wrong="if instruction % EVERY == 0 and self._resident() > 2 * self.cap_bytes:",
        tests=ENGINE,
    ),
    Fault(
        name="a run resumes under other conditions",
        file="runtime/engine/training/checkpoint.py",
        right="        if made.get(key) != value:",
        wrong="        if False:",
        tests=("tests/runtime/engine", "tests/runtime/session"),
    ),
    Fault(
        name="the service asks for no token",
        file="planner/service/http/guard.py",
        right='if self._token is not None and path != "/"',
        wrong='if False and path != "/"',
        tests=("tests/planner/service",),
    ),
    Fault(
        name="an updated state may be dropped without a copy on disk",
        file="planner/simulation/replay.py",
        right="        if name in self.dirty:",
        wrong="        if False:",
        tests=("tests/planner/simulation",),
    ),
    Fault(
        name="a bound is 2 % above what is proven",
        file="planner/solve/model_search.py",
        right="attempt.bound = max(attempt.bound, relaxed.bound(self.relaxed.proven(attempt.limit)))",
        wrong="attempt.bound = max(attempt.bound, 1.02 * relaxed.bound(self.relaxed.proven(attempt.limit)))",
        tests=("tests/planner/solve", "tests/planner/formulation"),
    ),
    Fault(
        name="a forward tensor that was fetched is read at the offset of another",
        file="runtime/engine/training/executor.py",
        right="self._submit(self._fetch, number, at, host, self.extents[number], after)",
        wrong="self._submit(self._fetch, number, at, host, self.extents[number] ^ 4096, after)",
        tests=ENGINE,
    ),
)


def caught_by(fault: Fault) -> str | None:
    """The quick test that fails where the fault is in the code; None: no test does."""
    path = ROOT / fault.file
    before = path.read_text()
    if before.count(fault.right) != 1:
        sys.exit(
            f"{fault.file}: {fault.right!r} stands {before.count(fault.right)} times in it, not once; adapt the fault"
        )
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", fault.file], check=False, cwd=ROOT).returncode:
        sys.exit(f"{fault.file} has changes; commit them first")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *fault.tests]
    try:
        path.write_text(before.replace(fault.right, fault.wrong))
        output = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True).stdout
    finally:
        path.write_text(before)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed[1] if failed else None


def main() -> None:
    """Print a line for each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[""], help="words of the faults' names")
    given = parser.parse_args()
    missed = 0
    for fault in FAULTS:
        if any(words in fault.name for words in given.only):
            test = caught_by(fault)
            missed += test is None
            print(f"{fault.name}: {f'caught by {test}' if test else 'CAUGHT BY NO TEST'}", flush=True)
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
