// Follows a script of commands with emaudit/standalone.hpp and prints one line per command, all numbers as their
// bits; tests/standalone/script.rs writes the script and knows what the library says.
#include "emaudit/standalone.hpp"

#include <cinttypes>
#include <cstdio>

using namespace emaudit::standalone;

std::size_t rules_of_the_second_unit();

namespace {

/// The script, in the byte order of the machine.
class Script {
 public:
  explicit Script(const char *path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path, "rb"), &std::fclose);
    if (file == nullptr) std::abort();
    unsigned char buffer[1 << 16];
    while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, file.get())) {
      bytes_.insert(bytes_.end(), buffer, buffer + n);
    }
  }

  bool more() const { return at_ < bytes_.size(); }

  template <class T>
  T take() {
    T value;
    std::memcpy(&value, raw(sizeof value), sizeof value);
    return value;
  }

  template <class T>
  std::vector<T> list() {
    const auto count = static_cast<std::size_t>(take<std::uint64_t>());
    std::vector<T> values(count);
    const unsigned char *from = raw(count * sizeof(T));
    if (count > 0) std::memcpy(values.data(), from, count * sizeof(T));
    return values;
  }

  std::string text() {
    const auto characters = list<char>();
    return std::string(characters.begin(), characters.end());
  }

 private:
  const unsigned char *raw(std::size_t size) {
    if (size > bytes_.size() - at_) std::abort();
    at_ += size;
    return bytes_.data() + at_ - size;
  }

  std::vector<unsigned char> bytes_;
  std::size_t at_ = 0;
};

template <class T>
unsigned number(T value) {
  return static_cast<unsigned>(value);
}

std::uint64_t bits(double value) { return detail::bits<std::uint64_t>(value); }
std::uint32_t bits(float value) { return value == value ? detail::bits<std::uint32_t>(value) : 0x7fc00000u; }

std::uint64_t fingerprint(const std::vector<float> &values) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (float value : values) hash = (hash ^ bits(value)) * 0x100000001b3u;
  return hash;
}

void describe(const Directions &directions) {
  const Model &model = directions.model();
  std::printf("0 %d %s %s %u %u %u %s %s %s %s %u", directions.verified(), detail::hex(directions.digest()).c_str(),
              model.architecture.c_str(), model.hidden_size, model.n_layers, model.vocab_size,
              model.tokenizer_digest.c_str(), model.weights_digest.c_str(), model.quantization.c_str(), model.name.c_str(), number(model.site));
  for (const Layer &layer : directions.layers()) {
    std::printf(" layer %u %u%u %016" PRIx64 " %u", layer.layer, number(directions.causal_at(layer.layer)),
                number(directions.content_at(layer.layer)), bits(layer.sigma), layer.sequences);
    for (const auto &[p, z] : layer.quantiles) std::printf(" %016" PRIx64 ":%016" PRIx64, bits(p), bits(z));
    for (const Threshold &t : layer.thresholds) {
      std::printf(" %u/%u/%u/%016" PRIx64 "/%016" PRIx64 "/%016" PRIx64, number(t.statistic), t.horizon, t.sequences,
                  bits(t.rate), bits(t.rate_upper), bits(t.z));
    }
    std::printf(" %016" PRIx64 " %016" PRIx64, fingerprint(layer.direction), fingerprint(layer.aligned_mean));
  }
  std::printf("\n");
}

std::optional<Directions> open(Script &script) {
  OpenOptions options;
  options.verify = script.take<std::uint8_t>() != 0;
  if (script.take<std::uint8_t>() != 0) options.expected_digest = script.take<Digest>();
  const auto bytes = script.list<unsigned char>();
  auto opened = Directions::from_bytes(bytes.data(), bytes.size(), options);
  if (opened) {
    describe(*opened);
    return std::move(*opened);
  }
  if (opened.error().message.empty()) std::abort();
  std::printf("%d\n", static_cast<int>(opened.status()));
  return std::nullopt;
}

/// Rows in memory that holds nothing else, so that a sanitizer sees every step beyond them.
struct Matrix {
  Dtype dtype;
  std::size_t rows, cols, stride;
  std::vector<unsigned char> data;

  explicit Matrix(Script &script) {
    dtype = script.take<Dtype>();
    rows = static_cast<std::size_t>(script.take<std::uint64_t>());
    cols = static_cast<std::size_t>(script.take<std::uint64_t>());
    stride = static_cast<std::size_t>(script.take<std::uint64_t>());
    data = script.list<unsigned char>();
  }
};

