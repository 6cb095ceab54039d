"""The main job on the real rclone, with an alias of a local folder as the remote."""

import collections
import json
import re
import resource
import shutil
import subprocess
import sys

import cv2
import h5py
import numpy as np
import pexpect
import pytest
import soundfile
import synthetic_release
from conftest import Workspace, stored_pictures, written_pictures

SPEECH = list(synthetic_release.SPEECH)
PERFORMANCES = ["s3_all", "s1_all", "s2_all"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, release):
    """A workspace in which both subjects are extracted, with three performances each; not to be changed. `first` is
    what the run printed."""
    workspace = Workspace(tmp_path_factory.mktemp("finished") / "work", release)
    workspace.write_config(extraction={"subjects": ["0019", "0018"], "performances": PERFORMANCES})
    workspace.first = workspace.run()
    return workspace


@pytest.fixture
def done(finished, tmp_path):
    """A copy of the finished workspace, to go on with."""
    return finished.copy(tmp_path / "copy")


def test_a_run_extracts_every_performance_in_the_order_of_the_config_and_leaves_no_smc(finished):
    rows = [(row["subject"], row["performance"], row["status"]) for row in finished.rows]
    assert rows == [(subject, p, "completed") for subject in ("0019", "0018") for p in PERFORMANCES]
    assert finished.leftovers() == []
    assert re.search(r"completed +6 ", finished.first.out)


def test_pictures_are_the_stored_bytes(finished):
    for subject, performance in finished.states:
        folder = finished.path(subject, performance)
        written = written_pictures(folder)
        assert written == stored_pictures(finished.smc(subject, performance))
        assert {path.suffix for path in folder.glob("images/*/*")} == {".jpg"}
        counts = collections.Counter(name[len("images/cam_") :][:2] for name in written)
        assert finished.info(subject, performance)["frames"] == counts


def test_s3_all_has_38_views_at_15_fps_and_the_others_camera_25_at_30(finished):
    assert finished.info("0018", "s3_all")["fps"] == 15
    assert len(finished.info("0018", "s3_all")["frames"]) == 38
    assert finished.info("0018", "s1_all")["fps"] == 30
    assert finished.info("0018", "s1_all")["cameras_available"] == [25]


def test_audio_read_back_equals_the_stored_samples(tmp_path):
    kinds = {"s1_all": ("pcm16", "PCM_16"), "s2_all": ("float", "FLOAT")}
    for performance, (kind, _) in kinds.items():
        synthetic_release.write_subject(
            tmp_path / "release", "0018", performances=[performance], frames=4, size=(64, 76), audio=kind
        )
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.run("--performance", *kinds)
    for performance, (_, subtype) in kinds.items():
        path = workspace.path("0018", performance, "audio", "audio.wav")
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        with h5py.File(workspace.smc("0018", performance)) as smc:
            stored = smc["Camera/00/audio/audio"][()]
        assert rate == 48000 and soundfile.info(path).subtype == subtype
        assert samples.dtype == stored.dtype and np.array_equal(samples, stored)


def test_calibration_read_back_equals_the_stored_matrices(finished):
    cameras = json.loads(finished.path("0018", "s3_all", "calibration", "cameras.json").read_text())["cameras"]
    with h5py.File(finished.smc("0018", "s3_all")) as smc:
        assert sorted(cameras) == sorted(smc["Calibration"])
        for camera, matrices in smc["Calibration"].items():
            for name in ("K", "D", "RT"):
                assert np.array_equal(np.array(cameras[camera][name]), matrices[name][()])


def test_info_json_says_what_was_extracted_and_from_what(finished):
    info = finished.info("0018", "s3_all")
    smc = finished.smc("0018", "s3_all")
    (source,) = info["source"]
    assert (source["name"], source["bytes"]) == (smc.name, smc.stat().st_size)
    assert (info["subject"], info["performance"], info["resolution"]) == ("0018", "s3_all", [128, 153])
    assert info["missing_frames"] == {} == info["damaged_frames"]
    assert info["modalities"] == ["images", "audio", "calibration"]
    assert set(info["actor"]) == {"age", "gender", "color", "height_cm", "weight_kg"}
    assert info["audio"]["duration_s"] == pytest.approx(0.2)


