"""Random decisions for a layer, what the layer model says of them beside their schedules, and settings of an almost
instant disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tightfit.planner.formulation.any_schedule_bound import AnyScheduleBound
from tightfit.planner.formulation.layer_constraints import LayerProgram
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.layer_figures import FIELDS
from tightfit.planner.schedule.column_bytes import live_bytes
from tightfit.planner.schedule.layer_schedule import Decision, expand, measure
from tightfit.planner.schedule.lowering import draft, live_profile
from tightfit.planner.schedule.realize import realize
from tightfit.planner.solvers.lp import Linear, LinearProgram

INSTANT = {"read": 1e12, "write": 1e12, "latency": 0.0, "per_byte": 2e-8}


def random_decision(rng, kind) -> Decision:
    """A decision of the planner's class for the layer type `kind`, drawn with `rng`."""
    share = rng.random()
    keep, offload = set(), set()
    for value in kind.candidates:
        if value in kind.alike:  # decided with the candidate of the first tile that it equals
            continue
        maker = kind.producer.get(value)
        draw = rng.random()
        if draw < share:
            keep.add(value)
        elif draw < share + 0.3 * (1 - share) and value in kind.offloadable:
            offload.add(value)
        elif maker is None or not maker.recomputable:
            keep.add(value)
    for chosen in (keep, offload):
        chosen.update(value for value, like in kind.alike.items() if like in chosen)
    drawn = {name: rng.choice(weight.modes) for name, weight in kind.weights.items()}
    weights = tuple((name, drawn[kind.alike.get(name, name)]) for name in kind.weights)
    states = {update.trainable for update in kind.updates if not update.minor and rng.random() < 0.5}
    if rng.random() < 0.5:
        states |= {update.trainable for update in kind.updates if update.minor}
    while True:
        made = Decision(keep=frozenset(keep), offload=frozenset(offload), weights=weights, states=frozenset(states))
        script = expand(kind, made)
        again = {v for v in offload if v in kind.producer and kind.producer[v].index in script.recomputed}
        if not again:
            return Decision(keep=script.kept, offload=script.offloaded, weights=weights, states=frozenset(states))
        # An output whose operator is recomputed for another output is not fetched as well, so it may not be offloaded.
        offload -= again
        keep |= again


def figures_of_decisions(
    rng: Random, kind, count: int
) -> Iterator[tuple[Decision, dict[str, float], dict[str, float]]]:
    """(decision, figures by the layer model, figures that its schedule counts) of random decisions for a layer type."""
    block = LayerProgram(LinearProgram(), kind)
    goal = Linear()
    for figure in block.figures().values():
        goal.plus(figure)
    for _ in range(count):
        decision = random_decision(rng, kind)
        block.fix(decision)
        result = block.program.solve(goal)
        assert result.optimal
        told = {name: getattr(block.figures(), name).value(result.values) for name in FIELDS}
        yield decision, told, dict(zip(FIELDS, measure(kind, decision).row))


def bounds_of_schedules(rng: Random, profile, count: int) -> list[float]:
    """Seconds that the planner proves for the memory of each schedule that was carried out of `count` random decisions.

    Asserts that the windows add up to what is live, and that no schedule is faster than its bounds.
    """
    problem, planner = layered(profile), ModelPlanner(profile)
    any_schedule, found = AnyScheduleBound(problem), []
    for _ in range(count):
        by_type = [[measure(kind, random_decision(rng, kind)) for _ in range(2)] for kind in problem.types]
        columns = tuple(rng.choice(by_type[kind]) for kind in problem.layer_type)
        joined = draft(problem, columns)
        schedules = joined.train, joined.evaluate, joined.update
        live = max(max(live_profile(entries, joined.resident, joined.sizes), default=0) for entries in schedules)
        assert live == live_bytes(problem, columns)
        schedule, _ = realize(problem, columns, 2 * live)
        if schedule is None:
            continue
        assert any_schedule.step_seconds(schedule.peak_bytes) <= schedule.seconds * (1 + 1e-9)
        bound = planner.bound(schedule.peak_bytes)
        assert bound is not None
        assert bound <= schedule.seconds * (1 + 1e-9)
        found.append(bound)
    return found
