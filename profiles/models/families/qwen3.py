"""Qwen 3 (dense): a norm over each head of q and k; sliding windows as in Qwen 2.

The text model of Qwen3-VL is the same: the three positions of a token are equal in a text, and what it adds to the
outputs of its first layers are features of images.
"""

from tightfit.profiles.models.families.qwen2 import upper_layers_slide
from tightfit.profiles.models.family import Family, GgufFacts

WRAPPED = {"num_key_value_heads": 32, "head_dim": 128, "rope_theta": 500_000.0}

FAMILY = Family(
    model_type="qwen3",
    wrapped_as=dict.fromkeys(("qwen3_vl", "qwen3_vl_text"), WRAPPED),
    head_norm=True,
    layer_types=upper_layers_slide,
    gguf=GgufFacts(architecture="qwen3"),
)
