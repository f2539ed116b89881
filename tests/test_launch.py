"""The scripts of launch/: what they would run, what they say when they cannot, and real runs of
what needs no cluster.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "tpu_vm.sh", "on_worker.sh", "gke.sh", "slurm.sh")
# Everything that the scripts may use besides the tools that they are for.
SMALL_TOOLS = [
    "base64",
    "bash",
    "cat",
    "chmod",
    "cp",
    "date",
    "dirname",
    "env",
    "flock",
    "git",
    "grep",
    "gzip",
    "head",
    "hostname",
    "mkdir",
    "mkfifo",
    "mktemp",
    "rm",
    "sed",
    "seq",
    "setsid",
    "sleep",
    "tail",
    "tar",
    "tr",
]
# A bound for what should take a second or two.
PATIENCE = 60

# Words that only right quoting brings through one shell or two.
WORDS = [
    "perl-jax",
    "rl",
    "--run",
    "/runs/my run",
    "--terms",
    '[{"kind": "words", "text": "it\'s $HOME $$ $(HOME) `id` \\\\ & | ; * ? #"}]',
    "--note=a  b",
    "",
    "~",
    "é",
]
TPU_VM = [
    "--name",
    "rl-1",
    "--zone",
    "us-east5-a",
    "--accelerator-type",
    "v5p-16",
    "--runtime-version",
    "v2-alpha-tpuv5",
]
GKE = ["--cluster", "my", "--workload", "rl-1", "--tpu-type", "v5p-16"]


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> pathlib.Path:
    """A folder of small tools only: no gcloud, xpk or srun, whatever this machine has."""
    folder = tmp_path_factory.mktemp("tools")
    for tool in (*SMALL_TOOLS, "python3"):
        found = sys.executable if tool == "python3" else shutil.which(tool)
        assert found, f"the tests need {tool}"
        (folder / tool).symlink_to(found)
    return folder


def environment(*folders: pathlib.Path, **variables: str) -> dict[str, str]:
    return {
        "PATH": ":".join(map(str, folders)),
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        **variables,
    }


def call(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAUNCH / script, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@contextlib.contextmanager
def started(script: str, *arguments: str, env: dict[str, str]):
    """A script that is left running; it is gone afterwards, whatever the test found."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [LAUNCH / script, *map(str, arguments)], env=env, text=True, **streams
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait(PATIENCE)


def planned(script: str, *arguments: str, env: dict[str, str]) -> list[list[str]]:
    """The commands that --dry-run prints, each as its words."""
    result = call(script, "--dry-run", *arguments, env=env)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def tool(folder: pathlib.Path, name: str, body: str) -> None:
    """An executable of the given shell code."""
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + body)
    path.chmod(0o755)


# What every script has.


def test_all_scripts_are_here():
    assert {path.name for path in LAUNCH.glob("*.sh")} == {*SCRIPTS, "common.sh"}


def test_shellcheck():
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    result = subprocess.run(
        [shellcheck, "--external-sources", *sorted(LAUNCH.glob("*.sh"))],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0 and result.stdout == "", result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_opening_comment(script, tools):
    text = (LAUNCH / script).read_text()
    assert "set -euo pipefail" in text and os.access(LAUNCH / script, os.X_OK)
    result = call(script, "--help", env=environment(tools))
    assert result.returncode == 0 and result.stderr == ""
    comment = [
        line[1:].removeprefix(" ")
        for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    ]
    assert result.stdout.splitlines() == comment
    assert (
        "\nNeeds: " in result.stdout
        and "--dry-run" in result.stdout
        and "set -euo" not in result.stdout
    )
    # A usage line, and an example that has a real command.
    assert result.stdout.count(f"launch/{script} ") >= 2 and "-- perl-jax rl" in result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("local.sh", ["--", "true"], "--processes is missing."),
        ("local.sh", ["--processes"], "--processes needs a value."),
        ("local.sh", ["--processes", "--", "true"], "--processes needs a value."),
        (
            "local.sh",
            ["--processes", "two", "--", "true"],
            "--processes is 'two'; it must be a whole number, at least 1.",
        ),
        (
            "local.sh",
            ["--processes=0", "--", "true"],
            "--processes is '0'; it must be a whole number, at least 1.",
        ),
        (
            "local.sh",
            ["--processes=2", "--restarts=-1", "--", "true"],
            "--restarts is '-1'; it must be a whole number, at least 0.",
        ),
        (
            "local.sh",
            ["--processes", "2"],
            "there is no command to run; give it after --, as in: -- perl-jax rl --run FOLDER ...",
        ),
        (
            "local.sh",
            ["--processes", "2", "perl-jax"],
            "there is no option 'perl-jax' before --; see --help.",
        ),
        (
            "local.sh",
            ["--process=2", "--", "true"],
            "there is no option '--process' before --; see --help.",
        ),
        (
            "local.sh",
            ["--processes=2", "--", "nonesuch"],
            "there is no command 'nonesuch'; install the package, or give the command's path.",
        ),
        ("tpu_vm.sh", ["--", "true"], "--name is missing."),
        (
            "tpu_vm.sh",
            ["--name", "My_run", "--", "true"],
            "--name is 'My_run'; it must be small letters, digits and '-', and begin with a "
            "letter.",
        ),
        ("tpu_vm.sh", TPU_VM[:2], "--zone is missing."),
        (
            "tpu_vm.sh",
            TPU_VM,
            "there is no command to run; give it after --, as in: -- perl-jax rl --run FOLDER ...",
        ),
        ("tpu_vm.sh", [*TPU_VM[:4], "--", "true"], "--accelerator-type is missing."),
        ("tpu_vm.sh", [*TPU_VM[:6], "--", "true"], "--runtime-version is missing."),
        (
            "tpu_vm.sh",
            [*TPU_VM, "--spot", "--reserved", "--", "true"],
            "--spot and --reserved are two kinds of capacity: give one of them.",
        ),
        ("tpu_vm.sh", [*TPU_VM, "--ref", "main", "--", "true"], "--ref needs --repository."),
        (
            "tpu_vm.sh",
            [*TPU_VM, "--stop", "--", "true"],
            "--stop takes no command; leave out what is after --.",
        ),
        (
            "tpu_vm.sh",
            [*TPU_VM, "--", "true"],
            "gcloud is not installed; see https://cloud.google.com/sdk/docs/install.",
        ),
        ("gke.sh", ["--", "true"], "--cluster is missing."),
        ("gke.sh", [*GKE[:2], "--", "true"], "--workload is missing."),
        ("gke.sh", [*GKE[:4], "--", "true"], "--tpu-type is missing."),
        (
            "gke.sh",
            [*GKE, "--delete", "--", "true"],
            "--delete needs --wait, or it would delete the run as it starts.",
        ),
        (
            "gke.sh",
            [*GKE, "--image=a", "--base-image=b", "--", "true"],
            "--image has the package and --base-image gets it: give one of them.",
        ),
        ("gke.sh", [*GKE, "--", "true"], "xpk is not installed; pip install xpk."),
        (
            "slurm.sh",
            ["--restarts", "--", "true"],
            "--restarts is '--'; it must be a whole number, at least 0.",
        ),
        (
            "slurm.sh",
            [],
            "there is no command to run; give it after --, as in: -- perl-jax rl --run FOLDER ...",
        ),
        (
            "slurm.sh",
            ["--", "true"],
            "this is not a Slurm job; submit it: sbatch --nodes=N --gpus-per-node=G "
            "launch/slurm.sh -- COMMAND",
        ),
        ("on_worker.sh", [], "say what to do: install, run or stop."),
        (
            "on_worker.sh",
            ["fly", "r"],
            "there is no action 'fly'; it must be install, run or stop.",
        ),
        (
            "on_worker.sh",
            ["stop", "../r"],
            "the run's name is '../r'; it must be letters, digits, '.', '_' and '-'.",
        ),
    ],
)
def test_errors_are_one_sentence(script, arguments, sentence, tools):
    result = call(script, *arguments, env=environment(tools))
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{script}: {sentence}\n")


