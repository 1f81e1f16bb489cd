"""The commands ``tightfit generate`` and ``tightfit chat``: a model's answers, within a budget of memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tightfit.profiles.option_fields import PRIMARY
from tightfit.profiles.weights.source import BUNDLE
from tightfit.runtime.cli.options import Certificate, Cgroup, Debug, Server, read, with_options
from tightfit.runtime.cli.phase_memory import ANSWERING, expect_phase
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.results.answer_options import AnswerOptions

if TYPE_CHECKING:
    from tightfit.planner.generation.answer_plan import GenerationPlan
    from tightfit.runtime.data.samples import Prompt

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id, or a GGUF file.")]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="SIZE|auto",
        help=(
            "Budget of all processes that live while answers are made: 600MiB, 600MB or plain bytes; auto: what this"
            " machine can spare now."
        ),
    ),
    PRIMARY,
]
AnswersAsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for each answer, on a line of its own."), PRIMARY
]


@with_options(AnswerOptions, "context", after="memory")
def generate(
    invoked: typer.Context,
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to answer."), PRIMARY] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help='Several prompts: one a line, or JSON lines with "prompt" (.jsonl).'
        ),
        PRIMARY,
    ] = None,
    memory: Memory = "auto",
    server: Server = None,
    certificate: Certificate = None,
    cgroup: Cgroup = True,
    as_json: AnswersAsJson = False,
    stream: Annotated[
        bool, typer.Option("--stream", help='With --json: the text as it comes, too, in objects with a "piece".')
    ] = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Answer prompts with MODEL, and an adapter if there is one, within a budget of memory; tokens are printed as they
    come.
    """
    from tightfit.runtime.results.generation import read_prompts

    if (prompt is None) == (prompts is None):
        raise InputError(
            "give --prompt TEXT, or --prompts FILE, and not both"
            if prompt
            else "--prompt TEXT or --prompts FILE is missing"
        )
    asked: list[Prompt] = [prompt] if prompt is not None else read_prompts(prompts or Path())
    wanted = read(AnswerOptions, options, cgroup=cgroup)
    if stream and not as_json:
        raise InputError("--stream: without --json the text is printed as it comes; give both, or neither")
    _hand_on(invoked, model, memory, wanted, asked, (server, certificate), as_json=as_json, stream=stream, debug=debug)


@with_options(AnswerOptions, "template", after="memory", max_tokens=512)
def chat(
    invoked: typer.Context,
    model: Model,
    memory: Memory = "auto",
    server: Server = None,
    certificate: Certificate = None,
    cgroup: Cgroup = True,
    as_json: AnswersAsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Talk with MODEL, and an adapter if there is one, within a budget of memory: one question a line."""
    wanted = read(AnswerOptions, options, cgroup=cgroup)
    _hand_on(invoked, model, memory, wanted, None, (server, certificate), as_json=as_json, debug=debug)


def _hand_on(
    invoked: typer.Context,
    model: str,
    size: str,
    options: AnswerOptions,
    prompts: Sequence[Prompt] | None,
    serving: tuple[str | None, Path | None],
    *,
    as_json: bool,
    stream: bool = False,
    debug: bool,
) -> NoReturn:
    """Prepare the answers and start the process that shows them, in the place of this one unless a program has called.

    `serving`: a service that traces and plans, and its certificate.
    """
    from tightfit.runtime.cli.terminal import StagesDisplay, messages
    from tightfit.runtime.common.units import format_size, parse_size
    from tightfit.runtime.results import chat as conversation
    from tightfit.runtime.results.generation import prepared
    from tightfit.runtime.supervision import answering
    from tightfit.runtime.supervision.cgroup import MemoryCgroup
    from tightfit.runtime.supervision.spare_memory import spare_memory
    from tightfit.runtime.supervision.supervisor import become

    console = messages()
    if invoked.obj:
        expect_phase("preparing the answers", ANSWERING, [Path(options.bundle or model) / BUNDLE])
    if size == "auto":
        budget, why = spare_memory()
        console.print(f"memory: {format_size(budget)}; {why}")
    else:
        budget = parse_size(size)

    def told(plan: GenerationPlan) -> None:
        console.print(f"plan: {_sentence(plan)}")

    with ExitStack() as kept, ExitStack() as shown:
        stages = shown.enter_context(StagesDisplay(console))
        options = options.but(stages=stages)
        server, certificate = serving
        if server is not None:
            from tightfit.runtime.cli.elsewhere import Elsewhere

            service = Elsewhere(server, certificate, force=options.force, report=lambda what: stages(what, 0, 1))
            bundle = service.answers(model, options)
            options = options.but(choose=service.choose, bundle=options.bundle if bundle is None else bundle)
        order = kept.enter_context(
            prepared(
                model,
                budget,
                options,
                prompts=prompts,
                as_json=as_json,
                stream=stream,
                debug=debug,
                told=told,
            )
        )
        shown.close()
        group = MemoryCgroup.create(budget) if options.cgroup else None
        if group is not None:
            order = replace(order, group=(str(group.path), group.version), home=MemoryCgroup.home())
        path = os.path.join(order.run.directory, "order")
        order.write(path)
        command = (conversation if prompts is None else answering).command(path)
        raise typer.Exit(become(command, order.run.lock, group, replace=bool(invoked.obj)))


def _sentence(plan: GenerationPlan) -> str:
    """What is said of a plan, for people."""
    from tightfit.runtime.common.units import format_size

    told = plan.summary()
    pieces = told["pieces"]
    number = sum(pieces.values())
    busy = ""
    if plan.busy_cores >= BUSY_CORES:
        busy = f" (measured while other programs took {plan.busy_cores:.1f} cores)"
    held = ", ".join(f"{count} of {number} parts of the weights {WHERE[state]}" for state, count in pieces.items())
    return (
        f"peak {format_size(plan.peak_bytes)} of {format_size(plan.budget_bytes)}; {held};"
        f" {format_size(plan.cache_bytes)} for {plan.context} tokens; {plan.times.token_seconds:.3f} s a token,"
        f" the first after {plan.times.first_seconds:.1f} s{busy}"
    )


BUSY_CORES = 0.25
"""cores of which it is said that other programs took them"""
WHERE = {"packed": "in memory", "unpacked": "in memory, unpacked", "streamed": "read for every token"}
