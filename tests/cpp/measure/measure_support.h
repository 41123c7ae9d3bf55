#pragma once

// A fake model that writes down what it computes, in order with what else a test writes down.

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "runtime/engine/engine.h"
#include "tests/cpp/executor/fake_graph.h"

namespace meki::test {

// A run of a model's one stage: the tokens that it took, and how many were then in the cache. Or, without tokens,
// another event.
struct Event {
  std::string who;
  int64_t tokens = 0;
  int64_t total = 0;
};
using Log = std::vector<Event>;

class LoggedModel {
 public:
  // Of one stage, with rows or without.
  LoggedModel(std::string name, FakeModel::Kind kind, Log& log, std::vector<int32_t> eos = {})
      : model(kind, std::move(eos)) {
    model.fault.on_run = [name = std::move(name), &log](int64_t tokens, int64_t total) {
      log.push_back({name, tokens, total});
    };
  }

  const std::shared_ptr<const Engine>& engine() const { return model.engine; }

  FakeModel model;
};

// How many tokens are in the cache after each run of one token.
inline std::vector<int64_t> single_steps(const Log& log) {
  std::vector<int64_t> totals;
  for (const Event& event : log) {
    if (event.tokens == 1) totals.push_back(event.total);
  }
  return totals;
}

// first, first + 1 .. last.
inline std::vector<int64_t> range(int64_t first, int64_t last) {
  std::vector<int64_t> numbers;
  for (int64_t number = first; number <= last; ++number) numbers.push_back(number);
  return numbers;
}

}  // namespace meki::test
