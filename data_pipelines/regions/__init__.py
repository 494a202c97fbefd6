"""Region features from the usual files, and the sets ViLBERT and UNITER are fine-tuned on.

pictures.py     what a detector saw in one picture; padding and choice of regions
tsv.py          bottom-up attention's tsv files
records.py      a record of ViLBERT's or UNITER's database, from its bytes
stores.py       tsv, npz folders and lmdb as mappings {name: Picture}
"""
