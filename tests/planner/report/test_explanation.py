"""What a plan says of itself against what the simulator and a second planning say."""

from __future__ import annotations

import json
import re

import pytest
from bare_graphs import graph_of
from broken_plans import listed
from layered_graph import layered
from places import ROOT
from sample_plans import sample_plan
from synthetic import decoder_like, device, small_chain

from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import planner_of
from tightfit.planner.report.costs import CostLedger
from tightfit.planner.report.explain import details, explain, gist, percent_within
from tightfit.planner.report.explanation import SORTS, account, peak_text, shortfall
from tightfit.planner.report.marginal_value import explained, neighbours, what_if
from tightfit.planner.report.memory_categories import fullest, peak_parts
from tightfit.profiles.graph_input import graph_profile, parse_graph
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import MIB, format_seconds, format_size

FLOOR = 100 * MIB


@pytest.fixture(scope="module")
def deep():
    """A decoder's planner; its policies are planned at once, no solver needed."""
    on = device(resident=FLOOR, import_peak=FLOOR, per_instruction=100)
    return ModelPlanner(decoder_like(4, tokens=256, slices=2, slice_rows=512, on=on))


@pytest.fixture(scope="module", params=["keep-all", "checkpoint-layers", "mebp"])
def ruled(request, deep):
    return deep.plan(1 << 31, policy=request.param)


@pytest.fixture(scope="module")
def smallest(deep):
    """A plan that spills, fetches, streams and recomputes."""
    return deep.smallest_plan(policy="mebp")


@pytest.fixture(scope="module")
def chain():
    return ModelPlanner(small_chain(12, on=device(resident=MIB, import_peak=MIB)))


def test_costs_add_up_to_the_simulators_figures(ruled):
    costs = CostLedger(ruled).costs()
    train = ruled.train
    assert sum(cost.recompute_seconds for cost in costs.values()) == pytest.approx(train.recompute_seconds)
    assert sum(cost.unpack_seconds for cost in costs.values()) == pytest.approx(train.unpack_seconds)
    assert sum(cost.read_bytes for cost in costs.values()) == train.read_bytes
    assert sum(cost.write_bytes for cost in costs.values()) == train.write_bytes
    assert set(ruled.decisions) <= set(costs)
    for name, cost in costs.items():
        assert cost.decision == ruled.decisions.get(name)
        if cost.decision == "streamed":
            assert cost.read_bytes > 0
        if cost.recompute_seconds and cost.decision is not None:
            assert cost.decision == "recomputed"


def test_a_plan_that_spills_counts_its_transfers(chain):
    floor = chain.profile.device.floor.resident_bytes
    made = chain.plan(chain.plan(floor + 1).minimum_budget_bytes)
    assert made.train.write_bytes
    costs = CostLedger(made).costs()
    verbs = [instruction[0] for instruction in listed(made.train)]
    device_ = made.device
    by_hand = {
        "read": sum(verb in ("read", "fetch") for verb in verbs) * device_.read.latency_seconds
        + made.train.read_bytes / device_.read.bytes_per_second,
        "write": verbs.count("spill") * device_.write.latency_seconds
        + made.train.write_bytes / device_.write.bytes_per_second,
    }
    uses = {use.name: use for use in account(made).channels}
    for name, seconds in by_hand.items():
        assert uses[name].seconds == pytest.approx(seconds)
        assert uses[name].share == pytest.approx(seconds / made.step_seconds)
        assert sum(getattr(cost, f"{name}_seconds") for cost in costs.values()) == pytest.approx(seconds)
    # Computing and waiting fill the step.
    assert uses["compute"].seconds + account(made).waiting_seconds == pytest.approx(made.step_seconds)


