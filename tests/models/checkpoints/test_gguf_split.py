"""Models that are split over several GGUF files, by the gguf package's own writer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from meki.models.architectures.llama import Decoder
from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.checkpoints.gguf_file import GgufFile

from .gguf_models import LLAMA, write_gguf

MakeModel = Callable[..., Decoder]
TYPES = {"blk.1.attn_q.weight": Type.Q8_0, "blk.2.ffn_up.weight": Type.Q4_1, "output_norm.weight": Type.F16}


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Decoder:
    return make_model(**LLAMA)


@pytest.fixture
def parts(model: Decoder, tmp_path: Path) -> list[Path]:
    write_gguf(tmp_path / "m.gguf", model, "llama", types=TYPES, split=8)
    return sorted(tmp_path.glob("*.gguf"))


def test_parts_are_one_model(model: Decoder, parts: list[Path], tmp_path: Path) -> None:
    assert [part.name for part in parts] == [f"m-{number:05d}-of-00004.gguf" for number in (1, 2, 3, 4)]
    (tmp_path / "whole").mkdir()
    whole = open_checkpoint(write_gguf(tmp_path / "whole" / "m.gguf", model, "llama", types=TYPES), {})
    split = open_checkpoint(parts[0], {})
    assert split.config == whole.config
    assert split.provenance == {**whole.provenance, "source": "m-00001-of-00004.gguf"}
    assert split.provenance["types"] == "F32, Q4_1, Q8_0, F16"  # of three parts
    ours, expected = checkpoint_source(split), checkpoint_source(whole)
    for name in split.parts:
        np.testing.assert_array_equal(ours.weights(name), expected.weights(name), err_msg=name)
    assert ours.blocks is not None
    blocks = ours.blocks.read("layers.2.mlp.up_proj.weight")
    assert blocks is not None
    np.testing.assert_array_equal(blocks.values(), expected.weights("layers.2.mlp.up_proj.weight"))


def test_one_file_that_says_so(model: Decoder, tmp_path: Path) -> None:
    """What llama-gguf-split --merge leaves in the metadata."""
    for count in (0, 1):
        changes = {"split.no": 0, "split.count": count, "split.tensors.count": 99}
        path = write_gguf(tmp_path / f"{count}.gguf", model, "llama", changes)
        checkpoint_source(open_checkpoint(path, {}))


def test_a_folder_names_the_first(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=f"the model is not here, but at {parts[0]}; give that"):
        open_checkpoint(parts[0].parent, {})


def test_another_part(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=f"{parts[2]}: is part 3 of a split model; give the first, {parts[0]}"):
        open_checkpoint(parts[2], {})


def test_missing_parts(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=f"{parts[0]}: .* first of 4 parts, .*; {parts[2].name} is missing, down"):
        open_checkpoint(parts[0], {})
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"; {parts[1].name}, {parts[2].name} are missing"):
        open_checkpoint(parts[0], {})


def test_many_missing_parts(model: Decoder, tmp_path: Path) -> None:
    changes = {"split.no": 0, "split.count": 99_999}
    path = write_gguf(tmp_path / "m-00001-of-99999.gguf", model, "llama", changes)
    with pytest.raises(CheckpointError, match=r"m-00004-of-99999.gguf \(and 99995 more\) are missing"):
        open_checkpoint(path, {})


@pytest.mark.parametrize("name", ["m.gguf", "m-00002-of-00004.gguf", "m-00001-of-00003.gguf", "m-1-of-4.gguf"])
def test_a_name_that_does_not_fit(parts: list[Path], name: str) -> None:
    path = parts[0].rename(parts[0].with_name(name))
    with pytest.raises(CheckpointError, match=r"split.no is 0 and split.count 4, expected a name that says so"):
        open_checkpoint(path, {})


@pytest.mark.parametrize("count", ["3", [3], 2.5])
def test_a_count_that_is_none(model: Decoder, tmp_path: Path, count: object) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", model, "llama", {"split.count": count, "split.no": 0})
    with pytest.raises(CheckpointError, match="expected a name that says so"):
        open_checkpoint(path, {})


def test_a_part_in_the_place_of_another(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match=f"{parts[2]}: split.no is 1, expected 2 of a part of {parts[0].name}"):
        open_checkpoint(parts[0], {})


def test_a_part_of_another_model(parts: list[Path], model: Decoder) -> None:
    write_gguf(parts[1], model, "llama", {"split.no": 1})
    with pytest.raises(CheckpointError, match=f"{parts[1]}: split.count is None, expected 4 of a part of"):
        open_checkpoint(parts[0], {})


def write_part(path: Path, names: list[str]) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 4)
    for name in names:
        writer.add_tensor(name, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tensors_of_several_models(parts: list[Path]) -> None:
    names = list(GgufFile(parts[0]).shapes)
    write_part(parts[1], ["mine"])
    with pytest.raises(CheckpointError, match=f"{parts[0]}: split.tensors.count is 29, but its 4 parts have 22"):
        open_checkpoint(parts[0], {})
    write_part(parts[1], names[:1])
    with pytest.raises(CheckpointError, match=f"{parts[1]}: tensor {names[0]} is also in {parts[0].name}; expected it"):
        open_checkpoint(parts[0], {})


def test_a_damaged_part(parts: list[Path]) -> None:
    parts[3].write_bytes(parts[3].read_bytes()[:200])
    with pytest.raises(CheckpointError, match=f"{parts[3]}: not a complete GGUF file"):
        open_checkpoint(parts[0], {})
