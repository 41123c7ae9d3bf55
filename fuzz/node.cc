// runtime/package/node.h: every accessor on every value of a JSON text.

#include "runtime/package/node.h"

#include "fuzz/target.h"

namespace meki::fuzz {
namespace {

constexpr int kMaxDepth = 64;  // as Manifest::open has it

void visit(const Node& node, int depth) {
  accepts([&] { node.string(); });
  if (uint64_t number = 0; accepts([&] { number = node.integer(2, 1 << 20); })) {
    require(number >= 2 && number <= 1 << 20, "an integer within its limits");
  }
  if (std::string name; accepts([&] { name = node.file_name(); })) {
    const std::filesystem::path path(name);
    require(path.filename() == path && name != "." && name != "..", "a file name without directories");
  }
  accepts([&] { node.at("a").with_remedy("do better").fail("another"); });
  accepts([&] {
    for (const Node& item : node.items()) visit(item, depth + 1);
  });
  accepts([&] {
    for (const auto& [key, member] : node.members()) {
      require(node.has(key), "a member that has() finds");
      visit(member, depth + 1);
    }
  });
  require(depth <= kMaxDepth + 1, "a value no deeper than the text may be nested");
}

}  // namespace
}  // namespace meki::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace meki;
  Node::Json json;
  try {
    json = Node::Json::parse(data, data + size, [](int depth, Node::Json::parse_event_t, Node::Json&) {
      if (depth > fuzz::kMaxDepth) throw PackageError("nested too deep");
      return true;
    });
  } catch (const Node::Json::exception&) {
    return 0;
  } catch (const PackageError&) {
    return 0;
  }
  fuzz::visit(Node(json, "input"), 0);
  return 0;
}
