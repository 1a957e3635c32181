"""The recipes of the four systems against their specification, which is written out here once more: nothing
in this file is derived from the YAML files."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

import pytest

from megamm.cli.entry import build_parser
from megamm.config import ParallelConfig, Recipe
from megamm.convert.tables import idefics, infimm, llava, xcomposer
from megamm.engine import groups
from megamm.engine.weights import named_shards
from megamm.planning.dry_run import PartSize, parameter_counts
from megamm.planning.shard import build_shard, fake_model, first_rank_of_stage
from megamm.recipe import load_recipe, validate, validate_world

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
QUICKSTART = 2


@dataclass(frozen=True)
class Stage:
    """What a stage must be. The rows of the table below are in this order."""

    steps: int
    batch: tuple[int, int, int, int]  # global = micro-batch x data parallel x accumulation
    gpus: int
    lengths: set[int]
    lr: tuple[float, float]
    warmup: int
    betas: tuple[float, float]
    eps: float
    trained: int


@dataclass(frozen=True)
class System:
    """A system: its stages in their order, its size, what it is exported with.

    Attributes:
        total: parameters as published, with the vocabulary of the published model.
        new_tokens: how many embeddings (and output rows) of `hidden` our tokenizer needs beyond these.
        sizes: of a picture, of the encoder's features, of what the language model sees of them.
    """

    stages: dict[str, Stage]
    total: int
    new_tokens: int
    hidden: int
    sizes: tuple[int, int, int]
    gpu: str
    table: Any


B95, B999 = (0.9, 0.95), (0.9, 0.999)


def infimm_system(total: int, aligned: int, tuned: int, hidden: int, **batches: Any) -> System:
    """Table 7 of InfiMM; what its models share."""
    rows = {
        "pretrain": Stage(
            285_000, batches["pretrain"], 40, {32, 384}, (1e-4, 1e-4), 6000, B95, 1e-8, aligned
        ),
        "multitask": Stage(10_000, batches["multitask"], 32, {128}, (1e-5, 1e-6), 500, B999, 1e-5, aligned),
        "instruct": Stage(6000, batches["instruct"], 32, {512}, (5e-6, 5e-7), 300, B999, 1e-5, tuned),
    }
    return System(rows, total, 0, hidden, (224, 257, 64), "a100-80gb", infimm.table)


BATCHES_13B = {"pretrain": (5120, 16, 20, 16), "multitask": (256, 32, 8, 1), "instruct": (64, 16, 4, 1)}
BATCHES_7B = {"pretrain": (5120, 16, 40, 8), "multitask": (256, 16, 16, 1), "instruct": (64, 8, 8, 1)}
SIZES_13B = (18_468_041_384, 4_441_010_472, 17_456_895_272, 5120)
# One of IDEFICS' blocks with normed queries and keys; its resampler; the last 8 blocks of OpenCLIP's bigG
BLOCK_65B, RESAMPLER_65B = 702_562_306 + 2 * 128, 194_418_432 + 6 * 2 * 2 * 96
VIT_BLOCKS = 8 * (4 * 1664**2 + 4 * 1664 + 2 * 1664 * 8192 + 8192 + 1664 + 4 * 1664)
NEW_65B = 20 * BLOCK_65B + RESAMPLER_65B
SYSTEMS = {
    "xcomposer_7b": System(
        {
            "pretrain": Stage(8000, (1024, 16, 64, 1), 64, {128}, (2e-4, 1e-5), 200, B95, 1e-8, 104_799_744),
            "instruct": Stage(3516, (1024, 1, 64, 16), 64, {2048}, (2e-5, 0.0), 1000, B95, 1e-8, 104_799_744),
        },
        total=7_730_401_728,
        new_tokens=1,
        hidden=4096,
        sizes=(336, 577, 66),
        gpu="a100-80gb",
        table=xcomposer.table,
    ),
    "flamingo_65b": System(
        {
            "pretrain": Stage(209_000, (2048, 16, 8, 16), 512, {64}, (2e-5, 1e-6), 2000, B95, 1e-8, NEW_65B),
            "finetune": Stage(
                6000,
                (256, 1, 8, 32),
                512,
                {1024},
                (1e-5, 1e-6),
                200,
                B95,
                1e-8,
                65_285_660_672 + 2 * 8192 + NEW_65B + VIT_BLOCKS,
            ),
        },
        total=65_285_660_672 + 1_844_907_264 - 1664 * 1280 + NEW_65B,  # no projection behind the encoder
        new_tokens=1,
        hidden=8192,
        sizes=(224, 257, 64),
        gpu="h100-80gb",
        table=idefics.table,
    ),
    "infimm_zephyr_7b": infimm_system(10_603_421_344, 2_350_526_752, 9_592_275_232, 4096, **BATCHES_7B),
    "infimm_llama2_13b": infimm_system(*SIZES_13B, **BATCHES_13B),
    "infimm_vicuna_13b": infimm_system(*SIZES_13B, **BATCHES_13B),
    "llava15_13b": System(
        {
            "pretrain": Stage(
                291, (2048, 8, 32, 8), 32, {704}, (2e-5, 0.0), 1000, B95, 1e-8, 31_467_520
            ),  # 595,375 / 2048, rounded up
            "instruct": Stage(
                975,  # 3 x 665,298 / 2048, rounded up
                (2048, 4, 8, 64),
                32,
                {2048},
                (1e-5, 0.0),
                1000,
                B95,
                1e-8,
                13_047_331_840 + 2 * 5120,
            ),
        },
        total=13_350_839_296,
        new_tokens=1,
        hidden=5120,
        sizes=(336, 576, 576),
        gpu="a100-80gb",
        table=llava.table,
    ),
}
STAGES = [(name, stage) for name, system in SYSTEMS.items() for stage in system.stages]


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


@cache
def recipe_of(system: str, stage: str) -> Recipe:
    return load_recipe(EXAMPLES / system / f"{stage}.yaml")


@cache
def counts(system: str, stage: str) -> dict[str, PartSize]:
    return parameter_counts(recipe_of(system, stage))


def test_all_recipes_are_known() -> None:
    found = {path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.yaml")}
    wanted = {Path(system) / f"{stage}.yaml" for system, stage in STAGES}
    assert len(wanted) == 15 and len(found) == 15 + QUICKSTART
    assert {path for path in found if path.parts[0] != "quickstart"} == wanted


@pytest.mark.parametrize(("system", "stage"), STAGES)
def test_optimizer_and_batch_are_the_specified_ones(system: str, stage: str) -> None:
    recipe, wanted = recipe_of(system, stage), SYSTEMS[system].stages[stage]
    o, t = recipe.optimizer, recipe.training
    assert (t.steps, o.schedule, o.warmup_steps, o.decay_steps) == (
        wanted.steps,
        "cosine",
        wanted.warmup,
        None,
    )
    assert ((o.lr, o.min_lr), (o.beta1, o.beta2), o.eps) == (wanted.lr, wanted.betas, wanted.eps)
    assert (o.weight_decay, o.clip_grad, t.precision) == (0.1, 1.0, "bf16")
    assert (recipe.hardware.gpus, recipe.hardware.gpu) == (wanted.gpus, SYSTEMS[system].gpu)
    data_parallel = validate_world(recipe, wanted.gpus)
    together, micro, ranks, accumulation = wanted.batch
    assert (t.global_batch_size, t.micro_batch_size, data_parallel) == (together, micro, ranks)
    assert together == micro * ranks * accumulation
    assert set(recipe.data.sequence_lengths()) == wanted.lengths
    assert not recipe.data.pack  # global batches are given in samples


@pytest.mark.parametrize(("system", "stage"), STAGES)
def test_only_what_is_said_in_the_recipe_is_warned_of(system: str, stage: str) -> None:
    """LLaVA's warm-up does not end: the rates it reaches are 5.8e-6 and 9.75e-6."""
    reached = {"pretrain": "5.82e-06", "instruct": "9.75e-06"} if system == "llava15_13b" else {}
    found = validate(recipe_of(system, stage))
    assert len(found) == (1 if reached else 0)
    assert all("warmup_steps" in line and reached[stage] in line for line in found)


