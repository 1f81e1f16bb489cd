"""Makes random layered graphs as used in papers on rematerialisation and operator order (Gagrani et al. 2022)."""

from __future__ import annotations

import random

from tightfit.profiles.graph_input import BareGraph, BareOperator


def layered(count, seed=0, training=False):
    """`count` operators in layers of about sqrt(count) each; a third of the inputs skip layers.

    Bytes and seconds are log-normal and independent. With `training`, half of the operators form a backward that
    mirrors the forward: the backward of operator i reads the backwards of its readers, its inputs and its output.
    """
    rng = random.Random(seed)
    forward = count // 2 if training else count
    width = max(2, round(forward**0.5))
    inputs: list[list[int]] = []
    for i in range(forward):
        layer = i // width
        chosen = set()
        for _ in range(rng.randint(1, 3) if layer else 0):
            source = layer - 1 if rng.random() < 2 / 3 else rng.randrange(layer)
            chosen.add(source * width + rng.randrange(width))
        inputs.append(sorted(chosen))
    size = [round(rng.lognormvariate(16, 0.8)) for _ in range(forward)]
    seconds = [rng.lognormvariate(-7, 0.8) for _ in range(forward)]
    made = [
        BareOperator(
            name=f"op{i}",
            seconds=seconds[i],
            output_bytes=size[i],
            inputs=[f"op{j}" for j in inputs[i]],
            phase="forward" if training else None,
        )
        for i in range(forward)
    ]
    if training:
        readers: list[list[int]] = [[] for _ in range(forward)]
        for i in range(forward):
            for j in inputs[i]:
                readers[j].append(i)
        for i in reversed(range(forward)):
            sources = [*(f"grad{r}" for r in readers[i]), f"op{i}", *(f"op{j}" for j in inputs[i])]
            made.append(
                BareOperator(
                    name=f"grad{i}", seconds=2 * seconds[i], output_bytes=size[i], inputs=sources, phase="backward"
                )
            )
    return BareGraph(format="tightfit-graph", name=f"layered {count}", estimated=True, operators=made)
