"""The client process of a collection: instructions in, rows of the collection out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from janus_ray.data.annotate import Annotator
from janus_ray.data.recipe import CollectRecipe
from janus_ray.llm.client import ChatClient
from janus_ray.llm.fanout import ClientProcess
from janus_ray.records import COLLECTION, Instruction

# Beside each row: the requests made for it just now.
ANNOTATED = pa.schema([*COLLECTION, ("sent", pa.int64())])


class AnnotatingClient(ClientProcess[Instruction]):
    """Turns instructions into rows of the collection, in a process of its own."""

    def __init__(self, target: dict[str, Any], ledger: str, max_concurrency: int, recipe: dict[str, Any]) -> None:
        """Keeps what is needed."""
        super().__init__(target, ledger, max_concurrency)
        self._recipe = CollectRecipe.model_validate(recipe)
        # As many instructions at work as requests may be in flight: each always has one to send, and rows are
        # finished one after another instead of all at the end.
        self._at_work = asyncio.Semaphore(max_concurrency)

    async def results(self, client: ChatClient, items: Sequence[Instruction]) -> pa.Table:
        """The rows of some instructions, in the schema ANNOTATED."""
        annotator = Annotator(client, self._recipe)
        finished = await asyncio.gather(*(self._rows(annotator, instruction) for instruction in items))
        # The explicit schema keeps a column that is empty in these rows from losing its type.
        return pa.Table.from_pylist([row for rows in finished for row in rows], schema=ANNOTATED)

    async def _rows(self, annotator: Annotator, instruction: Instruction) -> list[dict[str, Any]]:
        async with self._at_work:
            return await annotator.rows(instruction)
