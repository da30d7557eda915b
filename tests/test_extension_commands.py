"""python -m jax_flash doctor, explain, precompile."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from jax_flash import __main__ as commands
from jax_flash import extension


def test_explain_names_the_kernel_and_its_sizes(capsys):
    assert commands.main(["explain", "--head-dim", "64", "--causal", "--arch", "8.0"]) == 0
    forward = capsys.readouterr().out.partition("backward")[0]
    assert forward.startswith("forward on compute capability 8.0: sm80_forward\n  tile ")
    assert "kernel     sm80_forward (sm80/forward.cuh): 128 threads, " in forward


def test_explain_says_why_not(capsys):
    assert commands.main(["explain", "--head-dim", "512", "--arch", "9.0"]) == 0
    assert "forward on compute capability 9.0: XLA, " in capsys.readouterr().out


def test_explain_covers_each_gradient(capsys):
    commands.main(["explain", "--bias", "--arch", "8.0"])
    titles = [line.partition(" on ")[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert titles == ["forward", "backward", "bias gradient"]


@pytest.mark.parametrize("words, scores", [(["--fp8"], "e4m3"), (["--fp8", "int8"], "int8")])
def test_explain_covers_both_steps_of_fp8(capsys, words, scores):
    commands.main(["explain", *words, "--arch", "9.0"])
    said = capsys.readouterr().out
    assert "quantize on compute capability 9.0: quantize\n" in said
    assert f"forward on compute capability 9.0: sm90_forward_fp8\n  scores     {scores}\n" in said


def test_every_option_reaches_the_attributes():
    def attributes(*words):
        options = commands.argument_parser().parse_args(["explain", *words])
        return {call.title: call.attributes for call in commands.custom_calls(options)}

    plain = attributes()["forward"]
    for option, changed in {
        "--batch 2": {"batch"},
        "--q-len 64 --kv-len 128": {"q_len", "kv_len"},
        "--heads 8 --kv-heads 4": {"q_heads", "kv_heads"},
        "--head-dim 64 --value-dim 32": {"head_dim", "value_dim", "scale"},
        "--dtype float16": {"dtype"},
        "--causal": {"causal"},
        "--window 5 -1": {"window_left"},
        "--softcap 30": {"softcap"},
        "--dropout-rate 0.1": {"dropout_rate"},
        "--deterministic": {"deterministic"},
        "--kv-splits 4": {"kv_splits"},
        "--q-offset": {"q_offset"},
        "--segment-ids": {"segment_ids"},
        "--q-lengths": {"q_lengths"},
        "--kv-lengths": {"kv_lengths"},
        "--mask": {"mask"},
        "--bias": {"bias_dtype"},
        "--alibi-slopes": {"alibi"},
        "--sinks": {"sinks"},
        "--lse-gradient": set(),
    }.items():
        other = attributes(*option.split())["forward"]
        assert {name for name in plain if plain[name] != other[name]} == changed
    assert attributes("--lse-gradient")["backward"]["lse_cotangent"]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--arch 9", "--arch: expected a compute capability such as 9.0, got '9'"),
        ("--head-dim 0", "--head-dim: expected a number from 1 "),
        ("--dropout-rate 1", "--dropout-rate: expected a number from 0 to below 1, got 1"),
        ("--window -2 0", "--window: expected a number from -1 "),
    ],
)
def test_wrong_options(words, said, capsys):
    with pytest.raises(SystemExit):
        commands.main(["explain", *words.split()])
    assert f"error: argument {said}" in capsys.readouterr().err


def test_head_sizes_are_filled_up(capsys):
    assert commands.main(["explain", "--head-dim", "60", "--arch", "8.0"]) == 0
    assert "forward on compute capability 8.0: sm80_forward\n" in capsys.readouterr().out


def test_what_is_missing_is_one_line(monkeypatch, tmp_path, capsys):
    def missing():
        raise ImportError("no extension")

    (tmp_path / "file").touch()
    monkeypatch.setenv(extension.CACHE_DIR, str(tmp_path / "file" / "cache"))
    assert commands.main(["precompile", "--arch", "8.0"]) == 1
    assert capsys.readouterr().err.startswith("python -m jax_flash: [Errno ")
    monkeypatch.setattr(extension, "native", missing)
    assert commands.main(["explain", "--arch", "8.0"]) == 1
    assert capsys.readouterr().err == "python -m jax_flash: no extension\n"


def test_precompile_fills_the_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(extension.CACHE_DIR, str(tmp_path))
    native = extension.native()
    extension.configure(native)
    try:
        words = ["precompile", "--head-dim", "64", "--arch", "8.0"]
        assert commands.main(words) == 0
        assert "sm80_forward for compute capability 8.0: compiled, " in capsys.readouterr().out
        assert commands.main(words) == 0
        assert ": compiled, " not in capsys.readouterr().out
    finally:
        monkeypatch.undo()
        extension.configure(native)


def test_precompile_fails_where_nothing_was_compiled(capsys):
    assert commands.main(["precompile", "--head-dim", "512", "--arch", "9.0"]) == 1
    assert "no kernel" in capsys.readouterr().out


def test_doctor_advises_on_each_missing_thing(capsys):
    try:
        extension.native().devices()
        pytest.skip("nothing is missing here")
    except RuntimeError:
        pass
    assert commands.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(
        after.startswith("        -> ") for line, after in itertools.pairwise(lines) if line.startswith("MISSING")
    )
    assert any(line.startswith("MISSING driver: no NVIDIA driver") for line in lines)
    assert any(line.startswith("ok      NVRTC: ") for line in lines)
    assert any(line.startswith("ok      a kernel compiles: sm80_forward") for line in lines)


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "jax_flash", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("doctor", "explain", "precompile"))


def test_importing_jax_flash_is_quick():
    """At most 0.3 s more than importing jax, in the best of three processes."""
    program = "import time, jax; begin = time.perf_counter(); import jax_flash; print(time.perf_counter() - begin)"
    times = [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(3)]
    assert min(times) < 0.3
