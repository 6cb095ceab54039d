"""Faults of the machine, the account and the network: they cost no data and no download, and no file is blamed."""

import errno
import fcntl
import os
import pty
import resource
import shutil
import signal
import subprocess
import time

import pytest
import synthetic_release
from conftest import SCRIPT, DriveWorkspace, Workspace, wait_for
from fake_drive import FakeDrive
from machine import extracting, fill, has_ended, immutable, kill_extraction, refusing, without_rights

SUBJECTS = ["0018", "0019", "0026"]
PERFORMANCES = ["s1_all", "s3_all"]
IMPATIENT = ["--low-level-retries", "1", "--retries", "1", "--contimeout", "2s", "--timeout", "5s"]


@pytest.fixture
def workspace(tmp_path, drive):
    return drive_workspace(tmp_path / "work", drive)


def drive_workspace(folder, drive, subjects=("0018",), performances=PERFORMANCES, **storage):
    workspace = DriveWorkspace(folder, drive)
    extraction = {"subjects": list(subjects), "performances": list(performances)}
    workspace.write_config(extraction=extraction, storage=storage)
    return workspace


def downloads(drive, name="*"):
    """How many answers with the content of a file there were."""
    return drive.count("media", name)


def end_of(run):
    """(exit code, what it said) of a run that was started."""
    said = run.communicate(timeout=120)[0]
    assert "Traceback" not in said, said
    return run.returncode, said


# ---- folders that cannot be written


@pytest.mark.parametrize("key", ["output_dir", "temp_dir", "manifest", "log_dir"])
def test_a_read_only_disk_is_refused_before_the_first_byte(workspace, drive, small_disk, key):
    disk = small_disk("disk", 1)
    workspace.write_config(storage={key: str(disk / ("MANIFEST.csv" if key == "manifest" else "folder"))})
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    run = workspace.run(expect=2)
    assert key in run.err and str(disk) in run.err and downloads(drive) == 0 and workspace.rows == []


@pytest.mark.parametrize("key", ["output_dir", "temp_dir"])
def test_a_colleagues_folder_is_refused_before_the_first_byte(workspace, drive, key, tmp_path):
    before = without_rights()
    folder = tmp_path / "colleague"
    folder.mkdir(mode=0o755)
    os.chown(folder, 1234, 1234)
    workspace.write_config(storage={key: str(folder)})
    run = workspace.run(expect=2, before=before)
    assert key in run.err and str(folder) in run.err and downloads(drive) == 0 and workspace.rows == []


def test_a_colleagues_manifest_is_refused_before_the_first_byte(workspace, drive):
    before = without_rights()
    workspace.manifest.write_text("subject,performance,status\n")
    os.chown(workspace.manifest, 1234, 1234)
    run = workspace.run(expect=2, before=before)
    assert "storage.manifest" in run.err and downloads(drive) == 0


def test_a_full_disk_of_the_manifest_stops_the_run_before_the_first_byte(workspace, drive, small_disk):
    disk = small_disk("disk", 1)
    fill(disk)
    workspace.write_config(storage={"manifest": str(disk / "MANIFEST.csv")})
    run = workspace.run(expect=3)
    assert str(disk) in run.err and downloads(drive) == 0


def test_an_output_disk_that_becomes_read_only_stops_the_run_and_keeps_the_downloads(workspace, drive, small_disk):
    disk = small_disk("disk", 50)
    workspace.write_config(storage={"output_dir": str(disk / "subjects")})
    gate = drive.gate("0018_s1_all_raw.smc", 1000)
    run = workspace.start()
    gate.wait()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    gate.release()
    code, said = end_of(run)
    assert code == 3 and str(disk) in said and workspace.rows == []
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    workspace.run()
    assert workspace.has_everything() and downloads(drive) == 2


# ---- what the disk refuses


