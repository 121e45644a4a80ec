// The C++ interface over the fixtures in argv[1].
#include "handles.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>
#include <type_traits>
#if defined(__has_include) && __has_include(<version>)
#include <version>
#endif
#ifdef __cpp_lib_span
#include <span>
#endif

using emaudit::Status;

static_assert(!std::is_copy_constructible_v<emaudit::Directions>, "handles are move-only");
static_assert(!std::is_copy_constructible_v<emaudit::Probe>, "handles are move-only");
static_assert(!std::is_copy_constructible_v<emaudit::Steering>, "handles are move-only");
static_assert(!std::is_copy_constructible_v<emaudit::Drift>, "handles are move-only");
static_assert(!std::is_copy_constructible_v<emaudit::Monitor>, "handles are move-only");
static_assert(!std::is_copy_constructible_v<emaudit::Audit>, "handles are move-only");
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
  CHECK(info->pooling == emaudit::Pooling::last_prompt && info->contrast == emaudit::Contrast::adapter_minus_base);
  CHECK(info->estimator == emaudit::Estimator::mean_difference);

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
  const std::vector<std::uint8_t> text = {'n', 'o', 't', 'e', 's', 0, 0, 0, 0};
  CHECK(!emaudit::Directions::from_bytes(text));
  CHECK(std::strcmp(emaudit::name(Status::truncated), "TRUNCATED") == 0);
}

void test_layers(const std::string &fixtures) {
  auto directions = emaudit::Directions::open(fixtures + "/good.safetensors");
  auto info = directions->layer(layer);
  CHECK(info && info->layer == layer && info->sequences == 400 && info->sigma == 0.25);
  CHECK(info->thresholds.size() == 3);
  const emaudit::Threshold &threshold = info->thresholds[1];
  CHECK(threshold.aggregation == emaudit::Aggregation::mean && threshold.horizon == 4 && threshold.sequences == 400);
  CHECK(threshold.rate == 0.01 && threshold.rate_upper == 0.9 * 0.01 && threshold.z == 2.0);
  CHECK(directions->layer(2).status() == Status::layer_not_found);

  std::vector<float> direction(width);
  std::array<float, width> mean{};
  CHECK(directions->copy_vectors(layer, direction, mean) && direction[0] != 0.0f && mean[0] != 0.0f);
  CHECK(directions->copy_vectors(layer, {}, mean));
  CHECK(directions->copy_vectors(layer, {direction.data(), width - 1}).status() == Status::width_mismatch);
  CHECK(directions->copy_vectors(layer, {direction.data(), 3}, mean).status() == Status::invalid_argument);
  CHECK(directions->copy_vectors(2, direction).status() == Status::layer_not_found);
}

void test_kernels() {
  auto kernels = emaudit::kernels();
  CHECK(kernels && (*kernels)[0] == emaudit::Kernel::scalar);
  for (const emaudit::Kernel kernel : *kernels) {
    CHECK(emaudit::kernel_from_name(emaudit::name(kernel)).value() == kernel);
  }
  CHECK(emaudit::kernel_from_name(std::string("abacus")).status() == Status::kernel_unavailable);
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
  auto model = directions->model().value();
  CHECK(model.architecture == "llama" && model.hidden_size == width && !model.name.empty());
  CHECK(model.tokenizer_digest == std::string(64, '1') && model.site == emaudit::Site::resid_post);
  CHECK(directions->check_model(model).value() == emaudit::Identity::exact);
  model.weights_digest.reset();
  CHECK(directions->check_model(model).value() == emaudit::Identity::variant);
  model.n_layers += 1;
  CHECK(directions->check_model(model).status() == Status::model_mismatch);
}

