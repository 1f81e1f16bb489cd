"""The families of decoders that tests compare with transformers and PEFT, each by a tiny config with something of all
that is its own; the table of docs/models.md is made of this list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightfit.profiles.models.decoder_config import handwritten

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.3 * i for i in range(8)]
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "parallel_attn": True, "bias": False, "alibi": False,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPS = {
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | more}


def sized(model_type: str, **more: Any) -> dict[str, Any]:
    return SIZES | {"model_type": model_type} | more


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama, no scaling": sized("llama"),
    "Llama 3.x, llama3 scaling": sized(
        "llama", **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    ),
    "Llama, linear scaling": sized("llama", **rope("linear", factor=2.0)),
    "Llama, dynamic scaling": sized("llama", **rope("dynamic", factor=2.0)),
    "Llama, yarn scaling": sized("llama", **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "Llama, longrope scaling, short": sized(
        "llama", **rope("longrope", factor=2.0, original_max_position_embeddings=32, short_factor=SHORT, long_factor=LONG)
    ),
    "Llama, longrope scaling, long": sized(
        "llama", **rope("longrope", factor=8.0, original_max_position_embeddings=8, short_factor=SHORT, long_factor=LONG)
    ),
    "Mistral": sized("mistral", sliding_window=5),
    "Ministral": sized("ministral", head_dim=16, **SLIDING),
    "Ministral 3": sized("ministral3", head_dim=16),
    "Qwen2, Qwen2.5": sized("qwen2"),
    "Qwen3": sized("qwen3", head_dim=16),
    "Qwen3.5 (text)": sized(
        "qwen3_5_text", head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        **rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
    ),
    "Gemma 2": sized("gemma2", head_dim=16, sliding_window=5, query_pre_attn_scalar=16, tie_word_embeddings=True),
    "Gemma 3 (text)": sized("gemma3_text", head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=True, **SLIDING),
    "Gemma 4 (text)": sized(
        "gemma4_text", num_hidden_layers=4, head_dim=16, global_head_dim=32, sliding_window=5, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=2,
    ),
    "Phi-3": sized("phi3"),
    "Phi-4-mini": sized(
        "phi3", original_max_position_embeddings=32,
        **rope("longrope", partial_rotary_factor=0.75, original_max_position_embeddings=32, short_factor=SHORT[:6], long_factor=LONG[:6]),
    ),
    "SmolLM3": sized("smollm3", no_rope_layer_interval=2),
    "OLMo": sized("olmo"),
    "OLMo 2": sized("olmo2"),
    "OLMo 3": sized("olmo3", **SLIDING),
    "Granite": sized("granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.1),
    "GPT-2": GPT | {"model_type": "gpt2"},
    "GPT-NeoX, Pythia": sized("gpt_neox", hidden_act="gelu"),
    "StableLM": sized("stablelm", layer_norm_eps=1e-5),
    "StableLM 2 12B": sized("stablelm", layer_norm_eps=1e-5, qk_layernorm=True, use_parallel_residual=True),
    "Falcon, multi-query": FALCON | {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False},
    "Falcon, grouped": FALCON | {"model_type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True},
    "EXAONE 4": sized("exaone4", **SLIDING),
    "GLM-4 (glm)": sized("glm", head_dim=16, **rope("default", partial_rotary_factor=0.5)),
    "GLM-4-0414 (glm4)": sized("glm4", head_dim=16, **rope("default", partial_rotary_factor=0.5)),
    "LFM2": sized("lfm2", layer_types=["conv", "full_attention"]),
    "StarCoder2": sized("starcoder2"),
    "Command R": sized("cohere", logit_scale=0.0625),
    "Command R7B": sized("cohere2", logit_scale=0.25, **SLIDING),
    "Phi-1, Phi-2": sized("phi"),
    "Helium": sized("helium", head_dim=16),
    "Arcee": sized("arcee"),
    "Nemotron": sized("nemotron"),
    "Seed-OSS": sized("seed_oss", head_dim=16),
    "ERNIE 4.5": sized("ernie4_5", head_dim=16),
    "Hunyuan, dense": sized("hunyuan_v1_dense", head_dim=16),
    "Apertus": sized("apertus"),
    "GPT-J": GPT | {"model_type": "gptj", "rotary_dim": 8},
    "OPT": sized("opt", ffn_dim=96, word_embed_proj_dim=64),
    "BLOOM": {"model_type": "bloom", "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Qwen3-MoE": sized("qwen3_moe", head_dim=16, **EXPERTS),
    "Qwen2-MoE": sized("qwen2_moe", shared_expert_intermediate_size=48, **EXPERTS),
    "Mixtral": sized("mixtral", num_local_experts=6, num_experts_per_tok=2),
    "OLMoE": sized("olmoe", **EXPERTS),
    "Granite-MoE": sized("granitemoe", num_local_experts=6, num_experts_per_tok=2, embedding_multiplier=3.0, logits_scaling=2.0),
    "DeepSeek-V3": sized("deepseek_v3", **{"n_routed_experts": 6} | GROUPS | LATENT),
    "GLM-4.5": sized("glm4_moe", head_dim=16, n_routed_experts=6, **GROUPS),
    "Phi-3.5-MoE": sized("phimoe", num_local_experts=6, num_experts_per_tok=2),
    "ERNIE 4.5, MoE": sized("ernie4_5_moe", moe_num_experts=6, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=1),
    "gpt-oss": sized(
        "gpt_oss", head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=5, intermediate_size=32,
        layer_types=["sliding_attention", "full_attention"], **rope("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "Hunyuan, MoE": sized("hunyuan_v1_moe", head_dim=16, num_experts=6, moe_topk=2),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Forms:
    """What a trace has of a family's attention, in the words of the table; tests compare it with the trace."""

    rotation: str = "in attention"
    """Where queries and keys are rotated."""
    attention: str = "operator"
    """What runs as our operator and what as traced."""
    rows_apart: str | None = None
    """Why samples cannot share rows."""


