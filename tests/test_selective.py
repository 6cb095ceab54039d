"""`download: selective`: the real rclone against the fake Drive, which counts the bytes that it sends.

The byte counts are those of an s3_all scaled down: 38 views as in the release, with 24 pictures of 20 kB instead of 486
of 0.33 MB, so 20 MB instead of 6 GB. What is read besides the pictures (about 200 small blocks to find out what the
file has) does not shrink with it: the limits here are tighter, relative to the file, than they are for a real one.

    python tests/test_selective.py [MB/s [latency in s]]       a table of times, full and selective, for 1.3 GB
"""

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import synthetic_release
from conftest import DriveWorkspace, Workspace, stored_pictures, wait_for, written_pictures
from fake_drive import FakeDrive
from machine import fill

MB = 1e6
VIEWS = list(synthetic_release.S3_VIEWS)
TWELVE = VIEWS[:12]
SMALL = ["s1_all", "s2_all", "s4_all"]


class SelectiveWorkspace(DriveWorkspace):
    def __init__(self, folder, drive, release):
        super().__init__(folder, drive, release)
        self.write_config(google_drive={"download": "selective"})


def only(name="s3_all", **extraction):
    return {"performances": [name], **extraction}


def stored_bytes(path, cameras):
    """Of the pictures of some cameras, and the audio."""
    with h5py.File(path) as smc:
        pictures = sum(data.size for camera in cameras for data in smc[f"Camera/{camera:02d}/color"].values())
        return pictures + smc["Camera/00/audio/audio"].nbytes


@pytest.fixture(scope="module")
def s3_all(tmp_path_factory):
    """A release with one s3_all of 20 MB; not to be changed."""
    folder = tmp_path_factory.mktemp("large")
    path = folder / "0018/0018_s3_all_raw.smc"
    synthetic_release.write_smc(
        path,
        "0018",
        "s3_all",
        cameras=VIEWS,
        frame_ids=range(24),
        size=(128, 153),
        jpeg_bytes=30000,
        distinct=1,
        audio_seconds=1.6,
    )
    return folder


@pytest.fixture
def large(tmp_path, s3_all):
    with FakeDrive(s3_all) as drive:
        yield SelectiveWorkspace(tmp_path / "work", drive, s3_all)


@pytest.fixture(scope="module")
def small_release(tmp_path_factory):
    """Three performances of camera 24, 1 MB each: of camera 25 they would be copied. Not to be changed."""
    folder = tmp_path_factory.mktemp("small")
    options = {"cameras": [24], "frame_ids": range(30), "size": (128, 153), "jpeg_bytes": 30_000, "audio_seconds": 1}
    for name in SMALL:
        path = folder / f"0018/0018_{name}_raw.smc"
        synthetic_release.write_smc(path, "0018", name, distinct=1, **options)
    return folder


@pytest.fixture
def small(tmp_path, small_release):
    with FakeDrive(small_release) as drive:
        yield small_workspace(tmp_path, drive)


def small_workspace(folder, drive):
    workspace = SelectiveWorkspace(folder / "work", drive, drive.folder)
    workspace.write_config(extraction={"performances": SMALL, "cameras": [24]})
    return workspace


@pytest.fixture(scope="module")
def whole(s3_all, tmp_path_factory):
    """The tree of all its views, downloaded from a local remote."""
    workspace = Workspace(tmp_path_factory.mktemp("whole") / "work", s3_all)
    workspace.write_config(extraction=only())
    workspace.run()
    return workspace.tree()


@pytest.fixture(scope="module")
def small_whole(small_release, tmp_path_factory):
    """The tree of the three performances, downloaded from a local remote."""
    workspace = Workspace(tmp_path_factory.mktemp("small_whole") / "work", small_release)
    workspace.write_config(extraction={"performances": SMALL})
    workspace.run()
    return workspace.tree()


def views_of(tree, cameras):
    """The files of some views and of what is no picture, but for info.json, which counts the pictures."""
    views = [f"cam_{camera:02d}" for camera in cameras]
    parts = {name: name.split("/") for name in tree if not name.endswith("info.json")}
    return {name: tree[name] for name, part in parts.items() if "images" not in part or part[-2] in views}


def full_tree(workspace, tmp_path):
    """What a full download of the same gives."""
    other = SelectiveWorkspace(tmp_path / "full", workspace.drive, workspace.release)
    other.write_config(google_drive={"download": "full"}, extraction=workspace.settings["extraction"])
    other.run()
    return other.tree()