def test_what_is_recomputed_and_what_it_costs(ruled):
    told = account(ruled).recomputation
    train = ruled.train
    assert told.seconds == train.recompute_seconds
    assert told.share == pytest.approx(train.recompute_seconds / train.seconds)
    assert sum(group.seconds for group in told.operators) == pytest.approx(told.seconds)
    assert sum(told.by_layer.values()) == pytest.approx(told.seconds)
    runs = [(i[1], i[2]) for i in listed(train) if i[0] == "run"]
    assert sum(group.runs for group in told.operators) == len(runs) - len(set(runs))
    assert told.tensors == list(ruled.decisions.values()).count("recomputed")
    if ruled.policy == "keep-all":
        assert (told.operators, told.tensors, told.bytes) == ([], 0, 0)
    else:
        block = {group.operator: group for group in told.operators if group.program == "block"}
        assert {group.layers for group in block.values()} == {4}
        assert list(told.by_layer) == [f"layer{index}" for index in range(4)]


def test_what_the_cores_do_by_kind_of_operator(ruled):
    uses = account(ruled).operators
    train, programs = ruled.train, {program.name: program.operators for program in ruled.programs}
    of = {layer.name: programs[layer.program] for layer in ruled.layers}
    ran = [of[i[1]][i[2]] for i in listed(train) if i[0] == "run"]
    updates = sum(tensor.update_seconds for tensor in ruled.tensors if tensor.kind == "trainable")
    verbs, on = [i[0] for i in listed(train)], ruled.device
    moving = (
        train.read_bytes * on.read.compute_seconds_per_byte
        + train.write_bytes * on.write.compute_seconds_per_byte
        + sum(map(verbs.count, ("read", "fetch"))) * on.read.compute_seconds_per_transfer
        + verbs.count("spill") * on.write.compute_seconds_per_transfer
    )
    cores = train.compute_seconds + train.recompute_seconds
    assert sum(use.seconds for use in uses) + updates + moving == pytest.approx(cores)
    assert {use.operator for use in uses} == {operator.target for operator in ran}
    for use in uses:
        own = [operator for operator in ran if operator.target == use.operator]
        assert (use.runs, use.flops) == (len(own), pytest.approx(sum(operator.flops for operator in own)))
        assert use.share == pytest.approx(use.seconds / train.seconds)
    assert [use.seconds for use in uses] == sorted((use.seconds for use in uses), reverse=True)


def test_kinds_of_operators_are_told_with_their_rates(ruled):
    told = account(ruled)
    dearest = told.operators[0].model_copy(update={"flops": told.operators[0].seconds * 412e9})
    rare = told.operators[-1].model_copy(update={"share": 0.001})
    said = explain(ruled, told.model_copy(update={"operators": [dearest, rare]}))
    lines = [line for line in said if line.startswith("of the step, by kind of operator: ")]
    assert len(lines) == 1
    assert f"{dearest.operator} {dearest.share:.1%} (" in lines[0]
    assert lines[0].endswith(", 412 GFLOP/s)")


def test_the_peak_is_the_simulators(ruled):
    told = account(ruled).peak
    assert told.bytes == ruled.peak_bytes
    parts = (told.floor_bytes, told.schedule_bytes, told.tensor_bytes, told.workspace_bytes)
    assert sum(parts) == ruled.peak_bytes
    assert told.start_bytes == ruled.start_bytes == 0
    count = len(ruled.train.instructions) + len(ruled.evaluate.instructions)
    assert told.schedule_bytes == 100 * count
    assert (told.text, told.instruction) == (ruled.train.peak.text, ruled.train.peak.instruction)
    verb, layer, *_ = listed(ruled.train)[told.instruction]
    assert (verb, told.layer) == ("run", layer)
    assert told.text.startswith(f"{layer}: {told.operator} (")
    # What lies there, kind by kind, is what the simulator's timeline has at its fullest point.
    point = fullest(ruled.timeline)
    counted = {k: v for k, v in point.by_kind.items() if k not in ("floor", "workspace", "fragmentation")}
    assert {k: v for k, v in told.by_kind.items() if v} == counted
    assert list(told.tensors.items()) == list(ruled.train.peak.tensors.items())[: len(told.tensors)]


