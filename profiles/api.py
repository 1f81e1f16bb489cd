"""The profiler's entry point: `profile` traces and measures a model on a device and returns a `Profile`.

`load_profile` and `save_profile` of `tightfit.profiles.io` are re-exported here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensorMode

from tightfit.profiles.devices.data_sheets import find_device
from tightfit.profiles.devices.estimate import estimate_profile
from tightfit.profiles.io import load_profile, save_profile
from tightfit.profiles.measuring.cpu_load import crowded, our_cores, taken_now
from tightfit.profiles.measuring.cpu_quota import quota_cores, useful_threads
from tightfit.profiles.measuring.measure import measure
from tightfit.profiles.models.decoder import PAIRS_APART, Decoder
from tightfit.profiles.models.decoder_config import decoder_shape, handwritten
from tightfit.profiles.models.lora import LoraConfig, given, layer_numbers
from tightfit.profiles.models.side_network import SideNetwork
from tightfit.profiles.models.side_shape import CONFIG_KEY, INPUT, SideShape, chosen_blocks
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.options import BATCH, SEQ, ProfileOptions, Progress
from tightfit.profiles.schema import (
    KNOWN,
    POSITIONS,
    PREFERENCE,
    PROFILE_VERSION,
    Channel,
    Device,
    Floor,
    Model,
    Preference,
    Profile,
    Program,
    Tensor,
    adamw,
)
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.tracing.comparison import GradientComparison
from tightfit.profiles.tracing.fold import constant_made
from tightfit.profiles.tracing.loss_function import called
from tightfit.profiles.tracing.shorter_steps import (
    apart,
    bucket_lengths,
    name_apart,
    shorter_step,
    with_room,
)
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, INFERENCE
from tightfit.profiles.tracing.trace import Trace, trace
from tightfit.profiles.weights.pack import build_store
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.interpreter import PACKAGE, python_path
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.processor import cpu_name, features
from tightfit.runtime.engine.cpu import native_dropout
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.training.adapter import BODY
from tightfit.runtime.engine.weights import native
from tightfit.runtime.engine.weights.store import Entry, Store, find_extent

__all__ = ["Progress", "load_profile", "profile", "save_profile"]

if TYPE_CHECKING:
    from tightfit.profiles.models.transformers_decoder import AnyDecoder

DECODER_INPUTS = ("input_ids", "labels", POSITIONS)
"""the tensors of a decoder's batch, int64 [batch, seq], in the order of every plan"""
BETA = 0.1
"""of DPO and ORPO unless another is asked for, as with TRL"""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHOSEN_CODE_BYTES = 1 << 20
"""Allowance for the code of operators that only some runs have (dropout, DoRA, tables, batch norm, LSTM, losses of pairs), which
is mapped when they first run: the process that measures the floor does not run them. A run of a tiny model with DoRA held 0.1 MiB
more than its plan said without it."""
CHOSEN = tuple(f"tightfit.{name}" for name in ("dropout", "dora_", "table_", "batch_norm", "lstm", "preference"))
"""Prefixes of the names of these operators."""
CODE = (
    "runtime/common",
    "runtime/engine",
    "runtime/supervision",
    "profiles/measuring",
    "profiles/models",
    "profiles/sources",
    "profiles/tracing",
    "profiles/weights",
    "profiles/api.py",
    "profiles/schema.py",
)
"""Source files that determine a profile's figures: a change in any of them invalidates the cached profiles."""