def test_twelve_of_38_views_cost_a_tenth_more_than_their_pictures(large, whole):
    large.write_config(extraction=only(cameras=TWELVE))
    done = large.run()
    sent = large.drive.bytes_sent()
    assert sent <= 1.10 * stored_bytes(large.smc("0018", "s3_all"), TWELVE) + 4 * MB
    assert views_of(large.tree(), VIEWS) == views_of(whole, TWELVE)
    assert large.leftovers() == []
    row = large.rows[-1]
    assert int(row["smc_bytes"]) == large.smc("0018", "s3_all").stat().st_size
    assert f"fetched {sent / MB:.3g} MB of" in done.out


def test_audio_and_calibration_cost_a_few_megabytes(large, whole):
    large.write_config(extraction=only(modalities=["audio", "calibration"]))
    large.run()
    assert large.drive.bytes_sent() <= 5 * MB  # 38 cameras to look at, 1 MB of audio
    assert views_of(large.tree(), []) == views_of(whole, [])


def test_every_view_but_one_costs_no_more_than_the_file(large, whole):
    large.write_config(extraction=only(cameras=VIEWS[1:]))
    large.run()
    assert large.drive.bytes_sent() <= 1.05 * large.smc("0018", "s3_all").stat().st_size
    assert views_of(large.tree(), VIEWS) == views_of(whole, VIEWS[1:])


def test_while_a_subject_is_extracted_the_parts_of_the_next_one_come(tmp_path):
    for subject in ("0018", "0019"):
        path = tmp_path / f"release/{subject}/{subject}_s3_all_raw.smc"
        synthetic_release.write_smc(
            path, subject, "s3_all", cameras=VIEWS, frame_ids=range(4), size=(64, 76), audio_seconds=0.27
        )
    with FakeDrive(tmp_path / "release") as drive:
        workspace = SelectiveWorkspace(tmp_path / "work", drive, tmp_path / "release")
        workspace.write_config(extraction=only(subjects=["0018", "0019"], cameras=TWELVE))
        with open(workspace.manifest, "a") as manifest:
            fcntl.flock(manifest, fcntl.LOCK_EX)  # no row can be written: 0018 does not get finished
            process = workspace.start()
            logs = workspace.folder / "logs"
            wait_for(lambda: any("0019 s3_all: fetched" in log.read_text() for log in logs.glob("*.log")))
            assert workspace.states == {}
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert set(workspace.states.values()) == {"completed"} and len(workspace.rows) == 2
        for which in workspace.states:
            stored = stored_pictures(workspace.smc(*which))
            wanted = [name for name in stored if int(name[len("images/cam_") :][:2]) in TWELVE]
            assert written_pictures(workspace.path(*which)) == {name: stored[name] for name in wanted}


@pytest.mark.parametrize("cameras", ["all", VIEWS + [2]], ids=["all", "by number"])
def test_with_all_cameras_that_the_release_has_the_file_is_copied_and_its_md5_checked(tmp_path, drive, cameras):
    # A camera more than those of the release: what has no pictures costs nothing.
    workspace = SelectiveWorkspace(tmp_path / "work", drive, drive.folder)
    workspace.write_config(extraction=only(cameras=cameras))
    workspace.run()
    assert drive.bytes_sent() == workspace.smc("0018", "s3_all").stat().st_size
    assert drive.count("media") == 1


def test_room_for_one_file_at_a_time_is_enough(tmp_path):
    names = ["s1_all", "s2_all", "s4_all"]
    synthetic_release.write_subject(
        tmp_path / "release", "0018", performances=names, frames=20, size=(128, 153), jpeg_bytes=20_000
    )
    largest = max(path.stat().st_size for path in (tmp_path / "release").rglob("*.smc"))
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(
        google_drive={"download": "selective"},
        extraction={"performances": names, "modalities": ["audio"]},
        storage={"max_temp_size_gb": 1.5 * largest / 1e9},
    )
    workspace.run()
    assert set(workspace.states.values()) == {"completed"} and len(workspace.rows) == 3


