#!/usr/bin/env bash
# One run on TPU slices of a GKE cluster, through XPK, which makes a JobSet of it.
#
#   launch/gke.sh --cluster NAME --workload NAME --tpu-type TYPE [options] -- COMMAND [ARGUMENT ...]
#   launch/gke.sh --cluster my --workload rl-1 --tpu-type v5p-16 --env HF_TOKEN --wait -- perl-jax rl --run gs://my-bucket/rl-1 ...
#
# Needs: xpk (pip install xpk) and what it needs (gcloud, kubectl, docker or crane for an image), signed in; a cluster made by
# `xpk cluster create`; a bucket that the pods may read and write, for the run's folder: --run gs://BUCKET/FOLDER. A storage
# attached by `xpk storage attach` or `create`, which is mounted in every container, serves too: see --storage.
#
# On SIGTERM (a pod is evicted, a Spot machine is taken back) the run saves a checkpoint and ends with status 143. The JobSet starts
# all pods again after that, and after status 1, which is also what the other processes end with when one is gone; the same command
# resumes. Never after status 2, the user's error. A Spot machine gives a pod some 15 seconds by default, whatever --grace says: keep
# --checkpoint-every small there.
#
#   --tpu-type TYPE       as XPK names slices: v5litepod-16, v5p-16, v6e-256, ...
#   --num-slices N        default 1
#   --project P, --zone Z default: gcloud's
#   --image IMAGE         a Docker image that has the package installed; without it this working tree is put on top of
#   --base-image IMAGE    (default python:3.11), and each container installs it as it starts
#   --env NAME            pass this environment variable to the run, as HF_TOKEN or WANDB_API_KEY; may be given again. Its value is
#                         taken from this shell and goes into a Kubernetes secret, perl-jax-WORKLOAD, that kubectl writes and each
#                         container reads as it starts; it is in no command line, manifest of the workload or log.
#   --storage NAME        of XPK; may be given again
#   --max-restarts N      default 50
#   --grace SECONDS       from SIGTERM to SIGKILL (default 120)
#   --xpk-flag FLAG       one more of `xpk workload create`, as --xpk-flag=--spot; may be given again
#   --wait                wait for the end of the run; its status is XPK's: 0 success, 125 failure
#   --delete              after --wait, delete the workload
#   --dry-run             print the commands and run nothing
#   --help                print this
set -euo pipefail
script=gke.sh
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$folder/common.sh"

cluster='' workload='' tpu_type='' slices=1 project='' zone='' image='' base_image='' restarts=50 grace=120
storages=() extra=() variables=() wait_for_end=0 delete=0 dry_run=0
while (($#)); do
  case $1 in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --cluster) cluster=$(value "$@"); shift 2 ;;
    --workload) workload=$(value "$@"); shift 2 ;;
    --tpu-type) tpu_type=$(value "$@"); shift 2 ;;
    --num-slices) slices=$(value "$@"); shift 2 ;;
    --project) project=$(value "$@"); shift 2 ;;
    --zone) zone=$(value "$@"); shift 2 ;;
    --image) image=$(value "$@"); shift 2 ;;
    --base-image) base_image=$(value "$@"); shift 2 ;;
    --env) variables+=("$(value "$@")"); shift 2 ;;
    --storage) storages+=("$(value "$@")"); shift 2 ;;
    --max-restarts) restarts=$(value "$@"); shift 2 ;;
    --grace) grace=$(value "$@"); shift 2 ;;
    --xpk-flag) extra+=("$(value "$@")"); shift 2 ;;
    --wait) wait_for_end=1; shift ;;
    --delete) delete=1; shift ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "there is no option '$1' before --; see --help." ;;
  esac
