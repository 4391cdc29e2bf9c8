"""What is forked is a process like any other, with jax imported and untouched."""

import signal
import sys

import pytest

from tests.training import forked, kill


@pytest.fixture
def start(tmp_path):
    env = {**kill.environment(tmp_path / "cache"), "FOUND": "told"}
    return lambda *words: forked.start(words, env)


def test_words_environment_and_exit_status_are_its_own(start, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "if __name__ == '__main__':\n"
        "    print(os.environ['FOUND'], *sys.argv[1:], file=sys.stderr)\n"
        "    sys.exit(3)\n"
    )
    processes = [start(script, number, "x" * 100_000) for number in range(3)]
    for number, process in enumerate(processes):
        assert process.communicate(timeout=60) == (
            "",
            f"told {number} {'x' * 100_000}\n",
        )
        assert process.returncode == process.poll() == 3


def test_an_error_is_told_and_a_signal_is_the_end(start):
    process = start("-c", "raise KeyError('lost')")
    assert "KeyError: 'lost'" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    process = start("-c", "import time; print('on', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "on\n" and process.poll() is None
    process.kill()
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGKILL
    process.kill()  # nobody is there, and nobody minds


def test_jax_is_there_and_has_touched_no_device(start, tmp_path):
    program = (
        "import sys\n"
        "print('jax' in sys.modules)\n"
        "import jax\n"
        "from jax._src import xla_bridge\n"
        "print(len(xla_bridge._backends), jax.config.jax_compilation_cache_dir)\n"
    )
    out, err = start("-c", program).communicate(timeout=60)
    # Elsewhere a process starts as any does.
    is_forked = sys.platform == "linux"
    assert (out, err) == (f"{is_forked}\n0 {tmp_path / 'cache'}\n", "")
