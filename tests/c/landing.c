/* The self-test of steering: an engine that does it right passes, each that does not is caught. */
#include "check.h"

enum { ROWS = 4 };

/* Rows as an engine keeps them, and the three ways it may spoil an edit. */
static emaudit_tensor rows_of(float *data) {
  emaudit_tensor tensor = EMAUDIT_TENSOR_INIT;
  tensor.dtype = EMAUDIT_DTYPE_F32;
  tensor.data = data;
  tensor.rows = ROWS;
  tensor.cols = WIDTH;
  return tensor;
}

static emaudit_steering *steering_for(float alpha) {
  emaudit_probe *probe = probe_fixture("specific.safetensors");
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  options.alpha = alpha;
  emaudit_steering *steering = NULL;
  EXPECT(OK, emaudit_steering_new(probe, &options, &steering, &error));
  emaudit_probe_free(probe);
  return steering;
}

static void test_engines(const emaudit_steering *steering) {
  const float strengths[ROWS] = {1.0f, 0.0f, 2.0f, -1.0f};
  float before[ROWS * WIDTH], after[ROWS * WIDTH], deviations[ROWS];
  fill_rows(before, ROWS, WIDTH, WIDTH);
  memcpy(after, before, sizeof after);
  const emaudit_tensor was = rows_of(before), is = rows_of(after);
  emaudit_landing_report report = EMAUDIT_LANDING_REPORT_INIT;

  /* Dropped. */
  EXPECT(NOT_LANDED, emaudit_steering_check_landed(steering, &was, &is, strengths, deviations, &report, &error));
  CHECK(report.rows == ROWS && report.missed == 3 && report.untouched == 1 && report.landed == 0);
  CHECK(report.largest_deviation > 1000.0f && deviations[0] > 1.0f && deviations[1] == 0.0f);

  EXPECT(OK, emaudit_steering_apply(steering, &is, strengths, NULL, NULL, &error));
  EXPECT(OK, emaudit_steering_check_landed(steering, &was, &is, strengths, deviations, &report, &error));
  CHECK(report.landed == 3 && report.untouched == 1 && report.missed == 0 && report.lost == 0);
  CHECK(report.largest_deviation <= 1.0f && deviations[2] <= report.largest_deviation);
  EXPECT(OK, emaudit_steering_check_landed(steering, &was, &is, strengths, NULL, NULL, &error));

  /* To another row. */
  float swapped[ROWS] = {0.0f, 1.0f, 2.0f, -1.0f};
  EXPECT(NOT_LANDED, emaudit_steering_check_landed(steering, &was, &is, swapped, NULL, &report, &error));
  CHECK(report.missed == 2 && report.landed == 2);

  /* Twice. */
  EXPECT(OK, emaudit_steering_apply(steering, &is, strengths, NULL, NULL, &error));
  EXPECT(NOT_LANDED, emaudit_steering_check_landed(steering, &was, &is, strengths, NULL, &report, &error));
  CHECK(report.missed == 3 && report.untouched == 1);

  before[WIDTH] = INFINITY; /* the row that stays */
  memcpy(after, before, sizeof after);
  CHECK(emaudit_steering_apply(steering, &is, strengths, NULL, NULL, NULL) == EMAUDIT_STATUS_NON_FINITE);
  EXPECT(NON_FINITE, emaudit_steering_check_landed(steering, &was, &is, strengths, deviations, &report, &error));
  CHECK(report.landed == 3 && report.nonfinite == 1 && isnan(deviations[1]));
}

/* Row 1.0 in bfloat16: an edit of less than half a step of every element changes nothing. */
static void test_lost_in_bf16(void) {
  emaudit_steering *steering = steering_for(1e-4f);
  uint16_t before[WIDTH], after[WIDTH];
  for (size_t i = 0; i < WIDTH; ++i) {
    before[i] = 0x3f80;
  }
  memcpy(after, before, sizeof after);
  emaudit_tensor was = EMAUDIT_TENSOR_INIT;
  was.dtype = EMAUDIT_DTYPE_BF16;
  was.data = before;
  was.rows = 1;
  was.cols = WIDTH;
  emaudit_tensor is = was;
  is.data = after;
  EXPECT(OK, emaudit_steering_apply(steering, &is, NULL, NULL, NULL, &error));
  CHECK(memcmp(before, after, sizeof after) == 0);
  emaudit_landing_report report = EMAUDIT_LANDING_REPORT_INIT;
  EXPECT(NOT_LANDED, emaudit_steering_check_landed(steering, &was, &is, NULL, NULL, &report, &error));
  CHECK(report.lost == 1 && report.landed == 0 && report.missed == 0);
  emaudit_steering_free(steering);
}

static void test_landing_refusals(const emaudit_steering *steering) {
  float before[ROWS * WIDTH], after[ROWS * WIDTH];
  fill_rows(before, ROWS, WIDTH, WIDTH);
  memcpy(after, before, sizeof after);
  const emaudit_tensor was = rows_of(before), is = rows_of(after);
  emaudit_tensor fewer = is, narrow = is;
  fewer.rows = ROWS - 1;
  narrow.cols = WIDTH - 1;
  const float bad[ROWS] = {1.0f, 1.0f, 1.0f, NAN};
  emaudit_landing_report report = EMAUDIT_LANDING_REPORT_INIT;
  report.rows = 77;
  EXPECT(INVALID_ARGUMENT, emaudit_steering_check_landed(NULL, &was, &is, NULL, NULL, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_check_landed(steering, NULL, &is, NULL, NULL, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_check_landed(steering, &was, NULL, NULL, NULL, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_check_landed(steering, &was, &fewer, NULL, NULL, &report, &error));
  EXPECT(WIDTH_MISMATCH, emaudit_steering_check_landed(steering, &was, &narrow, NULL, NULL, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_check_landed(steering, &was, &is, bad, NULL, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_check_landed(steering, &was, &is, NULL, after, &report, &error));
  CHECK(report.rows == 77);
  report.struct_size = 12;
  EXPECT(INVALID_ARGUMENT, emaudit_steering_check_landed(steering, &was, &is, NULL, NULL, &report, &error));
  emaudit_tensor none = was;
  none.rows = 0;
  EXPECT(OK, emaudit_steering_check_landed(steering, &none, &none, NULL, NULL, NULL, &error));
}

void test_landing(void) {
  emaudit_steering *steering = steering_for(0.5f);
  test_engines(steering);
  test_lost_in_bf16();
  test_landing_refusals(steering);
  emaudit_steering_free(steering);
}
