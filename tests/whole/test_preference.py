"""Learning from pairs of answers: losses, gradients and steps against TRL's formulas on transformers + peft; the same
bits at every budget and after a resume; references that are computed once; what is refused.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import FAMILIES
from fleets import adapter_hash
from in_process import make_training
from reference import (
    CONFIGS,
    adapted_by_peft,
    gradients_of,
    held_by_peft,
    relative_error,
    trained_by_adamw,
)
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import byte_level_tokenizer, random_weights, write_directory
from tiny_plans import decoder_profile, naive_plan
from trl_losses import base_of, pairs_of_steps, rows_of, theirs_of

from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.schema import Link
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.report.explain import explain
from tightfit.profiles.api import load_profile, profile, save_profile
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.schema import Preference, Profile, adamw
from tightfit.profiles.sources.lookup import vocabulary
from tightfit.runtime.cli.answers import profile_text
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.tokenization import prepare
from tightfit.runtime.engine.training.adapter import adapter_key, table_slice
from tightfit.runtime.engine.training.pairs import PairBatches
from tightfit.runtime.engine.training.references import ENTRY, HEADER_BYTES
from tightfit.runtime.engine.training.trainer import Training
from tightfit.runtime.results.evaluation import evaluate
from tightfit.runtime.session.launch import run
from tightfit.runtime.session.session import Session
from tightfit.runtime.supervision.report_text import evaluation_text, report_text

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft warns of tied models that come apart
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")]

BETA, PAIRS, SEQ, RANK = 0.3, 2, 30, 4
SMALL = CONFIGS["llama"] | {"num_hidden_layers": 2}
SHORT_ROWS = [
    {"prompt": "a ", "chosen": "b", "rejected": "cde"},
    {"prompt": "fox ", "chosen": "it is", "rejected": "no"},
    {"prompt": "x", "chosen": "yz", "rejected": "w"},
    {"prompt": "o ", "chosen": "12", "rejected": "3"},
]
KINDS = {
    "tied": SMALL,
    "untied": CONFIGS["qwen2"] | {"num_hidden_layers": 1},
    "traced": FAMILIES["Phi-3"],
    "capped logits": FAMILIES["Gemma 2"],
}


def moments(folder: Path, training: Training) -> dict[str, torch.Tensor]:
    """The first moments of what is trained, by the keys of an adapter: of slices of a table one after the other."""
    states, found = load_file(folder / "optimizer.safetensors"), {}
    slices = [(own.start if (own := table_slice(one.name)) else 0, one.name) for one in training.trainables]
    for _, name in sorted(slices):
        key, moment = adapter_key(name), states[f"adam_m:{name}"]
        found[key] = torch.cat([found[key], moment]) if key in found else moment
    return found


def one_step(
    folder: Path,
    config: dict[str, Any],
    loss: str,
    dtype: str,
    tables: tuple[str, ...] = (),
    shared: list[dict[str, str]] | None = None,
) -> tuple[Profile, float, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """The loss and the gradients of a step whose adapter, left in `folder`, is no new one; and the rows of its batch,
    one for each answer. Answers share rows where the samples are those of `shared`, and are made up otherwise.
    """
    lora = LoraConfig(rank=RANK, alpha=8.0, modules_to_save=tables)
    preference = Preference(loss=loss, beta=BETA)  # type: ignore[arg-type]
    made = decoder_profile(folder, config=config, batch=PAIRS, seq=SEQ, dtype=dtype, lora=lora, preference=preference)
    words = made.model.config["vocab_size"]
    own_words = (
        None
        if shared is None
        else vocabulary(str(write_directory(folder, config, {}, tokenizer=byte_level_tokenizer())))
    )
    data = "random" if shared is None else str(folder / "pairs.jsonl")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shared or ()))
    records = prepare(data, own_words, folder, seq=SEQ, vocab_size=words, seed=3, pairs=True)
    records.close()
    training = make_training(naive_plan(made), str(records.path), folder, lr=0.0, packing=shared is not None)
    batches = training.batches
    assert isinstance(batches, PairBatches)
    if loss == "dpo":
        training.initialise(switched_off=True)
        batches.open_references({})
        (first,) = batches.without_references(1, PAIRS)
        training.refer(batches, first)
        assert not list(batches.without_references(1, PAIRS))
    training.initialise()
    generator = torch.Generator().manual_seed(0)
    for one in training.trainables:
        if ".lora_" in one.name:  # no B is zero
            value = torch.randn(one.shape, generator=generator) * 0.1
            training.device.tensor(one.value.at, one.shape, "float32").copy_(value)
    made_loss = training.step(1)
    training.save_state(str(folder))
    # The weights stay as they are, and Adam's first moment tells the gradient.
    gradients = {key: moment / 0.1 for key, moment in moments(folder, training).items()}
    rows = rows_of(records.path, batches.of_step(0, PAIRS), SEQ)
    training.close()
    return made, made_loss, gradients, rows


@pytest.mark.slow_but_for("tied-orpo-False", "untied-dpo-False", "tied-dpo-True", "traced-orpo-True")
@pytest.mark.parametrize(
    ("kind", "loss", "shared"),
    [
        ("tied", "orpo", False),
        ("untied", "dpo", False),
        ("capped logits", "dpo", False),
        ("tied", "dpo", True),
        ("traced", "orpo", True),
    ],
)
def test_losses_and_gradients_are_those_of_trl(kind: str, loss: str, shared: bool, tmp_path: Path) -> None:
    """Where answers share rows, of more pairs than have rows of their own in a batch."""
    config = KINDS[kind] | ({"vocab_size": 512} if shared else {})
    tables = ("lm_head",) if kind == "untied" else ()
    made, own_loss, own, rows = one_step(tmp_path, config, loss, "float32", tables, SHORT_ROWS if shared else None)
    assert (len(rows[0]) > 2 * PAIRS) == shared
    model = adapted_by_peft(base_of(made), tmp_path)
    theirs = theirs_of(loss, model, rows, BETA)["loss"]
    theirs.backward()
    assert own_loss == pytest.approx(float(theirs.detach()), rel=5e-6)
    exact = gradients_of(model)
    assert own.keys() == exact.keys()
    assert {key for key, value in exact.items() if not relative_error(own[key], value) < 1e-4} == set()


def test_bfloat16_gradients_are_as_near_to_the_exact_ones_as_autograds(tmp_path: Path) -> None:
    made, own_loss, own, rows = one_step(tmp_path, SMALL | {"num_hidden_layers": 1}, "dpo", "bfloat16")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted_by_peft(base_of(made, dtype), tmp_path)
        theirs = theirs_of("dpo", model, rows, BETA)["loss"]
        theirs.backward()
        found.append((float(theirs.detach()), gradients_of(model)))
    (exact_loss, exact), (their_loss, theirs_half) = found
    assert abs(own_loss - exact_loss) < max(1e-2 * exact_loss, 2 * abs(their_loss - exact_loss))
    own_errors = sorted(relative_error(own[key], value) for key, value in exact.items())
    their_errors = sorted(relative_error(theirs_half[key], value) for key, value in exact.items())
    assert own_errors[len(exact) // 2] < 1.5 * their_errors[len(exact) // 2]
    assert own_errors[-1] < 2 * their_errors[-1]


# --- runs -------------------------------------------------------------------------------------------------------------

LR, STEPS = 5e-3, 5
ROWS = [
    {"prompt": "Is the fox quick? ", "chosen": "positive", "rejected": "negative"},
    {"prompt": "lazy dog? ", "chosen": "negative, it is", "rejected": "pos"},
    {"prompt": "over ", "chosen": "the moon", "rejected": "12"},
    {"prompt": "user said: ", "chosen": "we're 345", "rejected": "I'd say; she'll"},
    {"prompt": "they've ", "chosen": "ps", "rejected": "jumps over"},
]
SHORT_SEQ = 24
Made = tuple[Profile, ModelPlanner]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return write_directory(folder, SMALL, random_weights(SMALL), tokenizer=byte_level_tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def dpo(model_folder: Path, cache: Path) -> Made:
    made = profile(
        str(model_folder), batch=PAIRS, seq=SHORT_SEQ, lora_rank=RANK, dtype="float32", loss="dpo", beta=BETA
    )
    return made, ModelPlanner(made)


@pytest.fixture(scope="module")
def trained(dpo: Made, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run at the smallest budget, and its report."""
    out = tmp_path_factory.mktemp("trained")
    smallest = dpo[1].plan(dpo[1].minimum().peak_bytes)
    report = run(smallest, data, steps=STEPS, out=out, lr=LR, eval_data=data)
    assert report["peak_bytes"]["measured"] <= smallest.peak_bytes
    return out, report


