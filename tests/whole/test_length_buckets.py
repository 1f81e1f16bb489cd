"""Whole runs of plans that have shorter steps for batches of short samples: against transformers + peft under autograd on the same
batches; the same bits by every schedule and after an interruption; what evaluations and the report say; with everything else that
a run can be asked for; `tightfit train --buckets auto`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_operators import with_operators
from decoder_families import FAMILIES
from fleets import adapter_hash
from in_process import make_training
from killed_runs import kill_run
from reference import (
    CONFIGS,
    adapted_by_peft,
    all_layers,
    errors_above,
    evaluated_apart,
    gradients_of,
    held_by_peft,
    loss_of,
    mean_loss,
    peft_model,
    starting_weights,
    trained_by_adamw,
    trained_by_peft,
    training_batches,
)
from safetensors.torch import load_file
from tiny_models import byte_level_tokenizer, random_weights, write_directory
from tiny_plans import decoder_profile, naive_plan
from torch import Tensor
from trl_losses import base_of, pairs_of_steps, rows_of, theirs_of

import tightfit as package
from tightfit.planner.fleet.plan import MemberSpec
from tightfit.planner.fleet.schema import Link
from tightfit.planner.io import save_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.problem.clipping import clipped
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.profiles.io import save_profile
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.schema import Preference, Profile, adamw, without_shorter
from tightfit.profiles.sources.lookup import vocabulary
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.tokenization import prepare
from tightfit.runtime.engine.training.adapter import adapter_key
from tightfit.runtime.engine.training.records import RecordFile, RecordWriter
from tightfit.runtime.results.evaluation import evaluate
from tightfit.runtime.session.launch import run
from tightfit.runtime.session.session import Session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("cache"),
    # peft, of tied models that come apart, and of GPT-2
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
BATCH, SEQ, RANK, LR = 3, 40, 4, 5e-3
BUCKETS = "8,20"
LENGTHS = (8, 20, SEQ)
STEPS = 16
"""two epochs of the data below"""
UNLIMITED = 1 << 40
CONFIG = CONFIGS["llama"] | {"num_hidden_layers": 2}
WORDS = ("positive", "negative", "they've 12", "the moon", "no")
WEIGHTS = "adapter_model.safetensors"


def samples() -> Iterator[dict[str, Any]]:
    """22 of them, of 5 to 35 positions: most short, so that batches of all three lengths come up."""
    for prompt, word in itertools.product(("over ", "no "), WORDS[:2] + WORDS[4:]):
        yield {"prompt": prompt, "completion": word}
        yield {"prompt": "ps " + prompt, "completion": word}
    for word in WORDS:
        yield {"prompt": "fox quick? ", "completion": word}
    for word in WORDS[:4]:
        yield {"prompt": "Is the fox quick? lazy dog? over ", "completion": f"I'd say; {word}"}
    yield {"prompt": "lazy dog? ", "completion": "negative, it is not"}


def held_out() -> Iterator[dict[str, Any]]:
    """Questions of two to five choices and of all lengths, and other samples between them."""
    for number in range(9):
        prompt = f"{'lazy dog? ' * (number % 4)}fox {number}? "
        yield {"prompt": prompt, "choices": WORDS[: 2 + number % 4], "answer": number % 2}
        if number % 2:
            yield {"prompt": "over ", "completion": WORDS[number % 5] * (number % 4)}


def written(rows: Iterator[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def called(*words: object, cwd: Path | None = None, code: int = 0) -> tuple[str, str]:
    """What the command line prints, and what it says beside that."""
    found = subprocess.run(
        interpreter.command("tightfit.runtime.cli.main", *map(str, words)),
        env=os.environ | {"PYTHONPATH": interpreter.python_path()},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code, found.stderr
    return found.stdout, found.stderr


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The lines of the metrics that are of steps."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def lengths_of(out: Path, rows: int = BATCH) -> list[int]:
    """Of each step, the positions of its rows, as the metrics tell them."""
    return [line["places"] // rows for line in steps_of(out)]


def smallest(made: Profile, policy: str | None = None) -> Plan:
    """The schedule of the smallest budget, as if imports needed no more than what stays resident: for a model this small they
    alone decide otherwise. It states the budget that they need.
    """
    floor = made.device.floor.model_copy(update={"import_peak_bytes": 0})
    planner = ModelPlanner(made.model_copy(update={"device": made.device.model_copy(update={"floor": floor})}))
    found = planner.plan(planner.minimum(policy=policy).peak_bytes, policy=policy)
    start = made.device.floor.start_peak_bytes
    assert found.peak_bytes < start
    return found.model_copy(update={"device": made.device, "budget_bytes": start, "peak_bytes": start})


# --- runs of a measured profile ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("buckets")
    return write_directory(made, CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return written(samples(), folder / "train.jsonl")


@pytest.fixture(scope="module")
def questions(folder: Path) -> Path:
    return written(held_out(), folder / "held-out.jsonl")


@pytest.fixture(scope="module")
def made(folder: Path, cache: Path) -> Profile:
    options: dict[str, Any] = {"lora_rank": RANK, "lora_alpha": 8.0, "dtype": "float32"}
    return profile(str(folder), batch=BATCH, seq=SEQ, buckets=BUCKETS, **options)


@pytest.fixture(scope="module")
def planner(made: Profile) -> ModelPlanner:
    return ModelPlanner(made)


@pytest.fixture(scope="module")
def tight(made: Profile) -> Plan:
    return smallest(made)


@pytest.fixture(scope="module")
def roomy(planner: ModelPlanner) -> Plan:
    return planner.plan(UNLIMITED)


@dataclass(frozen=True)
class Trained:
    """What a run has left."""

    out: Path
    report: dict[str, Any]

    @property
    def bits(self) -> tuple[Any, ...]:
        """The losses, the adapter and the optimizer's states."""
        folder = self.out / f"checkpoint-{len(self.report['loss'])}"
        return self.report["loss"], *((folder / name).read_bytes() for name in (WEIGHTS, "optimizer.safetensors"))


