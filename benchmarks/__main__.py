"""Time attention: `python -m benchmarks --help`.

Every implementation is checked against float64 attention, gradients too, before it is timed. Results go to a file of
JSON lines, one a case and implementation; the grid's lines carry the keys impl, dtype, dir, D, causal, S, tflops.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from unittest import mock

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jax_flash import extension, fp8

from . import check, report, timing, torch_sdpa
from .cases import Case, grid, named
from .peers import PEERS, TORCH, Attention, Skip


def scratch_mib(case: Case, attention: Attention) -> float:
    """Memory that forward and backward need beside their operands and results, as XLA plans it."""

    def gradients(q, k, v, g):
        out, pullback = jax.vjp(attention, q, k, v)
        return out, pullback(g)

    shapes = jax.eval_shape(case.arrays)
    return jax.jit(gradients).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 2**20


def compile_s(call, operands) -> float:
    """Seconds to trace and compile with no kernel on disk (those this process has already are not compiled again)."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {extension.CACHE_DIR: folder}):
        extension.configure(extension.native())
        start = time.perf_counter()
        call.lower(*operands).compile()
        seconds = time.perf_counter() - start
    extension.configure(extension.native())
    return seconds


@functools.lru_cache(maxsize=1)
def task(case: Case):
    """Operands of a case and what their results are: shared by the implementations that are timed on it."""
    arrays = case.arrays()
    rows = case.q_len if case.group == "accuracy" and case.q_len <= 4096 else check.ROWS
    return arrays, {} if case.feature or case.precision == "quantise" else check.exact(case, arrays, rows)


def measure(case: Case, name: str) -> dict:
    """One line of results; raises Skip where the implementation does not do the case."""
    attention = PEERS[name](case)
    if case.group == "memory":
        return {"scratch_MiB": scratch_mib(case, attention)}
    arrays, right = task(case)
    if case.precision == "quantised":
        *operands, cotangent = arrays
        arrays = jax.jit(fp8.quantize)(*operands), cotangent
    library = torch_sdpa if name in TORCH else timing
    call, operands, out = library.prepare(case.direction, attention, arrays)
    if case.group == "compile":
        return {"compile_s": compile_s(call, operands)}

    results = call(*operands)
    found = (
        {"out": results} if case.direction == "fwd" else dict(zip(("dq", "dk", "dv"), results, strict=True), out=out)
    )
    errors = check.errors(case, right, {name: library.array(x) for name, x in found.items()})
    line = {"error": check.worst(case, errors)} if errors else {}
    if case.group == "accuracy":
        return line | {f"error_{name}": error for name, error in errors.items()}
    timing.warm_up(call, *operands, wait=library.wait)
    kernel, wall = library.kernel_ms(call, *operands), timing.wall_ms(call, *operands, wait=library.wait)
    if case.group == "decode":
        line["cache_tbs"] = sum(x.nbytes for x in arrays[1:3]) / (kernel or wall) / 1e9
    line |= {"kernel_ms": kernel, "wall_ms": wall}
    if case.precision == "quantise":
        moved = sum(x.nbytes for x in jax.tree.leaves((operands, results)))
        return line | {"quantise_tbs": moved / (kernel or wall) / 1e9}
    return line | {
        "tflops": case.flops / (kernel or wall) / 1e9,
    }


def main() -> int:
    groups = named()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    gpu = jax.default_backend() == "gpu"
    parser.add_argument("groups", nargs="*", help=f"any of {', '.join(groups)} (default: grid; without a GPU: cpu)")
    parser.add_argument("--quick", action="store_true", help="a small grid: the two minutes' look")
    parser.add_argument(
        "--impl",
        nargs="+",
        default=["jax_flash", "cudnn" if gpu else "xla"],
        choices=list(PEERS),
        help="implementations to time (default: %(default)s)",
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="grid only: sequence lengths")
    parser.add_argument("--head-dims", type=int, nargs="+", help="grid only: head sizes")
    parser.add_argument("--directions", nargs="+", choices=["fwd", "bwd"], help="only these")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/benchmark.jsonl"))
    parser.add_argument("--commit", default="", help="recorded with the results where git cannot tell it")
    parser.add_argument("--pictures", action="store_true", help="draw speed and memory by length beside the results")
    args = parser.parse_args()

    args.groups = args.groups or [("quick" if args.quick else "grid") if gpu else "cpu"]
    unknown = [group for group in args.groups if group not in groups]
    if unknown:
        parser.error(f"unknown group {unknown[0]!r}: choose from {', '.join(groups)}")
    if args.lengths or args.head_dims:
        filters = {key: value for key, value in (("lengths", args.lengths), ("head_dims", args.head_dims)) if value}
        groups["grid"] = list(grid(**filters))
    cases = [case for group in args.groups for case in groups[group]]
    cases = [case for case in cases if not args.directions or case.direction in args.directions]
    console = Console()
    about = report.machine(args.commit) | timing.ceilings()
    console.print(" · ".join(f"{key}: {value}" for key, value in about.items() if value), highlight=False)

    table = Table(
        "case",
        *args.impl,
        *([f"{args.impl[0]} / {name}" for name in args.impl[1:]]),
        title="TFLOP/s (memory: MiB, quantise: TB/s, compile: s, accuracy: relative error)",
    )
    failures = 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with args.out.open("w") as out, Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(cases) * len(args.impl))
        for case in cases:
            speeds: dict[str, float] = {}
            notes: dict[str, str] = {}
            for name in args.impl:
                progress.update(bar, description=f"{name}: {case}")
                line = {
                    "impl": name,
                    "group": case.group,
                    "dtype": case.operands,
                    "dir": case.direction,
                    "D": case.head_dim,
                    "causal": int(case.causal),
                    "S": case.kv_len,
                    "case": str(case),
                }
                try:
                    line |= measure(case, name)
                    speeds[name] = next(
                        line[key]
                        for key in ("tflops", "quantise_tbs", "scratch_MiB", "compile_s", "error")
                        if key in line
                    )
                except Skip as skip:
                    notes[name] = "-"
                    line["skipped"] = str(skip)
                except Exception as error:  # one implementation's failure must not end the run
                    failures += name == "jax_flash"
                    notes[name] = "failed"
                    line["failed"] = f"{type(error).__name__}: {error}"[:400]
                    console.print(f"[red]{name}: {case}: {line['failed']}")
                out.write(json.dumps(line | about) + "\n")
                out.flush()
                progress.advance(bar)
            first = speeds.get(args.impl[0])
            ratios = [f"{first / speeds[name]:.2f}" if first and name in speeds else "" for name in args.impl[1:]]
            table.add_row(
                str(case), *[f"{speeds[name]:.3g}" if name in speeds else notes[name] for name in args.impl], *ratios
            )
    console.print(table)
    console.print(f"results: {args.out}")
    if args.pictures:
        for path in report.pictures(report.read(args.out), args.out.parent):
            console.print(f"picture: {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
