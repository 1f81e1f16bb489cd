"""Independent references: the same small decoders in transformers + peft, trained by PyTorch autograd."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from tightfit.profiles.schema import Profile
from tightfit.runtime.engine.training.adapter import initialise
from tightfit.runtime.engine.weights.store import Store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 256, "hidden_act": "silu",
    },
    "qwen2": {
        "model_type": "qwen2", "vocab_size": 300, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 256, "rope_theta": 1e6, "hidden_act": "silu",
    },
    "gemma3_text": {
        "model_type": "gemma3_text", "vocab_size": 640, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "max_position_embeddings": 256, "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3 with biases": CONFIGS["llama"] | {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    "gemma3_text with biases": CONFIGS["gemma3_text"] | {"attention_bias": True},
    "llama with biases": CONFIGS["llama"] | {"attention_bias": True, "mlp_bias": True},
    "mistral": CONFIGS["llama"] | {"model_type": "mistral", "sliding_window": 8},
}
"""Configs with switches on that the families' configs above leave off."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(
    config: dict[str, Any], weights: dict[str, Tensor], rank: int, alpha: float, dtype: torch.dtype
) -> torch.nn.Module:
    """A transformers + peft model with the given weights (base and LoRA, by Hugging Face name) loaded."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="sdpa"
    )
    model = model.to(dtype)
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, task_type="CAUSAL_LM", target_modules=TARGETS, lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, lora)
    wrapped.train()
    theirs = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            theirs[peft_name(name, theirs)].copy_(value)
    return wrapped


def starting_weights(made: Profile, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights that a run of a profile starts from, by tightfit's names: the dequantised base, with matrices in
    `dtype`, and the adapter's initial values.
    """
    weights: dict[str, Tensor] = {}
    assert made.model.store is not None
    with Store.open(made.model.store) as store:
        for name, entry in store.entries.items():
            weights[name] = torch.empty(entry.shape, dtype=torch.float32 if len(entry.shape) == 1 else dtype)
            store.load(name, weights[name])
    for tensor in made.tensors:
        if tensor.kind == "trainable":
            weights[tensor.name] = torch.empty(tensor.shape)
            initialise(tensor.name, 0, weights[tensor.name])
    return weights


def peft_name(name: str, theirs: dict[str, Any]) -> str:
    stem, _, last = name.rpartition(".")
    for candidate in (
        f"base_model.model.{name}",
        f"base_model.model.{stem}.base_layer.{last}",
        f"base_model.model.{stem}.default.{last}",
    ):
        if candidate in theirs:
            return candidate
    raise KeyError(name)
