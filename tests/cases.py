"""The case table: attention calls over the whole space of features, and the arrays for them, for every back end.

`CASES` are named calls, one per feature or hazard. `any_case(pick)` draws a call from the whole space. `Case.inputs`
makes the arrays, in the canonical form of the custom calls, `public` the same call as arguments of `flash_attention`,
and `check` compares results with the oracle. Queries, keys, values and cotangents past the lengths hold NaN and
infinities: they must reach nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from jax_flash import flash_attention
from jax_flash.spec import TRAILING_AXES, WITHOUT_BATCH, AttentionSpec, Operands

FEATURES = ("q_offset", "segment_ids", "q_lengths", "kv_lengths", "mask", "bias", "alibi_slopes", "sinks", "dlse")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call without its numbers."""

    batch: tuple[int, ...] = (2,)
    q_len: int = 200
    kv_len: int = 260
    q_heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: str = "float32"
    scale: float = 0.25
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    dropout_rate: float = 0.0
    features: frozenset[str] = frozenset()  # of FEATURES
    bias_dtype: str = "float32"
    # Axes of size 1, as (name, axis): of q, k, v and the operands. mask and bias may have them anywhere, the others
    # among the batch axes.
    broadcast: frozenset[tuple[str, int]] = frozenset()
    growth: float = 0.0  # of the keys, from the last to the first: so grow the maxima of the scores
    seed: int = 0

    @property
    def spec(self) -> AttentionSpec:
        left, right = self.window
        return AttentionSpec(self.scale, self.causal, left, right, self.softcap, self.dropout_rate)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of q, k, v, out, lse, ... or of an operand, by its name in jax_flash.spec."""
        sizes = {"T": self.q_len, "S": self.kv_len, "N": self.q_heads, "K": self.kv_heads}
        sizes |= {"H": self.head_dim, "V": self.value_dim, "2": 2}
        axes = (() if name in WITHOUT_BATCH else self.batch) + tuple(sizes[axis] for axis in TRAILING_AXES[name])
        return tuple(1 if (name, axis) in self.broadcast else size for axis, size in enumerate(axes))

    def inputs(self) -> Inputs:
        rng = np.random.default_rng(self.seed)

        def normal(name: str, dtype: str) -> np.ndarray:
            return rng.standard_normal(self.shape(name)).astype(np.dtype(dtype))

        def integers(name: str, least: int, most: int) -> np.ndarray:
            return rng.integers(least, most, self.shape(name), np.int32, endpoint=True)

        has = self.features.__contains__
        operands = Operands(
            q_offset=integers("q_offset", -3, max(3, self.kv_len - self.q_len)) if has("q_offset") else None,
            q_lengths=integers("q_lengths", 0, self.q_len) if has("q_lengths") else None,
            kv_lengths=integers("kv_lengths", 0, self.kv_len) if has("kv_lengths") else None,
            mask=rng.random(self.shape("mask")) < 0.8 if has("mask") else None,
            bias=normal("bias", self.bias_dtype) if has("bias") else None,
            alibi_slopes=rng.random(self.shape("alibi_slopes"), np.float32) / 4 if has("alibi_slopes") else None,
            sinks=normal("sinks", "float32") if has("sinks") else None,
        )
        if has("segment_ids"):
            q_ids, kv_ids = (integers(f"{side}_segment_ids", 0, 3) for side in ("q", "kv"))
            if rng.random() < 0.5:  # as packed sequences have them
                q_ids, kv_ids = np.sort(q_ids, axis=-1), np.sort(kv_ids, axis=-1)
            operands = operands._replace(q_segment_ids=q_ids, kv_segment_ids=kv_ids)
        if self.dropout_rate:
            seed = np.asarray(jax.random.bits(jax.random.key(self.seed), (2,), np.uint32))
            operands = operands._replace(
                dropout_seed=seed.reshape((1,) * len(self.batch) + (2,)),
                dropout_batch=np.arange(np.prod(self.batch), dtype=np.int32).reshape(self.batch),
                dropout_head=np.arange(self.q_heads, dtype=np.int32),
            )
        q, k, v, dout = (normal(name, self.dtype) for name in ("q", "k", "v", "dout"))
        k *= (1 + self.growth * np.linspace(1, 0, k.shape[-3])[:, None, None]).astype(k.dtype)
        dlse = normal("dlse", "float32") if has("dlse") else None
        for x, lengths in ((q, operands.q_lengths), (k, operands.kv_lengths), (v, operands.kv_lengths)):
            _poison(rng, self.batch, x, lengths)
        _poison(rng, self.batch, dout, operands.q_lengths)
        if dlse is not None:
            _poison(rng, self.batch, np.swapaxes(dlse, -1, -2)[..., None], operands.q_lengths)
        return Inputs(self.spec, q, k, v, operands, dout, dlse)


def in_16_bits(case: Case, dtype: str) -> Case:
    return dataclasses.replace(
        case, dtype=dtype, bias_dtype=dtype if case.bias_dtype == case.dtype else case.bias_dtype
    )


class Inputs(NamedTuple):
    """A call in canonical form, and the cotangents of its results: what the oracle takes."""

    spec: AttentionSpec
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    operands: Operands
    dout: np.ndarray
    dlse: np.ndarray | None


def public(case: Case, inputs: Inputs) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """The same call as arguments and keywords of `flash_attention`, without return_lse and implementation."""
    operands = inputs.operands
    keywords: dict[str, Any] = {
        "scale": case.scale,
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap or None,
        "dropout_rate": case.dropout_rate,
        "dropout_rng": jax.random.key(case.seed) if case.dropout_rate else None,
        "q_offset": 0 if operands.q_offset is None else operands.q_offset,
        "segment_ids": None if operands.q_segment_ids is None else (operands.q_segment_ids, operands.kv_segment_ids),
    }
    same = ("q_lengths", "kv_lengths", "mask", "bias", "alibi_slopes", "sinks")
    arrays = tuple(jnp.broadcast_to(x, case.batch + x.shape[-3:]) for x in (inputs.q, inputs.k, inputs.v))
    return arrays, keywords | {name: getattr(operands, name) for name in same}


def public_results(case: Case, inputs: Inputs, **keywords: Any) -> dict[str, jax.Array]:
    """Results of `flash_attention` and of its derivative, for `check`. `keywords`: further arguments of the call."""
    arrays, fixed = public(case, inputs)
    learned = {name: fixed.pop(name) for name in ("bias", "sinks")}
    learned = {name: x for name, x in learned.items() if x is not None}

    def attend(q, k, v, learned):
        return flash_attention(q, k, v, return_lse=True, **fixed, **learned, **keywords)

    def run(arrays, learned, dout, dlse):
        (out, lse), vjp = jax.vjp(attend, *arrays, learned)
        dq, dk, dv, gradients = vjp((dout, jnp.zeros_like(lse) if dlse is None else dlse))
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | {f"d{n}": x for n, x in gradients.items()}

    return jax.jit(run)(arrays, learned, inputs.dout, inputs.dlse)


def check(inputs: Inputs, **results: Any) -> dict[str, tuple[float, float]]:
    """Asserts that results (named as in oracle.Results) are as exact as plain attention in the same dtype.

    Each element may be off by twice the largest error of plain attention, plus the roundings of one of its terms:
    of a call with few elements, plain attention may have all right by luck.
    Returns the largest error and the largest error of plain attention of each result.
    """
    storage = inputs.q.dtype
    compute = np.promote_types(storage, np.float32) if storage.kind == "f" else np.float32
    exact = np.longdouble if storage == np.float64 else np.float64
    truth = oracle.attention(*inputs, dtype=exact)._asdict()
    # With JAX's tanh: XLA's is off by four times as much as NumPy's.
    plain = oracle.attention(*inputs, dtype=compute, storage=storage, tanh=jnp.tanh)._asdict()
    sizes = oracle.magnitudes(*inputs)._asdict()
    spreads = oracle.rounding_spread(*inputs, eps=float(jnp.finfo(storage).eps)) if storage.itemsize == 2 else {}
    errors = {}
    for name, result in results.items():
        got, want = np.asarray(result), truth[name]
        assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite].astype(exact), want[~finite], err_msg=name)
        off = np.abs(np.where(finite, got, 0).astype(exact) - np.where(finite, want, 0))
        off_plain = np.abs(np.where(finite, plain[name].astype(got.dtype), 0).astype(exact) - np.where(finite, want, 0))
        error, error_plain = off.max(initial=0), off_plain.max(initial=0)
        beside = _rounding(name, storage, got, np.where(finite, want, 0), sizes[name], spreads.get(name))
        allowed = 2 * error_plain + beside
        assert np.all(off <= allowed), f"{name}: off by {error:.3g}, plain attention by {error_plain:.3g}"
        errors[name] = (error, error_plain)
    return errors


def _rounding(
    name: str, storage: np.dtype, got: np.ndarray, want: np.ndarray, size: np.ndarray, spread: np.ndarray | None
):
    """What a result may be off by beside the error of plain attention."""
    own = float(jnp.finfo(got.dtype).eps)
    if spread is not None:  # six standard deviations of what 16-bit arrays leave in a sum over rows
        return own * np.abs(want) + 6 * spread + 2.0**-20 * size
    if name == "lse" and storage.itemsize == 2:
        return 2.0**-18 * size  # exponentials and logarithms of the hardware are good to 2 ** -22
    roundings = 1 if got.dtype.itemsize == 2 else 4  # the score's, the lse's, their difference's and the exponential's
    return roundings * own * size


def any_case(
    pick: Callable[[Sequence[Any]], Any],
    *,
    dtypes: Sequence[str] = ("float32",),
    head_dims: Sequence[int] = (1, 4, 8, 24),
    longest: int = 70,
) -> Case:
    """A call from the whole space. `pick` chooses an element: a random generator's choice, or a Hypothesis draw."""
    flag = (False, True)
    batch = pick(((2,), (), (1,), (3,), (2, 2), (2, 1, 3), (0,)))
    length = [*range(longest + 1), *(1, longest) * (longest // 8)]
    sides = (None, 0, 1, *range(2, longest, 5))
    kv_heads, groups = pick((1, 2, 3)), pick((1, 2, 4))
    features = frozenset(name for name in FEATURES if pick(flag))
    dtype = pick(dtypes)
    arrays = [name for name in FEATURES if name in features and name not in ("segment_ids", "sinks", "dlse")]
    arrays += ["q_segment_ids", "kv_segment_ids"] if "segment_ids" in features else []
    broadcast = {
        (name, axis)
        for name in ("q", "k", "v", *arrays)
        for axis in range(len(batch) + (3 if name in ("mask", "bias") else 0))
        if pick(flag)
    }
    # Each batch axis is full in one of the three at least.
    broadcast -= {("q", axis) for axis in range(len(batch)) if {("k", axis), ("v", axis)} <= broadcast}
    return Case(
        batch=batch,
        q_len=pick(length),
        kv_len=pick(length),
        q_heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=pick(head_dims),
        value_dim=pick(head_dims),
        dtype=dtype,
        scale=pick((0.3, 1.0, -0.5)),
        causal=pick(flag),
        window=(pick(sides), pick(sides)),
        softcap=pick((0.0, 2.0, 20.0)),
        dropout_rate=pick((0.0, 0.1, 0.7)),
        features=features,
        bias_dtype=pick((dtype, "float32")),
        broadcast=frozenset(broadcast),
        seed=pick(range(1000)),
    )


def _poison(rng: np.random.Generator, batch: tuple[int, ...], x: np.ndarray, lengths: np.ndarray | None) -> None:
    """Writes NaN and infinities into x [*B, L, ...] where no batch entry that shares the row reads it."""
    if lengths is None:
        return
    shared = tuple(axis for axis, size in enumerate(x.shape[: len(batch)]) if size == 1)
    longest = np.max(np.broadcast_to(lengths, batch), axis=shared, keepdims=True, initial=0)
    padding = np.arange(x.shape[len(batch)]) >= longest[..., None]
    x[padding] = rng.choice([np.nan, np.inf, -np.inf], x[padding].shape).astype(x.dtype)


def _case(*features: str, broadcast: Sequence[tuple[str, int]] = (), **fields: Any) -> Case:
    return Case(features=frozenset(features), broadcast=frozenset(broadcast), **fields)


CASES: dict[str, Case] = {
    "plain": Case(),
    "causal": Case(causal=True),
    "causal, offset": _case("q_offset", causal=True),
    "causal, one offset": _case("q_offset", causal=True, broadcast=[("q_offset", 0)]),
    "window": Case(window=(30, 5)),
    "window to the left": Case(causal=True, window=(40, None)),
    "window to the right": Case(window=(None, 0)),
    "window of one": Case(window=(0, 0)),
    "window, offset": _case("q_offset", window=(70, 7)),
    "segment ids": _case("segment_ids", seed=1),
    "segment ids, causal": _case("segment_ids", causal=True, seed=2),
    "segment ids of the keys shared": _case("segment_ids", broadcast=[("kv_segment_ids", 0)]),
    "query lengths": _case("q_lengths", batch=(3,)),
    "key lengths": _case("kv_lengths", batch=(3,)),
    "lengths, causal": _case("q_lengths", "kv_lengths", batch=(3,), causal=True),
    "mask": _case("mask"),
    "mask of keys": _case("mask", broadcast=[("mask", 1), ("mask", 2)]),
    "mask of queries": _case("mask", broadcast=[("mask", 0), ("mask", 3)]),
    "bias": _case("bias"),
    "bias shared by the batch": _case("bias", broadcast=[("bias", 0)]),
    "bias shared by heads": _case("bias", broadcast=[("bias", 1)]),
    "bias of queries": _case("bias", broadcast=[("bias", 3)]),
    "bias of keys": _case("bias", broadcast=[("bias", 1), ("bias", 2)]),
    "bias of heads": _case("bias", broadcast=[("bias", 0), ("bias", 2), ("bias", 3)]),
    "bias, causal window": _case("bias", causal=True, window=(50, None)),
    "bias in tiles": _case("bias", causal=True, bias_dtype="bfloat16", kv_len=136),  # TMA takes these strides
    "ALiBi": _case("alibi_slopes", causal=True),
    "ALiBi, offset": _case("alibi_slopes", "q_offset", broadcast=[("alibi_slopes", 0)]),
    "softcap": Case(softcap=2.0),
    "softcap, bias": _case("bias", softcap=5.0, causal=True),
    "sinks": _case("sinks", q_heads=4),
    "sinks of empty rows": _case("sinks", "q_offset", "q_lengths", causal=True, batch=(3,)),
    "dropout": Case(dropout_rate=0.2),
    "dropout, lse": _case("dlse", dropout_rate=0.5, causal=True),
    "lse": _case("dlse", causal=True),
    "lse, sinks": _case("dlse", "sinks", "q_lengths"),
    "grouped heads": Case(q_heads=6, kv_heads=2, causal=True),
    "many heads of one key head": Case(q_heads=12, kv_heads=1, q_len=200),  # few long key tiles, cut into pieces
    "one key head": Case(q_heads=4, kv_heads=1),
    "many batch entries": Case(batch=(200,), q_len=70, kv_len=200),  # the first keys store dq, the others add to it
    "many batch entries, causal": Case(batch=(200,), q_len=130, kv_len=200, causal=True),
    "few queries of grouped heads": _case(
        "sinks", "q_offset", q_heads=32, kv_heads=4, causal=True, batch=(5,), q_len=20, window=(90, None)
    ),
    "few queries of grouped heads, segment ids": _case(
        "segment_ids", "q_lengths", "kv_lengths", "dlse", q_heads=32, kv_heads=2, batch=(5,), q_len=20, softcap=5.0
    ),
    "grouped heads, bias": _case("bias", "mask", q_heads=6, kv_heads=2, broadcast=[("mask", 1)]),
    "values wider": Case(value_dim=32),
    "values narrower": Case(head_dim=24, value_dim=8),
    "head size of one": Case(head_dim=1, value_dim=3),
    "negative scale": Case(scale=-0.5),
    "growing scores": Case(growth=20.0),
    "growing scores, causal": Case(growth=20.0, causal=True),
    "one query": _case("q_offset", q_len=1, causal=True),
    "one key": Case(kv_len=1),
    "one query, one key": Case(q_len=1, kv_len=1),
    "no query": Case(q_len=0),
    "no key": _case("sinks", "bias", kv_len=0),
    "no batch axis": _case("q_lengths", "bias", batch=(), causal=True),
    "no batch entry": _case("bias", "kv_lengths", batch=(0,)),
    "three batch axes": _case("mask", batch=(2, 1, 3), broadcast=[("mask", 0), ("mask", 4)]),
    "keys shared by the batch": Case(broadcast=frozenset({("k", 0), ("v", 0)})),
    "queries shared by the batch": _case("kv_lengths", batch=(3, 2), broadcast=[("q", 0), ("v", 1), ("kv_lengths", 1)]),
    "everything": _case(
        *FEATURES,
        q_heads=6,
        kv_heads=2,
        value_dim=24,
        causal=True,
        window=(90, 3),
        softcap=4.0,
        dropout_rate=0.2,
        broadcast=[("mask", 2), ("bias", 1), ("k", 0), ("alibi_slopes", 0)],
    ),
}
