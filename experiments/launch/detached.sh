#!/usr/bin/env bash
# A command on one machine that goes on when the connection to it breaks.
#
#   detached.sh start COMMAND [ARGUMENT ...]
#   detached.sh follow     print what it says, and end with its status
#   detached.sh stop       send it SIGTERM
#
# There is one at a time; its log lies in ~/.jaxrl_llm.

set -euo pipefail
state=$HOME/.jaxrl_llm

runs() {
  [[ -f $state/pid && ! -f $state/status ]] &&
    kill -0 "$(<"$state/pid")" 2>/dev/null
}

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

start() {
  if runs; then
    fail "a run is under way on $(hostname): stop it, or attach to it" 2
  fi
  mkdir -p "$state"
  rm -f "$state"/{pid,status,log}
  # shellcheck disable=SC2016  # The inner shell expands it.
  setsid bash -c '
    state=$1
    shift
    "$@" &
    echo $! >"$state/new" && mv "$state/new" "$state/pid"
    status=0
    wait $! || status=$?
    echo "$status" >"$state/new" && mv "$state/new" "$state/status"
  ' _ "$state" "$@" >"$state/log" 2>&1 </dev/null &
  until [[ -f $state/pid ]]; do
    sleep 0.05
  done
}

follow() {
  [[ -f $state/pid ]] || fail "nothing was started on $(hostname)"
  tail -n +1 -f -s 0.5 --pid="$(<"$state/pid")" "$state/log"
  for _ in {1..50}; do
    [[ ! -f $state/status ]] || exit "$(<"$state/status")"
    sleep 0.1
  done
  fail "the run on $(hostname) was killed together with what watched it"
}

stop() {
  if runs; then
    kill -TERM "$(<"$state/pid")"
  fi
}

case ${1:-}:$# in
  start:1 | :*) fail 'detached.sh start COMMAND [ARGUMENT ...]' 2 ;;
  start:*) start "${@:2}" ;;
  follow:1 | stop:1) "$1" ;;
  *) fail "detached.sh: unknown: $*" 2 ;;
esac
