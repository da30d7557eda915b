"""Attention as custom calls, under every transformation of JAX.

    custom_vjp                  forward, then backward and bias gradient as calls of their own
      custom_jvp                only to say that the calls themselves have no derivative
        custom_vmap             a mapped axis becomes one more batch axis; nothing is folded by reshape
          custom_partitioning   batch and heads stay sharded, all other axes are gathered; on a mesh with explicit axes,
                                whose arrays' types carry the sharding, shard_map instead
            _per_device         the kernel (an FFI call) on CUDA, the tiles of xla.py elsewhere

Every layer takes the arrays of a call flat and in order; `Call` names them. Batch axes `*B` are full or of size 1.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_flash import fp8, xla
from jax_flash.extension import native
from jax_flash.spec import TRAILING_AXES, WITHOUT_BATCH, AttentionSpec, Operands, batch_shape

SAVE_NAMES = ("jax_flash_out", "jax_flash_lse")
"""Names (`checkpoint_name`) of output and lse: a remat policy that saves both runs the forward kernel once."""

_CONFIG: Any = jax.config  # in JAX 0.10, its type lacks its flags
logger = logging.getLogger("jax_flash")

# Of a backward call: they always have the full batch axes.
_RESIDUALS = ("out", "lse", "dout", "dlse")


@dataclasses.dataclass(frozen=True)
class Call:
    """One custom call without its arrays."""

    direction: str  # "forward", "backward", "bias_gradient"
    spec: AttentionSpec
    path: str  # "kernel": CUDA only; "any": the kernel on CUDA where there is one, else "tiles": those of xla.py
    names: tuple[str, ...]  # of the arrays it takes

    @property
    def results(self) -> tuple[str, ...]:
        return {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv"), "bias_gradient": ("dbias",)}[self.direction]

    @property
    def target(self) -> str:
        return "jax_flash_forward_fp8" if self.quantizes else f"jax_flash_{self.direction}"

    @property
    def quantizes(self) -> bool:
        return self.direction == "forward" and self.spec.precision is not None

    @property
    def title(self) -> str:
        return self.direction.replace("_", " ")

    def operands(self, arrays: Sequence[Any]) -> Operands:
        return Operands(**{name: x for name, x in zip(self.names, arrays, strict=True) if name in Operands._fields})

    def attributes(self, arrays: Sequence[Any]) -> dict[str, Any]:
        q, k, v = arrays[:3]
        if self.quantizes:
            return fp8.forward_attributes(self.spec, q, k, v, self.operands(arrays), q.dtype)
        attributes = self.spec.attributes(q, k, v, self.operands(arrays))
        return attributes if self.direction == "forward" else attributes | {"lse_cotangent": "dlse" in self.names}

    def result_shapes(self, arrays: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """Of the full batch axes; from arrays, or anything else with a shape."""
        if self.direction == "bias_gradient":
            return (arrays[self.names.index("bias")].shape,)
        batch = batch_shape(*arrays[:3])
        (t, n, h), (s, k, v) = arrays[0].shape[-3:], arrays[2].shape[-3:]
        if self.direction == "forward":
            return (*batch, t, n, v), (*batch, n, t)
        return (*batch, t, n, h), (*batch, s, k, h), (*batch, s, k, v)


# --- the per-device call ---------------------------------------------------------------------------------------------


@functools.cache
def _architectures() -> tuple[int, ...]:
    """Compute capabilities (90: 9.0) of this machine's GPUs."""
    try:
        return tuple(sorted({device["arch"] for device in native().devices()}))
    except RuntimeError:
        return ()


def _plan(target: str, attributes: dict[str, Any]) -> dict[str, Any]:
    """The extension's plan for the call on the GPU of this machine, or {"reason": why there is none}."""
    try:
        here = [native().plan(target, attributes, arch) for arch in _architectures()]
        if here:
            return next((plan for plan in here if "reason" in plan), here[-1])
        # No GPU here, but the program may be lowered for one elsewhere.
        portable = [native().plan(target, attributes, arch) for arch in _PORTABLE]
        return next((plan for plan in portable if "reason" not in plan), portable[0])
    except ImportError as error:
        return {"reason": f"the extension is not there ({error})"}
    except RuntimeError as error:
        return {"reason": str(error)}


