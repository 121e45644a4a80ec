// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Which row of a tensor inside llama.cpp belongs to which token of the batch.
//
// llama.cpp cuts a batch into micro-batches and may sort their rows by sequence; its callback sees rows only. Order
// works out how a batch can have been cut, and takes what agrees with the tokens and positions that the graph itself
// was given. Where nothing agrees, or two ways agree and differ in a sequence, it says so and no row has an owner.
#ifndef EMAUDIT_LLAMA_CPP_ORDER_HPP
#define EMAUDIT_LLAMA_CPP_ORDER_HPP

#include "../functions.hpp"

#include <llama.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {
namespace llama_cpp {
namespace detail {

/// One token of the batch.
struct Entry {
  llama_token token = 0;
  llama_pos position = 0;
  llama_seq_id sequence = 0;
  /// Further sequences that share the token: `shared_count` ids, borrowed from the batch.
  const llama_seq_id *shared = nullptr;
  std::int32_t shared_count = 0;
  bool output = false;
};

/// A batch, and how far llama.cpp has come with it. After reserve() nothing allocates.
class Order {
 public:
  void reserve(std::size_t tokens) {
    if (tokens > used_.size()) {
      entries_.resize(tokens);
      used_.resize(tokens);
      for (Rows *rows : {&rows_, &candidate_}) {
        rows->reserve(tokens);
      }
      first_of_.reserve(tokens);
    }
  }

  /// Takes a batch of tokens for a context with micro-batches of that size. The context is asked for positions, where the
  /// batch leaves them to llama.cpp.
  void begin(const llama_batch &batch, std::size_t micro_batch, llama_context *context) {
    count_ = static_cast<std::size_t>(batch.n_tokens);
    reserve(count_);
    micro_batch_ = micro_batch;
    one_sequence_ = true;
    std::fill_n(used_.begin(), count_, std::uint8_t{0});
    for (std::size_t i = 0; i < count_; ++i) {
      Entry &entry = entries_[i];
      entry.token = batch.token[i];
      const bool has_sequence = batch.seq_id != nullptr && batch.n_seq_id != nullptr && batch.n_seq_id[i] > 0;
      entry.sequence = has_sequence ? batch.seq_id[i][0] : 0;
      entry.shared = has_sequence ? batch.seq_id[i] + 1 : nullptr;
      entry.shared_count = has_sequence ? batch.n_seq_id[i] - 1 : 0;
      entry.position = batch.pos != nullptr ? batch.pos[i] : next_position(context, i);
      entry.output = batch.logits != nullptr ? batch.logits[i] != 0 : i + 1 == count_;
      one_sequence_ = one_sequence_ && entry.shared_count == 0 && entry.sequence == entries_[0].sequence;
    }
  }

  /// The rows of the next micro-batch as indices into the batch, given the tokens and positions of the graph
  /// (`positions` null where the graph shows none). False when they cannot be told; then rows() is empty.
  bool match(const llama_token *tokens, const llama_pos *positions, std::size_t count) {
    rows_.clear();
    if (positions == nullptr && !one_sequence_) {
      return false;  // tokens alone do not tell two sequences apart
    }
    bool ambiguous = false;
    for (const Split split : {Split::simple, Split::sequential, Split::free}) {
      if (!predict(split) || !agrees(tokens, positions, count)) {
        continue;
      }
      if (rows_.empty()) {
        rows_ = candidate_;
      } else {
        ambiguous = ambiguous || differ_in_a_sequence();
      }
    }
    if (ambiguous) {
      rows_.clear();
    }
    for (const std::uint32_t i : rows_) {
      used_[i] = 1;
    }
    return !rows_.empty();
  }

  const std::vector<std::uint32_t> &rows() const noexcept { return rows_; }
  /// Of rows(), those whose logits are asked for.
  std::size_t outputs() const noexcept {
    return static_cast<std::size_t>(
        std::count_if(rows_.begin(), rows_.end(), [&](std::uint32_t i) { return entries_[i].output; }));
  }
  const Entry &entry(std::size_t index) const noexcept { return entries_[index]; }
  std::size_t size() const noexcept { return count_; }
  /// Whether every token was in a micro-batch.
  bool complete() const noexcept {
    return std::all_of(used_.begin(), used_.begin() + static_cast<std::ptrdiff_t>(count_),
                       [](std::uint8_t used) { return used != 0; });
  }

