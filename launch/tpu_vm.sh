#!/usr/bin/env bash
# One run on a TPU VM slice, which is asked for as a queued resource, kept through pre-emption and failure, and may be deleted at
# the end.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE --accelerator-type TYPE --runtime-version VERSION [options] -- COMMAND [ARGUMENT ...]
#   launch/tpu_vm.sh --name rl-1 --zone us-east5-a --accelerator-type v5p-16 --runtime-version v2-alpha-tpuv5 --spot --delete \
#     --env HF_TOKEN -- perl-jax rl --run gs://my-bucket/runs/rl-1 ...
#
# Needs: gcloud with its alpha component (gcloud components install alpha), signed in, its key in the ssh agent (ssh-add
# ~/.ssh/google_compute_engine); quota for the slice; a bucket in the slice's region that the workers' service account may read
# and write, for the run's folder: --run gs://BUCKET/FOLDER. A folder that every worker mounts (NFS) serves too: --setup mounts
# it, and installs what that needs. Runtime versions: v2-alpha-tpuv6e (v6e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite (v5e),
# tpu-ubuntu2204-base (v4 and older). Newer TPUs than v6e are not in this service of Google's: see gke.sh.
#
# The resource is created if it is absent, and waited for. The package is installed on every worker, from the working tree that this
# file is in or from a repository, and the command runs on all workers. When the resource is SUSPENDED or FAILED (a Spot slice was
# taken back, say) it is deleted and created again, and the same command resumes from its last checkpoint. Ctrl-C leaves
# the run going; the same line joins it again, and --stop makes it save and end.
#
#   --project P             default: gcloud's
#   --spot | --reserved     the kind of capacity (default: on demand)
#   --create-flag FLAG      one more of `queued-resources create`, as --create-flag=--network=NAME; may be given again
#   --connect-flag FLAG     one more of `tpu-vm ssh` and `scp`, as --connect-flag=--internal-ip; may be given again
#   --repository URL        install from a Git repository instead of this working tree
#   --ref REF               its branch, tag or commit (default HEAD)
#   --env NAME              pass this environment variable to the run, as HF_TOKEN or WANDB_API_KEY; may be given again. Its value is
#                           taken from this shell and goes to the workers in a file that its owner alone can read, never in a
#                           command line or a log; the file is deleted when the run has ended.
#   --setup COMMAND         a line of shell that every worker runs before the run, as to mount the run's file system; it must be
#                           harmless when it is run again
#   --restarts R            when the run fails on a slice that is well, start it again at most R times (default 3; never after
#                           status 2, the user's error). Pre-emptions do not count.
#   --poll SECONDS          between looks at the resource (default 30)
#   --stop                  instead of running: make the run of this name save a checkpoint and end
#   --delete                delete the resource when the run has ended, well or not
#   --dry-run               print the commands, in order, for a run without pre-emption, and run nothing
#   --help                  print this
set -euo pipefail
script=tpu_vm.sh
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

name='' zone='' project='' accelerator='' runtime='' repository='' ref='' setup='' restarts=3 poll=30
capacity=() create_flags=() connect_flags=() variables=() stop=0 delete=0 dry_run=0
while (($#)); do
  case $1 in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --name) name=$(value "$@"); shift 2 ;;
    --zone) zone=$(value "$@"); shift 2 ;;
    --project) project=$(value "$@"); shift 2 ;;
    --accelerator-type) accelerator=$(value "$@"); shift 2 ;;
    --runtime-version) runtime=$(value "$@"); shift 2 ;;
    --spot | --reserved) capacity+=("$1"); shift ;;
    --create-flag) create_flags+=("$(value "$@")"); shift 2 ;;
    --connect-flag) connect_flags+=("$(value "$@")"); shift 2 ;;
    --repository) repository=$(value "$@"); shift 2 ;;
    --ref) ref=$(value "$@"); shift 2 ;;
    --env) variables+=("$(value "$@")"); shift 2 ;;
    --setup) setup=$(value "$@"); shift 2 ;;
    --restarts) restarts=$(value "$@"); shift 2 ;;
    --poll) poll=$(value "$@"); shift 2 ;;
    --stop) stop=1; shift ;;
    --delete) delete=1; shift ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "there is no option '$1' before --; see --help." ;;
  esac
