// Field numbers are those of onnx.proto (https://github.com/onnx/onnx), encoding that of Protocol Buffers.

#include "runtime/graph/ort/model_file.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "runtime/base/error.h"
#include "runtime/base/file.h"

namespace meki::ort {
namespace {

constexpr std::array<std::string_view, 22> kCpu = {"Abs",
                                                   "Add",
                                                   "Cast",
                                                   "Gather",
                                                   "Gemm",
                                                   "MatMul",
                                                   "Max",
                                                   "Mul",
                                                   "RMSNormalization",
                                                   "ReduceSum",
                                                   "Sigmoid",
                                                   "Sign",
                                                   "Split",
                                                   "Sqrt",
                                                   "Squeeze",
                                                   "Tanh",
                                                   "meki.Attention",
                                                   "meki.Embedding",
                                                   "meki.Experts",
                                                   "meki.Injection",
                                                   "meki.Linear",
                                                   "meki.ShortConvolution"};
constexpr std::array<std::string_view, 1> kCompiled = {"com.microsoft.EPContext"};

constexpr size_t kMaxBytes = 64 << 20;
constexpr size_t kMaxNodes = 16'384;  // a float32 stage has some 40 a layer

// What is wrong with a file, without its name.
class ModelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A field of a message.
struct Field {
  uint32_t number = 0;
  std::string_view bytes;  // of a string, a message or packed numbers; else empty
  uint64_t value = 0;      // of an integer
};

// The fields of a message, one after the other.
class Message {
 public:
  explicit Message(std::string_view bytes) : rest_(bytes) {}

  bool next(Field& field) {
    if (rest_.empty()) return false;
    const uint64_t tag = varint();
    // Protocol Buffers' own parser drops the bits beyond, and so would see another field.
    if (tag > UINT32_MAX) throw ModelError("not an ONNX model");
    field = {.number = static_cast<uint32_t>(tag >> 3), .bytes = {}};
    switch (tag & 7) {
      case 0: field.value = varint(); return true;
      case 1: take(8); return true;
      case 2: field.bytes = take(varint()); return true;
      case 5: take(4); return true;
      default: throw ModelError("not an ONNX model");
    }
  }

  // Adds the numbers of a repeated field: this one, or as many as are packed in it.
  static void numbers(const Field& field, std::vector<uint64_t>& numbers) {
    if (field.bytes.empty()) numbers.push_back(field.value);
    for (Message packed(field.bytes); !packed.rest_.empty();) numbers.push_back(packed.varint());
  }

 private:
  uint64_t varint() {
    uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<uint8_t>(take(1).front());
      value |= static_cast<uint64_t>(byte & 127) << shift;
      if (byte < 128) return value;
    }
    throw ModelError("not an ONNX model");
  }

  std::string_view take(uint64_t count) {
    if (count > rest_.size()) throw ModelError("not an ONNX model, or truncated");
    const std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }

  std::string_view rest_;
};

class Checker {
 public:
  Checker(OperatorNames allowed, ModelFile& found) : allowed_(allowed), found_(found) {}

  void model(std::string_view bytes) {
    Field field;
    for (Message message(bytes); message.next(field);) {
      if (field.number == 7) graph(field.bytes);
      if (field.number == 20) throw ModelError("it has training information, which no stage has");
      if (field.number == 25) throw ModelError("it defines functions, which no stage does");
    }
    if (nodes_ == 0) throw ModelError("not an ONNX model, or one without nodes");
    std::erase_if(found_.streamed, [this](const PackedTensor& tensor) { return !streamed_.contains(tensor.name); });
  }

 private:
  void graph(std::string_view bytes) {
    Field field;
    for (Message message(bytes); message.next(field);) {
      if (field.number == 1) node(field.bytes);
      if (field.number == 5) tensor(field.bytes);
      if (field.number == 15) throw ModelError("it has a sparse tensor, which no stage has");
    }
  }

