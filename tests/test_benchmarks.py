"""The benchmark tool: the answers it compares with are right, a wrong one is noticed, its lines can be quoted."""

import json

import jax
import numpy as np
import pytest

from benchmarks import __main__ as tool
from benchmarks import check, compilation, module, quote, report, step
from benchmarks.cases import Case, named
from benchmarks.peers import PEERS, Skip

CASES = {
    "full": Case("t", 2, 160, 160, 2, 2, 16, "f32", "bwd"),
    "causal grouped": Case("t", 2, 160, 160, 4, 2, 16, "f32", "bwd", True),
    "window": Case("t", 1, 160, 160, 2, 2, 16, "f32", "bwd", True, window=20),
    "documents": Case("t", 1, 160, 160, 2, 2, 16, "f32", "bwd", True, documents=4),
    "outliers": Case("t", 1, 160, 160, 2, 2, 16, "f32", "bwd", True, outliers=True),
    "decode": Case("t", 2, 1, 160, 4, 2, 16, "f32"),
}


def results(case):
    *operands, cotangent = case.arrays()
    out, pullback = jax.vjp(PEERS["jax_flash"](case), *operands)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *pullback(cotangent)), strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("rows", [128, 160])
def test_right_answers_pass(case, rows, monkeypatch):
    monkeypatch.setattr(check, "BLOCK", 48)
    right = check.exact(case, case.arrays(), rows)
    found = check.errors(case, right, results(case))
    keys_known = case.causal or rows == case.q_len
    assert found.keys() == ({"out"} if case.direction == "fwd" else {"out", "dq", *(["dk", "dv"] * keys_known)})
    assert check.worst(case, found) < 1e-5


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("damage", [lambda x: x * 1.01, lambda x: x * np.nan], ids=["wrong", "nan"])
def test_a_wrong_answer_is_noticed(name, damage):
    case = CASES["causal grouped"]
    answers = results(case)
    answers[name] = damage(answers[name])
    with pytest.raises(AssertionError, match=f"error of {name}"):
        check.worst(case, check.errors(case, check.exact(case, case.arrays()), answers))


def test_quantised_operands_are_told_from_calls_that_quantise():
    case = Case("t", 2, 160, 160, 2, 2, 64, precision="quantised")
    line = tool.measure(case, ["jax_flash"])["jax_flash"]
    assert 0 < line["error"] < check.TOLERANCE["quantised"] and line["tflops"] > 0
    kinds = {case.precision: case.operands for case in named()["fp8"]}
    assert kinds == {"quantised": "e4m3", "fp8": "bf16 as e4m3"}


def test_quantise_gives_bytes_a_second(monkeypatch):
    results = [jax.numpy.zeros(1000, "float8_e4m3fn"), jax.numpy.zeros(1000)]  # types without a common one
    monkeypatch.setitem(tool.PEERS, "jax_flash", lambda case: lambda q, k, v: results)
    case = Case("t", 2, 160, 160, 2, 2, 64, precision="quantise")
    line = tool.measure(case, ["jax_flash"])["jax_flash"]
    assert line["moved_bytes"] == 3 * 2 * 160 * 2 * 64 * 2 + 5000
    assert line["quantise_tbs"] > 0 and "tflops" not in line and "error" not in line


def test_implementations_are_timed_in_turns(monkeypatch):
    order = []

    def take(watch, original=tool.timing.Stopwatch.take):
        order.append(watch)
        original(watch)

    monkeypatch.setattr(tool.timing.Stopwatch, "take", take)
    lines = tool.measure(CASES["full"], ["jax_flash", "xla"])
    assert [watch is order[0] for watch in order] == [True, False] * tool.timing.TURNS
    assert all(line["wall_ms"] > 0 and line["tflops"] > 0 for line in lines.values())


def test_one_failure_leaves_the_other_line(monkeypatch):
    monkeypatch.setitem(tool.PEERS, "xla", lambda case: 1 / 0)
    lines = tool.measure(CASES["full"], ["jax_flash", "xla"])
    assert lines["xla"] == {"failed": "ZeroDivisionError: division by zero"} and lines["jax_flash"]["tflops"] > 0


def test_compile_time_is_that_of_an_empty_cache(monkeypatch):
    folders = []
    monkeypatch.setattr(
        tool.timing.extension, "configure", lambda module: folders.append(tool.timing.extension.cache_folder())
    )
    monkeypatch.setattr(tool.timing.extension, "native", lambda: None)
    assert tool.compile_s(jax.jit(lambda x: x + 1), (1.0,)) > 0
    assert folders[0] != folders[1] == tool.timing.extension.cache_folder()


