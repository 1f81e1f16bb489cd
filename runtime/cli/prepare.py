"""The command ``tightfit prepare``: makes a bundle of a model for a device that has too little memory to trace it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.profiles.option_fields import PRIMARY
from tightfit.profiles.options import ProfileOptions
from tightfit.runtime.cli.options import Debug, Json, next_command, read, with_options
from tightfit.runtime.common.units import format_size
from tightfit.runtime.supervision.printing import answer


@with_options(ProfileOptions, "device", "threads", "force", "bundle", "accumulate")
def prepare(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id, a GGUF file, or a bare config.json."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder that is made."), PRIMARY
    ] = Path("model.tight"),
    weights: Annotated[
        bool,
        typer.Option(
            "--weights/--no-weights",
            help="Put the packed weights into the bundle, so that the device needs nothing else.",
        ),
        PRIMARY,
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Make a bundle of MODEL, a folder with the traced training step and the traced answers, which is copied to a small
    device: with it `tightfit train`, `generate` and `chat` need neither transformers nor the memory of tracing.
    """
    prepare_options = read(ProfileOptions, options)
    from tightfit.runtime.cli.terminal import StagesDisplay, messages

    console = messages()
    with StagesDisplay(console) as stages:
        stages(f"opening {model}", 0, 1)
        from tightfit.profiles.api import prepare as make

        bundle = make(model, output, weights, **dict(prepare_options.but(progress=stages)))
    step = bundle.step
    size = sum(file.stat().st_size for file in output.iterdir())
    summary = {
        "folder": str(output),
        "bytes": size,
        "model": step.model.name,
        "seq": step.seq,
        "batch": step.batch,
        "weights": weights,
        "answers": bundle.answers.refused is None,
    }
    text = (
        f"{output}: a bundle of {step.model.name} {'with' if weights else 'without'} its weights, a step of"
        f" {step.batch} x {step.seq} tokens, {format_size(size)}"
    )
    answer(summary, text, as_json=as_json)
    if bundle.answers.refused is not None:
        console.print(f"no answers: {bundle.answers.refused}")
    words = shlex.quote(str(output))
    if not weights:
        words = f"{shlex.quote(model)} --bundle {words}"
    console.print(f"copy the folder{next_command(f'tightfit train {words} --data FILE.jsonl --memory SIZE -o out')}")
