"""Synthetic RenderMe-360 releases: SMC files that look and behave like the real ones, without the licensed data.

    python tests/synthetic_release.py demo                   two subjects, six speech parts each, and a config to run
    python tests/synthetic_release.py demo --layout pair     the 21-ID layout: raw and anno files

A made-up person sits in a made-up rig of 60 cameras. The pictures are ray-cast through the very calibration that is
written to the file, and coloured stickers on the head (LANDMARKS) can be found again in them, so a test can check that
a pose is right and not merely present. Everything is deterministic: the same arguments give the same bytes.

Units are metres and pixels. The world is the person's: x to their left, y down, z to their back. A picture's size is
(height, width). Every stored picture carries its name ("0018 s1_all cam 25 frame 12", see `label`) in a JPEG comment or
PNG text chunk, so no two are the same bytes.
"""

import argparse
import itertools
import struct
import zlib
from functools import cache, lru_cache
from pathlib import Path

import cv2
import h5py
import numpy as np

SPEECH = tuple(f"s{n}_all" for n in range(1, 7))
S3_VIEWS = "0 1 3 4 5 7 9 11 13 15 16 17 19 20 21 23 24 25 27 28 29 31 32 33 35 37 39 40 41 43 45 47 48 49 53 55 57 59"
S3_VIEWS = tuple(map(int, S3_VIEWS.split()))
ALL_VIEWS = tuple(range(60))
KEYPOINT_VIEWS = tuple(range(18, 33))  # the cameras in front of the face
MODALITIES = ["images", "masks", "audio", "calibration", "keypoints2d", "keypoints3d"]
MODALITIES += ["flame", "uv_textures", "scan", "scan_masks"]
TINY = {"frames": 4, "size": (64, 76), "cameras": (0, 25)}  # options of write_subject, for files of some 100 kB
SMALL_SMC = {  # options of write_smc: a small file with everything but FLAME, which is large
    "cameras": (3, 25),
    "frame_ids": range(4),
    "size": (64, 76),
    "audio_seconds": 4 / 30,
    "masks": (25,),
    "keypoints2d": (25,),
    "keypoints3d": True,
    "uv_textures": True,
    "scan": True,
    "scan_masks": (3, 25),
}
SAMPLE_RATE = 48000
MOUTH_STEPS = 4  # the files have the mouth in 0, 1/4 ... 1, so that few pictures need rendering

CENTRE = np.array([0.06, -0.45, 0.03])  # where all optical axes meet, in the world; a little below the head's middle
HEAD = CENTRE - (0, 0.02, 0)

# Ellipsoids, seen from HEAD: centre, radii, what they are made of.
PARTS = {
    "face": ((0, 0, 0), (0.074, 0.112, 0.092), "skin"),
    "jaw": ((0, 0.055, -0.022), (0.056, 0.070, 0.066), "skin"),
    "nose": ((0, 0.018, -0.094), (0.014, 0.028, 0.022), "skin"),
    "left_ear": ((0.080, 0.005, 0.005), (0.012, 0.031, 0.020), "skin"),
    "right_ear": ((-0.080, 0.005, 0.005), (0.012, 0.031, 0.020), "skin"),
    "left_eye": ((0.030, -0.018, -0.0745), (0.0150, 0.0115, 0.0135), "eye"),
    "right_eye": ((-0.030, -0.018, -0.0745), (0.0150, 0.0115, 0.0135), "eye"),
    "hair": ((0, -0.030, 0.022), (0.084, 0.105, 0.098), "hair"),
    "neck": ((0, 0.150, 0.025), (0.050, 0.110, 0.052), "skin"),
    "shirt": ((0, 0.340, 0.030), (0.215, 0.150, 0.110), "shirt"),
}
PART_NAMES = tuple(PARTS)
PART_CENTRES = HEAD + np.array([centre for centre, _, _ in PARTS.values()])
PART_RADII = np.array([radii for _, radii, _ in PARTS.values()])

# What a subject looks like, BGR; one of these, by the subject's number.
LOOKS = (
    {"skin": (150, 176, 212), "hair": (38, 48, 66), "shirt": (112, 88, 72), "eye": (232, 236, 238)},
    {"skin": (96, 130, 172), "hair": (30, 28, 28), "shirt": (92, 110, 84), "eye": (228, 232, 234)},
    {"skin": (168, 190, 222), "hair": (92, 140, 176), "shirt": (84, 76, 122), "eye": (234, 238, 240)},
)
PAINTED = ((-0.031, -0.046, -0.07), (0.031, -0.046, -0.07), (0, 0.066, -0.07))  # eyebrows and mouth, from HEAD

