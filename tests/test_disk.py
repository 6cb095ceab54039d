"""A disk that fills up, and the limits that keep it from that. Uses a small tmpfs, where mounting one is allowed."""

import contextlib
import fcntl
import glob
import os
import shutil
import time

import h5py
import numpy as np
import pytest
import synthetic_release
from conftest import SCRIPT, Workspace, wait_for
from machine import fill


@pytest.fixture(scope="module")
def big_release(tmp_path_factory):
    """One subject: s1_all and s3_all of some MB each."""
    folder = tmp_path_factory.mktemp("big")
    synthetic_release.write_subject(
        folder,
        "0018",
        performances=["s1_all", "s3_all"],
        frames=40,
        size=(256, 306),
        cameras=(0, 1, 25, 27, 48),
        jpeg_bytes=40_000,
        distinct=2,
    )
    return folder


def test_a_disk_that_fills_during_the_download_stops_the_run_and_a_rerun_finishes(tmp_path, big_release, small_disk):
    temp = small_disk("temp", 30)
    workspace = Workspace(tmp_path / "work", big_release)
    flags = ["--config", "rclone.conf", "--bwlimit", "2M", "--local-no-preallocate"]
    workspace.write_config(
        storage={"temp_dir": str(temp)},
        extraction={"performances": ["s1_all", "s3_all"]},
        google_drive={"rclone_flags": flags},
    )
    run = workspace.start()
    wait_for(lambda: any(temp.rglob("*.smc*")))
    fill(temp, leave=100_000)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 3 and str(temp) in output and "free" in output and "Traceback" not in output
    assert "completed" not in (workspace.manifest.read_text() if workspace.manifest.exists() else "")
    (temp / "filler").unlink()
    workspace.write_config(google_drive={"rclone_flags": flags[:2]})
    workspace.run()
    assert set(workspace.states.values()) == {"completed"} and not any(temp.iterdir())


def test_a_disk_that_fills_during_the_extraction_stops_the_run_and_a_rerun_finishes(tmp_path, big_release, small_disk):
    output_disk = small_disk("output", 16)
    workspace = Workspace(tmp_path / "work", big_release)
    workspace.write_config(
        storage={"output_dir": str(output_disk / "subjects")}, extraction={"performances": ["s1_all", "s3_all"]}
    )
    with open(workspace.manifest, "a") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)  # the row of s1_all waits, and s3_all with it
        run = workspace.start()
        wait_for((output_disk / "subjects/0018/s1_all").exists)
        fill(output_disk, leave=50_000)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 3 and str(output_disk) in said and "free" in said
    assert workspace.states == {("0018", "s1_all"): "completed"}
    assert (
        not list(output_disk.rglob(".*.partial")) and (workspace.folder / "temp_smc/0018/0018_s3_all_raw.smc").exists()
    )
    (output_disk / "filler").unlink()
    workspace.run()
    assert set(workspace.states.values()) == {"completed"} and not any((workspace.folder / "temp_smc").iterdir())


def test_a_disk_that_is_full_when_the_sound_is_written_stops_the_run(tmp_path, release, small_disk):
    """Silence that is compressed in the SMC needs far more room than the SMC."""
    smc = tmp_path / "release/0018/0018_s1_all_raw.smc"
    smc.parent.mkdir(parents=True)
    shutil.copy(release / "0018/0018_s1_all_raw.smc", smc)
    with h5py.File(smc, "r+") as file:
        del file["Camera/00/audio/audio"]
        file.create_dataset("Camera/00/audio/audio", data=np.zeros((48000 * 30, 2), np.float32), compression="gzip")
    output_disk = small_disk("output", 4)
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(storage={"output_dir": str(output_disk)}, extraction={"performances": ["s1_all"]})
    run = workspace.run(expect=3)
    assert str(output_disk) in run.err and "s1_all" in run.err and workspace.rows == []


