"""MANIFEST.csv: the record of what is done, whoever wrote it and whatever a crash did to it."""

import csv
import re

import pytest

OLD_HEADER = "subject,performance,status,cameras_extracted,frames,size_gb,timestamp,error"
HEADER = f"{OLD_HEADER},cameras,cameras_available,modalities,smc_bytes,download_s,extract_s,smc_id"
ALL = "images masks audio calibration keypoints2d keypoints3d"
DONE = f"0018,s1_all,completed,1,6,0.1,2026-01-01T00:00:00+00:00,,25,25,{ALL},100,1,1,0123"


@pytest.fixture
def one(workspace):
    """A workspace that asks for one performance."""
    workspace.write_config(extraction={"performances": ["s1_all"]})
    return workspace


def did_something(workspace):
    """Whether a run has extracted something, or written a row."""
    before, folders = len(workspace.rows), sorted(workspace.path().glob("*/*"))
    workspace.run()
    return len(workspace.rows) > before or sorted(workspace.path().glob("*/*")) != folders


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\n{DONE}\n",
        f"{HEADER}\r\n{DONE}\r\n",
        f"\ufeff{HEADER}\n{DONE}\n",
        f"{HEADER}\n{DONE.replace('0018', '18').replace(',1,6,', ',1.0,6.0,')}\n",
        f"{HEADER}\n{DONE.replace('0018', '18.0')}\n",
        f"{HEADER}\n\n0018,s1_all,failed,,,,,\n{DONE}\n",
        f"{HEADER},remarks\n{DONE},mine\n",
        f"{OLD_HEADER}\n18,s1_all,completed,1,6,0.1,2025-01-01,\n",
        f'{OLD_HEADER}\n18,s1_all,completed,1,6,0.1,2025-01-01,"two\nlines"\n',
    ],
    ids=[
        "plain",
        "CRLF",
        "byte order mark",
        "pandas 18",
        "pandas 18.0",
        "empty and short lines",
        "a column more",
        "older",
        "older with a line break",
    ],
)
def test_a_done_row_is_read_however_it_was_written(one, content):
    one.manifest.write_bytes(content.encode())
    assert not did_something(one)


@pytest.mark.parametrize(
    "content",
    [
        "",
        f"{HEADER}\n{DONE}",
        f"{HEADER}\n{DONE[:-8]}",
        f"{HEADER}\n0018,s1_all,completed,1\n",
        f"{HEADER}\n{DONE}\n0018,s1_all,failed,0,0,0,2026-01-02,broken,,,,1,1,1,0123\n",
        f"{HEADER}\n{DONE}\n{DONE[:40]}\0\0\0\0",
    ],
    ids=[
        "empty",
        "without line end",
        "torn",
        "a short row",
        "failed later",
        "zeros at the end",
    ],
)
def test_a_row_that_is_torn_or_holds_no_more_is_done_again(one, content):
    one.manifest.write_bytes(content.encode())
    done = content.count(f"{DONE}\n") and "failed" not in content
    assert did_something(one) is not bool(done)
    assert one.rows[-1]["status"] == "completed" and one.path("0018", "s1_all").exists() is not bool(done)
    assert done or None not in one.rows[-1].values()


def test_a_torn_row_takes_nothing_else_with_it(workspace):
    """Nothing of it stays behind the shorter one that is written in its place."""
    workspace.write_config(extraction={"performances": ["s1_all", "s2_all"]})
    workspace.manifest.write_text(f'{HEADER}\n{DONE}\n0018,s2_all,failed,,,,2026,"{"an error with, a quo" * 50}')
    workspace.run()
    assert "an error" not in workspace.manifest.read_text()
    assert [(row["performance"], row["status"]) for row in workspace.rows] == [
        ("s1_all", "completed"),
        ("s2_all", "completed"),
    ]


def test_new_rows_in_an_older_manifest_can_be_read_by_everybody(workspace):
    workspace.write_config(extraction={"performances": ["s1_all", "s2_all"]})
    workspace.manifest.write_text(f"{OLD_HEADER}\n18,s1_all,completed,1,6,0.1,2025,\n")
    workspace.run()
    with open(workspace.manifest, newline="") as file:
        lines = list(csv.reader(file))
    assert all(len(line) == 15 for line in lines) and lines[0] == HEADER.split(",")
    assert [(line[1], line[2], line[8]) for line in lines[1:]] == [
        ("s1_all", "completed", ""),
        ("s2_all", "completed", "25"),
    ]
    assert not did_something(workspace)


