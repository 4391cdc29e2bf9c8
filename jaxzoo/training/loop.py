"""The training loop: steps under `lax.scan`, over any mesh, with exact resume.

The state is one pytree, `{"params", "opt_state", "step", "key"}`; the batch of step t
is a pure function of t, and the key of step t is `fold_in(key, t)`. So a run that was
stopped and continued computes what an undisturbed one does, bit for bit.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxzoo.training import nonfinite
from jaxzoo.training.checkpoint import Checkpoints
from jaxzoo.training.hosts import everyone, is_first, wait_for_all
from jaxzoo.training.launch import report_step
from jaxzoo.training.mesh import Specs, place
from jaxzoo.training.profiler import Profiler
from jaxzoo.training.program import (
    Batch,
    Loader,
    State,
    Step,
    Told,
    build,
    describe,
    full_rate,
    left_out,
    state_like,
)
from jaxzoo.training.progress import Progress
from jaxzoo.training.record import Run
from jaxzoo.training.signals import stop_signals

__all__ = ["Stopped", "train"]

MOST_ROLLBACKS = 3


class Stopped(Exception):
    """A signal ended the loop after a checkpoint was saved."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def train(
    run: Run,
    name: str,
    step: Step,
    state: State | Callable[[], State],
    batches: Callable[..., Batch],
    *,
    num_steps: int,
    log_every: int = 50,
    save_every: float = 20.0,
    show: str | None = None,
    batch_axis: int = 0,
    batch_rows: int | None = None,
    specs: Specs | None = None,
    ids: Callable[[int], Any] | None = None,
) -> State:
    """Runs `num_steps` steps, from the newest checkpoint of this run if there is one.

    Args:
        run: the open run; metrics go to its metrics.jsonl, averaged over `log_every`
            steps, and checkpoints to `checkpoints/<name>`. Its mesh is the one that
            is trained on.
        name: what this fit is called; one run may have several.
        step: `(state, batch) -> (state, metrics)`, jittable.
        state: the state at step 0, or a function that makes it: then each device makes
            its own part.
        batches: the batch of step t, NumPy arrays, the whole of it in every process; a
            pure function. With `batch_rows` it is called as `batches(t, rows)` for the
            slice of examples that this process needs.
        num_steps: where the fit ends.
        log_every: steps per compiled call; the host looks at nothing in between.
        save_every: seconds between checkpoints.
        show: name of the metric on the progress bar.
        batch_axis: the dimension of a batch that counts examples.
        batch_rows: how many examples the whole batch has, where each process loads its
            own part.
        specs: as for `mesh.state_shardings`.
        ids: which examples the batch of step t is made of, for the black box.

    Returns:
        The state after `num_steps` steps, as it lies on the mesh: `mesh.local` brings
        it to one device.

    Raises:
        Stopped: SIGINT or SIGTERM came; the state of the last whole call is saved. A
            second SIGINT raises KeyboardInterrupt at once.
        FloatingPointError: a number is not finite, and the run's policy does not go on;
            names the step and the first bad leaf.
    """
    loader = Loader(run.mesh, batches, batch_axis, batch_rows)
    call, step = build(step, state, loader, specs=specs, options=run.options)
    size = min(log_every, num_steps)
    if run.dry_run is not None:
        run.dry_run(describe(name, call, step, state, loader, size, specs))
        return state() if callable(state) else state
    fit = _Fit(run, name, call, step, loader, size, num_steps, save_every, show, ids)
    with (
        stop_signals(run.say) as received,
        Checkpoints(run.folder / "checkpoints" / name) as checkpoints,
    ):
        while True:
            try:
                like = state_like(run.mesh, state, specs)
                restored = checkpoints.restore_latest(like)
                begin = restored or (0, _start(run, state, specs))
                return fit.sitting(*begin, checkpoints, received)
            except _RollBack as bad:
                checkpoints.wait()
                fit.pass_over(bad)


def _profiler(run: Run) -> Profiler:
    # Where nothing is wanted, no step is: the range is empty.
    first, last = run.options.profiled() or (0, -1)
    return Profiler(first, last, run.folder / "profile")


class _RollBack(Exception):
    """A call met a bad step, and the policy is to go back before it."""

    def __init__(self, diagnosis: nonfinite.Diagnosis, first: int, end: int):
        super().__init__(str(diagnosis))
        self.first, self.end = first, end


