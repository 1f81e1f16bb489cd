"""Steps of answers of hand-written decoders: of any number of tokens, and traced without what takes memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from places import SOURCES
from reference import CONFIGS, VARIANTS

from tightfit.profiles.steps.answer_tracing import answer_steps
from tightfit.profiles.weights.describe import describe
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3 with biases"])
def test_the_step_of_fewer_tokens_is_the_one_that_would_be_traced(name: str) -> None:
    config = (CONFIGS | VARIANTS)[name]
    steps = answer_steps(config, describe(config), 0)
    for tokens in (1, 5, GROUP - 1):
        assert steps.step_of(tokens) == answer_steps(config, describe(config), 0, group=tokens).steps[1]
    cut = steps.model_copy(update={"steps": [steps.steps[0].model_copy(update={"result": "other"}), steps.steps[1]]})
    assert cut.step_of(5) is cut.steps[1]  # they differ in more than numbers


@pytest.mark.slow
def test_neither_transformers_nor_the_export_of_pytorch_is_imported() -> None:
    code = f"""
import sys
from tightfit.profiles.steps.answer_tracing import answer_steps
from tightfit.profiles.weights.describe import describe
config = {CONFIGS["gemma3_text"]!r}
answer_steps(config, describe(config), 0)
print(*(name for name in ("transformers", "sympy", "torch.export._trace", "torch._dynamo.eval_frame") if name in sys.modules))
"""
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
