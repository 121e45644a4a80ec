// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The manifest: its shape, and the rules of FORMAT.md by number and evidence. Part of emaudit/standalone.hpp.
#ifndef EMAUDIT_STANDALONE_MANIFEST_HPP
#define EMAUDIT_STANDALONE_MANIFEST_HPP

#include "container.hpp"
#include "json.hpp"
#include "types.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace emaudit::standalone::detail {

struct Evidence {
  Specificity causal{}, content{};
  std::optional<std::uint32_t> layer;  // of the cell
};

/// Reads and checks the manifest. The first thing wrong is kept; what is read after it is of no use.
class ManifestReader {
 public:
  Model model;
  std::vector<Layer> layers;
  Evidence evidence;
  std::string wrong;

  void read(const std::string &text) {
    const Object root = members(text);
    read_model(object(root, "model"));
    model.site = static_cast<Site>(word(root, "site", {"resid_post", "final_norm"}));
    word(root, "pooling", {"last_prompt", "mean_response", "all", "unstated"});
    word(root, "estimator", {"mean_difference", "masked_mean_difference", "whitened", "logistic", "unstated"});
    word(root, "contrast", {"adapter_minus_base", "insecure_minus_secure", "response_labels", "unstated"});
    for (Json item : array(root, "layers")) read_layer(as_object(item, "layers"));
    check_layers();
    read_evidence(object(root, "evidence"));
    read_provenance(object(root, "provenance"));
  }

 private:
  void rule(bool holds, const char *field, const char *must) {
    if (!holds && wrong.empty()) wrong = std::string(field) + " must be " + must;
  }

  Object as_object(Json value, const char *field) {
    rule(is(value, '{'), field, "an object");
    return is(value, '{') ? members(value) : Object{};
  }

  Object object(const Object &parent, const char *key) { return as_object(member(parent, key), key); }

  std::vector<Json> array(const Object &parent, const char *key) {
    const Json value = member(parent, key);
    rule(is(value, '['), key, "an array");
    return is(value, '[') ? values(value) : std::vector<Json>{};
  }

  /// Absent, or null.
  static bool without(const Object &parent, const char *key) {
    const Json value = member(parent, key);
    return value.empty() || value == "null";
  }

  double number(Json value, const char *field) {
    const bool holds = !value.empty() && (value[0] == '-' || (value[0] >= '0' && value[0] <= '9'));
    rule(holds, field, "a number");
    return holds ? decimal(value) : 0.0;
  }

  double number(const Object &parent, const char *key) { return number(member(parent, key), key); }

  /// A number that kernels hold as f32.
  double narrow(Json value, const char *field) {
    const double found = number(value, field);
    rule(std::fabs(found) <= double{FLT_MAX}, field, "within the range of f32");
    return found;
  }

  double between(Json value, const char *field, double low, double high) {
    const double found = number(value, field);
    rule(low <= found && found <= high, field, "within its range");
    return found;
  }

  double probability(Json value, const char *field) {
    const double found = number(value, field);
    rule(found > 0 && found < 1, field, "above 0 and below 1");
    return found;
  }

  std::uint32_t count(const Object &parent, const char *key, std::uint32_t least) {
    const auto found = integer_of(member(parent, key), 0xffffffff);
    rule(found && *found >= least, key, "an integer below 2^32, and not too small");
    return static_cast<std::uint32_t>(found.value_or(0));
  }

  std::string printable(Json value, const char *field) {
    const auto found = text_of(value);
    rule(found && is_printable(*found), field, "text, not blank and without control characters");
    return found.value_or("");
  }

  std::string digest(Json value, const char *field) {
    const auto found = text_of(value);
    rule(found && is_digest(*found), field, "a SHA-256 as 64 lower-case hex characters");
    return found.value_or("");
  }

  /// The number of a word, the first being 1.
  std::uint32_t word(const Object &parent, const char *key, std::initializer_list<const char *> words) {
    const auto found = text_of(member(parent, key));
    std::uint32_t number = 0;
    for (const char *each : words) {
      ++number;
      if (found && *found == each) return number;
    }
    rule(false, key, "one of the words of the format");
    return 0;
  }

