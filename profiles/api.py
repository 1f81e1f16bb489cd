"""The profiler's entry point: `profile` traces and measures a model on a device and returns a `Profile`.

`load_profile` and `save_profile` of `tightfit.profiles.io` are re-exported here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

from tightfit.profiles.devices.data_sheets import DeviceDescription, find_device
from tightfit.profiles.devices.estimate import estimate_profile
from tightfit.profiles.io import checked_json, load_profile, parse_profile, save_profile
from tightfit.profiles.measuring.cpu_load import crowded, our_cores, taken_now
from tightfit.profiles.measuring.cpu_quota import quota_cores, useful_threads
from tightfit.profiles.measuring.figures import measured, unmeasured
from tightfit.profiles.measuring.measure import measure
from tightfit.profiles.measuring.tile_rates import fast_tile, tried_sizes
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.schema import PROFILE_VERSION, Profile, TracedStep
from tightfit.profiles.sources.bundle import Bundle, BundleRequest, PackedWeights
from tightfit.profiles.sources.lookup import headers, is_traced, names_module, resolve, resolve_traced, vocabulary
from tightfit.profiles.sources.storing import stored_weights, storing_bytes
from tightfit.profiles.steps.choice import step_of
from tightfit.profiles.steps.decoder_step import DecoderStep, tile_sizes
from tightfit.profiles.steps.step import ProfiledStep
from tightfit.profiles.steps.tracing_process import (
    check_tracing,
    request_of,
    traced_bundle,
    traced_here,
    traced_step,
    what_it_takes,
)
from tightfit.profiles.weights.source import Source
from tightfit.profiles.worker_process import have_place
from tightfit.runtime.common.cache import cache_place, keep, kept
from tightfit.runtime.common.children import own_environment
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.interpreter import PACKAGE
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.processor import cpu_name, features
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.cpu import native_dropout
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.lean_torch import installed_version
from tightfit.runtime.engine.weights import native
from tightfit.runtime.engine.weights.layout import Header, read_header

__all__ = ["Progress", "bundle_request", "load_profile", "prepare", "profile", "save_profile"]

LIBRARIES = (native, native_dropout, page_out)
"""modules whose libraries are compiled on this machine"""
MEASURING_CODE = ("runtime/common", "runtime/engine", "runtime/supervision", "profiles/measuring", "profiles/schema.py")
"""Source files that determine what is measured of an operator or a process, whatever the model."""
CODE = (
    *MEASURING_CODE,
    "profiles/models",
    "profiles/sources",
    "profiles/steps",
    "profiles/tracing",
    "profiles/weights",
    "profiles/api.py",
    "profiles/worker_process.py",
)
"""Source files that determine a profile's figures: a change in any of them invalidates the cached profiles."""