@pytest.mark.parametrize(("script", "options"), [("tpu_vm.sh", TPU_VM), ("gke.sh", GKE)])
@pytest.mark.parametrize("flag", [["--run", "{}"], ["--run={}"]])
@pytest.mark.parametrize(
    ("folder", "word"),
    [
        ("gs://", "gs://BUCKET/FOLDER"),
        ("gs://bucket", "gs://BUCKET/FOLDER"),
        ("gs:///run", "gs://BUCKET/FOLDER"),
        ("runs/my", "absolute path"),
    ],
)
def test_a_run_folder_that_hosts_cannot_share_is_refused(
    script, options, flag, folder, word, tools
):
    command = [part.format(folder) for part in flag]
    result = call(
        script, "--dry-run", *options, "--", "perl-jax", "rl", *command, env=environment(tools)
    )
    assert (
        result.returncode == 2
        and result.stdout == ""
        and f"--run is {folder}; " in result.stderr
        and word in result.stderr
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("script", "options"), [("tpu_vm.sh", TPU_VM), ("gke.sh", GKE)])
def test_a_run_in_a_bucket_is_taken_as_it_is(script, options, tools):
    command = ["perl-jax", "rl", "--run", "gs://bucket/runs/my", "--steps", "3"]
    commands = planned(script, *options, "--", *command, env=environment(tools))
    assert sum(" ".join(command) in words[-1] for words in commands) == 1


# A value that no command line, output or file that stays may hold.
VALUE = "hf_Secret'\" $HOME\n2nd"
NAMED = {
    "local.sh": ["--processes", "1"],
    "tpu_vm.sh": TPU_VM,
    "gke.sh": GKE,
    "slurm.sh": [],
    "on_worker.sh": ["run", "rl-1"],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("given", [["--env", f"HF_TOKEN={VALUE}"], ["--env=4"], ["--env", "A B"]])
def test_a_variable_is_given_by_its_name_alone(script, given, tools):
    command = [*NAMED[script], "--dry-run", *given, "--", "true"]
    result = call(script, *command, env=environment(tools))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"{script}: --env takes the name of an environment variable without its value, as in "
        "--env HF_TOKEN.\n"
    )


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "on_worker.sh"])
@pytest.mark.parametrize("variables", [{}, {"WANDB_API_KEY": ""}])
def test_a_variable_that_is_missing_is_one_sentence(script, variables, tools):
    command = [*NAMED[script], "--dry-run", "--env=HF_TOKEN", "--env", "WANDB_API_KEY"]
    env = environment(tools, HF_TOKEN=VALUE, **variables)
    result = call(script, *command, "--", "true", env=env)
    said = "WANDB_API_KEY is not set here, and --env WANDB_API_KEY asks for it; export it first."
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{script}: {said}\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_shows_no_value(script, tools):
    command = [*NAMED[script], "--dry-run", "--env", "HF_TOKEN", "--", "perl-jax", "show", "x"]
    result = call(script, *command, env=environment(tools, HF_TOKEN=VALUE))
    assert result.returncode == 0, result.stderr
    shown = result.stdout + result.stderr
    assert "Secret" not in shown
    assert "aGZfU2VjcmV0" not in shown  # in base64
    assert script in ("local.sh", "slurm.sh", "on_worker.sh") or "HF_TOKEN" in shown


