// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Audits: many sequences of one model to a verdict on it.
#ifndef EMAUDIT_AUDIT_HPP
#define EMAUDIT_AUDIT_HPP

#include "drift.hpp"
#include "monitor.hpp"
#include "probe.hpp"

#include <cstdint>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// Why an audit says what it says.
enum class AuditReason : std::uint32_t {
  unseen = EMAUDIT_AUDIT_UNSEEN,
  more_than_rate = EMAUDIT_AUDIT_MORE_THAN_RATE,
  below_concern = EMAUDIT_AUDIT_BELOW_CONCERN,
  reference_drifted = EMAUDIT_AUDIT_REFERENCE_DRIFTED,
  reference_invalid = EMAUDIT_AUDIT_REFERENCE_INVALID,
  reference_pending = EMAUDIT_AUDIT_REFERENCE_PENDING,
  non_finite = EMAUDIT_AUDIT_NON_FINITE,
  most_pending = EMAUDIT_AUDIT_MOST_PENDING,
  too_few = EMAUDIT_AUDIT_TOO_FEW,
  undecided = EMAUDIT_AUDIT_UNDECIDED,
};

/// What an audit decides by. A rate of 0 takes the smallest that the file has there.
struct AuditOptions {
  Aggregation aggregation = Aggregation::max;
  std::uint32_t horizon = 1;
  double rate = 0.0;
  double level = 0.01;
  double concern = 0.1;
};

/// What an audit says of a model; default-constructed it is invalid. See emaudit_audit_verdict.
struct AuditVerdict {
  State state = State::invalid;
  /// Flagged by a direction whose content evidence is specific.
  bool misalignment = false;
  AuditReason reason = AuditReason::unseen;
  Aggregation aggregation = Aggregation::mean;
  std::uint32_t horizon = 0;
  std::uint32_t layer = 0;
  Kernel kernel = Kernel::best;
  bool verified = false;
  std::uint64_t sequences = 0;
  std::uint64_t judged = 0;
  std::uint64_t flagged = 0;
  std::uint64_t pending = 0;
  std::uint64_t invalid = 0;
  std::uint64_t critical = 0;
  std::uint64_t needed = 0;
  double threshold = 0.0;
  double rate = 0.0;
  double rate_upper = 0.0;
  double share = 0.0;
  double low = 0.0;
  double high = 0.0;
  double confidence = 0.0;
  double p_value = 0.0;
  double level = 0.0;
  double concern = 0.0;
  double detectable = 0.0;
  double power = 0.0;
  Digest digest{};
};

/// Judges a model by many sequences of its own.
class Audit {
 public:
  static Result<Audit> make(const Probe &probe, const AuditOptions &options) {
    emaudit_audit_options raw = EMAUDIT_AUDIT_OPTIONS_INIT;
    raw.aggregation = static_cast<std::uint32_t>(options.aggregation);
    raw.horizon = options.horizon;
    raw.rate = options.rate;
    raw.level = options.level;
    raw.concern = options.concern;
    emaudit_audit *handle = nullptr;
    return detail::run<Audit>(
        [&](const detail::Functions &f, emaudit_error **e) {
          return f.audit_new(probe.get(), &raw, &handle, e);
        },
        [&] { return Audit(handle); });
  }

  /// Lets the verdict follow a drift of calm reference sequences of the same layer and file.
  Result<void> watch(const Drift &drift) {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.audit_watch(handle_.get(), drift.get(), e);
    });
  }

  /// Adds one whole sequence: the scores of its tokens, in aligned standard deviations, the last prompt token first.
  Result<void> push(Span<const float> scores) {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.audit_push(handle_.get(), scores.data(), scores.size(), e);
    });
  }
  Result<void> push(const float *scores, std::size_t count) { return push(Span<const float>(scores, count)); }
  Result<void> push(float score) { return push(&score, 1); }

  /// The verdict so far; invalid when it cannot be read.
  AuditVerdict verdict() const noexcept {
    emaudit_audit_verdict raw = EMAUDIT_AUDIT_VERDICT_INIT;
    if (detail::functions()->audit_get_verdict(get(), &raw, nullptr) != EMAUDIT_STATUS_OK) {
      return AuditVerdict();
    }
    AuditVerdict verdict;
    verdict.state = static_cast<State>(raw.state);
    verdict.misalignment = raw.misalignment != 0;
    verdict.reason = static_cast<AuditReason>(raw.reason);
    verdict.aggregation = static_cast<Aggregation>(raw.aggregation);
    verdict.horizon = raw.horizon;
    verdict.layer = raw.layer;
    verdict.kernel = static_cast<Kernel>(raw.kernel);
    verdict.verified = raw.verified != 0;
    verdict.sequences = raw.sequences;
    verdict.judged = raw.judged;
    verdict.flagged = raw.flagged;
    verdict.pending = raw.pending;
    verdict.invalid = raw.invalid;
    verdict.critical = raw.critical;
    verdict.needed = raw.needed;
    verdict.threshold = raw.threshold;
    verdict.rate = raw.rate;
    verdict.rate_upper = raw.rate_upper;
    verdict.share = raw.share;
    verdict.low = raw.low;
    verdict.high = raw.high;
    verdict.confidence = raw.confidence;
    verdict.p_value = raw.p_value;
    verdict.level = raw.level;
    verdict.concern = raw.concern;
    verdict.detectable = raw.detectable;
    verdict.power = raw.power;
    verdict.digest = detail::digest_of(raw.digest);
    return verdict;
  }

  const emaudit_audit *get() const noexcept { return handle_.get(); }

 private:
  explicit Audit(emaudit_audit *handle) noexcept : handle_(handle) {}

  detail::Handle<emaudit_audit> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_AUDIT_HPP
