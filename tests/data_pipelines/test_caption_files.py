"""Caption files as strangers have them are read whole, or refused with the line to mend."""

import json

import pytest

from data_pipelines.errors import DataError
from data_pipelines.preparation import annotation_files, file_names, json_files, media_catalog

FOREVER = float('inf')


def sentence(text, start=0.0, end=FOREVER):
    return {'text': text, 'start': start, 'end': end}


@pytest.fixture(params=['at once', 'member by member'])
def read(tmp_path, monkeypatch, request):
    """(name, content) -> captions of a file with this content; JSON as small and as large files."""
    if request.param == 'member by member':
        monkeypatch.setattr(json_files, '_AT_ONCE', 1)
        monkeypatch.setattr(json_files, '_CHUNK', 10)

    def read_content(name, content, **options):
        path = tmp_path / name
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)
        return annotation_files.read_captions(path, **options)

    return read_content


# ---- tables of spreadsheets

TIMED = {
    'a.mp4': [sentence('first, chop the onions', 0.5, 1.25)],
    'b.mp4': [sentence('çay', 61.5, 62.0)],
}
# The same two sentences as different programs save them.
EXCEL_GERMAN = (
    'video;start;end;text\r\n'
    'a.mp4;0,5;1,25;first, chop the onions\r\n'
    'b.mp4;01:01,5;00:01:02;çay\r\n'
)
TABLES = {
    'Excel, comma, UTF-8 with its mark': (
        'a.csv',
        '\ufeffVideo,Start,End,Text\r\na.mp4,0.5,1.25,"first, chop the onions"\r\n'
        'b.mp4,1:01.5,1:02,çay\r\n',
    ),
    'Excel in Germany': ('a.csv', '\ufeff' + EXCEL_GERMAN),
    'Excel, the separator in a line of its own': ('a.csv', 'sep=;\r\n' + EXCEL_GERMAN),
    'Excel, Unicode text': ('a.txt', EXCEL_GERMAN.replace(';', '\t').encode('utf-16')),
    'UTF-16 without its mark': ('a.csv', EXCEL_GERMAN.encode('utf-16-le')),
    'old Mac': ('a.csv', EXCEL_GERMAN.replace('\r\n', '\r')),
    'tabs': ('a.tsv', EXCEL_GERMAN.replace(';', '\t')),
    'bars': ('a.csv', EXCEL_GERMAN.replace(';', '|')),
    'rows filled up by the spreadsheet': (
        'a.csv',
        'video,start,end,text,,\na.mp4,0.5,1.25,first, chop the onions\n'
        'b.mp4,61.5,62,çay,,\n,,,,,\n',
    ),
    'names in words': (
        'a.csv',
        'Line,Start (s),End time,File name,Sentence\n1,0.5,1.25,a.mp4,"first, chop the onions"\n'
        '2,61.5 s,62s,b.mp4,çay\n',
    ),
    'durations': (
        'a.csv',
        'path,start,duration,caption\na.mp4,0.5,0.75,first, chop the onions\nb.mp4,61.5,.5,çay\n',
    ),
}


@pytest.mark.parametrize('name, content', TABLES.values(), ids=TABLES.keys())
def test_tables_of_spreadsheets(read, name, content):
    assert read(name, content) == TIMED


@pytest.mark.parametrize(
    'header', ['path,caption', 'video_id,text', 'filename,sentence', 'File,Description']
)
def test_names_of_columns(read, header):
    assert read('a.csv', f'{header}\na.mp4,a dog\n') == {'a.mp4': [sentence('a dog')]}


def test_windows_encodings_are_named_by_the_user(read):
    content = 'video;text\na.mp4;ok\nb.mp4;café “crème”\n'.encode('cp1252')
    with pytest.raises(DataError, match="line 3: expected UTF-8.*'b.mp4;café “crème”'.*cp1252"):
        read('a.csv', content)
    assert read('a.csv', content, encoding='cp1252')['b.mp4'] == [sentence('café “crème”')]
    # The flag is for files that need it.
    assert read('b.csv', 'video,text\na,café\n', encoding='cp1252') == {'a': [sentence('café')]}
    with pytest.raises(DataError, match="expected a name that Python knows .*, got 'windows'"):
        read('a.csv', content, encoding='windows')
    with pytest.raises(DataError, match='line 3: expected UTF-8 or ascii, got the byte 0xe9'):
        read('a.csv', content, encoding='ascii')


