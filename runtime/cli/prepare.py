"""The command ``tightfit prepare``: traces a model on this machine for a device that has too little memory for that."""

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


@with_options(ProfileOptions, "device", "threads", "force", "prepared", "accumulate")
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
            help="Put the packed weights into the folder, so that the device needs nothing else.",
        ),
        PRIMARY,
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Trace a training step of MODEL into a folder, which is copied to a small device: `tightfit train FOLDER` there needs neither
    transformers nor the memory of tracing.
    """
    prepare_options = read(ProfileOptions, options)
    from tightfit.runtime.cli.terminal import StagesDisplay, messages

    console = messages()
    with StagesDisplay(console) as stages:
        stages(f"opening {model}", 0, 1)
        from tightfit.profiles.api import prepare as trace

        prepared = trace(model, output, weights, **dict(prepare_options.but(progress=stages)))
    step = prepared.training
    size = sum(file.stat().st_size for file in output.iterdir())
    summary = {
        "folder": str(output),
        "bytes": size,
        "model": step.model.name,
        "seq": step.seq,
        "batch": step.batch,
        "weights": prepared.weights,
    }
    where = {"here": "with its weights", "elsewhere": "without weights", "random": "which has no weights"}[
        prepared.weights
    ]
    text = f"{output}: {step.model.name} {where}, a step of {step.batch} x {step.seq} tokens, {format_size(size)}"
    answer(summary, text, as_json=as_json)
    model_words = f"{shlex.quote(str(output))}"
    if prepared.weights == "elsewhere":
        model_words = f"{shlex.quote(model)} --prepared {model_words}"
    console.print(
        f"copy the folder{next_command(f'tightfit train {model_words} --data FILE.jsonl --memory SIZE -o out')}"
    )