done
(($#)) && shift
check_command "$@"
[[ -n $cluster ]] || die "--cluster is missing."
[[ -n $workload ]] || die "--workload is missing."
[[ -n $tpu_type ]] || die "--tpu-type is missing."
[[ -z $image || -z $base_image ]] || die "--image has the package and --base-image gets it: give one of them."
whole --num-slices "$slices" 1
whole --max-restarts "$restarts" 0
whole --grace "$grace" 1
((!delete || wait_for_end)) || die "--delete needs --wait, or it would delete the run as it starts."
check_shared_run "$@"
[[ "$*" != *$'\n'* ]] || die "an argument of the command has a line break; XPK puts the command into a YAML line: put that argument in a file."
check_variables "${variables[@]+"${variables[@]}"}"
need xpk "pip install xpk"
((${#variables[@]} == 0)) || need kubectl "see https://kubernetes.io/docs/tasks/tools"

# XPK has no option for secrets, so each container asks the cluster for the values before it becomes the run. On one line and
# without braces, for XPK puts it into a YAML line.
secret=perl-jax-$workload
reader='import base64, json, os, ssl, sys, urllib.request; folder = "/var/run/secrets/kubernetes.io/serviceaccount/"'
reader+='; read = lambda name: open(folder + name).read().strip()'
reader+='; url = "https://kubernetes.default.svc/api/v1/namespaces/" + read("namespace") + "/secrets/" + sys.argv[1]'
reader+='; request = urllib.request.Request(url, headers=dict(Authorization="Bearer " + read("token")))'
reader+='; context = ssl.create_default_context(cafile=folder + "ca.crt")'
reader+='; data = json.load(urllib.request.urlopen(request, context=context, timeout=60))["data"]'
reader+='; os.environ.update((name, base64.b64decode(data[name]).decode()) for name in data)'
reader+='; os.execvp(sys.argv[2], sys.argv[2:])'

# The secret, and the right of the namespace's pods to read it, as JSON for kubectl.
manifest() {
  local variable data='' meta
  for variable in "${variables[@]}"; do
    data+="${data:+,}\"$variable\":\"$(printf '%s' "${!variable}" | base64 | tr -d '\n')\""
  done
  meta="\"metadata\":{\"name\":\"$secret\"}"
  printf '{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Secret",%s,"data":{%s}},' "$meta" "$data"
  printf '{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"Role",%s,"rules":[{"apiGroups":[""],' "$meta"
  printf '"resources":["secrets"],"resourceNames":["%s"],"verbs":["get"]}]},' "$secret"
  printf '{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"RoleBinding",%s,"roleRef":' "$meta"
  printf '{"apiGroup":"rbac.authorization.k8s.io","kind":"Role","name":"%s"},"subjects":[{"kind":"Group",' "$secret"
  printf '"apiGroup":"rbac.authorization.k8s.io","name":"system:serviceaccounts:default"}]}]}\n'
}
apply=(kubectl apply --namespace default --server-side --force-conflicts --filename -)

# XPK's container relays SIGTERM to the shell that runs this: exec makes the run take that shell's place. Kubernetes reads $$ and
# $(NAME) in a command before any shell: no $ is left beside another character.
((${#variables[@]} == 0)) || set -- python3 -c "$reader" "$secret" "$@"
words=$(quote "$@")
line="exec ${words//\$/"'\\\$'"}"
place=(--cluster "$cluster")
[[ -z $project ]] || place+=(--project "$project")
[[ -z $zone ]] || place+=(--zone "$zone")
create=(xpk workload create "${place[@]}" --workload "$workload" --tpu-type "$tpu_type" --num-slices "$slices")
if [[ -n $image ]]; then
  create+=(--docker-image "$image")
else
  create+=(--base-docker-image "${base_image:-python:3.11}" --script-dir "$(dirname "$folder")")
  line="pip install --quiet -c constraints.txt -e '.[tpu,gcs]' && $line"
fi
for storage in "${storages[@]+"${storages[@]}"}"; do
  create+=(--storage "$storage")
done
create+=(--max-restarts "$restarts" --restart-on-exit-codes 1 --termination-grace-period-seconds "$grace")
# Containers do not start at once: the processes wait for each other for as long as images and packages may take.
create+=(--env PERL_JAX_HOSTS=auto --env PERL_JAX_CONNECT_SECONDS=900 "${extra[@]+"${extra[@]}"}" --command "$line")

if ((${#variables[@]})); then
  # Any command of XPK makes its cluster kubectl's.
  run xpk workload list "${place[@]}"
  if ((dry_run)); then
    run "${apply[@]}"
    note "kubectl reads from its standard input the secret $secret with ${variables[*]}."
  else
    manifest | "${apply[@]}"
  fi
fi
run "${create[@]}"
((wait_for_end)) || exit 0
status=0
run xpk workload list "${place[@]}" --wait-for-job-completion "$workload" || status=$?
if ((delete)); then
  run xpk workload delete "${place[@]}" --workload "$workload" --force
  ((${#variables[@]} == 0)) ||
    run kubectl delete --namespace default --ignore-not-found "secret/$secret" "role/$secret" "rolebinding/$secret"
fi
exit "$status"
