"""The two stages of a device's service as runs of their own: the seat of each, and the labels that the server needs."""

from __future__ import annotations

import shutil
import struct
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tightfit.planner.fleet.pipeline_schema import PipelinePlan, Stage
from tightfit.planner.fleet.split_schema import SERVER, SplitMember, SplitPlan
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.data.tokenization import PREPARED, RANDOM, prepare
from tightfit.runtime.engine.fleet.seat import StagePart
from tightfit.runtime.engine.training.records import HEADER_BYTES, IGNORED, PREFIX_WORDS, RecordFile
from tightfit.runtime.federated.device import Device
from tightfit.runtime.federated.split_device import SplitDevice
from tightfit.runtime.session.fleet import Membership, membership

SERVERS_PLACE = 1
"""in the chain of two"""


def stage_membership(
    fleet: SplitPlan,
    member: SplitMember,
    plan: Plan,
    address: str,
    port: int,
    key: Path,
    timeout: float,
    *,
    server: bool,
) -> Membership:
    """The membership of the run of `plan`: of a device's layers, or with `server` of the layers above. The server listens
    at `address` and `port`, and each saves its own part of the adapter.
    """
    name = SERVER if server else member.name
    made = membership(pipeline_of(fleet, member, plan), name, address, port, key, timeout)
    assert made.seat is not None
    assert isinstance(made.seat.part, StagePart)
    part = replace(made.seat.part, gathers=False)
    return replace(made, seat=replace(made.seat, part=part, listens=SERVERS_PLACE))


def pipeline_of(fleet: SplitPlan, member: SplitMember, plan: Plan) -> PipelinePlan:
    """A device with the server, as the pipeline that they are while it is served; with the seconds of the one that runs
    `plan`.
    """
    update = fleet.accumulate * (member.step_seconds or 0.0)
    common: dict[str, Any] = {
        "layer_names": member.layer_names,
        "micro_batch_seconds": plan.step_seconds,
        "forward_seconds": plan.evaluate.seconds if plan.evaluate else None,
    }
    lower = Stage(
        name=member.name,
        device=member.device,
        measured=member.measured,
        budget_bytes=member.budget_bytes - member.flower_bytes,
        link=member.link,
        plan=member.plan,
        plan_fingerprint=member.plan_fingerprint,
        last_layer=member.layers,
        ahead=member.ahead,
        up=member.up,
        **common,
    )
    upper = Stage(
        name=SERVER,
        device=fleet.server.device,
        measured=fleet.server.measured,
        budget_bytes=fleet.server.budget_bytes,
        link=fleet.server.link,
        plan=member.server_plan,
        plan_fingerprint=member.server_plan_fingerprint,
        first_layer=member.layers,
        down=member.down,
        **common,
    )
    return PipelinePlan(
        fingerprint=f"{fleet.fingerprint} {member.name}",
        model=fleet.model,
        micro_batches=fleet.accumulate,
        batch=fleet.batch,
        members=[lower, upper],
        makespan_seconds=update,
        bound_seconds=0.0,
        gap=1.0,
        solve_seconds=0.0,
        bit_identical=fleet.bit_identical,
        differences=fleet.differences,
    )


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


def prepared_device(device: Device, plan: Plan, fleet: str, server: str) -> SplitDevice:
    """A device with its data prepared once, before its first round, for all of them: in its folder, beside the labels that
    the server gets. `fleet` is the folder of the fleet's plan, `server` the host that the server's runs listen at.
    """
    from tightfit.profiles.sources import lookup

    assert plan.seq is not None
    plain = device.data == RANDOM or device.data.endswith(PREPARED)
    folder = Path(device.work) / "data"
    records = prepare(
        device.data,
        None if plain else lookup.vocabulary(plan.model.source),
        folder,
        seq=plan.seq,
        vocab_size=plan.model.config["vocab_size"],
        too_long="truncate" if device.truncate else "refuse",
    )
    records.close()
    labels = folder / f"labels{PREPARED}"
    labels_alone(records.path, labels)
    words = {**asdict(device), "data": str(records.path)}
    return SplitDevice(**words, fleet=fleet, labels=str(labels), server=server)


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
