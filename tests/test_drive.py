"""The script against a Google Drive on loopback, through rclone's own drive backend: quotas, faults, wrong set-ups."""

import fcntl
import hashlib
import re
import shutil
import time

import pytest
import synthetic_release
from conftest import DriveWorkspace, wait_for
from fake_drive import FakeDrive

PERFORMANCES = ["s1_all", "s2_all", "s3_all"]


@pytest.fixture
def workspace(tmp_path, drive):
    return drive_workspace(tmp_path, drive)


def drive_workspace(folder, drive):
    """A workspace that asks for the three performances of 0018."""
    workspace = DriveWorkspace(folder / "work", drive)
    workspace.write_config(extraction={"performances": PERFORMANCES})
    return workspace


def test_a_subject_comes_off_drive_with_the_flags_of_the_contract(workspace, drive):
    workspace.run()
    assert workspace.has_everything() and drive.count(kind="media", status=200) == 3
    log = next((workspace.folder / "logs").iterdir()).read_text()
    for flags in (
        f"--drive-root-folder-id {drive.root_id}",
        "--drive-acknowledge-abuse",
        "--transfers 4 --checkers 8 --retries 10 --low-level-retries 20",
    ):
        assert flags in log
    source = workspace.info("0018", "s1_all")["source"][0]
    assert (
        re.fullmatch("[0-9a-f]{32}", source["md5"])
        and source["bytes"] == workspace.smc("0018", "s1_all").stat().st_size
    )


def test_a_used_up_quota_costs_one_request_leaves_the_others_alone_and_is_mended_by_a_rerun(workspace, drive):
    fault = drive.fault("0018/0018_s2_all_raw.smc", "downloadQuotaExceeded")
    run = workspace.run(expect=1)
    states = {performance: state for (_, performance), state in workspace.states.items()}
    assert states == {"s1_all": "completed", "s2_all": "quota_exceeded", "s3_all": "completed"}
    assert drive.count(kind="media", name="0018_s2_all_raw.smc") == 1
    assert "quota" in run.err
    fault.clear()
    requests = drive.count(kind="media")
    workspace.run()
    assert workspace.has_everything() and drive.count(kind="media") == requests + 1


def test_after_three_used_up_quotas_in_a_row_the_run_stops_and_says_when_to_rerun(workspace, drive):
    drive.fault("*.smc", "downloadQuotaExceeded")
    workspace.write_config(extraction={"subjects": ["0018", "0019", "0026"]})
    run = workspace.run(expect=3)
    assert list(workspace.states.values()).count("quota_exceeded") == 3
    assert {subject for subject, _ in workspace.states} == {"0018"}
    assert re.search(r"since \d{4}-\d\d-\d\dT\S+.*again after \d{4}-\d\d-\d\d", run.err)
    assert drive.count(kind="media") <= 8


def test_quota_failures_that_are_not_in_a_row_do_not_stop_the_run(workspace, drive):
    """Each subject has one of them and a file that comes, whichever is first."""
    drive.fault("*_s1_all_raw.smc", "downloadQuotaExceeded")
    extraction = {"subjects": ["0018", "0019", "0026"], "performances": ["s1_all", "s2_all"]}
    workspace.write_config(extraction=extraction)
    workspace.run(expect=1)
    assert sorted(workspace.states.values()) == ["completed"] * 3 + ["quota_exceeded"] * 3


def test_a_bad_network_ends_well_with_the_right_bytes(workspace, drive):
    drive.bandwidth = 2e6
    faults = [
        drive.fault("0018_s1_all_raw.smc", "userRateLimitExceeded", times=1),
        drive.fault("0018_s2_all_raw.smc", "500", times=1),
        drive.fault("0018_s3_all_raw.smc", "cut", times=3, after_bytes=5000),
        drive.fault("0019_s1_all_raw.smc", "corrupt", times=1),
        drive.fault("0019_s2_all_raw.smc", "truncated", times=1),
    ]
    workspace.write_config(extraction={"subjects": ["0018", "0019"]})
    workspace.run()
    assert [fault.hits for fault in faults] == [1, 1, 3, 1, 1] and workspace.has_everything()


def test_while_a_subject_is_extracted_the_next_one_comes_and_no_other(workspace, drive):
    workspace.write_config(extraction={"subjects": ["0018", "0019", "0026"], "performances": ["s1_all"]})
    with open(workspace.manifest, "a") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)  # no row can be written: 0018 does not get finished
        run = workspace.start()
        wait_for(lambda: drive.count(kind="media", status=200) == 2)
        time.sleep(0.5)
        assert drive.count(kind="media") == 2
        assert not (workspace.folder / "temp_smc/0026").exists() and workspace.states == {}
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 0 and workspace.has_everything(), output


def test_a_file_that_changes_between_the_listing_and_its_download_is_never_noted_as_the_listed_one(
    tmp_path, three_subjects
):
    """Days can lie between them. A rerun takes the new one."""
    release, subjects = tmp_path / "release", ["0018", "0019"]
    shutil.copytree(three_subjects, release)
    with FakeDrive(release) as drive:
        workspace = drive_workspace(tmp_path, drive)
        workspace.write_config(extraction={"subjects": subjects, "performances": ["s1_all"]})
        gate = drive.gate("0018_s1_all_raw.smc", 1000)
        run = workspace.start()
        gate.wait()
        options = {**synthetic_release.TINY, "frames": 7}
        (path,) = synthetic_release.write_subject(release, "0019", performances=["s1_all"], **options)
        gate.release()
        output = run.communicate(timeout=120)[0]
        assert run.returncode == 1 and "0019_s1_all_raw.smc has changed on the remote" in output, output
        assert workspace.states == {("0018", "s1_all"): "completed", ("0019", "s1_all"): "download_failed"}
        workspace.run()
    assert workspace.has_everything()
    size, md5 = path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()
    row, (source,) = workspace.row("0019", "s1_all"), workspace.info("0019", "s1_all")["source"]
    assert (row["smc_bytes"], row["smc_id"]) == (str(size), md5)
    assert (source["bytes"], source["md5"]) == (size, md5)


