"""Shapes of published decoders, as their config.json says them: what `decoders.py` plans.

Only fields that change bytes or time are here (no token ids). Of multimodal models it is the text model's config:
vision, audio and multi-token-prediction layers are left out. `source` says where the numbers were read (2026-11-28).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HUB = "https://huggingface.co"
QWEN35: dict[str, Any] = {
    "model_type": "qwen3_5_text", "vocab_size": 248320, "head_dim": 256, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "max_position_embeddings": 262144, "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_section": [11, 11, 10], "mrope_interleaved": True},
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text", "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8, "head_dim": 256, "global_head_dim": 512, "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6, "sliding_window": 512, "final_logit_softcapping": 30.0, "max_position_embeddings": 131072,
    "attention_bias": False, "attention_k_eq_v": False, "enable_moe_block": False, "tie_word_embeddings": True,
    "rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip
PHI4_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898, 2.735880826,
    3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894,
    8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807,
    22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97,
    33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
"""Factors of Phi-4-mini's 48 rotary frequencies for sequences of more than 4096 tokens."""


@dataclass(frozen=True, kw_only=True)
class Published:
    config: dict[str, Any]
    source: str
    exact: int | None = None
    """Parameters in the published file, where that holds nothing but this decoder; a head that is the embedding counts
    once."""


def pattern(period: int, layers: int) -> list[str]:
    """Layer types, with full attention in every layer whose number is a multiple of `period`."""
    return ["sliding_attention" if number % period else "full_attention" for number in range(1, layers + 1)]


def qwen35(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, linear_heads: int, *, tied: bool
) -> dict[str, Any]:
    return QWEN35 | {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "linear_num_value_heads": linear_heads, "tie_word_embeddings": tied,
    }  # fmt: skip


MODELS: dict[str, Published] = {
    "qwen2.5-0.5b": Published(
        config={
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "max_position_embeddings": 32768, "tie_word_embeddings": True,
        },
        source=f"{HUB}/Qwen/Qwen2.5-0.5B/blob/main/config.json",
        exact=494_032_768,
    ),
    "qwen3-0.6b": Published(
        config={
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "max_position_embeddings": 40960, "attention_bias": False, "tie_word_embeddings": True,
        },
        source=f"{HUB}/Qwen/Qwen3-0.6B/blob/main/config.json",
        exact=596_049_920,
    ),
    "qwen3.5-0.8b": Published(
        config=qwen35(1024, 3584, 24, 8, 2, 16, tied=True),
        source=f"{HUB}/Qwen/Qwen3.5-0.8B, in scripts/models/qwen3.5-0.8B.sh of github.com/THUDM/slime and in the config.json of"
        f" {HUB}/oopere/Qwen3.5-0.65B-Base-Rearchitected, which was cut out of it",
    ),
    "llama-3.2-1b": Published(
        config={
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "rope_theta": 5e5, "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192},
            "tie_word_embeddings": True,
        },
        source=f"{HUB}/meta-llama/Llama-3.2-1B/blob/main/config.json",
        exact=1_235_814_400,
    ),
    "qwen3.5-2b": Published(
        config=qwen35(2048, 6144, 24, 8, 2, 16, tied=True),
        source=f"{HUB}/Qwen/Qwen3.5-2B, at apxml.com/models/qwen35-2b; heads of DeltaNet and tied head from its 4,548,221,488 bytes",
    ),
    "smollm3-3b": Published(
        config={
            "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5e6,
            "max_position_embeddings": 65536, "no_rope_layer_interval": 4, "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": True, "pad_token_id": 128004,
        },
        source=f"{HUB}/HuggingFaceTB/SmolLM3-3B/blob/main/config.json",
        exact=3_075_098_624,
    ),
    "phi-4-mini": Published(
        config={
            "model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 24, "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4,
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": PHI4_LONG},
            "sliding_window": 262144, "attention_bias": False, "tie_word_embeddings": True, "pad_token_id": 199999,
        },
        source=f"{HUB}/microsoft/Phi-4-mini-instruct/blob/main/config.json",
        exact=3_836_021_760,
    ),
    "qwen3-4b": Published(
        config={
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "max_position_embeddings": 40960, "attention_bias": False, "tie_word_embeddings": True,
        },
        source=f"{HUB}/Qwen/Qwen3-4B/blob/main/config.json",
        exact=4_022_468_096,
    ),
    "qwen3.5-4b": Published(
        config=qwen35(2560, 9216, 32, 16, 4, 32, tied=True),
        source=f"{HUB}/Qwen/Qwen3.5-4B, in the config.json of {HUB}/halen214/st01, a fine-tuned copy; tied head from its"
        " 9,319,828,320 bytes",
    ),
    "gemma-4-e2b": Published(
        config=GEMMA4 | {
            "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_key_value_heads": 1,
            "num_kv_shared_layers": 20, "use_double_wide_mlp": True, "layer_types": pattern(5, 35),
        },
        source=f"{HUB}/google/gemma-4-E2B-it, in the presets of github.com/keras-team/keras-hub and at"
        " ollama.com/library/gemma4:e2b-it-qat",
    ),
    "mistral-7b-v0.3": Published(
        config={
            "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
        },
        source=f"{HUB}/mistralai/Mistral-7B-v0.3/blob/main/config.json",
        exact=7_248_023_552,
    ),
    "gemma-4-e4b": Published(
        config=GEMMA4 | {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_key_value_heads": 2,
            "num_kv_shared_layers": 18, "use_double_wide_mlp": False, "layer_types": pattern(6, 42),
        },
        source=f"{HUB}/google/gemma-4-E4B-it, in the presets of github.com/keras-team/keras-hub and in the recipes of NVIDIA's"
        " Megatron Bridge",
    ),
    "qwen3.5-9b": Published(
        config=qwen35(4096, 12288, 32, 16, 4, 32, tied=False),
        source=f"{HUB}/Qwen/Qwen3.5-9B, at apxml.com/models/qwen35-9b, and the defaults of transformers'"
        " configuration_qwen3_5.py; the head of its own from llama.cpp's count of 8.95 billion parameters",
    ),
    "qwen3-30b-a3b": Published(
        config={
            "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "norm_topk_prob": True, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "max_position_embeddings": 40960, "tie_word_embeddings": False,
        },
        source=f"{HUB}/Qwen/Qwen3-30B-A3B/blob/main/config.json",
        exact=30_532_122_624,
    ),
    "llama-3.3-70b": Published(
        config={
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "rope_theta": 5e5, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        },
        source=f"{HUB}/meta-llama/Llama-3.3-70B-Instruct/blob/main/config.json, without its rope scaling",
        exact=70_553_706_496,
    ),
}  # fmt: skip
"""By name, from the smallest to the largest."""
