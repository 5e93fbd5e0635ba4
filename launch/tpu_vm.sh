#!/usr/bin/env bash
# Trains on Cloud TPU VMs, which queued resources create. docs/pods.md walks through it.
set -euo pipefail
# shellcheck source=launch/common.sh
source "${BASH_SOURCE[0]%/*}/common.sh"

help() {
  cat <<'END'
usage: launch/tpu_vm.sh ACTION --name NAME --zone ZONE [flags] [-- COMMAND [ARGUMENT...]]

  create   requests the TPU as a queued resource; with --wait, waits until it is there
  setup    copies this checkout, as it is, to every worker and installs it there
  run      starts COMMAND on every worker in the background; it goes on when the connection ends
  log      follows the log of one worker
  status   prints the state of the queued resource and of COMMAND on every worker
  stop     sends SIGTERM to COMMAND on every worker and waits until it has saved and ended
  resume   after a preemption: requests the TPU again when it is gone, waits, sets up, and runs COMMAND.
           Does nothing when COMMAND is running or has ended for good, so it may be called again and again
  delete   deletes the queued resource and its TPU VMs, which ends the costs; disks and buckets stay

Every action accepts all flags, so one list of flags serves all of them.

  --name NAME               name of the queued resource and of the TPU (needed)
  --zone ZONE               such as us-east5-a (needed)
  --project PROJECT         project (that of gcloud's configuration)

create, resume:
  --accelerator-type TYPE   such as v5p-64, v5litepod-16, v6e-64, v4-32 (needed)
  --runtime-version NAME    software of the VMs (the one for PyTorch and JAX on this type of TPU)
  --spot                    Spot VMs: cheaper, may be preempted at any time
  --on-demand               VMs that are not preempted (the default)
  --reserved                capacity of a reservation
  --service-account EMAIL   service account of the VMs; it needs access to the bucket (that of Compute Engine)
  --network NAME            network (default)
  --subnetwork NAME         subnetwork
  --internal-ips            VMs have no external addresses
  --data-disk SOURCE[,MODE] attach a disk, projects/P/zones/Z/disks/D; MODE is read-only or read-write. Repeatable
  --labels KEY=VALUE,...    labels, to find the costs
  --valid-until-duration D  give up when the request is not filled by then, such as 6h
  --wait                    create: wait until the TPU is there
  --wait-seconds S          how long to wait at most (0, without end)
  --poll-seconds S          time between two looks at the state (30)

setup, resume:
  --python VERSION          version of Python (3.12)
  --extras LIST             extras of the package (train,tpu,gcs)
  --setup-command TEXT      a shell command to run on every worker at the end, such as one that mounts a disk. Repeatable

run, resume:
  --env NAME=VALUE          environment variable of COMMAND. Repeatable
  --max-restarts N          how many times a worker starts COMMAND again after a status that asks for it (100)

log, stop:
  --worker N                log: the worker (0)
  --lines N                 log: how many earlier lines (100)
  --stop-seconds S          stop: how long to wait (600)

  --internal-ip             connect to internal addresses, from a machine in the same network
  --quiet                   delete: do not ask
  --dry-run                 print the gcloud commands that would run if the TPU is there (resume: if it was preempted)
  --help                    this text

Words in flags may be joined by - or _. Exit status: 0, 1 for an error, 2 for wrong usage.

  flags=(--name decoder --zone us-east5-a --accelerator-type v5p-64 --spot)
  launch/tpu_vm.sh create "${flags[@]}" --wait
  launch/tpu_vm.sh setup "${flags[@]}"
  launch/tpu_vm.sh run "${flags[@]}" -- python -m ddpm_jax.train --config configs/unclip.py --workdir gs://BUCKET/unclip
END
}

action='' name='' zone='' project='' accelerator='' runtime='' capacity='' service_account='' network='' subnetwork=''
internal_ips='' labels='' valid_until='' wait='' wait_seconds=0 poll_seconds=30 python=3.12 extras=train,tpu,gcs
max_restarts=100 worker=0 lines=100 stop_seconds=600 internal_ip='' quiet='' dry_run=''
data_disks=() setup_commands=() environment=() command=()
root=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
RUN_DIRECTORY=ddpm_jax_run # on the workers, below the home directory

set_capacity() { # CAPACITY
  if [[ -n $capacity && $capacity != "$1" ]]; then usage_error "--$capacity and --$1 exclude each other"; fi
  capacity=$1
}

add_data_disk() { # SOURCE[,MODE]
  local source=${1%%,*} mode=read-write
  if [[ $1 == *,* ]]; then mode=${1#*,}; fi
  if ! [[ $source =~ ^projects/[^/]+/zones/[^/]+/disks/[^/]+$ && $mode =~ ^read-(only|write)$ ]]; then
    usage_error "--data-disk must be projects/P/zones/Z/disks/D, with ,read-only or ,read-write after it, not $1"
  fi
  data_disks+=("--data-disk=source=$source,mode=$mode")
}

read_flags() {
  case ${1:-} in
    create | setup | run | log | status | stop | resume | delete) action=$1; shift ;;
    --help) help; exit 0 ;;
    '') usage_error "the first argument must be an action: create, setup, run, log, status, stop, resume or delete" ;;
    *) usage_error "no action $1: create, setup, run, log, status, stop, resume or delete" ;;
  esac
  while (($#)); do
    next_flag "$@"
    case $flag in
      --name) take_value; name=$value ;;
      --zone) take_value; zone=$value ;;
      --project) take_value; project=$value ;;
      --accelerator-type) take_value; accelerator=$value ;;
      --runtime-version) take_value; runtime=$value ;;
      --spot | --on-demand | --reserved) take_switch; set_capacity "${flag#--}" ;;
      --service-account) take_value; service_account=$value ;;
      --network) take_value; network=$value ;;
      --subnetwork) take_value; subnetwork=$value ;;
      --internal-ips) take_switch; internal_ips=yes ;;
      --data-disk) take_value; add_data_disk "$value" ;;
      --labels) take_value; labels=$value ;;
      --valid-until-duration) take_value; valid_until=$value ;;
      --wait) take_switch; wait=yes ;;
      --wait-seconds) take_number 0; wait_seconds=$value ;;
      --poll-seconds) take_number 0; poll_seconds=$value ;;
      --python) take_value; python=$value ;;
      --extras) take_value; extras=$value ;;
      --setup-command) take_value; setup_commands+=("$value") ;;
      --env) take_value; check_environment "$value"; environment+=("$value") ;;
      --max-restarts) take_number 0; max_restarts=$value ;;
      --worker) take_number 0; worker=$value ;;
      --lines) take_number 0; lines=$value ;;
      --stop-seconds) take_number 0; stop_seconds=$value ;;
      --internal-ip) take_switch; internal_ip=yes ;;
      --quiet) take_switch; quiet=yes ;;
      --dry-run) take_switch; dry_run=yes ;;
      --help) help; exit 0 ;;
      --) shift; command=("$@"); break ;;
      *) unknown_flag ;;
    esac
    shift "$used"
  done
}

