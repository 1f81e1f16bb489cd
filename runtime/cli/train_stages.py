"""The stages of ``tightfit train`` before its run: they read the data, measure, plan, rehearse, and leave what the run
needs in the output folder.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tightfit.planner.report.step_words import rehearsal_words
from tightfit.planner.report.summary import profile_summary
from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.sources.lookup import names_module
from tightfit.profiles.weights.source import BUNDLE
from tightfit.runtime.cli import answers
from tightfit.runtime.cli.config_file import FOR_ONE_CALL, read_file, write_options
from tightfit.runtime.cli.course import (
    BEGIN,
    LEARN,
    MEASURE,
    NAMES,
    PLAN,
    REHEARSE,
    RUN,
    SMALLER,
    Course,
    rehearsal_end,
)
from tightfit.runtime.cli.options import command_words, key_of, read, stage
from tightfit.runtime.cli.phase_memory import ASKING, LEARNING, PROFILING, READING, REHEARSING, expect_phase
from tightfit.runtime.cli.plan import plan, smaller_folder
from tightfit.runtime.cli.profile import profile
from tightfit.runtime.common.errors import CapError, InputError, RunError, TightfitError
from tightfit.runtime.common.run_folder import find_checkpoints
from tightfit.runtime.common.strict_json import to_json
from tightfit.runtime.common.units import MIB, format_size, parse_size
from tightfit.runtime.engine.device.resident import memory as resident
from tightfit.runtime.session.options import DataOptions

if TYPE_CHECKING:
    from rich.console import Console

    from tightfit.planner.schema import Plan
    from tightfit.profiles.schema import Profile

AUTO = "auto"
PROFILE, PLAN_FILE, CONFIG = "profile.json", "plan.json", "config.toml"
"""what this command leaves in the output folder beside what a run leaves"""
RANDOM = "random"
"""data that are made up, and no file"""
PATHS = ("model", "data", "eval_data")
"""options that may name a file, whose absolute path is then written down"""
ELSEWHERE = {"output", "server", "certificate"}
"""options that change where a result is made and kept, and not what it is"""
UNFINISHED = ["metrics.jsonl"]
"""the only result of a run that was killed before its first checkpoint"""


def options_of_command(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `values` that a function takes."""
    return {name: values[name] for name in inspect.signature(function).parameters if name in values}


