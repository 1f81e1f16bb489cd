"""Traces the steps of a decoder's answers, in this process, whoever wrote its layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from tightfit.profiles.models.answer_steps import Answers, AnswerStep, AnswerSteps, operand_of, refused_answers
from tightfit.profiles.models.answering_family import AnsweringFamily
from tightfit.profiles.models.decoder_config import first_lengths, handwritten
from tightfit.profiles.tracing.recorded import trace_forward
from tightfit.profiles.tracing.repeated_layers import traced_by_kinds
from tightfit.profiles.tracing.traced import Trace
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError, TightfitError
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.generation.names import HELD, IDS, POSITIONS, PROJECTION

if TYPE_CHECKING:
    from tightfit.profiles.models.answering_decoder import AnsweringDecoder


def trace_answers(source: Source) -> Answers:
    """The steps of a decoder's answers, or why it cannot answer with a cache."""
    config = source.config
    fewest = {0} if handwritten(config) else {0, *(length + 1 for length in first_lengths(config))}
    try:
        return Answers(steps={tokens: answer_steps(config, source.entries, tokens) for tokens in sorted(fewest)})
    except InputError as error:
        return Answers(steps={}, refused=str(error))


def answer_steps(config: dict[str, Any], stored: Collection[str], longest: int, *, group: int = GROUP) -> AnswerSteps:
    """The steps of one token and of `group` tokens of a config's decoder, in answers of up to `longest` tokens with
    what was asked; `stored` are the names of the tensors in its store.

    Raises InputError for a decoder that cannot answer with a cache.
    """
    name = str(config.get("model_type"))
    modules = [(tokens, _opened(config, tokens, longest)) for tokens in (1, group)]
    steps: list[AnswerStep] = []
    numbers: dict[str, list[float]] = {}
    for tokens, module in modules:
        step, constants = _step(module, tokens, name)
        numbers |= {constant: value.flatten().tolist() for constant, value in constants.items()}
        missing = sorted(_held(step).difference(stored, numbers))
        if missing:
            raise refused_answers(name, f"it reads a constant ({missing[0]}) that no checkpoint holds")
        if not _side_by_side(step):
            raise refused_answers(name, "its matrix products read rows that do not lie one after the other")
        steps.append(step)
    one, several = ([_read(layer, call) for layer, call in step.calls if call.target == PROJECTION] for step in steps)
    if one != several or len(set(one)) != len(one):
        raise refused_answers(name, "it multiplies with a matrix more than once in a step")
    _, decoder = modules[-1]
    head = decoder.head
    return AnswerSteps(
        steps=steps,
        numbers=numbers,
        head=next(name for name, parameter in decoder.named_parameters() if parameter is head.weight),
        bias=None if getattr(head, "bias", None) is None else f"{decoder.head_name}.bias",
        cap=decoder.cap,
        vocab=len(decoder.embedding.weight),
    )


def _opened(config: dict[str, Any], tokens: int, longest: int) -> AnsweringFamily | AnsweringDecoder:
    if handwritten(config):
        return AnsweringFamily(config)
    from tightfit.profiles.models.answering_decoder import AnsweringDecoder

    return AnsweringDecoder(config, tokens=tokens, longest=longest)


def _step(
    module: AnsweringFamily | AnsweringDecoder, tokens: int, name: str
) -> tuple[AnswerStep, dict[str, torch.Tensor]]:
    """The step of so many tokens, and the constants that it reads and no store holds."""
    if why := module.refuse_by_modules():
        raise refused_answers(name, why)
    constants: dict[str, torch.Tensor] = {}

    def trace() -> Trace:
        sample = {part: torch.zeros(1, tokens, dtype=torch.int64) for part in (IDS, POSITIONS)}
        traced, read = trace_forward(module, sample)
        constants.update(read)
        return traced

    try:
        with module.without_values():
            traced = traced_by_kinds(module, trace)
    except TightfitError:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise refused_answers(name, f"its code fails on new tokens ({first_line})") from error
    if why := module.refuse():
        raise refused_answers(name, why)
    step = AnswerStep(tokens=tokens, programs=traced.programs, layers=traced.layers, result=traced.loss)
    return step, constants


def _held(step: AnswerStep) -> set[str]:
    """Names of what a step reads of the store."""
    programs = {program.name: program for program in step.programs}
    return {
        layer.bindings[value.name]
        for layer in step.layers
        for value in programs[layer.program].values
        if value.kind in HELD
    }


def _side_by_side(step: AnswerStep) -> bool:
    """Whether the rows of several groups lie one after the other, where those of each group do, in what is multiplied
    with matrices, what is made so, and the result.
    """
    for program in step.programs:
        values = {value.name: value for value in program.values}
        for call in program.operators:
            if call.target == PROJECTION:
                x, product = operand_of(call.args[0]), values[str(call.outputs[0])]
                rows = [
                    (x["size"], x["stride"], values[x["value"]]),
                    (product.shape, product.stride, product),
                ]
                for size, stride, value in rows:
                    if len(size) != 2 or stride[1] != 1 or value.dtype != "float32":
                        return False
                    if step.tokens > 1 and (size[0] != step.tokens or 4 * size[0] * stride[0] != value.bytes):
                        return False
    return True


def _read(layer: Any, call: Any) -> str:
    """The matrix in the store that a projection multiplies with."""
    matrix: str = layer.bindings[operand_of(call.args[1])["value"]]
    return matrix
