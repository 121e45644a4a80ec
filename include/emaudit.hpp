// SPDX-License-Identifier: MIT OR Apache-2.0
//
// emaudit for C++17: owning handles and typed results over the C interface in emaudit.h. Header-only, needs
// the standard library and emaudit.h, works with and without exceptions and RTTI.
//
//   auto directions = emaudit::Directions::open("model.safetensors");
//   if (!directions) { std::fprintf(stderr, "%s\n", directions.error().message()); return 1; }
//   auto probe = emaudit::Probe::make(*directions, 12);
//   ...
//   if (auto scored = probe->score(emaudit::Rows::f32(h, n, width), scores); !scored) { ... }
//
// Handles are move-only; a moved-from handle may only be destroyed or assigned to. What is made from a handle
// keeps what it needs, so any order of destruction is fine. Const member functions may be called from several
// threads at once; a Monitor belongs to one thread at a time. emaudit.h documents every operation in full.
#ifndef EMAUDIT_HPP
#define EMAUDIT_HPP

#include "emaudit.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace emaudit {

/// Outcome of a call. Treat every unknown value other than `ok` as a failure.
enum class Status : std::int32_t {
  ok = EMAUDIT_STATUS_OK,
  invalid_argument = EMAUDIT_STATUS_INVALID_ARGUMENT,
  io = EMAUDIT_STATUS_IO,
  not_a_direction_file = EMAUDIT_STATUS_NOT_A_DIRECTION_FILE,
  truncated = EMAUDIT_STATUS_TRUNCATED,
  malformed = EMAUDIT_STATUS_MALFORMED,
  unsupported_version = EMAUDIT_STATUS_UNSUPPORTED_VERSION,
  digest_mismatch = EMAUDIT_STATUS_DIGEST_MISMATCH,
  schema = EMAUDIT_STATUS_SCHEMA,
  model_mismatch = EMAUDIT_STATUS_MODEL_MISMATCH,
  width_mismatch = EMAUDIT_STATUS_WIDTH_MISMATCH,
  layer_not_found = EMAUDIT_STATUS_LAYER_NOT_FOUND,
  non_finite = EMAUDIT_STATUS_NON_FINITE,
  not_specific = EMAUDIT_STATUS_NOT_SPECIFIC,
  rate_unsupported = EMAUDIT_STATUS_RATE_UNSUPPORTED,
  kernel_unavailable = EMAUDIT_STATUS_KERNEL_UNAVAILABLE,
  panic = EMAUDIT_STATUS_PANIC,
  not_calibrated = EMAUDIT_STATUS_NOT_CALIBRATED,
};

/// How a file is brought into memory.
enum class Mode : std::uint32_t { copied = EMAUDIT_MODE_COPIED, mapped = EMAUDIT_MODE_MAPPED };

/// An implementation of the arithmetic.
enum class Kernel : std::uint32_t {
  best = EMAUDIT_KERNEL_DEFAULT,
  scalar = EMAUDIT_KERNEL_SCALAR,
  portable = EMAUDIT_KERNEL_PORTABLE,
  avx2 = EMAUDIT_KERNEL_AVX2,
  avx512 = EMAUDIT_KERNEL_AVX512,
};

/// Unit of a score.
enum class Unit : std::uint32_t { aligned_sd = EMAUDIT_UNIT_ALIGNED_SD, raw = EMAUDIT_UNIT_RAW };

/// What became of one row.
enum class RowStatus : std::uint8_t {
  ok = EMAUDIT_ROW_OK,
  non_finite = EMAUDIT_ROW_NON_FINITE,
  gated = EMAUDIT_ROW_GATED,
  limited = EMAUDIT_ROW_LIMITED,
};

/// A place in the network.
enum class Site : std::uint32_t { resid_post = EMAUDIT_SITE_RESID_POST, final_norm = EMAUDIT_SITE_FINAL_NORM };

/// How the caller's model relates to the one of the file.
enum class Identity : std::uint32_t { exact = EMAUDIT_IDENTITY_EXACT, variant = EMAUDIT_IDENTITY_VARIANT };

/// Status of one axis of evidence.
enum class Specificity : std::uint32_t {
  untested = EMAUDIT_SPECIFICITY_UNTESTED,
  nonspecific = EMAUDIT_SPECIFICITY_NONSPECIFIC,
  specific = EMAUDIT_SPECIFICITY_SPECIFIC,
};