class TrainStages:
    """The stages before the run: they leave profile.json, plan.json and config.toml in the output folder, which is
    locked.
    """

    def __init__(
        self, context: typer.Context, values: dict[str, Any], course: Course, tokens: Path, console: Console
    ) -> None:
        self.context, self.values, self.course, self.tokens, self.console = context, values, course, tokens, console
        self.output: Path = values["output"]
        self.apart = bool(context.obj)
        """whether each stage is a program of its own"""

    def words(self) -> list[str]:
        """The words of a command line with the values as the stages so far have decided them."""
        decided = {"resume": self.course.resume, "overwrite": self.course.overwrite}
        return command_words(self.context.command.params, self.values | decided | {"at": None})

    def carry_out(self, stage: str) -> str:
        """Carry a stage out; returns the next one. Raises what it raises, and typer.Exit if no plan fits."""
        stages = {
            BEGIN: self.begin,
            MEASURE: self.measure,
            PLAN: self.plan,
            REHEARSE: self.rehearse,
            LEARN: self.learn,
            SMALLER: self.smaller,
        }
        if self.apart:
            self._foresee(stage)
        try:
            return stages[stage]()
        except KeyboardInterrupt as stop:
            # The results that were to be overwritten are still there, and not what a resumption may go on from.
            anew = f"--config {shlex.quote(str(self.output / CONFIG))} --overwrite"
            resumption = anew if self.values["overwrite"] else f"--resume -o {shlex.quote(str(self.output))}"
            raise RunError(f"interrupted; go on with: tightfit train {resumption}") from stop

    def _foresee(self, stage: str) -> None:
        """Note what this process is going to hold in a stage. Raises InputError where that is not free."""
        files = [self.output / PROFILE, self.output / PLAN_FILE]
        if stage in {BEGIN, MEASURE} and names_module(self.values["model"]):
            return  # what the module's own code takes is not known
        if stage == BEGIN:
            expect_phase(NAMES[stage], READING, [])
        elif stage == MEASURE:
            expect_phase(NAMES[stage], PROFILING, [Path(self.values["bundle"] or self.values["model"]) / BUNDLE])
        elif stage in {PLAN, SMALLER} and self.values["server"] is not None:
            expect_phase(NAMES[stage], ASKING, files[:1])
        elif stage == REHEARSE:
            expect_phase(NAMES[stage], REHEARSING, files[1:])
        elif stage == LEARN:
            expect_phase(NAMES[stage], LEARNING, files)

    def begin(self) -> str:
        values, output, console, course = self.values, self.output, self.console, self.course
        earlier = read_file(output / CONFIG) if values["resume"] and (output / CONFIG).exists() else {}
        course.resume, course.overwrite = _how_to_begin(output, resume=values["resume"], overwrite=values["overwrite"])
        memory = values["memory"]
        own = resident().resident if self.apart else 0
        budget = _budget(memory, console, resume=values["resume"], own=own)
        seq = _length(values, budget, self.tokens, console)
        values |= {
            "seq": seq,
            "memory": f"{budget // MIB}MiB" if budget % MIB == 0 else str(budget),
        }
        settings = _settings(self.context, values)
        if memory == AUTO and values["resume"] and not values["force"] and (fitting := _fitting_plan(output, budget)):
            # What was planned beforehand for less memory, or for as much, is taken: nothing is planned now.
            console.print(f"plan: that of {format_size(fitting.budget_bytes)}, made before")
            settings["memory"] = values["memory"] = earlier["memory"] = str(fitting.budget_bytes)
        measured, planned = (
            (None, None) if values["force"] else _earlier_results(self.context, output, settings, earlier)
        )
        for result, name in ((planned, PLAN_FILE), (measured, PROFILE)):
            if result is None:
                (output / name).unlink(missing_ok=True)
        if planned is None:
            shutil.rmtree(smaller_folder(output / PLAN_FILE), ignore_errors=True)
        write_options(
            output / CONFIG,
            settings,
            "`tightfit train --resume -o FOLDER` goes on from it, `tightfit train --config FILE -o OTHER` begins"
            " with it.",
        )
        if measured is None:
            return MEASURE
        console.print(f"profile: {answers.profile_sentence(measured)}")
        return PLAN if planned is None else self.planned(planned)

    def measure(self) -> str:
        if self.values["device"] == "cpu":
            self._wait_for_cores(self.values["threads"])
        self.console.print(f"profile: {answers.profile_sentence(_profile(self.values))}")
        return PLAN

    def plan(self) -> str:
        from tightfit.runtime.session.rehearsal import MOST_ROUNDS, why_not

        apart = self.apart and self.values["rehearse"]
        planned = _plan(self.values | {"smaller": 0} | ({"rehearse": False} if apart else {}), self.measured())
        rehearsed = apart and self.course.rounds < MOST_ROUNDS and why_not(planned) is None
        return REHEARSE if rehearsed else self.planned(planned)

    def smaller(self) -> str:
        from tightfit.planner.io import load_plan
        from tightfit.runtime.cli.plan import plan_smaller

        values, path = self.values, self.output / PLAN_FILE
        options, server, certificate = read(PlanOptions, values), values["server"], values["certificate"]
        number = values["smaller"]
        plan_smaller(self.measured(), load_plan(path), number, options, path, server, certificate, self.console)
        return RUN

    def planned(self, planned: Plan) -> str:
        """The plan is made: say what it is worth."""
        from tightfit.planner.report.explain import verdict

        for sentence in verdict(planned):
            self.console.print(f"plan: {sentence}")
        return SMALLER if self.values["smaller"] and not smaller_folder(self.output / PLAN_FILE).exists() else RUN

    def rehearse(self) -> str:
        from tightfit.planner.io import load_plan
        from tightfit.profiles.measuring.cpu_load import OtherPrograms
        from tightfit.runtime.cli.run import hand_on
        from tightfit.runtime.cli.terminal import StagesDisplay
        from tightfit.runtime.session.rehearsal import prepared_rehearsal, rehearsal_folder

        plan, course = load_plan(self.output / PLAN_FILE), self.course
        self._wait_for_cores(plan.device.threads)
        course.folder, others = rehearsal_folder(), OtherPrograms()
        course.others = others.began, others.used
        course.held(REHEARSE)
        then = course.next_program(self.output, self.words(), LEARN)
        try:
            with (
                StagesDisplay(self.console) as stages,
                prepared_rehearsal(plan, course.folder, stages, resident().resident) as ready,
            ):
                stages("rehearsing the plan for a few steps", 0, 1)
                hand_on(ready, plan, cgroup=self.values["cgroup"], as_json=False, debug=False, replace=True, then=then)
        except TightfitError as error:
            shutil.rmtree(course.folder, ignore_errors=True)
            self.console.print(f"not rehearsed: {error}")
            return self.planned(plan)

    def learn(self) -> str:
        from tightfit.planner.io import load_plan, save_plan
        from tightfit.profiles.learned import figures_id
        from tightfit.profiles.measuring.cpu_load import OtherPrograms
        from tightfit.runtime.session.rehearsal import ANEW, over_cap, taught, traced_rehearsal

        plan, course = load_plan(self.output / PLAN_FILE), self.course
        assert course.folder is not None
        assert course.others is not None
        try:
            failure = rehearsal_end(course.folder)
            if failure is None:
                traced = traced_rehearsal(plan, course.folder, OtherPrograms(*course.others))
            elif failure["interrupted"]:
                raise KeyboardInterrupt
            elif failure["kind"] == CapError.__name__:
                traced = over_cap(plan)
            else:
                self.console.print(f"not rehearsed: {failure['message']}")
                return self.planned(plan)
        finally:
            shutil.rmtree(course.folder, ignore_errors=True)
        course.rounds += 1
        plan, anew = taught(figures_id(self.measured()), plan, traced, course.rounds)
        save_plan(plan, self.output / PLAN_FILE)
        self.console.print(rehearsal_words(plan))
        if not anew:
            return self.planned(plan)
        self.console.print(ANEW)
        return PLAN

    def _wait_for_cores(self, threads: int | None) -> None:
        """Wait for other programs before seconds are measured with so many threads (None: one for each core)."""
        from tightfit.profiles.measuring.cpu_load import our_cores, wait_for_cores
        from tightfit.runtime.cli.terminal import StagesDisplay

        if self.values["wait"]:
            with StagesDisplay(self.console) as stages:
                wait_for_cores(threads or our_cores(), self.console.print, stages)

    def measured(self) -> Profile:
        from tightfit.profiles.io import load_profile

        return load_profile(self.output / PROFILE)

    def of_run(self) -> dict[str, Any]:
        """Arguments for `run`: how it begins, the data if they were kept as tokens, what the stages say and held."""
        from tightfit.planner.io import load_plan

        summary = None
        if self.values["as_json"]:
            planned = load_plan(self.output / PLAN_FILE)
            plan_facts = answers.facts(planned) | {"plan": str(self.output / PLAN_FILE)}
            summary = to_json({"profile": _facts(self.measured(), self.output), "plan": plan_facts})
        return {
            "resume": self.course.resume,
            "overwrite": self.course.overwrite,
            "tokens": self.tokens if self.tokens.exists() else None,
            "stages": summary,
            "held": json.dumps(self.course.stage_bytes) if self.apart else None,
            "plan": self.output / PLAN_FILE,
        }


