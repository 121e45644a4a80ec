// The bridge from C++, over the fixtures in argv[1]; see bridge.rs.
#include "emaudit-cxx/src/lib.rs.h"
#include "rust/cxx.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);  \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

namespace {

constexpr std::size_t width = 67;
constexpr std::uint32_t layer = 3;

using Floats = rust::Slice<const float>;
using MutableFloats = rust::Slice<float>;
using Bytes = rust::Slice<std::uint8_t>;

// The call must throw a rust::Error whose message begins with that status.
template <class Call>
bool throws(const char *status, Call &&call) {
  try {
    call();
  } catch (const rust::Error &error) {
    const bool right = std::strncmp(error.what(), status, std::strlen(status)) == 0;
    if (!right) {
      std::fprintf(stderr, "threw `%s`, wanted %s\n", error.what(), status);
    }
    return right;
  }
  return false;
}

std::vector<float> make_rows(std::size_t rows) {
  std::vector<float> data(rows * width);
  for (std::size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<float>(i * 31 % 251) / 64.0f - 1.953125f;
  }
  return data;
}

rust::Box<emaudit::Probe> open_probe(const std::string &path) {
  auto directions = emaudit::open_directions(path, {});
  return emaudit::make_probe(*directions, layer, emaudit::Kernel::Best);  // outlives the directions
}

void test_directions(const std::string &fixtures) {
  const std::string good = fixtures + "/good.safetensors";
  auto directions = emaudit::open_directions(good, {});
  CHECK(directions->width() == width && directions->verified());
  CHECK(directions->layers().size() == 2 && directions->layers()[1] == layer);
  CHECK(directions->causal() == emaudit::Specificity::Untested);

  emaudit::OpenOptions options{};
  std::array<std::uint8_t, 32> digest = directions->digest();
  options.mapped = true;
  options.has_expected_digest = true;
  options.expected_digest = {digest.data(), digest.size()};
  CHECK(emaudit::open_directions(good, options)->verified());
  digest[0] ^= 1;
  CHECK(throws("DigestMismatch", [&] { emaudit::open_directions(good, options); }));
  options.expected_digest = {digest.data(), 5};
  CHECK(throws("InvalidArgument", [&] { emaudit::open_directions(good, options); }));

  std::ifstream file(good, std::ios::binary);
  const std::vector<char> content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto *bytes = reinterpret_cast<const std::uint8_t *>(content.data());
  CHECK(emaudit::directions_from_bytes({bytes, content.size()}, {})->width() == width);
  CHECK(throws("Truncated", [&] { emaudit::directions_from_bytes({bytes, content.size() - 7}, {}); }));
  CHECK(throws("Io", [&] { emaudit::open_directions(fixtures + "/absent", {}); }));

  emaudit::OpenOptions trusting{};
  std::ifstream key_file(fixtures + "/key.pub");
  const std::string key((std::istreambuf_iterator<char>(key_file)), std::istreambuf_iterator<char>());
  trusting.trusted_key = key;
  CHECK(throws("InvalidArgument", [&] { emaudit::open_directions(good, trusting); }));  // half said
  trusting.has_trusted_key = true;
  CHECK(emaudit::open_directions(fixtures + "/signed.safetensors", trusting)->verified());
  CHECK(throws("Unsigned", [&] { emaudit::open_directions(good, trusting); }));
  trusting.trusted_key = "";
  CHECK(throws("InvalidArgument", [&] { emaudit::open_directions(good, trusting); }));
  trusting.trusted_key = key;
  trusting.signature = {bytes, content.size()};
  CHECK(throws("BadSignature", [&] { emaudit::open_directions(good, trusting); }));

  emaudit::ModelIdentity model = directions->model();
  CHECK(directions->check_model(model) == emaudit::Identity::Exact);
  model.weights_digest = "";
  CHECK(directions->check_model(model) == emaudit::Identity::Variant);
  model.site = emaudit::Site::FinalNorm;
  CHECK(throws("ModelMismatch", [&] { directions->check_model(model); }));
  CHECK(throws("LayerNotFound", [&] { emaudit::make_probe(*directions, 2, emaudit::Kernel::Best); }));
  CHECK(throws("InvalidArgument",
               [&] { emaudit::make_probe(*directions, layer, static_cast<emaudit::Kernel>(99)); }));
}

void test_score(const emaudit::Probe &probe) {
  CHECK(probe.width() == width && probe.layer() == layer && probe.kernel() != emaudit::Kernel::Best);
  CHECK(emaudit::kernel_available(emaudit::Kernel::Scalar));
  std::vector<float> data = make_rows(3), z(3);
  const Floats rows{data.data(), data.size()};
  const MutableFloats scores{z.data(), z.size()};
  probe.score(rows, emaudit::Unit::AlignedSd, scores, {});
  const std::vector<float> good = z;
  CHECK(std::isfinite(z[0]) && z[0] != z[1]);
  CHECK(throws("WidthMismatch", [&] {
    probe.score({data.data(), 3 * (width - 1)}, emaudit::Unit::AlignedSd, scores, {});
  }));
  CHECK(throws("InvalidArgument", [&] { probe.score(rows, static_cast<emaudit::Unit>(9), scores, {}); }));

  data[width + 5] = std::numeric_limits<float>::quiet_NaN();
  std::vector<std::uint8_t> status(3, 9);
  const Bytes statuses{status.data(), status.size()};
  CHECK(throws("NonFinite", [&] { probe.score(rows, emaudit::Unit::AlignedSd, scores, statuses); }));
  CHECK(std::isnan(z[1]) && z[0] == good[0] && z[2] == good[2]);
  CHECK(status == std::vector<std::uint8_t>({0, 1, 0}));

  // 1.0 and -2.0 in all three types
  std::vector<float> wide(width, 1.0f);
  std::vector<std::uint16_t> half(width, 0x3c00), brain(width, 0x3f80);
  wide[1] = -2.0f;
  half[1] = brain[1] = 0xc000;
  float expected = 0.0f, f16 = 0.0f, bf16 = 0.0f;
  probe.score({wide.data(), width}, emaudit::Unit::Raw, {&expected, 1}, {});
  probe.score_f16({half.data(), width}, emaudit::Unit::Raw, {&f16, 1}, {});
  probe.score_bf16({brain.data(), width}, emaudit::Unit::Raw, {&bf16, 1}, {});
  CHECK(expected == f16 && expected == bf16);
}

void test_steer(const emaudit::Probe &probe, const emaudit::Probe &untested) {
  emaudit::SteeringOptions options{};
  CHECK(throws("InvalidArgument", [&] { emaudit::make_steering(probe, options); }));
  options.operation = emaudit::Operation::ProjectOut;
  options.alpha = 1.0f;
  CHECK(throws("NotSpecific", [&] { emaudit::make_steering(untested, options); }));
  auto steering = emaudit::make_steering(probe, options);
  std::vector<float> data = make_rows(2), z(2);
  const emaudit::SteerReport report = steering->apply({data.data(), data.size()}, {}, {});
  CHECK(report.rows == 2 && report.touched == 2 && report.largest_dose > 0.0f);
  probe.score({data.data(), data.size()}, emaudit::Unit::AlignedSd, {z.data(), 2}, {});
  CHECK(std::fabs(z[0] - z[1]) < 1e-3f);
  CHECK(throws("InvalidArgument", [&] { steering->apply({data.data(), width + 1}, {}, {}); }));
  std::vector<std::uint16_t> brain(width, 0x3f80);
  CHECK(steering->apply_bf16({brain.data(), width}, {}, {}).touched == 1 && brain[0] != 0x3f80);
}

void test_landing(const emaudit::Probe &probe) {
  emaudit::SteeringOptions options{};
  options.operation = emaudit::Operation::Subtract;
  options.alpha = 0.5f;
  auto steering = emaudit::make_steering(probe, options);
  const std::vector<float> before = make_rows(2);
  std::vector<float> after = before, deviations(2);
  const Floats was{before.data(), before.size()}, is{after.data(), after.size()};
  CHECK(throws("NotLanded", [&] { steering->check_landed(was, is, {}, {deviations.data(), 2}); }));
  CHECK(deviations[0] > 1.0f && deviations[1] > 1.0f);
  steering->apply({after.data(), after.size()}, {}, {});
  const emaudit::LandingReport report = steering->check_landed(was, is, {}, {});
  CHECK(report.rows == 2 && report.landed == 2 && report.largest_deviation <= 1.0f);
  CHECK(throws("InvalidArgument", [&] { steering->check_landed(was, {after.data(), width}, {}, {}); }));
  std::vector<std::uint16_t> ones(width, 0x3f80);
  const rust::Slice<const std::uint16_t> brain{ones.data(), width};
  CHECK(throws("NotLanded", [&] { steering->check_landed_bf16(brain, brain, {}, {}); }));
  CHECK(throws("NotLanded", [&] { steering->check_landed_f16(brain, brain, {}, {}); }));
}

void test_drift(const emaudit::Probe &probe) {
  CHECK(throws("RateUnsupported", [&] { emaudit::make_drift(probe, 1, 0.01); }));
  auto drift = emaudit::make_drift(probe, 50, 0.01);
  auto monitor = emaudit::make_monitor(probe, emaudit::Aggregation::Mean, 0.01);
  monitor->watch(*drift);
  const float calm = 0.25f;
  monitor->push({&calm, 1});
  CHECK(monitor->verdict().state == emaudit::State::Clean);
  const std::vector<float> shifted(50, 5.0f);
  drift->push({shifted.data(), shifted.size()});
  const emaudit::DriftReport report = drift->report();
  CHECK(report.state == emaudit::DriftState::Drifted && report.windows == 1 && report.share < report.lowest);
  CHECK(monitor->verdict().state == emaudit::State::Stale);
  drift->reset();
  CHECK(drift->report().state == emaudit::DriftState::Pending);
  CHECK(monitor->verdict().state == emaudit::State::Clean);
}

void test_monitor(const emaudit::Probe &probe) {
  CHECK(throws("RateUnsupported", [&] { emaudit::make_monitor(probe, emaudit::Aggregation::Mean, 1e-9); }));
  auto monitor = emaudit::make_monitor(probe, emaudit::Aggregation::Mean, 0.01);
  CHECK(monitor->verdict().state == emaudit::State::Invalid);
  const float calm = 0.25f;
  monitor->push({&calm, 1});
  CHECK(monitor->verdict().state == emaudit::State::Clean);
  const float loud[3] = {60.0f, 60.0f, 60.0f};
  monitor->push({loud, 3});
  const emaudit::Verdict verdict = monitor->verdict();
  CHECK(verdict.state == emaudit::State::Flagged && verdict.misalignment && verdict.verified);
  CHECK(verdict.tokens == 4 && verdict.horizon == 4 && verdict.kernel == probe.kernel());
  const float bad = std::numeric_limits<float>::quiet_NaN();
  monitor->push({&bad, 1});
  CHECK(monitor->verdict().state == emaudit::State::Invalid);
  monitor->reset();
  monitor->push({&calm, 1});
  CHECK(monitor->verdict().state == emaudit::State::Clean);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 2) {
    return 2;
  }
  const std::string fixtures = argv[1];
  test_directions(fixtures);
  auto probe = open_probe(fixtures + "/specific.safetensors");
  auto untested = open_probe(fixtures + "/good.safetensors");
  test_score(*probe);
  test_steer(*probe, *untested);
  test_landing(*probe);
  test_drift(*probe);
  test_monitor(*probe);
  std::puts("ok: cxx");
  return 0;
}