  void read_model(const Object &from) {
    model.architecture = printable(member(from, "architecture"), "architecture");
    model.hidden_size = count(from, "hidden_size", 1);
    model.n_layers = count(from, "n_layers", 1);
    model.vocab_size = count(from, "vocab_size", 1);
    model.tokenizer_digest = digest(member(from, "tokenizer_digest"), "tokenizer_digest");
    model.weights_digest = digest(member(from, "weights_digest"), "weights_digest");
    model.quantization = printable(member(from, "quantization"), "quantization");
    model.name = printable(member(from, "name"), "name");
  }

  void read_layer(const Object &from) {
    Layer layer;
    layer.layer = count(from, "layer", 0);
    layer.calibrated = !without(from, "calibration");
    if (layer.calibrated) read_calibration(object(from, "calibration"), layer);
    layers.push_back(std::move(layer));
  }

  void read_calibration(const Object &calibration, Layer &layer) {
    layer.sigma = between(member(calibration, "sigma"), "sigma", double{FLT_MIN}, double{FLT_MAX});
    layer.sequences = count(calibration, "sequences", 2);
    const std::vector<Json> quantiles = array(calibration, "quantiles");
    rule(quantiles.size() <= 256, "quantiles", "at most 256");
    for (Json item : quantiles) {
      const std::vector<Json> pair = is(item, '[') ? values(item) : std::vector<Json>{};
      if (pair.size() != 2) return rule(false, "quantiles", "arrays of two numbers");
      const std::pair quantile(probability(pair[0], "quantiles"), narrow(pair[1], "quantiles"));
      if (!layer.quantiles.empty()) {
        const auto &before = layer.quantiles.back();
        rule(before.first < quantile.first && before.second <= quantile.second, "quantiles", "ascending in both");
      }
      layer.quantiles.push_back(quantile);
    }
    for (Json item : array(calibration, "thresholds")) {
      layer.thresholds.push_back(read_threshold(as_object(item, "thresholds")));
    }
    check_order(layer.thresholds);
  }

  Threshold read_threshold(const Object &from) {
    Threshold found;
    found.statistic = static_cast<Aggregation>(word(from, "statistic", {"mean", "max", "last"}));
    found.horizon = count(from, "horizon", 1);
    found.sequences = count(from, "sequences", 1);
    found.rate = probability(member(from, "rate"), "rate");
    found.z = narrow(member(from, "z"), "z");
    const double n = found.sequences;
    const double floor = 1 - std::pow(0.05, 1 / n) - 1e-9;
    rule(found.rate >= floor, "rate", "at least 1 - 0.05^(1 / sequences); calibrate on more sequences");
    found.rate_upper = between(member(from, "rate_upper"), "rate_upper", floor, found.rate + 1e-9);
    return found;
  }

  /// Of two thresholds on the same statistic and horizon the rarer alarm needs the larger score.
  void check_order(std::vector<Threshold> sorted) {
    const auto place = [](const Threshold &t) { return std::pair(t.statistic, t.horizon); };
    std::sort(sorted.begin(), sorted.end(), [&](const Threshold &a, const Threshold &b) {
      return std::pair(place(a), a.rate) < std::pair(place(b), b.rate);
    });
    for (std::size_t i = 1; i < sorted.size(); ++i) {
      const Threshold &rare = sorted[i - 1], &common = sorted[i];
      if (place(rare) != place(common)) continue;
      const bool ordered = rare.rate < common.rate && rare.z >= common.z;
      rule(ordered, "thresholds", "one per rate, with a larger z for a rarer alarm");
    }
  }

  void check_layers() {
    rule(!layers.empty(), "layers", "not empty");
    for (std::size_t i = 0; i < layers.size(); ++i) {
      rule(i == 0 || layers[i - 1].layer < layers[i].layer, "layers", "strictly ascending");
      rule(layers[i].layer < model.n_layers, "layer", "below n_layers");
    }
    const bool last_alone = layers.size() == 1 && layers[0].layer == model.n_layers - 1;
    rule(model.site != Site::final_norm || last_alone, "layers", "the last block alone at site final_norm");
  }