# ---- nothing is lost in silence


@pytest.mark.parametrize(
    'row, expected',
    [
        ('a.mp4,0,1,first, chop the onions', sentence('first, chop the onions', 0.0, 1.0)),
        ('a.mp4,,,first, chop, and stir', sentence('first, chop, and stir')),
        ('a.mp4,0:01,,"quoted, too"', sentence('quoted, too', 1.0)),
        ('a.mp4,0,1,"two\nlines, here"', sentence('two\nlines, here', 0.0, 1.0)),
        ('a.mp4,0,1,say ""hi"" twice', sentence('say ""hi"" twice', 0.0, 1.0)),
    ],
)
def test_a_comma_in_a_caption_is_part_of_it(read, row, expected):
    assert read('a.csv', f'video,start,end,text\n{row}\n') == {'a.mp4': [expected]}


def test_a_comma_in_a_caption_without_times(read):
    content = 'path,caption\na.mp4,first, chop the onions\n'
    assert read('a.csv', content) == {'a.mp4': [sentence('first, chop the onions')]}


@pytest.mark.parametrize(
    'content, message',
    [
        # What is before the sentence is no name and times: the comma is elsewhere.
        ('video,start,end,text\nSoup, easy.mp4,0,1,stir\n', 'line 2: expected 4 fields, got 5'),
        ('path,caption\nSoup, easy.mp4,stir\n', 'line 2: expected 2 fields, got 3'),
        ('path,caption\nsoup,first, chop\n', "line 2: .*put a text that holds ',' into"),
        ('text,video\nfirst, chop,a.mp4\n', 'line 2: expected 2 fields, got 3'),
        # Decimal commas between commas.
        ('video,start,end,text\na,0,5,1,5,stir\n', 'line 2: .*with a decimal point'),
        ('video,start,end,text\na,"1,234",,stir\n', "line 2: '1,234' is not a time"),
        # Quotes that are not closed would take the rows behind them.
        ('video,text\na,"5 pizza\nb,stir\n', 'line 2: expected a row of CSV'),
        ('video,text\na,"the "best" one"\n', 'line 2: expected a row of CSV'),
        ('video,text\na,ok\nb,"5\nc,x\na,7"\n', 'line 3: .* before line 5, which looks like'),
        # A merged cell names its video in the first row alone.
        ('video,text\na,ok\n,more\n', "line 3: expected the name of a video in column 'video'"),
        ('video,text,text\na,b,c\n', "different names, got 'text' twice"),
        ('video,Text,text\na,b,c\n', "different names, got 'text' twice"),
        ('video,start,end,tags,text\na,0,1,red, blue,hi\n', 'line 2: expected 5 fields, got 6'),
        ('video,caption,description\na,b,c\n', 'got caption and description'),
        ('video,start_frame,text\na,5,b\n', "got 'start_frame', whose unit is unknown"),
        ('video,start,end_ms,text\na,5,9,b\n', "got 'end_ms', whose unit is unknown"),
        ('video,timestamp,text\na,5,b\n', "in columns start and end .*got 'timestamp'"),
        ('a.mp4,a dog\n', 'expected the columns video,start,end,text, got a.mp4, a dog'),
        ('video,start,end,text\na,0:75,,x\n', "line 2: '0:75' is not a time"),
        ('video,start,end,text\na,00:00:01:12,,x\n', "'00:00:01:12' is not a time"),
        ('video,start,end,text\na,0:02,0:01,x\n', 'it ends .1 s. before it starts .2 s.'),
        ('', 'got an empty file'),
        (b'PK\x03\x04\x00\x00\xff\xff', 'expected text, got binary data'),
    ],
)
def test_what_cannot_be_read_names_its_line(read, content, message):
    with pytest.raises(DataError, match=message):
        read('a.csv', content)


def test_lines_that_begin_like_an_index_are_text(read):
    """The names are in another column, as where pandas has written its index."""
    content = ',video,text\n0,a.mp4,"steps:\n1, chop\n2, stir"\n1,b.mp4,wait\n2,b.mp4,eat\n'
    assert read('a.csv', content)['a.mp4'] == [sentence('steps:\n1, chop\n2, stir')]