def test_where_the_start_sets_the_peak_its_bytes_are_under_its_name():
    """As with a PyTorch whose import alone holds more than the step: what it holds then is no schedule."""
    start = 1 << 30
    on = device(resident=FLOOR, import_peak=start, per_instruction=100)
    made = ModelPlanner(decoder_like(4, tokens=256, slices=2, slice_rows=512, on=on)).plan(start, policy="mebp")
    assert made.peak_bytes == start
    told = account(made).peak
    count = len(made.train.instructions) + len(made.evaluate.instructions)
    assert told.schedule_bytes == 100 * count
    later = FLOOR + told.schedule_bytes + told.tensor_bytes + told.workspace_bytes
    assert told.start_bytes == made.start_bytes == start - later > start // 2
    parts = {kind.label: size for kind, size in peak_parts(made)}
    assert parts["start of Python and PyTorch"] == told.start_bytes
    assert sum(parts.values()) == start
    said = explain(made)
    more = format_size(told.start_bytes)
    assert (
        f"the peak is set by the start of Python and PyTorch: it reaches 1024.0 MiB, {more} more than all that follows"
        in said
    )
    (after,) = (sentence for sentence in said if sentence.startswith("the peak after that"))
    assert f", {format_size(told.schedule_bytes)} schedule;" in after


def test_the_neighbours_of_a_budget_are_what_planning_them_says(chain):
    least = chain.plan(MIB + 1).minimum_budget_bytes
    roomy = chain.plan(1 << 40).peak_bytes
    middle, step = (least + roomy) // 2, (roomy - least) // 4
    made = chain.plan(middle)
    best, beside = what_if(chain, made, step_bytes=step)
    assert best == made
    assert [worth.budget_bytes for worth in beside] == [middle - step, middle + step]
    for worth in beside:
        again = chain.plan(worth.budget_bytes)
        assert worth.step_seconds == pytest.approx(again.step_seconds)
        assert worth.status == again.status
        assert worth.bound_seconds <= worth.step_seconds * (1 + 1e-9)
        assert worth.price_seconds == pytest.approx(worth.bound_seconds - chain.bound(middle))
        # The class bound is monotone: less memory never is faster.
        assert worth.price_seconds * worth.change_bytes <= 1e-12
    assert [worth.price_seconds for worth in neighbours(chain, made, step_bytes=step)] == [
        worth.price_seconds for worth in beside
    ]
    text = "\n".join(explain(made, account(made).model_copy(update={"neighbours": beside})))
    assert f"{beside[0].step_seconds:.3f} s per step" in text
    assert "as planning again shows" in text


def test_less_than_the_smallest_budget_has_no_neighbour(chain):
    least = chain.plan(MIB + 1).minimum_budget_bytes
    made = chain.plan(least)
    _, beside = what_if(chain, made, step_bytes=1)
    below, above = beside
    assert (below.step_seconds, below.status, below.bound_seconds) == (None, "infeasible", None)
    assert above.step_seconds is not None
    assert "no plan fits, as planning again shows" in "\n".join(
        explain(made, account(made).model_copy(update={"neighbours": beside}))
    )


def test_nothing_fits_below_the_floor(chain):
    made = chain.plan(1 << 21)
    below = neighbours(chain, made, step_bytes=made.budget_bytes)[0]
    assert (below.budget_bytes, below.status, below.bound_seconds) == (0, "infeasible", None)
    text = "\n".join(explain(made, account(made).model_copy(update={"neighbours": [below]})))
    assert "2.0 MiB less (0 B): no plan fits, Python and PyTorch alone take 1.0 MiB" in text


def test_a_faster_plan_in_less_memory_takes_its_place(chain, monkeypatch):
    roomy = chain.plan(1 << 40)
    tight = chain.plan(chain.plan(MIB + 1).minimum_budget_bytes)
    assert tight.step_seconds > roomy.step_seconds
    # As if the search at the budget had been cut short, and that beside it had not.
    budget = roomy.peak_bytes + 100
    late = tight.model_copy(update={"budget_bytes": budget, "bound_seconds": roomy.bound_seconds})
    best, beside = what_if(chain, late, step_bytes=50)
    assert best.step_seconds == pytest.approx(roomy.step_seconds)
    assert best.budget_bytes == budget
    assert all(worth.step_seconds <= best.step_seconds * (1 + 1e-9) for worth in beside)


