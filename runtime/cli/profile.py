"""The command ``tightfit profile``: measures a model on this machine, or estimates it for another device."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from tightfit.runtime.cli import answers
from tightfit.runtime.cli.options import Debug, Force, Json, at_least, next_command
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.limits import enough_for_a_solver
from tightfit.runtime.supervision.printing import answer

Number = TypeVar("Number", int, float)


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
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the LoRA pairs; default: 8.")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="LoRA scale is alpha / rank; default: twice the rank.")
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="Linear layers that get pairs: all-linear (the default), attention, names such as q_proj,v_proj, or a regular expression for whole names.",
        ),
    ] = None,
    lora_layers: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Only in these layers of the model, such as 8-15,20.")
    ] = None,
    rank_pattern: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=RANK", help="Another rank where a layer's name ends so, such as q_proj=16."),
    ] = None,
    alpha_pattern: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=ALPHA", help="Another alpha there, such as q_proj=32.")
    ] = None,
    lora_dropout: Annotated[
        float | None,
        typer.Option(metavar="P", help="Share of a pair's input that is left out in training, anew in each step."),
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora/--no-rslora", help="LoRA scale is alpha / sqrt(rank).")] = False,
    dora: Annotated[bool, typer.Option("--dora/--no-dora", help="Train a magnitude beside each pair (DoRA).")] = False,
    modules_to_save: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Modules that are trained in full: embed_tokens, lm_head, or both."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Take all LoRA settings from this adapter of PEFT, so that a run can start from it."
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="dpo|orpo",
            help="Learn from pairs of a chosen and a rejected answer, --batch of them per step, instead of predicting tokens.",
        ),
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="How much the comparison weighs in the loss of pairs; default: 0.1.")
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
    side_rank: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            help="Measure the step of a side network beside MODEL instead, with adapters of this rank: the server's part of `mobillm`.",
        ),
    ] = None,
    side_blocks: Annotated[
        int | None, typer.Option(help="Blocks of MODEL whose outputs a side network reads; default: 8, or all.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help="4bit, 8bit or 16bit: precision of the frozen weights, where MODEL leaves a choice; default: what the file holds, 4bit for files in 16 or 32 bits.",
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(metavar="BITS", help="The same for the embedding and the head; default: as the other weights."),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the profile is written.")] = Path(
        "profile.json"
    ),
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure one training step of MODEL (or estimate it, on a device that is not here): its tensors, operators, disk
    and process floor. The weights need not fit in memory.
    """
    at_least(
        1,
        seq=seq,
        batch=batch,
        lora_rank=1 if lora_rank is None else lora_rank,
        accumulate=accumulate,
        threads=1 if threads is None else threads,
    )
    enough_for_a_solver()
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
            lora_targets=lora_targets,
            lora_layers=lora_layers,
            rank_pattern=_numbers("--rank-pattern", rank_pattern, int),
            alpha_pattern=_numbers("--alpha-pattern", alpha_pattern, float),
            lora_dropout=lora_dropout,
            rslora=rslora,
            dora=dora,
            modules_to_save=tuple(name.strip() for name in (modules_to_save or "").split(",") if name.strip()),
            adapter=adapter,
            loss=loss,
            beta=beta,
            accumulate=accumulate,
            dtype=dtype,
            device=device,
            threads=threads,
            side_rank=side_rank,
            side_blocks=side_blocks,
            base=base,
            embeddings=embeddings,
            force=force,
            progress=stages,
        )
    save_profile(measured, output)
    summary = answers.profile_summary(measured) | {"profile": str(output)}
    answer(summary, answers.profile_text(measured), as_json=as_json)
    following = next_command(f"tightfit plan {shlex.quote(str(output))} --memory SIZE")
    console.print(f"profile written to {output}{following}")


def _numbers(option: str, words: Sequence[str] | None, number: Callable[[str], Number]) -> dict[str, Number]:
    """What ``PATTERN=NUMBER`` says, once or often. Raises InputError for anything else."""
    found: dict[str, Number] = {}
    for word in words or ():
        pattern, equals, value = word.rpartition("=")
        try:
            found[pattern] = number(value)
        except ValueError:
            equals = ""
        if not equals or not pattern:
            raise InputError(f"{option} {word!r}: give a pattern of names and a number, such as q_proj=16")
    return found
