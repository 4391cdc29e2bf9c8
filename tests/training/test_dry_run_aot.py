"""The dry run with the vendors' compilers: needs their wheels, no TPU and no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxzoo.training import topology
from jaxzoo.training.chips import chip
from jaxzoo.training.forecast import forecast
from jaxzoo.training.forecast_page import advice
from jaxzoo.training.traffic import traffic
from tests.training import toy

REPO = Path(__file__).resolve().parents[2]
HOW = "needs the compiler: pip install 'jax[tpu]' jax-cuda13-plugin jax-cuda13-pjrt"
TPUS = ("v5e:1x1", "v5e:4x4", "v5e:16x16", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1")
GPUS = ("h100:1", "h100:8", "h100:2x8")


def devices(name):
    wheel = "jax_cuda13_plugin" if name.startswith("h100") else "libtpu"
    pytest.importorskip(wheel, reason=HOW)
    topology.prepare()
    return topology.devices(name)


def figures(name, fsdp, **knobs):
    found = devices(name)
    kind = chip(found[0].device_kind)
    assert kind is not None
    platform = "tpu" if kind.links else "cuda"
    return forecast(toy.program(found, fsdp, **knobs), kind, platform)


@pytest.mark.parametrize("name", [*TPUS, *GPUS])
def test_every_kind_of_machine_from_1_to_256_devices(name):
    count = len(devices(name))
    fsdp = min(count, 16)
    each = figures(name, fsdp, width=512, rows=max(256, count))
    assert each.devices == count and each.memory.fits
    assert each.memory.parameters == 2 * 512 * 512 * 4 // fsdp
    assert each.memory.peak >= each.memory.parameters + each.memory.optimizer
    assert each.traffic is not None and each.memory_seconds is not None
    assert each.compute_seconds > 0 and each.floor >= each.compute_seconds
    assert each.unknown == ()
    assert bool(each.networks) == (count > 1)
    assert (each.compiler_flops is None) == name.startswith("h100")


@pytest.mark.parametrize("name", ["v5e:4x4", "h100:2x8"])
def test_memory_falls_with_fsdp(name):
    whole = figures(name, 1, width=1024, rows=256).memory
    split = figures(name, 16, width=1024, rows=256).memory
    state = whole.parameters + whole.optimizer
    assert split.parameters + split.optimizer <= state / 16 + 1024
    # What is computed with is gathered, so the temporaries do not fall as far.
    assert split.peak < whole.peak / 2
    assert whole.peak >= state


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_what_is_too_large_is_refused_with_the_memory_of_the_table(name):
    each = figures(name, 1, width=65536, layers=12)
    assert not each.memory.fits and each.memory.temporaries is None
    assert each.memory.peak > each.memory.available
    kind = chip(devices(name)[0].device_kind)
    assert kind is not None
    assert each.memory.available == pytest.approx(kind.hbm, rel=1e-3)
    assert f"--mesh fsdp={each.devices}" in advice(each, name)


@pytest.mark.parametrize("name", ["v5e:4x4", "h100:8"])
def test_loops_over_layers_count_each_layer(name):
    few, many = (figures(name, 8, width=512, rows=256, layers=n) for n in (3, 12))

    def moved(each):
        return sum(network.bytes for network in each.networks)

    assert moved(many) == pytest.approx(4 * moved(few), rel=0.1)
    assert few.traffic is not None and many.traffic is not None
    assert many.traffic / few.traffic == pytest.approx(4, rel=0.25)
    assert many.matmul_flops == 4 * few.matmul_flops


def test_traffic_is_the_tpu_compilers_where_all_of_it_is_in_hbm():
    sharding = SingleDeviceSharding(devices("v5e:1x1")[0])
    # Each array is larger than the vector memory of 128 MiB.
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=sharding)
    lowered = jax.jit(lambda a, b, c: a @ b + c).trace(x, x, x)
    compiled = lowered.lower(lowering_platforms=("tpu",)).compile()
    analysis, text = compiled.cost_analysis(), compiled.as_text()
    assert analysis is not None and text is not None
    expected = analysis["bytes accessed"]
    assert traffic(text).bytes == pytest.approx(expected, rel=0.1)
    assert expected == pytest.approx(4 * 8192 * 8192 * 4, rel=0.1)


def test_the_command_on_a_real_experiment():
    devices("v5e:2x2")
    command = ("-m", "jaxzoo.training.dry_run", "experiments.vae.iwae")
    flags = ("--topology", "v5e:1x1", "--json", "--fit", "k5", "--", "smoke")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, *command, *flags],
        cwd=REPO, env=environment, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["fit"] == "k5" and record["memory"]["fits"]
    assert "libtpu" in record["versions"] and record["flops"] > 1e6
