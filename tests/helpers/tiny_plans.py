"""Makes simple plans without the planner: layers in order, activations kept until their last use, weights read for each
use.

The profiles are real traces of small models, so that the runtime is tested with the operators that real runs use.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

from tightfit.planner.schema import Peak, Phase, Plan
from tightfit.profiles.schema import PREFERENCE, Channel, DeviceFigures, Floor, Model, Profile
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.engine.start import cuda_stubs
from tightfit.runtime.engine.weights.store import find_extent

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
TRACED: dict[str, tuple] = {}
"""traces that were made in this process, by what they depend on: many tests want the same"""
FLOOR = Floor(
    import_peak_bytes=160 << 20,
    resident_bytes=130 << 20,
    instruction_bytes=64,
    cuda_stubs=bool(cuda_stubs.folder(cache_directory())),  # a process with all of CUDA's libraries holds more
)


def device(threads=2):
    channel = Channel(bytes_per_second=1e9, latency_seconds=1e-4)
    return DeviceFigures(
        name="test",
        kind="cpu",
        threads=threads,
        floor=FLOOR,
        read=channel,
        write=channel,
        torch_version=torch.__version__,
    )


def decoder_profile(
    directory: Path,
    *,
    config=None,
    batch=2,
    seq=24,
    rank=4,
    dtype="bfloat16",
    lora=None,
    preference=None,
    tile=None,
    matrix_rows=None,
):
    """A profile, without measured times, of a small decoder of any family with random weights packed in `directory`.

    `lora`: a LoraConfig; by default pairs of `rank` everywhere. `preference`: a loss of pairs, if it learns from such.
    `tile`: tokens that go through a layer at a time; `matrix_rows`: rows of a frozen matrix that are multiplied at a
    time.
    """
    from tightfit.profiles.models.lora import LoraConfig
    from tightfit.profiles.sources.lookup import resolve
    from tightfit.profiles.steps.decoder_trace import trace_decoder
    from tightfit.profiles.weights.store_file import build_store
    from tightfit.runtime.engine.weights.store import WeightStore

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps(config or CONFIG))
    source = resolve(str(path))
    store = build_store(source, directory)
    with WeightStore.open(store) as opened:
        fingerprint = opened.fingerprint
    pairs = lora or LoraConfig(rank=rank)

    key = repr((source.config, batch, seq, pairs, dtype, preference, tile, matrix_rows))
    if key not in TRACED:
        TRACED[key] = trace_decoder(
            source, batch, seq, pairs, dtype, lambda *_: None, preference, tile=tile, matrix_rows=matrix_rows
        )
    traced, decoder = copy.deepcopy(TRACED[key][0]), TRACED[key][1]
    told = {PREFERENCE: preference.model_dump()} if preference else {}
    model = Model(
        name="tiny", source=str(path), kind="decoder", config=source.config | told,
        lora=decoder.lora if lora else {"rank": rank, "alpha": 2.0 * rank}, store=str(store), store_fingerprint=fingerprint,
        tables=decoder.tables, rows_apart=decoder.rows_apart,
    )  # fmt: skip
    return _profile(traced, source, model, batch, seq, dtype)


def module_profile(directory: Path, factory: str):
    """A profile, without measured times, of a module:factory, all of whose parameters are trained."""
    from tightfit.profiles.sources.factory import build_module
    from tightfit.profiles.sources.lookup import resolve
    from tightfit.profiles.tracing.trace import trace
    from tightfit.profiles.weights.store_file import build_store
    from tightfit.runtime.engine.weights.store import WeightStore

    source = resolve(factory)
    store = build_store(source, directory)
    with WeightStore.open(store) as opened:
        fingerprint = opened.fingerprint
    module, sample, _ = build_module(factory)
    traced = trace(module, {f"batch{i}": t for i, t in enumerate(sample)})
    model = Model(
        name="tiny",
        source=source.path,
        kind="module",
        config=source.config,
        store=str(store),
        store_fingerprint=fingerprint,
    )
    return _profile(traced, source, model, sample[0].shape[0], None, "float32")


def _profile(traced, source, model, batch, seq, dtype):
    tensors = [
        t.model_copy(update={"packed_bytes": find_extent(source.entries, t.name).bytes}) if t.kind == "weight" else t
        for t in traced.tensors
    ]
    return Profile(
        fingerprint="f" * 64, model=model, batch=batch, seq=seq, compute_dtype=dtype, device=device(), tensors=tensors,
        programs=traced.programs, layers=traced.layers, loss=traced.loss, token_losses=traced.token_losses,
    )  # fmt: skip


def naive_plan(
    profile: Profile, *, budget=1 << 33, spill=(), offload=(), recompute=False, packed=(), unpacked=(), shift=0
):
    """A valid schedule by simple rules.

    `spill`: activations (global names) that are in the spill file between forward and backward. `offload`: trainables
    whose Adam states are in the spill file between steps. `packed`, `unpacked`: weights that stay resident in that
    form. `recompute`: a layer's private activations are freed after its forward and recomputed before its backward.
    `shift`: bytes added to every offset.
    """
    return _Naive(profile, set(spill), set(offload), recompute, set(packed), set(unpacked), shift).plan(budget)


class _Naive:
    def __init__(self, profile, spill, offload, recompute, packed, unpacked, shift):
        self.profile, self.spill, self.offload, self.recompute = profile, spill, offload, recompute
        self.packed, self.unpacked = packed, unpacked
        self.tensors = {t.name: t for t in profile.tensors}
        self.programs = {p.name: p for p in profile.programs}
        self.sizes = {t.name: t.bytes for t in profile.tensors}
        self.end = shift
        self.live, self.resident = {}, {}
        for t in profile.tensors:
            if t.kind in ("constant", "batch", "trainable"):
                self.resident[t.name] = self._take(t.name, t.bytes)
            if t.kind == "trainable":
                for name in (f"adam_m:{t.name}", f"adam_v:{t.name}"):
                    self.sizes[name] = t.bytes
                    if t.name not in offload:
                        self.resident[name] = self._take(name, t.bytes)
            if t.name in packed:
                self.resident[f"packed:{t.name}"] = self._take(f"packed:{t.name}", t.packed_bytes)
            if t.name in unpacked:
                self.resident[t.name] = self._take(t.name, t.bytes)

    def _take(self, name, size):
        """Allocate by first fit, aligned to 4096 bytes for packed weights and 64 for others."""
        step = 4096 if name.startswith("packed:") else 64
        at = 0
        for start, stop in sorted(self.live.values()):
            at = -(-at // step) * step
            if at + size <= start:
                break
            at = max(at, stop)
        at = -(-max(at, 0) // step) * step
        self.live[name] = (at, at + max(size, 1))
        self.end = max(self.end, at + size)
        return at

    def _names(self, layer):
        return {
            v.name: layer.bindings.get(v.name, f"{layer.name}/{v.name}") for v in self.programs[layer.program].values
        }

    def _calls(self, evaluate):
        layers = self.profile.layers
        for layer in layers:
            program = self.programs[layer.program]
            for index, op in enumerate(program.operators):
                if index in program.inference if evaluate else op.phase == "forward":
                    yield layer, index, op, False
        if evaluate:
            return
        for layer in reversed(layers):
            operators = self.programs[layer.program].operators
            if self.recompute:
                for index, op in enumerate(operators):
                    if op.phase == "forward" and self._private(layer, op):
                        yield layer, index, op, True
            for index, op in enumerate(operators):
                if op.phase == "backward":
                    yield layer, index, op, False

    def _private(self, layer, op):
        return all(n is not None and n not in layer.bindings for n in op.outputs) and op.recomputable and not op.gathers

    def phase(self, *, evaluate):
        calls = list(self._calls(evaluate))
        last, later = {}, {}
        for place, (layer, _, op, again) in enumerate(calls):
            names = self._names(layer)
            for n in (*op.inputs, *(o for o in op.outputs if o)):
                last[names[n]] = place
                later.setdefault(names[n], []).append((place, op.phase == "backward" or again))
        out, due = [], []
        for place, (layer, index, op, again) in enumerate(calls):
            names = self._names(layer)
            for n in op.inputs:
                name = names[n]
                if n in op.gathers or name in self.live:
                    continue
                t = self.tensors.get(name)
                if t is not None and t.kind == "weight":
                    if f"packed:{name}" not in self.live:
                        out.append(["read", name, self._take(f"packed:{name}", t.packed_bytes)])
                    out.append(["unpack", name, self._take(name, t.bytes)])
                    if name not in self.packed:
                        self._free(out, f"packed:{name}")
                else:
                    assert name in self.spill, name
                    out.append(["fetch", name, self._take(name, t.bytes)])
            sizes = {v.name: v.bytes for v in self.programs[layer.program].values}
            offsets = []
            for n in op.outputs:
                if n is not None:
                    self.sizes[names[n]] = sizes[n]
                offsets.append(None if n is None else self._take(names[n], sizes[n]))
            out.append(["run", layer.name, index, offsets])
            due += [names[n] for n in op.outputs if n and self._trainable(names[n])]
            for gradient in [g for g in due if max(last[g], last[g.removeprefix("grad:")]) <= place]:
                self._update(out, gradient.removeprefix("grad:"))
                self._free(out, gradient)
                due.remove(gradient)
            for n in dict.fromkeys((*op.inputs, *(o for o in op.outputs if o))):
                name = names[n]
                if (
                    n in op.gathers
                    or name in self.resident
                    or name in (self.profile.loss, self.profile.token_losses)
                    or name not in self.live
                    or name in due
                ):
                    continue
                t = self.tensors.get(name)
                following = [backward for p, backward in later[name] if p > place]
                weight = t is not None and t.kind == "weight"
                dropped = (
                    self.recompute
                    and op.phase == "forward"
                    and not again
                    and self._is_private_value(layer, n)
                    and all(following)
                )
                if name in self.spill and not evaluate and op.phase == "forward" and following and all(following):
                    out.append(["spill", name])
                    self._free(out, name)
                elif last[name] == place or weight or dropped:
                    self._free(out, name)
        for name in (self.profile.token_losses, self.profile.loss):
            if name:
                self._free(out, name)
        assert set(self.live) == set(self.resident), set(self.live) ^ set(self.resident)
        peak = self.profile.device.floor.resident_bytes + self.end
        return Phase(instructions=out, seconds=1.0, peak_bytes=peak, peak=Peak(instruction=0, text="", tensors={}))

    def _is_private_value(self, layer, value):
        for op in self.programs[layer.program].operators:
            if value in op.outputs:
                return op.phase == "forward" and self._private(layer, op)
        return False

    def _trainable(self, gradient):
        t = self.tensors.get(gradient.removeprefix("grad:"))
        return gradient.startswith("grad:") and t is not None and t.kind == "trainable"

    def _update(self, out, name):
        states = (f"adam_m:{name}", f"adam_v:{name}") if name in self.offload else ()
        for state in states:
            out.append(["fetch", state, self._take(state, self.sizes[state])])
        out.append(["update", name])
        for state in states:
            out.append(["spill", state])
            self._free(out, state)

    def _free(self, out, name):
        del self.live[name]
        out.append(["free", name])

    def plan(self, budget):
        train = self.phase(evaluate=False)
        evaluate = self.phase(evaluate=True)
        p = self.profile
        floor = p.device.floor
        count = len(train.instructions) + len(evaluate.instructions)
        workspace = max(op.workspace_bytes for program in p.programs for op in program.operators)
        peak = max(
            floor.import_peak_bytes, floor.resident_bytes + floor.instruction_bytes * count + self.end + workspace
        )
        return Plan(
            fingerprint="n" * 64, profile_fingerprint=p.fingerprint, policy="naive", status="feasible", budget_bytes=budget,
            floor_bytes=floor.import_peak_bytes, peak_bytes=peak, step_seconds=1.0, bound_seconds=0.0,
            any_schedule_bound_seconds=0.0, gap=1.0, any_schedule_gap=1.0, solve_seconds=0.0, model=p.model, batch=p.batch,
            seq=p.seq, compute_dtype=p.compute_dtype, optimizer=p.optimizer, device=p.device, tensors=p.tensors,
            programs=p.programs, layers=p.layers, loss=p.loss, token_losses=p.token_losses, decisions={},
            resident=self.resident, arena_bytes=self.end, workspace_bytes=workspace, train=train, evaluate=evaluate,
        )  # fmt: skip
