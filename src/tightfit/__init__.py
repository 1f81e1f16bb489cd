"""tightfit: fit training into the memory you have.

    import tightfit

    measured = tightfit.profile("my_module:factory")
    planned = tightfit.plan(measured, 400 << 20)  # bytes
    report = tightfit.run(planned, batches, steps=200, out="out")

Each name below is imported when it is first asked for: a process that only reads plans loads neither a solver nor
PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightfit.planner.compare import compare
    from tightfit.planner.io import load_plan, save_plan
    from tightfit.planner.plan import minimum_budget, plan, planner_of
    from tightfit.planner.report.explain import explain
    from tightfit.planner.schema import Plan
    from tightfit.planner.service.client import connect
    from tightfit.planner.simulation.simulate import simulate
    from tightfit.profiles.api import load_profile, prepare, profile, save_profile
    from tightfit.profiles.devices.data_sheets import find_device, known_devices
    from tightfit.profiles.schema import Profile
    from tightfit.runtime.common.errors import CapError, InfeasibleError, InputError, RunError, TightfitError
    from tightfit.runtime.common.units import parse_size
    from tightfit.runtime.results.evaluation import evaluate
    from tightfit.runtime.results.generation import generate
    from tightfit.runtime.results.merge import merge
    from tightfit.runtime.session.launch import run
    from tightfit.runtime.session.rehearsal import rehearse
    from tightfit.runtime.session.session import Session
    from tightfit.runtime.session.train import train

__all__ = [
    "CapError",
    "InfeasibleError",
    "InputError",
    "Plan",
    "Profile",
    "RunError",
    "Session",
    "TightfitError",
    "compare",
    "connect",
    "evaluate",
    "explain",
    "find_device",
    "generate",
    "known_devices",
    "load_plan",
    "load_profile",
    "merge",
    "minimum_budget",
    "parse_size",
    "plan",
    "planner_of",
    "prepare",
    "profile",
    "rehearse",
    "run",
    "save_plan",
    "save_profile",
    "simulate",
    "train",
]

_PLACES = {
    "planner.io": ("load_plan", "save_plan"),
    "planner.plan": ("minimum_budget", "plan", "planner_of"),
    "planner.compare": ("compare",),
    "planner.report.explain": ("explain",),
    "planner.schema": ("Plan",),
    "planner.service.client": ("connect",),
    "planner.simulation.simulate": ("simulate",),
    "profiles.api": ("load_profile", "prepare", "profile", "save_profile"),
    "profiles.devices.data_sheets": ("find_device", "known_devices"),
    "profiles.schema": ("Profile",),
    "runtime.common.errors": ("CapError", "InfeasibleError", "InputError", "RunError", "TightfitError"),
    "runtime.common.units": ("parse_size",),
    "runtime.results.evaluation": ("evaluate",),
    "runtime.results.generation": ("generate",),
    "runtime.results.merge": ("merge",),
    "runtime.session.launch": ("run",),
    "runtime.session.rehearsal": ("rehearse",),
    "runtime.session.session": ("Session",),
    "runtime.session.train": ("train",),
}
"""the same, for the interpreter"""
_PLACE = {name: f"{__name__}.{place}" for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