@keywords_of(ProfileOptions)
def profile(source: str | os.PathLike[str], options: ProfileOptions) -> Profile:
    """Trace and measure one training step of `source` on this machine, or trace it and estimate its times for another
    `device`.

    `source` is anything that `tightfit.profiles.sources.lookup.resolve` takes; `device` is "cpu" (this machine) or
    anything that `tightfit.profiles.devices.data_sheets.find_device` takes. The step has `batch` samples (default: 1)
    of `seq` tokens (default: 256); a module:factory brings its own sample batch instead. The gradients of `accumulate`
    steps make one optimizer update. `dtype` is the type of activations and unpacked weights (default: bfloat16 for
    language models, float32 for a module of your own). `threads` defaults to all cores that this process may use, or to
    what a CPU quota (a container's `--cpus`) leaves of them.

    With `side_rank` the step is that of a side network beside `source` instead
    (`tightfit.profiles.models.side_network`), whose adapters of that rank read the outputs of `side_blocks` of its
    blocks (default: 8, or all): what a server trains where a device runs the model (the policy `mobillm`). It has no
    LoRA pairs.

    What is trained of a language model is an adapter (`tightfit.profiles.models.lora.LoraConfig`): LoRA pairs of
    `lora_rank` (default 8) and `lora_alpha` (default: twice the rank) on the linear layers that `lora_targets` and
    `lora_layers` ("0-3,8") choose, by default all of them; or what the settings of the adapter in the folder `adapter`
    say, so that a run can start from it.

    With a `loss` of "dpo" or "orpo" the step learns from pairs of answers (`tightfit.runtime.engine.cpu.preference`):
    `batch` of them, each in two rows, or as many as share these. `beta` (default 0.1) is how much the comparison of the
    two weighs.

    `tile` tokens go through a layer at a time (default: all); 0 stands for the fewest with which products with the
    model's widest matrix keep their speed on this machine (`tightfit.profiles.measuring.tile_rates`).

    `base` and `embeddings` are the precision, 4bit, 8bit or 16bit, of matrices and of the embedding and the head that
    the source does not hold quantised; what it holds quantised is kept, code for code. By default matrices are rounded
    to 4 bits, and embeddings are treated as matrices are (`tightfit.profiles.weights.precision`).

    Weights, where the source has them, are first packed into a store in the cache, tensor by tensor. A cached profile
    with the same fingerprint is returned at once, except with `force`, or if it was measured while other programs kept
    the cores busy and the cores are idle now. An estimate touches no weights, measures nothing and is not cached.

    `bundle` is a folder of `prepare`, from which the step is taken instead of tracing it. `memory` are the bytes that
    measuring may hold (default: what it measures best with). `progress` is called now and then.

    Raises InputError for a source, shape or device that cannot be used, or what has no place in the memory that is
    free, RunError if packing or measuring fails.
    """
    elsewhere = None if options.device == "cpu" else find_device(options.device)
    threads = _threads(options.threads, elsewhere)
    opened, bundle = resolve_traced(source, options.bundle, base=options.base, embeddings=options.embeddings)
    step = _step(opened, options, threads, bundle)
    report = options.progress or (lambda stage, done, total: None)
    if options.memory is None:  # compilers side by side; else one after the other
        with ThreadPoolExecutor(len(LIBRARIES)) as pool:
            list(pool.map(_library, LIBRARIES))
    key = _fingerprint(opened, step.settings(report), options.accumulate, threads, quota_cores())
    cached = cache_place("profiles", key)
    earlier = _earlier(cached, opened) if elsewhere is None and not options.force else None
    if earlier and (not crowded(earlier.device.busy_cores, threads) or crowded(taken_now(threads), threads)):
        return earlier
    if elsewhere is not None:
        return estimate_profile(unmeasured(traced_step(step, report), elsewhere.device(), key), elsewhere)
    check_tracing(step)
    store, traced = _packed_and_traced(step, report, options.memory)
    figures = measure(
        traced.programs,
        traced.tensors,
        opened.entries,
        compute_dtype=traced.compute_dtype,
        accumulate=options.accumulate,
        threads=threads,
        scratch=cache_directory(),
        environment=own_environment(),
        layers=traced.layers,
        memory=options.memory,
        kept=_kept_figures(threads),
        anew=options.force,
        progress=options.progress,
        comparison=step.comparison(),
    )
    result = measured(traced, figures, threads, key, store)
    if earlier is not None and earlier.device.busy_cores <= result.device.busy_cores:
        return earlier
    keep(cached, checked_json(result))
    return result


@keywords_of(ProfileOptions)
def bundle_request(source: str | os.PathLike[str], options: ProfileOptions) -> BundleRequest | None:
    """What has to be known of a model to make a bundle of it, with the step that the options ask for. None where
    nothing is to be traced elsewhere: of a module, whose code stays on the device, and of what is a bundle already.
    """
    if names_module(source) or is_traced(source, options.bundle):
        return None
    return request_of(headers(source, base=options.base, embeddings=options.embeddings), options)


@keywords_of(ProfileOptions)
def prepare(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], weights: bool, options: ProfileOptions
) -> Bundle:
    """Make a bundle of `source` in `folder`, if `weights` with the packed weights and the tokenizer: a device that gets
    a copy trains the model, and asks it, without transformers and without tracing it
    (`tightfit.profiles.sources.bundle`).

    Options are those of `profile`, but for those of measuring. Raises InputError for a source or options that cannot be
    used (a module, whose code each device has itself), RunError if the disk is full.
    """
    if names_module(source):
        raise InputError(
            f"{source}: a module is traced by the device itself, which has its code; prepare a language model"
        )
    report = options.progress or (lambda stage, done, total: None)
    request = request_of(headers(source, base=options.base, embeddings=options.embeddings), options)
    bundle = traced_bundle(request, report)
    if not weights:
        bundle.save(Path(folder))
        return bundle
    opened = resolve(source, base=options.base, embeddings=options.embeddings, decoder=bundle.decoder)
    packed = PackedWeights(base=opened.base, embeddings=opened.embeddings, note=opened.note)
    bundle = bundle.model_copy(update={"weights": packed})
    bundle.save(Path(folder), _stored(opened, report).path, vocabulary(source))
    return bundle


