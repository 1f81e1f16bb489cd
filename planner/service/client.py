"""A client of the service: `connect` from another machine, then make the same calls as in the library.

```python
from tightfit.planner.service.client import connect

with connect("http://planner.local:8000", token="...") as service:
    plan = service.plan(profile, 600 << 20, time_limit=30.0)
```
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from tightfit.planner.fleet.io import parse_any
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.options import FleetOptions
from tightfit.planner.fleet.schema import FleetPlan, PipelinePlan
from tightfit.planner.io import parse_plan
from tightfit.planner.report.comparison import Comparison
from tightfit.planner.report.explanation import Explanation, account
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import SOLVER, TIME_LIMIT, PlanOptions
from tightfit.planner.service.wire.errors import JOB_ERRORS
from tightfit.planner.service.wire.schema import FINISHED, OWN_DEVICE
from tightfit.planner.service.wire.settings import check_token
from tightfit.profiles.io import canonical_json, parse_profile
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError, RunError

Progress = Callable[[dict[str, Any]], None]
"""called with the latest figures of a job: stage, incumbent, bound, gap, seconds; or step, loss, seconds, resident_bytes"""
TRIES = 4
RESTART_SECONDS = 60.0
"""seconds for which a broken event stream is requested again: a restarted service goes on with its jobs"""
RETRY_SECONDS = 0.5
RESTARTING = frozenset({502, 503, 504})
"""statuses that a proxy answers while the service restarts"""
ERROR_TYPES = {code: kind for kind, code in JOB_ERRORS.items()}


def connect(url: str, *, token: str | None = None, timeout: float = 60.0) -> Client:
    """A client of the service at `url`; `token` defaults to the environment variable TIGHTFIT_TOKEN.

    Raises InputError where nothing answers there, or what answers is no tightfit.
    """
    client = Client(url, token=token or os.environ.get("TIGHTFIT_TOKEN") or None, timeout=timeout)
    with contextlib.ExitStack() as stack:
        stack.enter_context(client)
        if client.get("/healthz").get("status") != "ok":
            raise InputError(f"{url}: what answers there is no tightfit service; check the address")
        stack.pop_all()
    return client


class Client:
    """A connection to a service. Every method raises InputError for what the service refuses, with its message, and
    RunError where the service does not answer any more.

    A request that is cut off is sent again with the same idempotency key, so that nothing is done twice.
    """

    def __init__(self, url: str, *, token: str | None, timeout: float) -> None:
        base_url = url.partition("#")[0].partition("?")[0]  # as it is copied from a browser
        self.url = base_url.rstrip("/").removesuffix("/page")
        if token is not None:
            check_token(token)
        self._ids: dict[str, str] = {}
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            raise InputError(f"{url!r} is no address ({error}); write for example http://127.0.0.1:8000") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    # --- what the library does -------------------------------------------------------------------------------------

    def upload(self, profile: Profile) -> str:
        """Store a profile; returns its id."""
        return str(self._upload(profile)["id"])

    def _upload(self, profile: Profile) -> dict[str, Any]:
        body = gzip.compress(canonical_json(profile).encode(), 5)
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return self._json(self._send("POST", "/v1/profiles/upload", content=body, headers=headers))

    def profile(self, *, progress: Progress | None = None, **request: Any) -> Profile:
        """Measure a model on the service's machine: `path`, `hub` or `config`, with seq, batch,
        lora_rank, ..., force.
        """
        job = self.finish(self.post("/v1/profiles", request), progress)
        identity = job["result"]["profile"]
        return parse_profile(self._send("GET", f"/v1/profiles/{identity}/file").content, f"{self.url}: {identity}")

    @keywords_of(PlanOptions)
    def plan(self, profile: Profile, budget_bytes: int, options: PlanOptions) -> Plan:
        """`tightfit.planner.plan.plan`, solved by the service."""
        fields = options.model_dump(exclude={"progress"}, exclude_none=True)
        request = {"profile": self.upload(profile), "memory": budget_bytes, **fields}
        job = self.finish(self.post("/v1/plans", request), options.progress)
        return self.stored_plan(job["result"]["plan"])

    def explanation(self, plan: Plan) -> Explanation:
        """The explanation of a plan that the service has made; unless a comparison made it, with the value of memory."""
        stored = self.get(f"/v1/plans/{self._id(plan.fingerprint)}")["summary"]["explanation"]
        return account(plan) if stored is None else Explanation.model_validate(stored)

    def compare(
        self,
        profile: Profile,
        budgets: Sequence[int],
        policies: Sequence[str] | None = (SOLVER,),
        *,
        devices: Sequence[str] = (OWN_DEVICE,),
        time_limit: float = TIME_LIMIT,
        gap: float = 0.0,
        optimizer: str | None = None,
        max_grad_norm: float | None = None,
        progress: Progress | None = None,
    ) -> Comparison:
        """`tightfit.planner.report.compare.compare`, solved by the service."""
        stored = self._upload(profile)
        policies = stored["summary"]["policies"] if policies is None else policies
        request = {
            "profile": stored["id"],
            "devices": list(devices),
            "memory": list(budgets),
            "policies": list(policies),
            "time_limit": time_limit,
            "gap": gap,
            "optimizer": optimizer,
            "max_grad_norm": max_grad_norm,
        }
        job = self.finish(self.post("/v1/comparisons", request), progress)
        cells = job["result"]["cells"]
        return Comparison(
            devices=list(dict.fromkeys(cell["device"] for cell in cells)),
            budgets=sorted({cell["budget_bytes"] for cell in cells}),
            policies=list(dict.fromkeys(policies)),
            plans=[self.stored_plan(cell["plan"]) for cell in cells],
        )

    @keywords_of(FleetOptions)
    def fleet(
        self, members: Sequence[MemberSpec], micro_batches: int, options: FleetOptions
    ) -> tuple[FleetPlan | PipelinePlan, dict[str, Plan], str | None]:
        """`tightfit.planner.fleet.plan.plan_kind`, solved by the service: the fleet's plan, each member's by name, and
        why it is of its kind.
        """
        stored: dict[int, str] = {}
        for member in members:
            if id(member.profile) not in stored:  # members may share one
                stored[id(member.profile)] = self.upload(member.profile)
        request = {
            **options.model_dump(exclude={"progress"}),
            "micro_batches": micro_batches,
            "members": [
                {
                    "name": member.name,
                    "profile": stored[id(member.profile)],
                    "memory": member.budget_bytes,
                    "up": member.link.up_bytes_per_second,
                    "down": member.link.down_bytes_per_second,
                    "latency": member.link.latency_seconds,
                }
                for member in members
            ],
        }
        result = self.finish(self.post("/v1/fleets", request), options.progress)["result"]
        plans = {name: self.stored_plan(identity) for name, identity in result["plans"].items()}
        return self.stored_fleet(result["fleet"]), plans, result["why"]

    def run(
        self, plan: str | Plan, data: str, *, steps: int | None = None, progress: Progress | None = None, **options: Any
    ) -> dict[str, Any]:
        """Carry out a plan that the service has made, or the stored one of that id, on the service's machine, `steps`
        steps or else `epochs` times the data; returns the report.
        """
        identity = self._id(plan if isinstance(plan, str) else plan.fingerprint)
        return self._report("/v1/runs", {"plan": identity, "data": data, "steps": steps, **options}, progress)

    def resume(self, run: str, *, progress: Progress | None = None) -> dict[str, Any]:
        """Go on with a run that was cancelled, failed or interrupted, from its checkpoint; returns the report."""
        return self._report(f"/v1/runs/{run}/resume", {}, progress)

    def _report(self, path: str, request: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
        job = self.post(path, request, headers={"Idempotency-Key": os.urandom(16).hex()})
        self.finish(job, progress)
        return self.get(f"/v1/runs/{job['id']}/report")

    def stored_plan(self, identity: str) -> Plan:
        plan = parse_plan(self._send("GET", f"/v1/plans/{identity}/file").content, f"{self.url}: {identity}")
        self._ids[plan.fingerprint] = identity
        return plan

    def _id(self, plan: str) -> str:
        """The id of the stored plan with that fingerprint, where this client has it from the service; else `plan`."""
        return self._ids.get(plan, plan)

    def stored_fleet(self, identity: str) -> FleetPlan | PipelinePlan:
        return parse_any(self._send("GET", f"/v1/fleets/{identity}/file").content, f"{self.url}: {identity}")

    # --- jobs ------------------------------------------------------------------------------------------------------

    def finish(self, job: dict[str, Any], progress: Progress | None = None) -> dict[str, Any]:
        """Follow a job to its end. Raises what made it fail; after Ctrl-C the job goes on, as KeyboardInterrupt says."""
        events = iter(()) if job["state"] == "succeeded" else self.events(job["id"])
        try:
            for name, data in events:
                if name == "progress" and progress is not None:
                    progress(data)
                elif name == "job":
                    job = data
        except KeyboardInterrupt:
            # Others may wait for it too: an equal request is the same job, but for runs.
            result = "ask the same again for its result"
            if job["kind"] == "run":
                result = (
                    f"see {self.url}/v1/jobs/{job['id']}, and {self.url}/v1/runs/{job['id']}/report once it is done"
                )
            raise KeyboardInterrupt(
                f"{job['id']} goes on at {self.url}: {result}, or end it by POST {self.url}/v1/jobs/{job['id']}/cancel"
            ) from None
        if job["state"] == "succeeded":
            return job
        error = job["error"] or {"code": job["state"], "message": f"the job {job['id']} was {job['state']}"}
        raise ERROR_TYPES.get(error["code"], RunError)(error["message"])

    def events(self, identity: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, data) of a job's events to its end; a stream that breaks is taken up again, for a
        minute of silence.
        """
        broken_since: float | None = None
        while broken_since is None or time.monotonic() - broken_since < RESTART_SECONDS:
            with contextlib.suppress(httpx.TransportError):
                for name, data in self._stream(identity):
                    broken_since = None
                    yield name, data
                    if name == "job" and data["state"] in FINISHED:
                        return
            broken_since = broken_since or time.monotonic()
            time.sleep(RETRY_SECONDS)
        raise RunError(
            f"{self.url}: no answer for {RESTART_SECONDS:.0f} s; {identity} goes on when `tightfit serve` is started there"
            f" again: see {self.url}/v1/jobs/{identity} then"
        )

    def _stream(self, identity: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._http.stream("GET", f"/v1/jobs/{identity}/events") as response:
            if response.status_code in RESTARTING:
                raise httpx.RemoteProtocolError(f"status {response.status_code}")
            if response.status_code != 200:
                response.read()
                _raise(response)
            name = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))

    def cancel(self, identity: str) -> dict[str, Any]:
        """End a job, a run with a checkpoint."""
        job: dict[str, Any] = self._send("POST", f"/v1/jobs/{identity}/cancel").json()
        return job

    # --- HTTP ------------------------------------------------------------------------------------------------------

    def get(self, path: str) -> dict[str, Any]:
        return self._json(self._send("GET", path))

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        return self._json(self._send("POST", path, json=body, headers=headers))

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            content: dict[str, Any] = response.json()
        except ValueError as error:
            raise InputError(f"{response.url}: what answers there is no tightfit service; check the address") from error
        return content

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        for tries_left in reversed(range(TRIES)):
            try:
                response = self._http.request(method, path, **options)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                if not tries_left:
                    raise RunError(f"{self.url}: the connection broke off ({error}); try again later") from error
            except httpx.UnsupportedProtocol as error:
                raise InputError(f"{self.url!r} is no address; write for example http://127.0.0.1:8000") from error
            except httpx.TransportError as error:
                raise RunError(f"{self.url}: no answer ({error}); is `tightfit serve` running there?") from error
            else:
                if response.status_code >= 400:
                    _raise(response)
                return response
        raise AssertionError


def _raise(response: httpx.Response) -> None:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}; if no tightfit service answers there, check the address"
    if response.status_code == 401:
        message += "; set TIGHTFIT_TOKEN to the service's token"
    error_type = RunError if response.status_code >= 500 or response.status_code == 429 else InputError
    raise error_type(f"{response.url.host}: {message}")
