"""Reader of RenderMe-360 SMC files (HDF5), one performance of one subject.

    with SMCReader("0018_s1_all_raw.smc") as reader:
        reader.cameras()                           [25]
        reader.get_img("25", "color", 0)           (2048, 2448, 3) uint8, BGR
        reader.encoded("images", 25, 0)            the stored JPEG, as bytes
        reader.get_Calibration("25")["RT"]         (4, 4) float64, camera to world
        reader.fps()                               30

The methods called `get_…` have the names and the returns of the reader that is published with the data set, and like
that one they return None for what a performance does not have; the others are this module's own. Whatever is wrong with
a file is raised as one exception, `SMCError`, with the file's name; the rest of it can be read all the same, with
`entries` frame by frame. What is merely unusual is no error: padded names ("000012", "7"), axes of length one, mono or
integer sound.

A release of 21 subjects keeps a performance in two files: pictures and audio in `…_raw.smc`, masks, calibration and
everything fitted in `…_anno.smc`. `SMCReader(raw, anno)` presents the two as one performance.

Nothing in a file is trusted: only what lies in the file itself is read (soft and external links, external storage and
virtual data sets are refused), sizes are checked before memory is asked for, and an entry whose name is no camera or
frame number is left alone and named in `oddities`. HDF5's own library can still spin or crash over a damaged file: who
must not be stopped by that calls this module in a process of its own, with a limit on its time.

Conventions: cameras are numbered 0…59 and written with two digits; `RT` maps camera to world coordinates, in metres,
with OpenCV axes (x right, y down, z forward); key points of a picture are (x, y) in pixels.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Callable, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5i, h5l, h5o, h5s

NUM_CAMERAS = 60
MAX_PICTURE_BYTES = 64 << 20  # an encoded picture has 0.33 MB; the raw pixels of one have 15 MB
MAX_PICTURE_PIXELS = 1 << 26
MAX_ARRAY_BYTES = 128 << 20  # the longest audio seen, 85 s, has 32 MB
MAX_ATTRIBUTE_BYTES = 64 << 10
MAX_EXPANSION = 10  # of the encoded pictures in a chunked, compressed file: there is hardly anything left to compress
MAX_FRAMES = 100_000  # the longest performance seen has 2529
MAX_ODDITIES = 50
MAX_CHANNELS = 32  # of sound
HEADER_CACHE_BYTES = 256 << 10  # that HDF5 keeps of the headers that it has read, each of which takes 5 kB of memory

# The name of an SMC file, or of a copy of it: "Copy of 0018_s1_all_raw.smc", "0018_s1_all_raw (1).smc",
# "0018_s1_all_raw.smc的副本". Names that a download in progress has ("….smc.partial", "….smc~") are none, nor
# are those with control characters, or with the signs that rclone shows for them (U+2400 and on).
SMC_NAME = re.compile(
    r"(?s)(?!.*[\x00-\x1f\x7f-\x9f\u2028\u2029\u2400-\u2421])(?:.*[^0-9A-Za-z_])?"
    r"(?P<subject>[0-9]{4})_(?P<performance>[A-Za-z0-9][A-Za-z0-9_-]*)_(?P<half>raw|anno)"
    r"(?:[^0-9A-Za-z_].*)?\.smc(?:[^!-'*-,.-\x7f][^.~]*)?"
)
NAMES = {  # of entries that are numbered: those that are understood, and how the number is usually written
    "cameras": (re.compile(r"0{0,8}[0-5]?[0-9]"), "{:02d}"),
    "frames": (re.compile(r"[0-9]{1,12}"), "{}"),
}
PARAMETER_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
SOUND_TYPES = ("f4", "f8", "i2", "i4")
DETECTING_CAMERAS = {f"{camera:02d}" for camera in range(18, 33)}  # in whose pictures key points were looked for


class Modality(NamedTuple):
    """One kind of data in an SMC file, and how to find and read it."""

    path: str  # of its group; "{}" stands for the two digits of a camera, where each camera has a group of its own
    numbered: str = ""  # what the names in that group are: numbers of "frames" or of "cameras"; "" for neither
    pictures: bool = False  # its entries are encoded pictures
    method: str = ""  # of SMCReader, which returns an entry that is neither a picture nor a mere array
    by_camera: bool = False  # only the cameras that are asked for are extracted
    from_raw: bool = False  # it is taken from the raw file where both files of a pair have it
    default: bool = False  # it is extracted where nobody says what to extract
    derived: bool = False  # it is made of others that were extracted


# All that is known of a modality. What is written of it is one function in the script's table.
MODALITIES = {
    "images": Modality("Camera/{}/color", "frames", pictures=True, by_camera=True, from_raw=True, default=True),
    "masks": Modality("Camera/{}/mask", "frames", pictures=True, by_camera=True, default=True),
    "audio": Modality("Camera/00/audio", method="get_audio", from_raw=True, default=True),
    "calibration": Modality("Calibration", "cameras", method="get_Calibration", default=True),
    "keypoints2d": Modality("Keypoints2d/{}", "frames", method="get_Keypoints2d", by_camera=True, default=True),
    "keypoints3d": Modality("Keypoints3d", "frames", method="get_Keypoints3d", default=True),
    "flame": Modality("FLAME", "frames", method="get_FLAME"),
    "uv_textures": Modality("UV_texture", "frames", pictures=True),
    "scan": Modality("Scan", method="get_scanmesh"),
    "scan_masks": Modality("ScanMask", "cameras", pictures=True, by_camera=True),
    "transforms": Modality("Calibration", "cameras", by_camera=True, derived=True),
}


class SMCError(Exception):
    """An SMC file cannot be read: what is wrong, with the file's name."""


