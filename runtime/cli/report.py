"""The command ``tightfit report``: hands the metrics of a run to TensorBoard or Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.runtime.cli.options import Debug, Json
from tightfit.runtime.supervision.printing import answer


def report(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The output folder of `tightfit run`.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="tensorboard|wandb", help="Who takes the metrics; tensorboard: a file in OUT/tensorboard."
        ),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on while the run goes on, until it ends or Ctrl-C.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hand the metrics of a run, of one that is under way or of one that is done, to a tool that draws curves.

    A process of its own, whose memory is no part of the run's budget.
    """
    from tightfit.runtime.cli.terminal import messages
    from tightfit.runtime.session.trackers import track

    console = messages()
    last_step = -1

    def print_step(step: int) -> None:
        nonlocal last_step
        if follow and step > last_step:
            console.print(f"{to} has step {step}")
            last_step = step

    counts = track(output, to, follow=follow, tell=print_step)
    text = f"{to} has {counts['steps']} steps and {counts['evaluations']} evaluations of {output}"
    answer(counts, text, as_json=as_json)