@pytest.mark.parametrize("system", SYSTEMS)
def test_stages_hand_over_to_each_other(system: str) -> None:
    recipes = [recipe_of(system, stage) for stage in SYSTEMS[system].stages]
    assert recipes[0].training.init_from == f"checkpoints/{system}"
    for stage, recipe in zip(SYSTEMS[system].stages, recipes, strict=True):
        assert (recipe.stage, recipe.run_dir) == (stage, f"runs/{system}/{stage}")
        assert (recipe.model, recipe.tokenizer) == (recipes[0].model, f"data/{system}/tokenizer")
        assert all(source.path.startswith(f"data/{system}/") for source in recipe.data.sources())
    for before, after in pairwise(recipes):
        assert after.training.init_from == before.run_dir
    model = recipes[0].model
    seen = model.connector.num_latents if model.assembly == "cross_attention" else model.tokens_per_image
    assert (model.vision.image_size, model.vision.num_features, seen) == SYSTEMS[system].sizes


@pytest.mark.parametrize(("system", "stage"), STAGES)
def test_parameters_are_those_of_the_system(system: str, stage: str) -> None:
    wanted = SYSTEMS[system]
    found = counts(system, stage)
    more = 2 * wanted.new_tokens * wanted.hidden
    assert sum(part.total for part in found.values()) == wanted.total + more
    assert sum(part.trainable for part in found.values()) == wanted.stages[stage].trained


