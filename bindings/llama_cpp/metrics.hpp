// Metrics of an Auditor in the text format of Prometheus. A file that is replaced whole suits node_exporter's textfile
// collector; a server with a port of its own sends text() on /metrics.
#ifndef METRICS_HPP
#define METRICS_HPP

#include <emaudit/llama_cpp.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

inline const char *name(emaudit::State state) {
  switch (state) {
    case emaudit::State::pending:
      return "pending";
    case emaudit::State::clean:
      return "clean";
    case emaudit::State::flagged:
      return "flagged";
    case emaudit::State::stale:
      return "stale";
    default:
      return "invalid";
  }
}

inline const char *name(emaudit::llama_cpp::Decoded::Kind kind) {
  using Kind = emaudit::llama_cpp::Decoded::Kind;
  switch (kind) {
    case Kind::ok:
      return "ok";
    case Kind::blocked:
      return "blocked";
    case Kind::refused:
      return "refused";
    case Kind::failed:
      return "failed";
    default:
      return "unaudited";
  }
}

/// Counters and a histogram; one thread.
class Metrics {
 public:
  void decoded(const emaudit::llama_cpp::Decoded &decoded, emaudit::Span<const emaudit::llama_cpp::ScoredRow> rows) {
    ++batches_[static_cast<std::size_t>(decoded.kind())];
    for (const emaudit::llama_cpp::ScoredRow &row : rows) {
      if (!std::isfinite(row.score)) {
        ++nonfinite_;
        continue;
      }
      ++scored_;
      sum_ += static_cast<double>(row.score);
      std::size_t bucket = 0;
      while (bucket < bounds.size() && static_cast<double>(row.score) > bounds[bucket]) {
        ++bucket;
      }
      ++buckets_[bucket];
    }
  }

  void ended(const emaudit::Verdict &verdict) { ++verdicts_[static_cast<std::size_t>(verdict.state)]; }

  std::string text() const {
    using Kind = emaudit::llama_cpp::Decoded::Kind;
    std::string out;
    head(out, "emaudit_batches_total", "counter", "Batches by what became of them.");
    for (std::size_t k = 0; k < batches_.size(); ++k) {
      line(out, "emaudit_batches_total{outcome=\"" + std::string(name(static_cast<Kind>(k))) + "\"}", batches_[k]);
    }
    head(out, "emaudit_sequences_total", "counter", "Ended sequences by their verdict.");
    for (std::size_t s = 0; s < verdicts_.size(); ++s) {
      line(out, "emaudit_sequences_total{verdict=\"" + std::string(name(static_cast<emaudit::State>(s))) + "\"}",
           verdicts_[s]);
    }
    head(out, "emaudit_tokens_nonfinite_total", "counter", "Tokens whose residual row was not finite.");
    line(out, "emaudit_tokens_nonfinite_total", nonfinite_);
    head(out, "emaudit_token_score", "histogram", "Scores of tokens in aligned standard deviations.");
    std::uint64_t below = 0;
    for (std::size_t b = 0; b < bounds.size(); ++b) {
      below += buckets_[b];
      line(out, "emaudit_token_score_bucket{le=\"" + number(bounds[b]) + "\"}", below);
    }
    line(out, "emaudit_token_score_bucket{le=\"+Inf\"}", scored_);
    out += "emaudit_token_score_sum " + number(sum_) + "\n";
    line(out, "emaudit_token_score_count", scored_);
    return out;
  }

  /// Replaces the file, so that nobody reads half of it.
  bool write(const std::string &path) const {
    const std::string beside = path + ".new", content = text();
    std::FILE *const file = std::fopen(beside.c_str(), "wb");
    if (file == nullptr) {
      return false;
    }
    const bool written = std::fwrite(content.data(), 1, content.size(), file) == content.size();
    return std::fclose(file) == 0 && written && std::rename(beside.c_str(), path.c_str()) == 0;
  }

 private:
  static constexpr std::array<double, 12> bounds{-8, -4, -2, -1, 0, 1, 2, 3, 4, 6, 8, 16};

  static void head(std::string &out, const std::string &metric, const char *type, const char *help) {
    out += "# HELP " + metric + " " + help + "\n# TYPE " + metric + " " + type + "\n";
  }
  static void line(std::string &out, const std::string &series, std::uint64_t value) {
    out += series + " " + std::to_string(value) + "\n";
  }
  static std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return text;
  }

  std::array<std::uint64_t, 5> batches_{};
  std::array<std::uint64_t, 5> verdicts_{};
  std::array<std::uint64_t, 13> buckets_{};
  std::uint64_t scored_ = 0;
  std::uint64_t nonfinite_ = 0;
  double sum_ = 0.0;
};

#endif  // METRICS_HPP
