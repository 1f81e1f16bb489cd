"""The simulator rejects every broken schedule by the name of the invariant, and states what a replay by hand gives."""

from __future__ import annotations

import pytest
from broken_plans import changed, listed, rejected
from changed_operators import with_operators
from synthetic import PAGE, ProgramBuilder, decoder_like, device, profile_of, small_chain

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.runtime.common.errors import InputError


@pytest.fixture(scope="module")
def streaming():
    """A plan that reads, spills, fetches and updates."""
    profile = decoder_like(1, tokens=64, hidden=96, ffn=192, slices=2, slice_rows=64)
    return ModelPlanner(profile).smallest_plan()


def first(instructions, verb, nth=0):
    return [index for index, entry in enumerate(instructions) if entry[0] == verb][nth]


def test_the_plan_itself_passes_and_its_figures_are_the_simulators(streaming):
    verbs = {entry[0] for entry in listed(streaming.train)}
    assert verbs == {"read", "unpack", "run", "free", "spill", "fetch", "update"}
    found = simulate(streaming)
    assert (found.peak_bytes, found.step_seconds) == (streaming.peak_bytes, streaming.step_seconds)
    assert found.train == streaming.train
    assert found.arena_bytes == streaming.arena_bytes
    assert found.live_bytes <= found.arena_bytes
    assert max(point.bytes for point in found.timeline) <= streaming.peak_bytes


def test_use_before_resident(streaming):
    def edit(instructions):
        index = first(instructions, "unpack")
        del instructions[index]

    error = rejected(changed(streaming, edit), "use-before-resident")
    assert error.phase == "train"
    assert error.tensor.endswith(".w") or error.tensor.startswith("head.w")


def test_read_before_unpack(streaming):
    error = rejected(changed(streaming, lambda i: i.pop(first(i, "read"))), "use-before-resident")
    assert error.tensor.startswith("packed:")


def test_a_tensor_made_twice(streaming):
    def edit(instructions):
        index = first(instructions, "unpack")
        instructions.insert(index, instructions[index])

    rejected(changed(streaming, edit), "already-resident")


@pytest.mark.parametrize("offset", [-64, 32, 1 << 40])
def test_offsets_outside_or_askew(streaming, offset):
    def edit(instructions):
        instructions[first(instructions, "unpack")][2] = offset

    rejected(changed(streaming, edit), "offset")


def test_packed_weights_lie_on_pages(streaming):
    def edit(instructions):
        index = first(instructions, "read")
        instructions[index][2] += 64

    rejected(changed(streaming, edit), "offset")


def test_overlap(streaming):
    def edit(instructions):
        read = next(i for i in instructions if i[0] == "read")
        unpack = next(i for i in instructions if i[:2] == ["unpack", read[1]])
        unpack[2] = read[2]

    error = rejected(changed(streaming, edit), "overlap")
    assert "packed:" in str(error)


def test_double_free(streaming):
    def edit(instructions):
        index = first(instructions, "free")
        instructions.insert(index, instructions[index])

    rejected(changed(streaming, edit), "double-free")


def test_leak(streaming):
    outcome = listed(streaming.train)[-1]
    error = rejected(changed(streaming, lambda i: i.pop()), "leak")
    assert error.tensor == outcome[1]
    assert error.instruction == len(streaming.train.instructions) - 1


def test_a_resident_tensor_that_is_gone_at_the_end(streaming):
    name = next(iter(streaming.resident))
    rejected(changed(streaming, lambda i: i.append(["free", name])), "leak")


def test_operator_order(streaming):
    def swap(instructions):
        a, b = first(instructions, "run", 0), first(instructions, "run", 1)
        instructions[a], instructions[b] = instructions[b], instructions[a]

    rejected(changed(streaming, swap), "operator-order")


def test_an_operator_that_never_runs(streaming):
    def edit(instructions):
        last = first(instructions, "run", -1)
        layer, operator = instructions[last][1:3]
        del instructions[last]
        gone = [v for v in _outputs(streaming, layer, operator) if v is not None]
        instructions[:] = [i for i in instructions if not (i[0] == "free" and i[1] in gone)]

    rejected(changed(streaming, edit), "operator-order")


