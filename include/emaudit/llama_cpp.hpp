// SPDX-License-Identifier: MIT OR Apache-2.0
//
// emaudit inside llama.cpp: scores and steers the output of chosen blocks while llama_decode runs, by its evaluation
// callback, without a patch. Header-only C++17 over emaudit.hpp; needs llama.h and ggml's headers.
//
//   auto directions = emaudit::Directions::open("directions.safetensors");
//   emaudit::llama_cpp::Auditor auditor;
//   auto added = auditor.add(*directions, 14, {{}, emaudit::llama_cpp::Alarm{}});   // score layer 14, alarm at 1 %
//   auditor.attach(params);                                                         // before llama_init_from_model
//   llama_context *context = llama_init_from_model(model, params);
//   auto started = auditor.start(sequence, options);                                // a new sequence in that slot
//   if (auto decoded = auditor.decode(context, batch); !decoded) { ... }       // instead of llama_decode
//   for (const auto &row : auditor.rows()) { ... row.sequence, row.position, row.score ... }
//   emaudit::Verdict verdict = auditor.verdict(sequence, 14);
//
// Sequences: rows are told apart by the graph's own tokens and positions, whatever way llama.cpp cuts and sorts the
// batch (see llama_cpp/order.hpp). Sequences that were not started are neither scored nor steered, and cost nothing.
//
// Layers: N is the block's output, after control vectors and adapters ("l_out-N"). The last layer has only the tokens
// whose logits are asked for.
//
// Order: an evaluation callback that was set before attach() runs first on every tensor that it asks for; what it
// writes is what is scored. If it stops the graph, llama_decode would still return 0: decode() says unaudited.
//
// Blocking: a blocked sequence stays blocked until acknowledge(). Its logits of the batch that blocked it allow only
// tokens that end the generation, so that even a caller who drops the result gets no further text; later batches with
// it are refused and computed for nobody. (Samplers inside llama.cpp's graph choose before that; there, the refusal is
// all.) What is unaudited is never called clean: verdicts of its sequences are invalid until start(), and sequences
// that block are blocked.
//
// Cost: after the first batches of their size nothing allocates, takes a lock or blocks, beyond what the backend does
// to hand over a tensor that is not in the host's memory.
//
// Threads: an Auditor belongs to one context and is used by the thread that decodes; it outlives the context.
#ifndef EMAUDIT_LLAMA_CPP_HPP
#define EMAUDIT_LLAMA_CPP_HPP

#include "../emaudit.hpp"
#include "llama_cpp/options.hpp"
#include "llama_cpp/order.hpp"
#include "llama_cpp/rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {
namespace llama_cpp {

/// Scores, steers, watches and blocks the sequences of one llama.cpp context.
class Auditor {
 public:
  Auditor() = default;
  Auditor(const Auditor &) = delete;
  Auditor &operator=(const Auditor &) = delete;

  /// Scores a layer from now on, with what `options` says besides. Before the first start().
  ///
  /// Errors: those of Probe::make, Steering::make and Monitor::make; invalid_argument for a layer that is there already,
  /// a site other than resid_post, or when a sequence was started.
  Result<void> add(const Directions &directions, std::uint32_t layer, const TapOptions &options = {}) {
    Result<DirectionsInfo> info = directions.info();
    if (!info) {
      return std::move(info).error();
    }
    if (info->site != Site::resid_post) {
      return Error(Status::invalid_argument, "these directions are of the final norm; llama.cpp names block outputs");
    }
    if (!sequences_.empty() || tap_of(static_cast<std::int32_t>(layer)) != nullptr) {
      return Error(Status::invalid_argument, "a layer is added once, and before the first sequence is started");
    }
    Result<Probe> probe = Probe::make(directions, layer);
    if (!probe) {
      return std::move(probe).error();
    }
    auto tap = std::make_unique<Tap>(Tap{std::move(*probe), std::nullopt, options.alarm, options.unit, layer, 0});
    if (options.steering) {
      Result<Steering> steering = Steering::make(tap->probe, *options.steering);
      if (!steering) {
        return std::move(steering).error();
      }
      tap->steering.emplace(std::move(*steering));
    }
    if (options.alarm) {
      if (options.unit != Unit::aligned_sd) {
        return Error(Status::invalid_argument, "thresholds are in aligned standard deviations; so must the scores be");
      }
      if (Result<Monitor> monitor = Monitor::make(tap->probe, options.alarm->aggregation, options.alarm->rate);
          !monitor) {
        return std::move(monitor).error();
      }
    }
    taps_.push_back(std::move(tap));
    return {};
  }

