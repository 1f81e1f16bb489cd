"""Kills random processes of a federated run, on devices and on the server, and says what became of its rounds.

    python tests/benchmarks/federated_kills.py [KILLS] [SEED]

Two devices train a tiny model; what is killed is a device's node, or on the server the command, the SuperLink or the
process of the rounds. Devices are started again after a moment, the server with --resume. It prints a line for each kill
and fails if an acknowledged round is lost or changed, or nothing is acknowledged for `STUCK_SECONDS`. Needs Flower.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "helpers")]

from federated_fleets import tiny_fleet

from tightfit.runtime.common import interpreter
from tightfit.runtime.federated.rounds_folder import RoundsFolder
from tightfit.runtime.session.fleet import free_port

STUCK_SECONDS = 600.0


class Trial:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        tiny_fleet(folder, steps=5, ranks=(4, 4), speeds=(1e-3, 1.4e-3), start_seconds=1.0)
        self.out = folder / "out"
        self.rounds = RoundsFolder(self.out)
        self.port = free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.acknowledged: dict[int, str] = {}

    def start(self, name: str) -> None:
        link = ["--insecure", "--no-cgroup"]
        words = ["join", self.folder / "fleet", "--member", name, "--superlink", f"127.0.0.1:{self.port}", *link]
        words += ["--data", "random", "-o", self.folder / f"work-{name}"]
        if name == "server":
            words = ["run", self.folder / "fleet", "--rounds", 10000, "-o", self.out, "--port", self.port, "--insecure"]
            words += ["--min", 2, "--timeout", 60, *(["--resume"] if self.rounds.rounds.exists() else [])]
        command = interpreter.command("tightfit.runtime.cli.main", "fleet", "federate", *map(str, words))
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": interpreter.python_path()},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> str:
        """Kill something; returns what."""
        what = self.draw.choice(["a", "b", "server", "superlink", "rounds"])
        number = {"rounds": self._rounds_process, "superlink": self._superlink}.get(what, lambda: None)()
        if what in self.running:
            number = self.running[what].pid
        if number is None:
            return f"{what} (not there)"
        os.kill(number, signal.SIGKILL)
        return what

    def _rounds_process(self) -> int | None:
        try:
            return int((self.out / "server.pid").read_text())
        except (OSError, ValueError):
            return None

    def _superlink(self) -> int | None:
        found = subprocess.run(
            ["pgrep", "-P", str(self.running["server"].pid)], capture_output=True, text=True, check=False
        )
        return next((int(line) for line in found.stdout.split()), None)

    def look(self) -> int:
        """Check that what was acknowledged is there as it was; returns the newest round."""
        lines = self.rounds.lines()
        numbers = [line["round"] for line in lines]
        if numbers != list(range(1, len(numbers) + 1)):
            raise SystemExit(f"rounds are missing: {numbers}")
        for line in lines:
            digest = hashlib.sha256(repr(sorted(line.items())).encode()).hexdigest()
            if self.acknowledged.setdefault(line["round"], digest) != digest:
                raise SystemExit(f"round {line['round']} has changed")
        if len(lines) < len(self.acknowledged):
            raise SystemExit(f"{len(self.acknowledged)} rounds were acknowledged, {len(lines)} are there")
        return len(lines)

    def keep_up(self) -> None:
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                self.start(name)

    def wait_for(self, number: int) -> None:
        limit = time.monotonic() + STUCK_SECONDS
        while self.look() < number:
            self.keep_up()
            if time.monotonic() > limit:
                raise SystemExit(f"stuck after round {self.look()}; see {self.folder}")
            time.sleep(0.5)


def main(kills: int, seed: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="federated-kills-"))
    trial = Trial(folder, seed)
    try:
        for name in ("server", "a", "b"):
            trial.start(name)
        trial.wait_for(1)
        for number in range(1, kills + 1):
            time.sleep(trial.draw.uniform(0, 8))
            before, began = trial.look(), time.monotonic()
            what = trial.kill()
            time.sleep(trial.draw.uniform(0, 3))
            trial.wait_for(before + 2)
            print(
                f"kill {number}: {what} after round {before}; two rounds later {time.monotonic() - began:.0f} s",
                flush=True,
            )
        print(f"{kills} kills, {trial.look()} rounds, none lost, none stuck")
    finally:
        for process in trial.running.values():
            process.terminate()
        for process in trial.running.values():
            process.wait(60)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
