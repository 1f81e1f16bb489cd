"""The command ``tightfit train``: profiles a model, plans its step and runs the plan, in one go.

Each stage is the command of that name, called with the options that it declares itself: an option that one of them gets
is an option of ``train`` too, with the same name, default, help and checks. Once the plan is made, this process is
replaced by ``tightfit run``: neither planner nor PyTorch is alive beside the training process.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.models import ArgumentInfo, OptionInfo

from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.option_fields import PRIMARY, options_of
from tightfit.profiles.options import ProfileOptions
from tightfit.runtime.cli import answers
from tightfit.runtime.cli.command import EVERYTHING, Command
from tightfit.runtime.cli.config_file import FOR_ONE_CALL, read_file, read_options, write_options
from tightfit.runtime.cli.options import command_words, key_of, read, stage, usage
from tightfit.runtime.cli.plan import plan
from tightfit.runtime.cli.profile import profile
from tightfit.runtime.cli.run import run
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.interpreter import command, python_path
from tightfit.runtime.common.run_folder import find_checkpoints
from tightfit.runtime.common.units import MIB, format_size, parse_size
from tightfit.runtime.session.options import DataOptions, RunOptions

if TYPE_CHECKING:
    from rich.console import Console

    from tightfit.planner.schema import Plan
    from tightfit.profiles.schema import Profile

MODEL_AND_STEP, MEMORY, TRAINING, OTHERS = "Model and step", "Memory", "Training", "Options"
STAGES = ((MODEL_AND_STEP, profile), (MEMORY, plan), (TRAINING, run))
"""(heading in the help, command): options that several of them have are the last one's"""
AUTO = "auto"
PROFILE, PLAN, CONFIG = "profile.json", "plan.json", "config.toml"
"""what this command leaves in the output folder beside what a run leaves"""
RANDOM = "random"
"""data that are made up, and no file"""
PATHS = ("model", "data", "eval_data")
"""options that may name a file, whose absolute path is then written down"""
UNFINISHED = ["metrics.jsonl"]
"""the only result of a run that was killed before its first checkpoint"""


class TrainCommand(Command):
    """Takes options from the command line, then from a file; shows them under headings in its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with self.hinting():
            values, *_ = self.make_parser(ctx).parse_args(args=list(args))
        resumed = Path(values["output"]) / CONFIG if values.get("resume") and values.get("output") else None
        path = Path(values["config"]) if values.get("config") else resumed
        if path and not (values.get("help") or values.get(EVERYTHING)) and (values.get("config") or path.exists()):
            ctx.default_map = read_options(path, ctx)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if resumed and not resumed.exists() and usage(error) and type(error).__name__ == "MissingParameter":
                raise InputError(
                    f"{resumed}: no such file, and it would say what the run was started with; name the folder that"
                    " `tightfit train` has left, or give MODEL, --data and the other options again"
                ) from error
            raise

    def format_all(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {
            heading: [] for heading in ("Arguments", *(heading for heading, _ in STAGES), OTHERS)
        }
        for parameter in self.get_params(ctx):
            panel = getattr(parameter, "rich_help_panel", None) or OTHERS
            heading = "Arguments" if parameter.param_type_name == "argument" else panel
            if record := parameter.get_help_record(ctx):
                rows[heading].append(record)
        for heading, records in rows.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _with_options_of_stages(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the ``**options`` of `command` by the model and the options of the three stages.

    Where it has a parameter of the same name as a stage, its own stays.
    """
    declared = inspect.signature(command, eval_str=True).parameters
    stage_parameters: dict[str, inspect.Parameter] = {}
    stages = [(heading, inspect.signature(each, eval_str=True).parameters) for heading, each in STAGES]
    for heading, parameters in stages:
        for name, parameter in parameters.items():
            kind, info, *marks = get_args(parameter.annotation) or (None, None)
            option = isinstance(info, OptionInfo) and not info.hidden
            if not option and not (isinstance(info, ArgumentInfo) and name == "model"):
                continue
            info = copy.copy(info)
            everywhere = all(name in others for _, others in stages)
            info.rich_help_panel = OTHERS if everywhere else heading if option else None
            annotated: Any = Annotated
            stage_parameters[name] = parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotated[(kind, info, *marks)]
            )
    own = {name: each for name, each in declared.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    command.__signature__ = inspect.Signature(list((stage_parameters | own).values()))  # type: ignore[attr-defined]
    return command


@_with_options_of_stages
def train(
    *,
    context: typer.Context,
    seq: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sample; default: as many as the longest sample of the data needs.",
            rich_help_panel=MODEL_AND_STEP,
        ),
        PRIMARY,
    ] = None,
    buckets: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTHS|auto",
            help=f"{options_of(ProfileOptions)['buckets'].description} auto: two lengths that the data suggest, or fewer.",
            rich_help_panel=MODEL_AND_STEP,
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE|auto",
            help="Budget of the whole run, its supervisor included: 600MiB, 600MB or plain bytes; auto: what this machine can spare now.",
            rich_help_panel=MEMORY,
        ),
        PRIMARY,
    ] = AUTO,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Start from this adapter of PEFT, with all its LoRA settings, instead of a new one.",
            rich_help_panel=MODEL_AND_STEP,
        ),
        PRIMARY,
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take options from this YAML or TOML file; the command line goes before it.",
            rich_help_panel=OTHERS,
        ),
        PRIMARY,
    ] = None,
    **options: Any,
) -> None:
    """Train MODEL: measure one step of it, plan that step for a budget of memory, and run the plan under this cap.

    These are `tightfit profile`, `tightfit plan` and `tightfit run`, whose options it takes. With --resume and the
    output folder alone, it goes on from what an earlier call has left there.
    """
    values = options | {"seq": seq, "buckets": buckets, "memory": memory, "adapter": adapter}
    _check(values)
    from tightfit.runtime.cli.terminal import messages
    from tightfit.runtime.session.output import locked, tokens_kept

    output = values["output"].absolute()
    with locked(output), tokens_kept(output) as tokens:
        run_values = _prepare(context, values | {"output": output}, tokens, messages())
    _run_plan(context, values | run_values | {"output": output, "plan": output / PLAN})


