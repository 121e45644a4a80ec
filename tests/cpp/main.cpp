// The C++ interface over the fixtures in argv[1].
#include "handles.hpp"

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>
#include <type_traits>

using emaudit::Status;

static_assert(!std::is_copy_constructible_v<emaudit::Directions>, "handles are move-only");
static_assert(!std::is_copy_constructible_v<emaudit::Probe>, "handles are move-only");
static_assert(!std::is_copy_constructible_v<emaudit::Steering>, "handles are move-only");
static_assert(!std::is_copy_constructible_v<emaudit::Monitor>, "handles are move-only");
static_assert(std::is_nothrow_move_constructible_v<emaudit::Probe>, "moving is free");
static_assert(std::is_nothrow_move_constructible_v<emaudit::Error>, "moving is free");

namespace {

std::vector<float> make_rows(std::size_t rows) {
  std::vector<float> data(rows * width);
  for (std::size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<float>(i * 31 % 251) / 64.0f - 1.953125f;
  }
  return data;
}

void test_open(const std::string &fixtures) {
  auto good = emaudit::Directions::open(fixtures + "/good.safetensors");
  CHECK(good && good.status() == Status::ok);
  auto info = good->info();
  CHECK(info && info->width == width && info->verified && info->layers == std::vector<std::uint32_t>({1, layer}));
  CHECK(info->causal == emaudit::Specificity::untested && info->site == emaudit::Site::resid_post);

  emaudit::OpenOptions options;
  options.mode = emaudit::Mode::mapped;
  options.expected_digest = info->digest;
  CHECK(emaudit::Directions::open(fixtures + "/good.safetensors", options));
  (*options.expected_digest)[0] ^= 0xff;
  CHECK(emaudit::Directions::open(fixtures + "/good.safetensors", options).status() == Status::digest_mismatch);

  auto truncated = emaudit::Directions::open(fixtures + "/truncated.safetensors");
  CHECK(!truncated && truncated.status() == Status::truncated);
  CHECK(std::strstr(truncated.error().message(), "bytes") != nullptr);
  CHECK(emaudit::Directions::open(fixtures + "/absent.safetensors").status() == Status::io);
  CHECK(emaudit::Directions::from_bytes(nullptr, 0).status() == Status::not_a_direction_file);
  CHECK(std::strcmp(emaudit::name(Status::truncated), "TRUNCATED") == 0);
}

std::string read_text(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  CHECK(file && !text.str().empty());
  return text.str();
}

void test_trust(const std::string &fixtures) {
  const std::string path = fixtures + "/signed.safetensors";
  emaudit::OpenOptions options;
  options.trusted_key = read_text(fixtures + "/key.pub");
  auto trusted = emaudit::Directions::open(path, options);
  CHECK(trusted && trusted->info()->trusted && std::strcmp(trusted->trusted_comment(), "version 7") == 0);
  CHECK(emaudit::Directions::open(fixtures + "/good.safetensors", options).status() == Status::unsigned_file);
  const std::string bytes = read_text(path);
  CHECK(emaudit::Directions::from_bytes(bytes.data(), bytes.size(), options).status() == Status::unsigned_file);
  options.signature = read_text(path + ".minisig");
  CHECK(emaudit::Directions::from_bytes(bytes.data(), bytes.size(), options));
  CHECK(emaudit::Directions::from_bytes(bytes.data(), bytes.size() - 1, options).status() == Status::bad_signature);
  options.trusted_key = read_text(fixtures + "/stranger.pub");
  CHECK(emaudit::Directions::open(path, options).status() == Status::untrusted_key);
}

void test_identity(const std::string &fixtures) {
  auto directions = emaudit::Directions::open(fixtures + "/good.safetensors");
  emaudit_model_identity raw = EMAUDIT_MODEL_IDENTITY_INIT;
  CHECK(emaudit_directions_get_identity(directions->get(), &raw, nullptr) == EMAUDIT_STATUS_OK);
  emaudit::ModelIdentity model;
  model.architecture = raw.architecture;
  model.hidden_size = raw.hidden_size;
  model.n_layers = raw.n_layers;
  model.vocab_size = raw.vocab_size;
  model.tokenizer_digest = raw.tokenizer_digest;
  CHECK(directions->check_model(model).value() == emaudit::Identity::variant);
  model.weights_digest = raw.weights_digest;
  model.quantization = raw.quantization;
  CHECK(directions->check_model(model).value() == emaudit::Identity::exact);
  model.n_layers += 1;
  CHECK(directions->check_model(model).status() == Status::model_mismatch);
}

void test_score(const emaudit::Probe &probe) {
  CHECK(probe.width() == width && probe.layer() == layer && probe.kernel() != emaudit::Kernel::best);
  std::vector<float> data = make_rows(3);
  std::vector<float> z(3), raw(3);
  CHECK(probe.score(emaudit::Rows::f32(data.data(), 3, width), z.data()));
  CHECK(probe.score(emaudit::Rows::f32(data.data(), 3, width), raw.data(), emaudit::Unit::raw));
  const float sigma = raw[0] / z[0];
  CHECK(std::fabs(raw[2] / z[2] - sigma) < 1e-4f * sigma);
  CHECK(probe.score(emaudit::Rows::f32(data.data(), 3, width - 1), z.data()).status() == Status::width_mismatch);

  data[width] = std::numeric_limits<float>::quiet_NaN();
  std::vector<emaudit::RowStatus> status(3);
  auto bad = probe.score(emaudit::Rows::f32(data.data(), 3, width), z.data(), emaudit::Unit::aligned_sd, status.data());
  CHECK(bad.status() == Status::non_finite && std::isnan(z[1]) && std::isfinite(z[2]));
  CHECK(status[0] == emaudit::RowStatus::ok && status[1] == emaudit::RowStatus::non_finite);
}

// One probe, several threads, the same bits.
void test_threads(const emaudit::Probe &probe) {
  const std::vector<float> data = make_rows(500);
  const emaudit::Rows rows = emaudit::Rows::f32(data.data(), 500, width);
  std::vector<float> expected(500);
  CHECK(probe.score(rows, expected.data()));
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      std::vector<float> scores(500);
      for (int round = 0; round < 20; ++round) {
        CHECK(probe.score(rows, scores.data()));
        CHECK(scores == expected);
      }
    });
  }
  for (std::thread &thread : threads) {
    thread.join();
  }
}

