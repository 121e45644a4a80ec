// SPDX-License-Identifier: MIT OR Apache-2.0
//
// What an Auditor is told, and what it answers.
#ifndef EMAUDIT_LLAMA_CPP_OPTIONS_HPP
#define EMAUDIT_LLAMA_CPP_OPTIONS_HPP

#include "../monitor.hpp"
#include "../standalone/container.hpp"
#include "../steering.hpp"

#include <llama.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {
namespace llama_cpp {

/// The statistic and the false-positive rate per sequence at which a layer raises its alarm.
struct Alarm {
  Aggregation aggregation = Aggregation::mean;
  double rate = 0.01;
};

/// What is done at one layer. Without `alarm` it is scored only, without `steering` not edited.
struct TapOptions {
  std::optional<SteeringOptions> steering;
  std::optional<Alarm> alarm;
  /// Imported directions have no calibration: take Unit::raw, and no alarm.
  Unit unit = Unit::aligned_sd;
};

/// What is done with one sequence (slot, tenant).
struct SequenceOptions {
  /// Multiplies the steering of every layer; 0 leaves the rows as they are.
  float strength = 1.0f;
  /// Steer tokens from this position on: 0 is all of the prompt, the prompt's length is the answer alone.
  llama_pos steer_from = 0;
  /// Position of the last prompt token, where monitors begin. Without it they take the tokens whose logits are asked for,
  /// which is the same where the host asks for those of the last prompt token and of every token after it.
  std::optional<llama_pos> watch_from;
  /// Block the sequence as soon as one of its verdicts is neither clean nor pending.
  bool block = false;
};

/// One scored token of the last decode.
struct ScoredRow {
  llama_seq_id sequence = 0;
  llama_pos position = 0;
  /// Index of the token in the batch.
  std::int32_t index = 0;
  std::uint32_t layer = 0;
  /// In the unit of the layer, before any edit; NaN where the row is not finite.
  float score = 0.0f;
  RowStatus status = RowStatus::ok;
  /// Whether the monitor took it.
  bool watched = false;
};

/// What became of a batch. Only `ok` is ok; the compiler warns where it is thrown away.
class [[nodiscard]] Decoded {
 public:
  enum class Kind {
    ok,
    /// llama.cpp computed the batch, and a sequence of it is blocked from now on; its logits allow only the end of
    /// generation. The other sequences may go on.
    blocked,
    /// Nothing was computed: the batch holds a blocked sequence, or is one that cannot be audited.
    refused,
    /// llama_decode failed; code() is what it returned.
    failed,
    /// llama.cpp computed the batch, but not every row was scored. The verdicts of its sequences are invalid.
    unaudited,
  };

  Decoded(Kind kind, std::int32_t code, const char *message) noexcept
      : kind_(kind), code_(code), message_(message) {}

  explicit operator bool() const noexcept { return kind_ == Kind::ok; }
  Kind kind() const noexcept { return kind_; }
  /// What llama_decode returned; 0 where it was not called.
  std::int32_t code() const noexcept { return code_; }
  /// One English sentence; lives for ever.
  const char *message() const noexcept { return message_; }

 private:
  Kind kind_;
  std::int32_t code_;
  const char *message_;
};

/// A model as direction files name it. Weights and quantisation are unknown to llama.cpp, so a match is a variant.
inline ModelIdentity identity(const llama_model *model) {
  const llama_vocab *const vocab = llama_model_get_vocab(model);
  const std::int32_t tokens = llama_vocab_n_tokens(vocab);
  ModelIdentity out;
  char text[128] = "";
  (void)llama_model_meta_val_str(model, "general.architecture", text, sizeof text);
  out.architecture = text;
  (void)llama_model_meta_val_str(model, "general.name", text, sizeof text);
  out.name = text;
  out.hidden_size = static_cast<std::uint32_t>(llama_model_n_embd(model));
  out.n_layers = static_cast<std::uint32_t>(llama_model_n_layer(model));
  out.vocab_size = static_cast<std::uint32_t>(tokens);
  standalone::detail::Sha256 hash;
  for (llama_token id = 0; id < tokens; ++id) {
    const std::string token = llama_vocab_get_text(vocab, id);
    // Spare rows that converters fill; the model's own tokenizer has no such token.
    if ((llama_vocab_get_attr(vocab, id) & LLAMA_TOKEN_ATTR_UNUSED) != 0 &&
        token == "[PAD" + std::to_string(id) + "]") {
      continue;
    }
    hash.update(reinterpret_cast<const unsigned char *>(token.data()), token.size());
    const unsigned char line_feed = '\n';
    hash.update(&line_feed, 1);
  }
  out.tokenizer_digest = standalone::detail::hex(hash.finish());
  return out;
}

/// Whether directions belong to a model; model_mismatch when not.
inline Result<Identity> check_model(const Directions &directions, const llama_model *model) {
  return directions.check_model(identity(model));
}

}  // namespace llama_cpp
}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_LLAMA_CPP_OPTIONS_HPP
