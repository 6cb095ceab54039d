"""What the tests share: a small synthetic release, and a workspace in which to run the script on it as a user does."""

import contextlib
import copy
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Before numpy: the threads that it keeps ready take a third of the CPU of each start of Python. And the reader is
# compiled once, whatever the surroundings say.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import h5py
import pytest
import yaml

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "extract_streaming_gdrive.py"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import synthetic_release
from fake_drive import FakeDrive

RCLONE = shutil.which("rclone") or str(Path(sys.executable).parent / "rclone")


def pytest_addoption(parser):
    parser.addoption("--sweep", action="store_true", help="try every moment and every mutation instead of a few")


def pytest_xdist_auto_num_workers():
    """One more than there are cores: many tests wait for a process that waits."""
    return os.cpu_count() + 1


def pytest_configure(config):
    config.option.reportchars += "s"  # names what was skipped and why, in quiet mode too
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as for `pytest &` in a script; the runs would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    """In CI, where Chromium is installed for it, the test of the camera page may not be skipped."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("CI") and "test_cameras.py" in report.nodeid:
        report.outcome, report.longrepr = "failed", f"in CI this may not be skipped: {report.longrepr[2]}"


@pytest.fixture(scope="session")
def sample(request):
    """Give a function of (cases, few): all the cases with --sweep, else so few of them, evenly spread."""
    sweep = request.config.getoption("--sweep")

    def sampled(cases, few):
        cases = list(cases)
        step = 1 if sweep else max(1, len(cases) // few)
        return cases[step // 2 :: step]

    return sampled


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """0018 with its six speech performances and 0019 with three, small; not to be changed."""
    folder = tmp_path_factory.mktemp("release")
    options = {"frames": 6, "size": (128, 153)}
    synthetic_release.write_subject(folder, "0018", **options)
    synthetic_release.write_subject(folder, "0019", performances=synthetic_release.SPEECH[:3], **options)
    return folder


@pytest.fixture(scope="session")
def three_subjects(tmp_path_factory):
    """0018, 0019 and 0026 with s1_all, s2_all and s3_all, each of a few tiny pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("three")
    performances = synthetic_release.SPEECH[:3]
    synthetic_release.write_release(
        folder, ("0018", "0019", "0026"), performances=performances, **synthetic_release.TINY
    )
    return folder


@pytest.fixture
def workspace(tmp_path, release):
    return Workspace(tmp_path / "work", release)


@pytest.fixture(scope="session")
def long_release(tmp_path_factory):
    """s1_all and s3_all of 0018; the extraction of the first takes long enough to be disturbed. Not to be changed."""
    folder = tmp_path_factory.mktemp("long")
    for performance, frames in (("s1_all", 2000), ("s3_all", 2)):
        path = folder / f"0018/0018_{performance}_raw.smc"
        synthetic_release.write_smc(path, "0018", performance, frame_ids=range(frames), size=(32, 38), distinct=1)
    return folder


@pytest.fixture
def drive(three_subjects):
    with FakeDrive(three_subjects) as drive:
        yield drive


STARTED = []  # runs that a test has not waited for


@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture
def small_disk(tmp_path):
    """Give a function that mounts a tmpfs of so many MB under a name in tmp_path, with options such as nr_inodes=50."""
    with contextlib.ExitStack() as disks:
        yield lambda name, megabytes, *options: disks.enter_context(mounted_disk(tmp_path / name, megabytes, options))


@contextlib.contextmanager
def mounted_disk(folder, megabytes, options):
    folder.mkdir(parents=True)
    options = ",".join([f"size={int(megabytes * 1e6)}", *options])
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