def test_a_limit_on_the_size_of_a_file_ends_the_run_after_one_download(workspace, drive):
    limit = workspace.smc("0018", "s3_all").stat().st_size // 2
    run = workspace.run(expect=3, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert "0018" in run.err and workspace.rows == []
    assert downloads(drive, "0018_s3_all_raw.smc") <= 1
    workspace.run()
    assert workspace.has_everything()


def test_a_temp_dir_where_times_cannot_be_set_is_no_reason_to_download_twice(workspace, drive):
    """As on a CIFS share that another user has mounted."""
    workspace.run(preexec_fn=refusing("utimensat", errno.EPERM))
    assert workspace.has_everything() and downloads(drive) == 2


@pytest.mark.parametrize("call", ["fsync", "syncfs"])
def test_what_cannot_be_brought_onto_the_disk_is_not_done(workspace, drive, call):
    """A disk that fails when it is to be synced: nothing is put in place before that, nor noted."""
    workspace.run(expect=3, preexec_fn=refusing(call, errno.EIO))
    assert call == "fsync" or (workspace.rows == [] and not workspace.path("0018", "s1_all").exists())
    workspace.run()
    assert workspace.has_everything() and downloads(drive) == 2


def test_inodes_that_are_used_up_are_named_instead_of_the_space(workspace, drive, small_disk):
    disk = small_disk("disk", 50, "nr_inodes=12")
    workspace.write_config(storage={"output_dir": str(disk)})
    run = workspace.run(expect=3)
    assert "inodes" in run.err or "files" in run.err
    assert str(disk) in run.err and downloads(drive) == 2 and workspace.rows == []
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", disk], check=True)
    workspace.run()
    assert workspace.has_everything() and downloads(drive) == 2


def test_min_free_gb_is_looked_at_while_rclone_writes(workspace, drive, small_disk):
    disk = small_disk("disk", 10)
    workspace.write_config(storage={"temp_dir": str(disk), "min_free_gb": 0.005})
    gate = drive.gate("0018_s1_all_raw.smc", 1000)
    run = workspace.start()
    gate.wait()
    fill(disk, leave=3_000_000)
    code, said = end_of(run)  # the gate still holds the answer
    assert code == 3 and "min_free_gb" in said and workspace.rows == []
    gate.release()
    (disk / "filler").unlink()
    workspace.run()
    assert workspace.has_everything()


def test_min_free_gb_is_looked_at_while_pictures_are_written(workspace, drive, small_disk):
    disk = small_disk("disk", 10)
    workspace.write_config(storage={"output_dir": str(disk), "min_free_gb": 0.005})
    with open(workspace.manifest, "a") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)  # the row of s1_all waits, and s3_all with it
        run = workspace.start()
        wait_for(lambda: workspace.path("0018", "s1_all").exists() or run.poll() is not None)
        fill(disk, leave=3_000_000)
    code, said = end_of(run)
    assert code == 3 and "min_free_gb" in said and workspace.states == {("0018", "s1_all"): "completed"}
    (disk / "filler").unlink()
    workspace.run()
    assert workspace.has_everything() and downloads(drive) == 2


def test_two_runs_that_download_at_once_keep_min_free_gb_together(tmp_path, small_disk):
    """For each alone there is room."""
    options = {"performances": ["s1_all"], "frames": 30, "size": (64, 76), "jpeg_bytes": 80_000, "distinct": 1}
    paths = synthetic_release.write_release(tmp_path / "release", SUBJECTS[:2], **options)
    size = paths[0].stat().st_size
    storage = {"temp_dir": str(small_disk("disk", 2.2 * size / 1e6)), "min_free_gb": 0.7 * size / 1e9}
    with FakeDrive(tmp_path / "release", bandwidth=size / 2) as drive:
        workspaces = [drive_workspace(tmp_path / s, drive, [s], ["s1_all"], **storage) for s in SUBJECTS[:2]]
        for workspace in workspaces:
            workspace.write_config(google_drive={"rclone_flags": ["--local-no-preallocate"]})
        gates = [drive.gate(path.name, 100) for path in paths]
        runs = [workspace.start() for workspace in workspaces]
        for gate in gates:
            gate.wait()
        for gate in gates:
            gate.release()
        ends = [end_of(run) for run in runs]
        assert 3 in [code for code, _ in ends] and {code for code, _ in ends} <= {0, 3}, ends
        assert all("min_free_gb" in said for code, said in ends if code)
        drive.bandwidth = None
        for workspace in [*workspaces, *workspaces]:  # what one of them has kept may leave no room for the other
            workspace.run(expect=(0, 3))
        assert all(workspace.has_everything() for workspace in workspaces)


# ---- processes that are killed


@pytest.fixture
def long_run(tmp_path, long_release):
    workspace = Workspace(tmp_path / "work", long_release)
    workspace.write_config(extraction={"performances": PERFORMANCES})
    return workspace


