"""On a small device, a bundle gives the adapter and the answers of the ordinary road, to the bit, whether it is copied
as a folder or comes from a service; also at another budget.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from damage import CONFIG, ROWS, lines
from decoder_families import FAMILIES
from peft_adapters import save_model
from served import Served
from tiny_models import byte_level_tokenizer, random_weights, write_directory

import tightfit
from tightfit.runtime.common import interpreter
from tightfit.runtime.supervision.cgroup import MemoryCgroup

pytestmark = pytest.mark.usefixtures("cache")
MIB = 1 << 20
STEP = ("--seq=32", "--batch=2", "--lora-rank=4", "--lora-dropout=0.1")
RUN = ("--steps=6", "--lr=5e-3", "--no-wait")
LEFT_OUT = ("ortools", "transformers", "matplotlib", "networkx", "pandas")
"""packages that a device does without"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device")
    write_directory(path / "model", CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())
    (path / "data.jsonl").write_text(lines(ROWS))
    (path / "without").mkdir()
    (path / "without" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refusing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {LEFT_OUT!r}:\n"
        "            raise ModuleNotFoundError(f'no module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Refusing())\n"
    )
    return path


def started(folder: Path, *words: object, device: bool, cache: Path, group: MemoryCgroup | None = None) -> Any:
    """Run a command as people do, on a `device` without the packages that are left out there; returns what ended."""
    line = interpreter.command("tightfit.runtime.cli.main", *map(str, words))
    path = os.pathsep.join([*([str(folder / "without")] if device else []), interpreter.python_path()])
    environment = os.environ | {"PYTHONPATH": path, "TIGHTFIT_CACHE": str(cache)}
    line = line if group is None else group.enter(line)
    return subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def trained(folder: Path, out: Path, *words: object, device: bool = True, **how: Any) -> dict[str, Any]:
    """The report of `tightfit train` in a cache of its own."""
    ended = started(folder, "train", *words, "--data=data.jsonl", *RUN, "-o", out, "--json", device=device, **how)
    assert ended.returncode == 0, ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)["report"]
    return report


def answered(folder: Path, *words: object, **how: Any) -> str:
    ended = started(folder, "generate", *words, **how)
    assert ended.returncode == 0, ended.stderr
    return str(json.loads(ended.stdout)["text"])


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family that is not written by hand."""
    pytest.importorskip("transformers")
    path = save_model(
        tmp_path_factory.mktemp("olmo") / "model", FAMILIES["OLMo 2"] | {"vocab_size": CONFIG["vocab_size"]}
    )
    byte_level_tokenizer().save(str(path / "tokenizer.json"))
    return path


def adapter(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def ordinary(folder: Path, cache: Path) -> Path:
    trained(folder, folder / "ordinary", "model", *STEP, "--memory=1GiB", "--no-rehearse", device=False, cache=cache)
    return folder / "ordinary"


def bundle(folder: Path, model: object, made: Path, *words: object, cache: Path) -> Path:
    ended = started(folder, "prepare", model, *STEP, *words, "-o", made, device=False, cache=cache)
    assert ended.returncode == 0, ended.stderr
    return made


def test_a_bundle_with_weights_is_enough(folder: Path, ordinary: Path, cache: Path, tmp_path: Path) -> None:
    """The device plans by itself here, so that it has the solver, and nothing that traces."""
    made = bundle(folder, "model", tmp_path / "m.tight", "--weights", cache=cache)
    report = trained(folder, tmp_path / "out", made, "--memory=1GiB", device=False, cache=tmp_path / "c")
    assert adapter(tmp_path / "out") == adapter(ordinary)
    assert not list((tmp_path / "c").glob("stores/*.store"))
    stages = {"reading the data", "measuring", "planning", "rehearsing", "learning", "preparing the run"}
    assert stages == set(report["stage_bytes"])
    for name, stage in report["stage_bytes"].items():
        assert stage["measured"] <= stage["predicted"] <= 1.5 * stage["measured"], name
    merged = started(folder, "merge", tmp_path / "out", "-o", tmp_path / "merged", device=False, cache=cache)
    assert merged.returncode == 2
    assert "is a bundle, whose weights are packed: name the model's own files with --base" in merged.stderr


@pytest.mark.slow
def test_a_bundle_answers_as_its_model_does(folder: Path, cache: Path, tmp_path: Path) -> None:
    """Without PyTorch's Python: the steps of answers are in it."""
    light = bundle(folder, "model", tmp_path / "light.tight", cache=cache)
    whole = bundle(folder, "model", tmp_path / "whole.tight", "--weights", cache=cache)
    words = ("--prompt=The quick brown", "--max-tokens=8", "--memory=300MiB", "--json")
    named = {"ordinary": ("model",), "light": ("model", "--bundle", light), "whole": (whole,)}
    answers = {
        name: answered(folder, *model, *words, device=False, cache=tmp_path / name) for name, model in named.items()
    }
    assert answers["ordinary"] == answers["light"] == answers["whole"] != ""
    assert [len(list(tmp_path.glob(f"{name}/generation/steps/*"))) for name in named] == [1, 0, 0]


