"""Qwen 2 and 2.5: biases on q, k and v; with ``use_sliding_window`` the upper layers have a sliding window."""

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


FAMILY = Family(
    model_type="qwen2",
    always_biased=True,
    output_bias=False,
    layer_types=upper_layers_slide,
    gguf=GgufFacts(architecture="qwen2"),
)
