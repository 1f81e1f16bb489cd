"""The server of a federated run as its caller sees it: starts a SuperLink and the rounds on it, follows them, ends
them.

With `devices` it also starts a node for each of these on this machine, for a trial. All processes end with this one,
however it ends.
"""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.children import last_words
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import write_whole
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.federated import flower
from tightfit.runtime.federated.device import DeviceSettings, start
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds_folder import FAILED, PID, REPORT, SERVER, RoundsFolder
from tightfit.runtime.session.fleet import free_port
from tightfit.runtime.session.output import locked

POLL_SECONDS = 0.5
START_SECONDS = 120.0
"""until a SuperLink answers, and until the rounds have begun on it, at most"""
END_SECONDS = 15.0
"""that processes have to end when they are asked to; then they are killed"""
LOCAL = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files with which the SuperLink shows who it is; paths."""

    certificate: str
    key: str
    authority: str
    """certificates of the authority that signed; devices need these too"""


@dataclass(frozen=True, kw_only=True)
class SuperLinkOptions:
    """Where and how the SuperLink serves."""

    host: str = LOCAL
    port: int = 0
    """0: any that is free"""
    tls: Tls | None = None
    """None: in the clear"""
    keys: Sequence[str] = ()
    """public keys of the devices that may take part; none: whoever reaches the SuperLink"""
    devices: Sequence[DeviceSettings] = field(default_factory=list)
    """that run on this machine"""


def serve(
    options: RoundOptions,
    serving: SuperLinkOptions,
    *,
    resume: bool,
    overwrite: bool,
    told: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Carry out the rounds that `options` ask for; returns the report, also written to ``out/report.json``.

    `told` is called with the record of each round. Raises InputError where Flower is missing, for settings that cannot
    be used, and where `out` holds an earlier run and neither `resume` nor `overwrite` is set; RunError where a process
    that is needed ends. What is acknowledged stays, and `resume` goes on from there.
    """
    flower.check_installed()
    if serving.keys and not serving.tls:
        raise InputError(
            "keys of devices are checked over TLS only: give the SuperLink's certificate, its key and authority"
        )
    folder = RoundsFolder(Path(options.out).absolute())
    with locked(folder.out):
        _ready(folder, resume=resume, overwrite=overwrite)
        with _processes(folder.out) as processes:
            return _served(processes, folder, options, serving, told)


def _ready(folder: RoundsFolder, *, resume: bool, overwrite: bool) -> None:
    found = folder.rounds.exists() or (folder.out / REPORT).exists()
    if found and not resume and not overwrite:
        raise InputError(
            f"{folder.out} holds an earlier run; continue it with {spelled('resume', True)}, replace it with"
            f" {spelled('overwrite', True)}, or choose another folder"
        )
    if resume and not found:
        raise InputError(
            f"{folder.out} holds no rounds to go on from; leave out {spelled('resume', True)} to start from the"
            " beginning"
        )
    if not resume:
        folder.clear()
    for name in (REPORT, FAILED, PID):
        (folder.out / name).unlink(missing_ok=True)


