#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/file.h"

namespace meki {

// A JSON value together with where it stands, for messages. The accessors throw PackageError for a value that is not
// what is asked for. A view: the value outlives it.
class Node {
 public:
  using Json = nlohmann::json;

  // `remedy` ends every message about it, or about a part of it.
  Node(const Json& value, std::string where, const char* remedy = "convert the model again")
      : value_(value), where_(std::move(where)), remedy_(remedy) {}

  [[noreturn]] void fail(const std::string& expected) const {
    std::string got = value_.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (got.size() > 80) got = got.substr(0, 77) + "...";
    throw PackageError(where_ + " is " + got + ", expected " + expected + "; " + remedy_);
  }
  Node at(const std::string& key) const {
    if (!value_.is_object()) fail("an object");
    const auto found = value_.find(key);
    if (found == value_.end()) throw PackageError(where_ + " has no \"" + key + "\"; " + remedy_);
    return {*found, where_ + "." + key, remedy_};
  }
  std::vector<Node> items() const {
    if (!value_.is_array()) fail("an array");
    std::vector<Node> nodes;
    nodes.reserve(value_.size());
    for (size_t i = 0; i < value_.size(); ++i) {
      nodes.emplace_back(value_[i], where_ + "[" + std::to_string(i) + "]", remedy_);
    }
    return nodes;
  }
  std::vector<std::pair<std::string, Node>> members() const {
    if (!value_.is_object()) fail("an object");
    std::vector<std::pair<std::string, Node>> nodes;
    for (const auto& [key, value] : value_.items()) nodes.emplace_back(key, Node(value, where_ + "." + key, remedy_));
    return nodes;
  }
  bool has(const std::string& key) const { return value_.contains(key); }
  const std::string& where() const { return where_; }
  Node with_remedy(const char* remedy) const { return {value_, where_, remedy}; }
  bool is_null() const { return value_.is_null(); }
  std::string string() const {
    if (!value_.is_string()) fail("a string");
    return value_.get<std::string>();
  }
  uint64_t integer(uint64_t low, uint64_t high) const {
    const std::string expected = "an integer from " + std::to_string(low) + " to " + std::to_string(high);
    if (!value_.is_number_unsigned()) fail(expected);
    const auto number = value_.get<uint64_t>();
    if (number < low || number > high) fail(expected);
    return number;
  }
  // A plain name: the file stands in the package's own directory.
  std::string file_name() const {
    std::string name = string();
    if (!is_plain_file_name(name)) fail("a plain file name without directories");
    return name;
  }

 private:
  const Json& value_;
  std::string where_;
  const char* remedy_;
};

}  // namespace meki
