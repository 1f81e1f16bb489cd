"""LoRA dropout: losses and gradients of real steps against peft with the same masks; the same bits at every budget,
after a resume and in fleets; none in an evaluation.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fleets import Workshop, adapter_hash, ended
from in_process import make_training, random_records, train
from reference import CONFIGS, MaskedDropout, loss_of, peft_model, peft_name, relative_error, starting_weights
from rich.console import Console
from safetensors.torch import load_file
from tiny_plans import decoder_profile, naive_plan

from tightfit.planner.instructions import Run
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.report.summary import describe
from tightfit.planner.schema import Phase
from tightfit.planner.solve.policies import refused_of
from tightfit.profiles.api import profile
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.schema import Profile
from tightfit.runtime.cli.answers import profile_text
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.device.draws import Draws
from tightfit.runtime.engine.kernels.optimizer import MeZO
from tightfit.runtime.engine.training.adapter import CONFIG, adapter_config
from tightfit.runtime.engine.training.trainer import Training
from tightfit.runtime.session.launch import run

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

P, SEED, LORA = 0.2, 7, LoraConfig(rank=4, alpha=6.0, dropout=0.2)
PHI3 = {
    "model_type": "phi3", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BATCH, SEQ = 3, 20


def records(folder: Path, made: Profile) -> str:
    return random_records(folder, seq=SEQ, vocab_size=made.model.config["vocab_size"])


def dropouts(made: Profile) -> dict[str, tuple[str, int, float]]:
    """Name of each trained A -> (its layer, the number of its mask there, p), as the profile's operators have them."""
    programs = {program.name: program for program in made.programs}
    found = {}
    for layer in made.layers:
        for operator in programs[layer.program].operators:
            if operator.target == "tightfit.dropout_lora_down":
                _, a, p, site = operator.args
                found[layer.bindings[a["operand"]["value"]]] = layer.name, site, p
    return found


def peft_with_masks(made: Profile, weights: dict[str, torch.Tensor], draws: Draws) -> torch.nn.Module:
    """The model in transformers + peft, with each nn.Dropout of a pair replaced by the masks of the profile's
    operators.
    """
    assert made.model.lora is not None
    config = {name: value for name, value in made.model.config.items() if name != "adapter_base"}
    model = peft_model(config, weights, adapter_config(made.model.lora, [], ""), torch.float32)
    placed = dropouts(made)
    replaced = 0
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            assert isinstance(module.lora_dropout["default"], torch.nn.Dropout)
            own = f"{name.removeprefix('base_model.model.')}.lora_A.weight"
            layer, site, p = placed[own]
            module.lora_dropout["default"] = MaskedDropout(p, site, draws, layer)
            replaced += 1
    assert replaced == len(placed)
    return model


def given_weights(training: Training, weights: dict[str, torch.Tensor]) -> None:
    """Train from these values, of which no B is zero."""
    for one in training.trainables:
        training.device.tensor(one.value.at, one.shape, "float32").copy_(weights[one.name])


def test_losses_and_gradients_are_those_of_peft_with_the_same_masks(tmp_path: Path) -> None:
    """Of a family that transformers runs while it is traced."""
    made = decoder_profile(tmp_path, config=PHI3, batch=BATCH, seq=SEQ, dtype="float32", lora=LORA)
    weights = starting_weights(made)
    generator = torch.Generator().manual_seed(0)
    for name in weights:
        if ".lora_" in name:
            weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.1
    training = make_training(naive_plan(made), records(tmp_path / "data", made), tmp_path, lr=0.0, seed=SEED)
    training.initialise()
    given_weights(training, weights)
    draws = Draws(SEED)
    model = peft_with_masks(made, weights, draws)
    theirs = dict(model.named_parameters())
    trained = [one.name for one in training.trainables]
    before = {name: torch.zeros(weights[name].shape) for name in trained}
    losses = []
    for step in (1, 2):
        own_loss = training.step(step)
        inputs = [tensor.clone() for tensor in training.inputs]
        draws.step = step
        model.zero_grad()
        loss = loss_of(model, *inputs[:2])  # masks are drawn for rows, each of one sample
        loss.backward()
        assert own_loss == pytest.approx(float(loss.detach()), rel=2e-6)
        losses.append(own_loss)
        training.save_state(str(tmp_path))
        states = {name: held.clone() for name, held in load_file(tmp_path / "optimizer.safetensors").items()}
        for name in trained:
            # The weights stay as they are, and Adam's first moment tells the gradient.
            own = (states[f"adam_m:{name}"] - 0.9 * before[name]) / 0.1
            before[name] = states[f"adam_m:{name}"]
            exact = theirs[peft_name(name, theirs)].grad
            assert exact is not None
            assert relative_error(own, exact) < 2e-5, name
    # With the masks of another step the loss is another.
    draws.step = 3
    with torch.no_grad():
        other = loss_of(model, *inputs)
    assert losses[1] != pytest.approx(float(other), rel=1e-4)
    training.close()


