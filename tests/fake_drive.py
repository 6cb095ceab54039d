"""A Google Drive on loopback, for testing with the real rclone and its real drive backend.

rclone has no option for the address of Drive. It does honour HTTPS_PROXY and --ca-cert, so this is a proxy that ends
the TLS of *.googleapis.com itself and answers the Drive v3 API out of a local folder. It refuses every other host and
never connects anywhere.

    with FakeDrive(folder) as drive:
        drive.fault("0012/a.smc", "downloadQuotaExceeded")
        subprocess.run(["rclone", "copy", f"{drive.remote_name}:0012", "here", "--drive-root-folder-id", drive.root_id],
                       env={**os.environ, **drive.environment()})
        assert drive.count(kind="media", name="a.smc") == 1

The folder may change while it is served: names, sizes, times and MD5 sums are read anew for every request.
"""

import base64
import datetime
import fnmatch
import functools
import hashlib
import http.server
import json
import re
import select
import shutil
import socket
import socketserver
import ssl
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

ROOT_ID = "fake-root-folder-id-000000000000"  # the shared folder; every other id is derived from a path in it
PAGE_SIZE = 1000  # entries of a listing in one answer, at most
FOLDER_TYPE = "application/vnd.google-apps.folder"
BLOCK_SIZE = 1 << 14  # bytes per write, one TLS record: a write that fails is not counted, so keep it small
SEND_BUFFER = 1 << 16  # kernel send buffer, for the same reason: what is in it counts as sent

# fault kind: (status, domain, reason, message), in the words of the real service
QUOTA_MESSAGE = "The download quota for this file has been exceeded."
ERRORS = {
    "downloadQuotaExceeded": (403, "usageLimits", "downloadQuotaExceeded", QUOTA_MESSAGE),
    "userRateLimitExceeded": (403, "usageLimits", "userRateLimitExceeded", "User Rate Limit Exceeded"),
    "dailyLimitExceeded": (403, "usageLimits", "dailyLimitExceeded", "Daily Limit Exceeded"),
    "insufficientFilePermissions": (403, "global", "insufficientFilePermissions", "Insufficient permissions for file."),
    "cannotDownloadFile": (403, "global", "cannotDownloadFile", "This file cannot be downloaded by the user."),
    "401": (401, "global", "authError", "Invalid Credentials"),
    "400": (400, "global", "invalid", "Invalid Value"),
    "404": (404, "global", "notFound", "File not found: {id}."),
    "416": (416, "global", "requestedRangeNotSatisfiable", "Request range not satisfiable"),
    "500": (500, "global", "internalError", "Internal Error"),
    "503": (503, "global", "backendError", "Service Unavailable"),
}
BODY_FAULTS = ("cut", "corrupt", "truncated")

# What rclone asks for when it lists a folder, or looks for a name in it.
QUERY = re.compile(
    r"trashed=false and \((?P<parents>'[^']+' in parents(?: or '[^']+' in parents)*)\)"
    r"(?: and \(name='(?P<name>(?:\\.|[^'\\])*)'\))?"
    rf"(?P<folders> and \(mimeType='{FOLDER_TYPE}' or mimeType='application/vnd.google-apps.shortcut'\))?"
)


