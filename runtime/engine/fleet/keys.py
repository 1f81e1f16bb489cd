"""The keys by which the members of a fleet know each other: a CURVE key pair for each (ZeroMQ's RFC 26), in one file in
the folder of the fleet's plan. Who has none of them is not let in, and reads nothing of what passes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tightfit.runtime.common.errors import InputError

LETTERS = 40
"""of a key in Z85"""
MOST_BYTES = 1 << 20
"""of the file"""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What one member knows: the public keys of all, in the order of the members, and its own secret one; in Z85."""

    public: list[bytes]
    secret: bytes

    @classmethod
    def of(cls, pairs: Mapping[str, Mapping[str, str]], members: Sequence[str], rank: int) -> Keys:
        """What the member `rank` knows of these key pairs. Raises KeyError where one is missing."""
        public = [pairs[name]["public"].encode() for name in members]
        return cls(public=public, secret=pairs[members[rank]]["secret"].encode())


def new_pairs(members: Iterable[str]) -> dict[str, dict[str, str]]:
    """A public and a secret key for each member, by name: the content of a fleet's file of keys."""
    import zmq

    pairs = {name: zmq.curve_keypair() for name in members}
    return {name: {"public": public.decode(), "secret": secret.decode()} for name, (public, secret) in pairs.items()}


def read_keys(path: str, members: Sequence[str], rank: int) -> Keys:
    """The keys that the member `rank` needs, from a fleet's file. Raises InputError where they are not there."""
    try:
        with open(path, encoding="ascii") as file:
            keys = Keys.of(json.loads(file.read(MOST_BYTES)), members, rank)
        if any(len(key) != LETTERS for key in (*keys.public, keys.secret)):
            raise ValueError(f"a key has {LETTERS} letters")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: no keys of the fleet ({type(error).__name__}: {error}); they lie in the folder of the fleet's"
            " plan: give every member all of it, or make it again with `tightfit fleet plan`"
        ) from error
    return keys
