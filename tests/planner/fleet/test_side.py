"""The policy `mobillm` and the plan of its two members: what a device computes and sends, what a step takes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from changed_operators import with_operators
from fleet_kinds import plan_side
from fleet_views import changed
from side_networks import BUDGET, side_profile, specs_of
from tiny_plans import CONFIG, decoder_profile

from tightfit.planner.compare import compare
from tightfit.planner.fleet.clock import OneWay
from tightfit.planner.fleet.io import load_fleet, load_member_plan, save_fleet
from tightfit.planner.fleet.part_profiles import server_profile, side_shape
from tightfit.planner.fleet.schema import Link
from tightfit.planner.fleet.simulate import InvalidFleet, simulate_fleet
from tightfit.planner.plan import minimum_budget, plan
from tightfit.planner.problem.device_forward import device_forward, message_bytes, sent_tensors
from tightfit.planner.report.explain import explain
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.models.side_shape import SideShape, chosen_blocks
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.training.job import RECEIVE
from tightfit.runtime.session.launch import run

LAYERS, BATCH, SEQ, HIDDEN = 4, 2, 24, 64
SIDE = SideShape(blocks=(1, 3), rank=8)
TOKENS = BATCH * SEQ


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Operators take times as if this were a larger model, so that plans differ in them."""
    made = decoder_profile(tmp_path_factory.mktemp("store"), config=CONFIG | {"num_hidden_layers": LAYERS})
    return with_operators(made, lambda one: {"seconds": 1e-3 + one.flops / 1e9, "workspace_bytes": 1 << 14})


# --- the device -------------------------------------------------------------------------------------------------------


def test_blocks_are_chosen_at_even_distances_with_the_last_one():
    assert chosen_blocks(30, 3) == (9, 19, 29)
    assert chosen_blocks(3, 8) == (0, 1, 2)
    assert chosen_blocks(5, 1) == (4,)
    with pytest.raises(InputError, match="at least 1 block, not of 0"):
        chosen_blocks(5, 0)


def test_the_device_runs_the_frozen_model_up_to_its_last_block(profile):
    device = device_forward(profile, SIDE.blocks, 8)
    names = [layer.name for layer in device.layers]
    assert names == [
        "sent.labels",
        "stem",
        *(f"model.layers.{i}" for i in (0, 1)),
        "sent.1",
        *(f"model.layers.{i}" for i in (2, 3)),
        "sent.3",
    ]
    targets = [one.target for program in device.programs for one in program.operators]
    assert {one.phase for program in device.programs for one in program.operators} == {"forward"}
    assert "tightfit.lora_down" not in targets
    assert {tensor.kind for tensor in device.tensors} == {"weight", "constant", "activation", "batch"}
    assert not [tensor.name for tensor in device.tensors if "lora" in tensor.name or "model.norm" in tensor.name]
    assert device.model.lora is None
    forward, wanted = ({p.name: p for p in one.programs} for one in (profile, device))
    projections = [
        (one, other)
        for layer in profile.layers[1:-1]
        for one, other in zip(
            [op for op in forward[layer.program].operators if op.target == "tightfit.projection"],
            [op for op in wanted[f"{layer.program} inference alone"].operators if op.target == "tightfit.projection"],
            strict=False,
        )
    ]
    assert len(projections) == 7 * LAYERS
    assert all(other.seconds < one.seconds and other.flops < one.flops for one, other in projections)


