"""The disk cache of compiled kernels: whatever is wrong with it costs time, never a result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jax_flash import extension

KERNEL = """
#include "factor.h"
extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= kFactor * kScale; }
"""

# Compiles variants with the cache it is told. Prints, as JSON, for each: digest of the cubin, was it cached, log.
# Loads the extension without jax_flash, to start quickly.
PROGRAM = """
import hashlib, importlib.util, json, sys
native_path, kernels, cache, variants, nvrtc = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("_native", native_path)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
native.configure(nvrtc=nvrtc, kernels=kernels, cache=cache, dump="")
made = [native.compile("twice.cuh", "twice", f"constexpr float kScale = {i};", 90) for i in range(variants)]
print(json.dumps([[hashlib.sha256(m["cubin"]).hexdigest(), m["cached"], m["log"]] for m in made]))
"""


def start(kernels: Path, cache: Path | str, variants: int = 1, within: tuple = (), **options) -> subprocess.Popen:
    arguments = [extension.native().__file__, str(kernels), str(cache), variants, extension.nvrtc_candidates()]
    command = [*within, sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen) -> tuple[list, str]:
    """What was compiled, and what was said on standard error."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out), err


def compile_apart(*args, **options) -> tuple[list, str]:
    return finish(start(*args, **options))


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def is_whole(entry: Path) -> bool:
    content = entry.read_bytes()
    return content[:32] == hashlib.sha256(content[32:]).digest()


def warned_once(said: str) -> bool:
    return said.startswith("jax_flash: the kernel cache") and len(said.splitlines()) == 1


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "twice.cuh").write_text(KERNEL)
    (folder / "factor.h").write_text("constexpr float kFactor = 2;\n")
    return folder


@pytest.fixture(scope="module")
def filled(kernels, tmp_path_factory) -> tuple[Path, str]:
    """A cache with one entry, and the digest of its cubin."""
    cache = tmp_path_factory.mktemp("parent") / "cache"
    ((digest, cached, _),), said = compile_apart(kernels, cache)
    assert not cached
    assert not said
    return cache, digest


@pytest.fixture
def cache(filled, tmp_path) -> Path:
    return Path(shutil.copytree(filled[0], tmp_path / "cache"))


def test_a_second_process_compiles_nothing(kernels, filled):
    ((digest, cached, log),), said = compile_apart(kernels, filled[0])
    assert (digest, cached) == (filled[1], True)
    assert "registers" in log
    assert not said


def test_only_the_user_can_read_it(filled):
    assert stat.S_IMODE(filled[0].stat().st_mode) == 0o700
    (entry,) = entries(filled[0])
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert is_whole(entry)


def truncated(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-1])


def emptied(entry: Path) -> None:
    entry.write_bytes(b"")


def bit_flipped(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 4
    entry.write_bytes(content)


def writable_by_others(entry: Path) -> None:
    entry.chmod(0o622)


def foreign_owned(entry: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(entry, 12345, 12345)


def linked(entry: Path) -> None:
    elsewhere = entry.parent.parent / "elsewhere"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "damage",
    [truncated, emptied, bit_flipped, writable_by_others, foreign_owned, linked],
    ids=lambda damage: damage.__name__,
)
def test_a_bad_entry_is_ignored_then_replaced(kernels, filled, cache, damage):
    damage(entries(cache)[0])
    ((digest, cached, _),), said = compile_apart(kernels, cache)
    assert (digest, cached) == (filled[1], False)
    assert warned_once(said)
    ((digest, cached, _),), said = compile_apart(kernels, cache)
    assert (digest, cached) == (filled[1], True)
    assert not said


def test_an_unreadable_entry_is_ignored(kernels, filled, cache):
    (entry,) = entries(cache)
    entry.unlink()
    entry.mkdir()
    ((digest, cached, _),), said = compile_apart(kernels, cache)
    assert (digest, cached) == (filled[1], False)
    assert warned_once(said)
    assert entries(cache) == [entry]


def test_a_folder_that_others_can_write_is_ignored(kernels, filled, cache):
    cache.chmod(0o777)
    ((digest, cached, _),), said = compile_apart(kernels, cache)
    assert (digest, cached) == (filled[1], False)
    assert warned_once(said)


def test_a_folder_that_cannot_be_made_is_ignored(kernels, filled, tmp_path):
    (tmp_path / "file").write_text("")
    made, said = compile_apart(kernels, tmp_path / "file" / "cache", variants=2)
    assert made[0][0] == filled[1]
    assert [cached for _, cached, _ in made] == [False, False]
    assert warned_once(said)


def test_a_full_disk_leaves_nothing_behind(kernels, filled, tmp_path):
    cache = tmp_path / "cache"
    small_files_only = ("sh", "-c", 'ulimit -f 1; exec "$@"', "sh")
    made, said = compile_apart(kernels, cache, variants=2, within=small_files_only)
    assert made[0][0] == filled[1]
    assert warned_once(said)
    assert entries(cache) == []


def test_no_folder_means_no_cache(kernels, filled, tmp_path):
    ((digest, cached, _),), said = compile_apart(kernels, "", cwd=tmp_path)
    assert (digest, cached) == (filled[1], False)
    assert not said
    assert entries(tmp_path) == []


def test_eight_processes_fill_it_at_once(kernels, tmp_path):
    cache = tmp_path / "cache"
    results = [finish(process) for process in [start(kernels, cache, variants=3) for _ in range(8)]]
    assert not any(said for _, said in results)
    assert len({tuple(digest for digest, *_ in made) for made, _ in results}) == 1
    assert len(entries(cache)) == 3
    assert all(map(is_whole, entries(cache)))


def test_the_key_covers_what_is_included_and_no_more(kernels, filled, cache, tmp_path):
    changed = Path(shutil.copytree(kernels, tmp_path / "changed"))
    (changed / "other.cuh").write_text("of another kernel")
    ((digest, cached, _),), _ = compile_apart(changed, cache)
    assert (digest, cached) == (filled[1], True)
    (changed / "factor.h").write_text("constexpr float kFactor = 3;\n")
    ((digest, cached, _),), _ = compile_apart(changed, cache)
    assert digest != filled[1]
    assert not cached
    assert len(entries(cache)) == 2