def test_an_extraction_that_is_killed_once_is_done_again(long_run):
    run = long_run.start()
    assert kill_extraction(run)
    code, said = end_of(run)
    assert code == 0 and long_run.has_everything(), said


def test_an_extraction_that_is_killed_each_time_stops_the_run_and_blames_the_memory(long_run):
    run = long_run.start()
    killed = []
    while child := kill_extraction(run):
        killed.append(child)
        wait_for(lambda: extracting(run) != killed[-1])
    code, said = end_of(run)
    assert killed and code == 3 and "memory" in said and long_run.rows == []
    assert (long_run.temp / "0018/0018_s1_all_raw.smc").exists()
    long_run.run()
    assert long_run.has_everything()


def test_an_extraction_that_crashes_is_the_fault_of_the_file(long_run):
    run = long_run.start()
    assert kill_extraction(run, signal.SIGSEGV)
    code, said = end_of(run)
    assert code == 1 and "0018_s1_all_raw.smc" in said
    assert long_run.states == {("0018", "s1_all"): "failed", ("0018", "s3_all"): "completed"}
    assert long_run.leftovers() == []


def test_a_run_goes_on_with_the_code_that_it_began_with(workspace, drive, tmp_path):
    program = tmp_path / "program"
    program.mkdir()
    for file in (SCRIPT, SCRIPT.with_name("renderme_360_reader_new.py")):
        shutil.copy(file, program)
    workspace.write_config(extraction={"subjects": SUBJECTS})
    gate = drive.gate("0018_s1_all_raw.smc", 1000)
    command = workspace.command()
    command[1] = str(program / SCRIPT.name)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **workspace.surroundings(None)}
    run = subprocess.Popen(command, **options)
    gate.wait()
    for file in program.glob("*.py"):
        file.write_text("raise ImportError('this is another version')\n")
    gate.release()
    code, said = end_of(run)
    assert code == 0 and workspace.has_everything(), said


def test_an_rclone_that_is_killed_is_no_fault_of_the_files(workspace, drive):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        gate = drive.gate("0018_s1_all_raw.smc", 1000)
        run = workspace.start()
        gate.wait()
        (rclone,) = subprocess.check_output(["pgrep", "-P", str(run.pid), "-x", "rclone"], text=True).split()
        os.kill(int(rclone), number)
        code, said = end_of(run)  # the gate still holds the answer
        assert code == 3 and "rclone" in said and workspace.rows == [], said
        gate.release()
    workspace.run()
    assert workspace.has_everything()


# ---- the account and the network


@pytest.mark.parametrize("short_tokens", [True, False], ids=["refresh refused", "401"])
def test_a_login_that_expires_in_the_middle_stops_the_run_with_the_command_that_renews_it(
    tmp_path, three_subjects, short_tokens
):
    with FakeDrive(three_subjects, short_tokens=short_tokens) as drive:
        workspace = drive_workspace(tmp_path / "work", drive, SUBJECTS)
        gate = drive.gate("0019_s1_all_raw.smc", 1000)
        run = workspace.start()
        gate.wait()
        drive.expire_login()
        gate.release()
        code, said = end_of(run)
        assert code == 3 and f"rclone config reconnect {drive.remote_name}:" in said and "{" not in said
        assert set(workspace.states.values()) <= {"completed"} and ("0026", "s1_all") not in workspace.states
        drive.login_expired = False
        workspace.run()
        assert workspace.has_everything() and downloads(drive, "0018*") == 2


@pytest.mark.parametrize("short_tokens", [True, False], ids=["refresh refused", "401"])
def test_a_login_that_has_expired_before_the_run_is_named_with_the_command_that_renews_it(
    tmp_path, three_subjects, short_tokens
):
    with FakeDrive(three_subjects, short_tokens=short_tokens) as drive:
        workspace = drive_workspace(tmp_path / "work", drive)
        drive.expire_login()
        run = workspace.run(expect=3)
        assert f"rclone config reconnect {drive.remote_name}:" in run.err and "{" not in run.err
        assert workspace.rows == [] and drive.count() <= 10


def test_a_network_that_is_gone_for_good_stops_the_run_without_a_row(workspace, drive):
    workspace.write_config(google_drive={"rclone_flags": IMPATIENT}, extraction={"subjects": SUBJECTS})
    gate = drive.gate("0019_s1_all_raw.smc", 1000)
    run = workspace.start()
    gate.wait()
    drive.stop()
    code, _ = end_of(run)
    assert code == 3 and set(workspace.states) <= {("0018", p) for p in PERFORMANCES}
    assert set(workspace.states.values()) <= {"completed"}
    drive.start()
    workspace.run()
    assert workspace.has_everything()


