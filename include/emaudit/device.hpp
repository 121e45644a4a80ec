// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Rows that live on an NVIDIA GPU: scored and steered there, on the caller's stream.
//
//   auto device = emaudit::DeviceProbe::make(probe);  // with the CUDA context current, before any graph is captured
//   if (auto queued = device->score(emaudit::DeviceRows::f16(h, n, width), scores, stream); !queued) { ... }
//
// Nothing here needs CUDA's headers: streams are void pointers, and every other pointer is a device address.
#ifndef EMAUDIT_DEVICE_HPP
#define EMAUDIT_DEVICE_HPP

#include "probe.hpp"
#include "steering.hpp"

#include <cstddef>
#include <cstdint>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// Rows in device memory: `rows` x `cols`, row i at element i * `row_stride` (0 means `cols`).
class DeviceRows {
 public:
  static DeviceRows f32(void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return DeviceRows(EMAUDIT_DTYPE_F32, data, rows, cols, row_stride);
  }
  static DeviceRows f16(void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return DeviceRows(EMAUDIT_DTYPE_F16, data, rows, cols, row_stride);
  }
  static DeviceRows bf16(void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return DeviceRows(EMAUDIT_DTYPE_BF16, data, rows, cols, row_stride);
  }

  const emaudit_tensor *c_tensor() const noexcept { return &tensor_; }

 private:
  DeviceRows(std::uint32_t dtype, void *data, std::size_t rows, std::size_t cols, std::size_t stride) noexcept {
    tensor_.dtype = dtype;
    tensor_.data = data;
    tensor_.rows = rows;
    tensor_.cols = cols;
    tensor_.row_stride = stride;
  }

  emaudit_tensor tensor_ = EMAUDIT_TENSOR_INIT;
};

/// A probe whose direction was copied to a GPU; see emaudit_device_probe. The arrays of every call have one element per
/// row and live on the device until the stream has run the kernel. What only the GPU sees is no error: look at the
/// scores (NaN) or the statuses. It must outlive what was enqueued with it and every graph that holds such a call: no
/// local variable of the function that enqueues.
class DeviceProbe {
 public:
  /// Copies the direction to the GPU whose context is current. device_unavailable where there is none.
  static Result<DeviceProbe> make(const Probe &probe) {
    emaudit_device_probe *handle = nullptr;
    return detail::run<DeviceProbe>(
        [&](const detail::Functions &f, emaudit_error **e) { return f.probe_to_device(probe.get(), &handle, e); },
        [&] { return DeviceProbe(handle); });
  }

  /// Enqueues the scoring of every row; `status` may be null.
  Result<void> score(const DeviceRows &rows, float *scores, void *stream, Unit unit = Unit::aligned_sd,
                     RowStatus *status = nullptr) const {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.probe_score_device(get(), rows.c_tensor(), static_cast<std::uint32_t>(unit), scores,
                                  reinterpret_cast<std::uint8_t *>(status), stream, e);
    });
  }

  /// Enqueues the editing of every row with a steering made from the same probe; `strengths` may be null, `status` not.
  Result<void> steer(const Steering &steering, const DeviceRows &rows, RowStatus *status, void *stream,
                     const float *strengths = nullptr) const {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.steer_device(get(), steering.get(), rows.c_tensor(), strengths,
                            reinterpret_cast<std::uint8_t *>(status), stream, e);
    });
  }

  /// Enqueues one kernel that scores every row as it was and then edits it.
  Result<void> score_and_steer(const Steering &steering, const DeviceRows &rows, float *scores, RowStatus *status,
                               void *stream, Unit unit = Unit::aligned_sd, const float *strengths = nullptr) const {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.score_and_steer_device(get(), steering.get(), rows.c_tensor(), static_cast<std::uint32_t>(unit),
                                      scores, strengths, reinterpret_cast<std::uint8_t *>(status), stream, e);
    });
  }

  /// Bound on the rounding error of a score in activation units, for a row of that Euclidean norm.
  Result<double> error_bound(double row_norm) const {
    double bound = 0.0;
    return detail::run<double>(
        [&](const detail::Functions &f, emaudit_error **e) {
          return f.device_probe_error_bound(get(), row_norm, &bound, e);
        },
        [&] { return bound; });
  }

  const emaudit_device_probe *get() const noexcept { return handle_.get(); }

 private:
  explicit DeviceProbe(emaudit_device_probe *handle) noexcept : handle_(handle) {}

  detail::Handle<emaudit_device_probe> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_DEVICE_HPP
