"""SMC files that are not as expected, through the script: what can be read is extracted, the rest is listed."""

import functools
import itertools
import json
import subprocess
import sys

import cv2
import h5py
import numpy as np
import pytest
import soundfile
import synthetic_release
from conftest import TESTS, Workspace, stored_pictures, written_pictures
from test_inspect import inspect, rows

EVERYTHING = [*synthetic_release.MODALITIES, "transforms"]


class Untidy:
    """A small performance with everything that was changed, and what a run made of it."""

    def __init__(self, workspace, performance, inspected):
        self.workspace, self.inspected = workspace, inspected
        self.smc = workspace.smc("0018", performance)
        self.row = workspace.row("0018", performance)
        self.folder = workspace.path("0018", performance)
        self.info = workspace.info("0018", performance) if self.row["status"] == "completed" else None

    def unreadable(self):
        """{(modality, camera, frame)} of what cannot be read, each with its reason, counted, and named by --inspect."""
        found = self.info["unreadable"]
        assert all(entry.keys() == {"modality", "camera", "frame", "reason"} for entry in found)
        count = f"{len(found)} {'entry' if len(found) == 1 else 'entries'} could not be read, listed in info.json"
        assert (count in self.row["error"]) == bool(found)
        assert self.row["status"] == "completed"
        assert set(self.inspected()[self.smc.name].get("damaged", [])) == {entry["reason"] for entry in found}
        return {(entry["modality"], entry["camera"], entry["frame"]) for entry in found}

    def oddities(self):
        """What is unusual, which --inspect shows as well."""
        assert self.inspected()[self.smc.name].get("warning", []) == self.info["oddities"]
        return self.info["oddities"]

    def pictures(self):
        return written_pictures(self.folder)

    def load(self, name):
        return json.loads((self.folder / name).read_text())


def extract_each(folder, changes, expect=0, modalities=EVERYTHING, cameras="all", verify="fast", **options):
    """Write a small performance with everything for each of `changes` {performance: function of its open file}, extract
    them all in one run, and give an Untidy for each. options: other ones for `write_smc`."""
    workspace = Workspace(folder / "work", folder / "release")
    smcs = [workspace.smc("0018", performance) for performance in changes]
    for smc, (performance, change) in zip(smcs, changes.items()):
        synthetic_release.write_smc(smc, "0018", performance, **{**synthetic_release.SMALL_SMC, **options})
        with h5py.File(smc, "r+") as file:
            change(file)
    extraction = {"performances": list(changes), "modalities": modalities, "cameras": cameras}
    workspace.write_config(extraction=extraction, processing={"verify": verify})
    workspace.run(expect=expect)

    @functools.cache
    def inspected():
        """What --inspect says, {name of the file: {title: lines}}; its exit code tells whether anything is damaged."""
        run = inspect(*smcs, expect=(0, 1))
        found = [rows(text) for text in run.stdout.split("\n\n") if text.strip()]
        assert run.returncode == any("damaged" in each for each in found)
        return {each["file"][0].split(",")[0]: each for each in found}

    return [Untidy(workspace, performance, inspected) for performance in changes]


def extract(folder, change, **options):
    """The same of one performance."""
    return extract_each(folder, {"s1_all": change}, **options)[0]


def replace(file, path, value):
    del file[path]
    file[path] = value


# ---- what cannot be read


BAD = {
    "Camera/00/audio/audio": ("text", ("audio", None, None)),
    "Camera/00/audio/sample_rate": (np.nan, ("audio", None, None)),
    "Camera/25/color/2": (np.zeros((5, 5), np.uint8), ("images", 25, 2)),
    "Camera/25/color": (h5py.SoftLink("/Camera/03/color"), ("images", 25, None)),
    "Camera/25/mask/0": (h5py.ExternalLink("x.h5", "/"), ("masks", 25, 0)),
    "Calibration/07/RT": (np.full((4, 4), np.nan), ("calibration", 7, None)),
    "Calibration/25": (5, ("calibration", 25, None)),
    "Keypoints2d/25/1": (np.zeros((2, 106)), ("keypoints2d", 25, 1)),
    "Keypoints2d/25/2": (np.zeros((105, 2)), ("keypoints2d", 25, 2)),
    "Keypoints2d": (5, ("keypoints2d", None, None)),
    "Keypoints3d/3": ("text", ("keypoints3d", None, 3)),
    "Keypoints3d": (h5py.SoftLink("/Camera"), ("keypoints3d", None, None)),
    "FLAME/2/exp": (np.zeros(3, complex), ("flame", None, 2)),
    "UV_texture/1": (np.zeros((256, 256, 3), np.uint8), ("uv_textures", None, 1)),
    "Scan/vertex_indices": (np.full((3, 3), 10**9), ("scan", None, None)),
    "ScanMask/25": (np.zeros((2, 2)), ("scan_masks", 25, None)),
}


