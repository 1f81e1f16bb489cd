"""What planning takes is counted before a solver is loaded, from the sizes that the solver's programs then have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import SOURCES
from synthetic import REAL, decoder_like, deep, device

from tightfit.planner.formulation.layer_constraints import LayerProgram
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.search_options import PlanOptions
from tightfit.planner.solve import planning_memory
from tightfit.planner.solve.planning_memory import planning_bytes
from tightfit.planner.solvers.lp import LinearProgram
from tightfit.profiles.io import save_profile
from tightfit.profiles.schema import Profile

MIB = 1 << 20
PROFILES = {
    "decoder": lambda: decoder_like(12, tokens=256, slices=3, on=device(**REAL)),
    "head in parts": lambda: decoder_like(4, tokens=64, slices=64, on=device(**REAL)),
    "chain": deep,
}
OBSERVED = """
import sys
import tightfit.runtime.cli.plan as command
from tightfit.runtime.engine.device.resident import memory

expect = command.expect
def noting(doing, added, instead):
    print(memory().resident + added, "ortools" in sys.modules)
    expect(doing, added, instead)

command.expect = noting
sys.argv = ["tightfit", *sys.argv[1:]]
from tightfit.runtime.cli import main
try:
    main.main()
finally:
    print(memory().peak)
"""


@pytest.mark.parametrize("name", PROFILES)
def test_programs_are_as_large_as_counted(name):
    counted = built = 0
    for kind in planning_memory._priced(layered(PROFILES[name]())):
        counted += planning_memory._entries(kind)
        built += len(LayerProgram(LinearProgram(), kind).program.matrix[0])
    assert 0.85 * built <= counted <= 1.2 * built + 500


def test_nothing_is_added_for_a_search_that_is_not_made():
    profile = PROFILES["decoder"]()
    options = PlanOptions()
    searched, kept = (planning_bytes(profile, budget, options) for budget in (1 << 20, 1 << 45))
    ruled = planning_bytes(profile, 1 << 20, options.but(policy="mebp"))
    assert kept == ruled < searched - planning_memory.SEARCH_BYTES


def planned(profile: Profile, folder: Path, budget: int) -> tuple[int, int]:
    """(bytes that a process which plans was predicted to hold, held)."""
    words = ["plan", str(save_profile(profile, folder / "profile.json")), f"--memory={budget}", "--time-limit=10"]
    words += ["--no-rehearse", "-o", str(folder / "plan.json"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "TIGHTFIT_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", OBSERVED, *words], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    predicted, loaded = lines[0].split()
    assert loaded == "False"
    return int(predicted), int(lines[-1])


@pytest.mark.slow
@pytest.mark.parametrize("budget", [160 * MIB, 1 << 40])
def test_planning_holds_what_was_predicted(budget: int, tmp_path: Path):
    predicted, held = planned(decoder_like(24, tokens=256, slices=40, on=device(**REAL)), tmp_path, budget)
    assert held <= predicted <= 1.3 * held


def test_planning_without_a_place_is_refused(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left = "60.0 MiB are left of the 96.0 MiB of the cgroup x"
    monkeypatch.setattr("tightfit.profiles.worker_process.free_memory", lambda **given: (60 * MIB, left))
    path = save_profile(PROFILES["decoder"](), tmp_path / "profile.json")
    message = refused(2, "plan", path, "--memory=100MiB", "-o", tmp_path / "plan.json")
    assert re.search(rf"planning takes \d+\.\d MiB, and {left}; let a service plan \(--server URL\)", message)
    assert not (tmp_path / "plan.json").exists()