def test_a_network_that_is_gone_before_the_run_is_one_message(workspace, drive):
    workspace.write_config(google_drive={"rclone_flags": IMPATIENT})
    drive.stop()
    workspace.run(expect=3)
    assert workspace.rows == []


def test_a_daily_limit_of_the_account_stops_the_run_without_a_row(workspace, drive):
    workspace.write_config(google_drive={"rclone_flags": IMPATIENT}, extraction={"subjects": SUBJECTS})
    fault = drive.fault("*", "dailyLimitExceeded")
    run = workspace.run(expect=3)
    assert "dailyLimitExceeded" in run.err or "Daily Limit" in run.err
    assert workspace.rows == [] and downloads(drive) <= 8
    fault.clear()
    workspace.run()
    assert workspace.has_everything()


def test_a_file_that_may_not_be_downloaded_costs_itself_alone(workspace, drive):
    kinds = dict(zip(SUBJECTS, ("insufficientFilePermissions", "cannotDownloadFile", "404")))
    faults = [drive.fault(f"{subject}_s1_all_raw.smc", kind, on="media") for subject, kind in kinds.items()]
    workspace.write_config(extraction={"subjects": SUBJECTS})
    run = workspace.run(expect=1)
    for subject in SUBJECTS:
        states = {performance: state for (each, performance), state in workspace.states.items() if each == subject}
        assert states == {"s1_all": "download_failed", "s3_all": "completed"} and f"{subject} s1_all" in run.err
    for fault in faults:
        fault.clear()
    workspace.run()
    assert workspace.has_everything() and downloads(drive, "*_s3_all_raw.smc") == 3


@pytest.fixture
def pair_drive(tmp_path):
    """A fake Drive with one performance in two files."""
    options = {"layout": "pair", "performances": ["s1_all"], "frames": 2, "size": (64, 76), "cameras": (0, 25)}
    synthetic_release.write_subject(tmp_path / "release", "0018", **options)
    with FakeDrive(tmp_path / "release") as drive:
        yield drive


@pytest.fixture
def pair(tmp_path, pair_drive):
    """A workspace that asks for it."""
    workspace = drive_workspace(tmp_path / "work", pair_drive, performances=["s1_all"])
    workspace.write_config(google_drive={"layout": "pair"})
    return workspace


def test_of_a_pair_one_file_may_be_refused_and_the_quota_of_the_other_used_up(pair, pair_drive):
    pair_drive.fault("*_raw.smc", "cannotDownloadFile", on="media")
    pair_drive.fault("*_anno.smc", "downloadQuotaExceeded")
    pair.run(expect=1)
    assert pair.states == {("0018", "s1_all"): "quota_exceeded"}


def test_of_a_pair_with_a_used_up_quota_the_other_file_stays(pair, pair_drive):
    pair_drive.fault("*_anno.smc", "cut", after_bytes=1000, times=1)
    fault, gate = pair_drive.fault("*_anno.smc", "downloadQuotaExceeded"), pair_drive.gate("*_anno.smc", 500)
    raw = pair.temp / "raw/0018/0018_s1_all_raw.smc"
    run = pair.start()
    gate.wait()
    wait_for(lambda: raw.exists())
    gate.release()  # it is cut then, and the rest is refused
    code, said = end_of(run)
    assert code == 1 and pair.states == {("0018", "s1_all"): "quota_exceeded"} and raw.exists(), said
    pair.run(expect=1)
    assert raw.exists() and downloads(pair_drive, "*_raw.smc") == 1
    fault.clear()
    pair.run()
    assert pair.states == {("0018", "s1_all"): "completed"} and pair.leftovers() == []
    assert downloads(pair_drive, "*_raw.smc") == 1


def test_of_a_pair_with_the_annotations_alone_masks_of_cameras_that_are_added_come(tmp_path):
    release = tmp_path / "release"
    options = {"layout": "pair", "performances": ["s1_all"], "frames": 2, "size": (64, 76), "cameras": (24, 25)}
    synthetic_release.write_subject(release, "0018", **options)
    shutil.rmtree(release / "raw")
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(
        google_drive={"layout": "pair"},
        extraction={"performances": ["s1_all"], "cameras": [25], "modalities": ["masks"]},
    )
    workspace.run()
    workspace.write_config(extraction={"cameras": [24, 25]})
    workspace.run()
    masks = workspace.path("0018", "s1_all", "masks")
    assert sorted(path.name for path in masks.iterdir()) == ["cam_24", "cam_25"] and len(workspace.rows) == 2
    workspace.run()
    assert len(workspace.rows) == 2


