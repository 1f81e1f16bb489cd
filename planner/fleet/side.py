"""The two members of a fleet that trains a side network (MobiLLM, arXiv 2502.20421), as profiles of which ordinary plans are
made: a device that runs the frozen model's forward, and a server that trains the side network from what it receives.

The device's profile is `tightfit.planner.problem.device_forward`'s. The server's is that of the side network as
`tightfit.profiles.api.profile` measures it, whose activations are part of the batch there; here they are received
(operators `tightfit.receive`), each just before the adapter that reads it. The labels, which a message begins with, become
the server's batch (`tightfit.runtime.engine.training.batches.ReceivedBatches`): it needs no data, and never sees the tokens.
"""

from __future__ import annotations

import hashlib

from tightfit.planner.fleet.member_profiles import alone_profile, raised
from tightfit.planner.fleet.parts import RINGS, message_bytes, messages_bytes
from tightfit.planner.problem.device_forward import (
    BYTES_PER_SECOND,
    CALL_SECONDS,
    DEFAULT_BITS,
    LABELS,
    device_forward,
)
from tightfit.planner.problem.messages import message_operator
from tightfit.profiles.models.side_shape import CONFIG_KEY, INPUT, SideShape
from tightfit.profiles.schema import Layer, Profile, Program, Tensor, Value
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.fleet.message import Passing
from tightfit.runtime.engine.training.job import RECEIVE

RECEIVED = "received"
"""the layers that receive are called ``received.1`` and so on, by the place in the message"""


def side_shape(profile: Profile) -> SideShape:
    """The side network that a profile is of. Raises InputError for a profile of something else."""
    said = profile.model.config.get(CONFIG_KEY)
    if said is None:
        raise InputError(
            f"the server's profile is of {profile.model.name} itself; profile the side network: `tightfit profile MODEL"
            " --side-rank 64`"
        )
    return SideShape(blocks=tuple(said["blocks"]), rank=said["rank"])


def device_profile(profile: Profile, side: SideShape, *, micro_batches: int, bits: int = DEFAULT_BITS) -> Profile:
    """The device's profile, of its measured `profile` of the model. Raises InputError as `device_forward`."""
    return device_forward(profile, side.blocks, bits, micro_batches=micro_batches)


def server_profile(profile: Profile, *, micro_batches: int, bits: int = DEFAULT_BITS) -> Profile:
    """The server's profile, of its measured `profile` of the side network; its updates are AdamW's of `micro_batches`
    accumulated micro-batches, and its floor has room for the connections and the messages.

    Raises InputError for a profile of something else than a side network.
    """
    side = side_shape(profile)
    own = alone_profile(profile, micro_batches)
    received = {f"{INPUT}.{number}": number + 1 for number in range(len(side.blocks))}
    """activation -> its place in the message, after the labels"""
    tensors = {tensor.name: tensor for tensor in own.tensors}
    layers: list[Layer] = []
    programs: dict[str, Program] = {}
    values = {
        layer.bindings[value.name]: value
        for layer in own.layers
        for value in next(program for program in own.programs if program.name == layer.program).values
        if value.name in layer.bindings
    }
    inputs = {
        (layer.program, value) for layer in own.layers for value, name in layer.bindings.items() if name in received
    }
    there: set[str] = set()
    for layer in own.layers:
        for name in layer.bindings.values():
            if name in received and name not in there:
                there.add(name)
                program, receiver = _receiver(values[name], name, received[name], bits)
                programs[program.name] = program
                layers.append(receiver)
        layers.append(layer)
    for program in own.programs:
        made = [
            value.model_copy(update={"kind": "activation"}) if (program.name, value.name) in inputs else value
            for value in program.values
        ]
        programs[program.name] = program.model_copy(update={"values": made})
    text = f"{profile.fingerprint} server {micro_batches} {bits}"
    labels = tensors[LABELS]
    changed = [
        tensor.model_copy(update={"kind": "activation"}) if tensor.name in received else tensor
        for tensor in own.tensors
    ]
    batch = [labels.model_copy(update={"name": "input_ids"}), labels]  # as all batches are; the first is never filled
    passing = received_tensors(own)
    extra = messages_bytes(profile.device.floor, from_below=message_bytes(passing, bits), buffers=RINGS)
    return own.model_copy(
        update={
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
            "tensors": [*batch, *(tensor for tensor in changed if tensor.name != LABELS)],
            "programs": list(programs.values()),
            "layers": layers,
            "device": raised(profile.device, extra),
        }
    )


def received_tensors(profile: Profile) -> tuple[Passing, ...]:
    """What a side network takes of a micro-batch, in the order of the message: labels, then activations."""
    tensors = {tensor.name: tensor for tensor in profile.tensors}

    def passing(tensor: Tensor) -> Passing:
        return Passing(shape=tuple(tensor.shape), dtype=tensor.dtype)

    activations = (f"{INPUT}.{number}" for number in range(len(side_shape(profile).blocks)))
    return tuple(passing(tensors[name]) for name in (LABELS, *activations))


def _receiver(value: Value, name: str, number: int, bits: int) -> tuple[Program, Layer]:
    """The layer that takes tensor `number` out of the message."""
    made = value.model_copy(update={"name": "output", "kind": "activation"})
    operator = message_operator(RECEIVE, made, number, bits, CALL_SECONDS + made.bytes / BYTES_PER_SECOND)
    program = Program(name=f"{RECEIVED} {number}", values=[made], operators=[operator])
    return program, Layer(name=f"{RECEIVED}.{number}", program=program.name, bindings={"output": name})
