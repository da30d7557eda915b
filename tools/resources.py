"""Registers, spills and shared memory of every variant of the support table; run as a program, it writes the table.

Nothing runs on a GPU: NVRTC compiles for all architectures anywhere.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, get_type_hints

from jax_flash.__main__ import ARCHS, arch_name, argument_parser, plans
from jax_flash.extension import native

TABLE = Path(__file__).parent.parent / "tests" / "resources.csv"

HEAD_SIZES = ("--head-dim 64", "--head-dim 96", "--head-dim 128", "--head-dim 192 --value-dim 128", "--head-dim 256")
FEATURES = (
    "--window 1024 0",
    "--q-offset",
    "--segment-ids",
    "--q-lengths --kv-lengths",
    "--mask",
    "--bias",
    "--alibi-slopes",
    "--softcap 30",
    "--sinks",
    "--dropout-rate 0.1",
    "--kv-heads 4",
    "--deterministic",
    "--lse-gradient",
)
ALL_FEATURES = "all features"
# What CI compiles: every kernel in its plainest form, and with everything at once.
SAMPLE = (
    "--head-dim 64 --causal",
    "--head-dim 128",
    f"--head-dim 128 --causal {ALL_FEATURES}",
    "--head-dim 128 --causal --fp8",
    "--head-dim 128 --causal --fp8 int8",
)
ALL = tuple(
    dict.fromkeys(
        [
            *SAMPLE,
            *(f"{size}{causal}" for size in HEAD_SIZES for causal in ("", " --causal")),
            *(f"--head-dim 96 --value-dim 128{causal}" for causal in ("", " --causal")),
            "--head-dim 128 --causal --dtype float16",
            *(f"--head-dim 128{causal} --q-len 8192 --kv-len 8192" for causal in ("", " --causal")),
            *(f"--head-dim {size} --causal --batch 1 --q-len 16384 --kv-len 16384" for size in (64, 128, 256)),
            *(f"--head-dim {size} --causal --batch 32 --q-len 512 --kv-len 512" for size in (64, 128, 256)),
            *(f"--head-dim {size} --causal --fp8{scores}" for size in (64, 128, 256) for scores in ("", " int8")),
            *(f"--head-dim 128 --causal {feature}" for feature in FEATURES),
            *(f"{size} --causal {ALL_FEATURES}" for size in HEAD_SIZES),
            *(f"--head-dim {call} --deterministic" for call in ("64", "96", "128 --mask")),
            *(f"--head-dim 96 --causal {feature}" for feature in ("--mask", "--dropout-rate 0.1", "--window 1024 0")),
            *(
                f"--head-dim {size} --causal --q-len 1 --kv-len 8192 --kv-heads 4 --q-offset --kv-lengths"
                for size in (64, 128, 256)
            ),
        ]
    )
)


class Row(NamedTuple):
    arch: str
    call: str  # options of `python -m jax_flash explain`, or ALL_FEATURES for those of FEATURES
    direction: str
    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int  # dynamic
    threads: int
    waits: str  # ptxas's codes for products of wgmma that it made wait: C7519, ...

    @property
    def key(self) -> tuple[str, ...]:
        return self[:4]


def plans_of(call: str, arch: int):
    """Of an attention call and its gradient on one architecture, as `jax_flash.__main__.plans` has them."""
    words = call.replace(ALL_FEATURES, " ".join(FEATURES)).split()
    return plans(argument_parser().parse_args(["explain", *words, "--arch", arch_name(arch)]))


def measure(call: str, arch: int) -> list[Row]:
    """The rows of one call."""
    rows = []
    for direction, _, plan in plans_of(call, arch):
        for kernel in plan.get("kernels", ()):
            log = native().compile(kernel["source"], kernel["entry"], kernel["variant"], arch)["log"]
            waits = " ".join(sorted(set(re.findall(r"C75\d\d", log))))
            log = log.partition(f"Compiling entry function '{kernel['entry']}'")[2].partition("Compiling entry")[0]
            (registers,) = re.findall(r"Used (\d+) registers", log)
            spills = map(int, re.findall(r"(\d+) bytes spill", log))
            sizes = int(registers), sum(spills), kernel["shared_bytes"], kernel["threads"]
            rows.append(Row(arch_name(arch), call, direction, kernel["entry"], *sizes, waits))
    return rows


def measure_all(calls: Iterable[str]) -> list[Row]:
    jobs = list(itertools.product(calls, ARCHS))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return sorted({row for rows in pool.starmap(measure, jobs, chunksize=1) for row in rows})  # plans share kernels


def nvrtc_version() -> str:
    return "NVRTC {}.{}".format(*native().nvrtc()["version"])


def write(rows: list[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# {nvrtc_version()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


def read() -> dict[tuple[str, ...], Row]:
    kinds = get_type_hints(Row)
    with TABLE.open(newline="") as file:
        file.readline()
        rows = [Row(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]
    return {row.key: row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compiles every variant of the support table and writes what it needs."
    )
    parser.add_argument("--sample", action="store_true", help="only what CI compiles; the rest of the table stays")
    calls = SAMPLE if parser.parse_args().sample else ALL
    try:
        version = nvrtc_version()
    except RuntimeError as error:
        parser.exit(2, f"{error}\n")
    rows = measure_all(calls)
    kept = [row for row in read().values() if row.call not in calls and row.call in ALL] if TABLE.exists() else []
    write(sorted(rows + kept))
    for row in rows:
        if row.spill_bytes or row.waits:
            print(f"{row.spill_bytes} bytes spilled {row.waits}", *row.key)
    print(f"{len(rows)} kernels by {version}, {sum(row.spill_bytes > 0 for row in rows)} spill; wrote {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