# ---- a file that is damaged on the remote


def test_a_file_that_is_damaged_on_the_remote_is_downloaded_once(tmp_path, three_subjects):
    release = tmp_path / "release"
    shutil.copytree(three_subjects, release)
    damaged = release / "0018/0018_s1_all_raw.smc"
    healthy = damaged.read_bytes()
    damaged.write_bytes(b"no HDF5" * 1000)
    with FakeDrive(release) as drive:
        workspace = drive_workspace(tmp_path / "work", drive)
        for _ in range(2):
            run = workspace.run(expect=1)
            assert "0018 s1_all" in run.said and downloads(drive, damaged.name) == 1
        row = workspace.row("0018", "s1_all")
        assert row["status"] == "failed" and len(workspace.rows) == 2
        assert (row["smc_id"], int(row["smc_bytes"])) == (drive.metadata("0018/" + damaged.name)["md5Checksum"], 7000)
        workspace.run("--redo", "--subject", "0018", expect=1)
        assert downloads(drive, damaged.name) == 2
        damaged.write_bytes(healthy)
        workspace.run()
        assert workspace.has_everything() and downloads(drive, damaged.name) == 3


def test_a_damaged_file_is_downloaded_again_when_its_size_or_its_time_is_another(tmp_path, three_subjects):
    """Of a remote that knows no md5 without reading the files, which here is a folder: s1_all gets another size, s3_all
    another time."""
    release = tmp_path / "release"
    shutil.copytree(three_subjects, release)
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(extraction={"performances": PERFORMANCES})
    paths = [workspace.smc("0018", performance) for performance in PERFORMANCES]
    healthy, times = [path.read_bytes() for path in paths], [path.stat().st_mtime_ns for path in paths]
    for path, size, time_ns in zip(paths, (1000, len(healthy[1])), times):
        path.write_bytes(b"no HDF5".ljust(size))
        os.utime(path, ns=(time_ns, time_ns))
    for _ in range(2):
        workspace.run(expect=1)
        assert [row["status"] for row in workspace.rows] == ["failed", "failed"]
    for path, content, time_ns in zip(paths, healthy, (times[0], times[1] + 10**9)):
        path.write_bytes(content)
        os.utime(path, ns=(time_ns, time_ns))
    workspace.run()
    assert workspace.has_everything()


# ---- the record


def test_a_lost_manifest_comes_back_from_the_folders(workspace, drive):
    workspace.run()
    before, old = downloads(drive), {(row["subject"], row["performance"]): row for row in workspace.rows}
    workspace.manifest.unlink()
    mine = workspace.path("0018", "s1_all", "images", "my notes.txt")
    mine.write_text("mine")
    trees = workspace.tree()
    workspace.run()
    assert workspace.tree() == trees and mine.read_text() == "mine" and downloads(drive) == before
    assert workspace.states == dict.fromkeys(old, "completed")
    for key, row in old.items():
        new = workspace.row(*key)
        for column in ("frames", "cameras", "cameras_available", "cameras_extracted"):
            assert new[column] == row[column], column
    workspace.run()
    assert len(workspace.rows) == 2 and downloads(drive) == before


def test_folders_that_lack_something_asked_for_are_taken_over_and_then_completed(workspace, drive):
    workspace.write_config(extraction={"cameras": [25], "performances": ["s3_all"]})
    workspace.run()
    workspace.manifest.unlink()
    workspace.write_config(extraction={"cameras": [0]})
    workspace.run()
    assert workspace.row("0018", "s3_all")["cameras"] == "0 25" and workspace.leftovers() == []


def test_a_folder_that_says_it_is_of_another_performance_is_not_taken_over(workspace, drive):
    """Somebody has copied s1_all to s3_all, and to another subject."""
    workspace.write_config(extraction={"subjects": SUBJECTS[:2]})
    workspace.run()
    workspace.manifest.unlink()
    for subject, performance in (("0018", "s3_all"), ("0019", "s1_all")):
        shutil.rmtree(workspace.path(subject, performance))
        shutil.copytree(workspace.path("0018", "s1_all"), workspace.path(subject, performance))
    workspace.run()
    assert workspace.has_everything() and downloads(drive) == 6
    assert all(workspace.info(*which)["performance"] == which[1] for which in workspace.states)


