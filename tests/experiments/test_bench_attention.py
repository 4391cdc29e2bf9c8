"""The bench of attention at tiny shapes: what a GPU will run has run here."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from experiments.bench import _attention_calls as calls  # noqa: E402
from experiments.bench import _attention_contestants as contestants  # noqa: E402
from experiments.bench import _attention_device as device  # noqa: E402
from experiments.bench import _timing as timing  # noqa: E402
from experiments.bench import attention as bench  # noqa: E402
from jaxzoo.training.mesh import PlacementError  # noqa: E402
from jaxzoo.training.record import Run  # noqa: E402
from pallas_kernels.attention import IMPLEMENTATIONS, ref  # noqa: E402

TINY = calls.Call(2, 16, 2, 8)
SECONDS = 1e-3


def clock(call, *, wait=jax.block_until_ready):
    """Runs once, as a device would many times, and tells a fixed time."""
    wait(call())
    return SECONDS


def opened(tmp_path, config) -> Run:
    return Run(
        tmp_path / "run", topic="bench", slug="attention", title="", preset="smoke",
        config=config,
    )  # fmt: skip


def kernels(tried: list[Any]) -> Any:
    """The definition with the face of the GPU kernels; blocks of 24 are refused."""
    blocks = {kind: {8: (16, 16)} for kind in device.KERNELS}

    def forward(*args):
        use("out")
        return ref.attend(*args)

    def backward(pattern, q, k, v, extras, out, lse, d_out, d_lse):
        use("dq")
        use("dkv")

        def attend(q, k, v):
            return ref.attend(pattern, q, k, v, extras)[0]

        dq, dk, dv = jax.vjp(attend, q, k, v)[1](d_out.astype(jnp.float32))
        if blocks["dkv"][8] == (8, 16):
            dk = dk * 2  # fast and wrong
        return dq, dk, dv, None, None

    def use(kind):
        tried.append((kind, blocks[kind][8]))
        if blocks[kind][8][0] == 24:
            raise ValueError("blocks of 24 do not go into 16\nat length")

    return types.SimpleNamespace(
        forward=forward, backward=backward, unsupported=lambda *_: None, BLOCKS=blocks
    )


def shrunk(work: calls.Workload) -> calls.Workload:
    """The same options with 32 tokens."""
    call = work.call
    small = call._replace(
        batch=2, length=min(call.length, 32), heads=2, width=8,
        key_heads=1 if call.key_heads else 0, keys=32 if call.keys else 0,
        window=call.window and (7, 0), group=8 if call.group else 0,
        page=8 if call.page else 0, dtype="float32",
    )  # fmt: skip
    return work._replace(call=small)


@pytest.fixture(autouse=True)
def definition(monkeypatch):
    """The definition in place of XLA's blocks, which take longer to compile."""
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", ref.attend)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Each program runs once: none is kept for the tests that follow."""
    yield
    jax.clear_caches()


def test_everything_on_a_device_runs_with_tiny_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(timing, "copy_rate", lambda clock: 1e9)
    monkeypatch.setattr(timing, "matmul_rate", lambda clock: 1e12)
    tried: list[Any] = []
    target = device.Target(
        "NVIDIA H100 (pretended)", "ref", kernels(tried), clock, 2.0**30
    )
    full, blocks = bench.PRESETS["full"], ((8, 16), (24, 16))
    config = dataclasses.replace(full, widths=(8,), blocks=blocks)
    # One of each kind; those that are left differ in sizes and masks alone.
    named = {w.name[:2]: shrunk(w) for w in calls.WORKLOADS}
    assert set(named) == set(config.only)
    goals = (*named["G6"].goals, *named["G7"].goals)
    works = [named["G6"]._replace(goals=goals), named["G8"], named["G9"]]
    cases = {
        "all": calls.CHECKS["all"]._replace(
            length=24, heads=2, key_heads=1, width=8, dtype="float32"
        )
    }
    report: Any = device.measure(
        config, opened(tmp_path, config), target, cases=cases, workloads=works,
        tried=TINY._replace(dtype="float32"),
    )  # fmt: skip
    path = tmp_path / "results" / "attention_nvidia_h100_pretended.json"
    record = json.loads(path.read_text())

    for name in ("ref", "xla"):
        assert all(record["checks"]["attention"][name][c]["holds"] for c in cases)
    # Of the blocks, what is wrong or cannot be compiled is told and not taken.
    assert record["blocks"]["out"]["8"] in ([16, 16], [8, 16])
    assert record["blocks"]["dkv"] == {"8": [16, 16]}
    assert record["tries"]["out 8 (24, 16)"].startswith("ValueError: blocks of 24")
    assert "differs from XLA" in record["tries"]["dkv 8 (8, 16)"]
    assert {(k, (n, 16)) for k in device.KERNELS for n in (8, 16, 24)} == set(tried)

    # cuDNN is not here; torch may not be.
    left = {name.split(", ")[2] for name in record["reasons"]}
    assert left - {calls.TORCH} == {calls.CUDNN}
    names = ("ref", "xla", calls.JAX, calls.FULL)
    ways = [(name, way) for name in names for way in contestants.WAYS]
    for work in works:
        if work.call.page:
            assert f"{work.name}/forward/{calls.DECODE}/TB_s" in report.metrics
            assert f"{work.name}/forward/{calls.JAX}/TB_s" in report.metrics
            continue
        for name, way in ways:
            if name in ("ref", "xla", *work.peers):
                rate = report.metrics[f"{work.name}/{way}/{name}/TFLOP_s"]
                of = work.call._replace(group=work.call.group * (name != calls.FULL))
                flops = calls.work(of, way)
                np.testing.assert_allclose(rate, flops / SECONDS / 1e12)
                share = report.metrics[f"{work.name}/{way}/{name}/of_matmul"]
                np.testing.assert_allclose(share, flops / SECONDS / 1e12)
    claims = {claim.text: claim for claim in report.claims}
    assert claims[f"workloads of {len(works)} that ref did not run"].holds
    assert claims["ref over XLA at its slowest shape: time"].measured == 1.0
    assert claims["G8 shifted groups 64k, backward: speed over full"].measured == 1.0
    assert not claims["G6 4 documents 32k, backward: TFLOP/s"].holds
    assert any("share of the copy rate" in text for text in claims)
    assert not any(calls.CUDNN in text for text in claims)  # it did not run


