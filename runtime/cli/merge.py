"""The command ``tightfit merge``: adds an adapter to the weights of its base and writes a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightfit.runtime.cli.options import Debug, Json
from tightfit.runtime.common.units import format_seconds, format_size
from tightfit.runtime.supervision.printing import answer

if TYPE_CHECKING:
    from rich.console import RenderableType


def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or of the run that left it.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the merged model; with --format gguf a .gguf file.")
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="safetensors|gguf",
            help="safetensors: a Hugging Face directory; gguf: a file for llama.cpp.",
        ),
    ] = "safetensors",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=(
                "The base: a Hugging Face directory or hub id, or a GGUF file; default: the one that the adapter was"
                " trained on."
            ),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help=(
                "float32, bfloat16 or float16, in GGUF also q8_0; default: what the base has, where that is quantised"
                " what its config names, in GGUF q8_0."
            ),
        ),
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only", help="With --format gguf: the LoRA pairs alone, as llama.cpp loads them beside a model."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that an earlier merge left at the place.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add an adapter to the weights of its base, tensor by tensor in a few MiB, and write the model that results."""
    from tightfit.runtime.cli.terminal import StagesDisplay, messages
    from tightfit.runtime.results import merge as merging

    with StagesDisplay(messages()) as stages:
        result = merging.merge(
            adapter,
            output,
            base=base,
            format=form,
            dtype=dtype,
            adapter_only=adapter_only,
            overwrite=overwrite,
            progress=stages,
        )
    answer(result, None if as_json else _text(result, "adapter" if adapter_only else "merged"), as_json=as_json)


def _text(result: dict[str, Any], what: str) -> RenderableType:
    from tightfit.runtime.supervision.report_text import facts_table

    types = result.get("types")
    rows = [
        (what, result["out"]),
        ("base", result["base"]),
        ("changed", f"{result['adapted']} tensors" + (f", as {_counts(types)}" if types else "")),
        ("size", f"{format_size(result['bytes'])} in {format_seconds(result['seconds'])}"),
        ("memory", f"peak of the process {format_size(result['peak_bytes'])}{_of(result.get('predicted_bytes'))}"),
        *([("note", result["note"])] if result["note"] else []),
    ]
    return facts_table(rows)


def _of(predicted: int | None) -> str:
    return "" if predicted is None else f", at most {format_size(predicted)} predicted"


def _counts(types: dict[str, int]) -> str:
    return ", ".join(f"{kind} ({count})" for kind, count in types.items())
