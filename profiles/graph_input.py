"""Reads bare graphs: DAGs of operators with seconds and bytes, written by other tools, to plan, compare and simulate.

A bare graph has no layers, programs or tensors of tightfit's, and nothing to execute. It becomes a `Profile` whose
model kind is ``graph``: one layer, one program, one value per operator. Its budget limits the live bytes: while an
operator runs, its inputs, its output, its workspace, every other output that is still in memory, and the graph's fixed
bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, ValidationError

from tightfit.profiles.schema import (
    Channel,
    DeviceFigures,
    Floor,
    FrozenRecord,
    Layer,
    Many,
    Model,
    Operator,
    Profile,
    Program,
    Tensor,
    Value,
)
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import printable

GRAPH_VERSION = 1
MOST_OPERATORS = 10_000
MOST_SECONDS = 1e12
"""Largest seconds accepted for an operator or a channel's latency: beyond it, sums of times lose all precision."""
LEAST_BYTES_PER_SECOND = 1e-3
LAYER = "graph"
"""Name of the single layer, and of its program, that hold a bare graph's operators."""
FIXED = "fixed bytes"
AGAIN = "correct it in the tool that writes the graph"
NO_CHANNEL = Channel(bytes_per_second=1.0, latency_seconds=1e18)
"""Channel of a graph that describes no disk: so slow that its plans offload nothing."""


def _whole(value: Any) -> Any:
    """Turn a float without a fraction into an int: some tools write 10 bytes as 10.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole), Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
"""These types accept JSON's own kinds only: neither the string "1.0" nor true is a number, and neither "no" nor 1 is a
boolean."""
ASIDE = ("operators", "format")
"""Fields that only the graph itself has, not its operators or channels."""


class BareOperator(FrozenRecord):
    """One operator: it reads the outputs of its inputs and makes one output of its own."""

    name: str = Field(min_length=1)
    seconds: Number = Field(ge=0, le=MOST_SECONDS, allow_inf_nan=False, description="time of one run")
    output_bytes: Whole = Field(ge=0, le=1 << 50, description="bytes that stay while any later reader needs them")
    workspace_bytes: Whole = Field(0, ge=0, le=1 << 50, description="bytes needed only while it runs")
    inputs: list[str] = Field([], description="names of the operators whose outputs it reads")
    phase: Literal["forward", "backward"] | None = Field(
        None, description="of a training step; all operators or none have one"
    )
    recomputable: Flag = Field(True, description="False: it runs once, its output stays until its last reader")
    keep_until_end: Flag = Field(False, description="True: its output must be there when the graph is done")


class BareChannel(FrozenRecord):
    """A path between memory and disk, or between a card's memory and its host's.

    Reads and writes share it, one transfer at a time.
    """

    bytes_per_second: Number = Field(ge=LEAST_BYTES_PER_SECOND, allow_inf_nan=False)
    latency_seconds: Number = Field(0.0, ge=0, le=MOST_SECONDS, allow_inf_nan=False)


class BareGraph(FrozenRecord):
    """A graph as another tool writes it.

    Operators run in the order given, except where an input is listed after its reader.
    """

    format: Literal["tightfit-graph"]
    version: Whole = GRAPH_VERSION
    name: str = "graph"
    fixed_bytes: Whole = Field(
        0, ge=0, le=1 << 50, description="what no schedule avoids: parameters, their gradients, constants, the batch"
    )
    estimated: Flag = Field(False, description="True: seconds were computed from operations and bytes, not measured")
    write: BareChannel | None = Field(None, description="where outputs may be moved to; not given: none is moved")
    read: BareChannel | None = Field(None, description="back into memory; given if and only if `write` is")
    operators: Many[BareOperator]


def is_bare(data: Any) -> bool:
    """Whether parsed JSON is meant as a bare graph, by its field `format` or `operators`, or as a list of operators."""
    if isinstance(data, list):
        return bool(data) and isinstance(data[0], dict) and {"name", "seconds", "output_bytes"} <= data[0].keys()
    if not isinstance(data, dict):
        return False
    return data.get("format") == "tightfit-graph" or ("operators" in data and "layers" not in data)


def parse_graph(data: Any, source: str = "graph") -> Profile:
    """The profile of a bare graph given as parsed JSON; `source` is named in messages.

    Raises InputError, naming the operator and the field, for: wrong types and values, a name given twice, an input that
    names no operator, a cycle, phases given to some operators only, a forward operator that reads a backward one, one
    channel without the other.
    """
    if not isinstance(data, dict):
        raise InputError(
            f'{source}: {_kind(data)}, no graph; write {{"format": "tightfit-graph", "operators": [...]}} with the'
            " operators in it"
        )
    if data.get("format") != "tightfit-graph":
        written = repr(data["format"]) if "format" in data else "missing"
        raise InputError(f'{source}: field format is {written}; write "tightfit-graph"')
    version = data.get("version", GRAPH_VERSION)
    if version != GRAPH_VERSION and not isinstance(version, bool):
        raise InputError(f"{source}: graph version {version!r}, this tightfit reads version {GRAPH_VERSION}; {AGAIN}")
    try:
        graph = BareGraph.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{source}: field {_place(first['loc'], data)}: {first['msg']} (got {repr(first['input'])[:60]}); {AGAIN}"
        ) from error
    return graph_profile(graph, source)


def refuse_repeated(content: bytes, source: str) -> None:
    """Raise InputError if any object in a graph's JSON has the same field twice, since it is unclear which one is
    meant.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for field, value in pairs:
            if field in fields:
                name = None if any(key in ASIDE for key, _ in pairs) else dict(pairs).get("name")
                whose = f" (operator {name!r})" if isinstance(name, str) else ""
                raise InputError(
                    f"{source}: field {field}{whose}: given twice, {fields[field]!r:.60} and {value!r:.60}; {AGAIN}"
                )
            fields[field] = value
        return fields

    json.loads(content, object_pairs_hook=checked)  # noqa: TID251  it has been read once