# Stickers: the part that they are on, the direction from its centre (in units of its radii), the colour (BGR).
STICKERS = {
    "nose": ("nose", (0, 0, -1), (0, 220, 0)),
    "left_eye": ("left_eye", (0.28, 0, -0.96), (235, 60, 0)),
    "right_eye": ("right_eye", (-0.28, 0, -0.96), (235, 215, 0)),
    "left_ear": ("left_ear", (1, 0, 0), (0, 0, 230)),
    "right_ear": ("right_ear", (-1, 0, 0), (0, 235, 245)),
    "chin": ("jaw", (0, 0.8, -0.6), (235, 0, 235)),
    "crown": ("hair", (0, -1, 0), (0, 130, 255)),
    "back": ("hair", (0, 0, 1), (255, 0, 130)),
}


def _on_part(part, direction):
    """A point on the surface of a part, and the unit normal there: (3,), (3,)."""
    k = PART_NAMES.index(part)
    normal = np.array(direction) / PART_RADII[k]
    return PART_CENTRES[k] + PART_RADII[k] * direction, normal / np.linalg.norm(normal)


LANDMARKS = {name: _on_part(part, direction)[0] for name, (part, direction, _) in STICKERS.items()}
LANDMARK_COLORS = {name: color for name, (_, _, color) in STICKERS.items()}


# ---------------------------------------------------------------------------------------------------------- cameras


def rig(size=(256, 306), distortion=(0, 0, 0, 0, 0)):
    """The 60 cameras: {"00": {"K": (3, 3), "D": (5,) k1 k2 p1 p2 k3, "RT": (4, 4) camera to world}, ...}, float64. Not to
    be changed.

    17 columns of three around the person, 20° apart and open behind, where 51 hangs; 52...59 closer, between the
    columns. Camera 25 is in front of the face, and lower numbers are on the person's left."""
    return {f"{n:02d}": _camera(n, tuple(size), tuple(distortion)) for n in ALL_VIEWS}


@cache
def _camera(n, size, distortion):
    height, width = size
    if n < 51:
        azimuth, elevation, distance = 20 * (n // 3 + 1), (30, 3, -24)[n % 3], 1.25 + 0.05 * np.sin(n // 3)
    elif n == 51:
        azimuth, elevation, distance = 0, 31, 1.3
    else:
        azimuth, elevation, distance = 30 + 40 * (n - 52), -3, 1.07 + 0.05 * np.cos(n)
    a, e = np.radians([azimuth, elevation])
    outward = np.array([np.sin(a) * np.cos(e), -np.sin(e), np.cos(a) * np.cos(e)])
    right = np.array([-np.cos(a), 0, np.sin(a)])
    RT = np.eye(4)
    RT[:3, :3] = np.column_stack([right, np.cross(-outward, right), -outward])
    RT[:3, 3] = CENTRE + distance * outward
    scale = height / 2048  # of the real pictures, 2048 x 2448
    fx, fy = scale * (4710 + 15 * np.sin([2.0 * n, 2.0 * n + 0.3]))
    cx = (width - 1) / 2 + scale * 20 * np.sin(1.3 * n)
    cy = (height - 1) / 2 + scale * 20 * np.cos(1.7 * n)
    camera = {"K": np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), "D": np.array(distortion, float), "RT": RT}
    for array in camera.values():
        array.setflags(write=False)
    return camera


def _distort(x, y, D):
    """Where the lens moves normalised image points to (OpenCV's five coefficients)."""
    k1, k2, p1, p2, k3 = D
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    return (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y))


def project(points, camera):
    """World points (n, 3) to pixels (n, 2), with the lens distortion; the centre of the first pixel is (0, 0)."""
    R, t = camera["RT"][:3, :3], camera["RT"][:3, 3]
    x, y, z = ((np.asarray(points, float) - t) @ R).T
    x, y = _distort(x / z, y / z, camera["D"])
    return np.column_stack([x, y, np.ones_like(x)]) @ camera["K"][:2].T


