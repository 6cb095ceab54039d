"""The snippets under "Using the data" in the README, run as they stand there on an extracted demo."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
import synthetic_release
from conftest import SCRIPT

README = (SCRIPT.parent / "README.md").read_text()
SECTION = re.search(r"^## Using the data$(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```bash\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module", params=[(0, 0, 0, 0, 0), (-0.12, 0.09, 0.003, -0.002, 0.05)], ids=["pinhole", "lens"])
def demo(request, tmp_path_factory):
    """A folder in which the demo is extracted, as the quick start does it."""
    folder = tmp_path_factory.mktemp("readme")
    synthetic_release.write_demo(
        folder / "demo",
        ["0018"],
        performances=["s3_all"],
        seconds=1.6,
        cameras=(25,),
        size=(512, 612),
        distortion=request.param,
    )
    command = [sys.executable, SCRIPT, "--config", "demo/config.yaml"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def run(number, folder, monkeypatch):
    """What the names in a block stand for after it has run, by itself, in a folder."""
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(BLOCKS[number], "README.md", "exec"), names)  # noqa: S102
    return names


def test_there_is_a_block_for_each_thing_and_each_is_short():
    assert len(BLOCKS) == 3 and len(COMMANDS) == 3
    assert all(len(block.splitlines()) < 14 for block in BLOCKS + COMMANDS)


def test_a_frame_and_a_small_one(demo, monkeypatch):
    names = run(0, demo, monkeypatch)
    assert names["picture"].shape == (512, 612, 3) and names["small"].shape == (128, 153, 3)


def test_the_sound_of_a_frame_is_a_fifteenth_of_a_second_in_s3_all(demo, monkeypatch):
    sound = run(1, demo, monkeypatch)["sound"]
    assert sound.shape == (3200, 2)
    whole, _ = soundfile.read(demo / "demo/subjects/0018/s3_all/audio/audio.wav")
    assert np.array_equal(sound, whole[12 * 3200 : 13 * 3200])


def test_a_point_lands_where_the_picture_shows_it(demo, monkeypatch):
    names = run(2, demo, monkeypatch)
    assert np.allclose(names["points"][0], synthetic_release.LANDMARKS["nose"], atol=1e-6)
    picture = run(0, demo, monkeypatch)["picture"]
    assert np.hypot(*(names["pixels"][0] - synthetic_release.find_landmark(picture, "nose"))) < 1


def test_without_the_distortion_a_pinhole_camera_fits(demo, monkeypatch):
    camera = run(2, demo, monkeypatch)
    for name in synthetic_release.visible_landmarks({"RT": camera["RT"]}):
        x, y, z = camera["K"] @ (np.linalg.inv(camera["RT"]) @ [*synthetic_release.LANDMARKS[name], 1])[:3]
        assert np.hypot(*(np.array([x / z, y / z]) - synthetic_release.find_landmark(camera["straight"], name))) < 1


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    """A folder in which s1_all and s3_all of the demo are extracted, with the script beside them as in the checkout."""
    folder = tmp_path_factory.mktemp("quick_start")
    options = {"performances": ["s1_all", "s3_all"], "seconds": 1.6, "cameras": (24, 25, 48), "size": (512, 612)}
    synthetic_release.write_demo(folder / "demo", ["0018"], **options)
    (folder / SCRIPT.name).symlink_to(SCRIPT)
    command = [sys.executable, SCRIPT.name, "--config", "demo/config.yaml"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def run_commands(number, folder, *tools):
    """Run a block of commands in the folder, if the tools that it needs are there."""
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"no {tool} here (Debian: ffmpeg, squashfs-tools)")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", COMMANDS[number]],
        cwd=folder,
        env={**os.environ, "PATH": path},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def frames_and_rate(video):
    """Read every frame of a video: how many there are, (height, width), and the frame rate."""
    capture, frames = cv2.VideoCapture(str(video)), []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame)
    return len(frames), frames[0].shape[:2], capture.get(cv2.CAP_PROP_FPS)


def test_a_scene_is_where_the_readme_says(quick_start):
    run_commands(0, quick_start)
    scene = quick_start / "demo/scenes/0018_s3_all_000012"
    assert str(scene.relative_to(quick_start)) in SECTION
    assert sorted(path.name for path in scene.glob("*/*.png")) == ["24.png", "25.png", "48.png"]
    assert {path.name for path in scene.glob("sparse/0/*")} == {"cameras.txt", "images.txt", "points3D.txt"}


def test_the_videos_have_every_frame_and_the_sound(quick_start):
    run_commands(1, quick_start, "ffmpeg")
    for name in ("video.mp4", "video.mkv"):
        assert frames_and_rate(quick_start / name) == (48, (512, 612), 30)
    first = quick_start / "demo/subjects/0018/s1_all/images/cam_25/frame_000000.jpg"
    assert first.read_bytes() in (quick_start / "video.mkv").read_bytes()  # without loss
    assert frames_and_rate(quick_start / "head.mp4") == (40, (512, 512), 25)
    sound, rate = soundfile.read(quick_start / "head.wav")
    assert rate == 16000 and sound.shape == (25600,)


def test_the_packed_subject_has_every_file(quick_start):
    run_commands(2, quick_start, "mksquashfs", "unsquashfs")
    listing = subprocess.run(["unsquashfs", "-l", "0018.sqfs"], cwd=quick_start, check=True, capture_output=True)
    files = [path for path in (quick_start / "demo/subjects/0018").rglob("*") if path.is_file()]
    assert sum(str(path.name).encode() in listing.stdout for path in files) == len(files)


def test_what_inspect_prints_stands_in_the_readme(tmp_path):
    options = {"performances": ["s3_all"], "seconds": 1.6, "size": (512, 612), "distinct": 1}
    smc = synthetic_release.write_demo(tmp_path / "demo", ["0018"], **options)[0]
    run = subprocess.run([sys.executable, SCRIPT, "--inspect", smc], check=False, capture_output=True, text=True)
    shown = re.search(r"^```\n(0018 s3_all\n.*?)^```", SECTION, re.MULTILINE | re.DOTALL)[1]

    def without_sizes(text):
        """They differ a little from one libjpeg to the next."""
        return re.sub(r"[0-9.]+ ?MB", "", text).split()

    assert without_sizes(run.stdout) == without_sizes(shown)
