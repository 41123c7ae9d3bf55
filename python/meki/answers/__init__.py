"""What an answer of a chat consists of: text, thinking and tool calls, told apart while they are written."""

from .events import AnswerEvent, Content, Reasoning, ToolCallArguments, ToolCallStart

__all__ = ["AnswerEvent", "Content", "Reasoning", "ToolCallArguments", "ToolCallStart"]