def test_without_kernels_the_rest_is_timed_and_it_is_said(tmp_path, capsys):
    config = dataclasses.replace(bench.PRESETS["smoke"], only=("G2", "G9"))
    target = device.Target("NVIDIA A100", "pallas_none", None, clock, 2.0**30)
    goals = (calls.Goal("forward", calls.JAX, 1.0),)
    works = [
        calls.Workload("G2", TINY, goals, (calls.JAX,)),
        calls.Workload("G3", TINY, (), ()),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "copy_rate", lambda clock: 1e9)
        patch.setattr(timing, "matmul_rate", lambda clock: 1e12)
        run = opened(tmp_path, config)
        report = device.measure(config, run, target, cases={}, workloads=works)
    said = capsys.readouterr().out
    assert "There is no 'pallas_none' in pallas_kernels.attention" in said
    assert "G2, forward, pallas_none is left out: ValueError" in said
    assert "G2/forward/xla/ms" in report.metrics
    texts = [claim.text for claim in report.claims]
    assert "workloads of 1 that pallas_none did not run" in texts
    assert not any("speed over" in text for text in texts)
    assert (run.folder / "attention_nvidia_a100.json").exists()


def test_what_comes_too_late_is_left_out(tmp_path):
    config = dataclasses.replace(bench.PRESETS["smoke"], only=("G2",), minutes=0.0)
    target = device.Target("GPU", "xla", None, clock, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "copy_rate", lambda clock: 1e9)
        patch.setattr(timing, "matmul_rate", lambda clock: 1e12)
        run = opened(tmp_path, config)
        works = [calls.Workload("G2", TINY, ())]
        report = device.measure(config, run, target, cases={}, workloads=works)
    assert [c.measured for c in report.claims if "did not run" in c.text] == [1]
    record = json.loads((run.folder / "attention_gpu.json").read_text())
    assert record["reasons"] == {"G2": "the 0 minutes were over"}
    _, reasons = contestants.timed(TINY, ["xla"], own="xla", clock=clock, memory=0.0)
    assert "GiB beside its arguments" in reasons["xla", "forward"]


@pytest.mark.parametrize("name", calls.CHECKS)
def test_every_case_is_a_call(name):
    call = calls.CHECKS[name]
    given = jax.eval_shape(lambda: calls.inputs(call))
    out, *gradients = jax.eval_shape(device._output_and_gradients(call, "xla"), *given)
    assert out.shape == (call.batch, call.length, call.heads, call.width)
    assert len(gradients) == 3 + call.sinks


def test_every_workload_is_a_call_of_each_contestant():
    for each in calls.WORKLOADS:
        (q, k, v, _), _ = jax.eval_shape(lambda each=each: calls.inputs(each.call))
        for name in ("xla", *each.peers):
            if name in (calls.TORCH, calls.CUDNN) or each.call.page and name == "xla":
                continue

            def whole(q, k, v, name=name, each=each):
                function, beside = contestants.contestant(name, each.call, "xla")
                return function(q, k, v, beside)

            assert jax.eval_shape(whole, q, k, v).shape == q.shape
        assert all(calls.work(each.call, way) > 0 for way in contestants.WAYS)