def test_every_pair_has_masks_of_its_own_and_equal_layers_share_a_program(tmp_path: Path) -> None:
    made = decoder_profile(tmp_path, config=CONFIGS["llama"], batch=BATCH, seq=SEQ, lora=LORA)
    placed = dropouts(made)
    assert len(placed) == 3 * 7
    assert len({(layer, site) for layer, site, _ in placed.values()}) == len(placed)
    assert {p for _, _, p in placed.values()} == {P}
    assert (
        len({layer.program for layer in made.layers if layer.name.startswith("model.layers.")}) == 2
    )  # the first differs


@pytest.mark.slow
def test_without_dropout_a_profile_is_what_it_was_and_with_it_no_operator_is_added(tmp_path: Path) -> None:
    def traced(folder: str, lora: LoraConfig) -> Profile:
        return decoder_profile(tmp_path / folder, config=CONFIGS["gemma3_text"], batch=BATCH, seq=SEQ, lora=lora)  # type: ignore[no-any-return]

    plain_profile, none = traced("plain", LoraConfig(rank=4)), traced("none", LoraConfig(rank=4, dropout=0.0))
    with_dropout = traced("dropout", LoraConfig(rank=4, dropout=P))
    assert none.programs == plain_profile.programs
    targets = [[operator.target for operator in program.operators] for program in none.programs]
    assert not any("dropout" in target for own in targets for target in own)
    # The sums of gradients are fused as without dropout, and no mask and no second input of a pair is a tensor.
    assert targets == [
        [operator.target.replace("dropout_", "") if "dropout" in operator.target else operator.target for operator in own]
        for own in (program.operators for program in with_dropout.programs)
    ]  # fmt: skip
    assert [len(p.values) for p in none.programs] == [len(p.values) for p in with_dropout.programs]
    assert all(operator.recomputable for program in with_dropout.programs for operator in program.operators)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return decoder_profile(tmp_path_factory.mktemp("small"), batch=BATCH, seq=SEQ, dtype="float32", lora=LORA)  # type: ignore[no-any-return]


def test_schedules_that_run_operators_again_give_the_same_bits(small: Profile, tmp_path: Path) -> None:
    data = records(tmp_path / "data", small)
    seen = [
        train(naive_plan(small, recompute=recompute), data, tmp_path / name, 3, lr=1e-2, seed=SEED)
        for name, recompute in (("kept", False), ("again", True))
    ]
    assert seen[0] == seen[1]


@pytest.mark.slow
def test_an_evaluation_has_no_dropout(small: Profile, tmp_path: Path) -> None:
    """Between training steps, to the bit what the same profile without dropout gives."""
    data = records(tmp_path / "data", small)
    without = decoder_profile(tmp_path / "store", batch=BATCH, seq=SEQ, dtype="float32", lora=dataclasses.replace(LORA, dropout=0.0))  # fmt: skip
    weights = {
        t.name: 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(len(t.name)))
        for t in small.tensors
        if t.kind == "trainable"
    }
    found = []
    for made in (small, without):
        training = make_training(naive_plan(made), data, tmp_path, lr=0.0, seed=SEED)
        training.initialise()
        given_weights(training, weights)
        trained = training.step(1)
        told = training.evaluate(data, lambda done, total: None)
        found.append((trained, told["loss"], training.loss()))
        assert training.step(1) == trained
        training.close()
    assert found[0][1:] == found[1][1:]
    assert found[0][0] != pytest.approx(found[1][0], rel=1e-4)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPlanner, str, list[float]]:
    """A planner, data, and the losses of four steps of a plain schedule with weights that do not move."""
    folder = tmp_path_factory.mktemp("deep")
    config = CONFIGS["llama"] | {"num_hidden_layers": 5}
    made = decoder_profile(folder, config=config, batch=BATCH, seq=SEQ, dtype="float32", lora=LORA)
    data = records(folder / "data", made)
    return ModelPlanner(made), data, losses_of(make_training(naive_plan(made), data, folder, lr=0.0, seed=SEED))


def losses_of(training: Training) -> list[float]:
    training.initialise()
    losses = [training.step(number) for number in range(1, 5)]
    training.close()
    return losses


