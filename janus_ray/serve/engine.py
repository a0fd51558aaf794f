"""One model as a Ray Serve deployment: vLLM through `ray.serve.llm`.

Importing this module imports vLLM (about 12 s of one core) and resets the root logger's handlers. Only the process
that builds the application and the replicas do; the gateway never does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest

from janus_ray.chat import conversation
from janus_ray.env import set_quiet_defaults
from janus_ray.model_folder import check_model_folder
from janus_ray.serve.recipe import DEPLOYMENT_PREFIX, ServedModel, ServeRecipe

_GIB = 1024**3
_CPU_BLOCK_TOKENS = 32
# A model folder that cannot be loaded once cannot be loaded the next time either.
_START_ATTEMPTS = 1
_PACE_S = 0.003

Item = dict[str, Any] | list[str]


class LocalFolder(CallbackBase):
    """Skips Ray's download step, which starts one more process per replica and finds nothing to fetch in a folder."""

    async def on_before_node_init(self) -> None:
        """Called by the engine before it would start the download."""
        self.ctx.run_init_node = False


class OneProcessEngine(VLLMEngine):
    """vLLM with the model in its scheduler's process, for replicas without GPUs.

    Ray gives a CPU engine a separate worker process. For one worker that only costs: another import of vLLM at the
    start, and a queue in shared memory on which both processes spin while they wait.
    """

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config


