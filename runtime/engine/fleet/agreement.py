"""What the members of a fleet agree on before the first step: equal settings, and the checkpoint to go on from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import sync_directory, write_all
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.run_folder import find_checkpoints, how_to_continue
from tightfit.runtime.engine.fleet.transport import Transport

CHUNK = 1 << 18
"""bytes of a file that pass in one message"""
MACHINE = ("threads", "torch", "products of bfloat16")
"""conditions of a run in which members may differ where they need not round alike"""


def agree(
    transport: Transport, settings: Mapping[str, Any], out: str, *, resume: bool, exact: bool, apart: bool = False
) -> None:
    """Compare this run's `settings` with those of the first member, and with `resume` see to it that the newest
    checkpoint in `out` is the newest that any member has; or where members train tensors of their own (`apart`), the
    newest that all have.

    Raises InputError where settings differ or there is no such checkpoint.
    """
    found = find_checkpoints(out) if resume else []
    steps = [step for step, _ in found]
    mine = {"settings": dict(settings), "step": steps[-1] if steps else -1, "steps": steps}
    if transport.rank:
        transport.send_json(mine, 0)
        told = transport.receive_json(0)
        if told["error"]:
            raise InputError(told["error"])
    else:
        told = _compared(transport, mine, exact=exact, apart=apart)
        if resume and told["step"] < 0:
            who = "no checkpoint is there that all members hold" if apart else "no member holds a checkpoint"
            told["error"] = f"{who} to resume from; start the fleet again without {spelled('resume', True)}"
        for rank in range(1, len(transport.members)):
            transport.send_json(told, rank)
        if told["error"]:
            raise InputError(told["error"])
    if resume and apart:
        for step, path in found:
            if step > told["step"]:
                shutil.rmtree(path)
    elif resume:
        _spread(transport, told, out, has=bool(found) and found[-1][0] == told["step"])


def _compared(transport: Transport, mine: dict[str, Any], *, exact: bool, apart: bool) -> dict[str, Any]:
    """What the first member tells the others: an error or None, the newest step, who has it, and who lacks it."""
    heard = [mine, *(transport.receive_json(rank) for rank in range(1, len(transport.members)))]
    step = max(one["step"] for one in heard)
    told = {"error": None, "step": step, "owner": [one["step"] for one in heard].index(step)}
    if apart:
        told["step"] = max(set.intersection(*(set(one["steps"]) for one in heard)), default=-1)
    told["lacking"] = [rank for rank, one in enumerate(heard) if one["step"] != step]
    for rank, one in enumerate(heard):
        for name, value in mine["settings"].items():
            if one["settings"].get(name) != value and (exact or name not in MACHINE):
                first, other = transport.members[0], transport.members[rank]
                whose = f"member {other!r} has {_short(one['settings'].get(name))}, {first!r} has {_short(value)}"
                told["error"] = f"the members were started with different {name}: {whose}; start all with the same"
                return told
    return told


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _spread(transport: Transport, told: dict[str, Any], out: str, *, has: bool) -> None:
    """Send the newest checkpoint from the member that has it to those that lack it."""
    path = os.path.join(out, f"checkpoint-{told['step']}")
    if transport.rank == told["owner"]:
        for rank in told["lacking"]:
            _send(transport, rank, path)
    elif not has:
        _receive(transport, told["owner"], path)


def _send(transport: Transport, rank: int, path: str) -> None:
    names = sorted(os.listdir(path))
    transport.send_json({name: os.path.getsize(os.path.join(path, name)) for name in names}, rank)
    for name in names:
        with open(os.path.join(path, name), "rb", buffering=0) as file:
            transport.send_parts(iter(partial(file.read, CHUNK), b""), rank)


def _receive(transport: Transport, owner: int, path: str) -> None:
    """Receive a checkpoint's files under another name, and give them their own once all are there."""
    partly = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.partial")
    try:
        shutil.rmtree(partly, ignore_errors=True)
        os.makedirs(partly)
        for name, size in transport.receive_json(owner).items():
            descriptor = os.open(os.path.join(partly, os.path.basename(name)), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                for part in transport.receive_parts(size, owner, CHUNK):
                    write_all(descriptor, part)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(partly)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partly, path)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        shutil.rmtree(partly, ignore_errors=True)
        raise RunError(
            f"saving {path} failed: {error.strerror}; free disk space and {how_to_continue(os.path.dirname(path))}"
        ) from error