def test_all_other_modalities_are_written_as_the_file_has_them(tmp_path):
    modalities = [name for name in synthetic_release.MODALITIES if name != "audio"]
    synthetic_release.write_subject(
        tmp_path / "release", "0018", performances=["e0"], cameras=(0, 18, 25), size=(64, 76)
    )
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"performances": ["e0"], "modalities": modalities})
    workspace.run()
    folder = workspace.path("0018", "e0")
    assert workspace.info("0018", "e0")["modalities"] == modalities
    assert workspace.info("0018", "e0")["fps"] is None
    with h5py.File(workspace.smc("0018", "e0")) as smc:
        for camera, group in smc["Camera"].items():
            for frame, data in group["mask"].items():
                assert (folder / f"masks/cam_{camera}/frame_{int(frame):06d}.png").read_bytes() == data[()].tobytes()
        for camera, data in smc["ScanMask"].items():
            assert (folder / f"scan_masks/cam_{camera}.png").read_bytes() == data[()].tobytes()
        for frame, data in smc["UV_texture"].items():
            stem = folder / f"uv_textures/frame_{int(frame):06d}"
            assert next(stem.parent.glob(f"{stem.name}.*")).read_bytes() == data[()].tobytes()
        for camera, group in smc["Keypoints2d"].items():
            points = np.load(folder / f"keypoints2d/cam_{camera}.npz")
            assert points["frame_ids"].tolist() == sorted(map(int, group))
            assert all(
                np.array_equal(points["points"][i], group[str(f)][()]) for i, f in enumerate(points["frame_ids"])
            )
        points = np.load(folder / "keypoints3d/keypoints3d.npz")
        assert points["frame_ids"].tolist() == sorted(map(int, smc["Keypoints3d"])) and points["points"].shape[1:] == (
            73,
            3,
        )
        for frame, group in smc["FLAME"].items():
            arrays = np.load(folder / f"flame/frame_{int(frame):06d}.npz")
            assert sorted(arrays) == sorted(group) and all(
                np.array_equal(arrays[name], group[name][()]) for name in group
            )
        vertices, faces = read_ply(folder / "scan/mesh.ply")
        assert np.array_equal(vertices, smc["Scan/vertex"][()]) and np.array_equal(
            faces, smc["Scan/vertex_indices"][()]
        )


def read_ply(path):
    header, _, body = path.read_bytes().partition(b"end_header\n")
    counts = [int(n) for n in re.findall(rb"element \w+ (\d+)", header)]
    assert b"format binary_little_endian 1.0" in header and b"property double x" in header
    vertices = np.frombuffer(body, "<f8", counts[0] * 3).reshape(-1, 3)
    faces = np.frombuffer(body[counts[0] * 24 :], [("count", "u1"), ("indices", "<i4", 3)])
    assert len(faces) == counts[1] and (faces["count"] == 3).all()
    return vertices, faces["indices"]


def test_a_second_run_downloads_and_changes_nothing(done):
    before, rows = done.tree(), done.manifest.read_bytes()
    done.run()
    assert done.rclone_calls("copy") == 0 and done.rclone_calls("lsjson") <= 2
    assert done.tree() == before and done.manifest.read_bytes() == rows


def test_cameras_taken_away_in_the_config_change_nothing(done):
    before = done.manifest.read_bytes()
    done.write_config(extraction={"cameras": {"s3_all": [25, 1], "default": "all"}})
    done.run()
    assert done.manifest.read_bytes() == before


