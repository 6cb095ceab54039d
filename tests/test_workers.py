"""Several processes with one config share the subjects, with nothing but lock files between them."""

import os
import re
import signal

import pytest
import synthetic_release
from conftest import SCRIPT, Workspace, wait_for

SUBJECTS = [f"{n:04d}" for n in range(100, 105)]


@pytest.fixture(scope="module")
def five_subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    synthetic_release.write_release(folder, SUBJECTS, performances=["s1_all"], frames=4, size=(64, 76))
    return folder


@pytest.fixture
def workspace(tmp_path, five_subjects):
    workspace = Workspace(tmp_path / "work", five_subjects)
    workspace.write_config(extraction={"subjects": SUBJECTS, "performances": ["s1_all"]})
    return workspace


def test_three_processes_do_each_subject_once_and_all_exit_0(workspace):
    runs = [workspace.start() for _ in range(3)]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 3, outputs
    assert sorted(row["subject"] for row in workspace.rows) == SUBJECTS
    assert set(workspace.states.values()) == {"completed"}
    assert all(None not in row.values() and len(row) == 15 for row in workspace.rows)
    assert workspace.leftovers() == []
    assert sum(int(re.search(r"completed +(\d+)", output)[1]) for output in outputs) == 5


def test_the_subject_of_a_killed_process_is_finished_by_the_others(workspace):
    victim = workspace.start(start_new_session=True)
    wait_for(lambda: workspace.manifest.exists() and "0100,s1_all" in workspace.manifest.read_text())
    runs = [workspace.start() for _ in range(2)]
    wait_for(lambda: len(workspace.rows) > 1)
    os.killpg(victim.pid, signal.SIGKILL)
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 2, outputs
    assert set(workspace.states.values()) == {"completed"} and len(workspace.states) == 5
    assert workspace.leftovers() == []


def test_a_file_system_without_locks_is_named_instead_of_pretending(workspace, tmp_path):
    """flock is made to answer as it does on a Lustre mounted without -o flock."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl, os\n"
        "def flock(*a): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\n"
        "fcntl.flock = flock\n"
    )
    run = workspace.run(expect=3, environment={"PYTHONPATH": str(tmp_path)})
    assert ".lock: cannot be locked" in run.err and not workspace.manifest.exists()


def test_what_another_process_has_done_is_seen_although_stat_answers_from_a_cache(workspace, tmp_path):
    """As an NFS client does: what os.stat says of the manifest is what it said first."""
    (tmp_path / "sitecustomize.py").write_text(
        "import functools, os\nreal, known = os.stat, {}\n"
        "def stat(path, *a, **k):\n"
        "    if str(path).endswith('MANIFEST.csv'):\n        return known.setdefault(str(path), real(path, *a, **k))\n"
        "    return real(path, *a, **k)\nos.stat = stat\n"
    )
    workspace.write_config(extraction={"subjects": SUBJECTS[:3]})
    workspace.manifest.write_text((SCRIPT.parent / "MANIFEST.csv").read_text())
    first = workspace.start()
    wait_for(lambda: len(workspace.rows) > 0)
    second = workspace.start(environment={"PYTHONPATH": str(tmp_path)})
    outputs = [run.communicate(timeout=120)[0] for run in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0] and len(workspace.rows) == 3, outputs
