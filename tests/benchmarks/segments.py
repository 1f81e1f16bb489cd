"""Whether layers in a row are run again sooner than their inputs are moved: milliseconds per layer on every known device.

A decoder layer of Qwen2.5-0.5B and one of Qwen2.5-3B, LoRA of rank 8, estimated from operators' FLOPs and bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]

from shapes import decoder_profile

from tightfit.planner.problem.build_layers import layered
from tightfit.planner.solve.segment_search import moved_and_rerun
from tightfit.profiles.devices.data_sheets import known_devices
from tightfit.profiles.devices.estimate import retarget

QWEN_05B = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
SHAPES = {"0.5B, 1 × 256": (1, 256, QWEN_05B), "3B, 1 × 256": (1, 256, {}), "0.5B, 16 × 256": (16, 256, QWEN_05B)}


def main() -> None:
    """Print the table."""
    table = Table("device", *(f"{name}: moved, run again" for name in SHAPES))
    profiles = [decoder_profile(3, batch=batch, seq=seq, **config) for batch, seq, config in SHAPES.values()]
    for device in known_devices():
        cells = []
        for profile in profiles:
            problem = layered(retarget(profile, device))
            moved, again = moved_and_rerun(problem)
            cells.append(f"{moved * 1e3:.2f} ms, {again * 1e3:.2f} ms")
        table.add_row(device.name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
