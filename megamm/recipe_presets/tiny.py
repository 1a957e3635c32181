"""The preset `tiny`: a stage of a recipe on two CPU cores, in less than a minute.

It is the same stage: assembly, connector, gated blocks, templates, what is frozen, the shape of the schedule
(each number of steps in proportion), accumulation, the order of stages. Sizes, batch and steps are small,
the peak learning rate is that of small models trained from random weights, and numbers are fp32.

Everything it reads and writes has a root of its own, `runs/tiny`: "data/x/pairs" becomes
"runs/tiny/data/x/pairs", and "runs/x/pretrain", where a stage leaves its weights, "runs/tiny/x/pretrain".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

from megamm.config import (
    DataConfig,
    Fp8Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
)
from megamm.recipe_presets.small_model import Sizes, small_model, small_stage

ROOT = PurePosixPath("runs/tiny")
STAGES = "runs"  # where recipes have their run directories

STEPS = 160
PEAK_LR = 4e-3  # ours; published rates are for large batches and pretrained weights
MICRO_BATCHES, MICRO_BATCH_SIZE = 2, 8
VALIDATION_BATCHES = 3  # as many as there are held-out samples for
SEQUENCE_LENGTH = 192  # at most; shorter ones stay
MAX_IMAGES = 3
SIZES = Sizes(
    vocab_size=640,  # with fewer, a system message would fill the row
    width=64,
    mlp_width=128,
    patches=4,
    window=32,
    latents=8,
    connector_head_dim=16,
    init_std=0.2,  # so that a connector alone can learn words from a random, frozen language model
)


def tiny(recipe: Recipe) -> Recipe:
    """The same stage, small.

    Args:
        recipe: validated.
    """
    model = _model(recipe.model)
    return replace(
        recipe,
        run_dir=rooted(recipe.run_dir),
        tokenizer=rooted(recipe.tokenizer),
        model=model,
        data=_data(recipe.data),
        training=_training(recipe, model),
        optimizer=_optimizer(recipe.optimizer, recipe.training.steps),
        parallel=ParallelConfig(timeout_s=recipe.parallel.timeout_s),
        checkpoint=replace(recipe.checkpoint, interval=STEPS // 4, keep=1),
        validation=replace(
            recipe.validation,
            interval=recipe.validation.interval and STEPS // 4,
            data=_rooted(recipe.validation.data),
            questions=_rooted(recipe.validation.questions),
            images=_rooted(recipe.validation.images),
            batches=min(recipe.validation.batches, VALIDATION_BATCHES),
            max_new_tokens=min(recipe.validation.max_new_tokens, 8),
        ),
        log=replace(recipe.log, interval=10, wandb=None),
        hardware=replace(recipe.hardware, gpus=None),
    )


def rooted(path: str) -> str:
    """A path of the recipe below `ROOT`; what is absolute stays."""
    parts = PurePosixPath(path)
    if parts.is_absolute():
        return path
    return str(ROOT / (parts.relative_to(STAGES) if _is_of_a_stage(path) else parts))


def _rooted(path: str | None) -> str | None:
    return None if path is None else rooted(path)


def _is_of_a_stage(path: str) -> bool:
    return PurePosixPath(path).parts[:1] == (STAGES,)


def _model(model: ModelConfig) -> ModelConfig:
    small = small_model(model, SIZES)
    return replace(
        small,
        language=replace(small.language, max_positions=2 * SEQUENCE_LENGTH),
        vision=replace(small.vision, init_std=0.6),  # random positions have to differ
        image_token_id=None,  # the tokenizer is another one
    )


def _data(data: DataConfig) -> DataConfig:
    train = data.train
    if isinstance(train, list):
        train = [
            replace(
                source,
                path=rooted(source.path),
                sequence_length=source.sequence_length and min(source.sequence_length, SEQUENCE_LENGTH),
            )
            for source in train
        ]
    elif train is not None:
        train = rooted(train)
    decode_device = data.image.decode_device
    return replace(
        data,
        train=train,
        sequence_length=min(data.sequence_length, SEQUENCE_LENGTH),
        max_images=min(data.max_images, MAX_IMAGES),
        image=replace(
            data.image,
            num_workers=1,
            decode_device="auto" if decode_device == "gpu" else decode_device,
        ),
        workers=0,
    )


def _training(recipe: Recipe, model: ModelConfig) -> TrainingConfig:
    init_from = _rooted(recipe.training.init_from)
    if init_from is not None and not _is_of_a_stage(recipe.training.init_from or ""):
        # pretrained weights, which nobody has in this size; what a stage leaves has to be there
        init_from = init_from if _holds_checkpoint(Path(init_from)) else None
    return replace(
        small_stage(recipe.training, recipe.model, model),
        steps=STEPS,
        global_batch_size=MICRO_BATCHES * MICRO_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        precision="fp32",
        fp8=Fp8Config(),
        init_from=init_from,
        device="cpu",
    )


def _holds_checkpoint(path: Path) -> bool:
    """Whether training could start from there; a run directory, its checkpoints, or one of them."""
    return (path / "shards").is_dir() or any(
        any(path.glob(name)) for name in ("step_*", "checkpoints/step_*")
    )


def _optimizer(optimizer: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The same shape in fewer steps. The rate that the stage reaches is PEAK_LR, also where its warm-up is
    longer than the stage; all others are in proportion."""
    reached = optimizer.lr * min(1.0, steps / (optimizer.warmup_steps or 1))
    factor = PEAK_LR / reached
    return replace(
        optimizer,
        lr=optimizer.lr * factor,
        min_lr=optimizer.min_lr * factor,
        warmup_steps=_in_proportion(optimizer.warmup_steps, steps),
        decay_steps=optimizer.decay_steps and _in_proportion(optimizer.decay_steps, steps),
        parts=[
            replace(part, lr=part.lr and part.lr * factor, min_lr=part.min_lr and part.min_lr * factor)
            for part in optimizer.parts
        ],
    )


def _in_proportion(number: int, steps: int) -> int:
    """So many of `steps` steps among STEPS: none only if it was none."""
    return -(-number * STEPS // steps)
