"""The fake Drive, driven by the real rclone: the program that RCLONE names, or the one beside this Python, or on the path."""

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time

import pytest
from fake_drive import ACCESS_TOKEN, FakeDrive, Query, matches

RCLONE = (
    os.environ.get("RCLONE") or shutil.which("rclone", path=os.path.dirname(sys.executable)) or shutil.which("rclone")
)
MB = 1 << 20
NAMES = ["0012/a.smc", "0012/b.smc", "0012/c.smc", "0012/d.smc"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "drive"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(2 * MB))
        os.utime(folder / name, (1.6e9, 1.6e9))
    return folder


@pytest.fixture
def drive(folder):
    with FakeDrive(folder) as drive:
        yield drive


def command(drive, *arguments, root_id=None):
    return [
        RCLONE,
        *map(str, arguments),
        "--drive-root-folder-id",
        root_id or drive.root_id,
        "--drive-acknowledge-abuse",
        "--transfers",
        "4",
        "--checkers",
        "8",
        "--retries",
        "10",
        "--low-level-retries",
        "20",
        "--drive-stop-on-download-limit",
        "--use-json-log",
        "--stats",
        "500ms",
        "-v",
    ]


def rclone(drive, *arguments, root_id=None):
    return subprocess.run(
        command(drive, *arguments, root_id=root_id),
        env={**os.environ, **drive.environment()},
        check=False,
        capture_output=True,
        timeout=30,
    )


def list_files(drive, path, **options):
    # Without --disable ListR, a recursive listing that meets an error now and then (1 to 5 in 100) ends well, with files missing
    return rclone(
        drive,
        "lsjson",
        f"{drive.remote_name}:{path}",
        "-R",
        "--hash",
        "--hash-type",
        "md5",
        "--files-only",
        "--disable",
        "ListR",
        **options,
    )


def copy_command(drive, tmp_path, names, *arguments):
    names_file = tmp_path / "names.txt"
    names_file.write_text("".join(f"{name}\n" for name in names))
    return ["copy", f"{drive.remote_name}:", tmp_path / "here", "--files-from-raw", names_file, *arguments]


def copy(drive, tmp_path, names=NAMES, *arguments):
    return rclone(drive, *copy_command(drive, tmp_path, names, *arguments))


def whole(tmp_path, names=NAMES):
    """The names whose copy equals the file in the drive."""
    return [
        name
        for name in names
        if (tmp_path / "here" / name).exists()
        and (tmp_path / "here" / name).read_bytes() == (tmp_path / "drive" / name).read_bytes()
    ]


def messages(done):
    return [json.loads(line) for line in done.stderr.decode().splitlines() if line.startswith("{")]


# Listing


def test_listing_has_size_time_and_md5_of_every_file(drive, folder):
    (folder / '0012/sub it\'s \\ "odd"').mkdir()
    (folder / '0012/sub it\'s \\ "odd"/é.txt').write_text("x")
    (folder / "0012/empty").touch()
    done = list_files(drive, "0012")
    assert done.returncode == 0, done.stderr
    files = {file["Path"]: file for file in json.loads(done.stdout)}
    assert set(files) == {"a.smc", "b.smc", "c.smc", "d.smc", "empty", 'sub it\'s \\ "odd"/é.txt'}
    assert files["a.smc"]["Size"] == 2 * MB
    assert files["a.smc"]["ModTime"].startswith("2020-09-13T12:26:40")
    assert files["empty"]["Hashes"]["md5"] == "d41d8cd98f00b204e9800998ecf8427e"


def test_a_path_with_quotes_and_backslashes_is_found(drive, folder):
    path = folder / "it's \\ odd/é'.txt"
    path.parent.mkdir()
    path.write_text("hello")
    assert rclone(drive, "cat", f"{drive.remote_name}:it's \\ odd/é'.txt").stdout == b"hello"


def test_listing_is_paged(drive):
    drive.page_size = 3
    assert len(json.loads(list_files(drive, "0012").stdout)) == 4
    assert drive.count("list", "0012") == 2