def _step(source: Source, options: ProfileOptions, threads: int, bundle: Bundle | None) -> ProfiledStep:
    """The step of a source that the options ask for, or that a bundle has; its tile is measured on this machine where
    they ask for that.
    """
    if options.tile != 0 or options.device != "cpu" or source.kind == "module" or bundle is not None:
        return step_of(source, options, bundle)
    step = step_of(source, options.but(tile=None))
    if not isinstance(step, DecoderStep):
        return step_of(source, options)
    sizes = tried_sizes(sorted(tile_sizes(step.batch, step.seq)), step.batch * step.seq)
    step_of(source, options.but(tile=sizes[0]))  # what goes with no tile is told before anything is measured
    tile = fast_tile(
        sizes,
        source.entries,
        dtype=step.dtype,
        threads=threads,
        memory=options.memory,
        kept=_kept_figures(threads),
        anew=options.force,
        progress=options.progress,
    )
    return step_of(source, options.but(tile=tile))


def _packed_and_traced(step: ProfiledStep, report: Progress, memory: int | None) -> tuple[Header | None, TracedStep]:
    """(the store of the weights, if there are any, the traced step). Two workers make them at the same time where the
    memory that is given, and free, holds both.
    """
    source = step.source
    if not source.has_weights:
        return None, traced_step(step, report)
    if traced_here(step) or not have_place(storing_bytes(source) + what_it_takes(step)[0], memory):
        return _stored(source, report), traced_step(step, report)
    with ThreadPoolExecutor(1) as pool:
        packing = pool.submit(copy_context().run, _stored, source, report)
        traced = traced_step(step, lambda *progress: report(*progress) if packing.done() else None)
        return packing.result(), traced


def _stored(source: Source, report: Progress) -> Header:
    """The store of the source's weights, packed now unless it is there."""
    folder = cache_directory() / "stores"
    return read_header(stored_weights(source, folder, report))


def _threads(requested: int | None, elsewhere: DeviceDescription | None) -> int:
    """Threads of the arithmetic. Raises InputError where there are not as many cores, or where another device has its
    own.
    """
    if elsewhere is not None and requested is not None:
        raise InputError(
            f"{spelled('threads')} {requested}: the figures of {elsewhere.name} are for {elsewhere.threads}; leave"
            " it out"
        )
    cores = our_cores()
    threads = useful_threads(cores, quota_cores()) if requested is None else requested
    if threads > cores:
        raise InputError(f"{spelled('threads')} {threads}: this process may use 1 to {cores} of the machine's cores")
    return threads


def _earlier(cached: Path, source: Source) -> Profile | None:
    """What an earlier call has measured of the same step, with the present paths of the model and of its packed
    weights, which may have been moved since; None if there is no such thing, or the weights are gone.
    """
    earlier = kept(cached, partial(parse_profile, name=str(cached)))
    if earlier is None:
        return None
    store = _present(earlier.model.store)
    if (store is None) != (earlier.model.store is None):
        return None
    present_paths = {"name": source.name, "source": source.path, "store": store}
    model = earlier.model.model_copy(update=present_paths | {"base": source.base, "embeddings": source.embeddings})
    return earlier.model_copy(update={"model": model})


def _present(store: str | None) -> str | None:
    """Present path of a cached weight store, which may have moved with the cache; None if there is none."""
    paths = () if store is None else (cache_directory() / "stores" / Path(store).name, Path(store))
    return next((str(path) for path in paths if path.exists()), None)


def _fingerprint(source: Source, *settings: Any) -> str:
    """sha256 of everything that the profile depends on: model, shapes, torch, machine, and the code that traces and
    measures.
    """
    return _digest(PROFILE_VERSION, source.fingerprint, source.config, settings, _machine(CODE))


def _machine(code: Sequence[str]) -> list[Any]:
    """What figures depend on beside the model: this machine, PyTorch, and what the files of `code` say."""
    return [
        installed_version(),
        cpu_name(),
        sorted(features()),
        *map(_library, LIBRARIES),
        Path(cuda_stubs.folder(cache_directory())).name,
        os.environ.get("TIGHTFIT_TORCH"),  # "plain" starts PyTorch in full, which has another floor
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(code)],
    ]


def _kept_figures(threads: int) -> Path:
    """The file with what was measured of this machine as it is (`tightfit.profiles.measuring.kept_figures`)."""
    return cache_place("machine", _machine(MEASURING_CODE), threads, quota_cores(), os.uname().release)


def _library(module: Any) -> str:
    """Name of a library that is compiled on this machine, now unless it is there; empty if it cannot be."""
    return Path(module.library(cache_directory())).name


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _files(code: Sequence[str]) -> Iterator[Path]:
    for name in code:
        path = PACKAGE / name
        yield from ([path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".py", ".c")))
