"""`megamm prepare`: conversations and the places of their images become a dataset directory.

The sources are cut into chunks, any process renders a chunk, and the results are appended in the order of the
sources. So the bytes depend on the sources, images and options alone: not on the number of processes, and not
on how often the work was interrupted and taken up again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from megamm import __version__
from megamm.data import image_places, indexed
from megamm.data.formats import Chunk, Format, FormatOptions, make_format
from megamm.data.image_store import describe
from megamm.data.instructions import NONE as NO_INSTRUCTIONS
from megamm.data.instructions import names as instruction_sets
from megamm.data.manifest import FILE_NAME as MANIFEST
from megamm.data.manifest import TOKENIZER_FOLDER, Manifest, describe_files, file_sha256
from megamm.data.prepare_partial import Partial
from megamm.data.prepare_progress import ProgressDisplay
from megamm.data.prepare_render import IMAGE_CHECKS, Renderer, Sight
from megamm.data.prepare_workers import in_order
from megamm.data.prepare_writer import DatasetWriter
from megamm.data.templates import Template
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from megamm.errors import InputError, MegammError

SHOWN_REASONS = 3


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        counts: of the dataset, as in its manifest.
        skipped_path: its list of skipped entries.
        up_to_date: the dataset was there already and nothing was written.
        resumed: chunks that an earlier, interrupted run had written.
    """

    out: Path
    counts: dict[str, int]
    skipped_path: Path
    up_to_date: bool
    resumed: int = 0

    def summary(self) -> str:
        """A few words for the terminal."""
        counts = self.counts
        text = (
            f"{self.out}: {counts['samples']} samples, {counts['images']} images, {counts['tokens']} tokens "
            f"({counts['learnt_tokens']} learnt)"
        )
        if self.up_to_date:
            text += ", up to date"
            if counts["skipped"]:
                text += " (to look for images again, remove it)"
        if counts["dropped_images"]:
            text += f"; {counts['dropped_images']} images of documents left out"
        if counts["skipped"]:
            text += f"; {counts['skipped']} entries skipped ({self._reasons()}), see {self.skipped_path}"
        return text

    def _reasons(self) -> str:
        """The most frequent reasons for which entries were skipped."""
        with open(self.skipped_path, encoding="utf-8") as file:
            found = Counter(str(json.loads(line)["reason"]) for line in file)
        most = [f"{count} {reason}" for reason, count in found.most_common(SHOWN_REASONS)]
        return ", ".join(most + ["..."] * (len(found) > SHOWN_REASONS))


