"""Products with frozen matrices of 4 bits: ours, which unpack to bfloat16 first, beside bare ones and those that unpack themselves
(``make bench-products``).

PyTorch's own go one way only, forward. oneDNN's are in no package that has them without SYCL: build it with
``cmake -DONEDNN_BUILD_GRAPH=OFF "-DONEDNN_ENABLE_PRIMITIVE=MATMUL;REORDER" -DONEDNN_CPU_RUNTIME=OMP``, and give its folder, in which `build`
is, with ``ARGS='--onednn FOLDER'``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER)]

import tables

from tightfit.profiles.weights.describe import packed_entry
from tightfit.runtime.engine.cpu.operators import projection, projection_backward
from tightfit.runtime.engine.weights.store import unpack

SHAPES = ((11008, 2048), (2048, 11008), (4864, 896))
"""(outputs, inputs) of MLPs: Qwen2.5-3B's, and its sibling's of 0.5 B"""
GROUP, TURNS = 32, 9
NOTES = """\
A frozen matrix is unpacked to bfloat16 and multiplied, forward and backward. Products of PyTorch and oneDNN that take packed weights of
4 bits are not used: PyTorch's are slower with any number of rows; oneDNN's backward is a reference implementation, and no package has a
oneDNN that can be called."""


def rate(flops: float, call: Callable[[], object]) -> float:
    """GFLOP/s of a call's median."""
    call()
    seconds = []
    for _ in range(TURNS):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return flops / statistics.median(seconds) / 1e9


def main(
    rows: Annotated[str, typer.Option(help="of activations, separated by commas")] = "64,256,512",
    onednn: Annotated[Path | None, typer.Option(help="folder of oneDNN's source, with its build inside")] = None,
    threads: Annotated[int, typer.Option(help="of each product")] = 2,
    *,
    write: Annotated[bool, typer.Option(help="write docs/benchmarks/products.md")] = False,
) -> None:
    """Measure every shape and print one table."""
    torch.set_num_threads(threads)
    report = tables.Report(width=170)
    table = Table(
        *("outputs x inputs", "rows", "bare product", "ours forward", "ours backward", "PyTorch's int4, forward"),
        *("oneDNN's u4, forward", "oneDNN's u4, backward"),
        title="GFLOP/s; ours unpack the matrix each time",
    )
    with tempfile.TemporaryDirectory() as folder:
        program = None if onednn is None else compiled(onednn, Path(folder))
        for outputs, inputs in SHAPES:
            for count in map(int, rows.split(",")):
                found = [f"{each:.0f}" for each in measured(outputs, inputs, count)]
                for kind in ("forward", "backward"):
                    found.append("–" if program is None else theirs(program, count, inputs, outputs, kind, threads))
                table.add_row(f"{outputs} x {inputs}", str(count), *found)
    report.table(table)
    if write:
        report.write("products", "Products with weights of 4 bits", NOTES)


def measured(outputs: int, inputs: int, rows: int) -> list[float]:
    """GFLOP/s of a bare product in bfloat16, of ours both ways with unpacking, and of PyTorch's with 4 bits."""
    kind, flops = torch.bfloat16, 2.0 * rows * inputs * outputs
    entry = packed_entry("w", (outputs, inputs), "q4")
    packed = torch.randint(0, 255, (outputs * entry.row_bytes,), dtype=torch.uint8)
    weight = torch.randn(outputs, inputs).to(kind)
    unpacked = torch.empty_like(weight)
    x, dy = torch.randn(rows, inputs).to(kind), torch.randn(rows, outputs).to(kind)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    codes = torch.randint(0, 15, (outputs, inputs), dtype=torch.int32)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(inputs // GROUP, outputs, 2).to(kind)

    def forward() -> None:
        unpack(entry, packed, unpacked)
        projection(x, weight, None, None, None, 1.0, out=(y,))

    def backward() -> None:
        unpack(entry, packed, unpacked)
        projection_backward(dy, weight, None, None, None, out=(dx,))

    calls: list[Callable[[], object]] = [
        lambda: torch.mm(x, weight.t(), out=y),
        forward,
        backward,
        lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, theirs, GROUP, scales),
    ]
    return [rate(flops, call) for call in calls]


def compiled(onednn: Path, folder: Path) -> Path:
    """The program that measures oneDNN's products."""
    library = onednn / "build" / "src"
    program = folder / "four_bit_products"
    places = [f"-I{onednn / 'include'}", f"-I{onednn / 'build' / 'include'}", f"-L{library}", f"-Wl,-rpath,{library}"]
    source = str(FOLDER / "four_bit_products.cpp")
    subprocess.run(["g++", "-O2", "-std=c++17", source, *places, "-ldnnl", "-o", str(program)], check=True)
    return program


def theirs(program: Path, rows: int, inputs: int, outputs: int, kind: str, threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    words = [str(program), str(rows), str(inputs), str(outputs), kind]
    speed, name = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return f"{float(speed):.1g} (reference)" if name.startswith("ref") else f"{float(speed):.0f}"


if __name__ == "__main__":
    typer.run(main)
