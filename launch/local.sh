#!/usr/bin/env bash
# Several processes of one run on this machine, over loopback.
#
#   launch/local.sh --processes N [--devices-per-process D] [options] -- COMMAND [ARGUMENT ...]
#   launch/local.sh --processes 2 --devices-per-process 4 -- perl-jax rl --run runs/my/rl --model MODEL ...
#
# Needs: bash and the command; nothing else. It is for trying a several-host run on a CPU: one process drives all
# GPUs or TPU chips of a machine by itself, without this script.
#
# Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, and D devices of a CPU (JAX_PLATFORMS=cpu unless
# it is set, and --xla_force_host_platform_device_count=D at the end of XLA_FLAGS). Each line it writes, to either stream, is
# printed with its number, [0], [1], ...
#
# SIGTERM and SIGINT are forwarded to every process. When one process fails the others get SIGTERM and, after the grace, SIGKILL.
# The status is 0 when all ended well, otherwise that of the process that failed first.
#
#   --processes N             how many
#   --devices-per-process D   devices each (default 1)
#   --restarts R              when a process fails, start all again at most R times; the same command resumes from its last
#                             checkpoint (default 0; never after status 2, the user's error)
#   --grace SECONDS           from SIGTERM to SIGKILL (default 60)
#   --port PORT               of the coordinator (default: a free one)
#   --env NAME                an environment variable that the run needs, as HF_TOKEN or WANDB_API_KEY; may be given again. Processes
#                             inherit this shell's variables; this says at once if one is missing.
#   --dry-run                 print the commands, one a process, and run nothing
#   --help                    print this
set -euo pipefail
script=local.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes='' devices=1 restarts=0 grace=60 port='' variables=() dry_run=0
while (($#)); do
  case $1 in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --processes) processes=$(value "$@"); shift 2 ;;
    --devices-per-process) devices=$(value "$@"); shift 2 ;;
    --restarts) restarts=$(value "$@"); shift 2 ;;
    --grace) grace=$(value "$@"); shift 2 ;;
    --port) port=$(value "$@"); shift 2 ;;
    --env) variables+=("$(value "$@")"); shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "there is no option '$1' before --; see --help." ;;
  esac
done
(($#)) && shift
check_command "$@"
check_variables "${variables[@]+"${variables[@]}"}"
[[ -n $processes ]] || die "--processes is missing."
whole --processes "$processes" 1
whole --devices-per-process "$devices" 1
whole --restarts "$restarts" 0
whole --grace "$grace" 0
[[ -z $port ]] || whole --port "$port" 1
((dry_run)) || command -v "$1" >/dev/null || die "there is no command '$1'; install the package, or give the command's path."

# A port that nothing listens on, below the range that outgoing connections take theirs from.
free_port() {
  local candidate
  while :; do
    candidate=$((20000 + (RANDOM << 15 | RANDOM) % 12768))
    (: <"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || break
  done
  printf '%d' "$candidate"
}

# The whole command of one process: `words INDEX ADDRESS_PORT COMMAND ...`, in the array `words`.
set_words() {
  words=(
    env -u PERL_JAX_HOSTS
    JAX_COORDINATOR_ADDRESS="127.0.0.1:$2" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$1"
    JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
    XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    "${@:3}"
  )
}

if ((dry_run)); then
  port=${port:-$(free_port)}
  for ((index = 0; index < processes; index++)); do
    set_words "$index" "$port" "$@"
    run "${words[@]}"
  done
  exit 0
fi

folder=$(mktemp -d)
pids=() readers=() running=() signalled='' announce='' deadline='' failed=0

# SIGKILL to what is left of a process's group: itself and what it started.
kill_group() {
  kill -KILL -- "-$1" 2>/dev/null || true
}

clean_up() {
  local index
  for index in "${!running[@]}"; do
    kill_group "${pids[index]}"
  done
  rm -rf "$folder"
}
trap clean_up EXIT

# To the processes themselves, not to what they started: they stop their own.
send() {
  local index
  for index in "${!running[@]}"; do
    kill "-$1" "${pids[index]}" 2>/dev/null || true
  done
  deadline=${deadline:-$((SECONDS + grace))}
}

forward() {
  # The first SIGTERM asks a run to save; a second would end it while it does. The grace ends what does not end.
  [[ $1 != TERM || $signalled != TERM ]] || return 0
  signalled=$1 announce=$1
  send "$1"
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

start() {
  local index address=${port:-$(free_port)} words
  deadline='' failed=0
  for ((index = 0; index < processes; index++)); do
    rm -f "$folder/$index"
    mkfifo "$folder/$index"
    prefixed "[$index] " <"$folder/$index" &
    readers[index]=$!
    set_words "$index" "$address" "$@"
    # Job control gives each process a group of its own, and SIGINT, which background commands otherwise ignore.
    set -m
    "${words[@]}" >"$folder/$index" 2>&1 </dev/null &
    set +m
    pids[index]=$!
    running[index]=1
  done
}

# Waits for the last lines of a process; not for ever, for it may have left another behind that keeps its output open.
drain() {
  local tries
  for ((tries = 0; tries < 20; tries++)); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill "$1" 2>/dev/null || true
}

# One process has ended: its status, and whether the others must stop.
ended() {
  local status=0
  wait "${pids[$1]}" 2>/dev/null || status=$?
  unset "running[$1]"
  kill_group "${pids[$1]}"
  drain "${readers[$1]}"
  ((status == 0)) && return
  # The user's error outlives whatever it made of the other processes.
  ((failed == 0 || status == 2)) && failed=$status
  if [[ -n $deadline ]]; then
    note "process $1 ended with $(status_in_words "$status")."
  else
    note "process $1 ended with $(status_in_words "$status"); stopping the others: SIGTERM, and SIGKILL after $grace s."
    send TERM
  fi
}

watch() {
  local index
  while ((${#running[@]})); do
    [[ -z $announce ]] || note "SIG$announce: forwarded to every process."
    announce=''
    for index in "${!running[@]}"; do
      kill -0 "${pids[index]}" 2>/dev/null || ended "$index"
    done
    if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
      for index in "${!running[@]}"; do
        note "process $index is still there after $grace s: SIGKILL."
        kill_group "${pids[index]}"
      done
      deadline=$((SECONDS + 5))
    fi
    # Without a word of the shell's own about a process that was killed; so what a signal has to say waits for the next round.
    { ((${#running[@]} == 0)) || sleep 0.2; } 2>/dev/null
  done
}

attempt=0
while :; do
  start "$@"
  # A signal that came while some were not yet started has not reached them.
  [[ -z $signalled ]] || send "$signalled"
  watch
  ((failed)) || exit 0
  [[ -z $signalled ]] || exit "$failed"
  if ((failed == 2)); then
    ((restarts == 0)) || note "status 2 is the user's error: not started again."
    exit 2
  fi
  ((attempt < restarts)) || exit "$failed"
  attempt=$((attempt + 1))
  note "starting all again, $attempt of $restarts."
done
