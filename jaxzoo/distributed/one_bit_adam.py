"""1-bit Adam: Adam whose momentum crosses the network as signs and a few scales.

Warm-up, `warmup` steps: Adam on the mean of the gradients, sent in float32. Then v
stays what it is, and worker i of n updates the momentum by its own gradient and sends
that, compressed; what it could not say it remembers and adds to its next message:

    m_i = b1 m + (1 - b1) g_i
    c_i = C(m_i + e_i),   e_i <- m_i + e_i - c_i            to n servers, a chunk each
    s   = mean_i c_i + e,   m = C(s),   e <- s - m          back to all workers
    u   = m / (sqrt(v) + eps)                               with Adam's bias corrections
    C(x) = mean|x| sign(x),   sign(0) = 1, a scale for each tensor

Each device is a worker, and the server of one n-th of the momentum; how messages are
cut, packed and remembered is in `jaxzoo.nn.sign_exchange`.

It is called inside of `jax.shard_map`, as is its `init`, with gradients as they are on
each device, not averaged; the module `dgc` beside it shows such a step.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxzoo.core.collectives import AxisName, axis_size, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.sign_exchange import mean_of_signs, no_errors

PAPER = {
    "slug": "one_bit_adam",
    "title": "1-bit Adam: Communication Efficient Large-Scale Training with Adam's "
    "Convergence Speed",
    "arxiv": "2102.02888",
    "year": 2021,
    "authors": "Hanlin Tang, Shaoduo Gan, Ammar Ahmad Awan, Samyam Rajbhandari, "
    "Conglong Li, Xiangru Lian, Ji Liu, Ce Zhang, Yuxiong He",
    "where": "Algorithm 1 (warm-up, then compressed momentum with the errors of worker "
    "and server), the test of whether v has settled; the compressed all-reduce is "
    "`jaxzoo.nn.sign_exchange`.",
    "differs": "A tensor's scale is the mean magnitude of its entries. The released "
    "code's root mean square is there, as scale='rms'; with it the errors of a digits "
    "net, whose inputs are mostly dark, grew until its loss was not finite. Moments "
    "have Adam's bias corrections, v that of the end of the warm-up; the released "
    "code takes the option and corrects nothing. Where v is 0 nothing is sent or "
    "remembered; the released code leaves such a mask to its user. All tensors travel "
    "in one message, scales behind the signs; the released code sends tensor by "
    "tensor, and scales by themselves. Weight decay is decoupled. The experiment "
    "trains nets of 33,440 and 9,610 parameters, on 8 workers simulated by vmap, for "
    "400 and 300 steps, a quarter of them warm-up, not BERT-Large. On digits training "
    "is not smooth: weights of pixels that are seldom lit have a small v, one bit "
    "moves them far, and the loss rises above 10 nats before errors bring it back. "
    "There, each at its best learning rate, 1-bit Adam (0.01) ends with the lower "
    "training loss than Adam (0.003); both at 0.01 it ends with the higher one, 0.028 "
    "against 0.016 nats.",
}

__all__ = [
    "OneBitAdamState",
    "one_bit_adam",
    "scale_by_one_bit_adam",
    "warmup_steps",
]

Number = float | int | jax.Array | np.ndarray | np.generic
Compression = Literal["momentum", "gradient", "none"]


class OneBitAdamState(NamedTuple):
    """The state of `scale_by_one_bit_adam`.

    Attributes:
        adam: count, mu and nu, the same on all devices.
        worker_error: what this worker has not sent, `[n * chunk]`. It and the next are
            another one on each device: `P(axis)` in the specs of `jax.shard_map`.
        server_error: what this server has not sent, `[chunk]`.
        bytes_sent: by this device in the last step, in rings, float32.
    """

    adam: optax.ScaleByAdamState
    worker_error: jax.Array
    server_error: jax.Array
    bytes_sent: jax.Array


@typed
def scale_by_one_bit_adam(
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    warmup: Number = 1000,
    compression: Compression = "momentum",
    scale: Literal["mean", "rms"] = "mean",
    error_feedback: bool = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformation:
    """The direction of 1-bit Adam, the same on all devices, of their own gradients.

    Args:
        b1: decay of the momentum, in [0, 1).
        b2: decay of v during the warm-up, in [0, 1).
        eps: >= 0, beside sqrt(v).
        warmup: steps of uncompressed Adam, >= 1; where v has settled, see
            `warmup_steps`.
        compression: "momentum" is 1-bit Adam. "gradient" compresses, after the warm-up,
            the gradients that both moments of Adam are then made of, which the paper
            shows to fail; its `warmup` may be 0. "none" is Adam throughout.
        scale: of a tensor's signs: "mean" of its magnitudes, with which an error is
            always shorter than what was to be sent; "rms" as in the released code, with
            which it is not if a few entries are much larger than the others.
        error_feedback: False forgets what a message could not say.
        axis_name: the axis of `jax.shard_map`, or of `jax.vmap`, whose devices are the
            workers; None is a world of one, which compresses all the same.

    Returns:
        The transformation; its state is a `OneBitAdamState`. Where v is 0 so are the
        momentum and its errors. With "none" it is `optax.scale_by_adam` of the mean
        gradient.

    Raises:
        ValueError: a number is out of range, or there is no such axis.

    >>> direction = scale_by_one_bit_adam(warmup=1)
    >>> state = direction.init(jnp.zeros(2))
    >>> for g in ([1.0, 2.0], [3.0, 6.0]):
    ...     u, state = direction.update(jnp.array(g), state)
    >>> u.tolist(), state.worker_error[:2].tolist()  # m = [0.39, 0.78], as +- 0.585
    ([3.0789, 1.5395], [-0.195, 0.195])
    """
    check_range("b1", b1, low=0.0, below=1.0)
    check_range("b2", b2, low=0.0, below=1.0)
    check_range("eps", eps, low=0.0)
    check_range("warmup", warmup, low=0.0 if compression == "gradient" else 1.0)
    knobs: Any = (b1, b2, eps, warmup)  # annotations know no sums of `Number`s
    decay1, decay2, small, steps = knobs
    adam: Any = optax.scale_by_adam(decay1, decay2, small)

    def init(params: Any) -> OneBitAdamState:
        params = jax.tree.map(lambda p: jnp.zeros_like(as_float32(p)), params)
        errors = no_errors(params, axis_name=axis_name)
        return OneBitAdamState(adam.init(params), *errors, jnp.float32(0.0))

    def dense(grads: Any, state: Any) -> Any:
        size = axis_size(axis_name)
        mean = jax.tree.map(lambda g: g / size, psum(grads, axis_name))
        updates, inner = adam.update(mean, state.adam)
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(grads))
        sent = jnp.float32(2.0 * total * (size - 1) / size)
        return updates, state._replace(adam=inner, bytes_sent=sent)

    def compressed(grads: Any, state: Any) -> Any:
        _, mu, nu = state.adam
        errors = state.worker_error, state.server_error
        if compression == "momentum":
            own = optax.tree.update_moment(grads, mu, decay1, 1)
            alive = jax.tree.map(lambda v: v > 0.0, nu)  # one bit cannot say 0
        else:
            own, alive = grads, jax.tree.map(lambda g: jnp.ones_like(g, bool), grads)
        power = 1 if scale == "mean" else 2
        mean, *rest, sent = mean_of_signs(
            own, alive, *errors, power=power, axis_name=axis_name
        )
        worker, server = rest if error_feedback else errors
        if compression == "gradient":
            updates, inner = adam.update(mean, state.adam)
        else:
            count: Any = optax.safe_increment(state.adam.count)
            frozen = jnp.minimum(count, jnp.asarray(steps).astype(count.dtype))
            updates = jax.tree.map(
                lambda m, v: m / (jnp.sqrt(v) + small),
                optax.tree.bias_correction(mean, decay1, count),
                optax.tree.bias_correction(nu, decay2, frozen),
            )
            inner = optax.ScaleByAdamState(count, mean, nu)
        return updates, OneBitAdamState(inner, worker, server, jnp.float32(sent))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        grads = jax.tree.map(as_float32, updates)
        if compression == "none":
            direction, state = dense(grads, state)
        else:
            # All devices count alike, so all are in the same branch's collectives.
            direction, state = lax.cond(
                state.adam.count < steps, dense, compressed, grads, state
            )
        return jax.tree.map(lambda u, g: u.astype(g.dtype), direction, updates), state

    return optax.GradientTransformation(init, update)


@typed
def one_bit_adam(
    learning_rate: Number | Callable[[Any], Any],
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    warmup: Number = 1000,
    compression: Compression = "momentum",
    axis_name: AxisName = None,
    weight_decay: Number = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """1-bit Adam, to be called inside `jax.shard_map` with each device's gradients.

    p <- p - learning_rate (m / (sqrt(v) + eps) + weight_decay p)

    Args:
        learning_rate: >= 0, or a schedule.
        b1: as for `scale_by_one_bit_adam`, and so the five that follow.
        b2: in [0, 1).
        eps: >= 0.
        warmup: steps of uncompressed Adam, >= 1.
        compression: "momentum", "gradient" or "none".
        axis_name: the axis of the workers; None is a world of one.
        weight_decay: decoupled, >= 0.
        mask: which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
        The optimizer; the first entry of its state is a `OneBitAdamState`.

    Raises:
        ValueError: a number is out of range, or there is no such axis.

    >>> optimizer = one_bit_adam(0.1, warmup=1)
    >>> p = jnp.array([3.0, -4.0])
    >>> state = optimizer.init(p)
    >>> for _ in range(100):
    ...     u, state = optimizer.update(p, state)
    ...     p = optax.apply_updates(p, u)
    >>> bool(jnp.all(jnp.abs(p) < 0.1))
    True
    """
    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, low=0.0)
    check_range("weight_decay", weight_decay, low=0.0)
    direction = scale_by_one_bit_adam(
        b1=b1, b2=b2, eps=eps, warmup=warmup, compression=compression,
        axis_name=axis_name,
    )  # fmt: skip
    rate: Any = learning_rate  # Optax's annotations know no NumPy numbers
    decay: Any = weight_decay
    if isinstance(decay, float | int) and decay == 0:  # asks for no parameters
        return optax.chain(direction, optax.scale_by_learning_rate(rate))
    decayed = optax.add_decayed_weights(decay, mask)
    return optax.chain(direction, decayed, optax.scale_by_learning_rate(rate))


@typed
def warmup_steps(
    norms: Float[ArrayLike, " steps"], *, b2: float = 0.999, threshold: float = 0.96
) -> Int[Array, ""]:
    """When v has settled, from a run of Adam: how long the warm-up has to be.

    The first t with min(a, b) / max(a, b) >= threshold, a = |v_t|_1, b = |v_(t-d)|_1,
    d = 1 / (1 - b2)

    Args:
        norms: |v|_1, the sum over all parameters, after steps 1, 2, ...
        b2: the decay of v, in [0, 1).
        threshold: in [0, 1]; the paper's is 0.96.

    Returns:
        The number of steps, int32; all of them where v never settles.

    Raises:
        ValueError: a number is out of range.

    >>> int(warmup_steps(jnp.array([1.0, 4.0, 5.0, 5.1, 5.1]), b2=0.5, threshold=0.9))
    5
    """
    check_range("b2", b2, low=0.0, below=1.0)
    check_range("threshold", threshold, low=0.0, high=1.0)
    v = jnp.asarray(norms)
    steps, lag = v.shape[0], round(1.0 / (1.0 - b2))
    now, before = v[lag:], v[: max(steps - lag, 0)]
    settled = jnp.minimum(now, before) >= threshold * jnp.maximum(now, before)
    first = jnp.argmax(jnp.append(settled, True))
    return jnp.minimum(lag + 1 + first, steps).astype(jnp.int32)


def _norms(key: Array) -> Array:
    return jnp.cumsum(jax.random.uniform(key, (64,)))


EXAMPLES = {
    one_bit_adam: lambda key: ((1e-2,), {"warmup": 20}),
    scale_by_one_bit_adam: lambda key: ((), {"warmup": 1}),
    warmup_steps: lambda key: ((_norms(key),), {"b2": 0.9}),
}
