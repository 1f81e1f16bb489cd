"""What the process that prepares a run imports and holds: no PyTorch, and no more for more data."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SOURCES
from tiny_models import byte_level_tokenizer, write_directory, write_gguf
from tiny_plans import CONFIG, decoder_profile, naive_plan

from tightfit.planner.io import save_plan
from tightfit.planner.plan_result import sealed
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Floor
from tightfit.profiles.sources.tokenizer_file import TokenizerFile
from tightfit.profiles.sources.tokenizer_memory import KnownMemory
from tightfit.runtime.data.preparation import Preparation
from tightfit.runtime.data.samples import Text, read_samples
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.lean_torch import installed_version
from tightfit.runtime.engine.weights import native

MIB = 1 << 20
PREPARED = """
import json, sys
from tightfit.planner.io import load_plan
from tightfit.profiles.worker_process import held_bytes
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.session.launch import prepared
from tightfit.runtime.session.options import RunOptions
from tightfit.runtime.engine.device.resident import memory

plan, data, out, left = sys.argv[1:]
loaded, error = load_plan(plan), None
if left:
    loaded = loaded.model_copy(update={"budget_bytes": memory().peak + int(left) * (1 << 20)})
try:
    with prepared(loaded, data, RunOptions(steps=2, out=out, overwrite=True), counted=True):
        pass
except TightfitError as failure:
    error = [type(failure).__name__, str(failure)]
heavy = {"torch", "numpy", "gguf", "networkx", "ortools", "scipy", "matplotlib", "safetensors", "tokenizers"} & sys.modules.keys()
print(json.dumps({"heavy": sorted(heavy), "peak": memory().peak, "tokenising": held_bytes(), "error": error}))
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plans of one small model, by where it comes from; their floor is none, so that any budget holds them."""
    folder = tmp_path_factory.mktemp("preparation")
    made = naive_plan(decoder_profile(folder / "stores"))
    floor = Floor(import_peak_bytes=0, resident_bytes=0, instruction_bytes=0)
    made = made.model_copy(update={"device": made.device.model_copy(update={"floor": floor})})
    tokenizer, weights = byte_level_tokenizer(), {"model.norm.weight": torch.zeros(64)}
    places = {
        "gguf": write_gguf(folder / "m.gguf", CONFIG, weights, tokenizer=tokenizer),
        "directory": write_directory(folder / "model", CONFIG, weights, tokenizer=tokenizer),
    }
    written = {kind: _saved(made, folder / f"{kind}.json", source=str(path)) for kind, path in places.items()}
    # Packed when it was profiled; where it lies is found again by the config alone.
    written["config"] = _saved(made, folder / "config.json", store=None, store_fingerprint=None)
    return written


def _saved(plan: Plan, path: Path, **model: Any) -> Path:
    return save_plan(sealed(plan.model_copy(update={"model": plan.model.model_copy(update=model)})), path)


def _prepared(plan: Path, data: Path | str, out: Path, left: str = "128") -> dict[str, Any]:
    """What preparing a run says and holds, in a process whose plan's budget leaves so many MiB, or that of the plan."""
    # The stores lie in a cache of their own; compiled code, which preparing does not call, is not made for it.
    made = dict.fromkeys((native.VARIABLE, page_out.VARIABLE, cuda_stubs.VARIABLE), "")
    made["TIGHTFIT_CACHE"] = str(plan.parent)
    environment = os.environ | {"PYTHONPATH": str(SOURCES)} | made
    words = [sys.executable, "-c", PREPARED, str(plan), str(data), str(out), left]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert not done.returncode, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _lines(path: Path, count: int) -> Path:
    samples = ({"prompt": f"The quick brown fox {number}", "completion": " jumps"} for number in range(count))
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.mark.parametrize("kind", ["gguf", "directory", "config"])
def test_nothing_heavy_is_imported(kind: str, plans: dict[str, Path], tmp_path: Path) -> None:
    data = "random" if kind == "config" else _lines(tmp_path / "data.jsonl", 20)
    told = _prepared(plans[kind], data, tmp_path / "out")
    assert told["error"] is None
    assert told["heavy"] == []
    assert told["peak"] < 70 * MIB  # with PyTorch 250
    assert told["tokenising"] < (1 if kind == "config" else 50 * MIB)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(plans: dict[str, Path], tmp_path: Path) -> None:
    peaks = []
    for count in (300, 15_000):
        told = _prepared(plans["gguf"], _lines(tmp_path / f"{count}.jsonl", count), tmp_path / str(count))
        assert told["error"] is None
        peaks.append(told["peak"] + told["tokenising"])
    assert abs(peaks[1] - peaks[0]) < 3 * MIB


