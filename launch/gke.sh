#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet. docs/pods.md walks through it.
set -euo pipefail
# shellcheck source=launch/common.sh
source "${BASH_SOURCE[0]%/*}/common.sh"

help() {
  cat <<'END'
usage: launch/gke.sh ACTION --name NAME [flags] [-- COMMAND [ARGUMENT...]]

  render   prints the manifest of a JobSet that runs COMMAND on every TPU VM
  apply    renders it and gives it to the cluster
  log      follows the log of one process
  status   prints the state of the JobSet and of its pods
  delete   deletes the JobSet and its pods. The node pool stays, and costs, until it is deleted or scaled to 0

Every action accepts all flags, so one list of flags serves all of them.

  --name NAME               name of the JobSet (needed)
  --namespace NAME          namespace (that of kubectl's context)
  --context NAME            context of kubectl (the current one)

render, apply:
  --accelerator NAME        tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice (needed)
  --topology AxB[xC]        topology of a slice, such as 4x4 or 2x2x4 (needed)
  --chips-per-vm N          chips of a VM, which the machine type of the node pool says (1 for 1x1, or 4);
                            8 for a 2x4 slice of one VM
  --slices N                number of slices (1)
  --image IMAGE             container image, such as launch/gke/Dockerfile makes (needed)
  --spot                    nodes are Spot VMs
  --service-account NAME    Kubernetes service account, with access to the bucket (default)
  --env NAME=VALUE          environment variable of COMMAND. Repeatable
  --volume-claim NAME:PATH  mount a PersistentVolumeClaim at PATH
  --queue NAME              local queue of Kueue
  --max-restarts N          how many times the JobSet is started again, preemptions included (100)
  --grace-seconds S         time between SIGTERM and SIGKILL, for the last checkpoint (600)

log:
  --slice N                 slice (0)
  --worker N                process of the slice (0)
  --lines N                 how many earlier lines (100)

  --dry-run                 print the kubectl command, and for apply the manifest
  --help                    this text

Words in flags may be joined by - or _. Exit status: 0, 1 for an error, 2 for wrong usage.

  flags=(--name decoder --accelerator tpu-v5p-slice --topology 4x4x4 --image IMAGE --spot)
  launch/gke.sh apply "${flags[@]}" -- python -m ddpm_jax.train --config configs/unclip.py --workdir gs://BUCKET/unclip
END
}

action='' name='' namespace='' context='' accelerator='' topology='' chips='' slices=1 image='' spot=''
service_account='' volume_claim='' volume_path='' queue='' max_restarts=100 grace_seconds=600 slice=0 worker=0 lines=100
dry_run='' environment=() command=()

read_flags() {
  case ${1:-} in
    render | apply | log | status | delete) action=$1; shift ;;
    --help) help; exit 0 ;;
    '') usage_error "the first argument must be an action: render, apply, log, status or delete" ;;
    *) usage_error "no action $1: render, apply, log, status or delete" ;;
  esac
  while (($#)); do
    next_flag "$@"
    case $flag in
      --name) take_value; name=$value ;;
      --namespace) take_value; namespace=$value ;;
      --context) take_value; context=$value ;;
      --accelerator) take_value; accelerator=$value ;;
      --topology) take_value; topology=$value ;;
      --chips-per-vm) take_number 1; chips=$value ;;
      --slices) take_number 1; slices=$value ;;
      --image) take_value; image=$value ;;
      --spot) take_switch; spot=yes ;;
      --service-account) take_value; service_account=$value ;;
      --env) take_value; check_environment "$value"; environment+=("$value") ;;
      --volume-claim) take_value; volume_claim=$value ;;
      --queue) take_value; queue=$value ;;
      --max-restarts) take_number 0; max_restarts=$value ;;
      --grace-seconds) take_number 1; grace_seconds=$value ;;
      --slice) take_number 0; slice=$value ;;
      --worker) take_number 0; worker=$value ;;
      --lines) take_number 0; lines=$value ;;
      --dry-run) take_switch; dry_run=yes ;;
      --help) help; exit 0 ;;
      --) shift; command=("$@"); break ;;
      *) unknown_flag ;;
    esac
    shift "$used"
  done
}

