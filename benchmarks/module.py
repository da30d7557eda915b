"""Time a decoding step of the nnx module beside its own kernels: `python -m benchmarks.module --help`.

One token a sequence against a cache that the step updates in place: projections, update, attention and output. What
the clock has beyond the kernels is the module's and the dispatch's.
"""

from __future__ import annotations

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flash.flax.nnx import MultiHeadAttention

from . import report, timing

STEPS = 256  # that a cache has room for beyond the tokens it starts with


class Step:
    """A jitted step that keeps its cache: it can be called over and over, as `timing` does."""

    def __init__(self, batch: int, cached: int, heads: int, kv_heads: int, head_dim: int):
        features = heads * head_dim
        options = {"num_kv_heads": kv_heads, "causal": True, "decode": True, "use_bias": False}
        types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        module = MultiHeadAttention(heads, features, **options, **types, rngs=nnx.Rngs(0))
        module.init_cache((batch, cached + STEPS, features))
        module.cache_index[...] = jnp.asarray(cached, module.cache_index.dtype)
        definition, self.parameters, self.cache = nnx.split(module, nnx.Param, nnx.Cache)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(parameters, cache, x):
            module = nnx.merge(definition, parameters, cache)
            return module(x), nnx.state(module, nnx.Cache)

        self.step = step

    def __call__(self, x):
        out, self.cache = self.step(self.parameters, self.cache, x)
        return out

    # With these it counts as a jitted function where kernels are timed.

    def trace(self, x):
        return self.step.trace(self.parameters, self.cache, x)

    def lower(self, x):
        return self.step.lower(self.parameters, self.cache, x)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.module", description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cached", type=int, default=8192, metavar="S", help="tokens in the cache")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/module.jsonl"))
    parser.add_argument("--commit", default="", help="recorded with the results where git cannot tell it")
    args = parser.parse_args(argv)

    sizes = args.batch, args.cached, args.heads, args.kv_heads, args.head_dim
    x = jax.random.normal(jax.random.key(0), (args.batch, 1, args.heads * args.head_dim), jnp.bfloat16)
    watch = timing.Stopwatch(Step(*sizes), [x], timing)
    timing.warm_up(watch.call, x)
    for _ in range(timing.TURNS):
        watch.take()
    if watch.call.cache["cache_index"][...] >= args.cached + STEPS:
        raise AssertionError("more steps than the cache has room for")

    case = "decode bf16 batch {} S{} heads {}/{} D{}".format(*sizes)
    row = {"group": "module", "impl": "jax_flash", "case": case} | watch.line | report.machine(args.commit)
    report.write(args.out, [row])
    kernels = f", {row['kernel_ms']:.3f} in kernels" if row["kernel_ms"] else ""
    print(f"{case}: {row['wall_ms']:.3f} ms a step by the clock{kernels}")
    return row


if __name__ == "__main__":
    main()
