"""A folder of a user's whose files are called like modules that our processes import."""

from __future__ import annotations

TAKEN = (
    "runtime.py", "planner.py", "profiles/__init__.py", "argparse.py", "json.py", "random.py", "tokenizers.py", "torch.py",
    "typing.py",
)  # fmt: skip


def working_folder(path):
    """Make `path` such a folder: whoever imports one of its files fails."""
    for name in TAKEN:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("raise RuntimeError(f'a file of the working folder was imported: {__file__}')\n")
    return path
