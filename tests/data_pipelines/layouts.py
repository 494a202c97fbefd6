"""Miniature copies of what the owners of named datasets distribute. Each function fills a folder; media are links to files encoded once."""

import fractions
import json
import os
import pathlib

import av
import numpy as np
from clocks import FPS, RATE, clock, write_wav
from PIL import Image

from data_pipelines import media


def encode(
    path,
    frames,
    audio,
    video_codec,
    audio_codec,
    pixels='yuv420p',
    tag=None,
    rate=RATE,
    source_rate=RATE,
):
    """uint8 [T H W 3] and int16 [S] (either may be None) -> a file of the container that the suffix says."""
    with av.open(str(path), 'w') as container:
        tracks = []
        if frames is not None:
            video = container.add_stream(
                video_codec,
                rate=fractions.Fraction(FPS),
                options={'threads': '1', 'qmin': '2', 'crf': '10'},
            )
            video.height, video.width, video.pix_fmt, video.bit_rate = (
                *frames.shape[1:3],
                pixels,
                2_000_000,
            )
            if tag:
                video.codec_context.codec_tag = tag
            tracks.append((video, [av.VideoFrame.from_ndarray(f, format='rgb24') for f in frames]))
        if audio is not None:
            sound = container.add_stream(audio_codec, rate=rate, layout='mono')
            sounds = av.AudioResampler(
                format=sound.codec_context.codec.audio_formats[0].name,
                layout='mono',
                rate=rate,
                frame_size=0,
            )
            whole = av.AudioFrame.from_ndarray(audio[None], format='s16', layout='mono')
            whole.sample_rate, whole.pts = source_rate, 0
            tracks.append((sound, [*sounds.resample(whole), *sounds.resample(None)]))
        for stream, pieces in tracks:
            for piece in pieces:
                container.mux(stream.encode(piece))
            container.mux(stream.encode())


def encodings(root):
    """{suffix: file}, each a clock: avi 1 s of XviD and MP3, mp4 1 s of H.264 and AAC, webm 5 s of VP8 and Opus, wav and ogg 1 s, JPEG."""
    root.mkdir()
    out = {s: root / f'file.{s}' for s in ('avi', 'mp4', 'webm', 'wav', 'ogg', 'JPEG')}
    frames, audio = clock(1.0, 32, 48)
    encode(
        out['avi'],
        frames,
        clock(1.0, rate=16000)[1],
        'mpeg4',
        'libmp3lame',
        tag='XVID',
        rate=16000,
        source_rate=16000,
    )
    media.write_mp4(out['mp4'], frames, FPS, audio, RATE)
    frames, audio = clock(3.5, 32, 48)
    frames, audio = (
        np.concatenate([frames, frames[::-1][:15]]),
        np.concatenate([audio, audio[:12000]]),
    )
    encode(out['webm'], frames, audio, 'libvpx', 'libopus', rate=48000)
    encode(out['ogg'], None, audio[:RATE], None, 'libopus', rate=48000)
    write_wav(out['wav'], audio[:RATE])
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(out['JPEG'])
    return out


def write(root, files):
    """files: {path below root: text, JSON-able object, or the file to link}."""
    for path, content in files.items():
        path = pathlib.Path(root, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pathlib.Path):
            os.link(content, path)
        else:
            path.write_text(
                content if isinstance(content, str) else json.dumps(content), encoding='utf-8'
            )


def ucf101(f):
    names = [f'{c}/v_{c}_g0{g}_c01.avi' for c in ('Archery', 'YoYo') for g in (1, 2, 3)]
    lists = {}
    for k in range(3):  # group k + 1 is tested on
        lists[f'ucfTrainTestlist/trainlist0{k + 1}.txt'] = ''.join(
            f'{n} {1 + (n[0] == "Y")}\n' for n in names if f'_g0{k + 1}_' not in n
        )
        lists[f'ucfTrainTestlist/testlist0{k + 1}.txt'] = '\r\n'.join(
            n for n in names if f'_g0{k + 1}_' in n
        )
    return {
        'ucfTrainTestlist/classInd.txt': '1 Archery\n2 YoYo\n',
        **lists,
        **{f'UCF-101/{n}': f['avi'] for n in names},
    }


