"""push_to_hub and load('hf://…') through huggingface_hub, against a hub on this machine."""

import base64
import hashlib
import http.server
import importlib
import json
import threading
import urllib.parse

import numpy as np
import pytest

import vatt_jax
from vatt_jax.config import ConfigError

hub = pytest.importorskip('huggingface_hub')
constants = importlib.import_module('huggingface_hub.constants')


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that downloads and commits use.

    `server.repositories` is {owner/name: {path: content}}.
    """

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def _answer(self, content, status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers['Content-Type'] = 'application/json'
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def _endpoint(self):
        return f'http://{self.headers["Host"]}'

    def _parts(self):
        return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip('/').split('/')

    def _sha(self, name):
        files = self.server.repositories[name]
        content = b''.join(path.encode() + files[path] for path in sorted(files))
        return hashlib.sha1(content).hexdigest()

    def _missing(self, code='RepoNotFound'):
        self._answer({'error': code}, 404, X_Error_Code=code, X_Error_Message='Not here')

    def do_GET(self):
        parts = self._parts()
        is_api = parts[:2] == ['api', 'models']
        name = '/'.join(parts[2:4] if is_api else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self._missing()
        rest = parts[4:] if is_api else parts[2:]
        if rest[0] in ('revision', 'tree') and rest[1] not in ('main', self._sha(name)):
            return self._missing('RevisionNotFound')
        if rest[0] == 'revision':
            siblings = [{'rfilename': path} for path in files]
            return self._answer({'id': name, 'sha': self._sha(name), 'siblings': siblings})
        if rest[0] == 'tree':
            listing = []
            for path, content in files.items():
                oid = hashlib.sha1(content).hexdigest()
                listing.append({'type': 'file', 'path': path, 'size': len(content), 'oid': oid})
            return self._answer(listing)
        # owner/name/resolve/<revision>/<path>
        content = files.get('/'.join(rest[2:]))
        if content is None:
            return self._missing('EntryNotFound')
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._answer(content, ETag=etag, X_Repo_Commit=self._sha(name))

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        parts = self._parts()
        if self.headers.get('Authorization') != 'Bearer secret':
            return self._answer({'error': 'Invalid username or password.'}, 401)
        if parts == ['api', 'repos', 'create']:
            asked = json.loads(body)
            name = f'{asked["organization"]}/{asked["name"]}'
            self.server.repositories.setdefault(name, {})
            return self._answer({'url': f'{self._endpoint()}/{name}', 'id': name})
        if parts == ['api', 'validate-yaml']:
            self.server.cards.append(json.loads(body)['content'])
            return self._answer({'errors': [], 'warnings': []})
        name, action = '/'.join(parts[2:4]), parts[4]
        if action == 'preupload':
            modes = []
            for file in json.loads(body)['files']:
                modes.append({'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False})
            return self._answer({'files': modes})
        assert action == 'commit', self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry['key'] == 'file':
                value = entry['value']
                content = base64.b64decode(value['content'])
                self.server.repositories[name][value['path']] = content
        sha = self._sha(name)
        url = f'{self._endpoint()}/{name}/commit/{sha}'
        self._answer({'success': True, 'commitOid': sha, 'commitUrl': url})


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub without repositories, which huggingface_hub takes for its own."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repositories, server.cards = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f'http://127.0.0.1:{server.server_port}'
    for name in ('ENDPOINT', '_HF_DEFAULT_ENDPOINT'):
        monkeypatch.setattr(constants, name, endpoint, raising=False)
    template = endpoint + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_there_and_back(server, plain_run):
    model = vatt_jax.load(plain_run)
    address = model.push_to_hub('me/tiny', licence='mit', token='secret')
    assert '/me/tiny/commit/' in address
    files = server.repositories['me/tiny']
    assert {'README.md', 'config.json', 'checkpoints/2/manifest.json'} <= set(files)
    assert files['README.md'].startswith(b'---\nlicense: "mit"\n')

    # Weights alone are taken.
    files['videos/huge.bin'] = b'0' * 1000
    downloaded = vatt_jax.load('hf://me/tiny')
    assert not (downloaded.path / 'videos').exists()
    sound = np.arange(1024, dtype=np.int16)
    expected = model.embed(text='red', audio=sound)
    found = downloaded.embed(text='red', audio=sound)
    np.testing.assert_array_equal(found['text']['vat'], expected['text']['vat'])
    np.testing.assert_array_equal(found['audio']['va'], expected['audio']['va'])

    # What was downloaded once is there without the hub.
    server.shutdown()
    server.server_close()
    assert vatt_jax.load('hf://me/tiny').path == downloaded.path


def test_what_goes_wrong_is_one_sentence(server, plain_run):
    for address in ('hf://tiny', 'hf://a/b/c', 'hf://../x/y', 'hf://'):
        with pytest.raises(ConfigError, match='expected hf://owner/name'):
            vatt_jax.load(address)
    with pytest.raises(ConfigError, match='hf://me/other: expected a repository'):
        vatt_jax.load('hf://me/other')
    server.repositories['me/empty'] = {'README.md': b'nothing'}
    with pytest.raises(ConfigError, match='holds no checkpoint'):
        vatt_jax.load('hf://me/empty')
    with pytest.raises(ConfigError, match='expected a repository'):
        vatt_jax.load('hf://me/empty@other')
    model = vatt_jax.load(plain_run)
    with pytest.raises(ConfigError, match='expected owner/name'):
        model.push_to_hub('tiny')
    with pytest.raises(ConfigError, match='that can be written'):
        model.push_to_hub('me/tiny', token='wrong')
    assert 'me/tiny' not in server.repositories
