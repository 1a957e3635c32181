"""OBELICS: parquet files whose rows are documents, with "images" (URLs) and "texts" side by side: at every
place one of the two is null."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.base import CHUNK_ENTRIES, Chunk, Format, FormatOptions
from megamm.data.formats.fields import is_name, words
from megamm.data.formats.interleaved import document, url_names
from megamm.errors import InputError

COLUMNS = ("images", "texts")


class Obelics(Format):
    """Images stand in the order of the document; their names are the URL, or the last part of its path.

    The options `max_images` and `keep_single_image` hold. Needs pyarrow.
    """

    uses = ("max_images", "keep_single_image")

    def __init__(self, options: FormatOptions = FormatOptions()) -> None:  # noqa: B008 (frozen)
        super().__init__(options)
        self._rows: _Rows | None = None

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        for number, path in enumerate(sources):
            with _parquet(path) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            if sum(sizes) == 0:
                raise InputError(f"{path}: holds no rows; give parquet files of OBELICS")
            before = 0
            for group, size in enumerate(sizes):
                for start in range(0, size, CHUNK_ENTRIES):
                    stop = min(start + CHUNK_ENTRIES, size)
                    yield Chunk(str(path), number, (group, before, start, stop))
                before += size

    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        group, before, start, stop = chunk.payload
        rows = self._rows
        if rows is None or (rows.path, rows.group) != (chunk.source, group) or rows.position > start:
            rows = self._rows = _Rows(chunk.source, group)
        for position, (images, texts) in enumerate(rows.take(start, stop), start=before + start):
            yield self._document(position, images, texts)

    def _document(self, position: int, images: Any, texts: Any) -> Conversation | Skipped:
        key = str(position)
        if images is None or texts is None or len(images) != len(texts):
            return Skipped(key, position, "has not as many images as texts")
        parts: list[Any] = []
        for url, text in zip(images, texts, strict=True):
            found = words(text) if text is not None else ""
            if found is None or (url is not None and not is_name(url)):
                return Skipped(key, position, "holds something that is no text")
            if url is not None:
                parts.append((url_names(url), ""))
            if found:
                parts.append((None, found))
        return document(key, position, parts, self.options, between="\n\n")


class _Rows:
    """The rows of a row group in their order, a few at a time: a file may be one group."""

    def __init__(self, path: str, group: int):
        self.path, self.group, self.position = path, group, 0
        self._batches = self._read()

    def take(self, start: int, stop: int) -> list[tuple[Any, Any]]:
        """The rows from `start` to `stop`, multiples of CHUNK_ENTRIES apart from the end."""
        rows: list[tuple[Any, Any]] | None = []
        while rows is not None and self.position < stop:
            rows = next(self._batches, None)
            self.position += len(rows or "")
        if rows is None or (self.position - len(rows), self.position) != (start, stop):
            raise InputError(f"{self.path}: has changed while it was read; start again")
        return rows

    def _read(self) -> Iterator[list[tuple[Any, Any]]]:
        with _parquet(Path(self.path)) as file:
            pending: list[tuple[Any, Any]] = []
            for batch in file.iter_batches(CHUNK_ENTRIES, row_groups=[self.group], columns=list(COLUMNS)):
                pending += zip(*(batch.column(name).to_pylist() for name in COLUMNS), strict=True)
                while len(pending) >= CHUNK_ENTRIES:
                    yield pending[:CHUNK_ENTRIES]
                    pending = pending[CHUNK_ENTRIES:]
            yield pending


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError:
        raise InputError(
            f"{path}: parquet files need pyarrow, which is not installed; "
            "install megamm with the extra [hf], or pyarrow"
        ) from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
            schema = file.schema_arrow
            for name in COLUMNS:
                kind = schema.field(name).type if schema.get_field_index(name) >= 0 else None
                if kind is None or not (types.is_list(kind) or types.is_large_list(kind)):
                    raise InputError(
                        f'{path}: has no column "{name}" of lists of texts; give parquet files of OBELICS'
                    )
            yield file
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: cannot be read as parquet ({reason}); copy or write it again") from None
