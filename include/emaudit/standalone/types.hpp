// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The words of the interface: statuses, results, and what a file says. Part of emaudit/standalone.hpp.
#ifndef EMAUDIT_STANDALONE_TYPES_HPP
#define EMAUDIT_STANDALONE_TYPES_HPP

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace emaudit::standalone {

/// Outcome of a call; the numbers are those of EMAUDIT_STATUS_* in emaudit.h.
enum class Status : std::int32_t {
  ok = 0, invalid_argument = 1, io = 2, not_a_direction_file = 3, truncated = 4, malformed = 5,
  unsupported_version = 6, digest_mismatch = 7, schema = 8, model_mismatch = 9, width_mismatch = 10,
  layer_not_found = 11, non_finite = 12, not_specific = 13, rate_unsupported = 14,
  not_calibrated = 21,
};

// The numbers of all that follow are those of emaudit.h as well.
enum class Dtype : std::uint32_t { f32 = 1, f16 = 2, bf16 = 3 };
enum class Unit : std::uint32_t { aligned_sd = 1, raw = 2 };
enum class RowStatus : std::uint8_t { ok = 0, non_finite = 1 };
enum class Site : std::uint32_t { resid_post = 1, final_norm = 2 };
enum class Identity : std::uint32_t { exact = 1, variant = 2 };
enum class Specificity : std::uint32_t { untested = 1, nonspecific = 2, specific = 3 };
enum class Aggregation : std::uint32_t { mean = 1, max = 2, last = 3 };
enum class State : std::uint32_t { invalid = 0, pending = 1, clean = 2, flagged = 3 };

using Digest = std::array<std::uint8_t, 32>;

/// What went wrong; true where something did.
struct Error {
  Status status = Status::ok;
  std::string message;

  explicit operator bool() const noexcept { return status != Status::ok; }
};

/// A value or the reason why there is none; ask before taking the value.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Error error) : error_(std::move(error)) {}
  explicit operator bool() const noexcept { return value_.has_value(); }
  T &operator*() noexcept { return *value_; }
  const T &operator*() const noexcept { return *value_; }
  T *operator->() noexcept { return &*value_; }
  const T *operator->() const noexcept { return &*value_; }
  const Error &error() const noexcept { return error_; }
  Status status() const noexcept { return error_.status; }

 private:
  std::optional<T> value_;
  Error error_;
};

/// An alarm: the statistic over the first `horizon` tokens exceeds `z` aligned standard deviations.
struct Threshold {
  Aggregation statistic{};
  std::uint32_t horizon = 0, sequences = 0;
  double rate = 0, rate_upper = 0, z = 0;
};

struct Layer {
  std::uint32_t layer = 0, sequences = 0;
  bool calibrated = false;  // else raw scores only, and nothing below up to the vectors
  double sigma = 0;
  std::vector<std::pair<double, double>> quantiles;  // probability, score
  std::vector<Threshold> thresholds;
  std::vector<float> direction, aligned_mean;
};

/// The model of a file, or the caller's own: then an unknown weights_digest or quantization stays empty.
struct Model {
  std::string architecture;
  std::uint32_t hidden_size = 0, n_layers = 0, vocab_size = 0;
  std::string tokenizer_digest;  // 64 lower-case hex characters, as weights_digest
  Site site{};
  std::string weights_digest, quantization, name;
};

struct OpenOptions {
  bool verify = true;                     // check the digest the file states about itself
  std::optional<Digest> expected_digest;  // SHA-256 of the file, from a place you trust
};

}  // namespace emaudit::standalone

#endif  // EMAUDIT_STANDALONE_TYPES_HPP
