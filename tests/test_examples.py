"""Each example, run small, says what it should."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import generate  # noqa: E402
import gpt  # noqa: E402
import long_context  # noqa: E402
import swap_attention  # noqa: E402
import text  # noqa: E402
import train  # noqa: E402


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    monkeypatch.setitem(gpt.SIZES, "tiny", gpt.Config(layers=1, heads=4, kv_heads=2, width=32, length=32))


def test_train_and_resume(tmp_path, capsys):
    def run(steps, out):
        return train.main(["--steps", str(steps), "--batch", "4", "--remat", "--out", str(tmp_path / out)])

    losses = run(20, "one run")
    assert losses[0] == pytest.approx(np.log(256), abs=0.1) and losses[-1] < losses[0] - 0.5
    assert (tmp_path / "one run" / "loss.png").stat().st_size > 1000
    assert re.search(r"loss 5\.\d+ -> [34]\.\d+", capsys.readouterr().out)
    assert run(20, "one run") == []
    assert len(run(22, "one run")) == 2


def test_generate_from_a_checkpoint(tmp_path):
    options = ["--out", str(tmp_path), "--tokens", "8", "--prompt", "Ada took"]
    train.main(["--steps", "2", "--batch", "4", "--out", str(tmp_path)])
    assert len(generate.main(options)) == 16
    assert generate.main([*options, "--temperature", "1"]) != generate.main(
        [*options, "--temperature", "1", "--seed", "1"]
    )


def test_generation_equals_the_whole_sequence_at_each_step():
    config = dataclasses.replace(gpt.SIZES["tiny"], dtype=jnp.float32)
    parameters = train.Trainer(config, steps=1).init().parameters
    model = gpt.GPT(config, gpt.nnx.Rngs(0))
    prompt = text.tokens("Ada took")[None]
    out = [int(t[0]) for t in generate.Generator(config, parameters, 1, 12)(prompt, 4, gpt.jax.random.key(0))]
    for token in out:
        assert token == int(jnp.argmax(model(prompt)[0, -1]))
        prompt = np.append(prompt, [[token]], axis=1)


def test_long_context():
    results = long_context.main(["--length", "1000", "--batch", "1", "--steps", "3"])
    assert results["documents"] > 1
    assert results["last loss"] < results["first loss"]
    assert results["difference"] < 1e-5


def test_swap_attention(tmp_path):
    results = swap_attention.main(["--lengths", "128", "1024", "--width", "64", "--out", str(tmp_path / "swap.png")])
    (_, flax_memory), (_, our_memory) = (rows[-1] for rows in results.values())
    assert our_memory < flax_memory / 3
    assert (tmp_path / "swap.png").stat().st_size > 1000


TWO_DEVICES = """
import sys; sys.path.insert(0, {examples!r})
import gpt, train, text, jax, numpy as np
config = gpt.Config(layers=1, heads=4, kv_heads=2, width=32, length=32, dtype="float32")
corpus = text.tokens(text.text(10_000))
def losses(parallel):
    trainer = train.Trainer(config, 3, 1e-2, parallel)
    assert len(trainer.devices) == 2
    return train.train(trainer, lambda start: ((x,) for x in text.batches(corpus, 4, 32, start)), 3)[1]
def one_device():
    trainer = train.Trainer(config, 3, 1e-2)
    state, batches = trainer.init(), text.batches(corpus, 4, 32, 0)
    for _ in range(3):
        state, loss = trainer.step(state, (next(batches),))
        yield float(loss)
right = list(one_device())
for parallel in ("jit", "pmap"):
    np.testing.assert_allclose(losses(parallel), right, rtol=1e-5)
"""


def test_two_devices_train_as_one():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    code = TWO_DEVICES.format(examples=str(EXAMPLES))
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    )


def test_the_text_is_small_and_always_the_same():
    corpus = text.text()
    assert 1_000_000 <= len(corpus) < 1_001_000
    assert corpus == text.text()
