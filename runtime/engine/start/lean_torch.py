"""Loads PyTorch's kernels without PyTorch's Python: `import torch` takes 147 MiB of resident memory, this takes 72.

`torch/__init__.py` imports eleven hundred modules (compiler, export, distributed, decompositions, NumPy) that a process
which only calls kernels never uses. `load` puts a small stand-in for the package in `sys.modules`, loads the native
libraries, and completes it with what lives in them: tensors, dtypes, functions and operators. The kernels are the very
same, so the numbers are the same. Python modules of torch that the native code asks for by name become empty stubs.

If this fails (a torch built in another way), the process starts again with ``TIGHTFIT_TORCH=plain`` and does the full
import; the floor is measured in the same way, so that predictions hold either way.

Must run before anything imports torch.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tightfit.runtime.common import torch_interface
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.page_cache import forget_large_folios
from tightfit.runtime.engine.start.process import release_file_pages, split_file_mappings

PLAIN = "TIGHTFIT_TORCH"  # set to "plain": import torch as usual
BLOCKED = ("numpy", "_hashlib")  # optional for torch and hashlib; 9 MiB and 1 MiB of resident memory


def load() -> str:
    """Make `import torch` work in this process. Returns "lean" or "plain"; replaces the process where lean fails."""
    if os.environ.get(PLAIN) == "plain":
        _block()
        importlib.import_module("torch")
        return "plain"
    if "torch" in sys.modules:
        return mode()
    _block()
    try:
        if not _known() and not _survives():
            raise ImportError(f"torch {installed_version()} does not start this way")
        with page_out.moving():
            _load()
            _check()
    except RunError:
        raise
    except Exception as error:
        restart_plain(error)
    return "lean"


def allow_numpy() -> None:
    """Let this process import NumPy after all; PyTorch, once it is loaded, does without it."""
    if sys.modules.get("numpy", sys) is None:
        del sys.modules["numpy"]


def mode() -> str:
    """How torch is loaded in this process: "lean" or "plain"."""
    return "lean" if getattr(sys.modules.get("torch"), "_tightfit_lean", False) else "plain"


def restart_plain(error: Exception) -> NoReturn:
    """Run this process again from the start with a plain import of torch."""
    sys.stderr.write(
        f"tightfit: the lean start is not possible here ({type(error).__name__}: {error}); importing all of torch\n"
    )
    os.environ[PLAIN] = "plain"
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606  this very command again


def _block() -> None:
    for name in BLOCKED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


class _StubModule(types.ModuleType):
    """A stand-in module: each public name that is asked for becomes an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _empty_class(self, name)


class _StubFinder:
    """Finder and loader that answers imports of ``torch.*`` with stubs, except ``torch._C``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("torch.") or name.startswith("torch._C"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


class _Overloads:
    """An operator such as ``torch.ops.aten.mm``: its overloads are attributes, each the native function itself."""

    def __init__(self, native: Any, name: str) -> None:
        self._native, self._name = native, name
        self._any: Any = None

    def __getattr__(self, overload: str) -> Any:
        operation = self._native._get_operation_overload(self._name, "" if overload == "default" else overload)
        if operation is None:
            raise AttributeError(f"{self._name} has no overload {overload!r}")
        setattr(self, overload, operation[0])
        return operation[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._any is None:
            self._any, _ = self._native._jit_get_operation(self._name)
        return self._any(*args, **kwargs)


class _OperatorNamespace:
    def __init__(self, native: Any, name: str) -> None:
        self._native, self._name = native, name

    def __getattr__(self, operator: str) -> Any:
        if operator.startswith("__"):
            raise AttributeError(operator)
        overloads = _Overloads(self._native, f"{self._name}::{operator}")
        setattr(self, operator, overloads)
        return overloads


class _Operators:
    """``torch.ops``."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def __getattr__(self, namespace: str) -> Any:
        if namespace.startswith("__"):
            raise AttributeError(namespace)
        operators = _OperatorNamespace(self._native, namespace)
        setattr(self, namespace, operators)
        return operators


class _NoGrad:
    """``torch.no_grad()``."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._before = True

    def __enter__(self) -> None:
        self._before = self._native.is_grad_enabled()
        self._native._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        self._native._set_grad_enabled(self._before)


def _known() -> bool:
    return not torch_interface.untried(installed_version())


def _survives() -> bool:
    """Whether the lean start works, tried in a forked process: native code may crash where it misses a Python
    module.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with page_out.moving():
                _load()
                _check()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def installed_version() -> str:
    """`torch.__version__`, read without importing torch. Raises ImportError if torch is not installed."""
    return _version(_root())


def _root() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("torch is not installed")
    return spec.submodule_search_locations[0]


