"""Orders and answers as Flower's records. Imports Flower, so that only its apps import this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from tightfit.runtime.federated.messages import ADAPTER, STYPE, Word


def packed(name: str, words: Mapping[str, Word], adapter: bytes) -> RecordDict:
    """The content of a message: words under `name`, and the file of an adapter beside them."""
    file = Array(dtype="uint8", shape=(len(adapter),), stype=STYPE, data=adapter)
    return RecordDict({name: ConfigRecord(dict(words)), ADAPTER: ArrayRecord({ADAPTER: file})})


def unpacked(name: str, content: RecordDict) -> tuple[dict[str, Word], bytes]:
    """The words under `name` and the adapter's file. Raises KeyError where they are not there."""
    records: Any = content  # whose type names every kind of record, whichever a name holds
    return dict(records[name]), records[ADAPTER][ADAPTER].data
