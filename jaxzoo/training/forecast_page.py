"""Shows a forecast on a terminal, and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxzoo.training.chips import Chip
from jaxzoo.training.forecast import Forecast, Memory
from jaxzoo.training.topology import TOPOLOGIES

__all__ = ["advice", "as_json", "show"]

_COLORS = ("cyan", "blue", "magenta", "yellow", "green")
_PREALLOCATED = 0.75  # of a GPU's memory, by JAX's default
_LETTERS = "posbt"  # where a terminal has no colors


def show(
    figures: Forecast, chip: Chip, head: dict[str, str], console: Console | None = None
) -> None:
    """Prints the report.

    Args:
        figures: what to show.
        chip: what they are for.
        head: "experiment", "topology" and "versions".
        console: where to; None takes standard output.
    """
    out = console or Console(highlight=False, emoji=False, markup=False)
    mesh = ", ".join(f"{name}={size}" for name, size in figures.mesh.items())
    plural = "s" if figures.devices > 1 else ""
    out.print(f"{head['experiment']} {figures.fit} on {head['topology']}", style="bold")
    out.print(
        f"{figures.devices} device{plural}, mesh {mesh}; "
        f"{figures.examples} examples per step, {figures.steps} steps per call; "
        f"compiled in {figures.compile_seconds:.1f} s by {head['versions']}",
        style="dim",
    )
    _memory(out, figures.memory)
    share = figures.memory.peak / figures.memory.available
    if not chip.links and _PREALLOCATED < share <= 1:
        out.print(
            "More than JAX takes of a GPU by default: set "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={min(share + 0.02, 1.0):.2f}.",
            style="yellow",
        )
    if figures.traffic is None:
        return
    _compute(out, figures)
    _networks(out, figures)
    _bound(out, figures, chip)


def _memory(out: Console, memory: Memory) -> None:
    out.print("\nMemory of each device", style="bold")
    table, available = _table(), memory.available
    for letter, color, (name, size) in zip(
        _LETTERS, _COLORS, _parts(memory), strict=True
    ):
        if size is not None:
            label = Text.assemble((letter, color), f" {name}")
            table.add_row(label, _bytes(size), _percent(size / available))
    peak = _bytes(memory.peak), _percent(memory.peak / available)
    table.add_row("  peak", *peak, style="bold")
    out.print(table)
    out.print(_bar(memory, min(out.width, 60)))
    style = "bold green" if memory.fits else "bold red"
    verdict = "fits into" if memory.fits else "DOES NOT FIT into"
    out.print(f"{verdict} {_bytes(available)}", style=style)


def _parts(memory: Memory) -> list[tuple[str, int | None]]:
    return [
        ("parameters", memory.parameters),
        ("optimizer state", memory.optimizer),
        ("other state", memory.other),
        ("batches of a call", memory.batch),
        ("temporaries, padding", memory.temporaries),
    ]


def _bar(memory: Memory, width: int) -> Text:
    """The device's memory in letters; a | where it ends and more is needed."""
    cells = width - 2
    whole = max(memory.peak, memory.available)
    row, size = [], 0
    for letter, color, (_, part) in zip(_LETTERS, _COLORS, _parts(memory), strict=True):
        size += part or 0
        row += [(letter, color)] * (round(cells * size / whole) - len(row))
    if memory.temporaries is None:  # the compiler gives only their sum
        row += [("?", "red")] * (cells - len(row))
    row += [(".", "dim")] * (cells - len(row))
    if not memory.fits:
        row[min(round(cells * memory.available / whole), cells - 1)] = ("|", "bold red")
    return Text.assemble("[", *row, "]")


def _compute(out: Console, figures: Forecast) -> None:
    out.print("\nWork of each step", style="bold")
    table, jaxpr = _table(), "counted from the jaxpr"
    share = figures.matmul_flops / figures.flops if figures.flops else 0.0
    table.add_row("FLOPs, all devices", _si(figures.flops), jaxpr)
    table.add_row("  matrix products", _percent(share), jaxpr)
    table.add_row("FLOPs, each device", _si(figures.flops / figures.devices), jaxpr)
    if figures.compiler_flops is None:
        table.add_row("  by the compiler", "-", "it tells none")
    else:
        table.add_row("  by the compiler", _si(figures.compiler_flops), "loops once")
    traffic = _bytes(figures.traffic or 0)
    table.add_row("memory traffic, each", traffic, "counted from the HLO")
    out.print(table)
    for words in figures.unknown:
        out.print(f"Not counted right: {words}.", style="yellow")


