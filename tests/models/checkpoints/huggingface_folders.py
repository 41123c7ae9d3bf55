"""What tests of Hugging Face folders share: settings of models, and another config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short enough that the eight frequencies of these heads fall on both sides and in between.
    "original_max_position_embeddings": 64,
}
MIXTURE: dict[str, Any] = {"ffn_kind": "moe", "experts": 3, "experts_per_token": 2}


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
