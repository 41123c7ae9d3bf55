// Measures a package without Python: the program that a phone runs.

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <csignal>
#include <exception>
#include <iostream>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/apps/figures.h"
#include "runtime/apps/options.h"
#include "runtime/apps/output.h"

namespace {

using namespace meki;
using namespace meki::bench;

enum ExitCode : int { kDone = 0, kFailure = 1, kUsage = 2, kInterrupted = 130 };

struct Interrupted {};

std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // or a signal handler may not touch it

// The first signal ends the run before its next step, a second one at once.
extern "C" void on_signal(int) {
  if (interrupted.exchange(true)) ::_exit(kInterrupted);
}

void poll() {
  if (interrupted) throw Interrupted();
}

// One line, whatever line breaks the message has.
int report_error(std::string message, int code) {
  for (char& character : message) {
    if (character == '\n' || character == '\r') character = ' ';
  }
  std::cerr << "meki_bench: error: " << message << '\n';
  return code;
}

void print(const std::string& text) {
  std::cout << text << std::flush;
  if (!std::cout) throw std::runtime_error("standard output: cannot write");
}

// Leads the descriptors 0 to 2 that are closed to nowhere, or the next file that is opened would be one of them.
// Nothing can be written there: a report for a closed standard output is an error, not lost.
void open_closed_streams() {
  int descriptor = 0;
  while ((descriptor = ::open("/dev/null", O_RDONLY)) >= 0 && descriptor <= STDERR_FILENO) {
  }
  if (descriptor >= 0) ::close(descriptor);
}

void write_logits(const std::shared_ptr<const Engine>& engine, const Options& options) {
  static_assert(std::endian::native == std::endian::little);
  const std::vector<float> logits = compute_logits(engine, options.token_ids, poll);
  write_file(options.logits, std::as_bytes(std::span(logits)));
}

void write_report(const std::shared_ptr<const Engine>& engine, const Options& options, double load_s) {
  const Plan plan = make_plan(options, engine->backend().info().context);
  const Figures figures = take_figures(engine, plan, poll);
  const std::string text = make_report(*engine, options, plan, load_s, figures).dump(2) + "\n";
  if (options.json.empty()) {
    print(text);
  } else {
    write_file(options.json, std::as_bytes(std::span(text)));
  }
}

void run(const Options& options) {
  const bool writable = (::fcntl(STDOUT_FILENO, F_GETFL) & O_ACCMODE) != O_RDONLY;
  if (options.json.empty() && options.logits.empty() && !writable) {
    throw std::runtime_error("standard output is closed; open or redirect it, or name a file with --json");
  }
  for (const auto& path : {options.json, options.logits}) {
    if (!path.empty()) check_writable(path);  // before, not after minutes of measuring
  }
  const auto begin = std::chrono::steady_clock::now();
  const std::shared_ptr<const Engine> engine = Engine::open(options.package, options.engine);
  const double load_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  poll();
  if (engine->backend().info().simulated) std::cerr << "HTP simulator: results as on the chip, speed is not\n";
  if (options.cold && engine->rows() == nullptr) {
    throw std::invalid_argument("--rom cold needs a memory, " + engine->manifest().name +
                                " is opened without one; omit it");
  }
  if (options.token_ids.empty()) {
    write_report(engine, options, load_s);
  } else {
    write_logits(engine, options);
  }
}

}  // namespace

int main(int argc, char** argv) {
  open_closed_streams();
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  try {
    if (const auto options = parse_options(argc, argv)) {
      run(*options);
    } else {
      print(help());
    }
    return kDone;
  } catch (const Interrupted&) {
    return kInterrupted;
  } catch (const std::invalid_argument& error) {
    return report_error(error.what(), kUsage);
  } catch (const std::bad_alloc&) {
    return report_error("memory is short; choose a smaller context or kv type", kFailure);
  } catch (const std::exception& error) {
    return report_error(error.what(), kFailure);
  }
}
