/* Slots: what is acquired stays what it was, whatever is put into the slot meanwhile. Under load: reload.cpp. */
#include "check.h"

static float score_one(const emaudit_probe *probe) {
  float row[WIDTH], score = 0.0f;
  fill_rows(row, 1, WIDTH, WIDTH);
  emaudit_tensor rows = EMAUDIT_TENSOR_INIT;
  rows.dtype = EMAUDIT_DTYPE_F32;
  rows.data = row;
  rows.rows = 1;
  rows.cols = WIDTH;
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_RAW, &score, NULL, &error));
  return score;
}

static void test_probe_slot(void) {
  emaudit_probe *first = probe_fixture("good.safetensors");
  emaudit_probe *second = probe_fixture("replacement.safetensors");
  const float first_score = score_one(first), second_score = score_one(second);
  CHECK(first_score < second_score || first_score > second_score);
  emaudit_probe_slot *slot = NULL;
  EXPECT(OK, emaudit_probe_slot_new(first, &slot, &error));
  emaudit_probe_free(first); /* the slot keeps it */

  emaudit_probe *before = NULL, *again = NULL, *after = NULL;
  EXPECT(OK, emaudit_probe_slot_acquire(slot, &before, &error));
  EXPECT(OK, emaudit_probe_slot_acquire(slot, &again, &error));
  CHECK(before == again); /* equal, and each is freed */
  emaudit_probe_free(again);
  EXPECT(OK, emaudit_probe_slot_replace(slot, second, &error));
  EXPECT(OK, emaudit_probe_slot_replace(slot, second, &error)); /* with itself */
  emaudit_probe_free(second);
  EXPECT(OK, emaudit_probe_slot_acquire(slot, &after, &error));
  CHECK(after == second && memcmp(&second_score, &(float){score_one(after)}, sizeof(float)) == 0);
  emaudit_probe_slot_free(slot);
  CHECK(memcmp(&first_score, &(float){score_one(before)}, sizeof(float)) == 0); /* outlives its slot */
  emaudit_probe_free(after);
  emaudit_probe_free(before);
}

static void test_steering_slot(void) {
  emaudit_probe *probe = probe_fixture("specific.safetensors");
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  emaudit_steering *first = NULL, *second = NULL, *before = NULL, *after = NULL;
  EXPECT(OK, emaudit_steering_new(probe, &options, &first, &error));
  EXPECT(OK, emaudit_steering_new(probe, &options, &second, &error));
  emaudit_steering_slot *slot = NULL;
  EXPECT(OK, emaudit_steering_slot_new(first, &slot, &error));
  EXPECT(OK, emaudit_steering_slot_acquire(slot, &before, &error));
  EXPECT(OK, emaudit_steering_slot_replace(slot, second, &error));
  EXPECT(OK, emaudit_steering_slot_acquire(slot, &after, &error));
  CHECK(before == first && after == second);
  EXPECT(INVALID_ARGUMENT, emaudit_steering_slot_new(NULL, &slot, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_slot_replace(slot, NULL, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_slot_acquire(NULL, &after, &error));
  emaudit_steering_slot_free(slot);
  emaudit_steering_slot_free(NULL);
  emaudit_steering_free(after);
  emaudit_steering_free(before);
  emaudit_steering_free(second);
  emaudit_steering_free(first);
  emaudit_probe_free(probe);
}

static void test_refusals(void) {
  emaudit_probe *probe = probe_fixture("good.safetensors");
  emaudit_probe_slot *slot = NULL;
  EXPECT(INVALID_ARGUMENT, emaudit_probe_slot_new(NULL, &slot, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_probe_slot_new(probe, NULL, &error));
  CHECK(slot == NULL);
  EXPECT(OK, emaudit_probe_slot_new(probe, &slot, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_probe_slot_replace(NULL, probe, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_probe_slot_replace(slot, NULL, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_probe_slot_acquire(slot, NULL, &error));
  emaudit_probe *untouched = NULL;
  EXPECT(INVALID_ARGUMENT, emaudit_probe_slot_acquire(NULL, &untouched, &error));
  CHECK(untouched == NULL);
  emaudit_probe_slot_free(slot);
  emaudit_probe_slot_free(NULL);
  emaudit_probe_free(probe);
}

void test_slot(void) {
  test_probe_slot();
  test_steering_slot();
  test_refusals();
}
