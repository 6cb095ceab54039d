"""How fast is the extraction? Beside `tar x` of the same pictures, the same disk in the same run.

    python tests/benchmark.py [--frames N] [--views N] [--runs N]     the table
    python tests/benchmark.py --growth       time per frame at 500, 5000, 20 000 frames, and with other cameras
    python tests/benchmark.py --overlap      four subjects, whose downloads take four times as long as their extractions

Each takes --dir FOLDER, for another disk than that of the temporary files. Each line is the median of runs in turn,
each in a process of its own, with the input in the page cache and the disk idle. Seconds end when the data is on disk
(one sync each, `cp` too); CPU seconds are user and system time together.

The floor: the kernel creates a file per picture and copies the bytes into the page cache, and the disk takes them.
`tar x` does just that, in C, so its time is the reference: 250 µs of CPU a picture, most of it for blocks of 10 kB.
Whole pictures take the kernel 140 µs (copy_file_range, sendfile: 130). To these we add, in Python and HDF5, 60 µs:
finding where the picture lies (23 µs, for three questions to HDF5), checking its header and end, and the calls; and
0.3 s per performance, 0.2 of it for the start of a process, the rest for the calibration of 60 cameras and the like.
One thread reads a picture and writes it at once, from the processor's cache: with a second thread that writes it took
40 % more CPU time.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import extract_streaming_gdrive as tool

SMC = "release/0018/0018_s3_all_raw.smc"
SAMPLE = 60  # pictures that are decoded and encoded again; the figures are scaled to all


def ours(folder, verify="fast", cameras=None):
    (folder / "config.yaml").write_text(
        "google_drive: {remote_name: none}\nextraction: {subjects: ['0018'], performances: [s3_all]}\n"
        f"storage: {{temp_dir: release, output_dir: subjects, min_free_gb: 0}}\nprocessing: {{verify: {verify}}}\n"
    )
    files = (tool.RemoteFile("0018/0018_s3_all_raw.smc", (folder / SMC).stat().st_size, "", None),)
    config, modalities = tool.load_config(str(folder / "config.yaml")), tuple(tool.DEFAULT_MODALITIES)
    job = tool.Job(config, "0018", "s3_all", files, cameras, modalities)
    row, _ = tool.extract_job(job, tool.Download())
    assert row["status"] == "completed", row


def tar(folder):
    (folder / "tar").mkdir()
    subprocess.run(["tar", "xf", folder / "pictures.tar", "-C", folder / "tar"], check=True)
    tool.sync_disk(folder)


def cp(folder):
    subprocess.run(["cp", folder / SMC, folder / "copy.smc"], check=True)
    tool.sync_disk(folder)


def reencode(folder):
    """What the usual scripts do, with the first frames."""
    import cv2  # here, because a process that extracts would import it too, and count it as its memory
    import h5py

    (folder / "reencoded").mkdir()
    with h5py.File(folder / SMC) as smc:
        names = [(c, f) for c, camera in smc["Camera"].items() if "color" in camera for f in camera["color"]]
        for camera, frame in names[:: max(1, len(names) // SAMPLE)][:SAMPLE]:
            pixels = cv2.imdecode(smc[f"Camera/{camera}/color/{frame}"][()], cv2.IMREAD_COLOR)
            cv2.imwrite(str(folder / f"reencoded/{camera}_{frame}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])


WAYS = {
    "ours, verify fast": (ours, "subjects"),
    "ours, verify full": (lambda folder: ours(folder, "full"), "subjects"),
    "tar x": (tar, "tar"),
    "cp of the SMC": (cp, "copy.smc"),
    "decode, re-encode": (reencode, "reencoded"),
}


def measure(way, folder):
    """Run one way in this process; prints seconds, CPU seconds, peak memory in MB, and bytes written, as JSON."""
    function, output = WAYS[way]

    def cpu():
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    begin, cpu_before = time.monotonic(), cpu()
    function(folder)
    seconds, cpu_seconds = time.monotonic() - begin, cpu() - cpu_before
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    paths = [folder / output, *(folder / output).rglob("*")]
    print(json.dumps([seconds, cpu_seconds, memory, sum(p.stat().st_size for p in paths if p.is_file())]))


def run(way, folder):
    os.sync()
    # The host of a virtual machine takes back memory that is free for seconds, and the first to write to it waits. Here
    # that is nobody.
    subprocess.run([sys.executable, "-c", f"b'x' * {2 * (folder / SMC).stat().st_size}"], check=True)
    # That memory may have taken the input out of the page cache.
    source = folder / ("pictures.tar" if way == "tar x" else SMC)
    subprocess.run(["cat", source], check=True, stdout=subprocess.DEVNULL)
    figures = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--one", way, "--dir", folder], check=True, capture_output=True, text=True
        ).stdout
    )
    put_away(folder, WAYS[way][1])
    return figures


def put_away(folder, name):
    """Free the space of an output without deleting it: for minutes after, ext4 looks at each deleted file when it makes
    a new one."""
    path = folder / name
    for file in [path] if path.is_file() else path.rglob("*.*"):
        if file.is_file():
            os.truncate(file, 0)
    path.rename(tempfile.mkdtemp(dir=folder) + "/" + name)


def make(folder, views, frames):
    """The SMC of a synthetic s3_all, and a tar of the same files as the extraction writes."""
    import synthetic_release

    smc = folder / SMC
    smc.parent.mkdir(parents=True)
    synthetic_release.write_smc(
        smc,
        performance="s3_all",
        cameras=synthetic_release.S3_VIEWS[:views],
        frame_ids=range(frames),
        size=(2048, 2448),
        jpeg_bytes=330_000,
        distinct=1,
        audio_seconds=frames / 15,
    )
    ours(folder)
    subprocess.run(["tar", "cf", folder / "pictures.tar", "-C", folder / "subjects/0018", "s3_all"], check=True)
    shutil.rmtree(folder / "subjects")
    print(f"s3_all with {views} views of {frames} frames, {smc.stat().st_size / 1e9:.2f} GB, on {folder}", flush=True)


def table(folder, views, frames, runs):
    subprocess.run(
        [sys.executable, __file__, "--make", "--views", str(views), "--frames", str(frames), "--dir", folder],
        check=True,
    )
    figures = {way: [] for way in WAYS}
    for _ in range(runs):
        for way in WAYS:
            seconds, cpu, memory, size = run(way, folder)
            scale = views * frames / SAMPLE if way.startswith("decode") else 1
            figures[way].append((seconds * scale, cpu * scale, memory, size * scale))
    median = statistics.median
    print(f"\n{'':20} {'s':>7} {'CPU s':>7} {'MB/s':>6} {'peak MB':>8} {'GB':>6} {'s / tar x':>10} {'CPU / tar x':>12}")
    for way, runs_of_way in figures.items():
        seconds, cpu, memory, size = (median(values) for values in zip(*runs_of_way))
        ratios = [median(a[k] / b[k] for a, b in zip(runs_of_way, figures["tar x"])) for k in (0, 1)]
        cells = f"{seconds:7.2f} {cpu:7.2f} {size / seconds / 1e6:6.0f} {memory:8.0f} {size / 1e9:6.2f}"
        print(f"{way:20} {cells} {ratios[0]:10.2f} {ratios[1]:12.2f}")

    def ratio(a, b):
        return median(x[1] / y[1] for x, y in zip(figures[a], figures[b]))

    print(f"\nCPU of decode, re-encode / ours, verify fast: {ratio('decode, re-encode', 'ours, verify fast'):.1f}")
    print(f"CPU of ours, verify full / decode, re-encode: {ratio('ours, verify full', 'decode, re-encode'):.2f}")


def growth(folder):
    """Time per frame with the number of frames in one file, and with cameras that are not selected."""
    import cv2
    import h5py
    import numpy as np

    for frames, cameras in ((500, 1), (5000, 1), (20000, 1), (5000, 8)):
        smc = folder / SMC
        smc.parent.mkdir(parents=True, exist_ok=True)
        picture = cv2.imencode(".jpg", np.zeros((64, 76, 3), np.uint8))[1].ravel()
        with h5py.File(smc, "w") as file:
            file.create_group("Camera").attrs.update({"num_frame": frames, "num_device": 60, "resolution": [64, 76]})
            for camera in range(25, 25 + cameras):
                group = file.create_group(f"Camera/{camera:02d}/color")
                for frame in range(frames):
                    group.create_dataset(str(frame), data=picture)
        times = []
        for _ in range(5):
            begin = time.monotonic()
            ours(folder, cameras={25})
            times.append(time.monotonic() - begin)
            put_away(folder, "subjects")
        per_frame = statistics.median(times) / frames * 1e6
        print(f"{frames:6} frames of camera 25, {cameras} cameras in the file: {per_frame:6.0f} µs a frame", flush=True)


def overlap(folder):
    """Print how long a run takes beside its downloads alone: rclone from the same loopback Drive, one subject after the
    other."""
    import synthetic_release
    from fake_drive import FakeDrive

    subjects = ("0018", "0019", "0026", "0030")
    paths = synthetic_release.write_demo(
        folder, subjects, frames=200, size=(1024, 1224), jpeg_bytes=200_000, distinct=1, cameras=(0, 25)
    )
    size = sum(path.stat().st_size for path in paths)
    places = {'""': FakeDrive.root_id, "demo": FakeDrive.remote_name, '["--config", "rclone.conf"]': "[]"}
    config = (folder / "config.yaml").read_text()
    for old, new in places.items():
        config = config.replace(old, new)
    (folder / "config.yaml").write_text(config)
    with FakeDrive(folder / "release") as drive:
        options = {"capture_output": True, "env": {**os.environ, **drive.environment()}}

        def run():
            begin, script = time.monotonic(), TESTS.parent / "extract_streaming_gdrive.py"
            subprocess.run([sys.executable, script, "--config", folder / "config.yaml"], check=True, **options)
            seconds = time.monotonic() - begin
            with open(folder / "MANIFEST.csv", newline="") as file:
                extraction = sum(float(row["extract_s"]) for row in csv.DictReader(file))
            shutil.rmtree(folder / "subjects")
            (folder / "MANIFEST.csv").unlink()
            return seconds, extraction

        _, extraction = run()
        drive.bandwidth = size / (4 * extraction)
        rclone = shutil.which("rclone") or Path(sys.executable).parent / "rclone"
        begin = time.monotonic()
        for subject in subjects:
            source = ["--drive-root-folder-id", drive.root_id, f"{drive.remote_name}:{subject}"]
            command = [rclone, "copy", "--transfers", "4", *source, folder / "copy" / subject]
            subprocess.run(command, check=True, **options)
        download = time.monotonic() - begin
        seconds, in_run = run()
    print(f"{size / 1e6:.0f} MB: downloads alone {download:.1f} s, extractions {extraction:.1f} s", end=" ")
    print(f"({in_run:.1f} s in the run)")
    print(f"the run {seconds:.1f} s: {seconds / download:.2f} times the downloads")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=112)
    parser.add_argument("--views", type=int, default=38)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:  # apart, because a process inherits its parent's peak memory
        return make(arguments.dir, arguments.views, arguments.frames)
    if arguments.one:
        return measure(arguments.one, arguments.dir)
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        folder = Path(folder)
        if arguments.growth:
            growth(folder)
        elif arguments.overlap:
            overlap(folder)
        else:
            table(folder, arguments.views, arguments.frames, arguments.runs)


if __name__ == "__main__":
    main()
