"""Where the cameras stand, the best subset, the picture, the page in a real browser, and scenes."""

import itertools
import json
import re
import shutil

import cv2
import h5py
import numpy as np
import pytest
import synthetic_release
from conftest import Workspace

import extract_streaming_gdrive as c

VIEWS_38 = sorted(c.S3_VIEWS)
UNREADABLE = [55, 57, 59]
READABLE = [n for n in VIEWS_38 if n not in UNREADABLE]


def data_of(page):
    return json.loads(re.search(r"^const \{.*\} = (.*);$", page, re.MULTILINE)[1])


def places():
    """Azimuth, elevation (degrees) and distance (m) of 60 cameras; lower numbers on the person's left, that is,
    right."""
    columns = [(160 - 20 * (n // 3), (30, 3, -24)[n % 3], 1.25) for n in range(51)]
    return np.array(columns + [(180, 31, 1.3)] + [(150 - 40 * k, -3, 1.07) for k in range(8)], float)


def rig(where=None, world=None):
    """The geometry of cameras that look at one point from there."""
    return c.rig_geometry(poses(where, world))


def poses(where=None, world=None):
    """The poses of cameras that look at one point from there; world (4, 4): moves the frame in which the camera that is
    in front stands at +z, with y up, and the person's left at +x."""
    pose_of = {}
    for n, (azimuth, elevation, distance) in enumerate(places() if where is None else where):
        a, e = np.radians([azimuth, elevation])
        outward = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
        right = np.array([np.cos(a), 0, -np.sin(a)])
        pose = np.eye(4)
        pose[:3, :3] = np.column_stack([right, np.cross(-outward, right), -outward])
        pose[:3, 3] = distance * outward
        pose_of[n] = pose if world is None else world @ pose
    return pose_of


def moved(axes, origin):
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = axes, origin
    return world


Y_DOWN = moved(np.diag([1, -1, -1]), (0, 0, 0))
Z_UP = moved([[1, 0, 0], [0, 0, -1], [0, 1, 0]], (5, -3, 100))
SLANTED = moved(cv2.Rodrigues(np.array([0.4, -1.1, 2.0]))[0], (-20, 7, 3))
WORLDS = pytest.mark.parametrize(
    "world", [np.eye(4), Y_DOWN, Z_UP, SLANTED], ids=["y up", "y down", "z up, moved", "slanted"]
)


# ---------------------------------------------------------------- geometry


@WORLDS
def test_azimuth_elevation_and_distance_of_a_known_rig_in_any_world_frame(world):
    found = rig(world=world)
    assert found.ids == list(range(60))
    assert np.allclose(np.column_stack([found.azimuth, found.elevation, found.distances]), places(), atol=1e-6)
    assert np.allclose(found.center, world[:3, 3])


def test_cameras_to_the_viewers_right_see_the_persons_left_ear():
    azimuth = rig().azimuth
    in_front_camera = np.array([np.linalg.solve(poses()[25], pose[:, 3]) for pose in poses().values()])
    beside = (abs(azimuth) > 1) & (abs(azimuth) < 179)
    assert np.array_equal(np.sign(in_front_camera[beside, 0]), np.sign(azimuth[beside]))


def test_the_up_direction_of_half_a_rig_is_not_tilted_by_the_pitch_of_its_cameras():
    where = np.array([place for place in places() if abs(place[0]) <= 60 and place[1] != -24])
    half = {n if n else 25: pose for n, pose in poses(where, SLANTED).items()}  # its first camera is the front
    order = np.argsort(list(half))
    assert np.allclose(c.rig_geometry(half).elevation, where[order, 1])


def test_parallel_axes_and_a_missing_front_camera_are_said_clearly():
    with pytest.raises(c.ConfigError, match="meet in no point"):
        c.rig_geometry({25: poses()[25]})
    with pytest.raises(c.ConfigError, match="lacks camera 25"):
        c.rig_geometry({camera: pose for camera, pose in poses().items() if camera != 25})


def test_coverage_is_the_angle_to_the_direction_that_is_worst_off():
    angles = rig([(azimuth, 0, 1) for azimuth in range(0, 360, 10)]).angles
    assert c.coverage(angles, [0, 9, 18, 27]) == pytest.approx((40, 80 / 36 * 10))
    assert c.coverage(angles, [0])[0] == pytest.approx(180)
    assert c.coverage(angles, []) == (180, 180)


# ---------------------------------------------------------------- suggestions


@pytest.mark.parametrize("seed", range(4))
def test_suggestions_are_the_optimum_that_brute_force_finds(seed):
    random = np.random.default_rng(seed)
    directions = random.normal(size=(16, 3)) * (1, 0.4, 1)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    angles = np.degrees(np.arccos(np.clip(directions @ directions.T, -1, 1)))
    available = sorted(random.choice(16, 11, replace=False).tolist())
    always = available[3]
    for n in range(1, 12):
        sets = [s for s in itertools.combinations(available, n) if always in s]
        best = min(c.coverage(angles, s)[0] for s in sets)
        found = c.suggest_cameras(angles, available, n, always)
        assert found == sorted(set(found)) and len(found) == n and always in found and set(found) <= set(available)
        assert c.coverage(angles, found)[0] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("views", [VIEWS_38, range(60)], ids=["38 views", "60 views"])
def test_every_size_is_found_and_never_worse_than_a_smaller_one(views):
    angles, last = rig().angles, 180.0
    for n in range(1, len(views) + 1):
        found = c.suggest_cameras(angles, views, n, 25)
        assert len(set(found)) == n and 25 in found and set(found) <= set(views)
        largest, _ = c.coverage(angles, found)
        assert largest <= last + 1e-5
        last = largest


@WORLDS
def test_suggestions_depend_neither_on_the_world_frame_nor_on_the_order_of_the_views(world):
    for n in (4, 13):
        best = c.suggest_cameras(rig().angles, VIEWS_38, n, 25)
        assert best == c.suggest_cameras(rig(world=world).angles, VIEWS_38[::-1], n, 25)


# ---------------------------------------------------------------- layout and picture


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """A coloured picture per view, JPEG and one PNG, and one file that is no picture."""
    folder, views = tmp_path_factory.mktemp("views"), {}
    for n in VIEWS_38:
        views[n] = folder / f"{n:02d}{'.png' if n == 3 else '.jpg'}"
        cv2.imwrite(str(views[n]), np.full((512, 612, 3), (4 * n, 90, 250 - 4 * n), np.uint8))
    views[59].write_bytes(b"\xff\xd8 no picture")
    views[57].write_bytes(b"")
    huge = bytearray(views[55].read_bytes())
    size = huge.index(b"\xff\xc0") + 5
    huge[size : size + 4] = b"\xff" * 4  # 65535 x 65535 pixels
    views[55].write_bytes(huge)
    tiles = {n: c.read_picture(path, size=c.TILE_SIZE) for n, path in views.items()}
    assert [n for n, tile in tiles.items() if tile is None] == UNREADABLE
    return {n: tile for n, tile in tiles.items() if tile is not None}


def test_the_layout_has_the_front_in_the_middle_rings_downward_and_the_closer_cameras_apart():
    layout = c.rig_layout(rig())
    row, slot = ([camera[key] for camera in layout] for key in ("row", "slot"))
    assert [i for i in range(60) if row[i] == 0] == list(range(0, 51, 3)) + [51]
    assert [i for i in range(60) if row[i] == 1] == list(range(1, 51, 3))
    assert [i for i in range(60) if row[i] == 2] == list(range(52, 60))
    assert slot[24] == slot[25] == slot[26] == 16
    assert slot[22] == 18 and slot[28] == 14 and slot[51] == 34  # 22 on the right; 51 at the end
    assert slot[55] == 19  # half way from 20° to 40°
    assert len(set(zip(row, slot))) == 60
    assert layout[22]["label"] == "azimuth +20°, elevation +3°"


def test_the_picture_shows_the_views_as_they_stand_and_frames_the_selected_ones(tiles):
    sheet = c.camera_grid(rig(), tiles, [0, 25], "0018 s3_all")
    width, height, left, top = 214, 168 + 14, 40, 40
    for i, camera in enumerate(c.rig_layout(rig())):
        x, y = left + camera["slot"] * width // 2, top + camera["row"] * height
        assert abs(sheet[y + 100, x + 100] - ((4 * i, 90, 250 - 4 * i) if i in tiles else c.LIGHT_GREY)).max() < 9
        assert (tuple(sheet[y + 100, x - 2]) == c.BLUE) == (i in (0, 25))
        if i in tiles:  # the number is at the bottom left, below the heads
            assert tuple(sheet[y + 165, x + 3]) == (c.BLUE if i in (0, 25) else c.WHITE)
    below = sheet[top + 4 * height :]
    assert (below < 100).any(2).sum() > 5000


@pytest.mark.parametrize("cameras", [range(60), range(26)])
def test_the_picture_and_the_page_work_with_one_view_and_with_none(tiles, cameras):
    few = c.rig_geometry({camera: poses()[camera] for camera in cameras})
    for views in ({few.ids.index(25): tiles[25]}, {}):
        assert c.camera_grid(few, views, list(views), "0018 s1_all").shape[1] >= 1600
        assert len(data_of(c.camera_page(few, views, list(views), "0018 s1_all"))["selected"]) == len(views)


def test_views_of_full_size_make_a_small_page_that_loads_nothing(tmp_path):
    noise = np.random.default_rng(0).normal(120, 8, (2048, 2448, 1)).clip(0, 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "view.jpg"), noise, [cv2.IMWRITE_JPEG_QUALITY, 60])
    full = dict.fromkeys(VIEWS_38, c.read_picture(tmp_path / "view.jpg", size=c.TILE_SIZE))
    page = c.camera_page(rig(), full, VIEWS_38, "0018 s3_all, frame 0")
    assert len(page) < 3_000_000
    assert not re.search(r"(src|href)=.?(https?:|//)|url\(|@[A-Z]+@", page)


# ---------------------------------------------------------------- the page in a browser


@pytest.fixture(scope="module")
def browser():
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("no chromium and chromedriver here (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--window-size=1366,768",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page_file(tiles, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "0018_s3_all.html"
    path.write_text(c.camera_page(rig(), tiles, [0, 25], "0018 s3_all, frame 0"), encoding="utf-8")
    return path


@pytest.fixture
def page(browser, page_file):
    """The page open in the browser, 0 and 25 selected; at the end its console must be empty."""
    browser.get(page_file.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def tile(page, camera):
    return page.find_element("css selector", f'button.tile[data-camera="{camera}"]')


def expect(page, chosen):
    """The page shows this selection, with the largest gap and the mean that Python computes."""

    def read(name):
        return page.find_element("id", name)

    pressed = page.find_elements("css selector", '.tile[aria-pressed="true"]')
    assert sorted(int(element.get_attribute("data-camera")) for element in pressed) == sorted(chosen)
    assert read("count").text == str(len(chosen))
    line = "" if not chosen else "cameras: all" if len(chosen) == len(READABLE) else f"cameras: {sorted(chosen)}"
    assert read("line").get_attribute("value") == line
    assert read("copy").is_enabled() == bool(chosen)
    assert read("warning").is_displayed() == (bool(chosen) and 25 not in chosen)
    orange = {int(element.get_attribute("data-camera")) for element in page.find_elements("css selector", ".gap")}
    if chosen:
        angles = rig().angles.round(4)
        largest, mean = c.coverage(rig().angles, chosen)
        worst = int(angles[:, chosen].min(1).argmax())
        assert read("largest").text == f"{largest:.1f}°"
        assert read("where").text == f"at camera {worst} · mean {mean:.1f}°"
        assert orange == {worst, min(sorted(chosen), key=lambda n: angles[worst, n])}
    else:
        assert not page.find_elements("id", "largest") and not orange


def test_a_click_on_a_view_toggles_it(page):
    expect(page, [0, 25])
    tile(page, 40).click()
    expect(page, [0, 25, 40])
    tile(page, 0).click()
    expect(page, [25, 40])


def test_the_buttons_choose_all_none_and_the_scripts_suggestions(page):
    angles = rig().angles
    buttons = page.find_elements("css selector", "#presets button")
    choices = [c.suggest_cameras(angles, READABLE, n, 25) for n in (4, 8, 12, 16, 20)] + [READABLE, []]
    gaps = [(len(best), *c.coverage(angles, best)) for best in choices[:-2]]
    labels = ["{} · {:.1f}° · mean {:.1f}°".format(*gap) for gap in gaps]
    assert [button.text for button in buttons] == labels + ["all", "none"]
    for button, choice in zip(buttons, choices):
        button.click()
        expect(page, choice)
        assert button.get_attribute("aria-pressed") == "true"


def test_without_camera_25_there_is_a_warning(page):
    tile(page, 25).click()
    expect(page, [0])
    assert "five of the six" in page.find_element("id", "warning").text


def test_a_reload_keeps_the_choice(page):
    tile(page, 40).click()
    page.refresh()
    expect(page, [0, 25, 40])
    page.find_elements("css selector", "#presets button")[-1].click()  # none
    page.refresh()
    expect(page, [])


def test_with_one_view_its_number_is_the_line(browser, tiles, tmp_path):
    path = tmp_path / "0018_s1_all.html"
    path.write_text(c.camera_page(rig(), {25: tiles[25]}, [25], "0018 s1_all"), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.find_element("id", "line").get_attribute("value") == "cameras: [25]"
    assert not tile(browser, 24).is_enabled()


def test_the_keyboard_is_enough(page):
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        for key in keys:
            page.switch_to.active_element.send_keys(key)

    def focused():
        return page.switch_to.active_element.get_attribute("data-camera")

    page.execute_script("arguments[0].focus()", tile(page, 25))
    press(Keys.TAB)
    assert focused() == "27"
    press(Keys.SPACE)
    expect(page, [0, 25, 27])
    assert "Camera 27" in page.find_element("id", "caption").text  # the one in focus is the one enlarged
    press(Keys.ENTER)
    expect(page, [0, 25])
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_hovering_enlarges_a_view(page):
    from selenium.webdriver import ActionChains

    ActionChains(page).move_to_element(tile(page, 33)).perform()
    assert page.find_element("id", "caption").text == "Camera 33: azimuth -60°, elevation +30°"
    large = page.find_element("id", "large")
    assert large.get_attribute("src") == tile(page, 33).find_element("tag name", "img").get_attribute("src")
    assert large.size["width"] > 3.5 * tile(page, 33).size["width"]


def test_the_line_is_copied(page):
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    page.execute_script("return navigator.clipboard.writeText('before')")
    page.find_element("id", "copy").click()
    assert page.execute_script("return navigator.clipboard.readText()") == "cameras: [0, 25]"
    assert page.find_element("id", "copy").text == "Copied"


@pytest.mark.parametrize("width, height", [(1366, 768), (800, 900)])
def test_it_fits_on_a_small_screen_and_nothing_scrolls_sideways(page, width, height):
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    size = page.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth, grid.scrollWidth - grid.clientWidth,"
        " grid.getBoundingClientRect().bottom, innerHeight]"
    )
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert size[0] <= size[1] == width and size[2] == 0 and size[3] < size[4]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colour_scheme(page, scheme):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", background)[0])
    assert red > 200 if scheme == "light" else red < 60


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A workspace with s1_all (camera 25) and s3_all (38 views) extracted; not to be changed."""
    folder = tmp_path_factory.mktemp("cameras")
    synthetic_release.write_subject(
        folder / "release", "0018", performances=["s1_all", "s3_all"], frames=4, size=(128, 153), gaps={3: [1]}
    )
    workspace = Workspace(folder / "work", folder / "release")
    workspace.write_config(extraction={"performances": ["s1_all", "s3_all"]})
    workspace.run()
    return workspace


def test_a_foreign_picture_is_passed_over_and_a_broken_calibration_is_a_message(extracted, tmp_path):
    workspace = Workspace(tmp_path / "copy", extracted.release)
    shutil.copytree(extracted.folder / "subjects", workspace.folder / "subjects")
    workspace.write_config()
    camera = workspace.path("0018", "s3_all", "images", "cam_25")
    shutil.copy(camera / "frame_000000.jpg", camera / "frame_000000 (copy).jpg")
    workspace.run("--camera-grid", "0018/s3_all")
    for content in ("[]", '{"cameras": null}', '{"cameras": {"25": {"K": 1}}}', '{"cameras": {"25": {"RT": [1]}}}'):
        workspace.path("0018", "s3_all", "calibration", "cameras.json").write_text(content)
        assert "cameras.json" in workspace.run("--camera-grid", "0018/s3_all", expect=2).err


def test_camera_grid_writes_a_picture_and_a_page_beside_the_config(extracted):
    run = extracted.run("--camera-grid", "0018/s3_all", "--suggest-cameras", "4")
    picture, page = (extracted.folder / "previews" / f"0018_s3_all.{ending}" for ending in ("jpg", "html"))
    assert (
        str(picture) in run.out
        and str(page) in run.out
        and "0018 s3_all, frame 0, as the cameras stand: 38 view" in run.out
    )
    assert cv2.imread(str(picture)).shape[1] > 3000
    data = data_of(page.read_text())
    assert sum("image" in camera for camera in data["cameras"]) == 38 and len(data["cameras"]) == 60
    line = [int(n) for n in re.search(r"cameras: \[(.*)\]", run.out)[1].split(",")]
    assert [data["cameras"][i]["id"] for i in data["selected"]] == line  # the suggestion is what is framed
    assert "frame 1, as the cameras stand: 37 view" in extracted.run("--camera-grid", "0018/s3_all", "--frame", "1").out
    assert "0018 s1_all, frame 0, as the cameras stand: 1 view" in extracted.run("--camera-grid", "0018/s1_all").out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--camera-grid", "0018/s2_all"], "extract 0018/s2_all first"),
        (["--camera-grid", "0077/s3_all"], "extract 0077/s3_all first"),
        (["--camera-grid", "../s3_all"], "0018/s3_all"),
        (["--camera-grid", "0018/s3_all", "--frame", "9"], "from 0 to 1"),
        (["--scene", "0018/s2_all"], "extract 0018/s2_all first"),
        (["--scene", "s3_all"], "0018/s3_all"),
        (["--scene", "0018/s3_all", "--frame", "9"], "from 0 to 1"),
        (["--suggest-cameras", "0"], "at least 1"),
        (["--suggest-cameras", "39"], "38 have pictures"),
        (["--suggest-cameras", "many"], "many"),
    ],
)
def test_what_cannot_be_shown_is_a_clear_message(extracted, arguments, expected):
    assert expected in extracted.run(*arguments, expect=2).err


def test_suggest_cameras_prints_the_coverage_and_the_line_to_paste(extracted):
    run = extracted.run("--suggest-cameras", "8")
    line = [int(n) for n in re.search(r"cameras: \[(.*)\]", run.out)[1].split(",")]
    _, rig = c.read_calibration(extracted.path("0018", "s3_all"), VIEWS_38)
    largest, mean = c.coverage(rig.angles, line)
    assert len(line) == 8 and 25 in line and set(line) <= set(VIEWS_38)
    assert f"{largest:.1f}°" in run.out and f"{mean:.1f}°" in run.out and "config.yaml now" in run.out


def test_before_anything_is_extracted_there_is_nothing_to_suggest(tmp_path):
    workspace = Workspace(tmp_path / "work", tmp_path)
    assert "extract one subject" in workspace.run("--suggest-cameras", "4", expect=2).err


# ---------------------------------------------------------------- scenes

LENS = (-0.12, 0.09, 0.003, -0.002, 0.05)
POINTS = synthetic_release.CENTRE + [(0, 0, 0), (0.05, 0.07, -0.01), (-0.04, -0.075, 0.02)]
SCENE_VIEWS = (3, 4, 16, 25, 48, 53)


def put_picture(smc, path, picture):
    del smc[path]
    smc[path] = cv2.imencode(".png", picture)[1].ravel()


@pytest.fixture(scope="module")
def points_extracted(tmp_path_factory):
    """A workspace with an s3_all extracted whose pictures show POINTS as blobs, through the rig's lenses; the masks show
    the first as a disc. Not to be changed."""
    folder, size = tmp_path_factory.mktemp("points"), (256, 306)
    release = folder / "release"
    options = {"cameras": SCENE_VIEWS, "frames": 2, "size": size, "distortion": LENS, "everything": True}
    (path,) = synthetic_release.write_subject(release, "0018", performances=["s3_all"], **options)
    rows, columns = np.mgrid[: size[0], : size[1]]
    with h5py.File(path, "r+") as smc:
        for n in SCENE_VIEWS:
            pixels = synthetic_release.project(POINTS, synthetic_release.rig(size, LENS)[f"{n:02d}"])
            squares = [(columns - x) ** 2 + (rows - y) ** 2 for x, y in pixels]
            blobs = sum(130 * np.exp(-square / 18) for square in squares)
            picture = (blobs[..., None] + (40, 60, 90)).clip(0, 255).round().astype(np.uint8)
            put_picture(smc, f"Camera/{n:02d}/color/0", picture)
            put_picture(smc, f"Camera/{n:02d}/mask/0", np.where(squares[0] < 400, 255, 0).astype(np.uint8))
    workspace = Workspace(folder / "work", release)
    modalities = ["images", "masks", "calibration", "transforms"]
    workspace.write_config(extraction={"performances": ["s3_all"], "modalities": modalities})
    workspace.run()
    return workspace


@pytest.fixture
def with_points(points_extracted, tmp_path):
    return points_extracted.copy(tmp_path / "work")


def read_colmap(model):
    """What COLMAP's text format says: f, cx, cy, (width, height), {image: (3, 4) world to camera}, points (n, 7)."""
    lines = [line for line in (model / "cameras.txt").read_text().splitlines() if not line.startswith("#")]
    (number, kind, width, height, fx, fy, cx, cy), lines_left = lines[0].split(), lines[1:]
    assert kind == "PINHOLE" and fx == fy and not lines_left
    poses = {}
    for line in (model / "images.txt").read_text().splitlines()[::2]:
        _, *pose, camera, name = line.split()
        assert camera == number
        w, x, y, z, *translation = map(float, pose)
        rotation = [
            [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
        ]
        assert np.linalg.det(rotation) == pytest.approx(1)
        poses[name] = np.column_stack([rotation, translation])
    points = np.loadtxt(model / "points3D.txt")
    assert points.shape[1] == 8 and len(set(points[:, 0])) == len(points)
    return float(fx), float(cx), float(cy), (int(width), int(height)), poses, points[:, 1:7]


def seen_in_scene(points, f, cx, cy, pose):
    """World points (n, 3) to pixels (n, 2), where the corner of the first pixel is (0, 0)."""
    x, y, z = pose @ np.column_stack([points, np.ones(len(points))]).T
    return np.column_stack([f * x / z + cx, f * y / z + cy])


def middle(weights):
    """The centre of mass (x, y), where the corner of the first pixel is (0, 0)."""
    rows, columns = np.indices(weights.shape) + 0.5
    return np.array([(weights * columns).sum(), (weights * rows).sum()]) / weights.sum()


def middle_of_blob(picture, near):
    left, top = np.floor(near).astype(int) - 9
    return (left, top) + middle((picture[top : top + 19, left : left + 19, 0].astype(float) - 60).clip(0))


def test_a_world_point_lies_on_its_detail_in_every_view_of_a_scene(with_points):
    with_points.run("--scene", "0018/s3_all")
    scene = with_points.folder / "scenes" / "0018_s3_all_000000"
    f, cx, cy, size, poses, points = read_colmap(scene / "sparse/0")
    assert (cx, cy) == (153, 128) and size == (306, 256)
    calibration = synthetic_release.rig((256, 306))
    assert f == pytest.approx(np.mean([calibration[f"{n:02d}"]["K"][[0, 1], [0, 1]] for n in SCENE_VIEWS]))
    assert list(poses) == [f"{n:02d}.png" for n in SCENE_VIEWS]
    for name, pose in poses.items():
        picture, mask = cv2.imread(str(scene / "images" / name)), cv2.imread(str(scene / "masks" / name), -1)
        assert picture.shape == (256, 306, 3) and mask.shape == (256, 306)
        pixels = seen_in_scene(POINTS, f, cx, cy, pose)
        for pixel in pixels:
            assert np.hypot(*(middle_of_blob(picture, pixel) - pixel)) < 0.1
        assert np.hypot(*(middle(mask) - pixels[0])) < 0.1
        seen = seen_in_scene(points[:, :3], f, cx, cy, pose)
        assert (seen > 0).all() and (seen < size).all()
    assert len(points) == 20_000 and np.linalg.norm(points[:, :3].mean(0) - synthetic_release.CENTRE) < 0.01
    assert np.median(points[:, 3:], axis=0).tolist() == [90, 60, 40]  # red, green, blue


def test_a_world_point_lies_on_its_detail_in_every_picture_of_transforms_json(with_points):
    folder = with_points.path("0018", "s3_all")
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    for frame in (frame for frame in frames if frame["timestep_id"] == "000000"):
        camera = {"RT": np.array(frame["transform_matrix"]) * [1, -1, -1, 1]}
        camera["K"] = np.array([[frame["fl_x"], 0, frame["cx"]], [0, frame["fl_y"], frame["cy"]], [0, 0, 1]])
        camera["D"] = [frame[name] for name in ("k1", "k2", "p1", "p2", "k3")]
        picture = cv2.imread(str(folder / frame["file_path"]))
        for pixel in synthetic_release.project(POINTS, camera):
            assert np.hypot(*(middle_of_blob(picture, pixel) - pixel)) < 0.1


def test_a_scene_goes_without_damaged_pictures_and_replaces_the_one_before(with_points):
    folder, scenes = with_points.path("0018", "s3_all"), with_points.folder / "scenes"
    with_points.run("--scene", "0018/s3_all")
    path = {n: folder / f"images/cam_{n:02d}/frame_000000.png" for n in SCENE_VIEWS}
    path[3].write_bytes(cv2.imencode(".jpg", cv2.imread(str(path[3])))[1].tobytes()[:-500])  # shows its upper part
    path[4].write_bytes(path[4].read_bytes()[:60] + b"x" * 5000 + path[4].read_bytes()[-12:])
    cv2.imwrite(str(path[16]), np.zeros((300, 400, 3), np.uint8))  # of another size: it is warped to the common one
    (folder / "masks/cam_25/frame_000000.png").write_bytes(b"no picture")
    run = with_points.run("--scene", "0018/s3_all")
    assert str(path[3]) in run.err and str(path[4]) in run.err and "4 view" in run.out
    assert [path.name for path in scenes.iterdir()] == ["0018_s3_all_000000"]
    scene = scenes / "0018_s3_all_000000"
    left = ["16.png", "25.png", "48.png", "53.png"]
    assert sorted(path.name for path in scene.glob("images/*")) == left == list(read_colmap(scene / "sparse/0")[4])
    assert {cv2.imread(str(path)).shape for path in scene.glob("images/*")} == {(256, 306, 3)}
    assert sorted(path.name for path in scene.glob("masks/*")) == ["16.png", "48.png", "53.png"]
    for n in (3, 4, 48, 53):
        path[n].write_bytes(b"")
    assert "2 view" in with_points.run("--scene", "0018/s3_all").out
    left = ["16.png", "25.png"]
    for n in SCENE_VIEWS:
        path[n].write_bytes(b"")
    assert "no picture of frame 0 that can be read" in with_points.run("--scene", "0018/s3_all", expect=2).err
    assert sorted(path.name for path in scene.glob("images/*")) == left and len(list(scenes.iterdir())) == 1


def test_a_scene_of_a_camera_without_calibration_is_refused(with_points):
    path = with_points.path("0018", "s3_all", "calibration", "cameras.json")
    content = json.loads(path.read_text())
    del content["cameras"]["48"]
    path.write_text(json.dumps(content))
    assert "no calibration for camera 48" in with_points.run("--scene", "0018/s3_all", expect=2).err
    assert not (with_points.folder / "scenes").exists()


def test_a_scene_takes_the_frame_that_is_asked_for(extracted):
    assert "37 view" in extracted.run("--scene", "0018/s3_all", "--frame", "1").out  # camera 3 has none
    scene = extracted.folder / "scenes" / "0018_s3_all_000001"
    assert sorted(path.stem for path in scene.glob("images/*")) == [f"{n:02d}" for n in VIEWS_38 if n != 3]
    assert not (scene / "masks").exists()
