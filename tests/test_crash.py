"""Whatever ends a run, and when: the next one mends it, and nothing is marked done that is not on disk."""

import itertools
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pexpect
import pytest
import synthetic_release
from conftest import Workspace, tree, wait_for
from machine import has_ended

PERFORMANCES = ["s1_all", "s3_all"]

# Python runs this before the script. Each step that changes something on disk is counted, in the script and in the
# process that it starts; before the one whose number is KILL_AT, the whole process group dies, rclone with it.
COUNT_STEPS = """
import builtins, functools, os, shutil, signal
last = int(os.environ.get("KILL_AT", 0))
def counted(function):
    @functools.wraps(function)
    def step(*arguments, **options):
        counter = os.open(os.environ["STEPS"], os.O_RDWR | os.O_CREAT | os.O_APPEND)  # a child closes what is open
        write(counter, b".")
        if last and os.fstat(counter).st_size >= last:
            os.killpg(0, signal.SIGKILL)
        os.close(counter)
        return function(*arguments, **options)
    return step
write = os.write
for name in "write pwrite ftruncate fsync rename replace unlink rmdir mkdir".split():
    setattr(os, name, counted(getattr(os, name)))
builtins.open = counted(open)
"""


@pytest.fixture(scope="module")
def small_release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    synthetic_release.write_subject(
        folder, "0018", performances=PERFORMANCES, frames=6, size=(64, 76), cameras=(0, 25, 48)
    )
    return folder


@pytest.fixture(scope="module")
def small_pair_release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    synthetic_release.write_subject(
        folder, "0018", layout="pair", performances=PERFORMANCES, frames=2, size=(64, 76), cameras=(0, 25)
    )
    return folder


def new_workspace(folder, release, **extraction):
    workspace = Workspace(folder, release)
    layout = "pair" if (release / "raw").exists() else "single"
    workspace.write_config(google_drive={"layout": layout}, extraction={"performances": PERFORMANCES, **extraction})
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(COUNT_STEPS)
    return workspace


def run_until(workspace, kill_at):
    """Run the script until that step (0: to its end); gives the number of steps."""
    steps = workspace.folder / "steps"
    environment = {"PYTHONPATH": str(workspace.folder / "hook"), "STEPS": str(steps), "KILL_AT": str(kill_at)}
    run = workspace.start(environment=environment, start_new_session=True)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == (-signal.SIGKILL if kill_at else 0), output
    count = steps.stat().st_size
    steps.unlink()
    return count


def check_promises(workspace, reference):
    """What has to hold at every moment: a completed has its whole folder; without the row, the SMC is still
    there."""
    states = workspace.states if workspace.manifest.exists() else {}
    for performance in PERFORMANCES:
        folder = workspace.path("0018", performance)
        if states.get(("0018", performance)) == "completed":
            assert {f"{performance}/{name}" for name in tree(folder)} == {
                n for n in reference if n.startswith(f"{performance}/")
            }
            assert all(reference[f"{performance}/{name}"] == value for name, value in tree(folder).items())
        elif folder.exists():
            smcs = {path.name for path in workspace.release.rglob(f"0018_{performance}_*.smc")}
            assert smcs == {path.name for path in (workspace.folder / "temp_smc").rglob(f"0018_{performance}_*.smc")}


@pytest.mark.parametrize("layout, moments, few", [("small_release", 48, 3), ("small_pair_release", 16, 1)])
def test_a_run_killed_at_any_of_its_steps_is_mended_by_the_next(layout, moments, few, request, tmp_path, sample):
    small_release = request.getfixturevalue(layout)
    undisturbed = new_workspace(tmp_path / "undisturbed", small_release)
    total = run_until(undisturbed, 0)
    reference = tree(undisturbed.path("0018"))
    assert total > moments

    def kill_and_run_again(moment):
        workspace = new_workspace(tmp_path / str(moment), small_release)
        run_until(workspace, 1 + moment * total // moments)
        check_promises(workspace, reference)
        workspace.run()
        assert tree(workspace.path("0018")) == reference, f"after a kill at step {moment} of {moments}"
        assert workspace.leftovers() == [] and workspace.states == undisturbed.states

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(kill_and_run_again, sample(range(moments), few)))


