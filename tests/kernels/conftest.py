"""Writes into pytest's reports which stage of a kernel's verification a test is.

A test with `@pytest.mark.stage("attention", "pallas_tpu", "compiled", describe)` is a
case of that stage; `describe` makes of its parameters what the tables say of it.
`stages.py` makes the tables of the reports that `--junitxml` writes.
"""

import jax
import stages


def pytest_runtest_setup(item):
    case = stages.case(item)
    if case is not None:
        item.user_properties += [("stage", "|".join(case)), ("jax", jax.__version__)]
