"""What torchrun starts in test_distributed.py: a run that is stopped after some steps and goes on.

torchrun ... together.py OUT TOKENS SETTINGS SHARD STOP
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from meki.models.architectures.llama import LlamaConfig
from meki.models.tokenizer import TokenizerSpec
from meki.models.train.data import TokenFile
from meki.models.train.distributed import World
from meki.models.train.trainer import Recipe, Trainer

STEPS = 8
RECIPE = Recipe(
    tokens=STEPS * 8 * 16, batch=8, micro_batch=2, length=16, rate=2e-3, last_rate=2e-4, warmup=3
)  # fmt: skip


def trainer(out: Path, tokens: Path, settings: dict, world: World, shard: bool) -> Trainer:
    file = TokenFile.open(tokens)
    tokenizer = TokenizerSpec((tokens.parent / "tokenizer.json").read_bytes(), eos_token_ids=(0,))
    config = LlamaConfig.from_settings(settings)
    return Trainer(config, RECIPE, file, file, out, tokenizer=tokenizer, provenance={}, world=world, shard=shard)


if __name__ == "__main__":
    out, tokens, settings, shard, stop = sys.argv[1:]
    with World.join("cpu") as world:
        counts = itertools.count(1)
        # A stop that one process is told is one for all.
        first = trainer(Path(out), Path(tokens), json.loads(settings), world, shard == "shard")
        first.train(lambda: next(counts) >= int(stop) and world.rank == world.size - 1, log_every=1, evaluate_every=2)
        assert first.step == int(stop)
        second = trainer(Path(out), Path(tokens), json.loads(settings), world, shard == "shard")
        assert second.step == int(stop)
        second.train(log_every=1, evaluate_every=2)
