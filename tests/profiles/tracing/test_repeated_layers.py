"""One layer of each kind is traced, and gives the same trace as all layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference import CONFIGS, MIXTURE, VARIANTS

from tightfit.profiles.models.decoder import Decoder
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.sources.random_weights import random_source
from tightfit.profiles.steps.decoder_trace import trace_decoder
from tightfit.profiles.tracing.repeated_layers import representatives
from tightfit.profiles.tracing.traced import Trace

LAYERS = 8
ADAPTERS = {
    "in some layers": LoraConfig(rank=4, layers=(3, 4, 6)),
    "of several ranks": LoraConfig(rank=4, rank_pattern={r".*\.4\..*q_proj": 2}, dropout=0.1),
    "with DoRA": LoraConfig(rank=4, dora=True, dropout=0.1),
    "with the embedding": LoraConfig(rank=4, modules_to_save=("embed_tokens", "lm_head")),
}
ROUTED = MIXTURE | {"output_router_logits": True}
MIXTURES = {"experts but for one layer": ROUTED}


def decoder_config(name: str) -> dict[str, Any]:
    config = (CONFIGS | VARIANTS | MIXTURES)[name] | {"num_hidden_layers": LAYERS}
    kinds = config.get("layer_types")
    return config | ({"layer_types": (kinds * LAYERS)[:LAYERS]} if kinds else {})


def traced(config: dict[str, Any], lora: LoraConfig) -> Trace:
    source = random_source(config, Path("config.json"))
    return trace_decoder(source, 1, 16, lora, "bfloat16", lambda stage, done, total: None)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        *(("llama", adapter) for adapter in ADAPTERS),
        *((family, "in some layers") for family in ("gemma3_text", *MIXTURES)),
    ],
)
def test_the_trace_is_that_of_all_layers(family: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, lora = decoder_config(family), ADAPTERS[adapter]
    of_kinds = traced(config, lora)
    monkeypatch.setattr(Decoder, "block_kinds", lambda self: list(range(LAYERS)))
    of_all = traced(config, lora)
    assert len(of_all.layers) > LAYERS
    assert of_kinds == of_all


def test_few_layers_are_traced() -> None:
    source = random_source(decoder_config("llama"), Path("config.json"))
    _, decoder = trace_decoder(source, 1, 16, LoraConfig(rank=4), "bfloat16", lambda stage, done, total: None)
    assert [name for name, _ in decoder.model.layers.named_children()] == ["0", "1"]


def test_a_layer_is_represented_by_the_first_of_its_kind() -> None:
    assert representatives("abbcba") == [0, 1, 1, 3, 1, 0]
