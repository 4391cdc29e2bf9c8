"""Lion, sign momentum found by evolution.

    c = b1 m + (1 - b1) g
    p <- p - learning_rate (sign(c) + weight_decay p)
    m <- b2 m + (1 - b2) g                         # one buffer, half of Adam's

The search over programs that found it is `jaxzoo.nn.program_evolution`; this rule as a
program is `LION` of `jaxzoo.nn.update_programs`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxzoo.core.transform import (
    Mask,
    Number,
    Rate,
    descend,
    float32_zeros,
    in_float32,
    like,
)
from jaxzoo.core.typed import check_range

PAPER = {
    "slug": "lion",
    "title": "Symbolic Discovery of Optimization Algorithms",
    "arxiv": "2302.06675",
    "year": 2023,
    "authors": "Xiangning Chen, Chen Liang, Da Huang, Esteban Real, Kaiyuan Wang, Yao "
    "Liu, Hieu Pham, Xuanyi Dong, Thang Luong, Cho-Jui Hsieh, Yifeng Lu, Quoc V. Le",
    "where": "Algorithm 2 (Lion); section 2 (programs, mutation, regularised "
    "evolution, abstract execution) in jaxzoo.nn.update_programs and "
    "jaxzoo.nn.program_evolution; the funnel is in the experiment.",
    "differs": "The optimizer is Optax's; weight decay is 0 by default, as in the "
    "authors' code, Optax has 1e-3. Their search is not released. Here a "
    "program is a fixed number of statements over 17 functions, two memories "
    "and three temporaries; theirs has 45 functions and any variables. "
    "Arguments are arrays of one shape, so that no program has a type error; "
    "divisors stay 1e-8 away from 0. The hash is of expressions, with "
    "constants to the last bit. Simplification by hand, hyperparameter tuning"
    " and restarts are left to the caller. The paper searches from AdamW with"
    " thousands of TPU days; the experiment from SGD, 3,000 children, as a "
    "start from AdamW would hold the claim by itself. Measured: 86% of the "
    "children are duplicates and cost nothing; two of three winners of the "
    "funnel beat SGD at its best learning rate on fresh seeds, the third does"
    " not (0.80, 0.81 and 0.90 against 0.89 nats), none finds momentum, and "
    "AdamW (0.61) and Lion (0.66) stay ahead. Without a bound on the weights "
    "evolution finds that equal logits of 1e20 have a float32 loss of 0. On "
    "Moby Dick, 300 steps, Lion is 1.3% behind AdamW if both are tuned (0.006"
    " and 0.01), but 14% at exactly a fifth of AdamW's best learning rate, "
    "which is too small for so few steps.",
}

__all__ = ["lion", "scale_by_lion"]


def scale_by_lion(
    *, b1: Number = 0.9, b2: Number = 0.99
) -> optax.GradientTransformation:
    """sign(b1 m + (1 - b1) g): Optax's, with its momentum in float32.

    Args:
        b1: weight of the momentum in the step, in [0, 1).
        b2: weight of the momentum in the next momentum, in (0, 1).

    Returns:
        A transformation whose state is one buffer of the parameters' shape.

    Raises:
        ValueError: a number is out of range.

    >>> direction = scale_by_lion()
    >>> g = jnp.array([3.0, -0.1, 0.0])
    >>> direction.update(g, direction.init(g))[0].tolist()
    [1.0, -1.0, 0.0]
    """
    check_range("b1", b1, low=0.0, below=1.0)
    check_range("b2", b2, above=0.0, below=1.0)
    rates: Any = {"b1": b1, "b2": b2}
    inner, share = optax.scale_by_lion(**rates), rates["b1"] / rates["b2"]

    def init(params: Any) -> Any:
        return inner.init(float32_zeros(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        g = in_float32(updates)
        _, state = inner.update(g, state, params)
        # Optax's direction in terms of the new momentum. As a function of the old one
        # it makes XLA copy that before it is overwritten: twice the time on a CPU.
        direction = jax.tree.map(
            lambda m, g: jnp.sign(share * m + (1.0 - share) * g), state.mu, g
        )
        return like(direction, updates), state

    return optax.GradientTransformation(init, update)


def lion(
    learning_rate: Rate, *, b1: Number = 0.9, b2: Number = 0.99,
    weight_decay: Number = 0.0, mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Lion: every coordinate moves by the learning rate, and decays.

    The authors take a learning rate 3 to 10 times below AdamW's, and a weight decay as
    many times above.

    Args:
        learning_rate: >= 0, or a schedule of the step.
        b1: as for `scale_by_lion`.
        b2: as for `scale_by_lion`.
        weight_decay: decoupled, >= 0; the authors' code has 0 as its default.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Returns:
        An Optax optimizer, equal to `optax.lion` on float32 parameters, but where
        b1 m + (1 - b1) g is 0 up to rounding.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer = lion(0.01)
    >>> g = jnp.array([3.0, -0.1])
    >>> optimizer.update(g, optimizer.init(g))[0].tolist()
    [-0.01, 0.01]
    """
    direction = scale_by_lion(b1=b1, b2=b2)
    return descend(direction, learning_rate, weight_decay=weight_decay, mask=mask)


EXAMPLES = {scale_by_lion: lambda key: ((), {}), lion: lambda key: ((0.01,), {})}
