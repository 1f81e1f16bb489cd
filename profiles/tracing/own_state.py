"""Sees what a module's forward changes in Python that outlives the call: a trace has none of it.

A look walks what can be reached from the module and from the code that it runs (attributes, containers, closures,
globals and class attributes of files that are not PyTorch's or Python's own, iterators, generators), before a call and
after it. What lies in Python's own modules, in files or in the environment is not seen.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import gc
import hashlib
import io
import logging
import re
import sys
import sysconfig
import types
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.profiles.tracing.own_code import is_own_code
from tightfit.profiles.tracing.own_draws import generator_kinds

MOST_OBJECTS = 200_000
"""How many objects a look goes through, about half a second."""
_TENSORS = ("_parameters", "_buffers")
"""what a module holds and a trace follows"""
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, torch.dtype, torch.device)
_LEAVES = (types.BuiltinFunctionType, types.CodeType, types.ModuleType, logging.Logger, logging.Handler, io.IOBase)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_LIBRARY = sysconfig.get_paths()["stdlib"]
_MODULE_STATE = re.compile(r"^(_modules|_forward_hooks|_forward_pre_hooks|_backward_hooks|_backward_pre_hooks)\.")

State = dict[str, Any]
"""what a look saw: by where it lies (``block.0.n``, ``my_module.COUNT['calls']``), something that is equal if it is"""


class Look:
    """Looks at a module, each time along the code that was seen to run; `ignored` are names that are let through."""

    def __init__(self, ignored: Iterable[str] = ()) -> None:
        self.ignored = tuple(ignored)
        self.let_through: set[str] = set()
        """of `ignored`, the names of what changed"""
        self.ended = False
        """whether a look ended before it had seen all"""
        self._roots: list[tuple[str, Any]] = []

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Have the next looks go along the code that runs in this context, in this thread."""
        with code_run() as code:
            yield
        functions = [
            value for value in gc.get_objects() if type(value) is types.FunctionType and value.__code__ in code
        ]
        self._roots = [root for function in functions for root in _read_by(function)]

    def __call__(self, module: nn.Module, *, code: bool = True) -> State:
        """What can be reached from the module and, with `code`, from the code that was seen to run, as it is now."""
        state: State = {}
        known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        seen: dict[int, str] = {id(module): ""}
        # What is put together on the way is held until the look ends, so that no two objects have one `id`.
        held: list[Any] = []
        waiting: deque[tuple[str, Any]] = deque([*_parts("", module, held), *(self._roots if code else ())])
        while waiting:
            path, value = waiting.popleft()
            if isinstance(value, _CONSTANTS):
                state[path] = value if value == value else repr(value)  # noqa: PLR0124  a NaN
                continue
            if id(value) in seen:
                state.setdefault(path, ("as", seen[id(value)]))
                continue
            if len(seen) >= MOST_OBJECTS:
                self.ended = True
                break
            seen[id(value)] = path
            state[path] = _Same(value) if id(value) in known else _described(value)
            waiting.extend(_parts(path, value, held))
        return state

    def changes(self, before: State, after: State) -> list[str]:
        """Where two looks differ, outermost first, but for what is let through."""
        paths = [path for path in {**before, **after} if before.get(path, _Absent) != after.get(path, _Absent)]
        kept: list[str] = []
        for path in paths:
            names = [name for name in self.ignored if _is_named(path, name)]
            self.let_through.update(names)
            if not names and not any(path == other or _lies_in(path, other) for other in kept):
                kept.append(path)
        return kept


