// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Monitors: the scores of one sequence to a verdict.
#ifndef EMAUDIT_MONITOR_HPP
#define EMAUDIT_MONITOR_HPP

#include "drift.hpp"
#include "probe.hpp"

#include <cstdint>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// What is known about a sequence. Only `clean` is clean; `stale` means that the thresholds no longer hold.
enum class State : std::uint32_t {
  invalid = EMAUDIT_STATE_INVALID,
  pending = EMAUDIT_STATE_PENDING,
  clean = EMAUDIT_STATE_CLEAN,
  flagged = EMAUDIT_STATE_FLAGGED,
  stale = EMAUDIT_STATE_STALE,
};

/// What is known about a sequence; default-constructed it is invalid.
struct Verdict {
  State state = State::invalid;
  /// Flagged by a direction whose content evidence is specific.
  bool misalignment = false;
  Aggregation aggregation = Aggregation::mean;
  float score = 0.0f;
  float threshold = 0.0f;
  std::uint32_t tokens = 0;
  double rate = 0.0;
  double rate_upper = 0.0;
  std::uint32_t horizon = 0;
  std::uint32_t layer = 0;
  Kernel kernel = Kernel::best;
  bool verified = false;
  Digest digest{};
};

/// The state of one sequence.
class Monitor {
 public:
  static Result<Monitor> make(const Probe &probe, Aggregation aggregation, double rate) {
    emaudit_monitor_options options = EMAUDIT_MONITOR_OPTIONS_INIT;
    options.aggregation = static_cast<std::uint32_t>(aggregation);
    options.rate = rate;
    emaudit_monitor *handle = nullptr;
    return detail::run<Monitor>(
        [&](const detail::Functions &f, emaudit_error **e) {
          return f.monitor_new(probe.get(), &options, &handle, e);
        },
        [&] { return Monitor(handle); });
  }

  /// Lets the verdicts follow a drift of the same layer and file: stale while it stands, invalid while it is
  /// invalid. The drift may go first; then its last state stays.
  Result<void> watch(const Drift &drift) {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.monitor_watch(handle_.get(), drift.get(), e);
    });
  }

  /// Adds the scores of the next tokens, in aligned standard deviations; token 1 is the last prompt token.
  Result<void> push(Span<const float> scores) {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.monitor_push(handle_.get(), scores.data(), scores.size(), e);
    });
  }
  Result<void> push(const float *scores, std::size_t count) { return push(Span<const float>(scores, count)); }
  Result<void> push(float score) { return push(&score, 1); }

  /// The verdict so far; invalid when it cannot be read.
  Verdict verdict() const noexcept {
    emaudit_verdict raw = EMAUDIT_VERDICT_INIT;
    if (detail::functions()->monitor_get_verdict(get(), &raw, nullptr) != EMAUDIT_STATUS_OK) {
      return Verdict();
    }
    Verdict verdict;
    verdict.state = static_cast<State>(raw.state);
    verdict.misalignment = raw.misalignment != 0;
    verdict.aggregation = static_cast<Aggregation>(raw.aggregation);
    verdict.score = raw.score;
    verdict.threshold = raw.threshold;
    verdict.tokens = raw.tokens;
    verdict.rate = raw.rate;
    verdict.rate_upper = raw.rate_upper;
    verdict.horizon = raw.horizon;
    verdict.layer = raw.layer;
    verdict.kernel = static_cast<Kernel>(raw.kernel);
    verdict.verified = raw.verified != 0;
    verdict.digest = detail::digest_of(raw.digest);
    return verdict;
  }

  /// Forgets the sequence.
  Result<void> reset() {
    return detail::run(
        [&](const detail::Functions &f, emaudit_error **e) { return f.monitor_reset(handle_.get(), e); });
  }

  const emaudit_monitor *get() const noexcept { return handle_.get(); }

 private:
  explicit Monitor(emaudit_monitor *handle) noexcept : handle_(handle) {}

  detail::Handle<emaudit_monitor> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_MONITOR_HPP
