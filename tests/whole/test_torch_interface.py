"""What the product takes from PyTorch beyond its public interface is what `runtime/common/torch_interface.py` lists,
and is there.
"""

from __future__ import annotations

import ast
import importlib
import tomllib
from types import SimpleNamespace

import pytest
from places import ROOT

from tightfit.profiles.measuring.marks import marks
from tightfit.runtime.common.torch_interface import OWN, PRIVATE, TRIED, release_of, untried
from tightfit.runtime.engine.start import lean_torch


def private(name):
    parts = name.split(".")
    return name.startswith("torch.fx.experimental.") or any(
        part.startswith("_") and not part.startswith("__") for part in parts
    )


def names_in(path):
    """Full names of what a file takes from torch."""
    tree = ast.parse(path.read_text())
    called = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                called[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    yield from (name for name in called.values())

    def full(node):
        if isinstance(node, ast.Name):
            return called.get(node.id)
        inner = full(node.value) if isinstance(node, ast.Attribute) else None
        return inner and f"{inner}.{node.attr}"

    yield from filter(None, (full(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)))


def test_the_list_is_what_the_code_takes():
    files = [path for top in ("planner", "profiles", "runtime") for path in (ROOT / top).rglob("*.py")]
    taken = {name for path in files for name in names_in(path) if private(name)} - set(OWN)
    listed = {name for name in PRIVATE if any(f"{one}.".startswith(f"{name}.") for one in taken)}
    assert listed == set(PRIVATE), "no longer taken"
    known = (*PRIVATE, "torch._ops", "torch._subclasses")
    assert {one for one in taken if not any(f"{one}.".startswith(f"{name}.") for name in known)} == set()


@pytest.mark.parametrize("name", PRIVATE)
def test_each_is_there(name):
    module, _, last = name.rpartition(".")
    try:
        assert hasattr(importlib.import_module(module), last)
    except ModuleNotFoundError:
        owner, _, attribute = module.rpartition(".")
        assert hasattr(getattr(importlib.import_module(owner), attribute), last)


def test_a_version_that_was_not_tried_is_said(monkeypatch, tightfit):
    (requirement,) = [
        one for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if "torch" in one
    ]
    assert requirement.startswith(f"torch>={TRIED[0]},<")
    assert untried(lean_torch.installed_version()) == ""
    assert release_of(lean_torch.installed_version()) in TRIED
    device = SimpleNamespace(
        busy_cores=0.0,
        threads=2,
        torch_version="3.1.0+cpu",
        read=SimpleNamespace(doubt=None),
        write=SimpleNamespace(doubt=None),
    )
    (words,) = marks(device)
    assert words.startswith("PyTorch 3.1.0+cpu is none of the versions with which tightfit was tried (2.9 to ")
    monkeypatch.setattr("tightfit.runtime.cli.main.installed_version", lambda: "3.1.0+cpu")
    code, said, _ = tightfit("--version")
    assert code == 0
    assert said.splitlines()[1:] == ["PyTorch 3.1.0+cpu", words]
