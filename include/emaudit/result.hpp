// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Status, Error and Result, and the one way in which every wrapper calls the library.
#ifndef EMAUDIT_RESULT_HPP
#define EMAUDIT_RESULT_HPP

#include "functions.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// Outcome of a call. Treat every unknown value other than `ok` as a failure. The negative ones come from these
/// headers in EMAUDIT_DYNAMIC mode, never from the library.
enum class Status : std::int32_t {
  ok = EMAUDIT_STATUS_OK,
  invalid_argument = EMAUDIT_STATUS_INVALID_ARGUMENT,
  io = EMAUDIT_STATUS_IO,
  not_a_direction_file = EMAUDIT_STATUS_NOT_A_DIRECTION_FILE,
  truncated = EMAUDIT_STATUS_TRUNCATED,
  malformed = EMAUDIT_STATUS_MALFORMED,
  unsupported_version = EMAUDIT_STATUS_UNSUPPORTED_VERSION,
  digest_mismatch = EMAUDIT_STATUS_DIGEST_MISMATCH,
  schema = EMAUDIT_STATUS_SCHEMA,
  model_mismatch = EMAUDIT_STATUS_MODEL_MISMATCH,
  width_mismatch = EMAUDIT_STATUS_WIDTH_MISMATCH,
  layer_not_found = EMAUDIT_STATUS_LAYER_NOT_FOUND,
  non_finite = EMAUDIT_STATUS_NON_FINITE,
  not_specific = EMAUDIT_STATUS_NOT_SPECIFIC,
  rate_unsupported = EMAUDIT_STATUS_RATE_UNSUPPORTED,
  kernel_unavailable = EMAUDIT_STATUS_KERNEL_UNAVAILABLE,
  panic = EMAUDIT_STATUS_PANIC,
  unsigned_file = EMAUDIT_STATUS_UNSIGNED,
  bad_signature = EMAUDIT_STATUS_BAD_SIGNATURE,
  untrusted_key = EMAUDIT_STATUS_UNTRUSTED_KEY,
  not_landed = EMAUDIT_STATUS_NOT_LANDED,
  not_calibrated = EMAUDIT_STATUS_NOT_CALIBRATED,
  broken_log = EMAUDIT_STATUS_BROKEN_LOG,
  device_unavailable = EMAUDIT_STATUS_DEVICE_UNAVAILABLE,
  device = EMAUDIT_STATUS_DEVICE,
  /// The library was not found or could not be loaded.
  library_not_found = -1,
  /// A library was found, but it is no emaudit, has another ABI, or lacks a function.
  library_incompatible = -2,
};

namespace detail {

[[noreturn]] inline void no_value(const char *message) noexcept {
  std::fprintf(stderr, "emaudit: the value of a failed result was used: %s\n", message);
  std::abort();
}

/// Frees what the library made; there is a library, since it made it.
struct Deleter {
  void operator()(emaudit_error *handle) const noexcept { functions()->error_free(handle); }
  void operator()(emaudit_directions *handle) const noexcept { functions()->directions_free(handle); }
  void operator()(emaudit_probe *handle) const noexcept { functions()->probe_free(handle); }
  void operator()(emaudit_steering *handle) const noexcept { functions()->steering_free(handle); }
  void operator()(emaudit_device_probe *handle) const noexcept { functions()->device_probe_free(handle); }
  void operator()(emaudit_probe_slot *handle) const noexcept { functions()->probe_slot_free(handle); }
  void operator()(emaudit_steering_slot *handle) const noexcept { functions()->steering_slot_free(handle); }
  void operator()(emaudit_drift *handle) const noexcept { functions()->drift_free(handle); }
  void operator()(emaudit_monitor *handle) const noexcept { functions()->monitor_free(handle); }
  void operator()(emaudit_audit *handle) const noexcept { functions()->audit_free(handle); }
  void operator()(emaudit_log *handle) const noexcept { functions()->log_free(handle); }
};

template <class T>
using Handle = std::unique_ptr<T, Deleter>;

}  // namespace detail

inline const char *name(Status status) noexcept;

/// Status and sentence of a failed call. Move-only.
class Error {
 public:
  /// Takes the sentence from the library; `handle` may be null.
  Error(emaudit_status status, emaudit_error *handle) noexcept
      : status_(static_cast<Status>(status)), handle_(handle) {}
  /// An error found on this side of the library.
  Error(Status status, std::string text) noexcept : status_(status), text_(std::move(text)) {}

  Status status() const noexcept { return status_; }

  /// One English sentence; lives as long as the error.
  const char *message() const noexcept {
    if (handle_) {
      return detail::functions()->error_message(handle_.get());
    }
    return text_.empty() ? name(status_) : text_.c_str();
  }

 private:
  Status status_;
  detail::Handle<emaudit_error> handle_;
  std::string text_;
};

