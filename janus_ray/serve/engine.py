"""One model as a Ray Serve deployment: vLLM through `ray.serve.llm`.

Importing this module imports vLLM (about 12 s of one core) and resets the root logger's handlers. Only the process
that builds the application and the replicas do; the gateway never does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError
from vllm.v1.engine.exceptions import EngineDeadError

from janus_ray.chat import conversation
from janus_ray.env import set_quiet_defaults
from janus_ray.model_folder import load_encoder, weights_id
from janus_ray.serve import private_ray
from janus_ray.serve.causes import engine_cause, own_log
from janus_ray.serve.engine_answers import Item, unfollowed, whole
from janus_ray.serve.engine_errors import refusal
from janus_ray.serve.prompts import TOKENIZER_MODE, check_prompts, use_our_prompts
from janus_ray.serve.recipe import DEPLOYMENT_PREFIX, ServedModel, ServeRecipe
from janus_ray.serve.requests import MAX_STOPS
from janus_ray.store.files import what_is_at
from janus_ray.store.hub import model_folder
from janus_ray.store.location import is_local, location

_GIB = 1024**3
_CPU_BLOCK_TOKENS = 32
# A model folder that cannot be loaded once cannot be loaded the next time either.
_START_ATTEMPTS = 1
_PACE_S = 0.003
# How often Serve looks whether a replica is alive; its own 10 s leave callers in the dark for that long.
_HEALTH_CHECK_S = 2.0
_ENGINE_POLL_S = 0.5
_ENGINE_STOPPED = "Engine core"
_LAST_WORDS_S = 3.0
_LOGGED = 1000
_ERROR_EVENT = 'data: {"error"'
_CHAT_TEMPLATE, _MODEL_PATH = "chat_template", "model_path"

_log = logging.getLogger("ray.serve")


_Callback: Any = private_ray.engine_callback()
_Engine: Any = private_ray.vllm_engine()
private_ray.with_methods(LLMServer, "_start_engine")


class LocalFolder(_Callback):
    """Skips Ray's download step, which starts one more process per replica and finds nothing to fetch in a folder."""

    async def on_before_node_init(self) -> None:
        """Called by the engine before it would start the download."""
        self.ctx.run_init_node = False