@pytest.mark.parametrize("policy", ["lcsb", "checkpoint-sqrt"])
def test_rules_draw_the_masks_of_plain_training(
    policy: str, deep: tuple[ModelPlanner, str, list[float]], tmp_path: Path
) -> None:
    """In layers that lcsb does not train, and in layers that go forward twice."""
    planner, data, losses = deep
    planned = planner.plan(1 << 40, policy=policy)
    assert losses_of(make_training(planned, data, tmp_path, lr=0.0, seed=SEED)) == losses
    if policy == "checkpoint-sqrt":
        assert planned.train is not None
        assert "tightfit.dropout_lora_down" in {name for name, again in runs(planner.profile, planned.train) if again}


def test_both_forwards_of_mezo_have_the_same_masks(deep: tuple[ModelPlanner, str, list[float]], tmp_path: Path) -> None:
    planner, data, losses = deep
    training = make_training(planner.plan(1 << 40, policy="mezo"), data, tmp_path, lr=0.0, seed=SEED)
    # So small a difference between the two forwards that only the masks could tell them apart.
    training.updates.optimizer = MeZO(lr=0.0, epsilon=1e-12)
    assert losses_of(training) == pytest.approx(losses, rel=1e-6)
    assert training.executor.forwards == pytest.approx([losses[-1]] * 2, rel=1e-6)


def runs(made: Profile, phase: Phase) -> list[tuple[str, bool]]:
    """(operator's target, whether it has run before in the step) of every run in a schedule."""
    layers = {layer.name: layer.program for layer in made.layers}
    programs = {program.name: program for program in made.programs}
    seen: set[tuple[str, int]] = set()
    found = []
    for one in phase.instructions:
        if isinstance(one, Run):
            found.append(
                (programs[layers[one.layer]].operators[one.operator].target, (one.layer, one.operator) in seen)
            )
            seen.add((one.layer, one.operator))
    return found


def test_a_side_network_is_refused_with_dropout(small: Profile) -> None:
    with pytest.raises(
        InputError, match=r"no LoRA pairs, so that lora_dropout 0\.2 would do nothing; profile without it"
    ):
        ModelPlanner(small).plan(1 << 40, policy="mobillm")
    assert set(refused_of(small)) == {"mobillm"}


# --- runs -------------------------------------------------------------------------------------------------------------


STEPS, LR = 4, 5e-3


@pytest.mark.slow
def test_runs_at_two_budgets_and_after_a_resume_give_one_adapter(tmp_path: Path, cache: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["llama"]))
    made = profile(str(config), batch=BATCH, seq=SEQ, lora_rank=4, lora_dropout=P)
    planner = ModelPlanner(made)
    small, large = (planner.plan(budget) for budget in (planner.minimum().peak_bytes, 1 << 40))
    mesp = planner.plan(small.peak_bytes + (8 << 20), policy="mesp")
    assert mesp.train is not None
    assert large.train is not None
    assert "tightfit.dropout_lora_down" in {name for name, again in runs(made, mesp.train) if again}
    assert not any(again for _, again in runs(made, large.train))
    options: dict[str, Any] = {"lr": LR, "eval_data": "random", "seed": 5}
    first = run(small, "random", steps=STEPS, out=tmp_path / "small", **options)
    assert first["peak_bytes"]["measured"] <= small.peak_bytes
    run(mesp, "random", steps=2, out=tmp_path / "part", **options)
    again = run(large, "random", steps=STEPS, out=tmp_path / "part", resume=True, **options)
    assert again["resumed_step"] == 2
    assert first["loss"] == again["loss"]
    assert first["evaluation"]["after"]["loss"] == again["evaluation"]["after"]["loss"]
    assert adapter_hash(tmp_path / "small") == adapter_hash(tmp_path / "part")
    assert json.loads((tmp_path / "small" / "adapter" / CONFIG).read_text())["lora_dropout"] == P
    console = Console(file=io.StringIO(), width=200)
    console.print(profile_text(made))
    assert "LoRA rank 4 with dropout 0.2" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "LoRA rank 4 with dropout 0.2" in describe(small)


@pytest.mark.slow
def test_fleets_of_two_train_what_one_process_does(tmp_path: Path) -> None:
    """Data parallel, and as a pipeline whose first member takes forwards ahead; DoRA, whose members find the magnitudes
    of their layers.
    """
    workshop = Workshop(tmp_path, 3, layers=2, lora=dataclasses.replace(LORA, dora=True))
    options: dict[str, Any] = {"steps": 6, "lr": 1e-2, "seed": 3, "checkpoint_every": 0}
    expected = workshop.alone(tmp_path / "alone", **options)
    shared = workshop.fleet((2, 1), (("memory", "memory"), ("disk", "disk")))
    for name, fleet in (("data", shared), ("pipeline", workshop.pipeline((2,), (1, 0)))):
        found = ended(workshop.start(fleet, tmp_path / name, **options))
        assert [code for code, _ in found.values()] == [0, 0], found
        assert adapter_hash(tmp_path / name / "m0") == expected
