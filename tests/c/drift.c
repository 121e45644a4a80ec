/* Drift: pending, steady, drifted, invalid, and what a watching monitor makes of each. */
#include "check.h"

enum { WINDOW = 50 };

static emaudit_drift *drift_for(const char *name) {
  emaudit_probe *probe = probe_fixture(name);
  emaudit_drift_options options = EMAUDIT_DRIFT_OPTIONS_INIT;
  options.window = WINDOW;
  options.rate = RATE;
  emaudit_drift *drift = NULL;
  EXPECT(OK, emaudit_drift_new(probe, &options, &drift, &error));
  emaudit_probe_free(probe); /* the drift lives on */
  return drift;
}

static emaudit_drift_report report_of(const emaudit_drift *drift) {
  emaudit_drift_report report = EMAUDIT_DRIFT_REPORT_INIT;
  CHECK(report.state == EMAUDIT_DRIFT_INVALID);
  EXPECT(OK, emaudit_drift_get_report(drift, &report, &error));
  CHECK(report.struct_size == sizeof report && report.window == WINDOW && report.rate == RATE);
  return report;
}

static void push(emaudit_drift *drift, float score, size_t count) {
  float scores[2 * WINDOW];
  CHECK(count <= 2 * WINDOW);
  for (size_t i = 0; i < count; ++i) {
    scores[i] = score;
  }
  EXPECT(OK, emaudit_drift_push(drift, scores, count, &error));
}

static void expect_verdict(const emaudit_monitor *monitor, uint32_t state) {
  emaudit_verdict verdict = EMAUDIT_VERDICT_INIT;
  EXPECT(OK, emaudit_monitor_get_verdict(monitor, &verdict, &error));
  CHECK(verdict.state == state && verdict.misalignment == (state == EMAUDIT_STATE_FLAGGED ? 1u : 0u));
  CHECK(verdict.tokens == 1 && verdict.layer == LAYER && verdict.verified == 1);
  CHECK(state == EMAUDIT_STATE_INVALID || (verdict.horizon == 1 && verdict.threshold > 0.0f));
}

/* One monitor that would be clean and one that would be flagged, at every turn of the drift. */
static void test_states(emaudit_drift *drift, const emaudit_monitor *calm, const emaudit_monitor *loud) {
  emaudit_drift_report report = report_of(drift);
  CHECK(report.state == EMAUDIT_DRIFT_PENDING && report.windows == 0 && isnan(report.share));
  push(drift, 9.0f, WINDOW - 1);
  CHECK(report_of(drift).state == EMAUDIT_DRIFT_PENDING && report_of(drift).sequences == WINDOW - 1);
  expect_verdict(calm, EMAUDIT_STATE_CLEAN);
  expect_verdict(loud, EMAUDIT_STATE_FLAGGED);

  push(drift, 9.0f, 1);
  report = report_of(drift);
  CHECK(report.state == EMAUDIT_DRIFT_DRIFTED && report.windows == 1 && report.sequences == 0);
  CHECK(report.share < report.lowest && report.lowest <= report.highest && report.probability > 0.0);
  expect_verdict(calm, EMAUDIT_STATE_STALE);
  expect_verdict(loud, EMAUDIT_STATE_STALE);

  push(drift, 0.0f, WINDOW); /* at the median */
  report = report_of(drift);
  CHECK(report.state == EMAUDIT_DRIFT_STEADY && report.windows == 2);
  expect_verdict(calm, EMAUDIT_STATE_CLEAN);

  const float bad = NAN;
  EXPECT(NON_FINITE, emaudit_drift_push(drift, &bad, 1, &error));
  push(drift, 0.0f, WINDOW);
  CHECK(report_of(drift).state == EMAUDIT_DRIFT_INVALID && report_of(drift).windows == 2); /* for good */
  expect_verdict(calm, EMAUDIT_STATE_INVALID);
  expect_verdict(loud, EMAUDIT_STATE_INVALID);

  EXPECT(OK, emaudit_drift_reset(drift, &error));
  EXPECT(OK, emaudit_drift_push(drift, NULL, 0, &error));
  CHECK(report_of(drift).state == EMAUDIT_DRIFT_PENDING && report_of(drift).windows == 0);
  expect_verdict(loud, EMAUDIT_STATE_FLAGGED);
  push(drift, -9.0f, WINDOW);
  report = report_of(drift);
  CHECK(report.state == EMAUDIT_DRIFT_DRIFTED && report.share > report.highest);
}

