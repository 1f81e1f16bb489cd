"""The options of planning for fleets."""

from __future__ import annotations

from typing import Literal

from tightfit.planner.search_options import Gap, SearchProgress, Seconds
from tightfit.profiles.option_fields import Options, option

Kind = Literal["auto", "data", "pipeline", "mobillm", "federated"]
FEDERATED = "federated"
"""the kind of fleets that meet once a round, split or not"""
NODE_BYTES = 42 << 20
"""Flower on a device, as `tightfit fleet federate join` runs it: one process, which speaks Flower's protocol with
little memory. Measured while a run trains (flwr 1.42, Python 3.11, x86-64, with TLS): 41.0 MiB resident, of which 18.7
are its own alone
"""
START_SECONDS = 6.0
"""of a round on a device, beside transfers and steps: until the order is looked for, `tightfit run` is ready and the
answer is looked for. Measured with a model of two layers on two busy cores: 5 to 7 s"""
SERVER_START_SECONDS = 4.0
"""of a service beside its steps: until the server's run trains, and has ended. Measured with a model of three layers on
two busy cores: 3.2 to 5.8 s
"""


class FleetOptions(Options):
    """How a fleet is planned for (`tightfit.planner.fleet.fleet_planner`)."""

    kind: Kind = option(
        "auto",
        "data: every device has the whole model and some of the micro-batches. pipeline: some of the layers and all"
        " micro-batches. mobillm: a device and a server after it, which trains a side network from what the device's"
        " forward sends. federated: rounds of devices that come and go, each with data of its own. auto: federated for"
        " a description of rounds; else data, unless no device can hold a micro-batch or a pipeline is shorter.",
        metavar="KIND",
        primary=True,
    )
    bits: Literal[0, 4, 8] | None = option(
        None,
        "Of a number in messages: in a pipeline 8, or 0 for numbers as they are (default); for mobillm 8 (default), 4"
        " or 0.",
        metavar="BITS",
    )
    gap: Gap | None = option(
        None,
        "Relative gap at which a search may stop; default: 0.01 for a pipeline, else 0.001.",
        metavar="SHARE",
    )
    start: float | None = option(
        None,
        "Of a federated round on a device, beside transfers and steps, as you measured it.",
        metavar="SECONDS",
        ge=0,
    )
    server_start: float | None = option(
        None, "Of the service of a device, beside its steps; with a [server].", metavar="SECONDS", ge=0
    )
    time_limit: Seconds = option(120.0, "Seconds that all of the planning may take.", metavar="SECONDS")
    flower_bytes: int = NODE_BYTES
    """of each device's budget: for Flower's processes, in federated rounds"""
    progress: SearchProgress | None = None
