"""Both pipelines of docs/socratic.md on the playground: numbers, and a page with every step.

    python -m vatt_jax.socratic --workdir=runs/clip_video
    python -m vatt_jax.socratic --workdir=runs/clip --hearing=runs/clip_video

--workdir is a run whose model has pictures and words in one space, --hearing one with sound and
words (by default the same). The clips are those of the dataset that --workdir was evaluated on.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vatt_jax import api
from vatt_jax import config as configs
from vatt_jax.command_line import expand_home
from vatt_jax.config import ConfigError
from vatt_jax.socratic import page, playground
from vatt_jax.socratic.graph import Log
from vatt_jax.socratic.playground import Clips, Share
from vatt_jax.socratic.scorers import ModelScorer

# TensorFlow, which reads the records, need not introduce itself.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
BATCH_SIZE = 64


def main(argv: list[str]) -> None:
    """Runs both pipelines, prints what they came to and writes the page.

    Args:
        argv: the flags, without the name of the program.

    Raises:
        ConfigError: a flag is wrong, or a run cannot be used for this.
    """
    flags = _parser().parse_args(expand_home(argv))
    if flags.limit < 2 or flags.examples < 0:
        raise ConfigError(
            f'--limit, --examples: expected at least 2 and 0, got {flags.limit}, {flags.examples}'
        )
    seeing = api.load(flags.workdir)
    listening = api.load(flags.hearing) if flags.hearing else seeing
    see, hear = ModelScorer(seeing, 'video'), ModelScorer(listening, 'audio')
    data = open_data(flags.workdir)
    clips = encode(seeing, listening, data, flags.split, flags.limit, flags.examples)
    activity = playground.run_activity(see, hear, clips)
    heard = playground.run_hearing(hear, clips)
    tables = [
        activity_table(playground.activity_shares(activity, see, clips), clips),
        hearing_table(playground.hearing_shares(heard, clips)),
        retrieval_table(playground.retrieval_shares(heard, see, hear, clips), clips),
    ]
    print_tables(tables)
    examples = shown_examples(activity, heard, clips, data.config.model.inputs.audio.rate)
    out = pathlib.Path(flags.out or pathlib.Path(flags.workdir) / 'socratic')
    page.write(out / 'index.html', f'Socratic models: {seeing.config.name}', tables, examples)
    print(f'page: {out / "index.html"}')


def open_data(workdir: str) -> Any:
    """The data object of a run.

    Raises:
        ConfigError: the folder holds no run.
    """
    from vatt_jax import named_configs

    config = configs.stored(workdir)
    if config is None:
        raise ConfigError(f'--workdir={workdir} holds no run (no config.json)')
    import data_pipelines

    return data_pipelines.open(
        configs.fill_missing(config, named_configs.module('default').get_config())
    )


def encode(seeing: Any, listening: Any, data: Any, split: str, limit: int, num_shown: int) -> Clips:
    """The first clips of a split, with the embeddings of both models.

    Args:
        seeing: model of pictures and words.
        listening: model of sound and words.
        data: the data object.
        split: of the data.
        limit: most clips.
        num_shown: clips whose pictures and sound are kept, evenly over the split.

    Raises:
        ConfigError: the data are no playground, or no clip has pictures and sound.
    """
    names = {label: list(classes) for label, classes in data.info.get('labels', {}).items()}
    playground.check_names(names)
    texts = data.texts(split, 'segments')
    wanted = set(np.linspace(0, min(limit, len(texts)) - 1, num_shown).astype(int).tolist())
    embedded: list[dict[str, Any]] = []
    captions: list[str] = []
    labels: dict[str, list[str]] = {label: [] for label in playground.LABELS}
    shown = {}
    left_out = 0
    for batch in data.one_pass(split, BATCH_SIZE, by='segments', limit=limit):
        video = seeing.embed(video=batch['video']['data'], quiet=True)['video']
        audio = listening.embed(audio=batch['audio']['data'], quiet=True)['audio']
        for row in np.flatnonzero(batch['valid']).tolist():
            if not (batch['video']['valid'][row] and batch['audio']['valid'][row]):
                left_out += 1
                continue
            place = int(batch['position'][row])
            if place in wanted:
                pictures, samples = batch['video']['data'][row], batch['audio']['data'][row]
                shown[len(embedded)] = (pictures.copy(), samples.copy())
            embedded.append({'video': _row(video, row), 'audio': _row(audio, row)})
            captions.append(texts[place]['caption'])
            for label, found in labels.items():
                found.append(names[label][int(batch['labels'][label][row])])
    if len(embedded) < 2:
        raise ConfigError(f'--split={split}: expected two clips or more with pictures and sound')
    chosen = {label: names[label] for label in playground.LABELS}
    return Clips(embedded, captions, labels, chosen, shown, left_out)


def _row(embedded: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    """One clip of what `embed` returned."""
    return {space: rows[row] for space, rows in embedded.items() if space != 'valid'}


def activity_table(shares: Mapping[str, Mapping[str, Share]], clips: Clips) -> page.Table:
    """Right answers of the six steps."""
    hint = (
        f'Share of {len(clips.embedded)} clips whose likeliest activity names the right one, with '
        'its 95 % interval.'
    )
    if clips.left_out:
        hint += f' {clips.left_out} without pictures or sound are left out.'
    rows = []
    for label in playground.LABELS:
        found = [by_label[label] for by_label in shares.values()]
        rows.append([label, *map(_text, found), f'{100 * found[0].chance:.1f} %'])
    return page.Table('Six steps to an activity', hint, ['', *shares, 'chance'], rows)


def hearing_table(shares: Mapping[str, Share]) -> page.Table:
    """Right answers of the ear alone."""
    hint = 'Share of clips whose summary of the sound names the right one.'
    rows = []
    for label, share in shares.items():
        rows.append([label, _text(share), f'{100 * share.chance:.1f} %'])
    return page.Table('What is heard', hint, ['', 'summary', 'chance'], rows)


def retrieval_table(shares: Mapping[str, Mapping[str, Share]], clips: Clips) -> page.Table:
    """Retrieval before and after re-ranking."""
    hint = (
        f'{len(clips.embedded)} clips and their captions, the first 100 ranked anew. words: by '
        'what is said of the sound; direct: by the sound itself; others: by what is said of other '
        'clips; truth: by what was heard in truth. product: as published; standard: the sum of '
        'both scores, each less its mean over its deviation.'
    )
    first = next(iter(shares.values()))
    rows = [[name, *map(_text, by_k.values())] for name, by_k in shares.items()]
    rows.append(['chance', *(f'{100 * share.chance:.1f} %' for share in first.values())])
    return page.Table('Retrieval, re-ranked by the sound', hint, ['', *first], rows)


def _text(share: Share) -> str:
    low, high = share.interval
    return f'{100 * share.value:.1f} % ({100 * low:.1f} – {100 * high:.1f})'


def shown_examples(
    activity: Sequence[Log], heard: Sequence[Log], clips: Clips, rate: int
) -> list[page.Example]:
    """Every step of both pipelines on the clips whose pictures were kept."""
    examples = []
    for number, (frames, samples) in clips.shown.items():
        for title, logs in (('What happens', activity), ('What is heard', heard)):
            # The second of a clip shows the steps alone.
            media: dict[str, Any] = {'frames': frames, 'samples': samples, 'rate': rate}
            if title == 'What is heard':
                media = {}
            title = f'{title}: clip {number}'
            examples.append(page.Example(title, clips.captions[number], logs[number], **media))
    return examples


def print_tables(tables: Sequence[page.Table]) -> None:
    """The tables as text."""
    for table in tables:
        lines = [list(table.header), *(list(row) for row in table.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
        print(f'{table.title}. {table.hint}')
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            print('  '.join(cells).rstrip())
        print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m vatt_jax.socratic',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--workdir', required=True, help='run of the model that sees')
    parser.add_argument('--hearing', default='', help='run of the model that hears')
    parser.add_argument('--split', default='test')
    parser.add_argument('--limit', type=int, default=768, help='most clips')
    parser.add_argument('--examples', type=int, default=4, help='clips on the page')
    parser.add_argument('--out', default='', help='folder of the page; default: WORKDIR/socratic')
    return parser


if __name__ == '__main__':
    from data_pipelines.errors import DataError
    from vatt_jax.terminal import use_plain_characters

    use_plain_characters()
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError) as error:
        configs.fail(str(error))
