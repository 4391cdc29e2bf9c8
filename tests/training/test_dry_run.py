"""The dry run without any vendor's compiler: its figures on pretend CPU devices."""

import io
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxzoo.training import forecast
from jaxzoo.training.chips import Chip, chip
from jaxzoo.training.collectives import Collective
from jaxzoo.training.forecast import Memory, Network, network_seconds
from jaxzoo.training.forecast_page import advice, as_json, show
from tests.training.toy import ROWS, STEPS, WIDTH, program

CPU = Chip("cpu", ("cpu",), 1e12, 2**30, 1e11, 1e10, 1e9, 0, 1, "made up")


@pytest.fixture(scope="module")
def figures():
    """Forecasts by the size of fsdp, on eight devices."""
    devices = jax.devices()
    return {n: forecast.forecast(program(devices, n), CPU, "cpu") for n in (1, 2, 8)}


MATRICES = 2 * WIDTH * WIDTH * 4


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_memory_falls_with_fsdp(figures, fsdp):
    memory = figures[fsdp].memory
    assert memory.parameters == MATRICES // fsdp
    assert memory.optimizer == 2 * MATRICES // fsdp + 4  # and Adam's count
    assert memory.other == jax.random.key(0).dtype.itemsize
    assert memory.batch == STEPS * ROWS * WIDTH * 4 // 8
    assert memory.temporaries >= 0
    parts = (*memory[:4], memory.temporaries)
    assert memory.fits and sum(parts) == pytest.approx(memory.peak, rel=0.01)
    if fsdp > 1:
        assert memory.peak < 0.8 * figures[1].memory.peak


def test_flops_are_those_of_one_step_of_all_devices(figures):
    products = 2 * ROWS * WIDTH * WIDTH * 2 * 3
    for each in figures.values():
        assert each.matmul_flops == products
        assert products < each.flops < 1.3 * products
        assert each.unknown == ()
        assert each.compute_seconds == each.flops / 8 / CPU.flops


def test_collectives_are_those_of_one_step(figures):
    (gradients, *rest) = figures[1].networks
    assert (gradients.kind, gradients.group_size) == ("all-reduce", 8)
    assert gradients.bytes == pytest.approx(MATRICES, rel=0.01)
    assert gradients.wire_bytes == gradients.bytes * 2 * 7 / 8
    wire_seconds = gradients.wire_bytes / CPU.interconnect
    assert gradients.seconds == pytest.approx(wire_seconds)
    seconds = sum(network.seconds for network in (gradients, *rest))
    assert figures[1].network_seconds == pytest.approx(seconds)
    assert any(network.kind == "all-gather" for network in figures[8].networks)


def test_the_bound_is_the_longest_of_the_floors(figures):
    each = figures[1]
    seconds = (each.compute_seconds, each.memory_seconds, each.network_seconds)
    assert each.floor == max(seconds)
    names = ("compute", "memory", "network")
    assert each.bound == names[seconds.index(max(seconds))]
    assert each.mfu == each.compute_seconds / each.floor
    # Traffic: parameters, moments and gradients are moved a few times each step.
    assert 6 * MATRICES < each.traffic < 60 * MATRICES
    slow = each._replace(compute_seconds=1.0)
    assert (slow.bound, slow.floor, slow.mfu) == ("compute", 1.0, 1.0)


HEAD = {"experiment": "toy", "topology": "v5e:2x4", "versions": "jax 1"}


def printed(figures, width, colors=False):
    file = io.StringIO()
    console = Console(
        file=file, width=width, highlight=False, markup=False, force_terminal=colors
    )
    show(figures, CPU, HEAD, console)
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_report_has_every_figure_at_every_width(figures, width):
    text = printed(figures[8], width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "\x1b" not in text and "…" not in text
    assert "\x1b" in printed(figures[8], width, colors=True)
    for words in (
        "toy fit on v5e:2x4", "mesh data=1, fsdp=8", "p parameters", "4 KiB",
        "o optimizer state", "b batches of a call", "t temporaries", "  peak",
        "fits into 1 GiB", "counted from the jaxpr", "loops once", "all-gather",
        "10 GB/s in a node", "MFU", f"Bound by {figures[8].bound}",
    ):  # fmt: skip
        assert words in " ".join(text.split()) or words in text, words


def test_the_longest_names_and_numbers_stay_whole_at_60_columns(figures):
    permute = Network("collective-permute", 512, 4785.25, 4e11, 8e11, 8.78)
    text = printed(figures[8]._replace(networks=(permute,)), 60)
    assert "…" not in text
    for words in ("4785", "372.5 GiB", "745.1 GiB", "8.78 s", "512", "ollective"):
        assert words in text, words


def test_the_bar_shows_the_shares_and_the_limit(figures):
    memory = Memory(2**20, 2 * 2**20, 0, 0, 2**20, 4 * 2**20, 8 * 2**20)
    bar = printed(figures[8]._replace(memory=memory), 82)
    bar = next(line for line in bar.splitlines() if line.startswith("["))
    assert len(bar) == 60
    assert bar.count("p") == pytest.approx(58 / 8, abs=1)
    assert bar.count("o") == pytest.approx(58 / 4, abs=1)
    assert bar.count(".") == pytest.approx(58 / 2, abs=1)
    text = printed(figures[8]._replace(memory=memory._replace(available=2**21)), 82)
    bar = next(line for line in text.splitlines() if line.startswith("["))
    assert bar.index("|") == 30 and "." not in bar
    assert "DOES NOT FIT into 2 MiB" in text


def test_what_jax_does_not_take_of_a_gpu_by_default_is_told(figures):
    words = "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"
    memory = figures[1].memory
    for peak, told in ((60, False), (90, True), (120, False)):
        each = figures[1]._replace(memory=memory._replace(peak=peak, available=100))
        assert (words in printed(each, 200)) == told


def test_json_has_the_same_figures(figures):
    record = json.loads(json.dumps(as_json(figures[8], CPU)))
    assert record["memory"]["parameters"] == MATRICES // 8
    assert record["memory"]["fits"] is True
    assert record["bound"] == figures[8].bound
    assert record["floor_seconds"] == figures[8].floor
    assert record["examples_per_second"] == ROWS / figures[8].floor
    assert record["networks"][0]["kind"] == figures[8].networks[0].kind
    assert record["chip"]["name"] == "cpu"


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
            "the total memory required for HLO temporaries (600.00G) exceeds available "
            "HBM (15.75G). HLO module: jit_call.",
            600.0, 15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of "
            "15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5, 15.75,
        ),
    ],
)  # fmt: skip
def test_a_program_that_the_compiler_refuses_for_its_size(
    figures, message, needed, available
):
    class Refusing:
        def trace(self, *_):
            raise jax.errors.JaxRuntimeError(message)

    refused = program(jax.devices(), 1)._replace(call=Refusing())
    figures = forecast.forecast(refused, CPU, "cpu")
    memory = figures.memory
    assert (memory.peak / 2**30, memory.available / 2**30) == (needed, available)
    assert not memory.fits and memory.temporaries is None
    assert memory.parameters == MATRICES and figures.traffic is None
    text = printed(figures, 60)
    assert "DOES NOT FIT into 15.75 GiB" in text and "?" in text
    assert as_json(figures, CPU)["memory"]["fits"] is False
    sentence = advice(figures, "v5e:2x4")
    assert f"fit does not fit: it needs {needed:.4g} GiB of the 15.75 GiB" in sentence
    assert "a smaller batch" in sentence and "--topology v5e:4x4" in sentence


