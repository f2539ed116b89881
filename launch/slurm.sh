#!/usr/bin/env bash
# One run on several GPU hosts under Slurm.
#
#   sbatch --nodes=N --gpus-per-node=G --cpus-per-task=C [sbatch's options] launch/slurm.sh [options] -- COMMAND [ARGUMENT ...]
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 launch/slurm.sh -- perl-jax rl --run /shared/runs/my/rl ...
#
# Needs: Slurm; the package in an environment on a shared file system, active where sbatch is called (jobs inherit it); the run's
# folder, --run, in a bucket (gs://BUCKET/FOLDER) or on a file system that every host mounts.
#
# One process a host, which drives all its GPUs; with --ntasks-per-node=G one a GPU, which is JAX's own way under Slurm. JAX
# finds the other processes from Slurm's variables. --cpus-per-task counts: without it Slurm may bind a process to one core.
#
# 300 seconds before the time limit, and on pre-emption, Slurm sends SIGTERM: the run saves a checkpoint and ends with status
# 143. The job is then put back in the queue, and resumes when it starts again, so a run may be longer than the time limit.
# To save on pre-emption it has the partition's grace time (GraceTime), or KillWait seconds without one; what is not saved in time
# is done again from the last checkpoint. After a host's failure Slurm puts the job back by itself. scancel ends it for good.
# The time limit (--time) must be well above 300 seconds.
#
#   --restarts R   when the run fails, start it again in the same allocation at most R times (default 3; never after status 2,
#                  the user's error)
#   --env NAME     an environment variable that the run needs, as HF_TOKEN or WANDB_API_KEY; may be given again. Jobs inherit the
#                  variables of the shell that called sbatch; this says at once if one is missing.
#   --dry-run      print the commands and run nothing
#   --help         print this

#SBATCH --job-name=perl-jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300

set -euo pipefail

# Slurm runs a copy of this file from a folder of its own, so it cannot source common.sh: these few are repeated.
die() {
  printf 'slurm.sh: %s\n' "$1" >&2
  exit 2
}

note() {
  printf 'slurm.sh: %s\n' "$1" >&2
}

quote() {
  local word line='' escaped="'\\''"
  for word; do
    case $word in
      '' | *[!a-zA-Z0-9_@%+=:,./-]*) word="'${word//"'"/"$escaped"}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

restarts=3 needed=() dry_run=0
while (($#)); do
  case $1 in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --restarts)
      [[ ${2-} =~ ^[0-9]{1,9}$ ]] || die "--restarts is '${2-}'; it must be a whole number, at least 0."
      restarts=$2
      shift 2
      ;;
    --env)
      [[ ${2-} =~ ^[a-zA-Z_][a-zA-Z0-9_]*$ ]] || die "--env takes the name of an environment variable without its value, as in --env HF_TOKEN."
      needed+=("$2")
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h)
      sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) die "there is no option '$1' before --; see --help." ;;
  esac
done
(($#)) && shift
(($#)) || die "there is no command to run; give it after --, as in: -- perl-jax rl --run FOLDER ..."

for name in "${needed[@]+"${needed[@]}"}"; do
  [[ -n ${!name-} ]] || die "$name is not set here, and --env $name asks for it; export it first."
done

if ((!dry_run)); then
  [[ -n ${SLURM_JOB_ID-} ]] || die "this is not a Slurm job; submit it: sbatch --nodes=N --gpus-per-node=G launch/slurm.sh -- COMMAND"
  for tool in srun scontrol squeue; do
    command -v "$tool" >/dev/null || die "$tool is not installed; it is part of Slurm."
  done
  command -v "$1" >/dev/null || die "there is no command '$1'; activate its environment before sbatch, or give the command's path."
fi
job=${SLURM_JOB_ID:-JOB_ID} tasks=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-0}

# Hosts do not start at once: the processes wait for each other.
variables=(PERL_JAX_HOSTS=auto PERL_JAX_CONNECT_SECONDS=300)
if ((gpus > 1 && tasks == 1)); then
  # Under Slurm JAX gives a process the one GPU of its number on the host, unless it is told which.
  printf -v ids '%s,' $(seq 0 $((gpus - 1)))
  variables+=(JAX_LOCAL_DEVICE_IDS="${ids%,}")
elif ((gpus > 0 && tasks != gpus)); then
  die "there are $tasks processes and $gpus GPUs on a host; --ntasks-per-node must be 1 or $gpus."
fi
# A task that ends does not end the others at once (they must save, and say why they end), but a task cannot outlive it for long.
step=(srun --label --kill-on-bad-exit=0 --wait=300)
# srun does not take the allocation's CPUs a task by itself.
[[ -z ${SLURM_CPUS_PER_TASK-} ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
step+=(env "${variables[@]}" "$@")

if ((dry_run)); then
  printf '%s\n' "$(quote "${step[@]}")"
  note "after status 143 it would also run: $(quote squeue --noheader --jobs="$job" --format=%T), and if the job is RUNNING: $(quote scontrol requeue "$job")"
  exit 0
fi

# Some signals reach this script too: it must outlive the run, to put the job back.
trap : TERM
attempt=0
while :; do
  "${step[@]}" &
  pid=$!
  while :; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  case $status in
    0 | 2) exit "$status" ;;
    143)
      # A job that was cancelled, or that Slurm has put back already, is in another state.
      if [[ $(squeue --noheader --jobs="$job" --format=%T) != RUNNING ]]; then
        note "the run was told to stop, and Slurm has decided about the job."
      elif scontrol requeue "$job"; then
        note "the run was told to stop and has saved; the job is in the queue again and will resume."
      else
        note "the job could not be put back in the queue; submit it again and it resumes."
      fi
      exit 143
      ;;
  esac
  ((attempt < restarts)) || exit "$status"
  attempt=$((attempt + 1))
  note "the run ended with status $status; starting it again, $attempt of $restarts."
done
