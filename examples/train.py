"""Train a GPT on a generated text: `python examples/train.py --size tiny` runs on a laptop, `--size gpt2` on GPUs.

All devices share the batch, by jit over a sharded batch or by pmap (`--parallel`). A run continues from the last
checkpoint in `--out`, where it also leaves a picture of the loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import text
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class State(NamedTuple):
    parameters: Any
    optimizer: Any


class Trainer:
    """A model's definition, its optimizer and the step that trains it on `devices`, by default all."""

    def __init__(
        self, config: gpt.Config, steps: int, learning_rate: float = 1e-3, parallel: str = "jit", devices=None
    ):
        self.config = config
        self.parallel = parallel
        schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(steps // 10 + 1, 1000), steps + 1)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
        self.definition = nnx.split(nnx.eval_shape(lambda: gpt.GPT(config, nnx.Rngs(0))))[0]
        self.devices = np.array(devices or jax.devices())
        if parallel == "jit":
            mesh = jax.sharding.Mesh(self.devices, ("data",), axis_types=(AxisType.Auto,))
            self.whole, self.split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
            self.step = jax.jit(self._step, donate_argnums=0)
        else:
            self.step = jax.pmap(self._step, axis_name="data", donate_argnums=0, devices=list(self.devices))

    def init(self, seed: int = 0) -> State:
        parameters = nnx.state(gpt.GPT(self.config, nnx.Rngs(seed)), nnx.Param)
        return State(parameters, self.optimizer.init(parameters))

    def _step(self, state: State, batch) -> tuple[State, jax.Array]:
        """One step on `batch`, the arguments of gpt.loss after the model; the loss before it."""

        def loss(parameters):
            return gpt.loss(nnx.merge(self.definition, parameters), *batch)

        value, gradients = jax.value_and_grad(loss)(state.parameters)
        if self.parallel == "pmap":
            value, gradients = jax.lax.pmean(value, "data"), jax.tree.map(self._mean, gradients)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.parameters)
        return State(optax.apply_updates(state.parameters, updates), optimizer), value

    def _mean(self, gradient: jax.Array) -> jax.Array:
        """Over the devices of pmap. Matrices travel in the type in which they were computed, as under a sharded jit."""
        sent = gradient.astype(self.config.dtype) if gradient.ndim > 1 else gradient
        return jax.lax.pmean(sent, "data").astype(gradient.dtype)

    def spread(self, state: State) -> State:
        """The same state on every device."""
        if self.parallel == "jit":
            return jax.device_put(state, self.whole)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(self.devices), *x.shape)), state)

    def gathered(self, state: State) -> State:
        return state if self.parallel == "jit" else jax.tree.map(lambda x: x[0], state)

    def shard(self, *batch: np.ndarray) -> tuple[Any, ...]:
        """Arrays [B, ...] over the devices."""
        if self.parallel == "jit":
            return tuple(jax.device_put(x, self.split) for x in batch)
        return tuple(x.reshape(len(self.devices), -1, *x.shape[1:]) for x in batch)


def train(trainer: Trainer, batches, steps: int, out: pathlib.Path | None = None, every: int = 100):
    """Train to step `steps`, from the last checkpoint in `out` if there is one: state, and loss of each step run."""
    state, start = trainer.init(), 0
    checkpoints = ocp.CheckpointManager(out.absolute() / "checkpoints") if out else None
    if checkpoints and checkpoints.latest_step() is not None:
        start = checkpoints.latest_step()
        state = checkpoints.restore(start, args=ocp.args.StandardRestore(state))
    state = trainer.spread(state)
    losses = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=start, loss=float("nan"), speed=0.0)
        batches, clock = batches(start), time.perf_counter()
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            state, loss = trainer.step(state, trainer.shard(*batch))
            losses.append(float(np.ravel(loss)[0]))
            now = time.perf_counter()
            progress.update(task, advance=1, loss=losses[-1], speed=batch[0][:, 1:].size / (now - clock))
            clock = now
            if checkpoints and (step % every == 0 or step == steps):
                checkpoints.save(step, args=ocp.args.StandardSave(trainer.gathered(state)))
    if checkpoints:
        checkpoints.close()
    return trainer.gathered(state), losses


def picture(losses, start: int, path: pathlib.Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.plot(range(start + 1, start + 1 + len(losses)), losses, color="#d95f02")
    axis.set(xlabel="step", ylabel="loss (nats a byte)", ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=gpt.SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, over all devices")
    parser.add_argument("--length", type=int, help="of a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--parallel", choices=["jit", "pmap"], default="jit")
    parser.add_argument(
        "--remat", action="store_true", help="recompute the blocks in the backward pass, attention excepted"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/train"))
    args = parser.parse_args(argv)

    config = dataclasses.replace(gpt.SIZES[args.size], remat=args.remat)
    length = args.length or config.length
    corpus = text.tokens(text.text())
    trainer = Trainer(config, args.steps, args.learning_rate, args.parallel)
    _, losses = train(
        trainer, lambda start: ((x,) for x in text.batches(corpus, args.batch, length, start)), args.steps, args.out
    )
    if not losses:
        print(f"{args.out} is already trained to step {args.steps}")
        return losses
    picture(losses, args.steps - len(losses), args.out / "loss.png")
    print(f"loss {losses[0]:.3f} -> {np.mean(losses[-10:]):.3f}; checkpoints and loss.png in {args.out}")
    return losses


if __name__ == "__main__":
    main()
