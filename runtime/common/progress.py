"""How whoever waits for long work hears of it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""called as progress(stage, done, total); done and total count what the stage is about, such as bytes"""
