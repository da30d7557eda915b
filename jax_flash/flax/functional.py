"""Attention as Flax's modules call it, and the pieces that the linen and the nnx module share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax

from jax_flash.arguments import aligned, array, positive, precision_or_none
from jax_flash.attention import flash_attention
from jax_flash.spec import Fp8

logger = logging.getLogger("jax_flash")


def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout: bool = True,
    dropout_rng=None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype=None,
    precision=None,
    module: Any = None,
    *,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable | None = None,
    qk_attn_weights_einsum: Callable | None = None,
    attn_weights_value_einsum: Callable | None = None,
    promote_dtype: Callable = nnx.nn.dtypes.promote_dtype,
    is_causal: bool = False,
    input_positions=None,
    rotary_base: float | None = None,
    **options,
):
    """`flax.linen.dot_product_attention` and `flax.nnx.dot_product_attention` in one, by `jax_flash.flash_attention`.

    For `attention_fn=` of `flax.linen.MultiHeadDotProductAttention` and of `flax.nnx.MultiHeadAttention`. Differences:

    * the softmax is in float32 whatever `force_fp32_for_softmax` says;
    * a query that sees no key gives 0, where Flax gives the mean of all values;
    * dropout has other random bits: counter-based, never an array of the size of the scores;
    * custom einsums (`einsum_dot_general`, `*_einsum`) need the scores as an array: Flax's own function computes these.

    Args:
      query, key, value: `[*B, T, N, H]`, `[*B, S, K, H]`, `[*B, S, K, Hv]`, `N` a multiple of `K`.
      bias, mask: broadcastable to `[*B, N, T, S]`, read broadcast; the mask in any dtype. A mask known while tracing
        that is causal, or the same for all queries, is used as such; `is_causal`, `window` and `segment_ids` are faster
        than other dense masks.
      module: the module that sows the attention weights (before dropout) as `attention_weights`, computed as a
        `[*B, N, T, S]` array beside the output.
      precision: `jax_flash.Fp8`; precisions of JAX change nothing, as products are accumulated in float32 anyway, and
        those of float32 are exact.
      is_causal: query i sees keys up to i (from the top left, as in Flax).
      input_positions: `[T]` or `[*B, T]`, positions for the rotary embedding; only with `rotary_base`.
      rotary_base: rotate query and key by their positions (see `rotary`).
      options: further arguments of `flash_attention`: window, segment_ids, softcap, sinks, ...

    Returns:
      `[*B, T, N, Hv]`
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    if rotary_base is not None:
        query, key = (rotary(x, input_positions, rotary_base) for x in (query, key))
    elif input_positions is not None:
        raise ValueError("input_positions: only rotary embedding uses positions, but rotary_base is not given")

    if mask is not None and not isinstance(mask, np.ndarray):
        mask = array("mask", mask)
    if einsum_dot_general or qk_attn_weights_einsum or attn_weights_value_einsum:
        if options:
            raise ValueError(f"custom einsums cannot be combined with {', '.join(options)}")
        logger.debug("attention with custom einsums: Flax's own function computes it, with T x S arrays")
        if is_causal:
            causal = np.tri(query.shape[-3], key.shape[-3], dtype=bool)
            mask = causal if mask is None else jnp.logical_and(mask, causal)
        return linen.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            broadcast_dropout,
            dropout_rng,
            dropout_rate,
            deterministic,
            precision=precision,
            module=module,
            force_fp32_for_softmax=force_fp32_for_softmax,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )

    if mask is not None:
        if "q_offset" in options:  # a causal mask begins at position 0, causal attention at q_offset
            mask = mask.astype(bool)
        else:
            mask_is_causal, mask = mask_structure(mask, query.shape[-3], key.shape[-3])
            is_causal = is_causal or mask_is_causal
    if isinstance(precision, Fp8):
        options["precision"] = precision
    options |= {"mask": mask, "bias": bias, "causal": is_causal}
    if module is not None:
        sow(module, attention_weights(query, key, **options))
    if not deterministic:
        options |= {
            "dropout_rate": dropout_rate,
            "dropout_rng": dropout_rng,
            "broadcast_dropout": broadcast_dropout,
        }
    return flash_attention(query, key, value, **options)