def test_a_line_that_the_budget_cannot_hold_is_refused_unread(plans: dict[str, Path], tmp_path: Path) -> None:
    few = _prepared(plans["gguf"], _lines(tmp_path / "few.jsonl", 20), tmp_path / "few")
    data = tmp_path / "long.jsonl.gz"
    with gzip.open(data, "wb", compresslevel=1) as file:
        file.write(b'{"text": "good"}\n{"text": "' + b"a" * (40 << 20) + b'"}\n')
    told = _prepared(plans["gguf"], data, tmp_path / "out")
    kind, message = told["error"]
    assert kind == "InputError"
    assert f"{data}:2: a line of {(40 << 20) + 13} bytes" in message
    assert "write it as several lines, or plan with a larger budget" in message
    assert told["tokenising"] == 0  # a process that fails does not say what it held
    assert told["peak"] < few["peak"] + 8 * MIB


def test_a_line_as_long_as_allowed_is_read(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    line = '{"text": "fox"}\n'
    file.write_text(line + "\n" + " " * 40 + "\n" + line.rstrip("\n"))
    read = dict(read_samples(file, len(line)))
    assert (read[1], read[4]) == (Text("fox"), Text("fox"))
    assert str(read[3]).startswith("a line of 41 bytes, ")
    read = dict(read_samples(file, len(line) - 1))
    assert str(read[1]) == (
        f"a line of {len(line)} bytes, and what the run's budget leaves is enough to tokenise one of {len(line) - 1};"
        " write it as several lines, or plan with a larger budget"
    )
    assert read[4] == Text("fox")  # the last one has no end


@pytest.mark.parametrize(
    ("left", "known", "told"),
    [
        ("", None, "reading the plan took "),
        ("24", None, "tokenising {data} takes about "),
        ("24", 1, "loading the tokenizer took "),
    ],
)
def test_more_than_the_budget_ends_it_before_an_earlier_run_is_touched(
    left: str, known: int | None, told: str, plans: dict[str, Path], tmp_path: Path
) -> None:
    plan, out = plans["directory"], tmp_path / "out"
    data = _lines(tmp_path / "data.jsonl", 1000)
    earlier = out / "adapter" / "adapter_model.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"earlier")
    if not left:
        content = Plan.model_validate_json(plan.read_bytes())
        plan = save_plan(sealed(content.model_copy(update={"budget_bytes": 20 * MIB})), plan.with_name("small.json"))
    kept = KnownMemory.of(TokenizerFile(kind="directory", path=str(plan.parent / "model"))).place
    place = plan.parent / "tokenizers" / kept.name
    place.unlink(missing_ok=True)
    if known is not None:
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps({"peak_bytes": known}))
    kind, message = _prepared(plan, data, out, left)["error"]
    place.unlink(missing_ok=True)
    assert kind == "CapError"
    assert message.startswith(told.format(data=data))
    assert ("; plan with at least " if "took" in told else "; give at least ") in message
    assert earlier.read_bytes() == b"earlier"


def test_the_version_of_torch_is_told_without_importing_it() -> None:
    assert installed_version() == torch.__version__


def test_a_process_that_holds_more_than_the_budget_still_reads_its_data(monkeypatch):
    """With PyTorch it is not held to the budget; without, a line is refused, and none is taken for the end of the
    file.
    """
    assert "torch" in sys.modules
    assert Preparation(1).longest_line() is None
    monkeypatch.setattr(sys, "modules", {name: one for name, one in sys.modules.items() if name != "torch"})
    assert Preparation(1).longest_line() == 1