def graph_profile(graph: BareGraph, source: str = "graph") -> Profile:
    """The profile of a bare graph. `source` only names the graph in error messages and leaves the profile unchanged.

    Raises InputError as `parse_graph` does.
    """
    if (graph.read is None) != (graph.write is None):
        missing, present = ("read", "write") if graph.read is None else ("write", "read")
        raise InputError(
            f"{source}: field {missing}: missing, while {present} is given; give both, or neither where nothing is to"
            " be moved"
        )
    order = _order(graph.operators, source)
    kinds: dict[str, Literal["activation", "gradient"]] = {
        op.name: "gradient" if op.phase == "backward" else "activation" for op in order
    }
    values = [
        Value(
            name=op.name, shape=[op.output_bytes], stride=[1], dtype="uint8", bytes=op.output_bytes, kind=kinds[op.name]
        )
        for op in order
    ]
    operators = [
        Operator(
            target=op.name,
            phase=op.phase or "forward",
            args=[],
            inputs=list(dict.fromkeys(op.inputs)),
            outputs=[op.name],
            seconds=op.seconds,
            workspace_bytes=op.workspace_bytes,
            recomputable=op.recomputable,
        )
        for op in order
    ]
    tensors = [
        Tensor(name=op.name, kind=kinds[op.name], shape=[op.output_bytes], dtype="uint8", bytes=op.output_bytes)
        for op in order
        if op.keep_until_end
    ]
    if graph.fixed_bytes:
        tensors.append(
            Tensor(name=FIXED, kind="constant", shape=[graph.fixed_bytes], dtype="uint8", bytes=graph.fixed_bytes)
        )
    content = json.dumps(graph.model_dump(mode="json"), sort_keys=True)
    return Profile(
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        model=Model(name=graph.name, source=graph.name, kind="graph"),  # no path: profiles do not depend on it
        batch=1,
        compute_dtype="as given",
        optimizer={},
        device=DeviceFigures(
            name="the device that the graph's figures are for",
            kind="cpu",
            threads=1,
            measured=not graph.estimated,
            floor=Floor(import_peak_bytes=0, resident_bytes=0, instruction_bytes=0),
            read=_channel(graph.read),
            write=_channel(graph.write),
        ),
        tensors=tensors,
        programs=[Program(name=LAYER, values=values, operators=operators)],
        layers=[Layer(name=LAYER, program=LAYER, bindings={op.name: op.name for op in order})],
        loss=order[-1].name,
    )


