"""--inspect: what is inside SMC files, in 100 columns, whatever state they are in."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import synthetic_release
from conftest import SCRIPT  # first of ours: it puts the project on the path

import extract_streaming_gdrive
from extract_streaming_gdrive import StopEarly
from renderme_360_reader_new import SMCError, SMCReader


def inspect(*paths, expect=0, folder=None):
    """What --inspect prints, on stdout and stderr; each line has to fit 100 columns."""
    run = subprocess.run(
        [sys.executable, SCRIPT, "--inspect", *map(str, paths)],
        capture_output=True,
        check=False,
        text=True,
        cwd=folder,
        timeout=60,
    )
    assert run.returncode in (expect if isinstance(expect, tuple) else (expect,)), run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr, run.stderr
    assert max(map(len, run.stdout.splitlines()), default=0) <= 100, run.stdout
    return run


def rows(text):
    """The lines of one performance as {title: [rest, …]}, wrapped ones put together."""
    found, title = {}, ""
    for line in text.splitlines():
        if line.startswith(" " * 16) and found:
            found[title][-1] += " " + line.strip()
        elif line.startswith("  "):
            title, _, rest = line.strip().partition("  ")
            found.setdefault(title, []).append(" ".join(rest.split()))
    return found


def test_it_tells_what_a_file_has_without_a_config(release, tmp_path):
    smc = release / "0018/0018_s3_all_raw.smc"
    run = inspect(smc, folder=tmp_path)
    assert run.stdout.startswith("0018 s3_all\n") and list(tmp_path.iterdir()) == []
    found = rows(run.stdout)
    assert found["frames"] == ["3, fps 15, 153 x 128 pixels"]
    assert re.fullmatch("0.20? ?s, 2 channels, 48000 Hz", found["audio"][0])
    with h5py.File(smc) as file:
        pictures = [
            data for camera in file["Camera"].values() if "color" in camera for data in camera["color"].values()
        ]
    cameras = " ".join(map(str, synthetic_release.S3_VIEWS))
    table, which = found["images"]
    assert re.fullmatch("38 114 .*kB jpg 153x128", table) and which == f"38 cameras with 3 frames: {cameras}"
    assert "warning" not in found and len(pictures) == 114


def test_gaps_missing_cameras_unknown_groups_and_odd_rates_are_named(tmp_path):
    smc = tmp_path / "0019_s3_all_raw.smc"
    cameras = [camera for camera in synthetic_release.S3_VIEWS if camera not in (48, 59)]
    gaps = {3: [1, 2, 3, 7], 5: [1, 2, 3, 7], 25: [0]}
    synthetic_release.write_smc(
        smc,
        "0018",
        "s3_all",
        cameras=cameras,
        frame_ids=range(20),
        size=(64, 76),
        gaps=gaps,
        audio_seconds=1.0,
        damaged={(4, 0): "garbage"},
        calibration=False,
    )
    with h5py.File(smc, "a") as file:
        file.create_group("Hair/strands")
        file.create_dataset("Camera/25/depth/0", data=[1])
        file.attrs["gender"] = "\x1b[31m"
    run = inspect(smc)
    found = rows(run.stdout)
    assert "2 cameras with 16 frames, without 1 2 3 7: 3 5" in found["images"]
    assert "1 camera with 19 frames, without 0: 25" in found["images"]
    assert found["images"][0].endswith("damaged or unknown, jpg 76x64")
    assert found["unknown"] == ["Hair"]
    assert any("20.00 pictures per second, not 15 or 30" in warning for warning in found["warning"])
    assert any("'0018'" in warning for warning in found["warning"])
    assert "\x1b" not in run.stdout


def data_sets(group):
    found = []
    group.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found


def test_bytes_are_those_of_the_data_sets_in_the_file(tmp_path):
    smc = synthetic_release.write_subject(tmp_path, "0018", performances=["e0"], size=(64, 76), cameras=(18, 25))[0]
    groups = {
        "images": ["Camera/18/color", "Camera/25/color"],
        "masks": ["Camera/18/mask", "Camera/25/mask"],
        "flame": ["FLAME"],
        "scan": ["Scan"],
        "calibration": ["Calibration"],
        "scan_masks": ["ScanMask"],
        "keypoints2d": ["Keypoints2d"],
        "uv_textures": ["UV_texture"],
    }
    sizes = dict.fromkeys(groups, 0)
    with h5py.File(smc) as file:
        for modality, paths in groups.items():
            for path in paths:
                sizes[modality] += sum(data.nbytes for data in data_sets(file[path]))
    cameras = {"keypoints2d": (18, 25), "images": (18, 25), "masks": (18, 25)}
    with SMCReader(smc) as reader:
        assert {
            modality: sum(
                end - start
                for camera in cameras.get(modality, [None])
                for _, start, end in reader.places(modality, camera)
            )
            for modality in groups
        } == sizes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One speech performance in the layout of two files, and its paths."""
    folder = tmp_path_factory.mktemp("pair")
    return synthetic_release.write_subject(
        folder, "0018", layout="pair", performances=["s1_all"], frames=2, size=(64, 76)
    )


