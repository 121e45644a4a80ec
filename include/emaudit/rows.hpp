// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Views of the caller's memory: arrays, and rows of activations.
#ifndef EMAUDIT_ROWS_HPP
#define EMAUDIT_ROWS_HPP

#include "result.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// A borrowed array: `{pointer, size}`, or anything contiguous with data() and size(), such as std::vector,
/// std::array and, where the standard has it, std::span. One type in every standard, so that C++17 and C++20
/// units of one program agree.
template <class T>
class Span {
 public:
  constexpr Span() noexcept = default;
  constexpr Span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t N>
  constexpr Span(T (&array)[N]) noexcept : data_(array), size_(N) {}
  template <class Container, class Element = std::remove_pointer_t<decltype(std::declval<Container &>().data())>,
            class = std::enable_if_t<std::is_convertible_v<Element (*)[], T (*)[]>>,
            class = decltype(std::declval<Container &>().size())>
  constexpr Span(Container &&container) noexcept : data_(container.data()), size_(container.size()) {}

  constexpr T *data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr T *begin() const noexcept { return data_; }
  constexpr T *end() const noexcept { return data_ + size_; }
  constexpr T &operator[](std::size_t index) const noexcept { return data_[index]; }

 private:
  T *data_ = nullptr;
  std::size_t size_ = 0;
};

/// What became of one row.
enum class RowStatus : std::uint8_t {
  ok = EMAUDIT_ROW_OK,
  non_finite = EMAUDIT_ROW_NON_FINITE,
  gated = EMAUDIT_ROW_GATED,
  limited = EMAUDIT_ROW_LIMITED,
  /// Steering on a device only.
  bad_strength = EMAUDIT_ROW_BAD_STRENGTH,
};

namespace detail {

/// The caller's row statuses as the bytes of the C interface; null when they are not wanted.
inline std::uint8_t *status_bytes(Span<RowStatus> status) noexcept {
  return status.size() == 0 ? nullptr : reinterpret_cast<std::uint8_t *>(status.data());
}

}  // namespace detail

/// Rows to read: `rows` x `cols`, row i at element i * `row_stride` (0 means `cols`). Borrows the memory. Made
/// from a Span, every call first checks that the rows lie inside it; a pointer is taken at its word.
class Rows {
 public:
  static Rows f32(const float *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_F32, data, SIZE_MAX, rows, cols, row_stride);
  }
  static Rows f32(Span<const float> data, std::size_t rows, std::size_t cols,
                  std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_F32, data.data(), data.size(), rows, cols, row_stride);
  }
  /// IEEE binary16 elements; in a Span, their bits.
  static Rows f16(const void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_F16, data, SIZE_MAX, rows, cols, row_stride);
  }
  static Rows f16(Span<const std::uint16_t> data, std::size_t rows, std::size_t cols,
                  std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_F16, data.data(), data.size(), rows, cols, row_stride);
  }
  static Rows bf16(const void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_BF16, data, SIZE_MAX, rows, cols, row_stride);
  }
  static Rows bf16(Span<const std::uint16_t> data, std::size_t rows, std::size_t cols,
                   std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_BF16, data.data(), data.size(), rows, cols, row_stride);
  }

  std::size_t rows() const noexcept { return tensor_.rows; }
  const emaudit_tensor *c_tensor() const noexcept { return &tensor_; }

  /// The error of rows that leave their span.
  std::optional<Error> check() const {
    if (inside()) {
      return std::nullopt;
    }
    return Error(Status::invalid_argument,
                 std::to_string(elements_) + " elements do not hold " + std::to_string(tensor_.rows) +
                     " rows of " + std::to_string(tensor_.cols) + " at the stride given");
  }

 private:
  // The C struct serves reading and editing; what only reads never writes through it.
  Rows(std::uint32_t dtype, const void *data, std::size_t elements, std::size_t rows, std::size_t cols,
       std::size_t stride) noexcept
      : elements_(elements) {
    tensor_.dtype = dtype;
    tensor_.data = const_cast<void *>(data);
    tensor_.rows = rows;
    tensor_.cols = cols;
    tensor_.row_stride = stride;
  }

  bool inside() const noexcept {
    if (elements_ == SIZE_MAX || tensor_.rows == 0) {
      return true;
    }
    const std::size_t stride = tensor_.row_stride == 0 ? tensor_.cols : tensor_.row_stride;
    if (tensor_.cols > elements_) {
      return false;
    }
    return stride == 0 || tensor_.rows - 1 <= (elements_ - tensor_.cols) / stride;
  }

  emaudit_tensor tensor_ = EMAUDIT_TENSOR_INIT;
  std::size_t elements_;
};

/// Rows to edit in place. Borrows the memory.
class MutableRows {
 public:
  static MutableRows f32(float *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::f32(data, rows, cols, row_stride));
  }
  static MutableRows f32(Span<float> data, std::size_t rows, std::size_t cols,
                         std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::f32(data, rows, cols, row_stride));
  }
  /// IEEE binary16 elements; in a Span, their bits.
  static MutableRows f16(void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::f16(data, rows, cols, row_stride));
  }
  static MutableRows f16(Span<std::uint16_t> data, std::size_t rows, std::size_t cols,
                         std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::f16(data, rows, cols, row_stride));
  }
  static MutableRows bf16(void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::bf16(data, rows, cols, row_stride));
  }
  static MutableRows bf16(Span<std::uint16_t> data, std::size_t rows, std::size_t cols,
                          std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::bf16(data, rows, cols, row_stride));
  }

  /// The same rows, to read.
  const Rows &as_rows() const noexcept { return rows_; }
  std::size_t rows() const noexcept { return rows_.rows(); }
  const emaudit_tensor *c_tensor() const noexcept { return rows_.c_tensor(); }
  std::optional<Error> check() const { return rows_.check(); }

 private:
  explicit MutableRows(Rows rows) noexcept : rows_(rows) {}
  Rows rows_;
};

namespace detail {

/// Refuses rows that leave their span, and arrays that do not fit the rows.
inline std::optional<Error> check_arrays(const Rows &rows, Span<float> scores, Span<RowStatus> status) {
  if (std::optional<Error> error = rows.check()) {
    return error;
  }
  if (std::optional<Error> error = check_size("scores", scores.size(), rows.rows())) {
    return error;
  }
  return check_optional_size("row statuses", status.size(), rows.rows());
}

/// The same where every row has the scores of several probes.
inline std::optional<Error> check_arrays(const Rows &rows, std::size_t probes, Span<float> scores,
                                         Span<RowStatus> status) {
  if (std::optional<Error> error = rows.check()) {
    return error;
  }
  // The product could overflow. No probe at all is for the library to refuse.
  if (probes != 0 && (scores.size() % probes != 0 || scores.size() / probes != rows.rows())) {
    return Error(Status::invalid_argument, std::to_string(scores.size()) + " scores for " +
                                               std::to_string(rows.rows()) + " rows and " +
                                               std::to_string(probes) + " probes");
  }
  return check_optional_size("row statuses", status.size(), rows.rows());
}

}  // namespace detail

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_ROWS_HPP
