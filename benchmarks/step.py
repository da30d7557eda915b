"""What a training step spends around its attention kernels: `python -m benchmarks.step --help`.

The model and the step are those of examples/train.py, with as many layers and heads as asked for. The kernels of some
steps are timed one by one (CUPTI), and the compiled program says which of them do nothing but move or cast what
attention takes or gives: copies, transposes, conversions that a layout or a type made necessary.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import re
import statistics
from collections.abc import Iterable

import jax

from jax_flash.extension import kernel_folder

from . import report
from .train import gpt, random_batch, train

STEPS = 5
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = .*? ([\w-]+)\(([^)]*)\)(.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) ")
MOVES = {"copy", "transpose", "convert", "reshape", "slice", "pad", "concatenate", "dynamic-slice"}
FREE = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant"}  # of themselves no kernel


@dataclasses.dataclass(frozen=True)
class Instruction:
    operation: str
    operands: tuple[str, ...]
    attributes: str


def computations(program: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of each computation of a compiled program's text, by name."""
    found: dict[str, dict[str, Instruction]] = {}
    for line in program.splitlines():
        if match := COMPUTATION.match(line):
            inside = found.setdefault(match[1], {})
        elif match := INSTRUCTION.match(line):
            inside[match[1]] = Instruction(match[2], tuple(re.findall(r"%([\w.-]+)", match[3])), match[4])
    return found


def moves(program: str) -> set[str]:
    """Names of the instructions that only move or cast what a kernel of this library takes or gives."""
    found = computations(program)

    def only_moves(x: Instruction) -> bool:
        if x.operation != "fusion":
            return x.operation in MOVES
        fused = found[re.search(r"calls=%([\w.-]+)", x.attributes)[1]].values()
        return all(y.operation in MOVES | FREE for y in fused)

    names = set()
    for inside in found.values():

        def behind(name: str, inside=inside) -> str:
            """What gives a value that `name` merely passes on."""
            while name in inside and inside[name].operation in FREE and inside[name].operands:
                name = inside[name].operands[0]
            return name

        ours = {name for name, x in inside.items() if 'custom_call_target="jax_flash' in x.attributes}
        taken = {behind(operand) for name in ours for operand in inside[name].operands}
        for name, x in inside.items():
            beside = name in taken or any(behind(operand) in ours for operand in x.operands)
            if beside and x.operation not in FREE and only_moves(x):
                names.add(name)
    return names


@functools.cache
def own_kernels() -> set[str]:
    sources = (path.read_text() for path in pathlib.Path(kernel_folder()).rglob("*.cuh"))
    return {name for source in sources for name in re.findall(r"(\w+)\(const __grid_constant__", source)}


def shares(moving: Iterable[str], kernels: list[tuple[str, float]]) -> dict[str, float]:
    """Of a step's kernel times in ms: those of this library, of the instructions `moving`, and of all. Equal
    instructions share a kernel, which has the name of one of them."""
    groups = {"attention_ms": own_kernels(), "moves_ms": {re.sub(r"[.-]", "_", name) for name in moving}}
    sums = {group: sum(time_ms for name, time_ms in kernels if name in names) for group, names in groups.items()}
    return {"all_ms": sum(time_ms for _, time_ms in kernels)} | sums


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32768, help="a step")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/step.jsonl"))
    parser.add_argument("--commit", default="", help="recorded with the results where git cannot tell it")
    args = parser.parse_args(argv)

    width, batch = args.heads * args.head_dim, args.tokens // args.length
    sizes = {"layers": args.layers, "heads": args.heads, "kv_heads": args.heads, "width": width, "length": args.length}
    config = dataclasses.replace(gpt.SIZES["gpt2"], **sizes)
    trainer = train.Trainer(config, steps=1000, devices=jax.devices()[:1])
    operands = trainer.spread(trainer.init()), random_batch(trainer, batch)
    step = jax.jit(lambda state, batch: trainer.step(state, batch))  # donates nothing: it can be called over and over
    moving = moves(step.lower(*operands).compile().as_text())

    case = f"step bf16 {args.layers} layers, batch {batch} S{args.length} heads {args.heads} D{args.head_dim} causal"
    row = {"group": "step", "impl": "jax_flash", "case": case} | report.machine(args.commit)
    row["moves"] = sorted(moving)
    print(f"{case}: {len(row['moves'])} instructions only move or cast what attention's kernels take or give")
    if jax.default_backend() == "gpu":
        from jax.experimental.mosaic.gpu import profiler

        _, times = profiler.measure(step, aggregate=False, iterations=STEPS)(*operands)
        steps = [shares(moving, kernels) for kernels in times]
        row |= {key: statistics.median(x[key] for x in steps) for key in steps[0]}
        print("{all_ms:.2f} ms in kernels, {attention_ms:.2f} in attention's, {moves_ms:.3f} in those".format(**row))
    report.write(args.out, [row])
    return row


if __name__ == "__main__":
    main()
