"""Time a training step of GPT-2 by attention implementation: `python -m benchmarks.train --help`.

The model, the optimizer and the step are those of examples/train.py: 124M parameters in bf16, 32768 tokens a step and
device, one sequence length after the other. `--parallel` takes all devices of the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from jax_flash.flax import attention_fn

from . import report

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import gpt
import train


def cudnn(q, k, v, *, is_causal, **_):
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="cudnn")


ROUNDS = 5
IMPLEMENTATIONS = {"jax_flash": attention_fn, "cudnn": cudnn, "flax": nnx.dot_product_attention}


@dataclasses.dataclass(frozen=True)
class Task:
    """`tokens` a step and device, by sequences of `length`, on the first `devices` of the machine."""

    size: str
    length: int
    impl: str
    parallel: str
    devices: int
    tokens: int

    @property
    def batch(self) -> int:
        return self.devices * max(1, self.tokens // self.length)

    def compiled(self, state: train.State):
        """The trainer, its compiled step, the batch, and the seconds that compilation took; None: out of memory."""
        config = dataclasses.replace(gpt.SIZES[self.size], length=self.length, attention_fn=IMPLEMENTATIONS[self.impl])
        devices = jax.devices()[: self.devices]
        trainer = train.Trainer(config, steps=1000, parallel=self.parallel, devices=devices)
        batch = random_batch(trainer, self.batch)
        start = time.perf_counter()
        step = out_of_memory_is_none(lambda: trainer.step.lower(trainer.spread(state), batch).compile())
        return trainer, step, batch, time.perf_counter() - start


def random_batch(trainer: train.Trainer, sequences: int):
    config = trainer.config
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (sequences, config.length + 1), np.int32)
    return trainer.shard(tokens)


def out_of_memory_is_none(function):
    try:
        return function()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


class Run:
    """A task whose step has been compiled, and the seconds a step took, by round."""

    def __init__(self, task: Task, state: train.State, trainer, step, batch):
        self.task, self.step, self.batch = task, step, batch
        self.seconds: list[float] = []
        state = trainer.spread(jax.tree.map(jnp.copy, state))  # the step takes its argument's memory
        self.state, loss = step(state, batch)
        self.loss = float(np.ravel(loss)[0])

    def take(self, repeats: int = 5) -> None:
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(repeats):
            self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        self.seconds.append((time.perf_counter() - start) / repeats)

    @property
    def row(self) -> dict:
        memory, seconds = self.step.memory_analysis(), statistics.median(self.seconds)
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return {
            "step_ms": seconds * 1e3,
            "tokens_s": self.task.batch * self.task.length / seconds,
            "GiB": (used + memory.temp_size_in_bytes) / 2**30,
            "loss": self.loss,
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--size", choices=gpt.SIZES, default="gpt2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--tokens", type=int, default=32768, help="a step and device")
    parser.add_argument("--parallel", nargs="+", choices=["jit", "pmap"], default=["jit"])
    parser.add_argument("--devices", type=int, nargs="+", default=[1], help="data parallel over so many")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/train.jsonl"))
    parser.add_argument("--commit", default="", help="recorded with the results where git cannot tell it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        share_tuning(folder)
        return run(args)


def share_tuning(folder: str) -> None:
    """Has XLA keep which kernels it found fastest, so that the matrix products of every program take the same ones."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_per_fusion_autotune_cache_dir={folder}"


def run(args: argparse.Namespace) -> int:
    console, about = Console(), report.machine(args.commit)
    columns = ("T", "attention", "parallel", "devices", "ms a step", "tokens/s", "GiB", "loss", "compile s")
    table = Table(*columns, title=args.size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    state = train.Trainer(gpt.SIZES[args.size], steps=1000).init()
    with args.out.open("w") as out:
        for length in args.lengths:
            tasks = [
                Task(args.size, length, *which, args.tokens)
                for which in itertools.product(args.impl, args.parallel, args.devices)
            ]
            # One after the other: XLA times kernels while it compiles.
            compiled = [task.compiled(state) for task in tasks]
            runs = [
                step and out_of_memory_is_none(functools.partial(Run, task, state, trainer, step, batch))
                for task, (trainer, step, batch, _) in zip(tasks, compiled, strict=True)
            ]
            for _ in range(ROUNDS):  # in turns, so that all meet the same clocks and temperatures
                for run in filter(None, runs):
                    run.take()
            for task, run, (*_, compile_s) in zip(tasks, runs, compiled, strict=True):
                row = {"group": "train", "impl": task.impl, "T": length, "parallel": task.parallel}
                row |= {"devices": task.devices, "compile_s": compile_s}
                row |= run.row if run else {"failed": "out of memory"}
                rows.append(row)
                out.write(json.dumps(row | about) + "\n")
                out.flush()
                keys = ("step_ms", "tokens_s", "GiB", "loss", "compile_s")
                figures = [f"{row[key]:,.4g}" if key in row else "-" for key in keys]
                what = (str(length), task.impl, task.parallel, str(task.devices))
                table.add_row(*what, row.get("failed") or figures[0], *figures[1:])
    console.print(table)
    for path in report.pictures(rows, args.out.parent):
        console.print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