def test_masks_that_are_not_asked_for_are_not_fetched(tmp_path):
    synthetic_release.write_subject(
        tmp_path / "release",
        "0018",
        layout="pair",
        performances=["s1_all"],
        frames=30,
        size=(64, 76),
        cameras=(0, 25, 48),
    )
    anno = next((tmp_path / "release").rglob("*_anno.smc"))
    with h5py.File(anno, "r+") as smc:  # larger than the blocks that are fetched to find out what there is
        smc.create_dataset("Camera/59/mask/0", data=np.frombuffer(os.urandom(4_000_000), np.uint8))
    with FakeDrive(tmp_path / "release") as drive:
        workspace = SelectiveWorkspace(tmp_path / "work", drive, tmp_path / "release")
        workspace.write_config(
            google_drive={"layout": "pair"}, extraction=only("s1_all", modalities=["images", "audio"])
        )
        workspace.run()
        assert drive.bytes_sent("*_anno.smc") < 0.5 * anno.stat().st_size


def test_every_modality_is_the_same_as_in_a_full_download_however_it_is_stored(tmp_path):
    release, subjects = tmp_path / "release", {"0018": "contiguous", "0019": "chunked", "0020": "gzip"}
    options = {**synthetic_release.SMALL_SMC, "frame_ids": range(2), "flame": True}
    options |= dict.fromkeys(("cameras", "masks", "keypoints2d", "scan_masks"), (16, 18, 25, 33))
    for subject, storage in subjects.items():
        path = release / subject / f"{subject}_e0_raw.smc"
        synthetic_release.write_smc(path, subject, "e0", **{**options, "storage": storage})
    with FakeDrive(release) as drive:
        workspace = SelectiveWorkspace(tmp_path / "work", drive, release)
        extraction = {"subjects": list(subjects), "cameras": [18, 25, 33], "modalities": synthetic_release.MODALITIES}
        workspace.write_config(extraction=only("e0", **extraction))
        done = workspace.run()
        assert done.out.count("fetched") == 3 and workspace.tree() == full_tree(workspace, tmp_path)
        assert workspace.info("0018", "e0")["modalities"] == synthetic_release.MODALITIES


def test_a_file_in_another_order_is_read_all_the_same(tmp_path):
    """Frame by frame instead of camera by camera, the groups made first."""
    path = tmp_path / "release/0018/0018_s3_all_raw.smc"
    synthetic_release.write_smc(
        path,
        "0018",
        "s3_all",
        cameras=[0, 25, 40],
        frame_ids=range(20),
        size=(256, 306),
        jpeg_bytes=60000,
        distinct=1,
        audio_seconds=1.35,
    )
    with h5py.File(path) as old, h5py.File(tmp_path / "new.smc", "w") as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value
        new.create_group("Camera").attrs.update(old["Camera"].attrs)
        old.copy("Calibration", new)
        for frame in range(20):
            for camera in ("40", "25", "00"):
                new.create_dataset(f"Camera/{camera}/color/{frame}", data=old[f"Camera/{camera}/color/{frame}"][:])
        old.copy("Camera/00/audio", new["Camera/00"])
    shutil.move(tmp_path / "new.smc", path)
    with FakeDrive(tmp_path / "release") as drive:
        workspace = SelectiveWorkspace(tmp_path / "work", drive, tmp_path / "release")
        workspace.write_config(extraction=only(cameras=[25]))
        workspace.run()
        assert drive.bytes_sent() < 0.9 * path.stat().st_size
        assert workspace.tree() == full_tree(workspace, tmp_path)


def test_a_remote_that_is_no_drive(tmp_path, three_subjects):
    workspace = Workspace(tmp_path / "work", three_subjects)
    workspace.write_config(extraction={"cameras": [25], "performances": ["s1_all", "s3_all"]})
    workspace.run()
    full = workspace.tree()
    shutil.rmtree(workspace.folder / "subjects")
    workspace.write_config(google_drive={"download": "selective"})
    done = workspace.run("--redo", "--subject", "0018")
    assert done.out.count("fetched") == 1  # the other has camera 25 only
    assert workspace.tree() == full
    assert workspace.leftovers() == []


def test_a_selection_that_does_not_fit_into_temp_dir_is_not_fetched(small):
    small.write_config(storage={"max_temp_size_gb": 0.00001})
    run = small.run(expect=1)
    assert "set storage.max_temp_size_gb to at least" in run.err and small.drive.bytes_sent() == 0
    assert set(small.states.values()) == {"download_failed"}


@pytest.mark.parametrize("download", ["full", "selective"])
def test_a_modality_whose_cameras_cannot_be_listed_is_left_out(tmp_path, download):
    path = tmp_path / "release/0018/0018_s3_all_raw.smc"
    synthetic_release.write_smc(path, "0018", "s3_all", cameras=(0, 25), frame_ids=range(2), size=(64, 76))
    with h5py.File(path, "a") as smc:
        smc["Keypoints2d/left/1"] = [1.0]
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(google_drive={"download": download}, extraction=only(cameras=[0, 25]))
    workspace.run()
    (row,) = workspace.rows
    assert row["status"] == "completed" and "could not be read" in row["error"] and row["cameras"] == "0 25"