void test_score(const emaudit::Probe &probe) {
  CHECK(probe.width() == width && probe.layer() == layer && probe.kernel() != emaudit::Kernel::best);
  std::vector<float> data = make_rows(3);
  std::vector<float> z(3), raw(3);
  const emaudit::Rows rows = emaudit::Rows::f32(data, 3, width);
  CHECK(probe.score(rows, z) && probe.score(rows, {raw.data(), 3}, emaudit::Unit::raw));
  const float sigma = raw[0] / z[0];
  CHECK(std::fabs(raw[2] / z[2] - sigma) < 1e-4f * sigma);
  CHECK(probe.score(emaudit::Rows::f32(data, 3, width - 1), z).status() == Status::width_mismatch);
  auto bound = probe.error_bound(100.0);
  CHECK(bound && *bound > 0.0 && *bound < 1e-2);
  CHECK(probe.error_bound(-1.0).status() == Status::invalid_argument);

  data[width] = std::numeric_limits<float>::quiet_NaN();
  std::vector<emaudit::RowStatus> status(3);
  auto bad = probe.score(rows, z, emaudit::Unit::aligned_sd, status);
  CHECK(bad.status() == Status::non_finite && std::isnan(z[1]) && std::isfinite(z[2]));
  CHECK(status[0] == emaudit::RowStatus::ok && status[1] == emaudit::RowStatus::non_finite);
}

// Several probes at once: the bits of each alone, and every refusal as a value.
void test_score_all(const std::string &fixtures) {
  const auto directions = emaudit::Directions::open(fixtures + "/good.safetensors");
  const auto make = [&](std::uint32_t of, emaudit::Kernel kernel) {
    return emaudit::Probe::make(*directions, of, kernel).value();
  };
  emaudit::Probe first = make(layer, emaudit::Kernel::best), other = make(1, emaudit::Kernel::best);
  std::vector<float> data = make_rows(3), together(6, 7.0f), alone[2] = {std::vector<float>(3), std::vector<float>(3)};
  std::vector<emaudit::RowStatus> status(3, emaudit::RowStatus::gated);
  const emaudit::Rows rows = emaudit::Rows::f32(data, 3, width);
  const emaudit_probe *const both[] = {first.get(), other.get()};
  const auto untouched = [&](const emaudit::Result<void> &result, Status wanted) {
    const auto is_seven = [](float score) { return score == 7.0f; };
    return result.status() == wanted && result.error().message()[0] != '\0' &&
           std::all_of(together.begin(), together.end(), is_seven) && status[2] == emaudit::RowStatus::gated;
  };
  const auto all = [&](emaudit::Span<const emaudit_probe *const> probes, const emaudit::Rows &of,
                       emaudit::Span<float> scores, emaudit::Span<emaudit::RowStatus> statuses) {
    return emaudit::Probe::score_all(probes, of, scores, emaudit::Unit::aligned_sd, statuses);
  };
  CHECK(untouched(all({}, rows, together, status), Status::invalid_argument));
  CHECK(untouched(all({nullptr, 2}, rows, together, status), Status::invalid_argument));
  CHECK(untouched(all(both, rows, {together.data(), 5}, status), Status::invalid_argument));
  CHECK(untouched(all(both, rows, {together.data(), 4}, status), Status::invalid_argument));
  CHECK(untouched(all(both, rows, together, {status.data(), 2}), Status::invalid_argument));
  CHECK(untouched(all(both, emaudit::Rows::f32(data, 4, width), together, status), Status::invalid_argument));
  CHECK(untouched(all(both, emaudit::Rows::f32(data, 3, width - 1), together, status), Status::width_mismatch));
  const emaudit::Probe scalar = make(layer, emaudit::Kernel::scalar), portable = make(layer, emaudit::Kernel::portable);
  const std::vector<const emaudit_probe *> mixed = {scalar.get(), portable.get()};
  CHECK(untouched(all(mixed, rows, together, status), Status::invalid_argument));
  const std::array<const emaudit_probe *, 2> missing = {first.get(), nullptr};
  CHECK(untouched(all(missing, rows, together, status), Status::invalid_argument));
  CHECK(untouched(all(both, rows, {data.data(), 6}, status), Status::invalid_argument));
  const auto uncalibrated = probe_of_file(fixtures + "/uncalibrated.safetensors");
  const emaudit_probe *const raw_only[] = {uncalibrated->get(), uncalibrated->get()};
  CHECK(untouched(all(raw_only, rows, together, status), Status::not_calibrated));

  CHECK(first.score(rows, alone[0]) && other.score(rows, alone[1]));
  CHECK(all(both, rows, together, status) && status[2] == emaudit::RowStatus::ok);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(together[2 * i] == alone[0][i] && together[2 * i + 1] == alone[1][i]);
  }
  data[width] = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> broken(6, 7.0f);
  CHECK(all(both, rows, broken, status).status() == Status::non_finite);
  CHECK(status[0] == emaudit::RowStatus::ok && status[1] == emaudit::RowStatus::non_finite);
  CHECK(std::isnan(broken[2]) && std::isnan(broken[3]) && broken[1] == together[1] && broken[4] == together[4]);
  CHECK(all(both, emaudit::Rows::f32({}, 0, width), {}, {}));
}

