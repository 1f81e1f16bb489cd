"""DoRA against transformers + peft (use_dora=True) under autograd: loss, every gradient and the saved names; runs at
two budgets, their initial magnitudes, and what starts from their adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fleets import adapter_hash
from in_process import make_training, random_records
from interpreter import run_step as plain_step
from reference import (
    CONFIGS,
    TRAINED_AGAIN,
    VARIANTS,
    MaskedDropout,
    adapted_by_peft,
    checkpoint,
    errors_above,
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
from safetensors.torch import load_file
from tiny_plans import decoder_profile, naive_plan
from traced import loss_and_gradients, random_batch

from tightfit.planner.instructions import Run
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.device_forward import SENT, device_forward
from tightfit.planner.report.summary import describe
from tightfit.profiles.api import profile
from tightfit.profiles.devices.data_sheets import find_device
from tightfit.profiles.devices.estimate import estimate_profile, operator_workspace
from tightfit.profiles.models.lora import LoraConfig, from_peft
from tightfit.profiles.schema import Profile
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.steps.decoder_trace import trace_decoder
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import BODY, CONFIG, WEIGHTS, adapter_key, initialise, scaled_weight
from tightfit.runtime.session.launch import run

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
# peft says that it transposes the weights of GPT-2's own linear layers, as it should
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

BATCH, SEQ = 3, 16
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": VARIANTS["llama with biases"] | {"num_hidden_layers": 2},
    "gpt2": {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
SETTINGS = {
    "all": LoraConfig(rank=4, alpha=6.0, dora=True),
    "attention": LoraConfig(rank=4, targets="attention", dora=True),
}
BY_PATTERN = LoraConfig(
    rank=4, dora=True, rslora=True, rank_pattern={"q_proj": 7, r"layers\.1\..*": 2}, alpha_pattern={"down_proj": 5.0}
)


class Case:
    """A tiny model on both sides, with the weights of the store, non-zero pairs, and magnitudes that are no norms."""

    def __init__(self, config: dict[str, Any], lora: LoraConfig, folder: Path, dtype: torch.dtype) -> None:
        self.model = checkpoint(config, folder)
        source = resolve(str(folder))
        self.body = source.config.get("adapter_body", BODY)
        kind = str(dtype).removeprefix("torch.")
        self.traced, decoder = trace_decoder(source, BATCH, SEQ, lora, kind, lambda *_: None)
        self.lora = decoder.lora
        self.weights = stored_weights(build_store(source, folder / "stores"))
        for name, weight in self.weights.items():
            self.weights[name] = weight.to(dtype) if weight.dim() == 2 else weight
        generator = torch.Generator().manual_seed(1)
        self.trained = {}
        for tensor in self.traced.tensors:
            if tensor.kind == "trainable":
                drawn = torch.randn(tensor.shape, generator=generator)
                scaled = scaled_weight(tensor.name)
                norms = None if scaled is None else torch.linalg.norm(self.weights[scaled].float(), dim=1)
                self.trained[tensor.name] = drawn * 0.1 if norms is None else norms * (1.0 + 0.3 * drawn)
        self.batch = random_batch({"vocab_size": config["vocab_size"]}, BATCH, SEQ)
        take(self.model, self.weights, config, self.body)
        self.place = folder / "adapter"
        write_adapter(self.place, self.lora, self.trained, self.body)

    def theirs(
        self, dtype: torch.dtype = torch.float32, masked: Mapping[str, MaskedDropout] | None = None
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """(loss, gradients by our names) by peft, which reads the adapter as a run writes it, and autograd; with
        dropout where `masked` has modules in the place of nn.Dropout.
        """
        model = adapted_by_peft(self.model.to(dtype), self.place)
        saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert saved.keys() == {adapter_key(name, self.body) for name in self.trained}
        for name, module in model.named_modules():
            if masked and name in masked:
                module.train().lora_dropout["default"] = masked[name]
        loss = loss_of(model, self.batch["input_ids"], self.batch["labels"])
        loss.backward()
        gradients = gradients_of(model)
        model.unload()
        return float(loss.detach()), {name: gradients[adapter_key(name, self.body)] for name in self.trained}

    def ours(self) -> tuple[float, dict[str, torch.Tensor]]:
        return loss_and_gradients(self.traced, self.weights | self.trained, self.batch)


@pytest.mark.slow_but_for("llama-attention")
@pytest.mark.parametrize(("family", "setting"), [("llama", "attention"), ("gpt2", "all"), ("llama", "by pattern")])
def test_loss_and_gradients_are_those_of_peft(family: str, setting: str, tmp_path: Path) -> None:
    lora = SETTINGS.get(setting, BY_PATTERN)
    case = Case(FAMILIES[family], lora, tmp_path, torch.float32)
    assert case.lora["use_dora"] is True
    (loss, exact), (own_loss, own) = case.theirs(), case.ours()
    assert own_loss == pytest.approx(loss, rel=2e-6)
    magnitudes = [name for name in exact if scaled_weight(name)]
    assert 3 * len(magnitudes) == len(exact)
    assert all(float(gradient.norm()) for gradient in exact.values())
    assert errors_above(2e-5, own, exact) == {}


@pytest.mark.slow
def test_bfloat16_gradients_are_as_near_to_the_exact_ones_as_autograds(tmp_path: Path) -> None:
    case = Case(FAMILIES["llama"], SETTINGS["all"], tmp_path, torch.bfloat16)
    loss, exact = case.theirs()
    own_loss, own = case.ours()
    _, theirs = case.theirs(torch.bfloat16)
    assert own_loss == pytest.approx(loss, rel=1e-2)
    for chosen in (".lora_A.", ".lora_B.", ".lora_magnitude_vector."):
        errors = [
            sorted(relative_error(made[name], exact[name]) for name in exact if chosen in name)
            for made in (own, theirs)
        ]
        middle = len(errors[0]) // 2
        assert errors[0][middle] < 1.2 * errors[1][middle]
        assert errors[0][-1] < 1.5 * errors[1][-1]


def test_with_dropout_loss_and_gradients_are_those_of_peft_with_the_same_masks(tmp_path: Path) -> None:
    case = Case(FAMILIES["gpt2"], LoraConfig(rank=4, dropout=0.2, dora=True), tmp_path, torch.float32)
    masked: dict[str, MaskedDropout] = {}
    for layer in case.traced.layers:
        program = next(program for program in case.traced.programs if program.name == layer.program)
        drawn = {one.outputs[0]: one.args[1:] for one in program.operators if one.target == "tightfit.dropout"}
        for operator in program.operators:
            if operator.target == "tightfit.lora_down" and operator.phase == "forward":
                left, a = (one["operand"]["value"] for one in operator.args)
                name = layer.bindings[a].removesuffix(".lora_A.weight").removeprefix(BODY)
                masked[f"base_model.model.{case.body}{name}"] = MaskedDropout(*drawn[left])
    assert 3 * len(masked) == len(case.trained)
    loss, exact = case.theirs(masked=masked)
    own_loss, own = case.ours()
    assert own_loss == pytest.approx(loss, rel=2e-6)
    assert errors_above(2e-5, own, exact) == {}
    plain, _ = case.theirs()
    assert abs(plain - loss) > 2e-5 * loss  # the masks leave something out


@pytest.mark.slow
def test_norms_follow_their_products_so_that_one_unpacked_weight_serves_both(tmp_path: Path) -> None:
    case = Case(FAMILIES["llama"], SETTINGS["all"], tmp_path, torch.float32)
    for program in case.traced.programs:
        order = [operator for operator in program.operators if operator.phase == "forward"]
        norms = [at for at, operator in enumerate(order) if operator.target == "tightfit.dora_norm"]
        for at in norms:
            product, norm, scaled = order[at - 1 : at + 2]
            assert (product.target, scaled.target) == ("tightfit.projection", "tightfit.dora_scale")
            assert product.args[1] == norm.args[0]
            assert product.args[2] is None  # the bias is no part of what is scaled
        backward = [operator.target for operator in program.operators if operator.phase == "backward"]
        assert "tightfit.dora_norm" not in backward
        assert backward.count("tightfit.dora_scale_backward") == len(norms)


# --- steps in this process --------------------------------------------------------------------------------------------

QWEN2 = CONFIGS["qwen2"] | {"vocab_size": 320}
"""with biases in attention"""
SEED, STEPS, LR = 7, 4, 5e-3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder, lora = tmp_path_factory.mktemp("small"), LoraConfig(rank=4, dora=True)
    return decoder_profile(folder, config=QWEN2, batch=BATCH, seq=SEQ, dtype="float32", lora=lora)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_records(tmp_path_factory.mktemp("records"), seq=SEQ, vocab_size=QWEN2["vocab_size"])


def frozen_model(small: Profile) -> Any:
    """The model in transformers with the dequantised weights."""
    base = random_model(QWEN2)
    take(base, stored_weights(small.model.store), QWEN2)
    return base


@pytest.mark.slow
def test_steps_are_those_of_peft_which_loads_the_adapter(small: Profile, records: str, tmp_path: Path) -> None:
    start, end = tmp_path / "start", tmp_path / "end"
    start.mkdir()
    end.mkdir()
    training = make_training(naive_plan(small), records, tmp_path, lr=LR, seed=SEED)
    training.initialise()
    training.save_trained(str(start))
    losses = [training.step(number) for number in range(1, STEPS + 1)]
    training.save_trained(str(end))
    after = training.loss()  # of the first batch
    training.close()
    batches = training_batches(records, STEPS, BATCH, SEQ, SEED)
    with torch.no_grad():
        # At first the model is as it would be without an adapter.
        assert losses[0] == pytest.approx(float(loss_of(frozen_model(small), *batches[0])), rel=1e-6)
        adapted = adapted_by_peft(frozen_model(small), end)
        assert after == pytest.approx(float(loss_of(adapted, *batches[0])), rel=1e-6)
    assert after != pytest.approx(losses[0], rel=1e-3)

    # The same steps by peft, which takes its first magnitudes of the weights itself, and torch.optim.AdamW.
    told = json.loads((end / CONFIG).read_text())
    assert told["use_dora"] is True
    theirs = peft.get_peft_model(frozen_model(small), peft.LoraConfig(**(told | TRAINED_AGAIN)))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_A." in name:
                initialise(name.removeprefix("base_model.model.").replace(".default.", "."), SEED, parameter)

    def state() -> dict[str, torch.Tensor]:
        found = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        return {name: value.clone() for name, value in found.items()}

    first, ours_first = state(), load_file(start / WEIGHTS)
    torch.testing.assert_close(ours_first, first, rtol=1e-6, atol=0)
    trained = held_by_peft(theirs).values()
    their_losses, _ = trained_by_adamw(trained, partial(loss_of, theirs), batches, lr=LR)
    assert losses == pytest.approx(their_losses, rel=1e-5)
    last, ours_last = state(), load_file(end / WEIGHTS)
    assert len(last) == 3 * 3 * 7
    for name, value in last.items():
        moved = float((value - first[name]).norm())
        assert moved > 0
        assert float((ours_last[name] - value).norm()) < 0.02 * moved, name


def test_schedules_and_starts_give_the_same_bits(small: Profile, records: str, tmp_path: Path) -> None:
    """Whatever runs again, also the norm, and however much memory there is when training starts."""
    made = {"kept": naive_plan(small), "mesp": ModelPlanner(small).plan(1 << 40, policy="mesp")}
    places = {layer.name: layer.program for layer in small.layers}
    programs = {program.name: program.operators for program in small.programs}
    for planned, times in zip(made.values(), (1, 2)):
        ran = [programs[places[one.layer]][one.operator].target for one in planned.train.instructions if isinstance(one, Run)]  # fmt: skip
        assert ran.count("tightfit.dora_norm") == times * 7 * 3
    seen = []
    for name, planned in made.items():
        folder = tmp_path / name
        folder.mkdir()
        training = make_training(planned, records, folder, lr=1e-2, seed=SEED)
        training.initialise()
        training.save_trained(str(folder))
        start = (folder / WEIGHTS).read_bytes()
        losses = [training.step(number) for number in (1, 2)]
        training.save_trained(str(folder))
        training.close()
        seen.append((start, losses, (folder / WEIGHTS).read_bytes()))
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][2]


def test_a_row_of_zeros_is_refused(small: Profile, records: str, tmp_path: Path, monkeypatch: Any) -> None:
    training = make_training(naive_plan(small), records, tmp_path, lr=LR)
    load, name = training.storage.store.load, "model.layers.1.mlp.up_proj.weight"

    def loaded(part: str, out: torch.Tensor) -> None:
        load(part, out)
        if part.startswith(name):
            out[2].zero_()

    monkeypatch.setattr(training.storage.store, "load", loaded)
    with pytest.raises(InputError, match=f"row 2 of {name} is zero, and DoRA divides by its length; .* without dora"):
        training.initialise()
    training.close()


def test_a_device_beside_whose_model_a_side_network_is_trained_runs_the_model_without_the_pairs(small: Profile) -> None:
    """mobillm: the forward of the frozen model, up to the output of its last block."""
    forward = device_forward(small)
    targets = {operator.target for program in forward.programs for operator in program.operators}
    assert "tightfit.projection" in targets
    assert not {target for target in targets if "dora" in target or "lora" in target}
    batch = random_batch(QWEN2, BATCH, SEQ)
    computing = [layer for layer in forward.layers if not layer.name.startswith(SENT)]
    weights = stored_weights(small.model.store)
    values = plain_step(computing, {program.name: program for program in forward.programs}, weights | batch)
    with torch.no_grad():
        base = frozen_model(small).model
        hidden = base(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(values["model.layers.1/out0"].view_as(hidden[2]), hidden[2], rtol=1e-4, atol=1e-4)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Profile:
    """Activations enough to matter beside the process itself."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(QWEN2 | {"hidden_size": 192, "intermediate_size": 512}))
    return profile(str(path), batch=24, seq=64, lora_rank=4, dora=True)


