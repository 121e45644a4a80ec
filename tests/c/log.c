/* Audit logs: append, read the head, go on; one writer; a broken chain is refused. */
#include "check.h"

static emaudit_log *open_log(void) {
  emaudit_log *log = NULL;
  EXPECT(OK, emaudit_log_open(fixture("audit.jsonl"), &log, &error));
  return log;
}

static emaudit_log_info info_of(const emaudit_log *log) {
  emaudit_log_info info = EMAUDIT_LOG_INFO_INIT;
  EXPECT(OK, emaudit_log_get_info(log, &info, &error));
  return info;
}

void test_log(void) {
  emaudit_log *log = open_log();
  const uint64_t before = info_of(log).records;
  emaudit_verdict verdict = EMAUDIT_VERDICT_INIT;
  EXPECT(OK, emaudit_log_append(log, "slot 1", &verdict, 0, &error));
  const emaudit_log_info first = info_of(log);
  verdict.state = EMAUDIT_STATE_FLAGGED;
  verdict.score = 5.0f;
  EXPECT(OK, emaudit_log_append(log, "slot 2", &verdict, 1, &error));
  const emaudit_log_info second = info_of(log);
  CHECK(first.records == before + 1 && second.records == before + 2);
  CHECK(memcmp(first.head, second.head, sizeof first.head) != 0);

  verdict.state = 9;
  EXPECT(INVALID_ARGUMENT, emaudit_log_append(log, "slot 3", &verdict, 0, &error));
  verdict.state = EMAUDIT_STATE_CLEAN;
  EXPECT(INVALID_ARGUMENT, emaudit_log_append(log, "slot 3", &verdict, 2, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_log_append(log, NULL, &verdict, 0, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_log_append(NULL, "slot 3", &verdict, 0, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_log_get_info(log, NULL, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_log_open(fixture("audit.jsonl"), NULL, &error));
  emaudit_log *other = NULL;
  EXPECT(IO, emaudit_log_open(fixture("audit.jsonl"), &other, &error)); /* it has a writer */
  CHECK(other == NULL && info_of(log).records == second.records);
  emaudit_log_free(log);
  emaudit_log_free(NULL);

  log = open_log();
  CHECK(info_of(log).records == second.records && memcmp(info_of(log).head, second.head, sizeof second.head) == 0);
  emaudit_log_free(log);
  EXPECT(BROKEN_LOG, emaudit_log_open(fixture("text.safetensors"), &other, &error));
}
