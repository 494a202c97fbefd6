"""A local S3 server for tests, and a proxy before it that misbehaves on request."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import logging
import threading
import time
from collections.abc import Iterator

import boto3
from moto.server import ThreadedMotoServer

BUCKET = 'bucket'
# What the client needs to know; the server accepts any key.
CREDENTIALS = {
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_DEFAULT_REGION': 'us-east-1',
}


class Faults:
    """What the proxy does to the requests that follow.

    Attributes:
        unavailable: requests that are answered with 503.
        cut: reads of which half of the bytes arrive before the connection is closed.
        hang: requests that are not answered at all.
        latency: seconds before each answer.
        requests: method and path of each request.
        most_at_once: the most requests that were under way at one moment.
    """

    def __init__(self) -> None:
        self.unavailable = 0
        self.cut = 0
        self.hang = 0
        self.latency = 0.0
        self.requests: list[str] = []
        self.most_at_once = 0
        self.released = threading.Event()
        self._at_once = 0
        self._lock = threading.Lock()

    def take(self, fault: str) -> bool:
        """Whether this request has the fault; counts it down."""
        with self._lock:
            left = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
            return left > 0

    @contextlib.contextmanager
    def under_way(self, request: str) -> Iterator[None]:
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a server, with faults.

    Attributes:
        target: host:port of the server.
        faults: what to do to the requests.
    """

    protocol_version = 'HTTP/1.1'
    target = ''
    faults = Faults()

    def handle_any(self) -> None:
        body = self.read_body()
        with self.faults.under_way(f'{self.command} {self.path}'):
            time.sleep(self.faults.latency)
            if self.faults.take('hang'):
                self.faults.released.wait(30)
                self.close_connection = True
            elif self.faults.take('unavailable'):
                self.answer(503, {}, b'')
            else:
                self.forward(body)

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()  # the end of the chunk's line
        self.rfile.readline()
        return body

    def forward(self, body: bytes) -> None:
        # Those of this connection alone.
        hops = ('Connection', 'Expect', 'Transfer-Encoding')
        headers = {name: value for name, value in self.headers.items() if name not in hops}
        connection = http.client.HTTPConnection(self.target, timeout=30)
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.answer(answer.status, dict(answer.headers), content)

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name not in ('Connection', 'Content-Length', 'Date', 'Server'):
                self.send_header(name, value)
        # Of the answer to HEAD it is that of the file.
        size = headers.get('Content-Length', len(content))
        self.send_header('Content-Length', size if self.command == 'HEAD' else len(content))
        self.end_headers()
        if self.command == 'GET' and len(content) > 1 and self.faults.take('cut'):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def log_message(self, *args: object) -> None:
        """Silent."""


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, Faults]]:
    """A server with an empty bucket; yields the URL of the proxy before it, and its faults."""
    # It logs every request.
    logging.getLogger('werkzeug').setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        's3',
        endpoint_url=f'http://{host}:{port}',
        aws_access_key_id='key',
        aws_secret_access_key='secret',
        region_name='us-east-1',
    )
    client.create_bucket(Bucket=BUCKET)
    faults = Faults()
    handler = type('Handler', (Proxy,), {'target': f'{host}:{port}', 'faults': faults})
    proxy = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{proxy.server_port}', faults
    finally:
        faults.released.set()
        proxy.shutdown()
        proxy.server_close()
        server.stop()
