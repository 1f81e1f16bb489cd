"""The example that a service shows at first: a measured profile of the demo's model, which comes with the package.

It is given once, to a service that has no profile yet, and planned like any other by jobs: that takes ten seconds of a
core, where the plans would take thirty times the package's room that the profile takes. Who deletes it does not get it
again. `make example` makes it anew.
"""

from __future__ import annotations

import gzip
import logging
from importlib.resources import files

from tightfit.planner.search_options import SOLVER, TIME_LIMIT
from tightfit.planner.service.http.service import Service
from tightfit.planner.service.wire.requests import ComparisonRequest, PlanRequest
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.files import write_whole

EXAMPLE = files("tightfit.planner.service.wire") / "example.json.gz"
GIVEN = "example"
"""file of the data folder that says that the service has had it"""
BUDGETS = tuple(f"{size}MiB" for size in (100, 128, 160, 208, 256, 350, 512, 640))
"""from a little above the smallest that is known to fit to more than it can use"""
ENDS, END_SECONDS = (SOLVER, "keep-all"), 2.0
"""policies whose smallest budgets are the ends of the curve, and for how long each is searched for: as the page asks
for them
"""
log = logging.getLogger("tightfit.service")


async def give_example(service: Service) -> None:
    """Store the example and have it planned, unless the service has or had a profile, or does not want it."""
    given = service.settings.data_dir / GIVEN
    if not service.settings.example or given.exists():
        return
    try:
        if not service.store.files("profile", limit=1).items:
            profile = (await service.uploads.keep(example_profile(), "example"))["id"]
            most = service.settings.time_limit_seconds
            curve = {"profile": profile, "memory": BUDGETS, "time_limit": min(TIME_LIMIT, most)}
            await service.supervisor.ask("comparison", ComparisonRequest.model_validate(curve))
            for policy in ENDS:
                end = {"profile": profile, "memory": 1, "policy": policy, "time_limit": min(END_SECONDS, most)}
                await service.supervisor.ask("plan", PlanRequest.model_validate(end))
        write_whole(given, "")
    except TightfitError as error:  # the service does without
        log.warning("no example", extra={"why": str(error)})


def example_profile() -> bytes:
    """The profile's JSON."""
    return gzip.decompress(EXAMPLE.read_bytes())