  /// Takes the place of the evaluation callback in `params` and keeps the one that is there. The context made of
  /// `params` refers to this Auditor for all its life.
  void attach(llama_context_params &params) {
    chained_ = params.cb_eval;
    chained_data_ = params.cb_eval_user_data;
    params.cb_eval = [](ggml_tensor *tensor, bool ask, void *self) {
      return ask ? static_cast<Auditor *>(self)->ask(tensor) : static_cast<Auditor *>(self)->take(tensor);
    };
    params.cb_eval_user_data = this;
  }

  /// Begins a sequence with that id anew: fresh monitors, these options. Allocates at the first time for an id.
  ///
  /// Errors: invalid_argument for a blocked sequence (see acknowledge()), an id that llama.cpp cannot have, or a strength
  /// that is not finite.
  Result<void> start(llama_seq_id id, const SequenceOptions &options = {}) {
    if (id < 0 || id >= 65536 || !std::isfinite(options.strength)) {
      return Error(Status::invalid_argument, "a sequence needs an id from 0 to 65535 and a finite strength");
    }
    if (blocked(id)) {
      return Error(Status::invalid_argument, "the sequence is blocked; acknowledge() gives its verdict and frees the id");
    }
    if (static_cast<std::size_t>(id) >= sequences_.size()) {
      sequences_.resize(static_cast<std::size_t>(id) + 1);
    }
    Sequence &sequence = sequences_[static_cast<std::size_t>(id)];
    for (std::size_t t = sequence.monitors.size(); t < taps_.size(); ++t) {
      sequence.monitors.emplace_back();
      if (taps_[t]->alarm) {
        sequence.monitors[t].emplace(
            Monitor::make(taps_[t]->probe, taps_[t]->alarm->aggregation, taps_[t]->alarm->rate).value());
      }
    }
    for (std::optional<Monitor> &monitor : sequence.monitors) {
      if (Result<void> reset = monitor ? monitor->reset() : Result<void>(); !reset) {
        return reset;
      }
    }
    sequence.options = options;
    sequence.started = true;
    sequence.trouble = nullptr;
    return {};
  }

  /// Lets go of a sequence: its rows are neither scored nor steered until start(). A blocked one stays blocked.
  void stop(llama_seq_id id) noexcept {
    if (Sequence *const sequence = find(id); sequence != nullptr && !sequence->blocked) {
      sequence->started = false;
    }
  }

  /// llama_decode with the audit around it.
  Decoded decode(llama_context *context, const llama_batch &batch) {
    rows_.clear();
    if (const char *const reason = why_refused(batch)) {
      return {Decoded::Kind::refused, 0, reason};
    }
    active_ = involve(batch);
    if (active_) {
      order_.begin(batch, llama_n_ubatch(context), context);
      if (const char *const reason = why_not_shared()) {
        return {Decoded::Kind::refused, 0, reason};
      }
      reserve(llama_n_ubatch(context));
    }
    trouble_ = nullptr;
    cut_ = fresh_ = false;
    decoding_ = true;
    const std::int32_t code = llama_decode(context, batch);
    decoding_ = false;
    return finish(context, code);
  }

  /// The scored tokens of the last decode, layer by layer in each micro-batch; in the order of its tokens for each
  /// sequence. Until the next decode.
  Span<const ScoredRow> rows() const noexcept { return {rows_.data(), rows_.size()}; }

