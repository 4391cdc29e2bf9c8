"""Processes without jax: what the launcher does with their ends and their words.

Row P5 of the reliability matrix.
"""

import os
import re
import subprocess
import sys
import time

import pytest

from tests.training import processes


def run_script(script, *options, size=2):
    command = [sys.executable, "-m", "jaxzoo.training.launch", "--local", str(size)]
    child = [sys.executable, "-S", "-c", f"import os, sys, time\n{script}"]
    return subprocess.run(
        [*command, *options, "--", *child],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(processes.REPO)},
    )


RANK = "rank = int(os.environ['JAXZOO_PROCESS_ID'])\n"
# Rank 0 goes by the launcher's own SIGTERM, rank 1 follows it.
MET_BY_OUR_SIGNAL = """
import signal
if rank: signal.signal(signal.SIGTERM, lambda *_: time.sleep(0.5) or os._exit(76))
time.sleep(0.5)
if not rank: os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("", 0),
        ("sys.exit(1)", 1),
        ("sys.exit(2)", 2),
        ("sys.exit(75)", 75),
        ("sys.exit(130)", 130),
        ("sys.exit(3)", 70),
        (RANK + "sys.exit(75 * rank)", 75),
        (RANK + MET_BY_OUR_SIGNAL, 143),
        (RANK + "if rank: os.abort()\ntime.sleep(60)", 70),
        (RANK + "if rank: sys.exit('no module')\ntime.sleep(60)", 70),
    ],
)
def test_exit_status(script, code):
    done = run_script(script)
    assert done.returncode == code
    assert done.stderr.count("Start the same command again") == (code == 70)
    if "abort" in script:
        assert re.match(r"rank 1 \(pid \d+ on .*\) was killed by SIGABRT", done.stderr)
    if "no module" in script:
        assert "rank 1 wrote last:\nno module\n" in done.stderr


def test_only_process_0_is_heard():
    done = run_script(RANK + "print('rank', rank)\nprint('oh', file=sys.stderr)")
    assert (done.stdout, done.stderr) == ("rank 0\n", "oh\n")


STACK = """\
E1121 17:13:58.117 7401 coordination_service_agent.cc:288] Polled an error.
F1121 17:13:41.440487    6870 client.h:86] Terminating process because the JAX service
Additional GRPC error information from remote target coordination_service:
:UNAVAILABLE:Stream removed (Socket closed)
=== Source Location Trace: ===
external/xla+/xla/pjrt/distributed/coordination/coordination_service_error_util.cc:64

*** Check failure stack trace: ***
    @     0x7fb7f58f8174  absl::lts_20260526::log_internal::LogMessage::SendToLog()
"""


def test_a_stack_of_cpp_goes_to_the_log_alone(tmp_path):
    script = f"sys.stderr.write('before\\n' + {STACK!r} + 'after\\n')"
    done = run_script(script, "--log", str(tmp_path / "logs"), size=1)
    assert (done.returncode, done.stderr) == (0, "before\nafter\n")
    assert (tmp_path / "logs" / "rank-0.log").read_text() == f"before\n{STACK}after\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--local", "0", "--", "true"], "'0' is not a whole number above 0"),
        (["--local", "2"], "no command"),
        (["--local", "2", "--heartbeat", "1", "--", "true"], "'1' is not a number of"),
        (["--locale", "2", "--", "true"], "unrecognized arguments: --locale"),
    ],
)
def test_a_wrong_command_is_answered_at_once(words, complaint):
    began = time.monotonic()
    command = [sys.executable, "-m", "jaxzoo.training.launch", *words]
    env = {**os.environ, "PYTHONPATH": str(processes.REPO)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and complaint in done.stderr
    assert time.monotonic() - began < 1


def test_the_launcher_has_no_jax():
    code = (
        "import sys, jaxzoo.training.launch, jaxzoo.training.supervise\n"
        "sys.exit('jax' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(processes.REPO)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