/// How rows are edited.
enum class Operation : std::uint32_t {
  subtract = EMAUDIT_OPERATION_SUBTRACT,
  project_out = EMAUDIT_OPERATION_PROJECT_OUT,
  clamp = EMAUDIT_OPERATION_CLAMP,
};

/// Statistic of the token scores of a sequence.
enum class Aggregation : std::uint32_t {
  mean = EMAUDIT_AGGREGATION_MEAN,
  max = EMAUDIT_AGGREGATION_MAX,
  last = EMAUDIT_AGGREGATION_LAST,
};

/// What is known about a sequence. Only `clean` is clean.
enum class State : std::uint32_t {
  invalid = EMAUDIT_STATE_INVALID,
  pending = EMAUDIT_STATE_PENDING,
  clean = EMAUDIT_STATE_CLEAN,
  flagged = EMAUDIT_STATE_FLAGGED,
};

/// A SHA-256.
using Digest = std::array<std::uint8_t, EMAUDIT_DIGEST_SIZE>;

/// Name of a status, such as "TRUNCATED".
inline const char *name(Status status) noexcept {
  return emaudit_status_name(static_cast<emaudit_status>(status));
}

/// Name of a kernel, such as "avx2".
inline const char *name(Kernel kernel) noexcept {
  return emaudit_kernel_name(static_cast<std::uint32_t>(kernel));
}

/// Whether the loaded library has the ABI this header was written for.
inline bool abi_matches() noexcept { return emaudit_abi_version() == EMAUDIT_ABI_VERSION; }

namespace detail {

template <class T, void (*Free)(T *)>
struct Deleter {
  void operator()(T *pointer) const noexcept { Free(pointer); }
};

template <class T, void (*Free)(T *)>
using Handle = std::unique_ptr<T, Deleter<T, Free>>;

[[noreturn]] inline void no_value(const char *message) noexcept {
  std::fprintf(stderr, "emaudit: the value of a failed result was used: %s\n", message);
  std::abort();
}

inline Digest digest_of(const std::uint8_t (&bytes)[EMAUDIT_DIGEST_SIZE]) noexcept {
  Digest digest{};
  for (std::size_t i = 0; i < digest.size(); ++i) {
    digest[i] = bytes[i];
  }
  return digest;
}

}  // namespace detail

/// Status and sentence of a failed call. Move-only.
class Error {
 public:
  Error(emaudit_status status, emaudit_error *handle) noexcept : status_(status), handle_(handle) {}

  Status status() const noexcept { return static_cast<Status>(status_); }

  /// One English sentence; lives as long as the error.
  const char *message() const noexcept {
    return handle_ ? emaudit_error_message(handle_.get()) : emaudit_status_name(status_);
  }

 private:
  emaudit_status status_;
  detail::Handle<emaudit_error, emaudit_error_free> handle_;
};

/// A value or an error. Using the value of a failed result aborts the process with its message.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : content_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) noexcept : content_(std::in_place_index<1>, std::move(error)) {}

  bool has_value() const noexcept { return content_.index() == 0; }
  explicit operator bool() const noexcept { return has_value(); }
  Status status() const noexcept { return has_value() ? Status::ok : error().status(); }

  T &value() & noexcept { return *checked(); }
  const T &value() const & noexcept { return *const_cast<Result *>(this)->checked(); }
  T value() && noexcept { return std::move(*checked()); }
  T &operator*() & noexcept { return value(); }
  const T &operator*() const & noexcept { return value(); }
  T *operator->() noexcept { return checked(); }
  const T *operator->() const noexcept { return const_cast<Result *>(this)->checked(); }

  /// The error of a failed result; aborts on a good one.
  const Error &error() const noexcept {
    if (has_value()) {
      detail::no_value("error() of a result that is OK");
    }
    return *std::get_if<1>(&content_);
  }

 private:
  T *checked() noexcept {
    if (!has_value()) {
      detail::no_value(error().message());
    }
    return std::get_if<0>(&content_);
  }

  std::variant<T, Error> content_;
};

/// Success or an error.
template <>
class [[nodiscard]] Result<void> {
 public:
  Result() noexcept = default;
  Result(Error error) noexcept : error_(std::move(error)) {}

  bool has_value() const noexcept { return !error_.has_value(); }
  explicit operator bool() const noexcept { return has_value(); }
  Status status() const noexcept { return error_ ? error_->status() : Status::ok; }

  /// The error of a failed result; aborts on a good one.
  const Error &error() const noexcept {
    if (!error_) {
      detail::no_value("error() of a result that is OK");
    }
    return *error_;
  }

