"""Which implementation of an operation runs, and why no other.

None takes the first kernel that is made for this machine and can do the call, and
otherwise "xla". With PALLAS_KERNELS_LOG=1 in the environment the choice is said on
standard error. PALLAS_KERNELS_TARGET=tpu (or hopper) chooses for a machine that is not
there, to compile for it.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["choose", "machine", "named_in_forward_mode", "reverse_alone"]

HOMES = {"pallas_tpu": "tpu", "pallas_gpu": "hopper"}  # what kernels are made for
KINDS = {"tpu": "TPU", "hopper": "Hopper GPU"}


def machine() -> str:
    """What programs are compiled for: "tpu", "hopper", "gpu" (another one) or "cpu"."""
    target = os.environ.get("PALLAS_KERNELS_TARGET")
    if target:
        return target
    if jax.default_backend() != "gpu":
        return jax.default_backend()
    # Of other generations some lack the instructions of Hopper, and some have others.
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return "hopper" if str(capability) == "9.0" else "gpu"


def choose(
    operation: str,
    name: str | None,
    implementations: dict[str, Callable],
    kernels: dict[str, Any],
    arguments: tuple[Any, ...],
    *,
    is_empty: bool,
    shapes: str,
) -> Callable:
    """The implementation of a call.

    Args:
        operation: its name.
        name: the argument 'implementation' of the call.
        implementations: by name, "ref" and "xla" among them.
        kernels: by name, the modules of those that are for one machine: `unsupported`
            in them says why one cannot do a call.
        arguments: of `unsupported`.
        is_empty: whether nothing is to be computed: "ref" does that.
        shapes: how the call is described.

    Returns:
        One of `implementations`.

    Raises:
        ValueError: there is no such implementation.
        NotImplementedError: the kernel that is named cannot do the call.
    """
    if name is not None and name not in implementations:
        names = ", ".join(f"'{n}'" for n in implementations)
        raise ValueError(
            f"argument 'implementation' is {name!r}, expected one of {names} or None."
        )
    here, against = machine(), {}
    for kernel, module in kernels.items():
        reason = module.unsupported(*arguments)
        if here != HOMES[kernel]:
            kind = KINDS[HOMES[kernel]]
            reason = f"the {kind} kernel does not run on '{here}'"
        if reason:
            against[kernel] = reason
    if name in against:
        raise NotImplementedError(
            f"argument 'implementation' is '{name}', but {against[name]}: 'xla' runs."
        )
    why = "asked for"
    if name is None:
        able = [kernel for kernel in kernels if kernel not in against]
        name = able[0] if able else "xla"
        ours = [against[kernel] for kernel in against if HOMES[kernel] == here]
        none = "; ".join(ours) or f"there is no kernel for '{here}'"
        why = "the fastest here" if able else none
    if is_empty:
        name, why = "ref", "an axis has length 0, and there is nothing to compute"
    if os.environ.get("PALLAS_KERNELS_LOG", "0") != "0":
        print(f"{operation}: {name} ({why}); {shapes}", file=sys.stderr)
    return implementations[name]


def reverse_alone(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that has no derivative, and an error that says what has.

    Args:
        operation: its name in the error.
        function: of trees of arrays.

    Raises:
        NotImplementedError: the function that is returned is differentiated.
    """

    @jax.custom_jvp
    def call(*arrays: Any) -> Any:
        return function(*arrays)

    @call.defjvp
    def _(*_: Any) -> Any:
        raise NotImplementedError(_lacks(operation))

    return call


def named_in_forward_mode(
    operation: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    """A `custom_vjp` function, whose error in forward mode says what has that mode.

    Under `jit` the error comes from the compiler, outside of this call, and is jax's.

    Args:
        operation: its name in the error.
        function: with reverse mode alone.

    Raises:
        NotImplementedError: the function that is returned meets `jax.jvp`.
    """

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise NotImplementedError(_lacks(operation)) from error

    return call


def _lacks(operation: str) -> str:
    return (
        f"{operation} by a Pallas kernel has first derivatives in reverse mode "
        'alone: implementation="xla" has them of any order in both modes.'
    )
