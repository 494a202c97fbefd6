"""Captions with markup, of speech recognition, mangled by spreadsheets, or cut short."""

import json

import pytest

from data_pipelines.errors import DataError
from data_pipelines.preparation import annotation_files, plain_text, subtitles

FOREVER = float('inf')


def sentence(text, start=0.0, end=FOREVER):
    return {'text': text, 'start': start, 'end': end}


@pytest.fixture
def read(tmp_path):
    """(name, content) -> {video: sentences} of a captions file with this content."""

    def read_content(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return {**annotation_files.read_captions(path)}

    return read_content


# ---- Markup.


@pytest.mark.parametrize(
    'text, expected',
    [
        ('Tom &amp; Jerry', 'Tom & Jerry'),
        ('it&#39;s &quot;fine&quot;', 'it\'s "fine"'),
        ('3 &lt; 5', '3 < 5'),
        ('twice &amp;amp; escaped', 'twice & escaped'),
        ('<i>one</i> <b class="x">two</b>', 'one two'),
        ('one<br>two<br/>three<BR />four', 'one two three four'),
        ('<p>one</p><p>two</p>', ' one  two '),
        ('{\\an8}up there', 'up there'),
        ('<v Bob>hello</v>', 'hello'),
        # What looks like markup and is none.
        ('AT&T and R&not', 'AT&T and R&not'),
        ('a < b and c > d', 'a < b and c > d'),
        ('I <3 you', 'I <3 you'),
        ('<unknown> stays', '<unknown> stays'),
        ('C:\\Names', 'C:\\Names'),
    ],
)
def test_markup_is_no_part_of_a_sentence(read, text, expected):
    assert plain_text.plain(text) == expected
    content = json.dumps({'a.mp4': text})
    assert read('a.json', content) == {'a.mp4': [sentence(expected)]}


# ---- Speech recognition.

WHISPER = {
    'text': ' Hello there. Goodbye.',
    'segments': [
        {'id': 0, 'start': 0.0, 'end': 1.5, 'text': ' Hello there.', 'tokens': [1, 2]},
        {'id': 1, 'start': 2.0, 'end': 3.0, 'text': ' Goodbye.', 'tokens': [3]},
    ],
    'language': 'en',
}
SAID = [sentence(' Hello there.', 0.0, 1.5), sentence(' Goodbye.', 2.0, 3.0)]


@pytest.mark.parametrize(
    'name, content, expected',
    [
        ('clip 1.json', WHISPER, {'clip 1': SAID}),
        (
            'all.json',
            {'a.mp4': WHISPER, 'b.mp4': 'by hand'},
            {'a.mp4': SAID, 'b.mp4': [sentence('by hand')]},
        ),
        ('all.json', [{'video': 'a.mp4', **WHISPER}], {'a.mp4': SAID}),
        ('all.json', {'a.mp4': {'segments': WHISPER['segments']}}, {'a.mp4': SAID}),
    ],
)
def test_sentences_with_times_come_before_the_whole_text(read, name, content, expected):
    assert read(name, json.dumps(content)) == expected


def test_lists_under_the_suffix_of_lines(read):
    content = '[\n{"video": "a", "text": "x"},\n{"video": "b", "text": "y"}\n]\n'
    assert read('a.jsonl', content) == {'a': [sentence('x')], 'b': [sentence('y')]}


# ---- Spreadsheets.


@pytest.mark.parametrize('row', ['#NAME?,hello', 'a.mp4,#NAME?', 'a.mp4,#REF!', '#DIV/0!,x'])
def test_what_a_spreadsheet_could_not_compute(read, row):
    with pytest.raises(DataError, match=r'line 3: expected a text, got .*spreadsheet'):
        read('a.csv', f'video,text\nb.mp4,fine\n{row}\n')


@pytest.mark.parametrize('line', ['sep=;', '"sep=;"', 'SEP=;', 'sep=; '])
def test_the_separator_in_a_line_of_its_own(read, line):
    assert read('a.csv', f'{line}\r\nvideo;text\r\na.mp4;hi\r\n') == {'a.mp4': [sentence('hi')]}


def test_a_tab_in_a_line_of_its_own(read):
    assert read('a.csv', 'sep=\t\nvideo\ttext\na.mp4\thi\n') == {'a.mp4': [sentence('hi')]}


def test_null_of_databases(read):
    assert read('a.csv', 'video,start,text\na.mp4,\\N,hi\nb.mp4,1,\\N\n') == {
        'a.mp4': [sentence('hi')],
        'b.mp4': [],
    }


@pytest.mark.parametrize(
    'time, seconds',
    [('1h02m03s', 3723.0), ('1H', 3600.0), ('2m', 120.0), ('1m30s', 90.0), ('90.5s', 90.5)],
)
def test_times_in_letters(read, time, seconds):
    content = f'video,start,text\na.mp4,{time},hi\n'
    assert read('a.csv', content) == {'a.mp4': [sentence('hi', seconds)]}


@pytest.mark.parametrize('time', ['1h 2', 'h', 's', '1s2m', '5 min', '1500ms'])
def test_letters_that_are_no_times(read, time):
    with pytest.raises(DataError, match='is not a time in seconds'):
        read('a.csv', f'video,start,text\na.mp4,{time},hi\n')


# ---- Other files.


@pytest.mark.parametrize(
    'name, remedy',
    [
        ('a.parquet', 'save the table as CSV'),
        ('a.xlsx', 'save the spreadsheet as CSV'),
        ('a.tar', 'unpack it first'),
        ('a.csv.gz', 'unpack it first'),
        ('a.ttml', 'convert it to SRT'),
        ('a.json3', 'convert it to SRT'),
        ('a.ASS', 'convert it to SRT'),
        ('a.docx', 'save it as plain text'),
    ],
)
def test_what_to_do_about_other_files(read, name, remedy):
    with pytest.raises(DataError, match=remedy):
        read(name, b'anything')


def test_folders_are_no_files(tmp_path):
    (tmp_path / 'a.csv').mkdir()
    with pytest.raises(DataError, match='expected a file, got a folder'):
        annotation_files.read_captions(tmp_path / 'a.csv')


def test_json_without_end(read):
    with pytest.raises(DataError, match='nested too deeply'):
        read('a.json', '[' * 200_000 + ']' * 200_000)


def test_text_that_looks_binary(read):
    with pytest.raises(DataError, match='name that: --encoding'):
        read('a.csv', ('video,text\na.mp4,' + '视频' * 400).encode('utf-16-le'))


# ---- Subtitles.


def said(text):
    return [(cue['text'], cue['start'], cue['end']) for cue in subtitles.parse(text, 'a.srt')]


@pytest.mark.parametrize('arrow', ['-->', '->', '–>', '—>', '→', ' --> '])
def test_arrows_as_people_type_them(arrow):
    text = f'1\n00:00:01,000{arrow}00:00:02,000\nhi\n\n2\n00:00:03,000 --> 00:00:04,000\nho\n'
    assert said(text) == [('hi', 1.0, 2.0), ('ho', 3.0, 4.0)]


def test_malformed_times_are_told_whatever_their_arrow():
    for line in ('1.5 --> 2.5', '00:00:01:12 -> 00:00:02:00', '-0:01 → 0:02'):
        text = f'1\n00:00:01,000 --> 00:00:02,000\nhi\n\n2\n{line}\nho\n'
        with pytest.raises(DataError, match='line 6: expected times'):
            said(text)


def test_line_breaks_of_ass():
    text = '1\n00:00:01,000 --> 00:00:02,000\n{\\an8}one\\Ntwo\\hthree\n'
    assert said(text) == [('one two three', 1.0, 2.0)]


def test_arrows_in_speech():
    text = '1\n00:00:01,000 --> 00:00:02,000\npress A -> B, then 1 -> go\n'
    assert said(text) == [('press A -> B, then 1 -> go', 1.0, 2.0)]


@pytest.mark.parametrize(
    'rest', ['00:00:03,0', '00:00:03,000 -', '00:00:03,000 --> 00:0', '00:00:03,']
)
def test_a_file_cut_within_times(rest):
    text = f'1\n00:00:01,000 --> 00:00:02,000\nhi\n\n2\n{rest}'
    assert said(text) == [('hi', 1.0, 2.0)]


def test_pictures_to_choose_from_are_not_said():
    text = 'WEBVTT\n\n00:00.000 --> 00:05.000\nsprite.jpg#xywh=0,0,160,90\n'
    assert said(text) == []
