"""The one description of an attention call.

`AttentionSpec` says what a call computes, without any array: it is hashable, travels through `jax.custom_vjp` as a
static argument, and becomes the attributes of the custom call (`attributes`), where the C++ side decodes the same
names into `jf::Spec` and `jf::Problem` (cuda/spec.h).

`Operands` holds the arrays beside query, key and value. Leading axes `*B` are the batch axes of the query; every
operand has all of them, each either full or of size 1 (broadcast, read with stride 0).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import numpy as np


class Operands(NamedTuple):
    """Arrays beside query, key and value, in the order in which the custom calls take those that are present."""

    q_offset: Any = None  # int32 [*B]: query i stands at key position i + q_offset
    q_segment_ids: Any = None  # int32 [*B, T]
    kv_segment_ids: Any = None  # int32 [*B, S]
    q_lengths: Any = None  # int32 [*B]
    kv_lengths: Any = None  # int32 [*B]
    mask: Any = None  # bool [*B, N|1, T|1, S|1]
    bias: Any = None  # query dtype or float32 [*B, N|1, T|1, S|1]
    alibi_slopes: Any = None  # score_dtype [*B, N]
    sinks: Any = None  # score_dtype [N]: no batch axes
    dropout_seed: Any = None  # uint32 [*B, 2]
    dropout_batch: Any = None  # int32 [*B]: index of the batch entry in the unsharded, unmapped call
    dropout_head: Any = None  # int32 [N]: index of the head in the unsharded call; no batch axes

    def present(self) -> dict[str, Any]:
        return {name: array for name, array in self._asdict().items() if array is not None}


# Axes of every array of a call after its batch axes. T, S: query and key length; N, K: query and key heads; H, V: head
# sizes of query and key, and of value; 2: the words of a seed.
TRAILING_AXES = {
    "q": "TNH",
    "k": "SKH",
    "v": "SKV",
    "out": "TNV",
    "lse": "NT",
    "dout": "TNV",
    "dlse": "NT",
    "dq": "TNH",
    "dk": "SKH",
    "dv": "SKV",
    "dbias": "NTS",
    "q_offset": "",
    "q_segment_ids": "T",
    "kv_segment_ids": "S",
    "q_lengths": "",
    "kv_lengths": "",
    "mask": "NTS",
    "bias": "NTS",
    "alibi_slopes": "N",
    "sinks": "N",
    "dropout_seed": "2",
    "dropout_batch": "",
    "dropout_head": "N",
}
WITHOUT_BATCH = frozenset({"sinks", "dropout_head"})


def score_dtype(*dtypes: Any) -> np.dtype:
    """float32, or float64 beside float64: what scores, lse, slopes and sinks are in."""
    return np.dtype(np.float64 if np.float64 in dtypes else np.float32)


def batch_shape(q: Any, k: Any, v: Any) -> tuple[int, ...]:
    """The full batch axes *B: each is full in one of the three arrays at least."""
    return np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])


@dataclasses.dataclass(frozen=True)
class Fp8:
    """Attention on 8 bits: how query, key and value are quantised. See jax_flash/fp8.py.

    rotate: query and key by the same random-sign Hadamard matrix, which spreads outliers and cancels in their product.
    scales, value_scales: one for each block of 32 tokens of a head, each head, or the whole array.
    scores: what query and key become: "e4m3", as the value always does, or "int8", whose error after the rotation is
      a third of that.
    """

    rotate: bool = True
    scales: Literal["block", "head", "tensor"] = "block"
    value_scales: Literal["block", "head", "tensor"] = "block"
    scores: Literal["e4m3", "int8"] = "e4m3"

    def __post_init__(self):
        if not isinstance(self.rotate, bool):
            raise TypeError(f"rotate: expected True or False, got {self.rotate!r}")
        for name in ("scales", "value_scales"):
            if getattr(self, name) not in ("block", "head", "tensor"):
                raise ValueError(f"{name}: expected 'block', 'head' or 'tensor', got {getattr(self, name)!r}")
        if self.scores not in ("e4m3", "int8"):
            raise ValueError(f"scores: expected 'e4m3' or 'int8', got {self.scores!r}")


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What one attention call computes. Sizes and dtypes are not part of it: they come from the arrays."""

    scale: float
    causal: bool = False
    window_left: int | None = None  # keys visible before the position; None: unbounded
    window_right: int | None = None
    softcap: float = 0.0  # 0: none
    dropout_rate: float = 0.0
    deterministic: bool = False
    kv_splits: int = 1  # forward only: parts of the key sequence computed apart and combined by lse
    precision: Fp8 | None = None  # forward only: the backward takes query, key and value as they are

    def attributes(self, q, k, v, operands: Operands) -> dict[str, Any]:
        """Attributes of the custom call on these (per-device) arrays: [*B, T, N, H], [*B, S, K, H], [*B, S, K, Hv]."""
        return {
            "dtype": str(np.dtype(q.dtype)),
            "bias_dtype": "none" if operands.bias is None else str(np.dtype(operands.bias.dtype)),
            "batch": np.int64(math.prod(batch_shape(q, k, v))),
            "q_len": np.int64(q.shape[-3]),
            "kv_len": np.int64(k.shape[-3]),
            "q_heads": np.int64(q.shape[-2]),
            "kv_heads": np.int64(k.shape[-2]),
            "head_dim": np.int64(q.shape[-1]),
            "value_dim": np.int64(v.shape[-1]),
            "scale": np.float32(self.scale),
            "causal": self.causal,
            "window_left": np.int64(-1 if self.window_left is None else self.window_left),
            "window_right": np.int64(-1 if self.window_right is None else self.window_right),
            "softcap": np.float32(self.softcap),
            "dropout_rate": np.float32(self.dropout_rate),
            "deterministic": self.deterministic,
            "kv_splits": np.int64(self.kv_splits),
            "q_offset": operands.q_offset is not None,
            "segment_ids": operands.q_segment_ids is not None,
            "q_lengths": operands.q_lengths is not None,
            "kv_lengths": operands.kv_lengths is not None,
            "mask": operands.mask is not None,
            "alibi": operands.alibi_slopes is not None,
            "sinks": operands.sinks is not None,
        }
