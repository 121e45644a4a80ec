// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Finds the library at run time. A program compiled with EMAUDIT_DYNAMIC has no link-time dependency on emaudit
// (on an older C library it needs -ldl) and starts without it.
#ifndef EMAUDIT_DYNAMIC_HPP
#define EMAUDIT_DYNAMIC_HPP

#ifndef EMAUDIT_DYNAMIC
#error "emaudit/dynamic.hpp is for EMAUDIT_DYNAMIC mode; define it before the first emaudit header"
#endif
#ifdef _WIN32
#error "EMAUDIT_DYNAMIC needs dlopen; on Windows link the library"
#endif

#include "functions.hpp"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <string>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {
namespace detail {

#define EMAUDIT_TEXT_OF(value) #value
#define EMAUDIT_TEXT(value) EMAUDIT_TEXT_OF(value)
#ifdef __APPLE__
inline constexpr const char *library_name = "libemaudit.dylib";
#else
/// The SONAME: it carries the ABI, so a library of another one is not even found.
inline constexpr const char *library_name = "libemaudit.so." EMAUDIT_TEXT(EMAUDIT_ABI_VERSION);
#endif
#undef EMAUDIT_TEXT
#undef EMAUDIT_TEXT_OF

/// What became of an attempt to load; `text` says why when it failed.
struct LoadOutcome {
  enum Kind { ok, not_found, incompatible, another_is_loaded } kind = ok;
  std::string text;
};

/// The one library of the process. The first that loads stays: handles and their functions belong together.
class Library {
 public:
  /// The table, null before the first success. Any thread.
  const Functions *functions() const noexcept { return published_.load(std::memory_order_acquire); }

  /// Loads `path`, or the SONAME when it is null. Any thread; a failure may be tried again.
  LoadOutcome load(const char *path) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (functions() != nullptr && path == nullptr) {
      return {};
    }
    const std::string name = path != nullptr ? path : library_name;
    void *const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char *const reason = dlerror();
      return {LoadOutcome::not_found,
              "cannot load the emaudit library: " + std::string(reason != nullptr ? reason : name.c_str())};
    }
    LoadOutcome outcome;
    if (functions() == nullptr) {
      outcome = resolve(library, name);
    } else if (library != library_) {
      outcome = {LoadOutcome::another_is_loaded, name + " is not the emaudit library this process uses already"};
    }
    if (outcome.kind == LoadOutcome::ok && functions() == nullptr) {
      library_ = library;
      published_.store(&functions_, std::memory_order_release);
    } else {
      dlclose(library);  // refused, or one reference too many
    }
    return outcome;
  }

 private:
  template <class Function>
  static bool find(void *library, const char *name, Function &function) noexcept {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
  }

  LoadOutcome resolve(void *library, const std::string &name) {
    if (!find(library, "emaudit_abi_version", functions_.abi_version)) {
      return {LoadOutcome::incompatible, name + " is no emaudit library: it has no emaudit_abi_version"};
    }
    if (const std::uint32_t abi = functions_.abi_version(); abi != EMAUDIT_ABI_VERSION) {
      return {LoadOutcome::incompatible, name + " has ABI " + std::to_string(abi) + ", this program needs ABI " +
                                             std::to_string(EMAUDIT_ABI_VERSION) +
                                             "; install the emaudit this program was compiled for"};
    }
#define EMAUDIT_FUNCTION_FIND(function)                                                                        \
  if (!find(library, "emaudit_" #function, functions_.function)) {                                             \
    return {LoadOutcome::incompatible,                                                                         \
            name + " is too old: it has no emaudit_" #function "; install the emaudit this program was compiled for"}; \
  }
    EMAUDIT_FUNCTIONS(EMAUDIT_FUNCTION_FIND)
#undef EMAUDIT_FUNCTION_FIND
    return {};
  }

  std::mutex mutex_;
  std::atomic<const Functions *> published_{nullptr};
  Functions functions_{};
  void *library_ = nullptr;
};

/// Constant-initialised, so it serves before main; never unloaded, since handles may outlive everything else.
inline Library library;

/// The table, null as long as no library was loaded.
inline const Functions *functions() noexcept { return library.functions(); }

}  // namespace detail
}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_DYNAMIC_HPP