class Told:
    """A planner that answers from lists: budget -> (seconds of its plan, bound of the class there)."""

    interrupted = False

    def __init__(self, answers):
        self.answers = answers

    def plan(self, budget, *, time_limit, gap, progress):
        seconds, bound = self.answers[budget]
        return planned_at(budget, seconds, bound)

    def bound(self, budget, *, time_limit):
        return self.answers[budget][1]


def planned_at(budget, seconds, bound):
    return sample_plan(
        budget=budget, seconds=seconds, status="feasible", bound_seconds=bound, any_schedule_bound_seconds=bound / 2
    )


def test_a_plan_from_another_budget_is_told_against_the_bounds_of_this_one():
    """In less memory the search was luckier: its plan is that of all three budgets, and only the first has its
    bound.
    """
    low, here, high = 300 * MIB, 350 * MIB, 400 * MIB
    planner = Told({low: (1.0, 0.9), here: (1.25, 0.8), high: (1.5, 0.7)})
    best, beside = what_if(planner, planned_at(here, 1.25, 0.8), step_bytes=50 * MIB)
    assert (best.budget_bytes, best.step_seconds) == (here, 1.0)
    assert (best.bound_seconds, best.any_schedule_bound_seconds) == (0.8, 0.4)
    assert best.gap == pytest.approx(0.2)
    assert [(w.budget_bytes, w.step_seconds, w.bound_seconds) for w in beside] == [(low, 1.0, 0.9), (high, 1.0, 0.7)]
    assert [w.price_seconds for w in beside] == [pytest.approx(0.1), pytest.approx(-0.1)]
    assert [w.status for w in beside] == ["feasible", "feasible"]


def test_an_optimum_is_none_where_there_is_more_memory():
    low, here, high = 300 * MIB, 350 * MIB, 400 * MIB
    planner = Told({low: (0.8, 0.8), here: (1.25, 0.8), high: (1.5, 0.7)})
    best, beside = what_if(planner, planned_at(here, 1.25, 0.8), step_bytes=50 * MIB)
    assert best.status == "optimal"
    assert [(w.step_seconds, w.status) for w in beside] == [(0.8, "feasible"), (0.8, "feasible")]


def test_a_plan_in_more_memory_does_not_take_its_place():
    low, here, high = 300 * MIB, 350 * MIB, 400 * MIB
    planner = Told({low: (1.5, 0.9), here: (1.25, 0.8), high: (1.0, 0.7)})
    given = planned_at(here, 1.25, 0.8)
    best, beside = what_if(planner, given, step_bytes=50 * MIB)
    assert best is given
    assert [w.step_seconds for w in beside] == [1.5, 1.0]


def test_at_the_floor_nothing_fits():
    given = planned_at(350 * MIB, 1.25, 0.8)
    floor = given.device.floor.resident_bytes
    planner = Told({given.budget_bytes: (1.25, 0.8), given.budget_bytes + (350 * MIB - floor): (1.0, 0.7)})
    below, _ = neighbours(planner, given, step_bytes=350 * MIB - floor)
    assert (below.budget_bytes, below.status, below.bound_seconds) == (floor, "infeasible", None)


def test_why_nothing_fits(deep, smallest):
    budget = smallest.peak_bytes - 1000
    plan = deep.plan(budget, policy="mebp")
    assert plan.status == "infeasible"
    why = shortfall(plan, smallest).shortfall
    assert why.minimum_budget_bytes == plan.minimum_budget_bytes == smallest.peak_bytes
    assert why.missing_bytes == 1000
    assert why.peak.text == smallest.train.peak.text
    assert why.remedies == []  # one sample, no tokens, no adapter: nothing to halve
    lines = explain(plan, shortfall(plan, smallest))
    assert lines[1].endswith(f"({smallest.peak_bytes} bytes), 1000 B more")
    assert smallest.train.peak.text in lines[2]


