"""The command line: a thin door of the library calls.

Results go to stdout (with ``--json``, one JSON object and nothing else), messages and progress to stderr. Exit codes: 0 done,
2 bad input, 3 infeasible budget, 4 failed while running, 5 cap passed. What is heavy is imported inside the commands, so
that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tightfit.planner.milp.solver_interrupts import left_alone
from tightfit.runtime.cli import answers
from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.common.interrupts import Interrupts
from tightfit.runtime.common.limits import limited
from tightfit.runtime.common.units import MIB, format_size, parse_size
from tightfit.runtime.session.options import LARGEST_SEED
from tightfit.runtime.supervision.failure import failure_of, told
from tightfit.runtime.supervision.printing import answer

if TYPE_CHECKING:
    from tightfit.planner.report.explanation import Explanation
    from tightfit.planner.schema import Plan
    from tightfit.planner.service.client import Client
    from tightfit.profiles.schema import Profile
    from tightfit.runtime.cli.terminal import Solving

app = typer.Typer(
    name="tightfit",
    help="Fit training into the memory you have: profile a model, plan its training step for a budget, run the plan under that cap.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LEAST_SOLVE_BYTES = 256 * MIB
"""of which a process that has loaded the planner and solved nothing yet takes 230"""
INTERRUPTED = 130
"""what Typer makes of Ctrl-C; older versions raise Abort"""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an unexpected error (also: TIGHTFIT_DEBUG=1).")
]
Force = Annotated[bool, typer.Option("--force", help="Measure again even where a fitting result lies in the cache.")]
TimeLimit = Annotated[
    float, typer.Option("--time-limit", metavar="SECONDS", help="Seconds the solver may take for one plan.")
]
Gap = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="End a search once its plan is proven to be slower than the best of its kind by at most this share, for example 0.001 for 0.1 %; 0: go on to the proof, as long as that gains anything within the time limit.",
    ),
]
Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Let a `tightfit serve` elsewhere solve; its token in TIGHTFIT_TOKEN."),
]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"tightfit {version('tightfit')}")
        except PackageNotFoundError:
            typer.echo("tightfit, not installed (run from a checkout)")
        raise typer.Exit


@app.callback()
def _tightfit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Libraries that find no memory for a thread end the process, and nothing can be told then.
    if limit := limited(hardly_enough=True):
        typer.echo(f"tightfit: {limit}, hardly enough to load PyTorch and a solver", err=True)


@app.command()
def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face directory or hub id, a GGUF file, a bare config.json (random weights, for sizing) or package.module:factory.",
        ),
    ],
    seq: Annotated[int, typer.Option(help="Tokens per sample.")] = 256,
    batch: Annotated[int, typer.Option(help="Samples per step.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA pairs on all seven projections.")] = 8,
    lora_alpha: Annotated[
        float | None, typer.Option(help="LoRA scale is alpha / rank; default: twice the rank.")
    ] = None,
    accumulate: Annotated[
        int,
        typer.Option(
            metavar="STEPS", help="Steps whose gradients make one update: a larger batch in the memory of a small one."
        ),
    ] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number type of the arithmetic, bfloat16 or float32; default: bfloat16, float32 for a module."
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="cpu: this machine, measured. The name of a device (see `tightfit devices`) or a JSON file that describes one: its times are estimated.",
        ),
    ] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="Compute threads; default: every core that this process may use.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the profile is written.")] = Path(
        "profile.json"
    ),
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure one training step of MODEL (or estimate it, on a device that is not here): its tensors, operators, disk and
    process floor. The weights need not fit in memory.
    """
    _at_least(
        1, seq=seq, batch=batch, lora_rank=lora_rank, accumulate=accumulate, threads=1 if threads is None else threads
    )
    from tightfit.profiles.api import profile as measure
    from tightfit.profiles.api import save_profile
    from tightfit.runtime.cli.terminal import Stages, messages
    from tightfit.runtime.common.files import check_place

    check_place(output)
    console = messages()
    with Stages(console) as stages:
        measured = measure(
            model,
            batch=batch,
            seq=seq,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            accumulate=accumulate,
            dtype=dtype,
            device=device,
            threads=threads,
            force=force,
            progress=stages,
        )
    save_profile(measured, output)
    summary = answers.profile_summary(measured) | {"profile": str(output)}
    answer(summary, answers.profile_text(measured), as_json=as_json)
    console.print(f"profile written to {output}; next: tightfit plan {shlex.quote(str(output))} --memory SIZE")