def hmdb51(f):
    names = {
        'brush_hair': ['April_09_brush_hair_u_nm_np1_ba_goo_0.avi', 'a #1 (x)&y;_brush_hair_1.avi'],
        'wave': ['w_wave_0.avi', 'w_wave_1.avi'],
    }
    marks = {1: '12', 2: '21', 3: '10'}  # of the two clips of a class
    out = {f'{c}/{n}': f['avi'] for c, some in names.items() for n in some}
    for c, some in names.items():
        for k, (a, b) in marks.items():
            out[f'testTrainMulti_7030_splits/{c}_test_split{k}.txt'] = (
                f'{some[0]} {a} \n{some[1]} {b} \n'
            )
    return out


def esc50(f):
    rows = ['filename,fold,target,category,esc10,src_file,take']
    names = [
        (f'{fold}-{100 + target}-A-{target}.wav', fold, target, category)
        for fold in range(1, 6)
        for target, category in ((0, 'dog'), (1, 'rooster'))
    ]
    rows += [f'{n},{fold},{t},{c},{t == 0},{100 + t},A' for n, fold, t, c in names]
    return {'meta/esc50.csv': '\n'.join(rows) + '\n', **{f'audio/{n}': f['wav'] for n, *_ in names}}


def audioset(f):
    head = '# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=2, num_segs=2\n# YTID, start_seconds, end_seconds, positive_labels\n'
    return {
        'balanced_train_segments.csv': head
        + '--whole_one, 1.000, 3.000, "/m/speech,/m/dog"\n-gone, 0.000, 10.000, "/m/dog"\n',
        'eval_segments.csv': head
        + 'sound_wav, 30.000, 40.000, "/m/dog"\nsound_ogg, 0.000, 10.000, "/m/speech"\n',
        'class_labels_indices.csv': 'index,mid,display_name\n0,/m/speech,"Speech"\n1,/m/dog,"Dog, bark"\n',
        'ontology.json': [
            {'id': '/m/animal', 'name': 'Animal', 'child_ids': ['/m/dog']},
            {'id': '/m/dog', 'name': 'Dog', 'child_ids': []},
            {'id': '/m/speech', 'name': 'Speech', 'child_ids': []},
        ],
        'clips/--whole_one.webm': f['webm'],
        'clips/Ysound_wav_30.000.wav': f['wav'],
        'clips/sound_ogg_0_10000.ogg': f['ogg'],
    }


def kinetics400(f):
    head = 'label,youtube_id,time_start,time_end,split,is_cc\n'
    return {
        'annotations/train.csv': head
        + 'riding a bike,-abc_DEFG12,10,11,train,0\nabseiling,wholeVideo1,2,4,train,0\n',
        'annotations/validate.csv': head + 'abseiling,zzz,0,1,validate,1\n',
        'annotations/test.csv': 'youtube_id,time_start,time_end,split\nttt,5,6,test\n',
        'train/riding a bike/-abc_DEFG12_000010_000011.mp4': f['mp4'],
        'train/wholeVideo1.webm': f['webm'],
        'val/zzz_000000_000001.mp4': f['mp4'],
        'test/ttt.mp4': f['mp4'],
    }


def moments_in_time(f):
    return {
        'moments_categories.txt': 'clapping,0\nadult+female+singing,1\n',
        'trainingSet.csv': 'clapping/a.mp4,clapping,4,0\nadult+female+singing/b.mp4,adult+female+singing,3,1\n',
        'validationSet.csv': 'clapping/a.mp4,clapping,3,0\n',
        'training/clapping/a.mp4': f['mp4'],
        'training/adult+female+singing/b.mp4': f['mp4'],
        'validation/clapping/a.mp4': f['mp4'],
    }


def vggsound(f):
    return {
        'vggsound.csv': '---g-f_I2yQ,1,"people marching, slowly",test\nb,12,dog barking,train\nc,0,dog barking,train\n',
        'video/---g-f_I2yQ_000001.mp4': f['mp4'],
        'video/b_000012_000022.mp4': f['mp4'],
        'video/c.mp4': f['mp4'],
    }


def ave(f):
    head = 'Category&VideoID&Quality&StartTime&EndTime\n'
    rows = [
        'Church bell&RUhOCu3LNXM&good&0&1',
        'Church bell&b&good&1&3',
        'Male speech, man speaking&b&good&4&5',
        'Violin, fiddle&c&good&0&1',
    ]
    return {
        'AVE_Dataset/Annotations.txt': head + '\n'.join(rows),
        'AVE_Dataset/trainSet.txt': '\n'.join(rows[1:3]),
        'AVE_Dataset/valSet.txt': rows[0],
        'AVE_Dataset/testSet.txt': rows[3] + '\n',
        'AVE_Dataset/AVE/RUhOCu3LNXM.mp4': f['mp4'],
        'AVE_Dataset/AVE/b.webm': f['webm'],
        'AVE_Dataset/AVE/c.mp4': f['mp4'],
    }