def test_what_would_lower_the_smallest_budget(deep, smallest):
    shaped = smallest.model_copy(
        update={"batch": 3, "seq": 64, "model": smallest.model.model_copy(update={"lora": {"rank": 8}})}
    )
    plan = deep.plan(smallest.peak_bytes - 1, policy="mebp")
    told = shortfall(plan, shaped).shortfall
    kinds = told.peak.by_kind
    resident = CostLedger(shaped).resident_at(shaped.train, shaped.train.peak.instruction)
    parameter_gradients = sum(size for name, size in resident.items() if name.startswith("grad:layer"))
    by_tokens = sum(kinds.get(kind, 0) for kind in ("activation", "gradient", "batch")) - parameter_gradients
    by_rank = kinds.get("trainable", 0) + kinds.get("optimizer", 0) + parameter_gradients
    saved = {remedy.change: remedy.saves_bytes for remedy in told.remedies}
    assert saved == {
        "a batch of 1 instead of 3": by_tokens * 2 // 3,
        "a sequence of 32 tokens instead of 64": by_tokens // 2,
        "a LoRA rank of 4 instead of 8": by_rank // 2,
    }
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    # Each says which option of profiling it is, and what to set it to, so that it can be tried.
    assert {remedy.field: remedy.value for remedy in told.remedies} == {"batch": 1, "seq": 32, "lora_rank": 4}


@pytest.mark.parametrize(
    ("batch", "seq", "tiles", "changes", "half"),
    [
        (1, 512, 1, {}, 256),
        (1, 512, 2, {}, 128),
        (1, 512, 4, {}, None),  # tiles so small make products slower
        (4, 128, 1, {}, 256),
        (3, 256, 1, {}, None),  # one and a half samples
        (1, 512, 1, {"config": {"model_type": "gpt2"}}, None),  # runs as transformers has it
        (1, 512, 1, {"lora": {"rank": 8, "lora_dropout": 0.1}}, None),
        (1, 512, 1, {"config": {"model_type": "llama", "preference": {"loss": "orpo", "beta": 0.1}}}, None),
    ],
)
def test_fewer_tokens_at_a_time_are_a_remedy_where_they_can_be(deep, smallest, batch, seq, tiles, changes, half):
    model = smallest.model.model_copy(
        update={"kind": "decoder", "config": {"model_type": "llama"}, "lora": {"rank": 8}} | changes
    )
    programs = [program.model_copy(update={"tiles": tiles}) for program in smallest.programs]
    shaped = smallest.model_copy(update={"batch": batch, "seq": seq, "model": model, "programs": programs})
    remedies = shortfall(deep.plan(smallest.peak_bytes - 1, policy="mebp"), shaped).shortfall.remedies
    told = {remedy.field: remedy for remedy in remedies}
    assert ("tile" in told) == (half is not None)
    if half is not None:
        assert told["tile"].value == half
        assert told["tile"].change == f"tiles of {half} tokens instead of {2 * half}"
        assert told["tile"].saves_bytes == told["seq"].saves_bytes


def test_frozen_weights_in_fewer_bits_are_a_remedy_where_they_are_resident_packed():
    roomy = ModelPlanner(decoder_like(2)).plan(60 * MIB, time_limit=5)
    held = {
        bits: roomy.model_copy(update={"model": roomy.model.model_copy(update={"base": bits})})
        for bits in ("16bit", "4bit")
    }
    packed = account(roomy).peak.by_kind.get("packed", 0)
    remedies = {bits: shortfall(roomy, plan).shortfall.remedies for bits, plan in held.items()}
    assert packed > 0
    (fewer,) = remedies["16bit"]
    assert (fewer.change, fewer.field, fewer.value) == ("frozen weights in 4 bits instead of 16", "base", "4bit")
    assert fewer.saves_bytes == pytest.approx(packed * 11.5 / 16, abs=1)
    assert remedies["4bit"] == []


