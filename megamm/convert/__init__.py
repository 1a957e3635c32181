"""Conversion between megamm checkpoints and Hugging Face model directories, bit for bit.

One table of rules for each family (`tables/`), read in both directions (`rules`), applied one tensor at a
time (`engine`).
"""

from megamm.convert.exporting import ExportReport, export_checkpoint, export_llava
from megamm.convert.importing import Imported, import_checkpoint, import_llava

__all__ = [
    "ExportReport",
    "Imported",
    "export_checkpoint",
    "export_llava",
    "import_checkpoint",
    "import_llava",
]
