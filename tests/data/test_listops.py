"""Generated ListOps against a reader of its own."""

from typing import Any

import numpy as np
import pytest

from jaxzoo.data.listops import SYMBOLS, listops


def value(symbols):
    """Reads an expression with a stack, symbol by symbol."""
    stack = [[]]
    for symbol in symbols:
        if symbol.startswith("("):
            stack.append([symbol])
        elif symbol == ")":
            name, *x = stack.pop()
            x = sorted(x)
            middle = (x[(len(x) - 1) // 2] + x[len(x) // 2]) // 2
            found = {"(MIN": x[0], "(MAX": x[-1], "(MED": middle, "(SUM": sum(x) % 10}
            stack[-1].append(found[name])
        else:
            stack[-1].append(int(symbol))
    ((result,),) = stack
    return result


def test_labels_are_what_a_reader_finds():
    data = listops(num_train=300, num_test=100, length=40)
    deepest = 0
    splits: Any = data.splits
    for split in splits.values():
        for tokens, label in zip(
            split.arrays["token"], split.arrays["label"], strict=True
        ):
            symbols = [SYMBOLS[t] for t in tokens]
            end = symbols.index(" ") if " " in symbols else len(symbols)
            assert set(symbols[end:]) <= {" "}
            assert value(symbols[:end]) == label
            opened = np.cumsum(
                [s.startswith("(") - (s == ")") for s in symbols[:end]], dtype=int
            )
            deepest = max(deepest, opened.max())
    assert deepest == 3
    counts = np.bincount(data.split("train").arrays["label"], minlength=10)
    assert (counts > 10).all()


def test_a_seed_gives_the_same_expressions_and_another_gives_others():
    first, again, other = (
        listops(num_train=20, num_test=5, seed=seed).split("train").arrays["token"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_train": 0}, "num_train=0"),
        ({"depth": 0}, "depth=0"),
        ({"operands": 1}, "operands=1"),
        ({"length": 5}, "length=5 is not at least 6"),
    ],
)
def test_numbers_out_of_range_are_named(knobs, message):
    with pytest.raises(ValueError, match=message):
        listops(**knobs)