  /// What the monitor of that layer says; invalid where there is none, or the sequence was not audited throughout.
  Verdict verdict(llama_seq_id id, std::uint32_t layer) const noexcept {
    const Sequence *const sequence = find(id);
    for (std::size_t t = 0; sequence != nullptr && t < sequence->monitors.size(); ++t) {
      if (taps_[t]->layer == layer && sequence->monitors[t]) {
        Verdict verdict = sequence->monitors[t]->verdict();
        verdict.state = sequence->trouble != nullptr ? State::invalid : verdict.state;
        verdict.misalignment = verdict.misalignment && verdict.state == State::flagged;
        return verdict;
      }
    }
    return {};
  }

  /// Why verdicts of a sequence are invalid beyond what its scores say; null where they are not.
  const char *trouble(llama_seq_id id) const noexcept {
    const Sequence *const sequence = find(id);
    return sequence != nullptr ? sequence->trouble : nullptr;
  }

  bool blocked(llama_seq_id id) const noexcept {
    const Sequence *const sequence = find(id);
    return sequence != nullptr && sequence->blocked;
  }

  /// Ends the block of a sequence and lets go of it; gives the verdict of the layer that blocked it.
  [[nodiscard]] Verdict acknowledge(llama_seq_id id) noexcept {
    Sequence *const sequence = find(id);
    if (sequence == nullptr || !sequence->blocked) {
      return {};
    }
    const Verdict verdict = this->verdict(id, sequence->blocking_layer);
    sequence->blocked = sequence->started = false;
    return verdict;
  }

 private:
  struct Tap {
    Probe probe;
    std::optional<Steering> steering;
    std::optional<Alarm> alarm;
    Unit unit;
    std::uint32_t layer;
    /// Tokens of the batch that this layer has seen.
    std::size_t seen;
  };

  struct Sequence {
    SequenceOptions options;
    std::vector<std::optional<Monitor>> monitors;
    bool started = false;
    bool blocked = false;
    bool involved = false;
    std::uint32_t blocking_layer = 0;
    const char *trouble = nullptr;
  };

  Sequence *find(llama_seq_id id) noexcept {
    return id >= 0 && static_cast<std::size_t>(id) < sequences_.size() ? &sequences_[static_cast<std::size_t>(id)]
                                                                       : nullptr;
  }
  const Sequence *find(llama_seq_id id) const noexcept { return const_cast<Auditor *>(this)->find(id); }

  Tap *tap_of(std::int32_t block) noexcept {
    for (const std::unique_ptr<Tap> &tap : taps_) {
      if (static_cast<std::int32_t>(tap->layer) == block) {
        return tap.get();
      }
    }
    return nullptr;
  }

  /// Calls visit(sequence, id) for every started sequence of a token of the batch.
  template <class Visit>
  void each_sequence(const llama_batch &batch, Visit &&visit) {
    for (std::int32_t i = 0; i < batch.n_tokens; ++i) {
      const std::int32_t count = batch.seq_id != nullptr && batch.n_seq_id != nullptr ? batch.n_seq_id[i] : 0;
      for (std::int32_t k = 0; k < std::max(count, 1); ++k) {
        const llama_seq_id id = count > 0 ? batch.seq_id[i][k] : 0;
        if (Sequence *const sequence = find(id)) {
          visit(*sequence);
        }
      }
    }
  }

  const char *why_refused(const llama_batch &batch) {
    const char *reason = nullptr;
    bool started = false;
    each_sequence(batch, [&](const Sequence &sequence) {
      started = started || sequence.started;
      if (sequence.blocked) {
        reason = "the batch holds a blocked sequence; take its tokens out and acknowledge() it";
      }
    });
    if (reason == nullptr && started && batch.token == nullptr) {
      reason = "the batch holds embeddings; rows are told apart by tokens, so audited sequences need tokens";
    }
    return reason;
  }

  /// Marks the started sequences of the batch; whether there is one, and a layer to look at.
  bool involve(const llama_batch &batch) {
    for (Sequence &sequence : sequences_) {
      sequence.involved = false;
    }
    bool any = false;
    each_sequence(batch, [&](Sequence &sequence) {
      sequence.involved = sequence.started;
      any = any || sequence.started;
    });
    return any && !taps_.empty();
  }

