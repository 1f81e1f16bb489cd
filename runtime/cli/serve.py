"""The command ``tightfit serve``: offers plans, comparisons and runs over HTTP, with a web page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tightfit.planner.service.wire.settings import Settings
from tightfit.runtime.cli.options import Debug
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.common.limits import LEAST_BYTES
from tightfit.runtime.common.units import format_size, parse_size


def serve(
    host: Annotated[
        str, typer.Option(help="Address to answer at; anything but this machine's own needs a token in TIGHTFIT_TOKEN.")
    ] = Settings.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to answer at; 0: a free one.")] = Settings.port,
    certificate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Speak https with this certificate, which is in PEM (docs/service.md)."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key; default: it is in the certificate's file.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What the service keeps; default: service in tightfit's cache folder."),
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder from which requests may name models and data; may be repeated."),
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Let requests name models on the hub, to be downloaded.")] = False,
    example: Annotated[bool, typer.Option(help="Begin with an example, where the service has no profile yet.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Plans solved at once.")] = Settings.workers,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory that one solving process may take; a comparison has two.")
    ] = f"{Settings.solve_bytes >> 30}GiB",
    keep_days: Annotated[float, typer.Option(help="Days after which unused results are removed.")] = Settings.keep_days,
    keep: Annotated[
        str, typer.Option(metavar="SIZE", help="Disk that results and packed weights may take.")
    ] = f"{Settings.keep_bytes >> 30}GiB",
    debug: Debug = False,
) -> None:
    """Serve plans, comparisons and runs over HTTP, with a page at the same address."""
    solve_bytes = parse_size(memory)
    if solve_bytes < LEAST_BYTES:
        raise InputError(f"--memory {memory}: no plan is solved in less than {format_size(LEAST_BYTES)}; give as much")
    from tightfit.planner.service.http.app import serve as serve_http

    if data_dir is None:
        from tightfit.runtime.common.files import cache_directory

        data_dir = cache_directory() / "service"
    serve_http(
        Settings(
            data_dir=data_dir.absolute(),
            command=tuple(command("tightfit.runtime.cli.main")),
            host=host,
            port=port,
            token=os.environ.get("TIGHTFIT_TOKEN") or None,
            certificate=certificate,
            key=key,
            roots=tuple(path.absolute() for path in root or ()),
            hub=hub,
            example=example,
            workers=workers,
            solve_bytes=solve_bytes,
            keep_days=keep_days,
            keep_bytes=parse_size(keep),
        )
    )
