"""Paths of the checkout's folders."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src"
"""The folder from which `tightfit` is imported."""