@pytest.mark.parametrize(("system", "stage"), STAGES)
def test_every_pipeline_stage_builds_at_the_size_of_the_paper(system: str, stage: str) -> None:
    recipe, world = recipe_of(system, stage), SYSTEMS[system].stages[stage].gpus
    stages = range(recipe.parallel.pipeline)
    shards = [build_shard(recipe, world, first_rank_of_stage(recipe, world, number)) for number in stages]
    layers = [number for shard in shards for numbers in shard.layers for number in numbers]
    assert layers == list(range(recipe.model.language.num_layers))
    assert shards[0].holds_embedding and shards[-1].holds_output
    # of 80 GB, what stays for the whole run leaves room for activations
    assert max(shard.held.total for shard in shards) < 45e9
    # nothing is lost: the ranks of a tensor group together hold at least the model
    held = recipe.parallel.tensor * sum(shard.all.total for shard in shards)
    assert held >= sum(part.total for part in counts(system, stage).values())


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_last_stage_can_be_exported(system: str) -> None:
    """Every weight has a place in the format that README.md names, in its shape."""
    recipe = recipe_of(system, list(SYSTEMS[system].stages)[-1])
    table = SYSTEMS[system].table(recipe.model)
    with fake_model(replace(recipe, parallel=ParallelConfig(backend="local")), 1, 0) as (_, models):
        shapes = {shard.name: tuple(shard.global_shape) for shard in named_shards(models[0])}
    places = {rule.ours: tuple(rule.our_shape()) for rule in table.rules}
    assert {name: places.get(name) for name in shapes} == shapes


def test_scripts_start_their_recipe_with_all_arguments(tmp_path: Path) -> None:
    """From any directory, with the root as the current one; blanks within arguments survive."""
    cluster = tmp_path / "a b" / "examples" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "launch.sh").write_text('pwd\nprintf "%s\\n" "$@"\n')
    for system, stage in STAGES:
        script = cluster.parent / system / f"{stage}.sh"
        script.parent.mkdir(exist_ok=True)
        shutil.copy(EXAMPLES / system / script.name, script)
        command = ["bash", str(script), "--preset", "tiny", "--training.freeze=[vision, language]"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=10, check=True)
        root, recipe, *arguments = done.stdout.splitlines()
        assert root == str(tmp_path / "a b") and arguments == command[2:]
        assert recipe == f"examples/{system}/{stage}.yaml" and (ROOT / recipe).is_file()
        assert len(script.read_text().splitlines()) <= 5


@pytest.mark.parametrize("system", SYSTEMS)
def test_commands_of_the_readme_are_commands(system: str) -> None:
    """Every `megamm` line of README.md is accepted by the parser; together they make what recipes name."""
    text = (EXAMPLES / system / "README.md").read_text().replace("\\\n", " ")
    parser, variables, written = build_parser(), {}, set()
    for line in (line.strip() for line in text.splitlines() if line.startswith("    ")):
        if match := re.fullmatch(r'([A-Z])="?(.*?)"?', line):
            variables[match[1]] = match[2]
        if not line.startswith("megamm "):
            continue
        words = shlex.split(Template(line).substitute(variables), comments=True)[1:]
        if words[:2] == ["prepare", "tokenizer"]:
            words[:2] = ["prepare tokenizer"]
        args, rest = parser.parse_known_args(words)
        assert not rest, rest
        written.add(str(getattr(args, "out", "")))
    assert f"checkpoints/{system}" in written
    for stage in SYSTEMS[system].stages:
        recipe = recipe_of(system, stage)
        assert {source.path for source in recipe.data.sources()} <= written
        assert {recipe.tokenizer, recipe.validation.data} <= written
        for command in (f"megamm plan examples/{system}/{stage}.yaml", f"bash examples/{system}/{stage}.sh"):
            assert f"    {command}\n" in text
        for size in (
            sum(part.total for part in counts(system, stage).values()),
            sum(part.trainable for part in counts(system, stage).values()),
        ):
            assert f"{size:,} |" in text


@pytest.mark.parametrize("system", SYSTEMS)
def test_other_readings_that_the_readme_names_are_recipes(system: str) -> None:
    """Every line that starts a stage with other values makes a valid recipe."""
    text = (EXAMPLES / system / "README.md").read_text().replace("\\\n", " ")
    for line in re.findall(rf"^    bash (examples/{system}/.*--.*)$", text, re.MULTILINE):
        script, *values = shlex.split(line)
        if values == ["--preset", "tiny"]:
            continue
        recipe = load_recipe(ROOT / script.replace(".sh", ".yaml"), values)
        validate_world(recipe, recipe.hardware.gpus or 0)
