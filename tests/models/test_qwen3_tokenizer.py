"""The paper's vocabulary: Qwen3's tokenizer, built from the ranks that the package `dashscope` carries."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from meki import Engine
from meki.models import convert
from tests.python.random_schemas import outcome

BASE = 151_643
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
OTHERS = [
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_characters() -> dict[int, str]:
    """How byte-level tokenizers write each byte as a character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def two_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What the token was merged of: all merges of a lower rank than its own, in their order."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        best = pairs.index(min(pairs))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json and what Qwen3 has beside it."""
    found = importlib.util.find_spec("dashscope")
    if found is None:
        pytest.skip("the ranks come with `pip install --no-deps -r tests/pretrained.txt`")
    text = Path(found.submodule_search_locations[0], "resources", "qwen.tiktoken").read_bytes()
    lines = (line.split() for line in text.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    assert len(ranks) == BASE
    characters = byte_characters()
    written = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [tuple(written[part] for part in two_parts(token, ranks)) for token in ranks if len(token) > 1]
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *OTHERS)])
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "add_bos_token": False}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151_645, 151_643]}))
    return folder


@pytest.mark.slow
def test_the_whole_vocabulary_through_a_package(qwen3: Path, tmp_path: Path) -> None:
    """151,669 tokens in a model of 151,680, as the paper's sizes have them; here with two narrow layers."""
    out = tmp_path / "p"
    shape = ["layers=2", "hidden=64", "ffn=96", "heads=2", "kv_heads=1", "head_dim=32", "memory_dim=32"]
    settings = [argument for value in shape for argument in ("--set", value)]
    tokenizer = str(qwen3 / "tokenizer.json")
    assert convert.main(["--random", "meki-0.6b", *settings, "--tokenizer", tokenizer, "-o", str(out)]) == 0
    engine = Engine(out)
    assert engine.vocab_size == 151_680 and engine.tokenizer.get_vocab_size() == 151_669
    assert engine.manifest["tokenizer"]["eos_token_ids"] == [151_645, 151_643]
    # "Hello world" as Qwen3's published tokenizer has it; the last token of the vocabulary; text comes back whole.
    assert engine.tokenizer.encode("Hello world").ids == [9707, 1879]
    assert engine.tokenizer.encode("</think>").ids == [151_668]
    text = "Der Fuß misst 30,48 cm, 一英尺等于12英寸。\n\n\tif x != 0:  # 🦊"
    assert engine.tokenizer.decode(engine.tokenizer.encode(text).ids) == text
    result = engine.generate(text, max_new_tokens=8, seed=1)
    assert engine.random_weights and 0 < len(result.token_ids) <= 8
    assert engine.logits([151_679, 151_668]).shape == (2, 151_680)
    ends = [outcome(engine, number, 300) for number in range(20)]
    assert set(ends) <= {"eos", "length"} and ends.count("eos") >= 10, ends
