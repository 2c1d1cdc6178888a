"""Models come when they are asked for, stay while they are used, and leave when there is no room."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.model import load
from pipeline.serving.config import ServingConfig
from pipeline.serving.model_cache import ModelCache
from pipeline.serving.refusals import Refused
from pipeline.serving.service import Identity, Service


@pytest.fixture
def opening(tiny_url: str) -> Callable[[str], Service]:
    def open_service(url: str) -> Service:
        if url == "broken":
            raise ValueError("self-test: the model answers NaN")
        return Service(load(tiny_url), replace(ServingConfig(), model=url), Identity(url, "1", ""))

    return open_service


def test_models_are_loaded_once_and_the_longest_unused_leaves(opening: Callable[[str], Service]) -> None:
    opened: list[str] = []

    def counted(url: str) -> Service:
        opened.append(url)
        return opening(url)

    one = opening("x")
    shelf = ModelCache(counted, max_bytes=2 * one.bytes)
    one.close()

    async def use(url: str) -> str:
        async with shelf.using(url) as service:
            await asyncio.sleep(0.01)
            return service.identity.id

    async def run() -> None:
        assert await asyncio.gather(*(use("a") for _ in range(5))) == ["a"] * 5
        assert opened == ["a"]
        await use("b")
        await use("a")
        first = shelf.services["b"]
        await use("c")
        assert set(shelf.services) == {"a", "c"}  # b was used longest ago
        assert not first.engine.alive
        async with shelf.using("a"), shelf.using("c"):
            with pytest.raises(Refused, match="max_model_bytes") as caught:
                await use("b")
            assert (caught.value.status, caught.value.retry_after_s) == (503, 5.0)
        with pytest.raises(ValueError, match="NaN"):
            await use("broken")
        assert set(shelf.services) == {"a", "c"}

    asyncio.run(run())
    engines = [service.engine for service in shelf.services.values()]
    shelf.close()
    assert not any(engine.alive for engine in engines)
