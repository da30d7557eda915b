"""Time attention: `python -m benchmarks --help`.

Every implementation is checked against float64 attention, gradients too, before it is timed. Results go to a file of
JSON lines, one a case and implementation; the grid's lines carry the keys impl, dtype, dir, D, causal, S, tflops.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jax_flash import fp8

from . import check, report, timing, torch_sdpa
from .cases import Case, grid, named
from .peers import PEERS, TORCH, Attention, Skip

FIGURES = ("tflops", "quantise_tbs", "scratch_MiB", "compile_s", "error")  # that the table shows: the first there is


def scratch_mib(case: Case, attention: Attention) -> float:
    """Memory that forward and backward need beside their operands and results, as XLA plans it."""

    def gradients(q, k, v, g):
        out, pullback = jax.vjp(attention, q, k, v)
        return out, pullback(g)

    shapes = jax.eval_shape(case.arrays)
    return jax.jit(gradients).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 2**20


def compile_s(call, operands) -> float:
    """Seconds to trace and compile with no kernel on disk."""
    with timing.empty_kernel_cache():
        start = time.perf_counter()
        call.lower(*operands).compile()
        return time.perf_counter() - start


@functools.lru_cache(maxsize=1)
def task(case: Case):
    """Operands of a case and what their results are: shared by the implementations that are timed on it."""
    arrays = case.arrays()
    rows = 2048 if case.group == "accuracy" else check.ROWS  # of a few, the error with outliers is a matter of chance
    return arrays, {} if case.feature or case.precision == "quantise" else check.exact(case, arrays, rows)


def prepare(case: Case, name: str) -> tuple[dict, timing.Stopwatch | None]:
    """What a line of results says beside times, and what is to be timed. Raises Skip where the implementation does not
    do the case."""
    attention = PEERS[name](case)
    if case.group == "memory":
        return {"scratch_MiB": scratch_mib(case, attention)}, None
    arrays, right = task(case)
    if case.precision == "quantised":
        *operands, cotangent = arrays
        arrays = jax.jit(fp8.quantize)(*operands), cotangent
    library = torch_sdpa if name in TORCH else timing
    call, operands, out = library.prepare(case.direction, attention, arrays)
    if case.group == "compile":
        return {"compile_s": compile_s(call, operands)}, None

    results = call(*operands)
    found = (
        {"out": results} if case.direction == "fwd" else dict(zip(("dq", "dk", "dv"), results, strict=True), out=out)
    )
    errors = check.errors(case, right, {name: library.array(x) for name, x in found.items() if name in right})
    line = {"error": check.worst(case, errors)} if errors else {}
    if case.group == "accuracy":
        return line | {f"error_{name}": error for name, error in errors.items()}, None
    if case.group == "decode":
        line["cache_bytes"] = sum(x.nbytes for x in arrays[1:3])
    if case.precision == "quantise":
        line["moved_bytes"] = sum(x.nbytes for x in jax.tree.leaves((operands, results)))
    timing.warm_up(call, *operands, wait=library.wait)
    return line, timing.Stopwatch(call, operands, library)


def speeds(case: Case, line: dict) -> dict[str, float]:
    """By the kernel's time if it is known."""
    ms = line["kernel_ms"] or line["wall_ms"]
    rates = {"cache_tbs": "cache_bytes", "quantise_tbs": "moved_bytes"}
    found = {rate: line[moved] / ms / 1e9 for rate, moved in rates.items() if moved in line}
    return found if case.precision == "quantise" else found | {"tflops": case.flops / ms / 1e9}


def measure(case: Case, names: list[str], began=lambda name: None) -> dict[str, dict]:
    """Lines of results. They are timed in turns, so that all meet the same clocks and temperatures."""
    lines: dict[str, dict] = {}
    watches: dict[str, timing.Stopwatch] = {}

    def attempt(step, name: str) -> None:
        """One implementation's failure must not end the run."""
        try:
            step(name)
        except Skip as skip:
            lines[name]["skipped"] = str(skip)
        except Exception as error:
            lines[name]["failed"] = f"{type(error).__name__}: {error}"[:400]
            watches.pop(name, None)

    def start(name: str) -> None:
        line, watch = prepare(case, name)
        lines[name] |= line
        if watch is not None:
            watches[name] = watch

    for name in names:
        began(name)
        lines[name] = {}
        attempt(start, name)
    for _ in range(timing.TURNS):
        for name in list(watches):
            attempt(lambda name: watches[name].take(), name)
    for name, watch in watches.items():
        lines[name] |= watch.line
        lines[name] |= speeds(case, lines[name])
    return lines


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
            lines = measure(
                case, args.impl, lambda name, case=case: progress.update(bar, description=f"{name}: {case}")
            )
            figures: dict[str, float] = {}
            notes: dict[str, str] = {}
            for name, line in lines.items():
                about_case = {
                    "impl": name,
                    "group": case.group,
                    "dtype": case.operands,
                    "dir": case.direction,
                    "D": case.head_dim,
                    "causal": int(case.causal),
                    "S": case.kv_len,
                    "case": str(case),
                }
                if "failed" in line:
                    failures += name == "jax_flash"
                    notes[name] = "failed"
                    console.print(f"[red]{name}: {case}: {line['failed']}")
                elif "skipped" in line:
                    notes[name] = "-"
                else:
                    figures[name] = next(line[key] for key in FIGURES if key in line)
                out.write(json.dumps(about_case | line | about) + "\n")
                out.flush()
                progress.advance(bar)
            first = figures.get(args.impl[0])
            ratios = [f"{first / figures[name]:.2f}" if first and name in figures else "" for name in args.impl[1:]]
            table.add_row(
                str(case), *[f"{figures[name]:.3g}" if name in figures else notes[name] for name in args.impl], *ratios
            )
    console.print(table)
    console.print(f"results: {args.out}")
    if args.pictures:
        for path in report.pictures(report.read(args.out), args.out.parent):
            console.print(f"picture: {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
