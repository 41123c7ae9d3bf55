"""What an answer of a chat consists of: text, thinking and tool calls, told apart while they are written."""

from .choice import RequiredCalls, call_grammar, choose_tools
from .events import AnswerEvent, Content, Reasoning, ToolCallArguments, ToolCallStart
from .forms import AnswerForm, begins_inside_thoughts, find_form
from .message import answer_message, new_call_id, with_calls_as_text
from .parser import AnswerParser

__all__ = [
    "AnswerEvent",
    "AnswerForm",
    "AnswerParser",
    "Content",
    "Reasoning",
    "RequiredCalls",
    "ToolCallArguments",
    "ToolCallStart",
    "answer_message",
    "begins_inside_thoughts",
    "call_grammar",
    "choose_tools",
    "find_form",
    "new_call_id",
    "with_calls_as_text",
]
