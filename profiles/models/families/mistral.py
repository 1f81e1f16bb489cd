"""Mistral: a sliding window on every layer, unless the config has none.

GGUF files of Mistral name the llama architecture.
"""

from tightfit.profiles.models.family import SLIDING, Config, Family, LayerTypes


def _layer_types(config: Config, layers: int, window: int | None) -> LayerTypes:
    return ([SLIDING] * layers if window else None), window


FAMILY = Family(model_type="mistral", output_bias=False, window=4096, layer_types=_layer_types)