def test_what_cannot_be_read_costs_itself_alone(tmp_path):
    """A file for each, and the trees of all of them beside that of the untouched file."""

    def spoil(file, path=None, value=None):
        for frame in range(4):
            file[f"FLAME/{frame}/exp"] = np.zeros(50)
        if path:
            replace(file, path, value)

    changes = {
        f"h1_{n}": functools.partial(spoil, path=path, value=value) for n, (path, (value, _)) in enumerate(BAD.items())
    }
    tidy, *spoilt = extract_each(tmp_path, {"s1_all": spoil, **changes})
    assert tidy.info["modalities"] == EVERYTHING and tidy.unreadable() == set()
    files = {str(path.relative_to(tidy.folder)) for path in tidy.folder.rglob("*.*")}
    lost = {
        ("audio", None, None): {"audio/audio.wav"},
        ("images", 25, 2): {"images/cam_25/frame_000002.jpg"},
        ("images", 25, None): {name for name in files if name.startswith("images/cam_25")},
        ("masks", 25, 0): {"masks/cam_25/frame_000000.png"},
        ("keypoints2d", None, None): {"keypoints2d/cam_25.npz"},
        ("keypoints3d", None, None): {"keypoints3d/keypoints3d.npz"},
        ("flame", None, 2): {"flame/frame_000002.npz"},
        ("uv_textures", None, 1): {"uv_textures/frame_000001.png"},
        ("scan", None, None): {"scan/mesh.ply"},
        ("scan_masks", 25, None): {"scan_masks/cam_25.png"},
    }
    for found, (path, (_, where)) in zip(spoilt, BAD.items()):
        assert found.unreadable() == {where}, path
        there = {str(path.relative_to(found.folder)) for path in found.folder.rglob("*.*")}
        assert files - there == lost.get(where, set()), path
        assert found.info["cameras_available"] == [3, 25] and found.row["cameras"] == "3 25"
        assert found.info["missing_frames"] == {} and found.info["fps"] == (None if where[0] == "audio" else 30)


def test_frames_without_readable_key_points_are_not_among_those_of_the_camera(tmp_path):
    def spoil(file):
        replace(file, "Keypoints2d/25/1", np.zeros((105, 2)))
        replace(file, "Keypoints3d/0", "text")
        file["Keypoints3d/1"][0] = np.nan

    found = extract(tmp_path, spoil)
    assert found.unreadable() == {("keypoints2d", 25, 1), ("keypoints3d", None, 0)}
    with np.load(found.folder / "keypoints2d/cam_25.npz") as flat, h5py.File(found.smc) as smc:
        assert flat["frame_ids"].tolist() == [0, 2, 3] and flat["points"].shape == (3, 106, 2)
        with np.load(found.folder / "keypoints3d/keypoints3d.npz") as solid:
            assert solid["frame_ids"].tolist() == [1, 2, 3]
            assert np.array_equal(solid["points"][0], smc["Keypoints3d/1"][()], equal_nan=True)


def test_each_thing_that_cannot_be_read_is_listed_once(tmp_path):
    def spoil(file):
        replace(file, "Camera/00/audio/audio", "text")
        replace(file, "Camera/25/color/2", np.zeros((5, 5), np.uint8))
        replace(file, "Calibration/25/K", np.zeros((3, 4)))

    found = extract(tmp_path, spoil)
    assert found.unreadable() == {("audio", None, None), ("images", 25, 2), ("calibration", 25, None)}
    assert len(found.info["unreadable"]) == 3 and found.row["error"].startswith("3 entries could not be read")
    assert found.info["missing_frames"] == {} and found.info["audio"] is None
    assert {frame["camera_id"] for frame in found.load("transforms.json")["frames"]} == {"03"}


