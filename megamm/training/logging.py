"""What a run reports, on rank 0: console, log.txt, metrics.jsonl, validation.jsonl and TensorBoard, all in
the run directory, and Weights & Biases where the recipe wants it.

metrics.jsonl holds one row for each optimizer step, so that scripts get the whole curve; console and
log.txt get a line every `log.interval` steps, with rates averaged over those steps.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from megamm.config import Recipe
from megamm.errors import InputError
from megamm.planning.flops import flops_per_step, hardware_flops_per_step
from megamm.planning.hardware import peak_flops
from megamm.recipe import validate
from megamm.training.console import Console
from megamm.training.log_files import AppendedFile
from megamm.training.metrics import SmoothedLoss, drop_rows_after, read_metrics, row_line
from megamm.training.wandb_run import WandbRun


@dataclass(frozen=True)
class StepStats:
    """What the loop knows about one optimizer step; sums are over all processes.

    Attributes:
        step: number of the step, from 1.
        consumed_samples: samples since the start of the stage, this step included.
        loss: mean per token that carries loss.
        lr: learning rate of this step.
        grad_norm: global norm before clipping.
        num_tokens, num_images: positions of the language model and images in the global batch.
        num_padding, num_labels: of these positions, how many hold no sample, carry loss.
        num_pairs: of positions that attend to each other; see Batch.
        sequence_length: S of the rows of this step.
        seconds: wall time of the step, waiting for data included.
        data_wait: seconds of it in which the loop waited for data.
        skipped_samples: samples replaced because a picture was unreadable, since the stage started.
        skipped_steps: updates left out because of non-finite gradients, since the stage started.
        memory: peak bytes of rank 0's device (resident memory on a CPU).
    """

    step: int
    consumed_samples: int
    loss: float
    lr: float
    grad_norm: float
    num_tokens: int
    num_images: int
    seconds: float
    data_wait: float
    skipped_samples: int
    skipped_steps: int
    memory: int
    num_padding: int
    num_labels: int
    num_pairs: int
    sequence_length: int


@dataclass(frozen=True)
class Rates:
    """Speed over some steps.

    Attributes:
        tflops_per_device: what the maths needs, which is what `mfu` counts.
        mfu: share of the device's dense bf16 peak, also with FP8; None where that is not known.
        hfu: the same with what recomputation does again.
        data_wait: share of the time, 0 to 1.
    """

    tokens_per_s: float
    images_per_s: float
    tflops_per_device: float
    mfu: float | None
    hfu: float | None
    data_wait: float


class RunLogger:
    """Reports one run. Only rank 0 has one.

    Attributes:
        skipped_samples: of the stage, before this start.
        validation_path: validation.jsonl.

    Args:
        run_dir: where metrics.jsonl, log.txt and tensorboard/ lie; created.
        recipe: of the run; its warnings are the first events.
        total_steps: last step of the stage.
        start_step: steps already done. Rows and events of later steps, left by an interrupted run
            that went further than its last checkpoint, are removed, so that curves have no folds.
        world_size: processes (devices) that share the work.
        device_name: what the device calls itself, for its peak rate.
    Raises:
        InputError: log.wandb is set and cannot start.
    """

    def __init__(
        self,
        run_dir: str | Path,
        recipe: Recipe,
        total_steps: int,
        start_step: int = 0,
        world_size: int = 1,
        device_name: str = "cpu",
    ) -> None:
        self._recipe, self._total_steps, self._world_size = recipe, total_steps, world_size
        self._peak = peak_flops(device_name, recipe.training.precision)
        self._window: list[StepStats] = []
        self._run_dir = run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.validation_path = run_dir / "validation.jsonl"
        self._metrics, self._board = self._open(start_step)
        self._text = AppendedFile(run_dir / "log.txt", self._complain)
        self._console = Console(recipe.name, total_steps, start_step)
        self._wandb: WandbRun | None = None
        if recipe.log.wandb is not None:
            try:
                self._wandb = WandbRun(recipe, run_dir, start_step, self.event)
            except InputError:
                self.close(failed=True)
                raise
        for warning in validate(recipe):
            self.event(f"warning: {warning}")

    def _open(self, step: int) -> tuple[AppendedFile, Any]:
        """metrics.jsonl and TensorBoard behind the rows of `step`."""
        metrics = self._run_dir / "metrics.jsonl"
        for path in (metrics, self.validation_path):
            drop_rows_after(path, step)
        self._smoothed, self.skipped_samples = SmoothedLoss(self._recipe.log.loss_half_life), 0
        for row in read_metrics(metrics):  # the average goes on as if there had been no interruption
            self._smoothed.add(row.get("loss"))
            self.skipped_samples = row.get("skipped_samples", 0)
        board = _board(self._run_dir / "tensorboard", step) if self._recipe.log.tensorboard else None
        return AppendedFile(metrics, self._complain), board

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: what is logged for later steps goes."""
        self._metrics.close()
        self._close_board()
        self._window = []
        self._metrics, self._board = self._open(step)

    def step(self, stats: StepStats) -> None:
        """Record a step; every `log.interval` steps, and after the last, a line is printed."""
        row = asdict(stats) | asdict(self._rates([stats]))
        row["loss_smoothed"] = self._smoothed.add(stats.loss)
        self._metrics.write(row_line(row))
        self._show(stats.step, {f"train/{name}": value for name, value in row.items() if name != "step"})
        self._window.append(stats)
        self._console.advance(stats.step)
        if stats.step % self._recipe.log.interval == 0 or stats.step == self._total_steps:
            self.event(format_line(self._window, self._rates(self._window), self._total_steps))
            self._window = []

    def validation(self, step: int, loss: float, seconds: float) -> None:
        """Record the mean loss over held-out samples after a step, and how long it took to compute."""
        file = AppendedFile(self.validation_path, self.event)
        file.write(row_line({"step": step, "validation_loss": loss, "seconds": seconds}))
        file.close()
        self._show(step, {"validation/loss": loss})
        self.event(f"step {step}/{self._total_steps} | validation loss {loss:.4f} | {seconds:.1f} s")

    def panels(self, step: int, folder: Path) -> None:
        """Give the panels of a step, which lie in `folder` with their samples.json, to Weights & Biases."""
        if self._wandb is not None:
            self._wandb.panels(step, folder)

    def event(self, text: str) -> None:
        """One line of text for console and log.txt: resumed, checkpoint saved, skipped, ..."""
        self._text.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n")
        self._console.print(text)

    def close(self, failed: bool = False) -> None:
        """Flush and close the files; may be called again. `failed`: the run ends with an error."""
        if self._wandb is not None:
            self._wandb.close(failed)
        self._console.close()
        self._close_board()
        self._metrics.close()
        self._text.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _show(self, step: int, values: Mapping[str, float | None]) -> None:
        """Give numbers to TensorBoard and Weights & Biases."""
        known = {name: value for name, value in values.items() if value is not None}
        if self._board is not None:
            try:
                for name, value in known.items():
                    self._board.add_scalar(name, value, step)
            except OSError as error:  # of its thread, whose file is then of no more use
                self._close_board()
                self.event(f"TensorBoard cannot be written ({error.strerror}); training goes on without it")
        if self._wandb is not None:
            self._wandb.log(step, {name: value for name, value in known.items() if math.isfinite(value)})

    def _close_board(self) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
            self._board = None

    def _complain(self, text: str) -> None:
        """A line about the files themselves, for the console alone."""
        self._console.print(text)

    def _rates(self, window: list[StepStats]) -> Rates:
        seconds = max(sum(s.seconds for s in window), 1e-9)
        tokens, images = sum(s.num_tokens for s in window), sum(s.num_images for s in window)
        counts = [(s.num_tokens, s.num_images, s.num_labels, s.num_pairs, s.sequence_length) for s in window]
        share = seconds * self._world_size
        flops_per_s = sum(flops_per_step(self._recipe, *count) for count in counts) / share
        hfu = None
        if self._peak is not None:
            hfu = sum(hardware_flops_per_step(self._recipe, *count) for count in counts) / share / self._peak
        return Rates(
            tokens_per_s=tokens / seconds,
            images_per_s=images / seconds,
            tflops_per_device=flops_per_s / 1e12,
            mfu=None if self._peak is None else flops_per_s / self._peak,
            hfu=hfu,
            data_wait=sum(s.data_wait for s in window) / seconds,
        )