def test_a_spreadsheet_is_told_apart(read):
    with pytest.raises(DataError, match='got .xlsx; save the spreadsheet as CSV'):
        read('a.xlsx', b'PK')


@pytest.mark.parametrize('word', ['', 'NaN', 'nan', 'null', 'None', '<NA>', '#N/A'])
def test_words_for_nothing_are_no_captions(read, word):
    content = f'video,start,end,text\na,{word},{word},one\na,1,2,{word}\nb,1,2,{word}\n'
    assert read('a.csv', content) == {'a': [sentence('one')], 'b': []}
    assert read('a.json', json.dumps({'a': ['one', word]})) == {'a': [sentence('one')]}


# ---- JSON


@pytest.mark.parametrize(
    'content, expected',
    [
        ('{"a": null, "b": [null, NaN, "one"]}', {'a': [], 'b': [sentence('one')]}),
        (
            '{"a": [{"start": "0:01", "end": null, "text": "one"}, {"text": NaN}]}',
            {'a': [sentence('one', 1.0)]},
        ),
        # HowTo100M, with its faults: no words, and an end before the start.
        (
            '{"a": {"start": [0, 2, 3], "end": [1, 1, 4], "text": ["hi", "ho", NaN]}}',
            {'a': [sentence('hi', 0.0, 1.0), sentence('ho', 2.0, 2.0)]},
        ),
        (
            '{"a": {"start": [0, 2], "duration": [1, 1.5], "text": ["hi", "ho"]}}',
            {'a': [sentence('hi', 0.0, 1.0), sentence('ho', 2.0, 3.5)]},
        ),
        # ActivityNet Captions.
        (
            '{"v_a": {"duration": 9, "timestamps": [[0.5, 2], [1, 9]], "sentences": ["x", "y"]}}',
            {'v_a': [sentence('x', 0.5, 2.0), sentence('y', 1.0, 9.0)]},
        ),
        # MSR-VTT.
        (
            '{"videos": [{"video_id": "a"}], "sentences": [{"video_id": "a", "caption": "x"}]}',
            {'a': [sentence('x')]},
        ),
        ('[{"path": "a.mp4", "captions": ["x", "y"]}]', {'a.mp4': [sentence('x'), sentence('y')]}),
        ('{"video": "a", "text": "x"}', {'a': [sentence('x')]}),
        # youtube-transcript-api.
        ('{"a": [{"text": "x", "start": 1.5, "duration": 2}]}', {'a': [sentence('x', 1.5, 3.5)]}),
        # Half an emoji cannot be stored.
        (r'{"a": ["hot \ud83d"]}', {'a': [sentence('hot ?')]}),
    ],
)
def test_forms_of_json(read, content, expected):
    assert read('a.json', content) == expected


@pytest.mark.parametrize('name', ['a.jsonl', 'a.ndjson', 'a.json'])
def test_json_lines(read, name):
    lines = ['{"video": "a", "text": "x", "start": 1}', '', '{"b": ["y"]}']
    assert read(name, '\r\n'.join(lines)) == {'a': [sentence('x', 1.0)], 'b': [sentence('y')]}


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('a.json', '{"a": ["x"], "a": ["y"]}', "the name 'a' comes twice in one object"),
        (
            'a.json',
            '{"a": {"start": [0], "end": [1, 2], "text": ["x"]}}',
            'entry 1: expected lists of one length, got 1 texts and 2 times',
        ),
        ('a.json', '{"a": {"text": {"en": "x"}}}', 'entry 1: expected a sentence, got'),
        ('a.json', '{"a": [{"start": true, "text": "x"}]}', 'True is not a time'),
        ('a.json', '{"a": [{"start": Infinity, "text": "x"}]}', 'inf is not a time'),
        ('a.json', '{"a": [{"start_ms": 5, "text": "x"}]}', "got 'start_ms', whose unit"),
        ('a.json', '5', 'expected {video: '),
        ('a.jsonl', '{"video": "a", "text": "x"}\n{"text": "y"}', 'line 2: expected a video name'),
        ('a.jsonl', '{"video": "a", "text": "x"}\n{"video": ', 'line 2 is not readable JSON'),
    ],
)
def test_what_is_wrong_with_json(read, name, content, message):
    with pytest.raises(DataError, match=message):
        read(name, content)


