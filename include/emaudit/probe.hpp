// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Probes: score rows against one layer's direction.
#ifndef EMAUDIT_PROBE_HPP
#define EMAUDIT_PROBE_HPP

#include "directions.hpp"
#include "kernel.hpp"
#include "rows.hpp"

#include <cstdint>
#include <optional>
#include <utility>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// Unit of a score.
enum class Unit : std::uint32_t { aligned_sd = EMAUDIT_UNIT_ALIGNED_SD, raw = EMAUDIT_UNIT_RAW };

/// One layer's direction, bound to a kernel.
class Probe {
 public:
  static Result<Probe> make(const Directions &directions, std::uint32_t layer, Kernel kernel = Kernel::best) {
    emaudit_probe_options options = EMAUDIT_PROBE_OPTIONS_INIT;
    options.kernel = static_cast<std::uint32_t>(kernel);
    emaudit_probe *handle = nullptr;
    return detail::run<Probe>(
        [&](const detail::Functions &f, emaudit_error **e) {
          return f.probe_new(directions.get(), layer, &options, &handle, e);
        },
        [&] { return Probe(handle); });
  }

  /// Scores every row. `scores`, and `status` unless empty, have one element per row. non_finite means that the
  /// flagged rows could not be scored; all other scores were written.
  Result<void> score(const Rows &rows, Span<float> scores, Unit unit = Unit::aligned_sd,
                     Span<RowStatus> status = {}) const {
    if (std::optional<Error> error = detail::check_arrays(rows, scores, status)) {
      return std::move(*error);
    }
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.probe_score(get(), rows.c_tensor(), static_cast<std::uint32_t>(unit), scores.data(),
                           detail::status_bytes(status), e);
    });
  }

  /// Scores every row with several probes in one reading of the rows, with the bits of each probe alone. `probes` are
  /// handles that get() gives, of one width and one kernel; `scores` has one element per row and probe, row by row,
  /// `status` unless empty one per row. Non_finite as for score(). Allocates nothing when it succeeds.
  static Result<void> score_all(Span<const emaudit_probe *const> probes, const Rows &rows, Span<float> scores,
                                Unit unit = Unit::aligned_sd, Span<RowStatus> status = {}) {
    if (std::optional<Error> error = detail::check_arrays(rows, probes.size(), scores, status)) {
      return std::move(*error);
    }
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.probe_score_all(probes.data(), probes.size(), rows.c_tensor(), static_cast<std::uint32_t>(unit),
                               scores.data(), detail::status_bytes(status), e);
    });
  }

  /// Bound on the rounding error of a score in activation units, for a row of that Euclidean norm.
  Result<double> error_bound(double row_norm) const {
    double bound = 0.0;
    return detail::run<double>(
        [&](const detail::Functions &f, emaudit_error **e) {
          return f.probe_error_bound(get(), row_norm, &bound, e);
        },
        [&] { return bound; });
  }

  std::uint32_t width() const noexcept { return info().width; }
  std::uint32_t layer() const noexcept { return info().layer; }
  /// The kernel in use, never `best`.
  Kernel kernel() const noexcept { return static_cast<Kernel>(info().kernel); }
  const emaudit_probe *get() const noexcept { return handle_.get(); }

 private:
  friend class ProbeSlot;
  explicit Probe(emaudit_probe *handle) noexcept : handle_(handle) {}

  emaudit_probe_info info() const noexcept {
    emaudit_probe_info info = EMAUDIT_PROBE_INFO_INIT;
    (void)detail::functions()->probe_get_info(get(), &info, nullptr);
    return info;
  }

  detail::Handle<emaudit_probe> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_PROBE_HPP
