"""Where the values of a step lie: those that live at once share no bytes, and no more is taken than a count by hand
says.
"""

from __future__ import annotations

import pytest
from decoder_families import FAMILIES
from reference import CONFIGS

from tightfit.planner.generation.decoder_form import Layout, layout
from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.profiles.models.transformers_decoder import facts
from tightfit.profiles.schema import Layer, Value
from tightfit.profiles.steps.answer_tracing import answer_steps
from tightfit.profiles.weights.describe import describe
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP


def place_of(found: Layout, layer: Layer, value: Value) -> tuple[int, int] | None:
    """The bytes of a value that a step makes; None: it is given."""
    if value.kind in ("weight", "constant", "batch"):
        return None
    bound = layer.bindings.get(value.name)
    at = found.own[layer.program][value.name] if bound is None else found.passed[bound]
    return at, at + value.bytes


def steps_of(name: str) -> AnswerSteps:
    if name in CONFIGS:
        return answer_steps(CONFIGS[name], describe(CONFIGS[name]), 0)
    config = FAMILIES[name] | {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
    stored = [tensor.name for tensor in facts(config).tensors]
    return answer_steps(config, stored, 60)


@pytest.mark.slow_but_for("gemma3_text-6-4")
@pytest.mark.parametrize(
    ("name", "layers", "programs"),
    [
        ("llama", 5, 3),
        ("gemma3_text", 6, 4),  # two kinds of layers, before and after them
        ("OLMo 3", 8, 5),  # and the first, whose input is shaped otherwise
    ],
)
def test_layers_that_are_alike_share_a_program_and_values_that_live_at_once_share_no_bytes(
    name: str, layers: int, programs: int
) -> None:
    for step in steps_of(name).steps:
        assert (len(step.layers), len(step.programs)) == (layers, programs)
        found = layout(step)
        by_name = {program.name: program for program in step.programs}
        written: dict[tuple[int, int], tuple[int, str]] = {}
        """bytes of the memory -> (layer or -1, value) that they hold"""
        for number, layer in enumerate(step.layers):
            values = {value.name: value for value in by_name[layer.program].values}
            for operator in by_name[layer.program].operators:
                for read in operator.inputs:
                    span = place_of(found, layer, values[read])
                    if span is not None:
                        bound = layer.bindings.get(read)
                        assert written[span] == ((number, read) if bound is None else (-1, bound))
                for made in filter(None, operator.outputs):
                    span = place_of(found, layer, values[made])
                    assert span is not None
                    assert span[1] <= found.bytes
                    written = {at: held for at, held in written.items() if at[1] <= span[0] or span[1] <= at[0]}
                    bound = layer.bindings.get(made)
                    written[span] = (number, made) if bound is None else (-1, bound)


def test_a_step_takes_as_many_bytes_as_its_widest_moment() -> None:
    """While the second of two wide rows is made: two hidden states that pass between layers, the one that attention has
    been added to, its norm, and the two wide rows, of which the first then takes their product.
    """
    config = CONFIGS["llama"] | {"intermediate_size": 512}
    _, group = answer_steps(config, describe(config), 0).steps
    floats = 4 * config["hidden_size"] + 2 * config["intermediate_size"] + 16  # and the cosines and sines
    assert layout(group).bytes == 4 * GROUP * floats