@contextlib.contextmanager
def code_run() -> Iterator[set[types.CodeType]]:
    """The set that it gives holds, once this context is left, the code that was called in it in this thread: the user's
    own, and that of libraries other than PyTorch.
    """
    earlier, called = sys.getprofile(), set()

    def call(frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            called.add(frame.f_code)

    found: set[types.CodeType] = set()
    sys.setprofile(call)
    try:
        yield found
    finally:
        sys.setprofile(earlier)
        found.update(code for code in called if _is_foreign(code.co_filename))


def digest_of_code(code: Iterable[types.CodeType]) -> str:
    """What is the same for the same code, wherever in a file it stands."""

    def text(one: types.CodeType) -> str:
        constants = [text(item) if isinstance(item, types.CodeType) else repr(item) for item in one.co_consts]
        return repr((one.co_qualname, one.co_code.hex(), one.co_names, one.co_freevars, constants))

    return hashlib.sha256("\n".join(sorted(map(text, code))).encode()).hexdigest()


class _Absent:
    """In the place of what a look has not seen."""


class _Same:
    """Equal to another one of the same object alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def shown(paths: Sequence[str]) -> str:
    """Names of what lies there, for a sentence."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(_MODULE_STATE.sub("", path) for path in paths[:3]) + more


def last_name(path: str) -> str:
    """The attribute or variable that lies there, or holds what does."""
    return re.split(r"[\[(]", path)[0].rpartition(".")[2]


def within(path: str, state: State) -> list[str]:
    """Where all lies that a look saw at `path`."""
    return [path, *(other for other in state if _lies_in(other, path))]


def state_copy(module: nn.Module) -> nn.Module | None:
    """A copy of all that the module holds but its parameters and buffers, which it shares; None if it cannot be
    copied.
    """
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        # What autograd made, such as the weight of `nn.utils.weight_norm`, cannot be copied, and each call makes it
        # anew.
        memo |= {id(value): value for value in vars(part).values() if isinstance(value, Tensor) and not value.is_leaf}
    try:
        return copy.deepcopy(module, memo)
    except Exception:
        return None


def _is_named(path: str, name: str) -> bool:
    """Whether `name`, such as ``n`` or ``block.n``, is one of the names on the path, or several that follow."""
    return re.search(rf"(^|[.\[(]){re.escape(name)}($|[.\[(])", path) is not None


def _lies_in(path: str, other: str) -> bool:
    return path.startswith(other) and path[len(other) :][:1] in (".", "[", "(")


def _is_foreign(file: str) -> bool:
    """Whether a file of code is the user's or of a library other than PyTorch."""
    return is_own_code(file) and (not file.startswith(_LIBRARY) or "site-packages" in file)


@functools.lru_cache(maxsize=4096)
def _class_is_foreign(kind: type) -> bool:
    return _is_foreign(getattr(sys.modules.get(kind.__module__), "__file__", None) or "<")


def _read_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(where it lies, value) of a function's own values and of the globals that its code names."""
    name = f"{function.__module__}.{function.__qualname__}"
    yield f"{name}()", function
    waiting = [function.__code__]
    names: set[str] = set()
    attributes: set[str] = set()
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for instruction in dis.get_instructions(code):
            kind = attributes if instruction.opname.endswith(("_ATTR", "_METHOD")) else names
            if instruction.opname.endswith(("_GLOBAL", "_NAME", "_ATTR", "_METHOD")):
                kind.add(instruction.argval)
    for key in names & function.__globals__.keys():
        value, label = function.__globals__[key], f"{function.__module__}.{key}"
        if not isinstance(value, types.ModuleType):
            yield label, value
        elif _is_foreign(getattr(value, "__file__", None) or "<"):
            held = vars(value)
            yield from ((f"{value.__name__}.{attribute}", held[attribute]) for attribute in attributes & held.keys())


def _described(value: Any) -> Any:
    """What tells a value from another, without its parts."""
    kind = type(value)
    if isinstance(value, Tensor):
        if value.is_meta:
            return kind, tuple(value.shape)
        return (str(value.dtype), tuple(value.shape), _digest(value.detach().cpu().contiguous()))
    if isinstance(value, (nn.Module, types.FunctionType, types.MethodType, type)) or _is_opaque(value):
        return _Same(value) if not isinstance(value, types.MethodType) else kind
    if isinstance(value, functools._lru_cache_wrapper):
        information = value.cache_info()
        return kind, information.misses, information.currsize
    if isinstance(value, (list, tuple, deque, dict, Mapping)):
        return kind, len(value)
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(_key, value))
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return _Same(value), frame.f_lasti if frame else None
    if isinstance(value, ContextVar):
        return kind
    with contextlib.suppress(Exception):
        return kind, hashlib.blake2b(memoryview(value).cast("B")).digest()
    if not hasattr(value, "__dict__") and not hasattr(kind, "__slots__"):
        text = repr(value)
        return kind, None if _ADDRESS.search(text) else text
    return kind


