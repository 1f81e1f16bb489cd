"""Debian's Chromium for the browser tests: found, or installed where that is possible, or a reason to skip."""

from __future__ import annotations

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium():
    """Path of the browser. Raises LookupError, saying why there is none."""
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LookupError("no Chromium here, and only root can install it: apt-get install chromium")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (
        ["apt-get", "update", "-q"],
        ["apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium"],
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=600)
        if done.returncode:
            raise LookupError(f"no Chromium here, and `{' '.join(words)}` failed: {done.stderr.strip()[-200:]}")
    found = shutil.which("chromium")
    if not found:
        raise LookupError("no Chromium here, and apt-get's package brought none")
    return found
