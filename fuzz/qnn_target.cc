// runtime/package/qnn_target.cc: any text as the member "qnn" of a manifest that is otherwise right.

#include "fuzz/check_manifest.h"

namespace {

constexpr std::string_view kBefore = R"({
  "format": "meki-package", "version": 4, "name": "fuzz",
  "architecture": {
    "vocab_size": 64, "layers": 4, "hidden": 8, "ffn": 16, "heads": 4, "kv_heads": 2, "head_dim": 16, "context": 512
  },
  "memory": {
    "kind": "meki", "address": {"kind": "token"}, "layers": 4, "row_dim": 16, "file": "memory.rom", "row_type": "int8",
    "content_id": "00112233445566778899aabbccddeeff"
  },
  "stages": [{"file": "stage0.onnx", "rows": [0, 4]}],
  "dense_stages": [{"file": "dense.onnx"}],
  "weights": {"type": "int8"},
  "tokenizer": {"file": "tokenizer.json", "eos_token_ids": [0], "chat_template": null},
  "files": {
    "memory.rom": {"bytes": 1}, "stage0.onnx": {"bytes": 1}, "dense.onnx": {"bytes": 1}, "tokenizer.json": {"bytes": 1}
  },
  "qnn": )";

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(kBefore);
  text += meki::fuzz::text_of(data, size);
  text += "}";
  meki::fuzz::check_manifest(text);
  return 0;
}
