// SPDX-License-Identifier: MIT OR Apache-2.0
//
// emaudit without the library: reads a direction file, checks the model, scores and subtracts, reaches a verdict.
// One header, C++17 and its standard library, for stacks that cannot link anything. Written from FORMAT.md and
// contract.md alone: it agrees with the library on every file, good or hostile, and on every bit of the library's
// "scalar" kernel. It is slower than the other kernels, and leaves out what needs more code: mapped files,
// signatures, gates, dose limits, projection and clamping.
//
//   using namespace emaudit::standalone;
//   auto directions = Directions::open("model.safetensors");
//   if (!directions) { std::fprintf(stderr, "%s\n", directions.error().message.c_str()); return 1; }
//   auto probe = directions->probe(12);
//   auto monitor = Monitor::make(*probe, Aggregation::mean, 0.01);
//   if (probe->score({h, Dtype::bf16, n, width}, scores) == Status::ok) { monitor->push(scores, n); }
//   bool all_well = monitor->verdict().state == State::clean;
//
// Nothing throws but the allocator; it works with -fno-exceptions and -fno-rtti. It does not work with -ffast-math,
// under which a NaN could read as clean. Const objects are shared between threads freely; a Monitor belongs to one
// thread at a time. Scoring, subtracting and monitoring do not allocate, lock or block.
#ifndef EMAUDIT_STANDALONE_HPP
#define EMAUDIT_STANDALONE_HPP

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0)
#error "emaudit/standalone.hpp: compile this file without -ffast-math: a NaN must never read as clean"
#endif

#include "standalone/container.hpp"
#include "standalone/json.hpp"
#include "standalone/manifest.hpp"
#include "standalone/types.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace emaudit::standalone {

static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559, "IEEE 754 is needed");
static_assert(FLT_EVAL_METHOD == 0, "f32 arithmetic must round to f32: compile with SSE");

/// Rows of activations: row i begins `stride` elements after row i - 1, where 0 means `cols`.
struct Rows {
  const void *data = nullptr;
  Dtype dtype{};
  std::size_t rows = 0, cols = 0, stride = 0;
};

/// Rows to edit in place; nothing else may use them meanwhile.
struct RowsMut {
  void *data = nullptr;
  Dtype dtype{};
  std::size_t rows = 0, cols = 0, stride = 0;
};

/// How much of a direction is taken out: h -= strength * alpha * v.
struct Subtraction {
  float alpha = 0;
  const float *strengths = nullptr;  // one per row; null means 1
  bool allow_nonspecific = false;    // subtract although the causal evidence is not `specific`
};

/// What may be said of a sequence; a fresh one is invalid, and only `clean` is clean.
struct Verdict {
  State state = State::invalid;
  bool misalignment = false;  // flagged by a direction whose content evidence is specific
  Aggregation aggregation{};
  float score = std::numeric_limits<float>::quiet_NaN(), threshold = 0;
  double rate = 0, rate_upper = 0;
  std::uint32_t tokens = 0, horizon = 0, layer = 0;
  std::uint32_t kernel = 1;  // "scalar": the same bits
  bool verified = false;
  Digest digest{};
};

