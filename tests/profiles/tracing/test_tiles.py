"""Steps whose layers take a part of the batch at a time: the same losses and gradients as of all tokens at once."""

from __future__ import annotations

import pytest
import torch
from reference import (
    CONFIGS,
    VARIANTS,
    all_layers,
    errors_beside_peft,
    relative_error,
)
from traced import (
    ALPHA,
    RANK,
    loss_and_gradients,
    random_batch,
    random_weights,
    shared_batch,
    trace_decoder,
)

from tightfit.profiles.models import decoder_module
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.schema import Operator, Program
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.sources.random_weights import random_source
from tightfit.profiles.steps.choice import step_of
from tightfit.profiles.tracing.tiles import in_tiles
from tightfit.profiles.tracing.traced import Trace
from tightfit.runtime.common.errors import InputError

BATCH, SEQ = 4, 32
TILES = {"two rows": 64, "a row": 32, "half a row": 16, "an eighth of a row": 4}


def tiles_of(traced: Trace) -> dict[str, int]:
    """Tiles of each layer's program, by the layer's name."""
    programs = {program.name: program.tiles for program in traced.programs}
    return {layer.name: programs[layer.program] for layer in traced.layers}


@pytest.mark.slow_but_for("gemma3_text-half a row")
@pytest.mark.parametrize(
    ("family", "tile"),
    [*(("llama", tile) for tile in TILES), *((family, "half a row") for family in [*CONFIGS, *VARIANTS][1:])],
)
def test_float32_loss_and_lora_gradients_match_autograd(
    family: str, tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same samples in transformers and peft. The head takes two tiles at a time where these are small."""
    monkeypatch.setattr(decoder_module, "HEAD_TOKENS", 32)
    config = (CONFIGS | VARIANTS)[family]
    weights, data = random_weights(config, torch.float32), random_batch(config, BATCH, SEQ)
    traced = trace_decoder(config, torch.float32, BATCH, SEQ, tile=TILES[tile])
    count = BATCH * SEQ // TILES[tile]
    assert tiles_of(traced)["model.layers.1"] == count
    assert tiles_of(traced)["head"] == min(count, BATCH * SEQ // 32)
    settings = all_layers(RANK, ALPHA)
    of_loss, of_gradients = errors_beside_peft(traced, config, weights, data, settings)
    assert of_loss < 1e-5
    assert len(of_gradients) == 14 * config["num_hidden_layers"]
    assert max(of_gradients.values()) < 1e-4


@pytest.mark.slow_but_for("half a row")
@pytest.mark.parametrize("tile", ["half a row", "an eighth of a row"])
def test_samples_that_share_a_row_keep_their_borders(tile: str) -> None:
    """Borders lie inside tiles and between them; the reference is the step of all tokens at once, which is held against
    autograd.
    """
    config = CONFIGS["gemma3_text"]
    weights, data = random_weights(config, torch.float32), shared_batch(config, BATCH, SEQ)
    loss, gradients = loss_and_gradients(trace_decoder(config, torch.float32, BATCH, SEQ), weights, data)
    traced = trace_decoder(config, torch.float32, BATCH, SEQ, tile=TILES[tile])
    for compiled in (False, True):
        own_loss, own = loss_and_gradients(traced, weights, data, compiled=compiled)
        assert own_loss == pytest.approx(loss, rel=1e-5)
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert relative_error(own[name], gradient) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [LoraConfig(rank=4, dora=True), LoraConfig(rank=4, modules_to_save=("embed_tokens", "lm_head"))],
    ids=["dora", "tables"],
)
def test_what_else_is_trained_has_the_same_gradients(lora: LoraConfig) -> None:
    config = CONFIGS["llama"]
    whole = trace_decoder(config, torch.float32, BATCH, SEQ, lora)
    generator = torch.Generator().manual_seed(0)
    weights = {
        tensor.name.split("[")[0]: torch.randn(tensor.shape, generator=generator) * 0.1
        + (tensor.name.endswith("vector.weight") * 1.0)
        for tensor in whole.tensors
        if tensor.kind in ("constant", "trainable", "weight") and "[" not in tensor.name
    }
    weights |= {
        tensor.name: torch.randn(tensor.shape, generator=generator) * 0.1
        for tensor in whole.tensors
        if tensor.kind == "trainable" and "[" in tensor.name
    }
    weights |= {name: values for name, values in random_weights(config, torch.float32).items() if name not in weights}
    data = random_batch(config, BATCH, SEQ)
    loss, gradients = loss_and_gradients(whole, weights, data)
    own_loss, own = loss_and_gradients(trace_decoder(config, torch.float32, BATCH, SEQ, lora, tile=16), weights, data)
    assert own_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert relative_error(own[name], gradient) < 1e-4, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": 24}, "give 4 or 8 or 16 or 32, or leave it out"),
        ({"tile": 96}, "give 8 or 16 or 32 or 64, or leave it out"),
        ({"tile": 64, "loss": "dpo"}, "the two answers of a pair"),
        ({"tile": 64, "lora_dropout": 0.1}, "lora_dropout"),
        ({"tile": 0}, "give the tokens of a tile here"),
    ],
)
def test_tiles_that_do_not_share_out_the_batch_are_refused(options: dict[str, object], words: str, tmp_path) -> None:
    source = random_source(CONFIGS["llama"], tmp_path / "config.json")
    with pytest.raises(InputError, match=words):
        step_of(source, ProfileOptions.of({"batch": 4, "seq": 32} | options))


@pytest.mark.parametrize("name", ["tile", "matrix_rows"])
def test_steps_without_them_refuse_tiles_and_slices(name: str, tmp_path) -> None:
    source = random_source(CONFIGS["llama"], tmp_path / "config.json")
    with pytest.raises(InputError, match=f"^{name} 64: a side network .*; leave the option out$"):
        step_of(source, ProfileOptions.of({"side_rank": 4, name: 64}))
    with pytest.raises(InputError, match=f"^{name} 64: .* is a module, whose operators run on whole tensors; leave"):
        step_of(resolve("examples.own_module:cnn"), ProfileOptions.of({name: 64}))
    with pytest.raises(InputError, match=r"^lora_rank 4: a side network has no adapter; leave the option out$"):
        step_of(source, ProfileOptions.of({"side_rank": 4, "lora_rank": 4}))


def test_all_tokens_in_one_tile_are_no_tile(tmp_path) -> None:
    source = random_source(CONFIGS["llama"], tmp_path / "config.json")
    settings = [
        step_of(source, ProfileOptions.of({"batch": 4, "seq": 32, "tile": tile})).settings(print)
        for tile in (None, 128)
    ]
    assert settings[0] == settings[1]


def program(*targets: str) -> Program:
    operators = [Operator(target=target, phase="forward", args=[], inputs=[], outputs=[]) for target in targets]
    return Program(name="p", values=[], operators=operators)


@pytest.mark.parametrize(
    ("targets", "most", "found"),
    [
        ("abcdeabcdeabcdeabcde", 4, (4, 5)),
        ("abcdeabcdeabcdeabcdexy", 4, (4, 5)),
        ("abcdeabcdf", 2, (1, 0)),
        ("abcdefghabcdefgh", 4, (2, 8)),
        ("aaaa", 4, (1, 0)),
    ],
)
def test_equal_runs_are_found(targets: str, most: int, found: tuple[int, int]) -> None:
    made = in_tiles(program(*targets), most)
    assert (made.tiles, made.tile_operators) == found
