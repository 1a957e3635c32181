"""What a run reports, on rank 0: console, log.txt, metrics.jsonl and TensorBoard, all in the run directory.

metrics.jsonl holds one row for each optimizer step, so that scripts get the whole curve; console and
log.txt get a line every `log.interval` steps, with rates averaged over those steps.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from megamm.config import Recipe
from megamm.recipe import validate
from megamm.training.flops import flops_per_step, peak_flops


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
    """Speed over some steps; `mfu` is None where the device has no known peak."""

    tokens_per_s: float
    images_per_s: float
    tflops_per_device: float
    mfu: float | None
    data_wait: float  # share of the time, 0 to 1


class RunLogger:
    """Reports one run. Only rank 0 has one.

    Args:
        run_dir: where metrics.jsonl, log.txt and tensorboard/ lie; created.
        recipe: of the run; its warnings are the first events.
        total_steps: last step of the stage.
        start_step: steps already done. Rows and events of later steps, left by an interrupted run
            that went further than its last checkpoint, are removed, so that curves have no folds.
        world_size: processes (devices) that share the work.
        device_name: what the device calls itself, for its peak rate.
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
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics = run_dir / "metrics.jsonl"
        drop_rows_after(metrics, start_step)
        self._metrics = metrics.open("a", encoding="utf-8", buffering=1)
        self._text = (run_dir / "log.txt").open("a", encoding="utf-8", buffering=1)
        self._board = _board(run_dir / "tensorboard", start_step) if recipe.log.tensorboard else None
        self._console = _Console(recipe.name, total_steps, start_step)
        for warning in validate(recipe):
            self.event(f"warning: {warning}")

    def step(self, stats: StepStats) -> None:
        """Record a step; every `log.interval` steps, and after the last, a line is printed."""
        row = asdict(stats) | asdict(self._rates([stats]))
        self._metrics.write(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n")
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"train/{name}", value, stats.step)
        self._window.append(stats)
        self._console.advance(stats.step)
        if stats.step % self._recipe.log.interval == 0 or stats.step == self._total_steps:
            self.event(format_line(self._window, self._rates(self._window), self._total_steps))
            self._window = []

    def event(self, text: str) -> None:
        """One line of text for console and log.txt: resumed, checkpoint saved, skipped, ..."""
        self._text.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n")
        self._console.print(text)

    def close(self) -> None:
        """Flush and close the files; may be called again."""
        self._console.close()
        if self._board is not None:
            self._board.close()
        self._metrics.close()
        self._text.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rates(self, window: list[StepStats]) -> Rates:
        seconds = max(sum(s.seconds for s in window), 1e-9)
        tokens, images = sum(s.num_tokens for s in window), sum(s.num_images for s in window)
        flops = sum(
            flops_per_step(
                self._recipe, s.num_tokens, s.num_images, s.num_labels, s.num_pairs, s.sequence_length
            )
            for s in window
        )
        flops_per_s = flops / seconds / self._world_size
        return Rates(
            tokens_per_s=tokens / seconds,
            images_per_s=images / seconds,
            tflops_per_device=flops_per_s / 1e12,
            mfu=None if self._peak is None else flops_per_s / self._peak,
            data_wait=sum(s.data_wait for s in window) / seconds,
        )


def format_line(window: list[StepStats], rates: Rates, total_steps: int) -> str:
    """The log line of the steps of `window`: loss is their mean, counters are those of the last one."""
    last, finite = window[-1], [s.loss for s in window if math.isfinite(s.loss)]
    loss = sum(finite) / len(finite) if finite else math.nan
    left = (total_steps - last.step) * sum(s.seconds for s in window) / len(window)
    mfu = "" if rates.mfu is None else f"MFU {rates.mfu:.1%} | "
    return (
        f"step {last.step:>{len(str(total_steps))}}/{total_steps} | {last.consumed_samples:,} samples | "
        f"loss {loss:.4f} | lr {last.lr:.2e} | grad norm {last.grad_norm:.3g} | "
        f"{rates.tokens_per_s:,.0f} tokens/s | {rates.images_per_s:,.1f} images/s | "
        f"{rates.tflops_per_device:.3g} TFLOP/s | {mfu}data wait {rates.data_wait:.1%} | "
        f"skipped {last.skipped_samples} samples, {last.skipped_steps} steps | "
        f"{last.memory / 2**30:.2f} GiB | ETA {timedelta(seconds=round(left))}"
    )


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return
    for line in lines[:-1]:  # a whole line ends in a newline, so what follows the last one is empty or cut
        yield json.loads(line)


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite a metrics.jsonl without the rows of steps after `step` (all of it or nothing of it)."""
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step]
    new = path.with_name(path.name + ".new")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(directory: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=start_step + 1, flush_secs=10)


class _Console:
    """A progress bar with lines above it on a terminal, plain lines elsewhere."""

    def __init__(self, name: str, total_steps: int, start_step: int) -> None:
        self._progress = _progress_bar() if sys.stdout.isatty() else None
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=total_steps, completed=start_step)
            self._progress.start()

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def print(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _progress_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