namespace detail {

template <class To, class From>
To bits(From value) noexcept {
  static_assert(sizeof(To) == sizeof(From), "bits are neither made nor lost");
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

template <class T>
T load(const unsigned char *from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Each dtype: how an element is widened and rounded, and the smallest f32 that rounds to no finite element.
struct F32 {
  using Stored = float;
  static constexpr float overflow = std::numeric_limits<float>::infinity();
  static float widen(float value) noexcept { return value; }
  static float round(float value) noexcept { return value; }
};

struct Bf16 {
  using Stored = std::uint16_t;
  static constexpr float overflow = 3.3961775292304957e38f;  // 0x1.ffp127
  static float widen(std::uint16_t half) noexcept { return bits<float>(std::uint32_t{half} << 16); }
  static std::uint16_t round(float value) noexcept {
    const auto wide = bits<std::uint32_t>(value);
    return static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
};

struct F16 {
  using Stored = std::uint16_t;
  static constexpr float overflow = 65520.0f;
  static float widen(std::uint16_t half) noexcept {
    const std::uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 0x3ffu;
    if (exponent == 31) return bits<float>(sign | 0x7f800000u | fraction << 13);
    if (exponent > 0) return bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
    const float subnormal = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -subnormal : subnormal;
  }
  static std::uint16_t round(float value) noexcept {
    const auto wide = bits<std::uint32_t>(value), size = wide & 0x7fffffffu;
    std::uint32_t rounded;
    if (size < 0x38800000u) {
      // A step of f32 at 0.5 is the step of a subnormal f16, so the addition rounds as it should.
      rounded = bits<std::uint32_t>(bits<float>(size) + 0.5f) - 0x3f000000u;
    } else {
      rounded = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112u << 10);
    }
    return static_cast<std::uint16_t>(wide >> 16 & 0x8000u) | static_cast<std::uint16_t>(rounded);
  }
};

template <class Body>
Status for_dtype(Dtype dtype, const Body &body) noexcept {
  switch (dtype) {
    case Dtype::f16: return body(F16{});
    case Dtype::bf16: return body(Bf16{});
    default: return body(F32{});
  }
}

/// Whether every row can be reached; the order of the checks is that of the C interface.
inline Status check_rows(const Rows &rows, std::size_t width) noexcept {
  const bool wide = rows.dtype == Dtype::f32;
  if (!wide && rows.dtype != Dtype::f16 && rows.dtype != Dtype::bf16) return Status::invalid_argument;
  if (rows.cols != width) return Status::width_mismatch;
  const std::size_t stride = rows.stride == 0 ? rows.cols : rows.stride, size = wide ? 4 : 2;
  if (stride < rows.cols) return Status::invalid_argument;
  if (rows.rows == 0) return Status::ok;
  const bool aligned = reinterpret_cast<std::uintptr_t>(rows.data) % size == 0;
  if (rows.data == nullptr || !aligned) return Status::invalid_argument;
  const std::size_t most = std::numeric_limits<std::size_t>::max() / 2 / size - rows.cols;
  return (rows.rows - 1) > most / stride ? Status::invalid_argument : Status::ok;
}

}  // namespace detail

/// One layer's direction, ready to score and subtract. It keeps a copy of all it needs.
class Probe {
 public:
  std::uint32_t layer() const noexcept { return layer_.layer; }
  std::size_t width() const noexcept { return unit_.size(); }

  /// Scores every row. One that holds a NaN or an infinity, or whose score would be one, gets a NaN and is flagged;
  /// the others are scored all the same, and the call returns non_finite.
  Status score(const Rows &rows, float *scores, Unit unit = Unit::aligned_sd,
               RowStatus *row_status = nullptr) const noexcept {
    if (unit != Unit::aligned_sd && unit != Unit::raw) return Status::invalid_argument;
    if (const Status status = detail::check_rows(rows, width()); status != Status::ok) return status;
    if (rows.rows > 0 && scores == nullptr) return Status::invalid_argument;
    if (unit == Unit::aligned_sd && !layer_.calibrated) return Status::not_calibrated;
    return detail::for_dtype(rows.dtype, [&](auto dtype) {
      using T = decltype(dtype);
      const auto *first = static_cast<const unsigned char *>(rows.data);
      return each_row<T>(first, rows, row_status, [&](const unsigned char *row, std::size_t i) {
        const Seen seen = look<T>(row);
        scores[i] = !seen.finite ? std::numeric_limits<float>::quiet_NaN() : unit == Unit::raw ? seen.raw : seen.z;
        return seen.finite;
      });
    });
  }

  /// Subtracts the raw direction from every row in place. A row that holds a NaN or an infinity, or whose edit would
  /// make one, stays as it is and is flagged; the others are edited all the same, and the call returns non_finite.
  Status subtract(const RowsMut &rows, const Subtraction &how, RowStatus *row_status = nullptr) const noexcept {
    if (!detail::finite(how.alpha)) return Status::invalid_argument;
    if (causal_ != Specificity::specific && !how.allow_nonspecific) return Status::not_specific;
    const Rows view{rows.data, rows.dtype, rows.rows, rows.cols, rows.stride};
    if (const Status status = detail::check_rows(view, width()); status != Status::ok) return status;
    for (std::size_t i = 0; how.strengths != nullptr && i < rows.rows; ++i) {
      if (!detail::finite(how.strengths[i])) return Status::invalid_argument;
    }
    return detail::for_dtype(rows.dtype, [&](auto dtype) {
      using T = decltype(dtype);
      auto *first = static_cast<unsigned char *>(rows.data);
      return each_row<T>(first, view, row_status, [&](unsigned char *row, std::size_t i) {
        const double strength = how.strengths != nullptr ? double{how.strengths[i]} : 1.0;
        return edit<T>(row, static_cast<float>(strength * double{how.alpha}));
      });
    });
  }

 private:
  friend class Directions;
  friend class Monitor;

  struct Seen {
    float raw, z;
    bool finite;
  };

  /// Calls `body` with the place and the number of each row; it says whether the row was finite.
  template <class T, class Byte, class Body>
  Status each_row(Byte *row, const Rows &rows, RowStatus *row_status, const Body &body) const noexcept {
    Status outcome = Status::ok;
    const std::size_t step = (rows.stride == 0 ? width() : rows.stride) * sizeof(typename T::Stored);
    for (std::size_t i = 0; i < rows.rows; ++i) {
      if (i > 0) row += step;
      const bool finite = body(row, i);
      if (!finite) outcome = Status::non_finite;
      if (row_status != nullptr) row_status[i] = finite ? RowStatus::ok : RowStatus::non_finite;
    }
    return outcome;
  }

  template <class T>
  static float element(const unsigned char *row, std::size_t i) noexcept {
    return T::widen(detail::load<typename T::Stored>(row + i * sizeof(typename T::Stored)));
  }

  /// The sums of the "scalar" kernel: one element after the other, in f64, where each product is exact.
  template <class T>
  Seen look(const unsigned char *row) const noexcept {
    double dot = 0;
    for (std::size_t i = 0; i < unit_.size(); ++i) dot += double{element<T>(row, i)} * double{unit_[i]};
    const double wide = double{static_cast<float>(dot)} - offset_;
    const float raw = static_cast<float>(wide);
    const float z = layer_.calibrated ? static_cast<float>(wide / layer_.sigma) : 0;
    return {raw, z, detail::finite(raw) && detail::finite(z)};
  }

  /// False, and nothing done, where the row or its edit is not finite.
  template <class T>
  bool edit(unsigned char *row, float c) const noexcept {
    if (!look<T>(row).finite) return false;
    if (c == 0) return true;
    for (std::size_t i = 0; i < width(); ++i) {
      if (!(std::fabs(edited<T>(row, i, c)) < T::overflow)) return false;
    }
    for (std::size_t i = 0; i < width(); ++i) {
      const typename T::Stored value = T::round(edited<T>(row, i, c));
      std::memcpy(row + i * sizeof value, &value, sizeof value);
    }
    return true;
  }

  template <class T>
  float edited(const unsigned char *row, std::size_t i, float c) const noexcept {
    volatile float product = c * layer_.direction[i];  // volatile: no compiler may fuse it with the subtraction
    return element<T>(row, i) - product;
  }

  Layer layer_;
  std::vector<float> unit_;
  double offset_ = 0;
  Specificity causal_ = Specificity::untested, content_ = Specificity::untested;
  bool verified_ = false;
  Digest digest_{};
};

/// An opened direction file: every rule of FORMAT.md was checked. It never changes.
class Directions {
 public:
  static Result<Directions> open(const std::string &path, const OpenOptions &options = {}) {
    const Error io{Status::io, "cannot read " + path + ": it is not there, not readable or not a regular file"};
    std::error_code failed;
    if (!std::filesystem::is_regular_file(path, failed)) return io;
    const std::uintmax_t size = std::filesystem::file_size(path, failed);
    if (failed) return io;
    if (Error error = detail::check_size(size)) return error;
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
    if (file == nullptr) return io;
    std::vector<unsigned char> bytes(static_cast<std::size_t>(size) + 1);  // one more, to see a file that grows
    bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file.get()));
    if (std::ferror(file.get()) != 0) return io;
    return from_bytes(bytes.data(), bytes.size(), options);
  }

