"""The data path: prompts and tokens, prepared datasets, images, and the stream of micro-batches.

Read in the order of a sample's life: formats/ -> instructions -> templates -> tokenizer -> prepare ->
indexed; blend -> step_plan -> batch_maker (assemble, images) -> loader.
"""

import os

# Without it webdataset, used beside megamm, unpickles members of tars and runs `pipe:` URLs.
os.environ.setdefault("WDS_SECURE", "1")
