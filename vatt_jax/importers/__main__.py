"""Official checkpoints in, and our models out in the official layout.

    # VATT; without --config, the sizes are read off the checkpoint
    python -m vatt_jax.importers --format=vatt_tf --checkpoint=ckpts/ckpt-500000 \\
        --config=configs/vatt.py:mbs --out=runs/vatt_mbs
    python -m vatt_jax.importers --format=vatt_tf --checkpoint=ckpts/ckpt-500000 --out=runs/vatt
    # the other way
    python -m vatt_jax.importers --format=vatt_tf --export=runs/vatt --out=exported/ckpt-0
    # MMV
    python -m vatt_jax.importers --format=mmv --checkpoint=mmv_s3d.pkl \\
        --config=configs/mmv.py:s3d_fac_vat --out=runs/mmv_s3d
    # CLIP and SigLIP: openai_clip (.pt), open_clip, hf_clip (safetensors), big_vision (.npz)
    python -m vatt_jax.importers --format=openai_clip --checkpoint=ViT-B-32.pt \\
        --vocabulary=bpe_simple_vocab_16e6.txt.gz --out=runs/clip_b32
    # any model of ours for other tools, and back; vatt_jax.load takes that folder, too
    python -m vatt_jax.importers --format=safetensors --export=runs/vatt --out=shared/vatt
    python -m vatt_jax.importers --format=safetensors --checkpoint=shared/vatt --out=runs/again

--out is then a run folder: vatt_jax.load(DIR), vatt-jax --mode=eval --workdir=DIR,
--config.init_from=DIR, or further training in it.
A pickle (mmv, openai_clip) is read without running anything that it asks for.
--vocabulary=FILE (a word a line, <pad> first; of CLIP its merges or tokenizer.json, of SigLIP its
SentencePiece model) makes embed(text=…) work; --classes=FILE names a fine-tuned model's classes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from typing import Any, NoReturn

from vatt_jax.command_line import expand_home

# TensorFlow reads this when it is imported; 3: errors alone.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
CLIP_FORMATS = ('openai_clip', 'open_clip', 'hf_clip', 'big_vision')
FORMATS = ('vatt_tf', 'mmv', 'safetensors', *CLIP_FORMATS)
MOST_LINES = 40  # names of one kind that are printed; the others are counted


def main(argv: list[str]) -> None:
    """Import or export one checkpoint.

    Args:
        argv: the flags, without the name of the program.

    Raises:
        ConfigError: flags, config or checkpoint are wrong.
    """
    # The importers, and models with them, are imported only when the flags are right.
    from vatt_jax import config as configs
    from vatt_jax.config import ConfigError
    from vatt_jax.importers import file_kinds
    from vatt_jax.object_store import check_local

    flags = _parser().parse_args(expand_home(argv))
    check_local(flags.out, '--out')
    if bool(flags.checkpoint) == bool(flags.export):
        # Neither says what to do; both would leave open which of them --out belongs to.
        raise ConfigError('name one of --checkpoint=PREFIX (in) and --export=RUN (out)')
    importer = _importer(flags.format)

    if flags.export:
        count = importer.export_checkpoint(flags.export, flags.out, flags.overwrite)
        # Of a TensorFlow checkpoint --out is the prefix; the index is one of its files.
        suffix = {'vatt_tf': '.index', 'safetensors': '/model.safetensors'}.get(flags.format, '')
        print(f'{count} variables of {flags.export} → {flags.out}{suffix}')
        return

    # Only vatt_tf's importer takes `classes`.
    names: dict[str, Any] = {'vocabulary': _lines(flags.vocabulary)}
    if flags.format in CLIP_FORMATS:
        # No list of words but the file of a library.
        names = {'tokenizer_file': flags.vocabulary}
    if flags.classes:
        if flags.format != 'vatt_tf':
            reasons = {
                'mmv': 'MMV checkpoints have no classifier',
                'safetensors': 'the names of classes are stored beside the model',
            }
            reason = reasons.get(flags.format, 'CLIP has no classifier')
            raise ConfigError(f'--classes: {reason}; leave it out')
        names['classes'] = _lines(flags.classes)
    config, base = None, None
    # The config of a safetensors folder lies in it.
    if flags.config or flags.format != 'safetensors':
        base = _default_config()
    if flags.config:
        config = configs.load(flags.config)
        # A misspelt field fails here, by its name.
        configs.check_fields(config, base)
    file_kinds.check(flags.checkpoint, flags.format)
    config, report = importer.import_checkpoint(flags.checkpoint, flags.out, config, base, **names)
    print(f'{report.read} variables of {flags.checkpoint} → {flags.out} ({config.name})')
    _print_report(report)


def _print_report(report: Any) -> None:
    from vatt_jax.importers.messages import listed

    print(f'position tables resized: {listed(report.resized, MOST_LINES) or "none"}')
    print(f'not used: {listed(report.unused, MOST_LINES) or "none"}')
    # Always none: a variable that is missing is an error.
    print(f'missing: none; optimizer and bookkeeping left alone: {report.bookkeeping} variables')
    if report.not_finite:
        print(
            f'not finite: {len(report.not_finite)} of them hold a NaN or an infinity, as they do '
            f'in the checkpoint: {listed(report.not_finite)}'
        )
    if report.unreadable:
        print(
            f'lost in the file: {len(report.unreadable)} of the optimizer and the like, which are '
            f'not needed: {listed(report.unreadable)}'
        )
    for assumption in report.assumed:
        print(f'assumed: {assumption}')


def _parser() -> argparse.ArgumentParser:
    from vatt_jax.config import ConfigError

    class Parser(argparse.ArgumentParser):
        # argparse prints the usage and exits; here wrong flags fail as wrong configs do.
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f'{message}; see python -m vatt_jax.importers --help')

    # Without abbreviations, so that a flag added later cannot change what a command means.
    parser = Parser(
        prog='python -m vatt_jax.importers',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--format', default='vatt_tf', choices=FORMATS)
    parser.add_argument(
        '--checkpoint',
        default='',
        help='what to import: the file, (vatt_tf) its path without .index, or (safetensors, '
        'open_clip, hf_clip) the folder',
    )
    parser.add_argument('--export', default='', help='a run folder, to be written in this format')
    parser.add_argument(
        '--config',
        default='',
        help='configs/FILE.py[:arg] that the checkpoint must fit; default: inferred from it',
    )
    parser.add_argument(
        '--out',
        required=True,
        help='the run folder to make; with --export, the file, prefix or folder to write',
    )
    parser.add_argument(
        '--vocabulary', default='', help='file of the words of the word table, one a line'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='let --export replace what is at --out'
    )
    parser.add_argument('--classes', default='', help='file of class names, one a line')
    return parser


def _default_config() -> Any:
    from vatt_jax import named_configs

    return named_configs.module('default').get_config()


def _importer(name: str) -> Any:
    """The module of a format: import_checkpoint and export_checkpoint."""
    from vatt_jax.importers import clip, mmv, safetensors_folder, vatt_tf

    if name in CLIP_FORMATS:
        return clip.FORMATS[name]
    return {'vatt_tf': vatt_tf, 'mmv': mmv, 'safetensors': safetensors_folder}[name]


def _lines(path: str) -> list[str] | None:
    """Lines of a text file; None where no file is given."""
    from vatt_jax.config import ConfigError

    if not path:
        return None
    try:
        # A byte order mark, as some editors write, is no part of the first word. Only line ends
        # separate words: other white space may belong to one.
        text = pathlib.Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or f'not UTF-8: {error}'
        raise ConfigError(
            f'{path} cannot be read ({reason}); expected a text file in UTF-8 with one word or '
            'name a line'
        ) from error
    return text.removesuffix('\n').split('\n')


if __name__ == '__main__':
    from vatt_jax.config import ConfigError, fail
    from vatt_jax.run_folder import NotWritten
    from vatt_jax.terminal import use_plain_characters
    from vatt_jax.training.checkpoint import CheckpointNotSaved

    use_plain_characters()
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        fail(str(error))
    # A full disk is no mistake of the user's in the flags: code 1, as of a run.
    except (CheckpointNotSaved, NotWritten) as error:
        print(f'error: {error}', file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # as `fail` does, without waiting for threads