  static Result<Directions> from_bytes(const void *data, std::size_t size, const OpenOptions &options = {}) {
    const auto *bytes = static_cast<const unsigned char *>(data);
    detail::Container file;
    if (Error error = detail::read_container(bytes, size, file)) return error;
    Directions out;
    out.verified_ = options.verify || options.expected_digest;
    if (out.verified_) out.digest_ = detail::sha256(bytes, size, size);
    const std::string content = options.verify ? detail::hex(detail::sha256(bytes, size, file.stated_at)) : file.stated;
    if (content != file.stated || (options.expected_digest && *options.expected_digest != out.digest_)) {
      return Error{Status::digest_mismatch, "digest mismatch: the file was altered or damaged"};
    }
    if (std::string wrong = detail::JsonChecker(file.manifest).check(); !wrong.empty()) {
      return detail::malformed("`emaudit.manifest`: " + wrong);
    }
    detail::ManifestReader manifest;
    manifest.read(file.manifest);
    if (manifest.wrong.empty()) manifest.wrong = read_values(file, bytes, manifest);
    if (!manifest.wrong.empty()) return Error{Status::schema, "inconsistent direction file: " + manifest.wrong};
    out.model_ = std::move(manifest.model);
    out.layers_ = std::move(manifest.layers);
    out.evidence_ = manifest.evidence;
    return out;
  }

