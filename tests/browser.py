"""A headless Chromium that tests drive, over the DevTools protocol on a pair of pipes.

Only the standard library: pages of this project are one file, so a browser is all they need.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from typing import Any

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
# Of one answer; the machine may be busy.
TIMEOUT = 120


class Browser:
    """One page of a headless Chromium.

    Attributes:
        messages: what the page wrote to the console, and errors of scripts and of the page's
            policy.
        requests: addresses it asked for, data and blobs left out.
    """

    def __init__(self, profile: pathlib.Path):
        """Start it. profile: an empty folder for its files."""
        self.messages: list[str] = []
        self.requests: list[str] = []
        from_here, self._to_browser = os.pipe()
        self._from_browser, to_here = os.pipe()
        arguments = [
            CHROMIUM,
            '--headless=new',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-dev-shm-usage',
            '--remote-debugging-pipe',
            f'--user-data-dir={profile}',
            '--no-first-run',
            '--mute-audio',
            '--autoplay-policy=no-user-gesture-required',
            'about:blank',
        ]
        # The browser reads commands from file 3 and writes to file 4.
        redirections = f'exec "$@" 3<&{from_here} 4>&{to_here}'
        self._process = subprocess.Popen(
            ['bash', '-c', redirections, 'bash', *arguments],
            pass_fds=(from_here, to_here),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_here)
        os.close(to_here)
        self._buffer = b''
        self._last_id = 0
        self._session = ''
        targets = self.call('Target.getTargets')['targetInfos']
        page = next(target for target in targets if target['type'] == 'page')
        attached = self.call('Target.attachToTarget', targetId=page['targetId'], flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def close(self) -> None:
        """End it."""
        os.close(self._to_browser)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from_browser)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._last_id += 1
        message = {'id': self._last_id, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._read()
            if answer.get('id') == self._last_id:
                assert 'error' not in answer, (method, answer['error'])
                return answer['result']
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b'\0' not in self._buffer:
            ready, _, _ = select.select([self._from_browser], [], [], TIMEOUT)
            assert ready, f'no answer within {TIMEOUT} s'
            part = os.read(self._from_browser, 1 << 20)
            assert part, 'the browser has ended'
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b'\0')
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get('params', {})
        match event.get('method'):
            case 'Runtime.consoleAPICalled':
                self.messages.append(str(params['args']))
            case 'Runtime.exceptionThrown':
                self.messages.append(str(params['exceptionDetails']))
            case 'Log.entryAdded':
                self.messages.append(params['entry']['text'])
            case 'Network.requestWillBeSent':
                address = params['request']['url']
                if not address.startswith(('data:', 'blob:')):
                    self.requests.append(address)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        answer = self.call(
            'Runtime.evaluate',
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        assert 'exceptionDetails' not in answer, answer['exceptionDetails']
        return answer['result'].get('value')

    def wait_for(self, condition: str) -> None:
        """Waits until an expression in the page is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(f'Boolean({condition})'):
            assert time.monotonic() < end, f'never true: {condition}'
            time.sleep(0.05)

    def open(self, path: pathlib.Path, width: int = 1280, height: int = 900) -> None:
        """Shows a file on a screen of this size."""
        self.go_to(path.resolve().as_uri(), width, height)

    def go_to(self, address: str, width: int = 1280, height: int = 900) -> None:
        """Shows the page of an address on a screen of this size."""
        self.resize(width, height)
        self.call('Page.navigate', url=address)
        self.wait_for(f'location.href == {address!r}')
        self.wait_for('document.readyState == "complete"')

    def choose_file(self, selector: str, path: pathlib.Path) -> None:
        """Puts a file into a file input."""
        root = self.call('DOM.getDocument')['root']['nodeId']
        node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        self.call('DOM.setFileInputFiles', nodeId=node, files=[str(path)])

    def submit(self, selector: str) -> None:
        """Clicks on what leads to another page, and waits until that is there."""
        self.run('window.isOld = true')
        self.run(f'document.querySelector({selector!r}).click()')
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            # A page that is being replaced cannot be asked.
            with contextlib.suppress(AssertionError):
                if self.run('!window.isOld && document.readyState == "complete"'):
                    return
            time.sleep(0.05)
        raise AssertionError(f'no page came after {selector}')

    def resize(self, width: int, height: int = 900) -> None:
        """Sets the size of the screen."""
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def color_scheme(self, name: str) -> None:
        """'light' or 'dark', as a user's system says."""
        feature = {'name': 'prefers-color-scheme', 'value': name}
        self.call('Emulation.setEmulatedMedia', features=[feature])

    def press(self, key: str, code: int, text: str = '') -> None:
        """Presses a key. code: its Windows virtual key code; text: what it types."""
        fields: dict[str, Any] = {'key': key, 'code': key, 'windowsVirtualKeyCode': code}
        down = {**fields, 'text': text} if text else fields
        self.call('Input.dispatchKeyEvent', type='keyDown', **down)
        self.call('Input.dispatchKeyEvent', type='keyUp', **fields)

    def move_to(self, selector: str, across: float, down: float) -> None:
        """Points at a place of an element, in shares of its width and height."""
        x, y = self.run(
            f"""(() => {{
              const element = document.querySelector({selector!r});
              element.scrollIntoView({{block: 'center'}});
              const box = element.getBoundingClientRect();
              return [box.left + box.width * {across}, box.top + box.height * {down}];
            }})()"""
        )
        self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

    def screenshot(self, path: pathlib.Path, whole: bool = False) -> None:
        """Writes a picture (PNG). whole: of the page, not of the screen alone."""
        shot = self.call('Page.captureScreenshot', captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot['data']))
