"""Opens the decoder of a job, with all that stays in memory loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.generation.cached_decoder import CachedDecoder
from tightfit.runtime.engine.generation.job import STREAMED, GenerationJob
from tightfit.runtime.engine.generation.stream import PieceStream
from tightfit.runtime.engine.training.adapter import adapter_key
from tightfit.runtime.engine.weights.safetensors_file import SafetensorsReader
from tightfit.runtime.engine.weights.store import WeightStore

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def open_decoder(job: GenerationJob, device: Device, store: WeightStore, channel: TransferChannel) -> CachedDecoder:
    """The decoder of a job, with all that stays in memory loaded. Raises InputError for a damaged store or adapter."""
    streamed = [piece for piece in job.pieces if piece.state == STREAMED]
    body = [piece for piece in streamed if piece.matrix != job.head]
    head = [piece for piece in streamed if piece.matrix == job.head]
    stream = PieceStream(channel, device, store, job.staging, body, head)
    decoder = CachedDecoder(job, device, store, stream)
    reader = SafetensorsReader(job.adapter, "copy the adapter again") if job.adapter else None
    try:
        decoder.load(lambda name, out: _read(reader, adapter_key(name, job.adapter_body), out))
    finally:
        if reader is not None:
            reader.close()
    return decoder


def _read(reader: SafetensorsReader | None, key: str, out: Tensor) -> None:
    """Read a tensor of an adapter in float32. Raises InputError where it is of another shape, or no finite numbers."""
    assert reader is not None
    kind, shape = reader.described(key)
    if kind not in FLOATS or shape != tuple(out.shape):
        raise InputError(
            f"{reader.path}: {key} is {kind} {list(shape)} and the model wants floats of {list(out.shape)}; give an"
            " adapter of this model"
        )
    flat, done = out.view(-1), 0
    for chunk in reader.chunks(key):
        values = torch.frombuffer(bytearray(chunk), dtype=FLOATS[kind])
        flat[done : done + values.numel()].copy_(values)
        done += values.numel()
    if not torch.isfinite(flat).all():
        raise InputError(
            f"{reader.path}: {key} holds values that are no finite numbers; give the adapter of another run"
        )