def test_another_error_of_the_compiler_is_not_taken_for_that():
    class Refusing:
        def trace(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vmem")

    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        refused = program(jax.devices(), 1)._replace(call=Refusing())
        forecast.forecast(refused, CPU, "cpu")


def test_the_advice_is_fsdp_where_the_state_is_the_load(figures):
    memory = Memory(10, 20, 0, 0, None, 100, 16)
    sentence = advice(figures[1]._replace(memory=memory), "v5e:16x16")
    assert sentence.endswith("Try --mesh fsdp=8 to split the state.")
    sentence = advice(figures[8]._replace(memory=memory), "v5e:2x4")
    assert sentence.endswith("Try --topology v5e:4x4.")


# The links that a group has.


class Device(NamedTuple):
    coords: tuple[int, ...]
    core: int = 0
    process_index: int = 0


def slice_of(*shape, cores=1):
    places = np.ndindex(*shape)
    return [Device(place, core) for place in places for core in range(cores)]


GB = 10**9


def seconds(name, devices, group, kind="all-gather"):
    made_of = chip(name)
    assert made_of is not None
    return network_seconds(Collective(kind, 1, GB, group), devices, made_of)


def test_a_group_has_the_links_of_its_axes():
    square = slice_of(4, 4, 1)
    whole, row = tuple(range(16)), (0, 1, 2, 3)
    # v5e: links of 50 GB/s; an axis of 4 is a line, one link at its ends.
    assert seconds("TPU v5 lite", square, row) == pytest.approx(3 / 4 / 50)
    assert seconds("TPU v5 lite", square, whole) == pytest.approx(15 / 16 / 100)
    # An axis of 16 is a ring.
    pod = slice_of(16, 16, 1)
    assert seconds("TPU v5 lite", pod, tuple(range(16))) == pytest.approx(15 / 16 / 100)
    # v5p: a ring where all three sides are multiples of four, links of 100 GB/s.
    cube = slice_of(4, 4, 4)
    assert seconds("TPU v5", cube, row) == pytest.approx(3 / 4 / 200)
    assert seconds("TPU v5", slice_of(2, 2, 4), row) == pytest.approx(3 / 4 / 100)
    reduced = seconds("TPU v5", cube, row, "all-reduce")
    assert reduced == pytest.approx(2 * 3 / 4 / 200)


def test_two_devices_of_a_chip_share_its_links():
    devices = slice_of(2, 2, 1, cores=2)
    # Both devices of each of two chips: a GB has to cross once, over one link.
    assert seconds("TPU7x", devices, (0, 1, 2, 3)) == pytest.approx(1 / 2 / 100)
    # One device of each: the other half of the chip's group wants the link too.
    assert seconds("TPU7x", devices, (0, 2)) == pytest.approx(1 / 2 / 50)
    assert seconds("TPU7x", devices, (0, 1)) == 0


def test_nodes_of_gpus_send_once_for_all_their_members():
    devices = [Device((), 0, node) for node in range(2) for _ in range(8)]
    kind = "NVIDIA H100 80GB HBM3"
    assert seconds(kind, devices, tuple(range(8))) == pytest.approx(7 / 8 / 450)
    # Eight adapters of 50 GB/s carry one copy of the half that the others lack.
    assert seconds(kind, devices, tuple(range(16))) == pytest.approx(7 / 8 / 450)
    assert seconds(kind, devices, (0, 8)) == pytest.approx(1 / 2 / 50)
    assert seconds(kind, devices, (0, 1, 8, 9)) == pytest.approx(1 / 2 / 100)
