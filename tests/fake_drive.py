"""A Google Drive on loopback, for testing with the real rclone and its real drive backend.

rclone has no option for the address of Drive. It does honour HTTPS_PROXY and --ca-cert, so this is a proxy that ends the TLS of
*.googleapis.com itself and answers the Drive v3 API out of a local folder. It refuses every other host and never connects anywhere.

    with FakeDrive(folder) as drive:
        drive.fault("0012/a.smc", "downloadQuotaExceeded")
        subprocess.run(["rclone", "copy", f"{drive.remote_name}:0012", "here", "--drive-root-folder-id", drive.root_id],
                       env={**os.environ, **drive.environment()})
        assert drive.count(kind="media", name="a.smc") == 1

The folder may change while it is served: names, sizes, times and MD5 sums are read anew for every request.

By hand, `python fake_drive.py FOLDER` serves a folder and prints the environment to set.
"""

import argparse
import base64
import datetime
import fnmatch
import hashlib
import http.server
import ipaddress
import json
import os
import re
import select
import shlex
import shutil
import socket
import socketserver
import ssl
import struct
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

ROOT_ID = "fake-root-folder-id-000000000000"  # the shared folder; every other id is derived from a path in it
REMOTE_NAME = "fake"  # section of the rclone config
ACCESS_TOKEN = "fake-access-token"  # any other bearer gets a 401
FOLDER_TYPE = "application/vnd.google-apps.folder"
READ_SIZE = 1 << 20  # bytes per read from a file
RECORD_SIZE = 1 << 14  # bytes per write, one TLS record: a write that fails is not counted, so keep it small
SEND_BUFFER = 1 << 16  # kernel send buffer, for the same reason: what is in it counts as sent
DRAIN_SECONDS = 1.0  # how long a cut waits for the bytes before it to leave

# fault kind: (status, domain, reason, message), in the words of the real service
ERRORS = {
    "downloadQuotaExceeded": (
        403,
        "usageLimits",
        "downloadQuotaExceeded",
        "The download quota for this file has been exceeded.",
    ),
    "userRateLimitExceeded": (403, "usageLimits", "userRateLimitExceeded", "User Rate Limit Exceeded"),
    "rateLimitExceeded": (403, "usageLimits", "rateLimitExceeded", "Rate Limit Exceeded"),
    "cannotDownloadAbusiveFile": (
        403,
        "global",
        "cannotDownloadAbusiveFile",
        "This file has been identified as malware or spam and cannot be downloaded.",
    ),
    "400": (400, "global", "invalid", "Invalid Value"),
    "401": (401, "global", "authError", "Invalid Credentials"),
    "404": (404, "global", "notFound", "File not found: {id}."),
    "416": (416, "global", "requestedRangeNotSatisfiable", "Request range not satisfiable"),
    "500": (500, "global", "internalError", "Internal Error"),
    "503": (503, "global", "backendError", "Service Unavailable"),
}
BODY_FAULTS = ("cut", "corrupt", "slow", "stall", "truncated")


