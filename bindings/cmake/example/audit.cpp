// Follows one made-up sequence with the first layer of a direction file: audit FILE
#include <emaudit.hpp>

#include <cstdio>
#include <vector>

int main(int argc, char **argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FILE\n", argv[0]);
    return 2;
  }
  auto directions = emaudit::Directions::open(argv[1]);
  if (!directions) {
    std::fprintf(stderr, "%s\n", directions.error().message());
    return 1;
  }
  const auto info = directions->info().value();
  auto probe = emaudit::Probe::make(*directions, info.layers.front());
  if (!probe) {
    std::fprintf(stderr, "%s\n", probe.error().message());
    return 1;
  }
  auto monitor = emaudit::Monitor::make(*probe, emaudit::Aggregation::mean, 0.01);
  if (!monitor) {
    std::fprintf(stderr, "%s\n", monitor.error().message());
    return 1;
  }
  // In an engine these are the residual stream of the tokens, after the probe's block.
  const std::vector<float> rows(4 * info.width, 0.5f);
  std::vector<float> scores(4);
  if (!probe->score(emaudit::Rows::f32(rows, 4, info.width), scores) || !monitor->push(scores)) {
    return 1;
  }
  const emaudit::Verdict verdict = monitor->verdict();
  std::printf("emaudit %s, kernel %s, layer %u: score %.3f, threshold %.3f, %s\n", emaudit::version(),
              emaudit::name(probe->kernel()), static_cast<unsigned>(verdict.layer), static_cast<double>(verdict.score),
              static_cast<double>(verdict.threshold),
              verdict.state == emaudit::State::clean     ? "clean"
              : verdict.state == emaudit::State::flagged ? "flagged"
                                                         : "no verdict");
  return 0;
}