def test_listing_follows_changes_of_the_folder(drive, folder):
    first = json.loads(list_files(drive, "0012").stdout)
    (folder / "0012/a.smc").write_bytes(b"new")
    (folder / "0012/b.smc").unlink()
    second = json.loads(list_files(drive, "0012").stdout)
    assert len(first) == 4
    assert [file["Path"] for file in second] == ["a.smc", "c.smc", "d.smc"]
    assert second[0]["Size"] == 3
    assert second[0]["Hashes"] != first[0]["Hashes"]


def test_an_unknown_root_folder_is_not_found(drive):
    done = list_files(drive, "0012", root_id="another-folder-id")
    assert done.returncode == 1
    assert b"googleapi: Error 404: File not found: ., notFound" in done.stderr


def test_a_missing_folder_is_not_found(drive):
    done = list_files(drive, "0099")
    assert done.returncode == 3
    assert b"directory not found" in done.stderr


def test_a_folder_that_is_not_shared_is_not_found(drive):
    drive.fault("0012", "404")
    assert b"Error 404" in list_files(drive, "0012").stderr


def test_a_refused_login_is_reported(drive):
    drive.fault("*", "401")
    done = list_files(drive, "0012")
    assert done.returncode == 1
    assert b"Error 401: Invalid Credentials, authError" in done.stderr


def test_an_expired_token_cannot_be_refreshed(folder):
    with FakeDrive(folder, expired_token=True) as drive:
        done = list_files(drive, "0012")
        assert done.returncode == 1
        assert b"invalid_grant" in done.stderr
        assert drive.count("token") > 0 and drive.count("list") == 0
        drive.wait_until_idle()


# Reading


def test_copy_fetches_each_file_once_and_then_no_more(drive, tmp_path):
    assert copy(drive, tmp_path).returncode == 0
    assert whole(tmp_path) == NAMES
    assert drive.bytes_sent() == 8 * MB
    assert drive.bytes_sent("a.smc") == 2 * MB
    assert drive.count("media") == 4
    assert copy(drive, tmp_path).returncode == 0
    assert drive.count("media") == 4


def test_cat_reads_a_range(drive, folder):
    done = rclone(drive, "cat", f"{drive.remote_name}:0012/a.smc", "--offset", 1000, "--count", 500)
    assert done.stdout == (folder / "0012/a.smc").read_bytes()[1000:1500]
    [request] = drive.select("media")
    assert (request.range_start, request.range_end, request.status, request.sent) == (1000, 1499, 206, 500)


def test_a_large_file_comes_fast(drive, folder):
    with open(folder / "large", "wb") as file:
        file.truncate(256 * MB)
    connection = http.client.HTTPSConnection("127.0.0.1", drive.port, context=trusting(drive))
    connection.set_tunnel("www.googleapis.com", 443)
    started = time.process_time()
    connection.request(
        "GET",
        f"/drive/v3/files/{drive.file_id('large')}?alt=media",
        headers={"Authorization": f"Bearer {ACCESS_TOKEN}"},
    )
    answer = connection.getresponse()
    buffer = bytearray(MB)
    while answer.readinto(buffer):
        pass
    assert drive.bytes_sent("large") == 256 * MB
    assert time.process_time() - started < 2  # of both ends; in real time 600 to 1400 MB/s when the machine is idle


def test_bandwidth_is_shared_by_all_answers(drive, tmp_path):
    drive.bandwidth = 8 * MB
    started = time.monotonic()
    copy(drive, tmp_path)
    assert 0.9 < time.monotonic() - started < 2.5


def test_a_gate_holds_an_answer_at_a_byte(drive, tmp_path):
    gate = drive.gate("c.smc", 1_000_001)
    process = subprocess.Popen(
        command(drive, *copy_command(drive, tmp_path, NAMES)),
        env={**os.environ, **drive.environment()},
        stderr=subprocess.DEVNULL,
    )
    gate.wait()
    assert drive.bytes_sent("c.smc") == 1_000_001
    assert process.poll() is None
    gate.release()
    assert process.wait(10) == 0
    assert whole(tmp_path) == NAMES