def test_a_redo_killed_at_any_of_its_steps_never_loses_what_was_done(small_release, tmp_path, sample):
    """Adding a camera replaces folders that have their completed row: one of the two is there at every moment."""
    one_camera = new_workspace(tmp_path / "one", small_release, cameras=[25])
    one_camera.run()
    before = tree(one_camera.path("0018"))

    def with_more_cameras(folder, kill_at):
        """A copy of that workspace, and the number of steps of a run for all cameras in it until that one."""
        workspace = new_workspace(tmp_path / folder, small_release)
        shutil.copytree(one_camera.path(), workspace.path())
        shutil.copy(one_camera.manifest, workspace.manifest)
        return workspace, run_until(workspace, kill_at)

    finished, total = with_more_cameras("all", 0)
    reference = tree(finished.path("0018"))

    def kill_and_run_again(moment):
        workspace, _ = with_more_cameras(str(moment), 1 + moment * total // 12)
        for performance in PERFORMANCES:
            folder = workspace.path("0018", performance)
            folder = folder if folder.exists() else workspace.path("0018", f".{performance}.old")
            there = {f"{performance}/{name}": value for name, value in tree(folder).items()}
            assert any(
                there == {n: v for n, v in whole.items() if n.startswith(f"{performance}/")}
                for whole in (before, reference)
            )
        workspace.run()
        assert tree(workspace.path("0018")) == reference and workspace.leftovers() == []

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(kill_and_run_again, sample(range(12), 2)))


# Python runs this before the script, in all its processes: it writes down in which order things come onto the disk.
NOTE_STEPS = """
import builtins, ctypes, functools, os
def noted(function, step):
    @functools.wraps(function)
    def call(*arguments, **options):
        result = function(*arguments, **options)
        if name := step(*arguments):
            notes = os.open(os.environ["STEPS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # a child closes what is open
            os.write(notes, (name + " ").encode())
            os.close(notes)
        return result
    return call
os.rename = noted(os.rename, lambda old, new: "rename")
os.fsync = noted(os.fsync, lambda *arguments: "fsync")
os.unlink = noted(os.unlink, lambda path, *others: "delete" if str(path).endswith(".smc") else "")
builtins.open = noted(open, lambda path, mode="r", *others: "file" if "x" in mode else "")
class Library(ctypes.CDLL):
    def __getitem__(self, name):
        function = super().__getitem__(name)
        return noted(function, lambda *arguments: "sync") if name == "syncfs" else function
ctypes.CDLL = Library
"""


def test_each_step_is_on_the_disk_before_the_next_that_relies_on_it(small_release, tmp_path):
    """The folder before it has its name, its name before the row, and the row before the SMC goes."""
    workspace = new_workspace(tmp_path / "work", small_release)
    workspace.write_config(extraction={"performances": ["s1_all"]})
    (workspace.folder / "hook" / "sitecustomize.py").write_text(NOTE_STEPS)
    steps = workspace.folder / "steps"
    workspace.run(environment={"PYTHONPATH": str(workspace.folder / "hook"), "STEPS": str(steps)})
    in_order = [step for step, _ in itertools.groupby(steps.read_text().split())]
    assert in_order == ["file", "sync", "rename", "sync", "fsync", "delete"]


def test_a_folder_that_a_killed_run_was_replacing_comes_back(small_release, tmp_path):
    """It is the only copy of what the manifest calls completed: nothing would bring it again."""
    workspace = new_workspace(tmp_path / "work", small_release)
    workspace.run()
    before = workspace.tree()
    workspace.path("0018", "s1_all").rename(workspace.path("0018", ".s1_all.old"))
    workspace.run()
    assert workspace.tree() == before and workspace.leftovers() == [] and len(workspace.rows) == 2