@app.command()
def devices(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show one device: every figure with its source.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the devices that can be planned for without being here; their times are estimated from FLOPs and bytes."""
    from tightfit.profiles.devices.data_sheets import find_device, known_devices

    found = known_devices() if name is None else [find_device(name)]
    summary = {"devices": [one.model_dump(mode="json") for one in found]}
    answer(summary, answers.devices_text(found) if name is None else answers.device_text(found[0]), as_json=as_json)


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.json, or a bare graph of operators.")],
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Budget of the whole training process: 600MiB, 600MB or plain bytes.")
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            help="A fixed rule instead of the solver: keep-all, checkpoint-layers, checkpoint-sqrt, mebp or mesp; mezo or lcsb, whose gradient is not the exact one; for a bare graph one of the first three."
        ),
    ] = None,
    time_limit: TimeLimit = 30.0,
    gap: Gap = 0.0,
    what_if: Annotated[
        bool,
        typer.Option(
            "--what-if",
            help="Also plan 50 MiB less and 50 MiB more, of a small bare graph a tenth of the budget, to see what memory is worth.",
        ),
    ] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the plan is written.")] = Path("plan.json"),
    server: Server = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the fastest training step whose peak never exceeds the budget, and prove how near it is to the best."""
    budget = parse_size(memory)
    _at_least(0, time_limit=time_limit, gap=gap)
    from tightfit.planner.io import save_plan
    from tightfit.profiles.api import load_profile
    from tightfit.runtime.cli.terminal import Solving, messages
    from tightfit.runtime.common.files import check_place

    check_place(output)
    console = messages()
    loaded = load_profile(profile)
    if server is not None and what_if:
        raise InputError("--what-if plans on this machine: leave out either it or --server")
    with Interrupts() as interrupts, Solving(console, time_limit) as solving:
        if server is not None:
            with _service(server) as service:
                planned = service.plan(loaded, budget, policy=policy, time_limit=time_limit, gap=gap, progress=solving)
                why = service.explanation(planned)
        else:
            planned, why = _plan_here(loaded, budget, policy, time_limit, gap, solving, interrupts, what_if=what_if)
    if why.shortfall is not None and why.shortfall.minimum_budget_bytes != planned.minimum_budget_bytes:
        # The search went on after the answer and found less; the reason told of the plan before.
        smallest = why.shortfall.minimum_budget_bytes
        planned = planned.model_copy(update={"minimum_budget_bytes": smallest, "minimum_budget_reason": None})
    summary = _told(planned) | {"interrupted": interrupts.seen, "explanation": why.model_dump(mode="json")}
    if planned.status == "infeasible":
        answer(summary, None, as_json=as_json)
        console.print(f"tightfit: {answers.infeasible_text(planned, why)}")
        raise typer.Exit(3)
    if interrupts.seen:
        console.print(
            f"interrupted: this is the best plan found so far, at most {planned.gap:.2%} from the best of its kind"
        )
    with _answering(summary, answers.plan_text(planned, why), as_json):
        summary["plan"] = str(save_plan(planned, output))
    console.print(f"plan written to {output}{_run_next(planned, output)}")


@app.command()
def compare(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.json, or a bare graph of operators.")],
    memory: Annotated[str, typer.Option(metavar="SIZE,...", help="Budgets, for example 400MiB,600MiB,1GiB.")],
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="solver and fixed rules to compare; default: the solver and every exact rule that applies to the profile.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="own: the profile's own device. Names of devices (see `tightfit devices`) or JSON files that describe them: times estimated from the profile's FLOPs and bytes.",
        ),
    ] = "own",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one self-contained HTML page.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the curve as .png or .svg.")] = None,
    time_limit: TimeLimit = 30.0,
    gap: Gap = 0.0,
    server: Server = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare policies over budgets and devices: seconds per step, or the smallest budget that would be enough."""
    budgets = [parse_size(part) for part in memory.split(",")]
    policies = None if policy is None else [part.strip() for part in policy.split(",")]
    _at_least(0, time_limit=time_limit, gap=gap)
    from tightfit.planner.report.compare import compare as compare_plans
    from tightfit.profiles.api import load_profile
    from tightfit.profiles.devices.data_sheets import find_device
    from tightfit.runtime.cli.terminal import Comparing, messages
    from tightfit.runtime.common.files import check_place, write_whole

    if html is not None:
        check_place(html)
    if picture is not None:
        from tightfit.planner.report.figures import picture_kind

        picture_kind(picture)
        check_place(picture)

    console = messages()
    names = [part.strip() for part in device.split(",")]
    loaded = load_profile(profile)
    with Interrupts() as interrupts, Comparing(console, interrupts) as comparing:
        if server is not None:
            with _service(server) as service:
                plans = service.compare(
                    loaded,
                    budgets,
                    policies,
                    devices=names,
                    time_limit=time_limit,
                    gap=gap,
                    progress=comparing.elsewhere,
                ).plans
        else:
            plans = compare_plans(
                loaded,
                budgets,
                policies,
                devices=[None if name == "own" else find_device(name) for name in names],
                time_limit=time_limit,
                gap=gap,
                progress=comparing,
                solving=comparing.solving,
            ).plans
    if interrupts.seen:
        console.print(f"interrupted: these are the {len(plans)} plans made so far, the last one with what it had found")
    summary: dict[str, Any] = {
        "interrupted": interrupts.seen,
        "plans": [_told(one) for one in plans],
    }
    with _answering(summary, answers.comparison_text(plans), as_json):
        if as_json:
            summary["changes"] = answers.changes(plans)
        if html is not None:
            from tightfit.planner.report.html import comparison_page

            summary["html"] = str(write_whole(html, comparison_page(plans)))
        if picture is not None:
            from tightfit.planner.report.figures import draw_curve

            summary["picture"] = str(draw_curve(plans, picture))
    for kind in ("html", "picture"):
        if kind in summary:
            console.print(f"{kind} written to {summary[kind]}")


@app.command()
def run(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|FILE.jsonl|random",
            help="Training data, as JSON lines; random: made-up tokens, for sizing, or a module's sample batch.",
        ),
    ],
    steps: Annotated[int, typer.Option(help="Steps in all, each of one batch.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for adapter, report, metrics and checkpoints.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in the folder.")
    ] = False,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW, or of a mezo plan's SGD.")] = 2e-4,
    seed: Annotated[int, typer.Option(help="Seed of the adapter's start and the order of the data.")] = 0,
    schedule: Annotated[
        str, typer.Option(help="Course of the learning rate: constant, linear or cosine.")
    ] = "constant",
    warmup_steps: Annotated[int, typer.Option(help="Steps over which the learning rate rises from zero.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: only at the end.")] = 50,
    evaluate: Annotated[
        str | None, typer.Option("--eval", metavar="FILE.jsonl", help="Held-out data, evaluated before and after.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut samples longer than the planned sequence instead of refusing them.")
    ] = False,
    cgroup: Annotated[
        bool,
        typer.Option("--cgroup/--no-cgroup", help="Let the kernel enforce the cap where a memory cgroup can be made."),
    ] = True,
    profile_step: Annotated[
        bool,
        typer.Option(
            "--profile-step",
            help="Report where the seconds of the third step went (where several make an update, of the next that ends one), or of the last of fewer.",
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train under the cap as planned; leaves an adapter that PEFT loads and a report of predicted beside measured."""
    _at_least(1, steps=steps)
    _at_least(
        0, checkpoint_every=checkpoint_every, lr=lr, seed=seed, warmup_steps=warmup_steps, weight_decay=weight_decay
    )
    _at_most(LARGEST_SEED, seed=seed)
    if resume and overwrite:
        raise InputError("--resume goes on from what lies in the folder, --overwrite replaces it: give one of them")
    from tightfit.planner.io import load_plan
    from tightfit.runtime.engine.device.resident import memory
    from tightfit.runtime.session.launch import prepared
    from tightfit.runtime.supervision.cgroup import MemoryCgroup
    from tightfit.runtime.supervision.progress import Training
    from tightfit.runtime.supervision.supervisor import Show, hand_over
    from tightfit.runtime.supervision.training_process import Order

    loaded = load_plan(plan)
    tokens = loaded.batch * loaded.seq if loaded.seq else None
    with (
        Training(steps=steps, tokens_per_step=tokens, budget=loaded.budget_bytes) as training,
        prepared(
            loaded,
            data,
            steps=steps,
            out=output,
            resume=resume,
            overwrite=overwrite,
            lr=lr,
            schedule=schedule,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            seed=seed,
            checkpoint_every=checkpoint_every,
            eval_data=evaluate,
            truncate=truncate,
            cgroup=cgroup,
            profile_step=profile_step,
            stages=training.stage,
            counted=bool(context.obj),
        ) as ready,
    ):
        if isinstance(ready, Order):
            group = MemoryCgroup.create(loaded.budget_bytes) if cgroup else None
            show = Show(
                steps=steps,
                tokens_per_step=tokens,
                as_json=as_json,
                debug=debug,
                preparation_bytes=memory().peak,
                group=(str(group.path), group.version) if group else None,
                home=MemoryCgroup.home() if group else None,
            )
            raise typer.Exit(hand_over(ready, show, group, replace=context.obj))
    sys.stderr.write(f"already done: {output} has all {steps} steps; give more --steps to go on\n")
    answer(ready, answers.report_text(ready), as_json=as_json)


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to answer at; anything but this machine's own needs a token in TIGHTFIT_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to answer at; 0: a free one.")] = 8000,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What the service keeps; default: service in tightfit's cache folder."),
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder from which requests may name models and data; may be repeated."),
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Let requests name models on the hub, to be downloaded.")] = False,
    workers: Annotated[int, typer.Option(help="Plans solved at once.")] = 2,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory that one solving process may take; a comparison has two.")
    ] = "4GiB",
    keep_days: Annotated[float, typer.Option(help="Days after which unused results are removed.")] = 30.0,
    keep: Annotated[str, typer.Option(metavar="SIZE", help="Disk that results and packed weights may take.")] = "20GiB",
    debug: Debug = False,
) -> None:
    """Serve plans, comparisons and runs over HTTP, with a page at the same address."""
    _at_least(0, port=port, keep_days=keep_days)
    _at_most((1 << 16) - 1, port=port)
    _at_least(1, workers=workers)
    solve_bytes = parse_size(memory)
    if solve_bytes < LEAST_SOLVE_BYTES:
        raise InputError(
            f"--memory {memory}: no plan is solved in less than {format_size(LEAST_SOLVE_BYTES)}; give as much"
        )
    with _served():
        from tightfit.planner.service.http.app import serve as answer
    from tightfit.planner.service.wire.settings import Settings

    if data_dir is None:
        from tightfit.runtime.common.files import cache_directory

        data_dir = cache_directory() / "service"
    answer(
        Settings(
            data_dir=data_dir.absolute(),
            command=tuple(command("tightfit.runtime.cli.main")),
            host=host,
            port=port,
            token=os.environ.get("TIGHTFIT_TOKEN") or None,
            roots=tuple(path.absolute() for path in root or ()),
            hub=hub,
            workers=workers,
            solve_bytes=solve_bytes,
            keep_days=keep_days,
            keep_bytes=parse_size(keep),
        )
    )


