"""Figures in the documentation are quoted from kept runs, never typed: `python -m benchmarks.quote` writes them.

A block of a page looks like

    <!-- run: h200-grid.jsonl grid fwd bf16 -->
    ...a table that this script writes...
    <!-- end -->

and names a file of benchmarks/results, then what to show: `grid DIRECTION DTYPE` (speed by length and head size),
`cases GROUP` (a line a case), `features` (what each costs), `accuracy` (errors beside cuDNN's), `decode` (beside a
copy), `train` (steps of benchmarks.train), `step` (of benchmarks.step), `parallel` (of several devices), `module` (of
benchmarks.module), `memory` (by length), `losses` (of benchmarks.fp8_training) or `peers` (all that were timed, a line
a case). The pictures in docs/pictures are drawn from the same files, those of `peers` apart. `--check` writes nothing
and fails where a page and its run disagree.

After a new run: copy its files over those in benchmarks/results, run this, look at the pages and pictures (only those
that a page shows are kept).
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from .report import LABELS, pictures, read

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- run: (\S+) (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def origin(rows: list[dict[str, Any]], name: str) -> str:
    runs = dict.fromkeys(f"{row['date']}, commit {row['commit']}" for row in rows)
    where = f"{rows[0]['device']}, {' and '.join(runs)}, JAX {rows[0]['jax']}"
    return f"\n{where}: `benchmarks/results/{name}`.\n"


def cell(rows: list[dict[str, Any]], **key: Any) -> str:
    """Our speed, and in brackets the ratio to cuDNN's in the same run."""
    match = [row for row in rows if all(row[field] == value for field, value in key.items())]
    speed = {row["impl"]: row["tflops"] for row in match if "tflops" in row}
    if "jax_flash" not in speed:
        return "-"
    ratio = f" ({speed['jax_flash'] / speed['cudnn']:.2f})" if "cudnn" in speed else ""
    return f"{speed['jax_flash']:.0f}{ratio}"


