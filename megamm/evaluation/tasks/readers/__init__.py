"""Readers of the benchmarks' public layouts, one file per layout.

Each has a function `read(data, images, split)`:
    data: what --data names, files or folders.
    images: the folder of --images, or None.
    split: "test" for what is evaluated, "train" for demonstrations; looked at where a file holds both.
It yields Items in the order of the data and raises InputError where they are wrong. Pictures are not opened.
"""