@pytest.mark.parametrize("bias", [None, torch.randn(32)], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_without_a_pair_is_one_whose_pair_adds_nothing(dtype, bias):
    x, weight, low = torch.randn(6, 16).to(dtype), torch.randn(32, 16).to(dtype), torch.randn(6, 4).to(dtype)
    alone, beside = torch.empty(6, 32, dtype=dtype), torch.empty(6, 32, dtype=dtype)
    projection = OPERATORS["tightfit.projection"]
    projection(x, weight, bias, None, None, 0.0, out=(alone,))
    projection(x, weight, bias, low, torch.zeros(32, 4), 2.0, out=(beside,))
    assert torch.equal(alone, beside)


def test_messages_are_counted_in_bytes_of_the_wire_and_of_memory(profile):
    """Labels of 8 bytes, then two tensors whose rows have 64 numbers and a scale, at multiples of 64 bytes after a
    header of as many.
    """
    rows = {0: 2 * HIDDEN, 8: 4 + HIDDEN, 4: 4 + HIDDEN // 2}
    for bits, row in rows.items():
        device = device_forward(profile, SIDE.blocks, bits)
        size = 64 + 8 * TOKENS + 2 * (-(-TOKENS * row // 64) * 64)
        assert message_bytes(device) == size
        passing, told = sent_tensors(device)
        assert [one.shape for one in passing] == [(BATCH, SEQ), *[(TOKENS, HIDDEN)] * 2]
        assert told == bits
        floor, before = device.device.floor, profile.device.floor.inference
        assert floor.held_bytes - before.held_bytes == (4 << 20) + 2 * (-(-size // 4096) * 4096)


@pytest.mark.parametrize(
    ("blocks", "bits", "said"),
    [((1, 2), 8, "the last of them 3"), ((3, 1, 3), 8, "ascending"), ((), 8, "empty"), ((3,), 5, "5 bits")],
)
def test_blocks_and_bits_that_cannot_be_used_are_refused(profile, blocks, bits, said):
    with pytest.raises(InputError, match=said):
        device_forward(profile, blocks, bits)


# --- the policy -------------------------------------------------------------------------------------------------------


def test_the_policy_plans_the_forward_and_says_what_its_result_is(profile):
    budget = 400 << 20
    made, exact = plan(profile, budget, policy="mobillm"), plan(profile, budget)
    assert made.policy == "mobillm"
    assert made.profile_fingerprint == profile.fingerprint
    assert not made.exact
    assert made.step_seconds < exact.step_seconds / 2
    assert made.step_seconds == simulate(made).step_seconds
    assert len(made.train.instructions) == len(made.evaluate.instructions)
    text = " ".join(explain(made))
    assert "the result is a side network that the server trains, and no adapter" in text
    assert (
        "the outputs of 4 of its blocks go to a server, 8 bits for a number, in a message of 13.2 KiB per step" in text
    )
    assert "tightfit fleet plan --kind mobillm" in text


@pytest.mark.slow
def test_the_policy_fits_where_backpropagation_does_not(profile):
    """Measured from where the start of the process no longer counts."""
    floor = profile.device.floor.model_copy(update={"import_peak_bytes": 0, "exchange_bytes": 0})
    small = profile.model_copy(update={"device": profile.device.model_copy(update={"floor": floor})})
    least = minimum_budget(small, policy="mobillm")
    assert least < minimum_budget(small)
    assert plan(small, least, policy="mobillm").train is not None
    refused = plan(small, least - 4096, policy="mobillm")
    assert refused.status == "infeasible"
    assert refused.minimum_budget_bytes == least
    assert any("mobillm does not fit" in line for line in explain(refused))


def test_a_comparison_names_it_beside_the_others(profile):
    found = compare(profile, [300 << 20, 400 << 20], ["solver", "mezo", "mobillm"], time_limit=5.0)
    assert [one.policy for one in found.plans] == ["solver", "mezo", "mobillm"] * 2
    assert found.plan(400 << 20, "mobillm").step_seconds <= found.plan(300 << 20, "mobillm").step_seconds


def test_a_module_and_a_run_without_a_server_are_refused(profile, tmp_path):
    own = profile.model_copy(update={"model": profile.model.model_copy(update={"kind": "module"})})
    with pytest.raises(InputError, match="beside a language model"):
        plan(own, BUDGET, policy="mobillm")
    with pytest.raises(InputError, match="run the fleet"):
        run(plan(profile, BUDGET, policy="mobillm"), "random", steps=1, out=tmp_path / "run")


# --- the server -------------------------------------------------------------------------------------------------------


def test_the_server_receives_each_activation_before_the_adapter_that_reads_it(profile):
    served = side_profile(profile, SIDE)
    assert side_shape(served) == SIDE
    made = server_profile(served, micro_batches=4, bits=8)
    assert [layer.name for layer in made.layers] == ["received.1", "side.0", "received.2", "side.1", "head"]
    passing, bits = sent_tensors(device_forward(profile, SIDE.blocks, 8))
    assert sent_tensors(made, RECEIVE) == (passing[1:], bits)
    assert [tensor.name for tensor in made.tensors if tensor.kind == "batch"] == ["input_ids", "labels"]
    assert {t.name for t in made.tensors if t.kind == "trainable"} == {
        "side.0.down.weight", "side.0.up.weight", "side.1.down.weight", "side.1.up.weight", "side.1.gate",
    }  # fmt: skip
    with pytest.raises(InputError, match="profile the side network"):
        server_profile(profile, micro_batches=4)


# --- the plan of both -------------------------------------------------------------------------------------------------


def test_a_step_is_as_long_as_its_slowest_part_and_the_way_there():
    link = Link(up_bytes_per_second=100.0, down_bytes_per_second=1000.0, latency_seconds=0.5)
    for device, server, size in ((3.0, 1.0, 100), (1.0, 3.0, 100), (1.0, 1.0, 300)):
        one = OneWay(
            device_seconds=device, server_seconds=server, message_bytes=size, device_link=link, server_link=link
        )
        played = one.play(5)
        makespan = played.makespan
        assert makespan == pytest.approx(device + size / 100 + 1.0 + server + 4 * 3.0 + 2.0)
        assert makespan >= one.least_seconds(5)
        for station, to in ((0, None), (0, 1), (1, None)):
            own = [doing for doing in played.doings if (doing.station, doing.to) == (station, to)]
            assert [doing.number for doing in own] == list(range(5))
            assert all(one.end <= other.begin for one, other in pairwise(own))


def test_the_plan_of_both_is_what_its_judge_finds_and_is_read_back(planned, tmp_path):
    fleet, plans = planned
    assert fleet.makespan_seconds == simulate_fleet(fleet, plans).makespan_seconds
    assert fleet.bound_seconds <= fleet.makespan_seconds < fleet.baselines[0].makespan_seconds
    assert (fleet.blocks, fleet.rank, fleet.bits) == ([1, 3], 8, 8)
    save_fleet(fleet, plans, tmp_path)
    assert load_fleet(tmp_path) == fleet
    assert load_member_plan(tmp_path, fleet, "device") == plans["device"]
    told = json.loads((tmp_path / "fleet.json").read_text())
    assert told["kind"] == "mobillm"


@pytest.fixture(scope="module")
def planned(profile):
    return plan_side(specs_of(profile, SIDE), 4, time_limit=10.0)


@pytest.mark.parametrize(
    ("changes", "invariant"),
    [
        ({"bits": 4}, "messages"),
        ({"micro_batches": 8}, "micro-batches"),
        ({"model": "another"}, "model"),
        ({"makespan_seconds": 1e-9}, "makespan"),
        ({"bound_seconds": 1e9}, "bound"),
    ],
)
def test_what_does_not_hold_is_found(planned, changes, invariant):
    fleet, plans = planned
    with pytest.raises(InvalidFleet) as caught:
        simulate_fleet(fleet.model_copy(update=changes), plans)
    assert caught.value.invariant == invariant


@pytest.mark.parametrize(
    ("changes", "invariant"),
    [
        ({"plan_fingerprint": "x"}, "plan"),
        ({"exchange_bytes": 1}, "exchange"),
        ({"budget_bytes": 1}, "budget"),
        ({"peak_bytes": 1}, "peak"),
        ({"micro_batch_seconds": 1e-9}, "seconds"),
        ({"bound_seconds": 1e9}, "bound"),
    ],
)
@pytest.mark.parametrize("member", [0, 1])
def test_what_does_not_hold_of_a_member_is_found(planned, changes, invariant, member):
    fleet, plans = planned
    with pytest.raises(InvalidFleet) as caught:
        simulate_fleet(changed(fleet, fleet.names[member], **changes), plans)
    assert caught.value.invariant == invariant


def test_members_that_cannot_train_together_are_refused(profile):
    device, server = specs_of(profile, SIDE)
    with pytest.raises(InputError, match="two members, a device and a server after it, and 1 are"):
        plan_side([server], 4)
    with pytest.raises(InputError, match="profile the side network"):
        plan_side([server, device], 4)
    other = replace(server, profile=server.profile.model_copy(update={"batch": 3}))
    with pytest.raises(InputError, match=r"differ in batch \(2 and 3\)"):
        plan_side([device, other], 4)
    with pytest.raises(InputError, match="its profile is of a side network"):
        plan_side([replace(device, profile=server.profile), server], 4)
    with pytest.raises(InfeasibleError, match=r"member 'device': its part does not fit 1\.0 MiB"):
        plan_side([replace(device, budget_bytes=1 << 20), server], 4)
