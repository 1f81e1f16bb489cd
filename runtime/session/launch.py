"""Runs a plan to its end: checks it, prepares data and job, has the training process carry it out under the cap,
reports.
"""

from __future__ import annotations

import itertools
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tightfit.planner.schema import Plan
from tightfit.profiles.option_fields import keywords_of
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.common.run_folder import writing_to
from tightfit.runtime.data.preparation import Preparation
from tightfit.runtime.engine.training.batches import open_batches
from tightfit.runtime.session.admission import (
    check_evaluation,
    check_fleet_options,
    check_kind,
    check_machine,
    check_schedule,
    check_seat,
    check_steps,
    find_store,
)
from tightfit.runtime.session.beforehand import check_data, check_held_out
from tightfit.runtime.session.fleet import Membership
from tightfit.runtime.session.given_adapter import given_adapter
from tightfit.runtime.session.job_compiler import compile_job
from tightfit.runtime.session.options import DataOptions, RunOptions, TrainingOptions
from tightfit.runtime.session.output import check_reached, finished_report, locked, remove, staged, to_be_replaced
from tightfit.runtime.session.settings import (
    order_of,
    packing_note,
    packs,
    receives_batches,
    settings_of,
)
from tightfit.runtime.supervision.supervisor import supervise
from tightfit.runtime.supervision.training_process import RunOrder

if TYPE_CHECKING:
    import torch

Data: TypeAlias = "str | os.PathLike[str] | Iterable[Sequence[torch.Tensor | Sequence[torch.Tensor]]]"


@keywords_of(RunOptions)
def run(plan: Plan, data: Data, options: RunOptions) -> dict[str, Any]:
    """Train `steps` steps, or `epochs` times the data, as planned, under the plan's budget; returns the report, also
    written to ``out/report.json``.

    `steps` must be a multiple of the steps of an update; those of `epochs` are rounded up to one. `data` is a file or
    directory of samples (`tightfit.runtime.data.samples`), ``random``, or, for a module, an iterable of batches (tuples
    of tensors); a server that trains a side network has no use for it. Batches are written to disk before training: all
    of an iterable that has a length, the first `steps` of one that has none. Each step takes the next batch, starting
    again after the last. `columns` says what the data call a sample's parts: ``{"prompt": "question"}``. With
    `packing`, samples of a language model share the rows of batches, in training and evaluations, and positions and
    attention stay inside each; models that do not allow it say why in the report, and have a row for each sample. With
    `eval_data`, which must end, the model is evaluated before and after training, and with `eval_every` also after
    every so many steps, or epochs (``"1 epoch"``); `keep_best` then keeps the result of the best evaluation in
    ``out/best``, and `early_stopping` ends the run after so many evaluations in a row that were no better than the
    best. `cgroup=False` leaves enforcing the cap to the training process's own meter. With `resume`, a run that has
    taken all `steps` already returns its report and changes nothing, except that it evaluates on other `eval_data`.
    `member` (`tightfit.runtime.session.fleet.membership`) says which member of a fleet runs its plan here; `steps` then
    counts the micro-batches of all members. `adapter` is a folder with the adapter that training starts from, as PEFT
    has it, with the optimizer's states at zero; without it, training starts from PEFT's initial values. `tokens` is for
    `tightfit.runtime.session.train`: a folder in which it may have kept these data as tokens, removed once they are
    prepared.

    Raises InputError for a plan that does not fit model, data or machine, InfeasibleError for a plan without a
    schedule, CapError if the measured memory is above the budget, RunError if the disk fills up, the training process
    dies or the run is interrupted; the message then says where the last checkpoint lies.

    In the main thread, Ctrl-C interrupts it, and so do SIGTERM and SIGHUP unless the program handles them: the step is
    finished and saved, and RunError is raised with `interrupted` set. The program should then end, since nothing else
    sees the signal. A signal handler of the program's own stays in place; if it, `progress` or `stages` raises, the run
    saves and ends.
    """
    with prepared(plan, data, options) as ready:
        return supervise(ready, options.progress, options.stages) if isinstance(ready, RunOrder) else ready


