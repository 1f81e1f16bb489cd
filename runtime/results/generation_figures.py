"""Measures what plans for answers need, in a process like the one that will answer, and keeps the figures in the
cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tightfit.planner.generation.answer_plan import GenerationPlan, plan_measuring
from tightfit.planner.generation.problem import Figures, Problem
from tightfit.profiles.measuring.cpu_load import OtherPrograms, crowded, taken_now
from tightfit.profiles.measuring.cpu_quota import quota_cores, slowdown
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.cache import cache_place, keep, kept
from tightfit.runtime.common.children import last_words, own_environment, start
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.interpreter import PACKAGE
from tightfit.runtime.common.option_names import on_the_command_line
from tightfit.runtime.common.processor import cpu_name, features
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.generation.job import GenerationJob
from tightfit.runtime.engine.generation.sizes import BLOCK_ELEMENTS, TAIL, TOKENS
from tightfit.runtime.engine.start.floor import IMPORT_SLACK_BYTES
from tightfit.runtime.engine.start.process import child_environment

CHILD = "tightfit.runtime.engine.generation.child"
CODE = (
    "runtime/common",
    "runtime/engine",
    "runtime/supervision",
    "planner/generation",
    "runtime/results/chat.py",
    "runtime/results/generation_figures.py",
)
"""Source files that determine the figures: a change in any of them invalidates the cached ones."""
VERSION = 1


def measured(
    problem: Problem, store: Path, fingerprint: str, front: list[str], *, called: str, threads: int, force: bool = False
) -> Figures:
    """The figures of a problem's decoder, whose packed weights lie in `store`: cached ones, or with `force`, and where
    other programs kept the cores busy then and do not now, measured now.

    `front` is the command line that prints the bytes which the process that shows answers takes, which is `called` so.
    Raises RunError if a process does not start or fails, InputError for a damaged store.
    """
    sampled = problem.sampling.temperature > 0
    small = replace(problem, pairs={}, prompt_tokens=GROUP + TAIL, answer_tokens=TOKENS, new_tokens=None)
    form = hashlib.sha256(json.dumps(small.form.job(), sort_keys=True, default=asdict).encode()).hexdigest()
    told = [VERSION, fingerprint, form, problem.cache_dtype, sampled, threads, quota_cores(), called, *_machine()]
    place = cache_place("generation", *told)
    earlier = None if force else kept(place, _read)
    if earlier and (not crowded(earlier.busy_cores, threads) or crowded(taken_now(threads), threads)):
        return earlier
    others = OtherPrograms()
    found, front_bytes = _of_decoder(small, store, threads), _of_front(front)
    figures = Figures(**found, front_bytes=front_bytes, busy_cores=others.taken(threads))
    if earlier and earlier.busy_cores <= figures.busy_cores:
        return earlier
    keep(place, json.dumps(asdict(figures)))
    return figures


def _read(content: bytes) -> Figures:
    try:
        return Figures(**json.loads(content))
    except TypeError as error:  # of another form
        raise ValueError(error) from error


def job_of(
    problem: Problem,
    plan: GenerationPlan,
    store: Path,
    *,
    cap_bytes: int,
    adapter: str | None = None,
    body: str = "model.",
    measure: bool = False,
) -> GenerationJob:
    """The job of the process that keeps to a plan; `adapter` is the path of the adapter's tensors."""
    return GenerationJob(
        store=str(store),
        device="cpu",
        **problem.form.job(),
        context=plan.context,
        pass_tokens=plan.pass_tokens,
        block_elements=BLOCK_ELEMENTS,
        pieces=plan.pieces,
        places=plan.places,
        staging=plan.staging,
        arena_bytes=plan.arena_bytes,
        cap_bytes=cap_bytes,
        budget_bytes=plan.budget_bytes,
        adapter=adapter,
        adapter_body=body,
        scales={matrix: pair.scale for matrix, pair in problem.pairs.items()},
        measure=measure,
        sampled=problem.sampling.temperature > 0,
    )


def _of_decoder(small: Problem, store: Path, threads: int) -> dict[str, Any]:
    """The figures of the process that computes, for a small problem."""
    plan = plan_measuring(small)
    os.sync()  # pages of freshly installed libraries cannot be released until they are written to disk
    # stderr goes into a file: nobody reads a pipe while results come in, and a full pipe would block the process for
    # ever.
    with tempfile.TemporaryDirectory(dir=_folder()) as folder, tempfile.TemporaryFile() as words:
        path = os.path.join(folder, "job")
        job_of(small, plan, store, cap_bytes=plan.budget_bytes, measure=True).write(path)
        read, write = os.pipe()
        with os.fdopen(read, "rb") as messages:
            try:
                process = start(
                    interpreter.command(
                        CHILD, path, "--messages", str(write), *["--on-command-line"] * on_the_command_line()
                    ),
                    stdout=subprocess.DEVNULL,
                    stderr=words,
                    pass_fds=(write,),
                    environment=child_environment(threads),
                )
            finally:
                os.close(write)
            lines: list[dict[str, Any]] = [json.loads(line) for line in messages]
        status = process.wait()
        spoken = last_words(words, f"exit status {status}")
    nothing = {"event": "error", "kind": "RunError", "message": spoken}
    last = [nothing, *lines][-1]
    if last["event"] != "measured":
        kind = InputError if last.get("kind") == "InputError" else RunError
        raise kind(f"measuring stopped: {last.get('message', last['event'])}")
    last["start_bytes"] += IMPORT_SLACK_BYTES
    longer = slowdown(threads, quota_cores())
    last["rates"] = {key: seconds * longer for key, seconds in last["rates"].items()}
    for name in ("group_seconds", "token_seconds", "key_seconds", "read_core_seconds_per_byte"):
        last[name] *= longer
    return {name: last[name] for name in Figures.__dataclass_fields__ if name in last}


def _of_front(command: list[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True, env=own_environment(), check=False)
    if done.returncode:
        said = last_words(done.stderr, f"exit status {done.returncode}")
        raise RunError(f"the process that shows the answers does not start: {said}")
    return int(done.stdout)


def _folder() -> Path:
    folder = cache_directory() / "generation"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _machine() -> Iterator[Any]:
    """What the figures depend on beside the model: machine, PyTorch, and the code that computes and measures."""
    yield from (version("torch"), cpu_name(), sorted(features()), os.environ.get("TIGHTFIT_TORCH"))
    environment = child_environment(1)
    yield sorted((name, Path(path).name) for name, path in environment.items() if name.startswith("TIGHTFIT"))
    for name in CODE:
        place = PACKAGE / name
        for path in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in (".py", ".c")):
            yield hashlib.sha256(path.read_bytes()).hexdigest()
