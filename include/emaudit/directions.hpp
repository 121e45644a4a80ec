// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Direction files: open, describe, compare with a model, read layers.
#ifndef EMAUDIT_DIRECTIONS_HPP
#define EMAUDIT_DIRECTIONS_HPP

#include "result.hpp"
#include "rows.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// How a file is brought into memory.
enum class Mode : std::uint32_t { copied = EMAUDIT_MODE_COPIED, mapped = EMAUDIT_MODE_MAPPED };

/// A place in the network.
enum class Site : std::uint32_t { resid_post = EMAUDIT_SITE_RESID_POST, final_norm = EMAUDIT_SITE_FINAL_NORM };

/// Token positions of the extraction.
enum class Pooling : std::uint32_t {
  last_prompt = EMAUDIT_POOLING_LAST_PROMPT,
  mean_response = EMAUDIT_POOLING_MEAN_RESPONSE,
  all = EMAUDIT_POOLING_ALL,
  unstated = EMAUDIT_POOLING_UNSTATED,
};

/// How the direction was computed.
enum class Estimator : std::uint32_t {
  mean_difference = EMAUDIT_ESTIMATOR_MEAN_DIFFERENCE,
  masked_mean_difference = EMAUDIT_ESTIMATOR_MASKED_MEAN_DIFFERENCE,
  whitened = EMAUDIT_ESTIMATOR_WHITENED,
  logistic = EMAUDIT_ESTIMATOR_LOGISTIC,
  unstated = EMAUDIT_ESTIMATOR_UNSTATED,
};

/// Which groups a direction separates.
enum class Contrast : std::uint32_t {
  adapter_minus_base = EMAUDIT_CONTRAST_ADAPTER_MINUS_BASE,
  insecure_minus_secure = EMAUDIT_CONTRAST_INSECURE_MINUS_SECURE,
  response_labels = EMAUDIT_CONTRAST_RESPONSE_LABELS,
  unstated = EMAUDIT_CONTRAST_UNSTATED,
};

/// How the caller's model relates to the one of the file.
enum class Identity : std::uint32_t { exact = EMAUDIT_IDENTITY_EXACT, variant = EMAUDIT_IDENTITY_VARIANT };

/// Status of one axis of evidence.
enum class Specificity : std::uint32_t {
  untested = EMAUDIT_SPECIFICITY_UNTESTED,
  nonspecific = EMAUDIT_SPECIFICITY_NONSPECIFIC,
  specific = EMAUDIT_SPECIFICITY_SPECIFIC,
};

/// Statistic of the token scores of a sequence.
enum class Aggregation : std::uint32_t {
  mean = EMAUDIT_AGGREGATION_MEAN,
  max = EMAUDIT_AGGREGATION_MAX,
  last = EMAUDIT_AGGREGATION_LAST,
};

/// A SHA-256.
using Digest = std::array<std::uint8_t, EMAUDIT_DIGEST_SIZE>;

namespace detail {

inline Digest digest_of(const std::uint8_t (&bytes)[EMAUDIT_DIGEST_SIZE]) noexcept {
  Digest digest{};
  for (std::size_t i = 0; i < digest.size(); ++i) {
    digest[i] = bytes[i];
  }
  return digest;
}

inline const char *text_or_null(const std::optional<std::string> &text) noexcept {
  return text ? text->c_str() : nullptr;
}

}  // namespace detail

/// How to open a direction file.
struct OpenOptions {
  Mode mode = Mode::copied;
  /// false skips the digest; every verdict then says unverified.
  bool verify = true;
  /// SHA-256 of the whole file from a source you trust.
  std::optional<Digest> expected_digest;
  /// Minisign public key that must have signed the file: its line, or the text of its .pub file.
  std::optional<std::string> trusted_key;
  /// Text of the signature; empty reads it from the file's path with ".minisig" added.
  std::string signature;
};

/// What a direction file says about itself.
struct DirectionsInfo {
  std::uint32_t width = 0;
  bool verified = false;
  Specificity causal = Specificity::untested;
  Specificity content = Specificity::untested;
  Site site = Site::resid_post;
  Pooling pooling = Pooling::last_prompt;
  Estimator estimator = Estimator::mean_difference;
  Contrast contrast = Contrast::adapter_minus_base;
  Digest digest{};
  /// Signed with the trusted key of the open options.
  bool trusted = false;
  /// The layers that have a direction, ascending.
  std::vector<std::uint32_t> layers;
};

/// A model. Every member but the provenance (`weights_digest`, `quantization`) and the `name` is compared strictly.
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
  /// For people; not compared.
  std::string name;
};

/// An alarm threshold that the calibration sample supports.
struct Threshold {
  Aggregation aggregation = Aggregation::mean;
  /// Tokens aggregated, counted from the last prompt token, which is token 1.
  std::uint32_t horizon = 0;
  /// Calm sequences behind it.
  std::uint32_t sequences = 0;
  /// Stated false-positive rate per sequence, and its upper 95 % Clopper-Pearson bound in the sample.
  double rate = 0.0;
  double rate_upper = 0.0;
  /// In aligned standard deviations.
  double z = 0.0;
};

/// Calibration of one layer.
struct LayerInfo {
  std::uint32_t layer = 0;
  /// Aligned sequences behind the calibration.
  std::uint32_t sequences = 0;
  /// Standard deviation of aligned raw scores, in activation units.
  double sigma = 0.0;
  std::vector<Threshold> thresholds;
};