@contextmanager
def prepared(
    plan: Plan, data: Data, options: RunOptions, *, counted: bool = False, traced_steps: Sequence[int] = ()
) -> Iterator[RunOrder | dict[str, Any]]:
    """Prepare a run (see `run`) up to starting its training process: check plan and machine, write data and job to
    `out`.

    Yields the order to carry out, or the report of a run that has taken all its steps already. `out` is locked while
    the block runs. With `counted`, the memory of this process must fit the plan's budget too; otherwise CapError is
    raised before anything of an earlier run is replaced. `traced_steps`: as of `settings_of`.
    """
    check_kind(plan)
    member: Membership | None = options.member
    seat = member.seat if member else None
    check_seat(plan, seat)
    preparation = Preparation(plan.budget_bytes) if counted else None
    directory = Path(options.out).absolute()
    steps = options.steps
    options.check_end()
    if seat:
        check_fleet_options(options)
    check_held_out(options)
    if steps is not None:
        check_steps(plan, steps)
    data_name = os.fspath(data) if isinstance(data, str | os.PathLike) else "the batches given"
    if not isinstance(data, str | os.PathLike) and _length(data) is None:
        if steps is None or isinstance(options.eval_every, str):
            raise InputError(
                "the batches given have no length, so that nobody knows what an epoch is; give a list, or steps"
            )
        data_name += f" (the first {steps} of an iterator without a length; give a list to go on with more steps)"
        data = itertools.islice(data, steps)
    check_machine(plan)
    check_schedule(plan)
    if options.eval_data is not None:
        check_evaluation(plan)
    initial = None if options.adapter is None else given_adapter(plan, Path(options.adapter).absolute())
    store = find_store(plan, options.stages)
    if preparation:
        preparation.check("reading the plan")
    with locked(directory) as lock, staged(directory) as staging:
        replaced = to_be_replaced(
            directory, steps, resume=options.resume, overwrite=options.overwrite, elsewhere=seat is not None
        )
        write_data = partial(
            prepare_data,
            plan,
            options=options,
            seed=options.seed,
            stages=options.stages,
            preparation=preparation,
            tokens=options.tokens,
        )
        train = None if receives_batches(plan) else write_data(data, staging, "train")
        evaluation = (
            None if options.eval_data is None or train is None else write_data(options.eval_data, staging, "evaluate")
        )
        if options.tokens is not None:
            shutil.rmtree(options.tokens, ignore_errors=True)
        epoch_steps = _epoch_steps(plan, train, options) if train else None
        if train is None and options.epochs is not None:
            raise InputError(
                f"{spelled('epochs')} {options.epochs:g}: a server has no data, of which an epoch would be; give"
                f" {spelled('steps')}"
            )
        in_steps = options.over(epoch_steps, of_update=seat.micro_batches if seat else plan.accumulate)
        if options.resume and steps is None and in_steps.steps is not None:
            check_reached(directory, in_steps.steps)
        settings = settings_of(
            plan,
            directory,
            store,
            in_steps,
            epoch_steps=epoch_steps,
            data=train.name if train else None,
            evaluation=evaluation.name if evaluation else None,
            resume=options.resume,
            traced_steps=traced_steps,
            seat=seat,
            adapter_given=initial,
        )
        finished, evaluated = None, False
        if options.resume and seat is None and train:  # the members of a fleet first find out together what is done
            finished, evaluated = finished_report(directory, settings, train, evaluation, data_name)
        if finished and evaluated:
            yield finished
            return
        compiled = compile_job(plan, settings)
        if preparation:
            preparation.check("preparing the data")
        remove(replaced)  # only now, so that an earlier run is kept if the plan or the data are refused
        with writing_to(directory):
            (directory / "data").mkdir(exist_ok=True)
            for file in staging.iterdir():
                file.replace(directory / "data" / file.name)
            staging.rmdir()  # already here, so that a run that is killed later does not leave the empty folder behind
        figures = member.figures if member else None
        packing = packing_note(plan, settings, options)
        yield order_of(
            plan, compiled, directory, lock, cgroup=options.cgroup, finished=finished, fleet=figures, packing=packing
        )


def prepare_data(
    plan: Plan,
    data: Data,
    folder: Path,
    purpose: Any,
    options: DataOptions,
    *,
    seed: int,
    stages: Progress | None,
    preparation: Preparation | None,
    tokens: Path | None = None,
) -> Path:
    """Write the data as a record or batch file in `folder`; returns its path. `purpose` is "train" or "evaluate"."""
    from tightfit.runtime.data.tokenization import tokens_file
    from tightfit.runtime.data.tokenizing import tokenise

    check_data(data, options.columns if purpose == "train" else None, module=plan.model.kind == "module")
    if plan.model.kind == "module":
        return _prepare_module(plan, data, folder, purpose, stages)
    assert isinstance(data, str | os.PathLike)
    from tightfit.profiles.sources import lookup

    assert plan.seq is not None
    text = os.fspath(data)
    kept_tokens = None if tokens is None else tokens_file(tokens, purpose)
    if kept_tokens is not None and not kept_tokens.exists():
        kept_tokens = None
    return tokenise(
        text,
        plan.model.source,
        folder,
        seq=plan.seq,
        vocab_size=plan.model.config["vocab_size"],
        purpose=purpose,
        columns=options.columns,
        too_long="truncate" if options.truncate else "refuse",
        seed=seed,
        pairs=plan.model.preference is not None,
        warn=lambda message: warnings.warn(message, UserWarning, stacklevel=2),
        report=stages,
        budget_bytes=preparation.budget_bytes if preparation else None,
        kept=kept_tokens,
        positions=lookup.positions_of(plan.model.config),
    )


def _epoch_steps(plan: Plan, prepared: Path, options: TrainingOptions) -> float:
    """The number of steps in which a run goes through the prepared data once."""
    loss = plan.model.preference.loss if plan.model.preference else None
    batches = open_batches(str(prepared), options.seed, packing=packs(plan, options), loss=loss)
    try:
        return batches.epoch_steps(plan.batch, options.epochs or 1.0)
    finally:
        batches.close()


def _length(batches: Iterable[object]) -> int | None:
    """Number of batches; None if unknown. A DataLoader always has `__len__`, which raises if its data set has no
    length.
    """
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _prepare_module(plan: Plan, data: Data, folder: Path, purpose: str, stages: Progress | None) -> Path:
    """Write the batches of a module, those given or its factory's sample batch, as a batch file; returns its path."""
    from tightfit.profiles.sources.factory import build_module
    from tightfit.runtime.engine.training.batches import write_batches
    from tightfit.runtime.session.python_batches import as_planned

    if isinstance(data, str | os.PathLike):
        _, sample, inputs = build_module(plan.model.source)
        data = [sample if inputs is None else (sample[:inputs], sample[inputs:])]
    length = _length(data)

    def checked() -> Iterator[list[torch.Tensor]]:
        for number, item in enumerate(data):
            batch = as_planned(plan, item, f"batch {number}")
            if stages:
                stages("writing batches down", number + 1, length or number + 1)
            yield batch

    return Path(write_batches(str(folder / f"{purpose}.batches"), checked()))
