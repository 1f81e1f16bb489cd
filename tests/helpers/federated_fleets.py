"""Small federated fleets: a traced model whose operators are said to take some time, planned for devices of any
speed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from changed_operators import with_operators
from fleet_kinds import plan_federated, plan_split
from tiny_plans import CONFIG, decoder_profile

from tightfit.planner.fleet.io import save_fleet
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.schema import Link

BUDGET = 400 << 20
LINK = Link(up_bytes_per_second=1e7, down_bytes_per_second=1e7, latency_seconds=1e-3)

needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="Flower is not installed: pip install 'tightfit[fleet]'"
)


def timed(profile, seconds: float):
    """The profile with `seconds` for each operator."""
    return with_operators(profile, lambda _: {"seconds": seconds})


def tiny_fleet(folder: Path, *, steps=6, ranks=(4, 4), speeds=(1e-3, 1e-3), names="abcdefgh", **options):
    """A federated plan and its members' plans, saved in `folder`/fleet."""
    profiles = {rank: decoder_profile(folder / f"store-{rank}", rank=rank) for rank in dict.fromkeys(ranks)}
    same = profiles[ranks[0]].model  # stores of equal weights, of which one will do
    members = [
        MemberSpec(
            name=name,
            profile=timed(
                profiles[rank].model_copy(
                    update={"model": same.model_copy(update={"lora": profiles[rank].model.lora})}
                ),
                seconds,
            ),
            budget_bytes=BUDGET,
            link=LINK,
        )
        for name, rank, seconds in zip(names, ranks, speeds)
    ]
    fleet, plans = plan_federated(members, steps, time_limit=10.0, **options)
    save_fleet(fleet, plans, folder / "fleet")
    return fleet, plans


def tiny_split_fleet(folder: Path, *, steps=4, speeds=(1e-5, 1e-3), server=1e-4, layers=3, names="abcdefgh", **options):
    """A split federated plan saved in `folder`/fleet, the plans of its parts, and the whole model's profile.
    `speeds`: seconds of an operator on each device; `server`: on the server.
    """
    traced = decoder_profile(folder / "store", config={**CONFIG, "num_hidden_layers": layers})
    profile = traced.model_copy(update={"device": traced.device.model_copy(update={"threads": 1})})

    def spec(name, seconds):
        return MemberSpec(name=name, profile=timed(profile, seconds), budget_bytes=BUDGET, link=LINK)

    members = [spec(name, seconds) for name, seconds in zip(names, speeds)]
    fleet, plans = plan_split(spec("server", server), members, steps, time_limit=20.0, **options)
    save_fleet(fleet, plans, folder / "fleet")
    return fleet, plans, profile
