#!/usr/bin/env bash
# Trains on all workers of a TPU VM, be it one machine or a whole pod slice.
#
#   tpu_pod.sh up                           create it if need be, and install
#   tpu_pod.sh run COMMAND [ARGUMENT ...]   start on all workers, and follow
#   tpu_pod.sh attach                       follow what was started
#   tpu_pod.sh stop                         SIGTERM: save and end
#   tpu_pod.sh fetch FOLDER DESTINATION     copy from worker 0
#   tpu_pod.sh down                         delete it
#
# The command runs in the repository on each worker.  `run` and `attach` end
# with 0 if it did so on all workers.  SIGTERM or Ctrl-C asks it to save and
# end; a lost connection does not end it.
#
# Variables:
#   NAME, ZONE   of the TPU VM; PROJECT if gcloud has no default
#   TYPE         for `up`, such as v5litepod-256 (the cloud's own count)
#   VERSION      for `up`, the VM's software, such as v2-alpha-tpuv5-lite
#   CREATE       for `up`, more flags of the creation, such as --spot
#   INSTALL      what installs the package on a worker, in the repository
#   SETUP        what each worker does after that, such as mounting a folder

set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# The workers' own Python is older than 3.11.
: "${INSTALL:=python3 -m pip install -q --user uv &&
  python3 -m uv venv -q --clear --python 3.12 ~/venv &&
  python3 -m uv pip install -q --python ~/venv/bin/python -e '.[tpu]'}"
# shellcheck disable=SC2016  # The worker expands it.
here='cd ~/jaxrl_llm && export PATH="$HOME/venv/bin:$PATH" &&'
detached='bash experiments/launch/detached.sh'

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

tpu() {
  local verb=$1
  shift
  gcloud compute tpus tpu-vm "$verb" "$@" --zone="$ZONE" \
    ${PROJECT:+--project="$PROJECT"}
}

on_all() {
  tpu ssh "$NAME" --worker=all --command="$1"
}

up() {
  if ! tpu describe "$NAME" --format='value(state)'; then
    read -ra more <<<"${CREATE:-}"
    tpu create "$NAME" --accelerator-type="${TYPE:?is not set}" \
      --version="${VERSION:?is not set}" "${more[@]}"
  fi
  # What is committed, so that a run can be told from its commit.
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$repository" archive --output="$archive" HEAD
  tpu scp "$archive" "$NAME:jaxrl_llm.tar.gz" --worker=all
  rm "$archive"
  on_all "rm -rf ~/jaxrl_llm && mkdir ~/jaxrl_llm &&
tar -xzf ~/jaxrl_llm.tar.gz -C ~/jaxrl_llm && $here { $INSTALL; } &&
{ ${SETUP:-true}; }"
}

follow() {
  on_all "$here $detached follow" &
  local following=$! status=0
  wait "$following" || status=$?
  while kill -0 "$following" 2>/dev/null; do
    status=0
    wait "$following" || status=$?
  done
  return "$status"
}

stop() {
  on_all "$here $detached stop"
}

# In the background, so that a wait goes on at once.
ask_to_save_if_stopped() {
  trap 'stop &' TERM INT
}

[[ -n ${NAME:-} && -n ${ZONE:-} ]] || usage
case ${1:-}:$# in
  up:1) up ;;
  run:1) usage ;;
  run:*)
    ask_to_save_if_stopped
    on_all "$here $detached start $(printf '%q ' "${@:2}")"
    follow
    ;;
  attach:1)
    ask_to_save_if_stopped
    follow
    ;;
  stop:1) stop ;;
  fetch:3) tpu scp --recurse --worker=0 "$NAME:$2" "$3" ;;
  down:1) tpu delete "$NAME" ;;
  *) usage ;;
esac
