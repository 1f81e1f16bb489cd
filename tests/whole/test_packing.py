"""Samples that share rows in whole runs: the same adapter at every budget, after a resume and in fleets; what is told
of it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from decoder_families import FAMILIES
from fleets import Workshop, adapter_hash, ended
from rich.console import Console
from tiny_plans import decoder_profile

from tightfit.planner.fleet.part_profiles import cuts
from tightfit.planner.io import load_plan
from tightfit.planner.plan import planner_of
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.records import RecordWriter
from tightfit.runtime.session.launch import run
from tightfit.runtime.session.options import TrainingOptions
from tightfit.runtime.supervision.report_text import report_text

SHELVES = [("memory", "memory")]
MICRO_BATCHES, STEPS = 3, 9
TRAINING = {"steps": STEPS, "lr": 1e-2, "seed": 7, "cgroup": False, "packing": True}
RESULT = ("loss", "records")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("packing"), MICRO_BATCHES)


@pytest.fixture(scope="module")
def data(workshop: Workshop) -> Path:
    """Prepared samples of 2 to 12 tokens; the plans' batches have 2 rows of 24."""
    generator, path = random.Random(0), workshop.folder / "short.records"
    with RecordWriter(path, seq=24, pad_token=0, vocab_size=512, source="test") as writer:
        for example in range(40):
            tokens = [generator.randrange(1, 512) for _ in range(generator.randint(3, 13))]
            writer.add(tokens[:-1], tokens[1:], example=example)
    return path


@pytest.fixture(scope="module")
def alone(workshop: Workshop, data: Path) -> tuple[str, dict[str, Any]]:
    """The adapter of one process, and its report; it evaluates on what it trains on."""
    out = workshop.folder / "alone"
    made = workshop.alone(out, data=str(data), eval_data=str(data), **TRAINING)
    return made, json.loads((out / "report.json").read_text())


def test_a_run_by_another_schedule_that_stops_and_goes_on_ends_with_the_same_adapter(
    workshop: Workshop, data: Path, alone: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    made = load_plan(workshop.folder / "alone.json")
    planner = planner_of(workshop.profile.model_copy(update={"optimizer": made.optimizer}))
    other = planner.plan(made.budget_bytes, policy="mebp")  # reads weights again and again, and runs layers twice
    assert other.train != made.train
    run(other, str(data), out=tmp_path, **{**TRAINING, "steps": 6})
    report = run(other, str(data), out=tmp_path, resume=True, **TRAINING)
    assert (report["resumed_step"], report["loss"]) == (6, alone[1]["loss"])
    assert adapter_hash(tmp_path) == alone[0]


@pytest.mark.slow
def test_little_of_the_rows_is_padding_and_the_report_says_so(
    workshop: Workshop, data: Path, alone: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    _, packed = alone
    apart = run(load_plan(workshop.folder / "alone.json"), str(data), out=tmp_path, **{**TRAINING, "packing": False})
    assert packed["packing"] == {"on": True, "refused": None}
    assert apart["packing"] == {"on": False, "refused": None}
    assert packed["tokens"]["padding_share"] < 0.2
    assert apart["tokens"]["padding_share"] > 0.6
    lines = [json.loads(line) for line in (workshop.folder / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["samples"] for line in lines) > 1.8 * 2 * STEPS
    console = Console(width=200)
    with console.capture() as captured:
        console.print(report_text(packed | {"packing": {"on": False, "refused": "its code takes no positions"}}))
    assert "samples/s" in captured.get()
    assert "one sample each, padded to the length of the plan: its code takes no positions" in captured.get()
    with pytest.raises(
        InputError, match=r"made without samples that share rows \(--no-packing\); resume with the same"
    ):
        run(load_plan(workshop.folder / "alone.json"), str(data), out=tmp_path, resume=True, **TRAINING)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data parallel", "pipeline"])
def test_a_fleet_ends_with_the_adapter_of_one_process(
    kind: str, workshop: Workshop, data: Path, alone: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    fleet = workshop.fleet([2, 1], SHELVES) if kind == "data parallel" else workshop.pipeline((2,), (1, 0))
    evaluation = {"eval_data": str(data)}  # the first member alone evaluates, or all of a pipeline together
    options = {"m0": evaluation, **({"m1": evaluation} if kind == "pipeline" else {})}
    told = ended(workshop.start(fleet, tmp_path, data=str(data), **options, **TRAINING))
    assert {name: code for name, (code, _) in told.items()} == {"m0": 0, "m1": 0}, told
    assert adapter_hash(tmp_path / "m0") == alone[0]
    report = json.loads((tmp_path / "m0" / "report.json").read_text())
    for when in ("before", "after"):
        found, due = report["evaluation"][when], alone[1]["evaluation"][when]
        assert {name: found[name] for name in RESULT} == {name: due[name] for name in RESULT}
        assert found["records"] == 40


@pytest.mark.slow_but_for("GPT-2")
@pytest.mark.parametrize("family", ["Phi-1, Phi-2", "GPT-2"])
def test_what_follows_from_positions_does_not_pass_between_the_stages_of_a_pipeline(
    family: str, tmp_path: Path
) -> None:
    """Angles before attention, and learned positions: each stage has the positions."""
    found = cuts(decoder_profile(tmp_path, config=FAMILIES[family], seq=16))
    assert [len(cut.up) for cut in found] == [1]


def test_packing_is_on_or_off() -> None:
    with pytest.raises(InputError, match="packing 'no': it should be a valid boolean"):
        TrainingOptions(packing="no")  # type: ignore[arg-type]