def test_a_manifest_that_excel_for_mac_has_saved_still_counts(workspace, drive):
    workspace.run()
    rows = workspace.rows
    workspace.manifest.write_bytes(workspace.manifest.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r"))
    before = workspace.manifest.read_bytes()
    workspace.run()
    assert downloads(drive) == 2 and workspace.manifest.read_bytes() == before
    workspace.write_config(extraction={"subjects": SUBJECTS[:2]})
    workspace.run()
    assert workspace.has_everything() and workspace.rows[:2] == rows and downloads(drive) == 4


def test_a_link_to_a_shared_manifest_of_eight_columns_stays_one(workspace, drive, tmp_path):
    shared = tmp_path / "lab" / "manifest of the lab.csv"
    shared.parent.mkdir()
    shared.write_text(
        "subject,performance,status,cameras_extracted,frames,size_gb,timestamp,error\n18,s1_all,completed,1,6,0.1,2025,\n"
    )
    os.chown(shared, 1234, 2345)
    shared.chmod(0o664)
    workspace.manifest.symlink_to(shared)
    workspace.run()
    status = shared.stat()
    assert workspace.manifest.is_symlink() and workspace.manifest.readlink() == shared
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 2345, 0o664)
    assert downloads(drive) == 1 and not workspace.path("0018", "s1_all").exists()
    with open(shared) as file:
        assert len(file.readline().split(",")) == 15
    assert {p: state for (_, p), state in workspace.states.items()}["s3_all"] == "completed"
    assert list(shared.parent.iterdir()) == [shared]
    workspace.run()
    assert downloads(drive) == 1


# ---- what others have in these folders


def people_put(workspace):
    """Folders and files of people, with names that look like ours. {path: content}"""
    mine = {
        workspace.path(name): f"{name} is mine"
        for name in (
            "0018/notes.old/notes.txt",
            "0018/s1_all.old/images/frame.jpg",
            "0018/mywork.partial/half.txt",
            "0018/labels.partial",
            "0018/s3_all.partial/x",
            "0018/.mine.txt",
            "mine.partial/x",
        )
    }
    for path, content in mine.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return mine


def test_peoples_own_folders_are_never_touched(workspace, drive):
    mine = people_put(workspace)

    def are_untouched():
        return all(path.read_text() == content for path, content in mine.items())

    gate = drive.gate("0018_s1_all_raw.smc", 1000)
    run = workspace.start()
    gate.wait()
    run.kill()
    run.communicate(timeout=60)
    assert are_untouched()
    gate.release()
    workspace.run()
    assert are_untouched() and set(workspace.states.values()) == {"completed"} and workspace.leftovers() == []
    workspace.run("--redo", "--subject", "0018")
    assert are_untouched() and workspace.leftovers() == []


def test_peoples_own_folders_outlive_a_run_that_is_killed_while_it_extracts(tmp_path, long_release):
    workspace = Workspace(tmp_path / "work", long_release)
    workspace.write_config(extraction={"performances": PERFORMANCES})
    mine = people_put(workspace)
    run = workspace.start(start_new_session=True)
    wait_for(lambda: workspace.path("0018", ".s1_all.partial").exists() or run.poll() is not None)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    workspace.run()
    assert all(path.read_text() == content for path, content in mine.items())
    assert set(workspace.states.values()) == {"completed"} and workspace.leftovers() == []


def test_a_leftover_that_cannot_be_deleted_stops_the_run_with_its_path(workspace, drive):
    leftover = workspace.path("0018", ".s1_all.partial", "images", "frame.jpg")
    leftover.parent.mkdir(parents=True)
    leftover.write_text("left over")
    with immutable(leftover):
        run = workspace.run(expect=3)
        assert str(leftover) in run.err and workspace.rows == []
    workspace.run()
    assert workspace.has_everything()


# ---- several runs


def test_two_configs_with_manifests_of_their_own_share_a_temp_dir(tmp_path, drive):
    temp = tmp_path / "temp"
    workspaces = [drive_workspace(tmp_path / name, drive, SUBJECTS, temp_dir=str(temp)) for name in ("one", "two")]
    drive.bandwidth = 600_000  # so that both are at work at once
    ends = [end_of(run) for run in [workspace.start() for workspace in workspaces]]
    assert [code for code, _ in ends] == [0, 0], ends
    assert all(workspace.has_everything() for workspace in workspaces)


