"""Long sequences of packed documents: `python examples/long_context.py --size gpt2 --length 32768` on a GPU.

Trains on sequences into which whole documents are packed, kept apart by segment ids, and shows that a document in the
middle of a long sequence is read exactly as if it stood alone. Time and memory of a step with and without segment ids
show that blocks of two documents that do not meet are skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import text
import train
from flax import nnx
from rich.console import Console
from rich.table import Table


def alone(model: gpt.GPT, tokens, ids, number: int) -> float:
    """Largest difference between the logits of document `number` within its sequence and alone."""
    begin, end = np.flatnonzero(ids == number)[[0, -1]] + (0, 1)
    within = model(tokens[None], ids[None])[0, begin:end]
    return float(jnp.abs(within - model(tokens[None, begin:end])[0]).max())


def measure(trainer: train.Trainer, batch, steps: int = 3) -> tuple[float, float]:
    """Seconds of a step (the least of a few) and GiB of its temporary arrays on a device."""
    state, batch = trainer.spread(trainer.init()), trainer.shard(*batch)
    step = trainer.step.lower(state, batch).compile()
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), step.memory_analysis().temp_size_in_bytes / 2**30


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=gpt.SIZES, default="tiny")
    parser.add_argument("--length", type=int, default=2048, help="of a sequence, in tokens")
    parser.add_argument("--batch", type=int, default=len(jax.devices()), help="sequences a step, over all devices")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)

    console = Console()
    config = dataclasses.replace(gpt.SIZES[args.size], remat=True)
    trainer = train.Trainer(config, args.steps, learning_rate=3e-3)
    tokens, ids = text.packed(np.random.default_rng(0), args.batch, args.length)
    documents = int(ids[0, -1]) + 1

    table = Table("", "ms a step", "tokens/s", "GiB of temporary arrays")
    for name, batch in (("one document", (tokens,)), (f"{documents} documents", (tokens, ids))):
        seconds, memory = measure(trainer, batch)
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{args.batch * args.length / seconds:,.0f}", f"{memory:.2f}")
    console.print(table)

    def batches(start):
        step = start
        while True:
            yield text.packed(np.random.default_rng(step), args.batch, args.length)
            step += 1

    state, losses = train.train(trainer, batches, args.steps)
    console.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    exact = gpt.GPT(dataclasses.replace(config, dtype=jnp.float32), nnx.Rngs(0))
    nnx.update(exact, state.parameters)
    difference = alone(exact, tokens[0, :-1], ids[0, :-1], documents // 2)
    console.print(f"document {documents // 2} of {documents}: its logits differ by {difference:.1e} from those alone")
    return {"documents": documents, "first loss": losses[0], "last loss": losses[-1], "difference": difference}


if __name__ == "__main__":
    main()
