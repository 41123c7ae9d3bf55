"""meki-run: continues a text, or answers a message."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from .. import _core
from ..engine import Draft, Engine, Session
from ..generation import GenerationResult, TextStream, TokenLogprobs, TopLogprob
from ..options import DEFAULT_MAX_NEW_TOKENS, MOST_LOGPROBS, PENALTIES, SAMPLING, GenerationOptions
from ..prompt import no_chat_template
from ..requests import Request
from .arguments import Parser, add_engine_options, engine_options, json_object, path, text_file, text_of, token_ids
from .errors import note, report, run_command
from .interactive import Conversation, converse
from .output import RANDOM_WEIGHTS, SIMULATED, print_stats, print_stream
from .prompt_cache import PromptCache


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = _parser()
    return run_command(parser.prog, lambda: _run(parser.parse_args(argv), parser.prog))


def _parser() -> argparse.ArgumentParser:
    defaults = _core.SamplingOptions()
    parser = Parser(
        "meki-run",
        description="Continue a text, or answer a message, with a MeKi model.",
        epilog="Without a prompt, standard input is read if it is not a terminal. Reference: docs/cli.md",
    )
    parser.add_argument("--model", default="meki-tiny", help="name or package directory (default: %(default)s)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("text", nargs="?", metavar="PROMPT", help="the text to continue; - reads standard input")
    prompt.add_argument("--prompt", help="the same, for texts that begin with a dash")
    prompt.add_argument("--file", metavar="FILE", help="read the prompt from a file; - reads standard input")
    prompt.add_argument(
        "--prompt-ids", type=token_ids, metavar="IDS", help="token ids with commas between them, taken as they are"
    )
    add = parser.add_argument_group("chat").add_argument
    add("--chat", action="store_true", help="the prompt is a user's message: answer it (needs a chat template)")
    add("--system", metavar="TEXT", help="with --chat: a system message before it")
    add("--assistant", metavar="TEXT", help="with --chat: the beginning of the answer, which the model goes on with")
    add(
        "--chat-template",
        type=text_file,
        metavar="FILE",
        help="with --chat: a Jinja template in place of the package's own",
    )
    add(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="with --chat: variables of the template, as '{\"enable_thinking\": false}'",
    )
    add = parser.add_argument_group(
        "generation", "What the package says about sampling comes before the defaults here."
    ).add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help="new tokens (default: %(default)s; 0 or -1: fill the context)",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        help=f"0: always the most probable token (default: {defaults.temperature}, with --chat 0)",
    )
    add("--top-k", type=int, metavar="K", help="keep the K most probable tokens (default: 0, all)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help=f"keep the most probable tokens that sum to P (default: {defaults.top_p})",
    )
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the most probable one (default: 0, none)")
    add("--repetition-penalty", type=float, metavar="R", help="make repetitions less probable (default: 1, off)")
    add("--presence-penalty", type=float, metavar="P", help="take P from logits of what is generated (default: 0, off)")
    add("--frequency-penalty", type=float, metavar="P", help="the same, times how often it is (default: 0, off)")
    add("--seed", type=int, metavar="N", help="same seed, same text (default: a fresh one, shown by --stats)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add(
        "--stop-token-id",
        action="append",
        type=int,
        default=[],
        metavar="ID",
        help="end at this token; may be repeated",
    )
    add("--ignore-eos", action="store_true", help="go on past the tokens with which the model ends a text")
    structured = parser.add_argument_group(
        "structured output", "The text ends where it is complete. Needs pip install 'meki[structured]'."
    ).add_mutually_exclusive_group()
    structured.add_argument("--json-schema", type=text_file, metavar="FILE", help="write JSON of the schema in FILE")
    structured.add_argument("--regex", metavar="TEXT", help="write what this regular expression matches as a whole")
    structured.add_argument(
        "--grammar", type=text_file, metavar="FILE", help="write a text of the grammar in FILE, in Lark's syntax"
    )
    add = add_engine_options(parser)
    add("--context", type=int, default=0, metavar="N", help="capacity in tokens (default: the model's, at most 4096)")
    add(
        "--prompt-cache",
        type=path,
        metavar="DIR",
        help="keep what is computed of prompts in this directory, and begin with what is there of this one",
    )
    add(
        "--provider",
        choices=("cpu", "qnn"),
        default="cpu",
        help="what computes; qnn: the NPU of a chip that meki-compile compiled the package for (default: %(default)s)",
    )
    add("--soc", metavar="NAME", help="with --provider qnn: the chip, such as sm8750 (default: the only one compiled)")
    add("--no-prefetch", action="store_true", help="read memory rows on the compute thread, for measurements")
    drafts = parser.add_argument_group("speculative decoding", "The same text, where guesses are right sooner.")
    source = drafts.add_mutually_exclusive_group()
    source.add_argument(
        "--draft", metavar="MODEL", help="a smaller model with the same tokenizer guesses the next tokens"
    )
    source.add_argument(
        "--prompt-lookup", action="store_true", help="guess what followed the last tokens where they occurred before"
    )
    drafts.add_argument(
        "--draft-tokens",
        type=int,
        metavar="N",
        help="with either: tokens guessed for a step at most, 1 to 15 "
        f"(default: {_core.SessionOptions.DEFAULT_DRAFT_TOKENS})",
    )
    output = parser.add_argument_group("output")
    mode = output.add_mutually_exclusive_group()
    mode.add_argument(
        "--interactive",
        action="store_true",
        help="several turns in one session; a line is a turn, with --chat a message",
    )
    mode.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help=f"with --json: log-probabilities of each token and of the N most probable ones, 0 to {MOST_LOGPROBS}",
    )
    output.add_argument("--stats", action="store_true", help="speed and memory on standard error")
    return parser


def _run(arguments: argparse.Namespace, program: str) -> None:
    prompt = _read_prompt(arguments)
    engine = Engine(
        arguments.model,
        provider=arguments.provider,
        soc=arguments.soc,
        chat_template=arguments.chat_template,
        **engine_options(arguments),
    )
    if arguments.chat and not engine.can_chat:
        raise no_chat_template(engine.path)
    draft: Draft = "lookup" if arguments.prompt_lookup else None
    if arguments.draft is not None:
        draft = Engine(arguments.draft, **engine_options(arguments))
    if engine.random_weights:
        note(RANDOM_WEIGHTS)
    if engine.simulated:
        note(SIMULATED)
    options = GenerationOptions(
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        stop=arguments.stop,
        stop_token_ids=arguments.stop_token_id,
        ignore_eos=arguments.ignore_eos,
        logprobs=arguments.logprobs,
        json_schema=arguments.json_schema and _read("schema", "--json-schema", arguments.json_schema),
        regex=arguments.regex,
        grammar=arguments.grammar and _read("grammar", "--grammar", arguments.grammar),
    )
    given = {name: value for name in (*SAMPLING, *PENALTIES) if (value := getattr(arguments, name)) is not None}
    options.update(cast(GenerationOptions, given))

    # What the text on a terminal begins with.
    begun = engine.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt
    begun = arguments.assistant if arguments.chat else begun

    def warn(text: str) -> None:
        report(program, "note", text)

    def make_session() -> Session:
        return engine.session(
            context=arguments.context,
            prefetch=not arguments.no_prefetch,
            draft=draft,
            draft_tokens=arguments.draft_tokens,
        )

    def begin() -> Session | Conversation:
        if not arguments.chat:
            return make_session()
        return Conversation(
            make_session(),
            arguments.system,
            warn,
            answer=arguments.assistant,
            chat_template_kwargs=arguments.chat_template_kwargs,
        )

    def show(stream: TextStream) -> None:
        if arguments.json:
            _print_json(engine, stream.finish())
        else:
            if sys.stdout.isatty():
                sys.stdout.write(begun or "")
            print_stream(stream)
        if arguments.stats:
            print_stats(engine, stream.result.stats)

    if prompt is None:
        converse(begin, options, show, program)
        return
    if arguments.prompt_cache is not None:
        cache = PromptCache(arguments.prompt_cache, warn)
        request = _request(engine, arguments, prompt, options)
        session = make_session()
        cache.load(session, request.token_ids)
        stream = session.run(request)
        show(stream)
        cache.save(session, len(request.token_ids), stream.result.stats.cached_tokens)
        return
    show(begin().stream(cast(str, prompt), **options))  # token ids: of a session alone, as _read_prompt sees to


def _request(
    engine: Engine, arguments: argparse.Namespace, prompt: str | list[int], options: GenerationOptions
) -> Request:
    """What a session is to become, whatever it has already."""
    if not arguments.chat:
        return engine.requests.text(prompt, first=True, whole=True, **options)
    turns = (("system", arguments.system), ("user", prompt), ("assistant", arguments.assistant))
    return engine.requests.chat(
        [{"role": role, "content": text} for role, text in turns if text is not None],
        chat_template_kwargs=arguments.chat_template_kwargs,
        continue_final_message=arguments.assistant is not None,
        **options,
    )


def _read_prompt(arguments: argparse.Namespace) -> str | list[int] | None:
    """The prompt, wherever it is given; None: the turns come line by line."""
    if arguments.draft_tokens is not None and arguments.draft is None and not arguments.prompt_lookup:
        raise ValueError("--draft-tokens is for speculative decoding; add --prompt-lookup or --draft, or omit it")
    if arguments.logprobs is not None and not arguments.json:
        raise ValueError("--logprobs is a part of the JSON object; add --json, or omit it")
    for option in ("system", "assistant", "chat_template", "chat_template_kwargs"):
        if getattr(arguments, option) is not None and not arguments.chat:
            raise ValueError(f"--{option.replace('_', '-')} is a part of a conversation; add --chat, or omit it")
    if arguments.prompt_ids is not None:
        if arguments.chat or arguments.interactive:
            raise ValueError("--prompt-ids is a whole prompt; omit --chat and --interactive")
        return list(arguments.prompt_ids)
    if arguments.prompt_cache is not None and arguments.interactive:
        raise ValueError("--prompt-cache is for one prompt; omit --interactive, whose session keeps its turns anyway")
    source = "-" if arguments.text == "-" else arguments.file
    text = arguments.prompt if arguments.text is None else arguments.text
    if arguments.interactive:
        if source is not None or text is not None:
            raise ValueError("--interactive takes its turns line by line; omit the prompt and --file")
        if sys.stdin is None:
            raise ValueError("--interactive reads standard input, which is closed; open or redirect it")
        return None
    if source is None and text is not None:
        return str(text).removeprefix("\ufeff")  # of a file that a shell has put here
    if sys.stdin is None and source in (None, "-"):
        raise ValueError("no prompt: standard input is closed; give it as an argument or with --file")
    if source is None and sys.stdin.isatty():
        if arguments.chat and not arguments.json and arguments.prompt_cache is None:
            return None
        raise ValueError("no prompt: give it as an argument, with --file or on standard input, or use --interactive")
    return _read("prompt", "--file", None if source in (None, "-") else path(source))


def _read(kind: str, option: str, file: Path | None) -> str:
    """The text of the file that the option names; None: standard input."""
    name = "standard input" if file is None else f"{kind} file {file}"
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}; {option} takes a readable text file") from error
    return text_of(name, data)


def _print_json(engine: Engine, result: GenerationResult) -> None:
    fields = {"model": engine.name, **dataclasses.asdict(result)}
    if result.message is None:
        del fields["message"]
    if result.logprobs is None:
        del fields["logprobs"]
    else:
        fields["logprobs"] = [
            {**_json_logprob(token), "top": [_json_logprob(other) for other in token.top]} for token in result.logprobs
        ]
    if engine.random_weights:
        fields["random_weights"] = True
    if engine.soc is not None:
        fields.update(provider=engine.provider, soc=engine.soc, simulated=engine.simulated)
    print(json.dumps(fields, indent=2))


def _json_logprob(token: TokenLogprobs | TopLogprob) -> dict[str, Any]:
    impossible = token.logprob == -math.inf  # which JSON cannot say
    return {
        "token_id": token.token_id,
        "text": token.text.decode(errors="replace"),
        "bytes": list(token.text),
        "logprob": None if impossible else token.logprob,
    }


if __name__ == "__main__":
    sys.exit(main())