def test_below_the_start_of_the_process(chain):
    floor = device(resident=106 * MIB, import_peak=122 * MIB)
    planner = ModelPlanner(small_chain(12, on=floor))
    plan = planner.plan(100 * MIB)
    lines = explain(plan, shortfall(plan, planner.smallest_plan()))
    assert "starting Python and PyTorch alone reaches 122.0 MiB" in lines


def test_a_card_is_told_as_one(deep, ruled):
    card = ruled.model_copy(update={"device": ruled.device.model_copy(update={"kind": "cuda"})})
    text = "\n".join(explain(card))
    assert "for the card's memory" in text
    assert "Python" not in text
    assert "disk" not in text


def test_a_graph_has_no_process_to_blame_and_no_budget_below_nothing():
    operators = [{"name": name, "seconds": 1, "output_bytes": 10, "inputs": []} for name in "ab"]
    planner = planner_of(graph_of(operators, name="g"))
    made = planner.plan(MIB)
    beside = neighbours(planner, made, step_bytes=50 * MIB)
    text = "\n".join(explain(made, account(made).model_copy(update={"neighbours": beside})))
    assert "50.0 MiB less: no plan fits\n" in f"{text}\n"


def test_a_step_of_a_small_graph_is_a_tenth_of_its_budget():
    small = GraphPlanner(graph_profile(layered(8)))
    top = small.plan(1 << 40).peak_bytes
    assert top < 500 * MIB
    assert [worth.change_bytes for worth in neighbours(small, small.plan(top))] == [-(top // 10), top // 10]
    assert [worth.change_bytes for worth in neighbours(small, small.plan(1 << 40))] == [-50 * MIB, 50 * MIB]


@pytest.mark.slow
def test_what_memory_is_worth_to_a_graph_of_few_operators_is_what_plans_say():
    """Bounds of linear programs, one less another, were a sixth of it."""
    planner = planner_of(parse_graph(json.loads((ROOT / "examples" / "bare-graph.json").read_text())))
    made = planner.plan(740_000_000)
    less, more = neighbours(planner, made)
    for worth in (less, more):
        planned = planner.plan(worth.budget_bytes).step_seconds
        assert worth.price_seconds == pytest.approx(planned - made.step_seconds, abs=1e-3 * planned)
    assert less.price_seconds > 0.05


def chain_of(*names, **fields):
    """Each operator reads the one before it, the last the first as well."""
    operators = [
        {"name": name, "seconds": 1, "output_bytes": size, "inputs": [names[i - 1]] if i else []} | fields
        for i, (name, size) in enumerate(zip(names, (100, 100, 300, 10)))
    ]
    operators[-1]["inputs"] = [names[-2], names[0]]
    return GraphPlanner(graph_of(operators, name="g"))


def test_a_graph_without_phases_is_told_without_them():
    planner = chain_of("a", "b", "c", "d")
    made = planner.plan(planner.smallest_plan().peak_bytes)
    assert made.decisions["a"] == "recomputed"
    for told in (explain(made), explain(planner.plan(1 << 40)), explain(planner.plan(1))):
        assert not {"backward", "forward", "training", "(forward", "(forward)"} & set(" ".join(told).split())
    text = "\n".join(explain(made))
    assert "\noutputs that are needed again later: " in text
    assert "1 given up and computed again (100 B)\n" in text
    assert "making 1 activation of 100 B again costs 1.000 s, 20.0% of the step; dearest: a 1.000 s" in text
    why = explained(planner, planner.plan(1), left=9)
    assert "the peak is set by d (instruction " in "; ".join(explain(planner.plan(1), why))
    again = made.train.model_copy(update={"peak": made.train.peak.model_copy(update={"text": "a (forward again)"})})
    assert peak_text(made, again) == "a (run again)"


def test_the_gist_says_what_becomes_of_tensors_and_what_little_memory_costs(deep):
    plan = deep.plan(1 << 31, policy="mebp")
    record = account(plan)
    sentences = gist(plan, record)
    weights, activations, *_, price = sentences[-4:]
    streamed = {(group.sort, group.decision): group for group in record.decisions}["weights", "streamed"]
    assert 0 < streamed.packed_bytes < streamed.bytes
    sizes = f"{format_size(streamed.bytes)}, {format_size(streamed.packed_bytes)} packed"
    assert weights == f"frozen weights: {streamed.tensors} read from disk for each use ({sizes})"
    assert re.search(r"^activations saved for the backward: .* given up and computed again \(", activations)
    train = plan.train
    costs = f"{train.recompute_seconds / plan.step_seconds:.1%} ({format_seconds(train.recompute_seconds)})"
    assert price.startswith(f"what little memory costs of a step by the model: {costs} computing again what was")
    assert explain(plan, record) == sentences + details(plan, record)
    free = train.model_copy(update={"recompute_seconds": 0, "unpack_seconds": 0})
    never = record.model_copy(update={"waiting_seconds": 0.0})
    assert gist(plan.model_copy(update={"train": free}), never)[-1] == "no time is lost to the lack of memory"


def test_of_a_plan_that_does_not_fit_the_gist_is_all_there_is_to_say(deep, smallest):
    plan = deep.plan(smallest.peak_bytes - 1000, policy="mebp")
    why = shortfall(plan, smallest)
    assert gist(plan, why) == explain(plan, why)
    assert details(plan, why) == []


def test_what_fills_the_memory_adds_up_to_the_peak(ruled):
    record = account(ruled)
    assert sum(part.bytes for part in record.memory) == ruled.peak_bytes
    kinds = {tensor.kind for tensor in CostLedger(ruled).costs().values() if tensor.decision}
    assert kinds - SORTS.keys() <= {"constant", "batch"}
    told = {(group.sort, group.decision): group.tensors for group in record.decisions}
    for (sort, decision), tensors in told.items():
        kinds = [kind for kind, of in SORTS.items() if of == sort]
        costs = [cost for cost in CostLedger(ruled).costs().values() if cost.kind in kinds]
        assert tensors == sum(cost.decision == decision for cost in costs)


def test_the_bytes_of_what_is_made_again_are_those_of_the_tensors(ruled):
    text = "\n".join(explain(ruled))
    assert "spares" not in text
    made_again = account(ruled).recomputation
    if made_again.tensors > 1:
        assert (
            f"making {made_again.tensors} activations of {format_size(made_again.bytes)} together again costs" in text
        )


def test_an_optimum_is_said_to_be_one_as_far_as_it_is_proven():
    made = chain_of("a", "b", "c", "d").plan(1 << 40)
    assert explain(made)[1].startswith("proven optimal among plans of its kind; no schedule whatever at this budget")
    for ended, said in (
        ("gap", ", as near as was asked for"),
        ("stalled", ", where the search gained no more"),
        ("time limit", ", where the time limit ended the search"),
        ("interrupt", ", where the search was interrupted"),
        (None, ""),
    ):
        near = made.model_copy(update={"status": "feasible", "gap": 0.00093, "ended_by": ended})
        assert explain(near)[1].startswith(f"within 0.10% of the best plan of its kind{said}; no schedule whatever")
    # What is said to be within a gap is: it is rounded up.
    assert [percent_within(gap) for gap in (0.0, 1e-6, 1e-3, 1.0001e-3)] == ["0.00%", "0.01%", "0.10%", "0.11%"]


def test_names_do_not_reach_a_terminal_as_codes():
    planner = chain_of("\x1b[31mRED\x1b[2J", "x\ny\u202e", "c", "d")
    for made in (planner.plan(1 << 40), planner.plan(planner.smallest_plan().peak_bytes), planner.plan(1)):
        said = explain(made, explained(planner, made, left=9))
        assert "".join(said).isprintable()
        assert r"\x1b[31mRED" in "".join(said)
    cycle = [{"name": name, "seconds": 1, "output_bytes": 1, "inputs": [name]} for name in ("\x1b[2J", "b")]
    with pytest.raises(InputError, match=r"form a cycle: \\x1b\[2J → "):
        graph_of(cycle)
