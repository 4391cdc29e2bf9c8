"""FuseMax: attention as cascades of Einsums, counted by passes and mapped on arrays.

An algorithm is a list of steps in index notation. How often it has to walk through the
keys follows from the steps alone, whatever the hardware and the order of loops:

    GM[p]   = max_m QK[m,p]                  all keys, before
    SN[m,p] = exp(QK[m,p] - GM[p])           any key again: one more pass

Softmax attention takes 3 passes over the keys, or 2, or, with a running maximum, 1.
What is read in several passes is kept whole or read again; a cascade of 1 pass needs a
buffer that does not grow with the sequence, and keeps two arrays of processing elements
busy.

    cascade = attention_cascade(1, tile=256)
    execute(cascade, {"Q": q, "K": k, "V": v})        # [F, P]
    pass_count(cascade, "m")                          # 1
    mapping_cost(cascade, sizes, binding, machine)    # cycles, traffic, buffer

Steps of any algorithm are executed by `jaxzoo.nn.einsum_cascade`; their passes, and
what attention takes on two arrays, are counted by `jaxzoo.nn.cascade_cost`.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.einsum_cascade import Cascade, Einsum, execute

PAPER = {
    "slug": "fusemax",
    "title": "FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator "
    "Design",
    "arxiv": "2406.10491",
    "year": 2024,
    "authors": "Nandeeka Nayak, Xinrui Wu, Toluwanimi O. Odemuyiwa, Michael Pellauer, "
    "Joel S. Emer, Christopher W. Fletcher",
    "where": "Sections II-C (extended Einsums, in jaxzoo.nn.einsum_cascade), III-A "
    "(passes) and V (mapping and binding, both in jaxzoo.nn.cascade_cost), IV-D and "
    "IV-E (late division; Cascades 4 and 5).",
    "differs": "Tensors are dense: no merge operators. The paper gives the 2-pass "
    "cascade in words only. Cycles are operations over processing elements, the "
    "largest of both arrays and the memory: the paper's interleaving hides fills and "
    "drains, and nothing is simulated. Energy, area and FLAT are not modelled. The "
    "utilisations of the released model are met, to 4 digits for FuseMax and 2 for "
    "the unfused baseline. At 1K tokens FuseMax keeps 0.89 of the 2-D array busy, also "
    "in the released figures: 0.9 holds from 4K on. In float32 the cascades are within "
    "1e-5 of softmax attention where scores are divided by sqrt(E), which the paper's "
    "leave out; without, 1.2e-5 was seen.",
}

__all__ = ["attention", "attention_cascade"]

LARGEST = 1e6  # of an entry of a query or key: scores and their gradients stay finite


@typed
def attention(
    q: Float[ArrayLike, "batch queries heads d"],
    k: Float[ArrayLike, "batch keys heads d"],
    v: Float[ArrayLike, "batch keys heads f"],
    *,
    passes: Literal[1, 2, 3] = 1,
    tile: int = 128,
    scale: float = 1.0,
) -> Float[Array, "batch queries heads f"]:
    """Softmax attention by one of the cascades: softmax(scale q k^T) v.

    Args:
        q: queries. Entries of `scale * q` and of k beyond 1e6 count as 1e6.
        k: keys.
        v: values.
        passes: which cascade: how often it walks through the keys.
        tile: keys per tile of 1 and 2 passes; has to divide their number, unless there
            are fewer keys than that.
        scale: of the scores. The paper leaves 1/sqrt(d) out, which is 1.0.

    Returns:
        float32 (float64 of float64), the same for every `passes` up to rounding.

    Raises:
        ValueError: `tile` does not divide the keys, or `scale` is NaN.

    >>> x = jnp.eye(2).reshape(1, 2, 1, 2)
    >>> attention(x, x, x, tile=1)[0, :, 0].tolist()
    [[0.7311, 0.2689], [0.2689, 0.7311]]
    """
    check_range("scale", scale)
    check_range("tile", tile, low=1)
    cascade = attention_cascade(passes, tile=min(tile, k.shape[1]))
    if k.shape[1] % min(tile, k.shape[1]):
        raise ValueError(
            f"argument 'tile' is {tile}, expected a divisor of the {k.shape[1]} keys."
        )
    q, k = (jnp.clip(as_float32(x), -LARGEST, LARGEST) for x in (scale * q, k))

    def one(q: Array, k: Array, v: Array) -> Array:
        return execute(cascade, {"Q": q.T, "K": k.T, "V": v.T}).T

    return jax.vmap(jax.vmap(one, 1, 1))(q, k, as_float32(v))


@functools.cache
@typed
def attention_cascade(
    passes: Literal[1, 2, 3], tile: int = 128, late_division: bool = False
) -> Cascade:
    """The attention cascades: Q [e,p], K [e,m] and V [f,m] to AV [f,p].

    3: maximum; exponentials and their sum; division, and the product with V.
    2: per tile of keys its maximum, exponentials and sum; then what corrects them to
       the global maximum, division, and the product with V.
    1: running maximum, denominator and numerator times V; each new maximum corrects
       what was summed so far.

    Args:
        passes: over the rank m of keys, 1, 2 or 3.
        tile: keys per tile, >= 1; 3 passes have no tiles.
        late_division: divide after the product with V: F P divisions, not M P. That of
            1 pass always is. It takes the third pass of 3 away.

    Returns:
        The cascade, as a tuple that can be changed step by step.

    Raises:
        ValueError: `tile` is below 1, or `passes` another number.

    >>> [step.output for step in attention_cascade(3).steps]
    ['QK[m,p]', 'GM[p]', 'SN[m,p]', 'SD[p]', 'A[m,p]', 'AV[f,p]']
    """
    check_range("tile", tile, low=1)
    inputs, output = ("Q[e,p]", "K[e,m]", "V[f,m]"), "AV[f,p]"
    if passes == 3:
        steps = (
            Einsum("QK[m,p]", ("Q[e,p]", "K[e,m]"), "times"),
            Einsum("GM[p]", ("QK[m,p]",), reduce="max"),
            Einsum("SN[m,p]", ("QK[m,p]", "GM[p]"), "sub_exp"),
            Einsum("SD[p]", ("SN[m,p]",)),
        )
        return Cascade(inputs, steps + _divided("m", "m", late_division), output)
    tiles = (
        Einsum("QK[m1,m0,p]", ("Q[e,p]", "K[e,m1*M0+m0]"), "times"),
        Einsum("LM[m1,p]", ("QK[m1,m0,p]",), reduce="max"),
    )
    sizes = (("m0", tile),)
    if passes == 2:
        steps = (
            Einsum("SLN[m1,m0,p]", ("QK[m1,m0,p]", "LM[m1,p]"), "sub_exp"),
            Einsum("SLD[m1,p]", ("SLN[m1,m0,p]",)),
            Einsum("GM[p]", ("LM[m1,p]",), reduce="max"),
            Einsum("PLM[m1,p]", ("LM[m1,p]", "GM[p]"), "sub_exp"),
            Einsum("SD[p]", ("SLD[m1,p]", "PLM[m1,p]"), "times"),
            Einsum("SN[m1,m0,p]", ("SLN[m1,m0,p]", "PLM[m1,p]"), "times"),
        )
        last = _divided("m1,m0", "m1*M0+m0", late_division)
        return Cascade(inputs, tiles + steps + last, output, sizes=sizes)
    steps = (
        Einsum("RM[m1+1,p]", ("RM[m1,p]", "LM[m1,p]"), "max"),
        Einsum("SLN[m1,m0,p]", ("QK[m1,m0,p]", "RM[m1+1,p]"), "sub_exp"),
        Einsum("SLD[m1,p]", ("SLN[m1,m0,p]",)),
        Einsum("SLNV[f,m1,p]", ("SLN[m1,m0,p]", "V[f,m1*M0+m0]"), "times"),
        Einsum("PRM[m1,p]", ("RM[m1,p]", "RM[m1+1,p]"), "sub_exp"),
        Einsum("SPD[m1,p]", ("RD[m1,p]", "PRM[m1,p]"), "times"),
        Einsum("RD[m1+1,p]", ("SLD[m1,p]", "SPD[m1,p]"), "plus"),
        Einsum("SPNV[f,m1,p]", ("RNV[f,m1,p]", "PRM[m1,p]"), "times"),
        Einsum("RNV[f,m1+1,p]", ("SLNV[f,m1,p]", "SPNV[f,m1,p]"), "plus"),
        Einsum("AV[f,p]", ("RNV[f,M1,p]", "RD[M1,p]"), "divide"),
    )
    initial = (("RM", -math.inf), ("RD", 0.0), ("RNV", 0.0))
    return Cascade(inputs, tiles + steps, output, initial, sizes)


def _divided(ranks: str, keys: str, late: bool) -> tuple[Einsum, ...]:
    if late:
        product = Einsum("SNV[f,p]", (f"SN[{ranks},p]", f"V[f,{keys}]"), "times")
        return product, Einsum("AV[f,p]", ("SNV[f,p]", "SD[p]"), "divide")
    quotient = Einsum(f"A[{ranks},p]", (f"SN[{ranks},p]", "SD[p]"), "divide")
    return quotient, Einsum("AV[f,p]", (f"A[{ranks},p]", f"V[f,{keys}]"), "times")


def _example(key: Array):
    q, k, v = jax.random.split(key, 3)
    draw = jax.random.normal
    return (draw(q, (2, 8, 2, 4)), draw(k, (2, 16, 2, 4)), draw(v, (2, 16, 2, 3)))


EXAMPLES = {attention: lambda key: (_example(key), {"tile": 4})}