def visible_landmarks(camera):
    """Names of the LANDMARKS that a camera sees: on a surface turned towards it, with nothing in between."""
    eye = camera["RT"][:3, 3]
    names = []
    for name, (part, direction, _) in STICKERS.items():
        point, normal = _on_part(part, direction)
        towards = (eye - point) / np.linalg.norm(eye - point)
        o, d = (point - PART_CENTRES) / PART_RADII, towards / PART_RADII
        a, b, c = (d * d).sum(1), (o * d).sum(1), (o * o).sum(1) - 1
        hidden = (b * b > a * c) & (b < 0)  # the line of sight meets the part, further on
        hidden[PART_NAMES.index(part)] = False
        if normal @ towards > 0.35 and not hidden.any():
            names.append(name)
    return names


# --------------------------------------------------------------------------------------------------------- pictures


def _rays(camera, rows, columns):
    """World directions of the pixels in two slices, one unit of depth long: (rows, columns, 3) float32."""
    (fx, _, cx), (_, fy, cy) = camera["K"][:2]
    x = x0 = ((np.arange(columns.start, columns.stop) - cx) / fx)[None, :]
    y = y0 = ((np.arange(rows.start, rows.stop) - cy) / fy)[:, None]
    if camera["D"].any():
        for _ in range(10):
            dx, dy = _distort(x, y, camera["D"])
            x, y = x + x0 - dx, y + y0 - dy
    R, x, y = camera["RT"][:3, :3].astype(np.float32), x.astype(np.float32), y.astype(np.float32)
    return x[..., None] * R[:, 0] + (y[..., None] * R[:, 1] + R[:, 2])


def _box(centre, radii, camera, size):
    """The slices (rows, columns) of the picture that hold a box of the world."""
    corners = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    pixels = project(centre + corners * radii, camera)
    low = np.floor(pixels.min(0)).astype(int) - 1
    high = np.ceil(pixels.max(0)).astype(int) + 2
    (left, top), (right, bottom) = (np.clip(corner, 0, size[::-1]) for corner in (low, high))
    return slice(top, bottom), slice(left, right)


@lru_cache(maxsize=64)
def _scene(name, size, distortion):
    """What each pixel of a camera of the rig shows, ray by ray.

    Returns two (height, width) uint8, the part's number + 1 (0: none) and its brightness (200: as its colour is), and
    for each of PAINTED its slices in the picture and, per pixel there, x and y in metres from its middle (NaN: no
    face)."""
    camera = _camera(int(name), size, distortion)
    eye = camera["RT"][:3, 3]
    light = np.array([0.35, -0.75, -0.55], np.float32)
    part, brightness, depth = np.zeros(size, np.uint8), np.zeros(size, np.uint8), np.full(size, np.inf, np.float32)
    for k, (centre, radii) in enumerate(zip(PART_CENTRES, PART_RADII)):
        box = _box(centre, radii, camera, size)
        o, inverse = ((eye - centre) / radii).astype(np.float32), (1 / radii).astype(np.float32)
        d = _rays(camera, *box) * inverse
        a, b, c = np.einsum("ijk,ijk->ij", d, d), d @ o, o @ o - 1
        root = b * b - a * c
        t = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
        near = t < depth[box]
        normal = (o + t[near, None] * d[near]) * inverse
        lit = normal @ light / np.sqrt(np.einsum("ij,ij->i", normal, normal))
        depth[box][near], part[box][near], brightness[box][near] = t[near], k + 1, 200 * (0.74 + 0.30 * lit)
    skin = np.isin(part, [PART_NAMES.index(name) + 1 for name in ("face", "jaw")])
    painted = []
    for middle in PAINTED:
        box = _box(HEAD + middle, (0.04, 0.04, 0.04), camera, size)
        at = _rays(camera, *box) * np.where(skin[box], depth[box], np.nan)[..., None] + (eye - HEAD - middle)
        at[at[..., 2] > 0.06] = np.nan  # the back of the head
        painted.append((box, at[..., 0], at[..., 1]))
    return part, brightness, painted


def _paint(picture, color, inside):
    """Blend a colour into part of a picture (h, w, 3) uint8, in place, as far as `inside` (h, w) goes from 0 to 1."""
    alpha = np.nan_to_num(inside).clip(0, 1)[..., None]
    picture[:] = picture * (1 - alpha) + np.array(color) * alpha