@pytest.mark.slow
def test_runs_at_two_budgets_give_one_adapter_from_which_another_run_starts(made: Profile, tmp_path: Path) -> None:
    planner = ModelPlanner(made)
    small, large = (planner.plan(budget) for budget in (planner.minimum().peak_bytes, 1 << 40))
    assert small.train != large.train
    reports = [run(planned, "random", steps=STEPS, out=tmp_path / planned.fingerprint, lr=LR) for planned in (small, large)]  # fmt: skip
    places = [Path(report["adapter"]) for report in reports]
    assert len({adapter_hash(place.parent) for place in places}) == 1
    assert reports[0]["loss"] == reports[1]["loss"]
    for report in reports:
        own = report["processes"]["training"]
        assert own["measured"] <= own["predicted"]
    # The start of the process, for which there is an allowance of more than this, does not set the peak of the second.
    assert own["predicted"] - own["measured"] < 7 << 19
    again = run(small, "random", steps=1, out=tmp_path / "again", lr=0.0, adapter=places[1])
    assert (places[1] / WEIGHTS).read_bytes() == (Path(again["adapter"]) / WEIGHTS).read_bytes()
    assert again["loss"][0] != reports[0]["loss"][0]
    assert from_peft(places[1]).pair("any") == LoraConfig(rank=4, dora=True).pair("any")
    assert describe(small).count("DoRA rank 4") == 1


@pytest.mark.slow
def test_a_device_that_is_not_here_is_given_what_is_measured_here(made: Profile) -> None:
    """Heap that the operators take, and the order of their seconds."""
    found = 0
    for program in made.programs:
        values = {value.name: value for value in program.values}
        for operator in program.operators:
            if "dora" in operator.target:
                assert operator.workspace_bytes <= operator_workspace(operator, values) <= 64 << 10
                found += 1
    assert found
    phone = estimate_profile(made, find_device("phone"))
    spent = {one.target: one.seconds for program in phone.programs for one in program.operators}
    added = [spent[f"tightfit.dora_{name}"] for name in ("norm", "scale", "scale_backward")]
    assert min(added) > 0
    assert sum(added) < spent["tightfit.projection"] + spent["tightfit.projection_backward"]
