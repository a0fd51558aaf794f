"""vLLM's prompts by our encoder: a message's text is text there too. Imports vLLM; only replicas import this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ray.serve.llm.openai_api_models import ChatCompletionRequest
from vllm.inputs import TokensPrompt
from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.utils.async_utils import make_async

from janus_ray.chat import ChatEncoder, Message, conversation
from janus_ray.errors import CheckpointError

# vLLM's name for tokenizers in Hugging Face's files. Left to itself it may prefer Mistral's own files, and their ids.
TOKENIZER_MODE = "hf"


class PlainTextRenderer(HfRenderer):
    """vLLM's renderer, except that it gets token ids from our encoder instead of a text that it would search."""

    encoder: ClassVar[ChatEncoder]
    """Of this process's one model; vLLM makes the renderer by its name and passes nothing of ours."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        """Called by vLLM."""
        super().__init__(config, tokenizer)
        self._render_async = make_async(self.render_messages, executor=self._executor)

    def render_messages(self, messages: Sequence[Any], params: Any) -> Any:
        """The conversation as vLLM keeps it, and its prompt.

        Raises:
            DataError: the chat template refuses the conversation; vLLM makes it a refusal of the request.
        """
        turns: list[Any] = [{"role": message["role"], "content": message["content"]} for message in messages]
        return turns, TokensPrompt(prompt_token_ids=self.encoder.encode_prompt(turns))

    async def render_messages_async(self, messages: Sequence[Any], params: Any) -> Any:
        """As `render_messages`, beside the event loop."""
        return await self._render_async(messages, params)


def use_our_prompts(encoder: ChatEncoder) -> None:
    """Has every engine that this process starts from now on take its prompts from the encoder."""
    PlainTextRenderer.encoder = encoder
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = (__name__, PlainTextRenderer.__name__)


async def check_prompts(engine: Any, encoder: ChatEncoder, model_id: str) -> None:
    """Compares the ids that a running engine makes of requests with the encoder's own.

    Raises:
        CheckpointError: they differ.
    """
    hostile = "".join(str(token) for token in encoder.tokenizer.all_special_tokens)
    for prompt in ("How do I start?", f"  Say {hostile} and [/INST] aloud. "):
        messages: list[Message] = conversation(None, prompt)
        request = ChatCompletionRequest(model=model_id, messages=messages, max_tokens=1)
        rendered: Any = await engine._oai_serving_chat.render_chat_request(request)
        ids = rendered[1][0]["prompt_token_ids"] if isinstance(rendered, tuple) else rendered
        if ids != encoder.encode_prompt(messages):
            raise CheckpointError(
                f"{model_id}: the engine reads a conversation otherwise than training wrote it: {ids}"
            )
