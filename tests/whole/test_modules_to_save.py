"""Embeddings and heads trained in full, against transformers + peft + autograd: losses and all gradients, whole runs at
two budgets that peft and other runs start from, fleets, and what is refused.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet_kinds import plan_pipeline
from fleets import Workshop, adapter_hash, ended
from reference import (
    CONFIGS,
    adapted_by_peft,
    checkpoint,
    errors_above,
    evaluated,
    gradients_of,
    held_by_peft,
    loss_of,
    random_model,
    relative_error,
    stored_weights,
    take,
    trained_by_adamw,
    training_batches,
    write_adapter,
)
from safetensors.torch import load_file, save_file
from tiny_models import byte_level_tokenizer
from torch import Tensor
from torch._subclasses import FakeTensorMode
from traced import fake_decoder, loss_and_gradients, random_batch, trace_step

from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.part_profiles import member_profile
from tightfit.planner.fleet.schema import Link
from tightfit.planner.instructions import Fetch, Spill
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.report.summary import adapter_words
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.planner.solve.policies import approximate_of
from tightfit.profiles.api import profile
from tightfit.profiles.models import saved_modules
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.models.decoder_module import without_values
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.transformers_decoder import AnyDecoder, facts
from tightfit.profiles.schema import Profile
from tightfit.profiles.tracing.traced import Trace
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import (
    BODY,
    CONFIG,
    WEIGHTS,
    adapter_config,
    adapter_key,
    initialise,
    table_slice,
    trained_name,
)
from tightfit.runtime.session.launch import run

pytest.importorskip("peft")
pytest.importorskip("transformers")
# peft warns of tied models that come apart, and says that it transposes the weights of GPT-2's own linear layers
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

BATCH, SEQ = 3, 24
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "Llama, tied": (CONFIGS["llama"] | {"pad_token_id": 5}, "embed_tokens", "lm_head"),
    "Qwen2, apart": (CONFIGS["qwen2"], "embed_tokens", "lm_head"),
    "Gemma 3, tied and scaled": (CONFIGS["gemma3_text"], "embed_tokens", "lm_head"),
    "GPT-2, tied": (
        {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "wte",
        "lm_head",
    ),
    "Gemma 2, capped": (
        SIZES | {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
                 "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
        "embed_tokens",
        "lm_head",
    ),
}  # fmt: skip
"""(config, name of the embedding, of the head)"""
CHOICES = {
    "embedding": (True, False),
    "head": (False, True),
    "both": (True, True),
}
COMPARED = [
    ("Llama, tied", "embedding"),
    ("Llama, tied", "head"),
    ("Qwen2, apart", "head"),
    ("GPT-2, tied", "both"),
    ("Gemma 3, tied and scaled", "both"),
    ("Gemma 2, capped", "both"),
]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 128 rows, at most two of them in a layer, so that tiny tables have several of both."""
    monkeypatch.setattr(saved_modules, "SLICE_BYTES", 0)
    monkeypatch.setattr(saved_modules, "MOST_LAYERS", 2)


def traced(config: dict[str, Any], lora: LoraConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, Trace]:
    """A decoder and its step."""
    if handwritten(config):
        module: Any = fake_decoder(config, dtype, lora)
    else:
        module = AnyDecoder(config | dict(facts(config).config), dtype=dtype, seq=SEQ, lora=lora)
        with FakeTensorMode():
            without_values(module)
    return module, trace_step(module, BATCH, SEQ)


