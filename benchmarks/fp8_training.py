"""Train a small GPT with the forward pass of attention in FP8, and in bfloat16: `python -m benchmarks.fp8_training`.

The same parameters, batches and optimizer; writes both curves as JSON lines, and a picture of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import numpy as np

from jax_flash import Fp8
from jax_flash.flax import attention_fn

from . import report

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import gpt
import text
import train

LAST = 50  # steps whose mean loss is compared


def fp8_attention(*arrays, precision=None, **keywords):
    return attention_fn(*arrays, precision=Fp8(), **keywords)


ATTENTION = {"bf16": attention_fn, "fp8": fp8_attention}


def curve(config: gpt.Config, steps: int, batch: int) -> list[float]:
    """The loss of each step."""
    trainer = train.Trainer(config, steps, learning_rate=1e-3)
    state, losses = trainer.spread(trainer.init()), []
    batches = text.batches(text.tokens(text.text()), batch, config.length, 0)
    for _ in range(steps):
        state, loss = trainer.step(state, trainer.shard(next(batches)))
        losses.append(loss)  # not read yet: the device need not wait
    return [float(loss) for loss in losses]


def main(argv=None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_training", description=__doc__)
    parser.add_argument("--size", choices=gpt.SIZES, default="small")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/fp8_training.jsonl"))
    parser.add_argument("--commit", default="", help="recorded with the results where git cannot tell it")
    args = parser.parse_args(argv)

    about, rows, curves = report.machine(args.commit), [], {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as out:
        for name, attention in ATTENTION.items():
            start = time.perf_counter()
            config = dataclasses.replace(gpt.SIZES[args.size], attention_fn=attention)
            curves[name] = curve(config, args.steps, args.batch)
            last = float(np.mean(curves[name][-LAST:]))
            row = {"group": "fp8_training", "impl": name, "size": args.size, "steps": args.steps, "last": last}
            rows.append(row | {"losses": np.round(curves[name], 5).tolist()} | about)
            out.write(json.dumps(rows[-1]) + "\n")
            print(
                f"{name}: mean loss of the last {LAST} steps {last:.5f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    report.pictures(rows, args.out.parent)
    return curves


if __name__ == "__main__":
    main()
