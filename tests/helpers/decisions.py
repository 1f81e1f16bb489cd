"""Random decisions for a layer, and settings of an almost instant disk."""

from __future__ import annotations

from tightfit.planner.schedule.layer_schedule import Decision, expand

INSTANT = {"read": 1e12, "write": 1e12, "latency": 0.0, "per_byte": 2e-8}


def random_decision(rng, kind) -> Decision:
    """A decision of the planner's class for the layer type `kind`, drawn with `rng`."""
    share = rng.random()
    keep, offload = set(), set()
    for value in kind.candidates:
        maker = kind.producer.get(value)
        draw = rng.random()
        if draw < share:
            keep.add(value)
        elif draw < share + 0.3 * (1 - share) and value in kind.offloadable:
            offload.add(value)
        elif maker is None or not maker.recomputable:
            keep.add(value)
    weights = tuple((name, rng.choice(weight.modes)) for name, weight in kind.weights.items())
    states = {update.trainable for update in kind.updates if not update.minor and rng.random() < 0.5}
    if rng.random() < 0.5:
        states |= {update.trainable for update in kind.updates if update.minor}
    while True:
        made = Decision(keep=frozenset(keep), offload=frozenset(offload), weights=weights, states=frozenset(states))
        script = expand(kind, made)
        again = {v for v in offload if v in kind.producer and kind.producer[v].index in script.recomputed}
        if not again:
            return Decision(keep=script.kept, offload=script.offloaded, weights=weights, states=frozenset(states))
        # An output whose operator is recomputed for another output is not fetched as well, so it may not be offloaded.
        offload -= again
        keep |= again
