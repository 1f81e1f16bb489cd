"""The command ``tightfit profile``: measures a model on this machine, or estimates it for another device."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tightfit.runtime.cli import answers
from tightfit.runtime.cli.options import Debug, Force, Json, at_least
from tightfit.runtime.common.limits import enough_for_a_solver
from tightfit.runtime.supervision.printing import answer


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
        1, seq=seq, batch=batch, lora_rank=lora_rank, accumulate=accumulate, threads=1 if threads is None else threads
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
    console.print(f"profile written to {output}; next: tightfit plan {shlex.quote(str(output))} --memory SIZE")
