"""The job of a plan with shorter steps, and its executor: at each length they are those of the plan of that length alone."""

from __future__ import annotations

import pytest
import torch
from in_process import make_training, train
from tiny_plans import decoder_profile, naive_plan

from tightfit.profiles.schema import Preference, shortened
from tightfit.runtime.engine.training.job import Job
from tightfit.runtime.engine.training.records import IGNORED, RecordWriter
from tightfit.runtime.session.job_compiler import compile_job

LENGTHS, BUCKETS, SEQ, BATCH = [8, 16], "8,16", 24, 2


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return decoder_profile(tmp_path_factory.mktemp("store"), seq=SEQ, batch=BATCH, dtype="float32", buckets=BUCKETS)


def moving(profile):
    """A plan that spills an activation and the optimizer's states, and computes activations again."""
    spilled = [t.name for t in profile.tensors if t.kind == "activation" and t.name.endswith("/out0")]
    trained = [t.name for t in profile.tensors if t.kind == "trainable"]
    return naive_plan(
        profile, spill=[name for name in spilled if "layers" in name][:1], offload=trained[::2], recompute=True
    )


@pytest.fixture(scope="module")
def plan(profile):
    return moving(profile)


def test_what_depends_on_the_length_is_what_a_job_of_that_length_has(plan):
    job = compile_job(plan, {"seed": 5})
    assert [step["seq"] for step in job.header["shorter"]] == LENGTHS
    assert len(job.shorter_sizes) == len(LENGTHS) * len(job.sizes)
    assert job.header["spill_bytes"] > 0
    for number, (told, step) in enumerate(zip(job.header["shorter"], plan.shorter, strict=True)):
        alone = compile_job(shortened(plan, step), {"seed": 5})
        for name in ("programs", "inputs", "token_losses"):
            assert told[name] == alone.header[name]
        assert told["expected_seconds"] == step.step_seconds
        assert job.sizes_of(number) == alone.sizes
        assert all(own <= whole for own, whole in zip(job.sizes_of(number), job.sizes, strict=True))
        assert sum(own < whole for own, whole in zip(job.sizes_of(number), job.sizes, strict=True)) >= 4
        assert (job.train, job.evaluate, job.where, job.tables) == (
            alone.train,
            alone.evaluate,
            alone.where,
            alone.tables,
        )


def test_inputs_and_token_losses_of_each_length(plan):
    header = compile_job(plan, {}).header
    places = {name: at for name, _, _, at in header["inputs"]}
    for told, length in zip([*header["shorter"], header], [*LENGTHS, SEQ], strict=True):
        assert told["inputs"] == [
            [name, "int64", [BATCH, length], places[name]] for name in ("input_ids", "labels", "positions")
        ]
        number, shape = told["token_losses"]
        assert number == header["token_losses"][0]
        assert shape == [BATCH * length]


@pytest.mark.slow_but_for("dpo")
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_inputs_of_pairs_have_two_rows_of_each_length(tmp_path, loss):
    made = decoder_profile(tmp_path, seq=SEQ, batch=BATCH, buckets=BUCKETS, preference=Preference(loss=loss, beta=0.1))
    header = compile_job(naive_plan(made), {}).header
    for told, length in zip([*header["shorter"], header], [*LENGTHS, SEQ], strict=True):
        shapes = {name: shape for name, _, shape, _ in told["inputs"]}
        assert shapes["input_ids"] == shapes["labels"] == [2 * BATCH, length]
        assert [shape for name, shape in shapes.items() if name not in ("input_ids", "labels")] == [[2 * BATCH]]


def test_a_job_with_shorter_steps_survives_the_disk(plan, tmp_path):
    job = compile_job(plan, {"seed": 5})
    job.write(str(tmp_path / "job"))
    again = Job.read(str(tmp_path / "job"))
    assert again.header["shorter"] == job.header["shorter"]
    assert again.shorter_sizes == job.shorter_sizes
    for number in range(len(LENGTHS)):
        assert again.sizes_of(number) == job.sizes_of(number)
    assert (again.sizes, again.train, again.evaluate) == (job.sizes, job.train, job.evaluate)
    alone = compile_job(plan.model_copy(update={"shorter": []}), {"seed": 5})
    assert alone.header["shorter"] == []
    assert not alone.shorter_sizes


