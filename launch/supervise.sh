#!/usr/bin/env bash
# Keeps a command running on a TPU VM after the connection that started it has ended. launch/tpu_vm.sh calls it there.
set -uo pipefail
# shellcheck source=launch/common.sh
source "${BASH_SOURCE[0]%/*}/common.sh"

help() {
  cat <<'END'
usage: launch/supervise.sh start|stop|status --directory DIR [flags] [-- COMMAND [ARGUMENT...]]

  start    runs COMMAND in the background, its output appended to DIR/log, and starts it again after the statuses that
           ask for it (75, 134, 137, 139, 143). Refuses to start a second one
  stop     sends SIGTERM to COMMAND and waits until it has ended
  status   prints whether COMMAND is running, or its last status

  --directory DIR       where the log and the state are
  --max-restarts N      how many times COMMAND is started again (100)
  --restart-delay S     seconds before it is started again (10)
  --resume              start: do nothing, and succeed, when COMMAND is running or has ended by itself for good
  --wait-seconds S      stop: how long to wait (600)
END
}

action='' directory='' max_restarts=100 restart_delay=10 resume='' wait_seconds=600
command=()

read_flags() {
  case ${1:-} in
    start | stop | status | run) action=$1; shift ;;
    --help) help; exit 0 ;;
    *) usage_error "the first argument must be start, stop or status, not '${1:-}'" ;;
  esac
  while (($#)); do
    next_flag "$@"
    case $flag in
      --directory) take_value; directory=$value ;;
      --max-restarts) take_number 0; max_restarts=$value ;;
      --restart-delay) take_number 0; restart_delay=$value ;;
      --resume) take_switch; resume=yes ;;
      --wait-seconds) take_number 0; wait_seconds=$value ;;
      --help) help; exit 0 ;;
      --) shift; command=("$@"); break ;;
      *) unknown_flag ;;
    esac
    shift "$used"
  done
  if [[ -z $directory ]]; then usage_error "--directory is needed"; fi
  if [[ $action == start ]] && ((${#command[@]} == 0)); then usage_error "there is no command; it comes after --"; fi
}

is_running() {
  if ! mkdir -p "$directory" || ! exec 9>>"$directory/lock"; then fail "cannot write $directory"; fi
  ! flock --nonblock 9
}

read_state() {
  state=''
  if [[ -r $directory/state ]]; then state=$(<"$directory/state"); fi
}

start() {
  read_state
  if is_running; then
    if [[ -z $resume ]]; then fail "$HOSTNAME: a command is running already (state: $state); stop it first"; fi
    printf '%s: %s\n' "$HOSTNAME" "$state"
    return
  fi
  if [[ -n $resume && $state == "ended with status "* ]] && ! asks_for_restart "${state##* }"; then
    printf '%s: %s; not started again\n' "$HOSTNAME" "$state"
    return
  fi
  rm -f "$directory/pid"
  write_state 'running'
  # The lock on descriptor 9 stays with the background process.
  nohup setsid bash "${BASH_SOURCE[0]}" run --directory "$directory" --max-restarts "$max_restarts" \
    --restart-delay "$restart_delay" -- "${command[@]}" </dev/null >>"$directory/log" 2>&1 &
  printf '%s: started, the log is %s\n' "$HOSTNAME" "$directory/log"
}

write_state() { # TEXT
  printf '%s\n' "$1" >"$directory/state.tmp" && mv "$directory/state.tmp" "$directory/state"
}

run() { # in the background: the command, again and again
  local status restarts=0
  export PYTHONUNBUFFERED=1 # the log is written line by line
  stopping='' pid='' interrupted=''
  trap 'stopping=yes interrupted=yes; if [[ -n $pid ]]; then kill -TERM "$pid" 2>/dev/null; fi' TERM
  printf '%s\n' "$$" >"$directory/pid"
  while :; do
    write_state "running, restarted $restarts times"
    say "$(date -u +%FT%TZ) starting: $(quote_all "${command[@]}")"
    "${command[@]}" 9>&- &
    pid=$!
    if [[ -n $stopping ]]; then kill -TERM "$pid"; fi
    while :; do
      interrupted=''
      wait "$pid"
      status=$?
      if [[ -z $interrupted ]]; then break; fi # else the trap ended wait, not the command
    done
    say "$(date -u +%FT%TZ) ended with status $status"
    if [[ -n $stopping ]] || ! asks_for_restart "$status" || ((restarts >= max_restarts)); then break; fi
    restarts=$((restarts + 1))
    write_state "restarting after status $status, restarted $((restarts - 1)) times"
    sleep "$restart_delay" 9>&-
    if [[ -n $stopping ]]; then break; fi
  done
  write_state "ended with status $status"
  exit "$status"
}

stop() {
  if ! is_running; then
    status
    return
  fi
  exec 9>&-
  local deadline=$((SECONDS + wait_seconds)) sent=''
  while is_running; do
    exec 9>&-
    if [[ -z $sent && -s $directory/pid ]]; then
      kill -TERM "$(<"$directory/pid")" 2>/dev/null
      sent=yes
    fi
    if ((SECONDS >= deadline)); then fail "$HOSTNAME: still running $wait_seconds s after SIGTERM"; fi
    sleep 0.2
  done
  exec 9>&-
  status
}

status() {
  read_state
  if is_running; then
    printf '%s: %s\n' "$HOSTNAME" "$state"
  elif [[ $state == running* || $state == restarting* ]]; then
    printf '%s: killed; its last state was: %s\n' "$HOSTNAME" "$state"
  else
    printf '%s: %s\n' "$HOSTNAME" "${state:-not started}"
  fi
}

read_flags "$@"
if ! command -v flock >/dev/null || ! command -v setsid >/dev/null; then
  fail "flock and setsid are needed; they are in the package util-linux"
fi
"$action"
