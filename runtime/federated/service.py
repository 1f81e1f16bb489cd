"""The server's side of a device's turn in split rounds: trains the upper layers for it, as a `tightfit run` under a cap
of its own.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import write_whole
from tightfit.runtime.engine.training.adapter import WEIGHTS
from tightfit.runtime.federated import aggregate
from tightfit.runtime.federated.device import MODULE, end, report_of, stage_arguments, start
from tightfit.runtime.federated.messages import Order
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds_folder import RoundsFolder
from tightfit.runtime.supervision.failure import last_message


@dataclass(frozen=True)
class ServerRun:
    """A run of the upper layers that is under way."""

    member: str
    folder: Path
    process: subprocess.Popen[bytes]
    began: float

    @classmethod
    def begun(
        cls, rounds: RoundsFolder, options: RoundOptions, member: str, order: Order, adapter: bytes, now: float
    ) -> Self:
        """Start the run for a device with this order; `adapter` is the file of the upper layers' part of the
        adapter.
        """
        folder = rounds.stage(member)
        given, out = folder / "given", folder / "run"
        shutil.rmtree(given, ignore_errors=True)
        write_whole(given / WEIGHTS, adapter)
        labels = str(rounds.labels(member))
        arguments = stage_arguments(options.fleet, member, order, options.meet, labels, str(given), str(out))
        command = interpreter.command(MODULE, *arguments, "--server", *["--no-cgroup"] * (not options.cgroup))
        return cls(member, folder, start(command, str(folder / "log")), now)

    def trained(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, now: float
    ) -> tuple[dict[str, Any], aggregate.Tensors] | None:
        """What is told of the run, and what it has trained; None: it is under way. Raises InputError or OSError where
        it has failed.
        """
        code = self.process.poll()
        if code is None:
            return None
        if code:
            said = last_message(self.folder / "log")
            raise InputError(f"the server's run for it ended with code {code}: {said}")
        out = self.folder / "run"
        peak = report_of(str(out))["peak_bytes"]["measured"]
        content = (out / "adapter" / WEIGHTS).read_bytes()
        tensors = aggregate.opened(content, shapes, rank, f"the upper part of {self.member}")
        return {"server_seconds": now - self.began, "server_peak_bytes": peak}, tensors

    def end(self) -> None:
        end(self.process)
