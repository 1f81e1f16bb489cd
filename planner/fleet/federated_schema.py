"""The plan of a federated fleet: devices that come and go, how many local steps each takes in a round, and until when.

In a round every device gets the fleet's adapter, takes a number of steps of its own on its own data, by a plan of its own
within its own budget, and sends back what the adapter has become. The server adds the answers up, weighted by the tokens
that each was trained on. Nobody meets anybody between, so that a round needs no more of a link than the adapter's bytes,
once in each direction, and a device that does not answer is left out.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tightfit.planner.fleet.schema import FLEET_VERSION, Participant, Price, Record

LARGEST_STEPS = 1_000_000
"""local steps of a round, at most"""


class FederatedMember(Participant):
    """One device that may take part in rounds."""

    budget_bytes: int = Field(description="for all that runs there, Flower's processes included")
    flower_bytes: int = Field(description="of the budget: set aside for Flower's processes on the device")
    rank: int = Field(ge=1, description="of the adapter that it trains")
    adapter_bytes: int = Field(ge=0, description="of the tensors that it sends back in a round")
    start_seconds: float = Field(
        ge=0, description="of a round beside transfers and steps: until a run trains, and ends"
    )
    steps: int = Field(0, ge=0, description="local steps in a round")
    step_seconds: float | None = Field(None, description="predicted seconds of one of them")
    peak_bytes: int | None = Field(
        None, description="predicted peak of all that runs there, Flower's processes included"
    )
    round_seconds: float = Field(0.0, ge=0, description="from when the round begins until its answer has arrived")


class FederatedBaseline(Record):
    """A fixed number of steps for each device, judged in the same terms."""

    name: Literal["equal steps", "fastest alone"]
    makespan_seconds: float | None = Field(description="None: some device cannot hold a step")
    steps: dict[str, int] = Field(description="by member")
    reason: str | None = Field(None, description="why there is no makespan")


class FederatedPlan(Record):
    version: int = FLEET_VERSION
    fingerprint: str = Field(description="sha256 of everything else here")
    kind: Literal["federated"] = "federated"
    model: str
    steps: int = Field(ge=1, description="local steps of a round, of all devices together")
    accumulate: int = Field(ge=1, description="steps of an update; each device takes a multiple of it")
    batch: int = Field(description="rows of a step")
    rank: int = Field(ge=1, description="of the fleet's adapter: the largest of those that take part")
    adapter_bytes: int = Field(description="of its tensors, which every device gets in a round")
    members: list[FederatedMember]
    makespan_seconds: float = Field(description="predicted seconds of a round, until the last answer has arrived")
    bound_seconds: float = Field(description="no numbers of steps and no plans of this class take less")
    gap: float = Field(description="(makespan_seconds - bound_seconds) / makespan_seconds")
    solve_seconds: float
    baselines: list[FederatedBaseline] = []
    prices: list[Price] = []

    @property
    def taking(self) -> list[FederatedMember]:
        """The members that take part in rounds."""
        return [member for member in self.members if member.steps]