class Entry(NamedTuple):
    """What a modality has of one frame or camera (None where it has no numbers); see `SMCReader.entries`."""

    number: int | None
    read: Callable  # returns its content, or raises SMCError where that cannot be read
    fault: SMCError | None = None  # what `read` will raise, where its header says that already


class Picture(NamedTuple):
    """What the bytes of an encoded picture say of themselves; see `probe_picture`."""

    format: str | None  # "jpg", "png", or None for anything else
    height: int
    width: int
    whole: bool  # it has its beginning, its size and its end, whatever follows


def probe_picture(data: bytes) -> Picture:
    """Return format, size in pixels and completeness of an encoded picture, from its header and its end alone."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return Picture("png", height, width, data.rfind(b"\0\0\0\0IEND\xaeB`\x82") >= 0 < height * width)
    is_jpeg, at = data[:3] == b"\xff\xd8\xff", 2
    # One segment after the other, up to that of the size. (A preview, with an end marker of its own, lies in one.)
    while is_jpeg and at + 9 <= len(data) and data[at] == 0xFF:
        marker, length, _, height, width = struct.unpack_from(">BHBHH", data, at + 1)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF0…SOF15 without DHT, JPG, DAC
            return Picture("jpg", height, width, data.rfind(b"\xff\xd9", at) >= 0 < height * width)
        at += 1 if marker == 0xFF else 2 + length
    return Picture("jpg" if is_jpeg else None, 0, 0, False)


def camera_name(camera: int | str) -> str:
    """Return the two digits of a camera given as 7, "7" or "07". Raise ValueError for anything else."""
    digits = str(camera) if isinstance(camera, (int, str, np.integer)) else ""
    if re.fullmatch("[0-9]{1,9}", digits) and int(digits) < NUM_CAMERAS:
        return f"{int(digits):02d}"
    raise ValueError(f"no camera {camera!r}: cameras are 0 to {NUM_CAMERAS - 1}")


class SMCReader(contextlib.AbstractContextManager):
    """One performance, from its SMC file or from the two files of a pair.

    file_path: path of the SMC file, or an open binary file object that can seek; then every byte is read through it.
    anno_path: the same for the second file of a pair, or None.

    Attributes, as in the published reader: `smc` (the open h5py.File of the first file), `actor_id`,
    `performance_part`, `capture_date` (str, None where the file has none), `actor_info` {"age" int, "color" str,
    "gender" str, "height" float cm, "weight" float kg} and `Camera_info` {"num_device" int, "num_frame" int,
    "resolution" int array (height, width)}. `num_device` says 60 whatever the file has: ask `cameras()`. `oddities` is
    a list of sentences about what was left out or looks wrong; `note` adds one.

    Raise SMCError where a file is no HDF5 file, is cut short or damaged."""

    def __init__(self, file_path, anno_path=None):
        self.oddities: list[str] = []
        sources = [source for source in (file_path, anno_path) if source is not None]
        self._files = [_File(source, self.oddities) for source in sources]
        self.smc, self.note = self._files[0].h5, self._files[0].note
        names = "actor_id", "performance_part", "capture_date"
        self.actor_id, self.performance_part, self.capture_date = (self._attribute("", name, str) for name in names)
        kinds = {"age": int, "color": str, "gender": str, "height": float, "weight": float}
        self.actor_info = {name: self._attribute("", name, kind) for name, kind in kinds.items()}
        kinds = {"num_device": int, "num_frame": int, "resolution": np.ndarray}
        self.Camera_info = {name: self._attribute("Camera", name, kind) for name, kind in kinds.items()}
        name = SMC_NAME.fullmatch(self._files[0].name)
        for part, stated in (("subject", self.actor_id), ("performance", self.performance_part)):
            if name and stated not in (None, name[part]):
                self.note(f"it says that it is of {printable(stated)!r}")

    def _attribute(self, group, name, kind):
        values = [value for file in self._files if (value := file.attribute(group, name, kind)) is not None]
        if len({str(value) for value in values}) > 1:
            said = " and ".join(printable(str(value)) for value in values)
            self.note(f"{name} is {said} in the two files of the performance")
        return values[0] if values else None

    def close(self):
        for file in self._files:
            with contextlib.suppress(Exception):  # damaged files can fail here too, with nothing left to lose
                file.h5.close()

    def __exit__(self, *error):
        self.close()

    # ---- what the file has

    def cameras(self, modality: str = "images") -> list[int]:
        """Return the numbers of the cameras that have data of a modality, ascending; [] for one without cameras. A
        camera with an empty group doesn't count, one with a damaged group does."""
        row = MODALITIES[modality]
        parent, by_camera, _ = row.path.partition("/{}")
        for file in self._files[:: 1 if row.from_raw else -1] if by_camera or row.numbered == "cameras" else ():
            numbers = sorted(file.numbers_in(file.open_group(parent), "cameras"))
            if found := [number for number in numbers if not by_camera or self.has(modality, number)]:
                return found
        return []

    @staticmethod
    def find_undecodable(paths: dict[int | None, str | os.PathLike], workers: int) -> list[int | None]:
        """Return the keys of those picture files that cannot be decoded without a complaint, by so many threads.

        stderr of this process has to be a file: libjpeg repairs a damaged stream and merely says so there. Whatever is
        decoded while something is said is decoded again by itself."""
        import cv2  # takes 17 MB and 40 ms, which a process that only copies pictures need not spend

        def is_bad(key: int | None) -> bool:
            """Decode every byte of the stream, at an eighth of the size."""
            printed, data, pixels = os.lseek(2, 0, os.SEEK_END), np.fromfile(paths[key], np.uint8), None
            with contextlib.suppress(cv2.error):  # it claims more pixels than OpenCV has room for
                pixels = cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8)
            return pixels is None or os.lseek(2, 0, os.SEEK_END) > printed

        with ThreadPoolExecutor(workers) as threads:
            suspects = [key for key, bad in zip(paths, threads.map(is_bad, paths)) if bad]
        return list(filter(is_bad, suspects))

    @staticmethod
    @contextlib.contextmanager
    def collecting_damage(damage: dict, modality: str, camera: int | None = None, frame: int | None = None):
        """Go on after what cannot be read, with the reason in `damage`. A fault of our own disk is still raised."""
        try:
            yield
        except SMCError as error:
            damage.setdefault((modality, camera, frame), str(error))

    def selected_cameras(self, modality: str, asked: Collection[int] | None) -> list[int | None]:
        """Return those of the asked-for cameras (None: all) that have a modality; [None] for one not by camera."""
        if MODALITIES[modality].by_camera:
            return [camera for camera in self.cameras(modality) if asked is None or camera in asked]
        return [None] if self.has(modality) else []

    def frame_numbers(self, modality: str = "images", camera: int | str | None = None) -> list[int]:
        """Return the frame numbers of a modality (and a camera, where it has them), ascending; there may be gaps.
        Return [] for a modality that has no frames."""
        file, group = self._open(modality, camera)
        return sorted(file.numbers_in(group, "frames")) if MODALITIES[modality].numbered == "frames" else []

    def has(self, modality: str, camera: int | str | None = None) -> bool:
        """Return whether there is anything of a modality (of a camera), be it damaged."""
        try:
            if "{}" in MODALITIES[modality].path and camera is None:
                return bool(self.cameras(modality))
            return self._open(modality, camera)[1] is not None
        except SMCError:
            return True

    def places(self, modality: str, camera=None, frames: Iterable[int] | None = None) -> list[tuple[object, int, int]]:
        """Return where the data of a modality (of a camera, of some frames) lies: (file as it was given to this reader,
        first byte, byte after the last) of each data set or chunk. What is damaged has no place."""
        with contextlib.suppress(SMCError):
            file, group = self._open(modality, camera)
            names = None if frames is None else [file.name_of(group, frame, "frames") for frame in frames]
            return [(file.source, *place) for place in file.places(group, names)]
        return []

    def frame_range(self, modality: str, camera: int | str | None = None) -> list[tuple[object, int, int]]:
        """Return the bytes from the first frame of a modality (of a camera) to the last, as a list of one of `places`.
        Return [] where they are much more than the frames can have: then other data lies in between."""
        ends = self.places(modality, camera, [0, self.num_frame - 1])
        first, last = min((start for _, start, _ in ends), default=0), max((end for *_, end in ends), default=0)
        likely = self.num_frame / 2 * sum(end - start for _, start, end in ends)
        return [(ends[0][0], first, last)] if ends and last - first <= 1.5 * likely + (1 << 20) else []

    def unknown_groups(self) -> list[str]:
        """Return the groups at the top of the file(s) of which this reader knows nothing: formats change."""
        known = {row.path.split("/")[0] for row in MODALITIES.values()}
        return sorted({name for file in self._files for name in file.links(file.open_group(""))} - known)

    @property
    def num_frame(self) -> int:
        """The frames of the performance: the attribute, or the longest camera where that is missing or cannot be."""
        stated = self.Camera_info["num_frame"]
        if stated is not None and 0 < stated <= MAX_FRAMES:
            return stated
        if stated is not None:
            self.note(f"Camera has {stated} for the number of frames")
        with contextlib.suppress(SMCError):
            return max((len(self.frame_numbers("images", camera)) for camera in self.cameras()), default=0)
        return 0

    def fps(self) -> int | float | None:
        """Return pictures per second, from the number of frames and the length of the audio: no attribute says it. 30
        or 15 where the ratio is within 5 % of it, else the ratio itself, noted as an oddity; None without pictures or
        without audio that can be read."""
        audio = None
        with contextlib.suppress(SMCError):
            audio = self.audio_info()
        if not audio or not self.num_frame:
            return None
        ratio = self.num_frame / audio["duration_s"]
        for rate in (15, 30):
            if abs(ratio / rate - 1) <= 0.05:
                return rate
        self.note(f"{self.num_frame} frames with its audio make {ratio:.2f} pictures per second, not 15 or 30")
        return ratio

    def expected_frames(self, of_cameras: Iterable[Iterable[int]]) -> set[int]:
        """Return the frames that every camera should have, given those that each has. Key frames keep the numbers that
        they had in the whole recording: then a frame is expected if any camera has it."""
        there = set().union(*of_cameras)
        return set(range(self.num_frame)) if max(there, default=0) < self.num_frame else there

    def note_sizes(self, sizes: Iterable[tuple[int, int]]):
        """Note as an oddity pictures of more than one (height, width), or of another than `resolution` says."""
        resolution = self.Camera_info["resolution"]
        stated = "" if resolution is None else f"{resolution[1]} x {resolution[0]}"
        found = list(dict.fromkeys(f"{width} x {height}" for height, width in sizes))
        if found and found != [stated or found[0]]:
            self.note(
                f"pictures have {' and '.join(found)} pixels; the attribute resolution says {stated or 'nothing'}"
            )

    # ---- entries, one by one

    def entries(self, modality: str, camera: int | str | None = None) -> Iterator[Entry]:
        """Yield what there is of a modality (of a camera), one frame or camera at a time, ascending; pictures in the
        order in which they lie in the file. To `read` an entry gives the stored bytes of a picture, or else what the
        method of this modality returns for one frame or camera. Raise SMCError where none of it can be read."""
        row = MODALITIES[modality]
        file, group = self._open(modality, camera)
        if row.pictures:
            yield from file.pictures(group, row.numbered)
        elif row.numbered:
            for number, name in sorted(file.numbers_in(group, row.numbered).items()):
                where = (camera, number) if "{}" in row.path else (number,)
                read = partial(getattr(self, row.method), *where) if row.method else None
                yield Entry(number, read or partial(file.read_array, group, name))
        elif group is not None:
            yield Entry(None, getattr(self, row.method))

    def encoded(self, modality: str, camera: int | str | None = None, frame: int | str | None = None) -> bytes:
        """Return the stored bytes of one picture: modality images or masks (camera, frame), uv_textures (frame) or
        scan_masks (camera)."""
        file, group, name = self._find(modality, camera, frame)
        return file.encoded(group, name)

    # ---- the published reader's methods

    def get_actor_info(self) -> dict:
        return self.actor_info

    def get_Camera_info(self) -> dict:
        return self.Camera_info

    def get_img(self, Camera_id, Image_type, Frame_id=None, disable_tqdm=True) -> np.ndarray:
        """Return decoded pictures. Image_type "color": (H, W, 3) uint8 BGR; "mask": (H, W) uint8, the maximum over
        channels. A list of frames gives them stacked (N, …) in its order, None gives all of them in frame order."""
        modality = {"color": "images", "mask": "masks"}.get(Image_type)
        if modality is None:
            raise ValueError(f"no Image_type {Image_type!r}: there are 'color' and 'mask'")
        self._open(modality, Camera_id, needed=True)
        return self._frames(lambda frame: self._decoded(modality, Camera_id, frame), Frame_id, modality, Camera_id)

    def get_Calibration(self, Camera_id) -> dict:
        """Return {"K" (3, 3) intrinsics in pixels, "D" (5,) distortion k1 k2 p1 p2 k3, "RT" (4, 4) camera to world,
        metres} of a camera, float64."""
        file, group, name = self._find("calibration", Camera_id)
        camera = file.entry(group, name, "group")
        shapes = {"K": (3, 3), "D": (-1,), "RT": (4, 4)}
        matrices = {key: file.read_array(camera, key, shape).astype(np.float64) for key, shape in shapes.items()}
        if matrices["D"].size == 4:  # k3 is 0 then
            matrices["D"] = np.append(matrices["D"], 0)
        if matrices["D"].size != 5 or not all(np.isfinite(matrix).all() for matrix in matrices.values()):
            raise file.error(f"Calibration/{name} holds values that are no finite numbers, or not 5 in D")
        return matrices

    def get_Calibration_all(self) -> dict:
        """Return {"00": what get_Calibration returns, …} of every camera of which it can be read."""
        self._open("calibration", needed=True)
        matrices = {}
        for entry in self.entries("calibration"):
            with contextlib.suppress(SMCError):
                matrices[f"{entry.number:02d}"] = entry.read()
        return matrices

    def get_audio(self) -> dict | None:
        """Return {"audio": (N, channels) float32 in [-1, 1), "sample_rate": int in Hz}, None for an expression. Sound
        that is stored as float64 or as integers stays that: float64, int16 or int32."""
        info = self.audio_info()
        if info is None:
            return None
        file, group = self._open("audio")
        audio = np.squeeze(file.read_array(group, "audio"))
        audio = audio.T if audio.shape[:1] == (info["channels"],) else audio
        audio = audio.reshape(info["samples"], info["channels"]).astype(audio.dtype.str[1:], copy=False)
        return {"audio": audio, "sample_rate": info["sample_rate"]}

    def audio_info(self) -> dict | None:
        """Return {"sample_rate" Hz, "channels", "samples", "duration_s"} without reading the samples; None without
        audio. Of two axes the longer one is that of the samples."""
        file, group = self._open("audio")
        if group is None:
            return None
        data, rate = file.dataset(group, "audio"), file.read_array(group, "sample_rate", ()).item()
        channels, samples = [1, 1, *sorted(data.shape)][-2:]
        form = f"{data.dtype} {data.shape}"
        is_sound = data.dtype.str[1:] in SOUND_TYPES and samples * channels == math.prod(data.shape) > 0
        if not is_sound or channels > MAX_CHANNELS or not 0 < rate <= 10**6 or rate != int(rate):
            raise file.error(f"{file.where(group)} holds {form} at {rate} Hz, which is no known form of sound")
        if data.dtype != np.float32 or data.shape != (samples, channels):
            file.note(f"{file.where(group)}/audio is stored as {form}, and not as float32 (n, 2)".replace(",)", ")"))
        rate = int(rate)
        return {"sample_rate": rate, "channels": channels, "samples": samples, "duration_s": samples / rate}

    def get_Keypoints2d(self, Camera_id, Frame_id=None) -> np.ndarray | None:
        """Return (106, 2) float64 pixels (x, y) of a frame, None where no face was found in it. A list of frames, or
        None for all, stacks those that have them (N, 106, 2). Cameras 18…32 can have key points."""
        if camera_name(Camera_id) not in DETECTING_CAMERAS:
            self._open("keypoints2d", Camera_id, needed=True)
        return self._keypoints((106, 2), Frame_id, "keypoints2d", Camera_id)

    def get_Keypoints3d(self, Frame_id=None) -> np.ndarray | None:
        """Return (73, 3) float64 of a frame, None where it has none. A list of frames, or None for all, stacks those
        that have them (N, 73, 3)."""
        return self._keypoints((73, 3), Frame_id, "keypoints3d")

    def _keypoints(self, shape, frame, modality, camera=None):
        file, group = self._open(modality, camera)

        def points_of(number):
            name = file.name_of(group, int(number), "frames")
            found = file.entry(group, name)
            return found and file.read_array(group, name, shape).astype(np.float64, copy=False)

        return self._frames(points_of, frame, modality, camera)

    def get_FLAME(self, Frame_id=None) -> dict | None:
        """Return {name: array} of the FLAME parameters of a frame: global_pose, neck_pose, jaw_pose, left_eye_pose,
        right_eye_pose, trans (3,), shape (100,), exp (50,), verts (5023, 3), albedos (3, 256, 256) and what else there
        is. For a list of frames or None each array has the frames stacked along a new first axis. None where the
        performance has no FLAME."""
        file, group = self._open("flame")
        if group is None:
            return None
        if isinstance(Frame_id, (int, str, np.integer)):
            frame = file.entry(*self._find("flame", frame=Frame_id)[1:], "group")
            names = [name for name in file.links(frame) if PARAMETER_NAME.fullmatch(name)]
            file.note_left_out(frame, names)
            return {name: file.read_array(frame, name) for name in names}
        frames = [self.get_FLAME(frame) for frame in (self.frame_numbers("flame") if Frame_id is None else Frame_id)]
        if any(frame.keys() != frames[0].keys() for frame in frames):
            raise file.error("the frames of FLAME have different parameters")
        with file.reading(group, what="cannot be stacked"):
            return {name: np.stack([frame[name] for frame in frames]) for name in (frames[0] if frames else ())}

    def get_uv(self, Frame_id=None, disable_tqdm=True) -> np.ndarray | None:
        """Return the decoded UV texture (256, 256, 3) uint8 BGR of a frame; a list of frames or None stacks them. None
        where the performance has no textures."""
        return self._frames(lambda frame: self._decoded("uv_textures", frame=frame), Frame_id, "uv_textures")

    def get_scanmesh(self) -> dict | None:
        """Return {"vertex": (n, 3) float64, "vertex_indices": (m, 3) int} of the scanned mesh, or None."""
        file, group = self._open("scan")
        if group is None:
            return None
        indices = file.read_array(group, "vertex_indices", (-1, 3))
        vertex = file.read_array(group, "vertex", (-1, 3)).astype(np.float64, copy=False)
        if indices.dtype.kind not in "iu" or indices.size and not 0 <= indices.min() <= indices.max() < len(vertex):
            raise file.error(f"Scan/vertex_indices holds {indices.dtype} that do not number the {len(vertex)} vertices")
        return {"vertex": vertex, "vertex_indices": indices}

    def get_scanmask(self, Camera_id=None) -> np.ndarray | None:
        """Return the decoded mask of the scan (H, W) uint8 from a camera; None stacks those of all cameras. None where
        the performance has no scan."""
        return self._frames(lambda camera: self._decoded("scan_masks", camera), Camera_id, "scan_masks")

    # ---- shared by the methods above

    def _open(self, modality, camera=None, needed=False):
        """Return (file, group) of a modality: the first file in which the group is there and not empty; group None if
        none. needed: raise SMCError then."""
        row = MODALITIES[modality]
        path = row.path.format(camera_name(camera)) if "{}" in row.path else row.path
        for file in self._files[:: 1 if row.from_raw else -1]:
            group = file.open_group(path)
            if file.links(group, first=True):
                return file, group
        if needed:
            raise self._files[0].error(f"there is no {path}")
        return self._files[0], None

    def _find(self, modality, camera=None, frame=None):
        """Return (file, group, name) of the entry of a frame, or of a camera where a modality's entries are cameras."""
        numbered = MODALITIES[modality].numbered
        file, group = self._open(modality, camera, needed=True)
        return file, group, file.name_of(group, int(camera_name(camera) if numbered == "cameras" else frame), numbered)

    def _frames(self, one, frame, modality, camera=None) -> np.ndarray | None:
        """Return one(frame), or the stack of it for a list of frames or None, without those for which it is None; None
        where the performance has nothing of the modality. (For a modality that has them, cameras stand for frames.)"""
        file, group = self._open(modality, camera)
        if group is None:
            return None
        if isinstance(frame, (int, str, np.integer)):
            return one(frame)
        wanted = sorted(file.numbers_in(group, MODALITIES[modality].numbered)) if frame is None else frame
        arrays = [one(number) for number in wanted]
        with file.reading(group, what="cannot be stacked"):
            return np.stack([array for array in arrays if array is not None])

    def _decoded(self, modality, camera=None, frame=None) -> np.ndarray:
        """Return the pixels (H, W, 3) uint8 BGR of a picture; of a mask (H, W), the maximum over channels."""
        import cv2  # costs 50 ms that those who only copy bytes need not spend

        file, group, name = self._find(modality, camera, frame)
        data = file.encoded(group, name)
        picture = probe_picture(data)
        with file.reading(group, name, what="cannot be decoded"):
            if picture.height * picture.width > MAX_PICTURE_PIXELS:
                raise ValueError(f"it claims {picture.width} x {picture.height} pixels")
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if picture.format else None
            if pixels is None:
                raise ValueError(f"its {len(data)} bytes are no JPEG or PNG, or damaged")
        return pixels.max(axis=2) if modality in ("masks", "scan_masks") else pixels


