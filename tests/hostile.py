"""Damaged and hostile SMC files for the tests: mutations with a fixed seed, and pictures that lie in another file."""

import hashlib
import os
import random
import re
import struct

import h5py
import numpy as np

SIGNATURES = re.compile(rb"TREE|SNOD|HEAP|GCOL|OHDR|FRHP|BTHD|FSHD|\x89HDF")
SECRET = b"\xff\xd8\xffthe secret of this host"
WORDS = (0, 1, 2**8 - 1, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def metadata_bytes(path):
    """Ranges of offsets of what is no data set's content in an HDF5 file: where damage hurts most."""
    data = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and item.id.get_offset() is not None:
            data.append((item.id.get_offset(), item.id.get_offset() + item.id.get_storage_size()))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    found, at = [], 0
    for start, stop in sorted(data) + [(os.path.getsize(path),) * 2]:
        found.append(range(at, start))
        at = max(at, stop)
    return [offsets for offsets in found if offsets]


def mutations(path, count, seed):
    """`count` damaged versions of a file, as (what was done, bytes). The same arguments give the same ones."""
    original, chance, metadata = path.read_bytes(), random.Random(seed), metadata_bytes(path)
    signatures = [match.start() for match in SIGNATURES.finditer(original)]
    places = {
        "in the metadata": lambda: chance.choice(chance.choices(metadata, map(len, metadata))[0]),
        "near a signature": lambda: chance.choice(signatures) + chance.randrange(48),
        "in the head": lambda: chance.randrange(96),
        "anywhere": lambda: chance.randrange(len(original)),
    }
    changes = {
        "bit": lambda old: bytes([old[0] ^ 1 << chance.randrange(8)]),
        "byte": lambda old: bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))]),
        "word": lambda old: struct.pack("<Q", chance.choice((*WORDS, len(original), places["in the metadata"]()))),
        "zeros": lambda old: bytes(min(len(old), chance.choice((1, 8, 64, 512, 4096)))),
        "noise": lambda old: chance.randbytes(min(len(old), chance.choice((2, 8, 64)))),
        "swap": lambda old: original[(at := places["in the metadata"]()) : at + min(len(old), 24)],
    }
    kinds = [(change, "in the metadata") for change in changes]
    kinds += [("byte", "near a signature"), ("byte", "in the head")]
    kinds += [("bit", "anywhere"), ("cut", "anywhere"), ("grow", "anywhere")]
    for number in range(count):
        (change, place), content = kinds[number % len(kinds)], bytearray(original)
        for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
            at = min(places[place](), len(content) - 1)
            if change == "cut":
                del content[at:]
                break
            if change == "grow":
                content[at:at] = chance.randbytes(chance.choice((1, 8, 100)))
            else:
                new = changes[change](content[at:])
                content[at : at + len(new)] = new
        yield f"{change} {place} {number}", bytes(content)


def write_secret(path):
    """Write an HDF5 file with something that must not come out."""
    with h5py.File(path, "w") as file:
        file["here"] = np.frombuffer(SECRET, np.uint8)
        file["0"] = file["color/0"] = file["here"]


def soft(file, secret):
    file["Camera/25/color/0"] = h5py.SoftLink("/Camera/25/color/2")


def external(file, secret):
    file["Camera/25/color/0"] = h5py.ExternalLink(str(secret), "here")


def external_storage(file, secret):
    place = str(secret), secret.read_bytes().find(SECRET), len(SECRET)
    file["Camera/25/color"].create_dataset("0", (len(SECRET),), np.uint8, external=[place])


def virtual(file, secret):
    layout = h5py.VirtualLayout((len(SECRET),), np.uint8)
    layout[:] = h5py.VirtualSource(str(secret), "here", (len(SECRET),))
    file["Camera/25/color"].create_virtual_dataset("0", layout)


def at_the_top(file, secret):
    del file["Keypoints3d"]
    file["Keypoints3d"] = h5py.ExternalLink(str(secret), "/")


LINKS = (soft, external, external_storage, virtual)  # each puts such a picture in the place of frame 0 of camera 25


def snapshot(folder, without=()):
    """{path: what is there} of everything in a folder, links as such, but for some entries at its top."""
    found = {}
    for path in folder.rglob("*"):
        if path.relative_to(folder).parts[0] not in without:
            status = path.lstat()
            found[path] = [status.st_mode]
            if path.is_symlink():
                found[path].append(os.readlink(path))
            elif path.is_file():
                found[path] += [hashlib.md5(path.read_bytes()).hexdigest(), status.st_mtime_ns]
    return found
