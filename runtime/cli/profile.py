"""The command ``tightfit profile``: measures a model on this machine, or estimates it for another device."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.planner.report.summary import profile_summary
from tightfit.profiles.option_fields import PRIMARY
from tightfit.profiles.options import ProfileOptions
from tightfit.runtime.cli import answers
from tightfit.runtime.cli.options import Certificate, Debug, Json, Server, next_command, read, with_options
from tightfit.runtime.common.limits import enough_for_a_solver
from tightfit.runtime.common.units import parse_size
from tightfit.runtime.engine.device.resident import memory as resident
from tightfit.runtime.supervision.printing import answer


@with_options(ProfileOptions)
def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=(
                "A Hugging Face directory or hub id, a GGUF file, a bare config.json (random weights, for sizing) or"
                " package.module:factory."
            ),
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the profile is written."), PRIMARY] = Path(
        "profile.json"
    ),
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What measuring may hold; default: what it measures best with."),
    ] = None,
    server: Server = None,
    certificate: Certificate = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure one training step of MODEL (or estimate it, on a device that is not here): its tensors, operators, disk
    and process floor. The weights need not fit in memory.
    """
    profile_options = read(ProfileOptions, options)
    enough_for_a_solver()
    from tightfit.runtime.cli.terminal import StagesDisplay, messages
    from tightfit.runtime.common.files import check_writable

    check_writable(output)
    console = messages()
    with StagesDisplay(console) as stages:
        stages(f"opening {model}", 0, 1)  # on a busy machine, loading PyTorch takes a while
        from tightfit.profiles.api import profile as measure
        from tightfit.profiles.api import save_profile

        profile_options = profile_options.but(progress=stages, memory=_left_for_measuring(memory))
        if server is not None:
            from tightfit.runtime.cli.elsewhere import Elsewhere

            elsewhere = Elsewhere(
                server, certificate, force=profile_options.force, report=lambda what: stages(what, 0, 1)
            )
            bundle = elsewhere.bundle(model, profile_options)
            profile_options = profile_options if bundle is None else profile_options.but(bundle=bundle)
        measured = measure(model, **dict(profile_options))
    save_profile(measured, output)
    summary = profile_summary(measured) | {"profile": str(output)}
    answer(summary, answers.profile_text(measured), as_json=as_json)
    following = next_command(f"tightfit plan {shlex.quote(str(output))} --memory SIZE")
    console.print(f"profile written to {output}{following}")


def _left_for_measuring(memory: str | None) -> int | None:
    """Bytes of a budget that this process leaves to those that measure."""
    return None if memory is None else max(1, parse_size(memory) - resident().resident)
