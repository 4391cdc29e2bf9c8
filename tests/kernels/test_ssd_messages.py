"""What a call of Mamba-2's scan says: which implementation ran, and what is wrong."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from running import ELSEWHERE
from ssd_oracle import arrays

from pallas_kernels.ssd import ssd, step


def test_it_says_which_implementation_ran(monkeypatch, capsys):
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    ssd(*arrays())
    ssd(*arrays(), implementation="ref")
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    jax.eval_shape(ssd, *arrays())
    x, *others = arrays()
    jax.eval_shape(ssd, x.astype(jnp.bfloat16), *others)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(
        "ssd: xla (there is no kernel for 'cpu'); x float32[2, 20, 4, 3], B [2, 20"
    )
    assert said[1].startswith("ssd: ref (asked for)")
    assert said[2].startswith("ssd: pallas_tpu (the fastest here)")
    assert said[3].startswith("ssd: xla (the TPU kernel takes x, B, C and z of one dty")


ONES = jnp.ones
BAD = {
    "x of 3 axes": ({"x": ONES((2, 20, 4))}, TypeError, r"'x' is float32\[2, 20, 4\]"),
    "x of ints": ({"x": ONES((2, 20, 4, 3), int)}, TypeError, "'x' is int32"),
    "dt": ({"dt": ONES((2, 20, 1))}, TypeError, r"'dt' .*expected floats \[2, 20, 4\]"),
    "A": ({"A": ONES((4, 5))}, TypeError, r"'A' is float32\[4, 5\], expected .*\[4\]"),
    "B of 3 axes": ({"B": ONES((2, 20, 5))}, TypeError, "'B' is"),
    "B of fewer tokens": ({"B": ONES((2, 19, 2, 5))}, TypeError, "'B' is"),
    "groups": (
        {"B": ONES((2, 20, 3, 5)), "C": ONES((2, 20, 3, 5))}, TypeError,
        "'B' .* divides the 4 of 'x'",
    ),
    "C": ({"C": ONES((2, 20, 2, 6))}, TypeError, "'C' .*as 'B' has"),
    "D": ({"D": ONES(3)}, TypeError, r"'D' is float32\[3\].* or \[4, 3\]"),
    "D of 2 axes": ({"D": ONES((4, 2))}, TypeError, "'D' is"),
    "z": ({"z": ONES((2, 20, 4, 1))}, TypeError, "'z' .*as 'x' has"),
    "dt_bias": ({"dt_bias": ONES(1)}, TypeError, "'dt_bias' is"),
    "state": (
        {"initial_state": ONES((2, 4, 5, 3))}, TypeError,
        r"'initial_state' .*expected floats \[2, 4, 3, 5\]",
    ),
    "ids": ({"segment_ids": ONES((2, 19), int)}, TypeError, "'segment_ids' is int32"),
    "ids of floats": ({"segment_ids": ONES((2, 20))}, TypeError, "'segment_ids' is f"),
    "chunk": ({"chunk": 0}, ValueError, "'chunk' is 0"),
    "axis": ({"axis_name": "t"}, ValueError, "'axis_name' is 't'"),
    "name": (
        {"implementation": "cudnn"}, ValueError, "'cudnn', expected one of 'ref', 'xla'"
    ),
    "platform": ELSEWHERE,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    bad, error, message = BAD[name]
    given = dict(zip(("x", "dt", "A", "B", "C"), arrays(), strict=True))
    with pytest.raises(error, match=message):
        ssd(**cast(Any, given | bad))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"state": ONES((2, 4, 3))}, "'state' is"),
        ({"x": ONES((2, 1, 4, 3))}, "'x' is"),
        ({"dt": ONES(4)}, "'dt' is"),
        ({"B": ONES((2, 5))}, "'B' is"),
        ({"reset": ONES(2)}, r"'reset' is float32\[2\], expected bool \[2\]"),
    ],
)
def test_bad_input_of_a_step_is_named(bad, message):
    x, dt, A, B, C = (a if a.ndim == 1 else a[:, 0] for a in arrays())
    given = {"state": ONES((2, 4, 3, 5)), "x": x, "dt": dt, "A": A, "B": B, "C": C}
    with pytest.raises(TypeError, match=message):
        step(**cast(Any, given | bad))