def format_line(window: list[StepStats], rates: Rates, total_steps: int) -> str:
    """The log line of the steps of `window`: loss is their mean, counters are those of the last one."""
    last, finite = window[-1], [s.loss for s in window if math.isfinite(s.loss)]
    loss = sum(finite) / len(finite) if finite else math.nan
    left = (total_steps - last.step) * sum(s.seconds for s in window) / len(window)
    use = "" if rates.mfu is None else f"MFU {rates.mfu:.1%} | "
    if rates.hfu is not None and f"{rates.hfu:.1%}" not in use:  # something is recomputed
        use += f"HFU {rates.hfu:.1%} | "
    return (
        f"step {last.step:>{len(str(total_steps))}}/{total_steps} | {last.consumed_samples:,} samples | "
        f"loss {loss:.4f} | lr {last.lr:.2e} | grad norm {last.grad_norm:.3g} | "
        f"{rates.tokens_per_s:,.0f} tokens/s | {rates.images_per_s:,.1f} images/s | "
        f"{rates.tflops_per_device:.3g} TFLOP/s | {use}data wait {rates.data_wait:.1%} | "
        f"skipped {last.skipped_samples} samples, {last.skipped_steps} steps | "
        f"{last.memory / 2**30:.2f} GiB | ETA {timedelta(seconds=round(left))}"
    )


def _board(directory: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=start_step + 1, flush_secs=10)