check_flags() {
  if [[ -z $name ]]; then usage_error "--name is needed: the name of the JobSet"; fi
  # Names of pods are made of it, and have at most 63 characters.
  check_name "$name" 40
  if [[ $action == render || $action == apply ]]; then
    if [[ -z $accelerator ]]; then usage_error "--accelerator is needed, such as tpu-v5p-slice"; fi
    if [[ -z $topology ]]; then usage_error "--topology is needed, such as 4x4x4"; fi
    if [[ -z $image ]]; then usage_error "--image is needed; launch/gke/Dockerfile makes one"; fi
    if ((${#command[@]} == 0)); then
      usage_error "there is no command; it comes after --, such as -- python -m ddpm_jax.train ..."
    fi
    check_topology
    check_chips
    local word printable
    for word in "$image" "${command[@]}" ${environment[@]+"${environment[@]}"}; do
      printable=$(printf '%s' "$word" | tr -d '\n\t\r')
      if [[ $printable == *[[:cntrl:]]* ]]; then usage_error "an argument has a control character: $(quote "$word")"; fi
    done
  fi
  local flag value
  for flag in namespace service_account queue; do
    value=${!flag}
    if [[ -n $value ]] && ! [[ $value =~ ^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$ ]]; then
      usage_error "--${flag//_/-} must be at most 63 lower-case letters, digits, hyphens and dots, not $(quote "$value")"
    fi
  done
  if [[ $context == *[[:cntrl:]]* ]]; then usage_error "--context has a control character: $(quote "$context")"; fi
  if [[ -n $volume_claim ]]; then
    if [[ $volume_claim == *[[:cntrl:]]* ]]; then
      usage_error "--volume-claim has a control character: $(quote "$volume_claim")"
    fi
    if ! [[ $volume_claim =~ ^[a-z0-9][-a-z0-9.]*:/.+$ ]]; then
      usage_error "--volume-claim must be NAME:/PATH, not $volume_claim"
    fi
    volume_path=${volume_claim#*:}
    volume_claim=${volume_claim%%:*}
  fi
}

check_topology() { # the tables of https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
  local a b c known=no
  case $accelerator in
    tpu-v5-lite-podslice | tpu-v6e-slice)
      case $topology in 1x1 | 2x2 | 2x4 | 4x4 | 4x8 | 8x8 | 8x16 | 16x16) known=yes ;; esac
      if [[ $known == no ]]; then
        usage_error "--topology of $accelerator must be 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16, not $topology"
      fi
      IFS=x read -r a b <<<"$topology"
      all_chips=$((a * b))
      ;;
    tpu-v4-podslice | tpu-v5p-slice)
      if [[ $topology =~ ^[1-9][0-9]{0,2}x[1-9][0-9]{0,2}x[1-9][0-9]{0,2}$ ]]; then
        IFS=x read -r a b c <<<"$topology"
        all_chips=$((a * b * c))
        case $topology in 2x2x1 | 2x2x2 | 2x2x4 | 2x4x4) known=yes ;; esac
        if ((a % 4 == 0 && b % 4 == 0 && c % 4 == 0 && a <= b && b <= c)); then known=yes; fi
        if [[ $accelerator == tpu-v4-podslice ]] && ((all_chips > 4096)); then known=no; fi
        if ((all_chips > 6144)); then known=no; fi # the largest slice of v5p, 16x16x24
      fi
      if [[ $known == no ]]; then
        usage_error "--topology of $accelerator must be 2x2x1, 2x2x2, 2x2x4, 2x4x4 or three multiples of 4 in rising \
order with at most 4096 (v4) or 6144 (v5p) chips, not $topology"
      fi
      ;;
    *) usage_error "--accelerator must be tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice, not \
$accelerator" ;;
  esac
}

check_chips() { # set chips and vms
  local allowed=4 # the machine types that end in -4t
  case $topology in
    1x1) allowed=1 ;;
    2x4) allowed='4 8' ;;
  esac
  chips=${chips:-${allowed%% *}}
  if [[ " $allowed " != *" $chips "* ]]; then
    usage_error "--chips-per-vm must be ${allowed/ / or } for a $topology slice of $accelerator, not $chips"
  fi
  vms=$((all_chips / chips))
}

