"""Headless Chromium by the DevTools protocol over a pipe: what a page does in a real browser."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 60  # seconds for an answer


class Browser:
    """One page at a time, opened from the disk; for a `with`."""

    def __init__(self, profile: Path) -> None:
        self.problems: list[str] = []  # what the page's console tells of errors
        self._number, self._buffer, self._loaded = 0, b"", False
        self._asked_for: list[str] = []
        theirs, self._to = os.pipe()
        self._from, ours = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{ours}', PROGRAM, *flags]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(ours)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        found = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(WAIT)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: object) -> dict:
        """What the page answers to a command of the protocol."""
        return self._call(method, self._session, **parameters)

    def _call(self, method: str, session: dict | None = None, **parameters: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | (session or {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda message: message.get("id") == self._number)
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, wanted: Callable[[dict], bool]) -> dict:
        end = time.monotonic() + WAIT
        while True:
            while b"\0" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\0")
                message = json.loads(line)
                self._note(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
            part = os.read(self._from, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part

    def _note(self, message: dict) -> None:
        method, said = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self._asked_for.append(said["request"]["url"])
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(said["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.problems.append(str(said["args"]))
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(said["exceptionDetails"]))

    def open(self, file: Path, width: int = 1400, night: bool = False) -> list[str]:
        """Loads a file in a window of so many pixels; returns what it asked for but data URIs."""
        self._asked_for.clear()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if night else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=file.as_uri())
        if not self._loaded:
            self._until(lambda message: message.get("method") == "Page.loadEventFired")
        return [url for url in self._asked_for if not url.startswith("data:")]

    def ask(self, script: str) -> object:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, whole: bool = True) -> bytes:
        """The page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])
