"""Subtitle files beside the videos become sentences, each line once and one file a video."""

import numpy as np
import pytest
from clocks import FPS, RATE, clock

from data_pipelines import media, prepare
from data_pipelines.errors import DataError
from data_pipelines.preparation import annotation_files, media_catalog, subtitles
from data_pipelines.storage.records import Prepared, Split

# What YouTube's automatic subtitles look like: two lines, of which the upper is the one before,
# the time of every word, and a cue of 10 ms in which a line moves up.
ROLLING_VTT = """WEBVTT
Kind: captions
Language: en

00:00:00.080 --> 00:00:02.389 align:start position:0%
\x20
hello<00:00:00.480><c> and</c><00:00:00.640><c> welcome</c>

00:00:02.389 --> 00:00:02.399 align:start position:0%
hello and welcome
\x20

00:00:02.399 --> 00:00:04.950 align:start position:0%
hello and welcome
to<00:00:02.639><c> my</c><00:00:02.879><c.colorE5E5E5> kitchen</c>

00:00:04.950 --> 00:00:04.960 align:start position:0%
to my kitchen
\x20

00:00:04.960 --> 00:00:06.950 align:start position:0%
to my kitchen
[Music]
"""
ROLLING = [
    {'text': 'hello and welcome', 'start': 0.08, 'end': 2.389},
    {'text': 'to my kitchen', 'start': 2.399, 'end': 4.95},
    {'text': '[Music]', 'start': 4.96, 'end': 6.95},
]
# The same as SRT, as yt-dlp converts it.
ROLLING_SRT = """1
00:00:00,080 --> 00:00:02,389
hello and welcome

2
00:00:02,389 --> 00:00:02,399
hello and welcome

3
00:00:02,399 --> 00:00:04,950
hello and welcome
to my kitchen

4
00:00:04,950 --> 00:00:04,960
to my kitchen

5
00:00:04,960 --> 00:00:06,950
to my kitchen
[Music]
"""


def parse(text):
    return subtitles.parse(text, 'x')


def texts(text):
    return [sentence['text'] for sentence in parse(text)]


@pytest.mark.parametrize(
    'text',
    [
        ROLLING_VTT,
        ROLLING_SRT,
        # Editors remove the spaces of empty lines.
        ROLLING_VTT.replace('\n \n', '\n\n'),
    ],
)
def test_rolling_lines_come_once(text):
    assert parse(text) == ROLLING


def timed(*lines):
    """SRT in which the lines follow one another, half a second each."""
    cues = []
    for i, line in enumerate(lines):
        times = f'00:00:{i / 2:06.3f} --> 00:00:{(i + 1) / 2:06.3f}'
        cues.append(f'{i + 1}\n{times}\n{line}\n')
    return '\n'.join(cues)


def test_lines_that_grow_or_are_highlighted_come_once():
    """Word by word, as live subtitles and Whisper's highlighted words do."""
    expected = [
        {'text': 'hello and welcome', 'start': 0.0, 'end': 1.5},
        {'text': 'to my kitchen', 'start': 1.5, 'end': 3.0},
    ]
    grown = timed('hello', 'hello and', 'hello and welcome', 'to', 'to my', 'to my kitchen')
    assert parse(grown) == expected
    highlighted = timed(
        '<u>hello</u> and welcome',
        'hello <u>and</u> welcome',
        'hello and <u>welcome</u>',
        '<u>to</u> my kitchen',
        'to <u>my</u> kitchen',
        'to my <u>kitchen</u>',
    )
    assert parse(highlighted) == expected
    # Once among many cues it is what was said.
    once = ['no', 'no way', 'one', 'two', 'three', 'four']
    assert texts(timed(*once)) == once


@pytest.mark.parametrize(
    'times', ['00:00:01:500 --> 00:00:02:000', '-00:00:01,000 --> 00:00:02,000', '0:1x --> 0:02']
)
def test_times_that_are_malformed_are_no_words(times):
    srt = timed('one', 'two') + f'\n3\n{times}\nthree\n'
    with pytest.raises(DataError, match='x, line 10: expected times such as'):
        parse(srt)


def test_what_is_said_twice_stays():
    srt = '1\n00:00:01,000 --> 00:00:02,000\nNo.\n\n2\n00:00:02,000 --> 00:00:03,000\nNo.\n'
    assert texts(srt) == ['No.', 'No.']