  /// A token that several sequences share has one row, which cannot be steered in two ways.
  const char *why_not_shared() const {
    for (std::size_t i = 0; i < order_.size(); ++i) {
      const detail::Entry &entry = order_.entry(i);
      for (std::int32_t k = 0; k < entry.shared_count; ++k) {
        if (strength_of(entry.sequence, entry.position) != strength_of(entry.shared[k], entry.position)) {
          return "sequences of different strength share a token; decode it once for each";
        }
      }
    }
    return nullptr;
  }

  float strength_of(llama_seq_id id, llama_pos position) const noexcept {
    const Sequence *const sequence = find(id);
    const bool steered = sequence != nullptr && sequence->started && position >= sequence->options.steer_from;
    return steered ? sequence->options.strength : 0.0f;
  }

  void reserve(std::size_t micro_batch) {
    if (micro_batch > scores_.size()) {
      scores_.resize(micro_batch);
      strengths_.resize(micro_batch);
      statuses_.resize(micro_batch);
      tokens_.resize(micro_batch);
      positions_.resize(micro_batch);
    }
    std::size_t rows = 0;
    for (std::size_t i = 0; i < order_.size(); ++i) {
      rows += 1 + static_cast<std::size_t>(order_.entry(i).shared_count);
    }
    rows_.reserve(rows * taps_.size());
    for (const std::unique_ptr<Tap> &tap : taps_) {
      tap->seen = 0;
    }
  }

  /// llama.cpp asks whether somebody wants to see this tensor once it is computed.
  bool ask(ggml_tensor *tensor) noexcept {
    ours_ = nullptr;
    if (decoding_ ? active_ : !sequences_.empty()) {
      look_at(tensor);
    }
    theirs_ = chained_ != nullptr && chained_(tensor, true, chained_data_);
    return ours_ != nullptr || theirs_;
  }

  void look_at(ggml_tensor *tensor) noexcept {
    if (const ggml_tensor *const input = tensor->src[1];
        input != nullptr && (tensor->op == GGML_OP_GET_ROWS || (tensor->op == GGML_OP_ROPE && !has_positions_))) {
      look_at_input(tensor, input);
    } else if (const std::int32_t block = detail::block_of(tensor); block >= 0) {
      if (decoding_) {
        ours_ = tap_of(block);
      } else if (tap_of(block) != nullptr) {
        for (Sequence &sequence : sequences_) {
          spoil(sequence, "llama_decode was called past the auditor");
        }
      }
    }
  }

  /// Inputs are read when they are first asked about: later their memory serves other tensors.
  void look_at_input(const ggml_tensor *tensor, const ggml_tensor *input) noexcept {
    if (tensor->op == GGML_OP_GET_ROWS && detail::is_named(input, "inp_tokens")) {
      if (detail::is_named(tensor->src[0], "token_embd.weight") && decoding_) {
        count_ = static_cast<std::size_t>(ggml_nelements(input));
        has_positions_ = false;
        fresh_ = count_ <= tokens_.size() && detail::read_integers(input, tokens_.data(), count_);
        matched_ = false;
      }
    } else if (!has_positions_ && detail::is_named(input, "inp_pos") && decoding_) {
      has_positions_ = count_ <= positions_.size() && detail::read_integers(input, positions_.data(), count_);
    }
  }

  /// llama.cpp hands over a computed tensor that ask() wanted.
  bool take(ggml_tensor *tensor) noexcept {
    if (theirs_ && !chained_(tensor, false, chained_data_)) {
      cut_ = true;
      return false;
    }
    if (ours_ != nullptr) {
      score(*ours_, tensor);
    }
    return true;
  }

