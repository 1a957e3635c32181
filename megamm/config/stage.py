"""What a stage of training is: optimizer, layout, steps, checkpoints; and the recipe of it all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from megamm.config.data import DataConfig
from megamm.config.model import ModelConfig, Part

# Of the templates in megamm/data/presets/templates.yaml.
TemplateName = Literal[
    "vicuna", "plain", "llama2_chat", "zephyr", "infimm", "xcomposer", "pair", "interleaved", "text"
]


@dataclass
class PartOptimizerConfig:
    """What the optimizer does differently with the weights of one part.

    Attributes:
        part: as in training.freeze.
        lr: peak rate instead of optimizer.lr; the minimum falls or rises in proportion, unless `min_lr`
            gives it. The schedule is that of the stage.
        weight_decay: instead of optimizer.weight_decay, for those of its weights that decay at all.
    """

    part: Part
    lr: Optional[float] = None
    min_lr: Optional[float] = None
    weight_decay: Optional[float] = None


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule (steps are optimizer steps).

    Attributes:
        decay_steps: steps over which the rate falls from `lr` to `min_lr`; None means training.steps.
        clip_grad: global gradient norm limit; 0 switches clipping off.
        no_decay: weights that do not decay: "vectors" are biases, norms and gates, "embeddings" those of
            tokens (and the output layer that shares them), "latents" the resampler's or the Q-Former's.
        parts: rates and decay of single parts, each at most once.
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
    no_decay: list[Literal["vectors", "embeddings", "latents"]] = field(default_factory=lambda: ["vectors"])
    parts: list[PartOptimizerConfig] = field(default_factory=list)


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
        new_tokens: the embeddings (and rows of the output layer) of the model.language.added_vocab tokens
            that were added to a pretrained vocabulary; the others stay as they are, bit for bit.
    """

    vision: Optional[int] = None
    language: Optional[int] = None
    new_tokens: bool = False


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
class Fp8Config:
    """Matrix multiplications of the decoder in 8 bits, by Transformer Engine (needs parallel.backend te and a
    GPU of compute capability 8.9 or newer). Weights are kept in bf16; encoder, connector, embeddings, output
    layer and adapters compute in bf16, and so does the whole model when it is not trained (validation,
    inference).

    Attributes:
        scaling: where a tensor's scale comes from: "delayed", from its largest values in the last
            `amax_history` steps (Micikevicius et al. 2022); "current", from its own; "blockwise", one for
            each block of 128 values (Hopper); "mxfp8", one for each 32 (Blackwell). "off": bf16.
        format: "hybrid" is E4M3 forward and E5M2 backward, "e4m3" both ways.
        amax_history, amax_choice: of "delayed".
        margin: of "delayed": powers of two that are left free above the largest value.
        bf16_layers_at_start, bf16_layers_at_end: decoder layers that stay in bf16; not of "delayed".
    """

    scaling: Literal["off", "delayed", "current", "blockwise", "mxfp8"] = "off"
    format: Literal["hybrid", "e4m3"] = "hybrid"
    amax_history: int = 1024
    amax_choice: Literal["max", "most_recent"] = "max"
    margin: int = 0
    bf16_layers_at_start: int = 0
    bf16_layers_at_end: int = 0


