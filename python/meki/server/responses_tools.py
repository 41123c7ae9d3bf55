"""The tools of OpenAI's /v1/responses: functions, alone and in namespaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .body import Body, of_type

_WHY = 'the server runs no tools of its own; give functions, as {"type": "function", "name": ...}'
_SEARCHES = ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11")
_DESCRIBED = {"name", "description", "parameters"}
_ECHOED = {"type", "strict", *_DESCRIBED}


class FunctionTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    # Of tools that are run or searched for elsewhere; ignored.
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None
    async_: Annotated[bool | None, Field(alias="async")] = None

    def echo(self) -> dict[str, Any]:
        """What a response says of it."""
        return {"description": None, "parameters": None, "strict": False, **self.model_dump(include=_ECHOED)}


class NamespaceTool(Body):
    type: Literal["namespace"]
    name: str
    description: str | None = None
    tools: list[Annotated[FunctionTool, of_type("function", why=_WHY)]]

    def echo(self) -> dict[str, Any]:
        """What a response says of it."""
        return {**self.model_dump(include={"type", "name", "description"}), "tools": [it.echo() for it in self.tools]}


class WebSearchTool(BaseModel):
    """A model may do without it, and agents offer it unasked: it is left out."""

    model_config = ConfigDict(extra="allow")

    type: Literal["web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"]


Tool = Annotated[
    Annotated[FunctionTool | NamespaceTool | WebSearchTool, Field(discriminator="type")],
    of_type("function", "namespace", *_SEARCHES, why=_WHY),
]


class Functions:
    """The functions that a model is told of: those of a namespace by both names, with a dot between them."""

    def __init__(self, tools: Sequence[FunctionTool | NamespaceTool | WebSearchTool]) -> None:
        self._usable = [tool for tool in tools if not isinstance(tool, WebSearchTool)]
        self._own = {
            full_name(function.name, tool.name): {"name": function.name, "namespace": tool.name}
            for tool in self._usable
            if isinstance(tool, NamespaceTool)
            for function in tool.tools
        }

    def described(self) -> list[dict[str, Any]]:
        """As chat templates know them."""
        named: list[tuple[str, FunctionTool]] = []
        for tool in self._usable:
            if isinstance(tool, NamespaceTool):
                named += [(full_name(function.name, tool.name), function) for function in tool.tools]
            else:
                named.append((tool.name, tool))
        return [
            {"type": "function", "function": {**it.model_dump(include=_DESCRIBED, exclude_none=True), "name": name}}
            for name, it in named
        ]

    def echo(self) -> list[dict[str, Any]]:
        """What a response says of its tools: those that there are."""
        return [tool.echo() for tool in self._usable]

    def called(self, name: str) -> dict[str, str]:
        """What an item says of the function that the model has called by this name."""
        return self._own.get(name, {"name": name})


def full_name(name: str, namespace: str | None) -> str:
    """Of a function, as the model knows it."""
    return name if namespace is None else f"{namespace}.{name}"