def test_added_cameras_are_extracted_together_with_the_old_ones(workspace):
    workspace.write_config(extraction={"cameras": [0, 25], "performances": ["s1_all", "s3_all"]})
    workspace.run()
    assert workspace.row("0018", "s3_all")["cameras"] == "0 25"
    workspace.write_config(extraction={"cameras": [1, 25]})
    workspace.run()
    assert sorted(row["performance"] for row in workspace.rows) == ["s1_all", "s3_all", "s3_all"]
    assert workspace.rows[-1]["performance"] == "s3_all"
    assert workspace.rows[-1]["cameras"] == "0 1 25"
    assert sorted(p.name for p in workspace.path("0018", "s3_all", "images").iterdir()) == [
        "cam_00",
        "cam_01",
        "cam_25",
    ]
    assert workspace.leftovers() == []


def test_added_modalities_are_extracted_together_with_the_old_ones(workspace):
    workspace.write_config(extraction={"modalities": ["audio"], "performances": ["s1_all"]})
    workspace.run()
    assert workspace.rows[-1]["cameras"] == "" and not workspace.path("0018", "s1_all", "images").exists()
    workspace.run()
    assert len(workspace.rows) == 1
    workspace.write_config(extraction={"modalities": ["images"]})
    workspace.run()
    assert set(workspace.rows[-1]["modalities"].split()) == {"audio", "images"}
    assert (
        workspace.path("0018", "s1_all", "audio", "audio.wav").exists()
        and workspace.path("0018", "s1_all", "images").exists()
    )


def test_a_subject_that_was_moved_away_stays_done_and_the_summary_says_so(done):
    shutil.move(done.path("0018"), done.folder / "archive")
    again = done.run()
    assert len(done.rows) == 6 and not done.path("0018").exists()
    assert "3 of them no longer in" in again.out


def test_redo_does_a_subject_again(done):
    before = done.tree()
    done.path("0018", "s1_all", "images", "cam_25", "frame_000000.jpg").write_bytes(b"spoilt")
    done.run("--redo", "--subject", "0018")
    assert len(done.rows) == 9 and {row["subject"] for row in done.rows[6:]} == {"0018"}
    assert done.tree() == before and done.leftovers() == []


def test_an_absent_file_gives_an_absent_row_at_once_and_one_rclone_call_fetches_the_rest(tmp_path):
    options = {"frames": 2, "size": (64, 76)}
    synthetic_release.write_subject(tmp_path / "release", "0018", performances=["s1_all", "s2_all"], **options)
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"performances": ["s1_all", "s2_all", "s4_all"]})
    run = workspace.run()
    assert [workspace.states["0018", p] for p in ("s1_all", "s2_all", "s4_all")] == ["completed"] * 2 + ["absent"]
    assert workspace.rclone_calls("copy") == 1
    assert re.search(r"absent +1", run.out)
    workspace.run()
    assert len(workspace.rows) == 3
    synthetic_release.write_subject(tmp_path / "release", "0018", performances=["s4_all"], **options)
    workspace.run()  # it is there now
    assert len(workspace.rows) == 4 and workspace.states["0018", "s4_all"] == "completed"


def test_subjects_all_takes_every_four_digit_folder(workspace, release, tmp_path):
    other = tmp_path / "release"
    shutil.copytree(release, other)
    (other / "notes").mkdir()
    workspace = Workspace(tmp_path / "all", other)
    workspace.write_config(extraction={"subjects": "all", "performances": ["s1_all"]})
    workspace.run()
    assert workspace.states == {("0018", "s1_all"): "completed", ("0019", "s1_all"): "completed"}


def test_subject_and_performance_on_the_command_line_take_the_place_of_the_configs(workspace):
    workspace.run("--subject", "0019", "--performance", "s2_all")
    assert workspace.states == {("0019", "s2_all"): "completed"}


