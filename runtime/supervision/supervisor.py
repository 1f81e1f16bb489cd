"""The supervisor: the process that starts a run's training process, shows its progress and writes the report.

    python -m tightfit.runtime.supervision.supervisor ORDER SHOW    supervises a run; the JSON files of a RunOrder and
    of
                                                                    SupervisorSettings
    python -m tightfit.runtime.supervision.supervisor --measure     prints the bytes of memory that a supervisor takes

Its memory counts against the run's budget; so, while the training process lives, it imports the standard library only.
`tightfit run` becomes this process once plan and data are prepared (`hand_over`). A program that calls
`tightfit.runtime.session.launch.run` or opens a Session supervises the training process itself, and that program's
memory does not count.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.children import start
from tightfit.runtime.common.errors import RunError, TightfitError
from tightfit.runtime.common.interrupts import ThirdInterrupt, relayed_signals
from tightfit.runtime.common.option_names import named_as, on_command_line
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.supervision.cgroup import MemoryCgroup
from tightfit.runtime.supervision.contention import Contention, usage_of
from tightfit.runtime.supervision.failure import fail, failure_of
from tightfit.runtime.supervision.progress import TrainingProgress
from tightfit.runtime.supervision.report import (
    ALONE,
    LATEST_STEPS,
    ObservedRun,
    already_done,
    build_report,
    evaluation_report,
    write_report,
)
from tightfit.runtime.supervision.training_process import RunOrder, TrainingProcess, started

StepProgress = Callable[[int, float, float, int, int, int | None], None]
"""progress(step, loss, seconds, resident bytes, peak bytes, tokens), called after every step. Steps count from 1;
resident and peak bytes are the training process's; tokens are those of the step without padding, None for a module."""
OnNotice = Callable[[str], None]
"""on_notice(text), called with what people should know about how the run goes."""
OnEvaluation = Callable[[dict[str, Any]], None]
"""on_evaluation(message), called with the training process's message about each evaluation between the steps."""


@dataclass(frozen=True, kw_only=True)
class SupervisorSettings:
    """What the supervisor of `tightfit run` needs beside the order: how to show the run, and the cgroup that it is
    in.
    """

    tokens_per_step: int | None
    as_json: bool
    debug: bool
    preparation_bytes: int
    """VmHWM of the process that prepared the run"""
    group: tuple[str, int] | None
    """path and version (1 or 2) of the cgroup that this process was put into"""
    home: str | None
    """path of the cgroup that it was in before, to which it returns at the end"""
    output: str | None = None
    """path for the result of an evaluation; None: it is printed alone"""
    stages: str | None = None
    """JSON of what was done before the run, to be printed beside the report with `as_json`"""
    stage_bytes: dict[str, list[int | None]] | None = None
    """stage before the run -> bytes that it was predicted to hold, if that was predicted, and that it has held; for the
    report
    """
    then: list[str] | None = None
    """of a rehearsal: the command line that this process becomes when the run has ended, however it did"""


def supervise(
    order: RunOrder,
    progress: StepProgress | None = None,
    stages: Progress | None = None,
    *,
    on_evaluation: OnEvaluation | None = None,
    on_notice: OnNotice | None = None,
    group: MemoryCgroup | None = None,
    counted: bool = False,
    preparation_bytes: int | None = None,
    stage_bytes: dict[str, list[int | None]] | None = None,
) -> dict[str, Any]:
    """Start the training process, follow it to its end and write the report; returns the report.

    `counted`: whether this process's memory counts against the budget; it is then in `group`, if there is one.
    `preparation_bytes` and `stage_bytes` go into the report. Raises CapError, RunError or InputError if the training
    process ended with one.
    """
    with relayed_signals() as passing, started(order, group=group) as child:
        passing.to(child.process)
        contention = Contention(
            threads=order.planned["threads"],
            expected_seconds=order.planned["expected_seconds"],
            busy_machine=order.planned["busy_machine"],
            usage=lambda: usage_of(child.process.pid),
        )
        try:
            _follow(child, contention, progress, stages, on_evaluation, on_notice)
        except ThirdInterrupt:
            raise
        except BaseException:
            child.stop()  # if progress cannot be shown any more, the steps so far are still saved
            raise
        try:
            observed = child.end()
        except RunError as error:
            error.interrupted = passing.asked
            raise
        own_bytes = memory().peak  # read before the report is built, when the training process has ended
    report = build_report(
        order.planned,
        observed,
        order.directory,
        enforced_by=child.enforced_by,
        supervisor_bytes=own_bytes if counted else None,
        program_bytes=None if counted else own_bytes,
        preparation_bytes=preparation_bytes,
        stage_bytes=stage_bytes,
        contention=contention.figures,
    )
    if order.evaluates:
        return evaluation_report(report, by_token=order.planned["places_per_step"] is not None)
    if order.finished:  # no step was taken now: keep the earlier report but for the evaluation
        between = ("evaluations", "best") if report["best"] else ()
        report = order.finished | {name: report[name] for name in ("evaluation", *between)}
    write_report(order.directory, report)
    return report


