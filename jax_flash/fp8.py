"""Attention on 8 bits: how query, key and value are quantised, and what the kernel computes from them.

    q' = R q / qs,   k' = R k / ks,   v' = v / vs          rounded to e4m3; R a random-sign Hadamard rotation
    s  = scale * qs * ks * (q' . k')                       = scale * q . k up to rounding: R cancels
    p  = 2^(s log2 e + log2 vs - m + 4)                    m an integer above the row's maximum; rounded to e4m3
    out = sum(p v') / sum(p / vs)

Scales are powers of two, one for each `BLOCK` tokens of a head: dividing by them is exact. With `Fp8(scores="int8")`
query and key are int8 instead: integers from -127 to 127, their scales the largest magnitude / 127. int8 has no NaN: a
token that holds one is `_NAN` throughout, and the scale of its block negative. `quantize` here and
cuda/support/quantize.cuh give the same bits. `emulate` computes what the kernel computes, rounding of p included, in
plain JAX.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import xla
from jax_flash.arguments import array, batch_lengths, precision_or_none, query_key_value
from jax_flash.extension import native
from jax_flash.masks import Tiling
from jax_flash.spec import AttentionSpec, Fp8, Operands, batch_shape

Granularity: TypeAlias = Literal["block", "head", "tensor"]

BLOCK = 32
"""Tokens that share a scale."""

E4M3 = jnp.float8_e4m3fn
SCORE_DTYPES: dict[Literal["e4m3", "int8"], Any] = {"e4m3": E4M3, "int8": jnp.int8}
"""Of query and key, by `Fp8.scores`."""

HEAD_SIZES = (64, 128, 256)
"""Head sizes of the kernel; others are padded with zeros, which change nothing."""

_CHUNK = 16  # keys that stand together in the layout of the value
_SHIFT = 4  # p reaches 2^4: a maximum that lags behind by up to 2^4 still fits e4m3
_CLAMP = 2.0**60  # of the inputs: then no product of two scales overflows
_LEAST_EXPONENT = -50  # of a scale of e4m3: nor does one vanish
_LEAST_OF_INTEGERS = 2.0**-43  # magnitude that a scale of int8 is for, as that is then about the same
_NAN = -128

# Position c of a chunk holds key _ORDER[c]: so the registers that hold a tile of p after the first product are already
# the operand of the second, without any shuffle.
_ORDER = np.array(
    [2 * (c // 4) + c % 4 if c % 4 < 2 else 8 + 2 * (c // 4) + c % 4 - 2 for c in range(_CHUNK)],
    np.int32,  # whether JAX has 64 bits or not
)


class Quantized(NamedTuple):
    """Query, key and value as the fp8 kernel takes them. H' is the head size of the kernel, S' is S up to a block."""

    query: Any  # e4m3 or int8 [*B, T, N, H']
    key: Any  # of query's dtype [*B, S, K, H']
    value: Any  # e4m3 [*B, K, S' / 16, H' * 16]: 16 keys, in the order of the kernel's registers, stand together
    query_scale: Any  # float32 [*B, N, ceil(T / BLOCK)]
    key_scale: Any  # float32 [*B, K, ceil(S / BLOCK)]
    value_scale: Any  # float32 [*B, K, ceil(S / BLOCK)]


def quantize(
    query: Any, key: Any, value: Any, precision: Fp8 | None = None, *, q_lengths: Any = None, kv_lengths: Any = None
) -> Quantized:
    """query [*B, T, N, H], key [*B, S, K, H], value [*B, S, K, Hv], as `flash_attention` takes them.

    Tokens at or past the lengths (integers [*B]) become zeros, whatever they hold, and do not count for any scale.
    Infinities and magnitudes above 2^60 become 2^60. precision None: `Fp8()`.
    """
    q, k, v = query_key_value(query, key, value)
    return _quantize(
        q,
        k,
        v,
        precision_or_none("precision", precision) or Fp8(),
        batch_lengths("q_lengths", q_lengths, q.shape[:-3], q.shape[-3]),
        batch_lengths("kv_lengths", kv_lengths, k.shape[:-3], k.shape[-3]),
    )


def from_tensors(
    query: Any, key: Any, value: Any, query_scale: Any = 1.0, key_scale: Any = 1.0, value_scale: Any = 1.0
) -> Quantized:
    """Tensors of 8 bits already, in `flash_attention`'s shapes, and what multiplies each: one number above 0.

    e4m3; query and key may be int8, of integers from -127 to 127.
    """
    dtypes = [str(np.dtype(dtype)) for dtype in SCORE_DTYPES.values()]
    q, k, v = query_key_value(query, key, value, dtypes, str(np.dtype(E4M3)))
    size = kernel_head_size(max(q.shape[-1], v.shape[-1]))

    def scales(x: Any, name: str, scale: Any) -> Any:
        scale = array(name, scale, jnp.floating)
        if scale.size != 1:
            raise ValueError(f"{name}: expected one number, got shape {scale.shape}")
        blocks = -(-x.shape[-3] // BLOCK)
        return jnp.full((*x.shape[:-3], x.shape[-2], blocks), scale.reshape(()), jnp.float32)

    return Quantized(
        _padded(q, size),
        _padded(k, size),
        value_layout(_padded(v, size)),
        scales(q, "query_scale", query_scale),
        scales(k, "key_scale", key_scale),
        scales(v, "value_scale", value_scale),
    )


def precision_of(quantized: Quantized) -> Fp8:
    """With the scores that the arrays are for."""
    return next(Fp8(scores=scores) for scores, dtype in SCORE_DTYPES.items() if quantized.query.dtype == dtype)


def kernel_head_size(size: int) -> int:
    if size > HEAD_SIZES[-1]:
        raise ValueError(f"precision: expected head sizes up to {HEAD_SIZES[-1]} beside Fp8, got {size}")
    return next(known for known in HEAD_SIZES if size <= known)


def hadamard_size(head_size: int) -> int:
    """Size of the blocks of the rotation: the largest power of two that divides the head size."""
    return head_size & -head_size


def value_layout(value: Any) -> Any:
    """[*B, S, K, H'] -> [*B, K, S' / 16, H' * 16]"""
    *batch, s, heads, size = value.shape
    rows = -(-s // BLOCK) * BLOCK
    x = jnp.pad(value, [(0, 0)] * len(batch) + [(0, rows - s), (0, 0), (0, 0)])
    x = x.reshape(*batch, rows // _CHUNK, _CHUNK, heads, size)[..., _ORDER, :, :]
    return jnp.moveaxis(x, (-2, -4, -1, -3), (-4, -3, -2, -1)).reshape(*batch, heads, rows // _CHUNK, size * _CHUNK)


def value_from_layout(value: Any, length: int) -> Any:
    """The inverse of `value_layout`."""
    *batch, heads, chunks, _ = value.shape
    x = value.reshape(*batch, heads, chunks, -1, _CHUNK)[..., np.argsort(_ORDER)]
    x = jnp.moveaxis(x, (-4, -3, -2, -1), (-2, -4, -1, -3))
    return x.reshape(*batch, chunks * _CHUNK, heads, -1)[..., :length, :, :]


def emulate(spec: AttentionSpec, quantized: Quantized, operands: Operands, dtype: Any) -> tuple[Any, Any]:
    """What the kernel computes: out [*B, T, N, H'] of `dtype` and lse [*B, N, T].

    The kernel meets a row's maximum key tile by key tile and so may hold p in lower powers of two: the results differ
    only where p is so small that e4m3 is denormal.
    """
    q = _restored(quantized.query, quantized.query_scale)
    k = _restored(quantized.key, quantized.key_scale)
    v = value_from_layout(quantized.value, k.shape[-3]).astype(jnp.float32)
    call = xla._Call(spec, q, k, v, operands)
    call.k_tiles = Tiling(k.shape[-3], k.shape[-3])  # a row's maximum must be known before its p is rounded
    value_scale = jnp.swapaxes(_each_token(quantized.value_scale, k.shape[-3]), -1, -2)[..., None, None, :]

    def query_tile(_: None, i: Any) -> tuple[None, tuple[Any, Any]]:
        tile = call.tile(i, 0)
        x = tile.scores * np.float32(np.log2(np.e)) + jnp.log2(value_scale)
        x = x if tile.visible is None else jnp.where(tile.visible, x, -jnp.inf)
        top = jnp.ceil(jnp.max(x, axis=-1, keepdims=True))
        offset = jnp.where(top == -jnp.inf, 0, top) - _SHIFT
        p = jnp.exp2(x - offset)
        total = jnp.sum(p / value_scale, axis=-1, keepdims=True)
        empty = total == 0
        if call.operands.sinks is not None:
            total += jnp.exp2(call.operands.sinks * np.float32(np.log2(np.e)) - offset)
        p = _rounded(p).astype(jnp.float32)
        if tile.keep is not None:
            p = p * tile.keep
        weighted = xla._product("...gts,...sh->...gth", p, call.v)
        out = jnp.where(empty, 0, weighted / jnp.where(empty, 1, total))
        return None, (out, jnp.where(empty, -jnp.inf, (offset + jnp.log2(total)) * np.float32(np.log(2))))

    _, tiles = jax.lax.scan(query_tile, None, jnp.arange(call.q_tiles.count, dtype=jnp.int32))
    out, lse = (call.q_tiles.join(x) for x in tiles)
    return xla._merge_heads(out).astype(dtype), lse.reshape(*call.batch, -1, q.shape[-3])


# --- the calls -------------------------------------------------------------------------------------------------------


def forward_attributes(spec: AttentionSpec, q: Any, k: Any, v: Any, operands: Operands, dtype: Any) -> dict[str, Any]:
    """Attributes of `jax_flash_forward_fp8`, from arrays of the shapes before quantisation."""
    size = kernel_head_size(max(q.shape[-1], v.shape[-1]))
    q, k = (jax.ShapeDtypeStruct((*x.shape[:-1], size), _score_dtype(spec)) for x in (q, k))
    return spec.attributes(q, k, v, operands) | {"out_dtype": str(np.dtype(dtype))}


def quantize_attributes(spec: AttentionSpec, q: Any, k: Any, v: Any, lengths: Operands) -> dict[str, Any]:
    """Attributes of `jax_flash_quantize`."""
    precision = spec.precision or Fp8()
    quantized = str(np.dtype(_score_dtype(spec)))
    return spec.attributes(q, k, v, lengths) | {"rotate": precision.rotate, "quantized": quantized}


def _score_dtype(spec: AttentionSpec) -> Any:
    return SCORE_DTYPES[(spec.precision or Fp8()).scores]


def tiles(spec: AttentionSpec, q: Any, k: Any, v: Any, operands: Operands) -> tuple[Any, Any]:
    """out and lse of the forward pass in plain JAX, from query, key and value as `flash_attention` takes them."""
    q, k, v = _with_own_lengths(q, k, v, operands)
    lengths = operands.q_lengths, operands.kv_lengths
    out, lse = emulate(spec, _quantize(q, k, v, spec.precision or Fp8(), *lengths), operands, q.dtype)
    return out[..., : v.shape[-1]], lse


def kernel(spec: AttentionSpec, q: Any, k: Any, v: Any, operands: Operands) -> tuple[Any, Any]:
    """`tiles`, by the kernels."""
    q, k, v = _with_own_lengths(q, k, v, operands)
    lengths = Operands(q_lengths=operands.q_lengths, kv_lengths=operands.kv_lengths)
    precision = spec.precision or Fp8()
    if {precision.scales, precision.value_scales} == {"block"}:
        quantized = _quantize_kernel(spec, q, k, v, lengths)
    else:
        quantized = _quantize(q, k, v, precision, lengths.q_lengths, lengths.kv_lengths)
    return forward_kernel(spec, quantized, operands, q.dtype, v)


def _quantize_kernel(spec: AttentionSpec, q: Any, k: Any, v: Any, lengths: Operands) -> Quantized:
    precision = spec.precision or Fp8()
    attributes = quantize_attributes(spec, q, k, v, lengths)
    shapes = jax.eval_shape(lambda q, k, v: _quantize(q, k, v, precision, None, None), q, k, v)
    return Quantized(*_ffi_call("jax_flash_quantize", shapes, attributes, q, k, v, *lengths.present().values()))


def forward_kernel(
    spec: AttentionSpec, quantized: Quantized, operands: Operands, dtype: Any, v: Any
) -> tuple[Any, Any]:
    """v: anything with the shape of the value before quantisation."""
    q, k = quantized[:2]
    *_, t, n, _ = q.shape
    batch = batch_shape(q, k, v)
    shapes = [
        jax.ShapeDtypeStruct((*batch, t, n, v.shape[-1]), dtype),
        jax.ShapeDtypeStruct((*batch, n, t), jnp.float32),
    ]
    attributes = forward_attributes(spec, q, k, v, operands, dtype)
    return _ffi_call("jax_flash_forward_fp8", shapes, attributes, *quantized, *operands.present().values())


def _ffi_call(target: str, shapes: Any, attributes: dict[str, Any], *arrays: Any) -> Any:
    scratch = jax.ShapeDtypeStruct((native().scratch_bytes(target, attributes),), jnp.uint8)
    # Inside shard_map(check_vma=True) a result must vary over the mesh axes over which the operands vary.
    types = [jax.typeof(arrays[0]).update(shape=x.shape, dtype=x.dtype) for x in (*shapes, scratch)]
    *results, _ = jax.ffi.ffi_call(target, types, vmap_method="sequential")(*arrays, **attributes)
    return tuple(results)


def _with_own_lengths(q: Any, k: Any, v: Any, operands: Operands) -> tuple[Any, Any, Any]:
    """Arrays with an entry for each length: what is past a length must not reach the scales of its block."""

    def own(x: Any, lengths: Any) -> Any:
        if lengths is None:
            return x
        return jnp.broadcast_to(x, (*np.broadcast_shapes(x.shape[:-3], lengths.shape), *x.shape[-3:]))

    return own(q, operands.q_lengths), own(k, operands.kv_lengths), own(v, operands.kv_lengths)


# --- the steps of quantize -------------------------------------------------------------------------------------------


def _quantize(q: Any, k: Any, v: Any, precision: Fp8, q_lengths: Any, kv_lengths: Any) -> Quantized:
    """`quantize`; the batch axes of an array and of its lengths may be of size 1."""
    size = kernel_head_size(max(q.shape[-1], v.shape[-1]))
    turned = -(-q.shape[-1] // 8) * 8  # kernels take multiples of 8
    rotation = hadamard_size(turned)
    v, v_scale = _scaled(_prepared(v, kv_lengths), precision.value_scales)
    q, k = (_padded(_prepared(x, lengths), turned) for x, lengths in ((q, q_lengths), (k, kv_lengths)))
    if precision.rotate:
        q, k = _rotated(q, rotation), _rotated(k, rotation)
    scaled = _scaled_to_integers if precision.scores == "int8" else _scaled
    q, q_scale = scaled(_padded(q, size), precision.scales)
    k, k_scale = scaled(_padded(k, size), precision.scales)
    if precision.rotate:
        k_scale = k_scale / rotation  # the butterflies grow q . k by that power of two
    return Quantized(q, k, value_layout(_padded(v, size)), q_scale, k_scale, v_scale)


def _prepared(x: Any, lengths: Any) -> Any:
    """[*B, T, N, H] in float32, bounded, with zeros at and past the lengths."""
    x = jnp.clip(x.astype(jnp.float32), -_CLAMP, _CLAMP)
    if lengths is None:
        return x
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 3)
    return jnp.where(token < lengths[..., None, None, None], x, 0)


def _signs(size: int) -> np.ndarray:
    """+1 and -1, from the bits of a hash of the index: the same in cuda/support/quantize.cuh."""
    x = np.arange(size, dtype=np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return np.where((x >> np.uint32(16)) & np.uint32(1), -1.0, 1.0).astype(np.float32)


def _rotated(x: Any, block: int) -> Any:
    """Random signs, then butterflies of width 1, 2, ..., block / 2. The sums are in the order of the kernel."""
    shape = x.shape
    x = x * jnp.broadcast_to(_signs(shape[-1]), shape)
    width = 1
    while width < block:
        x = x.reshape(*shape[:-1], shape[-1] // (2 * width), 2, width)
        low, high = x[..., 0, :], x[..., 1, :]
        x = jnp.stack([low + high, low - high], axis=-2)
        width *= 2
    return x.reshape(shape)


def _scaled(x: Any, granularity: Granularity) -> tuple[Any, Any]:
    """x [*B, T, N, H] float32 -> e4m3 of the same shape, scales float32 [*B, N, ceil(T / BLOCK)]."""
    exponent = _exponent(_largest(x, granularity))
    inverse = _each_block(_power_of_two(-exponent), x.shape[-3])[..., None]
    return _rounded(x * inverse), jnp.swapaxes(_power_of_two(exponent), -1, -2)


def _scaled_to_integers(x: Any, granularity: Granularity) -> tuple[Any, Any]:
    """The same with int8 instead of e4m3."""
    largest = jnp.maximum(_largest(x, granularity), np.float32(_LEAST_OF_INTEGERS))
    # 127 / largest from the first 16 bits of it: integers divide alike everywhere, floating point by XLA does not.
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32)
    quotient = np.uint32(127 << 25) // ((bits & np.uint32(0x7FFFFF) | np.uint32(0x800000)) >> np.uint32(8))
    inverse = quotient.astype(jnp.float32) * _power_of_two(117 - (bits >> np.uint32(23)).astype(jnp.int32))
    nan = jnp.isnan(x)
    rounded = jnp.round(x * _each_block(inverse, x.shape[-3])[..., None])
    scale = largest * (np.float32(1) / np.float32(127))
    scale = jnp.where(_in_blocks(nan).any((-3, -1)), -scale, scale)
    return jnp.where(nan.any(-1, keepdims=True), _NAN, rounded).astype(jnp.int8), jnp.swapaxes(scale, -1, -2)


def _restored(x: Any, scale: Any) -> Any:
    """Query or key as quantised -> float32."""
    scale = _each_token(scale, x.shape[-3])[..., None]
    restored = jnp.abs(scale) * x.astype(jnp.float32)
    return jnp.where((scale < 0) & (x == _NAN), jnp.nan, restored) if x.dtype == jnp.int8 else restored


def _largest(x: Any, granularity: Granularity) -> Any:
    """Magnitude for which each block has its scale: [*B, ceil(T / BLOCK), N]."""
    largest = jnp.nanmax(_in_blocks(jnp.abs(x)), axis=(-3, -1), initial=0)
    if granularity == "block":
        return largest
    axes = -2 if granularity == "head" else None
    return jnp.broadcast_to(jnp.max(largest, axes, keepdims=True), largest.shape)


def _in_blocks(x: Any) -> Any:
    """[*B, T, N, H] -> [*B, ceil(T / BLOCK), BLOCK, N, H]"""
    *batch, length, heads, size = x.shape
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -length % BLOCK), (0, 0), (0, 0)])
    return x.reshape(*batch, -(-length // BLOCK), BLOCK, heads, size)


def _rounded(x: Any) -> Any:
    """To e4m3, for good: XLA would drop a conversion that the next one undoes."""
    return jax.lax.optimization_barrier(x.astype(E4M3))


def _exponent(largest: Any) -> Any:
    """The least e for which largest <= 448 * 2^e: e4m3 holds 1.75 * 2^8."""
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    return jnp.where(bits == 0, 0, jnp.maximum(((bits + 0x1FFFFF) >> 23) - 135, _LEAST_EXPONENT))


def _power_of_two(exponent: Any) -> Any:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _each_block(x: Any, length: int) -> Any:
    """[*B, blocks, N] -> [*B, length, N]"""
    return jnp.repeat(x, BLOCK, axis=-2, total_repeat_length=x.shape[-2] * BLOCK)[..., :length, :]


def _each_token(scale: Any, length: int) -> Any:
    """[*B, N, blocks] -> [*B, length, N]"""
    return _each_block(jnp.swapaxes(scale, -1, -2), length)


def _padded(x: Any, size: int) -> Any:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
