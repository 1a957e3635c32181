"""`megamm report RUN_DIR`: a run on one HTML page.

read.py      what the run directory holds
curves.py    its numbers, step by step, and the few hundred points of them that a page can show
chart.py     a plot of them
samples.py   answers that the model gave on the way, with their pictures
sections.py  everything else, in tables
page.py      the page
"""
