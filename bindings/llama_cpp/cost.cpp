// What the audit costs, paired in one run: plain llama.cpp, attached without work, one layer scored, scored and steered.
//
//   cost MODEL.gguf DIRECTIONS.safetensors [--layer L] [--rounds N] [--prompt TOKENS] [--tokens N] [--clock wall]
//
// Each round runs all four in an order of its own; a figure is the mean over rounds of time / time of plain in the same
// round, less 1, with its 95 % interval (Student's t over the logarithms). The contexts live side by side, one thread each.
// Time is the processor's time of this process, so that waiting for a core that others have does not count; with --clock
// wall it is that of the wall.
#include "host.hpp"

#include <emaudit/llama_cpp.hpp>

#include <array>
#include <chrono>
#include <cmath>
#include <ctime>
#include <numeric>
#include <random>

namespace {

namespace llama_cpp = emaudit::llama_cpp;

constexpr std::size_t kinds = 4;
constexpr std::array<const char *, kinds> names{"plain", "attached, no work", "one layer scored", "scored and steered"};

struct Arm {
  llama_cpp::Auditor auditor;
  host::Owned<llama_context> context;
  bool attached = false;
  std::vector<double> prompt;
  std::vector<double> generation;
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

/// A prompt, then tokens one by one; the tokens are the same in every arm, so that the work is.
void round(Arm &arm, host::Batch &batch, int prompt, int tokens) {
  llama_memory_clear(llama_get_memory(arm.context.get()), true);
  batch.clear();
  for (int i = 0; i < prompt; ++i) {
    batch.add(100 + i * 37 % 4000, i, 0, i + 1 == prompt);
  }
  double begin = seconds();
  decode(arm, batch.get());
  arm.prompt.push_back(seconds() - begin);
  begin = seconds();
  for (int i = 0; i < tokens; ++i) {
    batch.clear();
    batch.add(200 + i * 41 % 4000, prompt + i, 0, true);
    decode(arm, batch.get());
  }
  arm.generation.push_back(seconds() - begin);
}

/// Mean and 95 % interval of the slowdown in per cent.
std::array<double, 3> slowdown(const std::vector<double> &times, const std::vector<double> &plain) {
  const auto n = static_cast<double>(times.size());
  double mean = 0.0, squares = 0.0;
  for (std::size_t i = 0; i < times.size(); ++i) {
    mean += std::log(times[i] / plain[i]) / n;
  }
  for (std::size_t i = 0; i < times.size(); ++i) {
    squares += std::pow(std::log(times[i] / plain[i]) - mean, 2);
  }
  // Student's t at 0.975 within 0.1 % from 10 degrees of freedom on (Cornish-Fisher).
  const double z = 1.959964, d = n - 1;
  const double t = z + (z * z * z + z) / (4 * d) + (5 * std::pow(z, 5) + 16 * std::pow(z, 3) + 3 * z) / (96 * d * d);
  const double half = t * std::sqrt(squares / d / n);
  const auto percent = [](double x) { return 100.0 * std::expm1(x); };
  return {percent(mean), percent(mean - half), percent(mean + half)};
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

void report(const char *what, const std::array<Arm, kinds> &arms, std::vector<double> Arm::*times, int tokens) {
  std::printf("%s: plain %.1f tokens a second\n", what, tokens / median(arms[0].*times));
  for (std::size_t k = 1; k < kinds; ++k) {
    const auto [mean, low, high] = slowdown(arms[k].*times, arms[0].*times);
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
    llama_context_params params = host::context_params(512, 1);
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
      arm.auditor.attach(params);
      if (k > 1) {  // without a started sequence there is no work
        host::check(arm.auditor.start(0));
      }
    }
    arm.context = host::open(model.get(), params);
  }
  host::Batch batch(512);
  std::array<std::size_t, kinds> order{};
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::mt19937 random(1);
  const int rounds = arguments.integer("rounds", 20);
  for (int r = -1; r < rounds; ++r) {
    std::shuffle(order.begin(), order.end(), random);
    for (const std::size_t k : order) {
      round(arms[k], batch, prompt, tokens);
      if (r < 0) {  // to warm up
        arms[k].prompt.clear();
        arms[k].generation.clear();
      }
    }
  }
  std::printf("%d rounds, layer %u, one thread, time of %s\n", rounds, static_cast<unsigned>(layer),
              by_wall ? "the wall" : "the processor");
  report("prompt", arms, &Arm::prompt, prompt);
  report("generation", arms, &Arm::generation, tokens);
  return 0;
}
