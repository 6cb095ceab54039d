"""The fake Drive answers the real rclone as the real Drive does, wherever other tests rely on it."""

import json
import os
import socket
import subprocess

import pytest
from conftest import RCLONE
from fake_drive import FakeDrive

MB = 1 << 20
NAMES = ["0012/a.smc", "0012/b.smc", "0012/c.smc"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "drive"
    (folder / "0012").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(os.urandom(2 * MB))
        os.utime(folder / name, (1.6e9, 1.6e9))
    return folder


@pytest.fixture
def drive(folder):
    with FakeDrive(folder) as drive:
        yield drive


def start(drive, *arguments):
    """rclone, with those flags of the script that matter when a request fails."""
    flags = ["--drive-stop-on-download-limit", "--retries", "10", "--low-level-retries", "20", "-v"]
    command = [RCLONE, *map(str, arguments), "--drive-root-folder-id", drive.root_id, *flags]
    environment = {**os.environ, **drive.environment()}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rclone(drive, *arguments):
    """What rclone says: exit code, stdout, stderr."""
    process = start(drive, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err.decode()


def list_files(drive):
    """What is in 0012. With ListR, a listing that meets an error now and then ends well, with files missing."""
    return rclone(drive, "lsjson", f"{drive.remote_name}:0012", "-R", "--disable", "ListR", "--hash", "--files-only")


def copy(drive, folder):
    return rclone(drive, "copy", f"{drive.remote_name}:", folder.parent / "here")


def copied(folder):
    """The names whose copy equals the file in the drive."""
    here = folder.parent / "here"
    return [n for n in NAMES if (here / n).exists() and (here / n).read_bytes() == (folder / n).read_bytes()]


def test_listing_has_size_time_and_md5_of_every_file_as_it_is_now(drive, folder):
    odd = "it's \\ odd/é'.txt"
    (folder / "0012" / odd).parent.mkdir()
    (folder / "0012" / odd).write_text("hello")
    code, out, _ = list_files(drive)
    files = {file["Path"]: file for file in json.loads(out)}
    assert code == 0 and set(files) == {"a.smc", "b.smc", "c.smc", odd}
    assert (files["a.smc"]["Size"], files["a.smc"]["ModTime"][:19]) == (2 * MB, "2020-09-13T12:26:40")
    assert files[odd]["Hashes"]["md5"] == "5d41402abc4b2a76b9719d911017c592"
    assert rclone(drive, "cat", f"{drive.remote_name}:0012/{odd}")[1] == b"hello"
    (folder / "0012/a.smc").write_bytes(b"")
    (folder / "0012/b.smc").unlink()
    files = {file["Path"]: file for file in json.loads(list_files(drive)[1])}
    assert set(files) == {"a.smc", "c.smc", odd} and files["a.smc"]["Size"] == 0
    assert files["a.smc"]["Hashes"]["md5"] == "d41d8cd98f00b204e9800998ecf8427e"


def test_each_file_is_fetched_once_and_then_no_more(drive, folder):
    assert copy(drive, folder)[0] == 0 and copied(folder) == NAMES
    assert copy(drive, folder)[0] == 0
    assert drive.count("media") == 3 and drive.bytes_sent() == 6 * MB and drive.bytes_sent("a.smc") == 2 * MB


def test_a_range_is_answered_with_its_bytes_alone(drive, folder):
    done = rclone(drive, "cat", f"{drive.remote_name}:0012/a.smc", "--offset", 1000, "--count", 500)
    assert done[1] == (folder / "0012/a.smc").read_bytes()[1000:1500]
    assert drive.count("media", "a.smc", status=206) == 1 and drive.bytes_sent() == 500


def test_a_used_up_quota_ends_rclone_after_one_request(drive, folder):
    drive.fault("c.smc", "downloadQuotaExceeded")
    code, _, err = copy(drive, folder)
    assert code == 7 and drive.count("media", "c.smc", 403) == 1
    assert "Error 403: The download quota for this file has been exceeded., downloadQuotaExceeded" in err


def test_what_passes_is_outlived(drive, folder):
    """A refusal, and an answer that is cut, which is resumed where it ended."""
    faults = [
        drive.fault("a.smc", "userRateLimitExceeded", times=1),
        drive.fault("b.smc", "503", times=1),
        drive.fault("c.smc", "cut", times=1, after_bytes=700_000),
    ]
    assert copy(drive, folder)[0] == 0 and copied(folder) == NAMES
    assert [fault.hits for fault in faults] == [1, 1, 1]
    assert [drive.count("media", "c.smc", status) for status in (200, 206)] == [1, 1]
    assert drive.bytes_sent() == 6 * MB


@pytest.mark.parametrize("kind, message", [("corrupt", "md5 hash"), ("truncated", "sizes differ")])
def test_wrong_bytes_are_noticed_and_the_file_is_fetched_again(drive, folder, kind, message):
    drive.fault("c.smc", kind, times=1)
    code, _, err = copy(drive, folder)
    assert code == 0 and f"corrupted on transfer: {message}" in err
    assert copied(folder) == NAMES and drive.count("media", "c.smc") == 2


def test_a_file_and_a_folder_that_are_not_shared_are_not_found(drive, folder):
    fault = drive.fault("c.smc", "404")
    code, _, err = copy(drive, folder)
    assert code == 1 and "Error 404: File not found" in err and copied(folder) == NAMES[:2]
    fault.clear()
    assert copy(drive, folder)[0] == 0
    drive.fault("0012", "404")
    assert "Error 404" in list_files(drive)[2]


def test_a_short_token_is_refreshed_until_the_login_expires(folder):
    with FakeDrive(folder, short_tokens=True) as drive:
        gate = drive.gate("b.smc", 1 << 20)
        copying = start(drive, "copy", f"{drive.remote_name}:", folder.parent / "here", "--transfers", 1)
        gate.wait()
        assert drive.count("token", status=200)
        drive.expire_login()
        gate.release()
        _, err = copying.communicate(timeout=120)
        assert copying.returncode != 0 and b"invalid_grant" in err and copied(folder) == NAMES[:2]
        requests = drive.count("list")
        code, _, err = list_files(drive)
        assert code == 1 and "invalid_grant" in err and drive.count("list") == requests


def test_a_login_that_is_taken_away_is_a_401(drive):
    drive.expire_login()
    code, _, err = list_files(drive)
    assert code == 1 and "Error 401: Invalid Credentials, authError" in err and drive.count(status=401)


@pytest.mark.parametrize("kind", ["insufficientFilePermissions", "cannotDownloadFile", "dailyLimitExceeded", "401"])
def test_what_is_refused_for_good_is_named_by_rclone(drive, folder, kind):
    drive.fault("c.smc", kind)
    code, _, err = copy(drive, folder)
    assert code != 0 and copied(folder) == NAMES[:2]
    assert {"401": "authError"}.get(kind, kind) in err and drive.count("media", "c.smc") == 10, drive.count(
        "media", "c.smc"
    )


def test_every_third_listing_fails_and_is_asked_again(drive):
    fault = drive.fault("*", "500", on="list", every=3)
    for _ in range(4):
        files = json.loads(list_files(drive)[1])
        assert sorted(file["Path"] for file in files) == ["a.smc", "b.smc", "c.smc"]
    assert fault.hits == drive.count("list", status=500) == drive.count("list") // 3 > 0


@pytest.mark.parametrize("first", [True, False])
def test_of_two_files_of_one_name_rclone_reads_the_first(drive, folder, first):
    other = folder.parent / "other"
    other.write_bytes(b"other")
    drive.duplicate("0012/b.smc", other, first=first)
    files = json.loads(list_files(drive)[1])
    sizes = [5, 2 * MB] if first else [2 * MB, 5]
    assert [(file["Path"], file["Size"]) for file in files if file["Path"] == "b.smc"] == [("b.smc", s) for s in sizes]
    assert len({file["ID"] for file in files}) == 4
    assert copy(drive, folder)[0] == 0
    assert (folder.parent / "here/0012/b.smc").stat().st_size == sizes[0]
    assert drive.count("media", "b.smc#1") == first and drive.count("media", "b.smc") == 1 - first


@pytest.mark.parametrize("first", [True, False])
def test_of_two_folders_of_one_name_rclone_lists_the_last_twice_and_opens_the_first(drive, folder, first):
    other = folder.parent / "other"
    other.mkdir()
    (other / "d.smc").write_bytes(b"other")
    drive.duplicate("0012", other, first=first)
    code, out, _ = rclone(drive, "lsjson", f"{drive.remote_name}:", "-R", "--disable", "ListR")
    paths = [file["Path"] for file in json.loads(out)]
    assert code == 0 and sorted(paths) == sorted(2 * ["0012", *(NAMES if first else ["0012/d.smc"])])
    found = [rclone(drive, "cat", f"{drive.remote_name}:0012/{name}")[0] == 0 for name in ("d.smc", "a.smc")]
    assert found == [first, not first]


def test_a_folder_of_more_than_a_thousand_files_comes_in_pages(drive, folder):
    for number in range(2500):
        (folder / f"0012/{number}").touch()
    assert len(json.loads(list_files(drive)[1])) == 2503 and drive.count("list", "0012") == 3


def test_a_gate_holds_an_answer_at_a_byte_until_it_is_released(drive, folder):
    gate = drive.gate("c.smc", 1_000_001)
    copying = start(drive, "copy", f"{drive.remote_name}:", folder.parent / "here")
    gate.wait()
    assert drive.bytes_sent("c.smc") == 1_000_001 and copying.poll() is None
    gate.release()
    copying.communicate(timeout=120)
    assert copying.returncode == 0 and copied(folder) == NAMES


def test_other_hosts_are_refused(drive):
    for target in ("example.com:443", "evilgoogleapis.com:443", "127.0.0.1:22"):
        with socket.create_connection(("127.0.0.1", int(drive.environment()["HTTPS_PROXY"].rpartition(":")[2]))) as c:
            c.sendall(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
            assert c.recv(1000).startswith(b"HTTP/1.1 403")
