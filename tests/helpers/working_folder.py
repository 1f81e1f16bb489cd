"""Makes a working folder with files named like modules that tightfit imports, which must not be picked up."""

from __future__ import annotations

TAKEN = (
    "runtime.py", "planner.py", "profiles/__init__.py", "argparse.py", "json.py", "random.py", "tokenizers.py", "torch.py",
    "typing.py",
)  # fmt: skip


def working_folder(path):
    """Fill `path` with such files, each of which raises when imported; returns `path`."""
    for name in TAKEN:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("raise RuntimeError(f'a file of the working folder was imported: {__file__}')\n")
    return path
