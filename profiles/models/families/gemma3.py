"""Gemma 3 (text): four norms per layer that multiply by 1 + weight, scaled embeddings, every sixth layer with full
attention.
"""

from collections.abc import Callable
from typing import Any

from tightfit.profiles.models.family import FULL, GGUF_NAMES, SLIDING, Config, Family, GgufFacts, LayerTypes
from tightfit.runtime.common.errors import InputError

PERIOD, WINDOW = 6, 4096
NAMES = GGUF_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _layer_types(config: Config, layers: int, window: int | None) -> LayerTypes:
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or PERIOD
    if isinstance(period, bool) or not isinstance(period, int) or period <= 0:
        raise InputError(f"config field 'sliding_window_pattern' must be a positive whole number, not {period!r}")
    return [SLIDING if (i + 1) % period else FULL for i in range(layers)], window or WINDOW


def _gguf_settings(have: Callable[..., Any], layers: int, width: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": have("attention.sliding_window", 512 if layers == 26 else 1024),
        "sliding_window_pattern": PERIOD,
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": width if layers == 62 else head_dim,  # 62 layers: the 27B model
    }


FAMILY = Family(
    model_type="gemma3_text",
    wrapped_as={"gemma3": {}},
    head_dim=256,
    activation="gelu_pytorch_tanh",
    tied=True,
    theta=1_000_000.0,
    local_theta=True,
    head_norm=True,
    unit_offset=True,
    post_norms=True,
    scaled_embedding=True,
    padding=0,
    attention_scalar=256.0,
    layer_types=_layer_types,
    gguf=GgufFacts(architecture="gemma3", names=NAMES, norm_offset=1.0, settings=_gguf_settings),
)
