"""The folder of federated rounds: each round that has been added up, with its adapter, so that a killed server goes on.

``rounds/round-N/`` holds the fleet's adapter after round N, as PEFT loads it, and ``round.json``: who answered with
what. It is written under another name, forced to disk and renamed, and only then counts: a round that is acknowledged
is never lost. ``rounds.jsonl`` has the same records, a line for each round; adapters of older rounds are removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import sync_directory, write_whole
from tightfit.runtime.common.run_folder import writing_to
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.engine.training.adapter import CONFIG, WEIGHTS

LINES, REPORT, FAILED, SERVER, PID = "rounds.jsonl", "report.json", "failed.json", "server.json", "server.pid"
KEPT = 2
"""rounds whose adapters are kept"""


@dataclass(frozen=True, kw_only=True)
class SavedRound:
    """A round that has been added up; round 0 is the adapter that the first one starts from."""

    number: int
    record: dict[str, Any]
    adapter: bytes


class RoundsFolder:
    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(out)
        self.rounds = self.out / "rounds"

    def latest(self) -> SavedRound | None:
        """The last round that was acknowledged. Raises InputError where its files are damaged."""
        numbers = self._numbers()
        if not numbers:
            return None
        folder = self._of(numbers[-1])
        try:
            record = from_json((folder / "round.json").read_bytes())
            adapter = (folder / WEIGHTS).read_bytes()
            if record["round"] != numbers[-1]:
                raise ValueError(f"it is of round {record['round']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder}: damaged ({error}); remove this folder to go on from the round before"
            ) from error
        return SavedRound(number=numbers[-1], record=record, adapter=adapter)

    def save(self, saved: SavedRound, config: Mapping[str, Any]) -> None:
        """Acknowledge a round; `config` is the adapter's ``adapter_config.json``."""
        folder, part = self._of(saved.number), self.rounds / f".round-{saved.number}.part"
        with writing_to(self.out):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_whole(part / WEIGHTS, saved.adapter)
            write_whole(part / CONFIG, json.dumps(dict(config), indent=1) + "\n")
            write_whole(part / "round.json", json.dumps(saved.record) + "\n")
            sync_directory(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            sync_directory(self.rounds)
            for number in self._numbers()[:-KEPT]:
                shutil.rmtree(self._of(number))
            self.tell(saved)

    def tell(self, saved: SavedRound) -> None:
        """Bring ``rounds.jsonl`` up to this round."""
        earlier = [line for line in self.lines() if line["round"] < saved.number]
        lines = [*earlier, *([saved.record] if saved.number else [])]
        write_whole(self.out / LINES, "".join(json.dumps(line) + "\n" for line in lines))

    def lines(self) -> list[dict[str, Any]]:
        """The records of the rounds so far."""
        try:
            text = (self.out / LINES).read_text()
        except FileNotFoundError:
            return []
        return [from_json(line) for line in text.splitlines()]

    def finish(self, saved: SavedRound) -> Path:
        """Copy the last round's adapter to ``adapter``; returns the path."""
        part, adapter = self.out / ".adapter.part", self.out / "adapter"
        with writing_to(self.out):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for name in (WEIGHTS, CONFIG):
                write_whole(part / name, (self._of(saved.number) / name).read_bytes())
            shutil.rmtree(adapter, ignore_errors=True)
            part.rename(adapter)
        return adapter

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for name in (LINES, REPORT, FAILED, SERVER, PID):
            (self.out / name).unlink(missing_ok=True)
        for folder in (self.rounds, self.out / "adapter"):
            shutil.rmtree(folder, ignore_errors=True)

    def labels(self, member: str) -> Path:
        """The file of the labels that a device has sent."""
        return self.out / "labels" / f"{member}.records"

    def stage(self, member: str) -> Path:
        """The folder of the server's runs for a device."""
        return self.out / "stages" / member

    def _of(self, number: int) -> Path:
        return self.rounds / f"round-{number}"

    def _numbers(self) -> list[int]:
        if not self.rounds.is_dir():
            return []
        names = [path.name.removeprefix("round-") for path in self.rounds.glob("round-*")]
        return sorted(int(name) for name in names if name.isdecimal())