@keywords_of(ProfileOptions)
def profile(source: str | os.PathLike[str], options: ProfileOptions) -> Profile:
    """Trace and measure one training step of `source` on this machine, or trace it and estimate its times for another
    `device`.

    `source` is anything that `tightfit.profiles.sources.lookup.resolve` takes; `device` is "cpu" (this machine) or
    anything that `tightfit.profiles.devices.data_sheets.find_device` takes. The step has `batch` samples (default: 1) of
    `seq` tokens (default: 256); a module:factory brings its own sample batch instead. The gradients of `accumulate` steps make one optimizer
    update. `dtype` is the type of activations and unpacked weights (default: bfloat16 for language models, float32 for a
    module of your own). `threads` defaults to all cores that this process may use, or to what a CPU quota (a container's
    `--cpus`) leaves of them.

    With `side_rank` the step is that of a side network beside `source` instead (`tightfit.profiles.models.side_network`), whose
    adapters of that rank read the outputs of `side_blocks` of its blocks (default: 8, or all): what a server trains where a
    device runs the model (the policy `mobillm`). It has no LoRA pairs.

    What is trained of a language model is an adapter (`tightfit.profiles.models.lora.LoraConfig`): LoRA pairs of
    `lora_rank` (default 8) and `lora_alpha` (default: twice the rank) on the linear layers that `lora_targets` and
    `lora_layers` ("0-3,8") choose, by default all of them; or what the settings of the adapter in the folder `adapter` say,
    so that a run can start from it.

    With a `loss` of "dpo" or "orpo" the step learns from pairs of answers (`tightfit.runtime.engine.cpu.preference`): `batch` of
    them, each in two rows. `beta` (default 0.1) is how much the comparison of the two weighs.

    `buckets` ("64,128") are shorter lengths at which the step is traced and measured as well: its batches are padded only to the
    shortest of them that holds their samples, and follow the same schedule in the same places.

    `base` and `embeddings` are the precision, 4bit, 8bit or 16bit, of matrices and of the embedding and the head that
    the source does not hold quantised; what it holds quantised is kept, code for code. By default matrices are rounded to
    4 bits, and embeddings are treated as matrices are (`tightfit.profiles.weights.precision`).

    Weights, where the source has them, are first packed into a store in the cache, tensor by tensor. A cached profile
    with the same fingerprint is returned at once, except with `force`, or if it was measured while other programs kept
    the cores busy and the cores are idle now. An estimate touches no weights, measures nothing and is not cached.

    `progress` is called now and then.

    Raises InputError for a source, shape or device that cannot be used, RunError if packing or measuring fails.
    """
    batch, seq, accumulate, dtype, threads = (
        BATCH if options.batch is None else options.batch,
        SEQ if options.seq is None else options.seq,
        options.accumulate,
        options.dtype,
        options.threads,
    )
    elsewhere = None if options.device == "cpu" else find_device(options.device)
    if elsewhere is not None and threads is not None:
        raise InputError(
            f"{spelled('threads')} {threads}: the figures of {elsewhere.name} are for {elsewhere.threads}; leave it out"
        )
    cores = our_cores()
    threads = useful_threads(cores, quota_cores()) if threads is None else threads
    if threads > cores:
        raise InputError(f"{spelled('threads')} {threads}: this process may use 1 to {cores} of the machine's cores")
    lora = given(
        options.adapter,
        {
            "rank": options.lora_rank,
            "alpha": options.lora_alpha,
            "targets": options.lora_targets,
            "layers": None if options.lora_layers is None else layer_numbers(options.lora_layers),
            "rank_pattern": options.rank_pattern,
            "alpha_pattern": options.alpha_pattern,
            "dropout": options.lora_dropout,
            "rslora": options.rslora,
            "dora": options.dora,
            "modules_to_save": tuple(options.modules_to_save or ()),
        },
    )
    found = resolve(source, base=options.base, embeddings=options.embeddings)
    side = _side_shape(found, options.side_rank, options.side_blocks)
    if lora.modules_to_save and (side is not None or found.kind == "module"):
        what = (
            "a side network has no adapter" if side is not None else f"{found.name} is a module, trained in full itself"
        )
        raise InputError(
            f"{spelled('modules_to_save')} {', '.join(lora.modules_to_save)}: {what}; leave the option out"
        )
    if found.kind == "module":
        for name, given_size in (("batch", options.batch), ("seq", options.seq)):
            if given_size is not None:
                raise InputError(
                    f"{spelled(name)} {given_size}: {found.name} is a module, whose factory gives the sample batch; give it there"
                )
    preference = _preference(found, side, options.loss, options.beta)
    if options.buckets is not None and (side is not None or found.kind == "module"):
        what = "a side network takes whole batches"
        if side is None:
            what = f"{found.name} is a module, with batches of one shape"
        raise InputError(f"{spelled('buckets')} {options.buckets}: {what}; leave the option out")
    lengths = bucket_lengths(options.buckets, seq)
    dtype = dtype or ("float32" if found.kind == "module" else "bfloat16")
    report = options.progress or (lambda stage, done, total: None)
    # A module is traced first: its code, and that of a loss_fn, is part of what the profile depends on.
    own = _trace_module(found, dtype, report) if found.kind == "module" else None
    code = None if own is None else _operators(own[0])
    key = _fingerprint(
        found, batch, seq, asdict(lora), accumulate, dtype, threads, quota_cores(), side, code, preference, lengths
    )
    cached = cache_directory() / "profiles" / f"{key[:32]}.json"
    earlier = None
    if elsewhere is None and cached.exists() and not options.force:
        try:
            loaded = load_profile(cached)
            store = _present(loaded.model.store)
            if (store is None) == (loaded.model.store is None):
                # The model, or the cache, may have been moved since; record their present paths.
                moved = {"name": found.name, "source": found.path, "store": store}
                here = loaded.model.model_copy(update=moved | {"base": found.base, "embeddings": found.embeddings})
                earlier = loaded.model_copy(update={"model": here})
                if not crowded(earlier.device.busy_cores, threads) or crowded(taken_now(threads), threads):
                    return earlier
        except InputError:
            cached.unlink(missing_ok=True)
    store, store_fingerprint = None, None
    if found.has_weights and elsewhere is None:
        path = build_store(found, cache_directory() / "stores", lambda done, total, name: report("pack", done, total))
        with Store.open(path) as opened:
            store, store_fingerprint = str(path), opened.fingerprint
    comparison, decoder = None, None
    if own is not None:
        traced, module, batches = own
        comparison = GradientComparison(found.name, module, batches[0], traced, batches[1:])
    elif side is not None:
        traced = _trace_side(found, side, batch, seq, dtype, report)
    else:
        traced, decoder = _trace_decoder(found, batch, seq, lora, dtype, report, preference)
    shorter = [
        shorter_step(
            traced, _trace_decoder(found, batch, length, lora, dtype, report, preference, longest=seq)[0], length
        )
        for length in lengths
    ]
    beside = [program for step in shorter for program in apart(step)]
    if found.kind == "module":
        batch, seq_or_none, kind = _first_dimension(traced), None, "module"
    else:
        seq_or_none, kind = seq, "decoder"
        _check_lengths(found, seq)
    tensors = [_packed(t, found.entries) for t in traced.tensors]
    measured: Mapping[str, Any] = (
        _unmeasured([*traced.programs, *beside], elsewhere.device())
        if elsewhere is not None
        else measure(
            traced.programs,
            tensors,
            found.entries,
            compute_dtype=dtype,
            accumulate=accumulate,
            threads=threads,
            scratch=cache_directory(),
            environment=dict(os.environ) | {"PYTHONPATH": python_path()},
            shorter=beside,
            progress=options.progress,
            comparison=comparison,
        )
    )

    def timed(program: Program, name: str) -> Program:
        return _timed_program(program, measured["operators"][name], measured["copied"][name])

    shorter = [
        step.model_copy(update={"programs": [timed(p, name_apart(p.name, step)) for p in step.programs]})
        for step in shorter
    ]
    result = Profile(
        fingerprint=key,
        model=Model(
            name=found.name,
            source=found.path,
            kind=kind,
            config=found.config
            | ({CONFIG_KEY: side.as_json()} if side else {})
            | ({PREFERENCE: preference.model_dump()} if preference else {}),
            lora=decoder and decoder.lora,
            tables=decoder.tables if decoder else {},
            rows_apart=decoder.rows_apart if decoder else None,
            store=store,
            store_fingerprint=store_fingerprint,
            compared=measured["compared"],
            base=found.base,
            embeddings=found.embeddings,
            rounding=found.note or None,
        ),
        batch=batch,
        seq=seq_or_none,
        compute_dtype=dtype,
        optimizer=adamw(accumulate),
        device=Device(
            name=cpu_name(),
            kind="cpu",
            threads=threads,
            busy_cores=measured["busy_cores"],
            quota_cores=measured["quota_cores"],
            torch_version=torch.__version__,
            floor=_floor(measured["floor"], traced),
            read=Channel.model_validate(measured["read"]),
            write=Channel.model_validate(measured["write"]),
        ),
        tensors=[_timed_tensor(t, measured) for t in tensors],
        programs=with_room([timed(p, p.name) for p in traced.programs], shorter),
        layers=traced.layers,
        loss=traced.loss,
        token_losses=traced.token_losses,
        shorter=shorter,
    )
    if elsewhere is not None:
        return estimate_profile(result, elsewhere)
    if earlier is not None and earlier.device.busy_cores <= result.device.busy_cores:
        return earlier
    save_profile(result, cached)
    return result