void print_statuses(Status status, const std::vector<RowStatus> &rows) {
  std::printf("%d ", static_cast<int>(status));
  for (RowStatus row : rows) std::printf("%u", number(row));
}

void score(Script &script, const Probe &probe) {
  const auto unit = script.take<Unit>();
  Matrix m(script);
  std::vector<float> scores(m.rows);
  std::vector<RowStatus> statuses(m.rows);
  const Rows rows{m.data.data(), m.dtype, m.rows, m.cols, m.stride};
  const Status status = probe.score(rows, scores.data(), unit, statuses.data());
  print_statuses(status, statuses);
  for (float each : scores) std::printf(" %08" PRIx32, bits(each));
  std::printf("\n");
}

void subtract(Script &script, const Probe &probe) {
  Subtraction how;
  how.alpha = script.take<float>();
  how.allow_nonspecific = script.take<std::uint8_t>() != 0;
  const auto strengths = script.list<float>();
  how.strengths = strengths.empty() ? nullptr : strengths.data();
  Matrix m(script);
  std::vector<RowStatus> statuses(m.rows);
  const Status status = probe.subtract({m.data.data(), m.dtype, m.rows, m.cols, m.stride}, how, statuses.data());
  print_statuses(status, statuses);
  std::printf(" ");
  for (unsigned char byte : m.data) std::printf("%02x", byte);
  std::printf("\n");
}

void print(const Verdict &v) {
  std::printf(" %u,%d,%u,%08" PRIx32 ",%08" PRIx32 ",%016" PRIx64 ",%016" PRIx64 ",%u,%u,%u,%u,%d,%s", number(v.state),
              v.misalignment, number(v.aggregation), bits(v.score), bits(v.threshold), bits(v.rate), bits(v.rate_upper),
              v.tokens, v.horizon, v.layer, v.kernel, v.verified, detail::hex(v.digest).c_str());
}

/// A verdict before the first score, after each, and after all of them again as one push on a reset monitor.
void watch(Script &script, const Probe &probe) {
  const auto aggregation = script.take<Aggregation>();
  const auto rate = script.take<double>();
  const auto scores = script.list<float>();
  auto monitor = Monitor::make(probe, aggregation, rate);
  std::printf("%d", static_cast<int>(monitor.status()));
  if (monitor) {
    print(monitor->verdict());
    for (float each : scores) {
      std::printf(" %d", static_cast<int>(monitor->push(&each, 1)));
      print(monitor->verdict());
    }
    monitor->reset();
    std::printf(" %d", static_cast<int>(monitor->push(scores.data(), scores.size())));
    print(monitor->verdict());
  }
  std::printf("\n");
}

void identify(Script &script, const Directions &directions) {
  Model found;
  found.architecture = script.text();
  found.hidden_size = script.take<std::uint32_t>();
  found.n_layers = script.take<std::uint32_t>();
  found.vocab_size = script.take<std::uint32_t>();
  found.tokenizer_digest = script.text();
  found.site = script.take<Site>();
  found.weights_digest = script.text();
  found.quantization = script.text();
  auto match = directions.check_model(found);
  std::printf("%d %u\n", static_cast<int>(match.status()), match ? number(*match) : 0);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 2 || rules_of_the_second_unit() == 0) return 2;
  Script script(argv[1]);
  std::optional<Directions> directions;
  std::optional<Probe> probe;
  while (script.more()) {
    switch (script.take<char>()) {
      case 'O': directions = open(script); break;
      case 'F': {
        auto opened = Directions::open(script.text());
        std::printf("%d\n", static_cast<int>(opened.status()));
        break;
      }
      case 'H': {
        const auto bytes = script.list<unsigned char>();
        std::printf("%s\n", detail::hex(detail::sha256(bytes.data(), bytes.size(), bytes.size())).c_str());
        break;
      }
      case 'P': {
        auto made = directions.value().probe(script.take<std::uint32_t>());
        std::printf("%d\n", static_cast<int>(made.status()));
        if (made) probe = std::move(*made);
        break;
      }
      case 'S': score(script, probe.value()); break;
      case 'T': subtract(script, probe.value()); break;
      case 'M': watch(script, probe.value()); break;
      case 'I': identify(script, directions.value()); break;
      default: return 3;
    }
  }
  return 0;
}