  const Model &model() const noexcept { return model_; }
  const std::vector<Layer> &layers() const noexcept { return layers_; }
  /// SHA-256 of the file; zeros when it was opened with neither `verify` nor an expected digest.
  const Digest &digest() const noexcept { return digest_; }
  bool verified() const noexcept { return verified_; }

  /// The evidence for one layer: measured in the cell of another one, it says nothing.
  Specificity causal_at(std::uint32_t layer) const noexcept {
    return evidence_.layer == layer ? evidence_.causal : Specificity::untested;
  }
  Specificity content_at(std::uint32_t layer) const noexcept {
    return evidence_.layer == layer ? evidence_.content : Specificity::untested;
  }

  /// Compares the caller's model with the one of the file: do this before the first probe.
  Result<Identity> check_model(const Model &found) const {
    if (found.site != Site::resid_post && found.site != Site::final_norm) {
      return Error{Status::invalid_argument, "invalid argument: the site is none"};
    }
    const char *field = found.architecture != model_.architecture           ? "architecture"
                        : found.hidden_size != model_.hidden_size           ? "hidden size"
                        : found.n_layers != model_.n_layers                 ? "number of layers"
                        : found.vocab_size != model_.vocab_size             ? "vocabulary size"
                        : found.tokenizer_digest != model_.tokenizer_digest ? "tokenizer digest"
                        : found.site != model_.site                         ? "site"
                                                                            : nullptr;
    if (field != nullptr) {
      return Error{Status::model_mismatch, std::string("these directions belong to another model: by its ") + field};
    }
    const bool same = found.weights_digest == model_.weights_digest && found.quantization == model_.quantization;
    return same ? Identity::exact : Identity::variant;
  }

  Result<Probe> probe(std::uint32_t layer) const {
    for (const Layer &each : layers_) {
      if (each.layer != layer) continue;
      Probe probe;
      probe.layer_ = each;
      double squares = 0;
      for (float x : each.direction) squares += double{x} * double{x};
      const double norm = std::sqrt(squares);
      for (std::size_t i = 0; i < each.direction.size(); ++i) {
        probe.unit_.push_back(static_cast<float>(double{each.direction[i]} / norm));
        probe.offset_ += double{each.aligned_mean[i]} * double{probe.unit_[i]};
      }
      probe.causal_ = causal_at(layer);
      probe.content_ = content_at(layer);
      probe.verified_ = verified_;
      probe.digest_ = digest_;
      return probe;
    }
    return Error{Status::layer_not_found, "no direction for layer " + std::to_string(layer)};
  }

 private:
  Directions() = default;

  /// Rule 14; the tensors are sorted by layer, each direction before its mean.
  static std::string read_values(const detail::Container &file, const unsigned char *bytes,
                                 detail::ManifestReader &to) {
    if (file.tensors.size() != 2 * to.layers.size()) return "the tensors are of other layers than the manifest";
    for (std::size_t i = 0; i < file.tensors.size(); ++i) {
      const detail::Tensor &tensor = file.tensors[i];
      Layer &layer = to.layers[i / 2];
      const std::string name = "a tensor of layer " + std::to_string(tensor.layer);
      if (tensor.layer != layer.layer) return name + " is of none of the manifest's layers";
      if (tensor.end - tensor.begin != 4 * std::uint64_t{to.model.hidden_size}) return name + " has another width";
      std::vector<float> &values = tensor.is_mean ? layer.aligned_mean : layer.direction;
      bool zero = true;
      for (std::uint64_t at = tensor.begin; at < tensor.end; at += 4) {
        const unsigned char *p = bytes + file.data_start + at;
        std::uint32_t word = 0;
        for (std::size_t i = 4; i-- > 0;) word = word << 8 | p[i];
        values.push_back(detail::bits<float>(word));
        if (!detail::finite(values.back())) return name + " holds a NaN or an infinity";
        zero = zero && values.back() == 0;
      }
      if (zero && !tensor.is_mean) return name + " is zero everywhere; extract it again";
    }
    return {};
  }

