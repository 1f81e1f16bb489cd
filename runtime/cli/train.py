"""The command ``tightfit train``: profiles a model, plans its step and runs the plan, in one go.

Each stage is the command of that name, called with the options that it declares itself: an option that one of them gets
is an option of ``train`` too, with the same name, default, help and checks. From the command line each is a program of
its own (`tightfit.runtime.cli.course`), and the last one is ``tightfit run``: what a stage has loaded is gone when the
next begins.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.models import ArgumentInfo, OptionInfo

from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.option_fields import PRIMARY
from tightfit.runtime.cli.command import EVERYTHING, Command
from tightfit.runtime.cli.config_file import read_options
from tightfit.runtime.cli.course import (
    BEGIN,
    RUN,
    Course,
    forgotten,
)
from tightfit.runtime.cli.options import command_words, read, usage
from tightfit.runtime.cli.plan import plan
from tightfit.runtime.cli.profile import profile
from tightfit.runtime.cli.run import run
from tightfit.runtime.cli.train_stages import AUTO, CONFIG, TrainStages, options_of_command
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interpreter import command, replace_process
from tightfit.runtime.common.units import parse_size
from tightfit.runtime.session.options import RunOptions

if TYPE_CHECKING:
    pass

MODEL_AND_STEP, MEMORY, TRAINING, OTHERS = "Model and step", "Memory", "Training", "Options"
STAGES = ((MODEL_AND_STEP, profile), (MEMORY, plan), (TRAINING, run))
"""(heading in the help, command): options that several of them have are the last one's"""


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
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE|auto",
            help=(
                "Budget of the whole run, its supervisor included: 600MiB, 600MB or plain bytes; auto: what this"
                " machine can spare now."
            ),
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
    at: Annotated[str | None, typer.Option("--at", hidden=True, help="The stage to go on with.")] = None,
    **options: Any,
) -> None:
    """Train MODEL: measure one step of it, plan that step for a budget of memory, and run the plan under this cap.

    These are `tightfit profile`, `tightfit plan` and `tightfit run`, whose options it takes. With --resume and the
    output folder alone, it goes on from what an earlier call has left there.
    """
    values = options | {"seq": seq, "memory": memory, "adapter": adapter}
    if at is None:
        _check(values)
    from tightfit.runtime.cli.terminal import messages
    from tightfit.runtime.session.output import locked, tokens_kept

    output = values["output"].absolute()
    values |= {"output": output, "config": None}
    course = Course() if at is None else Course.read(output)
    with (
        locked(output, course.lock) as lock,
        tokens_kept(output, begun=at is not None) as tokens,
        forgotten(output),
    ):
        course.lock = lock
        stages = TrainStages(context, values, course, tokens, messages())
        stage = at or BEGIN
        while stage != RUN:
            following = stages.carry_out(stage)
            course.held(stage)
            if context.obj and following != RUN:
                course.become(output, stages.words(), following)
            stage = following
        run_values = stages.of_run()
    _run_plan(context, values | run_values)


def _check(values: Mapping[str, Any]) -> None:
    """Raise InputError for options of the later stages that cannot be used, before the first stage takes its time."""
    if values["memory"] != AUTO:
        parse_size(values["memory"])
    if values["device"] != "cpu":
        from tightfit.profiles.devices.data_sheets import find_device

        find_device(values["device"])
    from tightfit.runtime.session.beforehand import check_beforehand

    training = read(RunOptions, values, out=values["output"], resume=values["resume"], overwrite=values["overwrite"])
    check_beforehand(values["model"], values["data"], planning=read(PlanOptions, values), training=training)


def _run_plan(context: typer.Context, values: Mapping[str, Any]) -> None:
    """The last stage: replaces this process by `tightfit run`, or runs the plan here if a program has called."""
    if not context.obj:
        run(context, **options_of_command(run, values))
        return
    words = command_words(context.command.params, options_of_command(run, values))
    words += [f"--{name}={values[name]}" for name in ("stages", "tokens", "held") if values[name] is not None]
    replace_process(command("tightfit.runtime.cli.main", "run", str(values["plan"]), *words))
