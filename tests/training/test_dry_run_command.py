"""The command line of the dry run, and the topologies that it takes."""

import json
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxzoo.training import command, dry_run, forecast, record, topology
from jaxzoo.training.chips import Chip
from tests.training.toy import WIDTH, program

CPU = Chip("cpu", ("cpu",), 1e12, 2**30, 1e11, 1e10, 1e9, 0, 1, "made up")
MATRICES = 2 * WIDTH * WIDTH * 4


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("v5e:3x3", ["no topology 'v5e:3x3'", "did you mean v5e:2x4", "16x16"]),
        ("v5:2x2", ["no topology 'v5:2x2'", "did you mean v5"]),
        ("h100:3", ["did you mean h100:2"]),
        ("v5p:4x4", ["2x2x4"]),
        ("nonsense", ["v5e, v5p, v6e, tpu7x, h100"]),
    ],
)
def test_a_topology_that_is_none_is_named_with_the_nearest(name, sentences):
    with pytest.raises(ValueError) as caught:
        topology.devices(name)
    for sentence in sentences:
        assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wheel"), [("v5e:2x2", "jax[tpu]"), ("h100:8", "jax-cuda13-plugin")]
)
def test_without_the_compiler_the_way_to_it_is_told(monkeypatch, name, wheel):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(topology.MissingWheelError) as caught:
        topology.devices(name)
    assert "pip install" in str(caught.value) and wheel in str(caught.value)


class FakeRun:
    """What an experiment sees of a run in a dry run."""

    def __init__(self, folder, *, mesh, dry_run, **_):
        self.folder, self.mesh, self.dry_run = folder, mesh, dry_run


@pytest.fixture
def experiment(monkeypatch):
    """An experiment of two fits, on eight devices that pass for H100."""
    module: Any = types.ModuleType("experiments.toy.tiny")
    module.__file__ = "experiments/toy/tiny.py"
    module.PRESETS = {"full": 64, "small": 8}
    seen = {}

    def parse(main, presets, words):
        preset = words[0] if words else "full"
        head = {"topic": "toy", "slug": "tiny", "title": "Tiny", "preset": preset}
        return types.SimpleNamespace(**head, config=presets[preset], options=None)

    def main(config, run):
        print("the experiment speaks")
        seen["config"], seen["mesh"] = config, run.mesh
        if config == 64 and run.mesh.size == 6:
            raise ValueError("64 examples cannot be split over 6")
        for name in ("first", "second"):
            run.dry_run(program(run.mesh.devices.ravel(), 1, name=name))

    module.main = main
    mesh: Any = types.ModuleType("jaxzoo.training.mesh")
    mesh.make_mesh = lambda text, devices: Mesh(np.array(devices), ("data",))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, mesh.__name__, mesh)
    monkeypatch.setattr(command, "parse", parse, raising=False)
    monkeypatch.setattr(record, "Run", FakeRun)
    monkeypatch.setattr(dry_run, "chip", lambda _: CPU)
    monkeypatch.setattr(topology, "devices", lambda _: jax.devices())
    monkeypatch.setattr(topology, "prepare", lambda: None)
    lower = forecast.forecast
    monkeypatch.setattr(forecast, "forecast", lambda p, c, _: lower(p, c, "cpu"))
    return seen


def call(*words):
    with pytest.raises(SystemExit) as left:
        dry_run.main(words)
    return left.value.code


TINY = ("experiments.toy.tiny", "--topology", "h100:8")


def test_the_command_prints_the_report_of_the_first_fit(experiment, capsys):
    dry_run.main(TINY)
    out, err = capsys.readouterr()
    assert out.startswith("experiments.toy.tiny first on h100:8")
    assert "fits into" in out and "Bound by" in out
    assert "the experiment speaks" in err and "Compiling first" in err
    assert experiment["config"] == 64


def test_flags_behind_two_dashes_are_the_experiments(experiment, capsys):
    dry_run.main((*TINY, "--fit", "second", "--json", "--", "small"))
    record = json.loads(capsys.readouterr().out)
    assert experiment["config"] == 8
    assert record["fit"] == "second" and record["topology"] == "h100:8"
    assert record["memory"]["parameters"] == MATRICES


def test_what_does_not_fit_exits_1_with_a_verdict(experiment, monkeypatch, capsys):
    tiny = CPU._replace(hbm=2**10)
    monkeypatch.setattr(dry_run, "chip", lambda _: tiny)
    assert call(*TINY) == 1
    out, err = capsys.readouterr()
    assert "DOES NOT FIT into 1 KiB" in out
    assert "error: first does not fit: it needs" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("experiments.toy.tinny", *TINY[1:]), "no module 'experiments.toy.tinny'"),
        (("json", *TINY[1:]), "json is no experiment"),
        ((*TINY, "--fit", "third"), "no fit 'third': the experiment has first, second"),
        (TINY[:1], "--topology"),
        ((*TINY, "--mehs", "data=8"), "--mehs"),
    ],
    ids=lambda value: None,
)
def test_a_wrong_command_exits_2_with_a_sentence(experiment, capsys, words, sentence):
    assert call(*words) == 2
    out, err = capsys.readouterr()
    assert sentence in " ".join(err.split()) and "Traceback" not in err


def test_a_batch_that_the_mesh_cannot_split_is_a_sentence(
    experiment, monkeypatch, capsys
):
    monkeypatch.setattr(topology, "devices", lambda _: jax.devices()[:6])
    assert call(*TINY) == 2
    err = capsys.readouterr().err
    assert "error: 64 examples cannot be split over 6" in err


def test_an_experiment_that_trains_nothing_is_told(experiment, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[TINY[0]], "main", lambda config, run: None)
    assert call(*TINY) == 2
    assert "trains nothing" in capsys.readouterr().err


def test_the_environment_is_set_before_jax_is_imported():
    code = (
        "import sys, os\n"
        "import jaxzoo.training.dry_run as d\n"
        "assert 'jax' not in sys.modules, 'jax was imported'\n"
        "d.topologies.prepare()\n"
        "assert os.environ['JAX_PLATFORMS'] == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
