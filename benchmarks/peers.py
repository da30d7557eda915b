"""The implementations timed side by side. Each is imported only if it is there, and says why it skips a case."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .cases import Case

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Skip(Exception):
    """This implementation does not do this case; the text says why."""


def jax_flash(case: Case) -> Attention:
    import jax_flash as jf

    arguments = dict(case.feature_arguments())
    if case.documents:
        arguments["segment_ids"] = case.segment_ids()
    if case.window is not None:
        arguments["window"] = (case.window, None)
    if case.precision == "fp8":
        arguments["precision"] = jf.Fp8()
    if case.q_len != case.kv_len:
        arguments["q_offset"] = case.kv_len - case.q_len
    implementation = "cuda" if jax.default_backend() == "gpu" else None
    return lambda q, k, v: jf.flash_attention(q, k, v, causal=case.causal, implementation=implementation, **arguments)


def _jax_nn(case: Case, implementation: str) -> Attention:
    if case.documents or case.precision or case.feature not in ("", "bias", "bias_heads", "lengths"):
        raise Skip("no such argument in jax.nn")
    arguments = {}
    if case.feature.startswith("bias"):
        arguments["bias"] = case.feature_arguments()["bias"]
    if case.feature == "lengths":
        arguments["key_value_seq_lengths"] = case.feature_arguments()["kv_lengths"]
        arguments["query_seq_lengths"] = jnp.full((case.batch,), case.q_len, jnp.int32)
    if case.window is not None:
        arguments["local_window_size"] = (case.window, 0)
    if implementation == "xla" and case.q_len * case.kv_len * case.q_heads * case.batch > 2**32:
        raise Skip("the score matrix does not fit")
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=case.causal, implementation=implementation, **arguments
    )


def cudnn(case: Case) -> Attention:
    if jax.default_backend() != "gpu":
        raise Skip("needs a GPU")
    return _jax_nn(case, "cudnn")


def xla(case: Case) -> Attention:
    return _jax_nn(case, "xla")


def pallas(case: Case) -> Attention:
    """jax's Pallas Mosaic GPU attention: forward only, float16, no causal short cut in every version."""
    try:
        from jax.experimental.pallas.ops.gpu import attention_mgpu
    except ImportError as error:
        raise Skip(f"not in this jax: {error}") from None
    if (
        case.direction == "bwd"
        or case.feature
        or case.documents
        or case.window
        or case.precision
        or case.dtype != "f16"
    ):
        raise Skip("forward, float16, plain or causal only")
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=case.causal)
    return functools.partial(attention_mgpu.attention, config=config)


def tokamax(case: Case) -> Attention:
    try:
        import tokamax as package
    except ImportError:
        raise Skip("not installed") from None
    if case.feature or case.documents or case.window or case.precision:
        raise Skip("plain cases only")
    return lambda q, k, v: package.dot_product_attention(q, k, v, is_causal=case.causal, implementation="mosaic")


def flash_attn_jax(case: Case) -> Attention:
    try:
        from flash_attn_jax import flash_mha
    except ImportError:
        raise Skip("not installed") from None
    if case.feature or case.documents or case.precision:
        raise Skip("plain and windowed cases only")
    window = (case.window, 0) if case.window is not None else (-1, -1)
    return lambda q, k, v: flash_mha(q, k, v, is_causal=case.causal, window_size=window)


PEERS: dict[str, Callable[[Case], Attention]] = {
    "jax_flash": jax_flash,
    "cudnn": cudnn,
    "xla": xla,
    "pallas": pallas,
    "tokamax": tokamax,
    "flash_attn_jax": flash_attn_jax,
}
