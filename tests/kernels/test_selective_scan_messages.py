"""What a call of the selective scan says: what ran, and which input is wrong."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from running import ELSEWHERE

from pallas_kernels.selective_scan import selective_scan, step


def test_it_says_which_implementation_ran(monkeypatch, capsys):
    one, A = jnp.ones((1, 2, 3)), -jnp.ones((3, 3))
    selective_scan(one, one, A, one, one)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    selective_scan(one, one, A, one, one)
    selective_scan(one, one, A, one, one, implementation="ref")
    selective_scan(one[:, :0], one[:, :0], A, one[:, :0], one[:, :0])
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    jax.eval_shape(selective_scan, one, one, A, one, one)
    jax.eval_shape(selective_scan, one, one, A + 0j, one, one)
    said = capsys.readouterr().err.splitlines()
    starts = [
        "xla (there is no kernel for 'cpu'); u float32[1, 2, 3], A [3, 3]",
        "ref (asked for)",
        "ref (an axis has length 0",
        "pallas_tpu (the fastest here)",
        "xla (the TPU kernel takes real A",
    ]
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(f"selective_scan: {start}")


ONE = jnp.ones((2, 5, 4))
GOOD: dict[str, Any] = {
    "u": ONE, "delta": ONE, "A": -ONE[0, :4, :3], "B": ONE[..., :3], "C": ONE[..., :3],
}  # fmt: skip
BAD = {
    "u": ({"u": ONE[0]}, TypeError, r"'u' is float32\[5, 4\], expected \[B, T, D\]\."),
    "ints": ({"u": ONE.astype(int)}, TypeError, "'u' is int32.*expected floats"),
    "delta": ({"delta": ONE[:, :4]}, TypeError, r"'delta' .*expected \[2, 5, 4\]"),
    "A": ({"A": ONE[0]}, TypeError, r"'A' is float32\[5, 4\], expected .*D = 4"),
    "A ints": ({"A": GOOD["A"].astype(int)}, TypeError, "'A' is int32"),
    "B": ({"B": ONE}, TypeError, r"'B' .*expected \[2, 5, 3\], or \[2, 5, G, 3\]"),
    "groups": ({"B": jnp.ones((2, 5, 3, 3))}, TypeError, "'B' .*a divisor of 4"),
    "no groups": ({"B": jnp.ones((2, 5, 0, 3))}, TypeError, "'B' .*a divisor of 4"),
    "complex B": ({"B": GOOD["B"] + 0j}, TypeError, "'B' is complex64.*'A' is not"),
    "C": ({"C": jnp.ones((2, 5, 1, 3))}, TypeError, r"'C' .*expected \[2, 5, 3\]"),
    "D": ({"D": ONE[0]}, TypeError, r"'D' is float32\[5, 4\], expected \[4\]"),
    "z": ({"z": ONE[:1]}, TypeError, r"'z' .*expected \[2, 5, 4\]"),
    "bias": ({"delta_bias": ONE[0, 0, :1]}, TypeError, r"'delta_bias' .*\[4\]"),
    "state": ({"initial_state": ONE}, TypeError, r"'initial_state' .*\[2, 4, 3\]"),
    "complex state": (
        {"initial_state": jnp.ones((2, 4, 3)) + 0j}, TypeError,
        "'initial_state' is complex64.*'A' is not",
    ),
    "ids": (
        {"segment_ids": jnp.ones((2, 4), int)}, TypeError,
        r"'segment_ids' .*expected integers \[2, 5\]",
    ),
    "float ids": ({"segment_ids": ONE[..., 0]}, TypeError, "'segment_ids' is float32"),
    "chunk": ({"chunk": 0}, ValueError, "'chunk' is 0, expected at least 1"),
    "rule": (
        {"discretization": cast(Any, "tustin")}, ValueError,
        "'discretization' is 'tustin', expected 'euler' or 'zoh'",
    ),
    "axis": ({"axis_name": "time"}, ValueError, "'axis_name' is 'time'"),
    "name": (
        {"implementation": cast(Any, "cuda")}, ValueError,
        "'implementation' is 'cuda', expected one of 'ref', 'xla'",
    ),
    "platform": ELSEWHERE,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        selective_scan(**{**GOOD, **changed})


BAD_STEPS = {
    "u": ({"u": ONE}, r"'u' .*expected \[B, D\]"),
    "B": ({"B": ONE[:, 0]}, r"'B' .*expected \[2, 3\], or \[2, G, 3\]"),
    "state": ({"state": ONE}, r"'state' .*expected \[2, 4, 3\]"),
    "reset": ({"reset": jnp.ones(2)}, r"'reset' .*expected bools \[2\]"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_input_of_a_step_is_named(name):
    changed, message = BAD_STEPS[name]
    row = {k: x if k == "A" else x[:, 0] for k, x in GOOD.items()}
    given = {"state": jnp.zeros((2, 4, 3)), **row, **changed}
    with pytest.raises(TypeError, match=message):
        step(**given)
    with pytest.raises(ValueError, match="'discretization' is 'exact'"):
        step(**{**given, "discretization": "exact"})