void test_steer(const emaudit::Probe &probe) {
  emaudit::SteeringOptions options;
  options.operation = emaudit::Operation::project_out;
  auto steering = emaudit::Steering::make(probe, options);
  CHECK(steering);
  std::vector<float> data = make_rows(2);
  auto rows = emaudit::MutableRows::f32(data.data(), 2, width);
  std::vector<float> before(2), after(2);
  emaudit::SteerReport report;
  CHECK(steering->score_and_apply(rows, before.data(), emaudit::Unit::aligned_sd, &report));
  CHECK(report.rows == 2 && report.touched == 2 && report.largest_dose > 0.0f);
  CHECK(probe.score(rows.as_rows(), after.data()));
  CHECK(before[0] != before[1] && std::fabs(after[0] - after[1]) < 1e-3f);
  data[0] = std::numeric_limits<float>::infinity();
  CHECK(steering->apply(rows, &report).status() == Status::non_finite && report.nonfinite == 1);
}

void test_monitor(const emaudit::Probe &probe) {
  CHECK(emaudit::Monitor::make(probe, emaudit::Aggregation::mean, 1e-9).status() == Status::rate_unsupported);
  auto monitor = emaudit::Monitor::make(probe, emaudit::Aggregation::mean, 0.01);
  CHECK(monitor && monitor->verdict().state == emaudit::State::invalid);
  CHECK(monitor->push(0.25f) && monitor->verdict().state == emaudit::State::clean);
  const float loud[3] = {60.0f, 60.0f, 60.0f};
  CHECK(monitor->push(loud, 3));
  const emaudit::Verdict verdict = monitor->verdict();
  CHECK(verdict.state == emaudit::State::flagged && verdict.misalignment && verdict.tokens == 4);
  CHECK(verdict.verified && verdict.layer == layer && verdict.kernel == probe.kernel());
  CHECK(monitor->push(std::numeric_limits<float>::infinity()).status() == Status::non_finite);
  CHECK(monitor->verdict().state == emaudit::State::invalid);
  CHECK(monitor->reset() && monitor->push(0.0f));
  emaudit::Monitor moved = std::move(*monitor);
  CHECK(moved.verdict().state == emaudit::State::clean);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FIXTURES\n", argv[0]);
    return 2;
  }
  const std::string fixtures = argv[1];
  CHECK(emaudit::abi_matches());
  test_open(fixtures);
  test_trust(fixtures);
  test_identity(fixtures);
  auto untested = probe_of_file(fixtures + "/good.safetensors");
  CHECK(untested && count_kernels() >= 2);
  emaudit::SteeringOptions options;
  CHECK(emaudit::Steering::make(*untested, options).status() == Status::not_specific);
  options.allow_nonspecific = true;
  CHECK(emaudit::Steering::make(*untested, options));
  auto probe = probe_of_file(fixtures + "/specific.safetensors");
  CHECK(probe);
  test_score(*probe);
  test_threads(*probe);
  test_steer(*probe);
  test_monitor(*probe);
  CHECK(probe_of_file(fixtures + "/text.safetensors").status() == Status::not_a_direction_file);
  std::printf("ok: C++\n");
  return 0;
}