class FakeDrive:
    """Serves `folder` as the Drive folder ROOT_ID, from `with` to the end of the block.

    Settings that may be changed at any time:
        latency                   seconds before every answer
        bandwidth                 bytes/s of media for all answers together, None for no limit
        bandwidth_per_connection  bytes/s of media for each answer, None for no limit
        page_size                 most entries per page of a listing (rclone asks for 1000)

    Records: `requests` is a list of Request, in the order in which they came; `count` and `bytes_sent` add it up.
    """

    remote_name = REMOTE_NAME
    root_id = ROOT_ID

    def __init__(self, folder, latency=0.0, bandwidth=None, bandwidth_per_connection=None, expired_token=False, port=0):
        """expired_token: the config holds a token of the past, and its refresh is refused as revoked."""
        self.latency = latency
        self.bandwidth = bandwidth
        self.bandwidth_per_connection = bandwidth_per_connection
        self.page_size = 1000
        self.requests = []
        self.port = port
        self._expired_token = expired_token
        self._tree = Tree(Path(folder))
        self._faults = []
        self._gates = []
        self._lock = threading.Lock()
        self._pacer = Pacer()
        self._connections = set()
        self._closing = threading.Event()
        self._server = None

    def __enter__(self):
        self._scratch = Path(tempfile.mkdtemp(prefix="fake_drive_"))
        self._tls = make_certificate(self._scratch / "certificate.pem")
        self.config_path = self._scratch / "rclone.conf"
        self.config_path.write_text(rclone_config(self._expired_token))
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def start(self):
        """Listen; after stop(), on the same port again, so that a running rclone finds it."""
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        """Drop all connections and listen no more: an outage. Does nothing when already stopped."""
        if self._server is None:
            return
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        self.drop_connections()

    def drop_connections(self):
        """Hang up on every client; they may connect again."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.hang_up()

    def environment(self):
        """Variables that lead rclone here. Add them to those of the process; the empty ones clear what may be set
        there."""
        proxy = f"http://127.0.0.1:{self.port}"
        return {
            "HTTPS_PROXY": proxy,
            "https_proxy": proxy,
            "NO_PROXY": "",
            "no_proxy": "",
            "RCLONE_CA_CERT": str(self._scratch / "certificate.pem"),
            "RCLONE_CONFIG": str(self.config_path),
        }

    def file_id(self, path):
        """The Drive id of a file or folder, given by its path in the served folder."""
        return file_id(str(path))

    # Faults and gates

    def fault(self, name, kind, times=None, after_bytes=None, on=None, skip=0, bytes_per_second=None, delay=0.0):
        """Spoil the answers to requests for `name`, a path in the folder or a bare file name, with * and ? as
        wildcards.

        kind: a key of ERRORS, answered with that status and reason
                  (cannotDownloadAbusiveFile only as long as the request does not acknowledge abuse), or
              "cut"        hang up hard after `after_bytes` of the body (default: half) "corrupt"    flip the bits of
              the byte at offset `after_bytes` of the file (default: the middle of the answer); an answer without that
              byte is left whole, and does not count for `times`
              "slow"       wait `delay` seconds, then send `bytes_per_second`
              "stall"      send `after_bytes` of the body (default: half), then nothing more
              "truncated"  a well-formed answer with a Content-Length of `after_bytes` (default: half)
        times: how many requests it hits, None for all skip: how many matching requests it lets pass first on: "list",
        "get", "media" or "any"; default "any" for 401 and 404, else "media". In a listing `name` is the folder's.

        Returns the Fault: `.hits` counts, `.clear()` ends it. Of several that match, the one set first is used.
        """
        if kind not in ERRORS and kind not in BODY_FAULTS:
            raise ValueError(f"no such fault: {kind}")
        on = on or ("any" if kind in ("401", "404") else "media")
        fault = Fault(name, kind, on, times, skip, after_bytes, bytes_per_second, delay)
        with self._lock:
            self._faults.append(fault)
        return fault

    def gate(self, name, after_bytes):
        """Hold the next media answer for `name` once `after_bytes` of its body are sent.

        Returns the Gate: `wait()` until it holds, then `release()`. A gate catches one answer.
        """
        gate = Gate(name, after_bytes)
        with self._lock:
            self._gates.append(gate)
        return gate

    def _fault_for(self, kind, name, params, start, end):
        with self._lock:
            for fault in self._faults:
                if fault.applies(kind, name, params, start, end):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.hits += 1
                    return fault
        return None

    def _gate_for(self, name, length):
        with self._lock:
            for gate in self._gates:
                if matches(gate.name, name) and gate.after_bytes <= length:
                    self._gates.remove(gate)
                    return gate
        return None

    # Records

    def count(self, kind=None, name=None, status=None):
        """How many requests of this kind ("list", "get", "media", ...), for this name and with this status there
        were."""
        return len(self.select(kind, name, status))

    def select(self, kind=None, name=None, status=None):
        """The requests that `count` counts."""
        with self._lock:
            return [
                request
                for request in self.requests
                if (kind is None or request.kind == kind)
                and (name is None or matches(name, request.name))
                and (status is None or request.status == status)
            ]

    def bytes_sent(self, name=None):
        """Media bytes sent, also by answers that were cut or are still under way.

        Sent means written to the socket. The last 100 KB or so of an answer that the client hung up on may have stayed
        in its buffer."""
        return sum(request.sent for request in self.select("media", name))

    def wait_until_idle(self, timeout=5.0):
        """Wait until every answer has ended, as it soon does when rclone is gone; TimeoutError if not."""
        deadline = time.monotonic() + timeout
        while not all(request.done for request in self.select()):
            if time.monotonic() > deadline:
                raise TimeoutError("answers are still under way")
            time.sleep(0.01)

    def forget_requests(self):
        """Start the records anew."""
        with self._lock:
            self.requests.clear()

    def _add_record(self, record):
        with self._lock:
            self.requests.append(record)
        return record


@dataclass
class Request:
    """One request. `sent` grows while the answer is under way; `status` is 0 until there is one."""

    time: float  # seconds since the epoch
    method: str
    kind: str  # list, get, media, token, connect (refused host), other
    name: str  # path in the folder; of the folder for a listing, the bare id if there is no such file
    range_start: int = None  # as the Range header has them, both ends included; range_end None: to the end
    range_end: int = None
    status: int = 0
    sent: int = 0  # bytes of media, not counting headers and error texts
    query: str = ""  # as it came, for a look at what rclone asks
    done: bool = False


@dataclass
class Fault:
    """See FakeDrive.fault."""

    name: str
    kind: str
    on: str
    times: int
    skip: int
    after_bytes: int
    bytes_per_second: float
    delay: float
    hits: int = 0

    def clear(self):
        self.times = self.hits

    def applies(self, kind, name, params, start, end):
        """start, end: the bytes of the file that the answer will hold, for kind "media"."""
        if self.on not in ("any", kind) or not matches(self.name, name):
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        if self.kind == "corrupt" and self.after_bytes is not None:
            return start <= self.after_bytes < end
        if self.kind == "cannotDownloadAbusiveFile":
            return params.get("acknowledgeAbuse") != "true"
        return self.kind in ERRORS or kind == "media"


@dataclass
class Gate:
    """See FakeDrive.gate."""

    name: str
    after_bytes: int
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout=10.0):
        """Wait until an answer is held here; TimeoutError if none comes."""
        if not self.reached.wait(timeout):
            raise TimeoutError(f"no answer for {self.name} came to {self.after_bytes} bytes")

    def release(self):
        self.released.set()


class Pacer:
    """Keeps what passes through it to a rate."""

    def __init__(self):
        self._lock = threading.Lock()
        self._free_at = 0.0

    def book(self, size, rate):
        """Book `size` bytes at `rate` bytes/s; returns the seconds until they are through."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + size / rate
            return self._free_at - now


