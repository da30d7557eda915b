"""Continue a prompt with a KV cache: `python examples/generate.py --prompt "Ada took the"`.

The prompt goes through the model at once, then each new token alone, against a cache that is updated in place. Takes
the checkpoint that examples/train.py left in `--out`; trains one first if there is none.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import text
import train
from flax import nnx


class Generator:
    """A model with a cache for `batch` sequences of up to `length` tokens."""

    def __init__(self, config: gpt.Config, parameters, batch: int, length: int):
        model = gpt.GPT(config, nnx.Rngs(0))
        nnx.update(model, parameters)
        model.init_cache(batch, length)
        self.definition, self.parameters, self.cache = nnx.split(model, nnx.Param, nnx.Cache)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def _step(self, parameters, cache, tokens, rng, temperature):
        model = nnx.merge(self.definition, parameters, cache)
        logits = model(tokens, decode=True)[:, -1].astype(jnp.float32)
        greedy = jnp.argmax(logits, axis=-1)
        sampled = jax.random.categorical(rng, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, sampled, greedy), nnx.state(model, nnx.Cache)

    def __call__(self, prompt, new: int, rng, temperature: float = 0.0):
        """Yield `new` tokens [B], the continuation of `prompt [B, T]`."""
        tokens = jnp.asarray(prompt)
        for key in jax.random.split(rng, new):
            token, self.cache = self._step(self.parameters, self.cache, tokens, key, temperature)
            tokens = token[:, None]
            yield token


def main(argv=None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=gpt.SIZES, default="tiny", help="that of the checkpoint")
    parser.add_argument("--prompt", default="Ada took the")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/train"))
    args = parser.parse_args(argv)

    if not (args.out / "checkpoints").exists():
        print(f"no checkpoint in {args.out}: training one")
        train.main(["--size", args.size, "--out", str(args.out)])
    config = gpt.SIZES[args.size]
    state = train.Trainer(config, steps=1).init()
    with ocp.CheckpointManager(args.out.absolute() / "checkpoints") as checkpoints:
        state = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore(state))

    prompt = text.tokens(args.prompt)[None]
    generator = Generator(config, state.parameters, batch=1, length=prompt.shape[1] + args.tokens)
    print(args.prompt, end="", flush=True)
    written, times = bytearray(), []
    start = time.perf_counter()
    for token in generator(prompt, args.tokens, jax.random.key(args.seed), args.temperature):
        written += bytes(np.asarray(token, np.uint8))
        print(chr(written[-1]), end="", flush=True)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    print(f"\n{np.median(times[2:]) * 1e3:.2f} ms a token")
    return args.prompt + written.decode(errors="replace")


if __name__ == "__main__":
    main()
