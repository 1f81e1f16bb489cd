"""Which optional packages bring what: turns a missing package into an error that says how to install it."""

from __future__ import annotations

from tightfit.runtime.common.errors import InputError

EXTRAS = {
    "ortools": ("planner", "planning on this machine", ", or let a service plan"),
    "networkx": ("planner", "planning on this machine", ", or let a service plan"),
    "matplotlib": ("planner", "drawing", ""),
    "fastapi": ("serve", "a service", ""),
    "uvicorn": ("serve", "a service", ""),
}
"""package -> (extra of tightfit that brings it, what needs it, what else can be done)"""


def not_installed(error: ImportError) -> InputError | None:
    """The error to show for a package that an extra brings; None for any other."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    extra, what, otherwise = EXTRAS[package]
    return InputError(f"{package} is not installed, which {what} needs: pip install 'tightfit[{extra}]'{otherwise}")