class _Fit:
    """One fit under way: what its sittings have in common."""

    def __init__(
        self,
        run: Run,
        name: str,
        call: Any,
        step: Step,
        loader: Loader,
        size: int,
        num_steps: int,
        save_every: float,
        show: str | None,
        ids: Callable[[int], Any] | None,
    ):
        self.run, self.name, self.call, self.step = run, name, call, step
        self.loader, self.size, self.num_steps = loader, size, num_steps
        self.save_every, self.show, self.ids = save_every, show, ids

    def sitting(
        self, done: int, state: State, checkpoints: Checkpoints, received: list[int]
    ) -> State:
        """From the state after `done` steps to the end."""
        run, name = self.run, self.name
        run.forget_after(name, done)
        passed_over = nonfinite.passed_over(run.folder, name)
        saved_at = time.monotonic()
        bad = self._no_bad_step()
        pending: tuple[int, int, Told] | None = None  # first step, end
        with (
            run.progress(name, done, self.num_steps, self.show) as progress,
            _profiler(run) as profiler,
        ):
            while done < self.num_steps:
                # Calls end on multiples of their size, whatever step a resume began at.
                size = self.size - done % self.size
                size = min(size, self.num_steps - done)
                if any(a < done + size and done < b for a, b in passed_over):
                    state = left_out(state, size)
                    done += size
                    continue
                batch = self.loader.stacked(done, size)
                if not progress.examples:
                    progress.examples = self.loader.examples(batch)
                    progress.full_rate = full_rate(self.step, state, batch)
                profiler.before(done, done + size)
                wishes = self._spread(self._wishes(received, saved_at))
                state, told = self.call(state, bad, batch, np.int32(done), wishes)
                bad = told.bad
                done += size
                if traced := profiler.after(done, told):
                    run.say(traced)
                # The call above runs in the background; meanwhile the one before it is
                # logged, so that the device never waits for the disk.
                agreed = self._settle(pending, state, progress)
                pending = (done - size, done, told)
                if jax.process_count() == 1:  # nobody to agree with
                    agreed = self._wishes(received, saved_at)
                signum, save = agreed
                if signum or save:
                    self._settle(pending, state, progress)
                    pending = None
                    checkpoints.save(done, state)
                    saved_at = time.monotonic()
                if signum and done < self.num_steps:
                    raise Stopped(
                        f"Stopped at step {done} of {self.num_steps} of {name}.", signum
                    )
            self._settle(pending, state, progress)
            checkpoints.save(self.num_steps, state)
            signum = max(everyone(received[0] if received else 0))
            if signum:
                raise Stopped(f"Stopped after {name}.", signum)
        return state

    def _settle(
        self, pending: tuple[int, int, Told] | None, state: State, progress: Progress
    ) -> tuple[int, int]:
        """Logs a call that is over; returns what the processes agreed on in it."""
        if pending is None:
            return 0, 0
        first, end, told = pending
        told = jax.device_get(told)
        skip = self.run.options.non_finite == "skip"
        if told.bad != nonfinite.FINE or not told.fine:
            self._stop_at(first, end, state)
        if skip:
            told.metrics["skipped"] = end - first - int(told.fine)
        report_step(self.name, end)
        self.run.log(self.name, end, told.metrics)
        progress.update(end, told.metrics)
        signum, save = told.wishes.tolist()
        return signum, save

    def _stop_at(self, first: int, end: int, state: State) -> None:
        """Finds the bad step of a call, from the state before the call, and stops."""
        run, name, policy = self.run, self.name, self.run.options.non_finite
        bad = end - 1
        if policy == "skip":
            batch = self.loader.stacked(bad, 1)
        else:
            bad, batch, state = self._first_bad(first, end, state)
        injection = run.options.injection()
        diagnosis = nonfinite.diagnose(self.step, injection, state, batch, bad)
        box = nonfinite.write_black_box(
            run.folder,
            diagnosis,
            fit=name,
            policy=policy,
            batch=self.loader.one(bad),
            ids=None if self.ids is None else self.ids(bad),
        )
        if policy == "rollback":
            raise _RollBack(diagnosis, first, end)
        more = f" (nor at any step from {first} on)" if policy == "skip" else ""
        raise FloatingPointError(
            f"{name}, {diagnosis}{more}. The parameters are those before it; {box} has "
            "the batch and all bad leaves."
        )

    def _first_bad(self, first: int, end: int, state: State) -> tuple[int, Any, State]:
        """The first bad step, its batch, and the state before it."""
        for t in range(first, end):
            batch = self.loader.stacked(t, 1)
            rest = batch, np.int32(t), self._spread((0, 0))
            state, told = self.call(state, self._no_bad_step(), *rest)
            if int(told.bad) != nonfinite.FINE:
                return t, batch, state
        raise FloatingPointError(
            f"{self.name}: of steps {first} to {end - 1} made together a number is not "
            "finite, and of none of them made alone. The newest checkpoint is from "
            "before."
        )

    def pass_over(self, bad: _RollBack) -> None:
        """Notes that the steps of a bad call are left out from now on."""
        name, folder = self.name, self.run.folder
        known = nonfinite.passed_over(folder, name)
        if len(known) == MOST_ROLLBACKS:
            raise FloatingPointError(
                f"{name}, {bad}, after {MOST_ROLLBACKS} rollbacks. "
                f"{folder / 'nonfinite'} has a black box of each."
            )
        wait_for_all(f"rollback {name} {len(known)}")  # each has read them
        if is_first():
            nonfinite.pass_over(folder, name, [*known, (bad.first, bad.end)])
        wait_for_all(f"rolled back {name} {len(known)}")
        self.run.say(
            f"{name}, {bad}: back to the newest checkpoint; from now on steps "
            f"{bad.first} to {bad.end - 1} are passed over."
        )

    def _wishes(self, received: list[int], saved_at: float) -> tuple[int, int]:
        late = time.monotonic() - saved_at > self.save_every
        return received[0] if received else 0, int(late and is_first())

    def _spread(self, wishes: tuple[int, int]) -> Any:
        """One row for each device, so that the compiled call can take the largest."""
        mesh = self.run.mesh
        if mesh is None:
            return np.array([wishes], np.int32)
        sharding = NamedSharding(mesh, P(mesh.axis_names))
        rows = np.tile(np.array(wishes, np.int32), (mesh.size, 1))
        return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)

    def _no_bad_step(self) -> Any:
        mesh = self.run.mesh
        if mesh is None:
            return jnp.int32(nonfinite.FINE)
        # As the calls return it, so that there is one program and not two.
        whole, value = NamedSharding(mesh, P()), np.int32(nonfinite.FINE)
        return jax.make_array_from_callback((), whole, lambda _: value)


def _start(run: Run, state: Any, specs: Specs | None) -> State:
    """The state at step 0, in arrays that a call may take for its own."""
    if run.mesh is not None:
        same = run.options.reproducible
        return place(run.mesh, state, specs, reproducible=same)
    if callable(state):
        return jax.jit(state)()
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(state)
