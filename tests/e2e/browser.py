"""A real browser for the pages that a person sees: Chromium, headless, through chromedriver's HTTP interface.

Only the standard library: chromedriver speaks the WebDriver protocol, JSON over HTTP, of which five calls are used here. The
browser has a fresh profile of its own and reaches the loopback only.

    apt-get install chromium chromium-driver
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars")
WAIT_SECONDS = 60.0
ESCAPE = "\ue00c"  # the key as the protocol names it


class BrowserError(Exception):
    """The browser is not installed, or a page did not show what was waited for."""


class Browser:
    """A session: `go`, `wait_for` a text, `run` a script, `picture`."""

    def __init__(self, url: str, session: str):
        self._url = f"{url}/session/{session}"

    def go(self, address: str) -> None:
        """Open an address; also when only its part behind # differs from the present one."""
        _call(f"{self._url}/url", {"url": "about:blank"})
        _call(f"{self._url}/url", {"url": address})

    def run(self, script: str) -> Any:
        """The value of a JavaScript function body."""
        return _call(f"{self._url}/execute/sync", {"script": script, "args": []})

    def text(self) -> str:
        """What a person can read on the page."""
        return str(self.run("return document.body ? document.body.innerText : ''"))

    def wait_for(self, *wanted: str) -> str:
        """The page's text, once it holds every wanted word. BrowserError names those that did not come, and shows the page."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            text = self.text()
            missing = [word for word in wanted if word not in text]
            if not missing:
                return text
            if time.monotonic() > deadline:
                raise BrowserError(f"the page never showed {missing}; it shows:\n{text[:2000]}")
            time.sleep(0.3)

    def click(self, label: str) -> None:
        """Click the innermost element whose whole text, or whose accessible name, is `label`."""
        script = f"""const all = [...document.querySelectorAll('button, a, label, [role=tab], [role=switch], span, div')];
            const hits = all.filter(e => (e.innerText || '').trim() === {json.dumps(label)} || e.getAttribute('aria-label') === {json.dumps(label)});
            if (!hits.length) return false; hits[hits.length - 1].click(); return true;"""
        if not self.run(script):
            raise BrowserError(f"nothing to click is called {label!r}")

    def press(self, xpath: str) -> None:
        """Click an element as a mouse does (some controls do not hear a script's click). BrowserError when there is none."""
        found = _call(f"{self._url}/element", {"using": "xpath", "value": xpath})
        _call(f"{self._url}/element/{next(iter(found.values()))}/click", {})

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        active = _send(urllib.request.Request(f"{self._url}/element/active"))
        _call(f"{self._url}/element/{next(iter(active.values()))}/value", {"text": text})

    def picture(self, path: Path, settle: float = 1.5) -> Path:
        """A PNG of the window, after the page had `settle` seconds to finish its animations."""
        time.sleep(settle)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(_call(f"{self._url}/screenshot", None)))
        return path


@contextlib.contextmanager
def browser(width: int = 1500, height: int = 900, more: Sequence[str] = ()) -> Iterator[Browser]:
    """A headless Chromium with `more` flags, gone at the end with its profile. BrowserError when it is not installed."""
    driver = shutil.which("chromedriver")
    if driver is None:
        raise BrowserError("chromedriver is not installed: apt-get install chromium chromium-driver")
    port = _free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            _until_ready(url)
            options = {"args": [*FLAGS, *more, f"--user-data-dir={profile}", f"--window-size={width},{height}"]}
            made = _call(f"{url}/session", {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}})
            try:
                yield Browser(url, made["sessionId"])
            finally:
                with contextlib.suppress(OSError, BrowserError):
                    _send(urllib.request.Request(f"{url}/session/{made['sessionId']}", method="DELETE"))
        finally:
            process.terminate()
            process.wait(10)


def _until_ready(url: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError):
            if _call(f"{url}/status", None)["ready"]:
                return
        if time.monotonic() > deadline:
            raise BrowserError("chromedriver does not answer")
        time.sleep(0.1)


def _call(url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    return _send(urllib.request.Request(url, data, {"Content-Type": "application/json"}))


def _send(request: urllib.request.Request) -> Any:
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())["value"]
    except urllib.error.HTTPError as error:
        raise BrowserError(error.read().decode("utf-8", "replace")[:500]) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