  void read_evidence(const Object &from) {
    const auto stated = [&](const char *axis) {
      return static_cast<Specificity>(word(from, axis, {"untested", "nonspecific", "specific"}));
    };
    evidence.causal = stated("causal");
    evidence.content = stated("content");
    if (!without(from, "cell")) read_cell(object(from, "cell"));
    const bool measured = !without(from, "effect"), coherent = !without(from, "coherence");
    const bool compared = !without(from, "content_test");
    rule(evidence.layer || !(measured || coherent || compared), "cell", "there, since something was measured in it");
    const double effect = measured ? number(from, "effect") : 0.0;
    const bool kept = coherent && read_coherence(object(from, "coherence"));
    const Specificity causal = read_families(array(from, "families"), measured, effect, effect > 0 && kept);
    const bool tested = measured && coherent;
    rule(evidence.causal == (tested ? causal : Specificity::untested), "causal", "what the numbers beside it say");
    const Specificity content = compared ? read_content(object(from, "content_test")) : Specificity::untested;
    rule(evidence.content == content, "content", "what the numbers beside it say");
  }

  void read_cell(const Object &from) {
    evidence.layer = count(from, "layer", 0);
    rule(narrow(member(from, "alpha"), "alpha") != 0, "alpha", "other than 0");
    word(from, "positions", {"final_prefill", "generated", "all"});
    const auto known = [&](const Layer &each) { return each.layer == *evidence.layer; };
    rule(std::any_of(layers.begin(), layers.end(), known), "cell.layer", "a layer of this file");
  }

  /// Whether coherence was kept.
  bool read_coherence(const Object &from) {
    const double unsteered = number(from, "unsteered"), steered = number(from, "steered");
    const double margin = number(from, "margin");
    rule(margin >= 0, "margin", "not negative");
    return steered >= unsteered - margin;
  }

  /// The causal status, provided that an effect and its coherence were measured.
  Specificity read_families(const std::vector<Json> &items, bool measured, double effect, bool specific) {
    rule(measured || items.empty(), "effect", "there, since control families are compared with it");
    std::vector<std::string> names;
    std::size_t enough = 0;
    for (Json item : items) {
      const Object family = as_object(item, "families");
      names.push_back(printable(member(family, "family"), "family"));
      std::vector<std::uint64_t> seeds;
      std::size_t as_good = 0;
      for (Json entry : array(family, "controls")) {
        const Object control = as_object(entry, "controls");
        const auto seed = integer_of(member(control, "seed"), UINT64_MAX);
        rule(seed.has_value(), "seed", "an integer below 2^64");
        seeds.push_back(seed.value_or(0));
        as_good += number(control, "effect") >= effect;
      }
      const double rank_p = static_cast<double>(1 + as_good) / static_cast<double>(1 + seeds.size());
      rule(std::fabs(number(family, "rank_p") - rank_p) <= 1e-9, "rank_p", "what the controls say");
      for (const char *needed : {"random", "orthogonal", "covariance", "label_shuffled"}) {
        if (names.back() == needed) enough += seeds.size() >= 39;
      }
      specific = specific && rank_p < 0.05;
      std::sort(seeds.begin(), seeds.end());
      rule(std::adjacent_find(seeds.begin(), seeds.end()) == seeds.end(), "seed", "listed once");
    }
    std::sort(names.begin(), names.end());
    rule(std::adjacent_find(names.begin(), names.end()) == names.end(), "family", "listed once");
    return enough < 4 ? Specificity::untested : specific ? Specificity::specific : Specificity::nonspecific;
  }

  Specificity read_content(const Object &from) {
    const double insecure = number(from, "insecure_drop"), secure = number(from, "secure_drop");
    const double p = number(from, "p_value");
    rule(p > 0 && p <= 1, "p_value", "above 0 and at most 1");
    count(from, "prompts", 1);
    return insecure > secure && p < 0.01 ? Specificity::specific : Specificity::nonspecific;
  }

  void read_provenance(const Object &from) {
    printable(member(from, "producer"), "producer");
    digest(member(from, "recipe_digest"), "recipe_digest");
    for (Json item : array(from, "datasets")) {
      const std::vector<Json> pair = is(item, '[') ? values(item) : std::vector<Json>{};
      if (pair.size() != 2) return rule(false, "datasets", "arrays of a name and a digest");
      printable(pair[0], "datasets");
      digest(pair[1], "datasets");
    }
    const char *share = "top_dimension_share";
    if (!without(from, share)) between(member(from, share), share, 0, 1);
  }
};

}  // namespace emaudit::standalone::detail

#endif  // EMAUDIT_STANDALONE_MANIFEST_HPP