 private:
  std::optional<Error> error_;
};

namespace detail {

/// Runs a call that takes `emaudit_error **` last and gives `make()` when it succeeds.
template <class T, class Call, class Make>
Result<T> run(Call &&call, Make &&make) {
  emaudit_error *error = nullptr;
  const emaudit_status status = call(&error);
  if (status != EMAUDIT_STATUS_OK) {
    return Error(status, error);
  }
  return make();
}

template <class Call>
Result<void> run(Call &&call) {
  return run<void>(std::forward<Call>(call), [] { return Result<void>(); });
}

}  // namespace detail

/// Rows to read: `rows` x `cols`, row i at element i * `row_stride` (0 means `cols`). Borrows the memory.
class Rows {
 public:
  static Rows f32(const float *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_F32, data, rows, cols, row_stride);
  }
  /// IEEE binary16 elements.
  static Rows f16(const void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_F16, data, rows, cols, row_stride);
  }
  static Rows bf16(const void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return Rows(EMAUDIT_DTYPE_BF16, data, rows, cols, row_stride);
  }

  std::size_t rows() const noexcept { return tensor_.rows; }
  const emaudit_tensor *c_tensor() const noexcept { return &tensor_; }

 private:
  // The C struct serves reading and editing; what only reads never writes through it.
  Rows(std::uint32_t dtype, const void *data, std::size_t rows, std::size_t cols, std::size_t stride) noexcept {
    tensor_.dtype = dtype;
    tensor_.data = const_cast<void *>(data);
    tensor_.rows = rows;
    tensor_.cols = cols;
    tensor_.row_stride = stride;
  }

  emaudit_tensor tensor_ = EMAUDIT_TENSOR_INIT;
};

/// Rows to edit in place. Borrows the memory.
class MutableRows {
 public:
  static MutableRows f32(float *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::f32(data, rows, cols, row_stride));
  }
  /// IEEE binary16 elements.
  static MutableRows f16(void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::f16(data, rows, cols, row_stride));
  }
  static MutableRows bf16(void *data, std::size_t rows, std::size_t cols, std::size_t row_stride = 0) noexcept {
    return MutableRows(Rows::bf16(data, rows, cols, row_stride));
  }

  /// The same rows, to read.
  const Rows &as_rows() const noexcept { return rows_; }
  const emaudit_tensor *c_tensor() const noexcept { return rows_.c_tensor(); }

 private:
  explicit MutableRows(Rows rows) noexcept : rows_(rows) {}
  Rows rows_;
};

/// How to open a direction file.
struct OpenOptions {
  Mode mode = Mode::copied;
  /// false skips the digest; every verdict then says unverified.
  bool verify = true;
  /// SHA-256 of the whole file from a source you trust.
  std::optional<Digest> expected_digest;
};

/// What a direction file says about itself.
struct DirectionsInfo {
  std::uint32_t width = 0;
  bool verified = false;
  Specificity causal = Specificity::untested;
  Specificity content = Specificity::untested;
  Site site = Site::resid_post;
  Digest digest{};
  std::vector<std::uint32_t> layers;
};

/// The caller's model. Every member but the digests of the provenance tier is compared strictly.
struct ModelIdentity {
  std::string architecture;
  std::uint32_t hidden_size = 0;
  std::uint32_t n_layers = 0;
  std::uint32_t vocab_size = 0;
  Site site = Site::resid_post;
  std::string tokenizer_digest;
  /// Unknown makes the model a variant.
  std::optional<std::string> weights_digest;
  std::optional<std::string> quantization;
};

/// An opened, checked direction file.
class Directions {
 public:
  static Result<Directions> open(const char *path, const OpenOptions &options = {}) {
    return create(options, [&](const emaudit_open_options *o, emaudit_directions **out, emaudit_error **e) {
      return emaudit_directions_open(path, o, out, e);
    });
  }
  static Result<Directions> open(const std::string &path, const OpenOptions &options = {}) {
    return open(path.c_str(), options);
  }
  /// Copies the bytes of a file already in memory.
  static Result<Directions> from_bytes(const void *bytes, std::size_t size, const OpenOptions &options = {}) {
    return create(options, [&](const emaudit_open_options *o, emaudit_directions **out, emaudit_error **e) {
      return emaudit_directions_from_bytes(static_cast<const std::uint8_t *>(bytes), size, o, out, e);
    });
  }

