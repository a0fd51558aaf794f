"""The recipe of supervised fine-tuning. Defaults are the paper's run (released axolotl configuration)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from janus_ray.chat import ChatTemplate
from janus_ray.config import OPERATIONAL, PathText, RayConfig, Recipe

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainRecipe(Recipe):
    """SFT of a policy on a collection."""

    collection: PathText = Field(json_schema_extra=OPERATIONAL)
    """Parquet, JSON lines, a JSON array or CSV, as a file, a folder of files or a hub id ("org/name@revision"), with at
    least the published columns system, prompt, output as text, or with messages: conversations of several turns as
    OpenAI's fine-tuning files hold them, with loss on every assistant turn. Rows that cannot be trained on, and rows
    whose status is there and not "ok", are left out and counted; a null or blank system means that there is none."""
    # Where the two inputs lie may change; what is in them is compared by a resume itself.
    base_model: PathText = Field(json_schema_extra=OPERATIONAL)
    """Local Hugging Face folder, or a hub id ("org/name@revision"), of the model to start from: a decoder of one of the
    families in train/families.py, with weights in safetensors."""
    chat_template: ChatTemplate = "janus"
    """How a conversation becomes token ids: "janus" is the paper's format, "own" the chat template that the base
    model's tokenizer brings, with its rule for system messages. A row that it refuses is left out and counted; where it
    refuses more than 1 % of them the run stops. The exported model names it, and is served with it."""
    output_dir: PathText = Field(json_schema_extra=OPERATIONAL)
    """Folder for the documents, checkpoints, metrics and the model: a path, or s3://, gs:// or abfs://. On a cluster:
    storage that every node sees."""

    max_length: int = Field(default=8192, ge=16)
    """Tokens in a bin. A longer document is left out and counted, never cut (paper: 8192)."""
    bins_per_step: int = Field(default=32, ge=1)
    """Bins in the global batch, over all workers (paper: 4 GPUs x micro-batch 2 x 4 accumulation steps = 32)."""
    bins_per_micro_batch: int = Field(default=2, ge=1, json_schema_extra=OPERATIONAL)
    """Bins that one worker processes at once (paper: 2)."""
    epochs: int = Field(default=4, ge=1)
    """Passes over the data (paper: 4)."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps; the schedule then ends there too."""

    learning_rate: float = Field(default=5e-6, gt=0)
    """Peak learning rate of AdamW (paper: 5e-6)."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up (paper: 10); a cosine to zero follows."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates, from 0 to below 1 (paper: the defaults)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay (paper: 0)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient is clipped to this L2 norm (paper: 1.0)."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of parameters and activations in the forward pass; master weights, gradients' reduction and optimizer state
    are FP32 in both."""
    activation_checkpointing: bool = Field(default=True, json_schema_extra=OPERATIONAL)
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    reshard_after_forward: bool = Field(default=True, json_schema_extra=OPERATIONAL)
    """Free a block's gathered parameters between forward and backward: less memory, one more all-gather."""

    num_workers: int = Field(default=2, ge=1, json_schema_extra=OPERATIONAL)
    """Training processes; the loss does not depend on their number."""
    use_gpu: bool = Field(default=False, json_schema_extra=OPERATIONAL)
    """One GPU per worker with NCCL; otherwise CPUs with gloo."""
    threads_per_worker: int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)
    """Threads of a CPU worker's arithmetic, for each of which it reserves one of the cluster's CPUs."""
    max_failures: int = Field(default=2, ge=0, json_schema_extra=OPERATIONAL)
    """How often the workers are started again from the last checkpoint after one of them died."""
    checkpoint_every_steps: int = Field(default=200, ge=1, json_schema_extra=OPERATIONAL)
    """Optimizer steps between sharded checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(default=2, ge=1, json_schema_extra=OPERATIONAL)
    """Checkpoints kept on disk, the newest. While one is written there is one more."""
    log_every_steps: int = Field(default=10, ge=1, json_schema_extra=OPERATIONAL)
    """Optimizer steps between lines of metrics."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the exported model's weights."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the data."""
    ray: RayConfig = Field(default=RayConfig(), json_schema_extra=OPERATIONAL)
    """The Ray cluster."""

    def cpus_per_worker(self) -> int:
        """Logical CPUs that one worker reserves; the arithmetic of a worker with a GPU is not theirs."""
        return 1 if self.use_gpu else self.threads_per_worker

    @model_validator(mode="after")
    def _the_gpu_kernel_takes_bf16(self) -> Self:
        if self.use_gpu and self.precision == "fp32":
            raise ValueError('precision: attention on a GPU takes "bf16"; "fp32" is for CPUs')
        return self