  void node(std::string_view bytes) {
    if (++nodes_ > kMaxNodes) throw ModelError("more than " + std::to_string(kMaxNodes) + " nodes");
    std::string_view kind;
    std::string_view domain;
    std::vector<std::string_view> inputs;
    Field field;
    for (Message message(bytes); message.next(field);) {
      if (field.number == 1) inputs.push_back(field.bytes);
      if (field.number == 4) kind = field.bytes;
      if (field.number == 7) domain = field.bytes;
      if (field.number == 5) attribute(field.bytes);
    }
    std::string name(kind);
    if (!domain.empty() && domain != "ai.onnx") name = std::string(domain) + "." + name;
    if (domain == "meki" && kind != "Embedding") streamed_.insert(inputs.begin(), inputs.end());
    if (std::find(allowed_.begin(), allowed_.end(), name) != allowed_.end()) return;
    std::string expected;
    for (const std::string_view known : allowed_) expected += (expected.empty() ? "" : ", ") + std::string(known);
    throw ModelError("its operator " + name.substr(0, 100) + " is none that a stage has, expected " + expected);
  }

  // Numbers and strings are all that an operator of a stage has.
  void attribute(std::string_view bytes) {
    std::string_view name;
    std::string_view text;
    Field field;
    for (Message message(bytes); message.next(field);) {
      if (field.number == 1) name = field.bytes;
      if (field.number == 4) text = field.bytes;
      constexpr std::array<uint32_t, 8> kOthers = {5, 6, 10, 11, 14, 15, 22, 23};  // tensors, graphs, types
      if (std::find(kOthers.begin(), kOthers.end(), field.number) != kOthers.end()) {
        throw ModelError("its attribute " + std::string(name.substr(0, 100)) + " is neither numbers nor text");
      }
    }
    if (name == "ep_cache_context") file(text);  // of EPContext: a name, as stages are compiled here
  }

  void tensor(std::string_view bytes) {
    constexpr uint64_t kUint8 = 2;
    PackedTensor tensor;
    std::vector<uint64_t> shape;
    bool packed = false;
    Field field;
    for (Message message(bytes); message.next(field);) {
      if (field.number == 1) Message::numbers(field, shape);
      if (field.number == 2) packed = field.value == kUint8;
      if (field.number == 8) tensor.name = field.bytes;
      if (field.number == 13) external_data(field.bytes, tensor);
    }
    // What is wrong with others, ONNX Runtime says.
    packed = packed && !tensor.file.empty() && tensor.bytes > 0 && shape == std::vector{tensor.bytes};
    if (packed) found_.streamed.push_back(std::move(tensor));
  }

  void external_data(std::string_view bytes, PackedTensor& tensor) {
    std::string_view key;
    std::string_view value;
    Field field;
    for (Message message(bytes); message.next(field);) {
      if (field.number == 1) key = field.bytes;
      if (field.number == 2) value = field.bytes;
    }
    if (key == "location") {
      file(value);
      tensor.file = value;
    }
    if (key == "offset") tensor.offset = number(value);
    if (key == "length") tensor.bytes = number(value);
  }

  uint64_t number(std::string_view text) {
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
      throw ModelError("where a tensor lies in its file is no number");
    }
    return value;
  }

  void file(std::string_view name) {
    if (!is_plain_file_name(name)) throw ModelError("what it says of a file that it refers to is no plain file name");
    found_.files.emplace(name);
  }

  const OperatorNames allowed_;
  ModelFile& found_;
  size_t nodes_ = 0;
  std::set<std::string_view, std::less<>> streamed_;  // inputs of operators that read all of them
};

}  // namespace

const OperatorNames kCpuOperators = kCpu;
const OperatorNames kCompiledOperators = kCompiled;

ModelFile check_model_file(const std::filesystem::path& path, OperatorNames allowed, const std::string& remedy) {
  const std::string bytes = read_text(path, kMaxBytes);
  ModelFile found{path, {}, {}};
  try {
    Checker(allowed, found).model(bytes);
  } catch (const ModelError& error) {
    throw PackageError(path.string() + ": " + error.what() + "; " + remedy);
  }
  return found;
}

}  // namespace meki::ort
