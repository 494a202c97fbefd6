"""Miniature copies of what the owners of named datasets distribute.

Each function of LAYOUTS gets the example files by suffix (`encode_examples`) and gives a layout for
`write_layout`, in which media are links to these files, encoded once.
"""

import fractions
import hashlib
import io
import json
import os
import pathlib
import tarfile
import zlib

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
    tag=None,
    rate=RATE,
    source_rate=RATE,
):
    """Writes a file of the container that the suffix says.

    Args:
      path: of the file.
      frames: uint8 [T H W 3] or None.
      audio: int16 [S] or None.
      video_codec: name of the encoder.
      audio_codec: name of the encoder.
      tag: of the video codec in the container.
      rate: of the sound in the file.
      source_rate: of `audio`.
    """
    with av.open(str(path), 'w') as container:
        # All streams are added before the first packet is written.
        content = []
        if frames is not None:
            video = container.add_stream(
                video_codec,
                rate=fractions.Fraction(FPS),
                options={'threads': '1', 'qmin': '2', 'crf': '10'},
            )
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = 'yuv420p'
            video.bit_rate = 2_000_000
            if tag:
                video.codec_context.codec_tag = tag
            pictures = [av.VideoFrame.from_ndarray(frame, format='rgb24') for frame in frames]
            content.append((video, pictures))
        if audio is not None:
            sound = container.add_stream(audio_codec, rate=rate, layout='mono')
            resampler = av.AudioResampler(
                format=sound.codec_context.codec.audio_formats[0].name,
                layout='mono',
                rate=rate,
                frame_size=0,
            )
            samples = av.AudioFrame.from_ndarray(audio[None], format='s16', layout='mono')
            samples.sample_rate = source_rate
            samples.pts = 0
            content.append((sound, [*resampler.resample(samples), *resampler.resample(None)]))
        for stream, pieces in content:
            for piece in pieces:
                container.mux(stream.encode(piece))
            container.mux(stream.encode())


def encode_examples(root):
    """Writes one example file of each kind below a new folder.

    Returns:
      {suffix: file}. avi is 1 s of XviD and MP3, mp4 1 s of H.264 and AAC, webm 5 s of VP8 and
      Opus; wav and ogg are 1 s of sound; JPEG is a gray picture.
    """
    root.mkdir()
    suffixes = ('avi', 'mp4', 'webm', 'wav', 'ogg', 'JPEG')
    files = {suffix: root / f'file.{suffix}' for suffix in suffixes}
    frames, audio = clock(1.0, 32, 48)
    _, audio_16k = clock(1.0, rate=16000)
    encode(
        files['avi'],
        frames,
        audio_16k,
        'mpeg4',
        'libmp3lame',
        tag='XVID',
        rate=16000,
        source_rate=16000,
    )
    media.write_mp4(files['mp4'], frames, FPS, audio, RATE)
    encode(files['ogg'], None, audio, None, 'libopus', rate=48000)
    write_wav(files['wav'], audio)

    # A clock stops at 3.5 s: its pictures go back for the rest, and its sound begins again.
    frames, audio = clock(3.5, 32, 48)
    frames = np.concatenate([frames, frames[::-1][:15]])
    audio = np.concatenate([audio, audio[:12000]])
    encode(files['webm'], frames, audio, 'libvpx', 'libopus', rate=48000)
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(files['JPEG'])
    return files


def write_layout(root, layout):
    """Writes {path below root: text, bytes, JSON-able object, or the file to link}."""
    for name, content in layout.items():
        path = pathlib.Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pathlib.Path):
            os.link(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding='utf-8')
        else:
            path.write_text(json.dumps(content), encoding='utf-8')


def lines(*rows):
    """Text of these lines, each with its end."""
    return ''.join(f'{row}\n' for row in rows)


