"""Finds Chromium for the browser tests, or installs Debian's, or says why the tests have to be skipped."""

from __future__ import annotations

import os
import shutil
import subprocess

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PACKAGES = ("chromium-headless-shell", "chromium")
"""Packages tried in this order; the headless shell is Chromium without desktop libraries."""
OPTIONS = (
    "-q",
    "-o=Acquire::http::Timeout=15",
    "-o=Acquire::Retries=1",
    "-o=DPkg::Lock::Timeout=60",
    "-o=APT::Update::Error-Mode=any",
)
PATIENCE = 240_000
"""Milliseconds that a test waits for what a page shows; the machine may be busy."""
SECONDS = 180
"""Time limit for apt-get; with a working network an installation takes 15 s."""


def find_chromium():
    """Path of the browser. Raises LookupError, saying why there is none."""
    found = _found()
    if found:
        return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LookupError("no Chromium here, and only root can install it: apt-get install chromium-headless-shell")
    said = _apt("update")
    for package in PACKAGES if not said else ():
        said = _apt("install", "-y", "--no-install-recommends", package)
        if not said:
            break
    found = _found()
    if not found:
        raise LookupError(f"no Chromium here, and apt-get could not install it: {said}")
    return found


def _found():
    return next((path for path in map(shutil.which, NAMES) if path), None)


def _apt(*words):
    """Run apt-get with `words`; returns an error message, or an empty string on success."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            ["apt-get", *OPTIONS, *words],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"apt-get {words[0]} took longer than {SECONDS} s"
    return (done.stderr.strip()[-200:] or f"apt-get {words[0]}: {done.returncode}") if done.returncode else ""
