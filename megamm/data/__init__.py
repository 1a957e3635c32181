"""The data path: prompts and tokens, prepared datasets, images, and the stream of micro-batches.

Read in the order of a sample's life: formats/ -> templates -> tokenizer -> prepare -> indexed -> order
-> assemble -> images -> loader.
"""
