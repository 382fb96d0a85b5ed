#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster that xpk made, as a JobSet.
#
#   NAME=run CLUSTER=tpus ZONE=us-east5-a TYPE=v5p-256 IMAGE=registry/jaxrl_llm \
#     experiments/launch/xpk.sh python -m experiments.train ... --resume
#
# Ends with 0 if the command did so on all hosts, else with xpk's own status.
# SIGTERM or Ctrl-C asks it to save and end, and deletes the workload.
#
# Variables:
#   NAME      of the workload, new to the cluster
#   CLUSTER, ZONE; PROJECT if gcloud has no default
#   TYPE      of the slice (the cloud's own count); SLICES (default: 1)
#   IMAGE     with the package installed
#   RESTARTS  how often it starts again after a loss (default: 3)

set -euo pipefail

if (($# == 0)) || [[ -z ${NAME:-} || -z ${CLUSTER:-} || -z ${ZONE:-} ||
  -z ${TYPE:-} || -z ${IMAGE:-} ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

workload() {
  local verb=$1
  shift
  xpk workload "$verb" --cluster="$CLUSTER" --zone="$ZONE" \
    ${PROJECT:+--project="$PROJECT"} "$@"
}

stopping=''
trap 'stopping=1
workload delete --workload="$NAME" --force &' TERM INT
workload create --workload="$NAME" --tpu-type="$TYPE" \
  --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts="${RESTARTS:-3}" --termination-grace-period-seconds=300 \
  --command="exec $(printf '%q ' "$@")"

# A week; xpk gives up after five minutes by default.
workload list --wait-for-job-completion="$NAME" --timeout=604800 &
waiting=$!
status=0
wait "$waiting" || status=$?
while kill -0 "$waiting" 2>/dev/null; do
  status=0
  wait "$waiting" || status=$?
done
exit $((stopping ? 143 : status))