done
(($#)) && shift
[[ -n $name ]] || die "--name is missing."
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name is '$name'; it must be small letters, digits and '-', and begin with a letter."
[[ -n $zone ]] || die "--zone is missing."
if ((stop)); then
  (($# == 0)) || die "--stop takes no command; leave out what is after --."
else
  check_command "$@"
  [[ -n $accelerator ]] || die "--accelerator-type is missing."
  [[ -n $runtime ]] || die "--runtime-version is missing."
  check_shared_run "$@"
  check_variables "${variables[@]+"${variables[@]}"}"
fi
((${#capacity[@]} <= 1)) || die "--spot and --reserved are two kinds of capacity: give one of them."
[[ -z $ref || -n $repository ]] || die "--ref needs --repository."
whole --restarts "$restarts" 0
whole --poll "$poll" 0
need gcloud "see https://cloud.google.com/sdk/docs/install"

place=(--zone "$zone")
[[ -z $project ]] || place+=(--project "$project")
queued=(gcloud alpha compute tpus queued-resources)

# One line of shell on every worker. Without the keep-alive, ssh would wait for ever on a machine that was taken back.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker all --ssh-flag='-o ServerAliveInterval=30' \
    "${connect_flags[@]+"${connect_flags[@]}"}" --command "$1"
}

create() {
  run "${queued[@]}" create "$name" --node-id "$name" "${place[@]}" --accelerator-type "$accelerator" \
    --runtime-version "$runtime" "${capacity[@]+"${capacity[@]}"}" "${create_flags[@]+"${create_flags[@]}"}"
}

delete_resource() {
  run "${queued[@]}" delete "$name" "${place[@]}" --force --quiet
}

was_active=0
describe=("${queued[@]}" describe "$name" "${place[@]}" '--format=value(state.state)')

# The resource's state, or ABSENT.
look() {
  local errors state
  errors=$(mktemp)
  if state=$("${describe[@]}" 2>"$errors"); then
    printf '%s' "$state"
  elif grep -q -i -e NOT_FOUND -e 'not found' "$errors"; then
    printf ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

# Looks until there is an answer; gives up after ten looks without one.
state() {
  local tries
  for ((tries = 0; tries < 10; tries++)); do
    look && return
    sleep "$poll"
  done
  note "gcloud does not answer."
  return 1
}

# Returns when the resource is ACTIVE.
wait_until_active() {
  local current before='' asked=0
  if ((dry_run)); then
    run "${describe[@]}"
    create
    run "${describe[@]}"
    return
  fi
  current=$(look) || exit 1
  while [[ $current != ACTIVE ]]; do
    [[ $current == "$before" ]] || note "the resource is $current."
    before=$current
    case $current in
      ABSENT)
        # Refused at first: gcloud has said why. Refused after it was there once: it may be only for now.
        if create; then
          asked=1
        elif ((was_active)); then
          sleep "$poll"
        else
          exit 1
        fi
        ;;
      SUSPENDED | FAILED)
        # What fails before it was ever there would fail again.
        if [[ $current == FAILED ]] && ((asked)); then
          note "the request failed; this says why: $(quote "${queued[@]}" describe "$name" "${place[@]}")"
          exit 1
        fi
        delete_resource || sleep "$poll"
        ;;
      *) sleep "$poll" ;;
    esac
    current=$(state) || exit 1
  done
  was_active=1
  note "the resource is ACTIVE."
}

install() {
  local archive
  if [[ -n $repository ]]; then
    on_workers "git init --quiet perl_jax && git -C perl_jax fetch --quiet --depth 1 $(quote "$repository" "${ref:-HEAD}") && git -C perl_jax checkout --quiet --force --detach FETCH_HEAD && bash perl_jax/launch/on_worker.sh install" || return
  else
    archive=${TMPDIR:-/tmp}/perl_jax-$name.tar.gz
    run tar --create --gzip --file "$archive" --directory "$root" --exclude ./.git --exclude ./.venv --exclude ./runs \
      --exclude __pycache__ --exclude '*.egg-info' --exclude ./build . || return
    run gcloud compute tpus tpu-vm scp "$archive" "$name:perl_jax.tar.gz" "${place[@]}" --worker all \
      "${connect_flags[@]+"${connect_flags[@]}"}" || return
    on_workers "mkdir -p perl_jax && tar --extract --gzip --file perl_jax.tar.gz --directory perl_jax && bash perl_jax/launch/on_worker.sh install" || return
  fi
  [[ -z $setup ]] || on_workers "$setup" || return
  send_variables
}

# The values of --env, in a file of shell that only its owner can read here and there: no command line and no output has them.
values=''
send_variables() {
  local variable status=0 target=.perl_jax_launch/$name
  ((${#variables[@]})) || return 0
  on_workers "umask 077 && mkdir -p $target && chmod 700 .perl_jax_launch $target" || return
  values=${TMPDIR:-/tmp}/perl_jax-$name.env
  if ((!dry_run)); then
    values=$(mktemp) || return
    for variable in "${variables[@]}"; do
      printf 'export %s=%s\n' "$variable" "$(quote "${!variable}")"
    done >"$values"
  fi
  run gcloud compute tpus tpu-vm scp "$values" "$name:$target/environment" "${place[@]}" --worker all \
    "${connect_flags[@]+"${connect_flags[@]}"}" || status=$?
  rm -f "$values"
  return "$status"
}

finish() {
  ((!delete)) || delete_resource
  exit "$1"
}

if ((stop)); then
  on_workers "bash perl_jax/launch/on_worker.sh stop $name"
  finish 0
fi

# Runs the command on the workers, in the background: so a signal is answered at once. gcloud asks again by itself when a
# connection is lost: the attempt's name tells the workers that it is the same run.
connection='' started=$(date +%Y%m%d-%H%M%S) attempt=0
run_command() {
  local line variable
  attempt=$((attempt + 1))
  line="bash perl_jax/launch/on_worker.sh run $name $started-$attempt"
  for variable in "${variables[@]+"${variables[@]}"}"; do
    line+=" --env $variable"
  done
  line+=" -- $(quote "$@")"
  if ((dry_run)); then
    on_workers "$line"
    return
  fi
  set -m
  on_workers "$line" </dev/null &
  connection=$!
  set +m
  wait "$connection"
}

leave() {
  [[ -z $values ]] || rm -f "$values"
  [[ -z $connection ]] || kill -TERM -- "-$connection" 2>/dev/null || true
  note "the run goes on if it had started; the same line joins it again, and --stop makes it end."
  exit "$1"
}
trap 'leave 130' INT
trap 'leave 143' TERM

failures=0 installed=0
while :; do
  wait_until_active
  status=0
  if ((!installed)); then
    install || status=$?
    ((status)) || installed=1
  fi
  ((status)) || run_command "$@" || status=$?
  if ((dry_run)); then
    note "this is for a resource that is absent; one that is there is not created, and is waited for until it is ACTIVE."
    finish 0
  fi
  case $status in
    0) finish 0 ;;
    2)
      note "status 2 is the user's error: not started again."
      finish 2
      ;;
  esac
  # A pre-emption takes a moment to show.
  sleep "$poll"
  current=$(state) || exit 1
  if [[ $current != ACTIVE ]]; then
    note "the slice was taken back; asking for it again."
    installed=0
    continue
  fi
  if ((status == 143)); then
    note "the run was told to stop and has saved; the same line resumes it."
    finish 143
  fi
  if ((failures >= restarts)); then
    note "the run ended with $(status_in_words "$status")."
    finish "$status"
  fi
  failures=$((failures + 1))
  note "the run ended with $(status_in_words "$status"); starting it again, $failures of $restarts."
done
