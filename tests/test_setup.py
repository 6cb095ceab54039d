"""Wrong and doubtful set-ups: what is wrong is refused, and what is doubtful is said, before a byte is downloaded."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import synthetic_release
from conftest import RCLONE, DriveWorkspace, Workspace
from fake_drive import FakeDrive, file_id

SINGLE, PAIR = "RenderMe360_500", "RenderMe360_21"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A shared folder with both releases in it and one without subjects; not to be changed."""
    folder = tmp_path_factory.mktemp("shared")
    options = {"frames": 2, "size": (64, 76)}
    performances = ["s1_all", "s3_all"]
    synthetic_release.write_release(folder / SINGLE, ("0018", "0019"), performances=performances, **options)
    options["cameras"] = (0, 25)
    synthetic_release.write_subject(folder / PAIR, "0018", layout="pair", performances=["s1_all"], **options)
    (folder / "papers").mkdir()
    (folder / "papers/README.txt").write_text("nothing here")
    return folder


@pytest.fixture
def drive(shared):
    with FakeDrive(shared) as drive:
        yield drive


@pytest.fixture
def workspace(tmp_path, drive, shared):
    """A workspace on the release of 500, with its two performances."""
    workspace = DriveWorkspace(tmp_path / "work", drive, shared / SINGLE)
    root = {"root_folder_id": file_id(SINGLE)}
    workspace.write_config(google_drive=root, extraction={"performances": ["s1_all", "s3_all"]})
    return workspace


def check_refused(workspace, *arguments, **options):
    """The run is refused with exit 2, and nothing is changed. Gives the message."""
    before = sorted(workspace.folder.rglob("*"))
    run = workspace.run(*arguments, expect=2, **options)
    assert sorted(workspace.folder.rglob("*")) == before
    return run.err


# ---- a wrong set-up


def test_a_file_in_the_place_of_a_subject_is_none(tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / "release/00181").write_text("no folder")
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"subjects": "all"})
    assert "It has 00181" in check_refused(workspace)


