// A target without libFuzzer, built by any compiler: runs every file of the directories that the command line names.
// What was found once is tested for ever.

#include <cstdio>
#include <fstream>
#include <iterator>

#include "fuzz/target.h"

int main(int count, char** arguments) {
  int files = 0;
  for (int i = 1; i < count; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(arguments[i])) {
      std::fprintf(stderr, "%s\n", entry.path().c_str());  // the last one is the one that failed
      std::ifstream file(entry.path(), std::ios::binary);
      const std::string input(std::istreambuf_iterator<char>(file), {});
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
      ++files;
    }
  }
  return files > 0 ? 0 : 1;
}
