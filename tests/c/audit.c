/* Audit: every state and reason that C can reach, the numbers behind them, and what is refused. */
#include "check.h"

static emaudit_audit *audit_for(const char *name, uint32_t horizon) {
  emaudit_probe *probe = probe_fixture(name);
  emaudit_audit_options options = EMAUDIT_AUDIT_OPTIONS_INIT;
  options.aggregation = EMAUDIT_AGGREGATION_MEAN;
  options.horizon = horizon;
  emaudit_audit *audit = NULL;
  EXPECT(OK, emaudit_audit_new(probe, &options, &audit, &error));
  emaudit_probe_free(probe); /* the audit lives on */
  return audit;
}

static void push(emaudit_audit *audit, float score, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    EXPECT(OK, emaudit_audit_push(audit, &score, 1, &error));
  }
}

static emaudit_audit_verdict expect(const emaudit_audit *audit, uint32_t state, uint32_t reason) {
  emaudit_audit_verdict verdict = EMAUDIT_AUDIT_VERDICT_INIT;
  CHECK(verdict.state == EMAUDIT_STATE_INVALID && verdict.reason == EMAUDIT_AUDIT_UNSEEN);
  EXPECT(OK, emaudit_audit_get_verdict(audit, &verdict, &error));
  CHECK(verdict.struct_size == sizeof verdict && verdict.state == state && verdict.reason == reason);
  CHECK(verdict.layer == LAYER && verdict.verified == 1 && verdict.needed == 36 && verdict.rate == RATE);
  CHECK(verdict.sequences == verdict.judged + verdict.pending + verdict.invalid);
  return verdict;
}

static void test_states(void) {
  emaudit_audit *audit = audit_for("good.safetensors", 1);
  CHECK(isnan(expect(audit, EMAUDIT_STATE_INVALID, EMAUDIT_AUDIT_UNSEEN).p_value));
  push(audit, 0.0f, 35);
  expect(audit, EMAUDIT_STATE_INVALID, EMAUDIT_AUDIT_TOO_FEW);
  push(audit, 0.0f, 1);
  expect(audit, EMAUDIT_STATE_CLEAN, EMAUDIT_AUDIT_BELOW_CONCERN);
  push(audit, 9.0f, 1);
  expect(audit, EMAUDIT_STATE_INVALID, EMAUDIT_AUDIT_UNDECIDED);
  push(audit, 9.0f, 4);
  push(audit, 0.0f, 57);
  const emaudit_audit_verdict verdict = expect(audit, EMAUDIT_STATE_FLAGGED, EMAUDIT_AUDIT_MORE_THAN_RATE);
  CHECK(verdict.judged == 98 && verdict.flagged == 5 && verdict.critical == 5 && verdict.misalignment == 0);
  /* scipy: binom.sf(4, 98, 0.009), beta.ppf(0.8, 5, 94) */
  CHECK(fabs(verdict.p_value - 0.0020056881230571663) < 1e-12);
  CHECK(fabs(verdict.detectable - 0.06763070899787367) < 1e-12 && verdict.power == 0.8);
  CHECK(verdict.low < verdict.share && verdict.share < verdict.high && verdict.threshold == 3.0);
  emaudit_audit_free(audit);

  audit = audit_for("specific.safetensors", 4);
  push(audit, 0.0f, 3);
  const float tokens[6] = {0.0f, 0.0f, 0.0f, 0.0f, NAN, 9.0f}, loud[4] = {9.0f, 9.0f, 9.0f, 9.0f};
  EXPECT(OK, emaudit_audit_push(audit, tokens, 6, &error)); /* beyond the horizon nothing is looked at */
  expect(audit, EMAUDIT_STATE_INVALID, EMAUDIT_AUDIT_MOST_PENDING);
  EXPECT(NON_FINITE, emaudit_audit_push(audit, tokens + 4, 1, &error));
  EXPECT(OK, emaudit_audit_push(audit, NULL, 0, &error));
  CHECK(expect(audit, EMAUDIT_STATE_INVALID, EMAUDIT_AUDIT_NON_FINITE).invalid == 2);
  for (int i = 0; i < 9; ++i) {
    EXPECT(OK, emaudit_audit_push(audit, loud, 4, &error));
  }
  CHECK(expect(audit, EMAUDIT_STATE_FLAGGED, EMAUDIT_AUDIT_MORE_THAN_RATE).misalignment == 1);
  emaudit_audit_free(audit);
}

