"""Flower's processes: whether it is installed, the app that is given to it, and the command lines of its programs.

On the server a SuperLink reaches the devices, and starts the server's app (`server_app`) for a run. On a device runs
`node`, which speaks to the SuperLink by itself.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import write_whole

PORT = 9092
"""of the SuperLink, where devices reach it"""
CONNECTION = "tightfit"
"""name of the SuperLink in Flower's configuration"""
APP = """# The code of both apps is that of the installed package.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tightfit-federated"
version = "1.0.0"
description = "Federated rounds of a fleet of tightfit's; the code is the installed package's"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "tightfit"

[tool.flwr.app.components]
serverapp = "tightfit.runtime.federated.server_app:app"
clientapp = "tightfit.runtime.federated.server_app:app" # Flower wants one to be named; devices run `node`

[tool.flwr.app.config]
settings = ""
"""


def check_installed() -> None:
    """Raise InputError where Flower is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise InputError("Flower (flwr) is not installed; federated rounds need it: pip install 'tightfit[fleet]'")


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's processes: its own folder, no telemetry, and the programs beside this Python."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONPATH": interpreter.python_path(),
        "PATH": os.pathsep.join([str(interpreter.PROGRAMS), os.environ.get("PATH", "")]),
    }


def program(name: str) -> str:
    """The path of one of Flower's programs, beside this Python or in PATH."""
    beside = interpreter.PROGRAMS / name
    return str(beside) if beside.exists() else name


def write_app(home: Path, address: str, root_certificates: str | None) -> Path:
    """Write the app that is given to the SuperLink at `address`, and how it is reached; returns the app's folder."""
    trust = "insecure = true" if root_certificates is None else f'root-certificates = "{root_certificates}"'
    config = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n{trust}\n'
    write_whole(home / "config.toml", config)
    app = home / "app"
    write_whole(app / "pyproject.toml", APP)
    return app


def run_command(app: Path, settings: Path) -> list[str]:
    """The command that starts a run on the SuperLink."""
    return [program("flwr"), "run", str(app), CONNECTION, "--run-config", f'settings="{settings}"', "--format", "json"]


def superlink_command(host: str, port: int, *options: str) -> list[str]:
    return [program("flower-superlink"), "--host", host, "--port", str(port), *options]


def register_command(public_key: str) -> list[str]:
    """The command that tells the SuperLink a device's public key."""
    return [program("flwr"), "supernode", "register", public_key, CONNECTION]
