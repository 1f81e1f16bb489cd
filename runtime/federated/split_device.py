"""A device's part of a round in which a server computes the upper layers: its own run is the first stage of a pipeline.

The order names a port of the server, where the run of the upper layers meets this one. The device answers with the lower
part of the adapter. Before its first round it says who it is and sends the labels of its data, with which the server
computes the loss; of a language model these are the texts that are to be predicted, without prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.federated.device import Device, carried_out, give_back, take_part
from tightfit.runtime.federated.messages import HELLO, Answer, Order, SplitOrder


@dataclass(frozen=True, kw_only=True)
class SplitDevice(Device):
    """A device that computes the lower layers."""

    fleet: str
    """folder of the fleet's plan"""
    labels: str
    """file of the labels of its data"""
    server: str
    """host at which the server's runs listen"""


def device_of(path: str) -> Device:
    """The device whose settings a file has. Raises InputError where it has none."""
    try:
        with open(path, encoding="utf-8") as file:
            split = "labels" in json.load(file)
    except (OSError, ValueError, TypeError):
        split = False  # which `read` explains
    return (SplitDevice if split else Device).read(path)


def order_of(device: Device, words: Mapping[str, object]) -> Order:
    """The order that a message holds. Raises KeyError, ValueError or TypeError where it is none for this device."""
    return (SplitOrder if isinstance(device, SplitDevice) else Order).of(words)


def part_of(device: Device, order: Order, adapter: Callable[[], bytes]) -> tuple[Answer, bytes]:
    """Carry out an order; the answer, and the file beside it: `take_part`."""
    if not isinstance(device, SplitDevice):
        return take_part(device, order, adapter)
    assert isinstance(order, SplitOrder)
    return _hello(device, order) if order.round == HELLO else carried_out(device, order, adapter, _stage)


def _hello(device: SplitDevice, order: SplitOrder) -> tuple[Answer, bytes]:
    try:
        with open(device.labels, "rb") as file:
            labels = file.read()
    except OSError as error:
        told = f"{device.labels}: {error.strerror}; join again with --data"
        return Answer(round=HELLO, member=device.member, error=told), b""
    known = order.knows(device.member, hashlib.sha256(labels).hexdigest())
    give_back()
    return Answer(round=HELLO, member=device.member), b"" if known else labels


def _stage(device: SplitDevice, order: SplitOrder, steps: int, given: str, out: str) -> list[str]:
    if not order.port:
        raise InputError(f"round {order.round}: the order names no port of the server")
    arguments = stage_arguments(device.fleet, device.member, order, device.server, device.data, given, out)
    return interpreter.command(*arguments, *["--truncate"] * device.truncate, *["--no-cgroup"] * (not device.cgroup))


def stage_arguments(
    fleet: str, member: str, order: SplitOrder, host: str, data: str, given: str, out: str
) -> list[str]:
    """The module that runs a stage, and its arguments: of the device `member`, whichever side runs it."""
    arguments = ["tightfit.runtime.cli.main", "fleet", "federate", "stage", fleet, "--member", member]
    arguments += ["--at", f"{host}:{order.port}", "--data", data, "--steps", str(order.steps_of(member)), "-o", out]
    arguments += ["--adapter", given, "--lr", repr(order.lr), "--weight-decay", repr(order.weight_decay)]
    return [*arguments, "--seed", str(order.seed), "--timeout", repr(order.seconds), "--json"]
