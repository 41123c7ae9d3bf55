// runtime/apps: the command line, what it comes to for a model, its figures over fake stages, and files. What the
// report says of a real package: tests/native.

#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/apps/figures.h"
#include "runtime/apps/options.h"
#include "runtime/apps/output.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace test;
using bench::Options;
using bench::Plan;

std::optional<Options> parse(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "meki_bench");
  std::vector<char*> pointers;
  for (std::string& argument : arguments) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  return bench::parse_options(static_cast<int>(arguments.size()), pointers.data());
}

std::string refusal(std::vector<std::string> arguments) {
  return error_of<std::invalid_argument>([&] { parse(std::move(arguments)); });
}

TEST_CASE("bench: a command line without options asks for the defaults") {
  const auto options = parse({"model", "--onnxruntime", "libonnxruntime.so"});
  REQUIRE(options.has_value());
  CHECK(options->package == "model");
  CHECK(options->engine.onnxruntime == "libonnxruntime.so");
  CHECK(options->engine.memory);
  CHECK(options->engine.threads == 0);
  CHECK(options->engine.row_cache == 0);
  CHECK_FALSE(options->cold);
  CHECK_FALSE(options->depth.has_value());
  CHECK_FALSE(options->prefill.has_value());
  CHECK(options->tokens == 32);
  CHECK(options->repetitions == 5);
  CHECK(options->json.empty());
  CHECK(options->token_ids.empty());
}

TEST_CASE("bench: every option arrives, in any order and in both spellings") {
  const auto options =
      parse({"--depth=100", "--prefill", "0", "model", "--tokens", "7", "--repetitions=2", "--rom", "cold", "--threads",
             "3", "--kv-type", "int4", "--memory", "off", "--json", "out.json", "--onnxruntime=lib"});
  REQUIRE(options.has_value());
  CHECK(options->package == "model");
  CHECK(options->depth == 100);
  CHECK(options->prefill == 0);
  CHECK(options->tokens == 7);
  CHECK(options->repetitions == 2);
  CHECK(options->cold);
  CHECK(options->engine.threads == 3);
  CHECK(options->engine.kv_type == KvType::int4);
  CHECK(options->engine.provider == Provider::cpu);
  CHECK_FALSE(options->engine.memory);
  CHECK(options->json == "out.json");

  const auto phone = parse({"model", "--onnxruntime", "lib", "--provider", "qnn", "--qnn-library", "ep", "--soc",
                            "sm8750", "--row-cache", "3"});
  REQUIRE(phone.has_value());
  CHECK(phone->engine.provider == Provider::qnn);
  CHECK(phone->engine.qnn_library == "ep");
  CHECK(phone->engine.soc == "sm8750");
  CHECK(phone->engine.row_cache == 3 << 20);
  CHECK_FALSE(phone->engine.kv_type.has_value());

  const auto logits = parse({"model", "--onnxruntime", "lib", "--token-ids", "5,0,4095", "--logits", "out.f32"});
  REQUIRE(logits.has_value());
  CHECK(logits->token_ids == std::vector<int64_t>{5, 0, 4095});
  CHECK(logits->logits == "out.f32");
}

TEST_CASE("bench: help needs nothing else and names every option") {
  CHECK_FALSE(parse({"--help"}).has_value());
  CHECK_FALSE(parse({"-h"}).has_value());
  for (const char* option :
       {"--onnxruntime LIB", "--provider cpu|qnn", "--qnn-library LIB", "--soc NAME", "--memory on|off", "--threads N",
        "--kv-type TYPE", "--depth N", "--prefill N", "--tokens N", "--repetitions N", "--rom warm|cold",
        "--row-cache MIB", "--json FILE", "--token-ids N,...", "--logits FILE"}) {
    check_names(bench::help(), option);
  }
}