def ucf101(files):
    """Two classes of three groups; the list of fold k tests on group k."""
    clips = []
    for name in ('Archery', 'YoYo'):
        clips += [f'{name}/v_{name}_g0{group}_c01.avi' for group in (1, 2, 3)]
    class_numbers = {'Archery': 1, 'YoYo': 2}
    layout = {'ucfTrainTestlist/classInd.txt': lines('1 Archery', '2 YoYo')}
    for fold in (1, 2, 3):
        train, test = [], []
        for clip in clips:
            if f'_g0{fold}_' in clip:
                test.append(clip)
            else:
                train.append(f'{clip} {class_numbers[clip.split("/")[0]]}')
        layout[f'ucfTrainTestlist/trainlist0{fold}.txt'] = lines(*train)
        layout[f'ucfTrainTestlist/testlist0{fold}.txt'] = '\r\n'.join(test)
    for clip in clips:
        layout[f'UCF-101/{clip}'] = files['avi']
    return layout


def hmdb51(files):
    """Two classes of two clips; some names have blanks and other odd characters."""
    clips = {
        'brush_hair': ['April_09_brush_hair_u_nm_np1_ba_goo_0.avi', 'a #1 (x)&y;_brush_hair_1.avi'],
        'wave': ['w_wave_0.avi', 'w_wave_1.avi'],
    }
    # Fold -> mark of each of the two clips: 1 train, 2 test, 0 neither.
    marks = {1: (1, 2), 2: (2, 1), 3: (1, 0)}
    layout = {}
    for name, (first, second) in clips.items():
        layout[f'{name}/{first}'] = files['avi']
        layout[f'{name}/{second}'] = files['avi']
        for fold, (first_mark, second_mark) in marks.items():
            rows = lines(f'{first} {first_mark} ', f'{second} {second_mark} ')
            layout[f'testTrainMulti_7030_splits/{name}_test_split{fold}.txt'] = rows
    return layout


def esc50(files):
    """A clip of each of two classes in every fold."""
    rows = ['filename,fold,target,category,esc10,src_file,take']
    layout = {}
    for fold in range(1, 6):
        for target, category in ((0, 'dog'), (1, 'rooster')):
            number = 100 + target
            name = f'{fold}-{number}-A-{target}.wav'
            rows.append(f'{name},{fold},{target},{category},{target == 0},{number},A')
            layout[f'audio/{name}'] = files['wav']
    layout['meta/esc50.csv'] = lines(*rows)
    return layout


def audioset(files):
    """One clip of each form that downloads have, and one that is gone."""
    header = (
        '# Segments csv created Sun Mar  5 10:54:31 2017',
        '# num_ytids=2, num_segs=2',
        '# YTID, start_seconds, end_seconds, positive_labels',
    )
    return {
        'balanced_train_segments.csv': lines(
            *header,
            '--whole_one, 1.000, 3.000, "/m/speech,/m/dog"',
            '-gone, 0.000, 10.000, "/m/dog"',
        ),
        'eval_segments.csv': lines(
            *header,
            'sound_wav, 30.000, 40.000, "/m/dog"',
            'sound_ogg, 0.000, 10.000, "/m/speech"',
        ),
        'class_labels_indices.csv': lines(
            'index,mid,display_name',
            '0,/m/speech,"Speech"',
            '1,/m/dog,"Dog, bark"',
        ),
        'ontology.json': [
            {'id': '/m/animal', 'name': 'Animal', 'child_ids': ['/m/dog']},
            {'id': '/m/dog', 'name': 'Dog', 'child_ids': []},
            {'id': '/m/speech', 'name': 'Speech', 'child_ids': []},
        ],
        'clips/--whole_one.webm': files['webm'],
        'clips/Ysound_wav_30.000.wav': files['wav'],
        'clips/sound_ogg_0_10000.ogg': files['ogg'],
    }


def kinetics400(files):
    """Clips cut before and a whole video; the test list has no labels."""
    header = 'label,youtube_id,time_start,time_end,split,is_cc'
    return {
        'annotations/train.csv': lines(
            header,
            'riding a bike,-abc_DEFG12,10,11,train,0',
            'abseiling,wholeVideo1,2,4,train,0',
        ),
        'annotations/validate.csv': lines(header, 'abseiling,zzz,0,1,validate,1'),
        'annotations/test.csv': lines('youtube_id,time_start,time_end,split', 'ttt,5,6,test'),
        'train/riding a bike/-abc_DEFG12_000010_000011.mp4': files['mp4'],
        'train/wholeVideo1.webm': files['webm'],
        'val/zzz_000000_000001.mp4': files['mp4'],
        'test/ttt.mp4': files['mp4'],
    }