  void score(Tap &tap, ggml_tensor *tensor) noexcept {
    if (fresh_ && !matched_) {
      matched_ = order_.match(tokens_.data(), has_positions_ ? positions_.data() : nullptr, count_);
      fresh_ = matched_;
    }
    if (!fresh_) {
      trouble_ = "the rows of a micro-batch could not be matched with the tokens of the batch";
      return;
    }
    const auto rows = static_cast<std::size_t>(tensor->ne[1]);
    const std::vector<std::uint32_t> &owners = order_.rows();
    const bool all = rows == owners.size();
    if (!all && rows != order_.outputs()) {
      trouble_ = "a layer has neither one row per token nor one per token whose logits are asked for";
      return;
    }
    tap.seen += owners.size();
    if (rows == 0) {
      return;
    }
    bool wanted = false, steered = false;
    std::size_t row = 0;
    for (const std::uint32_t index : owners) {
      const detail::Entry &entry = order_.entry(index);
      if (all || entry.output) {
        strengths_[row] = tap.steering ? strength_of(entry.sequence, entry.position) : 0.0f;
        steered = steered || strengths_[row] != 0.0f;
        wanted = wanted || is_wanted(entry);
        ++row;
      }
    }
    if (wanted && !run(tap, tensor, rows, steered)) {
      trouble_ = "a layer's output could not be scored: it is no matrix of f32, f16 or bf16 rows of the directions' width";
    } else if (wanted) {
      record(tap, all);
    }
  }

  bool is_wanted(const detail::Entry &entry) const noexcept {
    const auto started = [&](llama_seq_id id) {
      const Sequence *const sequence = find(id);
      return sequence != nullptr && sequence->started;
    };
    return started(entry.sequence) || std::any_of(entry.shared, entry.shared + entry.shared_count, started);
  }

  bool run(Tap &tap, ggml_tensor *tensor, std::size_t count, bool steered) noexcept {
    detail::TensorRows view(tensor, scratch_);
    if (!view) {
      return false;
    }
    const Span<float> scores(scores_.data(), count);
    const Span<RowStatus> statuses(statuses_.data(), count);
    SteerReport report;
    const Result<void> done =
        steered ? tap.steering->score_and_apply(*view, scores, tap.unit, &report,
                                                Span<const float>(strengths_.data(), count), statuses)
                : tap.probe.score((*view).as_rows(), scores, tap.unit, statuses);
    if (report.touched > 0) {
      view.commit();
    }
    return done || done.status() == Status::non_finite;
  }

  /// Keeps the scores of the rows that have a started sequence.
  void record(const Tap &tap, bool all) {
    std::size_t row = 0;
    for (const std::uint32_t index : order_.rows()) {
      const detail::Entry &entry = order_.entry(index);
      if (!all && !entry.output) {
        continue;
      }
      for (std::int32_t k = -1; k < entry.shared_count; ++k) {
        const llama_seq_id id = k < 0 ? entry.sequence : entry.shared[k];
        if (const Sequence *const sequence = find(id); sequence != nullptr && sequence->started) {
          const std::optional<llama_pos> &from = sequence->options.watch_from;
          const bool watched = tap.alarm && (from ? entry.position >= *from : entry.output);
          rows_.push_back(ScoredRow{id, entry.position, static_cast<std::int32_t>(index), tap.layer, scores_[row],
                                    statuses_[row], watched});
        }
      }
      ++row;
    }
  }

  Decoded finish(llama_context *context, std::int32_t code) {
    if (!active_) {
      return code != 0 ? Decoded{Decoded::Kind::failed, code, "llama_decode failed"}
             : cut_    ? Decoded{Decoded::Kind::unaudited, code, cut_message}
                       : Decoded{Decoded::Kind::ok, code, "decoded"};
    }
    bool begun = false, complete = true;
    for (const std::unique_ptr<Tap> &tap : taps_) {
      begun = begun || tap->seen > 0;
      complete = complete && tap->seen == order_.size();
    }
    if (cut_) {
      trouble_ = cut_message;
    } else if (code != 0 && begun) {
      trouble_ = "llama_decode failed after part of the batch; what it keeps of it was not watched";
    } else if (code == 0 && trouble_ == nullptr && !complete) {
      trouble_ = "a layer of the directions never appeared in llama.cpp's graph (\"l_out-N\")";
    }
    if (code != 0 && !begun) {
      rows_.clear();
      return {Decoded::Kind::failed, code, "llama_decode failed before anything was computed"};
    }
    watch();
    const bool blocked = block(context);
    if (code != 0) {
      return {Decoded::Kind::failed, code, trouble_};
    }
    if (blocked) {
      return {Decoded::Kind::blocked, code, "a sequence is blocked; acknowledge() gives its verdict"};
    }
    return trouble_ != nullptr ? Decoded{Decoded::Kind::unaudited, code, trouble_}
                               : Decoded{Decoded::Kind::ok, code, "decoded"};
  }