class OneProcessEngine(_Engine):
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
        named = self._llm_config.experimental_configs[_CHAT_TEMPLATE]
        # Fetched where it is loaded: the driver's cache may lie on another machine.
        folder = await asyncio.to_thread(model_folder, self._llm_config.experimental_configs[_MODEL_PATH])
        engine_config: Any = self._llm_config.get_engine_config()
        loading.model_source = engine_config.hf_model_id = str(folder)
        encoder = load_encoder(loading.model_source, named)
        use_our_prompts(encoder)
        # The tokenizer's own EOS ends an answer anyway; a template may end it with another token.
        self._stop_token_ids = [encoder.end_id] if encoder.end_id not in (None, encoder.tokenizer.eos_token_id) else []
        hashing = asyncio.ensure_future(asyncio.to_thread(weights_id, loading.model_source, named))
        try:
            await super().start()
        # Broad, because this is the process boundary: Serve's controller would import the engine to read its exception.
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("builtins", "janus_ray", "ray"):
                raise
            _log.exception("the engine did not start")
            # The engine's own process tells this one only that it has stopped; why stands in the log that both write.
            said = engine_cause(own_log()) if _ENGINE_STOPPED in str(error) else None
            raise RuntimeError(said or f"{type(error).__name__}: {error}") from None
        await check_prompts(self.engine, encoder, self._llm_config.model_id)
        messages = conversation(None, "Warm-up.")
        body = {"model": self._llm_config.model_id, "messages": messages, "max_tokens": 8, "ignore_eos": True}
        async for item in self.chat_json({**body, "temperature": 0.5, "top_p": 0.9, "seed": 0}):
            if isinstance(item, dict) and "error" in item:
                raise RuntimeError(f"the warm-up request failed: {item['error']['message']}")
        self._weights_id = await hashing
        self._watching = asyncio.create_task(self._end_with_the_engine())

    async def _start_engine(self) -> None:
        # The inherited method also starts an actor that imports all of this again to report usage statistics.
        engine: Any = self.engine
        await engine.start()

    async def chat_json(self, body: dict[str, Any]) -> AsyncIterator[Item]:
        """Answers one chat request.

        Args:
            body: the request, with OpenAI's names.

        Yields:
            One completion or one error as a dictionary; with `stream` lists of server-sent events instead, and an error
            as the last item where the answer breaks. Nothing else comes out: an exception of the engine's would be
            unpickled by the gateway, which would have to import the engine for it.
        """
        self._answering += 1
        try:
            async with aclosing(self._answer(body)) as items:
                async for item in items:
                    yield item
        except (asyncio.CancelledError, GeneratorExit):
            self._cancelled += 1
            raise
        # Broad, because this is the process boundary.
        except Exception as error:
            _log.warning("a request was refused or failed: %s: %s", type(error).__name__, str(error)[:_LOGGED])
            yield unfollowed() if isinstance(error, GenerationError) and "response_format" in body else _failure(error)
        finally:
            self._answering -= 1

    async def _answer(self, body: dict[str, Any]) -> AsyncGenerator[Item]:
        # An id of our own: Serve would take the caller's X-Request-Id, and two callers may send the same.
        request = ChatCompletionRequest(**self._with_stops(body), request_id=uuid.uuid4().hex)
        finished = False
        try:
            async with (
                aclosing(await self.chat(request)) as answers,
                aclosing(self._paced(whole(_plain(answers), body))) as items,
            ):
                async for item in items:
                    yield item
                    if isinstance(item, dict) and "error" in item:
                        return
            finished = True
        finally:
            if not finished:
                # A request that ends while it is being handed to the engine stays in the engine's list for ever.
                with suppress(EngineDeadError):
                    await private_ray.engine_client(self).abort(f"chatcmpl-{request.request_id}")

    def _with_stops(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if body.get("ignore_eos") else {**body, "stop_token_ids": self._stop_token_ids}

    async def _paced(self, items: AsyncIterator[Item]) -> AsyncGenerator[Item]:
        """Joins events that follow closely, the more the more streams there are.

        One message to the gateway costs about 2 ms of CPU time over all processes, so many fast streams with a message
        per token starve the engine. The first event is never held back, and none longer than until the next is there.
        """
        held: list[str] = []
        sent_s = -math.inf
        async for item in items:
            if isinstance(item, dict):
                if held:
                    yield held
                    held = []
                yield item
                continue
            held += item
            now_s = time.monotonic()
            if now_s - sent_s >= _PACE_S * self._answering:
                yield held
                held, sent_s = [], now_s
        if held:
            yield held

    async def _end_with_the_engine(self) -> None:
        """Ends this process once the engine's own has died: Serve replaces a dead replica at once.

        It would notice an unhealthy one after three checks, and then wait until it has drained.
        """
        engine = private_ray.engine_client(self)
        while not engine.errored:
            await asyncio.sleep(_ENGINE_POLL_S)
        _log.error("the engine has died; this replica ends with it")
        # Those who were being answered hear of it first.
        deadline_s = time.monotonic() + _LAST_WORDS_S
        while self._answering and time.monotonic() < deadline_s:
            await asyncio.sleep(_ENGINE_POLL_S)
        await asyncio.sleep(_ENGINE_POLL_S)
        os._exit(1)

    async def check_health(self) -> None:
        """Called by Serve.

        Raises:
            RuntimeError: the engine has died. Its own exception would make Serve's controller import the engine.
        """
        if self.engine is not None and private_ray.engine_client(self).errored:
            raise RuntimeError("the engine has died")

    async def weights_id(self) -> str:
        """The id of the weights that this replica has loaded (model_folder.weights_id)."""
        return self._weights_id

    async def counts(self) -> dict[str, int]:
        """Requests that the engine is working on, and those whose caller went away."""
        unfinished = private_ray.engine_client(self).output_processor.get_num_unfinished_requests()
        return {"unfinished": unfinished, "cancelled": self._cancelled}


async def _plain(answers: AsyncIterator[Any]) -> AsyncIterator[Item]:
    """A completion or an error as a dictionary, a batch of events as a list of texts."""
    async for answer in answers:
        for part in answer if isinstance(answer, list) else [answer]:
            if not isinstance(part, str):
                plain = part.model_dump(mode="json", exclude_none=True)
            elif part.startswith(_ERROR_EVENT):
                # What fails after the head of a stream, or before its first token, comes as an event.
                plain = json.loads(part.removeprefix("data: "))
            else:
                yield [part]
                continue
            yield refusal(**_named(plain["error"])) if "error" in plain else plain


def _named(error: dict[str, Any]) -> dict[str, Any]:
    code = error.get("code")
    return {
        "message": str(error.get("message")),
        "code": code if isinstance(code, int) else 500,
        "param": error.get("param"),
    }


def _failure(error: Exception) -> Item:
    """An exception as an error item: a refusal if the request is at fault, else words that give nothing away."""
    if isinstance(error, EngineDeadError):
        return refusal("", 503)
    return refusal(**_named(create_error_response(error).error.model_dump()))


def model_deployment(model: ServedModel, recipe: ServeRecipe) -> Application:
    """The Serve deployment of one model."""
    folder = model_folder(model.path).absolute()
    # Of a folder the absolute path, because replicas run in folders of their own.
    local = what_is_at(model.path) == "folder" and is_local(location(model.path))
    config = LLMConfig(
        model_loading_config={"model_id": model.model_id, "model_source": str(folder)},
        engine_kwargs=_engine_kwargs(model, recipe),
        deployment_config=_deployment_config(model, recipe),
        placement_group_config=_placement(model),
        # The defaults hold the first token back for 50 ms, to send larger batches of events.
        experimental_configs={
            "stream_batching_interval_ms": 0,
            _CHAT_TEMPLATE: model.chat_template,
            _MODEL_PATH: str(folder) if local else model.path,
        },
        runtime_env={"env_vars": _environment(model)},
        callback_config={"callback_class": LocalFolder},
    )
    engine = {} if model.num_gpus else {"engine_cls": OneProcessEngine}
    return build_llm_deployment(config, name_prefix=DEPLOYMENT_PREFIX, deployment_cls=ChatServer, bind_kwargs=engine)


def _engine_kwargs(model: ServedModel, recipe: ServeRecipe) -> dict[str, Any]:
    on_cpu = model.num_gpus == 0
    kwargs: dict[str, Any] = {
        "max_model_len": model.max_model_len,
        "tokenizer_mode": TOKENIZER_MODE,
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
        "health_check_period_s": _HEALTH_CHECK_S,
        "max_constructor_retry_count": _START_ATTEMPTS,
        # The placement group reserves what the engine needs; the actor beside it only passes messages.
        "ray_actor_options": {"num_cpus": 0},
        "autoscaling_config": model.scaling(),
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
    # As many stop texts as the gateway lets through; the engine's own limit is 4.
    limits = {"VLLM_MAX_STOP_STRINGS": str(MAX_STOPS)}
    if model.num_gpus:
        return limits
    threads = {**limits, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(model.cpus_per_replica)}
    # vLLM compiles some small functions on their first use even in eager mode: 10 s each, and it takes a C++ compiler.
    return {**threads, **({"TORCHDYNAMO_DISABLE": "1"} if _eager(model) else {})}


def _eager(model: ServedModel) -> bool:
    return model.num_gpus == 0 if model.enforce_eager is None else model.enforce_eager
