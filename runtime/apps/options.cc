#include "runtime/apps/options.h"

#include <getopt.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace meki::bench {
namespace {

template <class Number>
Number parse_number(std::string_view option, std::string_view text, Number least) {
  Number value{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < least) {
    throw std::invalid_argument(std::string(option) + " is \"" + std::string(text) + "\", expected a whole number of " +
                                std::to_string(least) + " to " + std::to_string(std::numeric_limits<Number>::max()));
  }
  return value;
}

// Whether `text` is `yes`; it may be `no`.
bool parse_choice(std::string_view option, std::string_view text, std::string_view yes, std::string_view no) {
  if (text == yes || text == no) return text == yes;
  throw std::invalid_argument(std::string(option) + " is \"" + std::string(text) + "\", expected " + std::string(yes) +
                              " or " + std::string(no));
}

std::vector<int64_t> parse_ids(std::string_view text) {
  std::vector<int64_t> ids;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    ids.push_back(parse_number<int64_t>("--token-ids", text.substr(begin, end - begin), 0));
    begin = end + 1;
  }
  return ids;
}

struct Flag {
  const char* name;
  const char* value;
  const char* help;
  void (*apply)(Options&, const char* text);
  bool measures = false;  // has no meaning with --token-ids
};

// Sorted as --help prints them.
constexpr std::array kFlags{
    Flag{"onnxruntime", "LIB", "the ONNX Runtime library (required)",
         [](Options& to, const char* text) { to.engine.onnxruntime = text; }},
    Flag{"provider", "cpu|qnn", "what computes; qnn: the NPU, or on x86-64 its simulator (default: cpu)",
         [](Options& to, const char* text) { to.engine.provider = parse_provider(text); }},
    Flag{"qnn-library", "LIB", "with --provider qnn: libonnxruntime_providers_qnn.so (required)",
         [](Options& to, const char* text) { to.engine.qnn_library = text; }},
    Flag{"soc", "NAME", "with --provider qnn: the compiled chip (default: the only one there is)",
         [](Options& to, const char* text) { to.engine.soc = text; }},
    Flag{"memory", "on|off", "off: the package's backbone without its memory (default: on)",
         [](Options& to, const char* text) { to.engine.memory = parse_choice("--memory", text, "on", "off"); }},
    Flag{"threads", "N", "compute threads (default: available cores)",
         [](Options& to, const char* text) { to.engine.threads = parse_number("--threads", text, 1); }},
    Flag{"kv-type", "TYPE",
         "float32, float16, int8 or int4: how the cache holds keys and values (default: int8; qnn: float16)",
         [](Options& to, const char* text) { to.engine.kv_type = parse_kv_type(text); }},
    Flag{"row-cache", "MIB", "memory that keeps rows (default: 0, every row is read)",
         [](Options& to, const char* text) {
           to.engine.row_cache = size_t{parse_number<uint32_t>("--row-cache", text, 0)} << 20;
         }},
    Flag{"depth", "N", "tokens in the cache when decode begins, synthetic (default: 10240, or what fits)",
         [](Options& to, const char* text) { to.depth = parse_number<size_t>("--depth", text, 0); }, true},
    Flag{"prefill", "N", "tokens of a prefill into an empty cache; 0: none (default: 512, or what fits)",
         [](Options& to, const char* text) { to.prefill = parse_number<size_t>("--prefill", text, 0); }, true},
    Flag{"tokens", "N", "decode steps of a round (default: 32)",
         [](Options& to, const char* text) { to.tokens = parse_number<size_t>("--tokens", text, 1); }, true},
    Flag{"repetitions", "N", "rounds, after one that is not counted (default: 5)",
         [](Options& to, const char* text) { to.repetitions = parse_number<size_t>("--repetitions", text, 1); }, true},
    Flag{"rom", "warm|cold", "cold: drop the ROM from the page cache before every step (default: warm)",
         [](Options& to, const char* text) { to.cold = parse_choice("--rom", text, "cold", "warm"); }, true},
    Flag{"json", "FILE", "where the figures go (default: standard output)",
         [](Options& to, const char* text) { to.json = text; }, true},
    Flag{"token-ids", "N,...", "compute the logits of these tokens and measure nothing",
         [](Options& to, const char* text) { to.token_ids = parse_ids(text); }},
    Flag{"logits", "FILE", "with --token-ids: where the logits go, little-endian float32 [tokens, vocab_size]",
         [](Options& to, const char* text) { to.logits = text; }},
};

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// measuring: the last option given that only a measurement has.
void check(const Options& options, const std::string& measuring) {
  require(!options.engine.onnxruntime.empty(), "--onnxruntime is missing; name the ONNX Runtime library");
  const bool qnn = options.engine.provider == Provider::qnn;
  require(qnn == !options.engine.qnn_library.empty(),
          "--provider qnn and --qnn-library need each other; give both or neither");
  require(qnn || options.engine.soc.empty(), "--soc chooses a chip for --provider qnn; omit it or give both");
  require(options.token_ids.empty() == options.logits.empty(),
          "--token-ids and --logits need each other; give both or neither");
  require(options.token_ids.empty() || measuring.empty(),
          "--token-ids measures nothing, " + measuring + " belongs to a measurement; omit one of them");
}

}  // namespace

std::optional<Options> parse_options(int argc, char** argv) {
  constexpr int kFirst = 256;  // beyond what a character could be
  std::vector<option> table{{"help", no_argument, nullptr, 'h'}};
  for (size_t index = 0; index < kFlags.size(); ++index) {
    table.push_back({kFlags[index].name, required_argument, nullptr, kFirst + static_cast<int>(index)});
  }
  table.push_back({});

  Options options;
  std::string measuring;
  ::opterr = 0;  // we say it in one line
  ::optind = 0;  // from the start, also when called again
  for (int found; (found = ::getopt_long(argc, argv, ":h", table.data(), nullptr)) != -1;) {
    if (found == 'h') return std::nullopt;
    const bool missing = found == ':';
    const size_t index = static_cast<size_t>((missing ? ::optopt : found) - kFirst);
    if (index >= kFlags.size()) {
      throw std::invalid_argument(std::string(argv[::optind - 1]) + " is not an option here; see meki_bench --help");
    }
    const Flag& flag = kFlags[index];
    require(!missing, std::string("--") + flag.name + " needs a value: " + flag.value);
    flag.apply(options, ::optarg);
    if (flag.measures) measuring = std::string("--") + flag.name;
  }
  require(argc - ::optind == 1,
          "got " + std::to_string(argc - ::optind) + " packages, expected one directory; see meki_bench --help");
  options.package = argv[::optind];
  check(options, measuring);
  return options;
}

std::string help() {
  std::string text =
      "usage: meki_bench PACKAGE --onnxruntime LIB [option ...]\n\n"
      "Measures decode and prefill of a package, and writes the figures as JSON.\n\n";
  for (const Flag& flag : kFlags) {
    std::string left = std::string("  --") + flag.name + " " + flag.value;
    left.resize(std::max<size_t>(left.size() + 1, 24), ' ');
    text += left + flag.help + "\n";
  }
  return text + "\nExit codes: 0, 1 failure, 2 usage, 130 interrupted.\n";
}

}  // namespace meki::bench