@lru_cache(maxsize=2)
def _person(name, size, distortion, look):
    """The person without mouth and stickers, (height, width, 3) uint8. Shared: not to be written to."""
    part, brightness, (*brows, _) = _scene(name, size, distortion)
    colors = np.array([(0, 0, 0)] + [LOOKS[look][material] for _, _, material in PARTS.values()], np.uint8)
    picture = cv2.multiply(np.take(colors, part, axis=0), cv2.merge([brightness] * 3), scale=1 / 200)
    backdrop = np.linspace(196, 160, size[0]).astype(np.uint8)[:, None, None]
    np.copyto(picture, backdrop, where=(part == 0)[..., None])
    for box, x, y in brows:
        _paint(picture[box], LOOKS[look]["hair"], 2 * (1 - (x / 0.019) ** 4 - ((y + 5 * x * x) / 0.0035) ** 2))
    outline = cv2.morphologyEx(part, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    cv2.copyTo(cv2.GaussianBlur(picture, (3, 3), 0), outline, picture)  # softens the steps of one ray per pixel
    return picture


@lru_cache(maxsize=MOUTH_STEPS + 1)
def _talking_person(name, size, distortion, look, mouth_open):
    """The person with mouth and stickers, (height, width, 3) uint8. Shared: not to be written to."""
    picture, camera = _person(name, size, distortion, look).copy(), _camera(int(name), size, distortion)
    box, x, y = _scene(name, size, distortion)[2][-1]
    lip, gap = 0.007 + 0.011 * mouth_open, 0.0005 + 0.012 * mouth_open
    sharp = lip * size[0]  # about the lip's height in pixels, for soft edges
    for color, half_width, half_height in (((92, 92, 164), 0.026, lip), ((40, 30, 60), 0.021, gap)):
        _paint(picture[box], color, sharp * (1 - (x / half_width) ** 2 - (y / half_height) ** 2))
    for landmark in visible_landmarks(camera):
        middle = np.round(project(LANDMARKS[landmark][None], camera)[0] * 16).astype(int).tolist()
        cv2.circle(picture, middle, round(16 * max(3, size[0] / 85)), LANDMARK_COLORS[landmark], -1, cv2.LINE_AA, 4)
    return picture


def render_head(name, size, distortion, frame, mouth_open, look):
    """The picture that a camera of the rig takes, (height, width, 3) uint8 BGR, with "cam 25 frame 12" in a corner."""
    picture = _talking_person(name, size, distortion, look, mouth_open).copy()
    at, thickness = (round(0.03 * size[0]), round(0.075 * size[0])), max(1, round(size[0] / 400))
    style = cv2.FONT_HERSHEY_SIMPLEX, size[0] / 560, (40, 40, 40), thickness, cv2.LINE_AA
    cv2.putText(picture, f"cam {name} frame {frame}", at, *style)
    return picture


def find_landmark(picture, name):
    """The centre (x, y) in pixels of a landmark's sticker in a picture (height, width, 3) BGR, or None."""
    color = LANDMARK_COLORS[name]
    alike = cv2.inRange(picture, tuple(c - 70 for c in color), tuple(c + 70 for c in color))
    _, _, boxes, centres = cv2.connectedComponentsWithStats(alike)
    areas = boxes[1:, cv2.CC_STAT_AREA]
    return centres[1 + areas.argmax()] if areas.max(initial=0) > 12 else None


@lru_cache(maxsize=4)
def _noise(size):
    """Film grain around 128, (height, width, 3) uint8."""
    return np.random.default_rng(360).normal(128, 32, (*size, 3)).clip(0, 255).astype(np.uint8)


def _jpeg(picture, quality=90, grain=0.0):
    """JPEG bytes of a picture, with noise of a strength (1: standard deviation 32) added."""
    if grain:
        picture = cv2.addWeighted(picture, 1, _noise(picture.shape[:2]), grain, -128 * grain)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _jpeg_settings(picture, target_bytes):
    """(quality, grain) for about so many bytes: a lower quality if a plain picture is larger, more noise if smaller."""
    if target_bytes is None:
        return 90, 0.0
    if len(_jpeg(picture)) > target_bytes:
        low, high = 1, 90
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if len(_jpeg(picture, middle)) < target_bytes else (low, middle)
        return low, 0.0
    low, high = 0.0, 4.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if len(_jpeg(picture, 90, middle)) < target_bytes else (low, middle)
    return 90, low


def label(subject, performance, kind, camera, frame):
    """The text that a stored picture carries, e.g. b"0018 s1_all mask cam 25 frame 12"; None: it has none of these."""
    camera, frame = camera is not None and f"cam {camera:02d}", frame is not None and f"frame {frame}"
    return " ".join(filter(None, (subject, performance, kind, camera, frame))).encode()


def _labelled(encoded, text):
    """A JPEG with a comment after its header, or a PNG with a text chunk."""
    if encoded[:2] == b"\xff\xd8":
        after = 4 + struct.unpack(">H", encoded[4:6])[0]
        return encoded[:after] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + encoded[after:]
    chunk = b"tEXtComment\0" + text
    length, checksum = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    return encoded[:33] + length + chunk + checksum + encoded[33:]


def _png(picture):
    return cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def damage(encoded, how):
    """A picture's bytes after an accident: "cut" in half, "garbage", "empty" (no byte) or "zeroed" (as long)."""
    return {
        "cut": encoded[: len(encoded) // 2],
        "garbage": np.random.default_rng(len(encoded)).bytes(len(encoded)),
        "empty": b"",
        "zeroed": bytes(len(encoded)),
    }[how]


# ------------------------------------------------------------------------------------- speech, keypoints, FLAME, scan


def mouth_opening(t):
    """How far the mouth is open, 0...1, at times in seconds: four syllables a second, in phrases."""
    t = np.asarray(t, float)
    return np.sin(4 * np.pi * t) ** 2 * (0.55 + 0.45 * np.sin(2.6 * t + 1)) * (np.sin(1.1 * t + 0.6) > -0.7)


def speech_audio(seconds, voice="0018 s1_all", kind="pcm16"):
    """A voice whose loudness follows the mouth: (N, 2) float32 in [-1, 1), 48000 Hz. kind "pcm16": every sample is a
    multiple of 2**-15; "float": they are not."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * (100 + zlib.crc32(voice.encode()) % 120) * t + 1.5 * np.sin(3 * t)
    tone = sum(np.sin(n * phase) / n for n in (1, 2, 3, 5, 8))
    left = (0.03 + 0.37 * mouth_opening(t)) * tone
    audio = np.column_stack([left, 0.7 * np.roll(left, 12)]).clip(-1, 1 - 2.0**-15)
    if kind == "pcm16":
        audio = np.round(audio * 32768) / 32768
    return audio.astype(np.float32)


def face_points(n, mouth_open=0.0):
    """World positions (n, 3) of points spread over the front of the face, the jaw's going down with the mouth."""
    k = np.arange(n) + 0.5
    radius, angle = 0.8 * np.sqrt(k / n), k * np.pi * (3 - np.sqrt(5))
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    points = np.column_stack([x, y, -np.sqrt(1 - x * x - y * y)]) * PART_RADII[0]
    points[points[:, 1] > PAINTED[-1][1], 1] += 0.012 * mouth_open
    return HEAD + points


def detected(camera, frame):
    """Whether Keypoints2d has this frame of this camera: one in eleven is without a detection."""
    return (camera + frame) % 11 != 10


def flame_parameters(voice="0018 e0", frame=0):
    """The FLAME fit of a frame: {name: float32 array}."""
    random = np.random.default_rng([zlib.crc32(voice.encode()), frame])
    shapes = dict.fromkeys(("global_pose", "neck_pose", "jaw_pose", "left_eye_pose", "right_eye_pose", "trans"), (3,))
    shapes |= {"shape": (100,), "exp": (50,), "cam": (3,), "verts": (5023, 3), "albedos": (3, 256, 256)}
    return {name: 0.1 * random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def scan_mesh(rows=40, columns=64):
    """The face as a mesh: vertices (n, 3) float64 in the world, triangles (m, 3) int64."""
    v, u = np.meshgrid(np.linspace(0, np.pi, rows), np.arange(columns) * 2 * np.pi / columns, indexing="ij")
    vertices = np.stack([np.sin(v) * np.sin(u), -np.cos(v), -np.sin(v) * np.cos(u)], -1).reshape(-1, 3)
    row, column = np.meshgrid(np.arange(rows - 1), np.arange(columns), indexing="ij")
    a, b = row * columns + column, row * columns + (column + 1) % columns
    triangles = np.stack([a, b, a + columns, b, b + columns, a + columns], -1).reshape(-1, 3)
    return HEAD + vertices * PART_RADII[0], triangles


@cache
def _uv_texture(look):
    """An unwrapped skin, (256, 256, 3) PNG bytes."""
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    shade = 0.75 + 0.2 * np.cos(2 * x) * np.cos(2 * y) + 0.05 * np.sin(40 * x) * np.sin(40 * y)
    return _png((shade[..., None] * LOOKS[look]["skin"]).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------- files


def _encoded(pictures, jpeg_bytes, distinct):
    """The JPEG bytes of one camera's pictures; with `distinct` of the first so many, again and again."""
    settings, every = None, []
    for picture in itertools.islice(pictures, distinct):
        settings = settings or _jpeg_settings(picture, jpeg_bytes)
        every.append(_jpeg(picture, *settings))
    return itertools.cycle(every)


class _SMCWriter:
    """An SMC file that is being written, and what its parts have in common."""

    def __init__(self, smc, subject, performance, size, frame_ids, fps, distortion, storage, column_shape):
        self.smc, self.subject, self.performance, self.size = smc, subject, performance, size
        self.frame_ids, self.storage, self.column_shape = frame_ids, storage, column_shape
        self.rig, self.distortion = rig(size, distortion), distortion
        self.look, self.voice = int(subject) % len(LOOKS), f"{subject} {performance}"
        opening = np.round(mouth_opening(np.array(frame_ids) / fps) * MOUTH_STEPS) / MOUTH_STEPS
        self.opening = dict(zip(frame_ids, opening.tolist()))  # how far the mouth is open in each frame

    def put(self, group, name, data):
        options = {}
        if self.storage != "contiguous" and data.size:
            options["chunks"] = tuple(min(length, 16384) for length in data.shape)
            options["compression"] = "gzip" if self.storage == "gzip" else None
        group.create_dataset(name, data=data, track_times=False, **options)

    def put_picture(self, group, name, encoded, kind="", camera=None, frame=None, how=None):
        """Put a picture there under its label, and damaged if `how` says so."""
        encoded = _labelled(encoded, label(self.subject, self.performance, kind, camera, frame))
        data = np.frombuffer(damage(encoded, how) if how else encoded, np.uint8)
        self.put(group, name, data[:, None] if self.column_shape else data)

    def attributes(self):
        odd = int(self.subject) % 2
        self.smc.attrs.update({"actor_id": self.subject, "performance_part": self.performance})
        self.smc.attrs.update({"capture_date": "2022-08-20", "age": 20 + int(self.subject) % 40})
        self.smc.attrs.update(
            {"gender": "female" if odd else "male", "color": "yellow", "height": 172.5, "weight": 64.0}
        )
        attributes = {"num_device": 60, "num_frame": len(self.frame_ids), "resolution": np.array(self.size)}
        self.smc.create_group("Camera").attrs.update(attributes)

    def images(self, cameras, jpeg_bytes, distinct, gaps, damaged):
        for n in cameras:
            name, frames = f"{n:02d}", [frame for frame in self.frame_ids if frame not in gaps.get(n, ())]
            group, scene = self.smc.create_group(f"Camera/{name}/color"), (name, self.size, self.distortion)
            shots = (render_head(*scene, frame, self.opening[frame], self.look) for frame in frames)
            for frame, encoded in zip(frames, _encoded(shots, jpeg_bytes, distinct)):
                self.put_picture(group, str(frame), encoded, "", n, frame, damaged.get((n, frame)))

    def masks(self, cameras):
        for n in cameras:
            group, encoded = self.smc.create_group(f"Camera/{n:02d}/mask"), self.head_mask(n)
            for frame in self.frame_ids:
                self.put_picture(group, str(frame), encoded, "mask", n, frame)

    def head_mask(self, n):
        """The PNG of where the person is in a camera's picture: 255 inside, 0 outside."""
        part, _, _ = _scene(f"{n:02d}", self.size, self.distortion)
        return _png(np.where(part, 255, 0).astype(np.uint8))

    def audio(self, seconds, kind):
        group = self.smc.create_group("Camera/00/audio")
        self.put(group, "audio", speech_audio(seconds, self.voice, kind))
        group.create_dataset("sample_rate", data=SAMPLE_RATE, track_times=False)

    def calibration(self):
        for name, camera in self.rig.items():
            group = self.smc.create_group(f"Calibration/{name}")
            for key in ("K", "D", "RT"):
                self.put(group, key, camera[key])

    def group_of_frames(self, name):
        group = self.smc.create_group(name)
        group.attrs["num_frame"] = len(self.frame_ids)
        return group

    def keypoints2d(self, cameras):
        self.group_of_frames("Keypoints2d")
        for n in cameras:
            group = self.smc.create_group(f"Keypoints2d/{n:02d}")
            for frame in self.frame_ids:
                if detected(n, frame):
                    self.put(group, str(frame), project(face_points(106, self.opening[frame]), self.rig[f"{n:02d}"]))

    def keypoints3d(self):
        group = self.group_of_frames("Keypoints3d")
        for frame in self.frame_ids:
            self.put(group, str(frame), face_points(73, self.opening[frame]))

    def flame(self):
        flame = self.group_of_frames("FLAME")
        for frame in self.frame_ids:
            group = flame.create_group(str(frame))
            for name, value in flame_parameters(self.voice, frame).items():
                self.put(group, name, value)

    def uv_textures(self):
        group = self.smc.create_group("UV_texture")
        for frame in self.frame_ids:
            self.put_picture(group, str(frame), _uv_texture(self.look), "uv", None, frame)

    def scan(self):
        group = self.smc.create_group("Scan")
        for name, data in zip(("vertex", "vertex_indices"), scan_mesh()):
            self.put(group, name, data)

    def scan_masks(self, cameras):
        group = self.smc.create_group("ScanMask")
        for n in cameras:
            self.put_picture(group, f"{n:02d}", self.head_mask(n), "scan", n)


def write_smc(
    path,
    subject="0018",
    performance="s1_all",
    *,
    cameras=(25,),
    frame_ids=range(12),
    size=(256, 306),
    images=True,
    jpeg_bytes=None,
    distinct=None,
    gaps=None,
    damaged=None,
    masks=(),
    audio_seconds=None,
    audio="pcm16",
    calibration=True,
    distortion=(0, 0, 0, 0, 0),
    keypoints2d=(),
    keypoints3d=False,
    flame=False,
    uv_textures=False,
    scan=False,
    scan_masks=(),
    storage="contiguous",
    column_shape=False,
):
    """Write one SMC file with just the groups that are asked for.

    cameras, masks, keypoints2d, scan_masks: the cameras (int) that have pictures, masks, …
    frame_ids: int, may have gaps; size: (height, width) of the pictures; jpeg_bytes: about how large each is to be
    distinct: render only so many pictures per camera and repeat them under other labels (large files in little time)
    gaps: {camera: [frames that are left out]}; damaged: {(camera, frame): a word that `damage` knows}
    audio_seconds: None for no audio; audio: "pcm16" | "float", see `speech_audio`
    storage: "contiguous" | "chunked" | "gzip"; column_shape: pictures are (N, 1), not (N,)
    """
    path, frame_ids = Path(path), [int(frame) for frame in frame_ids]
    fps = len(frame_ids) / audio_seconds if audio_seconds else 30.0
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as smc:
        write = _SMCWriter(smc, subject, performance, tuple(size), frame_ids, fps, distortion, storage, column_shape)
        write.attributes()
        if images:
            write.images(cameras, jpeg_bytes, distinct, gaps or {}, damaged or {})
        write.masks(masks)
        if audio_seconds is not None:
            write.audio(audio_seconds, audio)
        for part, views in ((write.keypoints2d, keypoints2d), (write.scan_masks, scan_masks)):
            if views:
                part(views)
        parts = {write.calibration: calibration, write.keypoints3d: keypoints3d, write.flame: flame}
        for part, asked in {**parts, write.uv_textures: uv_textures, write.scan: scan}.items():
            if asked:
                part()


def write_subject(
    root,
    subject,
    *,
    layout="single",
    performances=SPEECH,
    seconds=1.0,
    frames=None,
    cameras=None,
    everything=False,
    **options,
):
    """Write the files of one subject where the layout has them, and return their paths.

    layout: "single" (500-ID; <root>/0018/…) | "pair" (21-ID; <root>/raw/0018/… and <root>/anno/0018/…)
    performances: any of s1_all…s6_all, e0…e11 (always with all annotations), h0, h1_3bk …, h2
    seconds: of speech, or frames: that many at 30 fps (and half as many where it is 15 fps)
    cameras: the views with pictures (None: as the layout has them; one that has only camera 25 keeps it)
    everything: masks and keypoints in the single layout's files too, which the real ones lack
    options: for every file, see `write_smc`
    """
    frames = max(2, round(seconds * 30)) if frames is None else frames
    paths = []
    for performance in performances:
        kind, fps = performance[0], 30
        if layout == "pair":
            views, frame_ids = ALL_VIEWS, range(frames)
        elif performance == "s3_all":
            views, frame_ids, fps = S3_VIEWS, range(max(1, round(frames / 2))), 15
        elif kind == "s":
            views, frame_ids = (25,), range(frames)
        else:
            views, frame_ids = ALL_VIEWS, {"e": (0, 14, 31), "h": range(4 if performance.startswith("h1") else 1)}[kind]
        if cameras is not None and len(views) > 1:
            views = tuple(cameras)
        raw = {"audio_seconds": len(frame_ids) / fps if kind == "s" else None}
        annotations = {"calibration": True}
        if layout == "pair" or everything or kind == "e":
            annotations.update(masks=views, keypoints2d=[n for n in views if n in KEYPOINT_VIEWS], keypoints3d=True)
        if kind == "e":
            annotations.update(flame=True, uv_textures=True, scan=True, scan_masks=views)
        files = {"raw": {**raw, **annotations}}
        if layout == "pair":
            files = {"raw": {**raw, "calibration": False}, "anno": {**annotations, "images": False}}
        for suffix, content in files.items():
            folder = Path(root) / (suffix if layout == "pair" else "") / subject
            paths.append(folder / f"{subject}_{performance}_{suffix}.smc")
            content = {"cameras": views, "frame_ids": frame_ids, **content, **options}
            write_smc(paths[-1], subject, performance, **content)
    return paths


def write_release(root, subjects=("0018", "0019"), **options):
    """Write several subjects and return the paths."""
    return [path for subject in subjects for path in write_subject(root, subject, **options)]


CONFIG = """\
# Extracts the synthetic release beside this file. "demo" is a folder here; for the real data it is your Google Drive.
google_drive:
  root_folder_id: ""                             # empty: the remote is no Google Drive
  remote_name: demo                              # defined in rclone.conf
  layout: {layout}                                 # single: one file per performance | pair: raw and anno files
  download: full                                 # selective: only the bytes of the chosen cameras and modalities
  rclone_flags: ["--config", "rclone.conf"]      # this demo's own, not yours in ~/.config
extraction:
  subjects: [{subjects}]
  performances: [{performances}]
  cameras: all
  modalities: [images, masks, audio, calibration, keypoints2d, keypoints3d, transforms]
storage:
  temp_dir: temp_smc                             # SMC files until they are extracted
  output_dir: subjects                           # the result
  manifest: MANIFEST.csv                         # what is done; a rerun goes on from it
  log_dir: logs
  max_temp_size_gb: 1
  min_free_gb: 1
processing:
  workers: 4
  verify: full                                   # decode every picture
"""


def write_demo(folder, subjects=("0018", "0019"), *, layout="single", performances=SPEECH, **options):
    """Write <folder>/release, rclone.conf and config.yaml: all that a run needs. Returns the paths of the SMC files."""
    folder = Path(folder)
    paths = write_release(folder / "release", subjects, layout=layout, performances=performances, **options)
    (folder / "rclone.conf").write_text(f"[demo]\ntype = alias\nremote = {(folder / 'release').resolve()}\n")
    subjects, performances = ", ".join(f'"{subject}"' for subject in subjects), ", ".join(performances)
    config = CONFIG.format(layout=layout, subjects=subjects, performances=performances)
    (folder / "config.yaml").write_text(config)
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="demo", help="where to write (default demo)")
    parser.add_argument("--layout", choices=("single", "pair"), default="single", help="500-ID (default) or 21-ID")
    args = parser.parse_args()
    sizes = [path.stat().st_size for path in write_demo(args.folder, layout=args.layout, size=(512, 612), seconds=1.6)]
    print(f"{len(sizes)} SMC files, {sum(sizes) / 1e6:.1f} MB, in {Path(args.folder, 'release')}")
    print(f"Now run: python extract_streaming_gdrive.py --config {Path(args.folder, 'config.yaml')}")


if __name__ == "__main__":
    main()
