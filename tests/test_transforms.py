"""transforms.json: what a trainer reads from it, and nothing else, has to fit the pictures."""

import json
import math
import tracemalloc
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import pytest
import synthetic_release
from conftest import Workspace

from extract_streaming_gdrive import write_transforms
from renderme_360_reader_new import SMCReader

EVERYTHING = ["images", "masks", "audio", "calibration", "transforms"]
LENS = (-0.12, 0.09, 0.003, -0.002, 0.05)


def extracted(tmp_path, performance="s3_all", modalities=EVERYTHING, selected="all", change=None, **options):
    """A workspace in which the selected cameras of one performance were extracted, and its folder; `change` may change
    the SMC file before that."""
    settings = {"frames": 4, "size": (128, 153), "everything": True, **options}
    (path,) = synthetic_release.write_subject(tmp_path / "release", "0018", performances=[performance], **settings)
    if change:
        with h5py.File(path, "r+") as smc:
            change(smc)
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"performances": [performance], "modalities": modalities, "cameras": selected})
    workspace.run()
    return workspace, workspace.path("0018", performance)


@pytest.fixture(scope="module")
def s3_all(tmp_path_factory):
    """The same of all cameras of an s3_all with lens distortion, not to be changed."""
    return extracted(tmp_path_factory.mktemp("s3_all"), distortion=LENS)