def our_weights(config: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """The model's weights by our names."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    if handwritten(config):
        return {name: value.detach() for name, value in held.items()}
    return {
        one.name: (held[one.key].t() if one.transposed else held[one.key]).detach().contiguous()
        for one in facts(config).tensors
    }


class Case:
    """A tiny model with trained modules on both sides, with the same values."""

    def __init__(self, family: str, choice: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        config, *names = FAMILIES[family]
        wanted = tuple(name for name, taken in zip(names, CHOICES[choice]) if taken)
        module, self.made = traced(config, LoraConfig(rank=4, modules_to_save=wanted), dtype)
        assert len(module.tables) == len(wanted)
        self.model = random_model(config)
        kinds = {one.name.split("[")[0]: getattr(torch, one.dtype) for one in self.made.tensors}
        self.weights = {
            name: value.to(kinds.get(name, value.dtype)) for name, value in our_weights(config, self.model).items()
        }
        self.body = BODY if handwritten(config) else str(facts(config).config.get("adapter_body", BODY))
        generator = torch.Generator().manual_seed(1)
        # Other values than the base's: in a tied model one of the two moves away from the other.
        self.trained = {
            tensor.name: torch.randn(tensor.shape, generator=generator) * 0.1
            for tensor in self.made.tensors
            if tensor.kind == "trainable"
        }
        self.place = folder / "adapter"
        write_adapter(self.place, module.lora, self.trained, self.body)
        self.batch = random_batch(config, BATCH, SEQ)
        self.batch["input_ids"][:, 3] = 5  # also the token for padding

    def theirs(self, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, torch.Tensor]]:
        """(loss, gradients by key) by transformers + peft + autograd."""
        adapted = adapted_by_peft(self.model.to(dtype), self.place)
        loss = loss_of(adapted, self.batch["input_ids"], self.batch["labels"])
        loss.backward()
        gradients = gradients_of(adapted)
        adapted.unload()
        return float(loss.detach()), gradients

    def ours(self) -> tuple[float, dict[str, torch.Tensor]]:
        """The same by the traced programs, through the operators that a run calls."""
        loss, own = loss_and_gradients(self.made, self.weights | self.trained, self.batch, compiled=True)
        found: dict[str, list[torch.Tensor]] = {}
        for name, gradient in own.items():
            found.setdefault(adapter_key(name, self.body), []).append(gradient)
        return loss, {key: torch.cat(parts) for key, parts in found.items()}


@pytest.mark.slow_but_for("Qwen2, apart-head")
@pytest.mark.parametrize(("family", "choice"), COMPARED)
def test_loss_and_all_gradients_are_those_of_peft(family: str, choice: str, tmp_path: Path) -> None:
    case = Case(family, choice, tmp_path)
    (loss, exact), (own_loss, own) = case.theirs(), case.ours()
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert own.keys() == exact.keys()
    assert errors_above(1e-4, own, exact) == {}


@pytest.mark.slow
def test_bfloat16_gradients_of_tables_are_as_near_to_the_exact_ones_as_autograds(tmp_path: Path) -> None:
    case = Case("Qwen2, apart", "both", tmp_path, torch.bfloat16)
    exact_loss, exact = case.theirs()
    loss, own = case.ours()
    their_loss, theirs = case.theirs(torch.bfloat16)
    assert abs(loss - exact_loss) < max(1e-2 * exact_loss, 2 * abs(their_loss - exact_loss))
    for key in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        assert relative_error(own[key], exact[key]) < 1.5 * relative_error(theirs[key], exact[key])


# --- whole runs -------------------------------------------------------------------------------------------------------

STEPS, LR = 4, 5e-3
RUN_BATCH, RUN_SEQ = 2, 32
TEXTS = ["the quick brown fox jumps over the lazy dog", "user said: they've 12", "over the moon", "lazy dog? No."]
LARGE = CONFIGS["llama"] | {"vocab_size": 24_576, "hidden_size": 192, "intermediate_size": 256}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, with an embedding of 18 MiB that is its head, and data."""
    place = tmp_path_factory.mktemp("saved")
    checkpoint(LARGE, place / "model")
    byte_level_tokenizer().save(str(place / "model" / "tokenizer.json"))
    (place / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return place / "model", place / "data.jsonl"


@pytest.fixture(scope="module")
def measured(base: tuple[Path, Path], cache: Path) -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_modules, "SLICE_BYTES", 1 << 20)
        patch.setattr(saved_modules, "MOST_LAYERS", 6)
        return profile(
            str(base[0]), batch=RUN_BATCH, seq=RUN_SEQ, dtype="float32", base="16bit", lora_rank=4,
            modules_to_save=("embed_tokens", "lm_head"),
        )  # fmt: skip


@pytest.fixture(scope="module")
def plans(measured: Profile) -> tuple[Plan, Plan]:
    """Plans for a budget in which everything fits, and for the smallest."""
    planner = ModelPlanner(measured)
    return planner.plan(1 << 40), planner.plan(planner.minimum().peak_bytes)


def moved(made: Plan) -> dict[str, list[str]]:
    """Slices whose values, and those whose states, the plan has on disk between steps."""
    assert made.train is not None
    names = {one.tensor for one in made.train.instructions if isinstance(one, Spill)}
    fetched = {one.tensor for one in made.train.instructions if isinstance(one, Fetch)}
    values = [name for name in names & fetched if table_slice(name)]
    states = [name for name in names & fetched if table_slice(name.removeprefix("adam_m:")) and ":" in name]
    return {"values": values, "states": states}


def begin_again(loaded: Any, theirs: dict[str, Tensor]) -> None:
    """Set what is trained in a model of peft to its values before the first step: pairs drawn, tables the base's
    rows.
    """
    with torch.no_grad():
        base_rows = loaded.base_model.model.model.embed_tokens.original_module.weight
        for key, value in theirs.items():
            if ".lora_" in key:
                initialise(trained_name(key), 0, value)
            else:
                value.copy_(base_rows)


@pytest.mark.slow
def test_runs_at_two_budgets_give_the_adapter_of_peft_and_torch(
    measured: Profile, plans: tuple[Plan, Plan], base: tuple[Path, Path], tmp_path: Path
) -> None:
    """The smaller budget has values and states of slices on disk, and its run stops and goes on; the second run's
    adapter and losses are those of transformers + peft + torch.optim.AdamW, and peft loads it.
    """
    large, small = plans
    assert moved(large) == {"values": [], "states": []}
    assert moved(small)["values"]
    assert len(moved(small)["states"]) > 6
    assert large.peak_bytes - small.peak_bytes > 40 << 20
    settings: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "packing": False}
    whole = run(large, base[1], steps=STEPS, out=tmp_path / "large", eval_data=base[1], **settings)
    run(small, base[1], steps=2, out=tmp_path / "small", **settings)
    parts = run(small, base[1], steps=STEPS, out=tmp_path / "small", resume=True, **settings)
    assert adapter_hash(tmp_path / "small") == adapter_hash(tmp_path / "large")
    assert whole["loss"] == parts["loss"]
    for report, made in ((whole, large), (parts, small)):
        assert report["peak_bytes"]["measured"] <= made.peak_bytes

    model = random_model(LARGE)
    take(model, stored_weights(measured.model.store), LARGE)
    tensors = load_file(tmp_path / "large" / "adapter" / WEIGHTS)
    shape = [LARGE["vocab_size"], LARGE["hidden_size"]]
    for key in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        assert list(tensors[key].shape) == shape
        assert tensors[key].dtype is torch.float32
    loaded = adapted_by_peft(model, tmp_path / "large" / "adapter")
    theirs = held_by_peft(loaded)
    after = evaluated(loaded, tmp_path / "large", RUN_BATCH, RUN_SEQ)
    assert whole["evaluation"]["after"]["loss"] == pytest.approx(after, rel=1e-5)

    # the same steps by torch.optim.AdamW, from the base's rows
    begin_again(loaded, theirs)
    start = {key: value.detach().clone() for key, value in theirs.items()}
    batches = training_batches(tmp_path / "large", STEPS, RUN_BATCH, RUN_SEQ)
    losses, _ = trained_by_adamw(theirs.values(), partial(loss_of, loaded), batches, lr=LR)
    assert whole["loss"] == pytest.approx(losses, rel=1e-4)
    for key, value in theirs.items():
        # Where a gradient is all but zero, as those of most rows, Adam's steps are of any size.
        change = value.detach() - start[key]
        assert float((tensors[key] - value.detach()).norm()) < 0.1 * float(change.norm()), key
        assert float(change.norm()) > 0


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_with_tables(
    plans: tuple[Plan, Plan], base: tuple[Path, Path], tmp_path: Path
) -> None:
    _, small = plans
    run(small, base[1], steps=1, out=tmp_path / "first", lr=LR)
    given = tmp_path / "first" / "adapter"
    run(small, base[1], steps=1, out=tmp_path / "second", lr=0.0, weight_decay=0.0, adapter=given)
    assert adapter_hash(tmp_path / "second") == adapter_hash(tmp_path / "first")
    tensors = load_file(given / WEIGHTS)
    key = "base_model.model.lm_head.weight"
    for name, change in (
        ("short", lambda value: value[:-1].clone()),
        ("infinite", lambda value: torch.full_like(value, torch.inf)),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors | {key: change(tensors[key])}, tmp_path / name / WEIGHTS)
        with pytest.raises(InputError, match=rf"{key} (is F32 \[24575, 192\]|holds values that are no finite numbers)"):
            run(small, base[1], steps=1, out=tmp_path / f"from-{name}", adapter=tmp_path / name)


