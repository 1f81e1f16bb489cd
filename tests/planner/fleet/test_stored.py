"""Plans of each kind as version 3 writes them are read; each is replicas of a chain of parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tightfit.planner.fleet.io import fleet_fingerprint, load_any, load_rounds
from tightfit.planner.fleet.parts import replicas

STORED = Path(__file__).parent / "stored"
KINDS = {
    "data-parallel": ("data parallel", [["a"], ["b"]]),
    "pipeline": ("pipeline", [["a", "b"]]),
    "mobillm": ("mobillm", [["device", "server"]]),
    "federated": ("federated", [["a"], ["b"]]),
    "split-federated": ("split federated", [["a", "the server, for a"], ["b", "the server, for b"]]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_stored_plan_is_read_as_it_was_written(name):
    path = STORED / f"{name}.json"
    said = json.loads(path.read_text())
    fleet = (load_rounds if name.endswith("federated") else load_any)(path)
    assert fleet.kind == said["kind"] == KINDS[name][0]
    assert fleet_fingerprint(fleet) == said["fingerprint"]
    assert fleet.model_dump(mode="json") == said


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_replicas_of_a_chain_of_parts(name):
    path = STORED / f"{name}.json"
    fleet = (load_rounds if name.endswith("federated") else load_any)(path)
    chains = replicas(fleet)
    assert sorted([part.name for part in chain] for chain in chains) == KINDS[name][1]
    for chain in chains:
        lower, upper = chain[0], chain[-1]
        assert not lower.down
        assert not upper.up
        assert bool(lower.up) == (len(chain) == 2)
        assert bool(upper.down) == (len(chain) == 2 and name != "mobillm")
        assert all(part.plan and part.plan_fingerprint and part.peak_bytes <= part.budget_bytes for part in chain)