static emaudit_monitor *watching(const char *name, float score, const emaudit_drift *drift) {
  emaudit_probe *probe = probe_fixture(name);
  emaudit_monitor_options options = EMAUDIT_MONITOR_OPTIONS_INIT;
  options.aggregation = EMAUDIT_AGGREGATION_MEAN;
  options.rate = RATE;
  emaudit_monitor *monitor = NULL;
  EXPECT(OK, emaudit_monitor_new(probe, &options, &monitor, &error));
  emaudit_probe_free(probe);
  EXPECT(OK, emaudit_monitor_watch(monitor, drift, &error));
  EXPECT(OK, emaudit_monitor_push(monitor, &score, 1, &error));
  return monitor;
}

static void refuse(emaudit_status wanted, const emaudit_probe *probe, uint32_t window, double rate) {
  emaudit_drift_options options = EMAUDIT_DRIFT_OPTIONS_INIT;
  options.window = window;
  options.rate = rate;
  emaudit_drift *drift = NULL;
  CHECK(emaudit_drift_new(probe, &options, &drift, NULL) == wanted);
  CHECK(drift == NULL);
}

static void test_drift_refusals(emaudit_drift *drift, emaudit_monitor *monitor) {
  emaudit_probe *probe = probe_fixture("good.safetensors");
  emaudit_drift_options options = EMAUDIT_DRIFT_OPTIONS_INIT;
  emaudit_drift *none = NULL;
  refuse(EMAUDIT_STATUS_INVALID_ARGUMENT, probe, 0, RATE);
  refuse(EMAUDIT_STATUS_INVALID_ARGUMENT, probe, UINT32_MAX, RATE);
  refuse(EMAUDIT_STATUS_INVALID_ARGUMENT, probe, WINDOW, 0.0);
  refuse(EMAUDIT_STATUS_INVALID_ARGUMENT, probe, WINDOW, NAN);
  refuse(EMAUDIT_STATUS_RATE_UNSUPPORTED, probe, 1, RATE); /* could never alarm */
  refuse(EMAUDIT_STATUS_INVALID_ARGUMENT, NULL, WINDOW, RATE);
  EXPECT(INVALID_ARGUMENT, emaudit_drift_new(probe, NULL, &none, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_drift_new(probe, &options, NULL, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_drift_push(NULL, NULL, 0, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_drift_push(drift, NULL, 1, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_drift_get_report(drift, NULL, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_drift_reset(NULL, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_watch(NULL, drift, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_watch(monitor, NULL, &error));
  emaudit_drift *other = drift_for("good.safetensors");
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_watch(monitor, other, &error)); /* of another file */
  emaudit_drift_free(other);
  emaudit_drift_free(NULL);
  emaudit_probe_free(probe);
}

void test_drift(void) {
  emaudit_drift *drift = drift_for("specific.safetensors");
  emaudit_monitor *calm = watching("specific.safetensors", 0.5f, drift);
  emaudit_monitor *loud = watching("specific.safetensors", 50.0f, drift);
  test_states(drift, calm, loud);
  test_drift_refusals(drift, loud);
  emaudit_drift_free(drift);
  expect_verdict(calm, EMAUDIT_STATE_STALE); /* it keeps the last state */
  emaudit_monitor_free(calm);
  emaudit_monitor_free(loud);
}
