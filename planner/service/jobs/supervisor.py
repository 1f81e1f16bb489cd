"""The supervisor of worker processes: takes jobs from the store, lane by lane in order, and stores their results.

Lanes: ``solve`` has as many workers as the settings say; each device has one, for runs and for measurements.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from tightfit.planner.service.jobs.cache import CacheFolder
from tightfit.planner.service.jobs.kinds import KINDS
from tightfit.planner.service.jobs.orders import LOCAL, SOLVE, JobOrder
from tightfit.planner.service.jobs.processes import Worker, WorkerProcesses
from tightfit.planner.service.jobs.store import ATTEMPTS, JobStore, content_key, folder_row
from tightfit.planner.service.wire.errors import ServiceError, StorageError, failing_disk
from tightfit.planner.service.wire.events import Events
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.schema import Error, RequestBody, ServiceJob
from tightfit.planner.service.wire.settings import Settings

T = TypeVar("T")
READING_SECONDS = 60
"""of the processor, for all that a job does beside its search"""
RETAIN_SECONDS = 60.0
DISK_SECONDS = 5.0
"""between tries to write where the disk is full"""

log = logging.getLogger("tightfit.service")


def cpu_seconds(request: Mapping[str, Any]) -> int | None:
    """Seconds of the processor that a job may take which has a time limit: twice as many for each of its plans, and
    what reading and writing take. None for jobs without one, which `Settings.job_seconds` ends.
    """
    limit: float | None = request.get("time_limit")
    if limit is None:
        return None
    plans = math.prod(
        len(request[part]) for part in ("memory", "policies", "devices") if isinstance(request.get(part), list)
    )
    return READING_SECONDS + math.ceil(2 * plans * limit)


class Supervisor:
    def __init__(self, settings: Settings, store: JobStore, objects: ObjectStore, events: Events) -> None:
        self.settings, self.store, self.objects, self.events = settings, store, objects, events
        self.runs = settings.data_dir / "runs"
        self._wake: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.cache = CacheFolder(settings.data_dir / "cache")
        self.processes = WorkerProcesses(objects.temporary, self.cache.folder)
        self._workers: dict[str, Worker] = {}
        self._cancelled: set[str] = set()
        self._stopping = False

    def recover(self) -> None:
        """Put back what ran when the service ended, and clear up after it. Raises StorageError
        where the disk is full.
        """
        with failing_disk(self.settings.data_dir):
            self.runs.mkdir(exist_ok=True)
        requeued, interrupted = self.store.recover()
        swept = self.objects.sweep(self.store.digests()) + self.cache.sweep()
        log.info("store opened", extra={"requeued": requeued, "interrupted": interrupted, "swept": swept})

    async def start(self) -> None:
        for lane, slots in ((SOLVE, self.settings.workers), (LOCAL, 1)):
            self._wake[lane] = asyncio.Event()
            self._tasks += [asyncio.create_task(self._serve(lane)) for _ in range(slots)]
        self._tasks.append(asyncio.create_task(self._retain()))

    async def stop(self) -> None:
        """End every worker; what was running waits for the next start. Runs save first."""
        self._stopping = True
        for identity, worker in list(self._workers.items()):
            log.info("job put back", extra={"job": identity})
            self._end(self.store.job(identity), worker)
        for task in self._tasks:
            if task.get_name() not in self._workers:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.processes.close()

    async def ask(self, kind: str, body: RequestBody, key: str | None = None) -> ServiceJob:
        """The job of a request, once it is checked, which an equal one has made already if its kind says so, or one
        with the same idempotency `key`. Raises ServiceError for what is refused.
        """
        asked = await KINDS[kind].check(self.store, self.settings, body)
        lane = KINDS[kind].lane
        job, new = self.store.enqueue(
            kind,
            lane,
            asked.request,
            content=None if asked.repeatable else content_key(kind, asked.request),
            key=key,
            waiting=self.settings.waiting,
            uses=asked.uses,
            renews=None if asked.renews is None else content_key(kind, asked.renews),
        )
        if new:
            self.wake(lane)
        return self.events.shown(job)

    def wake(self, lane: str) -> None:
        """Tell a lane that it has a new job."""
        self._wake[lane].set()

    def cancel(self, identity: str) -> ServiceJob:
        """End a job: at once where it waits or solves, with a checkpoint where it trains."""
        job = self.store.job(identity)
        if job.state == "queued":
            job = self.store.finish(identity, "cancelled", files=self._unfinished_folder(job))
            self._announce(job)
        elif job.state == "running":
            self._cancelled.add(identity)
            if identity in self._workers:  # else it is about to start, and `_carry_out` looks
                self._end(job, self._workers[identity])
        return self.events.shown(job)

    def resume(self, identity: str, key: str | None = None) -> ServiceJob:
        """A run that ended before its last step goes on from its checkpoint, or from the start where it has none."""
        job, new = self.store.resume(identity, key=key, waiting=self.settings.waiting)
        if new:
            self._announce(job)
            self.wake(LOCAL)
        return self.events.shown(job)

    @staticmethod
    def _end(job: ServiceJob, worker: Worker) -> None:
        """Ask a run to save and end; kill any other job, which has nothing to save."""
        if job.kind != "run":
            worker.kill()
        elif worker.process.stdin is not None:
            worker.process.stdin.close()

    # --- one lane --------------------------------------------------------------------------------------------------

    async def _serve(self, lane: str) -> None:
        while not self._stopping:
            self._wake[lane].clear()
            job = await self._retried(lambda: self.store.next(lane))
            if job is None:
                if lane == SOLVE:
                    self.processes.prepare(SOLVE)
                await self._wake[lane].wait()
                continue
            task = asyncio.current_task()
            assert task is not None
            task.set_name(job.id)
            try:
                self.events.changed(job)
                await self._carry_out(job, lane)
            except asyncio.CancelledError:
                if self.store.job(job.id).state == "running":  # about to start when the service stops
                    self.store.requeue(job.id, counted=False)
                raise
            except StorageError:
                raise  # the service stops and nothing can be written: the next start takes the job up
            except Exception:
                log.exception("job failed inside the service", extra={"job": job.id})
                message = "internal error; the service's log tells more"
                error = Error(code="internal", message=message)
                with contextlib.suppress(ServiceError):  # set aside meanwhile
                    self._announce(await self._retried(partial(self.store.finish, job.id, "failed", error=error)))
            finally:
                task.set_name(lane)

    async def _carry_out(self, job: ServiceJob, lane: str) -> None:
        worker = self._workers[job.id] = await self.processes.take(lane)
        if job.id in self._cancelled:
            worker.kill()
        try:
            limit = None if job.kind == "run" else self.settings.job_seconds
            try:
                async with asyncio.timeout(limit):
                    end = await worker.carry_out(self._order(job), partial(self.events.progress, job.id))
            except TimeoutError:
                worker.kill()
                message = f"the job took longer than {self.settings.job_seconds:.0f} s; set a smaller time_limit"
                end = {"event": "error", "code": "too_slow", "message": message}
            code = await worker.process.wait()
            await self._conclude(job, end, code, worker)
        finally:
            self._workers.pop(job.id, None)
            await worker.end()

    def _order(self, job: ServiceJob) -> JobOrder:
        alone = KINDS[job.kind].lane == LOCAL
        rows = self.store.files_of(job.id)
        return JobOrder(
            kind=job.kind,
            request=job.request,
            objects=str(self.objects.folder),
            digests={row["id"]: row["digest"] for row in rows if row["digest"] is not None},
            names={row["id"]: row["name"] for row in rows},
            folder=str(self.runs / job.id),
            lock=str(self.settings.data_dir / f"{LOCAL}.lock") if alone else None,
            command=list(self.settings.command),
            memory_bytes=None if alone else self.settings.solve_bytes,
            cpu_seconds=cpu_seconds(job.request),
            folders=[str(folder) for folder in self.settings.folders],
            paths=next((json.loads(row["paths"]) for row in rows if row["paths"] is not None), {}),
        )

    async def _conclude(self, job: ServiceJob, end: dict[str, Any] | None, code: int, worker: Worker) -> None:
        if end is not None and end.get("code") == "storage":
            log.error("not stored; done again until it is", extra={"job": job.id, "why": end["message"]})
            await asyncio.sleep(DISK_SECONDS)
        ended = await self._retried(lambda: self._write_end(job, end, code, worker))
        if ended.state == "queued":
            self.wake(KINDS[job.kind].lane)
        self._announce(ended)

    def _write_end(self, job: ServiceJob, end: dict[str, Any] | None, code: int, worker: Worker) -> ServiceJob:
        if end is not None and "result" in end:
            return self.store.finish(job.id, "succeeded", result=end["result"], files=end["files"])
        if job.id in self._cancelled:
            return self.store.finish(job.id, "cancelled", files=self._unfinished_folder(job))
        if self._stopping or (end is not None and end["code"] == "storage"):
            return self.store.requeue(job.id, counted=False)
        if end is not None:
            if end["code"] == "internal":
                log.error("job failed inside", extra={"job": job.id, "said": worker.last_stderr()})
            error = Error(code=end["code"], message=end["message"])
            if "unreadable" in end:
                error = Error(code="input", message=str(self.store.damaged(end["unreadable"], end["message"])))
        elif code == -signal.SIGXCPU:
            seconds = cpu_seconds(job.request)
            message = f"the job took more than the {seconds} s of the processor that its time_limit gives it"
            error = Error(code="too_slow", message=f"{message}; set a smaller time_limit, or ask for fewer plans")
        elif code == -signal.SIGKILL and job.attempts < ATTEMPTS:
            # Killed from outside, perhaps by the kernel for want of memory: worth another try.
            return self.store.requeue(job.id, counted=True)
        else:
            ending = signal.Signals(-code).name if code < 0 else f"status {code}"
            log.error("worker died", extra={"job": job.id, "how": ending, "said": worker.last_stderr()})
            limit = self.settings.solve_bytes >> 20
            message = f"the process of this job died ({ending}); its memory limit is {limit} MiB"
            error = Error(code="worker_died", message=message)
        return self.store.finish(job.id, "failed", error=error, files=self._unfinished_folder(job))

    async def _retried(self, write: Callable[[], T]) -> T:
        """Call `write`, again and again while the disk is full, and return its result: a job's end
        must not get lost.
        """
        while True:
            try:
                return write()
            except StorageError as error:
                log.error("not stored; tried again until it is", extra={"why": str(error)})  # noqa: TRY400  no traceback
                if self._stopping:
                    raise  # the next start takes the job up
            await asyncio.sleep(DISK_SECONDS)

    def _unfinished_folder(self, job: ServiceJob) -> list[dict[str, Any]]:
        """The folder of a run that did not get to its end: its checkpoints count among what is kept. Of any other job
        nothing stays.
        """
        if job.kind != "run":
            shutil.rmtree(self.runs / job.id, ignore_errors=True)
            return []
        size = 0
        for path in (self.runs / job.id).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a run that lost its worker may still be clearing up
                size += path.stat().st_size if path.is_file() else 0
        return [folder_row(job.id, size)] if size else []

    def _announce(self, job: ServiceJob) -> None:
        self._cancelled.discard(job.id)  # only now: it may be cancelled while its end waits for room
        log.info("job", extra={"job": job.id, "kind": job.kind, "state": job.state, "attempts": job.attempts})
        self.events.changed(job)

    # --- retention -------------------------------------------------------------------------------------------------

    async def _retain(self) -> None:
        while True:
            try:
                self.retain()
            except Exception:
                log.exception("retention failed")
            await asyncio.sleep(RETAIN_SECONDS)

    def retain(self) -> int:
        """Remove what is too old or too much; returns how many files went."""
        if self.store.lane(LOCAL)[0] is None:  # else a job may use files there that no row names yet
            self.store.count_cache(self.cache.rows())
        before = time.time() - self.settings.keep_days * 86400
        removed = self.store.expire(before=before, keep_bytes=self.settings.keep_bytes)
        self._discard(removed)
        known_folders = self.store.job_ids() | set(self.store.set_aside())
        for folder in self.runs.iterdir():
            if folder.name not in known_folders:
                shutil.rmtree(folder, ignore_errors=True)
        return len(removed)

    def _discard(self, removed: Sequence[dict[str, Any]]) -> None:
        """Remove from the disk what lies behind rows that the store has removed, unless another row has it too."""
        kept_digests = self.store.digests() if removed else set()
        for row in removed:
            if row["kind"] == "cache":
                self.cache.remove(row["id"])
            if row["digest"] is not None and row["digest"] not in kept_digests:
                self.objects.remove(row["digest"])

    def delete_job(self, identity: str) -> None:
        """Remove a job that has ended, and of a run all that it left. Raises ServiceError where there is none, or it is
        needed.
        """
        self._discard(self.store.remove_job(identity))
        shutil.rmtree(self.runs / identity, ignore_errors=True)
        self.events.forget(identity)

    def delete_file(self, kind: str, identity: str, *, with_plans: bool = False) -> None:
        """Remove a profile or a plan. Raises ServiceError where there is none, or it is needed."""
        self._discard(self.store.remove_file(kind, identity, with_plans=with_plans))