def load(folder):
    """transforms.json as strict JSON."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads((folder / "transforms.json").read_text(), parse_constant=refuse)


def seen_by(frame, points):
    """World points (n, 3) to pixels (n, 2) as a NeRF loader does it: camera axes are x right, y up, z back, and the
    corner of the first pixel is (0, 0)."""
    world_to_camera = np.linalg.inv(np.array(frame["transform_matrix"]))
    x, y, z = (world_to_camera @ np.column_stack([points, np.ones(len(points))]).T)[:3]
    x, y = x / -z, -y / -z
    k1, k2, p1, p2, k3 = (frame[name] for name in ("k1", "k2", "p1", "p2", "k3"))
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    v = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    return np.column_stack([frame["fl_x"] * u + frame["cx"], frame["fl_y"] * v + frame["cy"]])


def seen_by_calibration(camera, points):
    """The same from cameras.json, by OpenCV: the middle of the first pixel is (0, 0)."""
    K, D, RT = (np.array(camera[name]) for name in ("K", "D", "RT"))
    world_to_camera = np.linalg.inv(RT)
    rotation, _ = cv2.Rodrigues(world_to_camera[:3, :3])
    return cv2.projectPoints(points, rotation, world_to_camera[:3, 3], K, D)[0][:, 0]


def test_points_of_the_head_project_to_where_the_pictures_show_them(tmp_path):
    """With the numbers in transforms.json, and with those in cameras.json."""
    _, folder = extracted(tmp_path, frames=2, size=(512, 612), cameras=range(0, 60, 5), distortion=LENS)
    cameras = json.loads((folder / "calibration/cameras.json").read_text())["cameras"]
    names = list(synthetic_release.LANDMARKS)
    points = np.array([synthetic_release.LANDMARKS[name] for name in names])
    checked = set()
    for frame in load(folder)["frames"]:
        picture = cv2.imread(str(folder / frame["file_path"]))
        assert picture.shape == (frame["h"], frame["w"], 3)
        visible = synthetic_release.visible_landmarks({"RT": np.array(cameras[frame["camera_id"]]["RT"])})
        middle_of_first = {seen_by: 0.5, seen_by_calibration: 0}
        for project, camera in ((seen_by, frame), (seen_by_calibration, cameras[frame["camera_id"]])):
            for name, pixel in zip(names, project(camera, points)):
                if name in visible:
                    found = synthetic_release.find_landmark(picture, name) + middle_of_first[project]
                    assert np.hypot(*(pixel - found)) < 1
                    checked.add((frame["camera_id"], name, project))
    assert len(checked) > 60 and len({camera for camera, *_ in checked}) == 12


def test_every_number_is_that_of_the_calibration(s3_all):
    _, folder = s3_all
    cameras = json.loads((folder / "calibration/cameras.json").read_text())["cameras"]
    for frame in load(folder)["frames"]:
        camera = cameras[frame["camera_id"]]
        K = np.array(camera["K"]) + [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]  # counts from the corner of the first pixel
        assert [[frame["fl_x"], 0, frame["cx"]], [0, frame["fl_y"], frame["cy"]], [0, 0, 1]] == K.tolist()
        assert [frame[name] for name in ("k1", "k2", "p1", "p2", "k3")] == camera["D"]
        assert np.array_equal(np.array(frame["transform_matrix"]) * [1, -1, -1, 1], camera["RT"])
        assert (frame["w"], frame["h"]) == (153, 128)
        assert frame["camera_angle_x"] == 2 * math.atan(153 / (2 * frame["fl_x"]))
        assert frame["camera_angle_y"] == 2 * math.atan(128 / (2 * frame["fl_y"]))


def test_the_top_says_what_all_pictures_share_and_no_intrinsics(s3_all):
    workspace, folder = s3_all
    transforms = load(folder)
    frames = transforms.pop("frames")
    assert transforms == {
        "camera_model": "OPENCV",
        "fps": 15,
        "audio_path": "audio/audio.wav",
        "camera_indices": list(range(38)),
        "timestep_indices": [0, 1],
    }
    assert (folder / transforms["audio_path"]).is_file()
    assert len(frames) == 38 * 2
    assert workspace.info("0018", "s3_all")["modalities"] == EVERYTHING
    assert workspace.rows[-1]["modalities"] == " ".join(EVERYTHING)


def test_pictures_are_numbered_by_camera_and_by_moment(tmp_path):
    _, folder = extracted(tmp_path, "e0", modalities=["images", "calibration", "transforms"], cameras=(3, 25))
    transforms = load(folder)
    found = [
        [frame[k] for k in ("camera_index", "camera_id", "timestep_index", "timestep_id", "file_path")]
        for frame in transforms["frames"]
    ]
    assert found == [
        [c, camera, t, moment, f"images/cam_{camera}/frame_{moment}.jpg"]
        for c, camera in enumerate(["03", "25"])
        for t, moment in enumerate(["000000", "000014", "000031"])
    ]
    assert transforms["fps"] is None and "audio_path" not in transforms and "mask_path" not in transforms["frames"][0]


def test_only_whole_pictures_that_exist_are_listed_each_with_its_mask_if_it_has_one(tmp_path):
    def spoil_two_masks(smc):
        del smc["Camera/25/mask/1"], smc["Camera/03/mask/2"]
        smc["Camera/03/mask/2"] = np.zeros(500, np.uint8)

    options = {"gaps": {3: [1], 25: [0, 2]}, "damaged": {(3, 0): "cut", (4, 1): "empty"}, "masks": (3, 16, 25)}
    _, folder = extracted(tmp_path, frames=8, cameras=(3, 4, 16, 25), change=spoil_two_masks, **options)
    found = {frame["file_path"]: frame.get("fg_mask_path") for frame in load(folder)["frames"]}
    assert found == {
        "images/cam_03/frame_000002.jpg": None,
        "images/cam_03/frame_000003.jpg": "masks/cam_03/frame_000003.png",
        "images/cam_04/frame_000000.jpg": None,
        "images/cam_04/frame_000002.jpg": None,
        "images/cam_04/frame_000003.jpg": None,
        **{f"images/cam_16/frame_00000{n}.jpg": f"masks/cam_16/frame_00000{n}.png" for n in range(4)},
        "images/cam_25/frame_000001.jpg": None,
        "images/cam_25/frame_000003.jpg": "masks/cam_25/frame_000003.png",
    }
    assert not any("mask_path" in frame for frame in load(folder)["frames"])  # nerfstudio refuses some without one
    assert all((folder / path).is_file() for path in [*found, *filter(None, found.values())])


def test_where_every_picture_has_a_mask_nerfstudio_finds_them_too(s3_all):
    _, folder = s3_all
    for frame in load(folder)["frames"]:
        assert frame["mask_path"] == frame["fg_mask_path"] == frame["file_path"].replace("images", "masks")[:-3] + "png"


def test_pictures_stored_as_png_have_their_name(tmp_path):
    def store_png(smc):
        for frame in ("0", "1"):
            del smc[f"Camera/25/color/{frame}"]
            smc[f"Camera/25/color/{frame}"] = cv2.imencode(".png", np.zeros((128, 153, 3), np.uint8))[1].ravel()

    _, folder = extracted(tmp_path, change=store_png, cameras=(25,))
    assert [frame["file_path"] for frame in load(folder)["frames"]] == [
        f"images/cam_25/frame_00000{n}.png" for n in (0, 1)
    ]


def test_the_size_is_the_pictures_own_where_no_attribute_says_it(tmp_path):
    def forget_resolution(smc):
        del smc["Camera"].attrs["resolution"]

    _, folder = extracted(tmp_path, "s1_all", change=forget_resolution, frames=2, size=(64, 76))
    assert {(frame["w"], frame["h"]) for frame in load(folder)["frames"]} == {(76, 64)}


@pytest.mark.parametrize(
    "modalities, options, reason",
    [
        (EVERYTHING, {"calibration": False}, "the file has no calibration"),
        (EVERYTHING, {"damaged": {(25, 0): "cut", (25, 1): "empty"}}, "no undamaged pictures were extracted"),
    ],
)
def test_what_it_cannot_be_made_from_is_a_note_and_no_failure(tmp_path, modalities, options, reason):
    workspace, folder = extracted(tmp_path, cameras=(25,), modalities=modalities, **options)
    assert not (folder / "transforms.json").exists()
    assert "transforms" not in workspace.info("0018", "s3_all")["modalities"]
    assert workspace.rows[-1]["status"] == "completed" and reason in workspace.rows[-1]["error"]


def test_cameras_and_modalities_added_later_are_in_it_together_with_the_old_ones(tmp_path):
    workspace, folder = extracted(tmp_path, modalities=["images", "calibration"], selected=[0, 25], cameras=(0, 1, 25))
    workspace.write_config(extraction={"cameras": [1], "modalities": ["images", "calibration", "transforms"]})
    workspace.run()
    assert {frame["camera_id"] for frame in load(folder)["frames"]} == {"00", "01", "25"} and len(workspace.rows) == 2
    workspace.write_config(extraction={"modalities": ["images"]})
    workspace.run("--redo", "--subject", "0018")
    assert {frame["camera_id"] for frame in load(folder)["frames"]} == {"00", "01", "25"}


def test_a_picture_takes_less_than_3_kilobytes_of_memory(tmp_path):
    smc = synthetic_release.write_subject(tmp_path, "0018", performances=["s1_all"], frames=1, size=(64, 76))[0]
    pictures = {
        (kind, camera, frame): (f"{kind}/cam_{camera:02d}/frame_{frame:06d}.{ending}", (2048, 2448))
        for kind, ending in (("images", "jpg"), ("masks", "png"))
        for camera in range(60)
        for frame in range(20)
    }
    with SMCReader(smc) as reader:
        task = SimpleNamespace(
            reader=reader,
            folder=tmp_path,
            pictures=pictures,
            save=lambda name, content: (tmp_path / name).write_bytes(content),
        )
        tracemalloc.start()
        write_transforms(task, "transforms")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(load(tmp_path)["frames"]) == 1200
    assert peak < 1200 * 3000 + 3e6
