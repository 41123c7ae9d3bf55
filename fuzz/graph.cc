// runtime/graph/ort/model_file.h: any bytes as a stage, on the CPU and compiled.

#include "fuzz/target.h"
#include "runtime/graph/ort/model_file.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace meki;
  static const fuzz::Scratch scratch;
  scratch.write("stage.onnx", fuzz::text_of(data, size));
  for (const ort::OperatorNames allowed : {ort::kCpuOperators, ort::kCompiledOperators}) {
    fuzz::accepts([&] {
      const ort::ModelFile model = ort::check_model_file(scratch / "stage.onnx", allowed, "remedy");
      for (const std::string& name : model.files) {
        fuzz::require(std::filesystem::path(name).filename() == name && name != "." && name != "..",
                      "files beside the stage");
      }
      for (const ort::PackedTensor& tensor : model.streamed) {
        fuzz::require(model.files.contains(tensor.file) && tensor.bytes > 0, "matrices in files of the stage");
      }
    });
  }
  return 0;
}
