// What the audit costs, paired in one run: plain llama.cpp, attached without work, one layer scored, scored and steered.
//
//   cost MODEL.gguf DIRECTIONS.safetensors [--layer L] [--rounds 20] [--prompt 128] [--tokens 32] [--clock wall]
//
// Every round opens four contexts anew, one thread each, for where a context's memory lies changes its speed by half a per
// cent. The prompt and every single token go through all four at once, in an order drawn anew, so that what slows the machine
// for longer than a token slows all of them. A round gives log(time / time of plain), for the tokens the median; a figure is
// the 20 % trimmed mean over rounds with Tukey and McLaughlin's 95 % interval from the winsorised variance.
// Time is the processor's time of this process, so that waiting for a core that others have does not count; with --clock
// wall it is that of the wall.
#include "host.hpp"

#include <emaudit/llama_cpp.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <ctime>
#include <iterator>
#include <numeric>
#include <random>

namespace {

namespace llama_cpp = emaudit::llama_cpp;

constexpr std::size_t kinds = 4;
constexpr std::array<const char *, kinds> names{"plain", "attached, no work", "one layer scored", "scored and steered"};

struct Arm {
  llama_cpp::Auditor auditor;
  llama_context_params params{};
  host::Owned<llama_context> context;
  bool attached = false;
};

/// Seconds of one batch in every arm.
using Times = std::array<double, kinds>;

/// Slowdowns of a round, as logarithms, and the seconds of plain.
struct Round {
  Times prompt{}, generation{};
  double plain_prompt = 0.0, plain_token = 0.0;
};

bool by_wall = false;

double seconds() {
  if (!by_wall) {
    return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void decode(Arm &arm, const llama_batch &batch) {
  if (arm.attached) {
    if (const auto decoded = arm.auditor.decode(arm.context.get(), batch); !decoded) {
      host::fail(decoded.message());
    }
  } else if (llama_decode(arm.context.get(), batch) != 0) {
    host::fail("llama_decode failed");
  }
  llama_synchronize(arm.context.get());
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

std::array<std::size_t, kinds> draw(std::mt19937 &random) {
  std::array<std::size_t, kinds> order{};
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

Times time_all(std::array<Arm, kinds> &arms, const llama_batch &batch, std::mt19937 &random) {
  Times times{};
  for (const std::size_t k : draw(random)) {
    const double begin = seconds();
    decode(arms[k], batch);
    times[k] = seconds() - begin;
  }
  return times;
}

/// A prompt, once more to be timed, then tokens one by one; the tokens are the same in every arm, so that the work is.
Round round(llama_model *model, std::array<Arm, kinds> &arms, host::Batch &batch, int prompt, int tokens, std::mt19937 &random) {
  for (Arm &arm : arms) {
    arm.context.reset();
  }
  for (const std::size_t k : draw(random)) {
    arms[k].context = host::open(model, arms[k].params);
  }
  batch.clear();
  for (int i = 0; i < prompt; ++i) {
    batch.add(100 + i * 37 % 4000, i, 0, i + 1 == prompt);
  }
  time_all(arms, batch.get(), random);
  for (Arm &arm : arms) {
    llama_memory_clear(llama_get_memory(arm.context.get()), true);
  }
  Round found;
  const Times read = time_all(arms, batch.get(), random);
  std::array<std::vector<double>, kinds> logs;
  std::vector<double> plain;
  for (int i = 0; i < tokens; ++i) {
    batch.clear();
    batch.add(200 + i * 41 % 4000, prompt + i, 0, true);
    const Times said = time_all(arms, batch.get(), random);
    plain.push_back(said[0]);
    for (std::size_t k = 1; k < kinds; ++k) {
      logs[k].push_back(std::log(said[k] / said[0]));
    }
  }
  for (std::size_t k = 1; k < kinds; ++k) {
    found.prompt[k] = std::log(read[k] / read[0]);
    found.generation[k] = median(logs[k]);
  }
  found.plain_prompt = read[0];
  found.plain_token = median(plain);
  return found;
}

/// Trimmed mean and 95 % interval of the slowdown in per cent.
std::array<double, 3> slowdown(std::vector<double> logs) {
  std::sort(logs.begin(), logs.end());
  const std::size_t cut = logs.size() / 5;
  const auto n = static_cast<double>(logs.size()), kept = static_cast<double>(logs.size() - 2 * cut);
  double trimmed = 0.0, winsorised = 0.0, squares = 0.0;
  const auto at = [&](std::size_t i) { return logs[std::clamp(i, cut, logs.size() - 1 - cut)]; };
  for (std::size_t i = 0; i < logs.size(); ++i) {
    trimmed += i >= cut && i < logs.size() - cut ? logs[i] / kept : 0.0;
    winsorised += at(i) / n;
  }
  for (std::size_t i = 0; i < logs.size(); ++i) {
    squares += std::pow(at(i) - winsorised, 2);
  }
  // Student's t at 0.975 within 0.1 % from 10 degrees of freedom on (Cornish-Fisher).
  const double z = 1.959964, d = kept - 1;
  const double t = z + (z * z * z + z) / (4 * d) + (5 * std::pow(z, 5) + 16 * std::pow(z, 3) + 3 * z) / (96 * d * d);
  const double half = t * std::sqrt(squares / (n - 1)) / (kept / n * std::sqrt(n));
  const auto percent = [](double x) { return 100.0 * std::expm1(x); };
  return {percent(trimmed), percent(trimmed - half), percent(trimmed + half)};
}

void report(const char *what, const std::vector<Round> &rounds, Times Round::*logs, double Round::*plain, int tokens) {
  const auto of = [&](auto value) {
    std::vector<double> all;
    std::transform(rounds.begin(), rounds.end(), std::back_inserter(all), value);
    return all;
  };
  std::printf("%s: plain %.1f tokens a second\n", what, tokens / median(of([&](const Round &r) { return r.*plain; })));
  for (std::size_t k = 1; k < kinds; ++k) {
    const auto [mean, low, high] = slowdown(of([&](const Round &r) { return (r.*logs)[k]; }));
    std::printf("  %-20s %+.2f %%  [%+.2f, %+.2f]\n", names[k], mean, low, high);
  }
}

}  // namespace

int main(int argc, char **argv) {
  const host::Arguments arguments(argc, argv, 2, "usage: cost MODEL.gguf DIRECTIONS.safetensors [--layer L] [--rounds N]");
  host::quiet();
  const auto model = host::load(arguments.words[0]);
  const auto directions = host::need(emaudit::Directions::open(arguments.words[1]));
  const auto layers = host::need(directions.info()).layers;
  const auto layer = static_cast<std::uint32_t>(arguments.integer("layer", static_cast<int>(layers[layers.size() / 2])));
  const int prompt = arguments.integer("prompt", 128), tokens = arguments.integer("tokens", 32);
  by_wall = arguments.text("clock", "") == "wall";
  std::array<Arm, kinds> arms;
  for (std::size_t k = 0; k < kinds; ++k) {
    Arm &arm = arms[k];
    arm.params = host::context_params(512, 1);
    arm.attached = k > 0;
    if (arm.attached) {
      llama_cpp::TapOptions tap;
      tap.alarm = llama_cpp::Alarm{emaudit::Aggregation::mean, arguments.number("rate", 0.05)};
      if (k == 3) {
        tap.steering.emplace();
        tap.steering->alpha = 0.01f;
        tap.steering->allow_nonspecific = true;
      }
      host::check(arm.auditor.add(directions, layer, tap));
      arm.auditor.attach(arm.params);
      if (k > 1) {  // without a started sequence there is no work
        host::check(arm.auditor.start(0));
      }
    }
  }
  host::Batch batch(512);
  std::mt19937 random(1);
  const int rounds = arguments.integer("rounds", 20);
  if (rounds < 20) {
    host::fail("--rounds: at least 20, for an interval");
  }
  std::vector<Round> found;
  for (int r = 0; r < rounds; ++r) {
    found.push_back(round(model.get(), arms, batch, prompt, tokens, random));
  }
  std::printf("%d rounds, layer %u, one thread, time of %s\n", rounds, static_cast<unsigned>(layer),
              by_wall ? "the wall" : "the processor");
  report("prompt", found, &Round::prompt, &Round::plain_prompt, prompt);
  report("generation", found, &Round::generation, &Round::plain_token, 1);
  return 0;
}
