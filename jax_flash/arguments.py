"""The arguments of the public calls, checked: each function returns what it was given in its canonical form, or raises
an error that names the argument, what was expected and what came.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash.spec import Fp8

DTYPES = ("float16", "bfloat16", "float32", "float64")


def query_key_value(
    query: Any, key: Any, value: Any, dtypes: Sequence[str] = DTYPES, value_dtype: str | None = None
) -> tuple[Any, Any, Any]:
    """[*B, T, N, H], [*B, S, K, H], [*B, S, K, Hv] of one dtype; the value of its own if it is given."""
    arrays = {name: array(name, x) for name, x in (("query", query), ("key", key), ("value", value))}
    q, k, v = arrays.values()
    if q.dtype not in dtypes:
        raise TypeError(f"query: expected one of the dtypes {', '.join(dtypes)}, got {q.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"key: expected query's dtype {q.dtype}, got {k.dtype}")
    if value_dtype is None and v.dtype != q.dtype:
        raise TypeError(f"value: expected query's dtype {q.dtype}, got {v.dtype}")
    if value_dtype is not None and v.dtype != value_dtype:
        raise TypeError(f"value: expected dtype {value_dtype}, got {v.dtype}")
    for name, x in arrays.items():
        if not all(isinstance(size, int) for size in x.shape):
            raise TypeError(f"{name}: expected sizes known at trace time, got {show(x.shape)}")
    if q.ndim < 3:
        raise ValueError(f"query: expected shape [*B, T, N, H], got {q.shape}")
    batch, (n, head_size) = q.shape[:-3], q.shape[-2:]
    if n < 1 or head_size < 1:
        raise ValueError(f"query: expected at least one head [*B, T, N, H] of size at least 1, got {q.shape}")
    if k.ndim != q.ndim or k.shape[:-3] != batch or k.shape[-1] != head_size:
        wanted = show((*batch, "S", "K", head_size))
        raise ValueError(f"key: expected shape [*B, S, K, H] = {wanted} beside query {q.shape}, got {k.shape}")
    if k.shape[-2] < 1 or n % k.shape[-2]:
        raise ValueError(f"key: expected a number of heads that divides query's {n}, got {k.shape[-2]} in {k.shape}")
    if v.ndim != q.ndim or v.shape[:-1] != k.shape[:-1] or v.shape[-1] < 1:
        wanted = show((*k.shape[:-1], "Hv"))
        raise ValueError(f"value: expected shape [*B, S, K, Hv] = {wanted} beside key {k.shape}, got {v.shape}")
    return q, k, v


def array(name: str, value: Any, kind: Any = None) -> Any:
    try:
        x = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__} ({error})") from error
    if kind is not None and not jnp.issubdtype(x.dtype, kind):
        wanted = {jnp.bool_: "bool", jnp.integer: "integers", jnp.floating: "floating point numbers"}[kind]
        raise TypeError(f"{name}: expected an array of {wanted}, got {x.dtype}")
    return x


def aligned(name: str, x: Any, full: tuple[int, ...], axes: str, whole: int = 0) -> Any:
    """x with axes of size 1 in front; each axis must be full or of size 1, the last `whole` of them full."""
    padded = (1,) * (len(full) - x.ndim) + x.shape
    smallest = (1,) * (len(full) - whole) + full[len(full) - whole :]
    broadcasts = len(padded) == len(full) and all(
        got in sizes for got, *sizes in zip(padded, full, smallest, strict=True)
    )
    if x.ndim < whole or not broadcasts:
        raise ValueError(f"{name}: expected a shape that broadcasts to [{axes}] = {show(full)}, got {show(x.shape)}")
    return x.reshape(padded)


def batch_integers(name: str, value: Any, batch: tuple[int, ...], least: int, most: int) -> Any:
    """int32 that broadcast to [*B], those out of bounds moved to the bounds."""
    x = aligned(name, array(name, value, jnp.integer), batch, "*B")
    held = jnp.iinfo(x.dtype)
    if held.min < least or most < held.max:
        x = jnp.clip(x, max(least, held.min), min(most, held.max))
    return x.astype(jnp.int32)


def batch_lengths(name: str, value: Any, batch: tuple[int, ...], most: int) -> Any:
    return None if value is None else batch_integers(name, value, batch, 0, most)


def integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected an integer known at trace time, got {_kind(value)}") from error


def number(name: str, value: Any) -> float:
    """A number that kernels can take, in float32."""
    try:
        given = np.asarray(value)
        if given.ndim or not (jnp.issubdtype(given.dtype, np.floating) or jnp.issubdtype(given.dtype, np.integer)):
            raise TypeError
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a number known at trace time, got {_kind(value)}") from error
    x, held = float(given), np.finfo(np.float32)
    if not (x == 0 or float(held.tiny) <= abs(x) <= float(held.max)):
        raise ValueError(f"{name}: expected a finite number in the range of float32, got {x}")
    return x


def positive(name: str, value: Any) -> float:
    x = number(name, value)
    if x <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {x}")
    return x


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {_kind(value)}")
    return bool(value)


def precision_or_none(name: str, value: Any) -> Fp8 | None:
    if not isinstance(value, Fp8 | None):
        raise ValueError(f"{name}: expected None or jax_flash.Fp8(...), got {value!r}")
    return value


def show(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _kind(value: Any) -> str:
    return "a traced array" if isinstance(value, jax.core.Tracer) else repr(value)
