"""Qwen 3 (dense): a norm over each head of q and k; sliding windows as in Qwen 2."""

from tightfit.profiles.models.families.qwen2 import upper_layers_slide
from tightfit.profiles.models.family import Family, GgufFacts

FAMILY = Family(
    model_type="qwen3", head_norm=True, layer_types=upper_layers_slide, gguf=GgufFacts(architecture="qwen3")
)
