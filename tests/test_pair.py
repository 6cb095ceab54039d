"""The release of 21 subjects: two SMC files per performance, pictures and audio in one, everything else in the other."""

import json
import shutil

import h5py
import pytest
import synthetic_release
from conftest import Workspace

EVERYTHING = [
    "images",
    "masks",
    "audio",
    "calibration",
    "keypoints2d",
    "keypoints3d",
    "flame",
    "uv_textures",
    "scan",
    "scan_masks",
]
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


def test_a_pair_becomes_one_tree_with_the_stored_bytes_of_both_files(workspace):
    workspace.run()
    assert (
        workspace.states == {("0018", "s1_all"): "completed", ("0018", "s3_all"): "completed"}
        and workspace.leftovers() == []
    )
    folder, info = workspace.path("0018", "s1_all"), workspace.info("0018", "s1_all")
    for part, group, modality, ending in (("raw", "color", "images", "jpg"), ("anno", "mask", "masks", "png")):
        with h5py.File(smc(workspace, part, "s1_all")) as file:
            stored = {
                f"{modality}/cam_{c}/frame_{int(f):06d}.{ending}": d[()].tobytes()
                for c in file["Camera"]
                if group in file["Camera"][c]
                for f, d in file["Camera"][c][group].items()
            }
        assert stored and {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob(f"{modality}/*/*")} == stored
    assert info["modalities"] == ["images", "masks", "audio", "calibration", "keypoints2d", "keypoints3d"]
    assert [source["name"] for source in info["source"]] == ["0018_s1_all_raw.smc", "0018_s1_all_anno.smc"]
    assert int(workspace.row("0018", "s1_all")["smc_bytes"]) == sum(
        smc(workspace, part, "s1_all").stat().st_size for part in ("raw", "anno")
    )
    assert info["oddities"] == [] and info["fps"] == 30


def test_performances_all_takes_every_performance_of_the_subject_with_all_it_has(workspace):
    workspace.write_config(extraction={"performances": "all"})
    workspace.run()
    assert {p: s for (_, p), s in workspace.states.items()} == dict.fromkeys(
        ["s1_all", "s3_all", "e0", "h1_3bk"], "completed"
    )
    assert workspace.info("0018", "e0")["modalities"] == [m for m in EVERYTHING if m != "audio"]
    assert "audio" not in workspace.info("0018", "h1_3bk")["modalities"]
    before = workspace.manifest.read_bytes()
    run = workspace.run()
    assert workspace.manifest.read_bytes() == before and "4 of 4" in run.out
    assert "4 performances are done" in workspace.run("--dry-run").out


def test_performances_all_works_in_the_single_layout_too(tmp_path):
    synthetic_release.write_subject(
        tmp_path / "release",
        "0018",
        performances=["s1_all", "e0", "h1_3bk", "h2"],
        frames=2,
        size=(64, 76),
        cameras=(0, 25),
    )
    workspace = Workspace(tmp_path / "work", tmp_path / "release")
    workspace.write_config(extraction={"performances": "all", "modalities": EVERYTHING})
    workspace.run()
    assert {p for (_, p), s in workspace.states.items() if s == "completed"} == {"s1_all", "e0", "h1_3bk", "h2"}
    assert (workspace.path("0018", "e0", "scan", "mesh.ply")).exists()


@pytest.mark.parametrize("part, other", [("anno", "raw"), ("raw", "anno")])
def test_one_file_alone_is_extracted_and_the_other_is_looked_for_again(tmp_path, pair_release, part, other):
    release = tmp_path / "release"
    shutil.copytree(pair_release, release)
    missing = release / part / "0018" / f"0018_s1_all_{part}.smc"
    kept = missing.rename(tmp_path / missing.name)
    workspace = pair_workspace(tmp_path / "work", release)
    workspace.write_config(extraction={"performances": ["s1_all"]})
    workspace.run()
    (row,) = workspace.rows
    assert row["status"] == "completed" and f"the file {part}" in row["error"]
    assert workspace.path("0018", "s1_all", "images").exists() is (part == "anno")
    assert workspace.path("0018", "s1_all", "masks").exists() is (part == "raw")
    workspace.run()
    assert len(workspace.rows) == 1 and " done" in workspace.run("--dry-run").out
    shutil.move(kept, missing)
    workspace.run()
    assert len(workspace.rows) == 2 and workspace.rows[1]["error"] == ""
    assert workspace.path("0018", "s1_all", "images").exists() and workspace.path("0018", "s1_all", "masks").exists()


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
    assert f"{size / 1e3:.3g} kB   to be downloaded" in workspace.run("--dry-run", "--performance", "s1_all").out


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
    extraction = {"performances": ["s1_all", "e0"], "cameras": [25], "modalities": EVERYTHING}
    trees = []
    for download in ("full", "selective"):
        workspace = pair_workspace(tmp_path / download, pair_release)
        workspace.write_config(google_drive={"download": download}, extraction=extraction)
        workspace.run()
        assert set(workspace.states.values()) == {"completed"} and workspace.leftovers() == []
        trees.append(workspace.tree())
    assert trees[0] == trees[1]
