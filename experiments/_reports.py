"""Reports that runs have left, and which of them may become the committed record."""

import ast
import json
from pathlib import Path
from typing import Any

from experiments._settings import read_settings
from jaxzoo.catalogue import Paper


def refusal(paper: Paper, report: dict[str, Any] | None, folder: Path) -> str:
    """Why a report cannot be the committed record; empty where it can."""
    if report is None:
        return f"{folder / 'report.json'} is missing or damaged"
    if report.get("preset") != "full":
        return f"the run in {folder} is of preset {report.get('preset')}, not full"
    if report.get("status") != "finished":
        return f"the run in {folder} is not finished"
    if lacks := {"claims", "seconds", "config"} - report.keys():
        return f"the report in {folder} lacks {min(lacks)}"
    # `full --steps 10` still calls itself full; only its settings tell.
    fields, presets = read_settings(paper)
    full, config = presets.get("full", {}), report["config"]
    for field in fields:
        try:
            wanted = full.get(field.name, ast.literal_eval(field.default))
        except (ValueError, SyntaxError):
            continue
        wanted = json.loads(json.dumps(wanted, default=str))
        if field.name in config and config[field.name] != wanted:
            told = f"{field.name} {config[field.name]} where full has {wanted}"
            return f"the run in {folder} has {told}"
    return ""


def read_report(folder: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def stamp(folder: Path) -> int | None:
    file = folder / "report.json"
    return file.stat().st_mtime_ns if file.is_file() else None


def without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if value != value else value


def held(report: dict[str, Any] | None) -> str:
    claims = report.get("claims") if report else None
    return f"{sum(c['holds'] for c in claims)}/{len(claims)}" if claims else "-"
