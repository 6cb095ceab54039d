"""The reader of SMC files: what it returns, and what it refuses."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import synthetic_release as synthetic
from hostile import LINKS, at_the_top, write_secret

import renderme_360_reader_new
from renderme_360_reader_new import SMCError, SMCReader, camera_name, probe_picture

SIZE = (32, 38)
FRAMES = [0, 2, 5, 10]  # "10" comes before "2" among names
EVERYTHING = {**synthetic.SMALL_SMC, "frame_ids": FRAMES, "size": SIZE}
EVERYTHING |= {"masks": (3, 25), "keypoints2d": (25, 30), "scan_masks": (0, 25)}


@pytest.fixture(scope="module")
def smc(tmp_path_factory):
    """An SMC file with everything but FLAME, which is large."""
    path = tmp_path_factory.mktemp("reader") / "0018_e0_raw.smc"
    synthetic.write_smc(path, "0018", "e0", **EVERYTHING)
    return path


@pytest.fixture
def reader(smc):
    with SMCReader(smc) as reader:
        yield reader


@pytest.fixture
def copy(smc, tmp_path):
    """The path of a copy of that file, to be spoilt."""
    path = tmp_path / "0018_e0_raw.smc"
    path.write_bytes(smc.read_bytes())
    return path


def put(group, name, content):
    """Put a data set of bytes in the place of another."""
    if name in group:
        del group[name]
    group[name] = np.frombuffer(content, np.uint8)


def error(path, read):
    """The message with which reading fails."""
    with pytest.raises(SMCError) as caught, SMCReader(path) as reader:
        read(reader)
    message = str(caught.value)
    assert message.startswith(Path(path).name + ": ") and message.isprintable()
    return message


def iter_encoded(reader, modality, camera=None):
    """Yield (number, stored bytes) of the pictures of a modality, or raise the first error."""
    for entry in reader.entries(modality, camera):
        yield entry.number, entry.read()


def read_everything(reader):
    """Ask for what the file has, as the extraction does."""
    for modality in ("images", "masks"):
        for camera in reader.cameras(modality):
            list(iter_encoded(reader, modality, camera))
    for modality in ("uv_textures", "scan_masks"):
        list(iter_encoded(reader, modality))
    for get in (reader.get_audio, reader.get_Calibration_all, reader.get_Keypoints3d, reader.get_scanmesh):
        get()


# ---- the published reader's names and returns


def test_actor_and_camera_info_are_plain_values(reader):
    assert (reader.actor_id, reader.performance_part, reader.capture_date) == ("0018", "e0", "2022-08-20")
    assert (
        reader.get_actor_info()
        == reader.actor_info
        == {"age": 38, "color": "yellow", "gender": "male", "height": 172.5, "weight": 64.0}
    )
    assert [type(value) for value in reader.actor_info.values()] == [int, str, str, float, float]
    info = reader.get_Camera_info()
    assert info is reader.Camera_info and (info["num_device"], info["num_frame"]) == (60, 4)
    assert info["resolution"].tolist() == list(SIZE)
    assert isinstance(reader.smc, h5py.File) and reader.smc.attrs["actor_id"] == "0018"


def test_a_picture_is_bgr_as_opencv_decodes_it(reader):
    picture = reader.get_img(25, "color", 5)
    stored = reader.smc["Camera/25/color/5"][()]
    assert picture.shape == (*SIZE, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, cv2.imdecode(stored, cv2.IMREAD_COLOR))


@pytest.mark.parametrize("camera", [3, "3", "03", np.int64(3)])
def test_a_camera_is_accepted_as_number_and_name(reader, camera):
    assert np.array_equal(reader.get_img(camera, "color", 0), reader.get_img("03", "color", 0))
    assert reader.frame_numbers("images", camera) == FRAMES


@pytest.mark.parametrize("camera", [60, -1, "x", "", "3.0", 3.0, None, "٣", "../03"])
def test_what_is_no_camera_is_a_value_error(reader, camera):
    with pytest.raises(ValueError, match="cameras are 0 to 59"):
        camera_name(camera)


def test_a_list_of_frames_is_stacked_in_its_order_and_none_is_all_in_frame_order(reader):
    one = {frame: reader.get_img("25", "color", frame) for frame in FRAMES}
    assert np.array_equal(reader.get_img("25", "color", [10, 0]), np.stack([one[10], one[0]]))
    assert np.array_equal(reader.get_img("25", "color", ["5"]), one[5][None])
    assert np.array_equal(reader.get_img("25", "color"), np.stack([one[frame] for frame in FRAMES]))
    assert np.array_equal(reader.get_img("25", "color", None, disable_tqdm=False), reader.get_img("25", "color"))
    assert reader.get_Keypoints3d([5, 0]).shape == (2, 73, 3)
    assert reader.get_Keypoints2d(25).shape == (len(reader.frame_numbers("keypoints2d", 25)), 106, 2)
    assert reader.get_uv().shape == (4, 256, 256, 3) and reader.get_uv(2).shape == (256, 256, 3)


def test_a_mask_is_the_maximum_over_its_channels(copy):
    three = np.zeros((*SIZE, 3), np.uint8)
    three[1, 2], three[3, 4], three[5, 6] = (9, 0, 0), (1, 200, 3), (0, 0, 77)
    with h5py.File(copy, "r+") as file:
        put(file["Camera/25/mask"], "0", cv2.imencode(".png", three)[1].tobytes())
        put(file["Camera/25/mask"], "2", cv2.imencode(".png", three.max(2))[1].tobytes())
    with SMCReader(copy) as reader:
        for frame in (0, 2):
            mask = reader.get_img(25, "mask", frame)
            assert mask.dtype == np.uint8 and np.array_equal(mask, three.max(2))
        assert reader.get_img(3, "mask").shape == (4, *SIZE)
        assert reader.get_scanmask(0).shape == SIZE and reader.get_scanmask().shape == (2, *SIZE)


def test_an_image_type_that_is_none_is_a_value_error(reader):
    with pytest.raises(ValueError, match="Image_type 'depth'"):
        reader.get_img(25, "depth", 0)


def test_calibration_audio_keypoints_and_mesh_are_the_stored_numbers(reader):
    file, rig = reader.smc, synthetic.rig(SIZE)
    everything = reader.get_Calibration_all()
    assert list(everything) == list(rig)
    for name, shape in {"K": (3, 3), "D": (5,), "RT": (4, 4)}.items():
        assert everything["07"][name].shape == shape and everything["07"][name].dtype == np.float64
        assert np.array_equal(everything["07"][name], rig["07"][name]) and np.array_equal(
            reader.get_Calibration(7)[name], rig["07"][name]
        )
    audio = reader.get_audio()
    assert audio["sample_rate"] == 48000 and type(audio["sample_rate"]) is int
    assert audio["audio"].dtype == np.float32 and np.array_equal(audio["audio"], file["Camera/00/audio/audio"][()])
    assert np.array_equal(reader.get_Keypoints2d("25", 0), file["Keypoints2d/25/0"][()])
    assert np.array_equal(reader.get_Keypoints3d(5), file["Keypoints3d/5"][()])
    mesh = reader.get_scanmesh()
    assert all(np.array_equal(mesh[name], file["Scan"][name][()]) for name in ("vertex", "vertex_indices"))
    assert mesh["vertex"].dtype == np.float64 and mesh["vertex_indices"].dtype.kind == "i"


def test_flame_is_a_dict_of_arrays_for_a_frame_and_of_stacks_for_more(copy):
    with h5py.File(copy, "r+") as file:
        for frame in FRAMES:
            file[f"FLAME/{frame}/exp"] = np.full(50, frame, np.float32)
            file[f"FLAME/{frame}/file"] = np.zeros(3)  # a name that is an argument of numpy.savez
    with SMCReader(copy) as reader:
        assert reader.get_FLAME(5)["exp"].tolist() == [5] * 50
        assert reader.get_FLAME()["exp"][:, 0].tolist() == FRAMES and reader.get_FLAME([5, 0])["exp"][
            :, 0
        ].tolist() == [5, 0]
        assert set(reader.get_FLAME([0])) == {"exp", "file"}


# ---- what lies in the file


def test_cameras_are_those_with_data_whatever_num_device_says(copy):
    with h5py.File(copy, "r+") as file:
        file["Camera"].attrs["num_device"] = 7
        file.create_group("Camera/40/color")  # empty
        file.create_group("Camera/41")
    with SMCReader(copy) as reader:
        assert reader.Camera_info["num_device"] == 7
        assert reader.cameras() == reader.cameras("masks") == [3, 25]
        assert reader.cameras("keypoints2d") == [25, 30] and reader.cameras("scan_masks") == [0, 25]
        assert reader.has("images", 25) and not reader.has("images", 40) and not reader.has("images", 41)
        assert reader.frame_numbers("images", 40) == reader.frame_numbers("images", 0) == []
        assert list(iter_encoded(reader, "images", 40)) == []


def test_has_and_unknown_groups_tell_what_there_is(copy):
    with h5py.File(copy, "r+") as file:
        file.create_group("Hands3d")
        file.create_group("FLAME")  # empty
        del file["UV_texture"]
    with SMCReader(copy) as reader:
        assert [name for name in renderme_360_reader_new.MODALITIES if not reader.has(name)] == ["flame", "uv_textures"]
        assert reader.unknown_groups() == ["Hands3d"] and reader.oddities == []
        assert reader.audio_info() == {"sample_rate": 48000, "channels": 2, "samples": 6400, "duration_s": 6400 / 48000}


def test_frame_numbers_may_have_gaps(reader):
    assert (
        reader.frame_numbers("masks", 3)
        == reader.frame_numbers("keypoints3d")
        == reader.frame_numbers("uv_textures")
        == FRAMES
    )
    assert reader.num_frame == 4


@pytest.mark.parametrize("stated", [0, -1, 2**62])
def test_a_number_of_frames_that_cannot_be_gives_way_to_what_is_there(copy, stated):
    with h5py.File(copy, "r+") as file:
        file["Camera"].attrs["num_frame"] = stated
    with SMCReader(copy) as reader:
        assert reader.num_frame == 4 and reader.fps() == 30
        assert any(str(stated) in oddity for oddity in reader.oddities)


@pytest.mark.parametrize(
    "frames, seconds, fps",
    [(1911, 63.70, 30), (486, 32.38, 15), (100, 4, 25), (30, None, None), (30, 0, None), (0, 1, 4)],
)
def test_fps_comes_from_frames_and_audio(copy, frames, seconds, fps):
    with h5py.File(copy, "r+") as file:
        del file["Camera/00/audio"]
        file["Camera"].attrs["num_frame"] = frames
        if seconds is not None:
            file["Camera/00/audio/audio"] = np.zeros((round(seconds * 1000), 2), np.float32)
            file["Camera/00/audio/sample_rate"] = 1000
    with SMCReader(copy) as reader:
        assert reader.fps() == fps


@pytest.mark.parametrize("storage", ["contiguous", "chunked", "gzip"])
@pytest.mark.parametrize("column_shape", [False, True])
def test_storage_and_shape_make_no_difference(tmp_path, smc, storage, column_shape):
    path = tmp_path / "0018_e0_raw.smc"
    synthetic.write_smc(path, "0018", "e0", **EVERYTHING, storage=storage, column_shape=column_shape)
    with SMCReader(path) as reader, SMCReader(smc) as plain:
        for modality in ("images", "masks"):
            assert sorted(iter_encoded(reader, modality, 25)) == sorted(iter_encoded(plain, modality, 25))
            assert reader.encoded(modality, "3", 10) == plain.encoded(modality, "3", 10)
        assert dict(iter_encoded(reader, "scan_masks")) == dict(iter_encoded(plain, "scan_masks"))
        assert reader.encoded("scan_masks", 25) == plain.encoded("scan_masks", 25)
        assert dict(iter_encoded(reader, "uv_textures")) == dict(iter_encoded(plain, "uv_textures"))
        assert np.array_equal(reader.get_audio()["audio"], plain.get_audio()["audio"])
        assert np.array_equal(reader.get_Calibration(59)["RT"], plain.get_Calibration(59)["RT"])


@pytest.mark.parametrize("options", [{}, {"userblock_size": 4096}, {"libver": "latest"}])
def test_pictures_come_in_stored_order_as_the_stored_bytes(tmp_path, options):
    order = [7, 3, 11, 0, 5, 100]
    content = {frame: os.urandom(3000) for frame in order}
    with h5py.File(tmp_path / "shuffled.smc", "w", **options) as file:
        for frame in order:
            file[f"Camera/25/color/{frame}"] = np.frombuffer(content[frame], np.uint8)
    with SMCReader(tmp_path / "shuffled.smc") as reader:
        assert list(iter_encoded(reader, "images", 25)) == [(frame, content[frame]) for frame in order]
        assert reader.frame_numbers("images", 25) == sorted(order)
        assert all(reader.encoded("images", 25, frame) == content[frame] for frame in order)


def test_an_open_file_object_serves_as_well_as_a_path(smc):
    with open(smc, "rb") as source, SMCReader(source) as reader, SMCReader(smc) as plain:
        assert list(iter_encoded(reader, "images", 25)) == list(iter_encoded(plain, "images", 25))
        assert reader.oddities == []


def test_memory_stays_small_over_a_big_file_of_many_pictures(tmp_path):
    with h5py.File(tmp_path / "big.smc", "w") as file:
        for camera in range(20, 26):
            for frame in range(400):
                file[f"Camera/{camera}/color/{frame}"] = np.full(30_000, frame % 256, np.uint8)
    code = (
        "import re, sys; from renderme_360_reader_new import SMCReader\n"
        "used = lambda: int(re.search(r'VmHWM:\\s+([0-9]+)', open('/proc/self/status').read())[1])\n"
        "before = used()\n"
        "with SMCReader(sys.argv[1]) as reader:\n"
        "    size = sum(len(data) for camera in reader.cameras()\n"
        "               for data in (entry.read() for entry in reader.entries('images', camera)))\n"
        "print(size, used() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "big.smc"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    size, kilobytes = map(int, done.stdout.split())
    assert size == 72_000_000 and kilobytes < 15_000, kilobytes


def test_a_closed_reader_leaves_no_file_open(smc):
    before = len(os.listdir("/proc/self/fd"))
    with SMCReader(smc) as reader:
        reader.get_img(25, "color", 0)
    with pytest.raises(SMCError):
        SMCReader(smc, smc.with_name("none.smc"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_printed(smc, capfd):
    error(smc, lambda reader: reader.get_img(9, "color", 0))
    assert capfd.readouterr() == ("", "")


# ---- two files as one


@pytest.fixture
def pair(tmp_path):
    """The paths of a raw and an anno file."""
    common = {"cameras": (3, 25), "frame_ids": FRAMES, "size": SIZE}
    raw, anno = tmp_path / "0018_e0_raw.smc", tmp_path / "0018_e0_anno.smc"
    synthetic.write_smc(raw, "0018", "e0", **common, audio_seconds=4 / 30, calibration=False)
    synthetic.write_smc(anno, "0018", "e0", **common, images=False, masks=(3,), keypoints3d=True)
    return raw, anno


def test_a_pair_is_presented_as_one_performance(pair):
    with SMCReader(*pair) as reader, SMCReader(pair[0]) as raw, SMCReader(pair[1]) as anno:
        assert list(iter_encoded(reader, "images", 25)) == list(iter_encoded(raw, "images", 25))
        assert list(iter_encoded(reader, "masks", 3)) == list(iter_encoded(anno, "masks", 3))
        assert reader.cameras() == [3, 25] and reader.cameras("masks") == [3]
        assert (
            reader.has("audio") and reader.has("calibration") and reader.has("keypoints3d") and not reader.has("flame")
        )
        assert np.array_equal(reader.get_Calibration(25)["K"], anno.get_Calibration(25)["K"])
        assert np.array_equal(reader.get_audio()["audio"], raw.get_audio()["audio"])
        assert reader.fps() == 30 and reader.oddities == [] and reader.smc.filename == os.fspath(pair[0])


def test_where_both_files_have_it_pictures_and_audio_come_from_raw_and_the_rest_from_anno(pair):
    for path, mark in zip(pair, (b"raw", b"anno")):
        with h5py.File(path, "r+") as file:
            put(file, "Camera/25/color/0", mark)
            put(file, "Camera/03/mask/0", mark)
            for name in set(file) & {"Calibration"}:
                del file[name]
            file["Calibration/25/K"], file["Calibration/25/D"], file["Calibration/25/RT"] = (
                np.full((3, 3), len(mark)),
                np.zeros(5),
                np.eye(4),
            )
            if "audio" not in file.require_group("Camera/00"):
                file["Camera/00/audio/audio"], file["Camera/00/audio/sample_rate"] = np.zeros((5, 1), np.float32), 5
    with SMCReader(*pair) as reader:
        assert reader.encoded("images", 25, 0) == b"raw" and reader.encoded("masks", 3, 0) == b"anno"
        assert reader.get_Calibration(25)["K"][0, 0] == 4 and reader.get_audio()["sample_rate"] == 48000


def test_an_empty_group_of_one_file_does_not_hide_the_other_files(pair):
    with h5py.File(pair[0], "r+") as raw, h5py.File(pair[1], "r+") as anno:
        raw.copy("Camera/25/color", anno, "Camera_25")
        del raw["Camera/03/color"], raw["Camera/25/color"]
        raw.create_group("Camera/25/color")
        anno.move("Camera_25", "Camera/25/color")
        anno.move("Keypoints3d", "Elsewhere")
        anno.create_group("Keypoints3d")
        anno.copy("Elsewhere", raw, "Keypoints3d")
    with SMCReader(*pair) as reader:
        assert reader.cameras() == [25] and reader.frame_numbers("images", 25) == FRAMES
        assert reader.get_Keypoints3d(0).shape == (73, 3)


def test_files_of_a_pair_that_disagree_are_odd(pair):
    with h5py.File(pair[1], "r+") as anno:
        anno.attrs["actor_id"] = "0019\x1b[2J"
        anno["Camera"].attrs["num_frame"] = 5
    with SMCReader(*pair) as reader:
        assert (reader.actor_id, reader.num_frame) == ("0018", 4)
        assert len(reader.oddities) == 2 and all(oddity.isprintable() for oddity in reader.oddities)
        assert "0018" in reader.oddities[0] and "0019" in reader.oddities[0]


def test_an_error_names_the_file_of_the_pair_that_is_at_fault(pair):
    with h5py.File(pair[1], "r+") as anno:
        put(anno, "Camera/03/mask/0", b"no picture")
    with (
        SMCReader(*pair) as reader,
        pytest.raises(SMCError, match="^0018_e0_anno.smc: Camera/03/mask/0 cannot be decoded"),
    ):
        reader.get_img(3, "mask", 0)


# ---- damaged files


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "is no HDF5 file (it begins with '<!DOCTYPE ht')"),
        (bytes(10_000), "is no HDF5 file"),
        (b"\x89HDF\r\n\x1a\n", "is damaged"),
        (b"\x89HDF\r\n\x1a\n" + b"\xff" * 10_000, "is damaged"),
    ],
)
def test_what_is_no_hdf5_file_is_an_error_that_says_what_it_is(tmp_path, content, message):
    (tmp_path / "0018_s1_all_raw.smc").write_bytes(content)
    assert f"0018_s1_all_raw.smc: {message}" in error(tmp_path / "0018_s1_all_raw.smc", lambda reader: None)


def test_a_file_that_is_not_there_or_a_folder_is_an_error(tmp_path):
    assert "there is no such file" in error(tmp_path / "none.smc", lambda reader: None)
    assert error(tmp_path, lambda reader: None) == f"{tmp_path.name}: is a folder"


@pytest.mark.parametrize("libver", ["earliest", "v108", "latest"])
@pytest.mark.parametrize("left", [0.999, 0.5])
def test_a_file_that_is_cut_is_an_error_that_says_how_much_is_there(tmp_path, libver, left):
    with h5py.File(tmp_path / "cut.smc", "w", libver=(libver, libver if libver == "v108" else "latest")) as file:
        file["Camera/25/color/0"] = np.zeros(1_660_000, np.uint8)
    size = os.path.getsize(tmp_path / "cut.smc")
    os.truncate(tmp_path / "cut.smc", int(left * size))
    assert (
        error(tmp_path / "cut.smc", lambda reader: None) == f"cut.smc: is cut short: {left * size / 1e6:.2f} of 1.66 MB"
    )


def test_what_the_disk_does_is_no_damage_of_the_file(smc):
    said = "Can't read data (file read failed: errno = 5, error message = 'Input/output error')"
    with (
        SMCReader(smc) as reader,
        pytest.raises(OSError, match="Input/output error") as caught,
        reader._files[0].reading("Camera"),
    ):
        raise RuntimeError(said)
    assert caught.value.errno == 5


@pytest.mark.parametrize(
    "path, read",
    [
        ("Camera/09/color", lambda reader: reader.get_img(9, "color", 0)),
        ("Camera/25/color/1", lambda reader: reader.get_img(25, "color", 1)),
        ("Camera/25/color/1", lambda reader: reader.get_img(25, "color", [0, 1])),
        ("Keypoints2d/03", lambda reader: reader.get_Keypoints2d(3)),
        ("ScanMask/09", lambda reader: reader.get_scanmask(9)),
        ("UV_texture/1", lambda reader: reader.get_uv(1)),
    ],
)
def test_what_is_not_in_the_file_is_named(smc, path, read):
    assert f"there is no {path}" in error(smc, read)


WRONG = {
    "Calibration/25/K": (np.zeros((3, 4)), lambda reader: reader.get_Calibration(25)),
    "Calibration/25/D": (np.array(["a"] * 5, "S1"), lambda reader: reader.get_Calibration(25)),
    "Calibration/25/D ": (np.zeros(8), lambda reader: reader.get_Calibration(25)),
    "Calibration/25/RT": (np.full((4, 4), np.nan), lambda reader: reader.get_Calibration(25)),
    "Keypoints2d/25/0": (np.zeros((105, 2)), lambda reader: reader.get_Keypoints2d(25)),
    "Keypoints3d/0": (np.zeros((73, 3), complex), lambda reader: reader.get_Keypoints3d(0)),
    "Camera/00/audio/audio": (np.zeros((5, 2), np.uint32), lambda reader: reader.get_audio()),
    "Camera/00/audio/audio ": (np.zeros((50, 50), np.float32), lambda reader: reader.audio_info()),
    "Camera/00/audio/sample_rate": (np.nan, lambda reader: reader.audio_info()),
    "Camera/00/audio/sample_rate ": (44100.5, lambda reader: reader.get_audio()),
    "Camera/25/color/0": (np.zeros(10, np.uint16), lambda reader: list(iter_encoded(reader, "images", 25))),
    "Camera/25/color/2": (np.zeros((10, 2), np.uint8), lambda reader: reader.encoded("images", 25, 2)),
    "Camera/25/mask/0": (h5py.Empty("u1"), lambda reader: list(iter_encoded(reader, "masks", 25))),
    "Camera/25/mask": (np.zeros(3), lambda reader: reader.frame_numbers("masks", 25)),
    "Scan/vertex": (np.zeros(3), lambda reader: reader.get_scanmesh()),
    "Scan/vertex_indices": (np.zeros((3, 3)), lambda reader: reader.get_scanmesh()),
    "Scan/vertex_indices ": (np.full((3, 3), 10**10), lambda reader: reader.get_scanmesh()),
    "UV_texture/0": (np.zeros((3, 3, 3), np.uint8), lambda reader: reader.get_uv()),
    "Keypoints3d": (5, lambda reader: reader.get_Keypoints3d()),
}


@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_shape_or_type_is_an_error_that_names_the_place(copy, path):
    (value, read), path = WRONG[path], path.strip()
    with h5py.File(copy, "r+") as file:
        del file[path]
        file[path] = value
    assert path.rpartition("/")[0] in error(copy, read)


@pytest.mark.parametrize("path", ["Camera", "Camera/25/color/0", "Calibration/25/K", "Keypoints3d/0", "FLAME/0"])
def test_a_group_and_a_data_set_are_not_the_same(copy, path):
    with h5py.File(copy, "r+") as file:
        group = path in file and isinstance(file[path], h5py.Group) or path == "FLAME/0"
        if path in file:
            del file[path]
        file[path] = 1
        if not group:
            del file[path]
            file.create_group(path)
    read = {
        "Cal": lambda r: r.get_Calibration(25),
        "Key": lambda r: r.get_Keypoints3d(),
        "FLA": lambda r: r.get_FLAME(),
    }
    assert path in error(copy, read.get(path[:3], lambda reader: list(iter_encoded(reader, "images", 25))))


def test_entries_that_cannot_be_stacked_are_an_error(copy):
    small = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    with h5py.File(copy, "r+") as file:
        put(file, "Camera/25/color/2", small)
        file["FLAME/0/exp"], file["FLAME/1/trans"] = np.zeros(50), np.zeros(3)
    assert "cannot be stacked" in error(copy, lambda reader: reader.get_img(25, "color"))
    assert "different parameters" in error(copy, lambda reader: reader.get_FLAME())


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n" + bytes(8) + b"\xff" * 20]
)
def test_a_picture_that_cannot_be_decoded_is_an_error_and_its_bytes_can_be_had(copy, content):
    with h5py.File(copy, "r+") as file:
        put(file, "Camera/25/color/0", content)
    with SMCReader(copy) as reader:
        assert reader.encoded("images", 25, 0) == dict(iter_encoded(reader, "images", 25))[0] == content
    assert "Camera/25/color/0 cannot be decoded" in error(copy, lambda reader: reader.get_img(25, "color", 0))
    assert not probe_picture(content).whole


def test_the_probe_of_a_picture_tells_format_size_and_completeness_whatever_follows():
    for suffix in ("jpg", "png"):
        data = cv2.imencode(f".{suffix}", np.zeros((20, 30), np.uint8))[1].tobytes()
        assert probe_picture(data) == (suffix, 20, 30, True)
        assert probe_picture(data[:-1]) == (suffix, 20, 30, False)
        assert not any(probe_picture(data[:length]).whole for length in range(len(data)))
        for after in (bytes(1), bytes(1000), b"garbage", b"MPF" + data[: len(data) // 2]):
            assert probe_picture(data + after) == (suffix, 20, 30, True)


def test_a_preview_in_its_header_does_not_make_a_cut_jpeg_whole():
    data = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (40, 60), np.uint8))[1].tobytes()
    preview = cv2.imencode(".jpg", np.zeros((8, 8), np.uint8))[1].tobytes()
    with_preview = data[:2] + b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview + data[2:]
    assert probe_picture(with_preview) == ("jpg", 40, 60, True)
    assert not any(probe_picture(with_preview[:length]).whole for length in range(len(with_preview)))
    assert not probe_picture(with_preview[: len(with_preview) // 2] + bytes(500)).whole


# ---- hostile files


@pytest.fixture
def secret(tmp_path):
    write_secret(tmp_path / "secret.h5")
    return tmp_path / "secret.h5"


def external_group(file, secret):
    del file["Camera/25/color"]
    file["Camera/25/color"] = h5py.ExternalLink(str(secret), "color")


@pytest.mark.parametrize("trick", [*LINKS, external_group])
def test_only_what_lies_in_the_file_is_read(copy, secret, trick):
    with h5py.File(copy, "r+") as file:
        del file["Camera/25/color/0"]
        trick(file, secret)
    for read in (
        lambda reader: list(iter_encoded(reader, "images", 25)),
        lambda reader: reader.encoded("images", 25, 0),
        lambda reader: reader.get_img(25, "color", 0),
    ):
        message = error(copy, read)
        assert "Camera/25/color" in message and ("another place" in message or "another file" in message)


@pytest.mark.parametrize("trick", LINKS)
def test_numbers_too_are_read_only_from_the_file(copy, secret, trick):
    with h5py.File(copy, "r+") as file:
        del file["Camera/25/color/0"], file["Calibration/25/K"]
        trick(file, secret)
        file.move("Camera/25/color/0", "Calibration/25/K")
    message = error(copy, lambda reader: reader.get_Calibration(25))
    assert "Calibration/25/K" in message and ("another place" in message or "another file" in message)


def test_the_source_of_a_virtual_data_set_is_not_even_looked_at(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # who opens it waits for ever
    with h5py.File(tmp_path / "virtual.smc", "w", libver="latest") as file:
        space = h5py.h5s.create_simple((5,), (h5py.h5s.UNLIMITED,))
        space.select_hyperslab((0,), (h5py.h5s.UNLIMITED,), (5,), (5,))
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_virtual(space, os.fsencode(tmp_path / "pipe"), b"here", space)
        h5py.h5d.create(file.create_group("Camera/25/color").id, b"0", h5py.h5t.STD_U8LE, space, properties)
    code = (
        "import sys; from renderme_360_reader_new import SMCReader\n"
        "[entry.read() for entry in SMCReader(sys.argv[1]).entries('images', 25)]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "virtual.smc"],
        cwd=Path(__file__).parents[1],
        check=False,
        capture_output=True,
        timeout=120,
    )
    assert b"virtual.smc: Camera/25/color/0 cannot be read: its data lies in another file" in done.stderr


def test_a_link_at_the_top_is_refused(copy, secret):
    with h5py.File(copy, "r+") as file:
        at_the_top(file, secret)
    assert "another place" in error(copy, lambda reader: reader.has("keypoints3d") and reader.get_Keypoints3d(0))


NAMES = ["..", "1e3", "-1", "٣", "5 ", "+5", "a" * 60_000, "new\nline", "\x1b[2J", "１", "0x1"]


def test_odd_names_are_never_used_and_noted(copy):
    with h5py.File(copy, "r+") as file:
        for group in (
            "Camera",
            "Camera/25/color",
            "Camera/25/mask",
            "ScanMask",
            "UV_texture",
            "Keypoints3d",
            "Calibration",
        ):
            for name in NAMES:
                file[group].create_group(name)
    with SMCReader(copy) as reader:
        assert reader.cameras() == [3, 25] and reader.cameras("scan_masks") == [0, 25]
        assert (
            [number for number, _ in sorted(iter_encoded(reader, "images", 25))]
            == reader.frame_numbers("masks", 25)
            == FRAMES
        )
        assert len(list(iter_encoded(reader, "uv_textures"))) == 4 and len(reader.get_Calibration_all()) == 60
        assert reader.get_Keypoints3d().shape == (4, 73, 3)
        for group in ("Camera has", "Camera/25/color has", "ScanMask has", "Keypoints3d has"):
            assert any(f"{group} entries that are left out" in oddity for oddity in reader.oddities)
        assert all(oddity.isprintable() and len(oddity) < 500 for oddity in reader.oddities)
        assert reader.unknown_groups() == []


def test_parts_of_a_path_as_names_lead_nowhere(copy):
    with h5py.File(copy, "r+") as file:
        file["Camera/25/color/../../x"] = 1
        file["/etc/passwd"] = 1
    with SMCReader(copy) as reader:
        assert reader.cameras() == [3, 25] and reader.frame_numbers("images", 25) == FRAMES
        assert reader.unknown_groups() == ["etc"] and len(reader.oddities) == 1


def test_parameters_of_flame_with_odd_names_are_left_out(copy):
    with h5py.File(copy, "r+") as file:
        for name in ("exp", "file", "..", "a b", "x" * 64_000, "é"):
            file[f"FLAME/0/{name}"] = np.zeros(3)
        file["FLAME/2/a/b"] = 1  # which is a group "a"
    with SMCReader(copy) as reader:
        assert set(reader.get_FLAME(0)) == {"exp", "file"} and len(reader.oddities) == 1
    assert "no data set FLAME/2/a" in error(copy, lambda reader: reader.get_FLAME(2))


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("actor_id", np.zeros(3), None),
        ("age", "old", None),
        ("height", np.inf, None),
        ("weight", h5py.Empty("f8"), None),
        ("gender", b"\xff\x1b", "\ufffd\x1b"),
        ("color", "x" * 30_000, "x" * 30_000),
    ],
)
def test_an_attribute_of_another_type_is_noted_and_not_fatal(copy, name, value, expected):
    with h5py.File(copy, "r+") as file:
        file.attrs[name] = value
    with SMCReader(copy) as reader:
        info = {"actor_id": reader.actor_id, **reader.actor_info}
        assert info[name] == expected
        assert [name in oddity for oddity in reader.oddities] == [True] * (expected is None)
        read_everything(reader)


@pytest.mark.parametrize("value", ["text", 1.5, [1, 2, 3], h5py.Empty("i8"), [2048.0, 2448.0]])
def test_a_resolution_that_is_none_is_noted_and_not_fatal(copy, value):
    with h5py.File(copy, "r+") as file:
        file["Camera"].attrs["resolution"] = value
    with SMCReader(copy) as reader:
        assert reader.Camera_info["resolution"] is None and "resolution" in reader.oddities[0]


def test_missing_attributes_are_none(copy):
    with h5py.File(copy, "r+") as file:
        for place in (file, file["Camera"]):
            for name in list(place.attrs):
                del place.attrs[name]
    with SMCReader(copy) as reader:
        values = [
            reader.actor_id,
            reader.performance_part,
            reader.capture_date,
            *reader.actor_info.values(),
            *reader.Camera_info.values(),
        ]
        assert set(values) == {None} and reader.oddities == [] and reader.num_frame == 4


@pytest.mark.parametrize(
    "shape, options",
    [((2**41,), {}), ((2**41, 1), {"chunks": (1 << 20, 1)}), ((2**30, 2**30), {"chunks": (10, 10)}), ((10**6,), {})],
)
def test_a_data_set_that_claims_more_than_it_has_is_an_error(copy, shape, options):
    with h5py.File(copy, "r+") as file:
        del file["Camera/25/color/0"], file["Calibration/25/K"], file["Camera/00/audio/audio"]
        file["Camera/25/color"].create_dataset("0", shape, np.uint8, **options)
        file["Calibration/25"].create_dataset("K", shape, np.float64, **options)
        file["Camera/00/audio"].create_dataset("audio", (shape[0], 2), np.float32)
    assert copy.stat().st_size < 10_000_000
    for read in (
        lambda reader: list(iter_encoded(reader, "images", 25)),
        lambda reader: reader.get_img(25, "color", 0),
        lambda reader: reader.get_Calibration(25),
        lambda reader: reader.get_audio(),
    ):
        error(copy, read)


@pytest.mark.parametrize("options, links", [({}, 2), ({"chunks": (4096,), "compression": "gzip"}, 2000)])
def test_one_picture_linked_many_times_is_an_error(tmp_path, options, links):
    with h5py.File(tmp_path / "links.smc", "w") as file:
        color = file.create_group("Camera/25/color")
        picture = color.create_dataset("0", data=np.frombuffer(os.urandom(300_000), np.uint8), **options)
        for frame in range(1, links):
            color[str(frame)] = picture
    assert f"claim {links * 300_000} bytes" in error(
        tmp_path / "links.smc", lambda reader: list(iter_encoded(reader, "images", 25))
    )


def test_pictures_that_unpack_to_far_more_than_the_file_are_an_error(tmp_path):
    with h5py.File(tmp_path / "bomb.smc", "w") as file:
        for frame in range(20):
            file.create_dataset(
                f"Camera/25/color/{frame}", data=np.zeros(5_000_000, np.uint8), chunks=(1_000_000,), compression="gzip"
            )
    assert "claim 100000000 bytes" in error(
        tmp_path / "bomb.smc", lambda reader: next(iter_encoded(reader, "images", 25))
    )


def test_ten_thousand_cameras_are_left_alone(tmp_path):
    with h5py.File(tmp_path / "many.smc", "w") as file:
        for number in range(10_000):
            file.create_group(f"Camera/{number:02d}")
        file["Camera/25/color/0"] = np.zeros(5, np.uint8)
        file["Camera/60/color/0"] = file["Camera/9999/color/0"] = np.zeros(5, np.uint8)
    with SMCReader(tmp_path / "many.smc") as reader:
        assert reader.cameras() == [25]
        assert len(reader.oddities) == 1 and "and 9937 more" in reader.oddities[0] and len(reader.oddities[0]) < 200


def test_the_list_of_oddities_has_an_end(copy):
    with h5py.File(copy, "r+") as file:
        for frame in range(1000):
            file.create_group(f"FLAME/{frame}/a b")
    with SMCReader(copy) as reader:
        assert all(reader.get_FLAME(frame) == {} for frame in range(1000))
        assert len(reader.oddities) == renderme_360_reader_new.MAX_ODDITIES


ABSENT = {
    "get_audio": (),
    "get_Keypoints2d": (25,),
    "get_Keypoints3d": (),
    "get_FLAME": (),
    "get_uv": (),
    "get_scanmesh": (),
    "get_scanmask": (),
}


@pytest.mark.parametrize("method", ABSENT)
def test_what_a_performance_does_not_have_is_none_as_in_the_published_reader(tmp_path, method):
    with h5py.File(tmp_path / "x.smc", "w") as smc:
        smc["Camera/25/color/0"] = np.zeros(5, np.uint8)
    with SMCReader(tmp_path / "x.smc") as reader:
        assert getattr(reader, method)(*ABSENT[method]) is None
        with contextlib.suppress(TypeError):  # of get_audio and get_scanmesh, which take no frame
            assert getattr(reader, method)(*ABSENT[method], 0) is None


def test_frames_without_key_points_are_none_and_left_out_of_lists_as_in_the_published_reader(tmp_path):
    flat, solid = np.arange(212.0).reshape(106, 2), np.arange(219.0).reshape(73, 3)
    with h5py.File(tmp_path / "x.smc", "w") as smc:
        for frame in (0, 3):
            smc[f"Keypoints2d/25/{frame}"], smc[f"Keypoints3d/{frame}"] = flat + frame, solid + frame
    with SMCReader(tmp_path / "x.smc") as reader:
        assert reader.get_Keypoints2d(25, 1) is None and reader.get_Keypoints3d(1) is None
        assert np.array_equal(reader.get_Keypoints2d("25", [0, 1, 3]), np.stack([flat, flat + 3]))
        assert np.array_equal(reader.get_Keypoints3d([2, 3]), (solid + 3)[None])
        with pytest.raises(SMCError, match="there is no Keypoints2d/05"):
            reader.get_Keypoints2d(5)


def test_a_file_that_is_open_with_h5py_already_can_be_read(tmp_path):
    with h5py.File(tmp_path / "x.smc", "w") as smc:
        smc["Camera/25/color/0"] = np.arange(5, dtype=np.uint8)
    with h5py.File(tmp_path / "x.smc"), SMCReader(tmp_path / "x.smc") as reader:
        assert reader.encoded("images", 25, 0) == bytes(range(5))


# ---- what is unusual


@pytest.mark.parametrize("color", ["{:06d}", "{:02d}", "{:d}"])
@pytest.mark.parametrize("camera", ["{:03d}", "{:02d}", "{:d}"])
def test_padded_names_are_the_numbers_that_they_say(smc, copy, color, camera):
    with h5py.File(copy, "r+") as file:
        for parent in ("Camera", "Calibration", "Keypoints2d", "ScanMask"):
            for name in list(file[parent]):
                file.move(f"{parent}/{name}", f"{parent}/x{name}")
            for name in list(file[parent]):
                file.move(f"{parent}/{name}", f"{parent}/{camera.format(int(name[1:]))}")
        for n in (3, 25):
            for group in (f"Camera/{camera.format(n)}/color", f"Camera/{camera.format(n)}/mask", "Keypoints3d"):
                for name in list(file[group]):
                    if color.format(int(name)) != name:
                        file.move(f"{group}/{name}", f"{group}/{color.format(int(name))}")
    with SMCReader(copy) as reader, SMCReader(smc) as plain:
        for modality in ("images", "masks", "keypoints2d", "scan_masks"):
            assert reader.cameras(modality) == plain.cameras(modality)
        assert reader.frame_numbers("images", 25) == FRAMES
        assert list(iter_encoded(reader, "images", 3)) == list(iter_encoded(plain, "images", 3))
        assert len(reader.places("images", 25, [0, 5])) == 2
        assert reader.encoded("scan_masks", 25) == plain.encoded("scan_masks", 25)
        assert np.array_equal(reader.get_img("25", "color", 10), plain.get_img("25", "color", 10))
        assert np.array_equal(reader.get_img("03", "mask"), plain.get_img("03", "mask"))
        assert np.array_equal(reader.get_Calibration(7)["K"], plain.get_Calibration(7)["K"])
        assert np.array_equal(reader.get_Keypoints2d(30, 0), plain.get_Keypoints2d(30, 0))
        assert np.array_equal(reader.get_Keypoints3d(), plain.get_Keypoints3d())
        assert np.array_equal(reader.get_audio()["audio"], plain.get_audio()["audio"]) and reader.fps() == 30
        usual = (camera.format(0), color.format(0)) == ("00", "0")
        assert bool(reader.oddities) != usual and all("are padded" in oddity for oddity in reader.oddities)


def test_of_two_names_for_one_number_the_usual_one_counts_and_the_other_is_noted(copy):
    with h5py.File(copy, "r+") as file:
        put(file["Camera/25/color"], "0002", b"other")
        put(file["Camera"], "7/color/0", b"other")
        put(file["Camera"], "07/color/0", b"usual")
    with SMCReader(copy) as reader:
        assert reader.cameras() == [3, 7, 25] and reader.frame_numbers("images", 25) == FRAMES
        assert reader.encoded("images", 7, 0) == b"usual"
        assert b"other" not in dict(iter_encoded(reader, "images", 25)).values()
        assert "Camera has entries that are left out: 7" in reader.oddities[0]
        assert "Camera/25/color has entries that are left out: 0002" in reader.oddities[1]


def test_a_group_without_a_name_that_is_understood_is_an_error_and_not_an_empty_group(copy):
    with h5py.File(copy, "r+") as file:
        for name in list(file["Camera/25/color"]):
            file.move(f"Camera/25/color/{name}", f"Camera/25/color/frame_{name}")
    assert "Camera/25/color has no numbers for names, but 'frame_0'" in error(
        copy, lambda reader: list(iter_encoded(reader, "images", 25))
    )


def test_arrays_may_have_axes_of_length_one(smc, copy):
    with h5py.File(copy, "r+") as file:
        for path, shape in {
            "Calibration/07/D": (1, 5),
            "Calibration/08/D": (5, 1),
            "Calibration/07/K": (1, 3, 3),
            "Calibration/07/RT": (4, 4, 1),
            "Keypoints2d/25/0": (1, 106, 2),
            "Keypoints3d/0": (73, 3, 1),
            "Scan/vertex": (1, -1, 3),
        }.items():
            value = file[path][()].reshape(shape)
            del file[path]
            file[path] = value
    with SMCReader(copy) as reader, SMCReader(smc) as plain:
        for camera in (7, 8):
            for name, value in plain.get_Calibration(camera).items():
                assert np.array_equal(reader.get_Calibration(camera)[name], value)
        assert np.array_equal(reader.get_Keypoints2d(25), plain.get_Keypoints2d(25))
        assert np.array_equal(reader.get_Keypoints3d(), plain.get_Keypoints3d())
        assert np.array_equal(reader.get_scanmesh()["vertex"], plain.get_scanmesh()["vertex"])


def test_a_distortion_of_four_numbers_has_none_for_k3(copy):
    with h5py.File(copy, "r+") as file:
        del file["Calibration/07/D"]
        file["Calibration/07/D"] = [1.0, 2, 3, 4]
    with SMCReader(copy) as reader:
        assert reader.get_Calibration(7)["D"].tolist() == [1, 2, 3, 4, 0]


def test_a_camera_without_a_pose_is_an_error_and_missing_among_all(copy):
    with h5py.File(copy, "r+") as file:
        file["Calibration/07/RT"][...] = np.nan
    assert "Calibration/07 holds values that are no finite numbers" in error(copy, lambda r: r.get_Calibration(7))
    with SMCReader(copy) as reader:
        assert len(reader.get_Calibration_all()) == 59 and "07" not in reader.get_Calibration_all()
        (fault,) = [entry for entry in reader.entries("calibration") if entry.number == 7]
        with pytest.raises(SMCError, match="Calibration/07"):
            fault.read()


SAMPLES = np.random.default_rng(3).integers(-(2**15), 2**15, (700, 2)).astype(np.int16)


@pytest.mark.parametrize(
    "stored, expected",
    [
        (SAMPLES[:, 0], SAMPLES[:, :1]),
        (SAMPLES[:, :1], SAMPLES[:, :1]),
        (SAMPLES[None, :, 0], SAMPLES[:, :1]),
        (SAMPLES.T, SAMPLES),
        (SAMPLES[None], SAMPLES),
        (SAMPLES.astype(">i2"), SAMPLES),
        (SAMPLES.astype(np.int32) * 65536, SAMPLES.astype(np.int32) * 65536),
        (SAMPLES / 32768, SAMPLES / 32768),
        ((SAMPLES / 32768).astype(np.float32).T, (SAMPLES / 32768).astype(np.float32)),
    ],
)
@pytest.mark.parametrize("rate", [48000, [48000], np.float64(48000)])
def test_sound_of_any_form_is_samples_by_channels(copy, stored, expected, rate):
    with h5py.File(copy, "r+") as file:
        del file["Camera/00/audio"]
        file["Camera/00/audio/audio"], file["Camera/00/audio/sample_rate"] = stored, rate
    with SMCReader(copy) as reader:
        found = reader.get_audio()
        assert found["audio"].dtype == expected.dtype and np.array_equal(found["audio"], expected)
        assert found["sample_rate"] == 48000 and type(found["sample_rate"]) is int
        info = reader.audio_info()
        assert (info["samples"], info["channels"]) == expected.shape and len(reader.oddities) == (
            stored.dtype != np.float32 or stored.shape != expected.shape
        )


@pytest.mark.parametrize(
    "form",
    [
        lambda data: {"data": np.frombuffer(data, np.uint8)[None]},
        lambda data: {"data": np.frombuffer(data, np.uint8)[:, None, None]},
        lambda data: {"data": np.frombuffer(data, np.uint8)[None], "chunks": (1, 100)},
        lambda data: {"data": np.frombuffer(data, np.int8)},
    ],
)
def test_pictures_may_be_stored_as_any_array_of_bytes(copy, form):
    with h5py.File(copy, "r+") as file:
        picture = file["Camera/25/color/0"][()].tobytes()
        del file["Camera/25/color/0"]
        file["Camera/25/color"].create_dataset("0", **form(picture))
    with SMCReader(copy) as reader:
        assert dict(iter_encoded(reader, "images", 25))[0] == reader.encoded("images", 25, 0) == picture


def test_entries_that_cannot_be_read_cost_themselves_alone(copy):
    with h5py.File(copy, "r+") as file:
        del file["Camera/25/color/0"], file["Camera/25/color/2"], file["Keypoints3d/2"]
        file["Camera/25/color/0"] = h5py.SoftLink("/Camera/25/color/5")
        file["Camera/25/color/2"] = np.zeros((10, 2), np.uint8)
        file["Keypoints3d/2"] = "text"
    with SMCReader(copy) as reader:
        assert reader.frame_numbers("images", 25) == FRAMES
        for modality, camera, bad in (("images", 25, {0, 2}), ("keypoints3d", None, {2})):
            read = set()
            for entry in reader.entries(modality, camera):
                with contextlib.suppress(SMCError):
                    entry.read()
                    read.add(entry.number)
            assert read == set(FRAMES) - bad


NAMES_OF_FILES = {
    "0018_s1_all_raw.smc": True,
    "Copy of 0018_s1_all_raw.smc": True,
    "Copy of Copy of 0018_s1_all_raw (2).smc": True,
    "Kopie von 0018_s1_all_raw.smc": True,
    "0018_s1_all_raw.smc的副本": True,
    "0018_s1_all_raw.smc のコピー": True,
    "0018_s1_all_raw (1).smc": True,
    "0018_s1_all_raw.smc (1)": True,
    "0018_s1_all_raw - Copy.smc": True,
    "0018_s1_all_raw的副本.smc": True,
    "副本0018_s1_all_raw.smc": True,
    "10018_s1_all_raw.smc": False,
    "a0018_s1_all_raw.smc": False,
    "._0018_s1_all_raw.smc": False,
    "0018_s1_all_raw2.smc": False,
    "0018_s1_all_raw_old.smc": False,
    "0018_s1_all.smc": False,
    "0018_s1_all_raw.smc.partial": False,
    "0018_s1_all_raw.smc.a1b2c3d4.partial": False,
    "0018_s1_all_raw.smc的副本.a1b2c3d4.partial": False,
    "0018_s1_all_raw.smc.crdownload": False,
    "0018_s1_all_raw.smc.selected": False,
    "0018_s1_all_raw.smc~": False,
    "0018_s1_all_raw.smc\n": False,
    "0018_s2_all_raw.smc␊0018_s1_all_raw.smc": False,
    "Copy\x1bof 0018_s1_all_raw.smc": False,
    "0018_s1_all_raw \x9b.smc": False,
    "0018_s1_all_raw.smc \n(1)": False,
}


@pytest.mark.parametrize("name", NAMES_OF_FILES)
def test_a_copy_of_a_file_is_known_by_the_usual_name_within_its_own(name):
    match = renderme_360_reader_new.SMC_NAME.fullmatch(name)
    assert bool(match) == NAMES_OF_FILES[name]
    assert not match or match.group("subject", "performance", "half") == ("0018", "s1_all", "raw")
