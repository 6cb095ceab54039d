"""The Python in the README, run as it stands there on an extracted demo."""

import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import synthetic_release
from conftest import SCRIPT

README = (SCRIPT.parent / "README.md").read_text()
SECTION = re.search(r"^## Using the data$(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


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
    assert len(BLOCKS) == 4 and all(len(block.splitlines()) < 14 for block in BLOCKS)


def test_a_frame(demo, monkeypatch):
    assert run(0, demo, monkeypatch)["picture"].shape == (512, 612, 3)


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
    straight = run(3, demo, monkeypatch)["straight"]
    camera = run(2, demo, monkeypatch)
    for name in synthetic_release.visible_landmarks({"RT": camera["RT"]}):
        x, y, z = camera["K"] @ (np.linalg.inv(camera["RT"]) @ [*synthetic_release.LANDMARKS[name], 1])[:3]
        assert np.hypot(*(np.array([x / z, y / z]) - synthetic_release.find_landmark(straight, name))) < 1


def test_what_inspect_prints_stands_in_the_readme(tmp_path):
    options = {"performances": ["s3_all"], "seconds": 1.6, "size": (512, 612), "distinct": 1}
    smc = synthetic_release.write_demo(tmp_path / "demo", ["0018"], **options)[0]
    run = subprocess.run([sys.executable, SCRIPT, "--inspect", smc], check=False, capture_output=True, text=True)
    shown = re.search(r"^```\n(0018 s3_all\n.*?)^```", SECTION, re.MULTILINE | re.DOTALL)[1]

    def without_sizes(text):
        """They differ a little from one libjpeg to the next."""
        return re.sub(r"[0-9.]+ ?MB", "", text).split()

    assert without_sizes(run.stdout) == without_sizes(shown)