WINDOWS = "operator, sliding windows"
BEFORE, PARTLY, NOWHERE = "before attention", "in attention, not in all layers", "none"
FORMS: dict[str, Forms] = {
    **dict.fromkeys(("Mistral", "Ministral", "Gemma 3 (text)", "Gemma 4 (text)", "OLMo 3"), Forms(attention=WINDOWS)),
    **dict.fromkeys(
        ("Ministral 3", "Phi-4-mini", "GPT-NeoX, Pythia", "StableLM", "StableLM 2 12B"), Forms(rotation=BEFORE)
    ),
    **dict.fromkeys(
        ("GLM-4 (glm)", "GLM-4-0414 (glm4)", "Command R", "Phi-1, Phi-2", "Helium"), Forms(rotation=BEFORE)
    ),
    **dict.fromkeys(("Nemotron", "ERNIE 4.5", "Hunyuan, dense", "GPT-J"), Forms(rotation=BEFORE)),
    **dict.fromkeys(("GLM-4.5", "ERNIE 4.5, MoE", "Hunyuan, MoE"), Forms(rotation=BEFORE)),
    "gpt-oss": Forms(
        rotation=BEFORE,
        attention="as traced",
        rows_apart="its GptOssAttention computes more than tightfit's attention",
    ),
    "DeepSeek-V3": Forms(
        rotation=BEFORE,
        attention="as traced",
        rows_apart="its DeepseekV3Attention computes more than tightfit's attention",
    ),
    "Gemma 2": Forms(
        rotation=BEFORE, attention="as traced", rows_apart="its Gemma2Attention computes more than tightfit's attention"
    ),
    **dict.fromkeys(
        ("Falcon, multi-query", "Falcon, grouped"),
        Forms(rotation=BEFORE, attention="as traced", rows_apart="attention is recognised in 0 of its 2 layers"),
    ),
    **dict.fromkeys(("GPT-2", "OPT"), Forms(rotation=NOWHERE)),
    "Qwen3.5 (text)": Forms(
        rotation=BEFORE,
        attention="operator, gated DeltaNet as traced",
        rows_apart="its Qwen3_5GatedDeltaNet mixes neighbouring tokens",
    ),
    "LFM2": Forms(
        attention="operator, convolutions as traced", rows_apart="its Lfm2ShortConv mixes neighbouring tokens"
    ),
    "SmolLM3": Forms(rotation=PARTLY),
    "EXAONE 4": Forms(rotation=PARTLY, attention=WINDOWS),
    "Command R7B": Forms(rotation=BEFORE, attention=WINDOWS),
    "BLOOM": Forms(rotation=NOWHERE, attention="as traced", rows_apart="its code takes no positions"),
}
"""Families whose forms are not the usual ones."""

MIXTURES = (
    "Qwen3-MoE", "Qwen2-MoE", "Mixtral", "OLMoE", "Granite-MoE", "DeepSeek-V3", "GLM-4.5", "Phi-3.5-MoE", "ERNIE 4.5, MoE",
    "Hunyuan, MoE", "gpt-oss",
)  # fmt: skip
NO_ANSWERS = {
    **dict.fromkeys(MIXTURES, "it is a mixture of experts"),
    "Qwen3.5 (text)": "its Qwen3_5GatedDeltaNet mixes neighbouring tokens",
    "Gemma 2": "its Gemma2Attention computes more than tightfit's attention",
    "Falcon, multi-query": "attention is recognised in 0 of its 2 layers",
    "Falcon, grouped": "attention is recognised in 0 of its 2 layers",
    "LFM2": "its Lfm2ShortConv mixes neighbouring tokens",
    "BLOOM": "its code takes no positions",
}
"""Families that `tightfit generate` refuses, and the reason that it gives."""


def table() -> list[str]:
    """The table of docs/models.md."""
    lines = [
        "| family | `model_type` | code | rotation | attention | samples | answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, config in FAMILIES.items():
        forms = FORMS.get(family, Forms())
        rows = "share rows" if forms.rows_apart is None else "have rows of their own"
        code = "tightfit" if handwritten(config) else "transformers"
        cells = f"{forms.rotation} | {forms.attention} | {rows} | {'no' if family in NO_ANSWERS else 'yes'}"
        lines.append(f"| {family} | `{config['model_type']}` | {code} | {cells} |")
    return lines