class FakeDrive:
    """Serves `folder` as the Drive folder ROOT_ID, from `with` to the end of the block.

    latency: seconds before every answer; bandwidth: bytes/s of media for all answers together, None for no limit;
    short_tokens: rclone's access token is always about to expire, so that it asks for a new one before each request.
    """

    remote_name = "fake"
    root_id = ROOT_ID

    def __init__(self, folder, latency=0.0, bandwidth=None, short_tokens=False):
        self.folder, self.latency, self.bandwidth = Path(folder), latency, bandwidth
        self.requests, self.faults, self.gates = [], [], []
        self.duplicates = {}  # {path with the number of the duplicate: (what it is, whether it is listed first)}
        self.lock = threading.Lock()
        self.connections = set()
        self.login_expired = False
        self._short_tokens = short_tokens
        self._free_at = 0.0  # when what was sent so far will be through
        self._server, self._port = None, 0

    def __enter__(self):
        self._scratch = Path(tempfile.mkdtemp(prefix="fake_drive_"))
        self.tls = make_certificate(self._scratch / "certificate.pem")
        self.config_path = self._scratch / "rclone.conf"
        self.config_path.write_text(rclone_config(self._short_tokens))
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()
        shutil.rmtree(self._scratch)

    def start(self):
        """Listen; after stop(), on the same port again, so that a running rclone finds it."""
        self.closing = threading.Event()
        self._server = Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        """Drop all connections and listen no more: an outage. Does nothing when already stopped."""
        if self._server:
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            for connection in list(self.connections):
                connection.hang_up()

    def environment(self):
        """Variables that lead rclone here, to be added to the process's; the empty ones clear what may be set."""
        proxy = f"http://127.0.0.1:{self._port}"
        return {
            "HTTPS_PROXY": proxy,
            "https_proxy": proxy,
            "NO_PROXY": "",
            "no_proxy": "",
            "RCLONE_CA_CERT": str(self._scratch / "certificate.pem"),
            "RCLONE_CONFIG": str(self.config_path),
        }

    def fault(self, name, kind, times=None, after_bytes=None, on=None, skip=0, every=1):
        """Spoil the answers to requests for `name`, a path in the folder or a file name, with * and ? as wildcards.

        kind: a key of ERRORS, answered with that status and reason, or
              "cut"        hang up after `after_bytes` of the body (default: half)
              "truncated"  a well-formed answer with a Content-Length of `after_bytes` (default: half)
              "corrupt"    flip the bits of the byte in the middle of the answer
        times: how many requests it hits, None for all; skip: how many matching requests it lets pass first;
        every: 3 to hit each third of those that follow;
        on: "list", "get", "media" or "any", default "any" for 404, else "media". In a listing `name` is the folder's.

        Returns the Fault: `.hits` counts, `.clear()` ends it. Of several that match, the one set first is used.
        """
        assert kind in ERRORS or kind in BODY_FAULTS, f"no such fault: {kind}"
        self.faults.append(
            Fault(name, kind, on or ("any" if kind == "404" else "media"), times, skip, after_bytes, every)
        )
        return self.faults[-1]

    def gate(self, name, after_bytes):
        """Hold the next media answer for `name` that is longer than `after_bytes` once so many bytes of it are sent.

        Returns the Gate: `wait()` until it holds, then `release()`. A gate catches one answer.
        """
        self.gates.append(Gate(name, after_bytes))
        return self.gates[-1]

    def duplicate(self, path, source, first=False):
        """List another file or folder, `source` on the disk, under the name of `path`, before or after that one.

        In requests it is called path#1, and the next one of that name path#2.
        """
        number = 1 + sum(other.rpartition("#")[0] == path for other in self.duplicates)
        self.duplicates[f"{path}#{number}"] = Path(source), first

    def expire_login(self):
        """From now on each request is answered 401, and the refresh of a token is refused: the grant is no more.

        With short_tokens, rclone meets the refusal, as on the day when a login ends; without, the 401, as after the
        user has taken the access away.
        """
        self.login_expired = True

    def count(self, kind=None, name="*", status=None):
        """How many requests of a kind ("list", "get", "media", …), for a name and with a status there were."""
        return sum(
            kind in (None, request.kind) and status in (None, request.status) and matches(name, request.name)
            for request in list(self.requests)
        )

    def bytes_sent(self, name="*"):
        """Media bytes written to the socket, also by answers that were cut or are still under way."""
        return sum(request.sent for request in list(self.requests) if matches(name, request.name))

    def fault_for(self, kind, name):
        """The fault that hits a request, or None. An error is raised."""
        with self.lock:
            fault = next((fault for fault in self.faults if fault.hits_now(kind, name)), None)
        if fault and fault.kind in ERRORS:
            raise ApiError(fault.kind, "" if kind == "list" else file_id(name))
        return fault

    def gate_for(self, name, length):
        """The gate that catches an answer of this length, or None."""
        with self.lock:
            for gate in self.gates:
                if matches(gate.name, name) and gate.after_bytes < length:
                    self.gates.remove(gate)
                    return gate

    def wait_for_bandwidth(self, size):
        """Wait until so many bytes more are through."""
        with self.lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self.bandwidth
            delay = self._free_at - time.monotonic()
        self.closing.wait(delay)

    # The folder as Drive has it

    def find(self, wanted):
        """The path in the folder that an id stands for."""
        path = "" if wanted == ROOT_ID else path_of(wanted)
        if path is None or not self.local(path).exists():
            raise ApiError("404", wanted)
        return path

    def local(self, path):
        """Where a path lies on the disk: in the folder, but for duplicates and what is in them."""
        parent, _, name = path.rpartition("/")
        return (
            self.duplicates[path][0] if path in self.duplicates else self.local(parent) / name if path else self.folder
        )

    def children(self, path):
        """The paths in a folder, by name, each duplicate beside the one whose name it has."""
        paths = [f"{path}/{child.name}".lstrip("/") for child in sorted(self.local(path).iterdir())]
        for duplicate, (_, first) in self.duplicates.items():
            original = duplicate.rpartition("#")[0]
            if original in paths:
                paths.insert(paths.index(original) + (not first), duplicate)
        return paths

    def metadata(self, path):
        """The resource of a file or folder."""
        local = self.local(path)
        status = local.stat()
        resource = {"id": file_id(path), "name": self.name(path), "mimeType": FOLDER_TYPE}
        resource["parents"] = [file_id(Path(path).parent.as_posix())]
        changed = datetime.datetime.fromtimestamp(status.st_mtime, datetime.timezone.utc)
        resource["modifiedTime"] = changed.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if local.is_file():
            resource["mimeType"] = "application/octet-stream"
            resource["size"] = str(status.st_size)
            resource["md5Checksum"] = md5_of(local, status.st_size, status.st_mtime_ns)
        return resource

    def name(self, path):
        return (path.rpartition("#")[0] if path in self.duplicates else path).rpartition("/")[2]