def _told(plan: Plan) -> dict[str, Any]:
    """A plan's summary with the device that it is for."""
    return answers.plan_summary(plan) | {"device": plan.device.name, "measured": plan.device.measured}


def _run_next(plan: Plan, path: Path) -> str:
    """How a plan is run, where this runtime can: not of a bare graph, for a card or on estimated times."""
    if plan.model.kind == "graph" or plan.device.kind != "cpu" or not plan.device.measured:
        return ""
    data = "random" if plan.model.kind == "module" else "FILE.jsonl"
    return f"; next: tightfit run {shlex.quote(str(path))} --data {data} --steps N -o out"


def _plan_here(
    profile: Profile,
    budget: int,
    policy: str | None,
    time_limit: float,
    gap: float,
    solving: Solving,
    interrupts: Interrupts,
    *,
    what_if: bool,
) -> tuple[Plan, Explanation]:
    """The plan, and why it is as it is; with what memory is worth beside it."""
    from tightfit.planner.plan import planner_of
    from tightfit.planner.report.explanation import account
    from tightfit.planner.report.marginal_value import explained
    from tightfit.planner.report.marginal_value import what_if as check

    planner = planner_of(profile)
    started = time.monotonic()
    planned = planner.plan(budget, policy=policy, time_limit=time_limit, gap=gap, progress=solving)
    # Whatever Ctrl-C takes from here on, the answer is there.
    with contextlib.suppress(KeyboardInterrupt):
        if what_if and planned.status != "infeasible" and planned.policy == "solver" and not interrupts.seen:
            planned, beside = check(planner, planned, time_limit=time_limit, gap=gap, progress=solving)
            return planned, account(planned).model_copy(update={"neighbours": beside})
        left = 0.0 if interrupts.seen else time_limit - (time.monotonic() - started)
        return planned, explained(planner, planned, time_limit=time_limit, left=left)
    return planned, account(planned)


