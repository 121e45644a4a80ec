// Follows one made-up sequence with the first layer of a direction file.
#include "audit-with-cxx/src/audit.h"

#include "emaudit-cxx/src/lib.rs.h"

#include <cstdio>
#include <vector>

std::int32_t audit(rust::Str path) {
  try {
    auto directions = emaudit::open_directions(path, {});
    auto probe = emaudit::make_probe(*directions, directions->layers()[0], emaudit::Kernel::Best);
    auto monitor = emaudit::make_monitor(*probe, emaudit::Aggregation::Mean, 0.01);
    // In an engine these are the residual stream of the tokens, after the probe's block.
    const std::vector<float> rows(4 * directions->width(), 0.5f);
    std::vector<float> scores(4);
    probe->score({rows.data(), rows.size()}, emaudit::Unit::AlignedSd, {scores.data(), scores.size()}, {});
    monitor->push({scores.data(), scores.size()});
    const auto verdict = monitor->verdict();
    std::printf("layer %u: score %.3f, threshold %.3f, %s\n", verdict.layer, static_cast<double>(verdict.score),
                static_cast<double>(verdict.threshold),
                verdict.state == emaudit::State::Clean     ? "clean"
                : verdict.state == emaudit::State::Flagged ? "flagged"
                                                           : "no verdict");
    return 0;
  } catch (const rust::Error &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
