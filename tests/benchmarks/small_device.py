"""From nothing cached to an adapter inside a memory cgroup without swap: ``make bench-small`` prints, stage by stage,
what was held, how often the limit was met, and whether something was killed.

The cgroup holds the whole command and has the budget as its limit. The bundle comes from a ``service`` (on this
machine, outside the cgroup, which also plans) or is a ``folder`` (`tightfit prepare`, outside, has made it).
``ARGS='--models smollm2 --bundles folder'`` for one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1])]

import tables

from examples import reviews
from tightfit.runtime.common.interpreter import command, python_path
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.supervision.cgroup import MemoryCgroup

CONFIGS = FOLDER.parents[1] / "examples" / "models"
BUDGETS = {"smollm2": 256, "qwen2.5-0.5b": 320, "qwen2.5-3b": 662}
"""model -> MiB"""
BUNDLES = ("service", "folder")
SEQ = 64
LOOK_SECONDS = 0.02
TRAINING = "training"


@dataclass
class Observed:
    """A command inside its cgroup."""

    code: int = 0
    seconds: float = 0.0
    kills: int = 0
    touches: dict[str, int] = field(default_factory=dict)
    """stage -> how often a page was wanted above the limit"""
    words: str = ""


def main(
    models: Annotated[str, typer.Option(help="Of smollm2, qwen2.5-0.5b and qwen2.5-3b.")] = "smollm2",
    bundles: Annotated[str, typer.Option(help="Of service and folder.")] = ",".join(BUNDLES),
    limit: Annotated[int | None, typer.Option(help="MiB; default: the model's goal.")] = None,
    steps: int = 6,
    extra: Annotated[str, typer.Option(help="Further words of `tightfit train`.")] = "",
) -> None:
    """Train each model with a bundle of each kind in its limit, and print one table."""
    table = Table(*("model", "MiB", "bundle", "stage", "predicted", "held", "limit met", "seconds of all", "end"))
    for name in models.split(","):
        budget = limit or BUDGETS[name]
        for bundle in bundles.split(","):
            with tempfile.TemporaryDirectory() as folder:
                _add_rows(table, name, budget, bundle, steps, Path(folder), extra.split())
    report = tables.Report(width=130)
    report.table(table)


def _add_rows(table: Table, name: str, budget: int, bundle: str, steps: int, folder: Path, extra: list[str]) -> None:
    out = folder / "out"
    model, data = _model(name)
    words = [
        model,
        "--data",
        data,
        "--memory",
        f"{budget}MiB",
        f"--seq={SEQ}",
        f"--steps={steps}",
        "-o",
        str(out),
        *extra,
    ]
    with _device(bundle, words, folder) as environment:
        observed = carried_out(["train", *words, "--json"], environment, budget * MIB)
    report = json.loads(observed.words)["report"] if observed.code == 0 else {}
    held = report.get("stage_bytes") or {}
    end = "adapter" if observed.code == 0 else f"exit {observed.code}: {observed.words.strip().splitlines()[-1:]}"

    def row(stage: str, figure: dict[str, int] | None, touches: int, seconds: str = "", end: str = "") -> None:
        sizes = [format_size(figure[name]) if figure and figure[name] else "–" for name in ("predicted", "measured")]
        table.add_row(name, str(budget), bundle, stage, *sizes, str(touches), seconds, end)

    for stage in dict.fromkeys([*held, *observed.touches]):
        if stage != TRAINING:
            row(stage, held.get(stage), observed.touches.get(stage, 0))
    killed = f", {observed.kills} killed" if observed.kills else ""
    seconds = f"{observed.seconds:.0f}"
    row(TRAINING, report.get("peak_bytes"), observed.touches.get(TRAINING, 0), seconds, end + killed)
    if saved := report.get("phases", {}).get("checkpoint"):
        row("training, until a checkpoint was saved", saved["peak_bytes"], 0)


def _model(name: str) -> tuple[str, str]:
    """(what to train, its data)."""
    if name != "smollm2":
        return str(CONFIGS / name / "config.json"), "random"
    fetched = reviews.fetch()
    return str(fetched.model), str(fetched.train)


@contextmanager
def _device(bundle: str, words: list[str], folder: Path) -> Iterator[dict[str, str]]:
    """The environment of the device, with an empty cache; what works elsewhere works meanwhile, or has worked
    before.
    """
    device = os.environ | {"PYTHONPATH": python_path(), "TIGHTFIT_CACHE": str(folder / "cache")}
    elsewhere = device | {"TIGHTFIT_CACHE": str(folder / "elsewhere")}
    if bundle == "folder":
        made = str(folder / "model.tight")
        prepare = [*command("tightfit.runtime.cli.main", "prepare"), words[0], f"--seq={SEQ}", "-o", made]
        subprocess.run(prepare, env=elsewhere, check=True, capture_output=True)
        words += ["--bundle", made]
        yield device
        return
    port = "8765"
    serve = [
        *command("tightfit.runtime.cli.main", "serve"),
        "--no-example",
        "--port",
        port,
        "--data-dir",
        str(folder / "service"),
    ]
    with subprocess.Popen(serve, env=elsewhere, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as service:
        try:
            _wait_for(f"http://127.0.0.1:{port}/healthz")
            words += ["--server", f"http://127.0.0.1:{port}"]
            yield device
        finally:
            service.terminate()


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url}: no answer")


def carried_out(words: list[str], environment: dict[str, str], limit: int) -> Observed:
    """Run a command of tightfit inside a cgroup of its own."""
    group = MemoryCgroup.create(limit)
    if group is None:
        raise SystemExit("no memory cgroup can be made here: run as root on Linux")
    observed, met = Observed(), group.path / "memory.failcnt"
    begun, stage, before = time.monotonic(), "reading the data", 0
    program = group.enter([*command("tightfit.runtime.cli.main"), *words])
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(program, env=environment, stdout=output, stderr=errors)
        while child.poll() is None:
            time.sleep(LOOK_SECONDS)
            count = int(met.read_text()) if met.exists() else 0
            observed.touches[stage] = observed.touches.get(stage, 0) + count - before
            stage, before = _stage(child.pid) or stage, count
        observed.code, observed.seconds = child.returncode, time.monotonic() - begun
        for file in (output, errors):
            file.seek(0)
        observed.words = output.read() if observed.code == 0 else errors.read()
    observed.kills = group.oom_kills()
    group.remove()
    return observed


def _stage(process: int) -> str | None:
    """What the command does now."""
    from tightfit.runtime.cli.course import NAMES

    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    at = next((word.removeprefix("--at=") for word in line if word.startswith("--at=")), None)
    if at is not None:
        return NAMES.get(at)
    if any("supervision.supervisor" in word for word in line):
        return None
    return TRAINING if "run" in line else None


if __name__ == "__main__":
    typer.run(main)
