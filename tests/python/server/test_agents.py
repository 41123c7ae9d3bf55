"""An agent of openai-agents that calls a tool, on a real server."""

from __future__ import annotations

import asyncio

import openai
import pytest
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from pydantic import BaseModel

from .running import Running


class Weather(BaseModel):
    sunny: bool


@pytest.mark.parametrize(
    ("api", "settings"),
    [
        (OpenAIChatCompletionsModel, ModelSettings(tool_choice="required", include_usage=True)),
        (OpenAIResponsesModel, ModelSettings(tool_choice="weather", store=False)),
    ],
    ids=["chat completions", "responses"],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_calls_a_tool_and_answers(
    served: Running, api: type[Model], settings: ModelSettings, streamed: bool
) -> None:
    asked: list[bool] = []

    # The tool is there once: this model would call it again and again.
    @function_tool(is_enabled=lambda context, agent: not asked)
    def weather(rain: bool) -> str:
        """Whether there is weather."""
        asked.append(rain)
        return "There is."

    async def run() -> object:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            agent = Agent(
                name="Meteorologist",
                instructions="Tell the weather.",
                model=api("meki-tiny", client),
                model_settings=settings.resolve(ModelSettings(temperature=0, max_tokens=100)),
                tools=[weather],
                output_type=Weather,
            )
            config = RunConfig(tracing_disabled=True)
            if not streamed:
                return (await Runner.run(agent, "How is it?", run_config=config, max_turns=3)).final_output
            result = Runner.run_streamed(agent, "How is it?", run_config=config, max_turns=3)
            async for _ in result.stream_events():
                pass
            return result.final_output

    assert isinstance(asyncio.run(run()), Weather)
    assert asked