def moments_in_time(files):
    """Two classes, one of them in both splits under the same file name."""
    return {
        'moments_categories.txt': lines('clapping,0', 'adult+female+singing,1'),
        'trainingSet.csv': lines(
            'clapping/a.mp4,clapping,4,0',
            'adult+female+singing/b.mp4,adult+female+singing,3,1',
        ),
        'validationSet.csv': lines('clapping/a.mp4,clapping,3,0'),
        'training/clapping/a.mp4': files['mp4'],
        'training/adult+female+singing/b.mp4': files['mp4'],
        'validation/clapping/a.mp4': files['mp4'],
    }


def vggsound(files):
    """Three clips, each file named in another way."""
    return {
        'vggsound.csv': lines(
            '---g-f_I2yQ,1,"people marching, slowly",test',
            'b,12,dog barking,train',
            'c,0,dog barking,train',
        ),
        'video/---g-f_I2yQ_000001.mp4': files['mp4'],
        'video/b_000012_000022.mp4': files['mp4'],
        'video/c.mp4': files['mp4'],
    }


def ave(files):
    """Three videos, one with two events."""
    church_bell = 'Church bell&RUhOCu3LNXM&good&0&1'
    two_events = ['Church bell&b&good&1&3', 'Male speech, man speaking&b&good&4&5']
    violin = 'Violin, fiddle&c&good&0&1'
    header = 'Category&VideoID&Quality&StartTime&EndTime'
    return {
        'AVE_Dataset/Annotations.txt': '\n'.join([header, church_bell, *two_events, violin]),
        'AVE_Dataset/trainSet.txt': '\n'.join(two_events),
        'AVE_Dataset/valSet.txt': church_bell,
        'AVE_Dataset/testSet.txt': lines(violin),
        'AVE_Dataset/AVE/RUhOCu3LNXM.mp4': files['mp4'],
        'AVE_Dataset/AVE/b.webm': files['webm'],
        'AVE_Dataset/AVE/c.mp4': files['mp4'],
    }


def youcook2_entry(subset, recipe, *steps):
    """A video of the annotations; a step is (begin, end, sentence)."""
    annotations = []
    for i, (begin, end, sentence) in enumerate(steps):
        annotations.append({'segment': [begin, end], 'id': i, 'sentence': sentence})
    return {
        'duration': 5.0,
        'subset': subset,
        'recipe_type': recipe,
        'video_url': 'https://www.youtube.com/watch?v=x',
        'annotations': annotations,
    }


def youcook2(files):
    """One video a split; the test split has segments without sentences."""
    database = {
        'GLd3aX16zBg': youcook2_entry(
            'training', '113', (0, 2, 'add the bacon'), (3, 5, 'flip it')
        ),
        'fn9anlEL4FI': youcook2_entry('validation', '9', (1, 2, 'whisk the eggs')),
    }
    test_entry = youcook2_entry('testing', '9')
    test_entry['annotations'] = [{'segment': [0, 1], 'id': 0}]
    return {
        'annotations/youcookii_annotations_trainval.json': {'database': database},
        'annotations/youcookii_annotations_test_segments_only.json': {
            'database': {'tttt': test_entry}
        },
        'annotations/label_foodtype.csv': lines('113,blt', '9,omelette'),
        'raw_videos/training/113/GLd3aX16zBg.webm': files['webm'],
        'raw_videos/validation/9/fn9anlEL4FI.webm': files['webm'],
        'raw_videos/testing/9/tttt.mp4': files['mp4'],
    }


def msrvtt_video(number, split):
    """The entry of one video."""
    return {
        'category': number % 2,
        'url': 'https://x',
        'video_id': f'video{number}',
        'start time': 137.7,
        'end time': 149.4,
        'split': split,
        'id': number,
    }


