"""Damaged and hostile SMC files through the extraction, as a user runs it: nothing crashes, leaks or goes astray."""

import csv
import json
import os
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import synthetic_release as synthetic
from conftest import SCRIPT, stored_pictures, written_pictures
from hostile import LINKS, SECRET, at_the_top, mutations, snapshot, write_secret

OURS = ("subjects", "temp_smc", "MANIFEST.csv", "logs")  # all that a run may write to, but for its locks
MODALITIES = ", ".join(synthetic.MODALITIES)
CONFIG = """\
google_drive:
  remote_name: demo
  rclone_flags: ["--config", "rclone.conf"]
extraction:
  subjects: all
  performances: [{performances}]
  modalities: [{modalities}]
storage:
  temp_dir: temp_smc
  output_dir: subjects
  min_free_gb: 0
processing:
  verify: {verify}
"""


class Place:
    """A folder with a release, a config and what a run leaves there."""

    def __init__(self, folder):
        self.folder, self.release, self.output = folder, folder / "release", folder / "subjects"
        self.performances = {}
        self.release.mkdir()
        (folder / "rclone.conf").write_text(f"[demo]\ntype = alias\nremote = {self.release}\n")

    def smc(self, subject, performance):
        """Where an SMC file of the release is to be put."""
        self.performances[performance] = None
        (self.release / subject).mkdir(exist_ok=True)
        return self.release / subject / f"{subject}_{performance}_raw.smc"

    def run(self, verify="fast", but=OURS):
        """Run the script; exit code, what it said and its memory (kB) are kept. It changes nothing but what is its
        own."""
        text = CONFIG.format(performances=", ".join(self.performances), modalities=MODALITIES, verify=verify)
        (self.folder / "config.yaml").write_text(text)
        before = snapshot(self.folder, without=but)
        command = [sys.executable, SCRIPT, "--config", self.folder / "config.yaml"]
        with open(self.folder.parent / "said", "w+") as said:
            process = subprocess.Popen(
                command, cwd=self.folder.parent, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = self.code = os.waitstatus_to_exitcode(status)
            said.seek(0)
            self.said, self.memory = said.read(), usage.ru_maxrss
        assert snapshot(self.folder, without=but) == before
        assert "Traceback" not in self.said and all(c.isprintable() or c == "\n" for c in self.said), self.said
        return self

    def all_rows(self):
        """{(subject, performance): row} of the manifest."""
        with open(self.folder / "MANIFEST.csv", newline="") as file:
            return {(row["subject"], row["performance"]): row for row in csv.DictReader(file)}

    def rows(self):
        """The same, when what has to be true after every run was found to be so."""
        rows = self.all_rows()
        for row in rows.values():
            assert row["status"] in ("completed", "failed", "absent"), row
            assert (row["status"] == "failed") <= bool(row["error"])
        folders = {(path.parent.name, path.name) for path in self.output.glob("*/*") if not path.is_symlink()}
        assert folders == {key for key, row in rows.items() if row["status"] == "completed"}
        assert list((self.folder / "temp_smc").rglob("*.smc*")) == [] and self.memory < 1_000_000
        return rows


@pytest.fixture
def place(tmp_path):
    (tmp_path / "here").mkdir()
    return Place(tmp_path / "here")


def check_completed(folder, row, source):
    """A completed performance is whole, as its info.json and its row say, and holds what plain h5py reads in the
    SMC."""
    info = json.loads((folder / "metadata/info.json").read_text())
    written = written_pictures(folder)
    lost = {(entry["modality"], entry["camera"], entry["frame"]) for entry in info["unreadable"]}
    for name in written.keys() ^ source.keys():
        modality, camera, frame = name.split("/")
        where = modality, int(camera[4:]), int(frame[6:])
        assert {where, (*where[:2], None), (modality, None, None)} & lost, name
    assert all(written[name] == source[name] for name in written.keys() & source.keys())
    assert bool(info["unreadable"]) == ("could not be read" in row["error"])
    assert info["frames"] == {path.name[4:]: len(list(path.iterdir())) for path in folder.glob("images/*")}
    assert int(row["frames"]) == sum(info["frames"].values())
    assert sorted(path.name for path in folder.iterdir()) == sorted(info["modalities"] + ["metadata"])
    assert all(any(path.iterdir()) for path in folder.rglob("*") if path.is_dir())


# ---- damage

SEED = int(os.environ.get("MUTATIONS_SEED", "9"))  # another one for more of them

SMALL = {
    "cameras": (0, 25),
    "frame_ids": range(3),
    "size": (24, 30),
    "audio_seconds": 0.02,
    "masks": (25,),
    "keypoints2d": (25,),
}
BASES = {
    "plain": dict(SMALL, keypoints3d=True, calibration=True),
    "gzip": dict(
        SMALL, keypoints3d=True, calibration=False, storage="gzip", column_shape=True, scan=True, scan_masks=(0, 3)
    ),
    "chunked": dict(SMALL, calibration=False, storage="chunked"),
}


def test_damaged_files_each_end_as_completed_or_failed(place, tmp_path, sample):
    """A few mutations of each file; all 510 with --sweep."""
    for number, (name, options) in enumerate(BASES.items()):
        base = tmp_path / f"{name}.smc"
        synthetic.write_smc(base, "1000", "m000", **options)
        for k, (_, content) in sample(enumerate(mutations(base, 170, seed=SEED)), 5):
            place.smc(f"{1000 + number}", f"m{k:03d}").write_bytes(content)
    place.run()
    rows = place.rows()
    completed = [key for key, row in rows.items() if row["status"] == "completed"]
    assert 0.2 < len(completed) / len(list(place.release.glob("*/*"))) < 0.8 and place.code == 1
    with ProcessPoolExecutor(2) as apart:  # libhdf5 could crash
        for key, source in zip(
            completed, apart.map(stored_pictures, [place.smc(*key) for key in completed], timeout=300)
        ):
            check_completed(place.output.joinpath(*key), rows[key], source)


# ---- hostile constructions


def small(path, **options):
    """A small healthy SMC file at a path."""
    subject, performance = path.stem[:4], path.stem[5:].rpartition("_")[0]
    usual = {"cameras": (3, 25), "frame_ids": range(3), "size": (24, 30), "audio_seconds": 0.1, "masks": (25,)}
    options = {**usual, "calibration": False, **options}
    synthetic.write_smc(path, subject, performance, **options)
    return path


def test_nothing_of_another_file_gets_into_the_output(place):
    secret = place.folder / "secret.h5"
    write_secret(secret)
    for trick in (*LINKS, at_the_top):
        with h5py.File(small(place.smc("1000", trick.__name__), keypoints3d=True), "r+") as file:
            del file["Camera/25/color/0"]
            trick(file, secret)
    rows = place.run().rows()
    assert {row["status"] for row in rows.values()} == {"completed"} and len(rows) == 5
    for trick in (*LINKS, at_the_top):
        folder = place.output / "1000" / trick.__name__
        (entry,) = json.loads((folder / "metadata/info.json").read_text())["unreadable"]
        assert "another place" in entry["reason"] or "another file" in entry["reason"]
        assert entry["modality"] == ("keypoints3d" if trick is at_the_top else "images")
        assert entry["frame"] == (None if trick is at_the_top else 0)
        assert not (folder / "images/cam_25/frame_000000.jpg").exists()
        assert rows["1000", trick.__name__]["error"].count("1 entry could not be read")
    for path in place.folder.rglob("*"):
        assert path == secret or not path.is_file() or "release" in path.parts or SECRET not in path.read_bytes()


def odd_names(file):
    for group in (file["Camera"], file["Camera/25/color"], file["Camera/25/mask"], file):
        for name in ("..", "025", "1e3", "5\n", "a" * 60_000, "\x1b[2J", "٣"):
            group.create_group(name)
    file["Camera/25/color/../../../../../x"] = file["/etc/passwd"] = 1


def odd_attributes(file):
    for place, value in ((file, np.zeros(3)), (file["Camera"], "\x1b[2J" * 100)):
        for name in place.attrs:
            place.attrs[name] = value
    file.attrs["actor_id"] = b"\xff\x1b]0;title\x07"
    file.attrs["performance_part"] = "x" * 60_000
    file["Camera"].attrs["num_frame"] = 2**62


def empty_pictures(file):
    del file["Camera/25/color/0"], file["Camera/25/mask/0"]
    file["Camera/25/color/0"] = file["Camera/25/mask/0"] = np.zeros(0, np.uint8)


def parameter_names(file):
    for name in ("../../x", "file", "x" * 64_000, "self", "exp"):
        file.require_group("FLAME/0").attrs["num_frame"] = 1
        if "/" in name:
            file["FLAME/0"].create_group("..")
        else:
            file[f"FLAME/0/{name}"] = np.zeros(3)


def two_terabytes_of_audio(file):
    del file["Camera/00/audio/audio"]
    file["Camera/00/audio"].create_dataset("audio", (2**38, 2), np.float32, chunks=(1000, 2))


def links_without_end(file):
    color = file["Camera/25/color"]
    for frame in range(3, 20_000):
        h5py.h5o.link(color.id, color.id, b"%d" % frame)


def endless_heap(file):
    """HDF5 never comes back from a string in a heap of zeros."""
    path = Path(file.filename)
    file.close()
    content = bytearray(path.read_bytes())
    at = content.find(b"GCOL")
    content[at + 16 : at + 4096] = bytes(4080)
    path.write_bytes(content)


SKIPPED = (odd_names, odd_attributes, empty_pictures, parameter_names)
UNREADABLE = {two_terabytes_of_audio: ("audio", None), links_without_end: ("images", 25)}


def test_hostile_files_are_refused_or_what_is_odd_in_them_is_skipped_with_a_message(place):
    for trick in (*SKIPPED, *UNREADABLE, endless_heap):
        with h5py.File(small(place.smc("1000", trick.__name__)), "r+") as file:
            trick(file)
    rows = {performance: row for (_, performance), row in place.run().rows().items()}
    for trick in SKIPPED:
        assert rows[trick.__name__]["status"] == "completed", rows[trick.__name__]
        folder = place.output / "1000" / trick.__name__
        check_completed(folder, rows[trick.__name__], stored_pictures(place.smc("1000", trick.__name__)))
        assert json.loads((folder / "metadata/info.json").read_text())["cameras_available"] == [3, 25]
    for trick, (modality, camera) in UNREADABLE.items():
        assert rows[trick.__name__]["status"] == "completed", rows[trick.__name__]
        unreadable = json.loads((place.output / "1000" / trick.__name__ / "metadata/info.json").read_text())[
            "unreadable"
        ]
        assert {(entry["modality"], entry["camera"]) for entry in unreadable} == {(modality, camera)}
    assert rows["endless_heap"]["status"] == "failed"
    assert "reading it does not come to an end" in rows["endless_heap"]["error"]
    for name in ("odd_names", "odd_attributes", "parameter_names"):
        assert f"warning: 1000_{name}_raw.smc: " in place.said
    with np.load(place.output / "1000/parameter_names/flame/frame_000000.npz") as frame:
        assert set(frame.files) == {"file", "self", "exp"}
    assert not list(place.folder.rglob("x")) and "missing" in rows["empty_pictures"]["error"]


def test_pictures_that_claim_too_many_pixels_to_decode_are_damaged_ones(place):
    with h5py.File(small(place.smc("1000", "s1_all")), "r+") as file:
        for frame, side in ((0, 30_000), (1, 60_000)):
            picture = bytearray(file[f"Camera/25/mask/{frame}"][()].tobytes())
            picture[16:24] = side.to_bytes(4, "big") * 2
            picture[29:33] = zlib.crc32(picture[12:29]).to_bytes(4, "big")
            del file[f"Camera/25/mask/{frame}"]
            file[f"Camera/25/mask/{frame}"] = np.frombuffer(picture, np.uint8)
        del file["Camera"].attrs["resolution"]
    row = place.run(verify="full").rows()["1000", "s1_all"]
    assert (row["status"], row["error"]) == ("completed", "2 damaged pictures, listed in info.json")
    info = json.loads((place.output / "1000/s1_all/metadata/info.json").read_text())
    assert info["damaged_frames"] == {"masks": {"25": [0, 1]}}


# ---- inspection


def test_inspecting_damaged_files_says_what_is_wrong_and_goes_on(tmp_path, sample):
    for trick in (odd_names, odd_attributes, two_terabytes_of_audio):
        path = small(tmp_path / f"1000_{trick.__name__}_raw.smc")
        with h5py.File(path, "r+") as file:
            trick(file)
    for number, (_, content) in sample(enumerate(mutations(small(tmp_path / "1000_s1_all_raw.smc"), 60, seed=3)), 6):
        (tmp_path / f"damaged_{number}.smc").write_bytes(content)
    paths = sorted(tmp_path.glob("*.smc"))
    done = subprocess.run(
        [sys.executable, SCRIPT, "--inspect", *paths], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(c.isprintable() or c == "\n" for c in done.stdout + done.stderr)
    for path in paths:
        assert path.name in done.stdout + done.stderr, path
    assert list(tmp_path.iterdir()) and sorted(tmp_path.iterdir()) == paths


# ---- symbolic links


@pytest.fixture
def precious(place):
    """A folder that is nobody's business, beside the output."""
    folder = place.folder / "precious"
    for name in (
        ".s1_all.partial/file",
        "s1_all/images/cam_25/frame_000000.jpg",
        "file",
        "1000_s1_all_raw.smc",
        "1000_s2_all_raw.smc.abc.partial",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"precious")
    return folder


def test_through_a_link_in_the_place_of_the_subject_a_new_performance_is_written_and_nothing_deleted(place, precious):
    source = small(place.smc("1000", "s2_all"))
    place.output.mkdir()
    (place.output / "1000").symlink_to(precious)
    before = snapshot(precious)
    row = place.run(but=(*OURS, "precious")).all_rows()["1000", "s2_all"]
    check_completed(precious / "s2_all", row, stored_pictures(source))
    shutil.rmtree(precious / "s2_all")
    assert place.code == 0 and snapshot(precious) == before


PLACES = (
    "subjects/{}/s1_all",
    "subjects/{}/.s1_all.partial",
    "subjects/{}/.s1_all.old",
    "temp_smc/{}",
    "temp_smc/{}/{}_s1_all_raw.smc",
)
PIPES = (PLACES[1], PLACES[4])


def test_a_link_or_a_pipe_in_the_place_of_an_output_or_temp_file_is_replaced_and_not_followed(place, precious, sample):
    cases = [(name, target) for name in PLACES for target in ("precious", "precious/file", "nowhere")]
    cases += [(name, None) for name in PIPES]
    odd = {f"{1000 + number}": case for number, case in enumerate(sample(cases, 8))}
    for subject, (name, target) in odd.items():
        source, path = small(place.smc(subject, "s1_all")), place.folder / name.format(subject, subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        if target is None:
            os.mkfifo(path)
        else:
            path.symlink_to(place.folder / target)
        if path.suffix == ".smc" and target == "precious/file":  # as long and as old as the file on the remote
            path.write_bytes(bytes(source.stat().st_size))
            os.utime(path, ns=(source.stat().st_mtime_ns,) * 2)
    rows = place.run().rows()
    assert place.code == 0, place.said
    for subject, case in odd.items():
        pictures = stored_pictures(place.smc(subject, "s1_all"))
        assert rows[subject, "s1_all"]["status"] == "completed", case
        check_completed(place.output / subject / "s1_all", rows[subject, "s1_all"], pictures)
    paths = [*place.output.rglob("*"), *(place.folder / "temp_smc").rglob("*")]
    assert not any(path.is_symlink() or path.is_fifo() for path in paths)
    assert not (place.folder / "nowhere").exists()
