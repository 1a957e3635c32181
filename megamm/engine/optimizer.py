"""Data parallelism, AdamW and the learning-rate schedule, all megatron-core's, from the recipe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamm.config import OptimizerConfig, Recipe
from megamm.engine import adam
from megamm.engine.gradient_flow import connect_chunks
from megamm.engine.groups import Groups
from megamm.engine.parameter_groups import group_overrides


def wrap_data_parallel(
    models: list[torch.nn.Module], recipe: Recipe, groups: Groups
) -> list[DistributedDataParallel]:
    """The chunks with fp32 gradient buffers for their trainable parameters, reduced over data parallelism
    (collective: the chunks of a pipeline learn from each other which gradients they have to pass on)."""
    connect_chunks(models, groups)  # type: ignore[arg-type]
    config = models[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=recipe.parallel.distributed_optimizer
    )
    return [
        DistributedDataParallel(
            config, ddp_config, model, disable_bucketing=i > 0, pg_collection=groups.collection
        )
        for i, model in enumerate(models)
    ]


def build_optimizer(
    wrapped: list[DistributedDataParallel], recipe: Recipe, groups: Groups
) -> MegatronOptimizer:
    """AdamW over the trainable parameters, in groups as `optimizer.parts` and `optimizer.no_decay` say."""
    adam.install_if_needed()
    config = wrapped[0].config
    settings = recipe.optimizer
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(
        megatron_config,
        wrapped,
        group_overrides(recipe),
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    for number, group in enumerate(optimizer.param_groups):
        # all that is left of this multiplier is that groups are told apart by it when state is loaded, and
        # the others of these keys do not know groups that differ in rates
        group["lr_mult"] = number
    # No loss is scaled in bf16 and fp32, so grad_scale_func stays None: it would tie optimizer, model and
    # groups into a knot that nobody can undo, whose groups keep gloo's threads running.
    config.finalize_model_grads_func = finalize_model_grads
    return optimizer


@torch.no_grad()
def update(optimizer: MegatronOptimizer, clip_grad: float, approve: Callable[[float], bool]) -> float:
    """One update from the gradients in the models' buffers, unless `approve` forbids it (collective).

    What megatron's `step` does, with a decision between the norm and the first change: an update that is left
    out leaves weights, moments and step counts as they are bit by bit.

    Args:
        clip_grad: largest norm; 0: any.
        approve: is given the norm before clipping; says the same on every rank.
    Returns:
        The norm before clipping.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not approve(grad_norm):
        return grad_norm
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    parameters = [parameter for one in chained for parameter in one.get_parameters()]
    if clip_grad > 0 and parameters:
        clip_grad_by_total_norm_fp32(parameters, clip_grad, grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm


def set_schedule(schedule: OptimizerParamScheduler, step: int) -> None:
    """Bring rates and decay to where they are after `step` steps of the stage, from wherever they are."""
    schedule.num_steps = 0
    schedule.step(step)


def build_schedule(
    optimizer: MegatronOptimizer, settings: OptimizerConfig, total_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then the recipe's decay to `min_lr`; counted in optimizer steps.

    A warm-up longer than the decay (the published LLaVA-1.5 recipe has one) never ends; megatron asserts
    that it does, so the decay is moved behind it.
    """
    decay_steps = max(settings.decay_steps or total_steps, settings.warmup_steps + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