def msrvtt_sentences(number):
    """The entries of three sentences about one video."""
    sentences = []
    for k in range(3):
        sentence = {
            'caption': f'sentence {k} about {number}',
            'video_id': f'video{number}',
            'sen_id': 20 * number + k,
        }
        sentences.append(sentence)
    return sentences


def msrvtt(files):
    """Four videos; one of the two test videos is in the list of 1k-A."""
    return {
        'train_val_videodatainfo.json': {
            'info': {},
            'videos': [msrvtt_video(0, 'train'), msrvtt_video(1, 'validate')],
            'sentences': msrvtt_sentences(0) + msrvtt_sentences(1),
        },
        'test_videodatainfo.json': {
            'info': {},
            'videos': [msrvtt_video(2, 'test'), msrvtt_video(3, 'test')],
            'sentences': msrvtt_sentences(2) + msrvtt_sentences(3),
        },
        'MSRVTT_JSFUSION_test.csv': lines(
            'key,vid_key,video_id,sentence',
            'ret0,msr3,video3,"a woman, cooking"',
        ),
        'category.txt': lines('music\t0', 'people\t1'),
        'TrainValVideo/video0.mp4': files['mp4'],
        'TrainValVideo/video1.mp4': files['mp4'],
        'TestVideo/video2.mp4': files['mp4'],
        'TestVideo/video3.mp4': files['mp4'],
    }


def howto100m(files):
    """Narrated, unnarrated, gone and unlisted videos; the captions have faults of the real ones."""
    return {
        'HowTo100M_v1.csv': lines(
            'video_id,category_1,category_2,rank,task_id',
            'nAmFnsR7g6A,Food and Entertaining,Recipes,1,1',
            'gone,Hobbies,Crafts,2,9',
            'second,Hobbies,Crafts,3,9',
        ),
        'caption.json': {
            'nAmFnsR7g6A': {
                'start': [0.5, 2.0, 3.0],
                'end': [1.5, 1.0, 4.0],
                'text': ['put onions', 'stir soup', float('nan')],
            },
            'gone': {'start': [], 'end': [], 'text': []},
        },
        'videos/nAmFnsR7g6A.webm': files['webm'],
        'videos/second.mp4': files['mp4'],
        'videos/unlisted.mp4': files['mp4'],
    }


def imagenet(files):
    """Training pictures in class folders, a validation picture in a list."""
    return {
        'train/n01440764/n01440764_1.JPEG': files['JPEG'],
        'train/n01443537/n01443537_1.JPEG': files['JPEG'],
        'val/ILSVRC2012_val_00000001.JPEG': files['JPEG'],
        'LOC_val_solution.csv': lines(
            'ImageId,PredictionString',
            'ILSVRC2012_val_00000001,n01443537 9 9 199 199 ',
        ),
        'LOC_synset_mapping.txt': lines('n01440764 tench, Tinca tinca', 'n01443537 goldfish'),
    }


def class_folders(files):
    """ImageNet-R: folders of WordNet ids, and a file beside them."""
    return {
        'imagenet-r/n01443537/art_0.jpg': files['JPEG'],
        'imagenet-r/n01484850/sketch_3.jpg': files['JPEG'],
        'imagenet-r/n01443537/tattoo_1.jpg': files['JPEG'],
        'imagenet-r/README.txt': 'n01443537 goldfish',
    }


def coco_captions(files):
    """Two pictures for training, one for validation; a caption has a line end in it."""

    def annotations(*images):
        """Of (number, captions) each."""
        entries = []
        for number, captions in images:
            for caption in captions:
                entry = {'image_id': number, 'id': len(entries), 'caption': caption}
                entries.append(entry)
        return {
            'info': {'year': 2017},
            'licenses': [],
            'images': [
                {'id': number, 'file_name': f'{number:012d}.jpg', 'height': 40, 'width': 60}
                for number, _ in images
            ],
            'annotations': entries,
        }

    return {
        'annotations/captions_train2017.json': annotations(
            (9, [f'sentence {k} about 9' for k in range(5)]), (25, ['A giraffe\n'])
        ),
        'annotations/captions_val2017.json': annotations((42, ['a shoe', 'shoes on a rack'])),
        'annotations/instances_val2017.json': {},
        'train2017/000000000009.jpg': files['JPEG'],
        'train2017/000000000025.jpg': files['JPEG'],
        'val2017/000000000042.jpg': files['JPEG'],
    }