check_flags() {
  if [[ -z $name ]]; then usage_error "--name is needed: the name of the queued resource and of the TPU"; fi
  check_name "$name" 63
  if [[ -z $zone ]]; then usage_error "--zone is needed, such as us-east5-a"; fi
  if ! [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]]; then usage_error "--zone must be one such as us-east5-a, not $zone"; fi
  if [[ $action == create || $action == resume ]]; then
    if [[ -z $accelerator ]]; then usage_error "--accelerator-type is needed, such as v5p-64"; fi
    if ! [[ $accelerator =~ ^(v2|v3|v4|v5p|v5litepod|v6e)-[1-9][0-9]*$ ]]; then
      usage_error "--accelerator-type must be v2-, v3-, v4-, v5p-, v5litepod- or v6e- and a size, not $accelerator"
    fi
    check_size "${accelerator%-*}" "${accelerator##*-}"
  fi
  if [[ $action == run || $action == resume ]] && ((${#command[@]} == 0)); then
    usage_error "there is no command; it comes after --, such as -- python -m ddpm_jax.train ..."
  fi
  if ! [[ $python =~ ^3\.[0-9]+(\.[0-9]+)?$ ]]; then usage_error "--python must be a version such as 3.12, not $python"; fi
  if ! [[ $extras =~ ^[a-z]+(,[a-z]+)*$ ]]; then usage_error "--extras must be a list such as train,tpu,gcs, not $extras"; fi
  where=("--zone=$zone")
  if [[ -n $project ]]; then where+=("--project=$project"); fi
  connection=("${where[@]}")
  if [[ -n $internal_ip ]]; then connection+=(--internal-ip); fi
}

check_size() { # TYPE, SIZE: TensorCores of v2, v3, v4 and v5p, else chips (the tables of cloud.google.com/tpu/docs)
  local sizes='' step=0 most=0
  case $1 in
    v2) sizes='8 32 128 256 512' ;;
    v3) sizes='8 32 64 128 256 512 1024 2048' ;;
    v4) step=8 most=8192 ;;
    v5p) step=8 most=12288 ;;
    *) sizes='1 4 8 16 32 64 128 256' ;;
  esac
  if [[ -n $sizes ]]; then
    if [[ " $sizes " != *" $2 "* ]]; then usage_error "--accelerator-type=$1-$2: sizes of $1 are ${sizes// /, }"; fi
  elif ((${#2} > 6 || $2 % step || $2 > most)); then
    usage_error "--accelerator-type=$1-$2: sizes of $1 are multiples of $step up to $most"
  fi
}

default_runtime() { # print what the documentation names for JAX on this type of TPU
  case $accelerator in
    v6e-*) printf v2-alpha-tpuv6e ;;
    v5p-*) printf v2-alpha-tpuv5 ;;
    v5litepod-*) printf v2-alpha-tpuv5-lite ;;
    *) printf tpu-ubuntu2204-base ;;
  esac
}