def test_backward_operators_run_once(streaming):
    def edit(instructions):
        index = first(instructions, "run", -1)
        instructions.insert(index, instructions[index])

    rejected(changed(streaming, edit), "operator-order")


def test_random_operators_do_not_run_again(streaming):
    again = [
        (entry[1], entry[2])
        for index, entry in enumerate(listed(streaming.train))
        if entry[0] == "run" and [e[:3] for e in listed(streaming.train)[:index]].count(entry[:3])
    ]
    assert again, "the smallest plan recomputes something"
    layer, position = again[0]
    name = next(la.program for la in streaming.layers if la.name == layer)
    programs = [
        p
        if p.name != name
        else p.model_copy(
            update={
                "operators": [
                    o.model_copy(update={"recomputable": False}) if i == position else o
                    for i, o in enumerate(p.operators)
                ]
            }
        )
        for p in streaming.programs
    ]
    rejected(streaming.model_copy(update={"programs": programs}), "operator-order")


def test_every_trainable_is_updated_once(streaming):
    def twice(instructions):
        index = first(instructions, "update")
        instructions.insert(index, instructions[index])

    rejected(changed(streaming, twice), "update-once")
    rejected(changed(streaming, lambda i: i.pop(first(i, "update"))), "update-once")


def test_a_trainable_is_not_read_after_its_update():
    profile = small_chain(3, layers=2, on=device())
    made = plan(profile, 1 << 30)
    trainable = next(t.name for t in made.tensors if t.kind == "trainable")
    index = next(i for i, e in enumerate(listed(made.train)) if e == ["update", trainable])

    def edit(instructions):
        layer, operator = next(
            (e[1], e[2]) for e in instructions if e[0] == "run" and trainable in _inputs(made, e[1], e[2])
        )
        run = next(e for e in instructions if e[:3] == ["run", layer, operator])
        instructions.insert(index + 1, run)

    rejected(changed(made, edit), "update-once")


def _operator(plan, layer, operator):
    placed = next(la for la in plan.layers if la.name == layer)
    program = next(p for p in plan.programs if p.name == placed.program)
    return placed, program.operators[operator]


def _inputs(plan, layer, operator):
    placed, found = _operator(plan, layer, operator)
    return [placed.bindings.get(v, f"{layer}/{v}") for v in found.inputs]


def _outputs(plan, layer, operator):
    placed, found = _operator(plan, layer, operator)
    return [None if v is None else placed.bindings.get(v, f"{layer}/{v}") for v in found.outputs]


def test_updates_need_the_whole_gradient(streaming):
    def early(instructions):
        index = first(instructions, "update")
        update = instructions.pop(index)
        instructions.insert(0, update)

    rejected(changed(streaming, early), "use-before-resident")


def test_updated_state_is_not_thrown_away(streaming):
    def edit(instructions):
        index = next(i for i, e in enumerate(instructions) if e[0] == "spill" and e[1].startswith("adam_m:"))
        del instructions[index]

    assert rejected(changed(streaming, edit), "lost-state").tensor.startswith("adam_m:")


def test_transfers(streaming):
    def never_spilled(instructions):
        fetches = [e for e in instructions if e[0] == "fetch" and not e[1].startswith("adam_")]
        name = fetches[0][1]
        index = next(i for i, e in enumerate(instructions) if e == ["spill", name])
        del instructions[index]

    rejected(changed(streaming, never_spilled), "transfer")
    batch = next(t.name for t in streaming.tensors if t.kind == "batch")
    rejected(changed(streaming, lambda i: i.insert(0, ["read", batch, 0])), "transfer")


def test_budget(streaming):
    tight = streaming.model_copy(update={"budget_bytes": streaming.peak_bytes - 1})
    assert rejected(tight, "budget").tensor == "the arena"
    simulate(streaming.model_copy(update={"budget_bytes": streaming.peak_bytes}))


def test_claims(streaming):
    rejected(streaming.model_copy(update={"peak_bytes": streaming.peak_bytes - 1}), "claims")