def _load() -> None:
    root = _root()
    torch: Any = _StubModule("torch")
    torch.__path__, torch.__file__ = [root], os.path.join(root, "__init__.py")
    torch.__spec__ = importlib.util.find_spec("torch")
    torch._tightfit_lean = True
    torch.__version__ = _version(root)
    sys.modules["torch"] = torch
    finder: Any = _StubFinder()
    sys.meta_path.insert(0, finder)

    cuda_stubs.load()
    libraries = os.path.join(root, "lib")
    for name in ("libtorch_cpu.so", "libtorch_python.so"):
        forget_large_folios(Path(libraries, name))
    ctypes.CDLL(os.path.join(libraries, "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.path.join(libraries, "libtorch_cpu.so"))
    split_file_mappings()
    release_file_pages()  # 50 MiB of relocations and start-up code: the peak of the import is here
    native: Any = importlib.import_module("torch._C")
    torch._C = native
    _adopt(torch, native)

    base: Any = native.TensorBase

    class Tensor(base):  # type: ignore[misc]
        """`torch.Tensor` with the methods that torch itself defines in Python, as far as they are needed."""

        __module__ = "torch"

        def __len__(self) -> int:
            return int(self.shape[0])

        def __hash__(self) -> int:
            return id(self)

        def __repr__(self) -> str:
            return f"tensor(shape={list(self.shape)}, dtype={self.dtype})"

        def __iter__(self) -> Any:
            return iter(self.unbind(0))

        def __neg__(self) -> Any:
            return self.neg()

        def __pos__(self) -> Any:
            return self

        def __abs__(self) -> Any:
            return self.abs()

        def __rsub__(self, other: Any) -> Any:
            return torch.rsub(self, other)

        def __rtruediv__(self, other: Any) -> Any:
            return self.reciprocal() * other

        def __pow__(self, other: Any) -> Any:
            return self.pow(other)

        def __rpow__(self, other: Any) -> Any:
            return torch.pow(other, self)

        def __floordiv__(self, other: Any) -> Any:
            return torch.floor_divide(self, other)

        def split(self, size: Any, dim: int = 0) -> Any:
            return base.split(self, size, dim) if isinstance(size, int) else base.split_with_sizes(self, size, dim)

    torch.Tensor = Tensor
    importlib.import_module("torch._tensor").Tensor = Tensor  # type: ignore[attr-defined]
    importlib.import_module("torch.nn.parameter").Parameter = type("Parameter", (Tensor,), {})  # type: ignore[attr-defined]
    importlib.import_module("torch.autograd").Function = type("Function", (native._FunctionBase,), {})  # type: ignore[attr-defined]
    torch.UntypedStorage = type("UntypedStorage", (native.StorageBase,), {"__module__": "torch"})
    importlib.import_module("torch.storage").UntypedStorage = torch.UntypedStorage  # type: ignore[attr-defined]
    torch._tensor_classes, torch._storage_classes = set(), set()
    native._initExtension(os.path.join(root, "bin", "torch_shm_manager").encode())
    if not native._autograd_init():
        raise ImportError("torch's autograd did not start")
    if hasattr(native, "_set_generator_metaclass"):
        native._set_generator_metaclass(type("GeneratorMeta", (type,), {}))
    functions = native._VariableFunctions
    for name in dir(functions):
        if not name.startswith("__"):
            setattr(torch, name, getattr(functions, name))
    torch.ops = _Operators(native)
    torch.no_grad = lambda: _NoGrad(native)
    torch.set_num_threads, torch.get_num_threads = native.set_num_threads, native.get_num_threads
    for name in ("SymInt", "SymFloat", "SymBool"):  # asked for by the argument parsers
        getattr(torch, name)
    _StubModule.__getattr__ = _missing  # type: ignore[method-assign]  # from now on a missing name of torch raises again
    release_file_pages()


def _missing(module: types.ModuleType, name: str) -> Any:
    if module.__name__ == "torch" or name.startswith("__"):
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r} in the lean process")
    return _empty_class(module, name)


def _empty_class(module: types.ModuleType, name: str) -> type:
    """Put an empty class of that name into the module; a metaclass if the name ends so, with which native types are
    made.
    """
    value = type(name, (type,) if name.endswith("Meta") else (), {"__module__": module.__name__})
    setattr(module, name, value)
    return value


def _adopt(torch: Any, native: Any) -> None:
    for name in dir(native):
        if not name.startswith("_"):
            setattr(torch, name, getattr(native, name))


def _version(root: str) -> str:
    with open(os.path.join(root, "version.py"), encoding="utf-8") as file:
        for line in file:
            if line.startswith("__version__"):
                return line.partition("=")[2].strip().strip("'\"")
    raise ImportError(f"{root}/version.py states no version")


def _check() -> None:
    """Call a few kernels as the runtime does. Raises ImportError if they give other results than they should."""
    import torch

    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    y = torch.empty((2, 2))
    torch.ops.aten.mm.out(x, x.t(), out=y)
    half = torch.frombuffer(bytearray(8), dtype=torch.uint8).view(torch.bfloat16)
    half.copy_(x.view(-1)[:4])
    torch.empty(4).uniform_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    torch.default_generator.manual_seed(1)
    if y.tolist() != [[5.0, 14.0], [14.0, 50.0]] or half.sum().item() != 6.0 or not isinstance(x[0], torch.Tensor):
        raise ImportError("kernels do not answer as expected")