def test_a_performance_without_the_cameras_asked_for_is_a_warning_and_a_note(workspace):
    workspace.write_config(extraction={"cameras": [0, 1], "performances": ["s1_all", "s3_all"]})
    run = workspace.run()
    rows = {row["performance"]: row for row in workspace.rows}
    assert rows["s1_all"]["status"] == "completed" and "none of the cameras asked for" in rows["s1_all"]["error"]
    assert rows["s3_all"]["error"] == "" and rows["s3_all"]["cameras"] == "0 1"
    assert run.out.count("none of the cameras asked for") == 1
    assert (
        workspace.path("0018", "s1_all", "audio").exists() and not workspace.path("0018", "s1_all", "images").exists()
    )


def test_damaged_and_missing_pictures_are_listed_and_do_not_fail_the_performance(tmp_path):
    synthetic_release.write_subject(
        tmp_path / "release",
        "0018",
        performances=["s1_all"],
        frames=8,
        size=(64, 76),
        gaps={25: [6]},
        damaged={(25, 1): "cut", (25, 2): "garbage", (25, 3): "empty", (25, 4): "zeroed"},
    )
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"performances": ["s1_all"]}, processing={"verify": "full"})
    workspace.run()
    info, folder = workspace.info("0018", "s1_all"), workspace.path("0018", "s1_all", "images", "cam_25")
    assert info["damaged_frames"] == {"images": {"25": [1, 2, 4]}}
    assert info["missing_frames"] == {"images": {"25": [3, 6]}}
    assert info["frames"] == {"25": 6}
    with h5py.File(workspace.smc("0018", "s1_all")) as smc:
        for frame in (1, 2, 4):
            assert (
                next(folder.glob(f"frame_{frame:06d}.*")).read_bytes() == smc[f"Camera/25/color/{frame}"][()].tobytes()
            )
    assert "3 damaged" in workspace.rows[0]["error"] and workspace.rows[0]["status"] == "completed"


def test_many_workers_with_large_stacks_decode_all_pictures(tmp_path):
    synthetic_release.write_subject(tmp_path / "release", "0018", performances=["s1_all"], frames=100, size=(64, 76))
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"performances": ["s1_all"]}, processing={"verify": "full", "workers": 48})
    run = workspace.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, 64 << 20)))
    assert run.wait(120) == 0, run.stdout.read()
    assert workspace.rows[0]["status"] == "completed" and workspace.rows[0]["error"] == ""


def test_modalities_that_the_file_lacks_are_noted_and_it_is_not_fetched_again(tmp_path):
    synthetic_release.write_subject(tmp_path / "release", "0018", performances=["s1_all"], frames=3, size=(64, 76))
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"performances": ["s1_all"], "modalities": ["flame", "uv_textures"]})
    run = workspace.run()
    (row,) = workspace.rows
    assert (
        row["status"] == "completed"
        and "none of what is asked for (flame, uv_textures)" in row["error"]
        and row["modalities"] == "flame uv_textures"
    )
    assert "none of what is asked for" in run.out and workspace.info("0018", "s1_all")["modalities"] == []
    workspace.run()
    assert len(workspace.rows) == 1


def test_a_picture_of_another_size_than_the_performance_counts_as_damaged(tmp_path):
    synthetic_release.write_subject(tmp_path / "release", "0018", performances=["s1_all"], frames=3, size=(64, 76))
    smc = tmp_path / "release/0018/0018_s1_all_raw.smc"
    with h5py.File(smc, "r+") as file:
        del file["Camera/25/color/1"]
        file["Camera/25/color/1"] = cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))[1].ravel()
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.run("--performance", "s1_all")
    assert workspace.info("0018", "s1_all")["damaged_frames"] == {"images": {"25": [1]}}


def test_a_file_that_cannot_be_read_fails_alone(tmp_path):
    synthetic_release.write_subject(
        tmp_path / "release", "0018", performances=["s1_all", "s2_all"], frames=3, size=(64, 76)
    )
    (tmp_path / "release/0018/0018_s1_all_raw.smc").write_bytes(b"no HDF5" * 1000)
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    run = workspace.run("--performance", "s1_all", "s2_all", expect=1)
    assert workspace.states == {("0018", "s1_all"): "failed", ("0018", "s2_all"): "completed"}
    assert "0018_s1_all_raw.smc" in workspace.row("0018", "s1_all")["error"] and "0018_s1_all_raw.smc" in run.err
    assert workspace.leftovers() == [] and not workspace.path("0018", "s1_all").exists()