def test_tags_comments_and_names_are_no_words():
    vtt = (
        'WEBVTT - a title\n\nNOTE\nmade by hand\n\nSTYLE\n::cue { color: red }\n\n'
        'intro\n00:01.000 --> 00:02.500 line:0\n<v Roger>Heat <i.loud>oil</i> &amp; wait\n\n'
        'NOTE the end\n\nthe last one\n01:00:02.500 --> 01:00:03.000\n3 < 5 &gt;&gt; 2\n'
    )
    assert parse(vtt) == [
        {'text': 'Heat oil & wait', 'start': 1.0, 'end': 2.5},
        {'text': '3 < 5 >> 2', 'start': 3602.5, 'end': 3603.0},
    ]
    srt = '1\n00:00:01,000 --> 00:00:02,000\n{\\an8}<font color="#fff">up</font>\n<b>there</b>\n'
    assert texts(srt) == ['up there']


def test_files_that_keep_to_no_standard():
    """Blank lines inside a cue, none between cues, numbers that are spoken, no milliseconds."""
    srt = (
        '\n1\n00:00:01 --> 00:00:02\nheat\n\noil\n2\n0:00:02,5 --> 00:00:02.100\n10\n'
        '\n00:00:03,000 --> 00:00:04,000\nwait\n\nand stir\n00:00:04,000 --> 00:00:05,000\neat\n'
    )
    assert parse(srt) == [
        {'text': 'heat oil', 'start': 1.0, 'end': 2.0},
        {'text': '10', 'start': 2.5, 'end': 2.5},
        {'text': 'wait and stir', 'start': 3.0, 'end': 4.0},
        {'text': 'eat', 'start': 4.0, 'end': 5.0},
    ]


def test_downloads_of_youtube_studio():
    sbv = '0:00:00.599,0:00:04.160\nhello[br]there\n\n0:00:04.160,0:00:05.000\nbye\n'
    assert texts(sbv) == ['hello there', 'bye']


def test_a_page_is_no_subtitle():
    with pytest.raises(DataError, match="expected subtitles with lines such as .* got '<html>'"):
        parse('<html>\n404\n')
    assert parse('WEBVTT\n\n') == []


def test_one_file_is_the_captions_of_its_video(tmp_path):
    path = tmp_path / 'Mr. Soup.en.srt'
    path.write_bytes(ROLLING_SRT.replace('\n', '\r\n').encode('utf-16'))
    assert annotation_files.read_captions(path) == {'Mr. Soup': ROLLING}


# ---- which file is of which video


def srt(text):
    return f'1\n00:00:00,000 --> 00:00:01,000\n{text}\n'


@pytest.fixture
def sentences_of(tmp_path):
    """({file name: text}, names of videos) -> {video: the text that it has}, and the catalog."""

    def catalog_of(files, videos, captions=''):
        folder = tmp_path / 'videos'
        for video in videos:
            path = folder / video
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b'')
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = text if isinstance(text, bytes) else srt(text).encode()
            path.write_bytes(content)
        catalog = media_catalog.from_folder(str(folder), captions)
        found = {}
        for video, sentences in catalog.sentences.items():
            found[video] = ' / '.join(sentence['text'] for sentence in sentences)
        return found, catalog

    return catalog_of


@pytest.mark.parametrize(
    'video, subtitle',
    [
        ('abc.mp4', 'abc.srt'),
        ('abc.mp4', 'abc.en.vtt'),
        ('abc.mp4', 'abc.en-US.vtt'),
        ('abc.mp4', 'abc.mp4.srt'),
        ('abc.mp4', 'abc.EN.SRT'),
        ('abc.mp4', 'abc.en.auto.srt'),
        ('abc.wav', 'abc.srt'),
        ('Mr. Smith.mp4', 'Mr. Smith.srt'),
        ('Mr. Smith.mp4', 'Mr. Smith.en.srt'),
        ('a/Soup [abcDEF_12-3].mp4', 'a/Soup [abcDEF_12-3].en.vtt'),
        ('a/Soup [abcDEF_12-3].mp4', 'subtitles/abcDEF_12-3.en.vtt'),
        ('videos/abc.mp4', 'subtitles/abc.srt'),
        ('cafe\u0301.mp4', 'caf\xe9.en.srt'),
    ],
)
def test_names_of_subtitle_files(sentences_of, video, subtitle):
    assert sentences_of({subtitle: 'here'}, [video])[0] == {video: 'here'}


