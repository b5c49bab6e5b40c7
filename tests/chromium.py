"""A real Chromium, driven over its DevTools protocol: sizes, colours, keys, pictures, console."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Chromium's sandbox refuses root; the rest keeps a fresh profile from asking its maker for this and that.
COMMAND = (
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
)
# It reads from 3 and writes to 4.
LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
ANSWER_SECONDS = 120


class Page:
    """One tab."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers, self.buffer, self.number, self.session = commands, answers, b"", 0, ""
        self.console: list[str] = []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                self.buffer += os.read(self.answers, 1 << 20) or self._closed()
            text, _, self.buffer = self.buffer.partition(b"\0")
            said = json.loads(text)
            if said.get("id") == self.number:
                assert "error" not in said, said
                return said["result"]
            self._hear(said)

    def _closed(self) -> bytes:
        raise AssertionError("the browser has ended")

    def _hear(self, said: Any) -> None:
        parameters = said.get("params", {})
        if said["method"] == "Log.entryAdded":
            self.console.append(parameters["entry"]["text"])
        elif said["method"] == "Runtime.consoleAPICalled":
            self.console.append(str([argument.get("value") for argument in parameters["args"]]))
        elif said["method"] == "Runtime.exceptionThrown":
            self.console.append(str(parameters["exceptionDetails"]))

    def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.tell("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        return self.tell("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str, seconds: float = ANSWER_SECONDS) -> None:
        give_up = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < give_up, f"{expression} does not come true; the console: {self.console}"
            time.sleep(0.05)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.tell("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def picture(self, file: Path) -> None:
        """Take a picture of the whole page, as far as it can be scrolled."""
        size = self.tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.tell("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def opened() -> Iterator[Page]:
    """Run a browser with a profile of its own, for as long as the context lasts."""
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        browser = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(to_browser), str(from_browser), *COMMAND, f"--user-data-dir={home}"],
            env={"PATH": os.environ["PATH"], "HOME": home},
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(commands, answers)
        finally:
            browser.terminate()
            browser.wait(ANSWER_SECONDS)
            os.close(commands)
            os.close(answers)
