"""Steps whose frozen matrices are multiplied a slice of rows at a time: the same losses and gradients as with whole
ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import CONFIGS, VARIANTS, all_layers, errors_beside_peft, relative_error
from traced import (
    ALPHA,
    RANK,
    loss_and_gradients,
    random_batch,
    random_weights,
    trace_decoder,
)

from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.sources.random_weights import random_source
from tightfit.profiles.steps.choice import step_of
from tightfit.profiles.tracing.traced import Trace
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.operators import projection_backward

BATCH, SEQ, ROWS = 3, 24, 24


def slices_of(traced: Trace, name: str) -> list[tuple[int, ...]]:
    """(rows, columns) of the weights that a matrix is cut into, in order."""
    return [tuple(t.shape) for t in traced.tensors if t.name == name or t.name.startswith(f"{name}[")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "llama with biases"])
def test_float32_loss_and_lora_gradients_match_autograd(family: str) -> None:
    """Of the same samples in transformers and peft. Most matrices have a last slice that is smaller."""
    config = (CONFIGS | VARIANTS)[family]
    weights, data = random_weights(config, torch.float32), random_batch(config, BATCH, SEQ)
    traced = trace_decoder(config, torch.float32, BATCH, SEQ, matrix_rows=ROWS)
    rows = config["intermediate_size"]
    sizes = [size for size, _ in slices_of(traced, "model.layers.1.mlp.up_proj.weight")]
    assert sizes == [ROWS] * (rows // ROWS) + [rows % ROWS] * (rows % ROWS > 0)
    settings = all_layers(RANK, ALPHA)
    of_loss, of_gradients = errors_beside_peft(traced, config, weights, data, settings)
    assert of_loss < 1e-5
    assert len(of_gradients) == 14 * config["num_hidden_layers"]
    assert max(of_gradients.values()) < 1e-4


@pytest.mark.slow
def test_slices_of_matrices_and_tiles_of_the_batch_go_together() -> None:
    config, tile = CONFIGS["llama"], SEQ // 2
    weights, data = random_weights(config, torch.float32), random_batch(config, BATCH, SEQ)
    loss, gradients = loss_and_gradients(trace_decoder(config, torch.float32, BATCH, SEQ), weights, data)
    traced = trace_decoder(config, torch.float32, BATCH, SEQ, tile=tile, matrix_rows=ROWS)
    programs = {program.name: program.tiles for program in traced.programs}
    assert BATCH * SEQ // tile in programs.values()
    for compiled in (False, True):
        own_loss, own = loss_and_gradients(traced, weights, data, compiled=compiled)
        assert own_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert relative_error(own[name], gradient) < 1e-4, name


@pytest.mark.slow
def test_what_slices_contribute_to_a_gradient_is_summed_in_float32_and_in_place() -> None:
    config = CONFIGS["llama"]
    traced = trace_decoder(config, torch.bfloat16, BATCH, SEQ, matrix_rows=ROWS)
    layer = next(layer for layer in traced.layers if layer.name == "model.layers.1")
    program = next(program for program in traced.programs if program.name == layer.program)
    kinds = {value.name: value.dtype for value in program.values}
    local = {name: value for value, name in layer.bindings.items()}
    matrix = [local[n] for n in local if n.startswith("model.layers.1.mlp.down_proj.weight[")]
    steps = [op for op in program.operators if op.phase == "backward" and set(op.inputs) & set(matrix)]
    assert len(steps) == len(matrix) > 2
    sums = {step.outputs[0] for step in steps[:-1]}
    assert len(sums) == 1, "every slice but the last adds to one sum"
    assert kinds[next(iter(sums))] == "float32"
    assert kinds[steps[-1].outputs[0]] == "bfloat16"


def test_bfloat16_sums_of_slices_are_as_exact_as_the_whole_product() -> None:
    torch.manual_seed(3)
    dy, weight = torch.randn(300, 512).bfloat16(), torch.randn(512, 96).bfloat16()
    exact = dy.double() @ weight.double()
    whole, sliced = torch.empty(300, 96, dtype=torch.bfloat16), torch.empty(300, 96, dtype=torch.bfloat16)
    projection_backward(dy, weight, None, None, None, out=(whole,))
    total = torch.empty(300, 96)
    for number in range(8):
        rows = slice(64 * number, 64 * number + 64)
        last = number == 7
        given = None if number == 0 else total
        dtype, out = (None, sliced) if last else (torch.float32, total)
        projection_backward(dy[:, rows], weight[rows], None, None, given, dtype, out=(out,))
    assert relative_error(sliced.double(), exact) < 1.5 * relative_error(whole.double(), exact) + 1e-3


@pytest.mark.slow
def test_a_whole_matrix_is_cut_by_itself_where_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from tightfit.profiles.models import projection

    config = CONFIGS["llama"] | {"intermediate_size": 1024}
    width = config["hidden_size"]
    monkeypatch.setattr(projection, "MATRIX_BYTES", 256 * width * 2)
    traced = trace_decoder(config, torch.bfloat16, BATCH, SEQ)
    assert slices_of(traced, "model.layers.0.mlp.gate_proj.weight") == [(256, width)] * 4
    assert slices_of(traced, "model.layers.0.self_attn.q_proj.weight") == [(width, width)]


@pytest.mark.slow
def test_pairs_with_dropout_or_magnitudes_take_whole_matrices() -> None:
    config = CONFIGS["llama"]
    for lora in (LoraConfig(rank=4, dora=True), LoraConfig(rank=4, dropout=0.1)):
        traced = trace_decoder(config, torch.float32, BATCH, SEQ, lora, matrix_rows=ROWS)
        assert len(slices_of(traced, "model.layers.0.mlp.gate_proj.weight")) == 1


@pytest.mark.parametrize("other", [{"dora": True}, {"lora_dropout": 0.1}])
def test_rows_that_are_asked_for_in_vain_are_refused(other: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"matrix_rows=32: with .* leave one of them out"):
        step_of(random_source(CONFIGS["llama"], Path("tiny")), ProfileOptions(matrix_rows=32, **other))  # type: ignore[arg-type]