def test_min_free_gb_is_looked_at_while_parts_come(small, small_disk):
    disk = small_disk("disk", 20)
    small.write_config(storage={"temp_dir": str(disk / "temp"), "min_free_gb": 0.01}, extraction=only("s1_all"))
    gate = small.drive.gate("*s1_all*", 4096)
    run = small.start()
    gate.wait()
    fill(disk, leave=6_000_000)
    gate.release()
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 3 and "min_free_gb" in said and small.rows == [], said
    (disk / "filler").unlink()
    small.run()
    assert set(small.states.values()) == {"completed"} and small.leftovers() == []


def test_a_whole_smc_in_temp_dir_is_used(small):
    temp = small.folder / "temp_smc/0018"
    temp.mkdir(parents=True)
    shutil.copy2(small.smc("0018", "s1_all"), temp)
    small.write_config(extraction=only("s1_all"))
    small.run()
    assert small.drive.bytes_sent() == 0


@pytest.mark.parametrize(
    "faults",
    [
        [("cut", 5, {}), ("cut", 3, {"after_bytes": 0}), ("truncated", 3, {})],
        [("500", 2, {}), ("503", 1, {}), ("userRateLimitExceeded", 1, {})],
    ],
    ids=["connection", "server"],
)
def test_faults_that_pass_are_lived_through(small, small_whole, faults):
    """One of them for each performance."""
    spoilt = [
        small.drive.fault(f"*{name}*", kind, times=times, skip=1, **options)
        for name, (kind, times, options) in zip(SMALL, faults)
    ]
    small.run()
    assert [fault.hits for fault in spoilt] == [times for _, times, _ in faults]
    size = sum(path.stat().st_size for path in small.release.rglob("*.smc"))
    assert small.drive.bytes_sent() < 1.2 * size + 300_000  # what had come was kept
    assert views_of(small.tree(), [24]) == views_of(small_whole, [24])


def test_a_quota_fails_one_performance_with_few_requests_and_the_others_go_on(small):
    small.drive.fault("*s2_all*", "downloadQuotaExceeded")
    small.run(expect=1)
    assert small.states == {
        ("0018", "s1_all"): "completed",
        ("0018", "s2_all"): "quota_exceeded",
        ("0018", "s4_all"): "completed",
    }
    assert small.drive.count("media", "*s2_all*") <= 5
    assert small.leftovers() == []


def test_a_quota_in_the_middle_of_a_file_is_one(small):
    small.write_config(extraction=only("s1_all"))
    small.drive.fault("*s1_all*", "downloadQuotaExceeded", skip=4)
    small.run(expect=1)
    assert small.states[("0018", "s1_all")] == "quota_exceeded"
    assert not small.path("0018", "s1_all").exists()


def test_three_quotas_in_a_row_stop_the_run_with_exit_3(small):
    small.drive.fault("*", "downloadQuotaExceeded")
    stopped = small.run(expect=3)
    assert set(small.states.values()) == {"quota_exceeded"} and len(small.rows) == 3
    assert "download quota for this file is used up" in stopped.err
    assert small.drive.bytes_sent() == 0


def test_a_file_that_is_gone_fails_with_what_drive_says(small):
    small.drive.fault("*s1_all*", "404", on="media")
    small.write_config(extraction={"performances": SMALL[:2]})
    small.run(expect=1)
    assert small.states == {("0018", "s1_all"): "download_failed", ("0018", "s2_all"): "completed"}
    assert "File not found" in small.row("0018", "s1_all")["error"]


def test_a_file_that_changes_meanwhile_fails_with_a_message(tmp_path, small_release):
    shutil.copytree(small_release, tmp_path / "release")
    with FakeDrive(tmp_path / "release") as drive:
        workspace = small_workspace(tmp_path, drive)
        workspace.write_config(extraction=only("s1_all"))
        gate, path = drive.gate("*s1_all*", 4096), workspace.smc("0018", "s1_all")
        process = workspace.start()
        gate.wait()
        path.write_bytes(path.read_bytes()[:-70000] + bytes(50000))
        gate.release()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "changed on the remote" in workspace.rows[-1]["error"]
    assert workspace.states[("0018", "s1_all")] != "completed"
    assert not workspace.path("0018", "s1_all").exists()