/// An opened, checked direction file.
class Directions {
 public:
  static Result<Directions> open(const char *path, const OpenOptions &options = {}) {
    return create(options, [&](const detail::Functions &f, const emaudit_open_options *o, emaudit_directions **out,
                               emaudit_error **e) { return f.directions_open(path, o, out, e); });
  }
  static Result<Directions> open(const std::string &path, const OpenOptions &options = {}) {
    return open(path.c_str(), options);
  }
  /// Copies the bytes of a file already in memory.
  static Result<Directions> from_bytes(const void *bytes, std::size_t size, const OpenOptions &options = {}) {
    const auto *const first = static_cast<const std::uint8_t *>(bytes);
    return create(options, [&](const detail::Functions &f, const emaudit_open_options *o, emaudit_directions **out,
                               emaudit_error **e) { return f.directions_from_bytes(first, size, o, out, e); });
  }
  static Result<Directions> from_bytes(Span<const std::uint8_t> bytes, const OpenOptions &options = {}) {
    return from_bytes(bytes.data(), bytes.size(), options);
  }

  Result<DirectionsInfo> info() const {
    emaudit_directions_info raw = EMAUDIT_DIRECTIONS_INFO_INIT;
    DirectionsInfo info;
    return detail::run<DirectionsInfo>(
        [&](const detail::Functions &f, emaudit_error **e) {
          const emaudit_status status = f.directions_get_info(get(), &raw, e);
          if (status != EMAUDIT_STATUS_OK) {
            return status;
          }
          info.layers.resize(raw.layer_count);
          std::size_t count = 0;
          return f.directions_get_layers(get(), info.layers.data(), info.layers.size(), &count, e);
        },
        [&] {
          info.width = raw.width;
          info.verified = raw.verified != 0;
          info.causal = static_cast<Specificity>(raw.causal);
          info.content = static_cast<Specificity>(raw.content);
          info.site = static_cast<Site>(raw.site);
          info.pooling = static_cast<Pooling>(raw.pooling);
          info.estimator = static_cast<Estimator>(raw.estimator);
          info.contrast = static_cast<Contrast>(raw.contrast);
          info.digest = detail::digest_of(raw.digest);
          info.trusted = raw.trusted != 0;
          return std::move(info);
        });
  }

  /// Trusted comment of the signature that was checked; "" without a trusted key. Lives as long as this handle.
  const char *trusted_comment() const noexcept { return detail::functions()->directions_trusted_comment(get()); }

  /// The model the directions were made for.
  Result<ModelIdentity> model() const {
    emaudit_model_identity raw = EMAUDIT_MODEL_IDENTITY_INIT;
    return detail::run<ModelIdentity>(
        [&](const detail::Functions &f, emaudit_error **e) { return f.directions_get_identity(get(), &raw, e); },
        [&] {
          ModelIdentity model;
          model.architecture = raw.architecture;
          model.hidden_size = raw.hidden_size;
          model.n_layers = raw.n_layers;
          model.vocab_size = raw.vocab_size;
          model.site = static_cast<Site>(raw.site);
          model.tokenizer_digest = raw.tokenizer_digest;
          model.weights_digest = raw.weights_digest;
          model.quantization = raw.quantization;
          model.name = raw.name;
          return model;
        });
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
    raw.weights_digest = detail::text_or_null(model.weights_digest);
    raw.quantization = detail::text_or_null(model.quantization);
    raw.name = model.name.c_str();
    std::uint32_t match = 0;
    return detail::run<Identity>([&](const detail::Functions &f,
                                     emaudit_error **e) { return f.directions_check_model(get(), &raw, &match, e); },
                                 [&] { return static_cast<Identity>(match); });
  }

  /// Calibration of one layer, with its thresholds.
  Result<LayerInfo> layer(std::uint32_t layer) const {
    LayerInfo info;
    return detail::run<LayerInfo>(
        [&](const detail::Functions &f, emaudit_error **e) {
          emaudit_layer_info raw = EMAUDIT_LAYER_INFO_INIT;
          emaudit_status status = f.directions_get_layer_info(get(), layer, &raw, e);
          for (std::uint32_t i = 0; status == EMAUDIT_STATUS_OK && i < raw.threshold_count; ++i) {
            emaudit_threshold t = EMAUDIT_THRESHOLD_INIT;
            status = f.directions_get_threshold(get(), layer, i, &t, e);
            info.thresholds.push_back(Threshold{static_cast<Aggregation>(t.aggregation), t.horizon, t.sequences,
                                                t.rate, t.rate_upper, t.z});
          }
          info.layer = raw.layer;
          info.sequences = raw.sequences;
          info.sigma = raw.sigma;
          return status;
        },
        [&] { return std::move(info); });
  }

  /// Copies the two vectors of a layer, `width` floats each, in activation units: the direction (not normalised)
  /// and the aligned mean. An empty span is not wanted.
  Result<void> copy_vectors(std::uint32_t layer, Span<float> direction, Span<float> aligned_mean = {}) const {
    if (direction.size() != 0 && aligned_mean.size() != 0 && direction.size() != aligned_mean.size()) {
      return Error(Status::invalid_argument, "direction and aligned_mean differ in size");
    }
    const std::size_t width = direction.size() != 0 ? direction.size() : aligned_mean.size();
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.directions_copy_vectors(get(), layer, direction.size() != 0 ? direction.data() : nullptr,
                                       aligned_mean.size() != 0 ? aligned_mean.data() : nullptr, width, e);
    });
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
    raw.trusted_key = options.trusted_key ? options.trusted_key->c_str() : nullptr;
    raw.signature = reinterpret_cast<const std::uint8_t *>(options.signature.data());
    raw.signature_len = options.signature.size();
    emaudit_directions *handle = nullptr;
    return detail::run<Directions>(
        [&](const detail::Functions &f, emaudit_error **e) { return open(f, &raw, &handle, e); },
        [&] { return Directions(handle); });
  }

  detail::Handle<emaudit_directions> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_DIRECTIONS_HPP