@dataclass
class Request:
    """One request. `sent` grows while the answer is under way; `status` is 0 until there is one."""

    kind: str = "other"  # list, get, media, token, connect (refused host), other
    name: str = ""  # path in the folder; of the folder for a listing, the bare id if there is no such file
    status: int = 0
    sent: int = 0  # bytes of media, not counting headers and error texts


@dataclass
class Fault:
    """See FakeDrive.fault."""

    name: str
    kind: str
    on: str
    times: int
    skip: int
    after_bytes: int
    every: int = 1
    seen: int = 0
    hits: int = 0

    def clear(self):
        self.times = self.hits

    def hits_now(self, kind, name):
        """Whether it hits this request, which is counted."""
        if self.on not in ("any", kind) or not matches(self.name, name) or self.hits == self.times:
            return False
        self.seen += 1
        hit = self.seen > self.skip and (self.seen - self.skip) % self.every == 0
        self.hits += hit
        return hit


@dataclass
class Gate:
    """See FakeDrive.gate."""

    name: str
    after_bytes: int
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def wait(self):
        assert self.reached.wait(120), f"no answer for {self.name} came to {self.after_bytes} bytes"

    def release(self):
        self.released.set()


class ApiError(Exception):
    """An answer with an error of Google's format."""

    def __init__(self, kind, about=""):
        self.status, domain, reason, message = ERRORS[kind]
        message = message.format(id=about)
        errors = [{"domain": domain, "reason": reason, "message": message}]
        self.body = {"error": {"errors": errors, "code": self.status, "message": message}}


def file_id(path):
    """The id of a path."""
    return ROOT_ID if path in ("", ".") else "1" + base64.urlsafe_b64encode(path.encode()).decode().rstrip("=")


def path_of(wanted):
    """The path of an id, None if it is no id of ours."""
    try:
        return base64.urlsafe_b64decode(wanted[1:] + "==").decode()
    except ValueError:
        return None


@functools.cache
def md5_of(path, size, changed):
    """The MD5 sum of a file, computed anew when its size or time has changed."""
    return hashlib.md5(path.read_bytes()).hexdigest()


