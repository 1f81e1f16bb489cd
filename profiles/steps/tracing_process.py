"""Traces steps, of training and of answers, in a process of its own, which has PyTorch and ends before anything is measured.

A process that has not loaded PyTorch does not load it: `traced_step` and `traced_answers` then start this module as a worker
(`tightfit.profiles.worker_process`). The worker knows a model by its description alone, as a service does that traces
for a device elsewhere.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.options import ProfileOptions, Progress
from tightfit.profiles.schema import TracedStep, adamw
from tightfit.profiles.sources.described import AnswersWanted, TracingRequest, described, described_source
from tightfit.profiles.sources.known_decoders import built_by_transformers
from tightfit.profiles.sources.prepared import PreparedModel
from tightfit.profiles.steps.answer_tracing import trace_answers
from tightfit.profiles.steps.choice import step_of
from tightfit.profiles.steps.decoder_step import DecoderStep
from tightfit.profiles.steps.prepared_step import MEASURING
from tightfit.profiles.weights.source import Source
from tightfit.profiles.worker_process import check_place, run_worker, work
from tightfit.runtime.common.interpreter import command, python_path

if TYPE_CHECKING:
    from tightfit.profiles.steps.step import ProfiledStep


TRACING_BYTES, TRANSFORMERS_BYTES = 416 << 20, 700 << 20
"""what the worker holds at most, for a hand-written family and for one that transformers builds"""
FAMILY_BYTES = 272 << 20
"""what it holds at most for the answers of a hand-written family: 253 MiB of Gemma 3's with 4 B parameters"""
DORA_BYTES, TILE_BYTES = 64 << 20, 5 << 20
"""what magnitudes of DoRA, and each tile, add"""


def tracing_request(step: ProfiledStep) -> TracingRequest:
    """What has to be known of a step to trace it elsewhere."""
    values = step.options.model_dump(mode="json", exclude=set(MEASURING), exclude_defaults=True)
    lora = asdict(step.lora) if isinstance(step, DecoderStep) and step.options.adapter is not None else None
    return TracingRequest(source=described(step.source), options=values, lora=lora)


def trace_requested(request: TracingRequest, report: Progress) -> PreparedModel:
    """What was asked for, traced in this process. Raises InputError for a model or options that cannot be used."""
    source = described_source(request.source)
    return PreparedModel(
        request=request,
        step=None if request.options is None else _step_requested(source, request).traced(report),
        answers=None if request.answers is None else trace_answers(source, request.answers),
        decoder=None if request.stored is None else built_by_transformers(source.config, request.stored),
        weights="elsewhere",
    )


def _step_requested(source: Source, request: TracingRequest) -> ProfiledStep:
    step = step_of(source, ProfileOptions.of(request.options or {}))
    if request.lora is not None and isinstance(step, DecoderStep):
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in request.lora.items()
        }
        step.lora = LoraConfig(**settings)
    return step


def check_tracing(step: ProfiledStep) -> None:
    """Raise InputError where the worker that traces the step has no place in the memory that is free."""
    if not traced_here(step):
        check_place("tracing", *what_it_takes(step))


def traced_here(step: ProfiledStep) -> bool:
    """Whether a step is traced in this process."""
    return "torch" in sys.modules or not step.worth_a_process


def what_it_takes(step: ProfiledStep) -> tuple[int, str]:
    """(bytes of the worker, what to do where they are not free)."""
    needed = TRACING_BYTES if handwritten(step.source.config) else TRANSFORMERS_BYTES
    needed += DORA_BYTES * step.options.dora
    if isinstance(step, DecoderStep) and step.tile is not None:
        needed += TILE_BYTES * (step.batch * step.seq // step.tile)
    return needed, "have the model traced on a machine with more memory: `tightfit prepare` there, or by a service"


def traced_step(step: ProfiledStep, report: Progress) -> TracedStep:
    """The step, traced here where PyTorch is loaded already, or has to be for a module's own code; else by a worker.

    Raises InputError for what cannot be traced, RunError if the worker fails.
    """
    if traced_here(step):
        return step.traced(report)
    needed, instead = what_it_takes(step)
    traced = _by_worker(tracing_request(step), needed, instead, report).training
    return traced.model_copy(update={"optimizer": adamw(step.options.accumulate)})


def answers_request(source: Source, wanted: AnswersWanted) -> TracingRequest:
    """What has to be known of a decoder to trace the steps of its answers elsewhere."""
    return TracingRequest(source=described(source), answers=wanted)


def traced_answers(source: Source, wanted: AnswersWanted) -> AnswerSteps:
    """The steps of a decoder's answers, traced here where PyTorch is loaded already; else by a worker.

    Raises InputError for a decoder that cannot answer with a cache, RunError if the worker fails.
    """
    if "torch" in sys.modules:
        return trace_answers(source, wanted)
    traced = _by_worker(
        answers_request(source, wanted),
        FAMILY_BYTES if handwritten(source.config) else TRANSFORMERS_BYTES,
        "have the model traced by a service (`--server URL`), or prepare it on a machine with more memory (`tightfit prepare --weights`)"
        " and ask the folder",
        lambda stage, done, total: None,
    ).answers
    assert traced is not None
    return traced


def _by_worker(request: TracingRequest, needed: int, instead: str, report: Progress) -> PreparedModel:
    result = run_worker(
        command(__name__),
        request.model_dump(mode="json"),
        os.environ | {"PYTHONPATH": python_path()},
        doing="tracing",
        predicted_bytes=needed,
        instead=instead,
        on_message=lambda message: report(message["stage"], message["done"], message["total"]),
    )
    return PreparedModel.model_validate(result)


def _trace(request: dict[str, Any], report: Progress) -> dict[str, Any]:
    return trace_requested(TracingRequest.model_validate(request), report).model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(work(_trace))