def test_a_run_leaves_what_another_has_in_a_shared_temp_dir(tmp_path, drive):
    """The first downloads one subject while the second begins and ends with another."""
    temp = tmp_path / "temp"
    first = drive_workspace(tmp_path / "first", drive, ["0018"], temp_dir=str(temp))
    second = drive_workspace(tmp_path / "second", drive, ["0019"], temp_dir=str(temp))
    gate = drive.gate("0018_s3_all_raw.smc", 1000)
    run = first.start()
    gate.wait()
    second.run()
    gate.release()
    code, said = end_of(run)
    assert code == 0 and first.has_everything() and second.has_everything(), said
    assert downloads(drive) == 4


def test_three_processes_with_redo_do_each_subject_once(workspace, drive):
    workspace.write_config(extraction={"subjects": SUBJECTS, "performances": ["s1_all"]})
    workspace.run()
    before = workspace.tree()
    gates = [drive.gate(f"{subject}_s1_all_raw.smc", 1000) for subject in SUBJECTS]
    runs = [workspace.start("--redo", "--subject", *SUBJECTS) for _ in range(3)]
    wait_for(lambda: len(list((workspace.folder / "logs").iterdir())) == 4)
    time.sleep(1)  # all three have begun
    for gate in gates:
        gate.release()
    ends = [end_of(run) for run in runs]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert sorted(row["subject"] for row in workspace.rows[3:]) == SUBJECTS
    assert workspace.tree() == before and workspace.leftovers() == []


def test_a_lock_file_that_is_removed_does_not_end_the_run(workspace, drive):
    gate = drive.gate("0018_s1_all_raw.smc", 1000)
    run = workspace.start()
    gate.wait()
    locks = [path for path in workspace.folder.rglob("*") if "lock" in path.name]
    assert locks
    for lock in locks:
        lock.unlink()
    gate.release()
    code, said = end_of(run)
    assert code == 0 and workspace.has_everything(), said


# ---- signals and the terminal


def test_an_interrupt_during_the_imports_shows_no_traceback(workspace, drive, tmp_path):
    (tmp_path / "yaml.py").write_text("import os, time\nopen(os.environ['IMPORTING'], 'w').close()\ntime.sleep(60)\n")
    run = workspace.start(environment={"PYTHONPATH": str(tmp_path), "IMPORTING": str(tmp_path / "importing")})
    wait_for((tmp_path / "importing").exists)
    run.send_signal(signal.SIGINT)
    code, said = end_of(run)
    assert code == -signal.SIGINT and said == ""