def _how_to_begin(output: Path, *, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """(resume, overwrite) for `run`: it resumes if that was asked for and there is a checkpoint, else it starts anew.

    Raises InputError if the folder holds what the run may not replace.
    """
    from tightfit.runtime.session.output import RESULTS, to_be_replaced

    going_on = resume and bool(find_checkpoints(str(output)))
    if resume and not going_on:
        overwrite = [name for name in RESULTS if (output / name).exists()] == UNFINISHED
    to_be_replaced(output, None, resume=going_on, overwrite=overwrite)
    return going_on, overwrite


def _budget(memory: str, console: Console, *, resume: bool, own: int) -> int:
    """The budget in bytes; prints where it comes from. `own`: bytes that this process will not hold beside the run."""
    from tightfit.runtime.supervision.spare_memory import spare_memory

    if memory == AUTO:
        budget, why = spare_memory(given_back=own)
        console.print(f"memory: {format_size(budget)}; {why}")
        return budget
    budget = parse_size(memory)
    if resume:
        with contextlib.suppress(InputError):  # nothing can be spared: the run may find out
            spare, why = spare_memory(given_back=own)
            if budget > spare:
                console.print(
                    f"memory: {format_size(budget)}, more than can be spared now: {why}; --memory auto plans anew"
                )
    return budget


def _length(values: Mapping[str, Any], budget: int, tokens: Path, console: Console) -> int | None:
    """Tokens of a sequence: as many as were asked for, or what the data need. The data are read and checked either way,
    and kept in the folder `tokens`. A module, whose batches have their shape, has no sequence, and profiling refuses
    one that is asked for.

    Raises InputError if there are no such data.
    """
    from tightfit.profiles.sources.lookup import traced_seq
    from tightfit.runtime.cli.terminal import StagesDisplay
    from tightfit.runtime.data.sequence import check_files, choose_seq

    requested_seq: int | None = values["seq"]
    if names_module(values["model"]):
        return requested_seq
    check_files(values["data"], values["eval_data"])
    if requested_seq is None:
        requested_seq = traced_seq(values["model"], values["bundle"])
    with StagesDisplay(console) as stages:
        seq, why = choose_seq(
            values["model"],
            values["data"],
            values["eval_data"],
            truncate=values["truncate"],
            budget=budget,
            columns=read(DataOptions, values).columns,
            keep=tokens,
            pairs=values["loss"] is not None,
            seq=requested_seq,
            stages=stages,
        )
    if requested_seq is None:
        console.print(f"sequence: {seq} tokens; {why}")
    return seq


def _settings(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they are used, by their keys in a file; without those that have no value."""
    settings: dict[str, Any] = {}
    for parameter in context.command.params:
        key, value = key_of(parameter), values.get(str(parameter.name))
        if key in FOR_ONE_CALL or value is None:
            continue
        if isinstance(value, Path) or (parameter.name in PATHS and value != RANDOM and Path(value).exists()):
            value = str(Path(value).absolute())
        settings[key] = value
    return settings


def _earlier_results(
    context: typer.Context, output: Path, settings: Mapping[str, Any], earlier: Mapping[str, Any]
) -> tuple[Profile | None, Plan | None]:
    """Profile and plan that an `earlier` call left in the output folder, if they were made with these settings."""
    if not earlier:
        return None, None
    from tightfit.planner.io import load_plan
    from tightfit.profiles.io import load_profile
    from tightfit.runtime.session.admission import check_machine

    def same(command: Callable[..., None]) -> bool:
        names = set(inspect.signature(command).parameters) - ELSEWHERE - ({"memory"} if command is profile else set())
        keys = [key_of(parameter) for parameter in context.command.params if parameter.name in names]
        return all(settings.get(key) == earlier.get(key) for key in keys)

    try:
        if not same(profile):
            return None, None
        measured = load_profile(output / PROFILE)
        check_machine(measured)
        if measured.model.store is not None and not Path(measured.model.store).exists():
            return None, None
    except InputError:
        return None, None
    try:
        planned = load_plan(output / PLAN_FILE) if same(plan) else None
    except InputError:
        return measured, None
    return measured, planned if planned and planned.profile_fingerprint == measured.fingerprint else None


def _fitting_plan(output: Path, budget: int) -> Plan | None:
    """Of the plans that an earlier call has left in the folder, that of the largest budget which is at most `budget`,
    now as the folder's plan; None where there is none, or no choice.
    """
    from tightfit.planner.io import load_plan, save_plan

    path = output / PLAN_FILE
    smaller = sorted(smaller_folder(path).glob("*.json"))
    if not smaller:
        return None
    plans = []
    for file in (path, *smaller):
        with contextlib.suppress(InputError):
            plans.append(load_plan(file))
    fitting = max(
        (plan for plan in plans if plan.budget_bytes <= budget), key=lambda plan: plan.budget_bytes, default=None
    )
    if fitting is not None and fitting.budget_bytes != plans[0].budget_bytes:
        if path.exists():
            path.replace(smaller_folder(path) / f"{plans[0].budget_bytes}.json")
        save_plan(fitting, path)
    return fitting


def _profile(values: Mapping[str, Any]) -> Profile:
    """The first stage: measures a step."""
    path = values["output"] / PROFILE
    with stage():
        profile(**options_of_command(profile, values) | {"output": path, "as_json": True})
    from tightfit.profiles.io import load_profile

    return load_profile(path)


def _plan(values: Mapping[str, Any], measured: Profile) -> Plan:
    """The second stage: plans the step. Raises KeyboardInterrupt if it was interrupted; the best plan found is kept."""
    output, failure = values["output"], None
    path = output / PLAN_FILE
    with stage() as answer_text:
        try:
            plan(**options_of_command(plan, values) | {"profile": output / PROFILE, "output": path, "as_json": True})
        except typer.Exit as error:
            failure = error
    answer = json.loads(answer_text.getvalue())  # noqa: TID251  written by the stage
    if failure:
        if values["as_json"]:
            sys.stdout.write(to_json({"profile": _facts(measured, output), "plan": answer}) + "\n")
        raise failure
    if answer["interrupted"]:
        raise KeyboardInterrupt
    from tightfit.planner.io import load_plan

    return load_plan(path)


def _facts(measured: Profile, output: Path) -> dict[str, Any]:
    return profile_summary(measured) | {"profile": str(output / PROFILE)}