  Model model_;
  std::vector<Layer> layers_;
  detail::Evidence evidence_;
  Digest digest_{};
  bool verified_ = false;
};

/// Watches one sequence. Token 1 is the last token of the prompt. The statistic over the first `horizon` tokens is
/// frozen at each horizon of the file, and a verdict speaks for the largest one reached.
class Monitor {
 public:
  /// With the thresholds of that statistic and false-positive rate per sequence.
  static Result<Monitor> make(const Probe &probe, Aggregation aggregation, double rate) {
    const bool known = aggregation >= Aggregation::mean && aggregation <= Aggregation::last;
    if (!known) return Error{Status::invalid_argument, "invalid argument: the aggregation is none"};
    Monitor out;
    for (const Threshold &each : probe.layer_.thresholds) {
      const bool same = each.statistic == aggregation && std::fabs(each.rate - rate) <= 1e-9 * std::fabs(rate);
      if (same) out.thresholds_.push_back(each);
    }
    if (out.thresholds_.empty()) {
      return Error{Status::rate_unsupported, "the file has no threshold for this statistic at this rate"};
    }
    const auto earlier = [](const Threshold &a, const Threshold &b) { return a.horizon < b.horizon; };
    std::sort(out.thresholds_.begin(), out.thresholds_.end(), earlier);
    for (std::size_t i = 1; i < out.thresholds_.size(); ++i) {
      const bool repeated = out.thresholds_[i - 1].horizon == out.thresholds_[i].horizon;
      if (repeated) return Error{Status::schema, "two thresholds are for the same rate and horizon"};
    }
    out.fixed_.aggregation = aggregation;
    out.fixed_.layer = probe.layer();
    out.fixed_.verified = probe.verified_;
    out.fixed_.digest = probe.digest_;
    out.content_specific_ = probe.content_ == Specificity::specific;
    return out;
  }

  /// Takes the scores of the next tokens, in aligned standard deviations. One that is not finite makes every verdict
  /// invalid until `reset`; all are taken in nevertheless.
  Status push(const float *scores, std::size_t count) noexcept {
    if (count > 0 && scores == nullptr) return Status::invalid_argument;
    Status outcome = Status::ok;
    for (std::size_t i = 0; i < count; ++i) {
      if (!detail::finite(scores[i])) outcome = Status::non_finite;
      push(double{scores[i]});
    }
    invalid_ = invalid_ || outcome != Status::ok;
    return outcome;
  }

  Verdict verdict() const noexcept {
    Verdict out = fixed_;
    out.tokens = tokens_;
    if (invalid_ || tokens_ == 0) return out;
    const Threshold &threshold = thresholds_[next_ == 0 ? 0 : next_ - 1];
    const double reached = next_ == 0 ? statistic() : frozen_;
    out.state = next_ == 0 ? State::pending : reached > threshold.z ? State::flagged : State::clean;
    out.misalignment = out.state == State::flagged && content_specific_;
    out.score = static_cast<float>(reached);
    out.threshold = static_cast<float>(threshold.z);
    out.rate = threshold.rate;
    out.rate_upper = threshold.rate_upper;
    out.horizon = threshold.horizon;
    return out;
  }

  /// Forgets the sequence, to start another.
  void reset() noexcept {
    tokens_ = 0;
    sum_ = largest_ = last_ = frozen_ = 0;
    next_ = 0;
    invalid_ = false;
  }

 private:
  Monitor() = default;

  void push(double z) noexcept {
    largest_ = tokens_ == 0 || z > largest_ ? z : largest_;
    tokens_ += tokens_ < UINT32_MAX;
    sum_ += z;
    last_ = z;
    if (next_ < thresholds_.size() && thresholds_[next_].horizon == tokens_) {
      frozen_ = statistic();
      ++next_;
    }
  }

  double statistic() const noexcept {
    switch (fixed_.aggregation) {
      case Aggregation::max: return largest_;
      case Aggregation::last: return last_;
      default: return sum_ / static_cast<double>(tokens_);
    }
  }

  std::vector<Threshold> thresholds_;
  Verdict fixed_;
  bool content_specific_ = false, invalid_ = false;
  std::uint32_t tokens_ = 0;
  std::size_t next_ = 0;
  double sum_ = 0, largest_ = 0, last_ = 0, frozen_ = 0;
};

}  // namespace emaudit::standalone

#endif  // EMAUDIT_STANDALONE_HPP