def test_a_performance_fails_where_nothing_can_be_read(tmp_path):
    def spoil(file):
        for camera in ("03", "25"):
            for frame in range(4):
                replace(file, f"Camera/{camera}/color/{frame}", np.zeros((5, 5), np.uint8))

    nothing = {"masks": (), "keypoints2d": (), "keypoints3d": False, "uv_textures": False, "scan": False}
    nothing |= {"scan_masks": (), "audio_seconds": None, "calibration": False}
    found = extract(tmp_path, spoil, expect=1, modalities=["images", "audio", "calibration", "transforms"], **nothing)
    assert found.row["status"] == "failed" and "Camera/03/color/0" in found.row["error"]
    assert not found.folder.exists() and found.workspace.leftovers() == []


def test_a_performance_of_which_only_what_was_not_asked_for_can_be_read_is_completed(tmp_path):
    def spoil(file):
        replace(file, "Camera/00/audio/audio", "text")

    found = extract(tmp_path, spoil, modalities=["audio"])
    assert found.unreadable() == {("audio", None, None)} and found.info["modalities"] == []
    assert found.info["modalities_asked"] == ["audio"]


def test_a_full_disk_is_never_what_cannot_be_read(tmp_path):
    """An OSError of ours while a picture is written is raised through all that collects damage."""
    import extract_streaming_gdrive as script

    class Reader:
        collecting_damage = staticmethod(script.SMCReader.collecting_damage)

        def entries(self, modality, camera=None):
            yield script.SMCReader.entries.__globals__["Entry"](0, lambda: b"picture")

    extraction = object.__new__(script.Extraction)
    extraction.reader, extraction.cameras, extraction.unreadable = Reader(), {"images": [25]}, {}
    with pytest.raises(OSError, match="No space left"):
        for _ in extraction.entries("images"):
            raise OSError(28, "No space left on device")
    assert extraction.unreadable == {}


def test_masks_without_pictures_have_their_cameras_in_the_manifest(tmp_path):
    found = extract(tmp_path, lambda file: None, images=False, masks=(3, 25), cameras=[25, 30])
    assert found.info["cameras_available"] == [3, 25] and found.row["cameras"] == "25"
    assert found.row["cameras_available"] == "3 25" and found.info["frames"] == {}


# ---- what is merely unusual


def test_padded_names_are_extracted_as_the_numbers_that_they_say(tmp_path):
    tidy = []  # what plain h5py reads of each file before

    def rename(file, camera, frame):
        tidy.append(stored_pictures(file.filename))
        pictures = [f"Camera/{n:02d}/{kind}" for n in (3, 25) for kind in ("color", "mask")]
        for group in (*pictures, "Keypoints2d/25", "Keypoints3d", "UV_texture"):
            for name in list(file.get(group, ())):
                file.move(f"{group}/{name}", f"{group}/{frame.format(int(name))}")
        for group in ("Camera", "Calibration", "Keypoints2d", "ScanMask"):
            for name in list(file[group]):
                file.move(f"{group}/{name}", f"{group}/{camera.format(int(name))}")

    forms = itertools.product(("{:03d}", "{:d}"), ("{:06d}", "{:03d}"))
    changes = {f"h1_{n}": functools.partial(rename, camera=c, frame=f) for n, (c, f) in enumerate(forms)}
    for found, pictures in zip(extract_each(tmp_path, changes), tidy):
        assert found.unreadable() == set() and found.pictures() == pictures and len(pictures) == 12
        assert found.info["frames"] == {"03": 4, "25": 4} and found.info["missing_frames"] == {}
        assert list(found.load("calibration/cameras.json")["cameras"]) == [f"{n:02d}" for n in range(60)]
        assert len(found.load("transforms.json")["frames"]) == 8 and found.info["fps"] == 30
        with np.load(found.folder / "keypoints2d/cam_25.npz") as points:
            assert points["frame_ids"].tolist() == [0, 1, 2, 3]


def test_pictures_whose_names_are_not_understood_are_no_completed_performance_of_no_frames(tmp_path):
    def rename(file):
        for name in list(file["Camera/25/color"]):
            file.move(f"Camera/25/color/{name}", f"Camera/25/color/frame_{name}")

    found = extract(tmp_path, rename)
    assert found.unreadable() == {("images", 25, None)} and found.info["frames"] == {"03": 4}
    assert "'frame_0'" in found.info["unreadable"][0]["reason"]


