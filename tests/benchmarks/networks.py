"""The networks of the rematerialisation papers as bare training graphs: defined here, traced without weights or data.

Batch sizes are those of Checkmate (Jain et al. 2020) where it has them. Seconds are estimated for an NVIDIA V100 in float32 from
operations and bytes moved: 15.7 TFLOP/s and 900 GB/s by its data sheet, of which 60 % and 80 % are taken to be reached, and
5 µs for a launch. Views and tuple items are no operators: their readers read what they look at. Gradients of parameters count
in the fixed bytes, with the parameters and the batch.
"""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import flop_registry

from tightfit.profiles.graph_input import BareGraph, BareOperator

FLOPS, BANDWIDTH, LAUNCH = 0.6 * 15.7e12, 0.8 * 900e9, 5e-6
VIEWS = {"t", "view", "_unsafe_view", "detach", "transpose", "permute", "expand", "unsqueeze", "squeeze", "alias"}


def conv(inputs, outputs, kernel=3, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def block(inputs, outputs, kernel=3, stride=1, groups=1, act=nn.ReLU):
    return [conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), act()]


def vgg16(classes=1000):
    layers, width = [], 3
    for item in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if item == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU()]
            width = item
    head = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width
        parts = [*block(inputs, width, 1), *block(width, width, 3, stride), conv(width, outputs, 1)]
        self.body = nn.Sequential(*parts, nn.BatchNorm2d(outputs))
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.body(x) + self.short(x))


def resnet50(classes=1000):
    layers = [*block(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            layers.append(Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, classes))


class Inverted(nn.Module):
    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        hidden = inputs * expand
        parts = block(inputs, hidden, 1, act=nn.ReLU6) if expand != 1 else []
        parts += [*block(hidden, hidden, 3, stride, hidden, act=nn.ReLU6), conv(hidden, outputs, 1)]
        self.body = nn.Sequential(*parts, nn.BatchNorm2d(outputs))
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.skip else self.body(x)


def mobilenet_v2(classes=1000):
    layers = block(3, 32, 3, 2, act=nn.ReLU6)
    inputs = 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, outputs, count, stride in stages:
        for index in range(count):
            layers.append(Inverted(inputs, outputs, stride if index == 0 else 1, expand))
            inputs = outputs
    layers += [*block(320, 1280, 1, act=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015, padded convolutions, four levels."""

    def __init__(self, classes=2, width=64):
        super().__init__()
        widths = [width << level for level in range(5)]

        def double(inputs, outputs):
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1),
                nn.ReLU(),
            )

        self.down = nn.ModuleList([double(i, o) for i, o in zip([3, *widths], widths)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1])])
        self.merge = nn.ModuleList([double(2 * w, w) for w in reversed(widths[:-1])])
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        kept = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else self.pool(x))
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(kept[:-1])):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.last(x)


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