/// A value or an error. Using the value of a failed result aborts the process with its message.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : content_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) noexcept : content_(std::in_place_index<1>, std::move(error)) {}

  bool has_value() const noexcept { return content_.index() == 0; }
  explicit operator bool() const noexcept { return has_value(); }
  Status status() const noexcept { return has_value() ? Status::ok : error().status(); }

  T &value() & noexcept { return *checked(); }
  const T &value() const & noexcept { return *const_cast<Result *>(this)->checked(); }
  T value() && noexcept { return std::move(*checked()); }
  T &operator*() & noexcept { return value(); }
  const T &operator*() const & noexcept { return value(); }
  T operator*() && noexcept { return std::move(*checked()); }
  T *operator->() noexcept { return checked(); }
  const T *operator->() const noexcept { return const_cast<Result *>(this)->checked(); }

  /// The error of a failed result; aborts on a good one.
  const Error &error() const & noexcept {
    if (has_value()) {
      detail::no_value("error() of a result that is OK");
    }
    return *std::get_if<1>(&content_);
  }
  Error error() && noexcept { return std::move(const_cast<Error &>(error())); }

 private:
  T *checked() noexcept {
    if (!has_value()) {
      detail::no_value(error().message());
    }
    return std::get_if<0>(&content_);
  }

  std::variant<T, Error> content_;
};

/// Success or an error.
template <>
class [[nodiscard]] Result<void> {
 public:
  Result() noexcept = default;
  Result(Error error) noexcept : error_(std::move(error)) {}

  bool has_value() const noexcept { return !error_.has_value(); }
  explicit operator bool() const noexcept { return has_value(); }
  Status status() const noexcept { return error_ ? error_->status() : Status::ok; }

  /// The error of a failed result; aborts on a good one.
  const Error &error() const & noexcept {
    if (!error_) {
      detail::no_value("error() of a result that is OK");
    }
    return *error_;
  }
  Error error() && noexcept { return std::move(const_cast<Error &>(error())); }

 private:
  std::optional<Error> error_;
};

#ifdef EMAUDIT_DYNAMIC

/// Loads the library from `path`, or by its SONAME from where the system looks when `path` is null. Every first
/// use does the latter by itself. The first success decides for the life of the process: loading the same
/// library again is fine, another one is invalid_argument. Any thread.
///
/// Errors: library_not_found, library_incompatible, invalid_argument.
inline Result<void> load(const char *path = nullptr) {
  detail::LoadOutcome outcome = detail::library.load(path);
  switch (outcome.kind) {
    case detail::LoadOutcome::ok:
      return {};
    case detail::LoadOutcome::not_found:
      return Error(Status::library_not_found, std::move(outcome.text));
    case detail::LoadOutcome::another_is_loaded:
      return Error(Status::invalid_argument, std::move(outcome.text));
    case detail::LoadOutcome::incompatible:
      break;
  }
  return Error(Status::library_incompatible, std::move(outcome.text));
}
inline Result<void> load(const std::string &path) { return load(path.c_str()); }

#else

/// Whether the linked library has the ABI of this header; in EMAUDIT_DYNAMIC mode it also finds the library.
inline Result<void> load() {
  if (detail::functions()->abi_version() == EMAUDIT_ABI_VERSION) {
    return {};
  }
  return Error(Status::library_incompatible, "the linked emaudit library has another ABI than its header");
}

#endif

namespace detail {

/// The table for calls that have no error to give; null when there is no library.
inline const Functions *functions_if_any() noexcept {
#ifdef EMAUDIT_DYNAMIC
  if (functions() == nullptr) {
    (void)load();
  }
#endif
  return functions();
}

/// Calls `call(functions, emaudit_error **)` and gives `make()` when it succeeds.
template <class T, class Call, class Make>
Result<T> run(Call &&call, Make &&make) {
#ifdef EMAUDIT_DYNAMIC
  if (functions() == nullptr) {
    if (Result<void> ready = load(); !ready) {
      return std::move(ready).error();
    }
  }
#endif
  emaudit_error *error = nullptr;
  const emaudit_status status = call(*functions(), &error);
  if (status != EMAUDIT_STATUS_OK) {
    return Error(status, error);
  }
  return make();
}

template <class Call>
Result<void> run(Call &&call) {
  return run<void>(std::forward<Call>(call), [] { return Result<void>(); });
}

/// Refuses an array that does not have one element per row.
inline std::optional<Error> check_size(const char *what, std::size_t size, std::size_t rows) {
  if (size == rows) {
    return std::nullopt;
  }
  return Error(Status::invalid_argument,
               std::to_string(size) + " " + what + " for " + std::to_string(rows) + " rows");
}

/// The same for an array that may be left out.
inline std::optional<Error> check_optional_size(const char *what, std::size_t size, std::size_t rows) {
  return size == 0 ? std::nullopt : check_size(what, size, rows);
}

}  // namespace detail

/// Name of a status, such as "TRUNCATED".
inline const char *name(Status status) noexcept {
  switch (status) {
    case Status::library_not_found:
      return "LIBRARY_NOT_FOUND";
    case Status::library_incompatible:
      return "LIBRARY_INCOMPATIBLE";
    default:
      break;
  }
  const detail::Functions *const functions = detail::functions_if_any();
  return functions != nullptr ? functions->status_name(static_cast<emaudit_status>(status)) : "UNKNOWN";
}

/// The library's version, such as "0.1.0"; "" when there is no library.
inline const char *version() noexcept {
  const detail::Functions *const functions = detail::functions_if_any();
  return functions != nullptr ? functions->version() : "";
}

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_RESULT_HPP
