"""The wheel, installed where nothing else of ours is, and used in a folder that holds files called like ours and
Python's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import ROOT, SOURCES
from served import Served
from synthetic import decoder_like
from working_folder import working_folder

FACTORY = """
import json

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        from nets import width  # a neighbour, asked for when the factory is called

        self.hidden, self.out = nn.Linear(16, width.HIDDEN), nn.Linear(width.HIDDEN, 4)

    def forward(self, x, y):
        return nn.functional.cross_entropy(self.out(self.hidden(x).relu()), y)


def make():
    assert json.loads("[4]") == [4]
    return Net(), (torch.randn(8, 16), torch.zeros(8, dtype=torch.int64))
"""
FOLDERS = ("planner", "profiles", "runtime", "src")
SECONDS = 300


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the wheel, as pip installs it, and with the packages that the tests' own environment has but
    tightfit.
    """
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # building leaves files behind, and takes what an earlier build has left
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    subprocess.run([*pip, *build], check=True, timeout=SECONDS)
    (wheel,) = folder.glob("tightfit-*.whl")
    made = folder / "environment"
    venv.create(made, with_pip=False, symlinks=True)
    python = made / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, timeout=SECONDS)
    ((site),) = made.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    # What some package or other brings along must not stand in for the standard library, either.
    (site / "argparse.py").write_text("raise RuntimeError('argparse of site-packages')\n")
    shutil.rmtree(source)
    return SimpleNamespace(site=site, tightfit=made / "bin" / "tightfit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a user works who never thought of our names."""
    path = working_folder(tmp_path_factory.mktemp("work"))
    (path / "nets").mkdir()
    (path / "nets" / "tiny.py").write_text(FACTORY)
    (path / "nets" / "width.py").write_text("HIDDEN = 16\n")
    return path


@pytest.fixture
def tightfit(environment, folder, cache):
    """Run the installed command in the user's folder: what it prints as JSON."""

    def call(*words, code=0):
        done = subprocess.run(
            [environment.tightfit, *map(str, words), "--json"],
            cwd=folder, env={**os.environ, "TIGHTFIT_CACHE": str(cache)}, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    return call


def test_the_wheel_holds_every_file_of_the_package(environment):
    def files(top):
        # Each folder by itself: links are not followed.
        for folder in (top, *(top / name for name in FOLDERS[:3])):
            for path in folder.rglob("*"):
                if path.is_file() and path.suffix != ".pyc":
                    yield path.relative_to(top).as_posix()

    assert set(files(environment.site / "tightfit")) == set(files(SOURCES / "tightfit"))


def test_one_name_is_installed(environment):
    (record,) = environment.site.glob("tightfit-*.dist-info/RECORD")
    tops = {line.partition("/")[0] for line in record.read_text().splitlines()}
    assert {top for top in tops if not top.endswith(".dist-info") and top != ".."} == {"tightfit"}
    python = environment.tightfit.with_name("python")
    code = "import tightfit; print(tightfit.__file__)"
    found = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).parents[1] == environment.site


@pytest.mark.slow
def test_a_module_of_the_working_folder_is_profiled_planned_and_run(tightfit, folder):
    measured = tightfit("profile", "nets.tiny:make", "-o", "profile.json")
    assert measured["profile"] == "profile.json"
    planned = tightfit("plan", "profile.json", "--memory", "1GiB", "-o", "plan.json")
    report = tightfit("run", "plan.json", "--data", "random", "--steps", 2, "-o", "out")
    assert len(report["loss"]) == 2
    assert report["peak_bytes"]["measured"] <= planned["budget_bytes"]


def test_the_service_solves_and_shows_its_page(environment, tmp_path):
    service = Served(tmp_path / "data", tightfit=environment.tightfit).start()
    try:
        for name in ("shell.js", "mark.svg", "charts.js", "components.js", "style.css"):
            assert service.http.get(f"/page/{name}").status_code == 200
        plan = service.result("/v1/plans", profile=service.upload(decoder_like(2)), memory="1GiB", policy="keep-all")
        assert plan["summary"]["status"] == "feasible"
    finally:
        service.stop()
    assert not [line for line in service.lines() if line["level"] == "error"]
