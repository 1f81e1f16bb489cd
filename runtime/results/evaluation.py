"""Evaluates a plan's model, with an adapter or as training would begin, in the capped process of a run.

It is a run of no steps: the same schedule, kernels and data files, and so the same figures to the bit as `tightfit run
--eval` reports for the same adapter, where samples share rows in both or in neither. Imports no PyTorch, as the process
that prepares a run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tightfit.planner.schema import Plan
from tightfit.profiles.option_fields import keywords_of
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.data.preparation import Preparation
from tightfit.runtime.results.place import adapter_folder
from tightfit.runtime.session.admission import check_kind, check_machine, check_schedule, check_seat, find_store
from tightfit.runtime.session.given_adapter import given_adapter
from tightfit.runtime.session.job_compiler import compile_job
from tightfit.runtime.session.launch import Data, prepare_data
from tightfit.runtime.session.options import EvaluationOptions, TrainingOptions
from tightfit.runtime.session.output import locked
from tightfit.runtime.session.settings import order_of, packing_note, settings_of
from tightfit.runtime.supervision.supervisor import supervise
from tightfit.runtime.supervision.training_process import RunOrder


@keywords_of(EvaluationOptions)
def evaluate(plan: Plan, data: Data, options: EvaluationOptions) -> dict[str, Any]:
    """The loss on `data` of a plan's model under the plan's budget, without a step; nothing is left on disk.

    `adapter` is the folder of an adapter, or of the run that left it; without it the model is as training would begin,
    which is the base. `data` and the other arguments are as of `tightfit.run`. Returns `loss` (of a decoder the mean
    over labelled tokens, of a module that over batches), `perplexity` (None for a module), `accuracy` (None without
    questions), `questions`, `records`, `seconds`, the memory as a run reports it, and `packing`, whether samples share
    rows. Raises what `tightfit.run` raises.
    """
    with prepared(plan, data, options) as order:
        return supervise(order, None, options.stages)


@contextmanager
def prepared(plan: Plan, data: Data, options: EvaluationOptions, *, counted: bool = False) -> Iterator[RunOrder]:
    """Prepare an evaluation (see `evaluate`) up to starting its training process; yields the order to carry out.

    Its files lie in a temporary folder, which is removed when the block ends. With `counted`, the memory of this
    process must fit the plan's budget too; otherwise CapError is raised.
    """
    check_kind(plan)
    check_seat(plan, None)
    preparation = Preparation(plan.budget_bytes) if counted else None
    check_machine(plan)
    check_schedule(plan)
    if plan.evaluate is None:
        raise InputError("the plan has no evaluation; plan the profile again")
    initial = None if options.adapter is None else given_adapter(plan, adapter_folder(Path(options.adapter).absolute()))
    store = find_store(plan, options.stages)
    if preparation:
        preparation.check("reading the plan")
    with temporary_folder() as directory, locked(directory) as lock:
        folder = directory / "data"
        folder.mkdir()
        records = prepare_data(
            plan,
            data,
            folder,
            "evaluate",
            options=options,
            seed=0,
            stages=options.stages,
            preparation=preparation,
        )
        settings = settings_of(
            plan,
            directory,
            store,
            TrainingOptions(packing=options.packing),
            data=records.name,
            evaluation=records.name,
            resume=False,
            adapter_given=initial,
        )
        compiled = compile_job(plan, settings | {"steps": 0})
        if preparation:
            preparation.check("preparing the data")
        packing = packing_note(plan, settings, options)
        yield order_of(plan, compiled, directory, lock, cgroup=options.cgroup, evaluates=True, packing=packing)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the cache, which is on a disk: files in memory would count as the run's. What killed evaluations left
    there is removed.
    """
    root = cache_directory() / "evaluations"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.iterdir():
            if not Path(f"/proc/{leftover.name.partition('-')[0]}").exists() and Path("/proc/self").exists():
                shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
    except OSError as error:
        raise RunError(f"{root}: {error.strerror}; set TIGHTFIT_CACHE to a folder that takes files") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