def karpathy_image(name, split, num_sentences=5, **fields):
    """The entry of a picture; its sentences are about its name."""
    sentences = []
    for k in range(num_sentences):
        raw = f'Sentence {k} about {name}.'
        sentences.append({'tokens': raw.lower().strip('.').split(), 'raw': raw, 'sentid': k})
    return {'filename': name, 'split': split, 'sentences': sentences, **fields}


def coco_karpathy(files):
    """A picture of each of the four splits; one has seven sentences."""
    folders = {'a': 'train2014', 'b': 'val2014', 'c': 'val2014', 'd': 'val2014'}
    images = [
        karpathy_image('a.jpg', 'train', filepath='train2014', cocoid=1, imgid=0),
        karpathy_image('b.jpg', 'restval', filepath='val2014', cocoid=2, imgid=1),
        karpathy_image('c.jpg', 'val', filepath='val2014', cocoid=3, imgid=2),
        karpathy_image('d.jpg', 'test', 7, filepath='val2014', cocoid=4, imgid=3),
    ]
    layout = {'caption_datasets/dataset_coco.json': {'images': images, 'dataset': 'coco'}}
    for name, folder in folders.items():
        layout[f'{folder}/{name}.jpg'] = files['JPEG']
    return layout


def flickr30k(files):
    """A picture of each split; there are no folders."""
    splits = {'1000092795.jpg': 'train', '10002456.jpg': 'val', '1000268201.jpg': 'test'}
    images = [karpathy_image(name, split, imgid=0) for name, split in splits.items()]
    layout = {'dataset_flickr30k.json': {'images': images, 'dataset': 'flickr30k'}}
    for name in splits:
        layout[f'flickr30k-images/{name}'] = files['JPEG']
    return layout


def image_lists(files):
    """CC3M: captions and addresses, pictures called by the addresses in three ways."""
    addresses = [f'http://example.org/{name}' for name in 'abcd']
    names = [
        hashlib.md5(addresses[0].encode()).hexdigest(),
        f'1_{zlib.crc32(addresses[1].encode())}',
        hashlib.sha256(addresses[3].encode()).hexdigest(),
    ]
    return {
        'Train_GCC-training.tsv': lines(
            f'a very typical "bus" station\t{addresses[0]}',
            f'sierra looked stunning\t{addresses[1]}',
            f'a picture that is gone\t{addresses[2]}',
        ),
        'Validation_GCC-1.1.0-Validation.tsv': f'author : a life in photography\t{addresses[3]}',
        f'pictures/{names[0]}.jpg': files['JPEG'],
        f'pictures/{names[1]}.jpg': files['JPEG'],
        f'pictures/{names[2]}.jpg': files['JPEG'],
    }


def tar_of(members):
    """A tar archive of (name, bytes), in this order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def shard_sample(key, picture, caption):
    """The members of one sample as img2dataset writes them."""
    metadata = {'caption': caption, 'url': f'http://example.org/{key}', 'key': key, 'width': 60}
    return [
        (f'{key}.jpg', picture),
        (f'{key}.json', json.dumps(metadata, indent=4).encode()),
        (f'{key}.txt', caption.encode()),
    ]


def webdataset(files):
    """Two shards for training, one for validation."""
    picture = files['JPEG'].read_bytes()
    first = shard_sample('000000000', picture, 'a dog') + shard_sample('000000003', picture, 'two')
    return {
        'train/00000.tar': tar_of(first),
        'train/00001.tar': tar_of(shard_sample('000010000', picture, 'a cat')),
        'train/00000_stats.json': {'count': 2},
        'val/00000.tar': tar_of(shard_sample('000000000', picture, 'a bird')),
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
    'class_folders': class_folders,
    'coco_captions': coco_captions,
    'coco_karpathy': coco_karpathy,
    'flickr30k': flickr30k,
    'image_lists': image_lists,
    'webdataset': webdataset,
}
