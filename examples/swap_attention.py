"""One argument changed in an existing Flax module: `python examples/swap_attention.py` draws what that does.

An encoder block of flax.linen with `nn.MultiHeadDotProductAttention`, once as it is and once with
`attention_fn=jax_flash.flax.attention_fn`: same parameters, same results; time and memory of a training step by length.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from jax_flash.flax import attention_fn


class Encoder(nn.Module):
    """A block as many models have it."""

    attention_fn: Callable = nn.dot_product_attention
    dtype: jnp.dtype = jnp.float32
    heads: int = 8

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, attention_fn=self.attention_fn)
        x += attention(nn.LayerNorm(dtype=self.dtype)(x))
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(hidden)


def measure(model: Encoder, parameters, x, repeats: int = 5) -> tuple[float, float]:
    """Milliseconds of a gradient (the least of a few) and MiB of its temporary arrays."""
    gradient = jax.jit(jax.grad(lambda p, x: model.apply(p, x).astype(jnp.float32).var()))
    compiled = gradient.lower(parameters, x).compile()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(parameters, x))
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1e3, compiled.memory_analysis().temp_size_in_bytes / 2**20


def picture(lengths, results, path: pathlib.Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for column, (axis, title) in enumerate(zip(axes, ("ms a training step", "MiB of temporary arrays"), strict=True)):
        for (name, rows), color in zip(results.items(), ("#999999", "#d95f02"), strict=True):
            axis.loglog(lengths, [row[column] for row in rows], marker="o", label=name, color=color, base=2)
        axis.set(title=title, xlabel="sequence length")
        axis.set_xticks(lengths, lengths)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)


def main(argv=None) -> dict[str, list[tuple[float, float]]]:
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [1024, 2048, 4096, 8192, 16384] if gpu else [256, 512, 1024, 2048]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--width", type=int, default=1024 if gpu else 256)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/swap_attention.png"))
    args = parser.parse_args(argv)

    dtype = jnp.bfloat16 if gpu else jnp.float32
    models = {"Flax": Encoder(dtype=dtype), "with jax_flash": Encoder(attention_fn, dtype)}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    table = Table("length", *(f"{name}: {what}" for name in models for what in ("ms", "MiB")), "difference")
    for length in args.lengths:
        x = jax.random.normal(jax.random.key(0), (1, length, args.width), dtype)
        parameters = models["Flax"].init(jax.random.key(1), x)
        outs = [model.apply(parameters, x).astype(jnp.float32) for model in models.values()]
        for name, model in models.items():
            results[name].append(measure(model, parameters, x))
        figures = [f"{figure:.3g}" for rows in results.values() for figure in rows[-1]]
        table.add_row(str(length), *figures, f"{jnp.abs(outs[0] - outs[1]).max():.1e}")
    Console().print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture(args.lengths, results, args.out)
    print(f"picture: {args.out}")
    return results


if __name__ == "__main__":
    main()
