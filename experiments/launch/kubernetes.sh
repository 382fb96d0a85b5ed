#!/usr/bin/env bash
# Trains on nodes of a Kubernetes cluster: one pod on each, with all its GPUs.
#
#   NAME=run IMAGE=registry/jaxrl_llm NODES=8 GPUS=8 CLAIM=runs \
#     experiments/launch/kubernetes.sh python -m experiments.train ... --resume
#
# The flags --coordinator, --num_processes and --process_id are added to the
# command.  Ends with 0 if it did so on all nodes.  SIGTERM or Ctrl-C asks it
# to save and end, and deletes the job.
#
# Variables:
#   NAME    of the job, new to the cluster
#   IMAGE   with the package installed
#   NODES   how many; GPUS on each
#   CLAIM   a volume claim that all nodes can write, which is /runs in the pods
#   RETRIES how often it starts again after a loss (default: 3)
#   POLL    seconds between two looks at it (default: 10)

set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if (($# == 0)) || [[ -z ${NAME:-} || -z ${IMAGE:-} || -z ${NODES:-} ||
  -z ${GPUS:-} || -z ${CLAIM:-} ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

# JSON is YAML.
COMMAND=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")
FAILURES=$((NODES * ${RETRIES:-3}))
export NAME IMAGE NODES GPUS CLAIM COMMAND FAILURES
stopping=''
trap 'stopping=1
kubectl delete job "$NAME" --cascade=foreground --wait=false &' TERM INT
python3 -c 'import os, string, sys
print(string.Template(sys.stdin.read()).substitute(os.environ))' \
  <"$folder/kubernetes.yaml" | kubectl apply -f -
echo "follow it with: kubectl logs --follow --prefix -l job-name=$NAME"

conditions='{.status.conditions[?(@.status=="True")].type}'
while true; do
  sleep "${POLL:-10}" &
  wait $! || true
  # An answer that fails to come says nothing of the job.
  state=$(kubectl get job "$NAME" --ignore-not-found \
    -o jsonpath="found $conditions") || continue
  case $state in
    *Complete*) exit 0 ;;
    *Failed* | '') break ;;
  esac
done
if [[ -n $stopping ]]; then
  exit 143
fi
kubectl logs --tail=20 --prefix -l "job-name=$NAME" >&2 || true
exit 1