def test_every_case_has_its_own_name():
    for group, cases in named().items():
        assert len({str(case) for case in cases}) == len(cases), group


def test_every_peer_has_a_label_and_says_why_it_skips():
    assert PEERS.keys() <= report.LABELS.keys() == report.COLORS.keys()
    for name in PEERS.keys() - {"jax_flash", "xla"}:
        if jax.default_backend() != "gpu":
            with pytest.raises(Skip, match=r"needs a GPU|not installed"):
                tool.prepare(CASES["full"], name)


def test_a_run_of_the_memory_group_becomes_a_table_and_a_picture(tmp_path, monkeypatch):
    origin = {"device": "a GPU", "date": "2026-01-01", "commit": "abc", "jax": "0.11.2"}
    run = [("jax_flash", 4096, 64.0), ("jax_flash", 16384, 256.0), ("xla", 4096, 2048.0)]
    lines = [{"impl": impl, "group": "memory", "S": s, "scratch_MiB": mib} | origin for impl, s, mib in run]
    lines.append({"impl": "xla", "group": "memory", "S": 16384, "skipped": "does not fit"} | origin)
    case = {"impl": "jax_flash", "group": "grid", "dir": "fwd", "dtype": "f16", "D": 64, "causal": 0, "S": 512}
    lines.append(case | {"tflops": 1.0} | origin)  # no page shows its picture
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "page.md"
    page.write_text("![](pictures/memory.png)\n<!-- run: run.jsonl memory -->\n<!-- end -->")
    monkeypatch.setattr(quote, "RESULTS", tmp_path)
    monkeypatch.setattr(quote, "ROOT", tmp_path)
    monkeypatch.setattr(quote, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(quote, "PAGES", [page])
    monkeypatch.setattr("sys.argv", ["quote"])
    assert quote.main() == 0
    assert "| S 4096 | 64 | 2048 |" in page.read_text() and "| S 16384 | 256 | - |" in page.read_text()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["memory.png"]


def test_lines_become_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "named", lambda: {"grid": [CASES["full"]], "accuracy": list(CASES.values())[:2]})
    monkeypatch.setattr(
        "sys.argv", ["benchmarks", "grid", "--impl", "jax_flash", "xla", "--out", f"{tmp_path}/run.jsonl"]
    )
    assert tool.main() == 0
    rows = report.read(tmp_path / "run.jsonl")
    assert [row["impl"] for row in rows] == ["jax_flash", "xla"] and all(row["tflops"] > 0 for row in rows)

    def line(impl, **fields):
        origin = {"device": "a GPU", "date": "2026-01-01", "commit": "abc", "jax": "0.11.2", "matmul_tflops": 700}
        return json.dumps({"impl": impl} | origin | fields)

    grid = {"group": "grid", "dir": "fwd", "dtype": "bf16", "D": 64, "causal": 0, "S": 512, "case": "a"}
    exact = {"group": "accuracy", "case": "bwd bf16 D64"}
    plain = {"group": "features", "dir": "fwd", "case": "fwd D128 causal", "tflops": 1.0, "kernel_ms": 2.0}
    step = {"group": "train", "T": 1024, "parallel": "jit", "devices": 1, "step_ms": 10.0, "GiB": 3.0}
    lines = [
        line("jax_flash", tflops=400.0, **grid),
        line("cudnn", tflops=200.0, **grid),
        line("jax_flash", error_out=1e-3, **exact),
        line("cudnn", error_out=2e-3, **exact),
        line("jax_flash", error_out=3e-3, **exact | {"case": "bwd bf16 D64 draw 1"}),
        line("cudnn", error_out=1e-3, **exact | {"case": "bwd bf16 D64 draw 1"}),
        line("jax_flash", **plain),
        line("jax_flash", **plain | {"case": "fwd D128 causal softcap", "kernel_ms": 3.0}),
        line("jax_flash", **step),
        line("flax", **step | {"step_ms": 20.0}),
        line("jax_flash", group="decode", cache_tbs=3.6, copy_tbs=4.0, kernel_ms=0.3, wall_ms=0.31),
        line("jax_flash", group="memory", S=4096, scratch_MiB=5.0),
    ]
    (tmp_path / "run.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(quote, "RESULTS", tmp_path)
    shows = ("grid fwd bf16", "accuracy", "features", "train", "decode")
    page = quote.quoted("\n".join(f"<!-- run: run.jsonl {what} -->\n<!-- end -->" for what in shows))
    for figure in (
        "400 (2.00)",
        "| bf16 D64 | 2.2e-03 (1.41; 0.50 to 3.00) |",
        "| softcap | 3.000 ms (x 1.50) |",
        "20.0 (x 2.00, 3 GiB)",
        "| 3.60 | 90% |",
    ):
        assert figure in page
    drawn = report.pictures(report.read(tmp_path / "run.jsonl"), tmp_path)
    assert {path.name for path in drawn} == {"fwd_bf16_speed.png", "fwd_bf16_ratios.png", "memory.png", "train.png"}


def test_a_decoding_step_of_the_module(tmp_path):
    out = tmp_path / "module.jsonl"
    row = module.main(
        ["--batch", "2", "--cached", "40", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--out", str(out)]
    )
    assert report.read(out) == [row] and row["wall_ms"] > 0
    assert "| decode bf16 batch 2 S40 heads 4/2 D8 | 100 | 250 | 150 |" in quote.module(
        [row | {"kernel_ms": 0.1, "wall_ms": 0.25}]
    )


def test_the_module_keeps_its_cache():
    step = module.Step(2, 5, 4, 2, 8)
    x = jax.random.normal(jax.random.key(0), (2, 1, 32), jax.numpy.bfloat16)
    first, second = np.asarray(step(x)), np.asarray(step(x))
    assert step.cache["cache_index"][...] == 7
    assert (first != second).any()


PROGRAM = """\
HloModule jit_step

%fused_moves (param: f32[2,4]) -> bf16[4,2] {
  %param = f32[2,4]{1,0} parameter(0)
  %transpose.1 = f32[4,2]{1,0} transpose(%param), dimensions={1,0}
  ROOT %convert.1 = bf16[4,2]{1,0} convert(%transpose.1)
}

%fused_work (param.1: bf16[4,2]) -> bf16[4,2] {
  %param.1 = bf16[4,2]{1,0} parameter(0)
  ROOT %add.1 = bf16[4,2]{1,0} add(%param.1, %param.1)
}

ENTRY %main (q: f32[2,4], k: bf16[4,2]) -> (bf16[4,2], bf16[2,4]) {
  %q = f32[2,4]{1,0} parameter(0)
  %k = bf16[4,2]{1,0} parameter(1)
  %loop_fusion.2 = bf16[4,2]{1,0} fusion(%q), kind=kLoop, calls=%fused_moves
  %add_fusion = bf16[4,2]{1,0} fusion(%k), kind=kLoop, calls=%fused_work
  %passed = bf16[8]{0} bitcast(%add_fusion)
  %attend.1 = (bf16[4,2]{1,0}, f32[2]{0}) custom-call(%loop_fusion.2, %passed), custom_call_target="jax_flash_forward"
  %out = bf16[4,2]{1,0} get-tuple-element(%attend.1), index=0
  %copy.5 = bf16[4,2]{0,1} copy(%out)
  %copy.6 = bf16[4,2]{0,1} copy(%k)
  ROOT %result = (bf16[4,2]{0,1}, bf16[4,2]{0,1}) tuple(%copy.5, %copy.6)
}
"""


def test_what_a_training_step_moves_around_attention(tmp_path):
    assert step.moves(PROGRAM) == {"loop_fusion.2", "copy.5"}
    kernels = [("loop_fusion_2", 1.0), ("sm90_forward", 4.0), ("copy_5", 0.5), ("copy_6", 2.0), ("delta", 1.0)]
    assert step.shares(step.moves(PROGRAM), kernels) == {"all_ms": 8.5, "attention_ms": 5.0, "moves_ms": 1.5}
    out = tmp_path / "step.jsonl"
    sizes = ["--layers", "1", "--heads", "2", "--head-dim", "8", "--length", "16", "--tokens", "32"]
    row = step.main([*sizes, "--out", str(out)])
    assert report.read(out) == [row] and row["moves"] == []  # without a GPU no kernel of ours
    found = {"moves": ["a", "b"], "all_ms": 60.0, "attention_ms": 6.0, "moves_ms": 0.03}
    assert f"| {row['case'].removeprefix('step ')} | 60.0 | 6.00 | 2: 0.5% of attention's time |" in quote.step(
        [row | found]
    )


def test_kernels_come_from_the_disk_once_they_are_compiled(tmp_path):
    out = tmp_path / "compilation.jsonl"
    rows = compilation.main(["--calls", "--head-dim 64", "--out", str(out)])
    assert {"sm90_forward", "sm90_backward", "delta", "dq_from_sums"} == {row["kernel"] for row in rows}
    assert all(row["warm_s"] < row["cold_s"] for row in rows)
    assert len(report.read(out)) == len(rows)
