"""Llama 2 and 3, and models of the same architecture (SmolLM2, TinyLlama, ...)."""

from tightfit.profiles.models.family import Family, GgufFacts

FAMILY = Family(model_type="llama", gguf=GgufFacts(architecture="llama", permuted=True))
