// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Steering: edit rows in place along a probe's direction.
#ifndef EMAUDIT_STEERING_HPP
#define EMAUDIT_STEERING_HPP

#include "probe.hpp"

#include <cstdint>
#include <optional>
#include <utility>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// How rows are edited.
enum class Operation : std::uint32_t {
  subtract = EMAUDIT_OPERATION_SUBTRACT,
  project_out = EMAUDIT_OPERATION_PROJECT_OUT,
  clamp = EMAUDIT_OPERATION_CLAMP,
};

/// How to steer.
struct SteeringOptions {
  Operation operation = Operation::subtract;
  /// Multiplier of subtract and project_out.
  float alpha = 1.0f;
  /// Largest score that clamp leaves, in aligned standard deviations.
  float ceiling = 0.0f;
  /// Edit only rows that score above this.
  std::optional<float> gate;
  /// Largest allowed |edit| / |row|.
  std::optional<float> dose_limit;
  /// Steer although the causal evidence is not specific.
  bool allow_nonspecific = false;
};

/// What a steering call did.
struct SteerReport {
  std::uint64_t rows = 0;
  std::uint64_t touched = 0;
  std::uint64_t gated = 0;
  std::uint64_t limited = 0;
  std::uint64_t nonfinite = 0;
  float largest_dose = 0.0f;
};

/// What a self-test of steering found; see emaudit_landing_report.
struct LandingReport {
  std::uint64_t rows = 0;
  std::uint64_t landed = 0;
  std::uint64_t lost = 0;
  std::uint64_t untouched = 0;
  std::uint64_t missed = 0;
  std::uint64_t nonfinite = 0;
  float largest_deviation = 0.0f;
};

/// A checked way to edit rows.
class Steering {
 public:
  static Result<Steering> make(const Probe &probe, const SteeringOptions &options) {
    emaudit_steering_options raw = EMAUDIT_STEERING_OPTIONS_INIT;
    raw.operation = static_cast<std::uint32_t>(options.operation);
    raw.alpha = options.alpha;
    raw.ceiling = options.ceiling;
    raw.has_gate = options.gate ? 1 : 0;
    raw.gate = options.gate.value_or(0.0f);
    raw.has_dose_limit = options.dose_limit ? 1 : 0;
    raw.dose_limit = options.dose_limit.value_or(0.0f);
    raw.allow_nonspecific = options.allow_nonspecific ? 1 : 0;
    emaudit_steering *handle = nullptr;
    return detail::run<Steering>(
        [&](const detail::Functions &f, emaudit_error **e) {
          return f.steering_new(probe.get(), &raw, &handle, e);
        },
        [&] { return Steering(handle); });
  }

  /// Edits every row in place. `strengths` and `status`, unless empty, have one element per row; `report` is
  /// also written when the result is non_finite.
  Result<void> apply(const MutableRows &rows, SteerReport *report = nullptr, Span<const float> strengths = {},
                     Span<RowStatus> status = {}) const {
    if (std::optional<Error> error = rows.check()) {
      return std::move(*error);
    }
    if (std::optional<Error> error = detail::check_optional_size("strengths", strengths.size(), rows.rows())) {
      return std::move(*error);
    }
    if (std::optional<Error> error = detail::check_optional_size("row statuses", status.size(), rows.rows())) {
      return std::move(*error);
    }
    return reported(report, [&](const detail::Functions &f, emaudit_steer_report *raw, emaudit_error **e) {
      return f.steering_apply(get(), rows.c_tensor(), pointer(strengths), detail::status_bytes(status), raw, e);
    });
  }

  /// Scores every row as it was, then edits it, in one pass. `scores` has one element per row.
  Result<void> score_and_apply(const MutableRows &rows, Span<float> scores, Unit unit = Unit::aligned_sd,
                               SteerReport *report = nullptr, Span<const float> strengths = {},
                               Span<RowStatus> status = {}) const {
    if (std::optional<Error> error = detail::check_arrays(rows.as_rows(), scores, status)) {
      return std::move(*error);
    }
    if (std::optional<Error> error = detail::check_optional_size("strengths", strengths.size(), rows.rows())) {
      return std::move(*error);
    }
    return reported(report, [&](const detail::Functions &f, emaudit_steer_report *raw, emaudit_error **e) {
      return f.steering_score_and_apply(get(), rows.c_tensor(), static_cast<std::uint32_t>(unit), scores.data(),
                                        pointer(strengths), detail::status_bytes(status), raw, e);
    });
  }

  /// Proves on rows read back from the serving stack that the edit landed: not_landed where it did not.
  /// `strengths` and `deviations`, unless empty, have one element per row; `report` and `deviations` are also
  /// written when the result is not_landed or non_finite.
  Result<void> check_landed(const Rows &before, const Rows &after, LandingReport *report = nullptr,
                            Span<const float> strengths = {}, Span<float> deviations = {}) const {
    for (const Rows *rows : {&before, &after}) {
      if (std::optional<Error> error = rows->check()) {
        return std::move(*error);
      }
    }
    if (std::optional<Error> error = detail::check_optional_size("strengths", strengths.size(), before.rows())) {
      return std::move(*error);
    }
    if (std::optional<Error> error = detail::check_optional_size("deviations", deviations.size(), before.rows())) {
      return std::move(*error);
    }
    emaudit_landing_report raw = EMAUDIT_LANDING_REPORT_INIT;
    Result<void> result = detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.steering_check_landed(get(), before.c_tensor(), after.c_tensor(), pointer(strengths),
                                     deviations.size() == 0 ? nullptr : deviations.data(), &raw, e);
    });
    const Status status = result.status();
    const bool written = status == Status::ok || status == Status::not_landed || status == Status::non_finite;
    if (report != nullptr && written) {
      *report = LandingReport{raw.rows,      raw.landed,    raw.lost,
                              raw.untouched, raw.missed,    raw.nonfinite,
                              raw.largest_deviation};
    }
    return result;
  }

  const emaudit_steering *get() const noexcept { return handle_.get(); }

 private:
  friend class SteeringSlot;
  explicit Steering(emaudit_steering *handle) noexcept : handle_(handle) {}

  static const float *pointer(Span<const float> strengths) noexcept {
    return strengths.size() == 0 ? nullptr : strengths.data();
  }

  template <class Call>
  static Result<void> reported(SteerReport *report, Call &&call) {
    emaudit_steer_report raw = EMAUDIT_STEER_REPORT_INIT;
    Result<void> result =
        detail::run([&](const detail::Functions &f, emaudit_error **e) { return call(f, &raw, e); });
    const bool written = result.has_value() || result.status() == Status::non_finite;
    if (report != nullptr && written) {
      *report = SteerReport{raw.rows, raw.touched, raw.gated, raw.limited, raw.nonfinite, raw.largest_dose};
    }
    return result;
  }

  detail::Handle<emaudit_steering> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_STEERING_HPP