def new_adapter(made: Profile, plan_: Any, data: Path, folder: Path) -> Any:
    """The model in transformers + peft as a run of no progress leaves it: the adapter before the first step."""
    run(plan_, data, steps=made.accumulate, out=folder, lr=0.0)
    return adapted_by_peft(base_of(made), folder / "adapter")


@pytest.mark.slow
def test_steps_are_those_of_trl_with_adamw(
    dpo: Made, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, report = trained
    made, planner = dpo
    model = new_adapter(made, planner.plan(1 << 40), data, tmp_path / "new")
    records = out / "data" / "train.records"
    batches = [(rows_of(records, pairs, SHORT_SEQ),) for pairs in pairs_of_steps(out, STEPS, PAIRS, "dpo")]
    every = rows_of(records, list(range(len(ROWS))), SHORT_SEQ)
    margins: list[float] = []

    def of_step(rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
        theirs = theirs_of("dpo", model, rows, BETA)
        margins.append(float(theirs["reward_margin"]))
        return theirs["loss"]

    losses, _ = trained_by_adamw(held_by_peft(model).values(), of_step, batches, lr=LR)
    assert report["loss"] == pytest.approx(losses, rel=2e-5)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["reward_margin"] for line in steps] == pytest.approx(margins, rel=1e-3, abs=1e-6)
    assert (steps[0]["reward_accuracy"], steps[0]["samples"]) == (0.0, PAIRS)
    assert report["loss"][0] == float(torch.tensor(2.0).log())  # what is compared is the same to the bit
    theirs = held_by_peft(model)
    for key, value in load_file(out / "adapter" / "adapter_model.safetensors").items():
        assert relative_error(value, theirs[key].detach()) < 2e-4, key
    found = {name: float(value.detach()) for name, value in theirs_of("dpo", model, every, BETA).items()}
    told = report["evaluation"]["after"]
    assert {name: told[name] for name in found} == pytest.approx(found, rel=1e-4)
    assert told["pairs"] == len(ROWS)
    assert told["reward_accuracy"] > 0.5
    assert report["evaluation"]["before"]["reward_margin"] == 0.0
    assert report["references"]["pairs"] == 2 * len(ROWS)
    assert report["tokens"]["samples_per_second"] > 0
    console = Console(file=io.StringIO(), width=200)
    for text in (report_text(report), profile_text(made), *explain(planner.plan(1 << 40))):
        console.print(text)
    words = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "chosen answer wins in",
        "log-probabilities of 10 pairs",
        "DPO on pairs of answers",
        "the adapter is off once",
    ):
        assert part in words
    alone = evaluate(planner.plan(1 << 40), data, adapter=out)
    assert {name: alone[name] for name in found} == {name: told[name] for name in found}
    assert alone["perplexity"] is None
    console.print(evaluation_text(alone))
    assert "of 5 pairs" in console.file.getvalue()  # type: ignore[attr-defined]