def test_work_counts_the_pairs_that_count():
    t, s = np.arange(24)[:, None], np.arange(24)[None]
    for call, pairs in {
        TINY._replace(length=24): np.sum(s <= t),
        TINY._replace(length=24, window=(5, 0)): np.sum((s <= t) & (s >= t - 5)),
        TINY._replace(length=24, causal=False): 24 * 24,
        TINY._replace(length=24, documents=3): np.sum((s <= t) & (s // 8 == t // 8)),
        TINY._replace(length=24, group=8): 0.5 * np.sum(
            (s <= t) * (1.0 * (s // 8 == t // 8) + ((s + 4) // 8 == (t + 4) // 8))
        ),
    }.items():  # fmt: skip
        assert calls.work(call, "forward") == 4 * 2 * 2 * 8 * pairs
        assert calls.work(call, "backward") == 2.5 * calls.work(call, "forward")
        if not call.group:
            counted = calls.counts(call, t, s) & np.ones((24, 24), bool)
            assert np.sum(counted) == pairs
    # As published figures are counted: 4 B N T^2 H, half of it if causal.
    long = calls.Call(1, 16384, 16, 128)
    assert abs(calls.work(long, "forward") / (2 * 16 * 16384**2 * 128) - 1) < 1e-4


def test_backward_is_the_gradient_of_forward():
    (q, k, v, d_out), beside = calls.inputs(TINY._replace(documents=2, dtype="float32"))
    function = contestants.ours(TINY, "xla")
    keep, gradient = contestants.halves(function)
    out, kept = keep(q, k, v, beside)
    wanted = jax.grad(lambda q: jnp.sum(function(q, k, v, beside) * d_out))(q)
    np.testing.assert_allclose(gradient(kept, d_out)[0], wanted, atol=1e-6)
    np.testing.assert_allclose(out, function(q, k, v, beside), atol=1e-6)


def test_torch_computes_the_same():
    pytest.importorskip("torch")
    for options in ({}, {"key_heads": 1}, {"window": (5, 0)}, {"documents": 2}):
        call = TINY._replace(dtype="float32", **options)
        (q, k, v, d_out), beside = calls.inputs(call)
        torch = contestants.in_torch(call, (q, k, v, d_out))
        keep, gradient = contestants.halves(contestants.ours(call, "xla"))
        out, kept = keep(q, k, v, beside)
        wanted = (out, *gradient(kept, d_out))
        whole, gradients = torch.both()
        for a, b in zip((whole, *gradients), wanted, strict=True):
            np.testing.assert_allclose(np.swapaxes(a, 1, 2), b, atol=1e-5)
        np.testing.assert_allclose(np.swapaxes(torch.forward(), 1, 2), out, atol=1e-5)
        for _ in range(2):
            np.testing.assert_allclose(
                np.swapaxes(torch.backward()[0], 1, 2), wanted[1], atol=1e-5
            )
        torch.wait(None)


def test_a_time_is_that_of_one_call_of_many():
    calls_made = []

    def call():
        calls_made.append(1)
        return len(calls_made)

    waited = []
    took = timing.queued(call, wait=waited.append, seconds=0.001, samples=3, most=7)
    assert 0 < took < 1e-3
    assert len(calls_made) == 2 + 3 * 7
    assert waited == [1, 2, 9, 16, 23]  # once for each sample


def test_rates_are_of_bytes_and_operations():
    assert timing.copy_rate(lambda call: call() is None or 2.0, size=64) == 64.0
    assert timing.matmul_rate(lambda call: call() is None or 4.0, size=8) == 256.0
    assert timing.dispatch(clock) == SECONDS


def test_difference_of_numbers_that_are_none_is_infinite():
    assert timing.far(jnp.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert timing.far(np.array([np.nan, 2.0]), np.array([1.0, 4.0])) == float("inf")


def test_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "QUIET", 2)
    config = dataclasses.replace(
        bench.PRESETS["smoke"], length=32, noise=1e9, record=True
    )
    report: Any = bench.main(config, opened(tmp_path, config))
    memory = [c for c in report.claims if "MiB" in c.text or "growth" in c.text]
    assert len(memory) == 2 and report.metrics["temporary/128_MiB"] > 0
    record = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert record["slug"] == "attention_cpu" and len(record["claims"]) >= 2
    assert report.metrics[f"{calls.JAX}/difference"] < 1e-5
    assert report.metrics["quiet"] == 2 and report.metrics["jaxzoo/ratio"] == 1.0


def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path):
    config = bench.PRESETS["quick"]
    assert config.device
    with pytest.raises(PlacementError, match="needs a GPU, and jax sees 'cpu' alone"):
        bench.main(config, opened(tmp_path, config))
