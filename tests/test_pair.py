"""The release of 21 subjects: two SMC files per performance, pictures and audio in one, all else in the other."""

import json
import re
import shutil

import h5py
import pytest
import synthetic_release
from conftest import Workspace, stored_pictures, written_pictures

EVERYTHING = synthetic_release.MODALITIES
VIEWS = (0, 24, 25)


@pytest.fixture(scope="module")
def pair_release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    synthetic_release.write_subject(
        folder,
        "0018",
        layout="pair",
        performances=["s1_all", "s3_all", "e0", "h1_3bk"],
        frames=4,
        size=(64, 76),
        cameras=VIEWS,
    )
    return folder


@pytest.fixture
def workspace(tmp_path, pair_release):
    return pair_workspace(tmp_path / "work", pair_release)


def pair_workspace(folder, release):
    workspace = Workspace(folder, release)
    workspace.write_config(
        google_drive={"layout": "pair"}, extraction={"performances": ["s1_all", "s3_all"], "modalities": EVERYTHING}
    )
    return workspace


def smc(workspace, part, performance):
    return workspace.release / part / "0018" / f"0018_{performance}_{part}.smc"


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, pair_release):
    """A workspace in which all performances are extracted; not to be changed."""
    workspace = pair_workspace(tmp_path_factory.mktemp("extracted") / "work", pair_release)
    workspace.write_config(extraction={"performances": "all"})
    workspace.run()
    return workspace


def test_a_pair_becomes_one_tree_with_the_stored_bytes_of_both_files(extracted):
    folder, info = extracted.path("0018", "s1_all"), extracted.info("0018", "s1_all")
    both = [smc(extracted, part, "s1_all") for part in ("raw", "anno")]
    assert written_pictures(folder) == stored_pictures(*both)
    assert all(stored_pictures(path) for path in both) and extracted.leftovers() == []
    assert info["modalities"] == ["images", "masks", "audio", "calibration", "keypoints2d", "keypoints3d"]
    assert [source["name"] for source in info["source"]] == [path.name for path in both]
    assert int(extracted.row("0018", "s1_all")["smc_bytes"]) == sum(path.stat().st_size for path in both)
    assert info["oddities"] == [] and info["fps"] == 30


def test_performances_all_takes_every_performance_of_the_subject_with_all_it_has(extracted):
    assert {p: s for (_, p), s in extracted.states.items()} == dict.fromkeys(
        ["s1_all", "s3_all", "e0", "h1_3bk"], "completed"
    )
    assert extracted.info("0018", "e0")["modalities"] == [m for m in EVERYTHING if m != "audio"]
    assert "audio" not in extracted.info("0018", "h1_3bk")["modalities"]
    before = extracted.manifest.read_bytes()
    run = extracted.run()
    assert extracted.manifest.read_bytes() == before and "4 of 4" in run.out
    assert "4 done" in extracted.run("--dry-run").out


def test_performances_all_works_in_the_single_layout_too(tmp_path):
    options = {"frames": 2, "size": (64, 76), "cameras": (0, 25)}
    synthetic_release.write_subject(tmp_path / "release", "0018", performances=["e0", "h1_3bk"], **options)
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"performances": "all", "modalities": EVERYTHING})
    workspace.run()
    assert workspace.states == {("0018", "e0"): "completed", ("0018", "h1_3bk"): "completed"}
    assert (workspace.path("0018", "e0", "scan", "mesh.ply")).exists()


