"""Bare graphs as a tool would hand them over."""

from __future__ import annotations

from tightfit.profiles.graph_input import parse_graph


def graph_of(operators, fixed=0, channels=None, name="graph"):
    """The profile of a graph. `operators`: as in its JSON; `channels`: its fields `read` and `write`, of a disk."""
    fields = {"format": "tightfit-graph", "operators": operators, "fixed_bytes": fixed}
    return parse_graph(fields | (channels or {}), name)
