"""The implementations timed side by side. Each is imported only if it is there, and says why it skips a case."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import torch_sdpa
from .cases import Case

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Skip(Exception):
    """This implementation does not do this case; the text says why."""


def _needs_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise Skip("needs a GPU")


def _plain_only(case: Case) -> None:
    if case.feature or case.documents or case.window is not None or case.precision:
        raise Skip("plain and causal cases only")


def _with(arguments: dict, function: Callable[..., jax.Array], **fixed) -> Attention:
    """The function with its further arguments, of which the arrays can be operands of a jitted call."""
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    fixed |= {name: x for name, x in arguments.items() if name not in arrays}
    return jax.tree_util.Partial(functools.partial(function, **fixed), **arrays)


def jax_flash(case: Case) -> Attention:
    import jax_flash as jf
    from jax_flash import fp8
    from jax_flash.spec import AttentionSpec, Operands

    implementation = "cuda" if jax.default_backend() == "gpu" else None
    arguments = dict(case.feature_arguments())
    if case.documents:
        arguments["segment_ids"] = case.segment_ids()
    if case.window is not None:
        arguments["window"] = (case.window, None)
    if case.precision == "quantised":
        return lambda quantized: jf.quantized_attention(quantized, causal=case.causal, implementation=implementation)
    if case.precision == "quantise":
        _needs_gpu()
        spec = AttentionSpec(case.head_dim**-0.5, precision=jf.Fp8())
        return lambda q, k, v: fp8._quantize_kernel(spec, q, k, v, Operands())
    if case.precision == "fp8":
        arguments["precision"] = jf.Fp8()
    if case.q_len != case.kv_len:
        arguments["q_offset"] = case.kv_len - case.q_len
    return _with(arguments, jf.flash_attention, causal=case.causal, implementation=implementation)


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
    return _with(arguments, jax.nn.dot_product_attention, is_causal=case.causal, implementation=implementation)


def cudnn(case: Case) -> Attention:
    _needs_gpu()
    return _jax_nn(case, "cudnn")


def xla(case: Case) -> Attention:
    return _jax_nn(case, "xla")


def pallas(case: Case) -> Attention:
    """jax's Pallas Mosaic GPU attention. It scales no scores: the query is scaled before, within the time."""
    _needs_gpu()
    try:
        from jax.experimental.pallas.ops.gpu import attention_mgpu
    except ImportError as error:
        raise Skip(f"not in this jax: {error}") from None
    _plain_only(case)
    if case.direction == "bwd" or case.dtype != "f16":
        raise Skip("forward only, float16 only")  # its output is float16 whatever the operands
    block_kv = 128 if case.head_dim <= 128 else 64  # two steps of keys and values fit shared memory
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=case.causal)
    return lambda q, k, v: attention_mgpu.attention(q * case.head_dim**-0.5, k, v, config)


def tokamax(case: Case) -> Attention:
    try:
        import tokamax as package
    except ImportError:
        raise Skip("not installed") from None
    _needs_gpu()
    _plain_only(case)
    return lambda q, k, v: package.dot_product_attention(q, k, v, is_causal=case.causal, implementation="mosaic")


def flash_attn_jax(case: Case) -> Attention:
    try:
        from flash_attn_jax import flash_mha
    except ImportError:
        raise Skip("not installed") from None
    _needs_gpu()
    if case.feature or case.documents or case.precision:
        raise Skip("plain and windowed cases only")
    window = (case.window, 0) if case.window is not None else (-1, -1)
    return lambda q, k, v: flash_mha(q, k, v, is_causal=case.causal, window_size=window)


def _torch(case: Case, backend: str) -> Attention:
    """Takes tensors of torch: see torch_sdpa."""
    try:
        import torch
    except ImportError:
        raise Skip("not installed") from None
    if not torch.cuda.is_available():
        raise Skip("needs a GPU")
    _plain_only(case)
    if case.dtype == "f32" or case.group in ("memory", "compile"):
        raise Skip("times and errors in float16 and bfloat16 only")
    return torch_sdpa.attention(case, backend)


TORCH = {"torch_flash": "FLASH_ATTENTION", "torch_cudnn": "CUDNN_ATTENTION"}
PEERS: dict[str, Callable[[Case], Attention]] = {
    "jax_flash": jax_flash,
    "cudnn": cudnn,
    "xla": xla,
    "pallas": pallas,
    "tokamax": tokamax,
    "flash_attn_jax": flash_attn_jax,
    **{name: functools.partial(_torch, backend=backend) for name, backend in TORCH.items()},
}