def test_one_file_alone_is_extracted_and_the_other_is_looked_for_again(tmp_path, pair_release):
    """s1_all lacks its anno file, s3_all its raw file."""
    release, missing = tmp_path / "release", {"s1_all": "anno", "s3_all": "raw"}
    shutil.copytree(pair_release, release)
    workspace = pair_workspace(tmp_path / "work", release)
    paths = [smc(workspace, part, performance) for performance, part in missing.items()]
    kept = [path.rename(tmp_path / path.name) for path in paths]

    def written(kind):
        return [workspace.path("0018", performance, kind).exists() for performance in missing]

    workspace.run()
    assert len(workspace.rows) == 2 and set(workspace.states.values()) == {"completed"}
    assert all(f"the file {part}" in workspace.row("0018", p)["error"] for p, part in missing.items())
    assert written("images") == [True, False] and written("masks") == [False, True]
    workspace.run()
    assert len(workspace.rows) == 2 and " done" in workspace.run("--dry-run").out
    for path, place in zip(kept, paths):
        path.rename(place)
    workspace.run()
    assert len(workspace.rows) == 4 and [row["error"] for row in workspace.rows[2:]] == ["", ""]
    assert written("images") == written("masks") == [True, True]


def test_both_files_count_for_the_limit_of_temp(workspace):
    sizes = [
        smc(workspace, part, performance).stat().st_size
        for performance in ("s1_all", "s3_all")
        for part in ("raw", "anno")
    ]
    workspace.write_config(storage={"max_temp_size_gb": (max(sizes) + 1000) / 1e9})
    run = workspace.run(expect=1)
    assert set(workspace.states.values()) == {"download_failed"} and "max_temp_size_gb to at least" in run.err
    workspace.write_config(storage={"max_temp_size_gb": sum(sizes) * 0.6 / 1e9})
    workspace.run()
    log = max((workspace.folder / "logs").iterdir()).read_text()
    assert set(workspace.states.values()) == {"completed"} and log.count("rclone copy") == 2


def test_dry_run_counts_both_files(workspace):
    size = sum(smc(workspace, part, "s1_all").stat().st_size for part in ("raw", "anno"))
    run = workspace.run("--dry-run", "--performance", "s1_all")
    assert float(re.search("([0-9.]+) ?kB +to be downloaded", run.out)[1]) == pytest.approx(size / 1e3, rel=0.01)


def test_files_of_a_pair_that_disagree_are_said_to(tmp_path, pair_release):
    release = tmp_path / "release"
    shutil.copytree(pair_release, release)
    with h5py.File(release / "anno/0018/0018_s1_all_anno.smc", "r+") as file:
        file.attrs["actor_id"] = "0099"
        file["Camera"].attrs["num_frame"] = 77
    workspace = pair_workspace(tmp_path / "work", release)
    run = workspace.run("--performance", "s1_all")
    said = json.dumps(workspace.info("0018", "s1_all")["oddities"])
    assert (
        "0099" in said and "77" in said and "0099" in run.err and workspace.states == {("0018", "s1_all"): "completed"}
    )


def test_subjects_all_knows_those_of_either_folder(tmp_path, pair_release):
    release = tmp_path / "release"
    shutil.copytree(pair_release, release)
    shutil.copytree(release / "anno/0018", release / "anno/0019")
    for path in (release / "anno/0019").iterdir():
        path.rename(path.with_name(path.name.replace("0018", "0019")))
    workspace = pair_workspace(tmp_path / "work", release)
    workspace.write_config(extraction={"subjects": "all", "performances": ["h1_3bk"]})
    workspace.run()
    assert set(workspace.states) == {("0018", "h1_3bk"), ("0019", "h1_3bk")} and set(workspace.states.values()) == {
        "completed"
    }


def test_a_selective_download_of_a_pair_gives_the_same_tree(tmp_path, pair_release):
    extraction = {"performances": ["s1_all"], "cameras": [25], "modalities": EVERYTHING}
    trees = []
    for download in ("full", "selective"):
        workspace = pair_workspace(tmp_path / download, pair_release)
        workspace.write_config(google_drive={"download": download}, extraction=extraction)
        workspace.run()
        assert set(workspace.states.values()) == {"completed"} and workspace.leftovers() == []
        trees.append(workspace.tree())
    assert trees[0] == trees[1]