def test_rows_are_appended_and_never_rewritten(one):
    one.manifest.write_text(f"{HEADER}\n" + f"{DONE.replace('0018', '0077')}\n" * 3)
    before, inode = one.manifest.read_bytes(), one.manifest.stat().st_ino
    one.run()
    assert one.manifest.read_bytes().startswith(before) and one.manifest.stat().st_ino == inode


@pytest.mark.parametrize(
    "content",
    ["name,age\nx,3\n", "hello", "\n", f"{HEADER}\n{DONE}\n" + '0018,s2_all,"' + "x\n" * 100_000],
    ids=["other columns", "a word", "an empty line", "an unpaired quotation mark"],
)
def test_a_file_that_is_no_manifest_is_refused(one, content):
    one.manifest.write_text(content)
    assert "MANIFEST.csv" in one.run(expect=2).err
    assert one.manifest.read_text() == content and not one.path("0018").exists()


@pytest.mark.parametrize("arguments", [[], ["--status"]], ids=["run", "status"])
def test_the_work_over_finished_subjects_grows_no_faster_than_their_number(workspace, arguments):
    def calls(number):
        """How many calls it takes where so many subjects are done and nothing is to be done, or changed."""
        subjects = [f"{n:04d}" for n in (18, *range(1000, 999 + number))]
        workspace.write_config(extraction={"subjects": subjects})
        done = [DONE.replace("0018", s).replace("s1_all", f"s{n}_all") for s in subjects for n in range(1, 7)]
        workspace.manifest.write_text("\n".join([HEADER, *done, ""]))
        before = workspace.manifest.stat().st_mtime_ns
        count = workspace.count_calls(*arguments)
        assert workspace.manifest.stat().st_mtime_ns == before
        return count

    start_up, some, many = calls(1), calls(30), calls(150)
    assert many - start_up < 6 * (some - start_up)


def test_status_tells_the_share_in_bytes_the_rate_the_end_and_what_failed(workspace):
    """0018 has a large and a small performance, 0019 and 0026 the small one. The large one is missing twice."""
    subjects = ["0018", "0019", "0026", *(f"{number:04d}" for number in range(1000, 1012))]
    workspace.write_config(extraction={"subjects": subjects, "performances": ["s1_all", "s3_all"]})
    rows = ["0018,s3_all,completed,38,9,6,2026,,,,,7,600,60,"]
    rows += [f"{subject},s1_all,completed,1,9,1,2026,,,,,1,100,10," for subject in subjects[:3]]
    rows += [f"{subject},s1_all,failed,0,0,,2026,it is broken,,,,1,5,1," for subject in subjects[3:]]
    rows += [f"{subject},s3_all,absent,0,0,,2026,,,,,,,," for subject in subjects[3:]]
    workspace.manifest.write_text("\n".join([HEADER, *rows, ""]))
    out = workspace.run("--status").out
    assert "4 of 30 performances of 15 subjects are done, 12 failed, 12 absent" in out
    # Extracted are 9 GB in 900 s; what is left has 2 * 6 + 12 * 1 GB, at the same rate.
    assert "1 subject finished; 27 % is extracted, 9.00 GB of about 33.0 GB" in out
    assert re.search(r"about 40:00 left for one process at 10\.0 MB/s, until \w+ \d+ \w+ \d+:\d+\n", out)
    assert out.count("s1_all: failed: it is broken") == 10 and "1009" in out and "1010" not in out


def test_rows_of_other_people_stay_when_the_header_is_renewed(one):
    one.manifest.write_text(f"{OLD_HEADER}\nmoved 0017 away,,mine,,,,,\n19,s1_all,completed,1,6,0.1,2025,\n")
    one.run()
    lines = one.manifest.read_text().splitlines()
    assert lines[0] == HEADER and lines[1].startswith("moved 0017 away,,mine,") and lines[2].startswith("0019,s1_all,")
    assert one.states[("0018", "s1_all")] == "completed"


def test_the_projects_own_manifest_has_the_header():
    from conftest import SCRIPT

    assert (SCRIPT.parent / "MANIFEST.csv").read_text() == HEADER + "\n"
