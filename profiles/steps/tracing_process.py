"""Traces steps, of training and of answers, in a process of its own, which has PyTorch and ends before anything is
measured.

A process that has not loaded PyTorch does not load it: `traced_step`, `traced_answers` and `traced_bundle` then start
this module as a worker (`tightfit.profiles.worker_process`). The worker knows a model by its description alone, as a
service does that makes a bundle for a device elsewhere.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.models.answer_steps import Answers
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.schema import TracedStep
from tightfit.profiles.sources.bundle import Bundle, BundleRequest
from tightfit.profiles.sources.random_weights import random_source
from tightfit.profiles.sources.transformers_source import any_random_source, built_decoder
from tightfit.profiles.steps.bundled_step import MEASURING
from tightfit.profiles.steps.choice import step_of
from tightfit.profiles.steps.decoder_step import DecoderStep
from tightfit.profiles.steps.step import ProfiledStep, of_source
from tightfit.profiles.weights.source import Source
from tightfit.profiles.worker_process import check_place, run_worker, work
from tightfit.runtime.common.children import own_environment
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.start.cuda_stubs import built_for_cuda

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel


TAKE_A_BUNDLE = (
    "take a bundle of the model: `tightfit prepare` makes it on a machine with more memory, or a service does"
)
TRACING_BYTES, TRANSFORMERS_BYTES = 416 << 20, 700 << 20
"""what the worker holds at most, for a hand-written family and for one that transformers builds"""
FAMILY_BYTES = 272 << 20
"""what it holds at most for the answers of a hand-written family: 259 MiB of Gemma 3's with 4 B parameters"""
DORA_BYTES, TILE_BYTES = 64 << 20, 5 << 20
"""what magnitudes of DoRA, and each tile, add"""
CUDA_BYTES = 640 << 20
"""what CUDA's libraries add, most of it pages of files: 588 to 617 MiB with PyTorch 2.14.1, which no stubs serve here,
since all of PyTorch looks for their kernels as it is imported
"""


def request_of(model: BundleRequest, options: ProfileOptions) -> BundleRequest:
    """The request for a bundle of a model, which is described, with the step that the options ask for. Raises
    InputError for options that it cannot have.
    """
    bare = Source(
        name=model.name,
        kind="described",
        path=model.name,
        config=model.config,
        fingerprint="",
        has_weights=False,
        entries={},
        tensors=lambda: (),
    )
    step = step_of(bare, options)
    values = options.model_dump(mode="json", exclude=set(MEASURING), exclude_defaults=True)
    lora = asdict(step.lora) if isinstance(step, DecoderStep) and options.adapter is not None else None
    return model.model_copy(update={"options": values, "lora": lora})


def make_bundle(request: BundleRequest, report: Progress) -> Bundle:
    """The bundle that was asked for, traced in this process. Raises InputError for a model or options that cannot be
    used.
    """
    source = _described(request)
    step = _step_of(source, request).traced(report)
    return Bundle(request=request, step=step, answers=trace_answers(source), decoder=source.decoder)


def _described(request: BundleRequest) -> Source:
    """The model of a request, without weights."""
    path = Path(request.name)
    if handwritten(request.config):
        source = random_source(request.config, path)
    else:
        source = any_random_source(request.config, path, built_decoder(request.config, request.stored))
    return replace(source, name=request.name, path=request.name, note="")


def _step_of(source: Source, request: BundleRequest) -> ProfiledStep:
    step = step_of(source, ProfileOptions.of(request.options))
    if request.lora is not None and isinstance(step, DecoderStep):
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in request.lora.items()
        }
        step.lora = LoraConfig(**settings)
    return step


def trace_answers(source: Source) -> Answers:
    """The steps of a decoder's answers, or why it cannot answer with a cache, traced in this process."""
    from tightfit.profiles.steps import answer_tracing  # it imports PyTorch

    return answer_tracing.trace_answers(source)


def check_tracing(step: ProfiledStep) -> None:
    """Raise InputError where the worker that traces the step has no place in the memory that is free."""
    if not traced_here(step):
        check_place("tracing", *what_it_takes(step))


def traced_here(step: ProfiledStep) -> bool:
    """Whether a step is traced in this process."""
    return "torch" in sys.modules or not step.worth_a_process


def _tracing_bytes(config: dict[str, Any]) -> int:
    return (TRACING_BYTES if handwritten(config) else TRANSFORMERS_BYTES) + _cuda_bytes()


def _cuda_bytes() -> int:
    return CUDA_BYTES if built_for_cuda() else 0


def what_it_takes(step: ProfiledStep) -> tuple[int, str]:
    """(bytes of the worker, what to do where they are not free)."""
    needed = _tracing_bytes(step.source.config)
    needed += DORA_BYTES * step.options.dora
    if isinstance(step, DecoderStep) and step.tile is not None:
        needed += TILE_BYTES * (step.batch * step.seq // step.tile)
    return needed, TAKE_A_BUNDLE


def traced_step(step: ProfiledStep, report: Progress) -> TracedStep:
    """The step, traced here where PyTorch is loaded already, or has to be for a module's own code; else by a worker.

    Raises InputError for what cannot be traced, RunError if the worker fails.
    """
    if traced_here(step):
        return step.traced(report)
    request = request_of(BundleRequest(name=step.source.name, config=step.source.config), step.options)
    traced = TracedStep.model_validate(_by_worker("step", request, *what_it_takes(step), report))
    return of_source(traced, step.source, step.options.accumulate)


def traced_answers(source: Source) -> Answers:
    """The steps of a decoder's answers, traced here where PyTorch is loaded already; else by a worker. Raises RunError
    if the worker fails.
    """
    if "torch" in sys.modules:
        return trace_answers(source)
    request = BundleRequest(name=source.name, config=source.config)
    return Answers.model_validate(
        _by_worker("answers", request, FAMILY_BYTES + _cuda_bytes(), TAKE_A_BUNDLE, lambda *_: None)
    )


def traced_bundle(request: BundleRequest, report: Progress) -> Bundle:
    """The bundle that is asked for, made here where PyTorch is loaded already; else by a worker.

    Raises InputError for what cannot be traced, RunError if the worker fails.
    """
    if "torch" in sys.modules:
        return make_bundle(request, report)
    needed = _tracing_bytes(request.config)
    instead = "make the bundle on a machine with more memory"
    return Bundle.model_validate(_by_worker("bundle", request, needed, instead, report))


def _by_worker(what: str, request: BundleRequest, needed: int, instead: str, report: Progress) -> Any:
    return run_worker(
        command(__name__),
        {"what": what, "request": request.model_dump(mode="json")},
        own_environment(),
        doing="tracing",
        predicted_bytes=needed,
        instead=instead,
        on_message=lambda message: report(message["stage"], message["done"], message["total"]),
    )


WORK: dict[str, Callable[[BundleRequest, Progress], BaseModel]] = {
    "step": lambda request, report: _step_of(_described(request), request).traced(report),
    "answers": lambda request, report: trace_answers(_described(request)),
    "bundle": make_bundle,
}
"""what of a model is traced -> how"""


def _trace(order: dict[str, Any], report: Progress) -> dict[str, Any]:
    return WORK[order["what"]](BundleRequest.model_validate(order["request"]), report).model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(work(_trace))