# --- the executor -----------------------------------------------------------------------------------------------------


def records(folder, lengths):
    """Samples of random tokens of these lengths."""
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(exist_ok=True)
    path = folder / "x.records"
    with RecordWriter(path, seq=SEQ, pad_token=0, vocab_size=512, source="") as writer:
        for number, length in enumerate(lengths):
            tokens = torch.randint(1, 512, (length + 1,), generator=generator).tolist()
            writer.add(tokens[:-1], [IGNORED, *tokens[2:]], example=number)
    return str(path)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_short_batch_trains_as_in_the_whole_step(plan, tmp_path, length):
    """Of two samples, which all steps see."""
    path = records(tmp_path / "data", [length - 3, length])
    alone = plan.model_copy(update={"shorter": []})
    (losses, *_), (whole, *_) = (
        train(made, path, tmp_path / str(at), 4, lr=1e-2) for at, made in enumerate((plan, alone))
    )
    assert losses == pytest.approx(whole, rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_a_step_of_a_length_gives_the_bits_of_a_plan_of_that_length(tmp_path, number):
    """Of one sample, which all steps see."""
    profile = decoder_profile(tmp_path / "store", seq=SEQ, batch=1, buckets=BUCKETS)
    plan = moving(profile)
    path = records(tmp_path / "data", [LENGTHS[number] - 1])
    alone = shortened(plan, plan.shorter[number])
    first, second = (train(made, path, tmp_path / str(at), 3, lr=1e-2) for at, made in enumerate((plan, alone)))
    assert first == second


SPREAD = [3, 8, 9, 16, 17, 24, 5, 7, 12, 2, 20]
"""lengths of samples"""


def test_each_batch_takes_the_shortest_step_with_room(plan, tmp_path):
    training = make_training(plan, records(tmp_path / "data", SPREAD), tmp_path, lr=1e-2)
    training.initialise()
    seconds = {SEQ: plan.step_seconds} | {step.seq: step.step_seconds for step in plan.shorter}
    taken = set()
    for step in range(1, 13):
        assert training.step(step) > 0
        longest = int((training.inputs[0] > 0).sum(1).max())
        length = next(one for one in [*LENGTHS, SEQ] if one >= longest)
        assert [list(one.shape) for one in training.inputs] == [[BATCH, length]] * 3
        assert training.lengths.figures == {"places": BATCH * length, "expected": seconds[length]}
        taken.add(length)
    assert taken == {*LENGTHS, SEQ}
    training.close()


def test_a_plan_of_one_length_tells_none(plan, tmp_path):
    alone = plan.model_copy(update={"shorter": []})
    training = make_training(alone, records(tmp_path / "data", SPREAD), tmp_path, lr=1e-2)
    training.initialise()
    training.step(1)
    assert training.lengths.figures == {}
    training.close()


def test_an_evaluation_over_all_lengths_is_that_of_the_whole_step(plan, tmp_path):
    path = records(tmp_path / "data", SPREAD)
    found, batches = [], []
    for at, made in enumerate((plan, plan.model_copy(update={"shorter": []}))):
        (tmp_path / str(at)).mkdir()
        training = make_training(made, path, tmp_path / str(at), lr=1e-2)
        training.initialise()
        lengths = []
        found.append(training.evaluate(path, lambda done, count: lengths.append(training.inputs[0].shape[1])))  # noqa: B023
        batches.append(lengths)
        training.close()
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["records"] == found[1]["records"] == len(SPREAD)
    assert batches == [[24, 24, 16, 8, 8, 8], [SEQ] * 6]  # the longest first
