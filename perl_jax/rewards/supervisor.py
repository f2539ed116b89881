"""The process between training and a reward function's worker: it ends everything that was started.

A function may start processes that leave its process group, or whose parents end before them. On
Linux such processes become children of the supervisor (a child subreaper), which finds and kills
them. Elsewhere the processes of the worker's group are killed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time

from perl_jax.rewards import worker

LOOK_SECONDS = 1.0  # how often the supervisor looks whether its parent still runs
END_SECONDS = 3.0  # how long it tries to end processes
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl


def main() -> None:
    """Starts the worker and ends with its exit code; `function.Worker` starts this program.

    The program has two arguments: the function (`module:function` or `path/to/file.py:function`),
    and the file descriptor of the worker's end of the pipe. Its standard input is a pipe to which
    nothing is written: its end means that training has ended, even by SIGKILL, or that training
    wants this program to end. Then, and when the worker ends, all that it started is killed.
    """
    target, number = sys.argv[1], int(sys.argv[2])
    parent = os.getppid()
    adopt_orphans()
    # Its other end is held by this process alone, so it tells the worker when this process ends.
    watched, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        os.setpgid(0, 0)
        worker.main(target, number, watched)
        return
    os.close(number)
    os.close(watched)
    with contextlib.suppress(OSError):  # the child has done so, or has ended
        os.setpgid(child, child)
    wait(child, parent)
    end_as(end_all(child))


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parents end; does nothing but on Linux."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def wait(child: int, parent: int) -> None:
    """Returns when the worker has ended, or when this process should end.

    The worker stays a zombie, so that no other process can have its number.

    Args:
        child: The worker.
        parent: The process that started this one.
    """
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while os.getppid() == parent:
        # Other processes are orphans: they are reaped here.
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == child:
                return
            os.waitpid(ended.si_pid, 0)
        ready, _, _ = select.select([0, woken], [], [], LOOK_SECONDS)
        if 0 in ready:
            return
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)


def end_all(child: int) -> int:
    """Kills the worker, its process group and all descendants of this process.

    Returns the worker's status, as `os.waitpid` gives it; 0 if it could not be ended.

    Args:
        child: The worker, which has not been reaped.
    """
    status, latest = 0, time.monotonic() + END_SECONDS
    with contextlib.suppress(OSError):  # on some systems: the group has only zombies
        os.killpg(child, signal.SIGKILL)
    while time.monotonic() < latest:
        for process in descendants():
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if ended[0] == child:
                    status = ended[1]
        except ChildProcessError:
            break  # none is left
        time.sleep(0.005)
    return status


def descendants() -> list[int]:
    """Returns the processes that this process started, those that they started, and so on.

    They are read from Linux's /proc; on other systems the list is empty.
    """
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc") if sys.platform == "linux" else ()):
        # It may have ended since.
        with (
            contextlib.suppress(OSError, ValueError, IndexError),
            open(f"/proc/{name}/stat", "rb") as f,
        ):
            # After the name in parentheses, which may hold anything: the state, and the parent.
            parent = int(f.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found, left = [], [os.getpid()]
    while left:
        below = children.pop(left.pop(), [])
        found += below
        left += below
    return found


def end_as(status: int) -> None:
    """Ends this process as another one has ended: with its exit code, or by its signal.

    Args:
        status: The other's status, as `os.waitpid` gives it.
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker may have left a dump already
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 0)