  /// Gives the monitors their scores, or marks the sequences of the batch.
  void watch() {
    for (Sequence &sequence : sequences_) {
      if (trouble_ != nullptr && sequence.involved) {
        spoil(sequence, trouble_);
      }
    }
    for (const ScoredRow &row : rows_) {
      for (std::size_t t = 0; row.watched && t < taps_.size(); ++t) {
        if (taps_[t]->layer == row.layer) {
          Sequence &sequence = sequences_[static_cast<std::size_t>(row.sequence)];
          if (const Result<void> pushed = sequence.monitors[t]->push(row.score); !pushed) {
            spoil(sequence, "a monitor refused a score");
          }
        }
      }
    }
  }

  static void spoil(Sequence &sequence, const char *reason) noexcept {
    if (sequence.started && sequence.trouble == nullptr) {
      sequence.trouble = reason;
    }
  }

  /// Blocks the sequences of the batch whose verdict asks for it; whether there was one.
  bool block(llama_context *context) {
    bool any = false;
    for (std::size_t id = 0; id < sequences_.size(); ++id) {
      Sequence &sequence = sequences_[id];
      if (!sequence.involved || !sequence.options.block || sequence.blocked) {
        continue;
      }
      for (std::size_t t = 0; t < taps_.size() && !sequence.blocked; ++t) {
        if (sequence.monitors[t] && must_block(static_cast<llama_seq_id>(id), taps_[t]->layer)) {
          sequence.blocked = any = true;
          sequence.blocking_layer = taps_[t]->layer;
          close_logits(context, static_cast<llama_seq_id>(id));
        }
      }
    }
    return any;
  }

  bool must_block(llama_seq_id id, std::uint32_t layer) const noexcept {
    const Verdict verdict = this->verdict(id, layer);
    const bool begun = verdict.tokens > 0 || trouble(id) != nullptr;  // before its first token it is invalid, too
    return begun && verdict.state != State::clean && verdict.state != State::pending;
  }

  /// Leaves a blocked sequence nothing to sample but the end of its generation.
  void close_logits(llama_context *context, llama_seq_id id) const {
    const llama_vocab *const vocab = llama_model_get_vocab(llama_get_model(context));
    const std::int32_t size = llama_vocab_n_tokens(vocab);
    for (std::size_t i = 0; i < order_.size(); ++i) {
      const detail::Entry &entry = order_.entry(i);
      float *const logits = entry.output && entry.sequence == id
                                ? llama_get_logits_ith(context, static_cast<std::int32_t>(i))
                                : nullptr;
      for (llama_token token = 0; logits != nullptr && token < size; ++token) {
        logits[token] = llama_vocab_is_eog(vocab, token) ? 0.0f : -std::numeric_limits<float>::infinity();
      }
    }
  }

  static constexpr const char *cut_message =
      "the callback behind the auditor stopped the graph, so the logits are not those of the model";

  std::vector<std::unique_ptr<Tap>> taps_;
  std::vector<Sequence> sequences_;
  ggml_backend_sched_eval_callback chained_ = nullptr;
  void *chained_data_ = nullptr;

  // Of the decode that runs.
  bool decoding_ = false;
  bool active_ = false;
  bool cut_ = false;
  const char *trouble_ = nullptr;
  detail::Order order_;
  std::vector<ScoredRow> rows_;

  // Of its micro-batch: the graph's inputs, whether they were read, and whether they have been matched.
  std::vector<llama_token> tokens_;
  std::vector<llama_pos> positions_;
  std::size_t count_ = 0;
  bool has_positions_ = false;
  bool fresh_ = false;
  bool matched_ = false;

  // Of the tensor that llama.cpp asked about last: who wants it.
  Tap *ours_ = nullptr;
  bool theirs_ = false;

  std::vector<float> scores_;
  std::vector<float> strengths_;
  std::vector<RowStatus> statuses_;
  std::vector<std::byte> scratch_;
};

}  // namespace llama_cpp
}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_LLAMA_CPP_HPP
