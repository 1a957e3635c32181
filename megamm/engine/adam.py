"""AdamW with its step count in the parameter group, where megatron-core's checkpoints expect it.

megatron-core's distributed optimizer knows two Adams: Apex/Transformer Engine's FusedAdam, whose `step`
lies in the parameter group, and torch's, whose `step` is a tensor per parameter. Its code for the second
is broken in 0.16: `state_dict()` asserts before the first step and on ranks with nothing trainable, and
after loading all parameters share one `step` tensor, so that each step counts as many as there are
parameters. This optimizer keeps the first convention on plain torch, and megatron takes that path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamm.engine.cpu import replace_symbol


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) on torch's fused multi-tensor kernel; `step` is per group.

    Args:
        params: parameters or groups with "params" (and optionally "lr", "weight_decay", ...).
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        adam_w_mode: decoupled weight decay; False adds it to the gradient (L2).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **_unused: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # A group that is empty on this rank counts too: rank 0's group is the one that is saved.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        update(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(float(group["step"]), device=p.device) for p in params],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def install_if_needed() -> None:
    """Make megatron-core use GroupStepAdamW unless Transformer Engine or Apex brought its own FusedAdam."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.Adam is GroupStepAdamW or not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    replace_symbol(optimizer, "Adam", GroupStepAdamW)
    replace_symbol(distributed, "Adam", GroupStepAdamW)  # used there in isinstance checks
    replace_symbol(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    replace_symbol(distributed, "HAVE_APEX_OR_TE", True)
    replace_symbol(distributed, "USING_APEX_OPTIMIZER", True)