class Workspace:
    """A folder with a config.yaml and an rclone.conf whose remote "demo" is an alias of a local release."""

    python = sys.executable

    def __init__(self, folder, release):
        self.folder, self.release = Path(folder), Path(release)
        self.folder.mkdir(parents=True)
        (self.folder / "rclone.conf").write_text(f"[demo]\ntype = alias\nremote = {self.release}\n")
        self.settings = {
            "google_drive": {"root_folder_id": "", "remote_name": "demo", "rclone_flags": ["--config", "rclone.conf"]},
            "extraction": {"subjects": ["0018"]},
            "storage": {"temp_dir": "temp_smc", "output_dir": "subjects", "max_temp_size_gb": 1, "min_free_gb": 0},
            "processing": {"workers": 2},
        }
        self.write_config()

    def write_config(self, **changes):
        """Change settings, such as extraction={"cameras": [25]}, and write the config."""
        for section, values in changes.items():
            self.settings.setdefault(section, {}).update(values)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.settings))

    def command(self, *arguments):
        return [self.python, str(SCRIPT), "--config", str(self.folder / "config.yaml"), *arguments]

    def run(self, *arguments, expect=0, environment=None, timeout=300, before=(), **options):
        """Run the script; its exit code has to be `expect`, or one of them. Gives what it printed: `out`, `err`, `said`."""
        options = {"capture_output": True, "timeout": timeout, **self.surroundings(environment), **options}
        done = subprocess.run([*before, *self.command(*arguments)], check=False, **options)
        done.out, done.err, done.said = done.stdout, done.stderr, done.stdout + done.stderr
        assert done.returncode in (expect if isinstance(expect, tuple) else (expect,)), done.said
        assert "Traceback" not in done.said, done.said
        return done

    def start(self, *arguments, environment=None, **options):
        """Start the script and don't wait for it."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **self.surroundings(environment), **options}
        STARTED.append(subprocess.Popen(self.command(*arguments), **options))
        return STARTED[-1]

    def count_calls(self, *arguments):
        """How many calls of Python functions a run takes: the same on every machine."""
        folder = self.folder.parent / "count_calls"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(COUNT_CALLS)
        self.run(*arguments, environment={"PYTHONPATH": str(folder), "CALLS": str(folder / "calls")})
        return int((folder / "calls").read_text())

    def surroundings(self, environment):
        return {"text": True, "env": {**os.environ, **(environment or {})}, "cwd": self.folder.parent}

    def copy(self, folder):
        """A copy of it and of all that it has extracted, to go on with. `folder` is one that is not there yet."""
        copied = type(self).__new__(type(self))
        copied.__dict__ = {**self.__dict__, "folder": Path(folder), "settings": copy.deepcopy(self.settings)}
        shutil.copytree(self.folder, folder)
        return copied

    @property
    def manifest(self):
        return self.folder / self.settings["storage"].get("manifest", "MANIFEST.csv")

    def rclone_calls(self, command):
        """How often the last run has called rclone with a command such as "copy"; it logs each call."""
        log = max((self.folder / "logs").iterdir(), key=os.path.getmtime).read_text()
        return len(re.findall(rf"running \S*rclone {command} ", log))

    @property
    def temp(self):
        return self.folder / self.settings["storage"]["temp_dir"]

    @property
    def rows(self):
        """The rows of the manifest, none where there is no file."""
        if not self.manifest.exists():
            return []
        return list(csv.DictReader(self.manifest.read_text().replace("\0", "").splitlines()))

    @property
    def states(self):
        """{(subject, performance): status of the last row}"""
        return {(row["subject"], row["performance"]): row["status"] for row in self.rows}

    def row(self, subject, performance):
        """The last row of a performance; rows come in the order in which the files arrive."""
        return [row for row in self.rows if (row["subject"], row["performance"]) == (subject, performance)][-1]

    def path(self, *names):
        return self.folder.joinpath(self.settings["storage"]["output_dir"], *names)

    def info(self, subject, performance):
        return json.loads(self.path(subject, performance, "metadata", "info.json").read_text())

    def smc(self, subject, performance):
        return self.release / subject / f"{subject}_{performance}_raw.smc"

    def tree(self):
        """{relative path: md5} of the output; the time in info.json, which differs from run to run, left out."""
        return tree(self.path())

    def leftovers(self):
        """What a finished run has no business leaving: SMC files, work in progress, locks."""
        unfinished = [path for pattern in (".*.partial", ".*.old") for path in self.path().rglob(pattern)]
        return [*self.temp.rglob("*"), *unfinished, *self.manifest.parent.glob(f".{self.manifest.name}*")]

    def has_everything(self):
        """Whether all that the config asks for is extracted, each picture as it is stored, and nothing is left over."""
        asked = self.settings["extraction"]
        performances = [(s, p) for s in asked["subjects"] for p in asked["performances"]]
        return (
            self.states == dict.fromkeys(performances, "completed")
            and all(written_pictures(self.path(*which)) == stored_pictures(self.smc(*which)) for which in performances)
            and self.leftovers() == []
        )


class DriveWorkspace(Workspace):
    """A workspace whose remote is a fake Drive that serves the release, by default what the drive's folder has."""

    def __init__(self, folder, drive, release=None):
        super().__init__(folder, release or drive.folder)
        self.drive = drive
        remote = {"remote_name": drive.remote_name, "root_folder_id": drive.root_id, "rclone_flags": []}
        self.write_config(google_drive=remote)

    def surroundings(self, environment):
        return super().surroundings({**self.drive.environment(), **(environment or {})})


def tree(folder):
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if (
                path.name == "info.json"
            ):  # not its time; nor the md5, which a remote without them tells only now and then
                info = json.loads(content)
                sources = [{**source, "md5": None} for source in info["source"]]
                content = json.dumps({**info, "extracted_at": "", "source": sources}).encode()
            found[str(path.relative_to(folder))] = hashlib.md5(content).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "folder"
            assert any(path.iterdir()), f"{path} is an empty folder"
    return found


# Python runs this before the script: it counts the calls of Python functions in the main thread, for CALLS.
COUNT_CALLS = """
import atexit, os, sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call"
def write():
    sys.setprofile(None)
    with open(os.environ["CALLS"], "w") as file:
        file.write(str(calls))
atexit.register(write)
sys.setprofile(count)
"""


def wait_for(condition, seconds=120):
    """Wait until it holds; the time only ends a test that would hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def stored_pictures(*smcs):
    """What plain h5py reads of the pictures and masks in SMC files: {"images/cam_25/frame_000000": bytes}, without
    empty ones, damaged ones and odd names."""
    is_camera, is_frame = re.compile("[0-5][0-9]").fullmatch, re.compile("0|[1-9][0-9]*").fullmatch
    found = {}
    for smc in smcs:
        with h5py.File(smc, "r") as file:
            cameras = []
            with contextlib.suppress(RuntimeError):  # the group of them all is damaged
                cameras = list(filter(is_camera, file.get("Camera", ())))
            for camera in cameras:
                for group, modality in (("color", "images"), ("mask", "masks")):
                    with contextlib.suppress(KeyError, RuntimeError, OSError, AttributeError):  # it is damaged
                        pictures = file[f"Camera/{camera}"].get(group, {})
                        for frame in filter(is_frame, pictures):
                            with contextlib.suppress(KeyError, RuntimeError, OSError, AttributeError):
                                if content := pictures[frame][()].tobytes():
                                    found[f"{modality}/cam_{camera}/frame_{int(frame):06d}"] = content
    return found


def written_pictures(folder):
    """The same of an extracted performance."""
    paths = [path for kind in ("images", "masks") for path in Path(folder).glob(f"{kind}/*/*")]
    return {str(path.relative_to(folder).with_suffix("")): path.read_bytes() for path in paths}