# What would be run.


def test_local_plans_one_command_a_process(tools):
    env = environment(tools, XLA_FLAGS="--xla_other=1", PERL_JAX_HOSTS="auto")
    commands = planned(
        "local.sh",
        "--processes=2",
        "--devices-per-process",
        "4",
        "--port=1234",
        "--",
        *WORDS,
        env=env,
    )
    flags = "XLA_FLAGS=--xla_other=1 --xla_force_host_platform_device_count=4"
    address = ["JAX_COORDINATOR_ADDRESS=127.0.0.1:1234", "JAX_NUM_PROCESSES=2"]
    start = ["env", "-u", "PERL_JAX_HOSTS", *address]
    assert commands == [
        [*start, f"JAX_PROCESS_ID={index}", "JAX_PLATFORMS=cpu", flags, *WORDS]
        for index in range(2)
    ]


def test_tpu_vm_plans_from_the_working_tree(tools):
    options = [
        *TPU_VM,
        "--project",
        "p",
        "--spot",
        "--create-flag=--network=n",
        "--connect-flag=--internal-ip",
        "--setup",
        "mount 'a b'",
    ]
    commands = planned(
        "tpu_vm.sh", *options, "--delete", "--", *WORDS, env=environment(tools, TMPDIR="/tmp/a b")
    )
    place = ["--zone", "us-east5-a", "--project", "p"]
    queued = ["gcloud", "alpha", "compute", "tpus", "queued-resources"]
    describe = [*queued, "describe", "rl-1", *place, "--format=value(state.state)"]
    ssh = [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "rl-1",
        *place,
        "--worker",
        "all",
        "--ssh-flag=-o ServerAliveInterval=30",
    ]
    archive = "/tmp/a b/perl_jax-rl-1.tar.gz"
    kind = [
        "--accelerator-type",
        "v5p-16",
        "--runtime-version",
        "v2-alpha-tpuv5",
        "--spot",
        "--network=n",
    ]
    pack, copy, unpack, setup, run = commands[3:8]
    assert commands[:3] == [
        describe,
        [*queued, "create", "rl-1", "--node-id", "rl-1", *place, *kind],
        describe,
    ]
    assert (
        pack[:7] == ["tar", "--create", "--gzip", "--file", archive, "--directory", str(ROOT)]
        and pack[-1] == "."
        and "./.git" in pack
    )
    assert copy == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "scp",
        archive,
        "rl-1:perl_jax.tar.gz",
        *place,
        "--worker",
        "all",
        "--internal-ip",
    ]
    assert unpack[:-1] == [*ssh, "--internal-ip", "--command"] and unpack[-1].endswith(
        " && bash perl_jax/launch/on_worker.sh install"
    )
    assert setup == [*ssh, "--internal-ip", "--command", "mount 'a b'"]
    assert run[:-1] == [*ssh, "--internal-ip", "--command"]
    remote = shlex.split(run[-1])
    assert remote[:4] == ["bash", "perl_jax/launch/on_worker.sh", "run", "rl-1"] and remote[5:] == [
        "--",
        *WORDS,
    ]
    assert commands[8:] == [[*queued, "delete", "rl-1", *place, "--force", "--quiet"]]


def test_tpu_vm_plans_from_a_repository(tools):
    commands = planned(
        "tpu_vm.sh",
        *TPU_VM,
        "--repository",
        "https://example.com/a.git",
        "--ref",
        "v 1",
        "--",
        "true",
        env=environment(tools),
    )
    assert [command[:5] for command in commands[3:]] == [
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    ] * 2
    steps = [shlex.split(step) for step in commands[3][-1].split(" && ")]
    assert steps[0] == ["git", "init", "--quiet", "perl_jax"]
    assert steps[1] == [
        "git",
        "-C",
        "perl_jax",
        "fetch",
        "--quiet",
        "--depth",
        "1",
        "https://example.com/a.git",
        "v 1",
    ]
    assert steps[2][-1] == "FETCH_HEAD" and steps[3] == [
        "bash",
        "perl_jax/launch/on_worker.sh",
        "install",
    ]


def test_tpu_vm_plans_to_stop(tools):
    commands = planned("tpu_vm.sh", *TPU_VM[:4], "--stop", "--delete", env=environment(tools))
    assert commands[0][-2:] == [
        "--command",
        "bash perl_jax/launch/on_worker.sh stop rl-1",
    ] and commands[1][-2:] == ["--force", "--quiet"]
    assert len(commands) == 2


