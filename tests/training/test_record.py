"""The run's folder: what lies there, who may write into it, what goes away."""

import json
import re

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxzoo.training.plots import curves, image_grid, panels
from jaxzoo.training.record import Claim, Report, RunFolderError

CLAIM = Claim("x falls in [a, b]", 0.5, ">= 0", True, 0.1)


def read(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def draw(run, name="curve"):
    figure, (left, right) = panels(2)
    y = np.random.default_rng(0).normal(size=(9, 4)).cumsum(0)
    curves(left, {"a": (range(9), y), "b": (range(9), -y)}, xlabel="t", ylabel="y")
    curves(right, {"a": (range(9), y[:, :1])}, xlabel="t", ylabel="y", points=True)
    return run.figure(name, figure, title="Walk", caption="A <random> walk.")


def files(folder):
    """What lies in a folder, but for the lock of the run that is open there."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return found - {"lock.json"}


def test_json_is_strict_and_nan_is_null(open_run):
    run = open_run(rates=(float("nan"), 0.5))
    run.log("fit", 5, {"loss": np.float32("nan"), "seeds": np.array([1.0, np.inf])})
    metrics = {"a": float("-inf"), "b": np.float32(2), "c": "word", "d": np.int64(3)}
    nan = Claim("y", float("nan"), "> 0", np.bool_(False))  # pyright: ignore
    assert run.finish(Report([CLAIM], {})) is True
    assert run.finish(Report([CLAIM, nan], metrics)) is False
    config = read(run.folder / "config.json")
    assert config["config"] == {"steps": 23, "rates": [None, 0.5], "name": "tiny"}
    assert (config["topic"], config["slug"]) == ("toy", "tiny")
    line = read(run.folder / "metrics.jsonl")
    assert line == {"fit": "fit", "step": 5, "loss": None, "seeds": [1.0, None]}
    report = read(run.folder / "report.json")
    assert report["claims"][0] == CLAIM._asdict()
    assert report["claims"][1]["measured"] is None
    assert report["claims"][1]["holds"] is False
    assert report["metrics"] == {"a": None, "b": 2.0, "c": "word", "d": 3}
    assert (report["status"], report["preset"]) == ("finished", "full")
    environment = read(run.folder / "env.json")
    assert {"python", "jax", "flax", "optax"} <= environment["versions"].keys()
    assert environment["device"].startswith("8 x cpu") and environment["commit"]


def test_history_has_the_values_of_one_fit_by_name(open_run):
    run = open_run()
    for step in (5, 10):
        run.log("a", step, {"loss": np.array([step, 2.0 * step])})
        run.log("b", step, {"other": float("nan") if step == 10 else 1.0})
    history = run.history("a")
    assert set(history) == {"step", "loss"}
    assert_array_equal(history["step"], [5, 10])
    assert history["step"].dtype.kind == "i"
    assert_array_equal(history["loss"], [[5.0, 10.0], [10.0, 20.0]])
    assert_array_equal(run.history("b")["other"], [1.0, np.nan])
    assert run.history("c") == {}


def test_forget_after_drops_later_lines_of_one_fit(open_run):
    run = open_run()
    run.forget_after("a", 0)  # before anything was logged
    for step in (5, 10, 15):
        for name in "ab":
            run.log(name, step, {"loss": 0.1 + step})
    kept = (run.folder / "metrics.jsonl").read_text().splitlines()
    run.forget_after("a", 5)
    assert_array_equal(run.history("a")["step"], [5])
    assert_array_equal(run.history("b")["step"], [5, 10, 15])
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert lines == [kept[i] for i in (0, 1, 3, 5)]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_half_a_last_line_is_dropped(open_run, cut):
    run = open_run()
    run.log("fit", 5, {"loss": 1.0})
    run.log("fit", 10, {"loss": 2.0})
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    run = open_run()
    assert run.resumed
    assert_array_equal(run.history("fit")["step"], [5])
    run.log("fit", 10, {"loss": 3.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        5,
        10,
    ]
    assert_array_equal(run.history("fit")["loss"], [1.0, 3.0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("thesis.tex", "years of work"),
        ("config.json", '{"model_type": "llama"}'),  # somebody else's
        ("config.json", "[1, 2]"),
        ("config.json", "{"),
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_refused_and_left_alone(
    open_run, tmp_path, name, text, fresh
):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text(text)
    with pytest.raises(
        RunFolderError, match=r"not empty and is not a run's.*--run-dir"
    ):
        open_run(fresh=fresh)
    assert files(folder) == {name}
    assert (folder / name).read_text() == text


def test_an_empty_folder_and_missing_parents_are_fine(open_run, tmp_path):
    (tmp_path / "run").mkdir()
    assert not open_run().resumed
    assert not open_run("a/b/c").resumed


def test_an_unfinished_run_with_other_settings_is_refused_by_name(open_run):
    run = open_run()
    run.log("fit", 5, {"loss": 1.0})
    before = {name: (run.folder / name).read_bytes() for name in files(run.folder)}
    with pytest.raises(RunFolderError) as refused:
        open_run(steps=7, rates=(0.1,), preset="smoke")
    sentence = str(refused.value)
    for words in (
        "unfinished run with other settings",
        "steps: 23 there, 7 here",
        "rates: [0.1, 0.2] there, [0.1] here",
        "preset: full there, smoke here",
        "--fresh",
        "--run-dir",
    ):
        assert words in sentence
    assert "name:" not in sentence and "slug:" not in sentence
    after = {name: (run.folder / name).read_bytes() for name in files(run.folder)}
    assert after == before
    assert open_run().resumed  # the same settings still continue it


def test_a_setting_that_is_gone_is_named(open_run):
    path = open_run().folder / "config.json"
    settings = read(path)
    settings["config"]["old"] = 3
    path.write_text(json.dumps(settings))
    with pytest.raises(RunFolderError, match="old: 3 there, nothing here"):
        open_run()


def test_another_title_alone_is_no_other_run(open_run):
    path = open_run().folder / "config.json"
    path.write_text(path.read_text().replace("Tiny", "Tiny, better said"))
    assert open_run().resumed


def write_all(run, single):
    single(run)
    assert run.finish(Report([CLAIM], {"a": 1.0}, [draw(run)]))


def test_a_finished_run_starts_over_and_spares_what_runs_do_not_write(open_run, single):
    write_all(run := open_run(), single)
    written = files(run.folder)
    assert {"report.json", "report.html", "curve.png", "metrics.jsonl"} <= written
    own = ["notes.txt", "notes.json", "photo.png", "analysis/curve.png", "page.html"]
    for name in own:
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text("mine")
    run = open_run()
    assert not run.resumed
    assert files(run.folder) == {"config.json", "env.json", *own}
    assert (run.folder / "notes.txt").read_text() == "mine"
    seen = []
    single(run, seen.append)
    assert seen == list(range(23))


def test_fresh_begins_again(open_run, single):
    single(open_run())
    run = open_run(fresh=True, steps=5)
    assert not run.resumed
    assert files(run.folder) == {"config.json", "env.json"}


def test_everything_is_written_in_the_runs_folder(
    open_run, single, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write_all(run := open_run(), single)
    assert files(elsewhere) == set()
    assert all(name.startswith("run/") for name in files(tmp_path))
    assert not [name for name in files(run.folder) if name.endswith(".tmp")]


def test_seconds_count_earlier_sittings(open_run):
    run = open_run()
    run._began -= 100.0  # as if it had been opened then
    run.log("fit", 5, {"loss": 1.0})
    run = open_run()
    run._began -= 20.0
    run.finish(Report([CLAIM], {}))
    assert 120.0 <= read(run.folder / "report.json")["seconds"] < 130.0


def test_the_same_figure_is_the_same_bytes(open_run):
    run = open_run()
    rows = [np.random.default_rng(1).random((4, 8, 8))] * 2
    pictures = []
    for name in ("first", "second"):
        draw(run, name)
        grid = image_grid(rows, ["data", "model"])
        run.figure(f"{name}_grid", grid, title="", caption="")
        pictures.append(
            [(run.folder / f"{name}{end}.png").read_bytes() for end in ("", "_grid")]
        )
    assert pictures[0] == pictures[1]
    assert pictures[0][0].startswith(b"\x89PNG") and len(pictures[0][0]) > 10_000


def test_report_html_needs_nothing_from_outside(open_run):
    run = open_run()
    run.finish(Report([CLAIM], {"a": 1.0}, [draw(run)]))
    html = (run.folder / "report.html").read_text()
    sources = re.findall(
        r"""(?:src|href|action|data)\s*=\s*["']?([^"'>]{0,40})""", html
    )
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"<script|<link|@import|url\(|https?://", html)
    assert "A &lt;random&gt; walk." in html and "x falls in [a, b]" in html


def test_the_claims_are_printed_as_they_are(open_run, capsys):
    run = open_run("a[b]/:smile:")
    fails = Claim("y", 0.25, "in [a, b]", False)
    run.finish(Report([CLAIM, fails], {}))
    out = capsys.readouterr().out
    assert "x falls in [a, b]" in out and "0.5 ± 0.1" in out
    assert re.search(r"0\.25.*in \[a, b\].*NO", out)
    # Whole, however long: it is there to be copied.
    assert f"Report: {run.folder / 'report.html'}\n" in out