@pytest.mark.slow
def test_a_service_makes_the_bundle_and_plans(folder: Path, ordinary: Path, tmp_path: Path) -> None:
    """The device has none of the packages that trace, plan and draw. What the service has sent for training is enough
    to answer: only what stays in memory is still asked for, once.
    """
    words = ("--prompt=The quick brown", "--max-tokens=8", "--memory=300MiB", "--json")
    expected = answered(folder, "model", *words, device=False, cache=tmp_path / "ordinary")
    service = Served(tmp_path / "service").start()
    try:
        server = f"--server={service.url}"
        trained(folder, tmp_path / "out", "model", *STEP, "--memory=300MiB", server, cache=tmp_path / "c")
        assert answered(folder, "model", *words, server, device=True, cache=tmp_path / "c") == expected != ""
        assert len(service.http.get("/v1/jobs?kind=bundle").json()["items"]) == 1
    finally:
        service.stop()
    assert answered(folder, "model", *words, server, device=True, cache=tmp_path / "c") == expected
    assert adapter(tmp_path / "out") == adapter(ordinary)


@pytest.mark.slow
def test_a_family_of_transformers_needs_none_on_the_device(folder: Path, olmo: Path, tmp_path: Path) -> None:
    """A bundle says what the decoder consists of."""
    memory, cache = "--memory=300MiB", tmp_path / "ordinary"
    asked = ("--prompt=The quick brown", "--max-tokens=8", memory, "--json")
    trained(folder, tmp_path / "out", olmo, *STEP, memory, "--no-rehearse", device=False, cache=cache)
    expected = answered(folder, olmo, *asked, device=False, cache=cache)
    service = Served(tmp_path / "service").start()
    try:
        server = (f"--server={service.url}", "--no-rehearse")
        trained(folder, tmp_path / "served", olmo, *STEP, memory, *server, cache=tmp_path / "c")
        assert answered(folder, olmo, *asked, server[0], device=True, cache=tmp_path / "c") == expected != ""
        made = bundle(folder, olmo, tmp_path / "m.tight", cache=cache)
        trained(folder, tmp_path / "copied", olmo, memory, "--bundle", made, *server, cache=tmp_path / "d")
    finally:
        service.stop()
    assert adapter(tmp_path / "out") == adapter(tmp_path / "served") == adapter(tmp_path / "copied")
    words = ("train", olmo, *STEP, "--data=data.jsonl", *RUN, "-o", tmp_path / "x")
    ended = started(folder, *words, device=True, cache=tmp_path / "e")
    assert ended.returncode == 2
    assert "run pip install 'tightfit[hf]', or take a bundle of the model" in ended.stderr


def test_a_service_that_is_not_there_is_told_within_seconds(folder: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    words = ("model", *STEP, "--memory=300MiB", "--server=http://127.0.0.1:9", "--data=data.jsonl", *RUN)
    ended = started(folder, "train", *words, "-o", tmp_path / "out", device=True, cache=tmp_path / "c")
    assert ended.returncode == 4
    assert "http://127.0.0.1:9: no answer" in ended.stderr
    assert "is `tightfit serve` running there?" in ended.stderr
    assert time.monotonic() - begun < 30
    assert not (tmp_path / "out" / ".course.json").exists()


def test_what_a_device_lacks_is_told(folder: Path, ordinary: Path, tmp_path: Path) -> None:
    """Without a service a device would have to trace and to plan."""
    ended = started(folder, "plan", "profile.json", "--memory=1GiB", device=True, cache=tmp_path / "c")
    assert (ended.returncode, "profile.json: No such file" in ended.stderr) == (2, True)
    (tmp_path / "profile.json").write_bytes((ordinary / "profile.json").read_bytes())
    ended = started(folder, "plan", tmp_path / "profile.json", "--memory=1GiB", device=True, cache=tmp_path / "c")
    assert ended.returncode == 2
    assert (
        "ortools is not installed, which planning on this machine needs: pip install 'tightfit[planner]'"
        in ended.stderr
    )
    assert "or let a service plan" in ended.stderr


@pytest.mark.slow
def test_less_memory_later_needs_no_planner(folder: Path, cache: Path, tmp_path: Path) -> None:
    """Plans for smaller budgets were made at once; the resumption in a smaller container takes one and gives the same
    bits.
    """
    group = MemoryCgroup.create(190 * MIB)
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    words = ("model", *STEP, "--memory=1GiB", "--no-rehearse", "--smaller=4", "--checkpoint-every=3")
    try:
        trained(folder, tmp_path / "whole", *words, device=False, cache=cache)
        made = started(
            folder, "train", *words, "--data=data.jsonl", "--steps=3", "--lr=5e-3", "-o", tmp_path / "out",
            device=False, cache=cache,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        budgets = sorted(int(file.stem) for file in (tmp_path / "out" / "plan.smaller").glob("*.json"))
        assert len(budgets) >= 2
        assert budgets[0] < 190 * MIB < budgets[-1] or budgets[0] < 150 * MIB
        profile = (tmp_path / "out" / "profile.json").read_bytes()
        words = ("--resume", "-o", tmp_path / "out", "--steps=6", "--memory=auto", "--json")
        ended = started(folder, "train", *words, device=True, cache=cache, group=group)
        assert ended.returncode == 0, ended.stderr
        report = json.loads(ended.stdout)["report"]
        assert group.oom_kills() == 0
    finally:
        group.remove()
    assert "made before" in ended.stderr
    assert report["budget_bytes"] in budgets
    assert report["budget_bytes"] <= 190 * MIB
    assert tightfit.load_plan(tmp_path / "out" / "plan.json").budget_bytes == report["budget_bytes"]
    assert (tmp_path / "out" / "profile.json").read_bytes() == profile
    assert adapter(tmp_path / "out") == adapter(tmp_path / "whole")
