"""The import contracts in pyproject.toml cover every topic that exists."""

import tomllib

from jaxzoo.catalogue import ROOT

FLOOR = {"core", "nn", "data", "training"}


def test_every_topic_stands_in_the_import_contracts():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers, independence, _ = settings["tool"]["importlinter"]["contracts"]
    named = {
        name.strip() for layer in layers["layers"] for name in layer.split("|")
    }  # topics share a layer: `jaxzoo.ssl | jaxzoo.vae` may not import each other
    for folder in (ROOT / "jaxzoo").iterdir():
        if folder.name in FLOOR or not (folder / "__init__.py").is_file():
            continue
        assert f"jaxzoo.{folder.name}" in named, f"{folder.name} is in no layer"
        assert f"jaxzoo.{folder.name}.*" in independence["modules"], folder.name


def test_init_files_are_empty():
    for package in ("jaxzoo", "experiments"):
        for file in (ROOT / package).rglob("__init__.py"):
            assert file.read_text("utf-8") == "", f"{file} is not empty"
