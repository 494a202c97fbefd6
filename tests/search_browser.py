"""A headless Chromium, driven over its debugging pipe: JSON messages that end with a zero byte."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import shutil
import subprocess
import time
from typing import Any

EXECUTABLE = shutil.which('chromium') or shutil.which('chromium-browser')


class Browser:
    """One page of a browser that is ended by `close`.

    Args:
        profile: an empty folder for its files.
    """

    def __init__(self, profile: pathlib.Path):
        assert EXECUTABLE is not None
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        self._rest = b''
        self._number = 0
        self.events: list[dict[str, Any]] = []

        self._process = subprocess.Popen(
            [
                # The browser reads from descriptor 3 and writes to 4.
                'bash',
                '-c',
                f'exec "$@" 3<&{to_browser} 4>&{from_browser}',
                'bash',
                EXECUTABLE,
                '--headless',
                '--no-sandbox',
                '--disable-gpu',
                '--disable-dev-shm-usage',
                '--no-first-run',
                '--autoplay-policy=no-user-gesture-required',
                '--remote-debugging-pipe',
                f'--user-data-dir={profile}',
                'about:blank',
            ],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._session = ''
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'DOM', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def close(self) -> None:
        """Ends the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one method of the DevTools protocol."""
        self._number += 1
        message: dict[str, Any] = {'id': self._number, 'method': method, 'params': parameters}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self._number:
                assert 'error' not in answer, answer['error']
                return answer['result']
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b'\0' not in self._rest:
            block = os.read(self._read, 1 << 16)
            assert block, 'the browser ended'
            self._rest += block
        message, self._rest = self._rest.split(b'\0', 1)
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call(
            'Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True
        )
        assert 'exceptionDetails' not in result, result['exceptionDetails']
        return result['result'].get('value')

    def wait_for(self, expression: str, seconds: float = 60.0) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while True:
            # A page that is being replaced cannot be asked.
            try:
                value = self.evaluate(expression)
            except AssertionError:
                value = None
            if value:
                return value
            assert time.monotonic() < deadline, f'{expression} stayed false'
            time.sleep(0.1)

    def open(self, url: str) -> None:
        """Goes to a page and waits until it is there."""
        self.call('Page.navigate', url=url)
        self.wait_for(f'location.href === {json.dumps(url)} && document.readyState === "complete"')

    def resize(self, width: int, height: int = 900) -> None:
        """Sets the size of the window, in pixels."""
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def choose_file(self, selector: str, path: str) -> None:
        """Puts a file into a file input."""
        root = self.call('DOM.getDocument')['root']['nodeId']
        node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        self.call('DOM.setFileInputFiles', nodeId=node, files=[path])

    def screenshot(self, path: pathlib.Path) -> None:
        """Saves what is seen as PNG."""
        shot = self.call('Page.captureScreenshot', captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot['data']))
