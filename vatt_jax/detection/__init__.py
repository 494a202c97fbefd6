"""Boxes and classes of objects in pictures: the detector, its targets, its measures.

Nothing is imported here: `coco` is read by data pipelines, which start no JAX.
"""
