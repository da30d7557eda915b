"""What is measured: the grid, and named cases beside it."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

TOKENS = 16384  # in all, whatever the length of a sequence
WIDTH = 2048  # heads x head size
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(seed: int, size: int, dtype, outliers: bool) -> jax.Array:
    """Flat, so that the shapes of a grid share one program: drawing is most of what a cell would compile."""
    kinds = jax.random.split(jax.random.key(seed), 3)
    values = jax.random.normal(kinds[0], (size,), dtype)
    if outliers:
        values += 10 * jax.random.normal(kinds[1], (size,), dtype) * jax.random.bernoulli(kinds[2], 0.001, (size,))
    return values


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention: query [batch, q_len, q_heads, head_dim], key, value [batch, kv_len, kv_heads, head_dim]."""

    group: str
    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bf16"
    direction: str = "fwd"
    causal: bool = False
    window: int | None = None  # keys before the query; implies causal
    documents: int = 0  # sequences packed into one, told apart by segment ids
    feature: str = ""  # one more argument of flash_attention: see `arguments`
    precision: str = ""  # "fp8": quantised inside; "quantised": before, untimed; "quantise": that alone
    outliers: bool = False  # a thousandth of query, key and value is ten times as large
    draw: int = 0  # of the same case with other numbers

    @property
    def flops(self) -> float:
        """Floating-point operations that the answer needs: two products a visible pair forward, five backward."""
        if self.documents:
            length = self.q_len // self.documents
            pairs = self.documents * length * length / (2 if self.causal else 1)
        elif self.window is not None:
            seen = np.minimum(np.arange(self.q_len) + 1, self.window + 1)
            pairs = float(seen.sum())
        else:
            pairs = self.q_len * self.kv_len / (2 if self.causal else 1)
        forward = 4 * self.batch * self.q_heads * pairs * self.head_dim
        return forward * (2.5 if self.direction == "bwd" else 1)

    @property
    def operands(self) -> str:
        """Types of the operands that are timed, as lines tell them: calls that quantise are no plain bf16 calls."""
        return {"quantised": "e4m3", "fp8": f"{self.dtype} as e4m3"}.get(self.precision, self.dtype)

    @property
    def jax_dtype(self):
        return {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}[self.dtype]

    def arrays(self) -> tuple[jax.Array, ...]:
        """Fresh random query, key, value and cotangent."""
        seed = zlib.crc32(str(self).encode()) % 2**30
        q = (self.batch, self.q_len, self.q_heads, self.head_dim)
        kv = (self.batch, self.kv_len, self.kv_heads, self.head_dim)
        return tuple(
            _random(seed + i, math.prod(shape), self.jax_dtype, self.outliers and i < 3).reshape(shape)
            for i, shape in enumerate((q, kv, kv, q))
        )

    def segment_ids(self) -> jax.Array | None:
        if not self.documents:
            return None
        ids = jnp.arange(self.q_len) // (self.q_len // self.documents)
        return jnp.broadcast_to(ids.astype(jnp.int32), (self.batch, self.q_len))

    def feature_arguments(self) -> dict:
        """Arguments of flash_attention for the one feature that this case adds to the plain call."""
        key = jax.random.key(7)
        shape = (self.batch, self.q_heads, self.q_len, self.kv_len)
        make = {
            "": dict,
            "softcap": lambda: {"softcap": 20.0},
            "alibi": lambda: {"alibi_slopes": 2.0 ** -jnp.linspace(1, 8, self.q_heads)},
            "bias": lambda: {"bias": jax.random.normal(key, shape, self.jax_dtype)},
            "bias_heads": lambda: {"bias": jax.random.normal(key, (1, *shape[1:]), self.jax_dtype)},
            "mask_keys": lambda: {"mask": jax.random.bernoulli(key, 0.9, (self.batch, 1, 1, self.kv_len))},
            "sinks": lambda: {"sinks": jax.random.normal(key, (self.q_heads,))},
            "dropout": lambda: {"dropout_rate": 0.1, "dropout_rng": key},
            "segment_ids": lambda: {"segment_ids": jnp.zeros((self.batch, self.q_len), jnp.int32)},
            "lengths": lambda: {"kv_lengths": jnp.full((self.batch,), self.kv_len, jnp.int32)},
            "q_offset": lambda: {"q_offset": jnp.zeros((self.batch,), jnp.int32)},
            "deterministic": lambda: {"deterministic": True},
        }
        return make[self.feature]()

    def __str__(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        extras = [
            "causal" if self.causal else "full",
            f"window {self.window}" if self.window is not None else "",
            f"{self.documents} documents" if self.documents else "",
            self.feature,
            self.precision,
            "outliers" if self.outliers else "",
            f"draw {self.draw}" if self.draw else "",
        ]
        what = " ".join(extra for extra in extras if extra)
        return f"{self.direction} {self.dtype} D{self.head_dim} S{self.kv_len} heads {heads} {what}"


def grid(
    lengths=LENGTHS, head_dims=HEAD_DIMS, directions=("fwd", "bwd"), dtypes=("bf16",), precision=""
) -> Iterator[Case]:
    """The 16384-token grid: every head size, full and causal, every length."""
    for direction in directions:
        for dtype in dtypes:
            for dim in head_dims:
                for causal in (False, True):
                    for length in lengths:
                        heads = WIDTH // dim
                        batch = TOKENS // length
                        yield Case(
                            "grid",
                            batch,
                            length,
                            length,
                            heads,
                            heads,
                            dim,
                            dtype,
                            direction,
                            causal,
                            precision=precision,
                        )


def named() -> dict[str, list[Case]]:
    """Groups of cases by name, as the command line takes them."""
    both = ("fwd", "bwd")
    features = [
        "",
        "softcap",
        "alibi",
        "bias_heads",
        "bias",
        "mask_keys",
        "sinks",
        "dropout",
        "segment_ids",
        "lengths",
        "q_offset",
    ]
    return {
        "grid": list(grid()),
        "quick": list(grid(lengths=(1024, 4096), head_dims=(64, 128))),
        "f16": list(grid(lengths=(4096,), dtypes=("f16",))),
        "fp8": [case for p in ("quantised", "fp8") for case in grid(directions=("fwd",), precision=p)],
        "quantise": [
            Case("quantise", 4, 4096, 4096, WIDTH // dim, WIDTH // dim, dim, precision="quantise") for dim in HEAD_DIMS
        ],
        "grouped": [Case("grouped", 2, 8192, 8192, 32, 8, 128, direction=d, causal=True) for d in both],
        "window": [Case("window", 1, 16384, 16384, 16, 16, 128, direction=d, causal=True, window=1024) for d in both],
        "segments": [
            case
            for d in both
            for case in (
                Case("segments", 16, 1024, 1024, 16, 16, 128, direction=d, causal=True),
                Case("segments", 1, 16384, 16384, 16, 16, 128, direction=d, causal=True, documents=16),
            )
        ],
        "features": [
            Case("features", 4, 4096, 4096, 16, 16, 128, direction=d, causal=True, feature=f)
            for d in both
            for f in features
        ],
        "deterministic": [
            Case("deterministic", TOKENS // s, s, s, 16, 16, 128, direction="bwd", causal=c, feature=f)
            for s in (4096, 16384)
            for c in (False, True)
            for f in ("", "deterministic")
        ],
        "accuracy": [
            Case("accuracy", 1, s, s, 2, 2, dim, direction=way, causal=c, outliers=o, draw=draw)
            for way, s, c in (("bwd", 2048, False), ("bwd", 2048, True), ("bwd", 16384, True), ("fwd", 131072, True))
            for dim in HEAD_DIMS
            for o in (False, True)
            for draw in range(4 if o else 1)  # a few queries and keys make most of the error of outliers
        ],
        "compile": [Case("compile", 2, 2048, 2048, 8, 8, dim, "f16", d, True) for dim in HEAD_DIMS for d in both],
        "memory": [
            Case("memory", 1, t, t, 8, 8, 128, direction="bwd", causal=True) for t in (4096, 16384, 65536, 131072)
        ],
        "decode": [Case("decode", 32, 1, 8192, 32, 8, 128)],
        "cpu": [Case("cpu", 1, 2048, 2048, 8, 8, 64, "f32", d, c) for d in both for c in (False, True)],
    }