def test_bytes_that_stay_corrupt_fail_the_download_and_nothing_else(workspace, drive):
    drive.fault("0018/0018_s1_all_raw.smc", "corrupt")
    workspace.write_config(extraction={"performances": ["s1_all", "s2_all"]})
    run = workspace.run(expect=1)
    assert workspace.states == {("0018", "s1_all"): "download_failed", ("0018", "s2_all"): "completed"}
    assert "corrupted on transfer" in workspace.row("0018", "s1_all")["error"] and "0018 s1_all" in run.err
    assert workspace.leftovers() == []


def test_an_outage_in_the_middle_is_waited_out(workspace, drive):
    workspace.write_config(extraction={"performances": ["s3_all"]})
    gate = drive.gate("0018/0018_s3_all_raw.smc", after_bytes=10000)
    run = workspace.start()
    gate.wait()
    drive.stop()
    time.sleep(1)
    drive.start()
    gate.release()
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0 and workspace.has_everything(), output


def test_a_remote_that_is_gone_is_one_clear_message(workspace, drive):
    workspace.write_config(google_drive={"rclone_flags": ["--low-level-retries", "2", "--contimeout", "2s"]})
    drive.stop()
    run = workspace.run(expect=3)
    assert drive.remote_name in run.err and len(run.err.splitlines()) == 1
    assert sorted(p.name for p in workspace.folder.iterdir()) == ["config.yaml", "rclone.conf"]


def test_a_wrong_folder_id_is_one_clear_message(workspace, drive):
    workspace.write_config(google_drive={"root_folder_id": "1wrongwrongwrong"})
    run = workspace.run(expect=2)
    assert "root_folder_id" in run.err and "1wrongwrongwrong" in run.err and len(run.err.splitlines()) == 1
    assert drive.count() <= 6
    assert sorted(p.name for p in workspace.folder.iterdir()) == ["config.yaml", "rclone.conf"]


def test_an_expired_token_is_one_clear_message(tmp_path, three_subjects):
    with FakeDrive(three_subjects, short_tokens=True) as drive:
        drive.expire_login()
        run = drive_workspace(tmp_path, drive).run(expect=3)
    assert "reconnect" in run.err and len(run.err.splitlines()) == 1


def test_a_subject_that_may_not_be_listed_stops_the_start_with_its_name(workspace, drive):
    drive.fault("0018", "404", on="list")
    workspace.write_config(extraction={"subjects": ["0018", "0019"], "performances": ["s1_all"]})
    run = workspace.run(expect=3)
    assert "0018" in run.err and workspace.rows == [] and drive.count("media") == 0


def test_a_subject_that_is_not_on_drive_is_absent(workspace):
    workspace.write_config(extraction={"subjects": ["0077", "0018"], "performances": ["s1_all"]})
    run = workspace.run()
    assert workspace.states == {("0077", "s1_all"): "absent", ("0018", "s1_all"): "completed"} and "0077" in run.said


def test_copies_are_extracted_like_the_plain_ones_and_the_plain_one_wins(tmp_path, three_subjects):
    release = tmp_path / "release"
    options = {"performances": ["s1_all", "s2_all"], "frames": 2, "size": (64, 76)}
    for path in synthetic_release.write_subject(release, "0018", **options):
        path.rename(path.with_name(f"Copy of {path.name}"))
    shutil.copy(three_subjects / "0018/0018_s2_all_raw.smc", release / "0018")
    with FakeDrive(release) as drive:
        workspace = drive_workspace(tmp_path, drive)
        workspace.run("--performance", "s1_all", "s2_all")
    names = [workspace.info("0018", p)["source"][0]["name"] for p in ("s1_all", "s2_all")]
    assert names == ["Copy of 0018_s1_all_raw.smc", "0018_s2_all_raw.smc"] and workspace.leftovers() == []


def test_names_on_the_remote_never_become_options_or_paths(tmp_path, three_subjects):
    release = tmp_path / "release"
    (release / "0018").mkdir(parents=True)
    shutil.copy(three_subjects / "0018/0018_s1_all_raw.smc", release / "0018")
    for name in (
        "--config=x",
        "0018_s2_all_raw.smc\n0018_s3_all_raw.smc",
        "0018_..s4_all_raw.smc",
        "-v",
        "$(touch x)",
        "0019_s5_all_raw.smc",
    ):
        (release / "0018" / name).write_bytes(b"bait")
    (release / "-rf").mkdir()
    with FakeDrive(release) as drive:
        workspace = drive_workspace(tmp_path, drive)
        workspace.write_config(extraction={"subjects": "all"})
        workspace.run()
    assert [p for (_, p), state in workspace.states.items() if state == "completed"] == ["s1_all"]
    assert workspace.leftovers() == [] and {s for s, _ in workspace.states} == {"0018"}
