// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Audit logs: verdicts as lines of JSON, chained by their hashes. `emaudit log verify` checks one.
#ifndef EMAUDIT_LOG_HPP
#define EMAUDIT_LOG_HPP

#include "monitor.hpp"

#include <cstdint>
#include <string>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// How far a log has come.
struct LogInfo {
  std::uint64_t records = 0;
  /// Hash of the last line, zeros in an empty log: what to keep elsewhere.
  Digest head{};
};

/// A log that is open for appending, by this writer alone. Appending allocates and writes: not for the path of tokens.
class Log {
 public:
  /// Makes the file where there is none; verifies all of its chain. Errors: io, broken_log.
  static Result<Log> open(const char *path) {
    emaudit_log *handle = nullptr;
    return detail::run<Log>(
        [&](const detail::Functions &f, emaudit_error **e) { return f.log_open(path, &handle, e); },
        [&] { return Log(handle); });
  }
  static Result<Log> open(const std::string &path) { return open(path.c_str()); }

  /// Adds the verdict on a sequence, named as the caller names it; `sync` waits until the device has the line.
  Result<void> append(const char *sequence, const Verdict &verdict, bool sync = false) {
    emaudit_verdict raw = EMAUDIT_VERDICT_INIT;
    raw.state = static_cast<std::uint32_t>(verdict.state);
    raw.misalignment = verdict.misalignment ? 1 : 0;
    raw.aggregation = static_cast<std::uint32_t>(verdict.aggregation);
    raw.score = verdict.score;
    raw.threshold = verdict.threshold;
    raw.tokens = verdict.tokens;
    raw.rate = verdict.rate;
    raw.rate_upper = verdict.rate_upper;
    raw.horizon = verdict.horizon;
    raw.layer = verdict.layer;
    raw.kernel = static_cast<std::uint32_t>(verdict.kernel);
    raw.verified = verdict.verified ? 1 : 0;
    for (std::size_t i = 0; i < verdict.digest.size(); ++i) {
      raw.digest[i] = verdict.digest[i];
    }
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.log_append(handle_.get(), sequence, &raw, sync ? 1 : 0, e);
    });
  }
  Result<void> append(const std::string &sequence, const Verdict &verdict, bool sync = false) {
    return append(sequence.c_str(), verdict, sync);
  }

  LogInfo info() const noexcept {
    emaudit_log_info raw = EMAUDIT_LOG_INFO_INIT;
    if (detail::functions()->log_get_info(get(), &raw, nullptr) != EMAUDIT_STATUS_OK) {
      return {};
    }
    return LogInfo{raw.records, detail::digest_of(raw.head)};
  }

  const emaudit_log *get() const noexcept { return handle_.get(); }

 private:
  explicit Log(emaudit_log *handle) noexcept : handle_(handle) {}

  detail::Handle<emaudit_log> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_LOG_HPP
