"""Passes of cascades counted by hand, their costs, and the figures that were released.

The figures of `RELEASED` were computed by the authors' Timeloop models: the files
workspace/outputs/pregenerated/results/attn-{unfused,cascade,binding}.csv of
github.com/FPSG-UIUC/micro24-fusemax-artifact, commit f543beb (MIT licence).
"""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.lm.fusemax import attention, attention_cascade
from jaxzoo.nn.cascade_cost import Accelerator, Binding, mapping_cost, pass_count
from jaxzoo.nn.einsum_cascade import Cascade, Einsum, execute

MACHINE = Accelerator(256, 256, 2**24, 2, 400 * 2**30 / 940e6, exponential=6)
PIPELINED = MACHINE._replace(exponential=0, buffer=2**25)
ONE_PASS = ("QK", "LM", "RM", "SLN", "SLD", "SLNV", "PRM", "SPD", "RD", "SPNV", "RNV")
FUSEMAX = Binding(("QK", "LM", "SLN", "SLD", "SLNV"), ((*ONE_PASS, "AV"),))
ON_1D = Binding(("QK", "SLNV"), FUSEMAX.groups)
UNFUSED = Binding(("QK", "AV"), (("QK",), ("GM", "SN", "SD", "A"), ("AV",)))
FUSED = Binding(("QK", "AV"), (("QK", "GM", "SN", "SD", "A", "AV"),))


def inputs(keys=12, scale=1.0, seed=0):
    rng = np.random.Generator(np.random.Philox(key=seed))
    shapes = {"Q": (4, 5), "K": (4, keys), "V": (3, keys)}
    return {name: scale * rng.standard_normal(s) for name, s in shapes.items()}


# Passes, counted by hand.


@pytest.mark.parametrize("passes", [3, 2, 1])
def test_attention_takes_three_two_and_one_passes(passes):
    assert pass_count(attention_cascade(passes), "m") == passes
    for rank in ("e", "f", "p"):
        assert pass_count(attention_cascade(passes), rank) == 1


def test_late_division_takes_the_third_pass_away():
    assert pass_count(attention_cascade(3, late_division=True), "m") == 2
    assert pass_count(attention_cascade(2, late_division=True), "m") == 2


def test_within_a_tile_the_cascade_of_one_pass_walks_twice():
    assert pass_count(attention_cascade(1), "m0") == 2
    assert pass_count(attention_cascade(1), "m1") == 1


def chain(*steps):
    return Cascade(("A[k]", "B[k]"), steps, steps[-1].output)


DOT = Einsum("Y[]", ("A[k]", "B[k]"), "times")


def test_the_cascades_of_section_three():
    again = Einsum("Z[]", ("Y[]", "A[k]"), "times")
    assert pass_count(chain(DOT, again), "k") == 2
    deferred = (Einsum("X[]", ("A[k]",)), Einsum("Z[]", ("Y[]", "X[]"), "times"))
    assert pass_count(chain(DOT, *deferred), "k") == 1
    iterative = (
        Einsum("P[i]", ("A[i]", "B[i]"), "times"),
        Einsum("RY[i+1]", ("RY[i]", "P[i]"), "plus"),
        Einsum("R[i]", ("RY[i+1]", "RY[i]"), "divide"),
        Einsum("C[i]", ("RZ[i]", "R[i]"), "times"),
        Einsum("D[i]", ("RY[i+1]", "A[i]"), "times"),
        Einsum("RZ[i+1]", ("C[i]", "D[i]"), "plus"),
        Einsum("Z[]", ("RZ[I]",)),
    )
    initial = (("RY", 0.0), ("RZ", 0.0))
    assert pass_count(chain(*iterative)._replace(initial=initial), "k") == 1


def layer_norm(*steps):
    return Cascade(("X[k,n]",), steps, "Y[k,n]")


MEAN = Einsum("M[n]", ("X[k,n]",))
CENTRED = Einsum("C[k,n]", ("X[k,n]", "M[n]"), "minus")
SQUARES = Einsum("V[n]", ("C[k,n]", "C[k,n]"), "times")
NORMED = Einsum("Y[k,n]", ("C[k,n]", "V[n]"), "divide")