def test_a_disk_that_is_full_when_the_row_is_written_leaves_no_half_row(tmp_path, release, small_disk):
    record = small_disk("record", 1)
    workspace = Workspace(tmp_path / "work", release)
    workspace.write_config(storage={"manifest": str(record / "MANIFEST.csv")}, extraction={"performances": ["s1_all"]})
    header = (SCRIPT.parent / "MANIFEST.csv").read_text()
    rows = [f"0077,s{n}_all,absent{',' * (header.count(',') - 2)}\n" for n in range(1000)]
    while len(header) < 4096 - 40:  # a row begins in the file's last block and ends in another one
        header += rows.pop()
    before = header.encode()
    (record / "MANIFEST.csv").write_bytes(before)
    with open(record / "MANIFEST.csv") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)  # the row waits until the disk is full
        run = workspace.start()
        wait_for(lambda: workspace.path("0018", "s1_all").exists() or run.poll() is not None)
        fill(record)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 3 and "Stopped" in said and "MANIFEST.csv" in said, said
    assert (record / "MANIFEST.csv").read_bytes() == before and workspace.path("0018", "s1_all").exists()
    (record / "filler").unlink()
    workspace.run()
    assert (record / "MANIFEST.csv").read_text().count("0018,s1_all,completed") == 1


def sizes_in_temp(workspace):
    """Bytes that the SMC files in temp_dir have together just now, while a run comes and goes with them."""
    total = 0
    for path in glob.glob(f"{workspace.folder}/temp_smc/**/*.smc*", recursive=True):
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(path).st_size
    return total


def test_temp_never_holds_more_than_max_temp_size_gb_and_files_go_in_turns(tmp_path):
    """Five files of which two fit at a time, watched while the run goes on."""
    performances = ["s1_all", "s2_all", "s4_all"]
    options = {"frames": 40, "size": (128, 153), "jpeg_bytes": 20_000, "distinct": 1}
    synthetic_release.write_subject(tmp_path / "release", "0018", performances=performances, **options)
    synthetic_release.write_subject(tmp_path / "release", "0019", performances=performances[:2], **options)
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    limit = int(2.5 * workspace.smc("0018", "s1_all").stat().st_size)
    workspace.write_config(
        storage={"max_temp_size_gb": limit / 1e9},
        extraction={"subjects": ["0018", "0019"], "performances": performances},
    )
    run, most = workspace.start(), 0
    while run.poll() is None:
        most = max(most, sizes_in_temp(workspace))
        time.sleep(0.001)
    assert run.returncode == 0, run.stdout.read()
    assert 0 < most <= limit and workspace.leftovers() == []
    assert list(workspace.states.values()).count("completed") == 5
    log = next((workspace.folder / "logs").iterdir()).read_text()
    assert log.count("rclone copy") > 2


def test_a_file_larger_than_the_limit_is_refused_with_the_number_to_set(tmp_path, big_release):
    workspace = Workspace(tmp_path / "work", big_release)
    size = workspace.smc("0018", "s3_all").stat().st_size
    workspace.write_config(storage={"max_temp_size_gb": (size - 1000) / 1e9}, extraction={"performances": ["s3_all"]})
    run = workspace.run(expect=1)
    assert workspace.states["0018", "s3_all"] == "download_failed"
    number = float(run.err.split("max_temp_size_gb to at least ")[1].split()[0])
    workspace.write_config(storage={"max_temp_size_gb": number})
    workspace.run()
    assert workspace.states["0018", "s3_all"] == "completed"


def test_min_free_gb_is_kept_from_the_sizes_in_the_listing(tmp_path, big_release, small_disk):
    disk = small_disk("disk", 30)
    workspace = Workspace(tmp_path / "work", big_release)
    size = sum(workspace.smc("0018", p).stat().st_size for p in ("s1_all", "s3_all"))
    free = shutil.disk_usage(disk).free
    storage = {"temp_dir": str(disk / "temp"), "output_dir": str(disk / "subjects")}
    workspace.write_config(
        storage={**storage, "min_free_gb": (free - size) / 1e9}, extraction={"performances": ["s3_all"]}
    )
    run = workspace.run(expect=3)
    assert (
        "min_free_gb" in run.err
        and "GB free" in run.err
        and not list(disk.rglob("*.smc*"))
        and not list(disk.rglob("images"))
    )
    workspace.write_config(storage={"min_free_gb": (free - 2.2 * size) / 1e9})
    workspace.run()
    assert workspace.states == {("0018", "s3_all"): "completed"}
