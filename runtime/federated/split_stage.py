"""The two stages of a device's service as runs of their own: the seat of each, and the labels that the server needs."""

from __future__ import annotations

import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tightfit.planner.fleet.schema import SERVER, FleetPlan
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.data.tokenization import PREPARED
from tightfit.runtime.data.tokenizing import tokenise
from tightfit.runtime.engine.fleet.seat import Seat
from tightfit.runtime.engine.training.records import HEADER_BYTES, IGNORED, PREFIX_WORDS, RecordFile
from tightfit.runtime.federated.device import DeviceSettings
from tightfit.runtime.session.fleet import Membership, stage_part

SERVERS_PLACE = 1
"""in the chain of two"""


def stage_membership(
    fleet: FleetPlan, name: str, address: str, port: int, key: Path, timeout: float, *, server: bool
) -> Membership:
    """The membership of the run of a device's layers, or with `server` of the layers above. The server listens at
    `address` and `port`, and each saves its own part of the adapter.
    """
    names, rank = [name, SERVER], SERVERS_PLACE if server else 0
    replica = fleet.replica(name)
    part = replica.parts[rank]
    update = fleet.accumulate * replica.step_seconds
    again = (part.forward_seconds or 0.0) if part.ahead else 0.0
    figures: dict[str, Any] = {
        "member": names[rank],
        "members": names,
        "micro_batches": fleet.accumulate,
        "seconds": update,
        "layers": part.layer_names,
        "exchange_seconds": max(0.0, update - fleet.accumulate * (part.micro_batch_seconds + again)),
        "update_seconds": 0.0,
        "share": [0, fleet.accumulate],
    }
    seat = Seat(
        members=names,
        rank=rank,
        address=address,
        port=port,
        timeout=timeout,
        micro_batches=fleet.accumulate,
        part=stage_part(fleet, replica, rank, gathers=False),
        exact=fleet.bit_identical,
        plan=f"{fleet.fingerprint} {name}",
        key=str(key.absolute()),
        listens=SERVERS_PLACE,
    )
    return Membership(name=names[rank], seat=seat, figures=figures)


def labels_alone(records: Path, target: Path) -> None:
    """Write a copy of a record file in which all tokens but the labels are padding: what the upper layers need. Its
    fingerprint stays that of the original, since the two are the same samples.
    """
    try:
        with RecordFile.open(records) as opened, records.open("rb") as source, target.open("wb") as written:
            pad = struct.pack("<i", opened.pad_token)
            written.write(source.read(HEADER_BYTES))
            for index in range(len(opened)):
                length = opened.length(index)
                one = bytearray(source.read(4 * (PREFIX_WORDS + 2 * length)))
                one[4 * PREFIX_WORDS : 4 * (PREFIX_WORDS + length)] = pad * length
                checksum = zlib.crc32(memoryview(one)[20:], zlib.crc32(memoryview(one)[:16]))
                struct.pack_into("<I", one, 16, checksum)
                written.write(one)
            shutil.copyfileobj(source, written)  # the index
    except OSError as error:
        raise RunError(f"{target}: {error.strerror}; free some space and start again") from error


def prepared_device(device: DeviceSettings, plan: Plan, fleet: str, server: str) -> DeviceSettings:
    """A device with its data prepared once, before its first round, for all of them: in its folder, beside the labels
    that the server gets. `fleet` is the folder of the fleet's plan, `server` the host that the server's runs listen at.
    """
    assert plan.seq is not None
    folder = Path(device.work) / "data"
    records = tokenise(
        device.data,
        plan.model.source,
        folder,
        seq=plan.seq,
        vocab_size=plan.model.config["vocab_size"],
        too_long="truncate" if device.truncate else "refuse",
    )
    labels = folder / f"labels{PREPARED}"
    labels_alone(records, labels)
    return replace(device, data=str(records), fleet=fleet, labels=str(labels), server=server)


def check_labels(content: bytes, plan: Plan, place: str) -> None:
    """Raise InputError, naming `place`, where the labels that a device sent are no record file that fits the plan."""
    assert plan.seq is not None
    seq, vocabulary = plan.seq, plan.model.config["vocab_size"]
    try:
        header = from_json(content[:HEADER_BYTES])
        shape = header["seq"], header["vocab_size"], 0 <= header["pad_token"] < vocabulary
        end, count = header["index"], header["count"]
        places = np.frombuffer(content, "<u8", count + 1, offset=end).astype(np.int64)
        words = np.frombuffer(content[:end], "<i4", offset=HEADER_BYTES)
        sizes = np.diff(places)
        whole = len(content) == end + places.nbytes and (places[0], places[-1]) == (HEADER_BYTES, end)
        if not whole or ((sizes < 4 * PREFIX_WORDS) | (sizes > 4 * (PREFIX_WORDS + 2 * seq)) | (sizes % 8 != 4)).any():
            raise ValueError("its index is of other records")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place}: no record file, or a damaged one ({error})") from error
    if shape != (seq, vocabulary, True):
        raise InputError(f"{place}: for sequences and a vocabulary of {shape[:2]}, the plan is for {(seq, vocabulary)}")
    told = ((places[:-1] - HEADER_BYTES) // 4)[:, None] + np.arange(PREFIX_WORDS)
    tokens = np.delete(words, told.reshape(-1))
    if not len(tokens) or tokens.max() >= vocabulary or ((tokens < 0) & (tokens != IGNORED)).any():
        raise InputError(f"{place}: no labels, or tokens that the model does not have")
