"""Machine code of the kernels of a call: python tools/sass.py [options of `python -m jax_flash explain`].

Prints how often the instructions appear that decide the speed, and keeps the listing in build/sass. Needs nvdisasm.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path

from jax_flash.__main__ import arch_name, argument_parser, plans
from jax_flash.extension import native

FOLDER = Path(__file__).parent.parent / "build" / "sass"
OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", re.MULTILINE)
COUNTED = ("HGMMA", "QGMMA", "HMMA", "MUFU", "FFMA", "LDSM", "LDGSTS", "UTMALDG", "LDL", "STL", "BAR", "SYNCS")


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
            listing = subprocess.run(["nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
            cubin.with_suffix(".sass").write_text(listing)
            found = collections.Counter(OPCODE.findall(listing))
            counts = ", ".join(f"{name} {found[name]}" for name in COUNTED if found[name])
            print(f"{direction}, {kernel['entry']}, {arch_name(arch)}: {sum(found.values())} instructions; {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