create() {
  local words=(gcloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name")
  words+=("--accelerator-type=$accelerator" "--runtime-version=${runtime:-$(default_runtime)}")
  if [[ $capacity == spot || $capacity == reserved ]]; then words+=("--$capacity"); fi
  if [[ -n $service_account ]]; then words+=("--service-account=$service_account"); fi
  if [[ -n $network ]]; then words+=("--network=$network"); fi
  if [[ -n $subnetwork ]]; then words+=("--subnetwork=$subnetwork"); fi
  if [[ -n $internal_ips ]]; then words+=(--internal-ips); fi
  if [[ -n $labels ]]; then words+=("--labels=$labels"); fi
  if [[ -n $valid_until ]]; then words+=("--valid-until-duration=$valid_until"); fi
  if ((${#data_disks[@]})); then words+=("${data_disks[@]}"); fi
  execute "${words[@]}"
}

read_state() { # STATE IN A DRY RUN: set state, ABSENT where there is no such queued resource
  local words=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  local errors
  if [[ -n $dry_run ]]; then
    execute "${words[@]}"
    state=$1
    return
  fi
  errors=$(mktemp)
  if ! state=$("${words[@]}" 2>"$errors"); then
    state=ABSENT
    if ! grep -q -e NOT_FOUND -e 'was not found' "$errors"; then
      cat "$errors" >&2
      rm -f "$errors"
      fail "cannot read the state of the queued resource $name"
    fi
  fi
  rm -f "$errors"
}

wait_until() { # STATE, STATES THAT END THE WAIT WITH AN ERROR
  local begin=$SECONDS last=''
  while :; do
    read_state "$1"
    if [[ $state != "$last" && -z $dry_run ]]; then say "the queued resource $name is $state"; fi
    last=$state
    if [[ $state == "$1" ]]; then return; fi
    if [[ " $2 " == *" $state "* ]]; then
      fail "the queued resource $name is $state and will not be $1; launch/tpu_vm.sh status shows why"
    fi
    if ((wait_seconds > 0 && SECONDS - begin >= wait_seconds)); then
      fail "the queued resource $name is still $state after $wait_seconds s"
    fi
    sleep "$poll_seconds"
  done
}

wait_until_active() {
  wait_until ACTIVE "FAILED SUSPENDING SUSPENDED DELETING ABSENT"
}

needs_active() {
  read_state ACTIVE
  if [[ $state == ABSENT ]]; then fail "there is no queued resource $name in $zone; create it first"; fi
  if [[ $state != ACTIVE ]]; then
    fail "the queued resource $name is $state, not ACTIVE; wait for it with create --wait, or bring it back with resume"
  fi
}

on_workers() { # WORKER, SHELL COMMAND
  execute gcloud compute tpus tpu-vm ssh "$name" "${connection[@]}" "--worker=$1" "--command=$2"
}

pack() { # FILE: the files of the checkout that git does not ignore, with their changes
  if git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    (cd "$root" && git ls-files --cached --others --exclude-standard -z | while IFS= read -r -d '' file; do
      if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
    done | tar --null -czf "$1" -T -)
  else
    tar -C "$root" --exclude ./.venv --exclude ./runs -czf "$1" .
  fi
}

# shellcheck disable=SC2016 # the workers expand $HOME and $PATH
setup() {
  local archive=ddpm_jax.tar.gz text extra
  if [[ -z $dry_run ]]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    archive=$scratch/ddpm_jax.tar.gz
    pack "$archive" || fail "cannot pack $root"
    say "copying $root to every worker, $(($(wc -c <"$archive") / 1024)) KiB"
  fi
  execute gcloud compute tpus tpu-vm scp "$archive" "$name:ddpm_jax.tar.gz" "${connection[@]}" --worker=all ||
    fail "cannot copy the checkout to the workers; with several of them, run ssh-add ~/.ssh/google_compute_engine first"
  text='set -e; mkdir -p ddpm_jax; find ddpm_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +'
  text+='; tar -xzf ddpm_jax.tar.gz -C ddpm_jax; cd ddpm_jax'
  # The images of the VMs can have a Python that is too old, and uv brings one.
  text+='; python3 -m pip install --user --quiet --upgrade uv; PATH=$HOME/.local/bin:$PATH'
  text+="; uv venv --quiet --allow-existing --python $python .venv"
  text+="; uv pip install --quiet --python .venv/bin/python -e '.[$extras]'"
  if ((${#setup_commands[@]})); then
    for extra in "${setup_commands[@]}"; do text+="; $extra"; done
  fi
  on_workers all "$text" || fail "the installation failed on a worker"
}

run() { # FLAGS OF supervise.sh
  local words=(bash launch/supervise.sh start) text
  if (($#)); then words+=("$@"); fi
  words+=(--directory "../$RUN_DIRECTORY" --max-restarts "$max_restarts" --)
  if ((${#environment[@]})); then words+=(env "${environment[@]}"); fi
  text="cd ddpm_jax && PATH=\"\$PWD/.venv/bin:\$PATH\" $(quote_all "${words[@]}" "${command[@]}")"
  on_workers all "$text" || fail "the command did not start on every worker; launch/tpu_vm.sh status shows where"
}

resume() {
  read_state SUSPENDED
  case $state in
    ACTIVE)
      run --resume
      return
      ;;
    DELETING) wait_until ABSENT '' ;;
    SUSPENDING) wait_until SUSPENDED 'ACTIVE FAILED DELETING ABSENT' ;;
  esac
  if [[ $state == SUSPENDED || $state == FAILED ]]; then
    execute gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    state=ABSENT
  fi
  if [[ $state == ABSENT ]]; then create; fi
  wait_until_active
  setup
  run --resume
}

read_flags "$@"
check_flags
needs_tool gcloud "the Google Cloud CLI has it: https://cloud.google.com/sdk/docs/install"
supervise="bash ddpm_jax/launch/supervise.sh"
case $action in
  create)
    create
    if [[ -n $wait ]]; then wait_until_active; fi
    ;;
  setup) needs_active; setup ;;
  run) needs_active; run ;;
  log) on_workers "$worker" "tail -n $lines -F $RUN_DIRECTORY/log" ;;
  status)
    execute gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    read_state ACTIVE
    if [[ $state == ACTIVE ]]; then on_workers all "$supervise status --directory $RUN_DIRECTORY"; fi
    ;;
  stop) on_workers all "$supervise stop --directory $RUN_DIRECTORY --wait-seconds $stop_seconds" ;;
  resume) resume ;;
  delete)
    words=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force)
    if [[ -n $quiet ]]; then words+=(--quiet); fi
    execute "${words[@]}"
    ;;
esac
