"""What was measured on this machine is taken by the next profile, as long as it is what would be measured now."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from reference import CONFIGS

from tightfit.profiles.api import profile
from tightfit.profiles.measuring import bandwidth, measure, worker
from tightfit.profiles.measuring.cpu_load import OtherPrograms
from tightfit.profiles.measuring.kept_figures import LONGEST_SECONDS, KeptFigures
from tightfit.profiles.measuring.messages import Steps
from tightfit.runtime.engine.cpu import native_dropout
from tightfit.runtime.engine.start import kernel_warmup, page_out
from tightfit.runtime.engine.weights import native

REFERENCE = 2.0
FLOOR = {
    "import_peak_bytes": 70 << 20,
    "resident_bytes": 60 << 20,
    "inference_resident_bytes": 60 << 20,
    "supervisor_bytes": 20 << 20,
    "instruction_bytes": 50,
}
CHANNEL = {"bytes_per_second": 1e9, "latency_seconds": 1e-4}


class Machine:
    """A machine on which nothing takes time, and which counts what is measured."""

    def __init__(self) -> None:
        self.measured: Counter[str] = Counter()
        self.reference, self.busy_cores, self.number = REFERENCE, 0.0, 0

    def seconds(self, kind: str, count: int = 1) -> float:
        """A figure that differs from all others."""
        self.measured[kind] += count
        self.number += 1
        return 1e-6 * self.number

    def program(self, program: Mapping[str, Any], *_: Any, workspaces_of: Any = (), **__: Any) -> Any:
        seconds = self.seconds("operators", len(program["operators"]))
        return [seconds] * len(program["operators"]), dict.fromkeys(workspaces_of, 0)

    def channels(self, *_: Any) -> dict[str, Any]:
        self.measured["channels"] += 1
        return {"read": dict(CHANNEL), "write": dict(CHANNEL)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()

    def run_here(command: Any, request: dict[str, Any], environment: Any, **_: Any) -> Any:
        return worker.measure(request, Steps(1)) | {"floor": FLOOR, "held_bytes": 0}

    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    for library in (native, native_dropout, page_out):
        monkeypatch.setenv(library.VARIABLE, "")  # nothing is compiled for this
    monkeypatch.setattr(measure, "run_worker", run_here)
    monkeypatch.setattr(kernel_warmup, "settle", lambda: None)
    monkeypatch.setattr(bandwidth, "reference_seconds", lambda: made.reference)
    monkeypatch.setattr(bandwidth, "measure_channels", made.channels)
    monkeypatch.setattr(OtherPrograms, "taken", lambda self, threads: made.busy_cores)
    monkeypatch.setattr(worker, "measure_program", made.program)
    monkeypatch.setattr(worker, "measure_clipped", lambda *_: (made.seconds("clipped"), made.seconds("clipped")))
    for kind in ("unpack", "update", "perturb", "adafactor"):
        monkeypatch.setattr(worker, f"measure_{kind}", lambda *_, kind=kind: made.seconds(kind))
    return made


def profiled(folder: Path, layers: int, **options: Any) -> list[float]:
    """Seconds of the operators of a decoder of so many layers, in the order of their programs."""
    path = folder / f"{layers}" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(CONFIGS["llama"] | {"num_hidden_layers": layers}))
    made = profile(path, **({"seq": 16, "threads": 1} | options))
    return [operator.seconds for program in made.programs for operator in program.operators]


@pytest.mark.slow
def test_a_second_model_of_the_same_shapes_is_not_measured(machine: Machine, tmp_path: Path) -> None:
    first = profiled(tmp_path, 3)
    assert {"operators", "unpack", "update", "clipped", "perturb", "adafactor", "channels"} <= set(machine.measured)
    machine.measured.clear()
    assert profiled(tmp_path, 5) == first
    assert machine.measured == {}


@pytest.mark.slow
def test_what_is_new_of_another_model_is_measured(machine: Machine, tmp_path: Path) -> None:
    profiled(tmp_path, 3)
    machine.measured.clear()
    profiled(tmp_path, 3, seq=32)
    assert machine.measured["operators"] > 0  # on more tokens
    assert set(machine.measured) == {"operators"}  # weights, trainables and the disk are the same


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"force": True}, {"threads": 2}], ids=["force", "threads"])
def test_all_is_measured_if_asked_for_or_on_other_threads(
    other: dict[str, Any], machine: Machine, tmp_path: Path
) -> None:
    first = profiled(tmp_path, 3)
    before = machine.measured.copy()
    assert profiled(tmp_path, 3, **other) != first
    assert machine.measured == before + before


@pytest.mark.slow
def test_on_a_machine_that_has_become_slower_all_is_measured(machine: Machine, tmp_path: Path) -> None:
    profiled(tmp_path, 3)
    before = machine.measured.copy()
    machine.reference = REFERENCE * 1.1  # within what measurements differ by
    profiled(tmp_path, 4)
    assert machine.measured == before
    machine.reference = REFERENCE * 1.5
    profiled(tmp_path, 5)
    assert machine.measured == before + before
    profiled(tmp_path, 6)  # those figures count from now on
    assert machine.measured == before + before


@pytest.mark.slow
def test_what_was_measured_beside_other_programs_is_not_kept(machine: Machine, tmp_path: Path) -> None:
    quiet = profiled(tmp_path, 3)
    before = machine.measured.copy()
    machine.reference, machine.busy_cores = REFERENCE * 2, 0.9
    assert profiled(tmp_path, 4) != quiet
    assert machine.measured == before + before
    machine.reference, machine.busy_cores = REFERENCE, 0.0
    assert profiled(tmp_path, 5) == quiet
    assert machine.measured == before + before


def test_a_figure_is_measured_anew_after_its_age(tmp_path: Path) -> None:
    today = [1e9]
    path = tmp_path / "machine.json"

    def opened(**settings: Any) -> KeptFigures:
        kept = KeptFigures(path, now=lambda: today[0], **settings)
        kept.check(REFERENCE)
        return kept

    kept = opened()
    assert kept.of("unpack", ["q4", 32], lambda: 0.5) == 0.5
    kept.save()
    today[0] += LONGEST_SECONDS - 1
    assert opened().of("unpack", ["q4", 32], lambda: 0.7) == 0.5
    assert opened().known("unpack", ["q4", 64]) is None
    today[0] += 1
    kept = opened()
    assert kept.of("unpack", ["q4", 32], lambda: 0.7) == 0.7
    kept.save()
    assert opened().known("unpack", ["q4", 32]) == 0.7
    today[0] -= 60  # the clock was set back
    assert opened().known("unpack", ["q4", 32]) is None


def test_a_figure_of_smaller_buffers_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    kept = KeptFigures(path, turning_bytes=100)
    kept.check(REFERENCE)
    kept.note("update", 7, 0.5)
    kept.save()
    assert KeptFigures(path, turning_bytes=100).known("update", 7) == 0.5
    assert KeptFigures(path, turning_bytes=101).known("update", 7) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"reference": "x", "figures": {}}', "\0"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content)
    kept = KeptFigures(path)
    kept.check(REFERENCE)
    assert kept.of("update", 7, lambda: 0.5) == 0.5
    kept.save()
    assert KeptFigures(path).known("update", 7) == 0.5


def test_bytes_outlive_a_machine_of_another_speed(tmp_path: Path) -> None:
    """Else two profiles of one model, measured one after the other, differ by how their floors happened to be
    measured.
    """
    path = tmp_path / "machine.json"
    kept = KeptFigures(path)
    kept.note("floor", [], {"resident_bytes": 1})
    kept.save()  # of a first profile no reference may be kept, since other programs were busy
    kept = KeptFigures(path)
    kept.check(REFERENCE)
    kept.note("operator", "a", 0.1)
    kept.note("workspace", "a", 5)
    kept.save()
    kept = KeptFigures(path)
    kept.check(2 * REFERENCE)
    assert kept.known("operator", "a") is None
    assert (kept.known("workspace", "a"), kept.known("floor", [])) == (5, {"resident_bytes": 1})
