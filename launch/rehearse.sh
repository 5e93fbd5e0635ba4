#!/usr/bin/env bash
# Runs a command in several processes on this machine, as the hosts of a cluster would.
set -uo pipefail
# shellcheck source=launch/common.sh
source "${BASH_SOURCE[0]%/*}/common.sh"

help() {
  cat <<'END'
usage: launch/rehearse.sh [flags] -- COMMAND [ARGUMENT...]

Runs COMMAND in several processes on this machine, as the hosts of a cluster run it: the processes find each other
through JAX_COORDINATOR_ADDRESS (127.0.0.1 and a free port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, and have CPU devices
only. Each line of output starts with the number of its process.

  --processes N         how many processes (2)
  --devices N           CPU devices of each process (what JAX_NUM_CPU_DEVICES says, or 1)
  --signal-to N|all     the process that SIGTERM and SIGINT to this script are forwarded to (all)
  --max-restarts N      how many times all processes are started again when their status asks for it (0)
  --restart-delay S     seconds before they are started again (1)
  --grace-seconds S     when a process has ended with an error, the others have this long until they are killed (600)
  --port N              port of the coordinator (a free one)
  --dry-run             print the command of each process
  --help                this text

Words in flags may be joined by - or _.

The exit status is the worst of the last start: an error before 129 and 130 (stopped by a person) before a status that
asks for a restart before 0. Processes are started again after 75, 134, 137, 139 and 143, and after no other status.

  launch/rehearse.sh --processes 2 --devices 4 -- python -m ddpm_jax.train --config configs/unclip.py:smoke --workdir runs/two
END
}

processes=2 devices=${JAX_NUM_CPU_DEVICES:-1} signal_to=all max_restarts=0 restart_delay=1 grace=600 port='' dry_run=''
command=()

read_flags() {
  while (($#)); do
    next_flag "$@"
    case $flag in
      --processes) take_number 1; processes=$value ;;
      --devices) take_number 1; devices=$value ;;
      --signal-to) take_value; signal_to=$value ;;
      --max-restarts) take_number 0; max_restarts=$value ;;
      --restart-delay) take_number 0; restart_delay=$value ;;
      --grace-seconds) take_number 1; grace=$value ;;
      --port) take_number 1; port=$value ;;
      --dry-run) take_switch; dry_run=yes ;;
      --help) help; exit 0 ;;
      --) shift; command=("$@"); break ;;
      *) unknown_flag ;;
    esac
    shift "$used"
  done
  if ((${#command[@]} == 0)); then usage_error "there is no command; it comes after --"; fi
  if ((processes > 64)); then usage_error "--processes must be at most 64, not $processes"; fi
  if [[ -n $port ]] && ((port > 65535)); then usage_error "--port must be at most 65535, not $port"; fi
  if ! [[ $devices =~ ^[1-9][0-9]{0,3}$ ]]; then
    usage_error "JAX_NUM_CPU_DEVICES must be a whole number of at least 1, not $devices"
  fi
  if [[ $signal_to != all ]] && { ! [[ $signal_to =~ ^[0-9]{1,2}$ ]] || ((10#$signal_to >= processes)); }; then
    usage_error "--signal-to must be all or a process from 0 to $((processes - 1)), not $signal_to"
  fi
  if [[ -z $dry_run ]] && ! type "${command[0]}" >/dev/null 2>&1; then
    fail "${command[0]} is not installed or not on PATH"
  fi
}

free_port() { # print one to which nothing listens
  local candidate tries
  for ((tries = 0; tries < 100; tries++)); do
    candidate=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "found no free port; give one with --port"
}

words_of() { # PROCESS: set words to its command
  words=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$address_port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1")
  words+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "${command[@]}")
}

prefix_lines() { # PROCESS
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%d] %s\n' "$1" "$line"; done
}

forward() { # SIGNAL
  local process
  stopped_by=$1
  for ((process = 0; process < processes; process++)); do
    if [[ $signal_to == all || $((10#$signal_to)) == "$process" ]] && [[ -n ${pids[process]:-} ]]; then
      say "SIG$1 to process $process"
      kill "-$1" "${pids[process]}" 2>/dev/null
    fi
  done
}

severity() { # STATUS: print it
  case $1 in
    0) printf 0 ;;
    129 | 130) printf 2 ;;
    *) if asks_for_restart "$1"; then printf 1; else printf 3; fi ;;
  esac
}

start() {
  local process words
  address_port=${port:-$(free_port)}
  pids=() printers=()
  for ((process = 0; process < processes; process++)); do
    words_of "$process"
    rm -f "$scratch/$process"
    mkfifo "$scratch/$process"
    prefix_lines "$process" <"$scratch/$process" &
    printers[process]=$!
    "${words[@]}" </dev/null >"$scratch/$process" 2>&1 &
    pids[process]=$!
    say "process $process has pid $!"
  done
}

collect() { # wait for all processes; set worst
  local process status deadline='' left=$processes
  worst=0
  while ((left > 0)); do
    sleep 0.1
    for ((process = 0; process < processes; process++)); do
      if [[ -z ${pids[process]} ]] || kill -0 "${pids[process]}" 2>/dev/null; then continue; fi
      wait "${pids[process]}" 2>/dev/null
      status=$?
      kill_group "${pids[process]}" # what a loader left behind, as when a host is gone
      pids[process]='' left=$((left - 1))
      say "process $process ended with status $status"
      if (($(severity "$status") > $(severity "$worst"))) ||
        { (($(severity "$status") == $(severity "$worst"))) && ((status > worst)); }; then worst=$status; fi
      if ((status != 0)) && [[ -z $deadline ]]; then deadline=$((SECONDS + grace)); fi
    done
    if [[ -n $deadline ]] && ((left > 0 && SECONDS >= deadline)); then
      say "$grace s after the first one: killing the processes that are left"
      kill_all
      deadline=$((SECONDS + 60))
    fi
  done
  finish_output
}

kill_group() { # PID: kill a process and its children
  kill -KILL "-$1" 2>/dev/null
}

kill_all() {
  local process
  for ((process = 0; process < processes; process++)); do
    if [[ -n ${pids[process]:-} ]]; then kill_group "${pids[process]}"; fi
  done
}

finish_output() { # processes that outlive their parent can hold the output open
  local printer tries
  for printer in "${printers[@]}"; do
    for ((tries = 0; tries < 20; tries++)); do
      if ! kill -0 "$printer" 2>/dev/null; then break; fi
      sleep 0.1
    done
    kill "$printer" 2>/dev/null
    wait "$printer" 2>/dev/null
  done
}

clean_up() {
  kill_all
  rm -rf "$scratch"
}

read_flags "$@"
if [[ -n $dry_run ]]; then
  address_port=${port:-PORT}
  for ((i = 0; i < processes; i++)); do
    words_of "$i"
    execute "${words[@]}"
  done
  exit 0
fi

export PYTHONUNBUFFERED=1 # lines appear when they are printed
set -m # each process has its own process group: Ctrl-C reaches this script only, which forwards it
scratch=$(mktemp -d) || fail "cannot make a temporary directory"
pids=() stopped_by=''
trap clean_up EXIT
trap 'forward TERM' TERM
trap 'forward INT' INT
restarts=0
while :; do
  start
  collect
  if ! asks_for_restart "$worst" || ((restarts >= max_restarts)) || [[ $stopped_by == INT ]]; then exit "$worst"; fi
  restarts=$((restarts + 1)) stopped_by=''
  say "restart $restarts of at most $max_restarts, after status $worst"
  sleep "$restart_delay"
  if [[ -n $stopped_by ]]; then exit "$worst"; fi # a signal while nothing ran
done
