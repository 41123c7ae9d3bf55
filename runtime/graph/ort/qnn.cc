// Qualcomm's QNN provider: a plugin library that is registered with ONNX Runtime once a process.

#include "runtime/graph/qnn.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/graph/ort/library.h"

namespace meki {
namespace {

using ort::Library;
using Devices = std::vector<const ort::EpDevice*>;

// Compiled models refer to their provider by this name.
constexpr const char* kName = "QNNExecutionProvider";
// And memory that the NPU shares has this one.
constexpr const char* kSharedMemory = "QnnHtpShared";

#ifdef __x86_64__
constexpr bool kSimulated = true;
#else
constexpr bool kSimulated = false;
#endif

// The NPU; where the provider does not tell what it found, whatever it offers: backend_type says what is meant.
Devices find_devices(const Library& library) {
  const ort::EpDevice* const* all = nullptr;
  size_t count = 0;
  library.api.check(library.api.GetEpDevices(library.env, &all, &count));
  Devices devices;
  std::copy_if(all, all + count, std::back_inserter(devices), [&](const ort::EpDevice* device) {
    return library.api.EpDevice_EpName(device) == std::string_view(kName);
  });
  const auto is_npu = [&](const ort::EpDevice* device) {
    return library.api.HardwareDevice_Type(library.api.EpDevice_Device(device)) == ort::kHardwareNpu;
  };
  const auto rest = std::stable_partition(devices.begin(), devices.end(), is_npu);
  if (rest != devices.begin()) devices.erase(rest, devices.end());
  return devices;
}

std::string remedy_for(std::string_view reason) {
  const auto has = [reason](const char* text) { return reason.find(text) != std::string_view::npos; };
  if (has("libatomic.so.1")) return "install the system's libatomic.so.1 (Debian, Ubuntu: apt install libatomic1)";
  if (has("CreateEpFactories")) return "it is no provider library, or one of onnxruntime-qnn before 2.0";
  return kSimulated ? "install the package onnxruntime-qnn >= 2.7"
                    : "use libraries of one release of onnxruntime-qnn, 2.7 or newer, all in one directory";
}

[[noreturn]] void fail_to_load(const std::filesystem::path& path, const std::string& reason) {
  throw std::runtime_error("cannot load the QNN provider from " + path.string() + ": " + reason + "; " +
                           remedy_for(reason));
}

// While it lives, what the process writes to standard output is lost. The simulator's library greets there as it is
// loaded, which is no part of anybody's output.
class MutedStdout {
 public:
  MutedStdout() {
    std::fflush(stdout);
    saved_ = ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 0);
    const int null = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (saved_ >= 0 && null >= 0) ::dup2(null, STDOUT_FILENO);
    if (null >= 0) ::close(null);
  }
  ~MutedStdout() {
    if (saved_ < 0) return;
    std::fflush(stdout);
    ::dup2(saved_, STDOUT_FILENO);
    ::close(saved_);
  }
  MutedStdout(const MutedStdout&) = delete;
  MutedStdout& operator=(const MutedStdout&) = delete;

 private:
  int saved_ = -1;
};

// The provider looks for these only when it needs them, and says no more than that it cannot run a stage.
void load_backend(const std::filesystem::path& provider) {
  std::optional<MutedStdout> muted;
  if (kSimulated) muted.emplace();
  for (const char* name : {"libQnnSystem.so", "libQnnHtp.so"}) {
    const std::filesystem::path beside = provider.parent_path() / name;
    std::error_code error;
    const std::filesystem::path path = std::filesystem::exists(beside, error) ? beside : name;
    if (::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) != nullptr) continue;
    const char* reason = ::dlerror();
    fail_to_load(provider, reason != nullptr ? reason : std::string(name) + " does not load");
  }
}

void register_provider(const Library& library, const std::filesystem::path& path) {
  try {
    library.api.check(library.api.RegisterExecutionProviderLibrary(library.env, kName, path.c_str()));
  } catch (const std::runtime_error& error) {
    fail_to_load(path, error.what());
  }
}

// Registers the provider unless it is registered already: by an earlier engine, or by whoever else uses ONNX Runtime
// in this process.
Devices devices_of(const Library& library, const std::filesystem::path& path) {
  static std::mutex mutex;
  static std::filesystem::path registered;
  static bool has_backend = false;
  const std::lock_guard lock(mutex);
  if (registered.empty()) {
    if (find_devices(library).empty()) register_provider(library, path);
    registered = path;
  } else if (path != registered) {
    throw std::runtime_error("the QNN provider is already loaded from " + registered.string() + ", cannot load " +
                             path.string() + " as well; use one library a process");
  }
  if (!has_backend) load_backend(path);
  has_backend = true;
  const Devices devices = find_devices(library);
  if (devices.empty()) {
    throw std::runtime_error(
        "the QNN provider finds no NPU on this machine; it needs a Qualcomm chip with a Hexagon "
        "NPU, whose driver this user may open (/dev/fastrpc-cdsp*)");
  }
  return devices;
}

// Whether the NPU's driver shares memory by the functions that the provider needs: without one of them, the provider
// loads no stage at all when it is asked for shared memory.
bool driver_shares_memory() {
  void* driver = ::dlopen("libcdsprpc.so", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) return false;
  const auto has = [driver](const char* name) { return ::dlsym(driver, name) != nullptr; };
  return has("rpcmem_alloc") && has("rpcmem_free") && has("rpcmem_to_fd") && has("remote_register_buf_attr2");
}

void add_provider(const Library& library, const Devices& devices, const QnnOptions& options,
                  ort::SessionOptions* session) {
  const std::string soc_model = std::to_string(options.soc_model);
  const std::string htp_arch = std::to_string(options.htp_arch);
  std::vector<const char*> keys = {"backend_type", "soc_model", "htp_arch"};
  std::vector<const char*> values = {"htp", soc_model.c_str(), htp_arch.c_str()};
  if (!kSimulated) {
    keys.push_back("htp_performance_mode");
    values.push_back("burst");
  }
  if (options.shared_memory) {
    keys.push_back("enable_htp_shared_memory_allocator");
    values.push_back("1");
  }
  const ort::Api& api = library.api;
  api.check(api.SetIntraOpNumThreads(session, 1));
  api.check(api.AddSessionConfigEntry(session, "session.disable_cpu_ep_fallback", "1"));
  api.check(api.SessionOptionsAppendExecutionProvider_V2(session, library.env, devices.data(), devices.size(),
                                                         keys.data(), values.data(), keys.size()));
}

}  // namespace

GraphLoader qnn_loader(const std::filesystem::path& onnxruntime, const std::filesystem::path& qnn, QnnOptions options) {
  const Library& library = ort::library_at(onnxruntime);
  options.shared_memory = options.shared_memory && driver_shares_memory();
  const auto configure = [&library, devices = devices_of(library, qnn), options](ort::SessionOptions* session,
                                                                                 const ort::ModelFile&) {
    add_provider(library, devices, options, session);
  };
  return [&library, configure, options](const std::filesystem::path& path) {
    return ort::load_graph(library, path, configure, ort::kCompiledOperators,
                           "the stage is damaged, or compiled by another version or for another chip, or memory is "
                           "short: run meki-compile again",
                           options.profile, options.shared_memory ? kSharedMemory : "");
  };
}

bool qnn_is_simulated() { return kSimulated; }

}  // namespace meki
