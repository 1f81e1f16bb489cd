"""Profiles a model, plans its step and runs the plan, for programs: `tightfit train` without its files."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tightfit.planner.plan import plan
from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.api import profile
from tightfit.profiles.sources.lookup import names_module, traced_seq
from tightfit.runtime.common.units import parse_size
from tightfit.runtime.data.sequence import check_files, choose_seq
from tightfit.runtime.session.beforehand import check_beforehand
from tightfit.runtime.session.launch import Data, run
from tightfit.runtime.session.options import RunOptions
from tightfit.runtime.session.output import locked, tokens_kept
from tightfit.runtime.session.rehearsal import rehearse
from tightfit.runtime.supervision.spare_memory import spare_memory

STAGES: tuple[Callable[..., Any], ...] = (profile, plan, run)


def train(
    model: str,
    data: Data,
    out: str | os.PathLike[str],
    *,
    memory: int | str = "auto",
    seq: int | None = None,
    eval_data: Data | None = None,
    truncate: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train `model` on `data` in a budget, and return the report, which is also written to ``out/report.json``.

    `memory` is the budget: bytes, a size such as "600MiB", or "auto", what the machine can spare now (it does not count
    what this program holds already: `tightfit.runtime.supervision.spare_memory`). `seq` is by default as long as the
    longest sample needs (`tightfit.runtime.data.sequence`). `options` are those of `profile`, `plan` and `run`, each of
    which gets what it takes: `steps` or `epochs` has to be there, `adapter` goes to both that have it.

    Raises TypeError for an option that none of them takes, and what they raise; InfeasibleError, with the smallest
    budget, if no plan fits. This program stays alive beside the run, and its memory is its own, as with `run`.
    """
    options |= {"eval_data": eval_data, "truncate": truncate}
    known = {name for stage in STAGES for name in inspect.signature(stage).parameters} - {"tokens"}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"train() has no option {unknown[0]!r}; its options are those of profile, plan and run")
    check_beforehand(model, data, planning=PlanOptions.of(options), training=RunOptions.of(options | {"out": out}))
    budget = spare_memory()[0] if memory == "auto" else parse_size(str(memory))
    directory = Path(out).absolute()
    with tokens_kept(directory) as tokens:
        with locked(directory):
            if not names_module(model):
                train_files = os.fspath(cast("str", data))
                held_out = None if eval_data is None else os.fspath(cast("str", eval_data))
                check_files(train_files, held_out)
                if seq is None:
                    seq = traced_seq(model, options.get("bundle"))
                seq, _ = choose_seq(
                    model,
                    train_files,
                    held_out,
                    truncate=truncate,
                    budget=budget,
                    columns=options.get("columns"),
                    keep=tokens,
                    pairs=options.get("loss") is not None,
                    seq=seq,
                    stages=options.get("stages"),
                )
            if seq is not None:
                options["seq"] = seq
            measured = profile(model, **_options_of(profile, options))
            planned = rehearse(measured, budget, **_options_of(plan, options))
        return run(planned, data, out=directory, **_options_of(run, options), tokens=tokens)


def _options_of(stage: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that a stage takes; of `progress`, the run alone."""
    names = set(inspect.signature(stage).parameters) - ({"progress"} if stage is not run else set())
    return {name: value for name, value in options.items() if name in names}