def _follow(
    child: TrainingProcess,
    contention: Contention,
    progress: StepProgress | None,
    stages: Progress | None,
    on_evaluation: OnEvaluation | None,
    on_notice: OnNotice | None,
) -> None:
    for message in child.messages():
        if message["event"] == "step":
            notice = contention.step(message["seconds"])
            if notice and on_notice:
                on_notice(notice)
        if message["event"] == "step" and progress:
            progress(
                message["step"],
                message["loss"],
                message["seconds"],
                message["resident_bytes"],
                message["peak_bytes"],
                message.get("tokens"),
            )
        elif message["event"] == "note" and on_notice:
            on_notice(message["text"])
        elif message["event"] == "evaluating" and stages:
            what = "evaluating" if message["when"] == ALONE else f"evaluating {message['when']}"
            stages(what, message["done"], message["total"])
        elif message["event"] == "referring" and stages:
            about = f"about {message['expected']:.0f} s" if message["expected"] >= 1 else "less than a second"
            stages(f"log-probabilities with the adapter off, {about} in all", message["done"], message["total"])
        elif message["event"] == "evaluated" and message["when"] == "between" and on_evaluation:
            on_evaluation(message)


def hand_over(order: RunOrder, settings: SupervisorSettings, group: MemoryCgroup | None, *, replace: bool) -> int:
    """Have a supervisor carry out `order`; returns its exit code.

    With `replace` this process becomes the supervisor (exec), and the call does not return: the memory of preparing is
    freed; process id, terminal and lock stay. Otherwise the supervisor is a child process, and signals that ask to end
    are passed on to it.
    """
    paths = [os.path.join(order.directory, name) for name in ("order", "show")]
    order.write(paths[0])
    with open(paths[1], "w", encoding="utf-8") as file:
        json.dump(asdict(settings), file)
    return become(command(*paths), order.lock, group, replace=replace)


