"""Small ListOps: nested lists of digits and what they come to, drawn from a seed."""

from __future__ import annotations

import numpy as np

from jaxzoo.data.source import Dataset, Feature, Source

__all__ = ["SYMBOLS", "listops"]

SYMBOLS = (" ", ")", "(MIN", "(MAX", "(MED", "(SUM", *"0123456789")
"""What each token stands for; 0 fills up behind the end."""

_VALUES = {
    "(MIN": min,
    "(MAX": max,
    "(MED": lambda x: int(np.median(x)),
    "(SUM": lambda x: sum(x) % 10,
}


def listops(
    *,
    num_train: int = 2000,
    num_test: int = 1000,
    length: int = 64,
    depth: int = 3,
    operands: int = 4,
    seed: int = 0,
) -> Dataset:
    """Expressions such as (MAX 2 9 (MIN 4 7) 0), each with its value, 0 to 9.

    The grammar of ListOps (Nangia and Bowman 2018) as in the Long Range Arena, short:
    minimum, maximum, median (rounded down) and sum modulo 10. An operand is a list
    again with probability 1/4, up to `depth` lists inside each other. Expressions that
    do not fit are drawn again.

    Args:
      num_train: expressions in "train", at least 1.
      num_test: expressions in "test", at least 1.
      length: tokens of a record, at least `operands` + 2.
      depth: lists inside each other at most, at least 1.
      operands: of a list at most, at least 2.
      seed: integer >= 0.

    Returns:
      Splits "train" and "test" of token uint8 [length], indices into `SYMBOLS`, and
      label int32 [].

    Raises:
      ValueError: a number is out of range.

    >>> record = listops(num_train=3, num_test=1, length=12).split("train")[1]
    >>> " ".join(SYMBOLS[t] for t in record["token"]).strip(), int(record["label"])
    ('(SUM 9 8 6 (MED 3 3 0 9 ) )', 6)
    """
    least = {
        "num_train": (num_train, 1), "num_test": (num_test, 1), "depth": (depth, 1),
        "operands": (operands, 2), "length": (length, operands + 2), "seed": (seed, 0),
    }  # fmt: skip
    for name, (number, bound) in least.items():
        if number < bound:
            raise ValueError(f"{name}={number} is not at least {bound}.")
    rng = np.random.default_rng(seed)
    tokens = np.zeros((num_train + num_test, length), np.uint8)
    labels = np.zeros(num_train + num_test, np.int32)
    for row in range(len(tokens)):
        written: list[str] = []
        while not 0 < len(written) <= length:
            written, labels[row] = _expression(rng, depth, operands, is_first=True)
        tokens[row, : len(written)] = [SYMBOLS.index(symbol) for symbol in written]
    whole = Source({"token": tokens, "label": labels})
    return Dataset(
        name="listops",
        splits={"train": whole[:num_train], "test": whole[num_train:]},
        description=f"Drawn from seed {seed}: nested lists of digits, and their value.",
        features={
            "token": Feature(
                (length,), "uint8", (0, len(SYMBOLS) - 1), "index into SYMBOLS"
            ),
            "label": Feature((), "int32", (0, 9), "the value of the expression"),
        },
        licence="generated here: public domain",
    )


def _expression(
    rng: np.random.Generator, depth: int, operands: int, *, is_first: bool = False
) -> tuple[list[str], int]:
    """Symbols and value of a list, or of a digit."""
    if depth == 0 or not (is_first or rng.random() < 0.25):
        digit = int(rng.integers(10))
        return [str(digit)], digit
    name = list(_VALUES)[rng.integers(len(_VALUES))]
    inner = [
        _expression(rng, depth - 1, operands)
        for _ in range(rng.integers(2, operands + 1))
    ]
    written = [name, *(symbol for symbols, _ in inner for symbol in symbols), ")"]
    return written, int(_VALUES[name]([value for _, value in inner]))
