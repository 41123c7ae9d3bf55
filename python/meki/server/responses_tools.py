"""The tools of OpenAI's /v1/responses: functions, alone and in namespaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from .body import Body, of_type

_WHY = 'the server runs no tools of its own; give functions, as {"type": "function", "name": ...}'
_Search = Literal["web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"]
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

    type: _Search


Tool = Annotated[
    Annotated[FunctionTool | NamespaceTool | WebSearchTool, Field(discriminator="type")],
    of_type("function", "namespace", *get_args(_Search), why=_WHY),
]


class Functions:
    """The functions that a model is told of: those of a namespace by both names, with a dot between them."""

    def __init__(self, tools: Sequence[FunctionTool | NamespaceTool | WebSearchTool]) -> None:
        self.usable = [tool for tool in tools if not isinstance(tool, WebSearchTool)]
        self._alone = {tool.name: tool for tool in self.usable if isinstance(tool, FunctionTool)}
        self._within = {
            f"{tool.name}.{function.name}": (tool, function)
            for tool in self.usable
            if isinstance(tool, NamespaceTool)
            for function in tool.tools
        }

    def described(self) -> list[dict[str, Any]]:
        """As chat templates know them."""
        functions = [tool.model_dump(include=_DESCRIBED, exclude_none=True) for tool in self._alone.values()]
        for name, (namespace, its) in self._within.items():
            described = its.model_dump(include=_DESCRIBED, exclude_none=True)
            about = "\n".join(text for text in (namespace.description, its.description) if text)
            functions.append({**described, "name": name, **({"description": about} if about else {})})
        return [{"type": "function", "function": function} for function in functions]

    def echo(self) -> list[dict[str, Any]]:
        """What a response says of its tools: those that there are."""
        return [tool.echo() for tool in self.usable]

    def full_name(self, name: str, namespace: str | None = None) -> str:
        """Of a function, as the model knows it. Without its namespace, it is the only one of this name."""
        if namespace is not None:
            return f"{namespace}.{name}"
        short = [] if name in self._alone else [full for full, (_, its) in self._within.items() if its.name == name]
        return short[0] if len(short) == 1 else name

    def called(self, name: str) -> dict[str, str]:
        """What an item says of the function that the model has called by this name."""
        if name in self._alone or (full := self.full_name(name)) not in self._within:
            return {"name": name}
        namespace, its = self._within[full]
        return {"name": its.name, "namespace": namespace.name}
