"""Runs a tightfit service in a process of its own, on a free port, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import time
from functools import partial
from pathlib import Path

import httpx
import psutil
from starlette.testclient import TestClient
from working_folder import working_folder

from tightfit.planner.service.http.app import create_app
from tightfit.planner.service.wire.settings import Settings
from tightfit.runtime.common.interpreter import command, python_path
from tightfit.runtime.common.parent import end_with_parent

PATIENCE = 120.0
"""Seconds to wait for an answer or a job; long, because machines that run tests are busy."""


@contextlib.contextmanager
def service(tmp_path, **limits):
    """A client of a service in this process; `limits` are fields of its settings."""
    settings = Settings(data_dir=tmp_path / "data", command=tuple(command("tightfit.runtime.cli.main")), **limits)
    with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as http:
        yield http


class Served:
    """`tightfit serve` on one data folder; it can be killed and started again.

    Its working folder contains files named like tightfit's modules, which must not be imported. `http` is a client for
    it. The argument `tightfit` is the path of an installed command; without it the service runs from this checkout.
    """

    def __init__(self, data, *options, token=None, environment=None, tightfit=None, certificate=None):
        self.data, self.options, self.token, self.certificate = Path(data), options, token, certificate
        if certificate is not None:
            self.options += ("--certificate", str(certificate))
        self.environment = environment or {}
        self.command = [tightfit]
        if tightfit is None:
            self.command = command("tightfit.runtime.cli.main")
            self.environment = {"PYTHONPATH": python_path()} | self.environment
        self.log = self.data.parent / f"{self.data.name}.log"
        self.process, self.url, self.http = None, "", None

    def start(self):
        environment = {k: v for k, v in os.environ.items() if k != "TIGHTFIT_TOKEN"} | self.environment
        if self.token:
            environment["TIGHTFIT_TOKEN"] = self.token
        with self.log.open("ab") as log:
            begun = log.tell()
            self.process = subprocess.Popen(
                [*self.command, "serve", "--port", "0", "--data-dir", str(self.data), "--no-example", *self.options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=working_folder(self.data.with_name(f"{self.data.name}.working")),
                env=environment,
                # Ends the service if the test is killed. preexec_fn is safe, because no other thread runs here.
                preexec_fn=partial(end_with_parent, signal.SIGKILL),  # noqa: PLW1509
            )
        try:
            self.url = self._wait_for_url(begun)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        trusted = True if self.certificate is None else ssl.create_default_context(cafile=self.certificate)
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False, verify=trusted)
        return self

    def _wait_for_url(self, begun):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            lines = self.log.read_bytes()[begun:].decode().splitlines()
            up = any('"store opened"' in line for line in lines)
            urls = [json.loads(line)["url"] for line in lines if '"serving"' in line]
            if up and urls:
                return urls[0].rstrip("/")
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}: {lines[-3:]}")
            time.sleep(0.05)
        raise AssertionError("the service did not start")

    def stop(self):
        """Ask the service to end; returns its exit code and asserts that none of its processes is left."""
        self.http.close()
        started = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            left = psutil.wait_procs(started, timeout=10)[1]
            assert not left, left

    def kill(self):
        self.http.close()
        self.process.kill()
        self.process.wait(PATIENCE)

    def lines(self):
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    # --- requests that tests make often ------------------------------------------------------------------------------

    def upload(self, profile):
        answer = self.http.post("/v1/uploads/profile", json=profile.model_dump(mode="json"))
        assert answer.status_code in {200, 201}, answer.text
        return answer.json()["id"]

    def wait(self, job, patience=PATIENCE):
        """Poll until a job has finished; returns it."""
        until = time.monotonic() + patience
        while job["state"] in {"queued", "running"}:
            assert time.monotonic() < until, job
            time.sleep(0.05)
            job = self.http.get(f"/v1/jobs/{job['id']}").json()
        return job

    def ask(self, path, /, **body):
        answer = self.http.post(path, json=body)
        assert answer.status_code in {200, 202}, answer.text
        return answer.json()

    def result(self, path, /, **body):
        job = self.wait(self.ask(path, **body))
        assert job["state"] == "succeeded", job
        return job["result"]
