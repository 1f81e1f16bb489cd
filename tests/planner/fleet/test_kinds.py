"""Which kind of fleet is planned, and why."""

from __future__ import annotations

import pytest
from fleet_kinds import plan_kind
from synthetic import MIB

from tightfit.planner.fleet import fleet_planner
from tightfit.runtime.common.errors import InputError


def test_a_pipeline_where_nobody_can_hold_a_micro_batch(stages):
    fleet, _, why = plan_kind(stages((1.0, 1.0), budget=20 * MIB), 2)
    assert fleet.kind == "pipeline"
    assert why == "a pipeline: no device can hold a micro-batch of the whole model"


def test_data_parallel_where_it_is_shorter(members):
    fleet, _, why = plan_kind(members((1.0, 1.0)), 4)
    assert fleet.kind == "data parallel"
    assert why == "data parallel: the model cannot be cut"


def test_data_parallel_without_planning_a_pipeline(stages, monkeypatch):
    def none(*_, **__):
        raise AssertionError("a pipeline is planned")

    monkeypatch.setattr(fleet_planner.PipelinePlanner, "plan", none)
    fleet, _, why = plan_kind(stages((1.0, 1.0), budget=64 * MIB, rate=1e9), 4)
    assert fleet.kind == "data parallel"
    assert why.startswith("data parallel (")
    assert "no pipeline takes less than" in why


def test_a_pipeline_that_is_shorter(stages):
    """8 MiB of gradients pass between the devices, or 128 KiB for each micro-batch and direction."""
    specs = stages((1.0, 1.0), budget=64 * MIB)
    fleet, _, why = plan_kind(specs, 4)
    assert fleet.kind == "pipeline"
    assert why.startswith("a pipeline (")
    assert "shorter than data parallel (" in why


def test_the_kind_that_was_asked_for(stages):
    specs = stages((1.0, 1.0), budget=64 * MIB)
    fleet, _, why = plan_kind(specs, 2, kind="pipeline")
    assert (fleet.kind, why) == ("pipeline", None)
    fleet, _, why = plan_kind(specs, 2, kind="data")
    assert (fleet.kind, why) == ("data parallel", None)


def test_kinds_and_bits_that_are_none(stages):
    specs = stages((1.0, 1.0))
    for options, message in (
        ({"kind": "tensor"}, "kind 'tensor': it should be 'auto', 'data', 'pipeline', 'mobillm' or 'federated'"),
        ({"bits": 3}, "bits 3: it should be 0, 4 or 8"),
        ({"kind": "data", "bits": 8}, "bits 8 is for fleets of another kind; plan data without it"),
    ):
        with pytest.raises(InputError, match=message):
            plan_kind(specs, 2, **options)
