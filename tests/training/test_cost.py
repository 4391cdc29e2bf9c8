"""The count of a jaxpr against closed forms, and against what the compiler counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxzoo.training.cost import count

A, B = jnp.ones((8, 16)), jnp.ones((16, 32))
W = jnp.ones((16, 16))


def flops(f, *arguments):
    return count(jax.make_jaxpr(f)(*arguments)).flops


def compiled(f, *arguments) -> Any:
    return jax.jit(f).lower(*arguments).compile()


@pytest.mark.parametrize(
    ("f", "arguments"),
    [
        (jnp.matmul, (A, B)),
        (jnp.matmul, (jnp.ones((5, 8, 16)), jnp.ones((5, 16, 32)))),
        (lambda a, b: jnp.einsum("bij,kj->kbi", a, b), (jnp.ones((5, 8, 16)), W)),
        (lambda a, w: a @ w @ w @ w, (A, W)),
        (jax.vmap(jnp.matmul, (0, None)), (jnp.ones((3, 8, 16)), B)),
    ],
    ids=["matmul", "batched", "einsum", "chain", "vmap"],
)
def test_matrix_products_count_as_the_compiler_counts_them(f, arguments):
    assert flops(f, *arguments) == compiled(f, *arguments).cost_analysis()["flops"]


def test_a_matrix_product_is_2mnk():
    assert flops(jnp.matmul, A, B) == 2 * 8 * 16 * 32


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_count_as_the_compiler_counts_them(stride, padding, groups):
    image, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def f(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, (stride, stride), padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    expected = compiled(f, image, kernel).cost_analysis()["flops"]
    assert flops(f, image, kernel) == expected
    if (stride, padding, groups) == (1, "VALID", 1):
        assert expected == 2 * (2 * 7 * 7 * 6) * (3 * 3 * 4)


def test_the_gradient_of_a_strided_convolution_counts_no_holes():
    image, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 6))

    def f(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def pull(image, kernel):
        out, vjp = jax.vjp(f, image, kernel)
        return vjp(out)

    cost = count(jax.make_jaxpr(pull)(image, kernel))
    once = flops(f, image, kernel)
    assert cost.flops_by_primitive["conv_general_dilated"] == 3 * once


def test_a_scan_counts_its_length_where_the_compiler_counts_one():
    def f(a):
        return lax.scan(lambda c, _: (c @ W, None), a, None, length=7)[0]

    once = 2 * 8 * 16 * 16
    assert flops(f, A) == 7 * once
    assert compiled(f, A).cost_analysis()["flops"] == pytest.approx(once, rel=0.01)
    assert flops(lambda a: lax.fori_loop(0, 5, lambda i, c: c @ W, a), A) == 5 * once
    nested = jax.vmap(f)
    assert flops(nested, jnp.ones((3, 8, 16))) == 3 * 7 * once


def test_the_gradient_of_an_mlp_is_the_hand_count():
    params = {"w": jnp.ones((16, 32)), "v": jnp.ones((32, 4))}

    def loss(params, x):
        return jnp.sum((jnp.maximum(x @ params["w"], 0) @ params["v"]) ** 2)

    cost = count(jax.make_jaxpr(jax.value_and_grad(loss))(params, A))
    forward = 2 * 8 * (16 * 32 + 32 * 4)
    weights = forward  # the gradient of each product by its weights
    inputs = 2 * 8 * 32 * 4  # by its inputs, but not by the data
    assert cost.flops_by_primitive["dot_general"] == forward + weights + inputs
    assert cost.matmul_flops == forward + weights + inputs
    assert cost.unknown == ()


def test_remat_counts_what_it_computes_again():
    def layer(a):
        return jnp.sin(jnp.sin(a @ W) @ W)

    def products(f):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda a: jnp.sum(f(a))))(A)
        return count(jaxpr).flops_by_primitive["dot_general"] / (2 * 8 * 16 * 16)

    assert products(layer) == 4
    # The cosines of the backward pass need both products once more.
    assert products(jax.checkpoint(layer)) == 6


def test_what_nothing_depends_on_is_left_out():
    # Of grad alone the value is dropped, and the product with it.
    gradient = jax.grad(lambda a: jnp.sum(jnp.sin(a @ W) @ W))
    cost = count(jax.make_jaxpr(gradient)(A))
    assert cost.flops_by_primitive["dot_general"] == 3 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda a: jnp.exp(a) + a, 2 * 128),
        (lambda a: jnp.sum(a), 128),
        (lambda a: jnp.cumsum(a, axis=0), 128),
        (lambda a: lax.cumsum(a, axis=0).T.reshape(4, 32)[::2], 128),
        (lambda a: a.astype(jnp.int32) + 1, 0),
        (lambda a: lax.cond(a[0, 0] > 0, lambda: a @ W, lambda: a), 2 * 8 * 256 + 1),
        (lambda a: lax.reduce_window(a, 0.0, lax.add, (2, 2), (2, 2), "VALID"), 128),
        (lambda a: jnp.zeros((4, 16)).at[jnp.arange(8) % 4].add(a), 128),
        (jax.jit(jax.nn.relu), 128),
        (lambda a: lax.sort(a, dimension=1), 128 * 4),
        (lambda a: jnp.fft.fft(a.astype(jnp.complex64)), 5 * 128 * 4),
    ],
    ids=[
        "elementwise", "reduction", "cumsum", "moves", "integers", "cond", "window",
        "scatter-add", "custom_jvp", "sort", "fft",
    ],
)  # fmt: skip
def test_other_operations_have_their_rules(f, expected):
    assert flops(f, A) == expected


def test_custom_vjp_and_checkpoint_are_looked_into():
    @jax.custom_vjp
    def f(a):
        return a @ W

    f.defvjp(lambda a: (f(a), None), lambda _, g: (g @ W.T,))
    once = 2 * 8 * 16 * 16
    assert flops(f, A) == once
    assert flops(jax.checkpoint(f), A) == once
    jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda a: jnp.sum(f(a))))(A)
    assert count(jaxpr).flops_by_primitive["dot_general"] == 2 * once


@pytest.mark.parametrize(("groups", "sizes"), [(2, [4, 4]), (4, [2, 2, 2, 2])])
def test_a_ragged_product_is_one_product_of_each_row(groups, sizes):
    weights = jnp.ones((groups, 16, 32))
    arguments = A, weights, jnp.array(sizes)
    assert flops(lax.ragged_dot, *arguments) == 2 * 8 * 16 * 32

    def pull(a, w):
        out, vjp = jax.vjp(lambda a, w: lax.ragged_dot(a, w, jnp.array(sizes)), a, w)
        return vjp(out)

    assert flops(pull, A, weights) == pytest.approx(3 * 2 * 8 * 16 * 32, rel=0.01)


def test_loops_of_unknown_length_are_named():
    cost = count(
        jax.make_jaxpr(
            lambda a: lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ W, a)
        )(A)
    )
    assert cost.flops_by_primitive["dot_general"] == 2 * 8 * 16 * 16
    assert len(cost.unknown) == 1 and "while" in cost.unknown[0]
    cost = count(jax.make_jaxpr(jnp.linalg.svd)(A))
    assert any("svd" in words for words in cost.unknown)


def test_a_shard_map_counts_all_of_its_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))

    def f(a):
        return a @ W

    both = P(("x", "y"))
    sharded = jax.shard_map(f, mesh=mesh, in_specs=both, out_specs=both)
    assert flops(sharded, A) == flops(f, A)


def test_a_kernel_counts_its_body_times_its_grid_or_what_it_says():
    def call(a, w, **knobs):
        def body(a_ref, w_ref, out_ref):
            out_ref[...] = a_ref[...] @ w_ref[...]

        return pl.pallas_call(
            body,
            grid=(4,),
            in_specs=[
                pl.BlockSpec((2, 16), lambda i: (i, 0)),
                pl.BlockSpec((16, 16), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((2, 16), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 16), jnp.float32),
            **knobs,
        )(a, w)

    assert flops(call, A, W) == 2 * 8 * 16 * 16
    said = pl.CostEstimate(flops=77, transcendentals=1, bytes_accessed=5)
    cost = count(jax.make_jaxpr(lambda a, w: call(a, w, cost_estimate=said))(A, W))
    assert (cost.flops, cost.bytes, cost.matmul_flops) == (77, 5, 77)


def test_bytes_are_operands_and_results():
    cost = count(jax.make_jaxpr(lambda a: jnp.sin(jnp.sin(a)))(A))
    assert cost.bytes == 4 * 128 * 4
