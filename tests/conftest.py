"""What the tests share: a small synthetic release, and a workspace in which to run the script on it as a user does."""

import contextlib
import csv
import hashlib
import json
import os
import re
import resource
import shutil
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

RCLONE = shutil.which("rclone") or str(Path(sys.executable).parent / "rclone")


def pytest_addoption(parser):
    parser.addoption("--sweep", action="store_true", help="try every moment and every mutation instead of a few")


def pytest_xdist_auto_num_workers():
    """One more than there are cores: many tests wait for a process that waits."""
    return os.cpu_count() + 1


def pytest_configure(config):
    config.option.reportchars += "s"  # names what was skipped and why, in quiet mode too


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


@pytest.fixture
def workspace(tmp_path, release):
    return Workspace(tmp_path / "work", release)


class Workspace:
    """A folder with a config.yaml and an rclone.conf whose remote "demo" is an alias of a local release."""

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
        return [sys.executable, str(SCRIPT), "--config", str(self.folder / "config.yaml"), *arguments]

    def run(self, *arguments, expect=0, environment=None, timeout=120):
        """Run the script; its exit code has to be `expect`. Gives what it printed in `out` and `err`."""
        begin, cpu_before = time.monotonic(), cpu_of_children()
        options = {"capture_output": True, "timeout": timeout, **self.surroundings(environment)}
        done = subprocess.run(self.command(*arguments), check=False, **options)
        done.seconds, done.cpu = time.monotonic() - begin, cpu_of_children() - cpu_before
        done.out, done.err = done.stdout, done.stderr
        assert done.returncode == expect, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done

    def start(self, *arguments, environment=None, **options):
        """Start the script and don't wait for it."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **self.surroundings(environment), **options}
        return subprocess.Popen(self.command(*arguments), **options)

    def surroundings(self, environment):
        return {"text": True, "env": {**os.environ, **(environment or {})}, "cwd": self.folder.parent}

    @property
    def manifest(self):
        return self.folder / "MANIFEST.csv"

    @property
    def rows(self):
        return list(csv.DictReader(self.manifest.read_text().replace("\0", "").splitlines()))

    @property
    def states(self):
        """{(subject, performance): status of the last row}"""
        return {(row["subject"], row["performance"]): row["status"] for row in self.rows}

    def row(self, subject, performance):
        """The last row of a performance; rows come in the order in which the files arrive."""
        return [row for row in self.rows if (row["subject"], row["performance"]) == (subject, performance)][-1]

    def path(self, *names):
        return self.folder.joinpath("subjects", *names)

    def info(self, subject, performance):
        return json.loads(self.path(subject, performance, "metadata", "info.json").read_text())

    def smc(self, subject, performance):
        return self.release / subject / f"{subject}_{performance}_raw.smc"

    def tree(self):
        """{relative path: md5} of the output; the time in info.json, which differs from run to run, left out."""
        return tree(self.folder / "subjects")

    def leftovers(self):
        """What a finished run has no business leaving: SMC files, work in progress, locks."""
        patterns = ("temp_smc/**/*", "subjects/**/*.partial", "subjects/**/*.old", ".MANIFEST*")
        return [path for pattern in patterns for path in self.folder.glob(pattern)]


class DriveWorkspace(Workspace):
    """A workspace whose remote is a fake Drive that serves the release."""

    def __init__(self, folder, drive, release):
        super().__init__(folder, release)
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
            if path.name == "info.json":
                content = json.dumps({**json.loads(content), "extracted_at": ""}).encode()
            found[str(path.relative_to(folder))] = hashlib.md5(content).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "folder"
            assert any(path.iterdir()), f"{path} is an empty folder"
    return found


def cpu_of_children():
    """CPU seconds of the processes that have ended, which other work on the machine hardly changes."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def stored_pictures(*smcs):
    """What plain h5py reads of the pictures and masks in SMC files: {"images/cam_25/frame_000000": bytes}, without
    empty ones, damaged ones and odd names."""
    is_camera, is_frame = re.compile("[0-5][0-9]").fullmatch, re.compile("0|[1-9][0-9]*").fullmatch
    found = {}
    for smc in smcs:
        with h5py.File(smc, "r") as file:
            for camera in filter(is_camera, file.get("Camera", ())):
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
