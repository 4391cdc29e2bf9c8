"""One of the processes that `processes` starts and kills: steps of a small program."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

NUM_STEPS = 60


def sit(options: argparse.Namespace) -> int:
    """One process: steps with a psum over all devices, the state in a file."""
    rank = int(os.environ.get("JAXZOO_PROCESS_ID", "0"))
    folder = options.folder
    own = folder / f"{rank}.pid"
    own.with_suffix(".new").write_text(str(os.getpid()))
    own.with_suffix(".new").replace(own)

    def note(text: str) -> None:
        with open(folder / f"{rank}.log", "a") as file:
            file.write(f"{text}\n")

    note("begin")
    received: list[int] = []

    def handle(signum: int, _: Any) -> None:
        note(f"signal {signum}")
        received.append(signum)

    from jaxzoo.training import launch

    if rank == options.absent:
        time.sleep(3600)
    began = time.monotonic()
    launch.initialize()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    note("joined")
    settings = {"learning_rate": 0.001 * (1 + rank * options.differ), "steps": 60}
    launch.agree(settings)
    note(f"agreed {time.monotonic() - began:.2f}")

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))

    def share(state, batch, flag):
        mean = jax.lax.pmean(jnp.sin(batch.mean(0) + state), "d")
        return state * 0.9 + mean, jax.lax.pmax(flag.max(), "d")

    specs = (PartitionSpec(), PartitionSpec("d"), PartitionSpec("d"))
    step = jax.jit(
        jax.shard_map(
            share, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(),) * 2
        )
    )
    file = folder / "state.json"
    done, state = json.loads(file.read_text()) if file.exists() else [0, [0.5] * 4]
    state = np.array(state, np.float32)
    count, first = jax.local_device_count(), rank * jax.local_device_count()
    launch.report_step("toy", done)
    while done < options.steps:
        rng = np.random.default_rng(done)
        batch = rng.normal(size=(jax.device_count(), 1, 4)).astype(np.float32)
        batch = batch[first : first + count].reshape(count, 4)
        flag = np.full((count,), len(received) and received[0], np.int32)
        batch, flags = (
            jax.make_array_from_process_local_data(sharding, a) for a in (batch, flag)
        )
        new, stop = step(state, batch, flags)
        state, stop = np.asarray(new), int(stop)
        done += 1
        if rank == 0:
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps([done, [float(x) for x in state]]))
            temporary.replace(file)
        launch.report_step("toy", done)
        note(f"step {done}")
        if done == options.fail and rank == 1:
            if options.abandon is not None:
                print("error: the disk is full", file=sys.stderr)
                launch.abandon(options.abandon)
            raise RuntimeError("this rank fails")
        if stop:
            return 75 if stop == signal.SIGTERM else 130
        rest(options.pause, busy=options.busy)
    return options.status


def rest(seconds: float, *, busy: bool) -> None:
    """Sleeps; or lets no other Python thread run, as a long call that keeps the GIL."""
    if not busy:
        time.sleep(seconds)
        return
    sys.setswitchinterval(1.0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        continue
    sys.setswitchinterval(0.005)


def guarded(options: argparse.Namespace) -> int:
    """`sit` with the errors that a command catches."""
    from jaxzoo.training import launch

    try:
        return sit(options)
    except launch.LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        (options.folder / f"{os.environ['JAXZOO_PROCESS_ID']}.said").write_text(
            str(error)
        )
        return error.code
    except (RuntimeError, ValueError) as error:
        sentence = launch.explain(error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        return launch.EXIT_LOST


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--busy", action="store_true", help="keeps the GIL in pauses")
    parser.add_argument("--differ", type=float, default=0.0)
    parser.add_argument("--absent", type=int, default=-1, help="this rank never joins")
    parser.add_argument("--fail", type=int, default=-1, help="rank 1 raises here")
    parser.add_argument("--abandon", type=int, help="instead with this status")
    parser.add_argument("--status", type=int, default=0, help="exit status at the end")
    sys.exit(guarded(parser.parse_args()))


if __name__ == "__main__":
    main()