def _floor(measured: Mapping[str, Any], traced: Trace) -> Floor:
    """The measured floor, with room for code that the process that measured it did not run."""
    floor = Floor.model_validate({name: measured[name] for name in Floor.model_fields if name in measured})
    targets = [operator.target for program in traced.programs for operator in program.operators]
    if not any(target.startswith(CHOSEN) for target in targets):
        return floor
    held = {"resident_bytes": floor.resident_bytes + CHOSEN_CODE_BYTES}
    if floor.inference_resident_bytes is not None:
        held["inference_resident_bytes"] = floor.inference_resident_bytes + CHOSEN_CODE_BYTES
    return floor.model_copy(update=held)


def _operators(traced: Trace) -> str:
    """sha256 of a traced step."""
    parts = [part.model_dump() for part in (*traced.tensors, *traced.programs, *traced.layers)]
    return hashlib.sha256(json.dumps([parts, traced.loss]).encode()).hexdigest()


def _present(store: str | None) -> str | None:
    """Present path of a cached weight store, which may have moved with the cache; None if there is none."""
    places = () if store is None else (cache_directory() / "stores" / Path(store).name, Path(store))
    return next((str(place) for place in places if place.exists()), None)


def _fingerprint(source: Source, *settings: Any) -> str:
    """sha256 of everything that the profile depends on: model, shapes, torch, machine, and the code that traces and
    measures.
    """
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in _code()]
    text = json.dumps(
        [
            PROFILE_VERSION,
            source.fingerprint,
            source.config,
            settings,
            torch.__version__,
            cpu_name(),
            sorted(features()),
            Path(native.library(cache_directory())).name,
            Path(native_dropout.library(cache_directory())).name,
            Path(page_out.library(cache_directory())).name,
            Path(cuda_stubs.folder(cache_directory())).name,
            os.environ.get("TIGHTFIT_TORCH"),  # "plain" starts PyTorch in full, which has another floor
            code,
        ],
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _code() -> Iterator[Path]:
    for name in CODE:
        place = PACKAGE / name
        yield from [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in (".py", ".c"))


def _preference(source: Source, side: SideShape | None, loss: str | None, beta: float | None) -> Preference | None:
    """The loss of a step that learns from pairs of answers; None: another loss. Raises InputError for one that is not known, a
    model that cannot have it, and a `beta` that is not above 0, or of no loss.
    """
    if loss is None:
        if beta is not None:
            raise InputError(
                f"{spelled('beta')} {beta:g} is of a loss of pairs; name one too: {' or '.join(spelled('loss', one) for one in KNOWN)}"
            )
        return None
    if source.kind == "module":
        raise InputError(
            f"{spelled('loss')} {loss}: {source.name} is a module with a loss of its own, and only a language model learns from pairs of answers;"
            " leave the option out"
        )
    if side is not None:
        raise InputError(
            f"{spelled('loss')} {loss}: a side network predicts tokens and nothing else; leave the option out"
        )
    beta = BETA if beta is None else float(beta)
    return Preference(loss=loss, beta=beta)


def _trace_decoder(
    source: Source,
    batch: int,
    seq: int,
    lora: LoraConfig,
    dtype: str,
    report: Progress,
    preference: Preference | None = None,
    longest: int | None = None,
) -> tuple[Trace, Decoder | AnyDecoder]:
    """The step of a decoder, and the decoder, which says what is trained. `longest`: the length of the step of which this is a shorter
    one.
    """
    if not handwritten(source.config):
        return _trace_any_decoder(source, batch, seq, lora, dtype, report, preference, longest)
    shape = decoder_shape(source.config)
    _check_rank(lora, shape.hidden)
    with FakeTensorMode():
        body = source.config.get("adapter_body", BODY)
        module = Decoder(shape, dtype=DTYPES[dtype], lora=lora, body=body, preference=preference, longest=longest)
        sample = _sample(batch, seq, rows_apart=None, preference=preference)
    return _traced(module, sample, report), module


def _sample(
    batch: int, seq: int, rows_apart: str | None, preference: Preference | None = None
) -> dict[str, torch.Tensor]:
    """The batch that a decoder is traced on; without positions where samples cannot share rows."""
    if preference:
        name, kind = KNOWN[preference.loss]
        return _sample(2 * batch, seq, PAIRS_APART) | {name: torch.zeros(2 * batch, dtype=getattr(torch, kind))}
    names = DECODER_INPUTS[:2] if rows_apart else DECODER_INPUTS
    return {name: torch.zeros(batch, seq, dtype=torch.int64) for name in names}


def _traced(module: torch.nn.Module, sample: dict[str, torch.Tensor], report: Progress) -> Trace:
    """The step of a decoder; the tensors of its batch are listed in the order of `sample`, and not in that of their use."""
    traced = trace(module, sample, decompositions=DECOMPOSITIONS, inference=INFERENCE, progress=report)
    batch = {tensor.name: tensor for tensor in traced.tensors if tensor.kind == "batch"}
    inputs = (batch[name] for name in sample if name in batch)
    return replace(traced, tensors=[next(inputs) if one.kind == "batch" else one for one in traced.tensors])


def _check_rank(lora: LoraConfig, hidden: int) -> None:
    for rank in (lora.rank, *lora.rank_pattern.values()):
        if rank > hidden:
            raise InputError(
                f"{spelled('lora_rank')} {rank}: the model is {hidden} wide, and a rank above that gains nothing"
            )


def _trace_any_decoder(
    source: Source,
    batch: int,
    seq: int,
    lora: LoraConfig,
    dtype: str,
    report: Progress,
    preference: Preference | None = None,
    longest: int | None = None,
) -> tuple[Trace, AnyDecoder]:
    from tightfit.profiles.models.transformers_decoder import AnyDecoder, without_values

    _check_rank(lora, source.config["hidden_size"])
    module = AnyDecoder(source.config, dtype=DTYPES[dtype], seq=seq, lora=lora, preference=preference, longest=longest)
    with FakeTensorMode():
        without_values(module)
        if preference is None:
            module.learn_rows(_sample(batch, seq, rows_apart=None))
        sample = _sample(batch, seq, module.rows_apart, preference)
    traced = _traced(module, sample, report)
    for tensor in traced.tensors:
        if tensor.kind in ("weight", "constant") and tensor.name.split("[")[0] not in source.entries:
            raise InputError(
                f"{source.name}: its {source.config['model_type']} decoder reads a constant of shape {tensor.shape}"
                f" ({tensor.name}) that no checkpoint holds; it is not supported"
            )
    return traced, module


def _side_shape(source: Source, rank: int | None, blocks: int | None) -> SideShape | None:
    """The side network that is profiled; None: the model itself."""
    if rank is None:
        if blocks is not None:
            raise InputError(
                f"{spelled('side_blocks')} {blocks} is of a side network; name its rank too, for example {spelled('side_rank', 64)}"
            )
        return None
    if source.kind == "module":
        raise InputError(
            f"{spelled('side_rank')} {rank}: a side network is trained beside a language model, {source.name} is a module"
        )
    shape = decoder_shape(source.config)
    if not 1 <= rank <= shape.hidden:
        raise InputError(f"{spelled('side_rank')} {rank}: give a width from 1 to {shape.hidden}, the model's own")
    chosen = chosen_blocks(shape.layers) if blocks is None else chosen_blocks(shape.layers, blocks)
    return SideShape(blocks=chosen, rank=rank)


def _trace_side(source: Source, side: SideShape, batch: int, seq: int, dtype: str, report: Progress) -> Trace:
    shape = decoder_shape(source.config)
    with FakeTensorMode():
        module = SideNetwork(shape, side, dtype=DTYPES[dtype])
        sample = {"labels": torch.zeros(batch, seq, dtype=torch.int64)}
        for number in range(len(side.blocks)):
            sample[f"{INPUT}.{number}"] = torch.zeros(batch * seq, shape.hidden, dtype=DTYPES[dtype])
    return trace(module, sample, decompositions=DECOMPOSITIONS, inference=INFERENCE, progress=report)


def _trace_module(
    source: Source, dtype: str, report: Progress
) -> tuple[Trace, torch.nn.Module, list[tuple[torch.Tensor, ...]]]:
    """The step of a module, the module, and the batches that its factory gives, first the sample."""
    from tightfit.profiles.sources.factory import build_with_batches, narrowed

    module, batches, inputs = build_with_batches(source.path)
    if dtype != "float32":
        batches = [narrowed(module, batch, inputs, DTYPES[dtype])[1] for batch in batches]
    names: Mapping[str, torch.Tensor] = {f"batch{index}": tensor for index, tensor in enumerate(batches[0])}
    traced = trace(module, names, progress=report)
    if traced.token_losses is not None:
        raise InputError(f"{source.name}: {called(module)} must return one scalar loss, not 2 results")
    for tensor in traced.tensors:
        if tensor.kind in ("trainable", "weight", "constant") and tensor.name not in source.entries:
            raise InputError(f"{source.name}: {constant_made(tensor.shape, tensor.name)}")
    return traced, module, batches


def _first_dimension(traced: Trace) -> int:
    return next((t.shape[0] for t in traced.tensors if t.kind == "batch" and t.shape), 1)


def _check_lengths(source: Source, seq: int) -> None:
    longest = source.config.get("max_position_embeddings")
    if isinstance(longest, int) and seq > longest:
        raise InputError(
            f"{spelled('seq')} {seq} is longer than the {longest} positions that {source.name} was trained for; use {spelled('seq', longest)} or less"
        )


def _packed(tensor: Tensor, entries: Mapping[str, Entry]) -> Tensor:
    if tensor.kind != "weight":
        return tensor
    extent = find_extent(entries, tensor.name)
    return tensor.model_copy(update={"packed_bytes": extent.bytes, "packed_format": extent.entry.format})


def _unmeasured(programs: Sequence[Program], device: Device) -> dict[str, Any]:
    """A stand-in for the result of `measure`, with all times 0 and the floor and channels of the described device."""
    operators = {program.name: [[0.0, 0.0]] * len(program.operators) for program in programs}
    channels = {"floor": device.floor.model_dump(), "read": device.read, "write": device.write}
    copied = {program.name: [False] * len(program.operators) for program in programs}
    return {
        "operators": operators,
        "copied": copied,
        "unpack": {},
        "update": {},
        "busy_cores": 0.0,
        "quota_cores": None,
        "compared": None,
    } | channels


UPDATED = ("update", "accumulate", "clipped", "perturb", "adafactor")
"""what takes time for a trainable"""


def _timed_tensor(tensor: Tensor, measured: Mapping[str, Any]) -> Tensor:
    if tensor.name in measured["unpack"]:
        return tensor.model_copy(update={"unpack_seconds": measured["unpack"][tensor.name]})
    if tensor.name in measured["update"]:
        seconds = {f"{kind}_seconds": measured[kind][tensor.name] for kind in UPDATED}
        return tensor.model_copy(update=seconds)
    return tensor


def _timed_program(program: Program, figures: list[list[float]], copied: list[bool]) -> Program:
    operators = [
        op.model_copy(update={"seconds": seconds, "workspace_bytes": int(workspace), "copied": copies})
        for op, (seconds, workspace), copies in zip(program.operators, figures, copied, strict=True)
    ]
    return program.model_copy(update={"operators": operators})
