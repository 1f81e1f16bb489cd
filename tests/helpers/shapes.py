"""Makes profiles of decoders with published shapes, traced without weights, with seconds estimated for a described
device.
"""

from __future__ import annotations

from typing import Any

import torch
from traced import trace_decoder

from tightfit.profiles.devices.data_sheets import find_device
from tightfit.profiles.devices.estimate import estimate_profile
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.schema import Model, Profile
from tightfit.profiles.weights.describe import describe
from tightfit.runtime.engine.weights.store import find_extent

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
"""Qwen2.5-3B's config.json without its number of layers (36)."""
ON = "zen4-2core"
"""The described device whose seconds, disk and floor the profiles have."""


TRACED = 3
"""Number of layers that are traced; deeper decoders repeat the last one, since all later layers share its program."""


def decoder_profile(layers: int, *, batch: int = 1, seq: int = 256, **config: Any) -> Profile:
    """A profile of LoRA with rank 8 on `layers` layers of Qwen2.5-3B, 4-bit base; `config` overrides fields of the
    config.
    """
    settings = QWEN_3B | config | {"num_hidden_layers": min(layers, TRACED)}
    traced = trace_decoder(settings, torch.bfloat16, batch, seq, LoraConfig())
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
    return estimate_profile(deepened(unmeasured, layers), on)


def deepened(profile: Profile, layers: int) -> Profile:
    """A copy of the profile with the decoder's last layer repeated until there are `layers` layers."""
    *body, last, head = profile.layers
    own = (f"{last.name}.", f"{last.name}/")
    tensors, repeated, before = [], [last], last.name
    for number in range(len(body), layers):
        name = f"model.layers.{number}"
        names = {last.name: name, body[-1].name: repeated[-1].name}
        bindings = {value: _renamed(bound, names) for value, bound in last.bindings.items()}
        repeated.append(last.model_copy(update={"name": name, "bindings": bindings}))
        tensors += [
            tensor.model_copy(update={"name": _renamed(tensor.name, names)})
            for tensor in profile.tensors
            if tensor.name.removeprefix("grad:").startswith(own)
        ]
    head = head.model_copy(
        update={"bindings": {v: _renamed(bound, {before: repeated[-1].name}) for v, bound in head.bindings.items()}}
    )
    return profile.model_copy(update={"layers": [*body, *repeated, head], "tensors": [*profile.tensors, *tensors]})


def _renamed(name: str, names: dict[str, str]) -> str:
    """The tensor name with its layer's name replaced by way of `names`: ``model.layers.2/out0``,
    ``grad:model.layers.2.mlp.weight``.
    """
    for old, new in names.items():
        for end in "./":
            for prefix in ("", "grad:"):
                if name.startswith(f"{prefix}{old}{end}"):
                    return f"{prefix}{new}{name[len(prefix) + len(old) :]}"
    return name
