"""The networks of the rematerialisation papers as bare training graphs, traced without weights or data.

Batch sizes are those of Checkmate (Jain et al. 2020) where it has them. Seconds are estimated for an NVIDIA V100 in
float32 from operations and bytes moved: 15.7 TFLOP/s and 900 GB/s by its data sheet, of which 60 % and 80 % are taken
to be reached, and 5 µs for a launch. Views and tuple items are no operators: their readers read what they look at.
Gradients of parameters count in the fixed bytes, with the parameters and the batch.
"""

from __future__ import annotations

import operator

import torch
from architectures import UNet, mobilenet_v2, resnet50, vgg16
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import flop_registry

from tightfit.profiles.graph_input import BareGraph, BareOperator

FLOPS, BANDWIDTH, LAUNCH = 0.6 * 15.7e12, 0.8 * 900e9, 5e-6
VIEWS = {"t", "view", "_unsafe_view", "detach", "transpose", "permute", "expand", "unsqueeze", "squeeze", "alias"}

NETWORKS = {
    "VGG-16": (vgg16, (256, 3, 224, 224), (256,), 1000),
    "ResNet-50": (resnet50, (256, 3, 224, 224), (256,), 1000),
    "U-Net": (UNet, (32, 3, 416, 608), (32, 416, 608), 2),
    "MobileNetV2": (mobilenet_v2, (512, 3, 224, 224), (512,), 1000),
}


def network(name):
    """The bare training graph of one of NETWORKS."""
    make, shape, labels, classes = NETWORKS[name]
    with FakeTensorMode() as mode:
        module = make(classes)
        parameters = dict(module.named_parameters())
        buffers = dict(module.named_buffers())
        sample = torch.empty(shape)
        target = torch.empty(labels, dtype=torch.int64)

        def step(values, x, y):
            out = torch.func.functional_call(module, {**values, **buffers}, (x,))
            loss = nn.functional.cross_entropy(out, y)
            return loss, *torch.autograd.grad(loss, list(values.values()))

        traced = make_fx(step, tracing_mode="real", _allow_non_fake_inputs=True)(parameters, sample, target)
    del mode
    fixed = 2 * sum(nbytes(p) for p in parameters.values()) + nbytes(sample) + nbytes(target)
    return BareGraph(
        format="tightfit-graph", name=name, fixed_bytes=fixed, estimated=True, operators=list(operators(traced.graph))
    )


def nbytes(value):
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def operators(graph):
    """Bare operators of a traced training step."""
    results = graph.find_nodes(op="output")[0].args[0]
    loss, gradients = results[0], set(results[1:])
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    base = {}
    for node in nodes:
        view = node.target is operator.getitem or node.target._overloadpacket.__name__ in VIEWS
        base[node] = base.get(node.args[0]) if view else node
    forward = nodes.index(loss)
    owned = dict.fromkeys(nodes, 0)
    for gradient in gradients:
        if base[gradient] is not None:
            owned[base[gradient]] += nbytes(gradient.meta["val"])
    for index, node in enumerate(nodes):
        if base[node] is not node:
            continue
        value = node.meta["val"]
        made = sum(nbytes(v) for v in value) if isinstance(value, tuple | list) else nbytes(value)
        sources = [base[s] for s in node.all_input_nodes if base.get(s) is not None]
        yield BareOperator(
            name=node.name,
            seconds=seconds(node, made),
            output_bytes=max(0, made - owned[node]),
            inputs=list(dict.fromkeys(s.name for s in sources)),
            phase="forward" if index <= forward else "backward",
        )


def seconds(node, made):
    """A roofline of operations and bytes."""
    formula = flop_registry.get(node.target._overloadpacket)
    operations = 0
    if formula is not None:
        args = torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
        operations = formula(*args, **node.kwargs, out_val=node.meta["val"])
    touched = made + sum(nbytes(s.meta["val"]) for s in node.all_input_nodes)
    return max(operations / FLOPS, touched / BANDWIDTH) + LAUNCH
