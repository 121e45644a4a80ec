// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The rows of a ggml tensor on any backend: in place where the memory is the host's, else by a copy.
#ifndef EMAUDIT_LLAMA_CPP_ROWS_HPP
#define EMAUDIT_LLAMA_CPP_ROWS_HPP

#include "../rows.hpp"

#include <ggml-backend.h>
#include <ggml.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {
namespace llama_cpp {
namespace detail {

/// N of a tensor named exactly "l_out-N", the output of block N; views of it have longer names. -1 for all others.
inline std::int32_t block_of(const ggml_tensor *tensor) noexcept {
  const char *name = tensor->name;
  if (name[0] != 'l' || std::strncmp(name, "l_out-", 6) != 0) {
    return -1;
  }
  std::int32_t block = 0;
  const char *digit = name + 6;
  for (; *digit >= '0' && *digit <= '9' && block < 100000; ++digit) {
    block = block * 10 + (*digit - '0');
  }
  return digit == name + 6 || *digit != '\0' ? -1 : block;
}

/// Whether a tensor is the named one or a scheduler's copy of it, which is "BACKEND#name#0".
inline bool is_named(const ggml_tensor *tensor, const char *name) noexcept {
  const char *const mark = std::strchr(tensor->name, '#');
  const std::size_t size = std::strlen(name);
  return mark == nullptr ? std::strcmp(tensor->name, name) == 0
                         : std::strncmp(mark + 1, name, size) == 0 && mark[1 + size] == '#';
}

/// The first `count` elements of an input of the graph. False when it has fewer, or is not of 32-bit integers.
inline bool read_integers(const ggml_tensor *tensor, std::int32_t *out, std::size_t count) {
  if (tensor->type != GGML_TYPE_I32 || static_cast<std::size_t>(ggml_nelements(tensor)) < count ||
      !ggml_is_contiguous(tensor)) {
    return false;
  }
  ggml_backend_tensor_get(tensor, out, 0, count * sizeof(std::int32_t));
  return true;
}

/// A tensor's rows as the library takes them.
class TensorRows {
 public:
  /// `scratch` holds the copy where one is needed; it grows to the largest tensor seen.
  TensorRows(ggml_tensor *tensor, std::vector<std::byte> &scratch) : tensor_(tensor) {
    if (tensor->ne[2] != 1 || tensor->ne[3] != 1 || tensor->nb[0] != ggml_type_size(tensor->type)) {
      return;
    }
    const ggml_tensor *const owner = tensor->view_src != nullptr ? tensor->view_src : tensor;
#ifdef EMAUDIT_LLAMA_CPP_COPY  // for tests: go the way of a device although the memory is the host's
    const bool in_place = owner == nullptr;
#else
    const bool in_place = owner->buffer != nullptr && ggml_backend_buffer_is_host(owner->buffer);
#endif
    void *data = tensor->data;
    if (!in_place) {
      bytes_ = ggml_nbytes(tensor);
      if (scratch.size() < bytes_) {
        scratch.resize(bytes_);
      }
      data = scratch.data();
      copy_ = data;
      ggml_backend_tensor_get(tensor, data, 0, bytes_);
    }
    const auto rows = static_cast<std::size_t>(tensor->ne[1]), width = static_cast<std::size_t>(tensor->ne[0]);
    const std::size_t stride = tensor->nb[1] / tensor->nb[0];
    switch (tensor->type) {
      case GGML_TYPE_F32:
        rows_ = MutableRows::f32(static_cast<float *>(data), rows, width, stride);
        break;
      case GGML_TYPE_F16:
        rows_ = MutableRows::f16(data, rows, width, stride);
        break;
      case GGML_TYPE_BF16:
        rows_ = MutableRows::bf16(data, rows, width, stride);
        break;
      default:
        break;
    }
  }

  /// False for a tensor that is no matrix of f32, f16 or bf16 rows.
  explicit operator bool() const noexcept { return rows_.has_value(); }
  const MutableRows &operator*() const noexcept { return *rows_; }

  /// Writes a copy back.
  void commit() {
    if (copy_ != nullptr) {
      ggml_backend_tensor_set(tensor_, copy_, 0, bytes_);
    }
  }

 private:
  ggml_tensor *tensor_;
  void *copy_ = nullptr;
  std::size_t bytes_ = 0;
  std::optional<MutableRows> rows_;
};

}  // namespace detail
}  // namespace llama_cpp
}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_LLAMA_CPP_ROWS_HPP