def test_a_video_of_another_name_is_not_meant(sentences_of):
    files = {'soup.srt': 'soup', 'soup.part2.srt': 'other', '._soup.srt': b'\0\5\x16\7'}
    found, catalog = sentences_of(files, ['soup.mp4', 'stew.mp4'])
    assert found == {'soup.mp4': 'soup'}
    assert catalog.missing == ['soup.part2.srt']
    assert not catalog.skipped


@pytest.mark.parametrize(
    'files, expected',
    [
        # What people wrote comes before what was recognised.
        ({'a.en-orig.vtt': 'auto', 'a.en.vtt': 'manual'}, 'manual'),
        ({'a.en-orig.vtt': 'auto', 'a.en-eEY6OEpapPo.vtt': 'manual'}, 'manual'),
        ({'a.en.auto.srt': 'auto', 'a.en-GB.srt': 'manual'}, 'manual'),
        ({'a.de.srt': 'deutsch', 'a.en.srt': 'english'}, 'english'),
        ({'a.de.srt': 'deutsch', 'a.srt': 'its own'}, 'its own'),
        ({'a.en.srt': 'the same', 'a.en.vtt': 'the same'}, 'the same'),
        # The language of the others.
        (
            {'a.de.srt': 'deutsch', 'a.en.srt': 'english', 'b.de.srt': 'x', 'c.de.srt': 'y'},
            'deutsch',
        ),
    ],
)
def test_one_of_several_tracks_is_read(sentences_of, files, expected):
    found, catalog = sentences_of(files, ['a.mp4', 'b.mp4', 'c.mp4'])
    assert found['a.mp4'] == expected
    is_choice = len({name.rpartition('.')[0] for name in files}) > 1
    remark = '1 media files have several subtitle files'
    assert any(remark in text for text in catalog.remarks) == is_choice


def test_what_cannot_be_read_stops_nothing(sentences_of):
    files = {
        'a.srt': 'fine',
        'b.en.srt': b'<html>not found</html>',
        'c.srt': srt('café').encode('cp1252'),
        'c.json3': 'x',
    }
    found, catalog = sentences_of(files, ['a.mp4', 'b.mp4', 'c.mp4'])
    assert found == {'a.mp4': 'fine'}
    assert 'expected subtitles' in catalog.skipped['b.en.srt']
    assert '--encoding=cp1252' in catalog.skipped['c.srt']
    assert any('convert them to SRT' in text for text in catalog.remarks)


def test_captions_are_a_folder_or_none(sentences_of, tmp_path):
    german = tmp_path / 'german'
    german.mkdir()
    (german / 'a.de.srt').write_text(srt('hallo'))
    files = {'a.en.srt': 'hello'}
    assert sentences_of(files, ['a.mp4'], str(german))[0] == {'a.mp4': 'hallo'}
    found, catalog = sentences_of(files, ['a.mp4'], media_catalog.NO_CAPTIONS)
    assert (found, catalog.identity['captions']) == ({}, '')
    (german / 'a.de.srt').unlink()
    with pytest.raises(DataError, match='expected a file, or a folder with subtitle files'):
        sentences_of(files, ['a.mp4'], str(german))


def test_prepared_with_the_subtitles_beside_it(tmp_path, capsys):
    videos = tmp_path / 'videos'
    videos.mkdir()
    frames, audio = clock(2.0, 32, 48)
    media.write_mp4(videos / 'Soup [abcDEF_12-3].mp4', frames, FPS, audio, RATE)
    subtitle = videos / 'Soup [abcDEF_12-3].en.vtt'
    subtitle.write_text(ROLLING_VTT)
    arguments = [f'--videos={videos}', f'--out={tmp_path / "out"}', f'--fps={FPS}', '--size=32']
    arguments += [f'--rate={RATE}', '--processes=1', '--validation=0', '--test=0']
    assert prepare.main(arguments) == 0
    assert 'sentences from the subtitle files of 1 media files (1 en)' in capsys.readouterr().out
    index = Split(Prepared(tmp_path / 'out'), 'train').index
    # The others begin behind the end of the video.
    assert list(index.sentence_text) == ['hello and welcome']
    np.testing.assert_allclose(index.sentence_end, [2.0], atol=0.1)
    # Other subtitles make another dataset.
    subtitle.write_text(ROLLING_VTT.replace('hello', 'hi'))
    assert prepare.main(arguments) == 2
    assert 'already prepared with other captions' in capsys.readouterr().err