def test_passes_follow_from_the_steps():
    """A layer norm: mean, variance, division are three; each step less is one less."""
    assert pass_count(layer_norm(MEAN, CENTRED, SQUARES, NORMED), "k") == 3
    assert pass_count(layer_norm(MEAN, CENTRED, SQUARES, NORMED), "n") == 1
    uncentred = Einsum("C[k,n]", ("X[k,n]",))
    assert pass_count(layer_norm(uncentred, SQUARES, NORMED), "k") == 2
    undivided = Einsum("Y[k,n]", ("C[k,n]",))
    assert pass_count(layer_norm(MEAN, CENTRED, undivided), "k") == 2
    assert pass_count(layer_norm(uncentred, undivided), "k") == 1


def test_what_was_not_read_before_needs_no_second_pass():
    """A pass is counted over a fibre; the sum of A says nothing about B."""
    total = Einsum("Y[]", ("A[k]",))
    assert pass_count(chain(total, Einsum("Z[]", ("Y[]", "B[k]"), "times")), "k") == 1
    # But what was computed from A element by element walks through A again.
    derived = Einsum("D[k]", ("A[k]", "B[k]"), "times")
    after = Einsum("Z[]", ("Y[]", "D[k]"), "times")
    assert pass_count(chain(total, derived, after), "k") == 2


def test_a_loop_around_a_reduction():
    """Fibres of each iteration are others, unless the tensor has no such rank."""

    def loop(a):
        steps = (
            Einsum("P[i]", (f"A[{a}]", "X[i]"), "times"),
            Einsum("X[i+1]", ("X[i]", "P[i]"), "plus"),
            Einsum("Z[]", ("X[I]",)),
        )
        return Cascade((f"A[{a}]", "B[i]"), steps, "Z[]", (("X", 1.0),))

    assert pass_count(loop("i,j"), "j") == 1
    with pytest.raises(ValueError, match="walks through j once more in every iter"):
        pass_count(loop("j"), "j")


# Costs: the authors' figures.

RELEASED = [
    # binding, sizes e = f, tokens, 2-D share, 1-D share, traffic per head in bytes
    (UNFUSED, 64, 2**10, 0.0766721058359586, 0.613376846687668, 6845104128 / 768),
    (UNFUSED, 64, 2**14, 0.0798895159133852, 0.639116127147082, 1655709892608 / 768),
    (UNFUSED, 64, 2**20, 0.0800978380920358, 0.640782704736286, 6757254866927616 / 768),
    (UNFUSED, 128, 2**12, 0.156710200100759, 0.626840800403038, 141733920768 / 1024),
    (ON_1D, 64, 2**10, 0.10912190963341858, 1.0, 402653184 / 768),
    (ON_1D, 64, 2**20, 0.11062944806817107, 1.0, None),
    (ON_1D, 128, 2**12, 0.1979891724671307, 1.0, 4294967296 / 1024),
    (FUSEMAX, 64, 2**10, 0.8896103896103896, 1.0, 402653184 / 768),
    (FUSEMAX, 64, 2**14, 0.9856115107913669, 1.0, 6442450944 / 768),
    (FUSEMAX, 64, 2**20, 0.9926412317445941, 1.0, 6803228196864 / 768),
    (FUSEMAX, 128, 2**10, 0.889261744966443, 1.0, 1073741824 / 1024),
    (FUSEMAX, 128, 2**18, 0.99577266322217, 1.0, 2336462209024 / 1024),
]


def cost_of(binding, width, tokens, machine, block=None, keys=None):
    sizes = (("e", width), ("f", width), ("m", keys or tokens), ("p", tokens))
    passes = 3 if binding in (UNFUSED, FUSED) else 1
    binding = binding._replace(block=block)
    return mapping_cost(attention_cascade(passes, 256), sizes, binding, machine)


@pytest.mark.parametrize("binding, width, tokens, on_2d, on_1d, traffic", RELEASED)
def test_utilisation_and_traffic_of_the_released_model(
    binding, width, tokens, on_2d, on_1d, traffic
):
    machine = {UNFUSED: PIPELINED, ON_1D: MACHINE._replace(exponential=1)}
    cost = cost_of(binding, width, tokens, machine.get(binding, MACHINE))
    # The baseline's tiles at long sequences were searched for; ours are halvings.
    rtol = 1e-9 if binding != UNFUSED or tokens < 2**16 else 1e-3
    assert_allclose(cost.utilisation_2d, on_2d, rtol=rtol)
    assert_allclose(cost.utilisation_1d, on_1d, rtol=rtol)
    if traffic is not None:
        assert_allclose(cost.traffic, traffic, rtol=rtol)