def mask_structure(mask, q_len: int, kv_len: int) -> tuple[bool, Any]:
    """A mask `[..., T|1, S|1]` of any dtype as flash_attention takes it: (is it causal, what remains to be masked)."""
    dense = mask.shape[-2:] == (q_len, kv_len) and q_len > 1
    if isinstance(mask, jax.core.Tracer) or not getattr(mask, "is_fully_addressable", True):
        if dense:
            logger.debug("attention mask %s is not known while tracing: every element is read", mask.shape)
        return False, mask.astype(bool)
    mask = np.asarray(mask, bool)
    if not dense:
        return False, mask
    first, last = mask[..., :1, :], mask[..., -1:, :]
    if (mask == first).all():
        return False, None if first.all() else first
    causal = np.tri(q_len, kv_len, dtype=bool)
    if (mask == (causal & last)).all():
        return True, None if last[..., :q_len].all() else last
    logger.debug("attention mask %s has no known structure: every element is read", mask.shape)
    return False, mask


def attention_weights(query, key, **options):
    """The matrix `[*B, N, T, S]` of attention weights: attention to values that are the unit vectors, in plain XLA."""
    kv_len = key.shape[-3]
    units = jnp.eye(kv_len, dtype=key.dtype)[:, None]
    units = jnp.broadcast_to(units, (*key.shape[:-1], kv_len))
    return jnp.moveaxis(flash_attention(query, key, units, implementation="xla", **options), -2, -3)


def sow(module: linen.Module | nnx.Module, weights):
    if isinstance(module, nnx.Module):
        module.sow(nnx.Intermediate, "attention_weights", weights)
    else:
        module.sow("intermediates", "attention_weights", weights)


def rotary(x, positions=None, base: float = 10000.0):
    """Rotary position embedding of `x [*B, T, N, H]` at `positions [T]` or `[*B, T]`; by default 0 to T - 1.

    Rotates the pair (j, j + H/2) of every head by `position * base ** (-2j / H)`, as `flax.nnx.RoPE` does.
    """
    half = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(f"rotary embedding needs an even head size, got {x.shape[-1]}")
    positions = array("positions", jnp.arange(x.shape[-3]) if positions is None else positions)
    positions = aligned("positions", positions, x.shape[:-2], "*B, T", whole=1)[..., None, None]
    frequencies = positive("base", base) ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions.astype(jnp.float32) * frequencies.reshape((1,) * (x.ndim - 1) + (half,))
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def extend_cache(cache, new, index):
    """`cache [*B, S, K, H]` with `new [*B, T, K, H]` from position `index [] or [*B]` on; in place if donated."""
    if new.shape[-3] > cache.shape[-3]:
        raise ValueError(
            f"inputs: expected at most {cache.shape[-3]} tokens, the length of the cache, got {new.shape[-3]}"
        )

    def write(cache, new, index):
        return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), index, axis=-3)

    for _ in range(index.ndim):
        write = jax.vmap(write)
    return write(cache, new, index)


def cache_positions(index, length: int):
    """Positions `[T]` or `[*B, T]` of the `length` tokens that follow `index [] or [*B]` tokens in the cache."""
    return index[..., None] + jnp.arange(length, dtype=index.dtype).reshape((1,) * index.ndim + (length,))


def cached_tokens(index, length: int, lengths=None):
    """Tokens in the cache, `[] or [*B]`, after `length` more, of which `lengths [*B]` are real."""
    if lengths is None:
        return index + length
    lengths = array("lengths", lengths, jnp.integer)
    if lengths.ndim > index.ndim:
        raise ValueError(f"lengths: expected a ragged cache beside lengths of each batch entry, got {lengths.shape}")
    return index + aligned("lengths", lengths, index.shape, "*B").astype(index.dtype)


def chosen_precision(attention_precision, precision):
    """`attention_fn`'s precision from that of the attention alone and that of the projections."""
    return precision_or_none("attention_precision", attention_precision) or precision


def given(**options) -> dict[str, Any]:
    """The options that are not None."""
    return {name: option for name, option in options.items() if option is not None}
