"""What the bench of attention calls, as data.

G1 to G9 are calls at the sizes of published figures: forward and gradient of causal and
full attention with heads of 64, 128 and 256, windows, packed documents, grouped query
heads, LongLoRA's shifted groups, and decoding from a paged cache. A goal is the figure
to be met: TFLOP/s on a Hopper GPU, or a share of another contestant's speed in the same
run. Inputs are random, as a GPU is faster on zeros.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import shifted_groups

CUDNN, JAX, TORCH, FULL = "jax.nn cudnn", "jax.nn xla", "torch", "full"
PEERS = (CUDNN, JAX, TORCH)
DECODE = "decode_attention"
FLOPS, COPY = "TFLOP/s", "copy rate"


class Call(NamedTuple):
    """One call of attention.

    Attributes:
        batch: B.
        length: T.
        heads: N.
        width: H.
        key_heads: K; 0: N.
        keys: S; 0: T.
        causal: keys after the query do not count.
        window: (left, right) keys beside the query's own.
        documents: of equal length in each row.
        group: of LongLoRA's shifted groups; 0: none.
        page: tokens of a page of the cache, for decoding; 0: no cache.
        softcap: of the logits.
        sinks: whether each head has one.
        mask: "keys", "queries" or "pairs"; "": none.
        drop: share of the pairs.
        dtype: of q, k and v.
    """

    batch: int
    length: int
    heads: int
    width: int
    key_heads: int = 0
    keys: int = 0
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    documents: int = 1
    group: int = 0
    page: int = 0
    softcap: float | None = None
    sinks: bool = False
    mask: str = ""
    drop: float = 0.0
    dtype: str = "bfloat16"


class Goal(NamedTuple):
    """`way` ("forward" or "backward") at `bound` of `of`: a contestant or a unit."""

    way: str
    of: str
    bound: float


class Workload(NamedTuple):
    """A call to be timed.

    Attributes:
        name: begins with its group, G1 to G9.
        call: what is called.
        goals: what its time is held to.
        peers: contestants beside ours and XLA.
    """

    name: str
    call: Call
    goals: tuple[Goal, ...]
    peers: tuple[str, ...] = PEERS


def _both(of: str, bound: float) -> tuple[Goal, Goal]:
    return Goal("forward", of, bound), Goal("backward", of, bound)


_FULL = Goal("forward", CUDNN, 0.95)
_CAUSAL = (_FULL, Goal("forward", FLOPS, 600.0))
WORKLOADS = (
    Workload("G1 full 16k", Call(1, 16384, 16, 128, causal=False), (_FULL,)),
    Workload("G1 causal 16k", Call(1, 16384, 16, 128), _CAUSAL),
    Workload("G1 full 8k", Call(2, 8192, 16, 128, causal=False), (_FULL,)),
    Workload("G1 causal 8k", Call(2, 8192, 16, 128), _CAUSAL),
    Workload("G2 causal 8k", Call(4, 8192, 16, 128), (Goal("backward", FLOPS, 450.0),)),
    Workload(
        "G3 d256 causal 16k", Call(1, 16384, 8, 256), (Goal("backward", FLOPS, 250.0),)
    ),
    Workload(
        "G4 d64 causal 16k",
        Call(1, 16384, 16, 64),
        (Goal("forward", FLOPS, 500.0), Goal("backward", FLOPS, 330.0)),
    ),
    *(
        Workload(
            f"G5 window {window} {length >> 10}k",
            Call(2**16 // length, length, 16, 128, window=(window - 1, 0)),
            _both(CUDNN, 1.0),
        )
        for length in (8192, 32768)
        for window in (128, 1024, 4096)
    ),
    *(
        Workload(
            f"G6 4 documents {length >> 10}k",
            Call(2**15 // length, length, 16, 128, documents=4),
            _both(CUDNN, 3.5),
        )
        for length in (2048, 8192, 32768)
    ),
    Workload(
        "G7 32/8 heads causal 4k",
        Call(32, 4096, 32, 128, key_heads=8),
        (Goal("forward", FLOPS, 600.0), Goal("backward", FLOPS, 400.0)),
    ),
    *(
        Workload(
            f"G8 shifted groups {length >> 10}k",
            Call(1, length, 32, 128, group=length // 4),
            _both(FULL, 3.2),
            (FULL,),
        )
        for length in (16384, 65536)
    ),
    *(
        Workload(
            f"G9 decode {batch * keys >> 18} GiB",
            Call(batch, 1, 32, 128, 8, keys, causal=False, page=64),
            (Goal("forward", COPY, 0.8),),
        )
        for batch, keys in ((64, 8192), (128, 16384))
    ),
)

# What is compared with the definition before anything is timed.
_SMALL = Call(2, 320, 4, 128, key_heads=2)
CHECKS = {
    **{
        f"d{width} {'causal' if causal else 'full'} {dtype}": _SMALL._replace(
            width=width, causal=causal, dtype=dtype
        )
        for width in (64, 128, 256)
        for causal in (True, False)
        for dtype in ("bfloat16", "float16")
    },
    "float32": _SMALL._replace(dtype="float32"),
    "odd lengths": _SMALL._replace(length=333, keys=257),
    "width 80": _SMALL._replace(width=80),
    "one query": _SMALL._replace(length=1, causal=False),
    "one pair": Call(1, 1, 1, 64),
    "window": _SMALL._replace(window=(99, 0)),
    "two-sided window": _SMALL._replace(causal=False, window=(99, 30)),
    "documents": _SMALL._replace(documents=3),
    "documents, not causal": _SMALL._replace(documents=3, causal=False),
    "shifted groups": _SMALL._replace(group=64),
    "softcap": _SMALL._replace(softcap=2.0),
    "sinks": _SMALL._replace(sinks=True),
    "mask of keys": _SMALL._replace(mask="keys"),
    "mask of queries": _SMALL._replace(mask="queries"),
    "mask of pairs": _SMALL._replace(mask="pairs"),
    "dropout": _SMALL._replace(drop=0.2),
    "all": _SMALL._replace(
        window=(200, 0), documents=2, softcap=3.0, sinks=True, mask="keys", drop=0.1
    ),
    "long": Call(1, 4096, 2, 128),
}


def inputs(call: Call) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """`(q, k, v, d_out)` and the arrays beside them, which `ours` takes by name."""
    key_heads, keys = call.key_heads or call.heads, call.keys or call.length
    of_queries = (call.batch, call.length, call.heads, call.width)
    of_keys = (call.batch, keys, key_heads, call.width)
    seeds = jax.random.split(jax.random.key(0), 6)
    arrays = tuple(
        jax.random.normal(seed, shape, jnp.dtype(call.dtype))
        for seed, shape in zip(
            seeds, (of_queries, of_keys, of_keys, of_queries), strict=False
        )
    )
    beside: dict[str, Any] = {}
    if call.documents > 1:
        beside["segment_ids"] = (jnp.arange(keys) * call.documents // keys)[None]
    if call.group:
        beside["segment_ids"] = shifted_groups(
            call.length, call.heads, call.group, key_heads=key_heads
        )
    if call.sinks:
        beside["sinks"] = jax.random.normal(seeds[4], (call.heads,))
    if call.mask:
        rows = 1 if call.mask == "keys" else call.length
        columns = 1 if call.mask == "queries" else keys
        shape = (call.batch, 1, rows, columns)
        beside["mask"] = jax.random.bernoulli(seeds[5], 0.7, shape)
    if call.drop:
        beside["key"] = jax.random.key(1)
    return arrays, beside


def counts(call: Call, rows: Any, columns: Any) -> Any:
    """Which pairs count by position and document: of any library's arrays."""
    total, length = columns >= 0, call.keys or call.length
    left, right = call.window or (None, None)
    if call.causal:
        total = total & (columns <= rows)
    if left is not None:
        total = total & (columns >= rows - left)
    if right is not None:
        total = total & (columns <= rows + right)
    if call.documents > 1:
        of_rows = rows * call.documents // length
        total = total & (of_rows == columns * call.documents // length)
    return total


def work(call: Call, way: str) -> float:
    """FLOPs of the products of the pairs that count: two forward, five backward."""
    keys, rows = call.keys or call.length, np.arange(call.length)
    left, right = call.window or (None, None)
    start, stop = np.zeros_like(rows), np.full_like(rows, keys)
    if call.causal:
        stop = np.minimum(stop, rows + 1)
    if left is not None:
        start = np.maximum(start, rows - left)
    if right is not None:
        stop = np.minimum(stop, rows + right + 1)
    size = call.group or keys // call.documents
    start = np.maximum(start, rows // size * size)
    stop = np.minimum(stop, rows // size * size + size)
    pairs = float(np.sum(np.maximum(0, stop - start)))
    if call.group:  # half of the heads begin with half a group, and end with one
        pairs -= (size // 2) ** 2 / (2 if call.causal else 1)
    products = 2 if way == "forward" else 5
    return 2.0 * products * call.batch * call.heads * call.width * pairs


def moved(call: Call) -> float:
    """Bytes of the keys and values that decoding reads."""
    size = jnp.dtype(call.dtype).itemsize * call.width * call.key_heads
    return 2.0 * size * call.batch * call.keys


def figures(
    call: Call, name: str, way: str, taken: float, copy: float, matmul: float
) -> dict[str, float]:
    """Milliseconds of a contestant, the rate, and its share of the measured rate."""
    if call.page:
        rate = moved(call) / taken
        return {"ms": 1e3 * taken, "TB_s": rate / 1e12, "of_copy": rate / copy}
    rate = work(call._replace(group=0) if name == FULL else call, way) / taken
    return {"ms": 1e3 * taken, "TFLOP_s": rate / 1e12, "of_matmul": rate / matmul}
