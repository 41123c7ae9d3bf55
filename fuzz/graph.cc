// runtime/graph/ort/model_file.h: any bytes as a stage, on the CPU and compiled.

#include "fuzz/target.h"
#include "runtime/graph/ort/model_file.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace meki;
  static const fuzz::Scratch scratch;
  scratch.write("stage.onnx", fuzz::text_of(data, size));
  for (const ort::OperatorNames allowed : {ort::kCpuOperators, ort::kCompiledOperators}) {
    fuzz::accepts([&] {
      for (const std::string& name : ort::check_model_file(scratch / "stage.onnx", allowed, "remedy")) {
        fuzz::require(std::filesystem::path(name).filename() == name && name != "." && name != "..",
                      "files beside the stage");
      }
    });
  }
  return 0;
}