class ChatServer(LLMServer):
    """`LLMServer` that is warm before it is ready, and that takes and gives plain JSON values.

    Plain values keep vLLM's request classes, and with them vLLM's import, out of the gateway.
    """

    _answering = 0
    _cancelled = 0

    async def start(self) -> None:
        """Starts the engine and answers one request with it, because the first one takes seconds.

        Raises:
            CheckpointError: the model was trained with another chat template.
        """
        set_quiet_defaults()
        loading: Any = self._llm_config.model_loading_config
        check_model_folder(loading.model_source)
        await super().start()
        messages = conversation("Values that nobody has.", "Warm-up.")
        body = {"model": self._llm_config.model_id, "messages": messages, "max_tokens": 8, "ignore_eos": True}
        async for item in self.chat_json({**body, "temperature": 0.5, "top_p": 0.9, "seed": 0}):
            if isinstance(item, dict) and "error" in item:
                raise RuntimeError(f"the warm-up request failed: {item['error']['message']}")

    async def _start_engine(self) -> None:
        # The inherited method also starts an actor that imports all of this again to report usage statistics.
        engine: Any = self.engine
        await engine.start()

    async def chat_json(self, body: dict[str, Any]) -> AsyncIterator[Item]:
        """Answers one chat request.

        Args:
            body: the request, with OpenAI's names.

        Yields:
            One completion or one error as a dictionary; with `stream` lists of server-sent events instead.
        """
        try:
            request = ChatCompletionRequest(**body)
        except ValueError as error:
            yield {"error": {"message": str(error).splitlines()[0], "code": 400}}
            return
        self._answering += 1
        try:
            async for item in self._paced(_plain(item) async for item in await self.chat(request)):
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            self._cancelled += 1
            raise
        finally:
            self._answering -= 1

    async def _paced(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        """Joins events that follow closely, the more the more streams there are.

        One message to the gateway costs about 2 ms of CPU time over all processes, so many fast streams with a message
        per token starve the engine. The first event is never held back, and none longer than until the next is there.
        """
        held: list[str] = []
        sent_s = -math.inf
        async for item in items:
            if isinstance(item, dict):
                yield item
                continue
            held += item
            now_s = time.monotonic()
            if now_s - sent_s >= _PACE_S * self._answering:
                yield held
                held, sent_s = [], now_s
        if held:
            yield held

    async def counts(self) -> dict[str, int]:
        """Requests that the engine is working on, and those whose caller went away."""
        engine: Any = self.engine
        unfinished = engine._engine_client.output_processor.get_num_unfinished_requests()
        return {"unfinished": unfinished, "cancelled": self._cancelled}


def _plain(item: Any) -> Item:
    """A completion or an error as a dictionary, a batch of events as a list of texts."""
    if isinstance(item, list):
        errors = [part for part in item if not isinstance(part, str)]
        return _plain(errors[0]) if errors else list(item)
    return [item] if isinstance(item, str) else item.model_dump(mode="json", exclude_none=True)


def model_deployment(model: ServedModel, recipe: ServeRecipe) -> Application:
    """The Serve deployment of one model."""
    config = LLMConfig(
        model_loading_config={"model_id": model.model_id, "model_source": model.path},
        engine_kwargs=_engine_kwargs(model, recipe),
        deployment_config=_deployment_config(model, recipe),
        placement_group_config=_placement(model),
        # The defaults hold the first token back for 50 ms, to send larger batches of events.
        experimental_configs={"stream_batching_interval_ms": 0},
        runtime_env={"env_vars": _environment(model)},
        callback_config={"callback_class": LocalFolder},
    )
    engine = {} if model.num_gpus else {"engine_cls": OneProcessEngine}
    return build_llm_deployment(config, name_prefix=DEPLOYMENT_PREFIX, deployment_cls=ChatServer, bind_kwargs=engine)


def _engine_kwargs(model: ServedModel, recipe: ServeRecipe) -> dict[str, Any]:
    on_cpu = model.num_gpus == 0
    kwargs: dict[str, Any] = {
        "max_model_len": model.max_model_len,
        "dtype": model.dtype or ("float32" if on_cpu else "bfloat16"),
        "max_num_seqs": model.max_num_seqs,
        "enable_prefix_caching": True,
        "enable_prompt_tokens_details": True,
        "enforce_eager": _eager(model),
        # Requests alone decide how to sample; the folder's generation_config.json does not.
        "generation_config": "vllm",
        "override_generation_config": {"max_new_tokens": recipe.max_tokens},
        "enable_log_requests": False,
    }
    block_size = model.block_size or (_CPU_BLOCK_TOKENS if on_cpu else None)
    if block_size:
        kwargs["block_size"] = block_size
    if on_cpu:
        kwargs["kv_cache_memory_bytes"] = int((model.kv_cache_gib or 1) * _GIB)
    else:
        kwargs["tensor_parallel_size"] = model.num_gpus
        if model.gpu_memory_utilization:
            kwargs["gpu_memory_utilization"] = model.gpu_memory_utilization
    return kwargs


def _deployment_config(model: ServedModel, recipe: ServeRecipe) -> dict[str, Any]:
    """Serve's options. `ray.serve.llm` would set the two request limits to 10^9, which switches scaling and 429 off."""
    return {
        "name": model.deployment_name.removeprefix(DEPLOYMENT_PREFIX),
        "max_ongoing_requests": model.max_ongoing_requests,
        "max_queued_requests": model.max_queued_requests,
        "graceful_shutdown_timeout_s": model.drain_timeout_s,
        "max_constructor_retry_count": _START_ATTEMPTS,
        # The placement group reserves what the engine needs; the actor beside it only passes messages.
        "ray_actor_options": {"num_cpus": 0},
        "autoscaling_config": {
            "min_replicas": model.min_replicas,
            "max_replicas": model.max_replicas,
            "target_ongoing_requests": model.target_ongoing_requests,
        },
    }


def _placement(model: ServedModel) -> dict[str, Any]:
    if model.num_gpus == 0:
        return {"bundles": [{"CPU": model.cpus_per_replica}]}
    first = {"GPU": 1, "CPU": model.cpus_per_replica}
    return {"bundles": [first, *({"GPU": 1} for _ in range(model.num_gpus - 1))]}


def _environment(model: ServedModel) -> dict[str, str]:
    """Environment of a replica and its engine.

    Threads are counted, not pinned: replicas on one machine know nothing of each other, and pinned ones would all
    choose the same cores.
    """
    if model.num_gpus:
        return {}
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(model.cpus_per_replica)}
    # vLLM compiles some small functions on their first use even in eager mode: 10 s each, and it takes a C++ compiler.
    return {**threads, **({"TORCHDYNAMO_DISABLE": "1"} if _eager(model) else {})}


def _eager(model: ServedModel) -> bool:
    return model.num_gpus == 0 if model.enforce_eager is None else model.enforce_eager