def _parts(path: str, value: Any, held: list[Any]) -> Iterator[tuple[str, Any]]:
    """(where it lies, value) of each thing that a value is made of."""
    prefix = f"{path}." if path else ""
    if isinstance(value, (types.MethodType, functools.partial)):
        names = ("__self__", "__func__") if isinstance(value, types.MethodType) else ("func", "args", "keywords")
        yield from ((f"{prefix}{name}", getattr(value, name)) for name in names)
        return
    if isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that is empty yet
                yield f"{prefix}{name}", cell.cell_contents
        yield f"{prefix}__defaults__", value.__defaults__
        yield f"{prefix}__kwdefaults__", value.__kwdefaults__
    if isinstance(value, type):
        if _class_is_foreign(value):
            data = (item for item in vars(value).items() if not item[0].startswith("__") and not _is_method(item[1]))
            yield from ((f"{prefix}{name}", attribute) for name, attribute in data)
        return
    if _is_opaque(value):
        return
    if isinstance(value, (dict, Mapping)):
        items = list(value.items())
        held.append(items)
        yield from ((f"{path}[{_key(key)}]", item) for key, item in items)
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, types.GeneratorType):
        yield from (
            (f"{prefix}{name}", item) for name, item in (value.gi_frame.f_locals if value.gi_frame else {}).items()
        )
    elif isinstance(value, ContextVar):
        yield f"{path}()", value.get(None)
    elif hasattr(value, "__next__") and not hasattr(value, "__dict__"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # itertools' iterators say that they will lose it
                made = value.__reduce__()[1:]
        except Exception:
            made = tuple(gc.get_referents(value))
        held.append(made)
        yield f"{path}()", made
    if isinstance(value, nn.Module):
        yield from _of_module(prefix, value)
    else:
        for name, attribute in _attributes(value).items():
            yield f"{prefix}{name}", attribute
    for kind in type(value).__mro__[:-1]:
        if _class_is_foreign(kind):
            yield f"{kind.__module__}.{kind.__qualname__}", kind


def _of_module(prefix: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """As `_parts`, of a module, whose parts are called as in its state_dict."""
    made = {getattr(hook, "name", None) or getattr(hook, "_tensor_name", None) for hook in _torch_hooks(module)}
    for name, value in vars(module).items():
        if name == "_modules":
            yield from ((f"{prefix}{child}", part) for child, part in value.items())
        elif name in _TENSORS:  # followed by the trace, but for what hangs on them
            for key, tensor in value.items():
                held = {} if tensor is None else vars(tensor)
                yield from ((f"{prefix}{key}.{attribute}", item) for attribute, item in held.items())
        elif name not in made and name != "_loss_fn":
            yield f"{prefix}{name}", value
    if "_loss_fn" in vars(module):
        yield f"{prefix}loss_fn", module._loss_fn


def _torch_hooks(module: nn.Module) -> Iterator[Any]:
    """Hooks of PyTorch itself, such as that of `nn.utils.weight_norm`: what they make is made anew in each call."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            yield hook


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object, those in slots too."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__[:-1]:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            with contextlib.suppress(AttributeError):
                found[name] = getattr(value, name)
    return found


def _is_opaque(value: Any) -> bool:
    """Whether a look does not go into a value: what PyTorch or Python keeps for itself, random numbers (watched by
    themselves), files.
    """
    kind = type(value)
    return (
        isinstance(value, (*_LEAVES, *generator_kinds(), weakref.ref))
        or (kind.__module__.startswith(("torch._", "_thread", "threading")) and not isinstance(value, nn.Module))
        or kind.__module__ in ("torch", "torch.utils.hooks")
    )


def _is_method(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, staticmethod, classmethod, property)) or (
        hasattr(type(value), "__get__") and not isinstance(value, functools.partial)
    )


def _key(key: Any) -> str:
    """A key as part of a name: the same in every look."""
    if isinstance(key, _CONSTANTS):
        return repr(key)
    if isinstance(key, tuple):
        return f"({', '.join(map(_key, key))})"
    return f"{type(key).__name__} {id(key)}"


def _digest(tensor: Tensor) -> bytes:
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.resolve_conj().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data if flat.numel() else b"").digest()
