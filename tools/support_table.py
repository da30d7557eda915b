"""Writes docs/support.md from the planner itself: which kernel runs which call, on which GPUs.

`--check` writes nothing and fails if the page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jax_flash import extension
from jax_flash.__main__ import ARCHS, add_call_options, custom_calls

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
GPUS = {80: "A100", 86: "RTX 30", 89: "Ada, L4", 90: "Hopper", 100: "B200", 120: "RTX 50"}
SIZES = ["32", "64", "72", "96", "128", "192", "192 --value-dim 128", "256", "264"]
FEATURES = {
    "none": "",
    "causal": "--causal",
    "causal, q_offset": "--causal --q-offset",
    "window": "--window 128 0",
    "segment_ids": "--segment-ids",
    "q_lengths, kv_lengths": "--q-lengths --kv-lengths",
    "mask": "--mask",
    "bias": "--bias",
    "alibi_slopes": "--alibi-slopes",
    "softcap": "--softcap 30",
    "sinks": "--sinks",
    "dropout": "--dropout-rate 0.1",
    "grouped heads": "--kv-heads 4",
    "one query, 16 key splits": "--q-len 1 --kv-len 8192 --kv-heads 4 --kv-splits 16",
    "cotangent of the lse": "--lse-gradient",
    "deterministic": "--deterministic",
}
HEAD = """# What has a kernel

Generated from the planner by `python tools/support_table.py`. A name is the kernel that runs the call;
a dash means plain XLA where `implementation` is None, and an error with the reason where it is `"cuda"`. Other head
sizes are padded with zeros.
"""


def kernels(arguments: str, arch: int) -> dict[str, str]:
    """Kernel name of each custom call of an attention and its gradient; an empty name where there is none."""
    parser = argparse.ArgumentParser()
    add_call_options(parser)
    names = {}
    for call in custom_calls(parser.parse_args(arguments.split())):
        plan = extension.native().plan(call.target, call.attributes, arch)
        names[call.title] = plan.get("name", "")
    return names


def table(head: str, rows: dict[str, str]) -> list[str]:
    """A table a direction: rows of calls, a column a GPU."""
    lines = []
    for title in ("forward", "backward"):
        lines += [f"\n## {head}, {title}\n"]
        lines += [f"| | {' | '.join(f'{GPUS[arch]} (sm_{arch})' for arch in ARCHS)} |", "|---" * (len(ARCHS) + 1) + "|"]
        for row, arguments in rows.items():
            cells = [kernels(arguments, arch).get(title, "") for arch in ARCHS]
            lines.append(f"| {row} | {' | '.join(f'`{cell}`' if cell else '-' for cell in cells)} |")
    return lines


def page() -> str:
    sizes = {size.replace(" --value-dim ", ", value size "): f"--head-dim {size}" for size in SIZES}
    lines = table("Head sizes", sizes) + table("Features, at head size 128", FEATURES)
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = page()
    if check:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print(f"{PAGE.name} is out of date: run python tools/support_table.py", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