def test_cycles_of_fusemax_by_hand():
    """Per tile 64 + 1 + 7 + 1 + 64 cycles of the 2-D array; the 1-D array has more."""
    cost, tiles = cost_of(FUSEMAX, 64, 4096, MACHINE), 16 * 16
    assert cost.busy_2d == 137 * tiles
    one_d = (1 + 7 + 1 + 64 + 1 + 64) * tiles + 64 * 16
    assert cost.busy_1d == cost.cycles == one_d


def test_buffer_of_one_pass_by_hand_does_not_grow():
    # K and V of a tile; per query Q, two running scalars and the numerator.
    expected = 2 * (256 * 128 + 256 * (64 + 2 + 64))
    for keys in (2**10, 2**14, 2**20):
        assert cost_of(FUSEMAX, 64, 1024, MACHINE, 256, keys).buffer == expected


def test_buffer_of_three_passes_by_hand_grows_with_the_keys():
    # A tile of K and V, Q, maximum and sum, and scores of all keys.
    for keys in (2**10, 2**14, 2**20):
        expected = 2 * (256 * 128 + 256 * (64 + 2) + 256 * keys)
        assert cost_of(FUSED, 64, 1024, MACHINE, 256, keys).buffer == expected


def test_late_division_divides_less():
    """On the 1-D array F P divisions and not M P, all else the same."""
    sizes = (("e", 64), ("f", 64), ("m", 1024), ("p", 512))
    late = Binding(("QK", "SNV"), (("QK", "GM", "SN", "SD", "SNV", "AV"),))
    early = mapping_cost(attention_cascade(3), sizes, FUSED, MACHINE)
    later = mapping_cost(attention_cascade(3, 128, True), sizes, late, MACHINE)
    assert early.busy_1d - later.busy_1d == (1024 - 64) * 512 / 256
    assert early.busy_2d == later.busy_2d


# What is refused.


def test_bad_arguments_are_named():
    tensors, cascade = inputs(), attention_cascade(1, 5)
    with pytest.raises(ValueError, match="cuts 12 of m in tiles of 5, expected"):
        execute(cascade, tensors)
    with pytest.raises(ValueError, match="argument 'tensors' has no V, expected V"):
        execute(cascade, {"Q": tensors["Q"], "K": tensors["K"]})
    with pytest.raises(ValueError, match="has V with rank m of length 10, expected 12"):
        execute(cascade, {**tensors, "V": tensors["V"][:, :10]})
    with pytest.raises(ValueError, match="argument 'tensors' has V"):
        execute(cascade, {**tensors, "V": tensors["V"][0]})
    with pytest.raises(ValueError, match="reads B"):
        execute(Cascade(("A[k]",), (DOT,), "Y[]"), {"A": np.ones(3)})
    with pytest.raises(ValueError, match="expected one of take, exp"):
        execute(chain(DOT._replace(map="power")), {"A": np.ones(3), "B": np.ones(3)})
    with pytest.raises(ValueError, match="has no initial value of RM"):
        execute(attention_cascade(1, 4)._replace(initial=()), tensors)
    with pytest.raises(ValueError, match="argument 'rank' is 'z'"):
        pass_count(cascade, "z")
    with pytest.raises(ValueError, match="expected such as"):
        pass_count(chain(DOT._replace(output="Y")), "k")
    with pytest.raises(ValueError, match="argument 'passes' is 4"):
        attention_cascade(4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="argument 'tile' is 0"):
        attention_cascade(1, 0)
    q = jnp.zeros((1, 4, 1, 2))
    with pytest.raises(ValueError, match="argument 'tile' is 3, expected a divisor"):
        attention(q, q, q, tile=3)
    with pytest.raises(ValueError, match="argument 'binding' has the groups"):
        mapping_cost(attention_cascade(3), (), FUSEMAX, MACHINE)
    with pytest.raises(ValueError, match="argument 'sizes' has no"):
        mapping_cost(attention_cascade(3), (("e", 4), ("m", 8)), FUSED, MACHINE)