def test_missing_captions_of_annotations(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('{"videos": {"a": {"segments": [{"caption": NaN, "start": "0:01"}]}}}')
    _, annotations = annotation_files.read_annotations(path)
    segment = annotations['a']['segments'][0]
    assert (segment['caption'], segment['start']) == ('', 1.0)


def test_labels_of_a_spreadsheet(tmp_path):
    path = tmp_path / 'l.csv'
    path.write_bytes('\ufefffilename;class\r\na.mp4;run\r\nb.mp4;jump\r\n'.encode())
    classes, _ = annotation_files.read_annotations(path)
    assert classes == {'class': ['jump', 'run']}
    path.write_text('video,class,category\na.mp4,run,sport\n')
    with pytest.raises(DataError, match='expected one field label, got class and category'):
        annotation_files.read_annotations(path)
    path.write_text('video,label\na.mp4,run, fast\n')
    with pytest.raises(DataError, match='line 2: expected 2 fields, got 3'):
        annotation_files.read_annotations(path)


# ---- names

FILES = [
    'Soup for two [abcDEF_12-3].mp4',
    'Stew-ABCdef_12-3.webm',
    'Cake [1080p] [zzzzzzzzzz1].f137.mp4',
    'one/Pie [twice].mp4',
    'two/Tart [twice].mp4',
    'cafe\u0301.mp4',
    'Dog.MP4',
]


@pytest.mark.parametrize(
    'name, expected',
    [
        ('abcDEF_12-3', FILES[0]),
        ('ABCdef_12-3', FILES[1]),
        ('zzzzzzzzzz1', FILES[2]),
        ('https://www.youtube.com/watch?v=abcDEF_12-3&t=5s', FILES[0]),
        ('https://www.youtube.com/watch?app=desktop&v=abcDEF_12-3', FILES[0]),
        ('youtu.be/abcDEF_12-3', FILES[0]),
        ('https://youtube.com/shorts/ABCdef_12-3', FILES[1]),
        ('https://youtu.be/elsewhere_1', None),
        ('1080p', None),
        ('twice', None),
        ('caf\xe9.mp4', FILES[5]),
        ('caf\xe9', FILES[5]),
        ('videos/caf\xe9.mp4', FILES[5]),
        ('/data/videos/one/Pie [twice].mp4', FILES[3]),
        ('videos/Pie [twice].mp4', None),
        ('other/Dog.MP4', None),
        ('/elsewhere/videos/Dog.MP4', None),
    ],
)
def test_names_of_downloads_and_other_systems(name, expected):
    assert file_names.NameResolver(FILES, '/data/videos')(name) == expected


def test_a_file_that_is_called_so_comes_before_an_id():
    resolver = file_names.NameResolver(['Soup [abc].mp4', 'abc.mp4'])
    assert resolver('abc') == 'abc.mp4'


def test_case_counts_only_where_it_decides():
    resolver = file_names.NameResolver(['Dog.MP4', 'sub/cat.mp4'])
    captions = {'dog.mp4': ['x'], 'CAT.mp4': ['y'], 'Cat.mp4': ['z'], 'dog': ['id']}
    matched, unknown = file_names.match_to_files(captions, resolver)
    # Two names claim the cat; an id without a suffix may differ in case alone.
    assert matched == {'Dog.MP4': ['x']}
    assert unknown == ['CAT.mp4', 'Cat.mp4', 'dog']
    exact = {'Dog.MP4': ['x'], 'dog.mp4': ['y']}
    assert file_names.match_to_files(exact, resolver) == ({'Dog.MP4': ['x']}, ['dog.mp4'])


def test_captions_under_the_id_of_a_download(tmp_path):
    videos = tmp_path / 'videos'
    videos.mkdir()
    (videos / FILES[0]).write_bytes(b'')
    (tmp_path / 'c.csv').write_text('video_id,caption\nabcDEF_12-3,soup, hot\n')
    with pytest.raises(DataError, match='line 2: expected 2 fields, got 3'):
        media_catalog.from_folder(str(videos), str(tmp_path / 'c.csv'))
    (tmp_path / 'c.csv').write_text('video_id,caption\nabcDEF_12-3,"soup, hot"\n')
    catalog = media_catalog.from_folder(str(videos), str(tmp_path / 'c.csv'))
    assert catalog.sentences == {FILES[0]: [sentence('soup, hot')]}