  Result<DirectionsInfo> info() const {
    emaudit_directions_info raw = EMAUDIT_DIRECTIONS_INFO_INIT;
    emaudit_error *error = nullptr;
    emaudit_status status = emaudit_directions_get_info(get(), &raw, &error);
    if (status != EMAUDIT_STATUS_OK) {
      return Error(status, error);
    }
    DirectionsInfo info;
    info.width = raw.width;
    info.verified = raw.verified != 0;
    info.causal = static_cast<Specificity>(raw.causal);
    info.content = static_cast<Specificity>(raw.content);
    info.site = static_cast<Site>(raw.site);
    info.digest = detail::digest_of(raw.digest);
    info.layers.resize(raw.layer_count);
    std::size_t count = 0;
    status = emaudit_directions_get_layers(get(), info.layers.data(), info.layers.size(), &count, &error);
    if (status != EMAUDIT_STATUS_OK) {
      return Error(status, error);
    }
    return info;
  }

  /// Exact or variant; model_mismatch when the directions belong to another model.
  Result<Identity> check_model(const ModelIdentity &model) const {
    emaudit_model_identity raw = EMAUDIT_MODEL_IDENTITY_INIT;
    raw.hidden_size = model.hidden_size;
    raw.n_layers = model.n_layers;
    raw.vocab_size = model.vocab_size;
    raw.site = static_cast<std::uint32_t>(model.site);
    raw.architecture = model.architecture.c_str();
    raw.tokenizer_digest = model.tokenizer_digest.c_str();
    raw.weights_digest = model.weights_digest ? model.weights_digest->c_str() : nullptr;
    raw.quantization = model.quantization ? model.quantization->c_str() : nullptr;
    std::uint32_t match = 0;
    return detail::run<Identity>(
        [&](emaudit_error **e) { return emaudit_directions_check_model(get(), &raw, &match, e); },
        [&] { return static_cast<Identity>(match); });
  }

  const emaudit_directions *get() const noexcept { return handle_.get(); }

 private:
  explicit Directions(emaudit_directions *handle) noexcept : handle_(handle) {}

  template <class Open>
  static Result<Directions> create(const OpenOptions &options, Open &&open) {
    emaudit_open_options raw = EMAUDIT_OPEN_OPTIONS_INIT;
    raw.mode = static_cast<std::uint32_t>(options.mode);
    raw.skip_verify = options.verify ? 0 : 1;
    raw.expected_digest = options.expected_digest ? options.expected_digest->data() : nullptr;
    emaudit_directions *handle = nullptr;
    return detail::run<Directions>([&](emaudit_error **e) { return open(&raw, &handle, e); },
                                   [&] { return Directions(handle); });
  }

  detail::Handle<emaudit_directions, emaudit_directions_free> handle_;
};

/// One layer's direction, bound to a kernel.
class Probe {
 public:
  static Result<Probe> make(const Directions &directions, std::uint32_t layer, Kernel kernel = Kernel::best) {
    emaudit_probe_options options = EMAUDIT_PROBE_OPTIONS_INIT;
    options.kernel = static_cast<std::uint32_t>(kernel);
    emaudit_probe *handle = nullptr;
    return detail::run<Probe>(
        [&](emaudit_error **e) { return emaudit_probe_new(directions.get(), layer, &options, &handle, e); },
        [&] { return Probe(handle); });
  }

  /// Scores every row: `scores`, and `status` unless null, have one element per row. non_finite means that
  /// the flagged rows could not be scored; all other scores were written.
  Result<void> score(const Rows &rows, float *scores, Unit unit = Unit::aligned_sd,
                     RowStatus *status = nullptr) const {
    return detail::run([&](emaudit_error **e) {
      return emaudit_probe_score(get(), rows.c_tensor(), static_cast<std::uint32_t>(unit), scores,
                                 reinterpret_cast<std::uint8_t *>(status), e);
    });
  }

  std::uint32_t width() const noexcept { return info().width; }
  std::uint32_t layer() const noexcept { return info().layer; }
  /// The kernel in use, never `best`.
  Kernel kernel() const noexcept { return static_cast<Kernel>(info().kernel); }
  const emaudit_probe *get() const noexcept { return handle_.get(); }

 private:
  explicit Probe(emaudit_probe *handle) noexcept : handle_(handle) {}

  emaudit_probe_info info() const noexcept {
    emaudit_probe_info info = EMAUDIT_PROBE_INFO_INIT;
    (void)emaudit_probe_get_info(get(), &info, nullptr);
    return info;
  }

