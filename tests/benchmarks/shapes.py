"""Profiles of decoders of published shapes, traced without weights; seconds by roofline, with rates as measured here."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from profiles.decoder import Decoder, decoder_shape
from profiles.describe import describe
from profiles.estimate import estimate_program, estimate_tensor
from profiles.register import DECOMPOSITIONS
from profiles.schema import Channel, Device, Floor, Model, Profile
from profiles.store import find_extent
from profiles.trace import trace
from profiles.units import MIB

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
FLOPS_PER_SECOND = {"bfloat16": 8e11, "float32": 3.5e11}
BYTES_PER_SECOND = 1.2e10
CALL_SECONDS = 1e-5
READ = Channel(bytes_per_second=1.35e9, latency_seconds=4e-5, compute_seconds_per_byte=1.4e-10)
WRITE = Channel(bytes_per_second=2.5e9, latency_seconds=7e-5, compute_seconds_per_byte=1.6e-10)
FLOOR = Floor(import_peak_bytes=124 * MIB, resident_bytes=115 * MIB, instruction_bytes=50)
"""rates and floor as measured on two cores with AMX"""


def decoder_profile(layers: int, *, batch: int = 1, seq: int = 256, **config: Any) -> Profile:
    """LoRA of rank 8 on `layers` layers of Qwen2.5-3B (or what `config` changes), 4-bit base."""
    settings = QWEN_3B | config | {"num_hidden_layers": layers}
    with FakeTensorMode():
        module = Decoder(decoder_shape(settings), dtype=torch.bfloat16, rank=8, alpha=16.0)
        sample = {name: torch.zeros(batch, seq, dtype=torch.int64) for name in ("input_ids", "labels")}
    traced = trace(module, sample, decompositions=DECOMPOSITIONS)
    entries = describe(settings)
    tensors = []
    for tensor in traced.tensors:
        packed = find_extent(entries, tensor.name).bytes if tensor.kind == "weight" else 0
        tensors.append(
            estimate_tensor(tensor.model_copy(update={"packed_bytes": packed}), bytes_per_second=BYTES_PER_SECOND)
        )
    programs = [
        estimate_program(
            program,
            flops_per_second=FLOPS_PER_SECOND,
            bytes_per_second=BYTES_PER_SECOND,
            call_seconds=CALL_SECONDS,
        )
        for program in traced.programs
    ]
    return Profile(
        fingerprint=f"benchmark-{layers}",
        model=Model(name=f"decoder-{layers}", source="benchmark", kind="decoder", config=settings),
        batch=batch,
        seq=seq,
        compute_dtype="bfloat16",
        device=Device(name="two cores", kind="cpu", threads=2, measured=False, floor=FLOOR, read=READ, write=WRITE),
        tensors=tensors,
        programs=programs,
        layers=traced.layers,
        loss=traced.loss,
        token_losses=traced.token_losses,
    )
