"""Two machines on one: network namespaces that are connected by a cable, a planner's and a device's, which call each
other by name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PLANNER, DEVICE = "192.168.1.20", "192.168.1.30"
NAME = "planner.local"


@dataclass(frozen=True)
class Machines:
    names: tuple[str, str]
    """of the namespaces: the planner's and the device's"""
    hosts: Path

    def planner(self, line: list[str]) -> list[str]:
        return self._on(self.names[0], line)

    def device(self, line: list[str]) -> list[str]:
        return self._on(self.names[1], line)

    def _on(self, name: str, line: list[str]) -> list[str]:
        """The command line that carries a command out there. Control groups stay where they are, which `ip netns exec`
        hides.
        """
        mounted = 'mount --bind "$0" /etc/hosts && exec "$@"'
        inside = ["unshare", "--mount", "/bin/sh", "-c", mounted, str(self.hosts)]
        return ["nsenter", f"--net=/run/netns/{name}", *inside, *line]

    def cable(self, state: str) -> None:
        """Plug the cable in (`up`) or pull it (`down`), at the device."""
        _do("ip", "-n", self.names[1], "link", "set", "cable", state)


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[Machines]:
    """Skips the test where no namespaces can be made."""
    missing = [program for program in ("ip", "nsenter", "unshare", "mount") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed, which makes network namespaces")
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{PLANNER} {NAME}\n")
    machines = Machines((f"tightfit-{os.getpid()}-planner", f"tightfit-{os.getpid()}-device"), hosts)
    made: list[str] = []
    try:
        try:
            for name in machines.names:
                _do("ip", "netns", "add", name)
                made.append(name)
            ends = [["cable", "netns", name] for name in machines.names]
            _do("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for name, address in zip(machines.names, (PLANNER, DEVICE), strict=True):
                _do("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
                _do("ip", "-n", name, "link", "set", "lo", "up")
                _do("ip", "-n", name, "link", "set", "cable", "up")
            _do(*machines.device(["true"]))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
        yield machines
    finally:
        for name in made:
            _do("ip", "netns", "delete", name)


def _do(*line: str) -> None:
    subprocess.run(line, check=True, capture_output=True, text=True)
