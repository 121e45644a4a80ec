/* Monitors: pending, clean, flagged, invalid. Thresholds of the fixtures: mean, horizons 1 and 4. */
#include "check.h"

static emaudit_monitor *monitor_for(const char *name) {
  emaudit_probe *probe = probe_fixture(name);
  emaudit_monitor_options options = EMAUDIT_MONITOR_OPTIONS_INIT;
  options.aggregation = EMAUDIT_AGGREGATION_MEAN;
  options.rate = RATE;
  emaudit_monitor *monitor = NULL;
  EXPECT(OK, emaudit_monitor_new(probe, &options, &monitor, &error));
  emaudit_probe_free(probe); /* the monitor lives on */
  return monitor;
}

static emaudit_verdict verdict_of(const emaudit_monitor *monitor) {
  emaudit_verdict verdict = EMAUDIT_VERDICT_INIT;
  CHECK(verdict.state == EMAUDIT_STATE_INVALID);
  EXPECT(OK, emaudit_monitor_get_verdict(monitor, &verdict, &error));
  CHECK(verdict.struct_size == sizeof verdict);
  return verdict;
}

static void push(emaudit_monitor *monitor, float score) {
  EXPECT(OK, emaudit_monitor_push(monitor, &score, 1, &error));
}

static void test_sequence(emaudit_monitor *monitor, int misalignment) {
  CHECK(verdict_of(monitor).state == EMAUDIT_STATE_INVALID);
  push(monitor, 0.5f);
  emaudit_verdict verdict = verdict_of(monitor);
  CHECK(verdict.state == EMAUDIT_STATE_CLEAN && verdict.horizon == 1 && verdict.tokens == 1);
  CHECK(fabsf(verdict.score - 0.5f) < 1e-6f && verdict.threshold > 0.5f && verdict.misalignment == 0);
  CHECK(verdict.layer == LAYER && verdict.verified == 1 && verdict.kernel != EMAUDIT_KERNEL_DEFAULT);
  CHECK(fabs(verdict.rate - RATE) < 1e-12 && verdict.rate_upper <= verdict.rate && verdict.rate_upper > 0.0);

  const float more[3] = {50.0f, 50.0f, 50.0f};
  EXPECT(OK, emaudit_monitor_push(monitor, more, 3, &error));
  EXPECT(OK, emaudit_monitor_push(monitor, NULL, 0, &error));
  verdict = verdict_of(monitor);
  CHECK(verdict.state == EMAUDIT_STATE_FLAGGED && verdict.horizon == 4 && verdict.tokens == 4);
  CHECK(verdict.misalignment == (misalignment ? 1u : 0u));
  CHECK(fabsf(verdict.score - 150.5f / 4.0f) < 1e-3f);
}

static void test_invalid(emaudit_monitor *monitor) {
  const float bad[2] = {NAN, 0.0f};
  EXPECT(OK, emaudit_monitor_reset(monitor, &error));
  EXPECT(NON_FINITE, emaudit_monitor_push(monitor, bad, 2, &error));
  push(monitor, 0.0f);
  CHECK(verdict_of(monitor).state == EMAUDIT_STATE_INVALID); /* for good */
  EXPECT(OK, emaudit_monitor_reset(monitor, &error));
  push(monitor, 0.0f);
  CHECK(verdict_of(monitor).state == EMAUDIT_STATE_CLEAN);
}

static void test_monitor_refusals(void) {
  emaudit_probe *probe = probe_fixture("good.safetensors");
  emaudit_monitor_options options = EMAUDIT_MONITOR_OPTIONS_INIT;
  emaudit_monitor *monitor = NULL;
  options.rate = RATE;
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_new(probe, &options, &monitor, &error)); /* no aggregation */
  options.aggregation = EMAUDIT_AGGREGATION_MEAN;
  options.rate = RATE / 1000.0;
  EXPECT(RATE_UNSUPPORTED, emaudit_monitor_new(probe, &options, &monitor, &error));
  options.rate = RATE;
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_new(NULL, &options, &monitor, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_new(probe, NULL, &monitor, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_new(probe, &options, NULL, &error));
  CHECK(monitor == NULL);
  emaudit_probe_free(probe);

  monitor = monitor_for("good.safetensors");
  emaudit_verdict verdict = EMAUDIT_VERDICT_INIT;
  verdict.struct_size = 12;
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_get_verdict(monitor, &verdict, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_get_verdict(monitor, NULL, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_get_verdict(NULL, &verdict, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_push(monitor, NULL, 1, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_monitor_reset(NULL, &error));
  CHECK(verdict.state == EMAUDIT_STATE_INVALID);
  emaudit_monitor_free(monitor);
}

void test_monitor(void) {
  emaudit_monitor *monitor = monitor_for("good.safetensors");
  test_sequence(monitor, 0); /* content untested: a flag is no claim of misalignment */
  test_invalid(monitor);
  emaudit_monitor_free(monitor);
  monitor = monitor_for("specific.safetensors");
  test_sequence(monitor, 1);
  emaudit_monitor_free(monitor);
  test_monitor_refusals();
}