def kubernetes(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a container's command: $$ is $, $(NAME) a variable that the
    container has.
    """
    result, position = "", 0
    while position < len(text):
        pair, end = text[position : position + 2], text.find(")", position)
        if pair == "$$":
            result, position = result + "$", position + 2
        elif pair == "$(" and end > 0:
            name = text[position + 2 : end]
            result, position = result + variables.get(name, f"$({name})"), end + 1
        else:
            result, position = result + text[position], position + 1
    return result


def test_gke_plans_a_workload_that_survives_two_readings(tools, tmp_path):
    options = [
        *GKE,
        "--num-slices=2",
        "--zone",
        "z",
        "--storage",
        "runs",
        "--storage",
        "data",
        "--max-restarts",
        "7",
        "--xpk-flag=--spot",
    ]
    create, wait, delete = planned(
        "gke.sh", *options, "--wait", "--delete", "--", *WORDS, env=environment(tools)
    )
    line = create.pop()
    place = ["--cluster", "my", "--zone", "z"]
    expected = [
        "xpk",
        "workload",
        "create",
        *place,
        "--workload",
        "rl-1",
        "--tpu-type",
        "v5p-16",
        "--num-slices",
        "2",
    ]
    expected += [
        "--base-docker-image",
        "python:3.11",
        "--script-dir",
        str(ROOT),
        "--storage",
        "runs",
        "--storage",
        "data",
    ]
    expected += [
        "--max-restarts",
        "7",
        "--restart-on-exit-codes",
        "1",
        "--termination-grace-period-seconds",
        "120",
    ]
    assert create == [
        *expected,
        "--env",
        "PERL_JAX_HOSTS=auto",
        "--env",
        "PERL_JAX_CONNECT_SECONDS=900",
        "--spot",
        "--command",
    ]
    assert wait == ["xpk", "workload", "list", *place, "--wait-for-job-completion", "rl-1"]
    assert delete == ["xpk", "workload", "delete", *place, "--workload", "rl-1", "--force"]
    tool(tmp_path, "pip", 'printf "%s," "$@" >>installed\n')
    tool(
        tmp_path,
        "perl-jax",
        "exec python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n",
    )
    line = kubernetes(line, {"HOME": "expanded"})
    result = subprocess.run(
        ["bash", "-c", line],
        env=environment(tmp_path, tools),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert json.loads(result.stdout) == WORDS[1:]
    assert (
        tmp_path / "installed"
    ).read_text() == "install,--quiet,-c,constraints.txt,-e,.[tpu,gcs],"


def test_gke_with_an_image_installs_nothing(tools):
    (create,) = planned(
        "gke.sh",
        *GKE,
        "--image",
        "gcr.io/p/i:1",
        "--",
        "perl-jax",
        "show",
        "a b",
        env=environment(tools),
    )
    assert (
        create[create.index("--docker-image") + 1] == "gcr.io/p/i:1"
        and "--script-dir" not in create
    )
    assert create[-1] == "exec perl-jax show 'a b'"


def test_gke_puts_values_into_a_secret_that_containers_read(tools, tmp_path):
    """Really run, with an xpk and a kubectl that write down what they were given."""
    for name in ("xpk", "kubectl"):
        tool(tmp_path, name, f'printf "%s\\x1f" {name} "$@" >>calls; echo >>calls\n')
    with open(tmp_path / "kubectl", "a") as file:
        file.write("[[ $1 != apply ]] || cat >manifest\n")
    options = [*GKE, "--image", "i", "--wait", "--delete", "--env", "HF_TOKEN", "--env", "WANDB"]
    result = subprocess.run(
        [LAUNCH / "gke.sh", *options, "--", *WORDS],
        env=environment(tmp_path, tools, HF_TOKEN=VALUE, WANDB="w"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text()
    assert "Secret" not in calls + result.stdout + result.stderr
    assert "aGZfU2VjcmV0" not in calls + result.stdout + result.stderr
    words = [line.split("\x1f")[:-1] for line in calls.splitlines()]
    assert [line[:3] for line in words] == [
        ["xpk", "workload", "list"],
        ["kubectl", "apply", "--namespace"],
        ["xpk", "workload", "create"],
        ["xpk", "workload", "list"],
        ["xpk", "workload", "delete"],
        ["kubectl", "delete", "--namespace"],
    ]
    secret, role, binding = json.loads((tmp_path / "manifest").read_text())["items"]
    found = {name: base64.b64decode(text).decode() for name, text in secret["data"].items()}
    assert found == {"HF_TOKEN": VALUE, "WANDB": "w"}
    assert {item["metadata"]["name"] for item in (secret, role, binding)} == {"perl-jax-rl-1"}
    assert role["rules"][0]["resourceNames"] == ["perl-jax-rl-1"]
    assert role["rules"][0]["verbs"] == ["get"]
    assert binding["roleRef"]["name"] == "perl-jax-rl-1"

    # The container: the words after Kubernetes and a shell have read the line, and its Python.
    line = kubernetes(words[2][-1], {"HOME": "expanded"})
    tool(
        tmp_path,
        "python3",
        "exec python -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n",
    )
    (tmp_path / "python").symlink_to(sys.executable)
    read = subprocess.run(
        ["bash", "-c", line],
        env=environment(tmp_path, tools),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    option, code, name, *command = json.loads(read.stdout)
    assert (option, name, command) == ("-c", "perl-jax-rl-1", WORDS)
    container_becomes(code, secret, command)


def container_becomes(code: str, secret: dict, command: list[str]) -> None:
    """Runs a container's Python against a cluster of a few lines, and checks what it becomes."""
    around = f"""
import builtins, io, json, os, ssl, sys, urllib.request
real = open
builtins.open = lambda path, *rest, **named: (
    io.StringIO("a-" + os.path.basename(path) + "\\n") if str(path).startswith("/var/run/secrets/")
    else real(path, *rest, **named)
)
ssl.create_default_context = lambda cafile: cafile

def answer(request, context, timeout):
    assert context == "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
    assert request.get_header("Authorization") == "Bearer a-token"
    assert request.full_url == (
        "https://kubernetes.default.svc/api/v1/namespaces/a-namespace/secrets/perl-jax-rl-1"
    )
    return io.StringIO({json.dumps(json.dumps(secret))})

urllib.request.urlopen = answer
os.execvp = lambda file, words: print(json.dumps([file, words, os.environ["HF_TOKEN"]]))
exec({code!r})
"""
    result = subprocess.run(
        [sys.executable, "-c", around, "perl-jax-rl-1", *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [command[0], command, VALUE]


def test_gke_refuses_line_breaks(tools):
    result = call("gke.sh", *GKE, "--dry-run", "--", "perl-jax", "a\nb", env=environment(tools))
    assert result.returncode == 2 and "line break" in result.stderr


@pytest.mark.parametrize(
    ("variables", "options", "more"),
    [
        ({}, [], []),
        (
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "8"},
            ["--cpus-per-task=8"],
            ["JAX_LOCAL_DEVICE_IDS=0,1,2,3"],
        ),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"}, [], []),
        ({"SLURM_GPUS_ON_NODE": "1", "SLURM_NTASKS_PER_NODE": "1"}, [], []),
    ],
)
def test_slurm_plans_a_process_a_host_or_a_gpu(variables, options, more, tools):
    commands = planned("slurm.sh", "--", *WORDS, env=environment(tools, **variables))
    step = ["srun", "--label", "--kill-on-bad-exit=0", "--wait=300", *options]
    assert commands == [
        [*step, "env", "PERL_JAX_HOSTS=auto", "PERL_JAX_CONNECT_SECONDS=300", *more, *WORDS]
    ]


def test_slurm_asks_sbatch_for_what_it_relies_on():
    head, *rest = (LAUNCH / "slurm.sh").read_text().split("set -euo pipefail")
    directives = [
        line.split(maxsplit=1)[1] for line in head.splitlines() if line.startswith("#SBATCH")
    ]
    assert {"--requeue", "--open-mode=append", "--signal=TERM@300", "--ntasks-per-node=1"} <= set(
        directives
    )
    assert "#SBATCH" not in "".join(rest)


def test_slurm_refuses_half_a_host_a_process(tools):
    env = environment(tools, SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="4")
    result = call("slurm.sh", "--dry-run", "--", "true", env=env)
    assert result.returncode == 2
    assert result.stderr == (
        "slurm.sh: there are 4 processes and 8 GPUs on a host; --ntasks-per-node must be 1 or 8.\n"
    )


# local.sh, really.


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


NUMBER = "import os, signal, sys, time; number = os.environ['JAX_PROCESS_ID']; "


def test_local_gives_each_process_its_environment(tools):
    names = [
        "JAX_COORDINATOR_ADDRESS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "XLA_FLAGS",
        "JAX_PLATFORMS",
        "PERL_JAX_HOSTS",
    ]
    code = (
        f"import json, os, sys; print(json.dumps([[os.environ.get(n) for n in {names}], "
        "sys.argv[1:]]))"
    )
    env = environment(tools, PERL_JAX_HOSTS="auto")
    result = call(
        "local.sh", "--processes=3", "--devices-per-process=2", "--", *python(code), *WORDS, env=env
    )
    assert result.returncode == 0 and result.stderr == ""
    lines = sorted(result.stdout.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] ", "[2] "]
    seen = [json.loads(line[4:]) for line in lines]
    address = seen[0][0][0]
    host, port = address.split(":")
    assert host == "127.0.0.1" and 20000 <= int(port) < 32768
    for index, (variables, words) in enumerate(seen):
        assert variables == [
            address,
            "3",
            str(index),
            "--xla_force_host_platform_device_count=2",
            "cpu",
            None,
        ]
        assert words == WORDS


def test_local_prefixes_both_streams_and_an_unended_line(tools):
    code = (
        "import sys; print('out'); sys.stdout.flush(); print('  err \\\\n', file=sys.stderr); "
        "sys.stderr.flush(); sys.stdout.write('end')"
    )
    result = call("local.sh", "--processes=1", "--", *python(code), env=environment(tools))
    assert result.stdout.splitlines() == ["[0] out", "[0]   err \\n", "[0] end"]


def test_local_stops_the_others_when_one_dies(tools, tmp_path):
    """The others are told to stop, and what a process has started ends with it."""
    code = NUMBER + (
        "import pathlib, subprocess; folder = pathlib.Path(sys.argv[1]); "
        "child = subprocess.Popen(['sleep', '300']); (folder / number).write_text(str(child.pid))\n"
        "while len(list(folder.iterdir())) < 3: time.sleep(0.05)\n"
        "if number == '1': sys.exit(3)\n"
        "time.sleep(300)"
    )
    result = call(
        "local.sh", "--processes=3", "--", *python(code), tmp_path, env=environment(tools)
    )
    assert result.returncode == 3
    assert (
        "local.sh: process 1 ended with status 3; stopping the others: SIGTERM, and SIGKILL after "
        "60 s.\n"
    ) in result.stderr
    assert "local.sh: process 0 ended with status 143 (SIGTERM).\n" in result.stderr
    for index in range(3):
        assert not pathlib.Path(f"/proc/{(tmp_path / str(index)).read_text()}/cwd").exists()


def test_local_kills_what_does_not_stop(tools, tmp_path):
    code = NUMBER + (
        "import pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path(sys.argv[1], "
        "number).touch()\n"
        "while len(list(pathlib.Path(sys.argv[1]).iterdir())) < 2: time.sleep(0.05)\n"
        "if number == '0': sys.exit(1)\n"
        "time.sleep(300)"
    )
    result = call(
        "local.sh",
        "--processes=2",
        "--grace=1",
        "--",
        *python(code),
        tmp_path,
        env=environment(tools),
    )
    assert result.returncode == 1
    assert (
        "local.sh: process 1 is still there after 1 s: SIGKILL.\n" in result.stderr
        and "status 137 (SIGKILL)" in result.stderr
    )
    # Nothing of the shell's own.
    assert all(line.startswith("local.sh: ") for line in result.stderr.splitlines())


def starts(folder: pathlib.Path) -> dict[str, int]:
    return {path.name: len(path.read_text()) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("status", "restarts", "last", "counted"),
    [(1, 2, 0, 2), (143, 1, 0, 2), (1, 0, 1, 1), (2, 2, 2, 1)],
    ids=[
        "a failure is started again",
        "so is a lone process told to stop",
        "not without --restarts",
        "nor the user's error",
    ],
)
def test_local_restarts(status, restarts, last, counted, tools, tmp_path):
    """Process 1 fails at its first start; all are started again, and end well."""
    code = NUMBER + (
        "import pathlib; mine = pathlib.Path(sys.argv[1], number); mine.open('a').write('x'); "
        "first = len(mine.read_text()) == 1\n"
        "while len(list(pathlib.Path(sys.argv[1]).iterdir())) < 2: time.sleep(0.05)\n"
        f"if first and number == '1': sys.exit({status})\n"
        "if first: time.sleep(300)"
    )
    result = call(
        "local.sh",
        "--processes=2",
        f"--restarts={restarts}",
        "--",
        *python(code),
        tmp_path,
        env=environment(tools),
    )
    assert (result.returncode, starts(tmp_path)) == (last, {"0": counted, "1": counted}), (
        result.stderr
    )
    assert (f"starting all again, 1 of {restarts}." in result.stderr) == (counted == 2)


def test_local_gives_up_after_its_restarts(tools, tmp_path):
    code = (
        NUMBER
        + "import pathlib; pathlib.Path(sys.argv[1], number).open('a').write('x'); sys.exit(5)"
    )
    result = call(
        "local.sh",
        "--processes=1",
        "--restarts=2",
        "--",
        *python(code),
        tmp_path,
        env=environment(tools),
    )
    assert (result.returncode, starts(tmp_path)) == (5, {"0": 3})


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_forwards_signals(sent, status, tools):
    """Every process gets the signal, SIGINT as Python's KeyboardInterrupt, and has time to save;
    nothing is started again.
    """
    code = NUMBER + (
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try: print('ready'); time.sleep(300)\n"
        f"except KeyboardInterrupt: time.sleep(0.5); print('saved'); sys.exit({status})"
    )
    with started(
        "local.sh", "--processes=2", "--restarts=3", "--", *python(code), env=environment(tools)
    ) as launcher:
        assert sorted(launcher.stdout.readline() for _ in range(2)) == [
            "[0] ready\n",
            "[1] ready\n",
        ]
        launcher.send_signal(sent)
        out, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == status and sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert f"local.sh: {sent.name}: forwarded to every process.\n" in err and "again" not in err


@pytest.mark.slow
def test_local_makes_a_run_that_jax_sees_as_one(tools):
    """Two processes of two devices: four devices, and a sum over all of them."""
    code = (
        "import os, jax, jax.numpy as jnp\n"
        "from jax.experimental import multihost_utils\n"
        "jax.distributed.initialize(num_processes=int(os.environ['JAX_NUM_PROCESSES']), "
        "process_id=int(os.environ['JAX_PROCESS_ID']))\n"
        "total = multihost_utils.process_allgather(jnp.asarray(1.0 + jax.process_index())).sum()\n"
        "print('sees', jax.process_count(), jax.device_count(), jax.local_device_count(), "
        "float(total))"
    )
    result = call(
        "local.sh",
        "--processes=2",
        "--devices-per-process=2",
        "--",
        *python(code),
        env=environment(tools),
    )
    assert result.returncode == 0, result.stdout
    assert {f"[{index}] sees 2 4 2 3.0" for index in range(2)} <= set(result.stdout.splitlines())


# Slurm, with a Slurm that is a few lines of shell.


def fake_slurm(folder: pathlib.Path, statuses: list[int], state: str) -> None:
    """srun says what it was given and ends with the next status; squeue knows the job's state."""
    (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    body = (
        f"cd {shlex.quote(str(folder))}\nread -r status <statuses\nsed -i 1d statuses\nprintf "
        '"%s|" "$@" >>calls\necho >>calls\nexit "$status"\n'
    )
    tool(folder, "srun", body)
    tool(folder, "squeue", f"echo {state}\n")
    tool(folder, "scontrol", f'echo "scontrol $*" >>{shlex.quote(str(folder / "calls"))}\n')


@pytest.mark.parametrize(
    ("statuses", "state", "restarts", "status", "steps", "requeued"),
    [
        ([0], "RUNNING", 3, 0, 1, False),
        ([2], "RUNNING", 3, 2, 1, False),
        ([1, 137, 0], "RUNNING", 3, 0, 3, False),
        ([1, 1], "RUNNING", 1, 1, 2, False),
        ([143], "RUNNING", 3, 143, 1, True),
        ([143], "COMPLETING", 3, 143, 1, False),
    ],
    ids=[
        "ends well",
        "user's error",
        "fails and is started again",
        "fails too often",
        "pre-empted or out of time",
        "cancelled",
    ],
)
def test_slurm_goes_on_as_the_status_says(
    statuses, state, restarts, status, steps, requeued, tools, tmp_path
):
    fake_slurm(tmp_path, statuses, state)
    env = environment(tmp_path, tools, SLURM_JOB_ID="17")
    result = call("slurm.sh", f"--restarts={restarts}", "--", "python3", "a b", env=env)
    assert result.returncode == status, result.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    step = (
        "--label|--kill-on-bad-exit=0|--wait=300|env|PERL_JAX_HOSTS=auto|"
        "PERL_JAX_CONNECT_SECONDS=300|python3|a b|"
    )
    assert calls == [step] * steps + ["scontrol requeue 17"] * requeued


# A worker of a slice, really; and the slice, with a gcloud that is a few lines of shell.


def worker(*arguments: str, home: pathlib.Path, tools: pathlib.Path) -> subprocess.CompletedProcess:
    return call("on_worker.sh", *arguments, env=environment(tools) | {"HOME": str(home)})


def test_worker_runs_a_command_and_says_how_it_ended(tools, tmp_path):
    code = "import os, sys; print(os.environ['PERL_JAX_HOSTS'], sys.argv[1:]); sys.exit(7)"
    result = worker("run", "rl-1", "a", "--", *python(code), *WORDS, home=tmp_path, tools=tools)
    assert result.returncode == 7 and result.stdout.endswith(f"] auto {WORDS}\n"), result.stderr
    # The same attempt is not run again; another is.
    marker = tmp_path / "marker"
    again = python(f"open({str(marker)!r}, 'a').write('x')")
    for attempt, count in (("a", 1), ("a", 1), ("b", 2)):
        assert (
            worker("run", "rl-2", attempt, "--", *again, home=tmp_path, tools=tools).returncode == 0
        )
        assert len(marker.read_text()) == count


def test_worker_outlives_the_connection_is_joined_and_stopped(tools, tmp_path):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), "
        "sys.exit(143))); print('ready'); time.sleep(300)"
    )
    command = ["on_worker.sh", "run", "rl-1", "--", *python(code)]
    env = environment(tools) | {"HOME": str(tmp_path)}
    with started(*command, env=env) as first:
        assert first.stdout.readline().endswith("] ready\n")
        first.kill()
    other = worker("run", "rl-1", "--", "true", home=tmp_path, tools=tools)
    assert other.returncode == 2 and "runs another command" in other.stderr
    with started(*command, env=env) as second:
        assert second.stdout.readline().endswith("] ready\n")
        stopped = worker("stop", "rl-1", home=tmp_path, tools=tools)
        out, _ = second.communicate(timeout=PATIENCE)
    assert (
        stopped.returncode == 0
        and "'rl-1' has ended with status 143 (SIGTERM).\n" in stopped.stderr
    )
    assert second.returncode == 143 and out.endswith("] saved\n") and out.count("ready") == 0


# describe takes the next of the given states and keeps the last; ssh runs the command here, as the
# one worker, whose package is a Python that only says what it was asked to install.
GCLOUD = r"""
cd "$FAKE"
printf '%s\x1f' "$@" >>calls
echo >>calls
case " $* " in
  *' describe '*)
    read -r state <states
    (($(grep -c . states) == 1)) || sed -i 1d states
    [[ $state == ABSENT ]] && { echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; }
    echo "$state"
    ;;
  *' scp '*)
    mkdir -p home/perl_jax/.venv/bin
    printf '#!/usr/bin/env bash\necho "$@" >>"$FAKE/installed"\n' >home/perl_jax/.venv/bin/python
    chmod +x home/perl_jax/.venv/bin/python
    case $6 in
      *:perl_jax.tar.gz) cp "$5" home/perl_jax.tar.gz ;;
      *) cp "$5" "home/${6#*:}" && chmod 644 "home/${6#*:}" ;;
    esac
    ;;
  *' ssh '*) cd home && HOME=$PWD exec bash -c "${!#}" ;;
esac
"""


def on_fake_slice(
    folder: pathlib.Path,
    tools: pathlib.Path,
    states: list[str],
    *arguments: str,
    variables: dict[str, str] | None = None,
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """tpu_vm.sh, and what it asked of gcloud: the verbs, in order."""
    (folder / "home").mkdir()
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    tool(folder, "gcloud", GCLOUD)
    env = environment(folder, tools, FAKE=str(folder), TMPDIR=str(folder)) | (variables or {})
    result = call("tpu_vm.sh", *TPU_VM, "--poll=0", *arguments, env=env)
    verbs = []
    for line in (folder / "calls").read_text().splitlines():
        words = line.split("\x1f")
        verb = next(
            word for word in words if word in ("create", "delete", "describe", "scp", "ssh")
        )
        if verb == "ssh":
            verb = next(
                action
                for action in ("install", "mkdir", "run", "setup")
                if action in words[-2].split(" -- ")[0]
            )
        if verb != "describe":
            verbs.append(verb)
    return result, verbs


def counting(folder: pathlib.Path, *statuses: int) -> list[str]:
    """A command that ends with the first status at its first start, and so on."""
    return python(
        f"import pathlib, sys; count = pathlib.Path({str(folder / 'count')!r}); "
        f"count.open('a').write('x'); sys.exit({statuses}[len(count.read_text()) - 1])"
    )


def test_tpu_vm_creates_installs_runs_and_deletes(tools, tmp_path):
    states = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    code = "import sys; print('ran', sys.argv[1:])"
    result, verbs = on_fake_slice(
        tmp_path, tools, states, "--setup=: setup", "--delete", "--", *python(code), *WORDS
    )
    assert result.returncode == 0 and f"] ran {WORDS}\n" in result.stdout, result.stderr
    assert verbs == ["create", "scp", "install", "setup", "run", "delete"]
    assert (
        (tmp_path / "installed").read_text()
        == "-m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[tpu,gcs]\n"
    )
    assert (tmp_path / "home/perl_jax/perl_jax/__main__.py").exists() and not (
        tmp_path / "home/perl_jax/.git"
    ).exists()


def test_values_reach_the_run_and_nothing_else(tools, tmp_path):
    """A run that fails once and is started again; then no file has them any more."""
    seen = tmp_path / "seen"
    code = (
        f"import os, pathlib, sys; seen = pathlib.Path({str(seen)!r}); "
        "seen.open('a').write(os.environ['HF_TOKEN'] + '|' + os.environ['WANDB'] + '|'); "
        "sys.exit(1 if seen.read_text().count('|') < 4 else 0)"
    )
    result, verbs = on_fake_slice(
        tmp_path,
        tools,
        ["ACTIVE"],
        "--env=HF_TOKEN",
        "--env",
        "WANDB",
        "--",
        *python(code),
        variables={"HF_TOKEN": VALUE, "WANDB": "w", "TMPDIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    assert verbs == ["scp", "install", "mkdir", "scp", "run", "run"]
    assert seen.read_text() == f"{VALUE}|w|" * 2
    calls = (tmp_path / "calls").read_text()
    assert "--env HF_TOKEN --env WANDB -- " in calls
    assert "Secret" not in calls + result.stdout + result.stderr
    seen.unlink()
    copied = tmp_path / "home/perl_jax"
    kept = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and not path.is_symlink() and copied not in path.parents
    ]
    assert kept
    assert not [path for path in kept if b"hf_Secret" in path.read_bytes()]
    assert (tmp_path / "home/.perl_jax_launch/rl-1").stat().st_mode & 0o777 == 0o700


def test_worker_says_which_variable_it_was_not_given(tools, tmp_path):
    command = ("run", "rl-1", "--env", "HF_TOKEN", "--", *python("pass"))
    result = worker(*command, home=tmp_path, tools=tools)
    assert result.returncode == 2
    assert "HF_TOKEN is not set here, and --env HF_TOKEN asks for it" in result.stderr
    given = environment(tools, HF_TOKEN="x") | {"HOME": str(tmp_path)}
    assert call("on_worker.sh", *command, env=given).returncode == 0


def test_tpu_vm_comes_back_after_a_preemption(tools, tmp_path):
    """The run is cut off; the resource goes through SUSPENDING to SUSPENDED, is made again, and the
    same command ends well.
    """
    states = ["ACTIVE", "SUSPENDING", "SUSPENDED", "ABSENT", "CREATING", "ACTIVE"]
    result, verbs = on_fake_slice(
        tmp_path, tools, states, "--restarts=0", "--", *counting(tmp_path, 255, 0)
    )
    assert result.returncode == 0, result.stderr
    assert verbs == ["scp", "install", "run", "delete", "create", "scp", "install", "run"]
    assert "the slice was taken back; asking for it again." in result.stderr


@pytest.mark.parametrize(
    ("states", "statuses", "status", "expected"),
    [
        (["ACTIVE"], (1, 0), 0, ["scp", "install", "run", "run"]),
        (["ACTIVE"], (1, 1), 1, ["scp", "install", "run", "run"]),
        (["ACTIVE"], (2,), 2, ["scp", "install", "run"]),
        (["ACTIVE"], (143,), 143, ["scp", "install", "run"]),
        (["FAILED", "ABSENT", "ACTIVE"], (0,), 0, ["delete", "create", "scp", "install", "run"]),
        (["ABSENT", "FAILED"], (), 1, ["create"]),
    ],
    ids=[
        "a failure",
        "failures",
        "the user's error",
        "told to stop",
        "an old failed request",
        "a request that fails",
    ],
)
def test_tpu_vm_goes_on_as_the_status_says(states, statuses, status, expected, tools, tmp_path):
    result, verbs = on_fake_slice(
        tmp_path, tools, states, "--restarts=1", "--", *counting(tmp_path, *statuses)
    )
    assert (result.returncode, verbs) == (status, expected), result.stderr


def test_tpu_vm_leaves_the_run_going_when_it_is_told_to_end(tools, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "states").write_text("ACTIVE\n")
    tool(tmp_path, "gcloud", GCLOUD)
    env = environment(tmp_path, tools, FAKE=str(tmp_path), TMPDIR=str(tmp_path))
    command = [*TPU_VM, "--poll=0", "--", *python("import time; print('ready'); time.sleep(300)")]
    with started("tpu_vm.sh", *command, env=env) as launcher:
        assert launcher.stdout.readline().endswith("] ready\n")
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 143 and "the run goes on" in err
    kept = int((tmp_path / "home/.perl_jax_launch/rl-1/pid").read_text())
    os.kill(kept, 0)
    result = call("tpu_vm.sh", *TPU_VM[:4], "--stop", env=env)
    assert result.returncode == 0 and "'rl-1' has ended with status 143 (SIGTERM)." in result.stderr
    deadline = time.monotonic() + PATIENCE
    while pathlib.Path(f"/proc/{kept}/cwd").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{kept}/cwd").exists()
