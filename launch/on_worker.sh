#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a slice; by hand it serves on any Linux host.
#
#   launch/on_worker.sh install                       the package for TPUs, in .venv of the repository this file is in
#   launch/on_worker.sh run NAME [ATTEMPT] -- COMMAND [ARGUMENT ...]
#   launch/on_worker.sh stop NAME                     SIGTERM to the command: it saves a checkpoint and ends
#   launch/on_worker.sh run rl-1 --env HF_TOKEN -- perl-jax rl --run gs://my-bucket/runs/rl-1 ...
#
# Needs: Linux with bash, setsid and flock; to install, Python 3.11 or newer with venv, or any Python with pip.
#
# `run` starts the command apart from the connection that asked for it, prints what it writes, and ends with its status. Asked
# again while the command still runs (the connection was lost, say) it joins that one and starts no second; asked again with the
# same ATTEMPT, any word, after it has ended, it only says how. Log and status are in ~/.perl_jax_launch/NAME.
#
#   --env NAME  a variable that the command needs; may be given again. Its value is taken from ~/.perl_jax_launch/NAME/environment,
#               which launch/tpu_vm.sh writes and which is deleted when the run has ended, or else from this shell.
#   --dry-run   print the commands and run nothing
#   --help      print this
set -euo pipefail
script=on_worker.sh
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

words=() variables=() dry_run=0
while (($#)); do
  case $1 in
    --) break ;;
    --env=*) variables+=("${1#*=}"); shift ;;
    --env) variables+=("$(value "$@")"); shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) die "there is no option '$1' before --; see --help." ;;
    *) words+=("$1"); shift ;;
  esac
done
(($#)) && shift
check_names "${variables[@]+"${variables[@]}"}"
action=${words[0]-} name=${words[1]-} attempt=${words[2]-}
[[ -n $action ]] || die "say what to do: install, run or stop."
if [[ $action != install ]]; then
  [[ $name =~ ^[a-zA-Z0-9][a-zA-Z0-9._-]*$ ]] || die "the run's name is '$name'; it must be letters, digits, '.', '_' and '-'."
  folder=${HOME}/.perl_jax_launch/$name
fi

# TPU VM images come with an older Python than the package needs: uv fetches one.
install() {
  local python
  cd "$root"
  if [[ ! -x .venv/bin/python ]]; then
    for python in python3.11 python3.12 python3.13; do
      command -v "$python" >/dev/null && "$python" -c 'import ensurepip' 2>/dev/null && break
      python=''
    done
    if [[ -n $python ]]; then
      run "$python" -m venv .venv
    else
      run python3 -m pip install --quiet --user uv
      run python3 -m uv venv --quiet --seed --python 3.11 .venv
    fi
  fi
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tpu,gcs]'
}

# The keeper of a run holds this lock as long as it lives, whatever became of who asked for it.
alive() {
  [[ -d $folder ]] && ! (exec 9>"$folder/lock" && flock --nonblock 9)
}

# Started by `run` in a session of its own: runs the command to its end and writes down its status.
keep() {
  local status pid
  exec 9>"$folder/lock"
  flock --nonblock 9 || exit 1
  trap : TERM HUP INT
  cd "$root"
  "$@" 9>&- </dev/null >"$folder/log" 2>&1 &
  pid=$!
  echo "$pid" >"$folder/pid"
  echo "$$" >"$folder/keeper"
  while :; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  # A run that failed is started again with the same values; any other is over.
  [[ $status == [02] || $status == 143 ]] && rm -f "$folder/environment"
  echo "$status" >"$folder/status"
}

# Prints the log as it grows, and ends with the command's status.
follow() {
  local number
  number=$(hostname)
  number=${number##*-w-}
  tail -n "$1" -f --pid="$(cat "$folder/keeper")" "$folder/log" | prefixed "[$number] "
  [[ -f $folder/status ]] || exit 1
  exit "$(cat "$folder/status")"
}

case $action in
  install) install ;;
  run)
    check_command "$@"
    export PATH="$root/.venv/bin:$PATH"
    # Connections to the workers are not made at once: their processes wait for each other.
    command=(env PERL_JAX_HOSTS=auto PERL_JAX_CONNECT_SECONDS=300 "$@")
    if ((dry_run)); then
      run "${command[@]}"
      exit 0
    fi
    command -v "$1" >/dev/null || die "there is no command '$1'; run launch/on_worker.sh install first, or give the command's path."
    if alive; then
      [[ $(quote "$@") == "$(cat "$folder/command")" ]] ||
        die "'$name' runs another command, $(cat "$folder/command"); stop it first, or give another name."
      follow 20
    fi
    if [[ -n $attempt && -f $folder/status && $attempt == "$(cat "$folder/attempt")" ]]; then
      follow 20
    fi
    if ((${#variables[@]})); then
      # shellcheck source=/dev/null
      [[ ! -f $folder/environment ]] || source "$folder/environment"
      check_variables "${variables[@]}"
    fi
    mkdir -p "$folder"
    rm -f "$folder"/{pid,keeper,status,log}
    printf '%s' "$attempt" >"$folder/attempt"
    quote "$@" >"$folder/command"
    setsid bash "${BASH_SOURCE[0]}" keep "$name" -- "${command[@]}" </dev/null >/dev/null 2>&1 &
    for ((tries = 0; tries < 100; tries++)); do
      [[ -s $folder/keeper ]] && follow +1
      sleep 0.1
    done
    note "the command did not start."
    exit 1
    ;;
  keep) keep "$@" ;;
  stop)
    if ((dry_run)); then
      note "it would send SIGTERM to the process whose number is in $folder/pid, and wait for its end."
    elif alive; then
      kill -TERM "$(cat "$folder/pid")"
      (exec 9>"$folder/lock" && flock 9)
      note "'$name' has ended with $(status_in_words "$(cat "$folder/status")")."
    else
      note "'$name' does not run."
    fi
    ;;
  *) die "there is no action '$action'; it must be install, run or stop." ;;
esac
