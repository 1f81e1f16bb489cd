"""Command line and PYTHONPATH of the processes that tightfit starts, so that they run these very packages.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).parents[2]
"""the folder of the installed package; in a checkout it links to the folders at the top"""
PROGRAMS = Path(sys.executable).parent
"""the folder of the programs that packages of this Python have installed"""


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a process that runs `module`; its environment needs PYTHONPATH from `python_path`.

    ``-P`` keeps the working folder off its module path: a ``runtime.py`` or ``json.py`` of the user's may lie there.
    """
    return [sys.executable, "-P", "-X", "utf8", "-m", module, *arguments]


def replace_process(words: list[str]) -> NoReturn:
    """Replace this process by another program, such as that of `command`; its number and what it has open for others
    stay.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(words[0], words, os.environ | {"PYTHONPATH": python_path()})  # noqa: S606  our own command line


def python_path() -> str:
    """PYTHONPATH for such a process: the folder of these packages, unless they are installed, then the inherited
    entries.

    Installed packages are found without it. Their folder must not be added, since it holds all that is installed and
    would come before the standard library: ``argparse`` and ``asyncio`` are packages on PyPI as well. Empty entries of
    the inherited path, which mean the working folder, are left out.
    """
    root = PACKAGE.parent
    installed = any(Path(path).resolve() == root.resolve() for path in site.getsitepackages())
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(dict.fromkeys([*([] if installed else [str(root)]), *inherited]))