def _channel(channel: BareChannel | None) -> Channel:
    return NO_CHANNEL if channel is None else Channel(**channel.model_dump())


def _kind(data: Any) -> str:
    """In words, the type of parsed JSON that is not an object, for an error message."""
    if data is None:
        return "null"
    return f"a list of {len(data)}" if isinstance(data, list) else f"{data!r:.60}"


def _place(loc: Sequence[int | str], data: dict[str, Any]) -> str:
    """The place of a validation error in words: the path of fields, with the operator's name if it lies in one."""
    path = ".".join(str(part) for part in loc)
    if len(loc) >= 2 and loc[0] == "operators" and isinstance(loc[1], int):
        operator = data["operators"][loc[1]]
        name = operator.get("name") if isinstance(operator, dict) else None
        path += f" (operator {name!r})" if isinstance(name, str) else ""
    return path


def _order(operators: Sequence[BareOperator], source: str) -> list[BareOperator]:
    """The operators, checked, in an order that runs inputs first: forward before backward where it can be, else as
    given.
    """
    if not 2 <= len(operators) <= MOST_OPERATORS:
        raise InputError(
            f"{source}: field operators: {len(operators)} operators; a graph has 2 to {MOST_OPERATORS}, {AGAIN}"
        )
    position: dict[str, int] = {}
    for index, op in enumerate(operators):
        if op.name in position or op.name == FIXED:
            raise InputError(
                f"{source}: field operators.{index}.name: {op.name!r} is taken by"
                f" {'the fixed bytes' if op.name == FIXED else f'operator {position[op.name]}'}; {AGAIN}"
            )
        position[op.name] = index
    if len({op.phase is None for op in operators}) == 2:
        index = next(i for i, op in enumerate(operators) if op.phase is None)
        raise InputError(
            f"{source}: field operators.{index}.phase (operator {operators[index].name!r}): missing, while other"
            " operators have one; give all operators a phase or none"
        )
    for index, op in enumerate(operators):
        for name in op.inputs:
            if name not in position:
                raise InputError(
                    f"{source}: field operators.{index}.inputs (operator {op.name!r}): {name!r} is no operator of the"
                    f" graph; {AGAIN}"
                )
            if op.phase == "forward" and operators[position[name]].phase == "backward":
                raise InputError(
                    f"{source}: field operators.{index}.inputs (operator {op.name!r}): a forward operator reads"
                    f" {name!r}, which is backward; {AGAIN}"
                )
    return _sorted(operators, position, source)


def _sorted(operators: Sequence[BareOperator], position: dict[str, int], source: str) -> list[BareOperator]:
    missing_inputs = [len(set(op.inputs)) for op in operators]
    readers: list[list[int]] = [[] for _ in operators]
    for index, op in enumerate(operators):
        for name in set(op.inputs):
            readers[position[name]].append(index)
    ready = [(op.phase == "backward", i) for i, op in enumerate(operators) if not missing_inputs[i]]
    heapq.heapify(ready)
    order: list[BareOperator] = []
    while ready:
        _, index = heapq.heappop(ready)
        order.append(operators[index])
        for reader in readers[index]:
            missing_inputs[reader] -= 1
            if not missing_inputs[reader]:
                heapq.heappush(ready, (operators[reader].phase == "backward", reader))
    if len(order) < len(operators):
        edges = [(name, op.name) for op in operators for name in op.inputs]
        import networkx as nx

        cycle = [edge[0] for edge in nx.find_cycle(nx.DiGraph(edges))]
        cycle_text = " → ".join([*cycle[:8], "…"] if len(cycle) > 8 else [*cycle, cycle[0]])
        raise InputError(f"{source}: the operators' inputs form a cycle: {printable(cycle_text)}; {AGAIN}")
    return order