WRONG = {
    "the folder above": ({"root_folder_id": file_id("")}, {}, [], ["root_folder_id", SINGLE]),
    "a subject's folder": ({"root_folder_id": file_id(f"{SINGLE}/0018")}, {}, [], ["root_folder_id"]),
    "a folder without subjects": ({"root_folder_id": file_id("papers")}, {"subjects": "all"}, [], ["root_folder_id"]),
    "pair for single": ({"layout": "pair"}, {}, [], ["layout", "single"]),
    "pair for single, all": ({"layout": "pair"}, {"subjects": "all"}, [], ["layout", "single"]),
    "single for pair": ({"root_folder_id": file_id(PAIR)}, {}, [], ["layout", "pair", "raw"]),
    "single for pair, all": ({"root_folder_id": file_id(PAIR)}, {"subjects": "all"}, [], ["layout", "pair"]),
    "0081": ({}, {"subjects": ["0081"]}, [], ["0081", "0018"]),
    "--subject 0081": ({}, {}, ["--subject", "0081"], ["0081", "0018"]),
    "s7_all": ({}, {"performances": ["s1_all", "s7_all"]}, [], ["s7_all", "did you mean"]),
    "S1_ALL": ({}, {"performances": ["S1_ALL"]}, [], ["S1_ALL", "s1_all"]),
    "--performance s3": ({}, {}, ["--performance", "s3"], ["s3", "s3_all"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_set_up_is_refused_with_the_cure(workspace, drive, name):
    """By a run and a dry run, in turn."""
    google_drive, extraction, arguments, words = WRONG[name]
    workspace.write_config(google_drive=google_drive, extraction=extraction)
    message = check_refused(workspace, *arguments, *["--dry-run"] * (list(WRONG).index(name) % 2))
    assert all(word in message for word in words), message
    assert drive.count("media") == 0


ARGUMENTS = {
    "18": (["--subject", "18"], ["--subject", "0018"]),
    "--subjects": (["--subjects", "0018"], ["--subject"]),
    "two at once": (["--status", "--dry-run"], ["--status", "--dry-run"]),
    "redo of all": (["--redo"], ["--redo", "--subject"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_option_is_refused_with_the_cure(workspace, drive, name):
    arguments, words = ARGUMENTS[name]
    message = check_refused(workspace, *arguments)
    assert all(word in message for word in words), message
    assert drive.count() == 0


def test_all_errors_of_a_config_are_shown_at_once_each_with_its_line(workspace):
    """The config of the script that people use today."""
    text = """\
google_drive:
  root_folder_id: "1abc"
  remote_name: "vllab13:"
extraction:
  subjects: ["0018", "18"]
  performances: [s1_all]
  modalities: [images, adio]
storage:
  temp_dir: temp_smc
  output_dir: subjects
  manifest_path: MANIFEST.csv
  max_temp_size_gb: 50 GB
processing:
  max_retries: 3
  workers: 0
"""
    (workspace.folder / "config.yaml").write_text(text)
    message = check_refused(workspace)
    assert all(f"line {line}" in message for line in (3, 5, 7, 11, 12, 14, 15)), message
    assert re.search(r"line 11.*manifest_path.*\bmanifest\b", message) and "max_retries" in message


def test_a_tab_in_a_config_is_named_with_its_line(workspace):
    (workspace.folder / "config.yaml").write_text("google_drive:\n  remote_name: fake\nextraction:\n\tsubjects: all\n")
    message = check_refused(workspace)
    assert "line 4" in message and "tab" in message


def test_without_a_config_the_message_says_where_it_has_to_be(workspace):
    (workspace.folder / "config.yaml").unlink()
    assert "--config" in check_refused(workspace)


def test_a_manifest_that_excel_has_saved_with_semicolons_is_refused_and_stays(workspace):
    content = "subject;performance;status\n0018;s1_all;completed\n"
    workspace.manifest.write_text(content)
    message = check_refused(workspace)
    assert "MANIFEST.csv" in message and ";" in message and workspace.manifest.read_text() == content


def test_a_manifest_with_its_first_three_columns_alone_is_read(workspace):
    workspace.manifest.write_text("subject,performance,status\n0018,s1_all,completed\n")
    workspace.run()
    assert workspace.states == {("0018", "s1_all"): "completed", ("0018", "s3_all"): "completed"}
    assert not workspace.path("0018", "s1_all").exists()


def test_the_version_is_one_line(workspace):
    assert re.fullmatch(r".*\d.*\n", workspace.run("--version").out)


def test_help_fits_80_columns(workspace):
    lines = workspace.run("--help", environment={"COLUMNS": "80"}).out.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)


# ---- doubtful ones


def said_before_the_first_byte(workspace, expect=0, **options):
    """What a run has said when the first media request is answered. The rest of the run follows."""
    drive, path = workspace.drive, workspace.folder / "said.txt"
    gate = drive.gate("*", 100)
    with open(path, "w") as file:
        run = workspace.start(stdout=file, **options)
    gate.wait()
    said = path.read_text()
    gate.release()
    assert run.wait(timeout=120) == expect, path.read_text()
    assert "Traceback" not in path.read_text()
    return said


def line_with(said, *words):
    return next((line for line in said.splitlines() if all(re.search(word, line) for word in words)), None)


def test_cameras_without_pictures_are_named_before_the_first_byte(workspace):
    workspace.write_config(extraction={"cameras": list(range(0, 60, 6))})
    said = said_before_the_first_byte(workspace)
    assert line_with(said, "s3_all", r"\b54\b") and line_with(said, r"\b25\b"), said


def test_a_performance_without_one_of_the_cameras_is_named_before_the_first_byte(workspace):
    workspace.write_config(extraction={"cameras": [0, 1]})
    said = said_before_the_first_byte(workspace)
    assert line_with(said, "s1_all", r"\b25\b"), said


def test_cameras_that_all_have_pictures_give_no_warning(workspace):
    workspace.write_config(extraction={"cameras": {"s3_all": [0, 25], "default": [25]}})
    assert not line_with(said_before_the_first_byte(workspace), "pictures")


def test_a_subject_that_is_missing_among_many_is_named_before_the_first_byte_and_in_the_summary(workspace):
    workspace.write_config(extraction={"subjects": ["0018", "0077", "0019"]})
    said = said_before_the_first_byte(workspace)
    assert line_with(said, "0077"), said
    summary = (workspace.folder / "said.txt").read_text().partition("Summary")[2]
    assert "0077" in summary


def test_smc_files_whose_names_are_not_understood_are_named_before_the_first_byte(workspace, tmp_path):
    release = tmp_path / "release"
    shutil.copytree(workspace.release, release)
    (release / "0018/0018_s2_all_raw_v2_final.smc").write_bytes(b"?")
    with FakeDrive(release) as drive:
        workspace = DriveWorkspace(tmp_path / "other", drive, release)
        said = said_before_the_first_byte(workspace)
        assert "0018_s2_all_raw_v2_final.smc" in said


def test_two_files_of_one_name_are_named_before_the_first_byte_and_the_first_is_taken(
    workspace, drive, shared, tmp_path
):
    other = synthetic_release.write_subject(tmp_path / "x", "0018", performances=["s1_all"], frames=5, size=(64, 76))[0]
    drive.duplicate(f"{SINGLE}/0018/0018_s1_all_raw.smc", other, first=True)
    said = said_before_the_first_byte(workspace)
    assert line_with(said, "0018_s1_all_raw.smc"), said
    assert workspace.info("0018", "s1_all")["frames"] == {"25": 5} and workspace.leftovers() == []
    assert workspace.row("0018", "s1_all")["smc_bytes"] == str(other.stat().st_size)
    assert drive.count("media", "0018_s1_all_raw.smc") == 0


@pytest.mark.parametrize("first", [True, False])
def test_two_folders_of_one_name_are_named_and_nothing_in_them_is_called_absent(workspace, drive, tmp_path, first):
    """rclone lists the files of one of them twice, and opens those of the other."""
    other = tmp_path / "empty"
    other.mkdir()
    (other / "notes.txt").write_text("empty")
    drive.duplicate(f"{SINGLE}/0018", other, first=first)
    workspace.write_config(extraction={"subjects": ["0018", "0019"]})
    run = workspace.run(expect=(0, 1, 2))
    assert line_with(run.said, "0018", "(?i)two|twice|folders|same name"), run.said
    assert "absent" not in [state for (subject, _), state in workspace.states.items() if subject == "0018"]
    assert drive.count("media", "0018*") == 0


# ---- rclone's options


REFUSED = [
    "-P",
    "-v",
    "-vv",
    "-q",
    "-i",
    "-n",
    "--progress",
    "--verbose",
    "--quiet",
    "--log-file=x",
    "--log-level",
    "--use-json-log",
    "--stats=1s",
]
REFUSED += [
    "--stats-one-line",
    "--dry-run",
    "--interactive",
    "--exclude=*.smc",
    "--include",
    "--filter",
    "--filter-from",
    "--files-from",
]
REFUSED += ["--exclude-from", "--max-depth=1", "--min-size=1k", "--max-size", "--max-age", "--min-age"]


def test_options_of_rclone_that_change_its_output_or_choice_are_refused_by_name(workspace, drive, sample):
    for flag in sample(REFUSED, 2):
        workspace.write_config(google_drive={"rclone_flags": ["--bwlimit", "20M", flag]})
        message = check_refused(workspace)
        assert flag.partition("=")[0] in message and "rclone_flags" in message
    assert drive.count() == 0


def test_every_option_that_is_refused_is_refused(tmp_path):
    from extract_streaming_gdrive import ConfigError, load_config

    workspace = Workspace(tmp_path / "work", tmp_path)
    for flag in REFUSED:
        workspace.write_config(google_drive={"rclone_flags": [flag]})
        with pytest.raises(ConfigError, match="rclone_flags"):
            load_config(str(workspace.folder / "config.yaml"))
    workspace.write_config(google_drive={"rclone_flags": ["--bwlimit", "20M", "--transfers=2", "--tpslimit", "5"]})
    load_config(str(workspace.folder / "config.yaml"))


def test_variables_of_rclone_that_change_its_output_or_choice_do_not_reach_it(workspace, tmp_path):
    environment = {
        "RCLONE_PROGRESS": "true",
        "RCLONE_VERBOSE": "2",
        "RCLONE_QUIET": "true",
        "RCLONE_LOG_FILE": str(tmp_path / "rclone.log"),
        "RCLONE_LOG_LEVEL": "ERROR",
        "RCLONE_STATS": "0",
        "RCLONE_DRY_RUN": "true",
        "RCLONE_INTERACTIVE": "true",
        "RCLONE_EXCLUDE": "*.smc",
        "RCLONE_FILTER": "- *",
        "RCLONE_MAX_DEPTH": "1",
        "RCLONE_MIN_SIZE": "1G",
    }
    workspace.run(environment=environment)
    assert workspace.has_everything() and not (tmp_path / "rclone.log").exists()


# ---- paths and programs


def test_variables_and_the_home_folder_in_paths_are_expanded(workspace, tmp_path):
    workspace.write_config(storage={"temp_dir": "$SCRATCH/temp", "output_dir": "~/out", "log_dir": "${SCRATCH}/logs"})
    workspace.run(environment={"SCRATCH": str(tmp_path / "scratch"), "HOME": str(tmp_path / "home")})
    assert (tmp_path / "home/out/0018/s1_all/images").is_dir() and (tmp_path / "scratch/logs").is_dir()
    assert (tmp_path / "scratch/temp").is_dir() and not list(workspace.folder.glob("*$*"))


def run_with_rclone(workspace, folder, rclone, path=None):
    """A dry run by a Python in a folder of its own, with that rclone beside it, and perhaps another PATH."""
    folder.mkdir()
    (folder / "python").symlink_to(os.path.realpath(sys.executable))
    if rclone:
        write_program(folder / "rclone", rclone)
    packages = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PATH": path or os.environ["PATH"]}
    command = [folder / "python", *workspace.command("--dry-run")[1:]]
    return subprocess.run(command, capture_output=True, check=False, **workspace.surroundings(packages))


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_an_rclone_that_is_too_old_is_refused(workspace, drive, tmp_path):
    run = run_with_rclone(workspace, tmp_path / "bin", 'echo "rclone v1.60.1"')
    assert run.returncode == 2 and "1.60.1" in run.stderr and "1.65" in run.stderr, run.stderr
    assert "pip install" in run.stderr and drive.count() == 0
    assert sorted(path.name for path in workspace.folder.iterdir()) == ["config.yaml", "rclone.conf"]


def test_the_rclone_beside_python_is_taken_and_else_the_one_on_path(workspace, tmp_path):
    """The ones here note their calls, and hand them to the real one."""
    calls = tmp_path / "calls"
    noting = f'echo "$0 $1" >> "{calls}"\nexec "{RCLONE}" "$@"'
    (tmp_path / "path").mkdir()
    write_program(tmp_path / "path/rclone", noting)
    path = f"{tmp_path / 'path'}:{os.environ['PATH']}"
    for rclone, used in ((noting, tmp_path / "beside/rclone"), (None, tmp_path / "path/rclone")):
        run = run_with_rclone(workspace, tmp_path / ("beside" if rclone else "alone"), rclone, path)
        assert run.returncode == 0 and f"{used} lsjson" in calls.read_text(), run.stderr
        calls.unlink()


# ---- many subjects, and a remote that stumbles


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """100 subjects with files that are none; every fifth lacks two speech parts. Enough for a plan."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(100):
        subject = f"{number:04d}"
        (folder / subject).mkdir()
        for part in range(1, 5 if number % 5 == 0 else 7):
            (folder / subject / f"{subject}_s{part}_all_raw.smc").write_text(subject)
    return folder


@pytest.fixture
def many_subjects(tmp_path, many):
    with FakeDrive(many) as drive:
        workspace = DriveWorkspace(tmp_path / "work", drive, many)
        workspace.write_config(extraction={"subjects": "all"})
        yield workspace


def test_a_dry_run_over_many_subjects_takes_a_request_for_each(many_subjects):
    run = many_subjects.run("--dry-run")
    assert many_subjects.drive.count() <= 120 and many_subjects.drive.count("media") == 0
    assert "560" in run.out and "40" in run.out  # to be downloaded, and absent


def test_a_dry_run_over_one_subject_of_many_takes_six_requests(many_subjects):
    many_subjects.write_config(extraction={"subjects": ["0023"]})
    run = many_subjects.run("--dry-run")
    assert many_subjects.drive.count() <= 6 and "0023" in run.out


def test_a_rerun_over_100_finished_subjects_looks_once_and_downloads_nothing(many_subjects):
    """Every fifth lacks two performances, which are looked for again."""
    subjects = [f"{number:04d}" for number in range(100)]
    many_subjects.write_config(extraction={"subjects": subjects})
    header = "subject,performance,status,cameras_extracted,frames,size_gb,timestamp,error"
    present = [path.stem.split("_", 1) for path in sorted(many_subjects.release.glob("00*/*.smc"))]
    rows = [f"{subject},{rest[:6]},completed,1,2,0.1,2026-01-01T00:00:00+00:00," for subject, rest in present]
    many_subjects.manifest.write_text("\n".join([header, *rows, ""]))
    many_subjects.run()
    assert many_subjects.drive.count() <= 120 and many_subjects.drive.count("media") == 0
    states = list(many_subjects.states.values())
    assert (states.count("completed"), states.count("absent")) == (560, 40)


def test_a_dry_run_is_right_or_ends_with_3_while_every_third_listing_fails(tmp_path, many, request):
    """60 of them with --sweep."""

    def plan(run):
        return [line for line in run.out.splitlines() if re.match(r"\s*\d{4}\b", line)]

    with FakeDrive(many) as drive:
        workspace = DriveWorkspace(tmp_path / "work", drive, many)
        workspace.write_config(extraction={"subjects": [f"{number:04d}" for number in range(0, 100, 5)]})
        right = plan(workspace.run("--dry-run"))
        assert len(right) >= 20
        fault = drive.fault("*", "500", on="list", every=3)
        for _ in range(60 if request.config.getoption("--sweep") else 2):
            run = workspace.run("--dry-run", expect=(0, 3))
            assert plan(run) == (right if run.returncode == 0 else []), run.said
        assert fault.hits


def test_a_folder_that_cannot_be_listed_stops_the_start_with_its_name(workspace, drive):
    drive.fault(f"{SINGLE}/0019", "500", on="list")
    impatient = {"rclone_flags": ["--low-level-retries", "2"]}
    workspace.write_config(extraction={"subjects": ["0018", "0019"]}, google_drive=impatient)
    run = workspace.run(expect=3)
    assert "0019" in run.err and drive.count("media") == 0 and workspace.rows == []


def test_what_passes_at_the_first_look_is_outlived(workspace, drive):
    faults = [drive.fault("*", kind, times=1, on="list") for kind in ("userRateLimitExceeded", "500", "503")]
    workspace.run()
    assert workspace.has_everything() and [fault.hits for fault in faults] == [1, 1, 1]
