"""Where the checkout's files lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src"
"""the folder from which `tightfit` is imported"""
EXAMPLES = ROOT / "examples"
