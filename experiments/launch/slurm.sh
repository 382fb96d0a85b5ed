#!/usr/bin/env bash
# Trains on the nodes of a Slurm job: one process on each, with all its GPUs.
#
#   sbatch --nodes=8 --gpus-per-node=8 --time=24:00:00 \
#     experiments/launch/slurm.sh python -m experiments.train ... --resume
#
# The job ends with the status of the command.  Five minutes before the time
# limit the command is asked to save; if it does, the job goes back into the
# queue and, with --resume, continues.  `scancel --signal=TERM JOB` saves and
# ends; `scancel JOB` leaves it KillWait seconds (30 by default) for that.

#SBATCH --job-name=jaxrl_llm
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

set -euo pipefail
saved=143 # of a command that SIGTERM asked to save
again=''

if (($# == 0)); then
  echo 'usage: sbatch [OPTION ...] slurm.sh COMMAND [ARGUMENT ...]' >&2
  exit 2
fi

# This signals every task, and not this script.  In the background, so that the
# wait below goes on at once.
trap 'scancel --signal=TERM "$SLURM_JOB_ID" &' TERM
trap 'again=1
scancel --signal=TERM "$SLURM_JOB_ID" &' USR1

# Not to be killed for another's end: processes end each other, and one may
# still be writing.
srun --kill-on-bad-exit=0 "$@" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done
if [[ -n $again && $status == "$saved" ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