def trained_by(planned: Plan, data: Path | str, out: Path, **options: Any) -> Trained:
    return Trained(out, run(planned, data, out=out, **({"steps": STEPS, "lr": LR} | options)))


@pytest.fixture(scope="module")
def trained(tight: Plan, data: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """At the smallest budget, with evaluations."""
    return trained_by(tight, data, tmp_path_factory.mktemp("trained"), eval_data=questions)


def longest_row(labels: Tensor) -> int:
    """The last place of a sample has a label."""
    return int((labels >= 0).nonzero()[:, 1].max()) + 1


def test_each_batch_takes_the_shortest_step_with_room_for_it(trained: Trained) -> None:
    batches = training_batches(trained.out, STEPS, BATCH, SEQ, by_length=True)
    room = [next(length for length in LENGTHS if length >= longest_row(labels)) for _, labels in batches]
    assert lengths_of(trained.out) == room
    assert set(room) == set(LENGTHS)
    # Each sample comes once in an epoch, and nothing else does.
    with RecordFile.open(trained.out / "data" / "train.records") as records:
        every = sorted(records.read(number).input_ids.tolist() for number in range(len(records)))
    for epoch in (batches[: STEPS // 2], batches[STEPS // 2 :]):
        rows = [(ids, own) for batch in epoch for ids, own in zip(*batch) if bool((own >= 0).any())]
        assert sorted(ids[: longest_row(own[None])].tolist() for ids, own in rows) == every


def by_peft(made: Profile, out: Path, limit: float | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the adapter of transformers + peft, trained by autograd and torch.optim.AdamW on the run's batches, all padded
    to the whole length. The loss of an update is the mean over all labelled tokens of its steps.
    """
    model = peft_model(CONFIG, starting_weights(made), all_layers(RANK, 8.0), torch.float32)
    trained = trained_by_peft(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0)
    batches = training_batches(out, STEPS, BATCH, SEQ, by_length=True)
    losses = []
    for step in range(0, STEPS, made.accumulate):
        together = batches[step : step + made.accumulate]
        labelled = [int((labels >= 0).sum()) for _, labels in together]
        for (ids, labels), count in zip(together, labelled):
            loss = loss_of(model, ids, labels)
            (loss * (count / sum(labelled))).backward()
            losses.append(float(loss.detach()))
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), limit)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {f"base_model.model.{name}": value.detach() for name, value in trained.items()}


def test_losses_and_the_adapter_are_those_of_peft(made: Profile, trained: Trained) -> None:
    losses, theirs = by_peft(made, trained.out)
    assert trained.report["loss"] == pytest.approx(losses, rel=2e-5)
    assert errors_above(1e-2, load_file(trained.out / "adapter" / WEIGHTS), theirs) == {}


@pytest.mark.slow_but_for("mebp")
@pytest.mark.parametrize("policy", [None, "mebp", "keep-all"])
def test_another_schedule_gives_the_same_bits(
    policy: str | None,
    planner: ModelPlanner,
    tight: Plan,
    data: Path,
    questions: Path,
    trained: Trained,
    tmp_path: Path,
) -> None:
    other = planner.plan(UNLIMITED, policy=policy)
    assert other.train != tight.train
    again = trained_by(other, data, tmp_path, eval_data=questions)
    assert again.bits == trained.bits
    for when in ("before", "after"):
        assert again.report["evaluation"][when]["loss"] == trained.report["evaluation"][when]["loss"]


def test_a_run_that_stops_in_an_epoch_goes_on_with_the_same_bits(
    roomy: Plan, tight: Plan, data: Path, trained: Trained, tmp_path: Path
) -> None:
    for planned, steps in ((roomy, 3), (tight, 9)):
        trained_by(planned, data, tmp_path, steps=steps, resume=steps > 3)
    again = trained_by(roomy, data, tmp_path, resume=True)
    assert again.report["resumed_step"] == 9
    assert again.bits == trained.bits


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(
    planner: ModelPlanner, roomy: Plan, data: Path, tmp_path: Path
) -> None:
    mebp = planner.plan(UNLIMITED, policy="mebp")
    save_plan(mebp, tmp_path / "plan.json")
    part = tmp_path / "part"
    reached = kill_run(tmp_path / "plan.json", data, part, after=6, lr=LR, checkpoint_every=3)
    steps = reached + 9
    again = trained_by(roomy, data, part, steps=steps, resume=True)
    assert again.report["resumed_step"] == reached
    assert again.bits == trained_by(mebp, data, tmp_path / "whole", steps=steps).bits


def test_a_run_does_not_go_on_with_other_lengths(roomy: Plan, made: Profile, data: Path, tmp_path: Path) -> None:
    """Which samples share a batch depends on whether there are shorter steps, and what rounding does on their lengths."""
    trained_by(roomy, data, tmp_path, steps=2)
    for lengths, told in (([], "no shorter steps"), ([20], "shorter steps of 20 tokens")):
        shorter = [step for step in made.shorter if step.seq in lengths]
        other = plan(made.model_copy(update={"shorter": shorter}), UNLIMITED)
        with pytest.raises(InputError, match=f"with shorter steps of 8 and 20 tokens, this run has {told}; resume"):
            trained_by(other, data, tmp_path, steps=4, resume=True)


@pytest.mark.slow_but_for("meter")
def test_the_cap_holds_and_the_peak_is_as_predicted(
    cgroup: bool, tight: Plan, data: Path, questions: Path, tmp_path: Path
) -> None:
    report = trained_by(tight, data, tmp_path, eval_data=questions, cgroup=cgroup).report
    assert set(lengths_of(tmp_path)) == set(LENGTHS)
    assert report["enforced_by"] == ("cgroup" if cgroup else "meter")
    assert report["peak_bytes"]["measured"] <= report["peak_bytes"]["predicted"] <= tight.budget_bytes


@pytest.mark.slow
def test_a_larger_model_keeps_within_its_smallest_budget(tmp_path: Path) -> None:
    """One whose activations matter beside the process itself; to the bit as with all the memory that it can use."""
    config = tmp_path / "config.json"
    sizes = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 4096, "num_hidden_layers": 4}
    config.write_text(json.dumps(CONFIG | sizes))
    rows, seq, lengths = 24, 64, [16, 32, 64]
    large = profile(str(config), batch=rows, seq=seq, buckets="16,32")
    planner = ModelPlanner(large)
    records = short_records(tmp_path, sizes, [5 + number % 60 for number in range(32 * rows)], seq)
    plans = {"tight": planner.plan(planner.minimum().peak_bytes), "roomy": planner.plan(UNLIMITED)}
    assert plans["roomy"].peak_bytes > plans["tight"].peak_bytes + (8 << 20)
    runs = []
    for name, planned in plans.items():
        runs.append(trained_by(planned, records, tmp_path / name, steps=8, eval_data=records))
        report = runs[-1].report
        assert report["peak_bytes"]["predicted"] <= planned.budget_bytes
        for told in (report, report["phases"]["train"]):
            assert told["peak_bytes"]["measured"] <= told["peak_bytes"]["predicted"]
        assert set(lengths_of(tmp_path / name, rows)) == set(lengths)
    assert runs[0].bits == runs[1].bits


# --- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluations_are_those_without_shorter_steps_and_of_transformers(
    made: Profile, roomy: Plan, data: Path, questions: Path, trained: Trained, tmp_path: Path
) -> None:
    exact = ("records", "questions", "accuracy")
    after = trained.report["evaluation"]["after"]
    alone = evaluate(roomy, questions, adapter=trained.out)
    assert {name: alone[name] for name in ("loss", *exact)} == {name: after[name] for name in ("loss", *exact)}
    whole = evaluate(plan(without_shorter(made), UNLIMITED), questions, adapter=trained.out)
    assert {name: whole[name] for name in exact} == {name: after[name] for name in exact}
    assert whole["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert 0 < after["accuracy"] < 1
    save_plan(roomy, tmp_path / "plan.json")
    words = ("eval", tmp_path / "plan.json", "--data", questions, "--adapter", trained.out, "--json")
    told = json.loads(called(*words)[0])
    assert {name: told[name] for name in ("loss", *exact)} == {name: after[name] for name in ("loss", *exact)}
    adapted = adapted_by_peft(base_of(made), trained.out / "adapter")
    loss, accuracy, count = evaluated_apart(adapted, next((trained.out / "data").glob("eval*.records")))
    assert after["loss"] == pytest.approx(loss, rel=1e-5)
    assert (after["accuracy"], after["questions"]) == (accuracy, count)


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_tells_what_the_lengths_saved(made: Profile, roomy: Plan, tmp_path: Path) -> None:
    """More samples: only those of a fourth of an epoch are sorted together."""
    many = written(itertools.chain.from_iterable(samples() for _ in range(4)), tmp_path / "many.jsonl")
    options: dict[str, Any] = {"steps": None, "epochs": 1}
    report = trained_by(roomy, many, tmp_path / "short", **options).report
    whole = trained_by(plan(without_shorter(made), UNLIMITED), many, tmp_path / "whole", **options).report
    lines = steps_of(tmp_path / "short")
    assert report["tokens"]["padding_share"] == pytest.approx(
        1 - sum(line["tokens"] for line in lines) / sum(line["places"] for line in lines)
    )
    assert report["tokens"]["padding_share"] < 0.4
    assert whole["tokens"]["padding_share"] > 0.6
    seconds = {BATCH * step.seq: step.step_seconds for step in roomy.shorter} | {BATCH * SEQ: roomy.step_seconds}
    assert [line["expected"] for line in lines] == [seconds[line["places"]] for line in lines]
    assert len(set(seconds.values())) == len(LENGTHS)
    # The first step is left out of both.
    mean = sum(line["expected"] for line in lines[1:]) / (len(lines) - 1)
    assert report["step_seconds"]["predicted"] == pytest.approx(mean)
    assert min(line["seconds"] for line in lines) < report["step_seconds"]["measured"]
    assert report["step_seconds"]["measured"] < max(line["seconds"] for line in lines)
    assert not {"places", "expected"} & steps_of(tmp_path / "whole")[0].keys()


# --- a batch by itself ------------------------------------------------------------------------------------------------


def short_records(folder: Path, config: dict[str, Any], lengths: Sequence[int], seq: int) -> str:
    """Prepared samples of these lengths: random tokens, the first two of which have no label."""
    generator = torch.Generator().manual_seed(3)
    path = folder / "short.records"
    with RecordWriter(path, seq=seq, pad_token=0, vocab_size=config["vocab_size"], source="test") as writer:
        for example, length in enumerate(lengths):
            tokens = torch.randint(3, config["vocab_size"], (length + 1,), generator=generator).tolist()
            writer.add(tokens[:-1], [-100, -100, *tokens[3:]], example=example)
    return str(path)


def one_step(made: Profile, records: str, folder: Path) -> tuple[int, float, dict[str, Tensor], list[Tensor]]:
    """The positions of the rows of a step, its loss, its gradients and its batch. The adapter, which is no new one, is in `folder`."""
    folder.mkdir()
    training = make_training(naive_plan(made), records, folder, lr=0.0)
    training.initialise()
    generator = torch.Generator().manual_seed(0)
    for one in training.trainables:  # no B is zero
        training.device.tensor(one.value.at, one.shape, "float32").copy_(
            torch.randn(one.shape, generator=generator) / 10
        )
    loss = training.step(1)
    inputs = [tensor.clone() for tensor in training.inputs]
    body = made.model.config.get("adapter_body", "model.")
    names = [one.name for one in training.trainables]
    training.save_state(str(folder))
    training.close()
    # The weights stay as they are, and Adam's first moment tells the gradient.
    states = load_file(folder / "optimizer.safetensors")
    gradients = {adapter_key(name, body): states[f"adam_m:{name}"] / 0.1 for name in names}
    return inputs[0].shape[1], loss, gradients, inputs


@pytest.mark.slow_but_for("Gemma 3 (text)-24")
@pytest.mark.parametrize(
    ("family", "seq"),
    [
        ("Gemma 3 (text)", 24),  # windows of 5, and none
        ("Phi-4-mini", 60),  # other angles beyond 32 positions
        ("GPT-2", 24),  # learned positions
        ("Qwen3.5 (text)", 24),  # a linear recurrence
    ],
)
def test_a_batch_has_the_same_gradients_at_its_short_length_as_padded(family: str, seq: int, tmp_path: Path) -> None:
    config, length = FAMILIES[family], 9
    made = decoder_profile(
        tmp_path, config=config, batch=BATCH, seq=seq, dtype="float32", buckets=str(length), lora=LoraConfig(rank=RANK)
    )
    records = short_records(tmp_path, config, (length, 5, 3), seq)
    rows, loss, own, batch = one_step(made, records, tmp_path / "short")
    whole_rows, whole_loss, whole, padded = one_step(without_shorter(made), records, tmp_path / "whole")
    assert (rows, whole_rows) == (length, seq)
    assert sorted(batch[0].tolist()) == sorted(padded[0][:, :length].tolist())
    assert loss == pytest.approx(whole_loss, rel=2e-6)
    assert errors_above(2e-5, own, whole) == {}
    model = adapted_by_peft(base_of(made), tmp_path / "whole")
    theirs = mean_loss(model(input_ids=padded[0]).logits, padded[1])
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), rel=3e-6)
    assert errors_above(2e-4, own, gradients_of(model)) == {}
    if seq > 24:  # transformers has the other angles, where it is not told the whole length
        with torch.no_grad():
            assert loss != pytest.approx(float(mean_loss(model(input_ids=batch[0]).logits, batch[1])), rel=1e-5)


# --- with everything else ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 0.5])
def test_updates_of_several_steps_are_those_of_peft(
    limit: float | None, made: Profile, data: Path, tmp_path: Path
) -> None:
    """The steps of an update have other lengths; with a limit, its gradients are clipped."""
    other = made.model_copy(update={"optimizer": adamw(2)})
    clipping = other if limit is None else clipped(other, limit)
    runs = [
        trained_by(planned, data, tmp_path / name)
        for name, planned in (("tight", smallest(clipping)), ("roomy", plan(clipping, UNLIMITED)))
    ]
    assert runs[0].bits == runs[1].bits
    if limit is not None:
        norms = runs[0].report["grad_norm"]
        assert min(norms) < limit < max(norms)
    losses, theirs = by_peft(other, tmp_path / "tight", limit)
    assert runs[0].report["loss"] == pytest.approx(losses, rel=5e-5)
    assert errors_above(1e-2, load_file(tmp_path / "tight" / "adapter" / WEIGHTS), theirs) == {}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mezo", "lcsb"])
def test_rules_of_another_gradient_give_the_same_bits_at_two_budgets(
    policy: str, made: Profile, planner: ModelPlanner, data: Path, tmp_path: Path
) -> None:
    runs = [
        trained_by(planned, data, tmp_path / name)
        for name, planned in (
            ("tight", smallest(made, policy)),
            ("roomy", planner.plan(UNLIMITED, policy=policy)),
        )
    ]
    assert runs[0].bits == runs[1].bits
    assert set(lengths_of(tmp_path / "tight")) == set(LENGTHS)
    assert runs[0].report["peak_bytes"]["measured"] <= runs[0].report["peak_bytes"]["predicted"]
    moved = load_file(tmp_path / "tight" / "adapter" / WEIGHTS)
    assert all(value.any() for name, value in moved.items() if "lora_B" in name)


@pytest.mark.slow
def test_dropout_draws_the_same_numbers_at_two_budgets(folder: Path, data: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=RANK, alpha=8.0, dropout=0.3)
    dropping = decoder_profile(
        tmp_path, config=CONFIG, batch=BATCH, seq=SEQ, dtype="float32", lora=lora, buckets=BUCKETS
    )
    words = vocabulary(str(folder))
    prepared = prepare(str(data), words, tmp_path / "ahead", seq=SEQ, vocab_size=CONFIG["vocab_size"])
    prepared.close()
    planner = ModelPlanner(dropping)
    runs = [
        trained_by(planned, prepared.path, tmp_path / name, cgroup=False)
        for name, planned in (("mebp", planner.plan(400 << 20, policy="mebp")), ("solver", planner.plan(UNLIMITED)))
    ]
    assert runs[0].bits == runs[1].bits
    assert set(lengths_of(tmp_path / "mebp")) == set(LENGTHS)
    # What is dropped matters, from the second step on, when the pairs no longer add zero.
    none = decoder_profile(
        tmp_path / "none",
        config=CONFIG,
        batch=BATCH,
        seq=SEQ,
        dtype="float32",
        lora=replace(lora, dropout=0.0),
        buckets=BUCKETS,
    )
    losses = trained_by(plan(none, UNLIMITED), prepared.path, tmp_path / "all", cgroup=False, steps=4).report["loss"]
    assert losses[0] == runs[0].report["loss"][0]
    assert losses[3] != pytest.approx(runs[0].report["loss"][3], rel=1e-4)


@pytest.mark.slow
def test_samples_that_share_rows_leave_a_short_batch_for_the_end(tight: Plan, roomy: Plan, tmp_path: Path) -> None:
    """Two of them share a row, two fill one, and the short one has the last row of an epoch to itself, if it comes last."""
    records = short_records(tmp_path, CONFIG, [20, 20, SEQ, SEQ, 6], SEQ)
    options: dict[str, Any] = {"packing": True, "epochs": 6, "steps": None, "eval_data": records}
    runs = [
        trained_by(planned, records, tmp_path / name, **options)
        for name, planned in (("tight", tight), ("roomy", roomy))
    ]
    assert runs[0].bits == runs[1].bits
    lines = steps_of(tmp_path / "tight")
    assert {line["tokens"]: line["places"] // BATCH for line in lines if line["samples"] == 1}[6] == 8
    assert max(line["samples"] for line in lines) > BATCH
    assert runs[0].report["packing"] == {"on": True, "refused": None}
    for when in ("before", "after"):
        assert runs[0].report["evaluation"][when]["loss"] == runs[1].report["evaluation"][when]["loss"]


@pytest.mark.slow
def test_an_epoch_takes_each_sample_once(made: Profile, tight: Plan, roomy: Plan, data: Path, tmp_path: Path) -> None:
    """Of 22 samples, three a batch, the last one has one sample."""
    runs = [
        trained_by(planned, data, tmp_path / name, steps=None, epochs=1)
        for name, planned in (("tight", tight), ("roomy", roomy))
    ]
    assert runs[0].bits == runs[1].bits
    counts = [line["samples"] for line in steps_of(tmp_path / "tight")]
    assert counts == [BATCH] * 7 + [1]
    with RecordFile.open(tmp_path / "tight" / "data" / "train.records") as records:
        every = sum(records.length(number) for number in range(len(records)))
    assert sum(line["tokens"] for line in steps_of(tmp_path / "tight")) == every


# --- pairs of answers -------------------------------------------------------------------------------------------------

BETA, PAIRS = 0.3, 2
ANSWERS = [
    {"prompt": "over ", "chosen": "no", "rejected": "ps"},
    {"prompt": "Is the fox quick? lazy dog? ", "chosen": "positive", "rejected": "I'd say; she'll"},
    {"prompt": "no ", "chosen": "12", "rejected": "positive"},
    {"prompt": "lazy dog? ", "chosen": "negative, it is", "rejected": "pos"},
    {"prompt": "ps ", "chosen": "negative", "rejected": "no"},
    {"prompt": "over ", "chosen": "no", "rejected": "12"},
    {"prompt": "user said: they've 12 ", "chosen": "we're 345", "rejected": "I'd say; she'll"},
]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_steps_on_pairs_are_those_of_trl(loss: str, folder: Path, tmp_path: Path) -> None:
    preference = Preference(loss=loss, beta=BETA)  # type: ignore[arg-type]
    lora, config = LoraConfig(rank=RANK, alpha=8.0), CONFIG | {"num_hidden_layers": 2}
    made = decoder_profile(
        tmp_path,
        config=config,
        batch=PAIRS,
        seq=SEQ,
        dtype="float32",
        lora=lora,
        preference=preference,
        buckets=BUCKETS,
    )
    pairs = written(iter(ANSWERS), tmp_path / "pairs.jsonl")
    words = vocabulary(str(folder))
    prepared = prepare(str(pairs), words, tmp_path / "ahead", seq=SEQ, vocab_size=config["vocab_size"], pairs=True)
    prepared.close()
    planner, steps = ModelPlanner(made), 8
    options: dict[str, Any] = {"steps": steps, "cgroup": False, "eval_data": prepared.path}
    plans = {"mebp": planner.plan(400 << 20, policy="mebp"), "solver": planner.plan(UNLIMITED)}
    runs = [trained_by(planned, prepared.path, tmp_path / name, **options) for name, planned in plans.items()]
    assert runs[0].bits == runs[1].bits
    out, report = runs[0].out, runs[0].report
    assert set(lengths_of(out, 2 * PAIRS)) == set(LENGTHS)
    trained_by(plans["mebp"], prepared.path, tmp_path / "new", steps=1, lr=0.0, cgroup=False)
    model = adapted_by_peft(base_of(made), tmp_path / "new" / "adapter")
    records = out / "data" / "train.records"
    found = pairs_of_steps(out, steps, PAIRS, loss, by_length=True)
    batches = [(rows_of(records, own, SEQ),) for own in found]
    losses, _ = trained_by_adamw(
        held_by_peft(model).values(), lambda rows: theirs_of(loss, model, rows, BETA)["loss"], batches, lr=LR
    )
    assert report["loss"] == pytest.approx(losses, rel=2e-5)
    theirs = {key: value.detach() for key, value in held_by_peft(model).items()}
    assert errors_above(1e-3, load_file(out / "adapter" / WEIGHTS), theirs) == {}
    every = theirs_of(loss, model, rows_of(records, list(range(len(ANSWERS))), SEQ), BETA)
    due = {name: float(value.detach()) for name, value in every.items()}
    told = report["evaluation"]["after"]
    assert {name: told[name] for name in due} == pytest.approx(due, rel=1e-4)
    assert told["pairs"] == len(ANSWERS)


# --- sessions and fleets ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_session_takes_whole_batches(made: Profile, roomy: Plan, tmp_path: Path) -> None:
    """To the bit as without shorter steps."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for length in (6, 33, 15, SEQ):
        ids = torch.randint(1, CONFIG["vocab_size"], (BATCH, length), generator=generator)
        batches.append((ids, ids.clone()))
    found = []
    for name, planned in (("short", roomy), ("whole", plan(without_shorter(made), UNLIMITED))):
        with Session(planned, out=tmp_path / name, lr=LR) as session:
            losses = [session.step(*batch) for batch in batches]
            losses.append(session.loss(*batches[0]))
        found.append((losses, adapter_hash(tmp_path / name)))
    assert found[0] == found[1]


DESCRIPTION = """
micro_batches = 4
[[member]]
name = "a"
profile = "PROFILE"
memory = "400MiB"
link = "1Gbit/s"
[[member]]
name = "b"
profile = "PROFILE"
memory = "400MiB"
link = "1Gbit/s"
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "pipeline"])
def test_a_fleet_takes_whole_batches(kind: str, tmp_path: Path) -> None:
    """Its adapter is to the bit that of a fleet whose profile has no shorter steps."""
    traced = with_operators(
        decoder_profile(tmp_path, buckets="8", lora=LoraConfig(rank=RANK)), lambda _: {"seconds": 1e-3}
    )
    floor = traced.device.floor.model_copy(update={"supervisor_bytes": 20 << 20})
    device = traced.device.model_copy(update={"threads": 1, "floor": floor})
    short = traced.model_copy(update={"device": device})
    records = short_records(tmp_path, {"vocab_size": 512}, [3, 5, 8, 24, 4, 17, 6, 7, 3, 5], 24)
    found = []
    for name, one in (("short", short), ("whole", without_shorter(short))):
        folder = tmp_path / name
        folder.mkdir()
        save_profile(one, folder / "profile.json")
        (folder / "fleet.toml").write_text(DESCRIPTION.replace("PROFILE", "profile.json"))
        called("fleet", "plan", folder / "fleet.toml", "--kind", kind, "-o", folder / "plan")
        members = [path.name for path in (folder / "plan").glob("*.json") if path.name != "fleet.json"]
        assert len(members) == 2
        words = ("--data", records, "--steps", 8, "--lr", 1e-2, "--checkpoint-every", 0, "-o", folder / "out")
        called("fleet", "run", folder / "plan", *words)
        found.append({name: (adapter_hash(folder / "out" / name), steps_of(folder / "out" / name)) for name in "ab"})
    for name in "ab":
        (short_hash, short_steps), (whole_hash, whole_steps) = (one[name] for one in found)
        assert short_hash == whole_hash
        assert [line["loss"] for line in short_steps] == [line["loss"] for line in whole_steps]
        assert "places" not in short_steps[0]


def test_a_member_of_a_fleet_has_the_whole_step_alone(made: Profile) -> None:
    """Also one that a program describes."""
    link = Link(up_bytes_per_second=1e8, down_bytes_per_second=1e8)
    member = MemberSpec(name="a", profile=made, budget_bytes=1 << 30, link=link)
    assert member.profile == without_shorter(made)
    assert not member.profile.shorter


# --- tightfit train ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIG | {"num_hidden_layers": 1}
    return write_directory(
        tmp_path_factory.mktemp("shallow"), config, random_weights(config), tokenizer=byte_level_tokenizer()
    )


@pytest.fixture(scope="module")
def auto(shallow: Path, data: Path, cache: Path) -> tuple[Path, dict[str, Any], str]:
    """(output folder, the object that --json prints, what was said) of a call that takes the lengths from the data."""
    out = shallow / "auto"
    words = (
        "train",
        shallow,
        "--data",
        data,
        "--batch",
        BATCH,
        "--lora-rank",
        RANK,
        "--buckets",
        "auto",
        "--steps",
        12,
    )
    printed, said = called(*words, "--lr", LR, "-o", out, "--json")
    return out, json.loads(printed), said


@pytest.mark.slow
def test_lengths_are_chosen_from_the_data(auto: tuple[Path, dict[str, Any], str]) -> None:
    """Those of all pairs of multiples of eight with which rows have the fewest places."""
    out, told, said = auto
    with RecordFile.open(out / "data" / "train.records") as records:
        found = [records.length(number) for number in range(len(records))]
        seq = records.seq

    def places(chosen: Sequence[int]) -> int:
        return sum(next(one for one in (*chosen, seq) if one >= length) for length in found)

    best = min(places(pair) for pair in itertools.combinations(range(8, seq, 8), 2))
    lengths = [step.seq for step in package.load_profile(out / "profile.json").shorter]
    assert len(lengths) == 2
    assert places(lengths) == best
    text = ",".join(map(str, lengths))
    assert f"shorter lengths: {text}; rows with {1 - best / (seq * len(found)):.0%} fewer places\n" in said
    assert f'buckets = "{text}"' in (out / "config.toml").read_text()
    assert told["profile"]["shorter"] == lengths
    assert set(lengths_of(out)) <= {*lengths, seq}
    assert len(set(lengths_of(out))) > 1


@pytest.mark.slow
def test_a_run_with_chosen_lengths_goes_on_as_one_by_hand(
    auto: tuple[Path, dict[str, Any], str], shallow: Path, data: Path, tmp_path: Path
) -> None:
    out, told, _ = auto
    printed, said = called("train", "--resume", "-o", out, "--steps", 20, "--json", cwd=tmp_path)
    assert "shorter lengths" not in said  # they are numbers now
    report = json.loads(printed)["report"]
    assert report["resumed_step"] == 12
    shape = {"batch": BATCH, "seq": told["profile"]["seq"], "lora_rank": RANK}
    measured = profile(str(shallow), buckets=",".join(map(str, told["profile"]["shorter"])), **shape)
    by_hand = trained_by(plan(measured, UNLIMITED), data, tmp_path / "hand", steps=20)
    assert report["loss"] == by_hand.report["loss"]
    assert adapter_hash(out) == adapter_hash(by_hand.out)


@pytest.mark.slow
def test_a_program_has_the_same_lengths_chosen(shallow: Path, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch": BATCH, "lora_rank": RANK, "steps": 3, "lr": LR, "memory": "1GiB"}
    auto = package.train(str(shallow), data, tmp_path / "auto", buckets="auto", **options)
    chosen = ",".join(str(length) for length in sorted(set(lengths_of(tmp_path / "auto"))))
    assert chosen
    assert auto["tokens"]["padding_share"] < 0.6


@pytest.mark.slow
def test_made_up_tokens_have_one_length(shallow: Path, tmp_path: Path) -> None:
    words = ("train", shallow, "--data", "random", "--seq", 16, "--lora-rank", RANK, "--buckets", "auto", "--steps", 2)
    printed, said = called(*words, "-o", tmp_path / "out", "--json")
    assert "shorter lengths: none; the tokens are made up, and fill their rows\n" in said
    assert json.loads(printed)["profile"]["shorter"] == []
    assert "buckets =" not in (tmp_path / "out" / "config.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "words", "told"),
    [
        (
            "model",
            ("--buckets", "0,x"),
            "buckets '0,x': it should be written otherwise: Shorter lengths, such as 64,128",
        ),
        ("model", ("--buckets", "16,32"), "buckets 16,32: 32 is not shorter than the sequence of 32; give lengths"),
        ("model", ("--buckets", "8", "--side-rank", "4"), "buckets 8: a side network takes whole batches; leave"),
        ("examples.own_module:cnn", ("--buckets", "8"), "is a module, with batches of one shape; leave the option out"),
    ],
)
def test_lengths_that_cannot_be_had_are_refused(
    source: str, words: tuple[str, ...], told: str, refused: Any, shallow: Path, data: Path, tmp_path: Path
) -> None:
    where, length = (str(shallow), ("--seq", 32)) if source == "model" else (source, ())
    assert told in refused(2, "profile", where, *length, *words, "-o", tmp_path / "profile.json")
    of_data = ("--data", data if source == "model" else "random", "--steps", 1)
    length = ("--seq", 32) if source == "model" else ()
    _, said = called("train", where, *of_data, *length, *words, "-o", tmp_path / "out", code=2)
    assert told in said