def test_a_file_of_another_subject_than_its_name_says_is_a_warning(tmp_path):
    synthetic_release.write_smc(
        tmp_path / "release/0018/0018_s1_all_raw.smc", "0099", "s2_all", frame_ids=range(2), size=(64, 76)
    )
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    run = workspace.run("--performance", "s1_all")
    assert "0099" in run.err and "s2_all" in run.err and workspace.states == {("0018", "s1_all"): "completed"}


def test_too_little_free_space_stops_before_the_download_with_exit_3(workspace):
    workspace.write_config(storage={"min_free_gb": 900000})
    run = workspace.run(expect=3)
    assert "min_free_gb" in run.err and not list(workspace.path().glob("*")) and workspace.leftovers() == []


def test_dry_run_lists_sizes_and_states_and_touches_nothing(workspace):
    run = workspace.run("--dry-run")
    size = sum(workspace.smc("0018", p).stat().st_size for p in SPEECH)
    assert all(re.search(rf"0018 .*\b{p}\b.*to be downloaded", run.out) for p in SPEECH)
    assert float(re.search("([0-9.]+) ?MB to be downloaded", run.out)[1]) == pytest.approx(size / 1e6, abs=0.01)
    assert sorted(p.name for p in workspace.folder.iterdir()) == ["config.yaml", "rclone.conf"]


def test_status_counts_from_the_manifest_alone(done):
    shutil.rmtree(done.path())
    run = done.run("--status")
    assert "6 of 6 performances of 2 subjects are done, 0 failed, 0 absent" in run.out and "left" not in run.out
    done.write_config(extraction={"subjects": ["0018", "0019", "0026"]})
    assert "6 of 9 performances" in (run := done.run("--status")).out and "left for one process" in run.out


def test_output_to_a_pipe_has_no_control_characters_and_a_terminal_has_bars(finished, workspace):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", finished.first.out + finished.first.err)
    command = workspace.command("--performance", "s3_all")
    terminal = pexpect.spawn(command[0], list(map(str, command[1:])), dimensions=(40, 120), encoding="utf-8")
    terminal.expect(pexpect.EOF, timeout=60)
    assert "0018 download:" in terminal.before and "0018 s3_all:" in terminal.before and "\r" in terminal.before


def test_a_closed_output_does_not_end_the_run(workspace):
    workspace.write_config(extraction={"performances": ["s1_all"]})
    command = " ".join(f"'{word}'" for word in workspace.command())
    run = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0 and set(workspace.states.values()) == {"completed"}, run.stderr


def test_every_run_has_its_log(finished):
    logs = list((finished.folder / "logs").iterdir())
    assert len(logs) == 1 and "0019 s2_all" in logs[0].read_text() and "rclone copy" in logs[0].read_text()


# Runs a command and prints the peak memory of it and its children.
MEASURED = """\
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("KB", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def test_peak_memory_does_not_grow_with_the_file(tmp_path):
    def peak(frames):
        """kB of a run over a file with so many pictures of 0.3 MB."""
        folder, options = tmp_path / str(frames), {"cameras": (0, 1, 24, 25), "size": (512, 612), "distinct": 1}
        smc = folder / "release/0018/0018_s3_all_raw.smc"
        synthetic_release.write_smc(smc, "0018", "s3_all", frame_ids=range(frames), jpeg_bytes=300_000, **options)
        assert smc.stat().st_size > frames * 4 * 250_000
        command = Workspace(folder / "work", folder / "release").command("--performance", "s3_all")
        run = subprocess.run(
            [sys.executable, "-c", MEASURED, *command], check=False, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        return int(re.search(r"KB (\d+)", run.stdout)[1])

    small, large = peak(5), peak(45)
    assert large < small + 20_000 and large < 250_000
