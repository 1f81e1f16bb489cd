"""Small federated fleets: a traced model whose operators are said to take some time, planned for devices of any speed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tiny_plans import decoder_profile

from tightfit.planner.fleet.federated import plan_federated
from tightfit.planner.fleet.io import save_fleet
from tightfit.planner.fleet.plan import MemberSpec
from tightfit.planner.fleet.schema import Link

BUDGET = 400 << 20
LINK = Link(up_bytes_per_second=1e7, down_bytes_per_second=1e7, latency_seconds=1e-3)

needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="Flower is not installed: pip install 'tightfit[fleet]'"
)


def timed(profile, seconds: float):
    """The profile with `seconds` for each operator."""
    programs = [
        program.model_copy(
            update={"operators": [one.model_copy(update={"seconds": seconds}) for one in program.operators]}
        )
        for program in profile.programs
    ]
    return profile.model_copy(update={"programs": programs})


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
    fleet, plans = plan_federated(members, steps, time_limit=10.0, prices=False, **options)
    save_fleet(fleet, plans, folder / "fleet")
    return fleet, plans
