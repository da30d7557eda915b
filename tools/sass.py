"""Machine code of the kernels of a call: python tools/sass.py [options of `python -m jax_flash explain`].

Prints how often the instructions appear that decide the speed, and how long one warp alone would take for a step of the
main loop; keeps the listing in build/sass. Needs nvdisasm.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

from jax_flash.__main__ import arch_name, argument_parser, plans
from jax_flash.extension import native

FOLDER = Path(__file__).parent.parent / "build" / "sass"
LINE = re.compile(r"^(\.L_\w+):|/\*([0-9a-f]+)\*/\s+(.*?);\s+/\* 0x\w+ \*/\s+/\* 0x(\w+) \*/", re.MULTILINE)
COUNTED = ("HGMMA", "QGMMA", "HMMA", "MUFU", "FFMA", "LDSM", "LDGSTS", "UTMALDG", "LDL", "STL", "BAR", "SYNCS")
PRODUCTS = ("HGMMA", "QGMMA", "HMMA")
# Cycles until the result of what a scoreboard waits for; about so, without contention.
LATENCY = {"MUFU": 18, "SHFL": 24, "LDS": 30, "LDSM": 33, "LDC": 30, "SYNCS": 30, "STSM": 20, "LDG": 400}
MUFU_CYCLES = 8  # a warp's share of the special-function unit


@dataclasses.dataclass
class Instruction:
    """A line of the listing; the compiler says in it when the next one may start, and what it waits for."""

    address: int
    text: str
    control: int
    target: int | None = None  # of a branch

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split()[0].split(".")[0]


def instructions(listing: str) -> list[Instruction]:
    code, labels = [], {}
    for label, at, text, high in LINE.findall(listing):
        if label:
            labels[label] = code[-1].address + 16 if code else 0
        else:
            code.append(Instruction(int(at, 16), text, int(high, 16) >> 41))
    for x in code:
        if x.name == "BRA":
            x.target = labels[re.search(r"`\((.*?)\)", x.text)[1]]
    return code


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """One pass of the innermost loop with a quarter of the products, by branches past whatever has none."""

    def products(part: list[Instruction]) -> int:
        return sum(x.name in PRODUCTS for x in part)

    last_end = {x.target: x.address for x in code if x.target is not None and x.target < x.address}
    loops = [[x for x in code if start <= x.address <= end] for start, end in last_end.items()]
    step = min((loop for loop in loops if 4 * products(loop) >= products(code) > 0), key=len, default=[])
    for x in list(step):
        passed = [y for y in step if x.target is not None and x.address < y.address < x.target]
        if passed and x in step and x.target <= step[-1].address and not products(passed):
            step = [y for y in step if y not in passed]
    return step


def cycles(step: list[Instruction]) -> int:
    """Of one warp that never waits for products, other warps or global memory."""
    time = unit_free = 0
    ready = [0] * 8  # the six scoreboards; 7: none
    for x in step:
        stall, written, read = x.control & 15, x.control >> 5 & 7, x.control >> 8 & 7
        time = max(time, *(ready[i] for i in range(6) if x.control >> 11 + i & 1), 0)
        if x.name == "MUFU":
            time = max(time, unit_free)
            unit_free = time + MUFU_CYCLES
        ready[written] = max(ready[written], time + LATENCY.get(x.name, 15))
        ready[read] = max(ready[read], time + 10)
        time += max(1, stall)
    return time


def main(arguments: list[str]) -> int:
    if not shutil.which("nvdisasm"):
        sys.exit("no nvdisasm on the path: it comes with NVIDIA's CUDA toolkit")
    try:
        native().nvrtc()
    except RuntimeError as error:
        sys.exit(str(error))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for direction, arch, plan in plans(argument_parser().parse_args(["explain", *arguments])):
        for kernel in plan.get("kernels", ()):
            made = native().compile(kernel["source"], kernel["entry"], kernel["variant"], arch)
            cubin = FOLDER / f"{kernel['entry']}-{arch}.cubin"
            cubin.write_bytes(made["cubin"])
            command = ["nvdisasm", "-c", "-hex", cubin]
            listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            cubin.with_suffix(".sass").write_text(listing)
            code = instructions(listing)
            found = collections.Counter(x.name for x in code)
            counts = ", ".join(f"{name} {found[name]}" for name in COUNTED if found[name])
            print(f"{direction}, {kernel['entry']}, {arch_name(arch)}: {len(code)} instructions; {counts}")
            if step := main_loop(code):
                print(f"  main loop: {len(step)} instructions, {cycles(step)} cycles of one warp")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