def _check(values: Mapping[str, Any]) -> None:
    """Raise InputError for options of the later stages that cannot be used, before the first stage takes its time."""
    if values["memory"] != AUTO:
        parse_size(values["memory"])
    from tightfit.runtime.session.beforehand import check_beforehand

    training = read(RunOptions, values, out=values["output"], resume=values["resume"], overwrite=values["overwrite"])
    check_beforehand(values["model"], values["data"], planning=read(PlanOptions, values), training=training)


def _options_of(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `values` that a function takes."""
    return {name: values[name] for name in inspect.signature(function).parameters if name in values}


def _prepare(context: typer.Context, values: dict[str, Any], tokens: Path, console: Console) -> dict[str, Any]:
    """Leave profile.json, plan.json and config.toml in the output folder, which is locked; returns arguments for `run`:
    `resume`, `overwrite`, `tokens` if the data were kept as tokens there, and the answers of the other `stages`.

    Raises what the stages raise, and typer.Exit if no plan fits.
    """
    output: Path = values["output"]
    run_values = _how_to_begin(output, resume=values["resume"], overwrite=values["overwrite"])
    budget = _budget(values["memory"], console, resume=values["resume"])
    seq, buckets = _lengths(values, budget, tokens, console)
    values |= {"seq": seq, "buckets": buckets, "memory": f"{budget // MIB}MiB" if budget % MIB == 0 else str(budget)}
    settings = _settings(context, values)
    earlier = read_file(output / CONFIG) if values["resume"] and (output / CONFIG).exists() else {}
    measured, planned = (None, None) if values["force"] else _earlier_results(context, output, settings, earlier)
    for result, name in ((planned, PLAN), (measured, PROFILE)):
        if result is None:
            (output / name).unlink(missing_ok=True)
    write_options(
        output / CONFIG,
        settings,
        "`tightfit train --resume -o FOLDER` goes on from it, `tightfit train --config FILE -o OTHER` begins with it.",
    )
    try:
        measured = measured or _profile(values)
        console.print(f"profile: {answers.profile_sentence(measured)}")
        if planned is None:
            planned = _plan(values, measured)
        for sentence in answers.verdict(planned):
            console.print(f"plan: {sentence}")
    except KeyboardInterrupt as stop:
        # The results that were to be overwritten are still there, and not what a resumption may go on from.
        anew = f"--config {shlex.quote(str(output / CONFIG))} --overwrite"
        resumption = anew if values["overwrite"] else f"--resume -o {shlex.quote(str(output))}"
        raise RunError(f"interrupted; go on with: tightfit train {resumption}") from stop
    summary = {"profile": _facts(measured, output), "plan": answers.facts(planned) | {"plan": str(output / PLAN)}}
    kept_tokens = {"tokens": tokens if tokens.exists() else None}
    return run_values | kept_tokens | {"stages": answers.to_json(summary) if values["as_json"] else None}


def _how_to_begin(output: Path, *, resume: bool, overwrite: bool) -> dict[str, Any]:
    """`resume` and `overwrite` for `run`: it resumes if that was asked for and there is a checkpoint, else it starts anew.

    Raises InputError if the folder holds what the run may not replace.
    """
    from tightfit.runtime.session.output import RESULTS, to_be_replaced

    going_on = resume and bool(find_checkpoints(str(output)))
    if resume and not going_on:
        overwrite = [name for name in RESULTS if (output / name).exists()] == UNFINISHED
    to_be_replaced(output, None, resume=going_on, overwrite=overwrite)
    return {"resume": going_on, "overwrite": overwrite}


def _budget(memory: str, console: Console, *, resume: bool) -> int:
    """The budget in bytes; prints where it comes from."""
    from tightfit.runtime.supervision.spare_memory import spare_memory

    if memory == AUTO:
        budget, why = spare_memory()
        console.print(f"memory: {format_size(budget)}; {why}")
        return budget
    budget = parse_size(memory)
    if resume:
        with contextlib.suppress(InputError):  # nothing can be spared: the run may find out
            spare, why = spare_memory()
            if budget > spare:
                console.print(
                    f"memory: {format_size(budget)}, more than can be spared now: {why}; --memory auto plans anew"
                )
    return budget


def _lengths(values: Mapping[str, Any], budget: int, tokens: Path, console: Console) -> tuple[int | None, str | None]:
    """Tokens of a sequence, and shorter lengths: those asked for, or what the data need. The data are read and checked either way, and
    kept in the folder `tokens`.
    A module, whose batches have their shape, has no sequence, and profiling refuses one that is asked for.

    Raises InputError if there are no such data.
    """
    from tightfit.profiles.sources.lookup import names_module
    from tightfit.runtime.cli.terminal import StagesDisplay
    from tightfit.runtime.data.sequence import check_files, choose_buckets, choose_seq

    requested_seq, buckets = values["seq"], values["buckets"]
    if names_module(values["model"]):
        return requested_seq, buckets
    check_files(values["data"], values["eval_data"])
    lengths: Counter[int] = Counter()
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
            lengths=lengths if buckets == AUTO else None,
            stages=stages,
        )
    if requested_seq is None:
        console.print(f"sequence: {seq} tokens; {why}")
    if buckets == AUTO:
        bucket_lengths, why = choose_buckets(lengths, seq)
        buckets = ",".join(map(str, bucket_lengths)) or None
        console.print(f"shorter lengths: {buckets or 'none'}; {why}")
    return seq, buckets


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
        names = set(inspect.signature(command).parameters) - {"output"}
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
        planned = load_plan(output / PLAN) if same(plan) else None
    except InputError:
        return measured, None
    return measured, planned if planned and planned.profile_fingerprint == measured.fingerprint else None


def _profile(values: Mapping[str, Any]) -> Profile:
    """The first stage: measures a step."""
    path = values["output"] / PROFILE
    with stage():
        profile(**_options_of(profile, values) | {"output": path, "as_json": True})
    from tightfit.profiles.io import load_profile

    return load_profile(path)


def _plan(values: Mapping[str, Any], measured: Profile) -> Plan:
    """The second stage: plans the step. Raises KeyboardInterrupt if it was interrupted; the best plan found is kept."""
    output, failure = values["output"], None
    path = output / PLAN
    with stage() as answer_text:
        try:
            plan(**_options_of(plan, values) | {"profile": output / PROFILE, "output": path, "as_json": True})
        except typer.Exit as error:
            failure = error
    answer = json.loads(answer_text.getvalue())  # noqa: TID251  written by the stage
    if failure:
        if values["as_json"]:
            sys.stdout.write(answers.to_json({"profile": _facts(measured, output), "plan": answer}) + "\n")
        raise failure
    if answer["interrupted"]:
        raise KeyboardInterrupt
    from tightfit.planner.io import load_plan

    return load_plan(path)


def _facts(measured: Profile, output: Path) -> dict[str, Any]:
    return answers.profile_summary(measured) | {"profile": str(output / PROFILE)}


def _run_plan(context: typer.Context, values: Mapping[str, Any]) -> None:
    """The last stage: replaces this process by `tightfit run`, or runs the plan here if a program has called."""
    if not context.obj:
        run(context, **_options_of(run, values))
        return
    sys.stdout.flush()
    sys.stderr.flush()
    words = command_words(context.command.params, _options_of(run, values))
    words += [f"--{name}={values[name]}" for name in ("stages", "tokens") if values[name] is not None]
    run_command = command("tightfit.runtime.cli.main", "run", str(values["plan"]), *words)
    os.execve(run_command[0], run_command, os.environ | {"PYTHONPATH": python_path()})  # noqa: S606  our own command line