static void test_reference(void) {
  emaudit_probe *probe = probe_fixture("specific.safetensors");
  emaudit_drift_options options = EMAUDIT_DRIFT_OPTIONS_INIT;
  options.window = 50;
  options.rate = RATE;
  emaudit_drift *drift = NULL;
  EXPECT(OK, emaudit_drift_new(probe, &options, &drift, &error));
  emaudit_probe_free(probe);
  emaudit_audit *audit = audit_for("specific.safetensors", 1), *other = audit_for("good.safetensors", 1);
  EXPECT(INVALID_ARGUMENT, emaudit_audit_watch(other, drift, &error));
  EXPECT(OK, emaudit_audit_watch(audit, drift, &error));
  push(audit, 0.0f, 36);
  expect(audit, EMAUDIT_STATE_INVALID, EMAUDIT_AUDIT_REFERENCE_PENDING);
  float scores[50] = {0.0f};
  EXPECT(OK, emaudit_drift_push(drift, scores, 50, &error));
  expect(audit, EMAUDIT_STATE_CLEAN, EMAUDIT_AUDIT_BELOW_CONCERN);
  for (int i = 0; i < 50; ++i) {
    scores[i] = 9.0f;
  }
  EXPECT(OK, emaudit_drift_push(drift, scores, 50, &error));
  expect(audit, EMAUDIT_STATE_STALE, EMAUDIT_AUDIT_REFERENCE_DRIFTED);
  scores[0] = NAN;
  EXPECT(NON_FINITE, emaudit_drift_push(drift, scores, 1, &error));
  emaudit_drift_free(drift); /* its last state stays */
  expect(audit, EMAUDIT_STATE_INVALID, EMAUDIT_AUDIT_REFERENCE_INVALID);
  emaudit_audit_free(other);
  emaudit_audit_free(audit);
}

static void test_audit_refusals(void) {
  emaudit_probe *probe = probe_fixture("good.safetensors");
  emaudit_audit *audit = audit_for("good.safetensors", 1), *none = NULL;
  const emaudit_audit_options usual = EMAUDIT_AUDIT_OPTIONS_INIT;
  emaudit_audit_options options = usual;
  EXPECT(INVALID_ARGUMENT, emaudit_audit_new(probe, &options, &none, &error)); /* no aggregation */
  options.aggregation = EMAUDIT_AGGREGATION_MEAN;
  options.horizon = 1;
  options.rate = 0.001;
  EXPECT(RATE_UNSUPPORTED, emaudit_audit_new(probe, &options, &none, &error));
  options.rate = RATE;
  options.horizon = 7;
  EXPECT(RATE_UNSUPPORTED, emaudit_audit_new(probe, &options, &none, &error));
  options.horizon = 1;
  options.level = 0.0;
  EXPECT(INVALID_ARGUMENT, emaudit_audit_new(probe, &options, &none, &error));
  options.level = usual.level;
  options.concern = 0.001;
  EXPECT(INVALID_ARGUMENT, emaudit_audit_new(probe, &options, &none, &error));
  options.concern = usual.concern;
  EXPECT(INVALID_ARGUMENT, emaudit_audit_new(NULL, &options, &none, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_audit_new(probe, NULL, &none, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_audit_new(probe, &options, NULL, &error));
  CHECK(none == NULL);
  EXPECT(INVALID_ARGUMENT, emaudit_audit_push(NULL, NULL, 0, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_audit_push(audit, NULL, 1, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_audit_watch(audit, NULL, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_audit_get_verdict(audit, NULL, &error));
  emaudit_audit_free(audit);
  emaudit_audit_free(NULL);
  emaudit_probe_free(probe);
}

void test_audit(void) {
  test_states();
  test_reference();
  test_audit_refusals();
}
