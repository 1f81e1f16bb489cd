"""Llama 2 and 3, and all that is built like them (SmolLM2, TinyLlama, ...)."""

from tightfit.profiles.models.family import Family, GgufFacts

FAMILY = Family(model_type="llama", gguf=GgufFacts(architecture="llama", permuted=True))