TEST_CASE("bench: what a command line may not say is refused, with what was expected") {
  const auto refuse = [](std::vector<std::string> more, std::string_view expected) {
    more.insert(more.begin(), {"model", "--onnxruntime", "lib"});
    check_names(refusal(std::move(more)), expected);
  };
  check_names(refusal({"model"}), "--onnxruntime is missing");
  check_names(refusal({"--onnxruntime", "lib"}), "got 0 packages, expected one directory");
  refuse({"other"}, "got 2 packages");
  refuse({"--fast"}, "--fast is not an option here");
  refuse({"-x"}, "-x is not an option here");
  refuse({"--depth"}, "--depth needs a value: N");
  for (const char* number : {"-1", "1.5", "", " 1", "1x", "99999999999999999999999"}) {
    refuse({"--depth", number}, "--depth is \"" + std::string(number) + "\", expected a whole number of 0 to ");
  }
  refuse({"--tokens", "0"}, "--tokens is \"0\", expected a whole number of 1 to ");
  refuse({"--repetitions", "0"}, "--repetitions is \"0\"");
  refuse({"--threads", "0"}, "--threads is \"0\"");
  refuse({"--memory", "maybe"}, "--memory is \"maybe\", expected on or off");
  refuse({"--rom", "hot"}, "--rom is \"hot\", expected cold or warm");
  refuse({"--kv-type", "int3"}, "int3");
  refuse({"--provider", "gpu"}, "gpu");
  refuse({"--provider", "qnn"}, "--provider qnn and --qnn-library need each other");
  refuse({"--qnn-library", "ep"}, "--provider qnn and --qnn-library need each other");
  refuse({"--soc", "sm8750"}, "--soc chooses a chip for --provider qnn");
  refuse({"--token-ids", "1,2"}, "--token-ids and --logits need each other");
  refuse({"--logits", "f"}, "--token-ids and --logits need each other");
  for (const char* ids : {"1,,2", "1,", "", "a", "1,-2"})
    refuse({"--token-ids", ids, "--logits", "f"}, "--token-ids is \"");
  refuse({"--token-ids", "1", "--logits", "f", "--tokens", "8"}, "--token-ids measures nothing, --tokens belongs to");
}

