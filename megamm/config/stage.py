"""What a stage of training is: data, optimizer, layout, steps, checkpoints; and the recipe of it all."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import PurePath
from typing import Literal, NamedTuple, Optional, Union

from megamm.config.model import ModelConfig, Part

# Of the templates in megamm/data/presets/templates.yaml.
TemplateName = Literal[
    "vicuna", "plain", "llama2_chat", "zephyr", "infimm", "xcomposer", "pair", "interleaved", "text"
]


@dataclass
class ImageConfig:
    """How pictures become tensors.

    Attributes:
        loader: "dali", "pillow", or "auto" (DALI where it works).
        fit: "squash" resizes to the square, "crop" resizes the shorter edge and crops the centre,
            "pad" pads to a square with the mean colour first.
        random_crop_scale: training only; crop a random area of at least this share of the picture
            and resize it (1.0 switches it off). Evaluation never crops at random.
        random_flip: training only; mirror left-right with probability one half.
        mean, std: per channel, for values in [0, 1].
        scaled_decode: decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is still at least as large as
            what is made of it: two to three times as fast, and one or two of 255 levels off on average. null:
            in training alone.
        decode_device: "gpu" decodes and resizes on the GPU of the training process (DALI, data.workers 0);
            "auto" is "cpu".
        max_pixels: larger pictures are refused before they are decoded.
        num_workers: decoding threads of each loading process.
    """

    loader: Literal["auto", "dali", "pillow"] = "auto"
    fit: Literal["squash", "crop", "pad"] = "crop"
    random_crop_scale: float = 1.0
    random_flip: bool = False
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    scaled_decode: Optional[bool] = None
    decode_device: Literal["auto", "cpu", "gpu"] = "auto"
    max_pixels: int = 64_000_000
    num_workers: int = 1


@dataclass
class SourceConfig:
    """One of several datasets that are trained on together. Either all have a weight, or all have epochs, or
    none has either: then each counts as one epoch.

    Attributes:
        path: a directory written by `megamm prepare`.
        weight: its part of the samples, compared with the other weights.
        epochs: how often each of its samples comes while those of a source of one epoch come once.
        sequence_length: S of its rows; None means data.sequence_length. Sources of different S never share
            a step.
        name: in logs and checkpoints, and part of the key of its order; None means the last part of the path.
    """

    path: str
    weight: Optional[float] = None
    epochs: Optional[float] = None
    sequence_length: Optional[int] = None
    name: Optional[str] = None


class NamedSource(NamedTuple):
    """A source with everything that its recipe leaves to defaults. `rate` is its weight or its epochs."""

    name: str
    path: str
    sequence_length: int
    rate: Fraction
    by_weight: bool


@dataclass
class DataConfig:
    """What is trained on.

    Attributes:
        train: a directory written by `megamm prepare`, or a list of several, each with its share. How long
            the stage is, training.steps says.
        sequence_length: S; shorter samples are padded, longer ones truncated (never inside an image).
        pure_batches: samples with images and those without never share a step.
        pack: fill rows with several whole samples, each of which attends to itself alone. A micro-batch is
            then one row of micro_batch_size * sequence_length positions, and global_batch_size counts rows
            of sequence_length. Off: one sample per row, padded.
        balance: deal the samples of a step over its micro-batches so that they cost about the same (text
            and images both counted); which samples a step has does not change.
        max_images: per sample; a sample with more is cut before the first image too many. With `pack`, a
            micro-batch has at most micro_batch_size times as many.
        max_bad_images: stop the run when more than this share of samples had to be replaced.
        prefetch: micro-batches prepared ahead.
        workers: loader processes of each reading rank; 0 loads in a thread of the training process.
    """

    train: Optional[Union[str, list[SourceConfig]]] = None
    sequence_length: int = 2048
    pure_batches: bool = False
    pack: bool = False
    balance: bool = True
    max_images: int = 8
    image: ImageConfig = field(default_factory=ImageConfig)
    max_bad_images: float = 0.05
    prefetch: int = 4
    workers: int = 0

    def sources(self) -> list[NamedSource]:
        """The datasets of `train`, with all defaults filled in."""
        given = [SourceConfig(self.train)] if isinstance(self.train, str) else self.train or []
        by_weight = any(source.weight is not None for source in given)
        return [
            NamedSource(
                source.name or PurePath(source.path).name,
                source.path,
                source.sequence_length or self.sequence_length,
                _as_written((source.weight if by_weight else source.epochs) or 1.0),
                by_weight,
            )
            for source in given
        ]

    def sequence_lengths(self) -> list[int]:
        """Every S that rows may have, each once."""
        lengths = [source.sequence_length for source in self.sources()]
        return list(dict.fromkeys(lengths or [self.sequence_length]))


def _as_written(number: float) -> Fraction:
    """0.1 as one tenth, not as the binary number that comes close to it."""
    return Fraction(str(number))


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule (steps are optimizer steps).

    Attributes:
        decay_steps: steps over which the rate falls from `lr` to `min_lr`; None means training.steps.
        clip_grad: global gradient norm limit; 0 switches clipping off.
    """

    lr: float = 1e-3
    min_lr: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: Optional[int] = None
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass
class ParallelConfig:
    """How the model is laid out; data parallelism takes the remaining processes.

    Attributes:
        tensor, pipeline: group sizes.
        virtual_pipeline: model chunks per pipeline stage (interleaved schedule); None means 1.
        pipeline_layout: which layers each stage holds, in megatron-core's notation: E embedding (with the
            vision encoder and connector), t decoder layer, L output layer, | between stages (stage 0, 1,
            ... of the first chunk, then of the next), "Ett|t*3|tL"; None deals the layers evenly.
        context: ranks over which a sequence is split (context parallelism).
        sequence: sequence parallelism (needs tensor > 1).
        distributed_optimizer: optimizer state sharded over the data-parallel group (ZeRO-1).
        backend: transformer layers from Transformer Engine ("te"), from megatron-core and megamm
            ("local"), or the best that works ("auto").
        timeout_s: a collective that takes longer fails the run instead of hanging.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: Optional[int] = None
    pipeline_layout: Optional[str] = None
    context: int = 1
    sequence: bool = False
    distributed_optimizer: bool = True
    backend: Literal["auto", "te", "local"] = "auto"
    timeout_s: int = 600


@dataclass
class UnfreezeConfig:
    """Parts of a frozen module that are trained all the same: its last blocks.

    Attributes:
        vision, language: the first block (from 0) that is trained, although training.freeze names the
            module; None: none of it. What lies behind the blocks (final norm, output layer) is trained
            along with them, embeddings are not.
    """

    vision: Optional[int] = None
    language: Optional[int] = None


@dataclass
class RecomputeConfig:
    """What is computed again in the backward pass instead of being kept.

    Attributes:
        language: "full" keeps only the inputs of decoder layers, "selective" recomputes `modules` of
            each, "none" keeps everything.
        modules: of "selective": "core_attn" (attention without its linears), "mlp".
        layers: of "full": how many of the layers of each pipeline chunk; None means all.
        vision, connector: keep only the inputs of the encoder's blocks, of the connector.
    """

    language: Literal["none", "selective", "full"] = "none"
    modules: list[Literal["core_attn", "mlp"]] = field(default_factory=lambda: ["core_attn"])
    layers: Optional[int] = None
    vision: bool = False
    connector: bool = False


@dataclass
class TrainingConfig:
    """What one stage does.

    Attributes:
        steps: optimizer steps of the stage.
        freeze: parts that are not trained; "language" is the decoder without gated blocks and adapters.
        unfreeze: last blocks of frozen parts that are trained all the same.
        recompute: activations that are computed again instead of being kept.
        init_from: a checkpoint whose weights start this stage (optimizer and step start afresh).
        device: "auto" takes CUDA when there is one.
    """

    steps: int = 1000
    global_batch_size: int = 1
    micro_batch_size: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    freeze: list[Part] = field(default_factory=list)
    unfreeze: UnfreezeConfig = field(default_factory=UnfreezeConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    init_from: Optional[str] = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay.

    Attributes:
        interval: optimizer steps between checkpoints; 0 writes only the last one.
        keep: how many of the newest stay on disk.
        asynchronous: training goes on while files are written (weights are copied to memory first).
    """

    interval: int = 500
    keep: int = 2
    asynchronous: bool = True


@dataclass
class ResumeConfig:
    """What happens when the run directory already has checkpoints.

    Attributes:
        enabled: go on from the newest good checkpoint; false insists on a run directory without any.
        strict: a damaged newest checkpoint stops the run instead of falling back to an older one.
    """

    enabled: bool = True
    strict: bool = False


@dataclass
class LogConfig:
    """What the run reports.

    Attributes:
        interval: optimizer steps between log lines.
        tensorboard: also write TensorBoard event files into the run directory.
    """

    interval: int = 10
    tensorboard: bool = True


@dataclass
class Recipe:
    """One training stage, complete.

    Attributes:
        name: of the run, for logs.
        stage: of the training ("alignment", "instruct", ...); part of the key of the sample order.
        seed: of weights and sample order.
        run_dir: everything the run writes lies here.
        tokenizer: a tokenizer directory, a SentencePiece .model file or a tokenizer.json.
        template: prompt template for questions at inference; training data carry theirs.
    """

    name: str
    run_dir: str
    tokenizer: str
    model: ModelConfig
    stage: str = "train"
    seed: int = 1
    template: TemplateName = "vicuna"
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    log: LogConfig = field(default_factory=LogConfig)