class ApiError(Exception):
    """An answer with an error of Google's format."""

    def __init__(self, kind, about=""):
        self.status, domain, reason, message = ERRORS[kind]
        message = message.format(id=about)
        self.body = {
            "error": {
                "errors": [{"domain": domain, "reason": reason, "message": message}],
                "code": self.status,
                "message": message,
            }
        }


# The folder as Drive has it: ids, metadata, queries


class Tree:
    """A local folder in the terms of Drive. Paths are relative and with /, the folder itself is ""."""

    def __init__(self, folder):
        self.folder = folder
        self._path_of = {ROOT_ID: ""}
        self._md5 = {}

    def local(self, path):
        return self.folder / path

    def find(self, wanted):
        """Path of the file or folder with this id; KeyError if there is none (any more)."""
        if wanted not in self._path_of:
            for parent, folders, files in os.walk(self.folder, followlinks=True):
                for name in folders + files:
                    path = Path(parent, name).relative_to(self.folder).as_posix()
                    self._path_of[file_id(path)] = path
        path = self._path_of[wanted]
        if not self.local(path).exists():
            raise KeyError(wanted)
        return path

    def children(self, path):
        """The entries of a folder, sorted by name, with only what a query can ask for."""
        with os.scandir(self.local(path)) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries)
        for name, is_folder in names:
            child = f"{path}/{name}" if path else name
            self._path_of[file_id(child)] = child
            yield {
                "path": child,
                "name": name,
                "parents": [file_id(path)],
                "trashed": False,
                "mimeType": FOLDER_TYPE if is_folder else "application/octet-stream",
            }

    def metadata(self, path, fields):
        """The resource of a file or folder, cut down to `fields` (the parameter of the request; without nesting)."""
        stat = self.local(path).stat()
        is_folder = self.local(path).is_dir()
        resource = {
            "kind": "drive#file",
            "id": file_id(path),
            "name": Path(path).name or self.folder.name,
            "mimeType": FOLDER_TYPE if is_folder else "application/octet-stream",
            "parents": [file_id(Path(path).parent.as_posix())] if path else [],
            "trashed": False,
            "modifiedTime": rfc3339(stat.st_mtime),
            "createdTime": rfc3339(stat.st_mtime),
        }
        if not is_folder:
            resource["size"] = str(stat.st_size)
            if "md5Checksum" in fields or fields == "*":
                resource["md5Checksum"] = self._md5_of(path, stat)
        wanted = set(re.findall(r"\w+", fields))
        return {key: value for key, value in resource.items() if fields == "*" or key in wanted}

    def _md5_of(self, path, stat):
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in self._md5:
            digest = hashlib.md5()
            with open(self.local(path), "rb") as file:
                while block := file.read(READ_SIZE):
                    digest.update(block)
            self._md5[key] = digest.hexdigest()
        return self._md5[key]


