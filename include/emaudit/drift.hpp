// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Drifts: is the aligned distribution still the one of the calibration?
#ifndef EMAUDIT_DRIFT_HPP
#define EMAUDIT_DRIFT_HPP

#include "probe.hpp"

#include <cstdint>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// What a drift knows. Only `steady` is steady.
enum class DriftState : std::uint32_t {
  invalid = EMAUDIT_DRIFT_INVALID,
  pending = EMAUDIT_DRIFT_PENDING,
  steady = EMAUDIT_DRIFT_STEADY,
  drifted = EMAUDIT_DRIFT_DRIFTED,
};

/// What a drift found; default-constructed it is invalid. See emaudit_drift_report.
struct DriftReport {
  DriftState state = DriftState::invalid;
  std::uint32_t window = 0;
  std::uint32_t sequences = 0;
  std::uint64_t windows = 0;
  double rate = 0.0;
  double probability = 0.0;
  double z = 0.0;
  double share = 0.0;
  double lowest = 0.0;
  double highest = 0.0;
};

/// Watches the aligned distribution on sequences that the caller vouches for as calm.
class Drift {
 public:
  static Result<Drift> make(const Probe &probe, std::uint32_t window, double rate) {
    emaudit_drift_options options = EMAUDIT_DRIFT_OPTIONS_INIT;
    options.window = window;
    options.rate = rate;
    emaudit_drift *handle = nullptr;
    return detail::run<Drift>(
        [&](const detail::Functions &f, emaudit_error **e) {
          return f.drift_new(probe.get(), &options, &handle, e);
        },
        [&] { return Drift(handle); });
  }

  /// Adds one score per calm sequence, that of its last prompt token, in aligned standard deviations.
  Result<void> push(Span<const float> scores) {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.drift_push(handle_.get(), scores.data(), scores.size(), e);
    });
  }
  Result<void> push(float score) { return push(Span<const float>(&score, 1)); }

  /// What was found so far; invalid when it cannot be read.
  DriftReport report() const noexcept {
    emaudit_drift_report raw = EMAUDIT_DRIFT_REPORT_INIT;
    if (detail::functions()->drift_get_report(get(), &raw, nullptr) != EMAUDIT_STATUS_OK) {
      return DriftReport();
    }
    return DriftReport{static_cast<DriftState>(raw.state), raw.window, raw.sequences, raw.windows, raw.rate,
                       raw.probability, raw.z, raw.share, raw.lowest, raw.highest};
  }

  /// Forgets all windows.
  Result<void> reset() {
    return detail::run(
        [&](const detail::Functions &f, emaudit_error **e) { return f.drift_reset(handle_.get(), e); });
  }

  const emaudit_drift *get() const noexcept { return handle_.get(); }

 private:
  explicit Drift(emaudit_drift *handle) noexcept : handle_(handle) {}

  detail::Handle<emaudit_drift> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_DRIFT_HPP