@pytest.mark.parametrize(
    "moment, number, code", [("download", signal.SIGTERM, 143), ("extraction", signal.SIGINT, 130)]
)
def test_a_signal_ends_the_run_and_rclone_and_cleans_up(tmp_path, long_release, number, code, moment):
    workspace = Workspace(tmp_path / "work", long_release)
    slow = ["--bwlimit", "500k"] if moment == "download" else []
    workspace.write_config(
        extraction={"performances": ["s1_all"]}, google_drive={"rclone_flags": ["--config", "rclone.conf", *slow]}
    )
    run = workspace.start(start_new_session=True)
    if moment == "download":
        wait_for(lambda: any((workspace.folder / "temp_smc").rglob("*.smc*")))
    else:
        wait_for(lambda: workspace.path("0018", ".s1_all.partial", "images").exists())
    run.send_signal(number)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == code and "run the same command again" in output and "Traceback" not in output
    wait_for(lambda: has_ended(run))
    left = [path for path in workspace.leftovers() if path.is_file()]
    assert all(path.name == "0018_s1_all_raw.smc" for path in left) and len(left) <= 1
    workspace.write_config(google_drive={"rclone_flags": ["--config", "rclone.conf"]})
    workspace.run()
    assert workspace.states == {("0018", "s1_all"): "completed"} and workspace.leftovers() == []


def test_ctrl_c_in_a_terminal_ends_the_run_with_130(tmp_path, release):
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(google_drive={"rclone_flags": ["--config", "rclone.conf", "--bwlimit", "100k"]})
    command = workspace.command()
    terminal = pexpect.spawn(command[0], list(map(str, command[1:])), dimensions=(40, 120), encoding="utf-8")
    terminal.expect("0018 download", timeout=60)
    wait_for(lambda: any((workspace.folder / "temp_smc").rglob("*.smc*")))
    terminal.sendintr()
    terminal.expect(pexpect.EOF, timeout=60)
    terminal.close()
    assert terminal.exitstatus == 130 and "Traceback" not in terminal.before


def test_a_script_killed_alone_takes_rclone_with_it_and_is_mended_by_the_next(tmp_path, release):
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(
        extraction={"performances": ["s3_all"]},
        google_drive={"rclone_flags": ["--config", "rclone.conf", "--bwlimit", "100k"]},
    )
    run = workspace.start(start_new_session=True)
    wait_for(lambda: any((workspace.folder / "temp_smc").rglob("*.smc*")))
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    wait_for(lambda: has_ended(run))
    workspace.write_config(google_drive={"rclone_flags": ["--config", "rclone.conf"]})
    workspace.run()
    assert workspace.states == {("0018", "s3_all"): "completed"} and workspace.leftovers() == []


def test_an_smc_that_is_whole_in_temp_is_not_downloaded_again(tmp_path, release):
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(extraction={"performances": ["s1_all"]})
    held = workspace.folder / "temp_smc/0018/0018_s1_all_raw.smc"
    held.parent.mkdir(parents=True)
    held.write_bytes(workspace.smc("0018", "s1_all").read_bytes())
    workspace.run()
    log = next((workspace.folder / "logs").iterdir()).read_text()
    assert "Copied" not in log and workspace.states == {("0018", "s1_all"): "completed"} and workspace.leftovers() == []


def test_an_smc_of_another_size_in_temp_is_downloaded_again(tmp_path, release):
    """It is one that the remote had before, or a power failure has cut it."""
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(extraction={"performances": ["s1_all"]})
    held = workspace.folder / "temp_smc/0018/0018_s1_all_raw.smc"
    held.parent.mkdir(parents=True)
    held.write_bytes(workspace.smc("0018", "s1_all").read_bytes()[:-1000])
    workspace.run()
    assert workspace.has_everything() and len(workspace.rows) == 1


def test_what_a_crash_left_of_a_finished_subject_is_cleaned_up(tmp_path, release):
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(extraction={"performances": ["s1_all"]})
    workspace.run()
    before = workspace.tree()
    for path in (
        "temp_smc/0018/0018_s1_all_raw.smc",
        "temp_smc/0018/0018_s2_all_raw.smc.3f2a.partial",
        "subjects/0018/.s1_all.partial/x",
        ".MANIFEST.csv.0018.lock",
    ):
        path = workspace.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left over")
    workspace.run()
    assert workspace.leftovers() == [] and workspace.tree() == before and len(workspace.rows) == 1
