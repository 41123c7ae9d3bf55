"""What one generation is asked for: the tokens of a prompt or a conversation, and checked options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from .answers import (
    AnswerForm,
    RequiredCalls,
    begins_inside_thoughts,
    call_grammar,
    choose_tools,
    find_form,
    with_calls_as_text,
)
from .messages import check_tools
from .options import (
    ChatOptions,
    CheckedOptions,
    Form,
    GenerationOptions,
    check_flag,
    check_integer,
    check_options,
    hold_to,
)
from .prompt import PromptEncoder
from .structured import Constraint, Grammars


@dataclass(frozen=True)
class Request:
    """One generation that a session is to run, once: the constraint goes along with its tokens."""

    token_ids: list[int]
    options: CheckedOptions
    constraint: Constraint | None
    """Of the tokens to come; None: none."""
    whole: bool
    """The session's sequence becomes `token_ids`; otherwise they follow it."""
    answer: AnswerForm | None = None
    """How the text is to be read (`AnswerParser`), if it is an answer in a chat."""


class Requests:
    """Makes the requests of an engine's sessions. Immutable and thread-safe; ValueError and TypeError as of
    `Session.stream` and `Session.stream_chat`."""

    def __init__(self, prompts: PromptEncoder, sampling: GenerationOptions, vocab_size: int) -> None:
        """sampling: the package's defaults. vocab_size: of the model."""
        self.prompts = prompts
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._grammars = Grammars(prompts, vocab_size)
        self._form = find_form(prompts.chat_template.text) if prompts.chat_template else AnswerForm()

    def text(
        self, prompt: str | Sequence[int], *, first: bool, whole: bool = False, **options: Unpack[GenerationOptions]
    ) -> Request:
        """To go on with `prompt`. first: it begins the sequence."""
        checked = check_options({**self._sampling, **options}, self._vocab_size)
        token_ids = self.prompts.encode(prompt, first=first)
        for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
            check_integer("each token id of a prompt", token_id, self._vocab_size - 1)
        return Request(token_ids, checked, self._constraint(checked), whole)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> Request:
        """To answer a conversation."""
        one_call = not check_flag("parallel_tool_calls", options.pop("parallel_tool_calls", True))
        tools, choice = choose_tools(
            check_tools(options.pop("tools", None)), options.pop("tool_choice", None), one_call=one_call
        )
        chat_template_kwargs = options.pop("chat_template_kwargs", None)
        go_on = check_flag("continue_final_message", options.pop("continue_final_message", False))
        generation: GenerationOptions = {**self._sampling, **options}  # type: ignore[typeddict-item]  # the rest
        checked = check_options({"temperature": 0.0, **generation}, self._vocab_size)
        template = self.prompts.chat_template
        if template and not template.knows_tool_calls and self._form.calls:
            messages = with_calls_as_text(messages, self._form.calls)
        text = self.prompts.render_chat(
            messages, tools=tools, chat_template_kwargs=chat_template_kwargs, continue_final_message=go_on
        )
        token_ids = self.prompts.encode_chat(text)
        begun = str(messages[-1]["content"]) if go_on else ""
        thinks_first = begins_inside_thoughts(self._form, text, begun)
        form = replace(self._form, thinks_first=thinks_first, one_call=one_call)
        answer, checked = self._held(form, checked, tools, choice)
        return Request(token_ids, checked, self._constraint(checked), whole=True, answer=answer)

    def _held(
        self,
        answer: AnswerForm,
        options: CheckedOptions,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: RequiredCalls | None,
    ) -> tuple[AnswerForm, CheckedOptions]:
        """How an answer is to be read, and options that hold it to what it has to be."""
        calls = answer.calls.of_tools(tools) if answer.calls and tools else None
        answer = replace(answer, calls=calls)
        form = options.form
        if choice is None and tools and calls and form is not None and form.option == "json_schema":
            choice = RequiredCalls(tools, several=not answer.one_call, or_json=form.text)
            options = replace(options, form=None)
        if choice is not None:
            grammar = call_grammar(answer, choice, self.prompts.vocabulary.special_tokens)
            return answer, hold_to(options, Form("tool_choice", grammar))
        if form is None:
            return answer, options
        if form.option == "json_schema":
            return AnswerForm(), options  # there is nothing but the JSON
        # Thoughts end only if the form says so.
        ends = answer.thinking is not None and answer.thinking[1] in form.text
        return replace(answer, thinks_first=answer.thinks_first and ends), options

    def _constraint(self, options: CheckedOptions) -> Constraint | None:
        return None if options.form is None else self._grammars.constraint(options.form)
