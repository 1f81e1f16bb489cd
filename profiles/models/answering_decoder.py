"""A decoder that transformers builds, as the step of an answer: new tokens and their positions in, hidden states out,
and attention to a cache that is not part of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tightfit.profiles.models.answer_steps import MIXTURE, AnswerStep, AnswerSteps, operand_of, refused_answers
from tightfit.profiles.models.decoder_module import without_values
from tightfit.profiles.models.experts import Experts
from tightfit.profiles.models.transformers_decoder import AnyDecoder, facts
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS
from tightfit.profiles.tracing.trace import trace_forward
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.generation.names import HELD, IDS, POSITIONS, PROJECTION

MOST_SEEN = 1 << 17
"""tokens up to which a model's attention masks are looked at, where its config names no length"""


class AnsweringDecoder(AnyDecoder):
    """forward(input_ids [1, t], positions [1, t]) -> hidden states float32 [t, H], after the last norm, scaled as the
    head wants them.

    `longest` is the number of tokens of a prompt and its answer. Raises InputError as `AnyDecoder` does.
    """

    def __init__(self, config: Mapping[str, Any], *, tokens: int, longest: int) -> None:
        super().__init__(config, dtype=torch.float32, seq=tokens, lora=None, longest=longest)
        self.context.answering = getattr(self.model.config, "max_position_embeddings", None) or MOST_SEEN

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        with self.recognition.active():
            made = self.model(input_ids=input_ids, position_ids=positions, use_cache=False)
        return made[0].reshape(-1, made[0].shape[-1]) * self.scale  # type: ignore[no-any-return]

    def refuse_by_modules(self) -> str | None:
        """Why its modules cannot answer with a cache; None: nothing speaks against them."""
        if any(isinstance(child, Experts) for child in self.modules()):
            return MIXTURE
        return f"its {self.mixing} mixes neighbouring tokens" if self.mixing else None

    def refuse(self) -> str | None:
        """Why its code, which has been traced, cannot answer with a cache; None: it can."""
        layers = self.model.config.num_hidden_layers
        if self.context.others:
            return f"its {self.context.others[0]} computes more than tightfit's attention"
        if self.context.attended != layers:
            return f"attention is recognised in {self.context.attended} of its {layers} layers"
        return None


def answer_steps(config: Mapping[str, Any], stored: Collection[str], *, group: int, longest: int) -> AnswerSteps:
    """The steps of one token and of `group` tokens of a config's decoder, in answers of up to `longest` tokens with
    what was asked; `stored` are the names of the tensors in its store.

    Raises InputError for a decoder that cannot answer with a cache.
    """
    name = str(config.get("model_type"))

    def refused(why: str) -> InputError:
        return refused_answers(name, why)

    steps, cap = [], None
    for tokens in (1, group):
        module = AnsweringDecoder(config, tokens=tokens, longest=longest)
        if "position_ids" not in inspect.signature(module.model.forward).parameters:
            raise refused("its code takes no positions")
        if why := module.refuse_by_modules():
            raise refused(why)
        with FakeTensorMode():
            without_values(module)
            sample = {part: torch.zeros(1, tokens, dtype=torch.int64) for part in (IDS, POSITIONS)}
        cap = module.cap
        made = trace_forward(module, sample, DECOMPOSITIONS)
        why = module.refuse()
        if why is not None:
            raise refused(why)
        steps.append(AnswerStep(tokens=tokens, programs=made.programs, layers=made.layers, result=made.loss))
        missing = sorted(_held(steps[-1]).difference(stored))
        if missing:
            raise refused(f"it reads a constant ({missing[0]}) that no checkpoint holds")
        if not _side_by_side(steps[-1]):
            raise refused("its matrix products read rows that do not lie one after the other")
    one, several = ([_read(layer, call) for layer, call in step.calls if call.target == PROJECTION] for step in steps)
    if one != several or len(set(one)) != len(one):
        raise refused("it multiplies with a matrix more than once in a step")
    found = facts(config)
    bias = found.head.removesuffix("weight") + "bias"
    return AnswerSteps(
        steps=steps,
        head=found.head if found.head in stored else found.embedding,
        bias=bias if bias in stored else None,
        cap=cap,
        vocab=found.config["vocab_size"],
    )


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
                x, made = operand_of(call.args[0]), values[str(call.outputs[0])]
                read = values[x["value"]]
                rows = [(x["size"], x["stride"], read), (made.shape, made.stride, made)]
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
