"""Plans federated rounds: each device's own plan within its budget, and local steps by its speed, so that nobody waits.

Devices' plans do not depend on how many steps they take, so each device is planned once, for the fastest step that its
budget holds beside Flower's processes, and of many equal ones as many as there is time for; `round_times` then shares the steps out. With the plans' proven bounds in the
place of their seconds, the same sharing-out gives the bound on the makespan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.planner.fleet.alone import AlonePlans, in_turn
from tightfit.planner.fleet.io import plan_file
from tightfit.planner.fleet.member_plans import no_time, while_there_is_time
from tightfit.planner.fleet.member_profiles import check_equal
from tightfit.planner.fleet.pieces import trained_tensors
from tightfit.planner.fleet.plan import (
    UNJUDGED,
    MemberSpec,
    checked_members,
    checked_steps,
    described,
    figures_of,
    judged,
    report,
    shared,
)
from tightfit.planner.fleet.round_times import Pace, makespan_of, shared_out, transfer_seconds
from tightfit.planner.fleet.schema import FederatedBaseline, FederatedMember, FederatedPlan, Link, Price
from tightfit.planner.fleet.worth import TENTH, faster, price
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import Progress, checked_gap, checked_limit
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_size

NODE_BYTES = 42 << 20
"""Flower on a device, as `tightfit fleet federate join` runs it: one process, which speaks Flower's protocol with little
memory. Measured while a run trains (flwr 1.42, Python 3.11, x86-64, with TLS): 41.0 MiB resident, of which 18.7 are its
own alone"""
SUPERNODE_BYTES = 388 << 20
"""Flower on a device, as its own `flower-supernode` runs it. Measured likewise, resident: SuperNode 135.5 MiB, SuperExec
125.5, and the process of the message that waits for the run 126.2; by share 100.9 + 93.3 + 91.8"""
START_SECONDS = 6.0
"""of a round on a device, beside transfers and steps: until the order is looked for, `tightfit run` is ready and the
answer is looked for. Measured with a model of two layers on two busy cores: 5 to 7 s"""
PRICE_SHARE = 0.3
"""of the time limit: for what more memory would be worth, if that is asked for"""
NOT_ADDED = {"rank_pattern": "rank_pattern", "use_dora": "dora", "modules_to_save": "modules_to_save"}
"""settings of an adapter that rounds cannot add up, and the option that makes each"""


def plan_federated(
    members: Sequence[MemberSpec],
    steps: int,
    *,
    flower_bytes: int = NODE_BYTES,
    start_seconds: float = START_SECONDS,
    time_limit: float = 120.0,
    gap: float = 1e-3,
    prices: bool = True,
    progress: Progress | None = None,
) -> tuple[FederatedPlan, dict[str, Plan]]:
    """The shortest round found of `steps` local steps in all, with its proof, and the plans of its members by name.

    Each member's budget is for all that runs there: `flower_bytes` of it are set aside for Flower's processes. Members
    that cannot hold a step, or would only be waited for, take no part; the plan says why. Ranks may differ between
    members, where alpha / rank does not. With `prices` it also says what more memory and a faster link would bring for
    each member. Raises InputError for members that cannot train together or a number that cannot be used, and
    InfeasibleError where no device can hold a step.
    """
    members = checked_members(members)
    profiles = {spec.name: spec.profile for spec in members}
    check_alike(profiles)
    unit = next(iter(profiles.values())).accumulate
    rounds = _Rounds(
        specs=members,
        steps=checked_steps(steps, unit),
        unit=unit,
        flower_bytes=flower_bytes,
        start_seconds=start_seconds,
        deadline=time.monotonic() + checked_limit(time_limit),
        gap=checked_gap(gap),
        progress=progress,
    )
    return rounds.plan(priced=prices)


@dataclass(kw_only=True)
class _Rounds:
    specs: Sequence[MemberSpec]
    steps: int
    unit: int
    flower_bytes: int
    start_seconds: float
    deadline: float
    gap: float
    progress: Progress | None

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.plans = shared([spec.profile for spec in self.specs], lambda one: AlonePlans(one, 1, self.gap))
        self.rooms = [max(1, spec.budget_bytes - self.flower_bytes) for spec in self.specs]
        """bytes of each device's run"""
        self.own_bytes = [sum(tensor.bytes for tensor in trained_tensors(spec.profile)) for spec in self.specs]

    def pace(self, at: int, step_seconds: float, link: Link | None = None) -> Pace:
        """How fast a device answers by a plan with such steps."""
        seconds = transfer_seconds(link or self.specs[at].link, self.down_bytes, self.own_bytes[at])
        return Pace(fixed_seconds=seconds + self.start_seconds, step_seconds=step_seconds)

    # --- the round --------------------------------------------------------------------------------------------------

    def plan(self, *, priced: bool) -> tuple[FederatedPlan, dict[str, Plan]]:
        until = self.started + (self.deadline - self.started) * (1 - PRICE_SHARE if priced else 1.0)
        order = in_turn(self.plans, self.rooms)
        for number, (at, share) in enumerate(while_there_is_time(order, until), 1):
            self.plans[at].plan(self.rooms[at], share)
            report(self.progress, f"planning devices ({number} of {len(order)})", self.started, math.inf, 0.0)
        plans = [own.known(room) for own, room in zip(self.plans, self.rooms)]
        able = {at for at, plan in enumerate(plans) if plan is not None and plan.train is not None}
        if not able:
            raise self._nothing_fits(plans)
        self.down_bytes = max(self.own_bytes[at] for at in able)  # the fleet's adapter has the largest rank
        paces = [self.pace(at, plan.step_seconds if plan and plan.train else math.inf) for at, plan in enumerate(plans)]
        hoped = [self.pace(at, self._bound(at, plan)) for at, plan in enumerate(plans)]
        taken = shared_out(paces, self.steps, self.unit)
        makespan = makespan_of(paces, taken)
        bound = makespan_of(hoped, shared_out(hoped, self.steps, self.unit))
        members = [self._member(at, plans[at], paces[at], taken[at]) for at in range(len(self.specs))]
        profile = self.specs[0].profile
        fleet = FederatedPlan(
            **UNJUDGED,
            model=profile.model.name,
            steps=self.steps,
            accumulate=self.unit,
            batch=profile.batch,
            rank=max(rank_of(self.specs[at].profile) for at in able),
            adapter_bytes=self.down_bytes,
            members=members,
            baselines=self._baselines(paces),
        )
        worth = self._prices(makespan, taken, paces) if priced else []
        chosen = {spec.name: plan for spec, plan, count in zip(self.specs, plans, taken) if plan and count}
        return judged(fleet, chosen, self.started, prices=worth, **figures_of(makespan, bound)), chosen

    def _bound(self, at: int, plan: Plan | None) -> float:
        """Seconds of a step that no plan of the device undercuts."""
        bound = self.plans[at].bound(self.rooms[at])
        return bound if plan is None or plan.train is None else min(bound, plan.step_seconds)

    def _member(self, at: int, plan: Plan | None, pace: Pace, count: int) -> FederatedMember:
        spec = self.specs[at]
        member = FederatedMember(
            **described(spec),
            flower_bytes=self.flower_bytes,
            rank=rank_of(spec.profile),
            adapter_bytes=self.own_bytes[at],
            start_seconds=self.start_seconds,
            plan=plan_file(spec.name) if count else None,
        )
        if plan is None or not count:
            return member.model_copy(update={"reason": self._reason(at, plan)})
        return member.model_copy(
            update={
                "plan_fingerprint": plan.fingerprint,
                "steps": count,
                "step_seconds": plan.step_seconds,
                "bound_seconds": self._bound(at, plan),
                "peak_bytes": plan.peak_bytes + self.flower_bytes,
                "round_seconds": pace.answered(count),
            }
        )

    def _reason(self, at: int, plan: Plan | None) -> str:
        if plan is None:
            return no_time()
        if plan.train is not None:
            return "a round would only wait for it"
        return f"it cannot hold a step: it {self._lacking(at, plan)}"

    def _lacking(self, at: int, plan: Plan) -> str:
        needed = (plan.minimum_budget_bytes or plan.peak_bytes) + self.flower_bytes
        return (
            f"needs {format_size(needed)}, of which {format_size(self.flower_bytes)} for Flower, and may take"
            f" {format_size(self.specs[at].budget_bytes)}"
        )

    def _nothing_fits(self, plans: Sequence[Plan | None]) -> InfeasibleError:
        planned = [(at, plan) for at, plan in enumerate(plans) if plan is not None]
        told = "; ".join(f"{self.specs[at].name} {self._lacking(at, plan)}" for at, plan in planned)
        if others := len(plans) - len(planned):
            told += f"; of {others} others none was planned: {no_time()}"
        least = min((plan.minimum_budget_bytes or plan.peak_bytes) + self.flower_bytes for _, plan in planned)
        return InfeasibleError(
            f"no device can hold a step: {told}; give one of them more memory, or profile with a smaller batch or a"
            " shorter sequence",
            least,
        )

    # --- what it is compared with -----------------------------------------------------------------------------------

    def _baselines(self, paces: Sequence[Pace]) -> list[FederatedBaseline]:
        names = [spec.name for spec in self.specs]
        units, count = self.steps // self.unit, len(names)
        shares = [self.unit * (units // count + (at < units % count)) for at in range(count)]
        equal = FederatedBaseline(name="equal steps", makespan_seconds=None, steps=dict(zip(names, shares)))
        unfit = [name for name, share, pace in zip(names, shares, paces) if share and pace.step_seconds == math.inf]
        if unfit:
            equal = equal.model_copy(update={"reason": f"{', '.join(unfit)} cannot hold a step"})
        else:
            equal = equal.model_copy(update={"makespan_seconds": makespan_of(paces, shares)})
        fastest = min(range(count), key=lambda at: paces[at].answered(self.steps))
        steps = {name: self.steps * (at == fastest) for at, name in enumerate(names)}
        alone = paces[fastest].answered(self.steps)
        return [equal, FederatedBaseline(name="fastest alone", makespan_seconds=alone, steps=steps)]

    def _prices(self, makespan: float, taken: Sequence[int], paces: Sequence[Pace]) -> list[Price]:
        """By how much a round gets shorter if one of the members has more memory, or a faster link, as far as there is time."""
        result: list[Price] = []
        taking = [at for at, count in enumerate(taken) if count]
        for at, share in while_there_is_time(taking, self.deadline, always=0):
            spec, step = self.specs[at], paces[at].step_seconds
            more = min(self.plans[at].planner.neighbour_bytes(spec.budget_bytes), spec.budget_bytes // TENTH)
            roomier = self.plans[at].plan(self.rooms[at] + more, share)
            roomy = self.pace(at, min(step, roomier.step_seconds) if roomier.train else step)
            ways = [[*paces[:at], one, *paces[at + 1 :]] for one in (roomy, self.pace(at, step, faster(spec.link)))]
            with_memory, with_link = (makespan_of(way, shared_out(way, self.steps, self.unit)) for way in ways)
            result.append(price(spec.name, more, makespan, with_memory=with_memory, with_link=with_link))
        return result


# --- one model --------------------------------------------------------------------------------------------------------


def rank_of(source: Profile | Plan) -> int:
    """The rank of the adapter that is trained."""
    assert source.model.lora is not None
    return int(source.model.lora["rank"])


def check_alike(profiles: dict[str, Profile]) -> None:
    """Raise InputError unless the members' profiles, by name, train an adapter of one model; ranks may differ."""
    for name, profile in profiles.items():
        if not profile.model.lora or not trained_tensors(profile):
            raise InputError(
                f"member {name}: its profile of {profile.model.name} trains no adapter, and adapters are what federated"
                f" rounds add up; profile with {spelled('lora_rank')}"
            )
        check_plain(name, profile)
    check_equal(
        {name: _facts(profile) for name, profile in profiles.items()},
        lambda one, other: f" ({one} and {other})" if isinstance(other, str | int | float) else "",
        f" ({spelled('lora_rank')} alone may differ, with {spelled('lora_alpha')} in proportion)",
    )


def check_plain(name: str, profile: Profile) -> None:
    """Raise InputError for an adapter of member `name` that rounds cannot add up: what is trained has to be LoRA pairs,
    all of one rank.
    """
    for setting, option in NOT_ADDED.items():
        if (profile.model.lora or {}).get(setting):
            raise InputError(
                f"member {name}: its adapter was profiled with {spelled(option)}, and rounds add up LoRA pairs of one rank and nothing"
                f" else; profile without {spelled(option)}"
            )


def _facts(profile: Profile) -> dict[str, Any]:
    lora = profile.model.lora
    assert lora is not None
    named = ("rank", "alpha", "alpha_pattern")
    scale = lora["alpha"] / (math.sqrt(lora["rank"]) if lora.get("use_rslora") else lora["rank"])
    return {
        "model": profile.model.name,
        "weights": profile.model.store_fingerprint,
        "batch": profile.batch,
        "seq": profile.seq,
        "steps of an update": profile.accumulate,
        "the adapter's scale": scale,
        "alphas by pattern": [lora["rank"], lora["alpha_pattern"]] if lora.get("alpha_pattern") else None,
        "the adapter's other settings": {key: value for key, value in lora.items() if key not in named},
        "the trained tensors": [tensor.name for tensor in trained_tensors(profile)],
    }
