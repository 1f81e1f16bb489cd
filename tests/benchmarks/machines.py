"""Both commands of README on machines that are not ours: ``make test-machines`` makes an ordinary user, and for each
Python an environment of its own, with the packages of .ci/lock.txt, the newest ones, or the lowest that pyproject.toml
allows.

    python tests/benchmarks/machines.py [--pythons python3.11,/usr/bin/python3.13] [--users ordinary,root] [--packages
    locked,newest]

A quarter of an hour for each combination, one after the other. `--write` puts the table into CONTRIBUTING.md. An
ordinary user is made by root alone; whoever else starts this tries as who they are.
"""

from __future__ import annotations

import datetime as dt
import os
import pwd
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tables
import typer
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- machines -->\n", "<!-- end of machines -->\n"
USER = "tightfit-trial"
HEADINGS = ("Python", "user", "packages", "PyTorch, NumPy", "make demo", "make test", "minutes")
LOWEST = "uv pip compile pyproject.toml --extra test --extra dev --resolution lowest-direct --no-annotate -q -o .venv/lowest.txt"
PACKAGES = {"locked": None, "newest": "", "lowest": "--constraint .venv/lowest.txt"}
"""name -> what LOCK is for make; None: as it is"""


@dataclass(frozen=True)
class Trial:
    """One row of the table: who tries what."""

    python: str
    user: str
    packages: str
    folder: Path

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """A shell command in the checkout of this trial, with pip's own defaults."""
        variables = {name: value for name, value in os.environ.items() if name not in ("PIP_FIND_LINKS", "VIRTUAL_ENV")}
        words = ["sh", "-c", command]
        if self.user == "ordinary" and os.geteuid() == 0:
            variables |= {"HOME": pwd.getpwnam(USER).pw_dir, "USER": USER}
            words = ["runuser", "-u", USER, "--", *words]
        return subprocess.run(
            words,
            cwd=self.folder,
            env=variables | {"PIP_CONFIG_FILE": "/dev/null"},
            capture_output=True,
            text=True,
            check=False,
        )

    def row(self) -> tuple[list[str], bool]:
        """Run both commands: the cells of the row, and whether both ended well."""
        begun = time.monotonic()
        lock = PACKAGES[self.packages]
        words = f"PYTHON={self.python}" + ("" if lock is None else f" LOCK='{lock}'")
        if self.packages == "lowest":
            self.run(f"{self.python} -m venv .venv && .venv/bin/pip install -q uv && .venv/bin/{LOWEST}")
        tested = self.run(f"make test {words}")
        (self.folder.parent / f"{self.folder.name}.log").write_text(tested.stdout + tested.stderr)
        summary = re.findall(r"^=+ (.*) in [\d.]+s.* =+$", tested.stdout, re.MULTILINE)
        shown = self.run(f"make demo {words}")
        versions = self.run(
            ".venv/bin/python -c 'import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)'"
        ).stdout.split() or ["?", "?", "?"]
        cells = [
            versions[0],
            self.user,
            self.packages,
            ", ".join(versions[1:]),
            "ends well" if shown.returncode == 0 else f"exit {shown.returncode}: {shown.stderr.strip()[-200:]}",
            summary[-1] if summary else f"exit {tested.returncode}: {tested.stderr.strip()[-200:]}",
            f"{(time.monotonic() - begun) / 60:.0f}",
        ]
        return cells, shown.returncode == tested.returncode == 0


def main(
    pythons: Annotated[
        str, typer.Option(help="Programs, separated by commas.")
    ] = "python3.11,python3.12,python3.13,python3.14",
    users: Annotated[str, typer.Option(help="Of ordinary and root.")] = "ordinary,root",
    packages: Annotated[str, typer.Option(help="Of locked, newest and lowest.")] = "locked,newest",
    *,
    write: Annotated[bool, typer.Option(help="Write the table into CONTRIBUTING.md.")] = False,
) -> None:
    """Try each combination, and print one table."""
    rows: list[list[str]] = []
    for python in pythons.split(","):
        for user in users.split(","):
            for which in packages.split(","):
                rows.append(tried(python, user, which))
                table = Table(*HEADINGS)
                for row in rows:
                    table.add_row(*row)
                report = tables.Report(width=170)
                report.table(table)
                if write:
                    write_table(rows)


def tried(python: str, user: str, packages: str) -> list[str]:
    """The row of one combination, in a fresh checkout that is deleted afterwards unless something failed."""
    found = shutil.which(python)
    if found is None:
        return [python, user, packages, "", "untried: not on this machine", "", ""]
    if user == "ordinary" and os.geteuid() == 0:
        if subprocess.run(["id", USER], capture_output=True, check=False).returncode:
            subprocess.run(["useradd", "--create-home", USER], check=True)
        home = Path(pwd.getpwnam(USER).pw_dir)
    else:
        home = Path.home()
    folder = home / f"tightfit-{Path(found).name}-{packages}"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, folder], check=True)
    if user == "ordinary" and os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{USER}:", folder], check=True)
    made = Trial(os.path.realpath(found), user, packages, folder)
    if made.run(f"{made.python} -c 'import venv, ensurepip'").returncode:
        return [python, user, packages, "", "untried: this user cannot use it", "", ""]
    row, well = made.row()
    if well:
        shutil.rmtree(folder)
    return row


def write_table(rows: list[list[str]]) -> None:
    """Put the table between its marks in CONTRIBUTING.md."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    said = f"`make test-machines`, {dt.datetime.now(dt.UTC).date()}, {tables.machine().split(',')[0]}.\n\n"
    PAGE.write_text(f"{before}{BEGIN}{said}{tables.markdown(HEADINGS, rows)}{END}{after}")


if __name__ == "__main__":
    typer.run(main)