_PORTABLE = (80, 90)  # the architectures whose kernels newer GPUs may run


@functools.cache
def _log_once(message: str) -> None:
    logger.debug(message)


def _varying(x: Any) -> frozenset[str]:
    """Mesh axes over which x varies inside shard_map(check_vma=True)."""
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(aval.vma if manual is None else manual.varying)


def _vary_alike(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """The arrays, each varying over the mesh axes over which any of them varies; the transpose sums gradients."""
    axes = frozenset().union(*map(_varying, arrays))
    missing = [tuple(sorted(axes - _varying(x))) for x in arrays]
    return tuple(jax.lax.pcast(x, m, to="varying") if m else x for x, m in zip(arrays, missing, strict=True))


def _type_like(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Type of a result of another shape that varies over the mesh axes over which x varies."""
    aval = jax.typeof(x)
    sharding = aval.sharding.update(spec=PartitionSpec(*(None for _ in shape)))
    return aval.update(shape=shape, dtype=np.dtype(dtype), sharding=sharding)


def _fill_gaps(name: str, x: Any, batch: tuple[int, ...]) -> Any:
    """x with those batch axes materialised that keep its full axes from being one contiguous run (jf::BatchMap)."""
    if name in WITHOUT_BATCH:
        return x
    full = [i for i, size in enumerate(batch) if size > 1 and x.shape[i] == size]
    gaps = [i for i in range(full[0], full[-1]) if x.shape[i] != batch[i]] if full else []
    shape = tuple(batch[i] if i in gaps else size for i, size in enumerate(x.shape))
    return jnp.broadcast_to(x, shape) if gaps else x


def _kernel(call: Call, *arrays: Any) -> tuple[Any, ...]:
    batch = batch_shape(*arrays[:3])
    dense = tuple(_fill_gaps(name, x, batch) for name, x in zip(call.names, arrays, strict=True))
    if call.quantizes:
        q, k, v = dense[:3]
        return fp8.kernel(call.spec, q, k, v, call.operands(dense))
    attributes = call.attributes(dense)
    results = [
        (shape, np.float32 if name == "lse" else arrays[0].dtype)
        for name, shape in zip(call.results, call.result_shapes(dense), strict=True)
    ]
    if call.direction == "bias_gradient":
        results = [(shape, call.operands(arrays).bias.dtype) for shape, _ in results]
    results.append(((native().scratch_bytes(call.target, attributes),), np.uint8))
    types = [_type_like(arrays[0], shape, dtype) for shape, dtype in results]
    *outputs, _ = jax.ffi.ffi_call(call.target, types)(*dense, **attributes)
    if call.direction == "bias_gradient":
        bias = call.operands(arrays).bias
        filled = tuple(i for i, (size, got) in enumerate(zip(bias.shape, outputs[0].shape, strict=True)) if size != got)
        return (outputs[0].sum(filled, keepdims=True).astype(bias.dtype),)
    return tuple(outputs)


def _tiles(call: Call, *arrays: Any) -> tuple[Any, ...]:
    operands = call.operands(arrays)
    q, k, v = arrays[:3]
    if call.quantizes:
        return fp8.tiles(call.spec, q, k, v, operands)
    if call.direction == "forward":
        return tuple(xla.forward(call.spec, q, k, v, operands))
    out, lse, dout = arrays[3:6]
    dlse = arrays[6] if "dlse" in call.names else None
    if call.direction == "bias_gradient":
        return (xla.bias_gradient(call.spec, q, k, v, operands, out, lse, dout, dlse),)
    return tuple(xla.backward(call.spec, q, k, v, operands, out, lse, dout, dlse))


# The identity, but for programs that are compiled for something else than CUDA.
_cuda_only = Primitive("jax_flash_cuda_only")
_cuda_only.def_abstract_eval(lambda x: x)
batching.defvectorized(_cuda_only)


def _refuse_platform(ctx: mlir.LoweringRuleContext, x: Any) -> Any:
    platforms = " and ".join(ctx.module_context.platforms)
    raise NotImplementedError(f"implementation='cuda': the program is compiled for {platforms}, not for a CUDA GPU")


mlir.register_lowering(_cuda_only, _refuse_platform)


def _kernel_or_tiles(
    title: str, path: str, plan: dict[str, Any], kernel: Callable[..., Any], tiles: Callable[..., Any], *arrays: Any
) -> Any:
    """One of two functions of the arrays: the kernel where the program is compiled for CUDA and there is one."""
    reason = plan.get("reason")
    if reason and path == "kernel":
        raise NotImplementedError(f"implementation='cuda': no kernel for the {title} of this call: {reason}")
    if reason:
        _log_once(f"{title} by XLA: {reason}")
        return tiles(*arrays)

    def elsewhere(first: Any, *rest: Any) -> Any:
        return tiles(_cuda_only.bind(first) if path == "kernel" else first, *rest)

    return jax.lax.platform_dependent(*arrays, cuda=kernel, default=elsewhere)


@functools.partial(jax.jit, static_argnums=0)
def _per_device(call: Call, *arrays: Any) -> tuple[Any, ...]:
    """Jitted so that a signature is traced once, and as custom_partitioning takes no function that holds constants."""
    kernel, tiles = functools.partial(_kernel, call), functools.partial(_tiles, call)
    plan = {"reason": "as asked for"} if call.path == "tiles" else _plan(call.target, call.attributes(arrays))
    return _kernel_or_tiles(call.title, call.path, plan, kernel, tiles, *arrays)


# --- sharding: batch and heads stay where they are -------------------------------------------------------------------


class _Layout(NamedTuple):
    """Which axes of the arrays of a call may be sharded."""

    arguments: tuple[tuple[str | None, ...], ...]  # of each array and axis: "b0", "b1", ..., "N", "K"; None: never
    results: tuple[tuple[str | None, ...], ...]
    sizes: dict[str, int]  # of each label


def _layout(call: Call, arrays: Sequence[Any]) -> _Layout:
    batch = batch_shape(*arrays[:3])
    heads = {"N": arrays[0].shape[-2], "K": arrays[1].shape[-2]}
    sizes = {f"b{i}": size for i, size in enumerate(batch)} | heads

    def labels(name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        leading = [] if name in WITHOUT_BATCH else [f"b{i}" for i in range(len(batch))]
        axes = [*leading, *(axis if axis in heads else None for axis in TRAILING_AXES[name])]
        return tuple(a if a and sizes[a] == size else None for a, size in zip(axes, shape, strict=True))

    return _Layout(
        tuple(labels(name, x.shape) for name, x in zip(call.names, arrays, strict=True)),
        tuple(labels(name, shape) for name, shape in zip(call.results, call.result_shapes(arrays), strict=True)),
        sizes,
    )


def _sharding_rule(layout: _Layout) -> tuple[str, tuple[str, ...]]:
    """The rule in the notation of custom_partitioning, and the factors in it that must not be sharded.

    An axis that may not be sharded gets a factor of its own. So do key heads if there are fewer of them than query
    heads: as factors of the query heads they would be sharded over parts of a mesh axis, which no NamedSharding says.
    """
    heads = {"N": "n", "K": "n" if layout.sizes["K"] == layout.sizes["N"] else "k"}
    alone: list[str] = []

    def write(axes: tuple[str | None, ...]) -> str:
        words = []
        for axis in axes:
            if axis is None:
                alone.append(f"a{len(alone)}")
            words.append(heads.get(axis, axis) if axis else alone[-1])
        return " ".join(words)

    rule = ", ".join(map(write, layout.arguments)) + " -> " + ", ".join(map(write, layout.results))
    return rule, tuple(alone)


class _Shards(NamedTuple):
    """How the axes of a call lie on a mesh."""

    axes: dict[str, tuple[str, ...]]  # mesh axes of each label; a label that is not here is not sharded
    kv_by_index: bool  # more shards of query heads than key heads: each device picks its key head

    def spec(self, labels: tuple[str | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(self.axes.get(label) if label else None for label in labels))


def _shards(layout: _Layout, specs: Sequence[Any], mesh: Any) -> _Shards:
    """Takes each axis from the first array that has it sharded evenly, on mesh axes that no other axis has.

    specs: PartitionSpecs of the arguments, then of the results.
    """
    found: dict[str, tuple[str, ...]] = {}
    for labels, spec in zip((*layout.arguments, *layout.results), specs, strict=True):
        for label, entry in zip(labels, tuple(spec), strict=False):
            label = "N" if label == "K" else label
            axes = entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else ()
            taken = {axis for others in found.values() for axis in others}
            count = math.prod(mesh.shape[axis] for axis in axes)
            if not label or not axes or label in found or taken & set(axes) or layout.sizes[label] % count:
                continue
            if label == "N" and layout.sizes["K"] % count and count % layout.sizes["K"]:
                continue  # a shard of query heads would straddle two key heads
            found[label] = axes
    head_shards = math.prod(mesh.shape[axis] for axis in found.get("N", ()))
    kv_by_index = layout.sizes["K"] % head_shards != 0
    if "N" in found and not kv_by_index:
        found["K"] = found["N"]
    return _Shards(found, kv_by_index)


def _local_call(
    call: Call, layout: _Layout, shards: _Shards, mesh: Any, run: Callable[..., tuple[Any, ...]]
) -> Callable[..., tuple[Any, ...]]:
    """`run` as one device's part of the call: its key head picked, gradients of what devices share summed over them."""
    results = dict(zip(call.results, layout.results, strict=True))
    head_axes = shards.axes.get("N", ())
    head_shards = math.prod(mesh.shape[axis] for axis in head_axes)

    def kv_head() -> Any:
        return jax.lax.axis_index(head_axes) * layout.sizes["K"] // head_shards

    def summed(name: str, x: Any) -> Any:
        if name in ("dk", "dv") and shards.kv_by_index:
            all_heads = jnp.zeros_like(x, shape=(*x.shape[:-2], layout.sizes["K"], x.shape[-1]))
            x, all_heads = _vary_alike((x, all_heads))
            return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(all_heads, x, kv_head(), axis=-2), head_axes)
        if name == "dbias":
            shared = [a for label, axes in shards.axes.items() if label not in ("K", *results[name]) for a in axes]
            return jax.lax.psum(x, tuple(shared)) if shared else x
        return x

    def local(*arrays: Any) -> tuple[Any, ...]:
        q, k, v, *rest = _vary_alike(arrays)
        if shards.kv_by_index:
            k, v = (jax.lax.dynamic_slice_in_dim(x, kv_head(), 1, axis=-2) for x in (k, v))
        return tuple(summed(*pair) for pair in zip(call.results, run(q, k, v, *rest), strict=True))

    return local


@functools.lru_cache(maxsize=1024)
def _partitioned(call: Call, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Callable[..., tuple[Any, ...]]:
    """The call for axes that the compiler shards."""
    layout = _layout(call, shapes)

    @custom_partitioning
    def partitioned(*arrays: Any) -> tuple[Any, ...]:
        return _per_device(call, *arrays)

    def partition(mesh: Any, arguments: Any, outputs: Any) -> Any:
        arrays = (*arguments, *outputs)
        if mesh.empty:  # under jax.set_mesh, but no array says that it lies on that mesh: nothing is sharded
            mesh = Mesh(sorted(arrays[0].sharding.device_set, key=lambda device: device.id), ("device",))
            specs = [PartitionSpec()] * len(arrays)
        else:
            specs = [x.sharding.spec for x in arrays]
        # Whatever sharding was proposed, only batch and heads keep theirs.
        shards = _shards(layout, specs, mesh)
        local = _local_call(call, layout, shards, mesh, functools.partial(_per_device, call))

        def shardings(layouts: Any) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, shards.spec(labels)) for labels in layouts)

        return mesh, local, shardings(layout.results), shardings(layout.arguments)

    rule, unsharded = _sharding_rule(layout)
    partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=unsharded)
    return partitioned