def _served(
    processes: _Processes,
    folder: RoundsFolder,
    options: RoundOptions,
    serving: SuperLinkOptions,
    told: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    home = folder.out / "flower"
    environment = flower.environment(home)
    port = serving.port or free_port()
    flags = ["--insecure"]
    if serving.tls:
        flags = ["--ssl-certfile", serving.tls.certificate, "--ssl-keyfile", serving.tls.key]
        flags += ["--ssl-ca-certfile", serving.tls.authority]
    flags += ["--enable-supernode-auth"] if serving.keys else []
    # At SIGTERM a SuperLink waits for as long as a device has a request open; it keeps nothing that a later one needs.
    command = flower.superlink_command(serving.host, port, *flags)
    processes.start("superlink", command, environment, signal.SIGKILL)
    local = LOCAL if serving.host in ("0.0.0.0", "::") else serving.host  # noqa: S104  compared, not bound
    processes.until("superlink", lambda: _answers(local, port))
    authority = serving.tls.authority if serving.tls else None
    app = flower.write_app(home, f"{local}:{port}", authority)
    for key in serving.keys:
        processes.run("register", flower.register_command(key), environment)
    settings = write_whole(folder.out / SERVER, options.model_dump_json(indent=1) + "\n")
    for device in serving.devices:
        command = node_command(device.write(), f"{local}:{port}", authority, insecure=not serving.tls)
        processes.start(f"device-{device.member}", command, environment)
    seen = [len(folder.lines())]
    processes.run("run", flower.run_command(app, settings), environment)

    limit = time.monotonic() + START_SECONDS

    def over() -> bool:
        if not (folder.out / PID).exists() and time.monotonic() > limit:
            raise RunError(f"the rounds have not begun after {START_SECONDS:.0f} s: {processes.said('superlink')}")
        lines = folder.lines()
        for line in lines[seen[0] :]:
            told(line)
        seen[0] = len(lines)
        if (folder.out / FAILED).exists():
            failed = json.loads((folder.out / FAILED).read_text())
            kind = InputError if failed["exit_code"] == InputError.exit_code else RunError
            raise kind(failed["message"])
        return (folder.out / REPORT).exists()

    processes.until("superlink", over, math.inf)
    report: dict[str, Any] = json.loads((folder.out / REPORT).read_text())
    return report


def node_command(
    settings: str, superlink: str, authority: str | None, private_key: str | None = None, *, insecure: bool
) -> list[str]:
    """The command line of a device's node; without an authority it trusts those of the system."""
    trust = ["--insecure"] * insecure + ([] if authority is None else ["--root-certificates", authority])
    trust += [] if private_key is None else ["--private-key", private_key]
    return interpreter.command("tightfit.runtime.federated.node", settings, "--superlink", superlink, *trust)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1.0).close()
    except OSError:
        return False
    return True


class _Processes:
    """The processes of a run, each with a log of its own in `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def end(self) -> None:
        for process in self.running.values():
            process.terminate()
        until = time.monotonic() + END_SECONDS
        for process in self.running.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        orphaned: signal.Signals = signal.SIGTERM,
    ) -> subprocess.Popen[bytes]:
        """Start a process, as of `tightfit.runtime.federated.device.start`."""
        self.running[name] = start(command, str(self.out / f"{name}.log"), environment, orphaned)
        return self.running[name]

    def run(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Run a command to its end. Raises RunError with what it said where it fails."""
        process = self.start(name, command, environment)
        try:
            code = process.wait(START_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RunError(
                f"{' '.join(command[:3])} has not ended in {START_SECONDS:.0f} s: {self.said(name)}"
            ) from error
        del self.running[name]
        if code:
            raise RunError(f"{' '.join(command[:3])} ended with code {code}: {self.said(name)}")

    def until(self, name: str, done: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait until `done()`, as long as the process called `name` lives. Raises RunError where it ends, or time is
        up.
        """
        limit = time.monotonic() + seconds
        while not done():
            if (code := self.running[name].poll()) is not None:
                if done():
                    return
                raise RunError(
                    f"the {name} has ended with code {code}: {self.said(name)}; rounds that are acknowledged are kept,"
                    f" go on with {spelled('resume', True)}"
                )
            self._server_lives()
            if time.monotonic() > limit:
                raise RunError(f"the {name} does not answer after {seconds:.0f} s: {self.said(name)}")
            time.sleep(POLL_SECONDS)

    def _server_lives(self) -> None:
        """Raise RunError where the process of the rounds has gone without a word."""
        try:
            number = int((self.out / PID).read_text())
        except (OSError, ValueError):
            return
        if not _lives(number) and not any((self.out / name).exists() for name in (REPORT, FAILED)):
            raise RunError(
                "the process of the rounds has ended; rounds that are acknowledged are kept, go on with"
                f" {spelled('resume', True)}"
            )

    def said(self, name: str) -> str:
        """The last line that a process said."""
        with (self.out / f"{name}.log").open("rb") as log:
            return last_words(log)


def _lives(number: int) -> bool:
    """Whether a process is there and has not ended; one that its parent has not asked about yet still has a number."""
    try:
        told = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return told.rpartition(")")[2].split()[0] not in ("Z", "X")


@contextmanager
def _processes(out: Path) -> Iterator[_Processes]:
    """Processes that end when the block does."""
    processes = _Processes(out)
    with _ended_by_signals():
        try:
            yield processes
        finally:
            processes.end()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that processes are ended here."""

    def ended(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, ended) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt as stop:
        error = RunError(f"interrupted; rounds that are acknowledged are kept, go on with {spelled('resume', True)}")
        error.interrupted = True
        raise error from stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