def test_an_answer_to_a_killed_client_ends(drive, tmp_path):
    gate = drive.gate("c.smc", MB)
    process = subprocess.Popen(
        command(drive, *copy_command(drive, tmp_path, NAMES)),
        env={**os.environ, **drive.environment()},
        stderr=subprocess.DEVNULL,
    )
    gate.wait()
    process.kill()
    process.wait()
    drive.wait_until_idle()
    assert drive.bytes_sent("c.smc") == MB


# Faults


def test_quota_of_one_file_stops_rclone(drive, tmp_path):
    drive.fault("c.smc", "downloadQuotaExceeded")
    done = copy(drive, tmp_path)
    assert done.returncode == 7
    [message] = [message for message in messages(done) if message.get("object") == "0012/c.smc"]
    assert "Error 403: The download quota for this file has been exceeded., downloadQuotaExceeded" in message["msg"]
    assert drive.count("media", "c.smc", 403) == 1


@pytest.mark.parametrize(
    "kind, status", [("userRateLimitExceeded", 403), ("rateLimitExceeded", 403), ("500", 500), ("503", 503)]
)
def test_passing_refusals_are_outlived(drive, tmp_path, kind, status):
    fault = drive.fault("c.smc", kind, times=1)
    assert copy(drive, tmp_path).returncode == 0
    assert whole(tmp_path) == NAMES
    assert fault.hits == 1
    assert drive.count("media", "c.smc", status) == 1


def test_a_cut_answer_is_resumed_where_it_ended(drive, tmp_path):
    drive.fault("c.smc", "cut", times=1, after_bytes=700_000)
    assert copy(drive, tmp_path).returncode == 0
    assert whole(tmp_path) == NAMES
    answers = [(request.range_start, request.sent) for request in drive.select("media", "c.smc")]
    assert answers == [(None, 700_000), (700_000, 2 * MB - 700_000)]


def test_a_corrupt_byte_is_noticed_and_the_file_fetched_again(drive, tmp_path):
    drive.fault("c.smc", "corrupt", times=1)
    done = copy(drive, tmp_path)
    assert done.returncode == 0
    assert b"corrupted on transfer: md5 hash" in done.stderr
    assert whole(tmp_path) == NAMES
    assert drive.count("media", "c.smc") == 2


def test_a_corrupt_byte_spoils_only_the_ranges_that_hold_it(drive, folder):
    drive.fault("a.smc", "corrupt", after_bytes=1000)
    data = (folder / "0012/a.smc").read_bytes()
    path = f"{drive.remote_name}:0012/a.smc"
    assert rclone(drive, "cat", path, "--offset", 0, "--count", 1000).stdout == data[:1000]
    assert rclone(drive, "cat", path, "--offset", 999, "--count", 3).stdout == bytes(
        [data[999], data[1000] ^ 0xFF, data[1001]]
    )


def test_a_truncated_answer_is_noticed(drive, tmp_path):
    drive.fault("c.smc", "truncated", times=1)
    done = copy(drive, tmp_path)
    assert done.returncode == 0
    assert b"corrupted on transfer: sizes differ" in done.stderr
    assert whole(tmp_path) == NAMES


def test_a_stalled_answer_is_given_up_after_the_timeout(drive, tmp_path):
    drive.fault("c.smc", "stall", times=1, after_bytes=MB)
    started = time.monotonic()
    assert copy(drive, tmp_path, NAMES, "--timeout", "1s").returncode == 0
    assert time.monotonic() - started > 1
    assert whole(tmp_path) == NAMES


def test_a_slow_answer_takes_its_time(drive, tmp_path):
    drive.fault("c.smc", "slow", bytes_per_second=4 * MB, delay=0.5)
    started = time.monotonic()
    assert copy(drive, tmp_path).returncode == 0
    assert 1.0 < time.monotonic() - started < 2.5