// Sizes are checked here, before the library sees a pointer; nothing is written.
void test_sizes(const emaudit::Probe &probe, const emaudit::Steering &steering) {
  std::vector<float> data = make_rows(3);
  const std::vector<float> before = data;
  float z[3] = {7.0f, 7.0f, 7.0f};
  std::vector<emaudit::RowStatus> two(2);
  const auto refused = [](const emaudit::Result<void> &result) {
    return result.status() == Status::invalid_argument && result.error().message()[0] != '\0';
  };
  CHECK(refused(probe.score(emaudit::Rows::f32(data, 4, width), z)));
  CHECK(refused(probe.score(emaudit::Rows::f32(data, 3, width, width + 1), z)));
  CHECK(refused(probe.score(emaudit::Rows::f32(data, SIZE_MAX, width), z)));
  CHECK(refused(probe.score(emaudit::Rows::f32(data, 2, width), z)));
  CHECK(refused(probe.score(emaudit::Rows::f32(data, 3, width), z, emaudit::Unit::raw, two)));
  auto rows = emaudit::MutableRows::f32(data, 3, width);
  const float strengths[2] = {1.0f, 1.0f};
  CHECK(refused(steering.apply(emaudit::MutableRows::f32(data, 4, width))));
  CHECK(refused(steering.apply(rows, nullptr, strengths)));
  CHECK(refused(steering.apply(rows, nullptr, {}, two)));
  CHECK(refused(steering.score_and_apply(rows, {z, 2})));
  CHECK(refused(steering.score_and_apply(rows, z, emaudit::Unit::raw, nullptr, strengths)));
  CHECK(data == before && z[0] == 7.0f && z[2] == 7.0f);
  CHECK(probe.score(emaudit::Rows::f32({}, 0, width), {}));
  // The last row may end before its stride does.
  CHECK(probe.score(emaudit::Rows::f32({data.data(), 2 * width}, 1, width, 3 * width), {z, 1}));
}

// Rows of one, in the two half formats: 1.0 in binary16 and in bfloat16.
void test_half(const emaudit::Probe &probe) {
  const std::vector<float> one(width, 1.0f);
  std::vector<std::uint16_t> f16(width, 0x3c00), bf16(width, 0x3f80);
  float expected = 0.0f, score = 0.0f;
  CHECK(probe.score(emaudit::Rows::f32(one, 1, width), {&expected, 1}));
  CHECK(probe.score(emaudit::Rows::f16(f16, 1, width), {&score, 1}) && score == expected);
  CHECK(probe.score(emaudit::Rows::bf16(bf16, 1, width), {&score, 1}) && score == expected);
  auto f16_rows = emaudit::MutableRows::f16(f16, 1, width);
  auto bf16_rows = emaudit::MutableRows::bf16(bf16.data(), 1, width);
  CHECK(probe.score(f16_rows.as_rows(), {&score, 1}) && score == expected);
  CHECK(probe.score(bf16_rows.as_rows(), {&score, 1}) && score == expected);
}