def prepare(
    sources: list[Path],
    format: str,
    out: Path,
    tokenizer: Path,
    images: list[Path],
    template: str,
    workers: int,
    instructions: str = "none",
    options: FormatOptions = FormatOptions(),  # noqa: B008 (frozen)
    image_checks: str = "full",
    restart: bool = False,
    progress: bool = False,
) -> PrepareReport:
    """Write the dataset directory `out` from source files.

    Entries whose images are missing or unreadable are skipped and listed in out/skipped.jsonl; a document
    only loses those images, unless none is left. The directory appears complete or not at all. Where it
    exists already from the same sources, images and options, nothing is done. A run that was interrupted,
    killed or stopped by a full disk goes on where it was when it is started again with the same arguments.

    Args:
        sources: files, read in this order.
        format: of the sources, a name in `megamm.data.formats`.
        images: folders and uncompressed tar files that hold the images; a name is looked up in each,
            the first that has it counts. If empty, images lie beside the source that names them.
        workers: processes that render and check; any number gives the same bytes.
        instructions: the set of words put around questions and captions; see `megamm.data.instructions`.
        image_checks: "full" reads every image once, tests its header and stores its crc32, so that training
            notices every changed byte; "header" reads the first kilobytes and stores the size in pixels;
            "none" looks up where images lie and opens none of them, so that bad ones are met in training.
        restart: throw away what an interrupted run has left.
        progress: show on stderr how far it is.

    Raises:
        InputError: wrong sources, options or images, or `out` holds something else or is being written.
        RunError: the disk is full or not writable, or a worker died.
    """
    out = Path(out)
    read, words = make_format(format, options), Template.by_name(template)
    _check_choices(workers, instructions, image_checks, words)
    vocabulary = Tokenizer.load(tokenizer)
    sources = _existing(sources)
    sight = _sight(read, sources, images)
    manifest = Manifest(
        preparation="",
        created_by=f"megamm {__version__}",
        sources=[str(path) for path in sources],
        source_format=format,
        options=asdict(options),
        instructions=instructions,
        template=words.name,
        image_checks=image_checks,
        tokenizer_sha256=vocabulary.sha256,
        vocab_size=vocabulary.vocab_size,
        image_id=vocabulary.image_id,
        counts={},
        containers=[list(container) for container in sight.containers],
    )
    if out.exists():
        manifest.preparation = _preparation(manifest, sources, read, workers)
        return _same_or_refuse(out, manifest.preparation)
    with Partial(out) as partial, ProgressDisplay(sources, progress) as display:
        manifest.preparation = _preparation(manifest, sources, read, workers)
        done = partial.begin(f"{manifest.preparation} {__version__}", restart)
        try:
            _write_tokenizer(partial, vocabulary)
            _index_images(partial, sight, workers, display)
            renderer = Renderer(
                format,
                options,
                partial.dataset / TOKENIZER_FOLDER,
                template,
                instructions,
                sight.of(partial.path),
                image_checks,
            )
            chunks = display.watch(islice(read.chunks(sources), done.chunks, None))
            with DatasetWriter(partial, done, vocabulary.vocab_size) as writer:
                _render(renderer, chunks, writer, workers, display)
            manifest.counts = writer.counts
            _finish(partial, manifest, workers)
        except InputError:  # it is in the sources: corrected, they are others, and this work is of no use
            partial.discard()
            raise
    return PrepareReport(out, manifest.counts, out / indexed.SKIPPED, up_to_date=False, resumed=done.chunks)


def train_tokenizer_from_sources(
    sources: list[Path], format: str, out: Path, vocab_size: int, template: str
) -> Tokenizer:
    """Train a tokenizer of `vocab_size` ids on the rendered conversations of the sources, so that the
    words of the template become pieces too, and save it in the directory `out`.

    Raises:
        InputError: wrong sources, or a vocabulary that does not fit them.
    """
    read, words = make_format(format), Template.by_name(template)
    texts = (
        segment.text
        for conversation in read.conversations(_existing(sources))
        for segment in words.segments(conversation.turns)
    )
    return train_tokenizer(texts, out, vocab_size)


def _check_choices(workers: int, instructions: str, image_checks: str, words: Template) -> None:
    if workers < 1:
        raise InputError(f"workers: is {workers}; give 1 or more")
    for name, given, known in (
        ("instructions", instructions, instruction_sets()),
        ("image checks", image_checks, IMAGE_CHECKS),
    ):
        if given not in known:
            raise InputError(f"{name}: there is no {given!r}; choose one of {', '.join(known)}")
    if instructions != NO_INSTRUCTIONS and words.takes != "conversation":
        raise InputError(
            f"instructions: the template {words.name} writes no questions; give a template for "
            "conversations, or leave out --instructions"
        )


def _existing(sources: list[Path]) -> list[Path]:
    if not sources:
        raise InputError("sources: none given; name at least one conversation file")
    for path in sources:
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such file; name a conversation file")
    return [Path(path) for path in sources]


def _sight(read: Format, sources: list[Path], images: list[Path]) -> Sight:
    """Tars among the sources, then the places given, or else the folders of the sources."""
    containers = []
    for path in read.image_tars(sources):
        tar = describe(path)
        containers += [tar, tar._replace(kind="base64")]
    given = [describe(path) for path in images]
    searched = [len(containers) + number for number in range(len(given))]
    containers += given
    beside = []
    for folder in [] if images else [describe(source.parent) for source in sources]:
        if folder not in containers:
            containers.append(folder)
        beside.append(containers.index(folder))
    return Sight(containers, searched, beside)


def _write_tokenizer(partial: Partial, vocabulary: Tokenizer) -> None:
    with partial.writing():
        vocabulary.save(partial.dataset / TOKENIZER_FOLDER)


