"""The service's settings: what whoever starts it decides, and the limits on what clients may ask."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

HEARTBEAT_SECONDS = 5.0
"""after which a service that has no news of a job says so"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    data_dir: Path
    """everything the service keeps lies here"""
    command: tuple[str, ...]
    """starts tightfit's command line: runs are processes of their own"""
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    """what clients must send as ``Authorization: Bearer``; None only where nobody but this machine can connect"""
    certificate: Path | None = None
    """PEM file of the certificate with which https is spoken, and of its key where `key` names none; None: http"""
    key: Path | None = None
    roots: tuple[Path, ...] = ()
    """folders from which requests may name models and data"""
    hub: bool = False
    """whether requests may name models on the hub, which are downloaded then"""
    example: bool = False
    """whether a service without profiles begins with the one that comes with the package"""
    workers: int = 2
    """plans and comparisons solved at once, a comparison by two processes"""
    solve_bytes: int = 4 << 30
    """private memory of one solving process (RLIMIT_DATA); a comparison has two"""
    time_limit_seconds: float = 300.0
    """the longest time limit that a request may set for one plan"""
    job_seconds: float = 3600.0
    """a plan, comparison or profile that takes longer is ended"""
    upload_bytes: int = 64 << 20
    """largest uploaded profile, as sent and as unpacked"""
    data_bytes: int = 256 << 20
    """largest uploaded file of samples"""
    request_bytes: int = 256 << 10
    """largest body of any other request"""
    check_bytes: int = 1 << 30
    """private memory of the process that reads an upload (RLIMIT_DATA)"""
    check_seconds: float = 60.0
    """an upload that takes longer to read is refused"""
    steps: int = 250_000
    """operators of a profile, counted once for every layer that runs them"""
    tensors: int = 1_000_000
    """tensors and values of a profile, counted the same way"""
    waiting: int = 1000
    """jobs that may be queued"""
    keep_days: float = 30.0
    """finished jobs and what nobody has asked for are removed after that"""
    keep_bytes: int = 20 << 30
    """most bytes of stored profiles, plans, results and packed weights; beyond it the longest unused are removed"""

    @property
    def folders(self) -> list[Path]:
        """Folders whose files are named relative to them in all that leaves the service."""
        return [self.data_dir / "cache", self.data_dir, *self.roots]

    def __post_init__(self) -> None:
        if self.token is None and not loopback(self.host):
            raise InputError(
                f"--host {self.host} can be reached from other machines: set a token of your choice in the environment"
                " variable TIGHTFIT_TOKEN, or leave the host at 127.0.0.1"
            )
        if self.token is not None and len(self.token) < 16:
            raise InputError(
                f"the token in TIGHTFIT_TOKEN has {len(self.token)} characters; choose one of at least 16,"
                " for example from `openssl rand -hex 16`"
            )
        if self.token is not None:
            check_token(self.token)
        if self.key is not None and self.certificate is None:
            raise InputError(f"--key {self.key}: name the certificate that it belongs to with --certificate FILE")
        if not self.keep_days >= 0:
            raise InputError(f"{spelled('keep_days')} {self.keep_days}: give a number of at least 0")
        for root in self.roots:
            if not root.is_dir():
                raise InputError(f"--root {root}: no such folder; name folders that hold models and data")


def check_token(token: str) -> None:
    """Raises InputError for a token that no request can carry."""
    if not all("!" <= character <= "~" for character in token):
        raise InputError(
            "the token holds a blank or a character that no request can carry; use letters, digits and"
            " signs of ASCII, for example from `openssl rand -hex 16`"
        )


def loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def installed_version() -> str:
    """The version of this tightfit."""
    try:
        return version("tightfit")
    except PackageNotFoundError:
        return "0+checkout"
