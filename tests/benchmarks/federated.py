"""Federated rounds of four devices on one machine, beside one process that is trained on as many tokens.

    python tests/benchmarks/federated.py [--steps 192] [--rounds 8] [--budgets 320,400,569,800] [--lr 5e-4]
        [--split random,label] [--json FILE] [--write]

SmolLM2-135M on film reviews, in batches of 16 x 64 tokens. Each device trains on sentences of its own under a cap of
its own, which counts what Flower holds there; all take as many steps, together as many as the one process. `random`
deals the sentences out like cards; with `label` two devices get four fifths of the positive ones, the others of the
negative ones. Accuracy is on 200 held-out sentences. Needs Flower (`pip install 'tightfit[fleet]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import tables
from rich.table import Table

from examples.reviews import ANSWERS, SEQ, Reviews, fetch
from tightfit.planner.io import load_plan
from tightfit.runtime.common.interpreter import command, python_path
from tightfit.runtime.federated.rounds_folder import RoundsFolder

MIB = 1 << 20
BATCH = 16
MOSTLY = 0.8
"""share of one label's sentences that the devices of that label get"""
ALONE = "600MiB"
"""budget of the one process: its result is the same under any"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Federated rounds beside one process.")
    parser.add_argument("--steps", type=int, default=192, help="steps of the one process, and of all devices together")
    parser.add_argument("--rounds", type=int, default=8, help="rounds in which the devices take them")
    parser.add_argument("--budgets", default="320,400,569,800", help="MiB of each device")
    parser.add_argument("--lr", default="5e-4", help="learning rate")
    parser.add_argument("--split", default="random,label", help="how the sentences are dealt out")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/federated.md")
    given = parser.parse_args()
    budgets = [int(one) for one in given.budgets.split(",")]
    if given.steps % (given.rounds * len(budgets)):
        parser.error(f"{given.steps} steps in {given.rounds} rounds of {len(budgets)} devices: give a multiple")
    report, figures = tables.Report(), []
    with tempfile.TemporaryDirectory(prefix="federated-") as name:
        folder = Path(name)
        reviews = fetch(folder / "data")
        sizes = ["--batch", str(BATCH), "--seq", str(SEQ), "--threads", "1"]
        tightfit("profile", reviews.model, *sizes, "-o", folder / "profile.json")
        tightfit("plan", folder / "profile.json", "--memory", ALONE, "-o", folder / "alone.json")
        out = folder / "alone"
        evaluation = ["--eval", reviews.held_out, "--checkpoint-every", "0", "--json"]
        tightfit("run", folder / "alone.json", "--data", reviews.train, "--steps", given.steps, "--lr", given.lr, "-o", out, *evaluation)  # fmt: skip
        before, alone = (accuracy(out, when) for when in ("before", "after"))
        report.text(f"One process, {given.steps} steps: accuracy {before:.3f} before, {alone:.3f} after.")
        for split in given.split.split(","):
            place = folder / split
            fleet = Fleet(place, reviews, budgets, given.steps // given.rounds, split)
            fleet.run(folder / "profile.json", given.rounds, given.lr)
            check = place / "check"
            tightfit("run", folder / "alone.json", "--data", reviews.train, "--steps", 1, "--adapter", fleet.out / "adapter", "-o", check, *evaluation)  # fmt: skip
            found = accuracy(check, "before")
            figures.append(fleet.tell(report, given.rounds) | {"split": split, "accuracy": found, "alone": alone})
            report.text(
                f"Split {split}: accuracy {found:.3f} after {given.rounds} rounds of {given.steps // given.rounds} steps in all,"
                f" {100 * (found - alone):+.1f} points from one process."
            )
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    if given.write:
        print(report.write("federated", "Federated rounds", (__doc__ or "").split("\n\n", 2)[2]))


class Fleet:
    """Four devices, the description of their fleet and their data."""

    def __init__(self, place: Path, reviews: Reviews, budgets: Sequence[int], steps: int, split: str) -> None:
        place.mkdir()
        self.place, self.out = place, place / "out"
        self.budgets = {f"device{number}": budget for number, budget in enumerate(budgets)}
        (place / "data").mkdir()
        for name, lines in zip(self.budgets, dealt(reviews, len(budgets), split), strict=True):
            (place / "data" / f"{name}.jsonl").write_text("".join(lines))
        described = [f"steps = {steps}\n"]
        for name, budget in self.budgets.items():
            described.append(
                f'[[member]]\nname = "{name}"\nprofile = "../profile.json"\nmemory = "{budget}MiB"\nlink = "100Mbit/s"\n'
            )
        (place / "fleet.toml").write_text("".join(described))

    def run(self, profile: Path, rounds: int, lr: str) -> None:
        """Plan the fleet and take the rounds."""
        tightfit("fleet", "plan", self.place / "fleet.toml", "-o", self.place / "plan", "--time-limit", 300)
        data = f"{self.place}/data/{{member}}.jsonl"
        least = ["--min", len(self.budgets), "--timeout", 3600]
        tightfit("fleet", "federate", "run", self.place / "plan", "--rounds", rounds, "--data", data, "--lr", lr, "-o", self.out, *least)  # fmt: skip

    def tell(self, report: tables.Report, rounds: int) -> dict[str, Any]:
        """Print the devices' peaks and the rounds; returns the figures."""
        lines = RoundsFolder(self.out).lines()
        table = Table(
            "device", "budget, MiB", "peak: predicted", "measured at most", "Flower's part of it", "steps of a round"
        )
        members: dict[str, Any] = {}
        for name, budget in self.budgets.items():
            plan = load_plan(self.place / "plan" / f"{name}.plan.json")
            answers = [line["members"][name] for line in lines if name in line["members"]]
            flower = max(one["flower_bytes"] for one in answers)
            measured = max(one["peak_bytes"] + one["flower_bytes"] for one in answers)
            members[name] = {"budget": budget * MIB, "planned": plan.peak_bytes, "flower": flower, "measured": measured}
            table.add_row(
                name,
                str(budget),
                f"{(plan.peak_bytes + flower) / MIB:,.1f}",
                f"{measured / MIB:,.1f}",
                f"{flower / MIB:,.1f}",
                str(answers[0]["steps"]),
            )
        report.table(table)
        seconds = statistics.median(line["seconds"] for line in lines)
        report.text(f"{len(lines)} of {rounds} rounds, {seconds:.1f} s each (median), four devices on two cores.")
        return {"members": members, "seconds": seconds, "rounds": len(lines)}


