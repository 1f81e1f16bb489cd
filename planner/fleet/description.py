"""Reads a fleet's description, a TOML file: its devices with their profiles, budgets and links, and the micro-batches
of a step or the steps of a federated round.

```toml
micro_batches = 16         # of a step that all make together
steps = 64                 # of a federated round, of all together

[[member]]
name = "laptop"
profile = "laptop.json"  # relative to this file
memory = "320MiB"
link = "100Mbit/s"       # both ways; or up = "40Mbit/s" and down = "250Mbit/s"
latency = "2ms"          # one way; without it 0
weight = 2               # split rounds: of its share of the steps; without it 1

[server]                 # split rounds: computes the layers that devices do not hold
profile = "server.json"
memory = "4GiB"
link = "1Gbit/s"         # without it, a fast one
```
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.options import FEDERATED
from tightfit.planner.fleet.schema import LARGEST_STEPS, NAME, Link
from tightfit.profiles.io import load_profile
from tightfit.profiles.options import MOST_ACCUMULATED
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError, named
from tightfit.runtime.common.files import read_whole
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import parse_rate, parse_seconds, parse_size

T = TypeVar("T")
COUNTS = {"micro_batches": ("step", 16), "steps": ("round", 64)}
"""what is counted under a key: parts of what, and an example"""
KEYS = (*COUNTS, "member", "server")
MEMBER_KEYS = ("name", "profile", "memory", "link", "up", "down", "latency", "weight")
SERVER_KEYS = ("profile", "memory", "link", "up", "down", "latency")
FAST = Link(up_bytes_per_second=1.25e9, down_bytes_per_second=1.25e9)
"""a server's connection where the description names none"""
WHOLE = "the bandwidth of its connection: link = RATE, or up = RATE and down = RATE where they differ"


@dataclass(frozen=True, kw_only=True)
class DescribedFleet:
    """The devices of a fleet, and what they do together."""

    members: list[MemberSpec]
    of_rounds: bool
    count: int
    """micro-batches of a step, or local steps of a round"""
    server: MemberSpec | None = None
    """of rounds: computes the layers that devices do not hold; None: each holds all"""
    weights: dict[str, float] = field(default_factory=dict)
    """of the devices' shares of the steps, where they are given"""


def read_description(
    path: str | os.PathLike[str], kind: str = "auto", *, micro_batches: int | None = None, steps: int | None = None
) -> DescribedFleet:
    """The fleet of a kind that the file `path` describes; of any kind ("auto"), federated rounds where it names a
    server, or the steps of a round and no micro-batches.

    `micro_batches` of a step, or `steps` of a round, take the place of the file's own figure. Raises InputError, naming
    the file, the member and the key, for what is missing, unknown or no such value, and for a profile that cannot be
    read.
    """
    given = {"micro_batches": micro_batches, "steps": steps}
    for key, count in given.items():
        if count is not None:
            _checked_count(count, key)
    path = Path(path)
    with named(path):
        content = _content(path)
        _known_keys(content, KEYS)
        tables = content.get("member")
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise InputError("it names no member; describe each device of the fleet under a line [[member]]")
        names_rounds = "server" in content or ("steps" in content and "micro_batches" not in content)
        undecided = kind == "auto" and micro_batches is None
        of_rounds = kind == FEDERATED or (undecided and (steps is not None or names_rounds))
    key = "steps" if of_rounds else "micro_batches"
    (foreign,) = given.keys() - {key}
    if given[foreign] is not None:
        does = FEDERATED if of_rounds else kind
        raise InputError(f"{spelled(foreign)} is for fleets of another kind; plan {does} without it")
    with named(path):
        if given[key] is None and key not in content:
            what, example = COUNTS[key]
            raise InputError(f"'{key}' is missing; say how many make a {what}, as in {key} = {example}")
        count = _checked_count(content[key] if given[key] is None else given[key], key)
        members = _members(tables, path.parent)
        if not of_rounds:
            if "server" in content or any("weight" in table for table in tables):
                raise InputError(
                    "a [server] and weights are for split federated rounds: plan them with"
                    f" {spelled('kind', FEDERATED)}"
                )
            return DescribedFleet(members=members, of_rounds=False, count=count)
        server = None
        if "server" in content:
            with named("[server]"):
                server = _server(content["server"], path.parent)
        weights: dict[str, float] = {}
        for member, table in zip(members, tables):
            if "weight" in table:
                with named(f"member {member.name!r}"):
                    weights[member.name] = _weight(table["weight"], split=server is not None)
        return DescribedFleet(members=members, of_rounds=True, count=count, server=server, weights=weights)