dollar=$
json() { # TEXT: print it as a JSON string
  local rest=$1 text='' character i
  for ((i = 0; i < ${#rest}; i++)); do
    character=${rest:i:1}
    case $character in
      \\ | \") text+="\\$character" ;;
      \$) text+=$dollar ;;
      $'\n') text+='\n' ;;
      $'\t') text+='\t' ;;
      $'\r') text+='\r' ;;
      *) text+=$character ;;
    esac
  done
  printf '"%s"' "$text"
}

# Kubernetes replaces $(NAME) in commands and variables, and $$ by $.
json_list() { # TEXT...
  local item separator='' dollar='$$'
  printf '['
  for item in "$@"; do
    printf '%s' "$separator"
    json "$item"
    separator=', '
  done
  printf ']'
}

json_environment() { # NAME=VALUE...
  local item separator='' dollar='$$'
  printf '['
  for item in "$@"; do
    printf '%s{"name": %s, "value": %s}' "$separator" "$(json "${item%%=*}")" "$(json "${item#*=}")"
    separator=', '
  done
  printf ']'
}

# shellcheck disable=SC2016 # $0 is awk's
render() {
  local variables='' statuses
  statuses=$(IFS=,; printf '[%s]' "${RESTART_STATUSES[*]}")
  if ((${#environment[@]})); then variables=$(json_environment "${environment[@]}"); fi
  # Values reach awk through its environment, where nothing in them has a meaning.
  env value_name="$(json "$name")" value_namespace="${namespace:+$(json "$namespace")}" \
    value_queue="${queue:+$(json "$queue")}" value_max_restarts="$max_restarts" value_slices="$slices" \
    value_vms="$vms" value_chips="$chips" value_restart_statuses="${statuses//,/, }" value_grace_seconds="$grace_seconds" \
    value_service_account="${service_account:+$(json "$service_account")}" value_accelerator="$accelerator" \
    value_topology="$(json "$topology")" value_spot="$spot" value_image="$(json "$image")" \
    value_command="$(json_list "${command[@]}")" value_environment="$variables" \
    value_volume_claim="${volume_claim:+$(json "$volume_claim")}" value_volume_path="$(json "$volume_path")" \
    awk '
      /^#/ { next }
      match($0, /^\{\{\?[a-z_]+\}\}/) {
        if (ENVIRON["value_" substr($0, 4, RLENGTH - 5)] == "") next
        $0 = substr($0, RLENGTH + 1)
      }
      {
        rest = $0; line = ""
        while (match(rest, /\{\{[a-z_]+\}\}/)) {
          line = line substr(rest, 1, RSTART - 1) ENVIRON["value_" substr(rest, RSTART + 2, RLENGTH - 4)]
          rest = substr(rest, RSTART + RLENGTH)
        }
        print line rest
      }' "${BASH_SOURCE[0]%/*}/gke/jobset.yaml"
}

read_flags "$@"
check_flags
kubectl=(kubectl)
if [[ -n $context ]]; then kubectl+=("--context=$context"); fi
if [[ -n $namespace ]]; then kubectl+=("--namespace=$namespace"); fi
if [[ $action == render ]]; then
  render
  exit
fi
needs_tool kubectl "gcloud components install kubectl installs it"
selector=jobset.sigs.k8s.io/jobset-name=$name
case $action in
  apply)
    manifest=$(render)
    execute "${kubectl[@]}" apply --filename=- <<<"$manifest"
    if [[ -n $dry_run ]]; then printf '%s\n' "$manifest"; fi
    ;;
  log)
    selector+=",jobset.sigs.k8s.io/job-index=$slice,batch.kubernetes.io/job-completion-index=$worker"
    execute "${kubectl[@]}" logs --follow "--tail=$lines" "--selector=$selector" --container=train
    ;;
  status)
    execute "${kubectl[@]}" get jobset "$name"
    execute "${kubectl[@]}" get pods "--selector=$selector" --output=wide
    ;;
  delete) execute "${kubectl[@]}" delete jobset "$name" ;;
esac
