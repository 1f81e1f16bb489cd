"""Qwen 2 and 2.5: biases on q, k and v; with ``use_sliding_window`` the upper layers have a sliding window.

The text models of Qwen2-VL and Qwen2.5-VL are the same: the three positions of a token are equal in a text.
"""

from tightfit.profiles.models.family import FULL, SLIDING, Config, Family, GgufFacts, LayerTypes
from tightfit.runtime.common.errors import InputError


def upper_layers_slide(config: Config, layers: int, window: int | None) -> LayerTypes:
    """With ``use_sliding_window``, layers from number ``max_window_layers`` on have a sliding window."""
    if not config.get("use_sliding_window"):
        return None, window
    full = config.get("max_window_layers", 28)
    if isinstance(full, bool) or not isinstance(full, int):
        raise InputError(f"config field 'max_window_layers' must be a whole number, not {full!r}")
    return [SLIDING if i >= full else FULL for i in range(layers)], window


WRAPPED = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": 4096,
    "max_window_layers": 80,
}

FAMILY = Family(
    model_type="qwen2",
    wrapped_as=dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), WRAPPED),
    always_biased=True,
    output_bias=False,
    layer_types=upper_layers_slide,
    gguf=GgufFacts(architecture="qwen2"),
)