SAMPLES = np.random.default_rng(0).integers(-(2**15), 2**15, (6400, 2)).astype(np.int16)


SOUNDS = [  # stored, how it is written, as what it comes back
    ((SAMPLES[:, 0] / 32768).astype(np.float32), "PCM_16", SAMPLES[:, :1] / 32768),
    ((SAMPLES[:, 0] / 32768).astype(np.float32)[None], "PCM_16", SAMPLES[:, :1] / 32768),
    ((SAMPLES / 32768).astype(np.float32).T, "PCM_16", SAMPLES / 32768),
    (SAMPLES, "PCM_16", SAMPLES / 32768),
    (SAMPLES.T, "PCM_16", SAMPLES / 32768),
    (SAMPLES.astype(np.int32) * 65536 + 1, "PCM_32", (SAMPLES * 65536.0 + 1) / 2**31),
    (SAMPLES / 32768, "PCM_16", SAMPLES / 32768),
    (SAMPLES.astype(np.float32) / 32769, "FLOAT", SAMPLES.astype(np.float32) / 32769),
    (SAMPLES / 32769, "DOUBLE", SAMPLES / 32769),
]


def test_sound_of_any_form_is_written_without_loss(tmp_path):
    store = functools.partial(replace, path="Camera/00/audio/audio")
    changes = {f"h1_{n}": functools.partial(store, value=stored) for n, (stored, *_) in enumerate(SOUNDS)}
    for found, (stored, subtype, expected) in zip(extract_each(tmp_path, changes, modalities=["audio"]), SOUNDS):
        path = found.folder / "audio/audio.wav"
        samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
        assert (soundfile.info(path).subtype, rate) == (subtype, 48000)
        assert np.array_equal(samples, expected), (stored.dtype, stored.shape)
        assert found.unreadable() == set() and found.info["audio"]["channels"] == expected.shape[1]
        assert found.info["fps"] == 30
        usual = stored.dtype == np.float32 and stored.shape == expected.shape
        assert len(found.oddities()) == (not usual)


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_bytes_after_the_end_of_a_picture_do_not_damage_it(tmp_path, verify):
    def extend(file, after):
        for group in ("Camera/25/color", "Camera/25/mask"):
            for name in list(file[group]):
                replace(file, f"{group}/{name}", np.frombuffer(file[f"{group}/{name}"][()].tobytes() + after, np.uint8))

    endings = [bytes(1), bytes(4), np.random.default_rng(0).bytes(999), b"\xff\xd8\xff\xe2MPF\0" + bytes(50)]
    changes = {f"h1_{n}": functools.partial(extend, after=after) for n, after in enumerate(endings)}
    for found in extract_each(tmp_path, changes, verify=verify):
        assert found.info["damaged_frames"] == {} and found.row["error"] == ""
        assert found.pictures() == stored_pictures(found.smc)
        images = found.inspected()[found.smc.name]["images"]
        assert images[0].endswith("jpg 76x64, jpg 76x64 with bytes after its end")


def test_a_resolution_that_is_not_that_of_the_pictures_is_one_oddity(tmp_path):
    resolutions = {"s1_all": (76, 64), "s2_all": (2048, 2448)}
    changes = {
        name: lambda file, name=name: file["Camera"].attrs.update(resolution=resolutions[name]) for name in resolutions
    }
    for found, (height, width) in zip(extract_each(tmp_path, changes), resolutions.values()):
        assert found.info["damaged_frames"] == {} and found.row["error"] == ""
        (oddity,) = found.oddities()
        assert "pictures have 76 x 64 pixels" in oddity and f"{width} x {height}" in oddity
        assert {(frame["w"], frame["h"]) for frame in found.load("transforms.json")["frames"]} == {(76, 64)}
        assert found.info["resolution"] == [64, 76]


def picture(height, width):
    return cv2.imencode(".jpg", np.zeros((height, width, 3), np.uint8))[1].ravel()


def test_a_camera_with_a_size_of_its_own_is_an_oddity_and_a_single_picture_is_damaged(tmp_path):
    def change(file):
        for frame in range(4):
            replace(file, f"Camera/03/color/{frame}", picture(32, 38))
        replace(file, "Camera/25/color/1", picture(48, 57))

    found = extract(tmp_path, change)
    assert found.info["damaged_frames"] == {"images": {"25": [1]}} and len(found.oddities()) == 1
    sizes = {(frame["camera_id"], frame["w"]) for frame in found.load("transforms.json")["frames"]}
    assert sizes == {("03", 38), ("25", 76)}


