"""The search page: a small web server for this machine alone.

Everything that is shown is text to the template, whatever a file is called, and nothing is served
but files of the index that lie in the indexed folder.
"""

from __future__ import annotations

import collections
import io
import itertools
import os
import pathlib
import tempfile
import threading
from typing import Any

from vatt_jax import extras
from vatt_jax.command_line import run_command
from vatt_jax.config import ConfigError
from vatt_jax.search.index import Window
from vatt_jax.search.playable import Playable
from vatt_jax.search.searcher import Hit, Searcher
from vatt_jax.terminal import printable

HOST = '127.0.0.1'
# Bytes of an uploaded query.
LARGEST_UPLOAD = 1 << 30
LONGEST_SUFFIX = 16
# Short side of a thumbnail, in pixels.
THUMBNAIL = 180
# Files shorter than so many seconds are read from their beginning, at this rate.
SHORT = 3.0
THUMBNAIL_FPS = 4.0
# Kinds that browsers play, as far as a name tells.
KINDS = {
    '.mp4': 'video/mp4',
    '.m4v': 'video/mp4',
    '.mov': 'video/mp4',
    '.webm': 'video/webm',
    '.mkv': 'video/webm',
    '.wav': 'audio/wav',
    '.flac': 'audio/flac',
    '.ogg': 'audio/ogg',
    '.opus': 'audio/ogg',
    '.mp3': 'audio/mpeg',
    '.m4a': 'audio/mp4',
}
# No script, nothing from elsewhere.
POLICY = (
    "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


def make_app(searcher: Searcher) -> Any:
    """The application (flask.Flask).

    Args:
        searcher: what answers.

    Raises:
        MissingExtra: Flask is not installed.
    """
    flask = _flask()
    app = flask.Flask(__name__)
    app.config['MAX_CONTENT_LENGTH'] = LARGEST_UPLOAD
    # Another site that gives its own name this address would otherwise read the answers.
    app.config['TRUSTED_HOSTS'] = [HOST, 'localhost']
    # One question at a time: the model fills the machine.
    lock = threading.Lock()
    playable = Playable()

    @app.after_request
    def restrict(response: Any) -> Any:
        response.headers['Content-Security-Policy'] = POLICY
        response.headers['X-Content-Type-Options'] = 'nosniff'
        response.headers['Referrer-Policy'] = 'no-referrer'
        return response

    @app.route('/', methods=['GET', 'POST'])
    def search() -> Any:
        against = flask.request.values.get('against', '')
        query = flask.request.values.get('query', '').strip()
        upload = flask.request.files.get('file')
        has_upload = upload is not None and bool(upload.filename)
        hits: list[Hit] = []
        message = ''
        try:
            if has_upload:
                with lock:
                    hits = _search_upload(searcher, playable, upload, against)
            elif query:
                with lock:
                    hits = searcher.search(text=query, against=against, count=12)
                if not searcher.knows(query):
                    message = 'The model knows none of these words, so the hits mean nothing.'
            elif flask.request.method == 'POST':
                message = 'Enter a sentence or choose a file.'
        except ConfigError as error:
            message = str(error)
        return flask.render_template(
            'search.html',
            searcher=searcher,
            query=query,
            upload=upload.filename if has_upload else '',
            against=against,
            hits=[_describe(searcher, playable, hit) for hit in hits],
            is_answer=has_upload or bool(query),
            message=message,
        )

    @app.route('/media/<int:number>')
    def media(number: int) -> Any:
        path = _servable(searcher, number)
        if path is None:
            return flask.abort(404)
        kind = KINDS.get(path.suffix.lower(), 'application/octet-stream')
        # conditional: players ask for the part that they show.
        return flask.send_file(path, mimetype=kind, conditional=True)

    @app.route('/clip/<int:number>')
    def clip(number: int) -> Any:
        path = _servable(searcher, number)
        made = playable.clip(path, searcher.windows[number]) if path is not None else None
        if made is None:
            return flask.abort(404)
        kind, content = made
        return flask.send_file(io.BytesIO(content), mimetype=kind, conditional=True, max_age=3600)

    @app.route('/favicon.ico')
    def favicon() -> Any:
        return app.send_static_file('favicon.svg')

    @app.route('/thumbnail/<int:number>')
    def thumbnail(number: int) -> Any:
        window = searcher.windows.get(number)
        path = _servable(searcher, number)
        picture = None
        if window is not None and path is not None:
            picture = _thumbnail(path, window)
        if picture is None:
            return flask.abort(404)
        return flask.send_file(io.BytesIO(picture), mimetype='image/jpeg', max_age=3600)

    @app.errorhandler(413)
    def too_large(_: Any) -> Any:
        return flask.Response('The file is larger than 1 GiB.', 413, mimetype='text/plain')

    return app


def serve(searcher: Searcher, port: int) -> None:
    """Serves the page until it is interrupted.

    Args:
        searcher: what answers.
        port: of 127.0.0.1; 0: any that is free.

    Raises:
        ConfigError: the port is in use, or Flask is not installed.
    """
    app = make_app(searcher)
    from werkzeug.serving import make_server

    try:
        server = make_server(HOST, port, app, threaded=True)
    # Werkzeug prints its own sentence and exits where the port is taken.
    except (OSError, OverflowError, SystemExit) as error:
        raise ConfigError(
            f'--port: expected a free port of {HOST}, got {port}; --port=0 takes any that is free'
        ) from error
    print(f'search page: http://{HOST}:{server.server_port}/ (Ctrl-C ends it)', flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def _flask() -> Any:
    with extras.needed('search', f'{run_command()} --mode=search --serve'):
        import flask
    return flask


def _search_upload(searcher: Searcher, playable: Playable, upload: Any, against: str) -> list[Hit]:
    """Searches with an uploaded file: its pictures where it has some, else its sound."""
    # The name is the sender's: only a plain suffix of it is used, which media readers look at.
    suffix = pathlib.PurePath(upload.filename).suffix
    is_plain = suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= LONGEST_SUFFIX
    if not is_plain:
        suffix = ''
    with _upload_folder() as folder:
        path = os.path.join(folder, f'query{suffix}')
        try:
            upload.save(path)
        except OSError as error:
            raise ConfigError(f'the file could not be stored ({error.strerror})') from error
        modalities = searcher.features.modalities
        try:
            kind = playable.kind_of(path)
            if kind not in modalities:
                raise ConfigError(f'the model has no {kind} tower for this file')
            given = {kind: path}
            return searcher.search(**given, against=against, count=12)
        except ConfigError as error:
            # The path is that of a copy that the reader never saw.
            raise ConfigError(str(error).replace(path, upload.filename)) from error


def _upload_folder() -> tempfile.TemporaryDirectory:
    """A folder for one uploaded file."""
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise ConfigError(
            f'no folder for the file could be made ({error.strerror}); TMPDIR names another place'
        ) from error


def _describe(searcher: Searcher, playable: Playable, hit: Hit) -> dict[str, Any]:
    """What the template shows of an answer."""
    window = hit.window
    kind = KINDS.get(window.path.suffix.lower(), '').split('/')[0]
    path = _servable(searcher, window.id)
    # Of a container that browsers know, they may still not know the codec.
    plays = path is not None and bool(kind) and playable.plays(path)
    return {
        'id': window.id,
        'name': printable(str(window.path)),
        'start': _clock(window.start),
        'end': _clock(window.end),
        'fragment': f't={window.start:.1f},{window.end:.1f}',
        # A minus sign is as wide as a digit.
        'score': f'{hit.score:.3f}'.replace('-', '−'),
        'kind': kind if plays else 'clip',
        'is_servable': path is not None,
    }


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f'{int(minutes)}:{rest:04.1f}'


def _servable(searcher: Searcher, number: int) -> pathlib.Path | None:
    """The file of a window; None where it is gone or leads out of the indexed folder."""
    window = searcher.windows.get(number)
    if window is None:
        return None
    root = searcher.folder.resolve()
    # Links are followed before it is checked where the file lies.
    path = (root / window.path).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return None
    return path


def _thumbnail(path: pathlib.Path, window: Window) -> bytes | None:
    """The picture in the middle of a window as JPEG; None for sound, and for what is damaged."""
    from data_pipelines import media

    middle = (window.start + window.end) / 2
    try:
        length = media.duration(path, 'video')
        if length is None or length < SHORT:
            # The reader takes no part of a file that is hardly longer than the part.
            frames = media.read(path, THUMBNAIL_FPS, THUMBNAIL, rate=0).frames
            number = int(middle * THUMBNAIL_FPS)
        else:
            frames = media.read(path, 1.0, THUMBNAIL, rate=0, part=(middle, middle + 1)).frames
            number = 0
        # The last one that there is, where the window is longer than the pictures.
        shown = collections.deque(itertools.islice(frames or (), number + 1), maxlen=1)
    except (media.MediaError, OSError):
        return None
    return media.encode_jpeg(shown[0], 80) if shown else None
