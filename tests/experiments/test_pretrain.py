"""Pretraining goes on as if it had never stopped, on any mesh; LZMA is what it was."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxzoo.training.mesh import local, make_mesh
from jaxzoo.training.record import Run

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pretrain():
    sys.path.insert(0, str(REPO))
    yield importlib.import_module("experiments.lm.pretrain")
    sys.path.remove(str(REPO))


def trained(pretrain: Any, folder: Path, mesh: str, stops: tuple[int, ...]) -> Any:
    config = dataclasses.replace(
        pretrain.PRESETS["smoke"], width=16, depth=1, length=16, warm_up=1
    )
    run = Run(
        folder, topic="lm", slug="pretrain", title="a test", preset="smoke",
        config=config, mesh=make_mesh(mesh) if mesh else None,
    )  # fmt: skip
    text = np.arange(400, dtype=np.uint8) % 61
    for stop in stops:
        state = pretrain.fit(config, run, "model", text, 6, stop)
    places = {str(x.sharding) for x in jax.tree.leaves(state["params"])}
    return local(state["params"]), places, run.history("model")["bits per byte"][-1]


def test_meshes_and_stops_leave_the_parameters_as_they_are(pretrain, tmp_path):
    whole, _, bits = trained(pretrain, tmp_path / "whole", "", (6,))
    stopped, _, _ = trained(pretrain, tmp_path / "stopped", "", (2, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, stopped, whole)
    shared, places, same = trained(pretrain, tmp_path / "mesh", pretrain.EIGHT, (6,))
    assert any("'tensor'" in place and "'fsdp'" in place for place in places)
    np.testing.assert_allclose(same, bits, rtol=1e-5)
    # Muon divides by singular values: rounding grows, and is still far below a step.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), shared, whole
    )


def test_each_byte_is_read_once_and_after_half_a_window(pretrain):
    config = dataclasses.replace(
        pretrain.PRESETS["smoke"], width=16, depth=1, length=8, blocks=0
    )
    text = np.arange(4 * 40 + 1, dtype=np.uint8)
    params = pretrain.build(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))
    bits = pretrain.held_out_bits(config, params, text)
    windows = [text[4 * i : 4 * i + 9].astype(np.int32) for i in range(32)]
    logits, _ = pretrain.build(config).apply(params, np.stack(windows)[:, :-1])
    logp = jax.nn.log_softmax(logits)[:, 4:]
    targets = np.stack(windows)[:, 5:, None]
    own = -np.take_along_axis(np.asarray(logp), targets, -1) / np.log(2)
    np.testing.assert_allclose(bits, own.reshape(4, -1).mean(1), rtol=1e-5)


def test_text_that_was_read_before_costs_nothing(pretrain):
    text = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    alone, after = pretrain.lzma_bits(text, text)
    assert 7.9 < alone < 8.1 and after < 0.2
