"""What does not fit is named: the argument, what came, and what was expected."""

import typing
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from examples import CASES, SEVERAL, assert_named, is_float, name

every = pytest.mark.parametrize("case", CASES, ids=name)


@every
def test_arguments_of_a_wrong_type_are_named(case):
    args, kwargs = case.example()
    names = list(case.parameters)
    for index, arg in enumerate(args):
        wrong = ["text", [1.0, 2.0], {"a": 1.0}, object()]
        if hasattr(arg, "dtype"):
            wrong.append(jnp.ones(arg.shape, jnp.complex64))
            if "Bool[" not in str(case.parameters[names[index]].annotation):
                wrong.append(jnp.ones(arg.shape, bool))
        if names[index] == "key":
            wrong.append(jax.random.PRNGKey(0))
        for value in wrong:
            spoilt = (*args[:index], value, *args[index + 1 :])
            call = partial(case.function, *spoilt, **kwargs)
            assert_named(TypeError, names[index], call)


@pytest.mark.parametrize("case", SEVERAL, ids=name)
def test_shapes_that_do_not_fit_are_named_and_never_broadcast(case):
    args, kwargs = case.example()
    names = list(case.parameters)
    arrays = [i for i, arg in enumerate(args) if is_float(arg)]
    for index in arrays[1:]:
        spoilt = list(args)
        spoilt[index] = args[index][..., None]
        with pytest.raises((TypeError, ValueError)) as info:
            case.function(*spoilt, **kwargs)
        assert any(f"'{names[i]}'" in str(info.value) for i in arrays), info.value


@every
def test_hyperparameters_out_of_range_are_named(case):
    args, kwargs = case.example()
    for parameter in case.parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        members = typing.get_args(parameter.annotation) or (parameter.annotation,)
        if typing.get_origin(parameter.annotation) is typing.Literal:
            wrong = ["nonsense"]
        elif parameter.name == "axis_name":
            continue
        elif "axis" in parameter.name:
            wrong = [99, -99]
        elif float in members:
            wrong = [float("nan")]
        elif int in members:
            wrong = [0, -3]
        else:
            continue
        for value in wrong:
            call = partial(case.function, *args, **{**kwargs, parameter.name: value})
            assert_named(ValueError, f"'{parameter.name}'", call)
        call = partial(case.function, *args, **{**kwargs, parameter.name: "text"})
        assert_named((TypeError, ValueError), f"'{parameter.name}'", call)
    misspelt = partial(case.function, *args, **{**kwargs, "hyperparameter": 1})
    assert_named(TypeError, "hyperparameter", misspelt)
