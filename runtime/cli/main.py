"""The command line: `main` runs one command, each of which has a file of its own beside this one.

Results go to stdout (with ``--json``, one JSON object and nothing else), messages and progress to stderr. Exit codes: 0
done, 2 bad input, 3 infeasible budget, 4 failed while running, 5 cap passed. What is heavy is imported inside the
commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tightfit.planner.solvers.solver_interrupts import left_alone
from tightfit.runtime.cli.command import Command
from tightfit.runtime.cli.compare import compare
from tightfit.runtime.cli.devices import devices
from tightfit.runtime.cli.eval import evaluate
from tightfit.runtime.cli.fleet import fleet
from tightfit.runtime.cli.generate import chat, generate
from tightfit.runtime.cli.merge import merge
from tightfit.runtime.cli.options import failure, usage
from tightfit.runtime.cli.plan import plan
from tightfit.runtime.cli.prepare import prepare
from tightfit.runtime.cli.profile import profile
from tightfit.runtime.cli.report import report
from tightfit.runtime.cli.run import run
from tightfit.runtime.cli.serve import serve
from tightfit.runtime.cli.train import TrainCommand, train
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.extras import not_installed
from tightfit.runtime.common.interpreter import PACKAGE
from tightfit.runtime.common.interrupts import Interrupts
from tightfit.runtime.common.limits import limited
from tightfit.runtime.common.option_names import named_as, on_command_line
from tightfit.runtime.common.torch_interface import untried
from tightfit.runtime.engine.start.lean_torch import installed_version
from tightfit.runtime.supervision.failure import print_failure

app = typer.Typer(
    name="tightfit",
    help=(
        "Fit training into the memory you have: profile a model, plan its training step for a budget, run the plan"
        " under that cap."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


INTERRUPTED = 130
"""exit code that Typer makes of Ctrl-C; its older versions raise Abort instead"""


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"tightfit {version('tightfit')}")
        except PackageNotFoundError:
            typer.echo("tightfit, not installed (run from a checkout)")
        with contextlib.suppress(ImportError):
            torch_version = installed_version()
            typer.echo("\n".join(filter(None, (f"PyTorch {torch_version}", untried(torch_version)))))
        raise typer.Exit


@app.callback()
def _tightfit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Warn now: a library that gets no memory for a thread may end the process without a message.
    if limit := limited(hardly_enough=True):
        typer.echo(f"tightfit: {limit}, hardly enough to load PyTorch and a solver", err=True)


app.command(cls=TrainCommand)(train)
for command in (profile, prepare, devices, plan, compare, run, report, generate, chat, merge, serve):
    app.command(cls=Command)(command)
app.command(cls=Command, name="eval")(evaluate)
app.add_typer(fleet, name="fleet")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code. A failure is reported on stderr, and as JSON if asked for.

    `arguments` are by default those of the process.
    """
    _open_what_is_closed()
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in command_line or os.environ.get("TIGHTFIT_DEBUG", "") not in ("", "0")
    interrupts = Interrupts()
    if arguments is None:
        warnings.formatwarning = _plain_warning
    try:
        with interrupts, named_as(on_command_line):
            # `obj` tells `tightfit run` whether it may replace this process: not if a program calls with `arguments`.
            code = app(args=command_line, prog_name="tightfit", standalone_mode=False, obj=arguments is None)
        if code == INTERRUPTED:
            raise typer.Abort
    except (Exception, KeyboardInterrupt) as caught:
        error = caught if isinstance(caught, Exception) else typer.Abort()
        error = (not_installed(error) if isinstance(error, ImportError) else None) or error
        if interrupts.seen and not _expected(error):
            # C code that Ctrl-C interrupts may raise an error of its own instead of KeyboardInterrupt.
            error = typer.Abort()
        if debug and not usage(error) and not isinstance(error, typer.Abort):
            raise
        code = print_failure(failure(error), as_json="--json" in command_line)
    code = code if isinstance(code, int) else 0
    if left_alone():
        # A solver's thread may still be running after Ctrl-C or its time limit; do not wait for it.
        try:
            for stream in (sys.stdout, sys.stderr):
                # The stream may be closed, or its reader gone.
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        finally:
            os._exit(code)
    sys.exit(code)


def _open_what_is_closed() -> None:
    """Open /dev/null for each standard stream that this process was started without.

    Otherwise a file opened later would get the stream's descriptor, and what is printed would go into it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  for good


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What tightfit warns of in a line for people; warnings of libraries as Python has them."""
    if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
        return f"tightfit: {message}\n"
    return _usual_warning(message, category, filename, lineno, line)


_usual_warning = warnings.formatwarning


def _expected(error: BaseException) -> bool:
    return isinstance(error, (TightfitError, typer.Abort, OSError)) or usage(error)


if __name__ == "__main__":
    main()