def file_id(path):
    """The id of a path: of the length of real ones, the same in every run."""
    if path in ("", "."):
        return ROOT_ID
    return "1" + base64.urlsafe_b64encode(hashlib.sha256(path.encode()).digest()).decode()[:32]


def rfc3339(seconds):
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def matches(pattern, path):
    """Whether a pattern names this path, or its last part."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern)


class Query:
    """The `q` of a listing, such as: trashed=false and ('ID' in parents) and (name='a' or name='b') and mimeType!='T'.

    `parents` are the folders that it names; `accepts` says whether an entry of one of them is meant.
    """

    def __init__(self, text):
        self._tokens = re.findall(r"'(?:\\.|[^'\\])*'|!=|=|[()]|\w+", text)
        self.parents = []
        self.accepts = self._either()
        if self._tokens:
            raise ValueError(f"cannot read the query at {self._tokens}")

    def _take(self):
        if not self._tokens:
            raise ValueError("the query ends too early")
        return self._tokens.pop(0)

    def _next_is(self, word):
        if self._tokens[:1] == [word]:
            return bool(self._tokens.pop(0))
        return False

    def _either(self):
        terms = [self._both()]
        while self._next_is("or"):
            terms.append(self._both())
        return lambda entry: any(term(entry) for term in terms)

    def _both(self):
        terms = [self._term()]
        while self._next_is("and"):
            terms.append(self._term())
        return lambda entry: all(term(entry) for term in terms)

    def _term(self):
        if self._next_is("not"):
            term = self._term()
            return lambda entry: not term(entry)
        if self._next_is("("):
            term = self._either()
            if not self._next_is(")"):
                raise ValueError("the query lacks a )")
            return term
        left = self._take()
        operator = self._take()
        right = self._take()
        if (operator, right) == ("in", "parents"):
            parent = self._value(left)
            self.parents.append(parent)
            return lambda entry: parent in entry["parents"]
        value = self._value(right)
        if operator == "=":
            return lambda entry: entry.get(left) == value
        if operator == "!=":
            return lambda entry: entry.get(left) != value
        raise ValueError(f"no operator of queries: {operator}")

    @staticmethod
    def _value(token):
        if token.startswith("'"):
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        if token in ("true", "false"):
            return token == "true"
        raise ValueError(f"no value of queries: {token}")


# HTTP


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, drive):
        self.drive = drive
        super().__init__(address, _Connection)

    def handle_error(self, request, client_address):
        """Clients that hang up are nothing to report; faults in here are."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Connection(http.server.BaseHTTPRequestHandler):
    """One client connection: a CONNECT, then TLS, then any number of requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host = None  # the host of the tunnel, once there is one

    def setup(self):
        super().setup()
        self.drive = self.server.drive
        self._closing = self.drive._closing
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        with self.drive._lock:
            self.drive._connections.add(self)
        if self._closing.is_set():
            self.hang_up()

    def finish(self):
        with self.drive._lock:
            self.drive._connections.discard(self)
        super().finish()
        self.connection.close()

    def hang_up(self):
        """From another thread: make every read and write here fail."""
        try:
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)
        except OSError:
            pass

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        host = self.path.rsplit(":", 1)[0]
        if self.host or not (host == "googleapis.com" or host.endswith(".googleapis.com")):
            return self._refuse("connect", self.path)
        self.send_response_only(200, "Connection established")
        self.end_headers()
        self.rfile.close()
        self.request = self.drive._tls.wrap_socket(self.request, server_side=True)
        self.host = host
        self.close_connection = False  # some clients say HTTP/1.0 here
        self.setup()

    def do_GET(self):
        if not self.host:
            return self._refuse("other", self.path)
        url = urlsplit(self.path)
        params = dict(parse_qsl(url.query))
        start, end = parse_range(self.headers.get("Range"))
        record = self.drive._add_record(Request(time.time(), "GET", "other", url.path, start, end, query=url.query))
        try:
            self._closing.wait(self.drive.latency)
            if self.headers.get("Authorization") != f"Bearer {ACCESS_TOKEN}":
                raise ApiError("401")
            self._answer(url.path, params, record)
        except ApiError as error:
            self._send_json(record, error.status, error.body)
        finally:
            record.done = True

    def do_POST(self):
        """The refresh of a token, always refused: the real service answers like this once the grant is revoked."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.host != "oauth2.googleapis.com":
            return self._refuse("other", self.path)
        record = self.drive._add_record(Request(time.time(), "POST", "token", self.path, done=True))
        self._send_json(
            record, 400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
        )

    def _refuse(self, kind, name):
        record = self.drive._add_record(Request(time.time(), self.command, kind, name, done=True))
        self.close_connection = True
        self._send_json(record, 403, {"error": {"errors": [], "code": 403, "message": "not served here"}})

    def _answer(self, url_path, params, record):
        found = re.fullmatch(r"/drive/v3/files/([^/]+)", url_path)
        if url_path == "/drive/v3/files":
            self._answer_list(params, record)
        elif found and params.get("alt") == "media":
            self._answer_media(found[1], params, record)
        elif found:
            record.kind = "get"
            path = self._find(found[1], record)
            self._meet_error("get", path, params)
            self._send_json(record, 200, self.drive._tree.metadata(path, params.get("fields", "*")))
        elif url_path == "/drive/v3/about":
            self._send_json(
                record,
                200,
                {
                    "user": {"displayName": "Fake", "emailAddress": "fake@example.com"},
                    "storageQuota": {"limit": str(15 << 30), "usage": "0"},
                },
            )
        elif url_path == "/drive/v3/changes/startPageToken":
            self._send_json(record, 200, {"startPageToken": "1"})
        elif url_path == "/drive/v3/drives":
            self._send_json(record, 200, {"drives": []})
        else:
            raise ApiError("404")

    def _find(self, wanted, record):
        record.name = wanted
        try:
            record.name = self.drive._tree.find(wanted)
        except KeyError:
            raise ApiError("404", wanted) from None
        return record.name

    def _meet_error(self, kind, name, params, start=0, end=0):
        """Raise the fault set for this request, or return it if it is one of the body."""
        fault = self.drive._fault_for(kind, name, params, start, end)
        if fault and fault.kind in ERRORS:
            raise ApiError(fault.kind, "" if kind == "list" else file_id(name))
        return fault

    def _answer_list(self, params, record):
        record.kind = "list"
        tree = self.drive._tree
        try:
            query = Query(params.get("q", ""))
        except ValueError:
            raise ApiError("400") from None
        entries = []
        for parent in query.parents:
            try:
                path = self._find(parent, record)
            except ApiError:
                raise ApiError("404") from None  # the real service leaves out the id here
            self._meet_error("list", path, params)
            entries += filter(query.accepts, tree.children(path))
        size = min(int(params.get("pageSize", 100)), self.drive.page_size)
        start = int(params.get("pageToken", 0))
        fields = params.get("fields", "*")
        page = {
            "kind": "drive#fileList",
            "incompleteSearch": False,
            "files": [tree.metadata(entry["path"], fields) for entry in entries[start : start + size]],
        }
        if start + size < len(entries):
            page["nextPageToken"] = str(start + size)
        self._send_json(record, 200, page)

    def _answer_media(self, wanted, params, record):
        record.kind = "media"
        path = self._find(wanted, record)
        with open(self.drive._tree.local(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, end = resolve_range(record.range_start, record.range_end, size)
            fault = self._meet_error("media", path, params, start, end)
            if fault and fault.kind == "slow":
                self._closing.wait(fault.delay)
            asked_for = end
            if fault and fault.kind == "truncated":
                end = start + body_offset(fault, end - start)
            record.status = 200 if record.range_start is None else 206
            self.send_response(record.status)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(end - start))
            self.send_header("Accept-Ranges", "bytes")
            if record.status == 206:
                self.send_header("Content-Range", f"bytes {start}-{(end or asked_for) - 1}/{size}")
            self.end_headers()
            file.seek(start)
            self._send_body(file, end - start, record, fault, self.drive._gate_for(path, end - start))

    def _send_body(self, file, length, record, fault, gate):
        start = file.tell()
        stop = body_offset(fault, length) if fault and fault.kind in ("cut", "stall") else length
        flip_at = None
        if fault and fault.kind == "corrupt":
            flip_at = (fault.after_bytes if fault.after_bytes is not None else start + length // 2) - start
        pacer = Pacer()
        slow_rate = fault.bytes_per_second if fault and fault.kind == "slow" else None
        while True:
            if gate and record.sent == gate.after_bytes:
                gate.reached.set()
                self._wait_while_connected(gate.released)
                gate = None
            if record.sent == stop:
                break
            rates = [rate for rate in (slow_rate, self.drive.bandwidth_per_connection, self.drive.bandwidth) if rate]
            size = min(READ_SIZE, stop - record.sent)
            if rates:
                size = min(size, max(1, int(min(rates) / 20)))
            if gate and record.sent < gate.after_bytes:
                size = min(size, gate.after_bytes - record.sent)
            block = file.read(size)
            if not block:
                self._cut()  # the file has become shorter meanwhile
                return
            if flip_at is not None and record.sent <= flip_at < record.sent + len(block):
                block = bytearray(block)
                block[flip_at - record.sent] ^= 0xFF
            self._send_block(block, record)
            delay = 0.0
            if slow_rate or self.drive.bandwidth_per_connection:
                delay = pacer.book(
                    len(block), min(rate for rate in (slow_rate, self.drive.bandwidth_per_connection) if rate)
                )
            if self.drive.bandwidth:
                delay = max(delay, self.drive._pacer.book(len(block), self.drive.bandwidth))
            if delay:
                self._closing.wait(delay)
        if fault and fault.kind == "stall":
            self._wait_while_connected(threading.Event())
        elif fault and fault.kind == "cut":
            self._cut()

    def _send_block(self, block, record):
        for start in range(0, len(block), RECORD_SIZE):
            piece = block[start : start + RECORD_SIZE]
            record.sent += len(piece)  # before the write: a client that has got everything must find it counted
            try:
                self.connection.sendall(piece)
            except OSError:
                record.sent -= len(piece)
                raise

    def _wait_while_connected(self, event):
        """Wait for the event; ConnectionError when the client hangs up or the server stops. A client that waits sends
        nothing."""
        while not event.wait(0.01):
            if self._closing.is_set() or select.select([self.connection], [], [], 0)[0]:
                self.close_connection = True
                raise ConnectionError("hung up")

    def _cut(self):
        """Hang up with a reset, once all that was written has left."""
        self.close_connection = True
        deadline = time.monotonic() + DRAIN_SECONDS
        while unsent_bytes(self.connection) and time.monotonic() < deadline:
            time.sleep(0.002)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _send_json(self, record, status, body):
        record.status = status
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


def parse_range(header):
    """(first, last) of a Range header, last None if open, (None, None) without one; a suffix has first < 0."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not found:
        return None, None
    if not found[1]:
        return -int(found[2]), None
    return int(found[1]), int(found[2]) if found[2] else None


def resolve_range(first, last, size):
    """The bytes [start, end) of a file that a Range asks for."""
    if first is None:
        return 0, size
    start = max(0, size + first) if first < 0 else first
    if start >= size:
        raise ApiError("416")
    return start, size if last is None else min(last + 1, size)


def body_offset(fault, length):
    """Where in a body of this length a fault strikes."""
    return length // 2 if fault.after_bytes is None else min(fault.after_bytes, length)


def unsent_bytes(connection):
    """Bytes that the kernel still holds for the other side; 0 where it does not tell."""
    try:
        import fcntl
        import termios

        return struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    except (ImportError, OSError):
        return 0


# What rclone is given


def rclone_config(expired_token):
    year = 2001 if expired_token else 2099
    token = {
        "access_token": ACCESS_TOKEN,
        "token_type": "Bearer",
        "refresh_token": "fake-refresh-token",
        "expiry": f"{year}-01-01T00:00:00Z",
    }
    return (
        f"[{REMOTE_NAME}]\ntype = drive\nscope = drive.readonly\nclient_id = fake-client-id\n"
        f"client_secret = fake-client-secret\ntoken = {json.dumps(token)}\n"
    )


def make_certificate(path):
    """Write a self-signed certificate for *.googleapis.com; returns the server's TLS context with it and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fake Drive")])
    alternatives = [x509.DNSName(host) for host in ("googleapis.com", "*.googleapis.com")]
    alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path.write_bytes(certificate.public_bytes(pem))
    key_path = path.with_suffix(".key")
    key_path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key_path)
    return context


def main():
    parser = argparse.ArgumentParser(description="Serve a folder as a Google Drive on loopback, until Ctrl-C.")
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every answer")
    parser.add_argument("--bandwidth", type=float, help="bytes/s of media, all answers together")
    parser.add_argument("--fault", nargs=2, action="append", default=[], metavar=("NAME", "KIND"))
    arguments = parser.parse_args()
    with FakeDrive(arguments.folder, arguments.latency, arguments.bandwidth, port=arguments.port) as drive:
        for name, kind in arguments.fault:
            drive.fault(name, kind)
        for name, value in drive.environment().items():
            print(f"export {name}={shlex.quote(value)}")
        print(f"# rclone lsf {drive.remote_name}: --drive-root-folder-id {drive.root_id}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