@pytest.mark.parametrize("broken", [["run", "nowhere", 0, []], ["free", "no such tensor"]])
def test_form(streaming, broken):
    rejected(changed(streaming, lambda i: i.insert(0, broken)), "form")


def test_evaluation_is_judged_too(streaming):
    error = rejected(changed(streaming, lambda i: i.pop(first(i, "run")), "evaluate"), "operator-order")
    assert error.phase == "evaluate"
    name = next(t.name for t in streaming.tensors if t.kind == "trainable")
    rejected(changed(streaming, lambda i: i.insert(0, ["update", name]), "evaluate"), "update-once")


def test_an_infeasible_plan_has_no_schedule():
    profile = small_chain(1)
    with pytest.raises(InputError, match="infeasible and has no schedule"):
        simulate(plan(profile, PAGE))


def test_time_by_hand():
    """One weight of 0.01 s on the disk, unpacked in 1 ms, read while a 4 ms operator runs: 6 ms are waited."""
    made = ProgramBuilder("p")
    made.value("x", PAGE, "batch")
    made.value("w", 2 * PAGE, "weight")
    made.value("a", PAGE)
    made.value("loss", 4)
    made.run("first", ["x"], ["a"], 4e-3)
    made.run("second", ["a", "w"], ["loss"], 2e-3)
    from tightfit.profiles.schema import Layer, Tensor

    tensors = [
        Tensor(name="x", kind="batch", shape=[1], dtype="uint8", bytes=PAGE),
        Tensor(
            name="w", kind="weight", shape=[1], dtype="uint8", bytes=2 * PAGE, packed_bytes=PAGE, unpack_seconds=1e-3
        ),
    ]
    on = device(read=PAGE / 8e-3, latency=2e-3, per_byte=0.0, per_transfer=0.0)
    bindings = {"x": "x", "w": "w", "loss": "loss"}
    profile = profile_of([made.program()], [Layer(name="l", program="p", bindings=bindings)], tensors, "loss", on=on)
    # Room for everything but the packed and unpacked weight over the whole step: it is read at the start.
    made_plan = plan(profile, 1 << 20, policy="mebp")
    assert made_plan.train.read_bytes == PAGE
    assert made_plan.train.stall_seconds == pytest.approx(6e-3)
    assert made_plan.step_seconds == pytest.approx(10e-3 + 1e-3 + 2e-3)


def summed(profile):
    """The same with sums for a backward: each layer has a residual."""
    return with_operators(profile, lambda one: {"target": "aten.add.Tensor"} if one.phase == "backward" else {})


@pytest.fixture(scope="module")
def chain():
    """Layers of equal width with a trainable each."""
    seed = next(
        seed
        for seed in range(100)
        if all("t" in {v.name for v in p.values} for p in small_chain(seed, layers=4, equal=True).programs)
    )
    return ModelPlanner(summed(small_chain(seed, layers=4, equal=True)))


@pytest.fixture(scope="module")
def two_forwards(chain):
    return chain.plan(1 << 40, policy="mezo")


@pytest.fixture(scope="module")
def cyclic(chain):
    return chain.plan(1 << 40, policy="lcsb")


def test_two_forwards_as_they_should_be(two_forwards):
    verbs = [entry[0] for entry in listed(two_forwards.train)]
    trainables = sum(t.kind == "trainable" for t in two_forwards.tensors)
    assert verbs.count("perturb") == 2 * verbs.count("update") == 2 * trainables
    found = simulate(two_forwards)
    assert found.step_seconds > 2 * found.evaluate.seconds * (1 - 1e-9)


@pytest.mark.parametrize("verb", ["perturb", "update"])
def test_every_trainable_is_perturbed_and_taken_back(two_forwards, verb):
    dropped = changed(two_forwards, lambda i: i.pop(first(i, verb)))
    rejected(dropped, "perturbed" if verb == "perturb" else "update-once")
    twice = changed(two_forwards, lambda i: i.insert(first(i, verb), i[first(i, verb)]))
    rejected(twice, "perturbed" if verb == "perturb" else "update-once")