def matches(pattern, path):
    """Whether a pattern names this path, or its last part."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, drive):
        self.drive = drive
        super().__init__(address, Connection)

    def handle_error(self, request, client_address):
        """Clients that hang up are nothing to report; faults in here are."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Connection(http.server.BaseHTTPRequestHandler):
    """One client connection: a CONNECT, then TLS, then any number of requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host = None  # the host of the tunnel, once there is one

    def setup(self):
        super().setup()
        self.drive = self.server.drive
        self.closing = self.drive.closing
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.drive.connections.add(self)
        if self.closing.is_set():
            self.hang_up()

    def finish(self):
        self.drive.connections.discard(self)
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
        if self.host or not host.endswith(".googleapis.com"):
            self.close_connection = True
            return self.send_json(self.new_record("connect", self.path), 403, {})
        self.send_response_only(200, "Connection established")
        self.end_headers()
        self.rfile.close()
        self.request = self.drive.tls.wrap_socket(self.request, server_side=True)
        self.host = host
        self.setup()

    def do_GET(self):
        url = urlsplit(self.path)
        record, params = self.new_record("other", url.path), dict(parse_qsl(url.query))
        self.closing.wait(self.drive.latency)
        found = re.fullmatch(r"/drive/v3/files(?:/([^/]+))?", url.path)
        try:
            if not self.host or not found:
                raise ApiError("404")
            if self.drive.login_expired:
                raise ApiError("401")
            if not found[1]:
                self.answer_list(params, record)
            elif params.get("alt") == "media":
                self.answer_media(found[1], record)
            else:
                record.kind = "get"
                record.name = self.drive.find(found[1])
                self.drive.fault_for("get", record.name)
                self.send_json(record, 200, self.drive.metadata(record.name))
        except ApiError as error:
            self.send_json(record, error.status, error.body)

    def do_POST(self):
        """The refresh of a token."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        record = self.new_record("token", self.path)
        if self.drive.login_expired:
            answer = {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
            return self.send_json(record, 400, answer)
        self.send_json(record, 200, {"access_token": "fake", "token_type": "Bearer", "expires_in": 1})

    def new_record(self, kind, name):
        self.drive.requests.append(Request(kind, name))
        return self.drive.requests[-1]

    def answer_list(self, params, record):
        record.kind = "list"
        asked = QUERY.fullmatch(params["q"])
        if not asked:
            raise ApiError("400")
        name = asked["name"] and re.sub(r"\\(.)", r"\1", asked["name"])
        paths = []
        for parent in re.findall("'([^']+)'", asked["parents"]):
            try:
                record.name = self.drive.find(parent)
            except ApiError:
                raise ApiError("404", ".") from None  # the real service does not say the id here
            self.drive.fault_for("list", record.name)
            for path in self.drive.children(record.name):
                if name in (None, self.drive.name(path)) and (self.drive.local(path).is_dir() or not asked["folders"]):
                    paths.append(path)
        start, size = int(params.get("pageToken", 0)), min(int(params.get("pageSize", 100)), PAGE_SIZE)
        answer = {"kind": "drive#fileList", "incompleteSearch": False}
        answer["files"] = list(map(self.drive.metadata, paths[start : start + size]))
        if start + size < len(paths):
            answer["nextPageToken"] = str(start + size)
        self.send_json(record, 200, answer)

    def answer_media(self, wanted, record):
        record.kind, record.name = "media", wanted
        record.name = self.drive.find(wanted)
        fault = self.drive.fault_for("media", record.name)
        with open(self.drive.local(record.name), "rb") as file:
            size = file.seek(0, 2)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            end = min(int(asked[2]) + 1, size) if asked and asked[2] else size
            if asked and start >= size:
                raise ApiError("416")
            length, strike = end - start, (end - start) // 2
            if fault and fault.after_bytes is not None:
                strike = min(fault.after_bytes, length)
            if fault and fault.kind == "truncated":
                length = strike
            record.status = 206 if asked else 200
            self.send_response(record.status)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(length))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{size}")
            self.end_headers()
            file.seek(start)
            if fault and fault.kind == "cut":
                self.send_body(file, strike, record)
                self.close_connection = True
            else:
                self.send_body(file, length, record, flip_at=strike if fault and fault.kind == "corrupt" else None)

    def send_body(self, file, length, record, flip_at=None):
        gate = self.drive.gate_for(record.name, length)
        while record.sent < length:
            size = min(BLOCK_SIZE, length - record.sent)
            if gate and record.sent == gate.after_bytes:
                gate.reached.set()
                self.wait_while_connected(gate.released)
                gate = None
            if gate and record.sent < gate.after_bytes:
                size = min(size, gate.after_bytes - record.sent)
            block = bytearray(file.read(size))
            if not block:  # the file has become shorter meanwhile
                self.close_connection = True
                return
            if flip_at is not None and record.sent <= flip_at < record.sent + len(block):
                block[flip_at - record.sent] ^= 0xFF
            if self.drive.bandwidth:
                self.drive.wait_for_bandwidth(len(block))
            record.sent += len(block)  # before the write: a client that has got everything must find it counted
            try:
                self.connection.sendall(block)
            except OSError:
                record.sent -= len(block)
                raise

    def wait_while_connected(self, event):
        """Wait for the event; ConnectionError when the client hangs up (it sends nothing else) or the server stops."""
        while not event.wait(0.01):
            if self.closing.is_set() or select.select([self.connection], [], [], 0)[0]:
                raise ConnectionError("hung up")

    def send_json(self, record, status, body):
        record.status = status
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def rclone_config(short_tokens):
    expiry = f"{2001 if short_tokens else 2099}-01-01T00:00:00Z"
    token = {"access_token": "fake", "token_type": "Bearer", "refresh_token": "fake", "expiry": expiry}
    return (
        f"[{FakeDrive.remote_name}]\ntype = drive\nscope = drive.readonly\nclient_id = fake-client-id\n"
        f"client_secret = fake-client-secret\ntoken = {json.dumps(token)}\n"
    )


def make_certificate(path):
    """Write a self-signed certificate for *.googleapis.com; returns the server's TLS context with it and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Fake Drive")])
    now, month = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=30)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - month)
        .not_valid_after(now + month)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("*.googleapis.com")]), critical=False)
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