  detail::Handle<emaudit_probe, emaudit_probe_free> handle_;
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
        [&](emaudit_error **e) { return emaudit_steering_new(probe.get(), &raw, &handle, e); },
        [&] { return Steering(handle); });
  }

  /// Edits every row in place. `strengths` and `status`, unless null, have one element per row; `report` is
  /// also written when the result is non_finite.
  Result<void> apply(const MutableRows &rows, SteerReport *report = nullptr, const float *strengths = nullptr,
                     RowStatus *status = nullptr) const {
    return reported(report, [&](emaudit_steer_report *raw, emaudit_error **e) {
      return emaudit_steering_apply(get(), rows.c_tensor(), strengths, reinterpret_cast<std::uint8_t *>(status),
                                    raw, e);
    });
  }

  /// Scores every row as it was, then edits it, in one pass.
  Result<void> score_and_apply(const MutableRows &rows, float *scores, Unit unit = Unit::aligned_sd,
                               SteerReport *report = nullptr, const float *strengths = nullptr,
                               RowStatus *status = nullptr) const {
    return reported(report, [&](emaudit_steer_report *raw, emaudit_error **e) {
      return emaudit_steering_score_and_apply(get(), rows.c_tensor(), static_cast<std::uint32_t>(unit), scores,
                                              strengths, reinterpret_cast<std::uint8_t *>(status), raw, e);
    });
  }

  const emaudit_steering *get() const noexcept { return handle_.get(); }

 private:
  explicit Steering(emaudit_steering *handle) noexcept : handle_(handle) {}

  template <class Call>
  static Result<void> reported(SteerReport *report, Call &&call) {
    emaudit_steer_report raw = EMAUDIT_STEER_REPORT_INIT;
    Result<void> result = detail::run([&](emaudit_error **e) { return call(&raw, e); });
    const bool written = result.has_value() || result.status() == Status::non_finite;
    if (report != nullptr && written) {
      *report = SteerReport{raw.rows, raw.touched, raw.gated, raw.limited, raw.nonfinite, raw.largest_dose};
    }
    return result;
  }

  detail::Handle<emaudit_steering, emaudit_steering_free> handle_;
};

/// What is known about a sequence; default-constructed it is invalid.
struct Verdict {
  State state = State::invalid;
  /// Flagged by a direction whose content evidence is specific.
  bool misalignment = false;
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
        [&](emaudit_error **e) { return emaudit_monitor_new(probe.get(), &options, &handle, e); },
        [&] { return Monitor(handle); });
  }

  /// Adds the scores of the next tokens, in aligned standard deviations; token 1 is the last prompt token.
  Result<void> push(const float *scores, std::size_t count) {
    return detail::run([&](emaudit_error **e) { return emaudit_monitor_push(handle_.get(), scores, count, e); });
  }
  Result<void> push(float score) { return push(&score, 1); }

  /// The verdict so far; invalid when it cannot be read.
  Verdict verdict() const noexcept {
    emaudit_verdict raw = EMAUDIT_VERDICT_INIT;
    if (emaudit_monitor_get_verdict(handle_.get(), &raw, nullptr) != EMAUDIT_STATUS_OK) {
      return Verdict();
    }
    Verdict verdict;
    verdict.state = static_cast<State>(raw.state);
    verdict.misalignment = raw.misalignment != 0;
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
    return detail::run([&](emaudit_error **e) { return emaudit_monitor_reset(handle_.get(), e); });
  }

  const emaudit_monitor *get() const noexcept { return handle_.get(); }

 private:
  explicit Monitor(emaudit_monitor *handle) noexcept : handle_(handle) {}

  detail::Handle<emaudit_monitor, emaudit_monitor_free> handle_;
};

/// The kernels this CPU can run, slowest first.
inline std::vector<Kernel> kernels() {
  std::size_t count = 0;
  if (emaudit_kernel_list(nullptr, 0, &count, nullptr) != EMAUDIT_STATUS_OK) {
    return {};
  }
  std::vector<std::uint32_t> numbers(count);
  if (emaudit_kernel_list(numbers.data(), numbers.size(), &count, nullptr) != EMAUDIT_STATUS_OK) {
    return {};
  }
  std::vector<Kernel> list;
  for (const std::uint32_t number : numbers) {
    list.push_back(static_cast<Kernel>(number));
  }
  return list;
}

}  // namespace emaudit

#endif  // EMAUDIT_HPP
