"""Time a training step of GPT-2 by attention implementation: `python -m benchmarks.train --help`.

The model, the optimizer and the step are those of examples/train.py: 124M parameters in bf16, 32768 tokens a step and
device, one sequence length after the other. `--parallel` takes all devices of the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time

import jax
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


IMPLEMENTATIONS = {"jax_flash": attention_fn, "cudnn": cudnn, "xla": nnx.dot_product_attention}


def measure(config: gpt.Config, batch: int, parallel: str, repeats: int) -> dict:
    """One line of results: `batch` sequences a step, over all devices that the trainer takes."""
    trainer = train.Trainer(config, steps=1000, parallel=parallel)
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (batch, config.length + 1), np.int32)
    state, tokens = trainer.spread(trainer.init()), trainer.shard(tokens)
    start = time.perf_counter()
    step = trainer.step.lower(state, tokens).compile()
    compile_s = time.perf_counter() - start
    memory = step.memory_analysis()
    state, loss = step(state, tokens)
    loss = float(np.ravel(loss)[0])
    rounds = []
    for _ in range(5):
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(repeats):
            state, _ = step(state, tokens)
        jax.block_until_ready(state)
        rounds.append((time.perf_counter() - start) / repeats)
    seconds = statistics.median(rounds)
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "step_ms": seconds * 1e3,
        "tokens_s": batch * config.length / seconds,
        "GiB": (used + memory.temp_size_in_bytes) / 2**30,
        "loss": loss,
        "compile_s": compile_s,
    }


def picture(rows: list[dict], path: pathlib.Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(axes, ("step_ms", "GiB"), ("ms a training step", "GiB a device"), strict=True):
        for impl in IMPLEMENTATIONS:
            points = sorted((row["T"], row[key]) for row in rows if row["impl"] == impl and key in row)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=report.LABELS[impl], color=report.COLORS[impl])
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel="sequence length", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--size", choices=gpt.SIZES, default="gpt2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--tokens", type=int, default=32768, help="a step and device")
    parser.add_argument("--parallel", nargs="+", choices=["jit", "pmap"], default=["jit"])
    parser.add_argument("--repeats", type=int, default=4, help="steps in each of five rounds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/train.jsonl"))
    parser.add_argument("--commit", default="", help="recorded with the results where git cannot tell it")
    args = parser.parse_args()

    console, about, devices = Console(), report.machine(args.commit), len(jax.devices())
    table = Table(
        "T", "attention", "parallel", "ms a step", "tokens/s", "GiB", "loss", title=f"{args.size}, {devices} devices"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    with args.out.open("w") as out:
        for length in args.lengths:
            for impl in args.impl:
                for parallel in args.parallel:
                    config = dataclasses.replace(
                        gpt.SIZES[args.size], length=length, attention_fn=IMPLEMENTATIONS[impl]
                    )
                    row = {"group": "train", "impl": impl, "T": length, "parallel": parallel, "devices": devices}
                    try:
                        row |= measure(config, devices * max(1, args.tokens // length), parallel, args.repeats)
                    except jax.errors.JaxRuntimeError as error:
                        if "RESOURCE_EXHAUSTED" not in str(error):
                            raise
                        row["failed"] = "out of memory"
                    rows.append(row)
                    out.write(json.dumps(row | about) + "\n")
                    out.flush()
                    figures = [
                        f"{row[key]:,.4g}" if key in row else "-" for key in ("step_ms", "tokens_s", "GiB", "loss")
                    ]
                    table.add_row(str(length), impl, parallel, row.get("failed") or figures[0], *figures[1:])
    console.print(table)
    picture(rows, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