void test_spans(const emaudit::Probe &probe) {
#ifdef __cpp_lib_span
  std::vector<float> data = make_rows(2);
  std::vector<float> expected(2), scores(2);
  std::vector<emaudit::RowStatus> status(2, emaudit::RowStatus::gated);
  CHECK(probe.score(emaudit::Rows::f32(data, 2, width), expected));
  const std::span<const float> values(data);
  CHECK(probe.score(emaudit::Rows::f32(values, 2, width), std::span<float>(scores), emaudit::Unit::aligned_sd,
                    std::span<emaudit::RowStatus>(status)));
  CHECK(scores == expected && status[1] == emaudit::RowStatus::ok);
  auto monitor = emaudit::Monitor::make(probe, emaudit::Aggregation::mean, 0.01);
  CHECK(monitor && monitor->push(std::span<const float>(scores)) && monitor->verdict().tokens == 2);
  static_assert(!std::is_constructible_v<emaudit::Span<float>, std::span<const float>>, "const stays const");
#else
  (void)probe;
  static_assert(__cplusplus < 202002L, "C++20 has std::span");
#endif
  static_assert(!std::is_constructible_v<emaudit::Span<float>, const std::vector<float> &>, "const stays const");
}

// One probe, several threads, the same bits.
void test_threads(const emaudit::Probe &probe) {
  const std::vector<float> data = make_rows(500);
  const emaudit::Rows rows = emaudit::Rows::f32(data, 500, width);
  std::vector<float> expected(500);
  CHECK(probe.score(rows, expected));
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      std::vector<float> scores(500);
      for (int round = 0; round < 20; ++round) {
        CHECK(probe.score(rows, scores));
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
  auto rows = emaudit::MutableRows::f32(data, 2, width);
  std::vector<float> before(2), after(2);
  emaudit::SteerReport report;
  CHECK(steering->score_and_apply(rows, before, emaudit::Unit::aligned_sd, &report));
  CHECK(report.rows == 2 && report.touched == 2 && report.largest_dose > 0.0f);
  CHECK(probe.score(rows.as_rows(), after));
  CHECK(before[0] != before[1] && std::fabs(after[0] - after[1]) < 1e-3f);
  const float strengths[2] = {0.5f, 0.0f};
  std::vector<emaudit::RowStatus> status(2, emaudit::RowStatus::gated);
  CHECK(steering->apply(rows, &report, strengths, status) && status[0] == emaudit::RowStatus::ok);
  test_sizes(probe, *steering);
  data[0] = std::numeric_limits<float>::infinity();
  CHECK(steering->apply(rows, &report).status() == Status::non_finite && report.nonfinite == 1);
}

void test_landing(const emaudit::Probe &probe) {
  emaudit::SteeringOptions options;
  options.alpha = 0.5f;
  auto steering = emaudit::Steering::make(probe, options);
  const std::vector<float> before = make_rows(3);
  std::vector<float> data = before, deviations(3);
  const auto was = emaudit::Rows::f32(before, 3, width);
  auto rows = emaudit::MutableRows::f32(data, 3, width);
  const std::vector<float> strengths = {1.0f, 0.0f, -2.0f};
  emaudit::LandingReport report;
  CHECK(steering->check_landed(was, rows.as_rows(), &report, strengths).status() == Status::not_landed);
  CHECK(report.missed == 2 && report.untouched == 1 && report.largest_deviation > 1.0f);
  CHECK(steering->apply(rows, nullptr, strengths));
  CHECK(steering->check_landed(was, rows.as_rows(), &report, strengths, deviations));
  CHECK(report.rows == 3 && report.landed == 2 && report.untouched == 1 && report.missed == 0 && report.lost == 0);
  CHECK(deviations[0] <= 1.0f && deviations[1] == 0.0f && deviations[2] <= report.largest_deviation);
  CHECK(steering->apply(rows, nullptr, strengths));
  CHECK(steering->check_landed(was, rows.as_rows(), nullptr, strengths).status() == Status::not_landed);
  CHECK(steering->check_landed(was, rows.as_rows(), nullptr, {strengths.data(), 2}).status() ==
        Status::invalid_argument);
}

// One thread feeds the drift, others read verdicts: clean until it stands, stale from then on.
void test_drift(const emaudit::Probe &probe) {
  CHECK(emaudit::Drift::make(probe, 1, 0.01).status() == Status::rate_unsupported);
  auto drift = emaudit::Drift::make(probe, 50, 0.01);
  CHECK(drift && drift->report().state == emaudit::DriftState::pending && std::isnan(drift->report().share));
  std::vector<emaudit::Monitor> monitors;
  for (int i = 0; i < 3; ++i) {
    auto monitor = emaudit::Monitor::make(probe, emaudit::Aggregation::mean, 0.01);
    CHECK(monitor->watch(*drift) && monitor->push(0.25f));
    monitors.push_back(std::move(*monitor));
  }
  std::vector<std::thread> threads;
  for (emaudit::Monitor &monitor : monitors) {
    threads.emplace_back([&monitor] {
      while (monitor.verdict().state == emaudit::State::clean) {
        std::this_thread::yield();
      }
      CHECK(monitor.verdict().state == emaudit::State::stale && !monitor.verdict().misalignment);
    });
  }
  const std::vector<float> shifted(50, 5.0f), median(50, 0.0f);
  CHECK(drift->push(shifted));
  for (std::thread &thread : threads) {
    thread.join();
  }
  const emaudit::DriftReport report = drift->report();
  CHECK(report.state == emaudit::DriftState::drifted && report.windows == 1 && report.share < report.lowest);
  CHECK(drift->push(median) && drift->report().state == emaudit::DriftState::steady);
  CHECK(monitors[0].verdict().state == emaudit::State::clean);
  CHECK(drift->push(std::numeric_limits<float>::quiet_NaN()).status() == Status::non_finite);
  CHECK(monitors[1].verdict().state == emaudit::State::invalid);
  CHECK(drift->reset() && drift->report().state == emaudit::DriftState::pending);
}

void test_audit(const emaudit::Probe &probe) {
  emaudit::AuditOptions options;
  CHECK(emaudit::Audit::make(probe, options).status() == Status::invalid_argument);  // no threshold of the maximum
  options.aggregation = emaudit::Aggregation::mean;
  auto audit = emaudit::Audit::make(probe, options);
  CHECK(audit && audit->verdict().state == emaudit::State::invalid && std::isnan(audit->verdict().p_value));
  for (int i = 0; i < 36; ++i) {
    CHECK(audit->push(0.5f));
  }
  emaudit::AuditVerdict verdict = audit->verdict();
  CHECK(verdict.state == emaudit::State::clean && verdict.reason == emaudit::AuditReason::below_concern);
  CHECK(verdict.judged == 36 && verdict.high < verdict.concern && verdict.verified && !verdict.misalignment);
  const std::vector<float> loud = {9.0f, 0.0f};
  for (int i = 0; i < 5; ++i) {
    CHECK(audit->push(loud));
  }
  CHECK(audit->push(std::numeric_limits<float>::quiet_NaN()).status() == Status::non_finite);
  verdict = audit->verdict();
  CHECK(verdict.state == emaudit::State::flagged && verdict.misalignment && verdict.invalid == 1);
  CHECK(verdict.p_value <= verdict.level && verdict.low < verdict.share && verdict.rate == 0.01);
  auto drift = emaudit::Drift::make(probe, 50, 0.01);
  CHECK(audit->watch(*drift) && audit->verdict().reason == emaudit::AuditReason::reference_pending);
}

void test_monitor(const emaudit::Probe &probe) {
  CHECK(emaudit::Monitor::make(probe, emaudit::Aggregation::mean, 1e-9).status() == Status::rate_unsupported);
  auto monitor = emaudit::Monitor::make(probe, emaudit::Aggregation::mean, 0.01);
  CHECK(monitor && monitor->verdict().state == emaudit::State::invalid);
  CHECK(monitor->push(0.25f) && monitor->verdict().state == emaudit::State::clean);
  const float loud[3] = {60.0f, 60.0f, 60.0f};
  CHECK(monitor->push(loud));
  const emaudit::Verdict verdict = monitor->verdict();
  CHECK(verdict.state == emaudit::State::flagged && verdict.misalignment && verdict.tokens == 4);
  CHECK(verdict.aggregation == emaudit::Aggregation::mean && verdict.horizon == 4 && verdict.rate == 0.01);
  CHECK(verdict.verified && verdict.layer == layer && verdict.kernel == probe.kernel());
  CHECK(monitor->push(std::numeric_limits<float>::infinity()).status() == Status::non_finite);
  CHECK(monitor->verdict().state == emaudit::State::invalid);
  CHECK(monitor->reset() && monitor->push(0.0f));
  emaudit::Monitor moved = std::move(*monitor);
  CHECK(moved.verdict().state == emaudit::State::clean);
}

void test_log(const std::string &path) {
  emaudit::Digest head{};
  {
    auto log = emaudit::Log::open(path);
    CHECK(log && log->info().records == 0 && log->info().head == head);
    emaudit::Verdict verdict;
    verdict.state = emaudit::State::flagged;
    CHECK(log->append("slot 7", verdict) && log->append(std::string("slot 8"), verdict, true));
    CHECK(log->info().records == 2 && log->info().head != head);
    CHECK(emaudit::Log::open(path).status() == Status::io);  // one writer
    head = log->info().head;
  }
  auto again = emaudit::Log::open(path.c_str());
  CHECK(again && again->info().records == 2 && again->info().head == head);
}

void test_device(const emaudit::Probe &probe) {
  auto device = emaudit::DeviceProbe::make(probe);
  if (!device) {
    // No driver, or one whose context nobody has made current.
    CHECK(device.status() == Status::device_unavailable || device.status() == Status::invalid_argument);
    CHECK(std::strlen(device.error().message()) > 20);
    return;
  }
  const auto at = [](std::uintptr_t address) { return reinterpret_cast<void *>(address); };
  auto *scores = static_cast<float *>(at(0x20000)), *strengths = static_cast<float *>(at(0x30000));
  auto *status = static_cast<emaudit::RowStatus *>(at(0x40000));
  auto steering = emaudit::Steering::make(probe, {});
  CHECK(steering);
  const auto f32 = emaudit::DeviceRows::f32(at(0x10000), 2, width), f16 = emaudit::DeviceRows::f16(at(0x10000), 2, width);
  const auto bf16 = emaudit::DeviceRows::bf16(at(0x10000), 2, width, width + 1);
  CHECK(device->score(f32, scores, at(0x40)));
  CHECK(device->steer(*steering, f16, status, at(0x40)));
  CHECK(device->score_and_steer(*steering, bf16, scores, status, at(0x40), emaudit::Unit::raw, strengths));
  CHECK(device->steer(*steering, f16, nullptr, at(0x40)).status() == Status::invalid_argument);
  CHECK(device->score(emaudit::DeviceRows::f32(at(0x10000), 2, 1), scores, nullptr).status() == Status::width_mismatch);
  CHECK(device->error_bound(1.0) && *device->error_bound(1.0) > 0.0);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FIXTURES\n", argv[0]);
    return 2;
  }
  const std::string fixtures = argv[1];
  CHECK(emaudit::load() && emaudit::version()[0] != '\0');
  test_open(fixtures);
  test_layers(fixtures);
  test_trust(fixtures);
  test_identity(fixtures);
  test_kernels();
  auto untested = probe_of_file(fixtures + "/good.safetensors");
  CHECK(untested && count_kernels() >= 2);
  emaudit::SteeringOptions options;
  CHECK(emaudit::Steering::make(*untested, options).status() == Status::not_specific);
  options.allow_nonspecific = true;
  CHECK(emaudit::Steering::make(*untested, options));
  auto probe = probe_of_file(fixtures + "/specific.safetensors");
  CHECK(probe);
  test_score(*probe);
  test_score_all(fixtures);
  test_half(*probe);
  test_spans(*probe);
  test_threads(*probe);
  test_steer(*probe);
  test_landing(*probe);
  test_drift(*probe);
  test_monitor(*probe);
  test_audit(*probe);
  test_device(*probe);
  test_log(fixtures + "/audit-cpp.jsonl");
  CHECK(emaudit::Log::open(fixtures + "/text.safetensors").status() == Status::broken_log);
  CHECK(probe_of_file(fixtures + "/text.safetensors").status() == Status::not_a_direction_file);
  std::printf("ok: C++\n");
  return 0;
}