@pytest.mark.slow
def test_the_members_of_a_fleet_train_tables_as_one_process_does(tmp_path: Path) -> None:
    """A fleet that shares out the batch, whose members have the values of all slices in memory."""
    lora = LoraConfig(rank=4, modules_to_save=("embed_tokens", "lm_head"))
    workshop = Workshop(tmp_path / "plans", 4, lora=lora)
    assert any(tensor.movable for tensor in workshop.profile.tensors)
    member = member_profile(workshop.profile, 4, 0, "memory")
    assert not any(tensor.movable for tensor in member.tensors)
    assert not layered(member).moving
    options = {"steps": 8, "lr": 1e-2, "seed": 3, "checkpoint_every": 0}
    expected = workshop.alone(tmp_path / "alone", **options)
    fleet = workshop.fleet((3, 1), (("memory", "disk"), ("disk", "memory")))
    found = ended(workshop.start(fleet, tmp_path, **options))
    assert {code for code, _ in found.values()} == {0}, found
    assert {adapter_hash(tmp_path / member.name) for member in fleet.members} == {expected}


# --- estimates, rules, and what is refused ----------------------------------------------------------------------------


def estimated(tmp_path: Path, config: dict[str, Any], *names: str, **settings: Any) -> Profile:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return profile(
        str(path), seq=16, lora_rank=4, device="raspberry-pi-5", modules_to_save=names, **settings
    )  # fmt: skip


