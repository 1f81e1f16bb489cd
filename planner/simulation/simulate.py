"""The simulator's entry: replays a plan's schedules instruction by instruction, checks invariants, states peak and
seconds.

It reads the plan file alone and shares no code with the search, so that it can check it. Every violated invariant
raises `InvalidSchedule` with the invariant's name, the instruction and the tensor:

| invariant | what must hold |
|---|---|
| form | an instruction has a known verb and names what the plan declares |
| use-before-resident | whatever an instruction reads is resident |
| already-resident | nothing is made twice, except that an operator may write the same value to the same place again |
| offset | every tensor lies inside the arena, aligned |
| overlap | no two resident tensors share a byte |
| double-free | only resident tensors are freed |
| leak | at the end exactly the `resident` tensors are there, each at its place |
| operator-order | forward operators first run in order, backward operators run once, in order; an evaluation runs those for inference where a layer has them |
| update-once | every trainable is updated once, with its gradient complete, and not read afterwards; in a cycle, at least once in all, and never where its layer's backward is left out; where gradients are clipped, in the update alone |
| sum-once | where gradients are clipped, every step adds each complete gradient to its sum once, and no trainable is updated in it |
| passed-once | a layer whose backward is left out passes a complete gradient of its output on as that of its input, at most once |
| perturbed | of two forwards the first reads every trainable at +1 epsilon, the second at -1, and the update follows both |
| lost-state | an updated trainable and its optimizer state are not dropped without a copy on disk |
| transfer | only weights are read, only what was spilled is fetched |
| budget | the peak is within the budget |
| claims | the plan's own figures are those found here |

Time: one sequential compute timeline; one disk that serves requests in the order of issue (latency + bytes / bandwidth
each); an instruction waits for the transfers it depends on; each byte moved costs the cores what the profile says.
"""  # noqa: E501  a row of a table is one line

from __future__ import annotations

from tightfit.planner.schema import Plan
from tightfit.planner.simulation.figures import Simulation
from tightfit.planner.simulation.plan_index import InvalidSchedule, PlanIndex
from tightfit.planner.simulation.replay import LARGEST, LINE, Replay
from tightfit.planner.simulation.timeline import POINTS
from tightfit.runtime.common.errors import InputError

__all__ = ["LARGEST", "POINTS", "InvalidSchedule", "Simulation", "simulate"]


def simulate(plan: Plan) -> Simulation:
    """Replay `plan`. Raises InvalidSchedule where an invariant breaks, InputError where the plan has no schedule."""
    if plan.model.is_bare_graph:
        from tightfit.planner.simulation.graph_replay import replay

        return replay(plan)
    if plan.train is None or plan.evaluate is None:
        raise InputError(
            f"the plan is {plan.status} and has no schedule; plan with at least {plan.minimum_budget_bytes} bytes"
        )
    declared = PlanIndex(plan)
    steps = [
        Replay(declared, phase, f"train {position}" if plan.cycle else "train", "train")
        for position, phase in enumerate(plan.steps)
    ]
    if declared.apart != (plan.update is not None) or (declared.apart and (plan.cycle or declared.two_forwards)):
        raise InvalidSchedule("update-once", "plan", -1, "update", "is a schedule if and only if gradients are clipped")
    evaluate = Replay(declared, plan.evaluate, "evaluate", "evaluate")
    update = None if plan.update is None else Replay(declared, plan.update, "update", "update")
    replays = [*steps, evaluate, *([] if update is None else [update])]
    for replayed in replays:
        replayed.run()
    for name in declared.trainables:
        if not any(name in replayed.updated for replayed in replays):
            raise InvalidSchedule("update-once", "plan", -1, name, "is never updated")
    floor = plan.device.floor
    fullest = max(replays, key=lambda replayed: replayed.top)
    arena = -(-fullest.top // LINE) * LINE
    workspace = max(replayed.workspace for replayed in replays)
    charged = floor.held_bytes + floor.instruction_bytes * declared.instructions
    peak = max(floor.start_peak_bytes, charged + arena + workspace)
    if peak > plan.budget_bytes:
        raise InvalidSchedule(
            "budget", fullest.name, -1, "the arena", f"{peak} bytes at the peak, {plan.budget_bytes} allowed"
        )
    for claim, stated, computed in (
        ("arena_bytes", plan.arena_bytes, arena),
        ("workspace_bytes", plan.workspace_bytes, workspace),
        ("peak_bytes", plan.peak_bytes, peak),
    ):
        if stated and stated < computed:
            raise InvalidSchedule("claims", "plan", -1, claim, f"the plan states {stated}, the replay finds {computed}")
    train, *cycle = (step.replayed_phase() for step in steps)
    return Simulation(
        train=train,
        cycle=cycle,
        evaluate=evaluate.replayed_phase(),
        update=None if update is None else update.replayed_phase(),
        accumulate=plan.accumulate,
        timeline=steps[0].timeline.points,
        peak_bytes=peak,
        arena_bytes=arena,
        workspace_bytes=workspace,
        live_bytes=max(replayed.most_live for replayed in replays),
    )
