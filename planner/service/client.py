"""A client of the service: `connect` from another machine, then make the same calls as in the library.

```python
from tightfit.planner.service.client import connect

with connect("https://planner.local:8000", token="...", certificate="planner.pem") as service:
    plan = service.plan(profile, 600 << 20, time_limit=30.0)
```
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self
from urllib.parse import quote

import httpx

from tightfit.planner.comparison import Comparison
from tightfit.planner.generation.choice import Choice, ChoiceProblem
from tightfit.planner.io import parse_plan
from tightfit.planner.plan_result import sealed
from tightfit.planner.report.explanation import Explanation, account
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import SOLVER, TIME_LIMIT, PlanOptions
from tightfit.planner.service.wire.bundles import canonical_request
from tightfit.planner.service.wire.errors import JOB_ERRORS
from tightfit.planner.service.wire.inputs import UPLOADED
from tightfit.planner.service.wire.redaction import Redaction, with_paths
from tightfit.planner.service.wire.schema import FINISHED, OWN_DEVICE
from tightfit.planner.service.wire.settings import HEARTBEAT_SECONDS, check_token, installed_version, loopback
from tightfit.profiles.io import canonical_json, parse_profile
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.schema import PROFILE_VERSION, Profile
from tightfit.profiles.sources.bundle import Bundle, BundleRequest
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.option_names import spelled

Kept = Literal["profiles", "plans", "bundles", "uploads", "jobs", "runs"]
"""what the service keeps; runs are jobs too"""
JobProgress = Callable[[dict[str, Any]], None]
"""called with the latest figures of a job: stage, incumbent, bound, gap, seconds; or step, loss, seconds,
resident_bytes
"""
CONNECT_SECONDS = 5.0
"""within which a service has to take a connection; how long it may take to answer is another question"""
TRIES = 4
RESTART_SECONDS = 60.0
"""seconds for which a service that has answered before is asked again: a restarted one goes on with its jobs"""
RETRY_SECONDS = 0.5
RESTARTING = frozenset({502, 503, 504})
"""statuses that a proxy answers while the service restarts"""
BROKEN = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
"""a connection that was there and broke off"""
ERROR_TYPES = {code: kind for kind, code in JOB_ERRORS.items()}


def connect(
    url: str,
    *,
    token: str | None = None,
    certificate: str | os.PathLike[str] | None = None,
    timeout: float = 60.0,
    tell: Callable[[str], None] | None = None,
) -> Client:
    """A client of the service at `url`. `token` and `certificate`, the file of the certificate that an https service
    shows or of those who have signed it, default to the environment variables TIGHTFIT_TOKEN and TIGHTFIT_CERTIFICATE.
    `tell` is called with a sentence when a service that has answered does not any more and is asked again.

    Raises InputError where what answers there is no tightfit, or one that its certificate does not vouch for, and
    RunError where nothing answers.
    """
    client = Client(
        url,
        token=token or os.environ.get("TIGHTFIT_TOKEN") or None,
        certificate=certificate,
        timeout=timeout,
        tell=tell,
    )
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

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout: float,
        certificate: str | os.PathLike[str] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        base_url = url.partition("#")[0].partition("?")[0]  # as it is copied from a browser
        self.url = base_url.rstrip("/").removesuffix("/page")
        self._ids: dict[str, str] = {}
        self._heard: dict[str, str] = {}  # job -> id of the last of its events
        self._answered = self._silent = False
        self._tell = tell or (lambda sentence: None)
        headers = {}
        try:
            address = httpx.URL(self.url)
            if token is not None:
                check_token(token)
                _check_secret(address)
                headers["Authorization"] = f"Bearer {token}"
            self._http = httpx.Client(
                base_url=address,
                headers=headers,
                timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
                trust_env=False,
                verify=_trusted(address, certificate),
            )
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
        """Store a profile as it is; returns its id."""
        return str(self._upload("profile", canonical_json(profile).encode())["id"])

    def _upload_without_paths(self, profile: Profile) -> tuple[dict[str, Any], dict[str, str]]:
        """Store a profile without paths of this machine; returns what is stored, and what `_planned` puts into plans of
        it.
        """
        model, paths = Redaction([]).model(profile.model)
        content = canonical_json(profile.model_copy(update={"model": model}))
        return self._upload("profile", content.encode()), paths

    def _planned(self, identity: str, paths: dict[str, str]) -> Plan:
        """A stored plan as it would have been made here."""
        plan = self.stored_plan(identity)
        if paths:
            plan = sealed(plan.model_copy(update={"model": with_paths(plan.model, paths)}))
            self._ids[plan.fingerprint] = identity
        return plan

    def _upload(self, kind: str, content: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return self._json(self._send("POST", f"/v1/uploads/{kind}", content=gzip.compress(content, 5), headers=headers))

    def profile(self, *, progress: JobProgress | None = None, **request: Any) -> Profile:
        """Measure a model on the service's machine: `path`, `hub` or `config`, with seq, batch,
        lora_rank, ..., force.
        """
        identity = self.ask("profiles", progress=progress, **request)["profile"]
        return parse_profile(self._send("GET", f"/v1/profiles/{identity}/file").content, f"{self.url}: {identity}")

    def bundle(self, request: BundleRequest, *, progress: JobProgress | None = None) -> Bundle:
        """`tightfit.profiles.steps.tracing_process.make_bundle`, done by the service. The names of files and folders on
        this machine are not sent.
        """
        self._check_version()
        sent = request.without_places()
        description = self._upload("description", canonical_request(sent))["id"]
        identity = self.ask("bundles", progress=progress, description=description)["bundle"]
        content = self._send("GET", f"/v1/bundles/{identity}/file").content
        bundle = Bundle.parse(content, f"{self.url}: {identity}")
        if bundle.request.model_dump_json() != sent.model_dump_json():
            raise RunError(f"{self.url}: what was made there as {identity} is a bundle of another model; ask again")
        return bundle

    def _check_version(self) -> None:
        """Raises InputError where the service has another tightfit, whose profiles this one does not read."""
        there = self.get("/healthz")
        if there.get("profile_version") != PROFILE_VERSION:
            version = there.get("profile_version", "another, and makes no bundles")
            raise InputError(
                f"{self.url}: tightfit {there.get('version')} answers there, whose profile version is {version}; that"
                f" of tightfit {installed_version()} here is {PROFILE_VERSION}. Install the same tightfit on both, or"
                " copy a bundle that `tightfit prepare` makes on a machine with this one"
            )

    @keywords_of(PlanOptions)
    def plan(self, profile: Profile, budget_bytes: int, options: PlanOptions) -> Plan:
        """`tightfit.planner.plan.plan`, solved by the service."""
        fields = options.model_dump(exclude={"progress"}, exclude_none=True)
        stored, paths = self._upload_without_paths(profile)
        request = {"profile": stored["id"], "memory": budget_bytes, **fields}
        return self._planned(self.ask("plans", progress=options.progress, **request)["plan"], paths)

    def choose(self, problems: Sequence[ChoiceProblem], *, progress: JobProgress | None = None) -> list[Choice | None]:
        """What of a model stays in memory between the tokens of answers (`tightfit.planner.generation.choice`), chosen
        by the service.
        """
        dumped = [problem.model_dump() for problem in problems]
        choices = self.ask("answer-plans", progress=progress, problems=dumped)["choices"]
        return [None if choice is None else Choice.model_validate(choice) for choice in choices]

    def explanation(self, plan: Plan) -> Explanation:
        """The explanation of a plan that the service has made; unless a comparison made it, with the value of
        memory.
        """
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
        progress: JobProgress | None = None,
    ) -> Comparison:
        """`tightfit.planner.compare.compare`, solved by the service."""
        stored, paths = self._upload_without_paths(profile)
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
        cells = self.ask("comparisons", progress=progress, **request)["cells"]
        return Comparison(
            devices=list(dict.fromkeys(cell["device"] for cell in cells)),
            budgets=sorted({cell["budget_bytes"] for cell in cells}),
            policies=list(dict.fromkeys(policies)),
            plans=[self._planned(cell["plan"], paths) for cell in cells],
        )

    def run(
        self,
        plan: str | Plan,
        data: str,
        *,
        steps: int | None = None,
        progress: JobProgress | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Carry out a plan that the service has made, or the stored one of that id, on the service's machine, `steps`
        steps or else `epochs` times the data; returns the report.
        """
        identity = self._id(plan if isinstance(plan, str) else plan.fingerprint)
        return self._report("/v1/runs", {"plan": identity, "data": data, "steps": steps, **options}, progress)

    def resume(self, run: str, *, progress: JobProgress | None = None) -> dict[str, Any]:
        """Go on with a run that was cancelled, failed or interrupted, from its checkpoint; returns the report."""
        return self._report(f"/v1/runs/{run}/resume", {}, progress)

    def _report(self, path: str, request: dict[str, Any], progress: JobProgress | None) -> dict[str, Any]:
        job = self._post_once(path, request)
        self.finish(job, progress)
        return self.get(f"/v1/runs/{job['id']}/report")

    def _post_once(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """Ask for a job of its own, of which there is one even if the request is sent again."""
        return self.post(path, request, headers={"Idempotency-Key": os.urandom(16).hex()})

    def stored_plan(self, identity: str) -> Plan:
        plan = parse_plan(self._send("GET", f"/v1/plans/{identity}/file").content, f"{self.url}: {identity}")
        self._ids[plan.fingerprint] = identity
        return plan

    def _id(self, plan: str) -> str:
        """The id of the stored plan with that fingerprint, where this client has it from the service; else `plan`."""
        return self._ids.get(plan, plan)

    # --- what the service keeps --------------------------------------------------------------------------------------

    def items(self, what: Kept, *, search: str | None = None, **filters: str) -> Iterator[dict[str, Any]]:
        """What the service keeps, newest first: all of it, or what mentions all words of `search`; of plans those of a
        `profile`, of jobs those of a `kind` or in a `state`.
        """
        query = {**filters, **({} if search is None else {"search": search})}
        while True:
            answer = self.get(f"/v1/{what}", query)
            yield from answer["items"]
            if answer["next"] is None:
                return
            query["after"] = answer["next"]

    def rename(self, what: Kept, identity: str, **names: str | None) -> dict[str, Any]:
        """Give what is kept another `title` or `note`; None takes it away. Returns it."""
        return self._json(self._send("PATCH", f"/v1/{what}/{identity}", json=names))

    def delete(self, what: Kept, identity: str, *, with_plans: bool = False) -> None:
        """Delete what is kept, a profile together with its plans if `with_plans`, a run with all that it left."""
        query = {"with_plans": "true"} if with_plans else {}
        self._send("DELETE", f"/v1/{what}/{identity}", params=query)

    def download(
        self,
        what: Kept,
        identity: str,
        file: str | os.PathLike[str],
        *,
        part: Literal["adapter", "report", "merged"] = "adapter",
    ) -> Path:
        """Write a profile or a plan to a file, or of a run its adapter (a tar file), its report or what was merged
        last. Returns the file's path.

        Raises InputError where it cannot be written.
        """
        path = Path(file)
        half_written = path.with_name(f".{path.name}.part")
        address = f"/v1/{what}/{identity}/{part if what == 'runs' else 'file'}"
        try:
            with half_written.open("wb") as content:
                self._send("GET", address, into=content)
            half_written.replace(path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; name a file that can be written") from error
        finally:
            with contextlib.suppress(OSError):
                half_written.unlink()
        return path

    # --- jobs ------------------------------------------------------------------------------------------------------

    def ask(
        self, what: str, *, progress: JobProgress | None = None, once: bool = False, **request: Any
    ) -> dict[str, Any]:
        """Have any kind of work done: `what` and the fields of its request are those of `POST /v1/WHAT`. Returns the
        job's result. With `once`, of a kind whose equal requests are jobs of their own, there is one even if the
        request is sent again.
        """
        send = self._post_once if once else self.post
        result: dict[str, Any] = self.finish(send(f"/v1/{what}", request), progress)["result"]
        return result

    def follow(self, identity: str, progress: JobProgress | None = None) -> dict[str, Any]:
        """Follow a job that was begun here or elsewhere to its end. Returns it, and raises what made it fail."""
        return self.finish(self.get(f"/v1/jobs/{identity}"), progress)

    def finish(self, job: dict[str, Any], progress: JobProgress | None = None) -> dict[str, Any]:
        """Follow a job to its end. Raises what made it fail; after Ctrl-C the job goes on, as KeyboardInterrupt
        says.
        """
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
        self._heard.pop(identity, None)
        while broken_since is None or time.monotonic() - broken_since < RESTART_SECONDS:
            with contextlib.suppress(httpx.TransportError):
                for name, data in self._stream(identity):
                    broken_since, self._silent = None, False
                    yield name, data
                    if name == "job" and data["state"] in FINISHED:
                        return
            broken_since = broken_since or time.monotonic()
            self._tell_of_silence()
            time.sleep(RETRY_SECONDS)
        raise RunError(
            f"{self.url}: no answer for {RESTART_SECONDS:.0f} s; {identity} goes on when `tightfit serve` is started"
            f" there again: see {self.url}/v1/jobs/{identity} then"
        )

    def _stream(self, identity: str) -> Iterator[tuple[str, dict[str, Any]]]:
        headers = {"Last-Event-ID": self._heard[identity]} if identity in self._heard else {}
        timeout = httpx.Timeout(3 * HEARTBEAT_SECONDS, connect=CONNECT_SECONDS)
        with self._http.stream("GET", f"/v1/jobs/{identity}/events", headers=headers, timeout=timeout) as response:
            if response.status_code in RESTARTING:
                raise httpx.RemoteProtocolError(f"status {response.status_code}")
            if response.status_code != 200:
                response.read()
                _raise(response)
            name = event_id = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("id: "):
                    event_id = line.removeprefix("id: ")
                elif line.startswith("data: "):
                    self._heard[identity] = event_id
                    yield name, json.loads(line.removeprefix("data: "))

    def cancel(self, identity: str) -> dict[str, Any]:
        """End a job, a run with a checkpoint."""
        job: dict[str, Any] = self._send("POST", f"/v1/jobs/{identity}/cancel").json()
        return job

    # --- data and answers ---------------------------------------------------------------------------------------------

    def upload_data(self, file: str | os.PathLike[str], name: str | None = None) -> str:
        """Store a file of samples at the service, by default under its own name; returns what a run there takes as
        data.
        """
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise InputError(f"{os.fspath(file)}: {error.strerror}; name a file of samples") from error
        headers = {"Content-Type": "application/octet-stream"}
        path = f"/v1/uploads/samples?name={quote(name or Path(file).name, safe='')}"
        return f"{UPLOADED}{self._json(self._send('POST', path, content=content, headers=headers))['id']}"

    def preview(
        self, profile: str, data: str, *, progress: JobProgress | None = None, **options: Any
    ) -> dict[str, Any]:
        """Data as a run of a stored profile would read them: its first samples in pieces, learned or not, what is cut
        and what is refused; `options` are columns, truncate and packing.
        """
        return self.ask("previews", progress=progress, once=True, profile=profile, data=data, **options)

    def answer(
        self, profile: str, prompt: str | list[dict[str, str]], *, progress: JobProgress | None = None, **options: Any
    ) -> dict[str, Any]:
        """What the model of a stored profile answers, with the adapter of a `run` if one is named: text, tokens,
        seconds; `progress` gets the text so far. `options` are those of `/v1/answers`.
        """
        return self.ask("answers", progress=progress, once=True, profile=profile, prompt=prompt, **options)

    def merged(
        self, run: str, file: str | os.PathLike[str], form: str = "gguf", progress: JobProgress | None = None
    ) -> Path:
        """Merge a run's adapter into its model at the service and download it: a GGUF file, or a tar file with
        safetensors.
        """
        self.ask("merges", progress=progress, run=run, format=form)
        return self.download("runs", run, file, part="merged")

    # --- HTTP ------------------------------------------------------------------------------------------------------

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._json(self._send("GET", path, params=query))

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        return self._json(self._send("POST", path, json=body, headers=headers))

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            content: dict[str, Any] = response.json()
        except ValueError as error:
            raise InputError(f"{response.url}: what answers there is no tightfit service; check the address") from error
        return content

    def _send(self, method: str, path: str, into: IO[bytes] | None = None, **options: Any) -> httpx.Response:
        """The answer to a request, which is sent again where the connection breaks off, and for a minute to a service
        that has answered before. What is answered is written `into` a file, where one is given.
        """
        started, tries = time.monotonic(), 0
        while True:
            try:
                with self._http.stream(method, path, **options) as response:
                    if into is None or response.status_code >= 400:
                        response.read()
                    else:
                        into.seek(0)
                        into.truncate()
                        into.writelines(response.iter_bytes())
            except httpx.UnsupportedProtocol as error:
                raise InputError(f"{self.url!r} is no address; write for example http://127.0.0.1:8000") from error
            except httpx.TransportError as error:
                refused = _refused_certificate(error)
                if refused is not None:
                    raise InputError(f"{self.url}: {refused}") from error
                tries += 1
                if not self._again(started) and not (isinstance(error, BROKEN) and tries < TRIES):
                    broke = "the connection broke off" if isinstance(error, BROKEN) else "no answer"
                    raise RunError(f"{self.url}: {broke} ({error}); is `tightfit serve` running there?") from error
            else:
                if response.status_code in RESTARTING and self._again(started):
                    continue
                if response.status_code >= 400:
                    _raise(response)
                self._answered, self._silent = True, False
                return response

    def _again(self, started: float) -> bool:
        """Whether a request that was first sent at `started` is to be sent again, after a moment."""
        again = self._answered and time.monotonic() - started < RESTART_SECONDS
        if again:
            self._tell_of_silence()
            time.sleep(RETRY_SECONDS)
        return again

    def _tell_of_silence(self) -> None:
        """Say once, until there is an answer, that the service does not answer any more and is asked again."""
        if not self._silent:
            self._tell(f"{self.url}: no answer any more; it is asked again for {RESTART_SECONDS:.0f} s")
        self._silent = True


def _check_secret(address: httpx.URL) -> None:
    """Raises InputError for an address to which a token would pass in the clear."""
    if address.scheme == "http" and not loopback(address.host):
        port = address.port or 80
        raise InputError(
            f"{address}: the token would pass in the clear. Give the service a certificate (`tightfit serve"
            f" --certificate`) and write https://; or take an ssh tunnel, `ssh -L {port}:localhost:{port}"
            f" {address.host}`, and write http://127.0.0.1:{port}"
        )


def _trusted(address: httpx.URL, certificate: str | os.PathLike[str] | None) -> ssl.SSLContext | bool:
    """What a service's certificate is checked by: that file, or else what this machine trusts.

    Raises InputError for a file that holds no certificate, and for one that is named beside an address without https.
    """
    if address.scheme != "https":
        if certificate is not None:
            raise InputError(f"{spelled('certificate')} {certificate}: {address} shows none; write https://")
        return True
    file = certificate or os.environ.get("TIGHTFIT_CERTIFICATE")
    if not file:
        return True
    try:
        return ssl.create_default_context(cafile=os.fspath(file))
    except ssl.SSLError as error:
        raise InputError(
            f"{spelled('certificate')} {file}: no certificate in PEM; copy that of `tightfit serve`"
        ) from error
    except OSError as error:
        raise InputError(f"{spelled('certificate')} {file}: {error.strerror}; copy that of `tightfit serve`") from error


def _refused_certificate(error: BaseException) -> str | None:
    """Why there is no TLS with a service, as the error that ended the connection has it; None where TLS was not the
    reason.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({cause.verify_message.rstrip('.')}); name the file of the service's"
            f" certificate with {spelled('certificate')} or in TIGHTFIT_CERTIFICATE, and the service by a name that"
            " stands in it"
        )
    return f"no https is spoken there ({cause.reason or cause}); check the address, or write http://"


def _raise(response: httpx.Response) -> None:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}; if no tightfit service answers there, check the address"
    if response.status_code == 401:
        message += "; set TIGHTFIT_TOKEN to the service's token"
    error_type = RunError if response.status_code >= 500 or response.status_code == 429 else InputError
    raise error_type(f"{response.url.host}: {message}")
