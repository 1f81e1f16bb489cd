"""Profiles of decoders of published shapes, traced without weights; seconds by roofline for a device that was measured."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from profiles.decoder import Decoder, decoder_shape
from profiles.describe import describe
from profiles.devices import find_device
from profiles.estimate import estimate_profile
from profiles.register import DECOMPOSITIONS
from profiles.schema import Model, Profile
from profiles.store import find_extent
from profiles.trace import trace

QWEN_3B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
"""Qwen2.5-3B's config.json, its 36 layers left to choose"""
ON = "zen4-2core"
"""the device that the seconds, the disk and the floor are estimated for"""


def decoder_profile(layers: int, *, batch: int = 1, seq: int = 256, **config: Any) -> Profile:
    """LoRA of rank 8 on `layers` layers of Qwen2.5-3B (or what `config` changes), 4-bit base."""
    settings = QWEN_3B | config | {"num_hidden_layers": layers}
    with FakeTensorMode():
        module = Decoder(decoder_shape(settings), dtype=torch.bfloat16, rank=8, alpha=16.0)
        sample = {name: torch.zeros(batch, seq, dtype=torch.int64) for name in ("input_ids", "labels")}
    traced = trace(module, sample, decompositions=DECOMPOSITIONS)
    entries = describe(settings)
    tensors = [
        tensor.model_copy(update={"packed_bytes": find_extent(entries, tensor.name).bytes})
        if tensor.kind == "weight"
        else tensor
        for tensor in traced.tensors
    ]
    on = find_device(ON)
    unmeasured = Profile(
        fingerprint=f"benchmark-{layers}",
        model=Model(name=f"decoder-{layers}", source="benchmark", kind="decoder", config=settings),
        batch=batch,
        seq=seq,
        compute_dtype="bfloat16",
        device=on.device(),
        tensors=tensors,
        programs=traced.programs,
        layers=traced.layers,
        loss=traced.loss,
        token_losses=traced.token_losses,
    )
    return estimate_profile(unmeasured, on)