def _explicit_mesh(arrays: Sequence[Any]) -> Any:
    """The mesh whose axes are part of the arrays' types, or None."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def _on_explicit_mesh(call: Call, mesh: Any, run: Callable[..., tuple[Any, ...]], arrays: Sequence[Any]) -> Any:
    """The call where the arrays' types say how they are sharded; so do those of the results."""
    layout = _layout(call, arrays)
    specs = [*(jax.typeof(x).sharding.spec for x in arrays), *(PartitionSpec() for _ in layout.results)]
    shards = _shards(layout, specs, mesh)
    places = [NamedSharding(mesh, shards.spec(labels)) for labels in layout.arguments]
    arrays = tuple(map(jax.sharding.reshard, arrays, places))
    if not shards.axes:
        return run(*arrays)
    return jax.shard_map(
        _local_call(call, layout, shards, mesh, run),
        mesh=mesh,
        in_specs=tuple(map(shards.spec, layout.arguments)),
        out_specs=tuple(map(shards.spec, layout.results)),
        axis_names={axis for axes in shards.axes.values() for axis in axes},
    )(*arrays)


# --- vmap: one more batch axis ---------------------------------------------------------------------------------------


def _stacked(call: Call, size: int, mapped: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays of the call with the mapped axis as their first batch axis; of size 1 where an array is not mapped."""
    # Residuals have every batch axis, one of query, key and value has it, and dbias has those of the bias.
    full = set(_RESIDUALS)
    if not any(mapped[:3]):
        full.add("q")
    if call.direction == "bias_gradient":
        full.add("bias")

    def stack(name: str, m: bool, x: Any) -> Any:
        if m or name in WITHOUT_BATCH:
            return x
        return jnp.broadcast_to(x[None], (size, *x.shape)) if name in full else x[None]

    return tuple(stack(*item) for item in zip(call.names, mapped, arrays, strict=True))


def _with_mapped_sinks(call: Call, size: int, mapped: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, Any]:
    """The forward call with sinks [size, N], which the calls do not take: attention without them, then rescaled."""
    at = call.names.index("sinks")
    sinks = arrays[at]
    rest = dataclasses.replace(call, names=call.names[:at] + call.names[at + 1 :])
    out, lse = _run(rest)(*_stacked(rest, size, [*mapped[:at], *mapped[at + 1 :]], [*arrays[:at], *arrays[at + 1 :]]))
    sinks = sinks.reshape(size, *(1,) * (lse.ndim - 3), -1, 1)
    seen = lse > -jnp.inf
    with_sinks = jnp.logaddexp(jnp.where(seen, lse, 0), sinks)
    kept = jnp.where(seen, jnp.exp(jnp.where(seen, lse, 0) - with_sinks), 0)
    out = (out.astype(kept.dtype) * jnp.moveaxis(kept, -1, -2)[..., None]).astype(out.dtype)
    return out, jnp.where(seen, with_sinks, -jnp.inf)


@functools.lru_cache(maxsize=1024)
def _run(call: Call) -> Callable[..., tuple[Any, ...]]:
    """The call as a function of its arrays, which vmap and sharded jit understand. Traced once per signature."""

    @custom_vmap
    def mappable(*arrays: Any) -> tuple[Any, ...]:
        mesh = _explicit_mesh(arrays)
        if mesh is not None:
            return _on_explicit_mesh(call, mesh, functools.partial(_per_device, call), arrays)
        # Inside shard_map, custom_partitioning would drop the varying axes; without jit, it meets constants.
        if any(_varying(x) for x in arrays) or _CONFIG.jax_disable_jit:
            return _per_device(call, *arrays)
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        return _partitioned(call, shapes)(*arrays)

    @mappable.def_vmap
    def _mapped(size: int, mapped: list[bool], *arrays: Any) -> tuple[Any, Any]:
        if "sinks" in call.names and mapped[call.names.index("sinks")]:
            results: Any = _with_mapped_sinks(call, size, mapped, arrays)
        else:
            results = _run(call)(*_stacked(call, size, mapped, arrays))
        return results, (True,) * len(call.results)

    return jax.jit(without_derivative(mappable, _NO_HIGHER_DERIVATIVES), inline=True)


def without_derivative(function: Callable[..., Any], message: str) -> Callable[..., Any]:
    """The function, where its derivative is asked for an error."""
    function = jax.custom_jvp(function)

    @function.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(message)

    return function


_NO_HIGHER_DERIVATIVES = (
    "this path of jax_flash has first derivatives in reverse mode; implementation='xla' has forward mode and any order"
)


# --- reverse mode ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(spec: AttentionSpec, path: str, lse_cotangent: bool, q: Any, k: Any, v: Any, operands: Operands) -> Any:
    del lse_cotangent
    present = operands.present()
    return _run(Call("forward", spec, path, ("q", "k", "v", *present)))(q, k, v, *present.values())


def _attention_forward(spec: AttentionSpec, path: str, lse_cotangent: bool, q: Any, k: Any, v: Any, operands: Operands):
    out, lse = _attention(spec, path, lse_cotangent, q, k, v, operands)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVE_NAMES, strict=True))
    return (out, lse), (q, k, v, operands, out, lse)


def _attention_backward(spec: AttentionSpec, path: str, lse_cotangent: bool, residuals: Any, cotangents: Any) -> Any:
    q, k, v, operands, out, lse = residuals
    dout, dlse = cotangents
    arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout} | ({"dlse": dlse} if lse_cotangent else {})
    arrays |= operands._replace(sinks=None).present()  # the lse already has the sink

    def run(direction: str) -> tuple[Any, ...]:
        return _run(Call(direction, spec, path, tuple(arrays)))(*arrays.values())

    def gradient(x: Any, of: Any) -> Any:
        """On an explicit mesh a gradient must lie as its array does."""
        sharding = jax.typeof(of).sharding
        return jax.sharding.reshard(x, sharding) if AxisType.Explicit in sharding.mesh.axis_types else x

    dq, dk, dv = map(gradient, run("backward"), (q, k, v))
    gradients = Operands()
    if operands.bias is not None:
        gradients = gradients._replace(bias=gradient(run("bias_gradient")[0], operands.bias))
    if operands.sinks is not None:
        dsinks = _sinks_gradient(operands.sinks, dout, dlse, out, lse)
        gradients = gradients._replace(sinks=gradient(dsinks, operands.sinks))
    return dq, dk, dv, gradients


def _sinks_gradient(sinks: Any, dout: Any, dlse: Any, out: Any, lse: Any) -> Any:
    """sinks [N]; dout, out [*B, T, N, Hv]; dlse, lse [*B, N, T]."""
    seen = lse > -jnp.inf  # a row that sees no key gives its sink no gradient
    probability = jnp.exp(sinks.reshape((1,) * (lse.ndim - 2) + (-1, 1)) - jnp.where(seen, lse, jnp.inf))
    delta = jnp.moveaxis(jnp.sum(out.astype(lse.dtype) * dout.astype(lse.dtype), axis=-1), -1, -2)
    per_row = probability * jnp.where(seen, dlse - delta, 0)
    return per_row.sum(axis=(*range(lse.ndim - 2), lse.ndim - 1)).astype(sinks.dtype)


_attention.defvjp(_attention_forward, _attention_backward)


# --- the entry -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _attend(spec: AttentionSpec, path: str, lse_cotangent: bool, q: Any, k: Any, v: Any, operands: Operands) -> Any:
    present = operands.present()
    arrays = (q, k, v, *present.values())
    mesh = _explicit_mesh(arrays)
    if mesh is not None:
        replicated = NamedSharding(mesh, PartitionSpec())
        arrays = tuple(jax.sharding.reshard(x, replicated) if jax.typeof(x).sharding.mesh.empty else x for x in arrays)

    def named(arrays: Sequence[Any]) -> Operands:
        return Operands(**dict(zip(present, arrays, strict=True)))

    if path == "xla" and spec.precision:
        path = "tiles"  # rounding has no derivative: the gradients are those of the unrounded call
    if path == "xla":

        def plain(q: Any, k: Any, v: Any, *operands: Any) -> Any:
            return xla.attention(spec, q, k, v, named(operands))

        call = Call("forward", spec, path, ("q", "k", "v", *present))
        return plain(*arrays) if mesh is None else _on_explicit_mesh(call, mesh, plain, arrays)

    # Outside of the custom_vjp: inside shard_map(check_vma=True) the transpose sums gradients of replicated arrays.
    q, k, v, *rest = _vary_alike(arrays)
    return _attention(spec, path, lse_cotangent, q, k, v, named(rest))


def attend(spec: AttentionSpec, path: str, lse_cotangent: bool, q: Any, k: Any, v: Any, operands: Operands) -> Any:
    """out [*B, T, N, Hv], lse [*B, N, T]. The lse's cotangent is ignored without lse_cotangent."""
    try:
        return _attend(spec, path, lse_cotangent, q, k, v, operands)
    except TypeError as error:
        if "custom_vjp" in str(error):  # JAX's own words for forward mode do not say what to do
            raise NotImplementedError(_NO_HIGHER_DERIVATIVES) from error
        raise


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5), inline=True)
def attend_quantized(
    spec: AttentionSpec, path: str, quantized: fp8.Quantized, operands: Operands, dtype: Any, value_size: int
) -> tuple[Any, Any]:
    """out [*B, T, N, value_size] and lse of query, key and value that are quantised already: the forward call alone."""
    v = jax.ShapeDtypeStruct((*quantized.key.shape[:-1], value_size), dtype)
    present = operands.present()
    count = len(quantized)

    def named(arrays: Sequence[Any]) -> tuple[fp8.Quantized, Operands]:
        return fp8.Quantized(*arrays[:count]), Operands(**dict(zip(present, arrays[count:], strict=True)))

    def kernel(*arrays: Any) -> tuple[Any, Any]:
        return fp8.forward_kernel(spec, *named(arrays), dtype, v)

    def tiles(*arrays: Any) -> tuple[Any, Any]:
        out, lse = fp8.emulate(spec, *named(arrays), dtype)
        return out[..., :value_size], lse

    def run(*arrays: Any) -> tuple[Any, Any]:
        if path == "xla":
            return tiles(*arrays)
        q, k = arrays[:2]
        attributes = fp8.forward_attributes(spec, q, k, v, operands, dtype)
        return _kernel_or_tiles("forward", path, _plan("jax_flash_forward_fp8", attributes), kernel, tiles, *arrays)

    message = "quantized_attention: it has no derivative; flash_attention(..., precision=jax_flash.Fp8()) has one"
    return without_derivative(run, message)(*quantized, *present.values())