def test_rules_for_models_with_trained_tables(tmp_path: Path) -> None:
    """mezo perturbs slices as it does pairs; rules with the exact gradient keep them in memory; lcsb and mobillm are
    refused.
    """
    made = estimated(tmp_path, CONFIGS["llama"], "embed_tokens", "lm_head")
    assert made.model.lora is not None
    assert adapter_words(made.model.lora) == "LoRA rank 4, embed_tokens and lm_head in full"
    for policy in ("mezo", "mebp", "keep-all"):
        planned = plan(made, 1 << 40, policy=policy)
        assert planned.status == "feasible"
        simulate(planned)
        assert not moved(planned)["values"]
    assert approximate_of(made) == ("mezo",)
    for policy in ("lcsb", "mobillm"):
        with pytest.raises(
            InputError, match=rf"{policy} trains LoRA pairs alone, .* model\.embed_tokens and lm_head in full"
        ):
            plan(made, 1 << 40, policy=policy)


def test_pipelines_and_side_networks_are_refused(tmp_path: Path) -> None:
    made = estimated(tmp_path, CONFIGS["llama"], "embed_tokens")
    link = Link(up_bytes_per_second=1e7, down_bytes_per_second=1e7)
    members = [MemberSpec(name=name, profile=made, budget_bytes=1 << 34, link=link) for name in "ab"]
    with pytest.raises(InputError, match=r"a pipeline trains LoRA pairs alone, .*profile without modules_to_save"):
        plan_pipeline(members, 4)
    with pytest.raises(
        InputError, match="modules_to_save lm_head: a side network has no adapter; leave the option out"
    ):
        estimated(tmp_path, CONFIGS["llama"], "lm_head", side_rank=8)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (CONFIGS["llama"], "norm", r"of the model these modules can be trained in full: embed_tokens, lm_head; others"),
        (FAMILIES["GPT-2, tied"][0], "wpe", r"of the gpt2 model these modules can be trained in full: wte, lm_head"),
        (
            SIZES | {"model_type": "phi"},
            "lm_head",
            r"it has a bias, which is not trained here; of the phi model these modules .*: embed_tokens$",
        ),
    ],
)  # fmt: skip
def test_other_modules_are_refused(config: dict[str, Any], name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"modules_to_save '{name}': .*{message}"):
        estimated(tmp_path, config, name)


def test_ties_that_peft_keeps_are_refused(tmp_path: Path) -> None:
    told = adapter_config({"rank": 4, "alpha": 8.0, "modules_to_save": ["lm_head"]}, ["a.q_proj.lora_A.weight"], "base")
    (tmp_path / CONFIG).write_text(json.dumps(told | {"ensure_weight_tying": True}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    with pytest.raises(InputError, match="ensure_weight_tying is True, which tightfit does not have; train without it"):
        profile(str(tmp_path / "config.json"), seq=16, device="phone", adapter=tmp_path)