def become(arguments: list[str], lock: int, group: MemoryCgroup | None, *, replace: bool) -> int:
    """Carry out a command line in a cgroup, in the place of this process with `replace`, else in a child process;
    `lock` is a descriptor that it inherits. Returns the exit code.
    """
    os.set_inheritable(lock, True)
    arguments = group.enter(arguments) if group else arguments
    if replace:
        interpreter.replace_process(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    with relayed_signals() as passing:
        child = start(arguments, stdin=None, pass_fds=(lock,), start_new_session=True)
        passing.to(child)
        return child.wait()


def command(*arguments: str) -> list[str]:
    """The command line of a supervisor."""
    return interpreter.command("tightfit.runtime.supervision.supervisor", *arguments)


def main(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--measure"]:
        sys.stdout.write(f"{measure()}\n")
        return 0
    order = RunOrder.read(arguments[0])
    with open(arguments[1], encoding="utf-8") as file:
        settings = SupervisorSettings(**json.load(file))
    for path in arguments:
        os.unlink(path)
    group = MemoryCgroup(Path(settings.group[0]), settings.group[1]) if settings.group else None
    if settings.then is not None:
        _rehearse(order, group, settings.home, settings.then)
    try:
        with (
            named_as(on_command_line),
            TrainingProgress(
                steps=order.steps or 0,
                tokens_per_step=settings.tokens_per_step,
                budget=order.planned["budget_bytes"],
                other_bytes=order.planned["supervisor_bytes"],
                epoch_steps=order.epoch_steps,
            ) as training,
        ):
            report = supervise(
                order,
                training,
                training.stage,
                on_evaluation=training.evaluated,
                on_notice=training.note,
                group=group,
                counted=True,
                preparation_bytes=settings.preparation_bytes,
                stage_bytes=settings.stage_bytes,
            )
        if settings.output:
            _write(settings.output, report)
        if not training.stepped and not order.evaluates:
            sys.stderr.write(already_done(report, order.directory, order.steps))
        _answer(report, settings.stages, as_json=settings.as_json)
    except (Exception, KeyboardInterrupt) as error:
        return fail(error, as_json=settings.as_json, debug=settings.debug)
    finally:
        if group:
            group.leave(settings.home)
        if order.evaluates:
            import shutil

            shutil.rmtree(order.directory, ignore_errors=True)
    return 0


REHEARSED = "rehearsed"
"""file in a rehearsal's output folder that says how it ended: an error in the form of `failure_of`, and whether it was
an interruption; or null
"""


def _rehearse(order: RunOrder, group: MemoryCgroup | None, home: str | None, then: list[str]) -> NoReturn:
    """Carry out a few steps of a plan for what they teach, say in a file how they ended, and become the command
    `then`.
    """
    failure: dict[str, Any] | None = None
    try:
        with named_as(on_command_line):
            supervise(order, group=group, counted=True)
    except (TightfitError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt) or getattr(error, "interrupted", False)
        failure = failure_of(error) | {"interrupted": interrupted}
    finally:
        if group:
            group.leave(home)
    with open(os.path.join(order.directory, REHEARSED), "w", encoding="utf-8") as file:
        json.dump(failure, file)
    interpreter.replace_process(then)


def _write(path: str, report: dict[str, Any]) -> None:
    from tightfit.runtime.common.files import write_whole
    from tightfit.runtime.common.strict_json import to_json

    write_whole(path, to_json(report) + "\n")


def _answer(report: dict[str, Any], stages: str | None, *, as_json: bool) -> None:
    # The training process has ended, so that imports no longer add to the run's peak.
    from tightfit.runtime.supervision.printing import answer, with_stages
    from tightfit.runtime.supervision.report_text import evaluation_text, report_text

    text = report_text if "timeline" in report else evaluation_text
    answer(with_stages(stages, report), None if as_json else text(report), as_json=as_json)


def measure() -> int:
    """Peak bytes of a supervisor, measured in this process, which plays a run of `LATEST_STEPS` steps with long
    messages.
    """
    words = json.dumps({"event": "timeline", "which": "first", "samples": [[i, i / 7e3, i << 20] for i in range(2048)]})
    step = {
        "event": "step",
        "step": 1,
        "loss": 1.0,
        "seconds": 0.5,
        "resident_bytes": 1,
        "peak_bytes": 1,
        "tokens": 1,
        "samples": 1,
    }
    step["spent"] = dict.fromkeys(("run", "unpack", "perturb", "update", "stall"), 0.1)
    observed = ObservedRun()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        training = TrainingProgress(steps=2, tokens_per_step=1, budget=1, file=nowhere)
        ticks = itertools.count()
        contention = Contention(
            threads=2, expected_seconds=1.0, usage=lambda: usage_of(os.getpid()), clock=lambda: float(next(ticks))
        )
        for line in [words] * 2 + [json.dumps(step)] * LATEST_STEPS:
            message = json.loads(line)
            observed.take(message)
            if message["event"] == "step":
                training(1, 1.0, 0.5, 1, 1, 1)
                contention.step(0.5)
        with relayed_signals():
            subprocess.run(["/bin/true"], check=False)
    return memory().peak


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