TEST_CASE("bench: a plan fills the context and no more") {
  Options options;
  options.tokens = 32;
  const auto needed = [](const Plan& plan) { return std::max(plan.prefill + 1, plan.context(plan.depths.at(0))); };
  const Plan longest = bench::make_plan(options, 100'000);
  CHECK(longest.depths == std::vector<size_t>{10240});
  CHECK(longest.prefill == 512);
  const Plan fitting = bench::make_plan(options, 512);
  CHECK(fitting.depths == std::vector<size_t>{512 - 32 - 1});
  CHECK(fitting.prefill == 511);
  CHECK(needed(fitting) == 512);

  options.depth = 479;
  CHECK(needed(bench::make_plan(options, 512)) == 512);
  options.depth = 480;
  CHECK(error_of<std::invalid_argument>([&] { bench::make_plan(options, 512); }) ==
        "--depth with --tokens 32 is 480 tokens, expected at most 479: the context is 512");
  options.depth = 0;
  options.tokens = 510;
  CHECK(needed(bench::make_plan(options, 512)) == 512);
  options.tokens = 511;
  check_names(error_of<std::invalid_argument>([&] { bench::make_plan(options, 512); }), "--tokens is 511 tokens");
  options.tokens = SIZE_MAX;
  check_names(error_of<std::invalid_argument>([&] { bench::make_plan(options, 512); }), "expected at most 510");
  options.tokens = 1;
  options.prefill = 512;
  check_names(error_of<std::invalid_argument>([&] { bench::make_plan(options, 512); }), "--prefill is 512 tokens");
  check_names(error_of<std::invalid_argument>([&] { bench::make_plan(options, 1); }), "--tokens is 1 tokens");
}

TEST_CASE("bench: rounds have the steps that were asked for, also where the model ends its text") {
  // Every token that the model makes at some point of the sequence is an end token in the second model.
  for (const auto& eos : {std::vector<int32_t>{}, std::vector<int32_t>{0, 3, 5, 8, 13, 21, 34}}) {
    for (const auto kind : {FakeModel::Kind::dense, FakeModel::Kind::two_stages}) {
      const FakeModel model(kind, eos);
      for (const size_t depth : {0U, 1U, 20U, FakeModel::kContext - 11}) {
        CAPTURE(depth);
        const Plan plan{
            .depths = {depth}, .prefill = 9, .tokens = 10, .repetitions = 3, .synthetic_depth = true, .lead_in = 0};
        int polls = 0;
        const bench::Figures found = bench::take_figures(model.engine, plan, [&polls] { ++polls; });
        CHECK(found.prefill_tokens_per_s.size() == 3);
        CHECK(found.decode_tokens_per_s.size() == 3);
        CHECK(found.row_hit_rate == (kind == FakeModel::Kind::dense ? std::nullopt : std::optional(0.0)));
        CHECK(found.stall_us.size() == (kind == FakeModel::Kind::dense ? 0 : 30));
        for (const double speed : found.decode_tokens_per_s) CHECK(speed > 0);
        CHECK(polls >= 4 * (1 + 11));  // before every step of every round
        REQUIRE(found.memory.has_value());
        CHECK(found.memory->resident <= found.memory->peak);
      }
    }
  }
}

TEST_CASE("bench: no prefill is no rounds of it, and a cold ROM is still read right") {
  const FakeModel model(FakeModel::Kind::two_stages);
  const Plan plan{
      .depths = {5}, .prefill = 0, .tokens = 4, .repetitions = 2, .synthetic_depth = true, .cold = true, .lead_in = 0};
  const bench::Figures found = bench::take_figures(model.engine, plan, [] {});
  CHECK(found.prefill_tokens_per_s.empty());
  CHECK(found.stall_us.size() == 8);
}

TEST_CASE("bench: a model that ends its text whatever it reads cannot be measured") {
  std::vector<int32_t> all(FakeModel::kVocab);
  for (size_t id = 0; id < all.size(); ++id) all[id] = static_cast<int32_t>(id);
  const FakeModel model(FakeModel::Kind::dense, all);
  const Plan plan{.depths = {5}, .prefill = 0, .tokens = 4, .repetitions = 2, .synthetic_depth = true, .lead_in = 0};
  check_names(error_of<std::runtime_error>([&] { bench::take_figures(model.engine, plan, [] {}); }), "no decode step");
}

TEST_CASE("bench: polling can interrupt every step") {
  struct Stop {};
  const FakeModel model(FakeModel::Kind::two_stages);
  const Plan plan{.depths = {5}, .prefill = 3, .tokens = 4, .repetitions = 1, .synthetic_depth = true, .lead_in = 0};
  for (int limit = 0; limit < 14; ++limit) {
    int polls = 0;
    const auto poll = [&] {
      if (polls++ == limit) throw Stop();
    };
    CHECK_THROWS_AS(bench::take_figures(model.engine, plan, poll), Stop);
  }
}

TEST_CASE("bench: logits are the model's") {
  const FakeModel model(FakeModel::Kind::three_stages);
  CHECK(bench::compute_logits(model.engine, kPrompt, [] {}) == expected_logits(model, kPrompt));
}

TEST_CASE("bench: a file appears whole or not at all") {
  const TempDir directory;
  const std::string text = "figures";
  const auto bytes = std::as_bytes(std::span(text));
  bench::write_file(directory / "a.json", bytes);
  std::ifstream file(directory / "a.json");
  CHECK(std::string(std::istreambuf_iterator<char>(file), {}) == text);

  std::filesystem::create_directory(directory / "d");
  for (const auto& path : {directory / "d", directory / "missing/a.json"}) {
    check_names(error_of<std::runtime_error>([&] { bench::check_writable(path); }), path.string() + ": cannot write: ");
    check_names(error_of<std::runtime_error>([&] { bench::write_file(path, bytes); }),
                path.string() + ": cannot write: ");
  }
  const auto files = std::filesystem::directory_iterator(directory.path());
  CHECK(std::distance(begin(files), end(files)) == 2);  // nothing temporary is left
}

}  // namespace
}  // namespace meki