def test_another_schedule_that_stops_and_goes_on_leaves_the_same_adapter(
    dpo: Made, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """References, too, are the same, and those that are there are not computed again."""
    out, report = trained
    planner = dpo[1]
    large, mebp = planner.plan(1 << 40), planner.plan(1 << 40, policy="mebp")
    first = run(mebp, data, steps=2, out=tmp_path, lr=LR)
    assert first["references"]["pairs"] == 2 * PAIRS  # what two steps see
    again = run(large, data, steps=STEPS, out=tmp_path, lr=LR, resume=True)
    assert (again["resumed_step"], again["references"]["pairs"]) == (2, len(ROWS) - 2 * PAIRS)
    assert again["loss"] == report["loss"]
    assert adapter_hash(tmp_path) == adapter_hash(out)
    values = [(folder / "data" / "train.references").read_bytes()[HEADER_BYTES:] for folder in (out, tmp_path)]
    assert values[0] == values[1]
    assert len(values[0]) == len(ROWS) * ENTRY.size


def test_packed_pairs_leave_the_same_adapter_at_every_budget_and_after_a_resume(
    dpo: Made, data: Path, tmp_path: Path
) -> None:
    planner = dpo[1]
    smallest, large = planner.plan(planner.minimum().peak_bytes), planner.plan(1 << 40)
    options: dict[str, Any] = {"lr": LR, "packing": True, "eval_data": data}
    whole = run(smallest, data, steps=3, out=tmp_path / "whole", **options)
    run(large, data, steps=1, out=tmp_path / "part", **options)
    again = run(large, data, steps=3, out=tmp_path / "part", resume=True, **options)
    assert again["loss"] == whole["loss"]
    assert adapter_hash(tmp_path / "part") == adapter_hash(tmp_path / "whole")
    assert whole["packing"] == {"on": True, "refused": None}
    assert whole["peak_bytes"]["measured"] <= smallest.peak_bytes
    # What is compared before the first step is the same to the bit.
    assert whole["loss"][0] == float(torch.tensor(2.0).log())
    assert whole["evaluation"]["before"]["reward_margin"] == 0.0
    apart = evaluate(large, data, adapter=tmp_path / "whole")
    names = ("loss", "pairs", "reward_accuracy", "reward_margin")
    told = whole["evaluation"]["after"]
    assert {name: apart[name] for name in names} == pytest.approx({name: told[name] for name in names}, rel=1e-4)


@pytest.mark.slow
def test_a_pass_for_references_that_was_killed_goes_on(
    dpo: Made, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, report = trained
    broken = bytearray((out / "data" / "train.references").read_bytes())
    lost = pairs_of_steps(out, 2, PAIRS, "dpo")[1]
    for pair in lost:
        begin = HEADER_BYTES + pair * ENTRY.size
        broken[begin : begin + ENTRY.size] = bytes(ENTRY.size)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.references").write_bytes(broken)
    again = run(dpo[1].plan(1 << 40), data, steps=STEPS, out=tmp_path, lr=LR)
    assert again["references"]["pairs"] == PAIRS
    assert adapter_hash(tmp_path) == adapter_hash(out)
    assert again["loss"] == report["loss"]


@pytest.mark.slow
def test_a_run_that_starts_from_an_adapter_compares_with_the_base(
    dpo: Made, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, report = trained
    again = run(dpo[1].plan(1 << 40), data, steps=1, out=tmp_path, adapter=out / "adapter", lr=LR, eval_data=data)
    told, before = again["evaluation"]["before"], report["evaluation"]["after"]
    assert (told["loss"], told["reward_margin"]) == (before["loss"], before["reward_margin"])
    values = [(folder / "data" / "evaluate.references").read_bytes()[HEADER_BYTES:] for folder in (out, tmp_path)]
    assert values[0] == values[1]


@pytest.mark.slow
def test_accumulated_steps_are_those_of_trl_with_adamw(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Two micro-batches of one pair make an update; ORPO."""
    lora, preference = LoraConfig(rank=RANK, alpha=8.0), Preference(loss="orpo", beta=BETA)
    made = decoder_profile(
        tmp_path, config=SMALL, batch=1, seq=SHORT_SEQ, dtype="float32", lora=lora, preference=preference
    )
    words = vocabulary(str(model_folder))
    prepared = prepare(str(data), words, tmp_path / "ahead", seq=SHORT_SEQ, vocab_size=SMALL["vocab_size"], pairs=True)
    prepared.close()
    made = made.model_copy(update={"optimizer": adamw(2)})
    planner = ModelPlanner(made)
    planned = planner.plan(400 << 20, policy="mebp")
    files = {"data": prepared.path, "eval_data": prepared.path}
    report = run(planned, **files, epochs=1.2, out=tmp_path / "out", lr=LR, cgroup=False)
    assert len(report["loss"]) == 6
    assert "references" not in report
    model = new_adapter(made, planned, prepared.path, tmp_path / "new")
    records = tmp_path / "out" / "data" / "train.records"
    rows = [rows_of(records, pairs, SHORT_SEQ) for pairs in pairs_of_steps(tmp_path / "out", 6, 1, "orpo")]
    losses: list[float] = []

    def of_update(*together: tuple[torch.Tensor, ...]) -> torch.Tensor:
        found = [theirs_of("orpo", model, one, BETA)["loss"] for one in together]
        losses.extend(float(one.detach()) for one in found)
        return torch.stack(found).mean()

    trained_by_adamw(held_by_peft(model).values(), of_update, zip(rows[0::2], rows[1::2]), lr=LR)
    assert report["loss"] == pytest.approx(losses, rel=2e-5)
    every = rows_of(records, list(range(len(ROWS))), SHORT_SEQ)
    found = {name: float(value.detach()) for name, value in theirs_of("orpo", model, every, BETA).items()}
    told = report["evaluation"]["after"]
    assert {name: told[name] for name in found} == pytest.approx(found, rel=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_losses_that_cannot_be_had_are_refused(model_folder: Path) -> None:
    for options, told in (
        ({"loss": "ppo"}, r"loss 'ppo': it should be 'dpo' or 'orpo'"),
        ({"beta": 0.2}, r"beta 0\.2 is of a loss of pairs; name one too: loss='dpo' or loss='orpo'"),
        ({"loss": "dpo", "beta": 0.0}, r"beta 0.0: it should be greater than 0"),
        ({"loss": "dpo", "beta": float("inf")}, r"beta inf: it should be a finite number"),
        ({"loss": "dpo", "side_rank": 8}, r"loss dpo: a side network predicts tokens and nothing else"),
    ):
        with pytest.raises(InputError, match=told):
            profile(str(model_folder), seq=SHORT_SEQ, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"loss orpo: .* is a module with a loss of its own"):
        profile("examples.own_module:cnn", loss="orpo")


def test_what_does_not_take_pairs_says_so(dpo: Made, data: Path, tmp_path: Path) -> None:
    made, planner = dpo
    planned = planner.plan(1 << 40)
    with (
        pytest.raises(
            InputError, match=r"the plan learns from pairs of answers \(dpo\), which a Session does not take"
        ),
        Session(planned, out=tmp_path / "b"),
    ):
        pass
    with pytest.raises(
        InputError, match=r"a fleet predicts tokens, and this profile learns from pairs of answers \(dpo\)"
    ):
        MemberSpec(name="a", profile=made, budget_bytes=1 << 30, link=Link(up_bytes_per_second=1e8, down_bytes_per_second=1e8))  # fmt: skip
    with pytest.raises(
        InputError, match=r"mobillm predicts tokens, and this profile learns from pairs of answers \(dpo\)"
    ):
        planner.plan(1 << 40, policy="mobillm")
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "over ", "completion": "the moon"}) + "\n")
    with pytest.raises(
        InputError, match=r"no pair of answers, and the plan's loss is of such; write \{\"prompt\", \"chosen\""
    ):
        run(planned, texts, steps=1, out=tmp_path / "c")


def test_a_profile_of_an_unknown_loss_is_refused(dpo: Made, tmp_path: Path) -> None:
    told = json.loads(save_profile(dpo[0], tmp_path / "p.json").read_text())
    del told["checksum"]
    told["model"]["config"]["preference"]["loss"] = "ppo"
    (tmp_path / "p.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"p\.json: field model\.loss: Input should be 'dpo' or 'orpo'"):
        load_profile(tmp_path / "p.json")


def test_another_beta_is_another_run(dpo: Made, data: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    made = dpo[0]
    config = made.model.config | {"preference": {"loss": "dpo", "beta": 0.5}}
    other = made.model_copy(update={"model": made.model.model_copy(update={"config": config})})
    with pytest.raises(InputError, match=r"resume with the same"):
        run(plan(other, 1 << 40), data, steps=STEPS + 1, out=trained[0], lr=LR, resume=True)
