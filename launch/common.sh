# shellcheck shell=bash
# Functions of the launchers. They need bash 3.2, which macOS has, and nothing newer.

# The exit statuses after which the same command is started again: stopped with everything saved (75), aborted (134),
# killed (137, 139), terminated (143). After any other the command needs a person, or it has finished.
RESTART_STATUSES=(75 134 137 139 143)

asks_for_restart() { # STATUS
  local status
  for status in "${RESTART_STATUSES[@]}"; do
    if [[ $1 == "$status" ]]; then return 0; fi
  done
  return 1
}

say() { # MESSAGE
  printf '%s: %s\n' "${0##*/}" "$1" >&2
}

usage_error() { # MESSAGE
  say "error: $1"
  exit 2
}

fail() { # MESSAGE
  say "error: $1"
  exit 1
}

quote() { # WORD: print it as one word of a shell command
  local rest=$1 done=''
  if [[ $rest =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
    printf '%s' "$rest"
    return
  fi
  while [[ $rest == *\'* ]]; do
    done+="${rest%%\'*}'\\''"
    rest=${rest#*\'}
  done
  printf "'%s'" "$done$rest"
}

quote_all() { # WORD...: print a shell command
  local word separator=''
  for word in "$@"; do
    printf '%s' "$separator"
    quote "$word"
    separator=' '
  done
}

execute() { # WORD...: run a command, or print it with --dry-run
  if [[ -n ${dry_run:-} ]]; then
    quote_all "$@"
    printf '\n'
  else
    "$@"
  fi
}

needs_tool() { # TOOL, WHERE IT COMES FROM
  if [[ -z ${dry_run:-} ]] && ! command -v "$1" >/dev/null; then
    fail "$1 is not installed or not on PATH; $2"
  fi
}

# How a launcher reads its flags:
#   while (($#)); do next_flag "$@"; case $flag in --zone) take_value; zone=$value ;; ... esac; shift "$used"; done
# shellcheck disable=SC2034 # used and value are read by the launchers
next_flag() { # WORD...: set flag, value and used from the first word
  following=("${@:2}")
  used=1
  has_value=''
  value=''
  flag=$1
  if [[ $1 == --*=* ]]; then
    flag=${1%%=*}
    value=${1#*=}
    has_value=yes
  fi
  if [[ $flag == --?* ]]; then
    flag=--$(printf '%s' "${flag#--}" | tr _ -) # --max_restarts is --max-restarts
  fi
}

# shellcheck disable=SC2034
take_value() { # set value to that of the flag
  if [[ -z $has_value ]]; then
    if ((${#following[@]} == 0)) || [[ ${following[0]} == --* ]]; then
      usage_error "$flag needs a value"
    fi
    value=${following[0]}
    used=2
  fi
  if [[ -z $value ]]; then
    usage_error "$flag needs a value that is not empty"
  fi
}

take_number() { # set value to that of the flag, a whole number of at least $1
  take_value
  if ! [[ $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $1)); then
    usage_error "$flag must be a whole number of at least $1, not $value"
  fi
  value=$((10#$value))
}

take_switch() {
  if [[ -n $has_value ]]; then
    usage_error "$flag takes no value, and has $value"
  fi
}

unknown_flag() {
  usage_error "unknown flag or argument $flag; ${0##*/} --help lists them"
}

check_environment() { # KEY=VALUE
  if ! [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then
    usage_error "--env must be NAME=VALUE, not $1"
  fi
}

check_name() { # NAME, LONGEST
  if ! [[ $1 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || ((${#1} > $2)); then
    usage_error "--name must be at most $2 lower-case letters, digits and hyphens, the first a letter, not $1"
  fi
}
