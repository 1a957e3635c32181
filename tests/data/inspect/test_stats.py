"""Statistics are those of the samples, and the picture shows them all."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamm.data.assemble import Assembler
from megamm.data.indexed import PreparedDataset
from megamm.data.inspect.histogram import PERCENTILES, Histogram
from megamm.data.inspect.limits import Limits
from megamm.data.inspect.plot import _edges, _panels, draw, write_plot
from megamm.data.inspect.stats import collect
from megamm.data.tokenizer import Tokenizer
from megamm.errors import RunError
from tests.data.documents import document
from tests.data.helpers import varied

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, tokenizer_dir: Path) -> Path:
    return varied(tmp_path_factory.mktemp("stats") / "<b> & 'co'", 300, image_folder, tokenizer_dir)


@pytest.mark.parametrize("step", [1, 0.01])
def test_histograms_are_exact(step: float) -> None:
    draw_from, one, values = np.random.default_rng(4), Histogram(step), np.empty(0)
    for size in (1, 700, 0, 300):
        block = draw_from.lognormal(4, 1, size).round() * step
        one.add(block)
        values = np.concatenate([values, block])
    assert one.total == 1001 and one.mean == pytest.approx(values.mean())
    expected = np.percentile(values, PERCENTILES, method="inverted_cdf")
    assert [one.percentile(percent) for percent in PERCENTILES] == pytest.approx(expected.tolist())
    edges, _ = _edges(one, limit=None)
    bars = one.bars(edges)
    assert len(bars) > 10 and bars.sum() + (values > edges[-1]).sum() == len(values)


def test_statistics_are_those_of_the_samples(dataset: Path, tokenizer: Tokenizer) -> None:
    limits = Limits(tokens_per_image=16, sequence_length=150, max_images=2)
    found = collect(dataset, limits, None)
    stored = PreparedDataset(dataset)
    samples = [stored[row] for row in range(len(stored))]
    assembler = Assembler(16, tokenizer.image_id, 0)
    documents = [document(assembler, s.tokens, s.learnt, 150, 2) for s in samples]
    whole = [len(s.tokens) + 15 * len(s.images) for s in samples]
    cut = [d for d in documents if d.truncated]
    assert 20 < len(cut) < 280
    assert found.truncation == {
        "samples": len(cut),
        "samples_without_images": sum(d.num_dropped_images > 0 for d in cut),
        "images": sum(d.num_dropped_images for d in cut),
        "samples_without_loss": sum(not d.learnt for d in cut),
        "positions": sum(whole) - sum(len(d.input_ids) for d in documents),
    }
    expected = {
        "tokens": [len(s.tokens) for s in samples],
        "positions": whole,
        "images per sample": [len(s.images) for s in samples],
        "learnt tokens": [s.learnt.sum() for s in samples],
        "image width": [stored.image_sizes(s.images)[:, 0] for s in samples if len(s.images)],
        "image height": [stored.image_sizes(s.images)[:, 1] for s in samples if len(s.images)],
    }
    for name, values in expected.items():
        flat = np.concatenate(values) if "width" in name or "height" in name else np.array(values)
        assert np.array_equal(
            np.repeat(found.histograms[name].values, found.histograms[name].counts), np.sort(flat)
        )
    assert found.learnt == sum(int(s.learnt.sum()) for s in samples) and found.samples == 300
    shares = [s.learnt.mean() for s in samples]
    assert found.histograms["label share"].mean == pytest.approx(np.mean(shares), abs=1e-3)
    assert found.content()["distributions"]["tokens"]["percentiles"]["100"] == max(expected["tokens"])


def test_packing_is_that_of_training(dataset: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    from megamm.data.balance import Cost
    from megamm.data.concatenated import ConcatenatedDataset
    from megamm.data.step_plan import StepPlanner
    from tests.data.helpers import recipe

    made = recipe(dataset, tokenizer_dir, pack=True, balance=False, sequence_length=256)
    per_image = made.model.tokens_per_image
    limits = Limits(per_image, 256, 8, rows=4, row_samples=2, seed=made.seed, stage=made.stage)
    found = collect(dataset, limits, None).packing
    planner = StepPlanner(
        ConcatenatedDataset([PreparedDataset(dataset)]), Assembler(per_image, 419, 0), made, Cost(1, 1)
    )
    start = used = steps = 0
    while start < 300:
        plan = planner.plan((start,))
        used += sum(place.length for row in plan.micro_batches for place in row)
        (start,), steps = plan.end, steps + 1
    assert found is not None and found.steps == steps
    assert found.packed == pytest.approx(used / (steps * 4 * 512))
    assert found.samples_per_row == start / (steps * 4) and found.padded == pytest.approx(used / start / 256)
    assert found.padded < found.packed


def test_a_part_of_the_samples(dataset: Path) -> None:
    found = collect(dataset, Limits(), 40)
    assert (found.samples, found.all_samples) == (40, 300) == (found.histograms["tokens"].total, 300)
    assert found.truncation is None and found.packing is None and "positions" not in found.histograms
    assert "40 of them looked at" in found.lines()[0]
    assert collect(dataset, Limits(), 40).content() == found.content()


def test_the_picture_is_sound_and_shows_every_panel(dataset: Path, tmp_path: Path) -> None:
    found = collect(dataset, Limits(16, 150), None)
    write_plot(found, tmp_path / "a.svg", 150)
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    for title in ("Length in training", "Label share", "Images per sample", "Image aspect"):
        assert title in texts
    assert "limit 150" in texts and texts[0] == str(dataset)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    panels = list(root.iter(f"{SVG}g"))
    assert len(panels) == 6
    for panel, shown in zip(panels, _panels(found, 150), strict=True):
        bars = [one.attrib for one in panel.iter(f"{SVG}rect")]
        assert bars and all(float(bar["height"]) > 0 < float(bar["width"]) for bar in bars)
        counts = shown.histogram.bars(_edges(shown.histogram, shown.limit)[0])
        heights = np.array([float(bar["height"]) for bar in bars])
        assert np.allclose(heights / heights.max(), counts[counts > 0] / counts.max(), atol=1e-3)
        left, top = map(float, panel.attrib["transform"][10:-1].split())
        for bar in bars:
            assert left + float(bar["x"]) >= 0 and left + float(bar["x"]) + float(bar["width"]) <= width
            assert 0 <= top + float(bar["y"]) <= top + float(bar["y"]) + float(bar["height"]) <= height
    text_only = replace(found, histograms={k: v for k, v in found.histograms.items() if "image " not in k})
    assert len(list(ElementTree.fromstring(draw(text_only)).iter(f"{SVG}g"))) == 3
    with pytest.raises(RunError, match="choose another --plot"):
        write_plot(found, tmp_path / "none" / "a.svg")