def _index_images(partial: Partial, sight: Sight, workers: int, display: ProgressDisplay) -> None:
    """The index of names in the tars given, unless an earlier run has made it."""
    if (partial.path / image_places.PLACES).exists() or not sight.searched_tars():
        return

    def ordered_map(
        function: Callable[[tuple[int, str]], bytes], jobs: Iterable[tuple[int, str]]
    ) -> Generator[bytes, None, None]:
        for number, rows in enumerate(in_order(function, jobs, workers)):
            display.stage(f"{number + 1} of {len(sight.searched_tars())} tar files indexed")
            yield rows

    with partial.writing():
        image_places.build(sight.searched_tars(), partial.path, ordered_map)


def _render(
    renderer: Renderer, chunks: Iterable[Chunk], writer: DatasetWriter, workers: int, display: ProgressDisplay
) -> None:
    """Render what is left of the chunks and append it in their order."""
    with closing(in_order(renderer, chunks, workers)) as rendered:
        for piece in rendered:
            writer.write(piece)
            display.update(writer.counts["samples"])
        display.stage("hashing what was written")
        writer.finish()


def _finish(partial: Partial, manifest: Manifest, workers: int) -> None:
    """Hash the files, write the manifest, make the directory appear."""
    _refuse_nothing(partial.dataset / indexed.SKIPPED, manifest)
    with partial.writing():
        tokenizer = sorted(path.name for path in (partial.dataset / TOKENIZER_FOLDER).iterdir())
        names = [*indexed.FILES, *(f"{TOKENIZER_FOLDER}/{name}" for name in tokenizer)]
        manifest.files = describe_files(partial.dataset, names, workers)
        manifest.write(partial.dataset)
    partial.commit()


def _refuse_nothing(skipped: Path, manifest: Manifest) -> None:
    """InputError where no sample is left, or none of those whose images were looked up."""
    if manifest.counts["images"]:
        return
    with open(skipped, encoding="utf-8") as file:
        lines = [line.strip() for line in islice(file, 1)]
        file.seek(0)
        lost = next((line.strip() for line in file if json.loads(line)["image"] is not None), None)
    where = f"{manifest.sources[0]}: "
    if lost is not None:
        raise InputError(
            f"{where}not one of the images could be used, the first being that of {lost}; "
            "check the folders or tar files given as --images"
        )
    if not manifest.counts["samples"]:
        if not lines:
            raise InputError(f"{where}holds nothing of split {manifest.options['split']!r}; check --split")
        raise InputError(f"{where}every entry was skipped, the first being {lines[0]}; check the sources")


def _same_or_refuse(out: Path, preparation: str) -> PrepareReport:
    if not (out / MANIFEST).is_file():  # it may be the user's pictures: never advise to remove it
        raise InputError(f"{out}: exists and is no prepared dataset; choose another --out")
    refusal = InputError(f"{out}: exists and was prepared otherwise; remove it or choose another --out")
    try:
        found = Manifest.read(out)
    except InputError:
        raise refusal from None
    if found.preparation != preparation:
        raise refusal
    try:
        found.check_files(out, indexed.HASH_LIMIT)
    except InputError:
        raise InputError(f"{out}: is damaged; remove it and run `megamm prepare` again") from None
    with contextlib.suppress(MegammError), Partial(out) as left:  # by a run that was killed at its very end
        left.discard()
    return PrepareReport(out, found.counts, out / indexed.SKIPPED, up_to_date=True)


def _preparation(manifest: Manifest, sources: list[Path], read: Format, threads: int) -> str:
    """Hash of everything that decides the contents of the dataset. Tars full of images count by their size
    and time of change: they may have terabytes."""
    tars = {str(path) for path in read.image_tars(sources)}

    def identity(path: Path) -> str:
        status = path.stat()
        return f"{status.st_size} {status.st_mtime_ns}" if str(path) in tars else file_sha256(path)

    with ThreadPoolExecutor(threads) as pool:
        hashes = list(pool.map(identity, sources))
    parts = {
        "sources": hashes,
        "names": manifest.sources,
        "format": manifest.source_format,
        "options": manifest.options,
        "instructions": manifest.instructions,
        "template": manifest.template,
        "image_checks": manifest.image_checks,
        "tokenizer": manifest.tokenizer_sha256,
        "containers": manifest.containers,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
