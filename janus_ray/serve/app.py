"""The Serve application: gateway and models. `build` is what a YAML file for `serve deploy` names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import metrics
from ray.serve.deployment import Application
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from janus_ray.chat import conversation
from janus_ray.config import resolved, validate
from janus_ray.metrics import GATEWAY_LATENCY, GATEWAY_REQUESTS, instrument
from janus_ray.serve.gateway import Api, Backend, Item, Overloaded, Unavailable
from janus_ray.serve.readiness import Readiness
from janus_ray.serve.recipe import ServeRecipe

APP_NAME = "janus"
GATEWAY_NAME = "gateway"
# The gateway only passes messages on; what limits it is the models' queues, which answer 429.
_GATEWAY_MAX_ONGOING = 2048
_RETRY_S = 1.0
_WATCH_S = 1.0
_CALL_S = 10.0
# How often Serve looks whether a replica is alive; its own 10 s leave callers in the dark for that long.
_HEALTH_CHECK_S = 2.0

_log = logging.getLogger("ray.serve")


def build(args: dict[str, Any]) -> Application:
    """Builds the application from a serving recipe, given as plain values.

    Raises:
        ConfigError: the values are not a valid `ServeRecipe`.
    """
    return application(validate(ServeRecipe, dict(args), "serve application arguments"))


def application(recipe: ServeRecipe, owner: str = "") -> Application:
    """The application of a recipe.

    Args:
        recipe: what to serve.
        owner: what the job that deploys it knows it by; see `Gateway.owner`.
    """
    from janus_ray.serve.engine import model_deployment

    models = {model.model_id: model_deployment(model, recipe) for model in recipe.models}
    return Gateway.options(num_replicas=recipe.gateway_replicas).bind(resolved(recipe), models, owner)


class ModelHandle:
    """A model's deployment, as the gateway sees it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        """Takes the handle of a `ChatServer` deployment."""
        self._handle = handle.options(method_name="chat_json", stream=True)

    async def chat(self, body: dict[str, Any]) -> AsyncIterator[Item]:
        """See `gateway.Backend`."""
        answer: Any = self._handle.remote(body)
        try:
            async for item in answer:
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            answer.cancel()
            raise
        except BackPressureError as error:
            raise Overloaded(str(error)) from None
        except (RayError, RayServeException) as error:
            _log.warning("a request failed: %s", error)
            raise Unavailable(type(error).__name__) from None


@serve.deployment(
    name=GATEWAY_NAME,
    max_ongoing_requests=_GATEWAY_MAX_ONGOING,
    ray_actor_options={"num_cpus": 1},
    max_constructor_retry_count=1,
    health_check_period_s=_HEALTH_CHECK_S,
)
@serve.ingress()
class Gateway:
    """The deployment that answers HTTP."""

    def __init__(self, recipe: dict[str, Any], handles: dict[str, DeploymentHandle], owner: str = "") -> None:
        """Takes the resolved recipe, one handle for each model id, and who deployed it."""
        self._owner = owner
        self._recipe = ServeRecipe.model_validate(recipe)
        self._handles = handles
        self._backends: dict[str, Backend] = {name: ModelHandle(handle) for name, handle in handles.items()}
        self._readiness = Readiness(handles)
        self._api = Api(self._recipe, self._backends, self._readiness, self._count)
        self._requests = instrument(GATEWAY_REQUESTS, metrics)
        self._latency_ms = instrument(GATEWAY_LATENCY, metrics)

    async def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve once the constructor is through."""
        starting = [self._wait_for(model_id) for model_id in self._backends]
        self._watching = [asyncio.create_task(task) for task in (*starting, self._watch())]
        return self._api.app()

    async def drain(self, owner: str) -> int | None:
        """Refuses new chat requests from now on; returns how many are still being answered.

        None, and nothing is refused, where another job has deployed its own application in the place of the owner's.
        """
        if owner != self._owner:
            return None
        self._readiness.stopping = True
        return self._api.answering

    async def owner(self) -> str:
        """Who deployed this application; empty where that was no job."""
        return self._owner

    async def _wait_for(self, model_id: str) -> None:
        """Marks a model as ready once it has answered; this also sets up the path from here to its replica."""
        body = {"model": model_id, "messages": conversation(None, "Are you there?"), "max_tokens": 1}
        while True:
            try:
                async for _ in self._backends[model_id].chat(body):
                    pass
                await self._mark_ready(model_id)
                return
            except (Overloaded, Unavailable):
                await asyncio.sleep(_RETRY_S)

    async def _mark_ready(self, model_id: str) -> None:
        """Marks a model as ready, with the id of the weights that its replicas have loaded now."""
        try:
            weights_id = await asyncio.to_thread(_weights_id, self._handles[model_id])
        except (RayError, RayServeException, TimeoutError) as error:
            raise Unavailable(type(error).__name__) from None
        self._readiness.mark_ready(model_id, weights_id)

    async def _watch(self) -> None:
        """Follows which models have a running replica; Serve restarts those that died."""
        app_name = serve.get_replica_context().app_name
        names = {model.model_id: model.deployment_name for model in self._recipe.models}
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                application = (await asyncio.to_thread(serve.status)).applications.get(app_name)
                found = application.deployments if application else {}
                running = {name: one.replica_states.get("RUNNING", 0) for name, one in found.items()}
                states = self._readiness.states()
                for model_id, name in names.items():
                    if not running.get(name):
                        self._readiness.mark_lost(model_id)
                    elif states[model_id] == "restarting":
                        await self._mark_ready(model_id)
            except (RayError, RayServeException, Unavailable) as error:
                _log.warning("the state of the models is not known: %s", type(error).__name__)

    def _count(self, model: str, status: int, kind: str, latency_ms: float) -> None:
        tags = {"model": model, "status": str(status), "kind": kind}
        self._requests.inc(tags=tags)
        self._latency_ms.observe(latency_ms, tags=tags)


def _weights_id(handle: DeploymentHandle) -> str:
    # A broadcast goes past the queue, which may be full.
    return handle.broadcast("weights_id").results(timeout_s=_CALL_S)[0]
