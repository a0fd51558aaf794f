"""The metrics of a run, step by step: on storage as `metrics.jsonl`, and to whoever follows the run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from upath import UPath

from janus_ray.store.files import delete_files, files_below, write_text
from janus_ray.store.location import is_local, location
from janus_ray.store.log import AppendLog, read_logs
from janus_ray.train.batches import TrainingData
from janus_ray.train.checkpoint import named_when_not_written
from janus_ray.train.context import Context
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.throughput import model_shape, peak_flops, training_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "metrics"


class StepLog:
    """Rank 0's lines of metrics: one for each logged step, in the order of the steps, each step once.

    On an object storage the lines of a running job lie in segments beside `metrics.jsonl`; at the end they are in it.
    """

    checkpoint_s: float | None = None
    """How long the newest checkpoint of this start took."""

    def __init__(
        self,
        folder: Path | UPath,
        recipe: TrainRecipe,
        data: TrainingData,
        model: PreTrainedModel,
        context: Context,
        after: int,
    ) -> None:
        """Drops the lines of steps that a resumed run does again.

        Args:
            folder: the run's.
            recipe: its recipe.
            data: the plan says what each step processes.
            model: its shape counts the FLOPs.
            context: whom to tell.
            after: the last step that stays.
        """
        self._folder, self._recipe, self._data, self._context = location(folder), recipe, data, context
        self._shape = model_shape(model)
        self._peak_flops = peak_flops(torch.cuda.get_device_name() if recipe.use_gpu else "")
        with named_when_not_written(self._folder / f"{_NAME}.jsonl"):
            self._gather(after)
        self._log = AppendLog(self._folder, _NAME)
        self._last_step, self._last_time = after, time.monotonic()

    def write(self, step: int, **values: float) -> None:
        """Appends the metrics of a step; rates are means since the line before."""
        now = time.monotonic()
        seconds = now - self._last_time
        steps = self._data.plan.bins_by_step
        recent = np.concatenate([steps[index] for index in range(self._last_step, step)])
        current = steps[step - 1]
        padding = 1 - int(self._data.tokens_per_bin[current].sum()) / (len(current) * self._recipe.max_length)
        record: dict[str, Any] = {
            "step": step,
            "num_steps": len(steps),
            **values,
            "tokens_per_s": int(self._data.tokens_per_bin[recent].sum()) / seconds,
            "mfu": self._mfu(recent, seconds),
            "padding_share": padding,
            "supervised_tokens": int(self._data.supervised_per_bin[current].sum()),
            "checkpoint_s": self.checkpoint_s,
            "worker_pid": os.getpid(),
        }
        with named_when_not_written(self._folder / f"{_NAME}.jsonl"):
            self._log.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._context.report(record)
        self._last_step, self._last_time = step, now

    def flush(self) -> None:
        """Returns when every line is on the storage: before a checkpoint says that their steps are done."""
        with named_when_not_written(self._folder / f"{_NAME}.jsonl"):
            self._log.flush()

    def close(self) -> None:
        """Leaves all lines in `metrics.jsonl`."""
        with named_when_not_written(self._folder / f"{_NAME}.jsonl"):
            self._log.close()
            if not is_local(self._folder):
                self._gather(self._last_step)

    def _gather(self, until: int) -> None:
        """Puts what all segments hold of the steps up to one into `metrics.jsonl`, and removes the segments."""
        file = self._folder / f"{_NAME}.jsonl"
        lines: dict[int, str] = {}
        for line in read_logs(self._folder):
            # A killed process may have left half a line.
            if line.file.name.startswith(_NAME) and line.content.endswith(b"}"):
                step = json.loads(line.content)["step"]
                lines.update({step: line.content.decode()} if step <= until else {})
        segments = [found for found in files_below(self._folder, deep=False) if found.name.startswith(f"{_NAME}-")]
        if lines or segments or file.exists():
            write_text(file, "".join(f"{lines[step]}\n" for step in sorted(lines)))
        delete_files(segments)

    def _mfu(self, recent: np.ndarray, seconds: float) -> float | None:
        if self._peak_flops is None:
            return None
        supervised = int(self._data.supervised_per_bin[recent].sum())
        flops = training_flops(self._data.lengths_in(recent), supervised, self._shape)
        return flops / seconds / (self._peak_flops * self._recipe.num_workers)