@dataclass
class TrainingConfig:
    """What one stage does.

    Attributes:
        steps: optimizer steps of the stage.
        freeze: parts that are not trained; "language" is the decoder without gated blocks and adapters.
        unfreeze: last blocks of frozen parts that are trained all the same.
        recompute: activations that are computed again instead of being kept.
        fp8: matrix multiplications in 8 bits; `precision` is that of everything else.
        init_from: a checkpoint whose weights start this stage.
        init_optimizer: what becomes of the moments of AdamW that come with `init_from`: "reset" starts
            afresh; "keep" takes them over, which needs them for every weight that is trained now. Steps,
            schedule and position in the data always start afresh.
        device: "auto" takes CUDA when there is one.
        deterministic: only operations that give the same bits every time, at some cost on GPUs: two runs of
            the same recipe on the same machines are then equal bit for bit. (On CPUs they are anyway.)
    """

    steps: int = 1000
    global_batch_size: int = 1
    micro_batch_size: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    freeze: list[Part] = field(default_factory=list)
    unfreeze: UnfreezeConfig = field(default_factory=UnfreezeConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    init_from: Optional[str] = None
    init_optimizer: Literal["reset", "keep"] = "reset"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay.

    Attributes:
        interval: optimizer steps between checkpoints; 0 writes only the last one.
        keep: how many of the newest stay on disk.
        keep_every: checkpoints at multiples of so many steps stay for good; 0: none.
        asynchronous: training goes on while files are written (weights are copied to memory first).
        max_failures: saves in a row that may fail before the run stops; 0: the first one stops it. That of
            the last step, or of a signal to stop, always has to succeed.
    """

    interval: int = 500
    keep: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    max_failures: int = 3


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
class ValidationConfig:
    """What is looked at while the stage is trained; it changes nothing in training.

    Attributes:
        interval: optimizer steps between looks; 0: none. The last step has one as well.
        data: a directory written by `megamm prepare`: its mean loss is logged.
        batches: micro-batches of `data`, over all data-parallel ranks together; always the same ones.
        questions: a file of questions in LLaVA's JSON format, answered by the model as it stands: picture,
            question and answer are kept as a panel.
        images: folder that the pictures of `questions` are relative to; None: that of the file.
        num_questions: how many of them, from the first on.
        max_new_tokens: of an answer.
    """

    interval: int = 0
    data: Optional[str] = None
    batches: int = 16
    questions: Optional[str] = None
    images: Optional[str] = None
    num_questions: int = 4
    max_new_tokens: int = 48


@dataclass
class PreflightConfig:
    """What is checked before the first step: what does not hold stops the run, is a warning, or is not looked
    at.

    Attributes:
        data: the data sets, by a sample of their rows and pictures.
        memory: the estimate of what a step needs against what the device has.
        disk: room for the checkpoints that are kept at once.
        network: a small collective over all processes, and one in each group, answers in time.
    """

    data: Literal["stop", "warn", "off"] = "stop"
    memory: Literal["stop", "warn", "off"] = "warn"
    disk: Literal["stop", "warn", "off"] = "stop"
    network: Literal["stop", "warn", "off"] = "stop"


@dataclass
class HardwareConfig:
    """What the stage is meant to run on: the default of `megamm plan`. Training takes what it is started on.

    Attributes:
        gpus: how many; None: as many as one copy of the model needs.
        gpu: which, as in megamm/planning/presets/hardware.yaml.
    """

    gpus: Optional[int] = None
    gpu: Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"] = "h100-80gb"


@dataclass
class AnomaliesConfig:
    """What becomes of a step whose loss or gradient is no number, or whose loss jumps. All ranks leave out
    the same update; weights, moments and step counts of the optimizer stay as they are bit by bit, and the
    step counts as one in the schedule and in the data.

    Attributes:
        non_finite: "skip" leaves out updates from a loss or a gradient that is NaN or infinite; "stop" ends
            the run at the first.
        spike_factor: leaves out an update whose loss is so many times the median of those before it, of the
            same group of sources; 0: none.
        spike_window: of how many updates the median is taken; there are no spikes before so many.
        in_a_row: so many updates left out in a row send the run back to the newest checkpoint before them of
            finite weights and moments, from which it goes on with the data behind them.
        max_rollbacks: how often in a stage; the next time ends the run.
    """

    non_finite: Literal["skip", "stop"] = "skip"
    spike_factor: float = 0.0
    spike_window: int = 32
    in_a_row: int = 5
    max_rollbacks: int = 2


@dataclass
class WatchdogConfig:
    """How ranks that hang or are slow are found. A run with a rank that hangs ends with exit code 69, after
    the stacks of all ranks were written to RUN_DIR/hangs.

    Attributes:
        enabled: look at all.
        silent_s: a process that gives no sign of life for so long is stopped, gone or stuck outside Python.
        stuck_s: one that lives and gets no further within a step for so long hangs; null: 20 times the
            longest of the last steps, at least 60 seconds. Around steps (data, checkpoints, validation) it
            is one call that lasts for nine tenths of parallel.timeout_s.
        slow_factor: a rank is reported as slow if it works so many times as long as others in its place, and
            they wait for it half of the time; 0: never.
    """

    enabled: bool = True
    silent_s: float = 20.0
    stuck_s: Optional[float] = None
    slow_factor: float = 3.0


@dataclass
class LogConfig:
    """What the run reports.

    Attributes:
        interval: optimizer steps between log lines.
        tensorboard: also write TensorBoard event files into the run directory.
        loss_half_life: steps after which a loss counts half in the smoothed loss (an exponential moving
            average without bias at the start).
        wandb: name of a Weights & Biases project that gets the metrics too (needs the extra [wandb]).
    """

    interval: int = 10
    tensorboard: bool = True
    loss_half_life: float = 20.0
    wandb: Optional[str] = None


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
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    anomalies: AnomaliesConfig = field(default_factory=AnomaliesConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    log: LogConfig = field(default_factory=LogConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