def youcook2(f):
    entry = lambda subset, kind, *steps: {
        'duration': 5.0,
        'subset': subset,
        'recipe_type': kind,
        'video_url': 'https://www.youtube.com/watch?v=x',
        'annotations': [
            {'segment': list(t), 'id': i, 'sentence': s} for i, (t, s) in enumerate(steps)
        ],
    }
    database = {
        'GLd3aX16zBg': entry('training', '113', ((0, 2), 'add the bacon'), ((3, 5), 'flip it')),
        'fn9anlEL4FI': entry('validation', '9', ((1, 2), 'whisk the eggs')),
    }
    test = {'tttt': {**entry('testing', '9'), 'annotations': [{'segment': [0, 1], 'id': 0}]}}
    return {
        'annotations/youcookii_annotations_trainval.json': {'database': database},
        'annotations/youcookii_annotations_test_segments_only.json': {'database': test},
        'annotations/label_foodtype.csv': '113,blt\n9,omelette\n',
        'raw_videos/training/113/GLd3aX16zBg.webm': f['webm'],
        'raw_videos/validation/9/fn9anlEL4FI.webm': f['webm'],
        'raw_videos/testing/9/tttt.mp4': f['mp4'],
    }


def msrvtt(f):
    video = lambda i, split: {
        'category': i % 2,
        'url': 'https://x',
        'video_id': f'video{i}',
        'start time': 137.7,
        'end time': 149.4,
        'split': split,
        'id': i,
    }
    said = lambda i: [
        {'caption': f'sentence {k} about {i}', 'video_id': f'video{i}', 'sen_id': 20 * i + k}
        for k in range(3)
    ]
    return {
        'train_val_videodatainfo.json': {
            'info': {},
            'videos': [video(0, 'train'), video(1, 'validate')],
            'sentences': said(0) + said(1),
        },
        'test_videodatainfo.json': {
            'info': {},
            'videos': [video(2, 'test'), video(3, 'test')],
            'sentences': said(2) + said(3),
        },
        'MSRVTT_JSFUSION_test.csv': 'key,vid_key,video_id,sentence\nret0,msr3,video3,"a woman, cooking"\n',
        'category.txt': 'music\t0\npeople\t1\n',
        **{f'TrainValVideo/video{i}.mp4': f['mp4'] for i in (0, 1)},
        **{f'TestVideo/video{i}.mp4': f['mp4'] for i in (2, 3)},
    }


def howto100m(f):
    return {
        'HowTo100M_v1.csv': 'video_id,category_1,category_2,rank,task_id\nnAmFnsR7g6A,Food and Entertaining,Recipes,1,1\n'
        'gone,Hobbies,Crafts,2,9\nsecond,Hobbies,Crafts,3,9\n',
        'caption.json': {
            'nAmFnsR7g6A': {
                'start': [0.5, 2.0, 3.0],
                'end': [1.5, 1.0, 4.0],
                'text': ['put onions', 'stir soup', float('nan')],
            },
            'gone': {'start': [], 'end': [], 'text': []},
        },
        'videos/nAmFnsR7g6A.webm': f['webm'],
        'videos/second.mp4': f['mp4'],
        'videos/unlisted.mp4': f['mp4'],
    }


def imagenet(f):
    return {
        'train/n01440764/n01440764_1.JPEG': f['JPEG'],
        'train/n01443537/n01443537_1.JPEG': f['JPEG'],
        'val/ILSVRC2012_val_00000001.JPEG': f['JPEG'],
        'LOC_val_solution.csv': 'ImageId,PredictionString\n'
        'ILSVRC2012_val_00000001,n01443537 9 9 199 199 \n',
        'LOC_synset_mapping.txt': 'n01440764 tench, Tinca tinca\nn01443537 goldfish\n',
    }


LAYOUTS = {
    'ucf101': ucf101,
    'hmdb51': hmdb51,
    'esc50': esc50,
    'audioset': audioset,
    'kinetics400': kinetics400,
    'kinetics600': kinetics400,
    'kinetics700': kinetics400,
    'moments_in_time': moments_in_time,
    'vggsound': vggsound,
    'ave': ave,
    'youcook2': youcook2,
    'msrvtt': msrvtt,
    'msrvtt_full': msrvtt,
    'howto100m': howto100m,
    'imagenet': imagenet,
}
