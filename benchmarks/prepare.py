"""What preparing a thousand clips of each named dataset takes: disk and time, from a few files of its form and length.

    python benchmarks/prepare.py            # some minutes
    python benchmarks/prepare.py --quick    # one file of each

For each dataset files are made with the codecs, picture size, rates and typical length of its clips (FORMS; the pictures are those of
input_pipeline.py), and go through data_pipelines.prepare's own decoding with its default settings (10 frames a second of short side 256, JPEG of
quality 90, sound at 48 kHz). Written are bytes of records, CPU seconds for a thousand clips, and half of these as the minutes on two cores. Videos of
minutes are measured on 30 s and scaled. What is not in it: reading slow disks, and writing the records, a copy. Real videos compress and decode
differently: take the numbers as sizes of orders. Writes benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import fractions
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import av
import input_pipeline
import numpy as np
from PIL import Image

from data_pipelines.preparation import decoded_files

# name -> (container, video codec, width, height, fps, sound codec, sound rate, seconds of a clip, seconds measured)
WEB = ('mp4', 'libx264', 340, 256, 30, 'aac', 44100)
FORMS = {
    'ucf101': ('avi', 'mpeg4', 320, 240, 25, 'mp3', 44100, 7.2, 7.2),
    'hmdb51': ('avi', 'mpeg4', 320, 240, 30, '', 0, 3.2, 3.2),
    'kinetics400, 600, 700': (*WEB, 10, 10),
    'moments_in_time': (*WEB, 3, 3),
    'esc50': ('wav', '', 0, 0, 0, 'pcm_s16le', 44100, 5, 5),
    'audioset': (*WEB, 10, 10),
    'vggsound': (*WEB, 10, 10),
    'ave': (*WEB, 10, 10),
    'youcook2': (*WEB, 316, 30),
    'msrvtt, msrvtt_full': ('mp4', 'libx264', 320, 240, 30, 'aac', 44100, 15, 15),
    'howto100m': (*WEB, 390, 30),
    'imagenet': ('JPEG', '', 500, 375, 0, '', 0, 0, 0),
}


def write(path: str, form: tuple, number: int) -> None:
    container, codec, width, height, fps, sound, rate, _, seconds = form
    frames, pcm = input_pipeline.clip(number)
    scaled = lambda i: Image.fromarray(frames[i]).resize((width, height))
    if container == 'JPEG':
        scaled(0).save(path, 'JPEG', quality=92)
        return
    with av.open(path, 'w') as out:
        tracks = []
        if codec:
            options = (
                {'crf': '23', 'preset': 'veryfast', 'threads': '1'}
                if codec == 'libx264'
                else {'qmin': '3', 'qmax': '6', 'threads': '1'}
            )
            v = out.add_stream(codec, rate=fractions.Fraction(fps), options=options)
            v.width, v.height, v.pix_fmt = width, height, 'yuv420p'
            if codec == 'mpeg4':
                v.bit_rate = 1_500_000
            tracks.append(
                (
                    v,
                    [
                        av.VideoFrame.from_ndarray(
                            np.asarray(scaled(i * 10 // fps % len(frames))), format='rgb24'
                        )
                        for i in range(round(seconds * fps))
                    ],
                )
            )
        if sound:
            a = out.add_stream(sound, rate=rate, layout='stereo')
            both = np.repeat(np.resize(pcm, round(seconds * rate)), 2)[None]
            whole = av.AudioFrame.from_ndarray(both, format='s16', layout='stereo')
            whole.sample_rate, whole.pts = rate, 0
            fit = av.AudioResampler(
                format=a.codec_context.codec.audio_formats[0].name, layout='stereo', rate=rate
            )
            tracks.append((a, [*fit.resample(whole), *fit.resample(None)]))
        for stream, pieces in tracks:
            for piece in pieces:
                out.mux(stream.encode(piece))
            out.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--files', type=int, default=3, help='of each dataset')
    parser.add_argument('--quick', action='store_true', help='one file of each, no result file')
    flags = parser.parse_args()
    number = 1 if flags.quick else flags.files
    table = {}
    print(
        f'{"":24s} {"GB for JPEG":>12s} {"for H.264":>10s} {"minutes on two cores":>21s} {"for H.264":>10s}     (1000 clips)'
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, form in FORMS.items():
            row = {'form': list(form)}
            for store, crf in (('jpeg', 0), ('h264', 23)):
                spent, size = [], []
                for i in range(number):
                    path = f'{folder}/{name[:4]}{i}.{form[0]}'
                    if not os.path.exists(path):
                        write(path, form, i)
                    settings, target = (
                        decoded_files.Settings(10.0, 256, 48000, 90, 0.0, crf),
                        f'{folder}/staged/{store}',
                    )
                    began = input_pipeline.cpu()
                    decoded_files.stage_file(decoded_files.File(path, path, 0, 0), settings, target)
                    spent.append(input_pipeline.cpu() - began)
                    head = decoded_files.header(pathlib.Path(target))
                    if 'skipped' in head:
                        raise SystemExit(f'{path}: {head["skipped"]}')
                    size.append(os.path.getsize(target))
                scale = form[7] / form[8] if form[8] else 1.0
                row[store] = {
                    'bytes': round(scale * statistics.mean(size)),
                    'cpu_seconds': round(scale * statistics.mean(spent), 3),
                }
            table[name] = row
            both = [row[s] for s in ('jpeg', 'h264')]
            print(
                f'{name:24s} {both[0]["bytes"] / 1e6:12.2f} {both[1]["bytes"] / 1e6:10.2f} {both[0]["cpu_seconds"] * 1000 / 120:21.1f} '
                f'{both[1]["cpu_seconds"] * 1000 / 120:10.1f}',
                flush=True,
            )
    if flags.quick:
        return
    commit = subprocess.run(
        ['git', '-C', str(ROOT), 'rev-parse', 'HEAD'], capture_output=True, text=True
    ).stdout.strip()
    (ROOT / 'benchmarks/results/prepare.json').write_text(
        json.dumps(
            {
                'commit': commit,
                'machine': f'{platform.machine()}, {os.cpu_count()} cores',
                'files': number,
                'datasets': table,
            },
            indent=1,
        )
        + '\n'
    )


if __name__ == '__main__':
    main()