 private:
  using Rows = std::vector<std::uint32_t>;

  /// How llama.cpp cuts: in the order of the batch; or as many tokens of each of several sequences, one sequence after
  /// the other, with consecutive ids or any.
  enum class Split { simple, sequential, free };

  llama_pos next_position(llama_context *context, std::size_t index) const {
    for (std::size_t i = index; i-- > 0;) {
      if (entries_[i].sequence == entries_[index].sequence) {
        return entries_[i].position + 1;
      }
    }
    return llama_memory_seq_pos_max(llama_get_memory(context), entries_[index].sequence) + 1;
  }

  bool predict(Split split) {
    candidate_.clear();
    if (split == Split::simple) {
      for (std::uint32_t i = 0; i < count_ && candidate_.size() < micro_batch_; ++i) {
        if (used_[i] == 0) {
          candidate_.push_back(i);
        }
      }
      return !candidate_.empty();
    }
    choose_sequences(split == Split::sequential);
    return share_out();
  }

  /// The sequences that take part, each by its first unused token.
  void choose_sequences(bool consecutive) {
    first_of_.clear();
    for (std::uint32_t i = 0; i < count_ && first_of_.size() <= micro_batch_; ++i) {
      if (used_[i] != 0) {
        continue;
      }
      bool add = !consecutive || first_of_.empty() ||
                 entries_[i].sequence == entries_[first_of_.back()].sequence + 1;
      for (const std::uint32_t first : first_of_) {
        add = add && !overlap(entries_[first], entries_[i]);
      }
      if (add) {
        first_of_.push_back(i);
      }
    }
  }

  /// As many tokens of each as all of them have and the micro-batch holds.
  bool share_out() {
    const std::size_t sequences = first_of_.size();
    if (sequences == 0) {
      return false;
    }
    std::size_t each = SIZE_MAX;
    for (const std::uint32_t first : first_of_) {
      std::size_t left = 0;
      for (std::size_t i = first; i < count_; ++i) {
        left += used_[i] == 0 && same(entries_[first], entries_[i]) ? 1 : 0;
      }
      each = std::min(each, left);
    }
    each = std::min(each, std::max<std::size_t>(1, micro_batch_ / sequences));
    for (const std::uint32_t first : first_of_) {
      std::size_t taken = 0;
      for (std::uint32_t i = first; i < count_ && taken < each; ++i) {
        if (used_[i] == 0 && same(entries_[first], entries_[i])) {
          candidate_.push_back(i);
          ++taken;
        }
      }
    }
    return true;
  }

  bool agrees(const llama_token *tokens, const llama_pos *positions, std::size_t count) const {
    if (candidate_.size() != count) {
      return false;
    }
    for (std::size_t i = 0; i < count; ++i) {
      const Entry &entry = entries_[candidate_[i]];
      if (entry.token != tokens[i] || (positions != nullptr && entry.position != positions[i])) {
        return false;
      }
    }
    return true;
  }

  bool differ_in_a_sequence() const {
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      if (!same(entries_[rows_[i]], entries_[candidate_[i]])) {
        return true;
      }
    }
    return false;
  }

  static bool has(const Entry &entry, llama_seq_id sequence) {
    return entry.sequence == sequence ||
           std::find(entry.shared, entry.shared + entry.shared_count, sequence) != entry.shared + entry.shared_count;
  }

  static bool overlap(const Entry &a, const Entry &b) {
    return has(b, a.sequence) || std::any_of(a.shared, a.shared + a.shared_count,
                                             [&](llama_seq_id sequence) { return has(b, sequence); });
  }

  /// Whether two tokens have the same set of sequences.
  static bool same(const Entry &a, const Entry &b) {
    return a.shared_count == b.shared_count && has(b, a.sequence) &&
           std::all_of(a.shared, a.shared + a.shared_count, [&](llama_seq_id sequence) { return has(b, sequence); });
  }

  std::vector<Entry> entries_;
  std::vector<std::uint8_t> used_;
  std::size_t count_ = 0;
  std::size_t micro_batch_ = 0;
  bool one_sequence_ = true;
  Rows rows_;
  Rows candidate_;
  Rows first_of_;
};

}  // namespace detail
}  // namespace llama_cpp
}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_LLAMA_CPP_ORDER_HPP
