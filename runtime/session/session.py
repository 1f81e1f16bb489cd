"""`Session`: lets a Python program's own training loop take the steps of a plan one at a time, in a training process.

The budget is the training process's. The program's own memory is not limited; the report states it (`program_bytes`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from tightfit.planner.report.summary import unfinished_update
from tightfit.planner.schema import Plan
from tightfit.profiles.option_fields import keywords_of
from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.common.run_folder import writing_to
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.training.session_protocol import ANSWERS, EVALUATE, FINISH, SAVE, STEP, ask
from tightfit.runtime.session.admission import check_evaluation, check_kind, check_machine, check_schedule, find_store
from tightfit.runtime.session.job_compiler import compile_job
from tightfit.runtime.session.options import SessionOptions, TrainingOptions, UpdateOptions
from tightfit.runtime.session.output import locked, remove, remove_prepared, to_be_replaced
from tightfit.runtime.session.python_batches import as_planned
from tightfit.runtime.session.settings import order_of, settings_of
from tightfit.runtime.supervision.report import build_report, write_report
from tightfit.runtime.supervision.training_process import started

CLOSED = "is over; go on with another one that resumes"


class Session:
    """Steps of a plan for a loop of your own::

        with Session(planned, out="out", lr=1e-3) as session:
            for inputs, labels in loader:
                loss = session.step(inputs, labels)
        module.load_state_dict(load_file("out/model/model.safetensors"))

    A batch is a module's tensors as it was profiled (inputs and targets where its factory gave a loss_fn), or a
    language model's input_ids and labels as transformers takes them (integers [rows, tokens], -100 where nothing is
    asked, padding on the right; fewer rows or tokens than planned will do). Learning rates, the order of the data and
    when to stop are the loop's. Forward, backward and update are one step of the plan: there is no gradient to look at
    between them.

    When the block ends without an error, the output folder holds what `tightfit.runtime.session.launch.run` leaves (the
    adapter or the model, a checkpoint, the report), and `report` is set. After an error in the loop, Ctrl-C included,
    the steps so far are saved in a checkpoint; another session with `resume` goes on from it, bit for bit, with step
    `taken` + 1. They are also saved if the loop's process gets SIGTERM or SIGKILL. A Ctrl-C during a step ends the
    session, even if the loop catches it.

    Entering raises InputError for a plan that does not fit model or machine, and InfeasibleError for one without a
    schedule. Any call raises CapError if the measured memory is above the budget, and RunError if the disk fills up or
    the training process dies.
    """

    _request_pipe = -1
    """descriptor of the pipe for requests to the training process; -1: closed"""

    @keywords_of(SessionOptions)
    def __init__(self, plan: Plan, options: SessionOptions) -> None:
        """Options as of `run`; `lr` is the learning rate of steps that are given none."""
        check_kind(plan)
        self.plan = plan
        self.directory = Path(options.out).absolute()
        self.taken = 0
        """number of steps taken so far, including those of the run that is resumed"""
        self.grad_norm: float | None = None
        """norm of the gradients of the latest update, all of them together, before they were clipped; None: the plan
        does not clip, or the latest step has made no update
        """
        self.report: dict[str, Any] | None = None
        """predicted and measured figures, once the session has ended without an error"""
        self._options = options
        self._stack = ExitStack()
        self._closed: str | None = "is not open; use it in a `with` block"
        """why no request can be made now, for messages; None: one can"""

    def __enter__(self) -> Self:
        plan, directory = self.plan, self.directory
        if plan.model.preference:
            raise InputError(
                f"the plan learns from pairs of answers ({plan.model.preference.loss}), which a Session does not take;"
                " run it on a file of pairs, or profile without a loss"
            )
        check_machine(plan)
        check_schedule(plan)
        store = find_store(plan, self._options.stages)
        with ExitStack() as stack:
            lock = stack.enter_context(locked(directory))
            replaced = to_be_replaced(directory, None, resume=self._options.resume, overwrite=self._options.overwrite)
            read, self._request_pipe = os.pipe()
            stack.callback(self._hang_up)
            with os.fdopen(read, "rb"):
                compiled = compile_job(
                    plan,
                    settings_of(
                        plan,
                        directory,
                        store,
                        TrainingOptions.of(dict(self._options)),
                        requests=read,
                        resume=self._options.resume,
                    ),
                )
                with writing_to(directory):
                    remove(replaced)
                    if not self._options.resume:
                        remove_prepared(directory)
                self._order = order_of(plan, compiled, directory, lock, cgroup=self._options.cgroup)
                self._child = stack.enter_context(started(self._order, requests=read))
            try:
                self.taken = self._wait_for("loaded")["step"]
            except BaseException:
                self._child.stop()
                raise
            self._stack, self._closed = stack.pop_all(), None
        return self

    def step(self, *batch: Tensor | Sequence[Tensor], lr: float | None = None) -> float:
        """Take the next step on a batch; returns its loss before the update, for a `mezo` plan the mean of its two
        losses.

        `lr` is the step's learning rate; if several steps make an update, that of the last one counts. Raises
        InputError for a batch or rate that is not allowed, after which the session can go on, and for a loss that is
        not finite, which ends it.
        """
        answer = self._answer(STEP, batch, None if lr is None else UpdateOptions(lr=lr).lr)
        self.taken += 1
        self.grad_norm = answer.get("grad_norm")
        loss: float = answer["loss"]
        return loss

    def loss(self, *batch: Tensor | Sequence[Tensor]) -> float:
        """The loss of a batch without a step, of a module as in eval mode; for a language model the mean over its
        labels.
        """
        check_evaluation(self.plan)
        loss: float = self._answer(EVALUATE, batch)["loss"]
        return loss

    def save(self) -> Path:
        """Make a checkpoint, from which ``resume`` goes on; returns its path.

        It holds ``model.safetensors`` for a module and the adapter for a language model.
        """
        return Path(self._answer(SAVE)["path"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            closed, self._closed = self._closed, CLOSED
            if error is None and closed is None:
                self._ask(FINISH)
                observed = self._child.end()
                directory = self._order.directory
                self.report = build_report(
                    self._order.planned,
                    observed,
                    directory,
                    enforced_by=self._child.enforced_by,
                    program_bytes=memory().peak,
                )
                write_report(directory, self.report)
                if self.taken % self.plan.accumulate:  # warned of last, since warnings may be turned into exceptions
                    told = unfinished_update(self.taken, self.plan.accumulate)
                    warnings.warn(
                        f"steps {self.taken}: {told}; what the last ones add waits in the checkpoint", stacklevel=2
                    )
                return
            self._hang_up()
            self._child.process.terminate()  # closing the pipe may not do: DataLoader workers may hold copies of it
            try:
                self._child.end()
            except TightfitError as told:
                if error is None:
                    raise
                if str(told) != str(error):
                    error.add_note(str(told))

    def _answer(
        self, kind: bytes, batch: Sequence[Tensor | Sequence[Tensor]] = (), lr: float | None = None
    ) -> dict[str, Any]:
        if self._closed is not None:
            raise RunError(f"the session {self._closed}")
        name = f"the batch of step {self.taken + 1}" if kind == STEP else "the batch"
        tensors = [] if kind == SAVE else as_planned(self.plan, batch, name)
        # Stays set until the answer has come: an interruption may leave half a request in the pipe.
        self._closed = (
            f"was interrupted after step {self.taken}, in the middle of what was asked; leave it, and go on with"
            " another one that resumes"
        )
        self._ask(kind, lr, tensors)
        message = self._wait_for(ANSWERS[kind])
        self._closed = None
        return message

    def _ask(self, kind: bytes, lr: float | None = None, tensors: Sequence[Tensor] = ()) -> None:
        with suppress(BrokenPipeError):  # the training process has ended; `_wait_for` raises what its end means
            ask(self._request_pipe, kind, lr, tensors)

    def _wait_for(self, event: str) -> dict[str, Any]:
        for message in self._child.messages():
            if message["event"] == event:
                return message
        self._closed = CLOSED
        self._child.end()
        raise RunError("the training process has ended; go on with another session that resumes")

    def _hang_up(self) -> None:
        if self._request_pipe >= 0:
            os.close(self._request_pipe)
            self._request_pipe = -1

    def __del__(self) -> None:
        # If the block was never left, closing the pipe makes the training process save and end.
        self._hang_up()