def test_a_file_that_is_not_shared_fails_alone(drive, tmp_path):
    drive.fault("c.smc", "404")
    done = copy(drive, tmp_path)
    assert done.returncode == 1
    assert b"Error 404: File not found" in done.stderr
    assert whole(tmp_path) == ["0012/a.smc", "0012/b.smc", "0012/d.smc"]


def test_an_abusive_file_is_sent_when_acknowledged(drive, tmp_path):
    drive.fault("c.smc", "cannotDownloadAbusiveFile")
    assert copy(drive, tmp_path).returncode == 0
    assert whole(tmp_path) == NAMES
    assert drive.count("media", "c.smc", 403) == 1


def test_faults_can_wait_and_end(drive, tmp_path):
    fault = drive.fault("*.smc", "404", on="media", skip=1)
    path = f"{drive.remote_name}:0012/a.smc"
    assert [rclone(drive, "cat", path).returncode == 0 for _ in range(2)] == [True, False]
    fault.clear()
    assert rclone(drive, "cat", path).returncode == 0


def test_an_outage_is_outlived(drive, tmp_path):
    drive.bandwidth_per_connection = 2 * MB
    process = subprocess.Popen(
        command(drive, *copy_command(drive, tmp_path, NAMES[:2])),
        env={**os.environ, **drive.environment()},
        stderr=subprocess.DEVNULL,
    )
    while drive.bytes_sent() < MB:
        time.sleep(0.01)
    drive.stop()
    time.sleep(0.2)
    drive.start()
    assert process.wait(20) == 0
    assert whole(tmp_path, NAMES[:2]) == NAMES[:2]


# The server itself


def trusting(drive):
    return ssl.create_default_context(cafile=drive.environment()["RCLONE_CA_CERT"])


@pytest.mark.parametrize("target", ["example.com:443", "evilgoogleapis.com:443", "127.0.0.1:22"])
def test_other_hosts_are_refused(drive, target):
    with socket.create_connection(("127.0.0.1", drive.port), timeout=5) as client:
        client.sendall(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 403")
    assert drive.count("connect", status=403) == 1


def test_it_stops_at_once_with_answers_under_way(folder, tmp_path, capfd):
    with FakeDrive(folder, bandwidth=100_000) as drive:
        process = subprocess.Popen(
            command(drive, *copy_command(drive, tmp_path, NAMES)),
            env={**os.environ, **drive.environment()},
            stderr=subprocess.DEVNULL,
        )
        while not drive.bytes_sent():
            time.sleep(0.01)
        scratch = drive.config_path.parent
        started = time.monotonic()
    assert time.monotonic() - started < 1
    process.kill()
    process.wait()
    assert not scratch.exists()
    assert capfd.readouterr().err == ""


def test_queries_are_read_as_the_service_reads_them():
    query = Query(
        r"trashed=false and ('A' in parents or 'B' in parents) and (name='it\'s' or name='x') and not mimeType='folder'"
    )
    entry = {"trashed": False, "parents": ["B"], "name": "it's", "mimeType": "file"}
    assert query.parents == ["A", "B"]
    assert query.accepts(entry)
    assert not query.accepts({**entry, "name": "y"})
    assert not query.accepts({**entry, "parents": ["C"]})
    assert not query.accepts({**entry, "mimeType": "folder"})


def test_an_unreadable_query_is_an_error():
    for text in ("trashed=false and", "name='x", "name>'x'", "trashed=perhaps", "('A' in parents"):
        with pytest.raises(ValueError):
            Query(text)


def test_names_match_as_a_path_or_as_a_bare_name():
    assert matches("0012/a.smc", "0012/a.smc") and matches("a.smc", "0012/a.smc") and matches("0012/*", "0012/a.smc")
    assert not matches("0013/*", "0012/a.smc")
