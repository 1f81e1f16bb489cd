"""Qwen 3 as a mixture of experts (30B-A3B, 235B-A22B): as the dense one, with experts in the place of MLPs."""

from collections.abc import Callable
from typing import Any

from tightfit.profiles.models.families.qwen2 import upper_layers_slide
from tightfit.profiles.models.family import GGUF_NAMES, Family, GgufFacts

NAMES = GGUF_NAMES | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


def _gguf_settings(have: Callable[..., Any], layers: int, width: int, head_dim: int) -> dict[str, Any]:
    return {
        "num_experts": have("expert_count"),
        "num_experts_per_tok": have("expert_used_count"),
        "moe_intermediate_size": have("expert_feed_forward_length"),
        "norm_topk_prob": True,  # as llama.cpp has it
    }


FAMILY = Family(
    model_type="qwen3_moe",
    head_norm=True,
    mixture=True,
    layer_types=upper_layers_slide,
    gguf=GgufFacts(architecture="qwen3moe", names=NAMES, settings=_gguf_settings),
)
