"""What tightfit takes from PyTorch beyond its public interface, and the versions with which all of it was tried.

The tracer and the engine need parts of PyTorch whose names may change without notice. A test compares this list with
the code (`tests/whole/test_torch_interface.py`), and looks each name up in the PyTorch that is installed.
"""

from __future__ import annotations

TRIED = ("2.9", "2.10", "2.11", "2.12", "2.13", "2.14")
"""versions whose kernels start without PyTorch's Python; `make test` has run whole with 2.13 and 2.14"""
PRIVATE = {
    "torch._C": "the native library, which the training process loads by itself",
    "torch._C._dispatch_has_kernel_for_dispatch_key": "whether an operator has a kernel of its own",
    "torch._C._get_fp32_precision_getter": "float32 products in bfloat16, where a plan has them",
    "torch._C._get_operation_overload": "an operator's function without PyTorch's Python",
    "torch._C._jit_get_schemas_for_operator": "the arguments of an operator",
    "torch._C._set_fp32_precision_setter": "as its getter",
    "torch._C._set_grad_enabled": "in the lean process, which has no torch.no_grad",
    "torch._VF": "what functions of torch.nn call for dropout and recurrences",
    "torch._VF.lstm": "what nn.LSTM calls, which is traced as operators of ours",
    "torch._functorch.eager_transforms": "torch.func computes gradients there, which a forward may not",
    "torch._ops.OpOverload": "the type of an operator in a graph",
    "torch._storage_classes": "looked up by native code as it starts",
    "torch._subclasses.FakeTensorMode": "tensors without memory, with which models are built and traced",
    "torch._subclasses.fake_tensor.DataDependentOutputException": "a shape that depends on values",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException": "a shape that depends on values",
    "torch._subclasses.fake_tensor.FakeTensor": "the type of such a tensor",
    "torch._subclasses.fake_tensor.FakeTensorMode": "as above",
    "torch._subclasses.fake_tensor.unset_fake_temporarily": "tables that are computed while a model is traced",
    "torch._tensor_classes": "looked up by native code as it starts",
    "torch.autograd.function._SingleLevelFunction": "the base of custom Functions",
    "torch.nn.modules.batchnorm._NormBase": "the base of layers that keep statistics",
    "torch.utils._python_dispatch.TorchDispatchMode": "sees each operator that a module runs",
    "torch.utils._pytree": "what lies in nested tuples and dicts",
    "torch.fx.experimental.proxy_tensor": "make_fx, which traces a backward",
    "torch.fx.experimental.symbolic_shapes": "a shape that depends on values",
}
"""name -> what it is for"""
OWN = ("torch._tightfit_lean",)
"""names that tightfit itself puts there"""


def release_of(version: str) -> str:
    """``2.13`` of ``2.13.0+cpu``."""
    return ".".join(version.split(".")[:2])


def untried(version: str) -> str:
    """What to say of a version of PyTorch that none of these is; empty for those that were tried."""
    if release_of(version) in TRIED:
        return ""
    return (
        f"PyTorch {version} is none of the versions with which tightfit was tried ({TRIED[0]} to {TRIED[-1]});"
        " where something goes wrong, install one of these"
    )