def test_an_interrupted_run_leaves_nothing_and_no_rclone(small):
    small.write_config(extraction=only("s1_all"))
    gate = small.drive.gate("*s1_all*", 4096)
    process = small.start()
    gate.wait()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert small.leftovers() == []
    wait_for(lambda: not rclone_servers(small.drive))
    gate.release()
    small.run()
    assert set(small.states.values()) == {"completed"}


def test_a_killed_run_takes_its_server_with_it(small):
    gate = small.drive.gate("*s1_all*", 4096)
    process = small.start()
    gate.wait()
    assert rclone_servers(small.drive)
    process.kill()
    process.communicate(timeout=120)
    wait_for(lambda: not rclone_servers(small.drive))
    gate.release()


def test_a_server_that_is_killed_is_no_fault_of_the_file(small):
    gate = small.drive.gate("*s1_all*", 4096)
    process = small.start()
    gate.wait()
    for server in rclone_servers(small.drive):
        os.kill(server, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    gate.release()
    assert process.returncode == 3 and "rclone was ended" in output and small.rows == [], output
    small.run()
    assert set(small.states.values()) == {"completed"} and small.leftovers() == []


def test_the_servers_password_is_neither_in_its_arguments_nor_in_the_log(small):
    small.write_config(extraction=only("s1_all"))
    gate = small.drive.gate("*s1_all*", 4096)
    process = small.start("--verbose")
    gate.wait()
    (server,) = rclone_servers(small.drive)
    secret = next(
        entry
        for entry in Path(f"/proc/{server}/environ").read_bytes().split(b"\0")
        if entry.startswith(b"RCLONE_PASS=")
    )[12:].decode()
    arguments = Path(f"/proc/{server}/cmdline").read_text()
    gate.release()
    output, _ = process.communicate(timeout=120)
    log = "".join(path.read_text() for path in (small.folder / "logs").iterdir())
    assert len(secret) > 20
    assert secret not in arguments + output + log


def rclone_servers(drive):
    """Process ids of the rclones that serve this drive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"restic" in (folder / "cmdline").read_bytes()
                and str(drive.config_path).encode() in (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def print_table(megabytes_per_s=20.0, latency=0.05):
    """Seconds of whole runs, full and selective, over a Drive of that rate and latency; see the top of this file."""
    selections = {
        "37 of 38 views": only(cameras=VIEWS[1:]),
        "12 of 38 views": only(cameras=TWELVE),
        "one view": only(cameras=[25]),
        "audio and calibration": only(modalities=["audio", "calibration"]),
    }
    with tempfile.TemporaryDirectory(prefix="selective_") as name:
        release = Path(name) / "release"
        path = release / "0018/0018_s3_all_raw.smc"
        synthetic_release.write_smc(
            path,
            "0018",
            "s3_all",
            cameras=VIEWS,
            frame_ids=range(110),
            size=(2048, 2448),
            jpeg_bytes=330_000,
            distinct=2,
            audio_seconds=7.33,
        )
        print(
            f"an s3_all of {path.stat().st_size / MB:.0f} MB, {megabytes_per_s:g} MB/s, latency {latency * 1000:g} ms"
        )
        with FakeDrive(release) as drive:  # which reads the whole file for its md5, once
            workspace = SelectiveWorkspace(Path(name) / "work", drive, release)
            workspace.run("--dry-run")
            shutil.rmtree(workspace.folder)
        print(f"{'selection':24} {'download':10} {'s':>6} {'MB sent':>8} {'requests':>8} {'MB of output':>12}")
        for selection, extraction in selections.items():
            for mode in ("full", "selective"):
                with FakeDrive(release, latency=latency, bandwidth=megabytes_per_s * MB) as drive:
                    workspace = SelectiveWorkspace(Path(name) / "work", drive, release)
                    workspace.write_config(
                        google_drive={"download": mode}, extraction=extraction, storage={"max_temp_size_gb": 10}
                    )
                    begin = time.monotonic()
                    workspace.run(timeout=3600)
                    seconds = time.monotonic() - begin
                    output = sum(file.stat().st_size for file in workspace.path().rglob("*") if file.is_file())
                    cells = f"{seconds:6.1f} {drive.bytes_sent() / MB:8.1f} {drive.count():8} {output / MB:12.1f}"
                    print(f"{selection:24} {mode:10} {cells}", flush=True)
                shutil.rmtree(workspace.folder)


if __name__ == "__main__":
    print_table(*map(float, sys.argv[1:]))
