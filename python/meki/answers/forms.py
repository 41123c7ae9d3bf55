"""In which form a model sets off the parts of its answers, found out from its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .calls import CallForm, HermesCalls, LlamaCalls, MistralCalls, NewMistralCalls
from .gemma import GemmaCalls
from .qwen_coder import QwenCoderCalls

_CALLS: tuple[CallForm, ...] = (
    QwenCoderCalls(),
    HermesCalls(),
    NewMistralCalls(),
    MistralCalls(),
    GemmaCalls(),
    LlamaCalls(),
)
"""The first that a template has is its."""
_THINKING = (("<think>", "</think>"), ("<|channel>thought\n", "<channel|>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class AnswerForm:
    """How one answer is to be read. The default: all of it is text for the user."""

    thinking: tuple[str, str] | None = None
    """What thoughts stand between; None: they are not told apart."""
    calls: CallForm | None = None
    """None: calls of tools are not told apart."""
    thinks_first: bool = False
    """The answer begins inside thoughts, which the prompt has begun."""
    one_call: bool = False
    """The answer is over where a second call begins."""

    def special_tokens(self, special_tokens: Mapping[str, int]) -> dict[str, int]:
        """Those of a tokenizer's, ids by their texts, that set off parts: they have to be part of the answer's text."""
        calls = (self.calls.opener, self.calls.closer, *self.calls.marks) if self.calls else ()
        marks = (*(self.thinking or ()), *calls)
        return {text: id for text, id in special_tokens.items() if any(text in mark for mark in marks)}


def find_form(template: str) -> AnswerForm:
    """That of the models that a chat template is for."""
    template = template.replace('\\"', '"')
    # Some templates know only the end of thoughts, where they leave out those of earlier answers.
    thinking = next((pair for pair in _THINKING if pair[0].strip() in template or pair[1] in template), None)
    calls = next((form for form in _CALLS if form.is_in(template)), None)
    return AnswerForm(thinking, calls)


def begins_inside_thoughts(form: AnswerForm, prompt: str, begun: str) -> bool:
    """Whether the prompt ends inside thoughts. begun: the answer that it ends with, if it is one to go on with."""
    if form.thinking is None:
        return False
    opener, closer = form.thinking[0].strip(), form.thinking[1]
    return begun.rfind(opener) > begun.rfind(closer) if begun else prompt.rstrip().endswith(opener)