class _File:
    """An open HDF5 file of which only plain groups, data sets and attributes are read. The one place that knows h5py's
    low-level interface, which costs a quarter of the high-level one per data set."""

    def __init__(self, source, oddities: list[str]):
        self.source, self.oddities = source, oddities
        self.name = os.path.basename(str(getattr(source, "name", source)))
        self.listed = None, {}
        if not hasattr(source, "read") and not os.path.isfile(source):
            raise self.error("is a folder" if os.path.isdir(source) else "there is no such file")
        try:
            self.h5 = _open_hdf5(source)
        except Exception as error:
            _raise_disk_fault(error, self.name)
            raise self.error(_what_is_wrong(source, error)) from error
        with self.reading(None, "the file"):
            cache = self.h5.id.get_mdc_config()
            cache.set_initial_size, cache.initial_size = True, HEADER_CACHE_BYTES
            cache.min_size = cache.max_size = HEADER_CACHE_BYTES
            self.h5.id.set_mdc_config(cache)
            self.descriptor = None if hasattr(source, "read") else self.h5.id.get_vfd_handle()
            self.bytes = self.h5.id.get_filesize()

    def error(self, what) -> SMCError:
        return SMCError(f"{self.name}: {what}")

    @contextlib.contextmanager
    def reading(self, *place, what="cannot be read"):
        """Turn exceptions into an SMCError about a place in the file: HDF5 reports damage as almost any of them. Raise
        OSError where the disk cannot be read, and MemoryError as it is."""
        try:
            yield
        except (SMCError, MemoryError):
            raise
        except Exception as error:
            _raise_disk_fault(error, self.name)
            reason = printable(" ".join(str(error).strip("'").split()) or type(error).__name__, 200)
            raise self.error(f"{self.where(*place)} {what}: {reason}") from error

    # ---- groups

    def open_group(self, path: str):
        """Return the group at a path of plain names ("" is the root), or None where it or one above it is missing. A
        name of digits stands for that camera."""
        with self.reading(None, "the root group"):
            group = h5g.open(self.h5.id, b"/")
        for name in path.split("/") if path else ():
            name = self.name_of(group, int(name), "cameras") if name.isdigit() else name
            group = group and self.entry(group, name)
            if group is not None and not isinstance(group, h5g.GroupID):
                raise self.error(f"{self.where(group)} is no group")
        return group

    def entry(self, parent, name: str, needed: str = ""):
        """Return what the hard link of that name points to, or None. needed: raise SMCError unless it is of that kind,
        "group" or "data set"."""
        found, key = None, name.encode()
        with self.reading(parent, name):
            if parent.links.exists(key):
                if parent.links.get_info(key).type != h5l.TYPE_HARD:
                    raise ValueError("it is a link to another place; such links are not followed")
                found = h5o.open(parent, key)
        if needed and not isinstance(found, {"group": h5g.GroupID, "data set": h5d.DatasetID}[needed]):
            raise self.error(f"there is no {needed + ' ' if found else ''}{self.where(parent, name)}")
        return found

    def where(self, parent, name: str = "") -> str:
        """Return the path of something in the file, fit for a message."""
        with contextlib.suppress(Exception):
            name = f"{h5i.get_name(parent).decode('utf-8', 'replace')}/{name}"
        return printable(name.strip("/"))

    def links(self, group, first=False) -> dict[str, int]:
        """Return {name: kind of link} of the entries of a group, or of the `first` alone; {} for None."""
        found: dict[bytes, int] = {}
        with self.reading(group):
            if group is not None:
                group.links.iterate(lambda name, link: found.update({name: link.type}) or first or None, info=True)
        return {name.decode("utf-8", "replace"): kind for name, kind in found.items()}

    def numbers_in(self, group, kind: str) -> dict[int, str]:
        """Return {number: name} of the entries of a group that are numbers of "cameras" or "frames".

        Of several names for one number the usual one counts: two digits for a camera, no zeros before those of a frame.
        Other names are noted as an oddity. Raise SMCError where there are none but these."""
        (pattern, usual), names = NAMES[kind], list(self.links(group))
        numbers = {name: int(name) for name in names if pattern.fullmatch(name)}
        found = {numbers[name]: name for name in sorted(numbers, key=lambda name: name == usual.format(numbers[name]))}
        if found and found[min(found)] != usual.format(min(found)):
            self.note(f"numbers in names are padded, as in {found[min(found)]!r}")
        self.note_left_out(group, set(found.values()))
        if names and not found:
            raise self.error(f"{self.where(group)} has no numbers for names, but {printable(names[0])!r}")
        return found

    def name_of(self, group, number: int, kind: str) -> str:
        """Return the name in a group that stands for a camera or frame: the usual one, or else one that is there."""
        usual = NAMES[kind][1].format(number)
        with self.reading(group, usual):
            if group is None or group.links.exists(usual.encode()):
                return usual
        if self.listed[0] != self.where(group):  # kept, because a file that has one unusual name has only such
            self.listed = self.where(group), self.numbers_in(group, kind)
        return self.listed[1].get(number, usual)

    def note_left_out(self, group, used: Iterable[str]):
        """Note the entries of a group that are not used."""
        left_out = [printable(name) for name in self.links(group) if name not in used]
        if left_out:
            more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
            self.note(f"{self.where(group)} has entries that are left out: {', '.join(left_out[:3])}{more}")

    def note(self, what: str):
        """Remember an oddity, once."""
        oddity = f"{self.name}: {what}"
        if len(self.oddities) < MAX_ODDITIES and oddity not in self.oddities:
            self.oddities.append(oddity)

    def places(self, group, names=None, deepest: int = 2) -> Iterator[tuple[int, int]]:
        """Yield (first byte, byte after the last) of the data sets and chunks in a group and in the groups in it: in
        all of its entries, or in those of some names, without damaged ones. (No deeper: groups can hold themselves.)"""
        for name in self.links(group) if names is None else names:
            with contextlib.suppress(SMCError), self.reading(group, name):
                found = self.entry(group, name)
                if isinstance(found, h5g.GroupID) and deepest > 1:
                    yield from self.places(found, None, deepest - 1)
                elif isinstance(found, h5d.DatasetID) and found.get_offset() is not None:
                    yield found.get_offset(), found.get_offset() + found.get_storage_size()
                elif isinstance(found, h5d.DatasetID) and found.get_create_plist().get_layout() == h5d.CHUNKED:
                    for chunk in map(found.get_chunk_info, range(found.get_num_chunks())):
                        yield chunk.byte_offset, chunk.byte_offset + chunk.size

    # ---- attributes and arrays

    def attribute(self, path: str, name: str, kind: type):
        """Return an attribute of a group as str, int, float or int array; None, with an oddity noted, where it is not
        of that kind."""
        group = self.open_group(path)
        try:
            with self.reading(None, f"the attribute {name}"):
                if group is None or not h5a.exists(group, name.encode()):
                    return None
                if h5a.open(group, name.encode()).get_storage_size() > MAX_ATTRIBUTE_BYTES:
                    raise ValueError("it is too large")
                return _as_kind(h5py.Group(group).attrs[name], kind)
        except SMCError as error:
            self.note(str(error).partition(": ")[2])
            return None

    def read_array(self, group, name: str, shape: tuple | None = None) -> np.ndarray:
        """Return a numeric data set, whole, in its stored type. With a shape, in which -1 stands for any length, it has
        that one, but for axes of length one in the file."""
        data = self.dataset(group, name)
        with self.reading(group, name):
            array = np.empty(data.shape, data.dtype)
            data.read(h5s.ALL, h5s.ALL, array)
            shaped = array if shape is None else array.reshape(shape)
            if np.squeeze(shaped).shape != np.squeeze(array).shape:
                raise ValueError(f"its shape is {array.shape}, not {shape}")
        return shaped

    def dataset(self, group, name: str):
        """Return a numeric data set that is not too large to be read."""
        data = self.entry(group, name, "data set")
        with self.reading(group, name):
            _check_storage(data, MAX_ARRAY_BYTES)
            if data.dtype.kind not in "fiub":
                raise ValueError(f"it holds {data.dtype}, not numbers")
        return data

    # ---- encoded pictures

    def pictures(self, group, kind: str) -> Iterator[Entry]:
        """Yield the pictures of a group, in the order in which they lie in the file."""
        found: list[tuple] = []  # (offset or 0, number, bytes, function that reads them)
        links = self.links(group)
        for number, name in self.numbers_in(group, kind).items():
            try:
                offset, size = self._extent(group, name, links[name])
                found.append((offset or 0, number, size, partial(self._read_extent, group, name, offset, size)))
            except SMCError as fault:
                yield Entry(number, partial(self._extent, group, name, links[name]), fault)
        claimed, plain = sum(size for _, _, size, _ in found), sum(size for offset, _, size, _ in found if offset)
        if plain > self.bytes or claimed > MAX_EXPANSION * self.bytes:
            raise self.error(f"the pictures of {self.where(group)} claim {claimed} bytes, in a file of {self.bytes}")
        for _, number, _, read in sorted(found):
            yield Entry(number, read)

    def _extent(self, group, name: str, link: int | None = None) -> tuple[int | None, int]:
        """Return where the bytes of a picture are, None where HDF5 has to put them together, and how many they are.
        link: the kind of its link, if it is known from `links`: a hard one need not be asked for by `entry` again."""
        with self.reading(group, name):
            is_hard = link == h5l.TYPE_HARD
            data = h5d.open(group, name.encode()) if is_hard else self.entry(group, name, "data set")
            offset = data.get_offset()
            if offset is not None:
                size = data.get_storage_size()
                if max(data.shape or (-1,)) == size <= MAX_PICTURE_BYTES:
                    return offset, size  # bytes in one piece: there is no more to ask
            _check_storage(data, MAX_PICTURE_BYTES)
            size = max(data.shape, default=1)
            if data.dtype.itemsize != 1 or math.prod(data.shape) != size:
                raise ValueError(f"it holds {data.dtype} {data.shape}, no list of bytes")
            return None, size

    def _read_extent(self, group, name: str, offset: int | None, size: int) -> bytes:
        """Return the bytes of one picture."""
        if offset is None:
            return self.read_array(group, name).tobytes()
        if self.descriptor is None:
            self.source.seek(offset)
            data = self.source.read(size)
        else:
            data = os.pread(self.descriptor, size, offset)
        if len(data) != size:
            raise self.error(f"{self.where(group, name)} has {len(data)} of its {size} bytes")
        return data

    def encoded(self, group, name: str) -> bytes:
        """Return the bytes of the picture of that name."""
        return self._read_extent(group, name, *self._extent(group, name))