def test_a_file_of_a_pair_is_shown_by_itself(pair):
    _, anno = pair
    found = rows(inspect(anno).stdout)
    assert len(found["file"]) == 1 and "images" not in found and found["masks"]


def test_a_file_that_is_no_smc_file_is_a_message_and_the_others_are_shown(release, tmp_path):
    (tmp_path / "text.smc").write_text("this is no HDF5 file")
    whole = (release / "0018/0018_s3_all_raw.smc").read_bytes()
    (tmp_path / "0018_s2_all_raw.smc").write_bytes(whole[: len(whole) // 2])
    run = inspect(
        tmp_path / "text.smc",
        tmp_path / "0018_s2_all_raw.smc",
        tmp_path / "none.smc",
        "/none.smc",
        release / "0018/0018_s1_all_raw.smc",
        expect=1,
    )
    assert (
        all(name in run.stderr for name in ("text.smc", "0018_s2_all_raw.smc", "none.smc"))
        and "1 camera with 6 frames: 25" in run.stdout
    )


def test_what_can_be_read_of_a_damaged_file_is_shown(release, tmp_path):
    smc = tmp_path / "0018_s3_all_raw.smc"
    shutil.copy(release / "0018/0018_s3_all_raw.smc", smc)
    with h5py.File(smc, "a") as file:
        del file["Camera/25/color"], file["Calibration"]
        file["Camera/25/color"] = np.zeros(3)
        file["Calibration"] = h5py.SoftLink("/Camera")
    found = rows(inspect(smc, expect=1).stdout)
    assert found["audio"] and any("Calibration" in text for text in found["damaged"])


def test_a_group_that_holds_itself_is_no_endless_descent(tmp_path):
    synthetic_release.write_smc(tmp_path / "loop.smc", cameras=(25,), size=(16, 20), frame_ids=range(2), scan=True)
    with h5py.File(tmp_path / "loop.smc", "a") as file:
        for number in range(50):
            file[f"Scan/{number}"] = file["Scan"]
            file[f"FLAME/{number}"] = file["/"]
    assert "scan" in rows(inspect(tmp_path / "loop.smc", expect=(0, 1)).stdout)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def spin():
    while time.process_time() < 30:  # far above the limit: without one, the test has to end too
        pass


def end_without_an_answer():
    os._exit(1)


def start_one_thread_too_many():
    raise RuntimeError("can't start new thread")


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def ask_for_memory():
    bytearray(2 << 30)


@pytest.mark.parametrize(
    "work, error, message",
    [
        (crash, SMCError, "crashed"),
        (spin, SMCError, "does not come to an end"),
        (ask_for_memory, SMCError, "memory"),
        (be_killed, StopEarly, "killed twice.*memory"),
        (end_without_an_answer, StopEarly, "code 1"),
        (start_one_thread_too_many, StopEarly, "thread"),
    ],
)
def test_how_a_child_ends_tells_the_fault_of_the_file_from_that_of_the_machine(work, error, message):
    with pytest.raises(error, match=f"x.smc.*{message}"):
        extract_streaming_gdrive.run_in_child(work, name="x.smc", size=0)


def test_a_lower_limit_on_memory_that_holds_already_is_no_error(monkeypatch):
    script = extract_streaming_gdrive

    def set_limit(which, limits):
        if which == script.resource.RLIMIT_DATA:
            raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(script.resource, "setrlimit", set_limit)
    monkeypatch.setattr(script.threading, "stack_size", lambda size: None)
    script.limit_resources(1 << 30, 60)