def test_a_perturbation_by_another_amount(two_forwards):
    def edit(instructions):
        instructions[first(instructions, "perturb")][2] = 2

    assert "at +2 epsilon, not at +1" in str(rejected(changed(two_forwards, edit), "perturbed"))


def test_an_update_before_the_second_loss(two_forwards):
    def edit(instructions):
        update = instructions.pop(first(instructions, "update"))
        last = max(index for index, entry in enumerate(instructions) if entry[0] == "run")
        instructions.insert(last, update)

    rejected(changed(two_forwards, edit), "perturbed")


def test_a_second_forward_that_leaves_an_operator_out(two_forwards):
    def edit(instructions):
        runs = [index for index, entry in enumerate(instructions) if entry[0] == "run"]
        del instructions[runs[-1]]

    rejected(changed(two_forwards, edit), "double-free")


def test_backpropagation_perturbs_nothing(streaming):
    trainable = next(t.name for t in streaming.tensors if t.kind == "trainable")
    rejected(changed(streaming, lambda i: i.insert(0, ["perturb", trainable, 1])), "perturbed")
    rejected(changed(streaming, lambda i: i.insert(0, ["pass", "a", "b"])), "passed-once")


def passing(cyclic):
    """The step of the cycle that passes a gradient through some layer, made the only one."""
    return next(step for step in cyclic.steps if any(entry[0] == "pass" for entry in listed(step)))


def test_a_cycle_as_it_should_be(cyclic):
    found = simulate(cyclic)
    assert (found.train, found.cycle) == (cyclic.train, cyclic.cycle)
    assert found.step_seconds == pytest.approx(sum(s.seconds for s in cyclic.steps) / len(cyclic.steps))
    updated = [entry[1] for step in cyclic.steps for entry in listed(step) if entry[0] == "update"]
    last = len(cyclic.layers) - 1
    assert sorted(set(updated)) == [f"l{index}.t" for index in range(len(cyclic.layers))]
    assert updated.count(f"l{last}.t") == len(cyclic.steps)  # the loss is in its layer, no gradient comes from above
    assert passing(cyclic)


@pytest.mark.parametrize(
    ("edit", "invariant"),
    [
        (lambda i: i.pop(first(i, "pass")), "use-before-resident"),
        (lambda i: i.insert(first(i, "pass"), i[first(i, "pass")]), "passed-once"),
        (lambda i: i[first(i, "pass")].__setitem__(2, "g0"), "passed-once"),
        (lambda i: i.pop(first(i, "update")), "update-once"),
    ],
)
def test_a_gradient_is_passed_on_once(cyclic, edit, invariant):
    step = passing(cyclic)
    position = cyclic.steps.index(step)
    broken = changed(cyclic.model_copy(update={"train": step}), edit).train
    steps = [broken if index == position else other for index, other in enumerate(cyclic.steps)]
    rejected(cyclic.model_copy(update={"train": steps[0], "cycle": steps[1:]}), invariant)


def test_a_cycle_that_never_trains_a_layer(cyclic):
    some = next(name for step in cyclic.steps[:1] for name in ("l0.t",) if step)
    without = [s for s in cyclic.steps if ["update", some] not in listed(s)]
    error = rejected(cyclic.model_copy(update={"train": without[0], "cycle": without[1:]}), "update-once")
    assert error.tensor == some


def test_lcsb_needs_a_residual_to_pass_gradients_through():
    seed = next(
        seed
        for seed in range(100)
        if all("t" in {v.name for v in p.values} for p in small_chain(seed, layers=3).programs)
        and len({v.bytes for p in small_chain(seed, layers=3).programs for v in p.values if v.name == "gy"}) > 1
    )
    with pytest.raises(InputError, match="and layer l1 has none: what comes from above is not one gradient"):
        plan(summed(small_chain(seed, layers=3)), 1 << 40, policy="lcsb")
    with pytest.raises(InputError, match="and layer l1 has none: no sum takes the gradient"):
        plan(small_chain(4, layers=3, equal=True), 1 << 40, policy="lcsb")
    with pytest.raises(InputError, match="has 0 that take a gradient from above; choose another policy"):
        plan(small_chain(1, layers=2, trainables=False), 1 << 40, policy="lcsb")