def _networks(out: Console, figures: Forecast) -> None:
    if not figures.networks:
        out.print("\nNo collectives.")
        return
    out.print("\nCollectives of each device and step, from the HLO", style="bold")
    table = _table("kind", "over", "count", "payload", "sends", "time")
    for n in figures.networks:
        table.add_row(
            n.kind,
            f"{n.group_size}",
            f"{n.count:.4g}",
            _bytes(n.bytes),
            _bytes(n.wire_bytes),
            _seconds(n.seconds),
        )
    out.print(table)


def _bound(out: Console, figures: Forecast, chip: Chip) -> None:
    out.print(f"\nFloor of each step at the peak rates of {chip.name}", style="bold")
    table = _table()
    links = "per link" if chip.links else "in a node"
    link = chip.interconnect * chip.per_chip / max(chip.links, 1) / 1e9
    rates = {
        "compute": (figures.compute_seconds, f"{chip.flops / 1e12:.4g} TFLOP/s"),
        "memory": (figures.memory_seconds, f"{chip.bandwidth / 1e9:.4g} GB/s"),
        "network": (figures.network_seconds, f"{link:.4g} GB/s {links}"),
    }
    for name, (seconds, rate) in rates.items():
        binds = name == figures.bound
        label = Text(f"{name}, the bound" if binds else name, "bold" if binds else "")
        table.add_row(label, _seconds(seconds or 0.0), rate)
    out.print(table)
    ceiling = figures.examples / figures.floor if figures.floor else float("inf")
    out.print(
        f"Bound by {figures.bound}: no step under {_seconds(figures.floor)}, at most "
        f"{_si(ceiling)} examples/s and {_percent(figures.mfu)} MFU.",
        style="bold",
    )


def _table(*headers: str) -> Table:
    table = Table(
        box=None, show_header=bool(headers), header_style="dim", pad_edge=False
    )
    for header in headers or ("", "", ""):
        justify = "right" if table.columns else "left"
        table.add_column(header, justify=justify, overflow="fold")
    return table


def advice(figures: Forecast, topology: str) -> str:
    """One sentence on a program that does not fit: by how much, and what to try."""
    memory, mesh = figures.memory, figures.mesh
    state = memory.parameters + memory.optimizer + memory.other
    tries = []
    if state > memory.available // 8 and mesh.get("fsdp", 1) < figures.devices:
        tries.append(f"--mesh fsdp={figures.devices} to split the state")
    if state <= memory.available // 2:
        tries.append("a smaller batch or jax.checkpoint around a layer")
    larger = _larger(topology)
    if larger:
        tries.append(f"--topology {larger}")
    return (
        f"{figures.fit} does not fit: it needs {_bytes(memory.peak)} of the "
        f"{_bytes(memory.available)} of each device. Try {', or '.join(tries)}."
    )


def _larger(topology: str) -> str:
    kind, _, shape = topology.lower().partition(":")
    shapes = TOPOLOGIES[kind]
    place = shapes.index(shape) + 1
    return f"{kind}:{shapes[place]}" if place < len(shapes) else ""


def as_json(figures: Forecast, chip: Chip) -> dict[str, Any]:
    """The figures with what follows from them, in types that JSON has."""
    record = figures._asdict() | {
        "memory": figures.memory._asdict() | {"fits": figures.memory.fits},
        "networks": [network._asdict() for network in figures.networks],
        "chip": chip._asdict(),
    }
    if figures.traffic is None:
        return record
    return record | {
        "bound": figures.bound,
        "floor_seconds": figures.floor,
        "examples_per_second": figures.examples / figures.floor,
        "mfu": figures.mfu,
    }


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if value < 1000:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:.3g} Z"


def _seconds(value: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns" if value >= 1e-9 or not value else "< 1 ns"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else "< 0.1 %"
