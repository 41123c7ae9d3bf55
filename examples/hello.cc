// hello PACKAGE LIBONNXRUNTIME ID...: the most probable 16 tokens after the given ones, as ids.
#include <cstdint>
#include <exception>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/engine/session.h"

int main(int argc, char** argv) try {
  if (argc < 4) {
    std::cerr << "usage: hello PACKAGE LIBONNXRUNTIME ID...\n";
    return 2;
  }
  meki::EngineOptions options;
  options.onnxruntime = argv[2];
  const std::shared_ptr<const meki::Engine> engine = meki::Engine::open(argv[1], options);

  std::vector<int64_t> prompt;
  for (int i = 3; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));

  meki::Session session(engine, {});
  session.append(prompt);
  session.start({.temperature = 0.0}, 16);
  while (const auto token = session.next()) std::cout << *token << ' ' << std::flush;
  std::cout << '\n';
  return 0;
} catch (const std::exception& error) {
  std::cerr << "hello: error: " << error.what() << '\n';
  return 1;
}