def dealt(reviews: Reviews, devices: int, split: str) -> list[list[str]]:
    """The lines of each device's training data."""
    lines = reviews.train.read_text(encoding="utf-8").splitlines(keepends=True)
    if split == "random":
        return [lines[number::devices] for number in range(devices)]
    if split != "label":
        raise SystemExit(f"--split {split}: give random or label")
    result: list[list[str]] = [[] for _ in range(devices)]
    for label, answer in enumerate(ANSWERS):
        own = [line for line in lines if json.loads(line)["completion"] == answer]
        cut = int(MOSTLY * len(own))
        mostly = [number for number in range(devices) if number % 2 == label]
        others = [number for number in range(devices) if number % 2 != label]
        for part, names in ((own[:cut], mostly), (own[cut:], others)):
            for place, line in enumerate(part):
                result[names[place % len(names)]].append(line)
    return result


def accuracy(out: Path, when: str) -> float:
    return float(json.loads((out / "report.json").read_text())["evaluation"][when]["accuracy"])


def tightfit(*words: object) -> None:
    """Run a command of tightfit, whose answers go nowhere."""
    done = subprocess.run(
        command("tightfit.runtime.cli.main", *map(str, words)),
        env=os.environ | {"PYTHONPATH": python_path()},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"tightfit {' '.join(map(str, words))} ended with {done.returncode}")


if __name__ == "__main__":
    main()
