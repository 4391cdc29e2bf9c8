"""The texts around the host script; `@{name}` stands for a value.

Comments in them are for the reader of the launch file.
"""

__all__ = ["GCLOUD", "JOBSET", "SLURM", "XPK"]

GCLOUD = r"""#!/usr/bin/env bash
# Cloud TPU VMs: the same command on every host of a slice. Run it in tmux, after
# `ssh-add ~/.ssh/google_compute_engine`, without which gcloud reaches one host at most.
# Written by `python -m experiments.launch gcloud`.
set -uo pipefail
@{needs}
name=@{name}
where=(--project="$PROJECT" --zone="$ZONE")

# What every host runs.
read -r -d '' host <<'HOST' || true
@{host}
HOST
printf -v remote 'RUNS=%q REPOSITORY=%q REVISION=%q bash -c %q' \
  "$RUNS" "$REPOSITORY" "$REVISION" "$host"

queued() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo ABSENT
}

slice() {
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
    --format='value(state)' 2>/dev/null || echo ABSENT
}

# A slice that was taken away leaves a suspended request behind, which never comes back.
wait_for_slice() {
  until [[ "$(queued)" == ACTIVE && "$(slice)" == READY ]]; do
    case "$(queued)" in
      ABSENT)
        gcloud compute tpus queued-resources create "$name" "${where[@]}" \
          --node-id="$name" --accelerator-type=@{accelerator} \
          --runtime-version=@{runtime}@{spot} --async || exit 1
        ;;
      SUSPENDED | FAILED)
        gcloud compute tpus queued-resources delete "$name" "${where[@]}" \
          --force --quiet
        ;;
    esac
    sleep "${POLL:-30}"
  done
}

# Ctrl-C asks the hosts to save and stop; otherwise they would go on without us.
# shellcheck disable=SC2329
stop() {
  trap - INT TERM
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command='pkill -TERM -f [j]axzoo.training.launch'
  exit 130
}
trap stop INT TERM

crashes=0
while true; do
  wait_for_slice
  status=0
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --ssh-flag='-o ServerAliveInterval=30' --command="$remote" || status=$?
  case $status in
    0 | 2 | 130) break ;;
    1) # A claim that does not hold, or gcloud that lost the slice.
      sleep "${POLL:-30}"
      if [[ "$(slice)" == READY ]]; then break; fi
      ;;
    75) ;;
    *)
      crashes=$((crashes + 1))
      if ((crashes > @{max_restarts})); then break; fi
      ;;
  esac
  echo "The run ended with status $status: starting it again." >&2
done
echo "Done. Give the slice back: gcloud compute tpus queued-resources delete $name" \
  "${where[*]} --force" >&2
exit "$status"
"""

XPK = r"""#!/usr/bin/env bash
# A TPU slice through XPK: one JobSet on a cluster that `xpk cluster create` made.
# Written by `python -m experiments.launch xpk`.
set -euo pipefail
@{needs}

# What every host runs.
read -r -d '' host <<'HOST' || true
@{host}
HOST

# XPK pastes the command into one line of YAML. It starts a run again on 42 and 127 to
# 255 by itself; 75 is a preempted run, 70 and 76 are a crash and a lost peer.
xpk workload create \
  --project="$PROJECT" \
  --zone="$ZONE" \
  --cluster="$CLUSTER" \
  --workload=@{name} \
  --tpu-type=@{tpu_type} \
  --no-use-parallel-containers \
  --docker-image=@{image} \
  --env="RUNS=$RUNS" \
  --env="REPOSITORY=$REPOSITORY" \
  --env="REVISION=$REVISION" \
  --max-restarts=@{max_restarts} \
  --restart-on-exit-codes=70,75,76 \
  --termination-grace-period-seconds=@{grace} \
  --command="${host//$'\n'/; }"
"""

JOBSET = r"""---
# One pod per host of a slice in Google Kubernetes Engine, by JobSet 0.10 or newer.
# Written by `python -m experiments.launch jobset`; start it by `kubectl apply -f`.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: @{name}
@{annotations}spec:
  failurePolicy:
    # Crashes alone count. Without a rule that matches, the set is started again.
    maxRestarts: @{max_restarts}
    rules:
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns:
          - "failed with exit code 75 "
          - "has condition DisruptionTarget "
      - name: done
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: host
      replicas: 1
      template:
        spec:
          parallelism: @{hosts}
          completions: @{hosts}
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: main, operator: In, values: [75]}
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
              - action: FailJob
                onExitCodes: {containerName: main, operator: In, values: [1, 2, 130]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: @{grace}
              nodeSelector:
@{selector}
              containers:
                - name: main
                  image: @{image}
                  env:
@{env}
                  command: [bash, -c]
                  args:
                    - |
@{host}
                  resources:
                    limits:
                      @{resource}: @{per_host}
"""

SLURM = r"""#!/usr/bin/env bash
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{hosts}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=@{per_host}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=@{hours}:00:00
#SBATCH --signal=TERM@@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# One process per node with all of its GPUs: RUNS=... REVISION=... sbatch THIS_FILE.
# Written by `python -m experiments.launch slurm`.
set -uo pipefail
@{needs}
export RUNS REPOSITORY REVISION
# Without it jax takes one GPU for each task.
export JAX_LOCAL_DEVICE_IDS=@{devices}

# What every host runs.
read -r -d '' host <<'HOST' || true
@{host}
HOST

# SLURM signals the tasks themselves before the time is over (no B: above): srun would
# turn a SIGTERM of this shell into SIGKILL. A task that is done kills no other: it may
# still be saving.
status=0
srun --kill-on-bad-exit=0 --cpu-bind=none bash -c "$host" || status=$?
case $status in
  0 | 1 | 2 | 130) ;;
  75) scontrol requeue "$SLURM_JOB_ID" ;;
  *) # SLURM's count holds the preemptions too.
    if ((${SLURM_RESTART_COUNT:-0} < @{max_restarts})); then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
"""