def _weight(weight: object, *, split: bool) -> float:
    if not split:
        raise InputError("'weight' is for rounds with a [server]; without one, steps are shared out by speed")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise InputError(f"'weight' is {weight!r}; give a number above 0, as in weight = 2")
    return float(weight)


def _server(table: object, folder: Path) -> MemberSpec:
    if not isinstance(table, dict):
        raise InputError("describe the server under a line [server]: profile, memory, link")
    _known_keys(table, SERVER_KEYS)
    named = {**table, "name": "server"}
    if not {"link", "up", "down"} & set(table):
        return replace(_member({**named, "link": "1Gbit/s"}, folder, {}), link=FAST)
    return _member(named, folder, {})


def _checked_count(count: object, key: str) -> int:
    most = MOST_ACCUMULATED if key == "micro_batches" else LARGEST_STEPS
    if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= most:
        return count
    raise InputError(f"'{key}' is {count!r}; give a whole number from 1 to {most}")


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_whole(path).decode())
    except OSError as error:
        raise InputError(
            f"{error.strerror}; `tightfit fleet plan --help` says what a description of a fleet holds"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not text; write the description of the fleet as TOML") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f'not TOML ({error}); texts stand in quotes, as in name = "laptop"') from error


def _members(tables: list[dict[str, Any]], folder: Path) -> list[MemberSpec]:
    profiles: dict[Path, Profile] = {}
    members: list[MemberSpec] = []
    for number, table in enumerate(tables, 1):
        name = table.get("name")
        with named(f"member {name!r}" if isinstance(name, str) else f"member {number}"):
            _known_keys(table, MEMBER_KEYS)
            members.append(_member(table, folder, profiles))
            if name in [member.name for member in members[:-1]]:
                raise InputError("another member has the same 'name'; each needs a name of its own")
    return members


def _member(table: Mapping[str, Any], folder: Path, profiles: dict[Path, Profile]) -> MemberSpec:
    """One member; a profile that several share is read once, and kept in `profiles`."""
    name = _value(table, "name", _checked_name, 'a name, as in name = "laptop"')
    file = folder / _value(table, "profile", str, 'the file of its profile: profile = "laptop.json"')
    memory = table.get("memory")
    if isinstance(memory, int) and not isinstance(memory, bool):
        table = {**table, "memory": str(memory)}  # plain bytes need no quotes
    budget = _value(table, "memory", parse_size, 'the budget of its processes: memory = "320MiB"')
    link = _link(table)
    if file not in profiles:
        with named("'profile'"):
            profiles[file] = load_profile(file)
    return MemberSpec(name=name, profile=profiles[file], budget_bytes=budget, link=link)


def _link(table: Mapping[str, Any]) -> Link:
    if "link" in table and ("up" in table or "down" in table):
        raise InputError(f"'link' is for both ways, so 'up' and 'down' cannot stand beside it; give {WHOLE}")
    up, down = ("link", "link") if "link" in table else ("up", "down")
    latency = _value(table, "latency", parse_seconds, 'a time: latency = "2ms"') if "latency" in table else 0.0
    return Link(
        up_bytes_per_second=_value(table, up, parse_rate, WHOLE),
        down_bytes_per_second=_value(table, down, parse_rate, WHOLE),
        latency_seconds=latency,
    )


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name for files; use letters, digits, '-' and '_', and '.' inside")
    return name


def _value(table: Mapping[str, Any], key: str, parse: Callable[[str], T], what: str) -> T:
    """What `parse` makes of the text under `key`; `what` says what is wanted there."""
    if key not in table:
        raise InputError(f"'{key}' is missing; give {what}")
    if not isinstance(table[key], str):
        raise InputError(f"'{key}' is {table[key]!r}, not a text in quotes; give {what}")
    with named(f"'{key}'"):
        return parse(table[key])


def _known_keys(table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            raise InputError(f"no key is called {key!r}; there are {', '.join(known)}")
