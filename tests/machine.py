"""What a machine does to a run, for the tests: full disks, calls that the kernel refuses, processes that are killed."""

import contextlib
import ctypes
import os
import platform
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

SYSTEM_CALLS = {"fsync": 74, "utimensat": 280, "syncfs": 306}  # their numbers on x86_64


def fill(folder, leave=0):
    """Fill a disk but for so many bytes, even while others write to it."""
    with open(folder / "filler", "ab", buffering=0) as file:
        try:
            while shutil.disk_usage(folder).free > leave:
                file.write(bytes(max(4096, (shutil.disk_usage(folder).free - leave) // 2)))
        except OSError:
            pass


def without_rights():
    """What to put before a command so that root has no more rights to files than their modes give it."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root, with setpriv, can give away files and rights")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


def refusing(call, error):
    """A preexec_fn after which the kernel refuses a system call with that errno, in the process and all below it."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the numbers of the system calls are those of Linux on x86_64")
    # The filter, in the kernel's packet filter language: load the number; is it this one? Then the errno, else go on.
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, SYSTEM_CALLS[call]), (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)

    def refuse():
        no_new_privileges, set_seccomp, by_filter = 38, 22, 2
        assert code and libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
        assert libc.prctl(set_seccomp, by_filter, program, 0, 0) == 0

    return refuse


@contextlib.contextmanager
def immutable(path):
    """A file that not even root can delete."""
    if subprocess.run(["chattr", "+i", path], check=False, capture_output=True).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        yield path
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


def extracting(run):
    """The process that extracts just now: the one that a run has started, other than rclone, and that has an SMC file
    open. None if there is none."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                files = [os.readlink(file) for file in Path(f"/proc/{child}/fd").iterdir()]
                program = Path(f"/proc/{child}/comm").read_text().strip()
                if program != "rclone" and any(file.endswith(".smc") for file in files):
                    return int(child)
    return None


def kill_extraction(run, number=signal.SIGKILL):
    """Kill the process that extracts, as soon as there is one. Gives its id, None where the run was over before."""
    while run.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if child := extracting(run):
                os.kill(child, number)
                return child
        time.sleep(0.001)
    return None


def has_ended(run):
    """Whether nothing of the session of a run, which was started as one, is left."""
    return subprocess.run(["pgrep", "-s", str(run.pid)], check=False, capture_output=True).returncode == 1
