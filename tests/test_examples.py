"""Each example, run small, says what it should."""

import dataclasses
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("matplotlib")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import generate  # noqa: E402
import gpt  # noqa: E402
import long_context  # noqa: E402
import swap_attention  # noqa: E402
import text  # noqa: E402
import train  # noqa: E402
import train_small  # noqa: E402


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    monkeypatch.setitem(gpt.SIZES, "tiny", gpt.Config(layers=1, heads=4, kv_heads=2, width=32, length=32))


def test_train_and_resume(tmp_path, capsys):
    def run(steps, out):
        return train.main(["--steps", str(steps), "--batch", "8", "--remat", "--out", str(tmp_path / out)])

    losses = run(20, "one run")
    assert losses[0] == pytest.approx(np.log(256), abs=0.1) and losses[-1] < losses[0] - 0.5
    assert (tmp_path / "one run" / "loss.png").stat().st_size > 1000
    assert re.search(r"loss 5\.\d+ -> [34]\.\d+", capsys.readouterr().out)
    assert run(20, "one run") == []
    assert len(run(22, "one run")) == 2


def test_generate_from_a_checkpoint(tmp_path):
    options = ["--out", str(tmp_path), "--tokens", "8", "--prompt", "Ada took"]
    train.main(["--steps", "2", "--batch", "8", "--out", str(tmp_path)])
    assert len(generate.main(options)) == 16
    assert generate.main([*options, "--temperature", "1"]) != generate.main(
        [*options, "--temperature", "1", "--seed", "1"]
    )


def test_generation_equals_the_whole_sequence_at_each_step():
    config = dataclasses.replace(gpt.SIZES["tiny"], dtype=jnp.float32)
    parameters = train.Trainer(config, steps=1).init().parameters
    model = gpt.GPT(config, nnx.Rngs(0))
    prompt = text.tokens("Ada took")[None]
    out = [int(t[0]) for t in generate.Generator(config, parameters, 1, 12)(prompt, 4, jax.random.key(0))]
    for token in out:
        assert token == int(jnp.argmax(model(prompt)[0, -1]))
        prompt = np.append(prompt, [[token]], axis=1)


def test_long_context():
    results = long_context.main(["--length", "800", "--steps", "3"])
    assert results["documents"] > 1
    assert results["last loss"] < results["first loss"]
    assert results["difference"] < 1e-5


def test_swap_attention(tmp_path):
    results = swap_attention.main(["--lengths", "128", "1024", "--width", "64", "--out", str(tmp_path / "swap.png")])
    (_, flax_memory), (_, our_memory) = (rows[-1] for rows in results.values())
    assert our_memory < flax_memory / 3
    assert (tmp_path / "swap.png").stat().st_size > 1000


@pytest.mark.parametrize("platform", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_two_devices_train_as_one(platform):
    try:
        devices = jax.devices(platform)[:2]
    except RuntimeError:
        devices = []
    if len(devices) < 2:
        pytest.skip(f"needs two devices of platform {platform}")
    config = dataclasses.replace(gpt.SIZES["tiny"], dtype=jnp.float32 if platform == "cpu" else jnp.bfloat16)
    corpus = text.tokens(text.text(10_000))

    def gradients(parallel, devices):
        """Adam's first moments after one step are the gradients, scaled."""
        trainer = train.Trainer(config, steps=3, learning_rate=1e-2, parallel=parallel, devices=devices)
        batch = trainer.shard(next(text.batches(corpus, batch=4, length=32, start=0)))
        state, _ = trainer.step(trainer.spread(trainer.init()), batch)
        return [np.asarray(x) for x in jax.tree.leaves(trainer.gathered(state).optimizer[1][0].mu)]

    right = gradients("jit", devices[:1])
    for parallel in ("jit", "pmap"):
        for ours, exact in zip(gradients(parallel, devices), right, strict=True):
            tolerance = 1e-5 if platform == "cpu" else 2e-2
            np.testing.assert_allclose(ours, exact, rtol=0, atol=tolerance * np.abs(exact).max())


def test_the_text_is_small_and_always_the_same():
    corpus = text.text()
    assert 1_000_000 <= len(corpus) < 1_001_000
    assert corpus == text.text()


def test_the_main_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_small.py", "--steps", "60", "--picture", str(tmp_path / "loss.png")])
    monkeypatch.setattr(train_small, "LAYERS", 2)
    train_small.main()
    assert re.search(r"loss: [45]\.\d+ -> [12]\.\d+", capsys.readouterr().out)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_fp8_training_follows_bf16(tmp_path):
    from benchmarks import fp8_training

    curves = fp8_training.main(
        ["--size", "tiny", "--steps", "12", "--batch", "8", "--out", str(tmp_path / "curves.jsonl")]
    )
    bf16, fp8 = (np.array(curves[name]) for name in ("bf16", "fp8"))
    assert bf16[-1] < bf16[0]
    assert (bf16 != fp8).any()
    np.testing.assert_allclose(fp8, bf16, rtol=0.01)
    assert (tmp_path / "fp8_training.png").exists()
