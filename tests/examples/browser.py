"""A headless Chromium that shows one page, driven by its DevTools protocol over a pair of pipes."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SECONDS = 40.0
"""For anything to happen in the page; far more than any of it takes."""

# Chromium reads commands from descriptor 3 and writes answers to 4.
_START = 'exec "$0" "$@" 3<&"$COMMANDS" 4>&"$ANSWERS"'
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)


class Page:
    """One page.

    Attributes:
        problems: exceptions, errors on the console and refused loads, as Chromium told them.
        urls: all that the page asked for.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.problems: list[str] = []
        self.urls: list[str] = []
        self._commands, self._answers = commands, answers
        self._num_sent = 0
        self._rest = b""
        self._session: str | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(answers, selectors.EVENT_READ)

    def open(self, url: str) -> None:
        """Show a page; return when it has loaded."""
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")
        self._send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """Return the value of some JavaScript, awaited if it is a promise."""
        told = self._send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Wait until some JavaScript gives what counts as true, looked at before each frame; return that."""
        milliseconds = SECONDS * 1000
        found = self.run(
            f"""new Promise(done => {{
                const end = Date.now() + {milliseconds};
                (function look() {{
                    const found = {condition};
                    found || Date.now() > end ? done(found) : setTimeout(look, 20);
                }})();
            }})"""
        )
        assert found, f"{condition} did not come true; {self.problems}"
        return found

    def press(self, key: str, times: int = 1) -> None:
        """Press a key and release it, as a person does with what has the focus."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39, "ArrowDown": 40, "Delete": 46}[key]
        for kind in ("keyDown", "keyUp") * times:
            self._send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def names(self) -> list[tuple[str, str]]:
        """Return role and name, as screen readers get them, of everything that can have the focus."""
        nodes = self._send("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if any(each["name"] == "focusable" for each in node.get("properties", ()))
        ]

    def text(self, selector: str) -> str:
        """Return the text of an element as it shows."""
        return str(self.run(f"document.querySelector({selector!r}).innerText"))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self._send("Browser.close")
        self._selector.close()

    def _send(self, method: str, **params: Any) -> Any:
        self._num_sent += 1
        number = self._num_sent
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == number:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]
            self._note(told.get("method"), told.get("params"))

    def _note(self, event: str | None, params: Any) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["exception"].get("description", "?"))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])

    def _read(self) -> Any:
        until = time.monotonic() + SECONDS + 10
        while b"\0" not in self._rest:
            assert self._selector.select(max(0.0, until - time.monotonic())), "Chromium does not answer"
            part = os.read(self._answers, 1 << 16)
            assert part, "Chromium ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)


@contextmanager
def open_browser() -> Iterator[Page]:
    """Start Chromium; skip the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None or shutil.which("bash") is None:
        pytest.skip("needs Chromium")
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["bash", "-c", _START, program, *_FLAGS, f"--user-data-dir={profile}"],
            env={**os.environ, "COMMANDS": str(read_commands), "ANSWERS": str(write_answers)},
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        page = Page(commands, answers)
        try:
            yield page
            page.close()
        finally:
            process.kill()
            process.wait()
            os.close(commands)
            os.close(answers)