@contextlib.contextmanager
def _service(url: str) -> Iterator[Client]:
    """The service at `url`; what Ctrl-C leaves going on there is said."""
    with _served():
        from tightfit.planner.service.client import connect
    with connect(url) as service:
        try:
            yield service
        except KeyboardInterrupt as stop:
            raise RunError("; ".join(["interrupted", *map(str, stop.args)])) from stop


@contextlib.contextmanager
def _served() -> Iterator[None]:
    """What comes with the extra `serve` is missing: say how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in {"planner", "profiles", "runtime"}:
            raise
        raise InputError(
            f"{error.name} is not installed; a service and its clients need it: pip install 'tightfit[serve]'"
        ) from error


def _at_least(least: float, **options: float) -> None:
    """Refuse options below `least`, named as Python names them."""
    for name, value in options.items():
        if not value >= least:
            raise InputError(f"--{name.replace('_', '-')} {value}: give a number of at least {least}")


def _at_most(most: int, **options: int) -> None:
    """Refuse options above `most`, named as Python names them."""
    for name, value in options.items():
        if value > most:
            raise InputError(f"--{name.replace('_', '-')} {value}: give a number of at most {most}")


@contextlib.contextmanager
def _answering(result: dict[str, Any], human: Any, as_json: bool) -> Iterator[None]:
    """Print a command's result whatever becomes of the files written inside: to a person before them, as JSON after them,
    with the error where there was one.
    """
    if not as_json:
        answer(result, human, as_json=as_json)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not as_json:
            raise
        result["error"] = failure = _failure(error if isinstance(error, Exception) else typer.Abort())
        answer(result, human, as_json=as_json)
        sys.stderr.write(f"tightfit: {failure['message']}\n")
        raise typer.Exit(failure["exit_code"]) from error
    if as_json:
        answer(result, human, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; every failure is a message on stderr, and JSON where that was asked for."""
    _open_what_is_closed()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("TIGHTFIT_DEBUG", "") not in ("", "0")
    interrupts = Interrupts()
    try:
        with interrupts:
            # What a program calls with `arguments` must not take that program's place.
            code = app(args=words, prog_name="tightfit", standalone_mode=False, obj=arguments is None)
        if code == INTERRUPTED:
            raise typer.Abort
    except (Exception, KeyboardInterrupt) as caught:
        error = caught if isinstance(caught, Exception) else typer.Abort()
        if interrupts.seen and not _expected(error):
            # C code that Ctrl-C ends may tell of an error of its own instead.
            error = typer.Abort()
        if debug and not _usage(error) and not isinstance(error, typer.Abort):
            raise
        code = told(_failure(error), as_json="--json" in words)
    code = code if isinstance(code, int) else 0
    if left_alone():
        # A solver that Ctrl-C or its time limit ended the waiting for goes on, for nobody.
        try:
            for stream in (sys.stdout, sys.stderr):
                # Closed, or with nobody left to read it.
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        finally:
            os._exit(code)
    sys.exit(code)


def _open_what_is_closed() -> None:
    """Where this process was started without a stream, what is said there goes nowhere, and into no file opened since."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  for good


def _expected(error: BaseException) -> bool:
    return isinstance(error, (TightfitError, typer.Abort, OSError)) or _usage(error)


def _usage(error: BaseException) -> bool:
    """Whether the command line itself was wrong. Typer brings a Click of its own or takes the installed one, by version."""
    return hasattr(error, "format_message")


def _failure(error: Exception) -> dict[str, Any]:
    """What went wrong, as --json tells it."""
    if _usage(error):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "tightfit"
        message = f"{error.format_message().rstrip('.')}; try '{command} --help'"  # type: ignore[attr-defined]
        return {"kind": type(error).__name__, "message": message, "exit_code": 2}
    return failure_of(KeyboardInterrupt() if isinstance(error, typer.Abort) else error)


if __name__ == "__main__":
    main()