def describe(spec: AttentionSpec, path: str, q: Any, k: Any, v: Any, operands: Operands) -> list[str]:
    """What runs each call: a line of the plan, or of the reason why it is left to XLA."""
    if path == "xla":
        return ["XLA, as asked for (implementation='xla')"]
    present = operands.present()
    forward = Call("forward", spec, path, ("q", "k", "v", *present))
    out, lse = (jax.ShapeDtypeStruct(shape, q.dtype) for shape in forward.result_shapes((q, k, v)))
    backward = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": out} | operands._replace(sinks=None).present()
    calls = [(forward, (q, k, v, *present.values()))]
    for direction in ("backward", *(["bias_gradient"] if "bias" in present else [])):
        calls.append((Call(direction, spec, path, tuple(backward)), tuple(backward.values())))
    backend = jax.default_backend()
    lines = [] if backend == "gpu" else [f"XLA on this machine, whose default backend is {backend}; compiled for CUDA:"]
    for call, arrays in calls:
        plan = _plan(call.target, call.attributes(arrays))
        facts = ", ".join(f"{name} {value}" for name, value in plan.get("facts", {}).items())
        lines.append(f"{call.title}: " + (f"XLA, {plan['reason']}" if "reason" in plan else f"{plan['name']}, {facts}"))
    return lines