def _check_storage(data, limit: int):
    """Refuse a data set outside the file, before anything is asked that would make HDF5 look there, and one that claims
    more bytes than the limit, or that has none."""
    properties = data.get_create_plist()
    if properties.get_layout() == h5d.VIRTUAL or properties.get_external_count():
        raise ValueError("its data lies in another file")
    size, stored = math.prod(data.shape) * data.dtype.itemsize, data.get_storage_size()
    if size > limit or size and not stored:
        raise ValueError(f"it claims {size} bytes and has {stored}")


def _open_hdf5(source) -> h5py.File:
    """Open a file without HDF5's locks, which file systems of clusters often lack; with them, where this process has
    the file open in that way already: HDF5 wants the same for both."""
    try:
        return h5py.File(source, "r", locking=False)
    except OSError as error:
        if "lock" not in str(error):
            raise
        return h5py.File(source, "r")


def _raise_disk_fault(error: Exception, name: str):
    """Raise OSError where HDF5 failed because the disk cannot be read, which says nothing of the file."""
    code = re.search(r"errno = ([0-9]+)", str(error))
    if code and int(code[1]) in (errno.EIO, errno.ESTALE):
        raise OSError(int(code[1]), os.strerror(int(code[1])), name) from error


def _what_is_wrong(source, error: Exception) -> str:
    """Return in plain words why a file cannot be opened as HDF5."""
    if cut := re.search(r"truncated file: eof = ([0-9]+),.* stored_eof = ([0-9]+)", str(error)):
        return f"is cut short: {int(cut[1]) / 1e6:.2f} of {int(cut[2]) / 1e6:.2f} MB"
    if "signature not found" in str(error) and not hasattr(source, "read"):
        with open(source, "rb") as file:
            head = file.read(12)
        return f"is no HDF5 file (it begins with {printable(repr(head)[1:])})" if head else "is empty"
    return "is damaged: " + printable(" ".join(str(error).split()), 200)


def _as_kind(value, kind: type):
    """Return a value of an HDF5 attribute as a str, int, float or pair of ints. Raise an exception where it is none."""
    if kind is np.ndarray:
        return np.asarray(value).astype(np.int64, casting="safe").reshape(2)
    value = np.asarray(value).item()
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    if not isinstance(value, (str, bytes, int, float)) or kind is not str and not math.isfinite(float(text)):
        raise ValueError(f"it is {value!r:.50}")
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if kind is str else kind(float(text))


def printable(text: str, longest: int = 60) -> str:
    """Return text from a file as it can be shown: control characters escaped, and cut where it is long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= longest else text[:longest] + "…"
