"""Damaged and hostile SMC files for the tests: mutations with a fixed seed, and what plain h5py makes of the result."""

import hashlib
import os
import random
import re
import stat
import struct

import h5py

SIGNATURES = (b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"FRHP", b"BTHD", b"FSHD", b"\x89HDF")
WORDS = (0, 1, 2**8 - 1, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def metadata_bytes(path):
    """Offsets (start, stop) of what is no data set's content in an HDF5 file: where damage hurts most."""
    data = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and item.id.get_offset() is not None:
            data.append((item.id.get_offset(), item.id.get_offset() + item.id.get_storage_size()))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    found, at = [], 0
    for start, stop in sorted(data) + [(os.path.getsize(path),) * 2]:
        if start > at:
            found.append((at, start))
        at = max(at, stop)
    return found


def mutations(path, count, seed):
    """`count` damaged versions of a file, as (what was done, bytes). The same arguments give the same ones."""
    with open(path, "rb") as file:
        original = file.read()
    chance, ranges = random.Random(seed), metadata_bytes(path)
    lengths = [stop - start for start, stop in ranges]
    signatures = [at for signature in SIGNATURES for at in occurrences(original, signature)]

    def somewhere():
        start, stop = chance.choices(ranges, lengths)[0]
        return chance.randrange(start, stop)

    def near_signature():
        return min(chance.choice(signatures) + chance.randrange(48), len(original) - 8)

    for number in range(count):
        content = bytearray(original)
        kind = ("flip", "word", "zero", "noise", "cut", "head", "swap", "sign", "payload", "grow")[number % 10]
        for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
            at = somewhere()
            if kind == "flip":
                content[at] ^= 1 << chance.randrange(8)
            elif kind == "word":
                at = min(at - at % 8, len(original) - 8)
                content[at : at + 8] = struct.pack(
                    "<Q", chance.choice(WORDS + (len(original), at, somewhere() // 8 * 8))
                )
            elif kind == "zero":
                length = chance.choice((1, 8, 64, 512, 4096))
                content[at : at + length] = bytes(len(content[at : at + length]))
            elif kind == "noise":
                length = len(content[at : at + chance.choice((2, 8, 64))])
                content[at : at + length] = chance.randbytes(length)
            elif kind == "cut":
                del content[chance.choice((at, chance.randrange(len(content) + 1), len(content) - 1, 100)) :]
                break
            elif kind == "head":
                content[chance.randrange(96)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            elif kind == "swap":
                other, length = somewhere(), chance.choice((8, 24, 64))
                length = min(length, len(content) - max(at, other))
                content[at : at + length], content[other : other + length] = (
                    original[other : other + length],
                    original[at : at + length],
                )
            elif kind == "sign":
                at = near_signature()
                content[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            elif kind == "payload":
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            elif kind == "grow":
                content[at:at] = chance.randbytes(chance.choice((1, 8, 100)))
        yield f"{kind} {number}", bytes(content)


def occurrences(content, wanted):
    at = content.find(wanted)
    while at >= 0:
        yield at
        at = content.find(wanted, at + 1)


def plain_pictures(path):
    """What h5py itself reads of the pictures and masks: {"images/cam_25/frame_000000": bytes}, without empty ones."""
    found = {}
    with h5py.File(path, "r") as file:
        for camera in file.get("Camera", ()):
            for group, modality in (("color", "images"), ("mask", "masks")):
                for frame in file[f"Camera/{camera}"].get(group, ()) if re.fullmatch("[0-5][0-9]", camera) else ():
                    data = (
                        file[f"Camera/{camera}/{group}/{frame}"][()].tobytes()
                        if re.fullmatch("0|[1-9][0-9]*", frame)
                        else b""
                    )
                    if data:
                        found[f"{modality}/cam_{camera}/frame_{int(frame):06d}"] = data
    return found


def snapshot(folder, without=()):
    """{path: what is there} of everything in a folder, links as such, but for some entries at its top."""
    found = {}
    for parent, folders, files in os.walk(folder):
        if parent == str(folder):
            folders[:], files = (
                [name for name in folders if name not in without],
                [name for name in files if name not in without],
            )
        for name in folders + files:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                found[path] = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    found[path] = hashlib.md5(file.read()).hexdigest(), status.st_mode, status.st_mtime_ns
            else:
                found[path] = status.st_mode
    return found