def test_attributes_that_are_missing_or_wrong_cost_nothing(tmp_path):
    def change(file):
        for name in list(file["Camera"].attrs):
            del file["Camera"].attrs[name]
        for name in list(file.attrs):
            file.attrs[name] = np.zeros(3)

    found = extract(tmp_path, change)
    assert found.unreadable() == set() and len(found.pictures()) == 12 and found.info["num_frame"] == 4
    assert found.info["resolution"] == [64, 76] and found.info["fps"] == 30


# ---- what is no SMC file


def test_what_is_no_smc_file_is_named_alike_by_a_run_and_by_inspect(tmp_path):
    whole = tmp_path / "whole.smc"
    synthetic_release.write_smc(whole, **synthetic_release.SMALL_SMC)
    contents = {"s1_all": b"", "s2_all": b"<!DOCTYPE html>", "s3_all": whole.read_bytes()[:200_000]}
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    (tmp_path / "release/0018").mkdir(parents=True)
    for performance, content in contents.items():
        workspace.smc("0018", performance).write_bytes(content)
    workspace.run("--performance", *contents, expect=1)
    said = inspect(*[workspace.smc("0018", performance) for performance in contents], tmp_path, expect=1).stderr
    cut = f"is cut short: 0.20 of {whole.stat().st_size / 1e6:.2f} MB"
    for performance, message in zip(contents, ("is empty", "is no HDF5 file (it begins with '<!DOCTYPE ht')", cut)):
        line = f"0018_{performance}_raw.smc: {message}"
        assert workspace.row("0018", performance)["error"] == line and line in said.splitlines()
    assert f"{tmp_path.name}: is a folder" in said.splitlines()


# ---- modalities


def test_a_modality_is_a_row_in_the_reader_and_a_line_in_the_script(tmp_path):
    """A copy of the two files in which the cameras have depth pictures too, and the performance a table of hands."""
    additions = {
        "renderme_360_reader_new.py": [
            '    "depth": Modality("Camera/{}/depth", "frames", pictures=True, by_camera=True, default=True),',
            '    "hands": Modality("Hands", "frames"),',
        ],
        "extract_streaming_gdrive.py": ['    "depth": write_pictures,', '    "hands": write_hands,'],
    }
    code = (
        "def write_hands(extraction, modality):\n"
        "    for _, frame, points in extraction.entries(modality):\n"
        '        extraction.save(f"hands/{frame}.npz", npz_bytes(points=points))\n\n\n'
    )
    for name, lines in additions.items():
        text, last = (TESTS.parent / name).read_text(), '\n    "transforms":'
        assert text.count(last) == 1
        text = text.replace(last, "\n" + "\n".join(lines) + last)
        (tmp_path / name).write_text(text.replace("# To add a modality", code + "# To add a modality"))

    def add(file):
        file.copy("Camera/25/mask", "Camera/25/depth")
        file.copy("Camera/25/mask", "Camera/03/depth")
        file["Hands/0"], file["Hands/1"] = np.arange(6.0), "text"

    release = extract(tmp_path / "untidy", add, modalities=["audio"]).workspace.release
    workspace = Workspace(tmp_path / "other", release)
    modalities = ["images", "depth", "hands", "calibration", "transforms"]
    workspace.write_config(extraction={"performances": ["s1_all"], "modalities": modalities, "cameras": [25]})
    python, script, *arguments = map(str, workspace.command())
    command = [python, script.replace(str(TESTS.parent), str(tmp_path)), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = workspace.path("0018", "s1_all")
    assert len(list(folder.glob("depth/cam_25/*.png"))) == 4 and not (folder / "depth/cam_03").exists()
    assert np.load(folder / "hands/0.npz")["points"].tolist() == [0, 1, 2, 3, 4, 5]
    info = workspace.info("0018", "s1_all")
    assert set(info["modalities"]) == set(modalities)
    assert [(entry["modality"], entry["frame"]) for entry in info["unreadable"]] == [("hands", 1)]
    inspected = subprocess.run(
        [sys.executable, tmp_path / "extract_streaming_gdrive.py", "--inspect", workspace.smc("0018", "s1_all")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "2 cameras with 4 frames: 3 25" in rows(inspected.stdout)["depth"]
