"""Steps of a mixture of experts that is written by hand, with tiles of every kind: losses and gradients of transformers
and peft.
"""

from __future__ import annotations

import pytest
import torch
from reference import MIXTURE, all_layers, errors_beside_peft, relative_error
from traced import (
    ALPHA,
    RANK,
    loss_and_gradients,
    random_batch,
    random_weights,
    shared_batch,
    trace_decoder,
)

from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.models.lora import OF_EXPERTS, LoraConfig

BATCH, SEQ = 4, 32
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TILES = {"all tokens": None, "two rows": 64, "half a row": 16}
ROUTED = MIXTURE | {"output_router_logits": True, "router_aux_loss_coef": 0.7}
ROWS = {"experts as they come": None, "one expert": 48}
CUT = [("all tokens", "experts as they come"), ("two rows", "one expert"), ("half a row", "one expert")]


@pytest.mark.slow_but_for("all tokens-experts as they come")
@pytest.mark.parametrize(("tile", "rows"), CUT)
def test_float32_loss_and_lora_gradients_match_autograd(tile: str, rows: str) -> None:
    weights, data = random_weights(MIXTURE, torch.float32), random_batch(MIXTURE, BATCH, SEQ)
    traced = trace_decoder(MIXTURE, torch.float32, BATCH, SEQ, tile=TILES[tile], matrix_rows=ROWS[rows])
    tiles = {layer.name: layer.program for layer in traced.layers}
    programs = {program.name: program for program in traced.programs}
    assert programs[tiles["model.layers.2"]].tiles == (1 if TILES[tile] is None else BATCH * SEQ // TILES[tile])
    slices = [t for t in traced.tensors if t.name.startswith("model.layers.2.mlp.experts.down_proj")]
    assert len(slices) == 6
    settings = all_layers(RANK, ALPHA) | {"target_modules": ATTENTION}
    of_loss, of_gradients = errors_beside_peft(traced, MIXTURE, weights, data, settings)
    assert of_loss < 1e-5
    assert len(of_gradients) == 2 * len(ATTENTION) * MIXTURE["num_hidden_layers"]
    assert max(of_gradients.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tile", ["all tokens", "half a row"])
def test_the_loss_of_routers_is_that_of_transformers(tile: str) -> None:
    weights, data = random_weights(ROUTED, torch.float32), random_batch(ROUTED, BATCH, SEQ)
    traced = trace_decoder(ROUTED, torch.float32, BATCH, SEQ, tile=TILES[tile], matrix_rows=48)
    settings = all_layers(RANK, ALPHA) | {"target_modules": ATTENTION}
    of_loss, of_gradients = errors_beside_peft(traced, ROUTED, weights, data, settings)
    assert of_loss < 1e-5
    assert max(of_gradients.values()) < 1e-4
    without, plain = loss_and_gradients(trace_decoder(MIXTURE, torch.float32, BATCH, SEQ), weights, data)
    loss, gradients = loss_and_gradients(traced, weights, data)
    assert (
        loss > without + 0.5
    )  # where it is smallest the loss of routers is its coefficient times the experts of a token
    assert max(relative_error(gradients[name], plain[name]) for name in plain) > 0.01


@pytest.mark.slow
def test_samples_that_share_a_row_keep_their_borders() -> None:
    weights, data = random_weights(MIXTURE, torch.float32), shared_batch(MIXTURE, BATCH, SEQ)
    loss, gradients = loss_and_gradients(trace_decoder(MIXTURE, torch.float32, BATCH, SEQ), weights, data)
    traced = trace_decoder(MIXTURE, torch.float32, BATCH, SEQ, tile=TILES["half a row"], matrix_rows=48)
    for compiled in (False, True):
        own_loss, own = loss_and_gradients(traced, weights, data, compiled=compiled)
        assert own_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert relative_error(own[name], gradient) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "rows"), CUT)
def test_pairs_of_experts_have_the_gradients_of_peft(tile: str, rows: str) -> None:
    lora = LoraConfig(rank=RANK, alpha=ALPHA, experts=True)
    weights, data = random_weights(MIXTURE, torch.float32, lora), random_batch(MIXTURE, BATCH, SEQ)
    traced = trace_decoder(MIXTURE, torch.float32, BATCH, SEQ, lora, TILES[tile], ROWS[rows])
    settings = all_layers(RANK, ALPHA) | {
        "target_modules": ATTENTION,
        "target_parameters": [f"experts.{name}" for name in OF_EXPERTS],
    }
    of_loss, of_gradients = errors_beside_peft(traced, MIXTURE, weights, data, settings)
    assert of_loss < 1e-5
    assert len(of_gradients) == 2 * len(ATTENTION) * MIXTURE["num_hidden_layers"] + 4 * sum(
        decoder_shape(MIXTURE).mixtures
    )
    assert max(of_gradients.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tile", ["all tokens", "half a row"])
def test_a_pair_of_experts_has_one_gradient(tile: str) -> None:
    lora = LoraConfig(rank=RANK, alpha=ALPHA, experts=True)
    traced = trace_decoder(MIXTURE, torch.bfloat16, BATCH, SEQ, lora, TILES[tile])
    layer = next(layer for layer in traced.layers if layer.name == "model.layers.2")
    program = next(program for program in traced.programs if program.name == layer.program)
    shapes = {tensor.name: tensor.shape for tensor in traced.tensors}
    for name in (name for name in layer.bindings.values() if "experts" in name and ".lora_" in name):
        same = [value for value in program.values if value.kind == "gradient" and value.shape == shapes[name]]
        like = [other for other in shapes if other.startswith("model.layers.2.") and shapes[other] == shapes[name]]
        assert len(same) == sum(".lora_" in other for other in like), name


@pytest.mark.slow
def test_a_sum_over_experts_has_one_storage() -> None:
    traced = trace_decoder(MIXTURE, torch.bfloat16, BATCH, SEQ)
    layer = next(layer for layer in traced.layers if layer.name == "model.layers.2")
    program = next(program for program in traced.programs if program.name == layer.program)
    for target, sums in (("tightfit.experts", 1), ("tightfit.experts_backward", 2)):
        calls = [step for step in program.operators if step.target == target]
        assert len(calls) == 6
        for number in range(sums):
            assert len({call.outputs[number] for call in calls}) == 1
    kinds = {value.name: value.dtype for value in program.values}
    assert kinds[calls[0].outputs[0]] == "float32"
