"""The commands ``tightfit generate`` and ``tightfit chat``: a model's answers, within a budget of memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tightfit.runtime.cli.options import Cgroup, Debug, Force
from tightfit.runtime.common.errors import InputError

if TYPE_CHECKING:
    from tightfit.planner.generation.plan import GenerationPlan
    from tightfit.runtime.data.samples import Prompt
    from tightfit.runtime.results.generation import AnswerOptions

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id, or a GGUF file.")]
AdapterFolder = Annotated[
    Path | None,
    typer.Option(
        "--adapter", metavar="DIR", help="Folder of an adapter of PEFT, or of the run that left it; applied unmerged."
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="SIZE|auto",
        help="Budget of all processes that live while answers are made: 600MiB, 600MB or plain bytes; auto: what this machine can spare now.",
    ),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="What the system turn says.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens of an answer.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0: take the likeliest token; else draw, the more evenly the higher.")
]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="SHARE", help="Draw from the likeliest tokens that make up this share.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from so many of the likeliest tokens; 0: from all.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the tokens that are drawn.")]
Cache = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="TYPE",
        help="Type of the cache of keys and values: float32, or bfloat16 for half of its bytes.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="PRECISION",
        help="Of matrices that MODEL does not hold quantised: 4bit (default), 8bit or 16bit.",
    ),
]
Embeddings = Annotated[
    str | None,
    typer.Option("--embeddings", metavar="PRECISION", help="The same for embedding and head; default: as --base."),
]
Threads = Annotated[int | None, typer.Option("--threads", help="Cores to compute with; default: all.")]

AnswersAsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for each answer, on a line of its own.")
]


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to answer.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help='Several prompts: one a line, or JSON lines with "prompt" (.jsonl).'
        ),
    ] = None,
    adapter: AdapterFolder = None,
    memory: Memory = "auto",
    system: System = None,
    template: Annotated[
        bool,
        typer.Option("--template/--no-template", help="Put prompts into the model's chat template, if it has one."),
    ] = True,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    cache: Cache = "float32",
    base: Base = None,
    embeddings: Embeddings = None,
    threads: Threads = None,
    force: Force = False,
    cgroup: Cgroup = True,
    as_json: AnswersAsJson = False,
    debug: Debug = False,
) -> None:
    """Answer prompts with MODEL, and an adapter if there is one, within a budget of memory; tokens are printed as they come."""
    from tightfit.runtime.results.generation import AnswerOptions, read_prompts

    if (prompt is None) == (prompts is None):
        raise InputError(
            "give --prompt TEXT, or --prompts FILE, and not both"
            if prompt
            else "--prompt TEXT or --prompts FILE is missing"
        )
    asked: list[Prompt] = [prompt] if prompt is not None else read_prompts(prompts or Path())
    options = AnswerOptions(
        max_tokens=max_tokens,
        sampling=_sampling(temperature, top_p, top_k, seed),
        system=system,
        template=template,
        cache=cache,
        base=base,
        embeddings=embeddings,
        threads=threads,
        force=force,
    )
    _hand_on(context, model, memory, options, asked, adapter, cgroup=cgroup, as_json=as_json, debug=debug)


def chat(
    context: typer.Context,
    model: Model,
    adapter: AdapterFolder = None,
    memory: Memory = "auto",
    system: System = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="TOKENS",
            help="Tokens of the conversation that are remembered, the next answer included; default: 2048.",
        ),
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    cache: Cache = "float32",
    base: Base = None,
    embeddings: Embeddings = None,
    threads: Threads = None,
    force: Force = False,
    cgroup: Cgroup = True,
    as_json: AnswersAsJson = False,
    debug: Debug = False,
) -> None:
    """Talk with MODEL, and an adapter if there is one, within a budget of memory: one question a line."""
    from tightfit.runtime.results.generation import AnswerOptions

    options = AnswerOptions(
        max_tokens=max_tokens,
        sampling=_sampling(temperature, top_p, top_k, seed),
        system=system,
        cache=cache,
        context=tokens,
        base=base,
        embeddings=embeddings,
        threads=threads,
        force=force,
    )
    _hand_on(context, model, memory, options, None, adapter, cgroup=cgroup, as_json=as_json, debug=debug)


def _sampling(temperature: float, top_p: float, top_k: int, seed: int) -> Any:
    from tightfit.runtime.engine.generation.job import Sampling

    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)


def _hand_on(
    context: typer.Context,
    model: str,
    size: str,
    options: AnswerOptions,
    prompts: Sequence[Prompt] | None,
    adapter: Path | None,
    *,
    cgroup: bool,
    as_json: bool,
    debug: bool,
) -> NoReturn:
    """Prepare the answers and start the process that shows them, in the place of this one unless a program has called."""
    from tightfit.runtime.cli.terminal import Stages, messages
    from tightfit.runtime.common.units import format_size, parse_size
    from tightfit.runtime.results import chat as conversation
    from tightfit.runtime.results.generation import prepared
    from tightfit.runtime.session.spare_memory import spare_memory
    from tightfit.runtime.supervision import answering
    from tightfit.runtime.supervision.cgroup import MemoryCgroup
    from tightfit.runtime.supervision.supervisor import become

    console = messages()
    if size == "auto":
        budget, why = spare_memory()
        console.print(f"memory: {format_size(budget)}; {why}")
    else:
        budget = parse_size(size)

    def told(plan: GenerationPlan) -> None:
        console.print(f"plan: {_sentence(plan)}")

    with ExitStack() as kept, ExitStack() as shown:
        order = kept.enter_context(
            prepared(
                model,
                budget,
                options,
                prompts=prompts,
                adapter=adapter,
                cgroup=cgroup,
                as_json=as_json,
                debug=debug,
                stages=shown.enter_context(Stages(console)),
                told=told,
            )
        )
        shown.close()
        group = MemoryCgroup.create(budget) if cgroup else None
        if group is not None:
            order = replace(order, group=(str(group.path), group.version), home=MemoryCgroup.home())
        path = os.path.join(order.run.directory, "order")
        order.write(path)
        command = (conversation if prompts is None else answering).command(path)
        raise typer.Exit(become(command, order.run.lock, group, replace=bool(context.obj)))


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
