"""The commands ``tightfit fleet ...``: several devices, each within its own budget, train one model together."""

from __future__ import annotations

import typer

from tightfit.runtime.cli.command import Command
from tightfit.runtime.cli.fleet_federate import federate
from tightfit.runtime.cli.fleet_plan import DESCRIPTION, plan
from tightfit.runtime.cli.fleet_run import run

fleet = typer.Typer(
    help="Plan training that several devices do together, each within its own memory, and run it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
fleet.command(cls=Command, epilog=DESCRIPTION)(plan)
fleet.command(cls=Command)(run)
fleet.add_typer(federate, name="federate")