def test_a_signal_to_all_processes_of_an_extraction_is_no_fault_of_the_file(long_run):
    """As Ctrl-C, SLURM and a terminal send it: to the extracting process too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        run = long_run.start(start_new_session=True)
        wait_for(lambda run=run: extracting(run) or run.poll() is not None)
        os.killpg(run.pid, number)
        code, said = end_of(run)
        assert code == 128 + number and long_run.rows == [], said
        wait_for(lambda run=run: has_ended(run))
        assert all(path.name.endswith("_raw.smc") or path.is_dir() for path in long_run.leftovers())
    long_run.run()
    assert long_run.has_everything()


def test_a_signal_that_reaches_an_extraction_is_left_to_the_run(long_run):
    """Which has not got it, and goes on."""
    run = long_run.start()
    assert all(kill_extraction(run, number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    code, said = end_of(run)
    assert code == 0 and long_run.has_everything(), said


def test_nothing_is_written_any_more_where_an_interrupted_extraction_was_removed(long_run):
    for _ in range(3):
        run = long_run.start()
        wait_for(lambda run=run: long_run.path("0018", ".s1_all.partial", "images").exists() or run.poll() is not None)
        run.send_signal(signal.SIGTERM)
        code, said = end_of(run)
        assert code == 143, said
        assert all(path.name.endswith("_raw.smc") or path.name == "0018" for path in long_run.leftovers())


def test_a_hangup_ends_the_run_with_129_and_cleans_up(workspace, drive):
    gate = drive.gate("0018_s1_all_raw.smc", 1000)
    run = workspace.start(start_new_session=True)
    gate.wait()
    run.send_signal(signal.SIGHUP)
    code, said = end_of(run)
    assert code == 129, said
    wait_for(lambda: has_ended(run))
    assert all(path.name.endswith("_raw.smc") or path.is_dir() for path in workspace.leftovers())
    gate.release()
    workspace.run()
    assert workspace.has_everything()


def test_a_hangup_that_nohup_ignores_stays_ignored(workspace, drive):
    gate = drive.gate("0018_s1_all_raw.smc", 1000)
    run = workspace.start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    gate.wait()
    run.send_signal(signal.SIGHUP)
    gate.release()
    code, said = end_of(run)
    assert code == 0 and workspace.has_everything(), said


def test_a_terminal_that_goes_away_does_not_end_the_run(workspace, drive):
    gate = drive.gate("0018_s1_all_raw.smc", 1000)
    ours, terminal = pty.openpty()
    run = workspace.start(stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    gate.wait()
    os.close(ours)
    gate.release()
    assert run.wait(timeout=300) == 0 and workspace.has_everything()
    (log,) = (workspace.folder / "logs").iterdir()
    assert "Summary" in log.read_text() and "Traceback" not in log.read_text()


# Python runs this before the script: the second download does not start before the run ends.
HOLD_SECOND_COPY = """
import os, subprocess, threading
ends, copies = threading.Event(), []
class Popen(subprocess.Popen):
    def __init__(self, call, *arguments, **options):
        if "copy" in call:
            copies.append(call)
            if len(copies) == 2:
                open(os.environ["HELD"], "w").close()
                ends.wait()
        super().__init__(call, *arguments, **options)
    def kill(self):
        if len(copies) == 2 and threading.current_thread() is threading.main_thread():  # it ends all, and is at its end
            ends.set()
        super().kill()
subprocess.Popen = Popen
"""


def test_a_download_that_starts_while_the_run_ends_is_ended_too(workspace, drive, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HOLD_SECOND_COPY)
    workspace.write_config(extraction={"subjects": SUBJECTS[:2]})
    gate = drive.gate("0019_s1_all_raw.smc", 1000)  # else a download that goes on would come to its end
    run = workspace.start(environment={"PYTHONPATH": str(tmp_path), "HELD": str(tmp_path / "held")})
    wait_for(lambda: (tmp_path / "held").exists() or run.poll() is not None)
    run.send_signal(signal.SIGTERM)
    code, said = end_of(run)
    assert code == 143 and downloads(drive, "0019*") == 0 and "failed" not in workspace.states.values(), said
    gate.release()
    workspace.run()
    assert workspace.has_everything()


# ---- what a rerun must not take away


def test_of_a_pair_whose_half_is_gone_from_the_remote_everything_stays(tmp_path):
    release = tmp_path / "release"
    options = {"performances": ["s1_all"], "frames": 2, "size": (64, 76), "cameras": (0, 25)}
    raw, _ = sorted(synthetic_release.write_subject(release, "0018", layout="pair", **options), reverse=True)
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(
        google_drive={"layout": "pair"}, extraction={"performances": ["s1_all"], "modalities": ["images", "audio"]}
    )
    workspace.run()
    before = workspace.tree()
    raw.unlink()
    workspace.write_config(extraction={"modalities": ["images", "audio", "masks"]})
    workspace.run()
    assert workspace.tree() == before and len(workspace.rows) == 1


def test_what_people_put_into_a_folder_outlives_its_replacement(workspace, drive):
    workspace.run()
    (workspace.path("0018", "s1_all") / "my_labels").mkdir()
    (workspace.path("0018", "s1_all") / "my_labels" / "a.txt").write_text("mine")
    workspace.run("--redo", "--subject", "0018")
    assert (workspace.path("0018", "s1_all") / "my_labels" / "a.txt").read_text() == "mine"
    assert workspace.has_everything()


def test_an_smc_of_the_right_size_and_another_content_is_downloaded_again(workspace, drive):
    path = workspace.temp / "0018" / "0018_s1_all_raw.smc"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(workspace.smc("0018", "s1_all").stat().st_size))
    workspace.run()
    assert workspace.has_everything() and downloads(drive) == 2


def test_a_subject_that_is_missing_beside_finished_ones_is_no_wrong_set_up(workspace, drive):
    workspace.write_config(extraction={"subjects": ["0018", "0777"]})
    for _ in range(2):
        run = workspace.run()
        assert "0777" in run.said and workspace.states["0018", "s1_all"] == "completed"