def grid(rows: list[dict[str, Any]], direction: str, *dtype: str) -> list[str]:
    wanted = {"group": "grid", "dir": direction, "dtype": " ".join(dtype)}
    rows = [row for row in rows if wanted.items() <= row.items()]
    lengths = sorted({row["S"] for row in rows})
    lines = [
        f"| TFLOP/s (x cuDNN) | {' | '.join(f'S {length}' for length in lengths)} |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for dim in sorted({row["D"] for row in rows}):
        for causal in (0, 1):
            cells = [cell(rows, D=dim, causal=causal, S=length) for length in lengths]
            lines.append(f"| head size {dim}, {'causal' if causal else 'full'} | {' | '.join(cells)} |")
    return lines


def cases(rows: list[dict[str, Any]], group: str) -> list[str]:
    rows = [row for row in rows if row["group"] == group]
    lines = ["| case | TFLOP/s (x cuDNN) | kernel ms | wall ms |", "|---|---|---|---|"]
    for row in rows:
        if row["impl"] == "jax_flash" and "tflops" in row:
            kernel = f"{row['kernel_ms']:.3f}" if row["kernel_ms"] else "-"
            lines.append(f"| {row['case']} | {cell(rows, case=row['case'])} | {kernel} | {row['wall_ms']:.3f} |")
    return lines


def features(rows: list[dict[str, Any]]) -> list[str]:
    """Kernel time of each feature as a multiple of the plain call's."""
    rows = [row for row in rows if row["group"] == "features" and row["impl"] == "jax_flash" and "tflops" in row]
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        feature = row["case"].split(" causal")[1].strip() or "plain"
        times.setdefault(feature, {})[row["dir"]] = row["kernel_ms"]
    lines = ["| one more argument | forward | backward |", "|---|---|---|"]
    for feature, time in times.items():
        cells = [
            f"{time[way]:.3f} ms (x {time[way] / times['plain'][way]:.2f})" if way in time else "-"
            for way in ("fwd", "bwd")
        ]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return lines


def rms(values: list[float]) -> float:
    return math.sqrt(statistics.fmean(x * x for x in values))


def accuracy(rows: list[dict[str, Any]]) -> list[str]:
    """Relative errors against float64, root mean square over the draws, and the ratio to cuDNN's in the same run: in
    brackets, with the least and the largest of any draw."""
    rows = [row for row in rows if row["group"] == "accuracy"]
    names = ["out", "dq", "dk", "dv"]
    lines = [f"| relative error (x cuDNN's) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    draws: dict[str, dict[str, dict[str, list[float]]]] = {}  # case, result, implementation
    for row in rows:
        results = draws.setdefault(re.sub(r" draw \d+", "", row["case"]), {})
        for name in names:
            if f"error_{name}" in row:
                results.setdefault(name, {}).setdefault(row["impl"], []).append(row[f"error_{name}"])
    for case, results in draws.items():
        cells = []
        for name in names:
            ours, theirs = (results.get(name, {}).get(impl, []) for impl in ("jax_flash", "cudnn"))
            text = f"{rms(ours):.1e}" if ours else "-"
            if ours and theirs:
                each = [a / b for a, b in zip(ours, theirs, strict=True)]
                spread = f"; {min(each):.2f} to {max(each):.2f}" if len(each) > 1 else ""
                text += f" ({rms(ours) / rms(theirs):.2f}{spread})"
            cells.append(text)
        lines.append(f"| {case.removeprefix('bwd ')} | {' | '.join(cells)} |")
    return lines


def train(rows: list[dict[str, Any]]) -> list[str]:
    """Milliseconds a training step by sequence length, and how many times as fast ours is."""
    one = {"group": "train", "parallel": "jit", "devices": 1}
    rows = [row for row in rows if one.items() <= row.items()]
    names = [name for name in LABELS if any(row["impl"] == name for row in rows)]
    lines = [f"| ms a step | {' | '.join(LABELS[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for length in sorted({row["T"] for row in rows}):
        by_name = {row["impl"]: row for row in rows if row["T"] == length}
        ours = by_name["jax_flash"]
        cells = [f"{ours['step_ms']:.1f} ({ours['GiB']:.0f} GiB)"]
        for name in names[1:]:
            row = by_name.get(name, {})
            speed = (
                f"{row['step_ms']:.1f} (x {row['step_ms'] / ours['step_ms']:.2f}, {row['GiB']:.0f} GiB)"
                if "step_ms" in row
                else ""
            )
            cells.append(speed or row.get("failed", "-"))
        lines.append(f"| T {length} | {' | '.join(cells)} |")
    return lines


def step(rows: list[dict[str, Any]]) -> list[str]:
    """What of a training step's kernels is attention, and how much longer that takes by copies and casts around it."""
    lines = [
        "| step | all kernels, ms | attention's, ms | copies, transposes, casts around them |",
        "|---|---|---|---|",
    ]
    for row in rows:
        moved = f"{len(row['moves'])}: {row['moves_ms'] / row['attention_ms']:.1%} of attention's time"
        lines.append(
            f"| {row['case'].removeprefix('step ')} | {row['all_ms']:.1f} | {row['attention_ms']:.2f} | {moved} |"
        )
    return lines


def parallel(rows: list[dict[str, Any]]) -> list[str]:
    """Data-parallel training steps, and the throughput as a multiple of one device's."""
    rows = [row for row in rows if row["group"] == "train" and "step_ms" in row]
    lines = ["| data parallel | devices | ms a step | tokens/s (x one device) |", "|---|---|---|---|"]
    for row in rows:
        (alone,) = (r for r in rows if (r["T"], r["parallel"], r["devices"]) == (row["T"], row["parallel"], 1))
        speed = f"{row['tokens_s']:,.0f} ({row['tokens_s'] / alone['tokens_s']:.2f})"
        lines.append(f"| {row['parallel']}, T {row['T']} | {row['devices']} | {row['step_ms']:.1f} | {speed} |")
    return lines


def decode(rows: list[dict[str, Any]]) -> list[str]:
    """Bytes of the cache a second, beside a copy in the same run, and the time beyond the kernels."""
    lines = ["| one token | TB/s | of a copy | kernel ms | wall ms |", "|---|---|---|---|---|"]
    for row in rows:
        if row["group"] == "decode" and "cache_tbs" in row:
            rate = f"{row['cache_tbs']:.2f} | {row['cache_tbs'] / row['copy_tbs']:.0%}"
            lines.append(f"| {row['impl']} | {rate} | {row['kernel_ms']:.3f} | {row['wall_ms']:.3f} |")
    return lines


def module(rows: list[dict[str, Any]]) -> list[str]:
    """A module's step by the clock, and what of it its kernels take."""
    lines = ["| step | kernels, us | clock, us | beyond the kernels, us |", "|---|---|---|---|"]
    for row in rows:
        kernels, clock = row["kernel_ms"] * 1e3, row["wall_ms"] * 1e3
        lines.append(f"| {row['case']} | {kernels:.0f} | {clock:.0f} | {clock - kernels:.0f} |")
    return lines


def memory(rows: list[dict[str, Any]]) -> list[str]:
    """MiB that forward and backward need beside operands and results, by sequence length."""
    mib = {(row["impl"], row["S"]): row["scratch_MiB"] for row in rows if "scratch_MiB" in row}
    names = [name for name in LABELS if any(impl == name for impl, _ in mib)]
    lines = [f"| MiB | {' | '.join(LABELS[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for length in sorted({s for _, s in mib}):
        cells = [f"{mib[name, length]:.0f}" if (name, length) in mib else "-" for name in names]
        lines.append(f"| S {length} | {' | '.join(cells)} |")
    return lines


def peers(rows: list[dict[str, Any]]) -> list[str]:
    """Everyone's speed in each case."""
    speed = {(row["impl"], row["case"]): row["tflops"] for row in rows if "tflops" in row}
    names = [name for name in LABELS if any(impl == name for impl, _ in speed)]
    lines = [f"| TFLOP/s | {' | '.join(LABELS[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for case in dict.fromkeys(case for _, case in speed):
        figures = [f"{speed[name, case]:.0f}" if (name, case) in speed else "-" for name in names]
        lines.append(f"| {case} | {' | '.join(figures)} |")
    return lines


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """Where training with each kind of forward pass ends."""
    lines = ["| forward pass | steps | mean loss of the last 50 |", "|---|---|---|"]
    return lines + [f"| {row['impl']} | {row['steps']} | {row['last']:.4f} |" for row in rows if "losses" in row]


_KINDS = (grid, cases, features, accuracy, train, step, parallel, decode, module, memory, peers, losses)
KINDS = {kind.__name__: kind for kind in _KINDS}


def quoted(text: str) -> str:
    """The page with every block written anew."""

    def block(match: re.Match[str]) -> str:
        start, name, what, end = match.groups()
        rows = read(RESULTS / name)
        kind, *arguments = what.split()
        lines = KINDS[kind](rows, *arguments)
        return start + "\n".join(lines) + "\n" + origin(rows, name) + end

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [page for page in PAGES if page.exists() and quoted(page.read_text()) != page.read_text()]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} disagrees with its run: python -m benchmarks.quote", file=sys.stderr)
        else:
            page.write_text(quoted(page.read_text()))
    if not check:
        blocks = [block for page in PAGES if page.exists() for block in BLOCK.findall(page.read_text())]
        for run in sorted({name for _, name, what, _ in blocks if what != "peers"}):
            for picture in pictures(read(RESULTS / run), PICTURES):
                if any(picture.name in page.read_text() for page in PAGES):
                    print(f"picture: {picture.relative_to(ROOT)}")
                else:
                    picture.unlink()
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
