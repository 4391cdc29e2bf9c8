"""The command line of an experiment: exit codes, plain sentences, Ctrl-C and on."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxzoo.training.record import Run

REPO = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny_experiment.py")


@pytest.fixture
def tree(tmp_path):
    package = tmp_path / "experiments" / "toy"
    package.mkdir(parents=True)
    (tmp_path / "experiments" / "__init__.py").touch()
    (package / "__init__.py").touch()
    shutil.copy(TINY, package / "tiny.py")
    return tmp_path


def call(tree, *words, code=0, script=("-m", "experiments.toy.tiny"), **env):
    plain = {"PYTHONPATH": str(REPO), "PYTHONWARNINGS": "error", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, *script, *map(str, words)],
        cwd=tree,
        env={**os.environ, **plain, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done


def metrics(tree, folder="runs/toy/tiny"):
    return json.loads((tree / folder / "report.json").read_text())["metrics"]


def test_claims_that_hold_exit_0_and_one_that_fails_1(tree):
    out = call(tree, "smoke").stdout
    assert "fit: 10/10" in out and "\x1b" not in out
    assert "the last loss" in out and "yes" in out
    report = json.loads((tree / "runs/toy/tiny/report.json").read_text())
    assert (report["topic"], report["slug"]) == ("toy", "tiny")
    assert (report["preset"], report["config"]["steps"]) == ("smoke", 10)
    assert report["title"] == "Tiny: a quadratic is minimised."
    assert {p.name for p in tree.iterdir()} <= {"experiments", "runs"}
    # Finished: other flags begin again in the same folder. Also run by its path.
    words = ("smoke", "--bound", "-1.0", "--widths", "5")
    path = ("experiments/toy/tiny.py",)
    out = call(tree, *words, code=1, script=path).stdout
    assert "NO" in out
    report = json.loads((tree / "runs/toy/tiny/report.json").read_text())
    assert report["claims"][0]["holds"] is False
    assert report["config"]["widths"] == [5]


def test_after_ctrl_c_the_same_command_goes_on_to_the_same_numbers(tree):
    out = call(tree, code=130, INTERRUPT_AT="5").stdout
    assert "Stopped at step 8 of 20 of fit. The same command goes on" in out
    run = tree / "runs/toy/tiny"
    assert not (run / "report.json").exists()
    assert (run / "checkpoints/fit/8").is_dir()
    # Were an earlier step computed again, it would be interrupted again.
    out = call(tree, INTERRUPT_AT="7").stdout
    assert "Going on with the unfinished run" in out
    call(tree, "--run-dir", "whole")
    assert metrics(tree) == metrics(tree, "whole")
    lines = [(tree / f / "metrics.jsonl").read_bytes() for f in (run, "whole")]
    assert lines[0] == lines[1] and lines[0].count(b"\n") == 5


def test_a_wrong_command_exits_2_with_a_sentence(tree):
    done = call(tree, "smok", code=2)
    assert "no preset 'smok': there are smoke, full, did you mean smoke." in done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert not (tree / "runs").exists()


@pytest.fixture
def here(tree, monkeypatch, capsys):
    """Calls the command in this process; returns exit status, stdout and stderr."""
    path = tree / "experiments" / "toy" / "tiny.py"
    spec = importlib.util.spec_from_file_location("experiments.toy.tiny", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tree)

    def one(*words):
        with pytest.raises(SystemExit) as left:
            module.experiment(module.main, module.PRESETS, argv=list(map(str, words)))
        return (left.value.code, *capsys.readouterr())

    return one


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (["fulll"], ["no preset 'fulll'", "did you mean full"]),
        (["xyz"], ["no preset 'xyz': there are smoke, full."]),
        (["full", "--stepz", "3"], ["--stepz", "--steps"]),
        (["full", "more"], ["more"]),
        (["full", "--steps", "many"], ["--steps", "many"]),
        (["full", "--steps"], ["--steps"]),
        (["full", "--method", "plane"], ["--method", "plain"]),
        (["smoke", "--steps", "0"], ["steps >= 1, please"]),
        (["smoke", "--run-dir", "experiments/toy/tiny.py"], ["--run-dir", "tiny.py"]),
        (["smoke", "--run-dir", "experiments/toy/tiny.py/x"], ["cannot write"]),
        (
            ["smoke", "--run-dir", "/proc/nowhere/x"],
            ["cannot write to --run-dir /proc"],
        ),
        (
            ["smoke", "--run-dir", "experiments"],
            ["not empty and is not a run's folder"],
        ),
    ],
    ids=lambda value: " ".join(value).replace("/", "|"),
)
def test_what_is_wrong_is_named(here, tree, words, sentences):
    before = set(tree.rglob("*"))
    status, out, err = here(*words)
    assert status == 2
    for sentence in sentences:
        assert sentence in " ".join(err.split())
    assert "Traceback" not in err and out == ""
    assert set(tree.rglob("*")) == before


def test_an_unfinished_run_is_continued_by_its_own_settings(here, monkeypatch):
    monkeypatch.setenv("INTERRUPT_AT", "2")
    monkeypatch.setenv("SIGNAL", "SIGTERM")
    status, out, _ = here("smoke")
    assert status == 75 and "Stopped at step 4 of 10 of fit." in out
    status, out, err = here("smoke", "--learning-rate", "1")
    assert status == 2 and out == ""
    assert "unfinished run with other settings" in err
    assert "learning_rate: 0.125 there, 1.0 here" in err
    monkeypatch.setenv("INTERRUPT_AT", "9")  # in the last call
    assert "Stopped after fit." in here("smoke")[1]
    assert here("smoke")[0] == 0
    monkeypatch.setenv("INTERRUPT_AT", "2")
    assert here("smoke")[0] == 75
    monkeypatch.delenv("INTERRUPT_AT")
    assert here("full", "--steps", "4", "--fresh")[0] == 0


def test_a_folder_without_permission_is_named(here, tree, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    status, _, err = here("smoke", "--run-dir", "locked")
    assert status == 2
    assert err == "error: cannot write to --run-dir locked: Permission denied.\n"


def test_help_lists_every_setting_with_its_default(here):
    status, out, err = here("--help")
    assert status == 0 and err == ""
    text = " ".join(out.split())
    assert "python -m experiments.toy.tiny [smoke | full]" in text
    assert "Tiny: a quadratic is minimised." in text and "[a lot]" in text
    assert "of Adam" in text and "--run-dir" in text and "--fresh" in text
    for flag, default in [
        ("--steps", "20"),
        ("--learning-rate", "0.125"),
        ("--method", "noisy"),
        ("--widths", "3 4"),
        ("--bound", "1000.0"),
    ]:
        after = text.split(f"{flag} ", 1)[1]
        assert f"(default: {default})" in after.split(" --")[0], (flag, after[:200])
    assert "(default: 10)" in " ".join(here("smoke", "--help")[1].split())


def test_a_save_that_fails_is_a_sentence(here, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", fail)
    status, _, err = here("smoke")
    assert status == 2 and err.count("\n") == 1
    assert "cannot save to" in err and "No space left on device" in err


@pytest.fixture
def optimized():
    """As without `conftest.py`."""
    brief = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", brief)


@pytest.mark.usefixtures("optimized")
def test_a_smoke_run_alone_compiles_in_brief(here, monkeypatch):
    def brief():
        return jax.config.read("jax_disable_most_optimizations")

    seen = []
    finish = Run.finish
    monkeypatch.setattr(
        Run, "finish", lambda run, report: seen.append(brief()) or finish(run, report)
    )
    assert here("smoke")[0] == 0 and here("full")[0] == 0
    assert seen == [True, False] and not brief()


@pytest.fixture
def twelve(monkeypatch):
    """Examples in a batch, of a module that is imported after it."""
    monkeypatch.setenv("SIZE", "12")


def test_a_mesh_is_named_on_the_command_line(here):
    assert here("--mesh", "tensor=8")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "data=3"], "mesh 'data=3' does not fit 8 devices"),
        (["--mesh", "model=8"], "'model=8' is not AXIS=SIZE"),
        ([], "the batch has 12 examples, which cannot be split evenly over data x"),
    ],
)
def test_a_mesh_that_does_not_fit_is_a_sentence(twelve, here, words, message):
    status, _, err = here(*words)
    assert status == 2 and message in err


def test_a_number_that_is_not_finite_is_a_sentence(tree):
    done = call(tree, "--inject-nan", "loss:6", code=1)
    assert "error: fit, step 6: 'loss' of the metrics is not finite." in done.stderr
    assert "nonfinite/fit-6.json has the batch" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inject-nan", "weights:6"], "inject-nan 'weights:6' is not WHERE:STEP"),
        (["--non-finite", "ignore"], "invalid choice 'ignore'"),
    ],
)
def test_options_that_are_wrong_are_a_sentence(here, words, message):
    status, _, err = here(*words)
    assert status == 2 and message in " ".join(err.replace("\u2502", " ").split())
