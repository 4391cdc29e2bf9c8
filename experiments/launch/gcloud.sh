#!/usr/bin/env bash
# Cloud TPU VMs: the same command on every host of a slice. Run it in tmux, after
# `ssh-add ~/.ssh/google_compute_engine`, without which gcloud reaches one host at most.
# Written by `python -m experiments.launch gcloud`.
set -uo pipefail
: "${PROJECT:?set PROJECT to your Google Cloud project}"
: "${ZONE:?set ZONE to a zone with this accelerator}"
: "${RUNS:?set RUNS to gs://BUCKET/FOLDER or to a folder that all hosts see}"
REPOSITORY=https://github.com/jaxzoo/jaxzoo
: "${REVISION:?set REVISION to the commit or tag that the hosts install}"
name=iwae
where=(--project="$PROJECT" --zone="$ZONE")

# What every host runs.
read -r -d '' host <<'HOST' || true
set -eo pipefail
trap 'exit 70' ERR
trap 'exit 75' TERM
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/0.13.9/install.sh | sh
git init --quiet "/tmp/jaxzoo-$UID-iwae"
cd "/tmp/jaxzoo-$UID-iwae"
git fetch --quiet --depth 1 "$REPOSITORY" "$REVISION"
git checkout --quiet --force FETCH_HEAD
uv venv --quiet --allow-existing --python 3.13 .venv
uv pip install --quiet --editable ".[tpu,gcs]"
[ -n "${JAXZOO_COORDINATOR:-}" ] || export JAXZOO_DISTRIBUTED=auto
export JAX_COMPILATION_CACHE_DIR="$RUNS/compile-cache"
exec .venv/bin/python -m jaxzoo.training.launch -- .venv/bin/python -m experiments.vae.iwae full --run-dir "$RUNS/iwae"
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
          --node-id="$name" --accelerator-type=v5litepod-16 \
          --runtime-version=v2-alpha-tpuv5-lite --spot --async || exit 1
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
      if ((crashes > 20)); then break; fi
      ;;
  esac
  echo "The run ended with status $status: starting it again." >&2
done
echo "Done. Give the slice back: gcloud compute tpus queued-resources delete $name" \
  "${where[*]} --force" >&2
exit "$status"
