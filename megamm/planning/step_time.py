"""How long an optimizer step takes, on paper.

Each pipeline stage is timed for a micro-batch (planning/work.py, timing.py, pieces.py). With m micro-batches
and v chunks for each of p stages, whose times are t_i,

    pipeline = m max t + (sum t - max t) / v

which is the 1F1B schedule's (m + p - 1) t for equal stages. Tensors between stages are waited for; the
interleaved schedule sends v times as many while it computes, and waits for what takes longer than that, and
while the pipeline is filled and emptied. Behind it comes what megamm does not overlap:
the reduce-scatter of fp32 gradients and the all-gather of the weights over data parallelism, both of trained
parameters alone, and the optimizer. The loading of data is taken to be hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megamm.config import Recipe
from megamm.planning.flops import flops_by_part, recomputed_flops
from megamm.planning.hardware import Gpu
from megamm.planning.layout import StageContents, stage_layers
from megamm.planning.pieces import Cost, Pieces
from megamm.planning.timing import link_rate, memory_rate
from megamm.planning.work import ELEMENT, Batch
from megamm.recipe_checks import validate_world

OPTIMIZER_BYTES = (
    30  # for each weight: AdamW's gradient, master weight and moments in fp32, the weight written
)
BUFFER_BYTES = 12  # for each gradient: cleared, and read for its norm and for clipping
GRADIENT_BYTES = 4  # sent in fp32


@dataclass(frozen=True)
class StageTime:
    """A pipeline stage, for one micro-batch: its cost, and its waiting for tensors of other stages, when the
    pipeline is full and while it is filled and emptied."""

    cost: Cost
    pipeline: float
    filling: float

    @property
    def seconds(self) -> float:
        return self.cost.total + self.pipeline


@dataclass(frozen=True)
class Schedule:
    """Where the seconds of a step go: `forward` to `optimizer` are those of the slowest pipeline stage.

    Attributes:
        forward, backward, recompute: computing, without waiting.
        tensor, pipeline: waiting for the tensor- (and context-) parallel group, for tensors of other stages.
        bubble: the pipeline is filled and emptied.
        data: gradients and weights over data parallelism; nothing of it is overlapped.
        products, attention, memory: computing again, by what limits it.
    """

    forward: float
    backward: float
    recompute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float
    products: float
    attention: float
    memory: float

    @property
    def compute(self) -> float:
        return self.forward + self.backward + self.recompute

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        waiting = self.tensor + self.pipeline + self.bubble + self.data
        return self.compute + waiting + self.optimizer


@dataclass(frozen=True)
class StepTime:
    """An optimizer step in a layout; sequence lengths are averaged over the sources.

    Attributes:
        stages: of the pipeline, for one micro-batch of the longest rows.
        model_flops: of the step, by part, as planning/flops.py defines them.
        hardware_flops: with what is recomputed, all parts.
        mfu, hfu: of the dense bf16 peak of all GPUs.
        tokens_per_s_per_gpu: positions of the language model.
        steps: of the stage, for its days and GPU-hours.
    """

    schedule: Schedule
    stages: list[StageTime]
    num_micro_batches: int
    model_flops: dict[str, float]
    hardware_flops: float
    mfu: float
    hfu: float
    tokens_per_s_per_gpu: float
    samples_per_s: float
    world: int
    steps: int

    @property
    def seconds(self) -> float:
        return self.schedule.seconds

    @property
    def days(self) -> float:
        """Of the whole stage."""
        return self.seconds * self.steps / 86400

    @property
    def gpu_hours(self) -> float:
        """Of the whole stage."""
        return self.seconds * self.steps * self.world / 3600


def data_parallel_size(recipe: Recipe, world: int) -> int:
    """Raises InputError where the layout or the batch does not fit; a decoder alone is as good as any."""
    if recipe.model.assembly == "language":
        recipe = replace(recipe, model=replace(recipe.model, assembly="merged"))
    return validate_world(recipe, world)


def images_per_row(recipe: Recipe) -> float:
    """What the planner takes if it is not told: one image in a sample; in a packed row of merged images, as
    many as fit with 256 positions of text for each."""
    model, data = recipe.model, recipe.data
    if model.assembly == "language":
        return 0.0
    if data.pack and model.assembly == "merged":
        return float(min(data.max_images, max(1, data.sequence_length // (model.tokens_per_image + 256))))
    return float(min(1, data.max_images))


def length_shares(recipe: Recipe) -> dict[int, float]:
    """Share of the samples that have rows of each length: by the weights of the sources, and equally often
    from each where they have epochs instead (how large they are is not looked up)."""
    sources = recipe.data.sources()
    if not sources:
        return {recipe.data.sequence_length: 1.0}
    shares = dict.fromkeys(recipe.data.sequence_lengths(), 0.0)
    whole = sum(source.rate if source.by_weight else 1 for source in sources)
    for source in sources:
        shares[source.sequence_length] += float((source.rate if source.by_weight else 1) / whole)
    return shares


def batch_of(recipe: Recipe, length: int, images: float) -> Batch:
    """A micro-batch of rows of `length` with `images` images each; all text carries loss."""
    samples = recipe.training.micro_batch_size
    own = images * recipe.model.tokens_per_image if recipe.model.assembly == "merged" else 0.0
    labels = max(length - own, 1.0)
    return Batch(samples, length, samples * images, samples * labels)


def step_time(recipe: Recipe, world: int, gpu: Gpu, images: float | None = None) -> StepTime:
    """The time of a step of `recipe` on `world` GPUs.

    Args:
        images: in a row, on average; None: as images_per_row takes it.
    Raises:
        InputError: the layout or the batch does not fit the number of processes.
    """
    images = images_per_row(recipe) if images is None else images
    layout, shares, schedules, stages = stage_layers(recipe), length_shares(recipe), [], []
    for length, share in sorted(shares.items()):
        pieces = Pieces(recipe, gpu, batch_of(recipe, length, images))
        stages = stage_times(recipe, world, gpu, pieces, layout, length)
        schedules.append((share, schedule(recipe, world, gpu, stages)))
    samples = recipe.training.global_batch_size
    model: dict[str, float] = {}
    hardware = positions = 0.0
    for length, share in shares.items():
        row = (length, images, batch_of(recipe, length, images).labels / recipe.training.micro_batch_size)
        for part, flops in flops_by_part(recipe, *row, sequence_length=length).items():
            model[part] = model.get(part, 0.0) + share * samples * flops
        hardware += share * samples * sum(recomputed_flops(recipe, length, images, None, length).values())
        positions += share * samples * length
    found = mean(schedules)
    peak = found.seconds * world * gpu.bf16_flops
    return StepTime(
        schedule=found,
        stages=stages,
        num_micro_batches=num_micro_batches(recipe, world),
        model_flops=model,
        hardware_flops=sum(model.values()) + hardware,
        mfu=sum(model.values()) / peak,
        hfu=(sum(model.values()) + hardware) / peak,
        tokens_per_s_per_gpu=positions / found.seconds / world,
        samples_per_s=samples / found.seconds,
        world=world,
        steps=recipe.training.steps,
    )


def num_micro_batches(recipe: Recipe, world: int) -> int:
    """Of a step, on each rank."""
    training = recipe.training
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size(recipe, world))


def stage_times(
    recipe: Recipe, world: int, gpu: Gpu, pieces: Pieces, layout: list[StageContents], length: int
) -> list[StageTime]:
    """Of each pipeline stage, for a micro-batch of rows of `length`."""
    costs = pieces.stages(layout)
    if len(costs) == 1:
        return [StageTime(costs[0], 0.0, 0.0)]
    parallel = recipe.parallel
    between = between_stages(recipe, world, gpu, length)
    waits = pipeline_waits([cost.total for cost in costs], between, parallel.virtual_pipeline or 1)
    return [StageTime(cost, *wait) for cost, wait in zip(costs, waits, strict=True)]


def pipeline_waits(seconds: Sequence[float], between: float, chunks: int) -> list[tuple[float, float]]:
    """How long stages that compute so long wait for tensors that take `between` to arrive, for a micro-batch:
    when the pipeline is full, and while it is filled and emptied."""
    last = len(seconds) - 1
    # what goes up and what comes down travels at the same time, also where no gradient comes down
    filling = [between * (1 if stage in (0, last) else 2) for stage in range(len(seconds))]
    if chunks == 1:
        return list(zip(filling, filling, strict=True))
    # every stage has a neighbour on both sides, and computes while it sends and receives
    full = [max(0.0, 2 * chunks * between - computing) for computing in seconds]
    return list(zip(full, filling, strict=True))


def schedule(recipe: Recipe, world: int, gpu: Gpu, stages: list[StageTime]) -> Schedule:
    """A step of pipeline stages that take so long."""
    times = num_micro_batches(recipe, world)
    slowest = max(stages, key=lambda stage: stage.seconds)
    computing = sum(stage.cost.total for stage in stages) - slowest.cost.total
    filling = sum(stage.filling for stage in stages) - slowest.filling
    replicas = data_parallel_size(recipe, world)
    data, optimizer = update_times(recipe, replicas, gpu, max(stage.cost.trained for stage in stages))
    cost = slowest.cost
    whole = cost.forward + cost.backward + cost.again
    return Schedule(
        forward=times * (cost.forward.total - cost.forward.tensor),
        backward=times * (cost.backward.total - cost.backward.tensor),
        recompute=times * (cost.again.total - cost.again.tensor),
        tensor=times * whole.tensor,
        pipeline=times * slowest.pipeline,
        bubble=computing / (recipe.parallel.virtual_pipeline or 1) + filling,
        data=data,
        optimizer=optimizer,
        products=times * whole.products,
        attention=times * whole.attention,
        memory=times * whole.memory,
    )


def between_stages(recipe: Recipe, world: int, gpu: Gpu, length: int) -> float:
    """Seconds until the tensor of a micro-batch has come from the stage before."""
    parallel, model = recipe.parallel, recipe.model
    elements = float(length * model.language.hidden_size)
    if model.assembly == "cross_attention":
        elements += recipe.data.max_images * model.connector.num_latents * model.vision.width
    elements *= recipe.training.micro_batch_size / parallel.context
    elements /= parallel.tensor if parallel.sequence else 1
    # stages are the outermost groups of ranks: neighbours are far apart
    rate = gpu.nvlink_bytes_per_s * gpu.achieved.nvlink
    if world > gpu.gpus_per_node:
        rate = gpu.network_bytes_per_s * gpu.achieved.network
    return ELEMENT * elements / rate


def update_times(recipe: Recipe, replicas: int, gpu: Gpu, trained: float) -> tuple[float, float]:
    """Seconds of data parallelism and of the optimizer, for a rank with so many trained weights."""
    parallel = recipe.parallel
    ranks = replicas * parallel.context  # gradients are also summed over context parallelism
    rate = link_rate(gpu, parallel.tensor, ranks)
    sent = trained * (ranks - 1) / ranks
    sharded = parallel.distributed_optimizer
    data = sent * (GRADIENT_BYTES + (ELEMENT if sharded else GRADIENT_BYTES)) / rate
    own = trained / (ranks if sharded else 1)
    return data, (own * OPTIMIZER_BYTES + trained * BUFFER_BYTES) / memory_rate(gpu)


def mean(schedules: list[tuple[float, Schedule]]) -> Schedule:
    """Of (share, schedule)."""
    whole = sum(share for share, _ in schedules)
    sums = {
        field.name: sum(share * getattr(found, field.name) for share, found in schedules) / whole
        for field in fields(Schedule)
    }
    return Schedule(**sums)
