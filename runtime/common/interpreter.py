"""How processes of our own are started: as a module of these very packages, whatever lies in the working folder.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
"""the folder of the installed package; in a checkout it links to the folders at the top"""


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a process that runs `module`; its environment needs `python_path`.

    ``-P`` keeps the working folder off its path, where a ``runtime.py`` or a ``json.py`` of the user's may lie.
    """
    return [sys.executable, "-P", "-X", "utf8", "-m", module, *arguments]


def python_path() -> str:
    """PYTHONPATH with which such a process finds these packages too: they come first where they are not installed.

    Installed, they are found without it. Their folder then holds all that is installed, which must not come before the standard
    library: ``argparse`` and ``asyncio`` are packages on PyPI as well. Empty entries, which mean the working folder, are left out.
    """
    root = PACKAGE.parent
    installed = any(Path(place).resolve() == root.resolve() for place in site.getsitepackages())
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(dict.fromkeys([*([] if installed else [str(root)]), *inherited]))
