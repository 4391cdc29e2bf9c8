#!/usr/bin/env bash
# A TPU slice through XPK: one JobSet on a cluster that `xpk cluster create` made.
# Written by `python -m experiments.launch xpk`.
set -euo pipefail
: "${PROJECT:?set PROJECT to your Google Cloud project}"
: "${ZONE:?set ZONE to a zone with this accelerator}"
: "${CLUSTER:?set CLUSTER to the cluster of xpk cluster create}"
: "${RUNS:?set RUNS to gs://BUCKET/FOLDER or to a folder that all hosts see}"
REPOSITORY=https://github.com/jaxzoo/jaxzoo
: "${REVISION:?set REVISION to the commit or tag that the hosts install}"

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

# XPK pastes the command into one line of YAML. It starts a run again on 42 and 127 to
# 255 by itself; 75 is a preempted run, 70 and 76 are a crash and a lost peer.
xpk workload create \
  --project="$PROJECT" \
  --zone="$ZONE" \
  --cluster="$CLUSTER" \
  --workload=iwae \
  --tpu-type=v6e-16x16 \
  --no-use-parallel-containers \
  --docker-image=python:3.13 \
  --env="RUNS=$RUNS" \
  --env="REPOSITORY=$REPOSITORY" \
  --env="REVISION=$REVISION" \
  --max-restarts=20 \
  --restart-on-exit-codes=70,75,76 \
  --termination-grace-period-seconds=300 \
  --command="${host//$'\n'/; }"
