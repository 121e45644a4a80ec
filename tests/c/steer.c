/* Steering: what it changes, what it leaves, what it refuses. */
#include "check.h"

enum { ROWS = 4, STRIDE = WIDTH + 3 };

static emaudit_tensor f32_rows(float *data) {
  emaudit_tensor tensor = EMAUDIT_TENSOR_INIT;
  tensor.dtype = EMAUDIT_DTYPE_F32;
  tensor.data = data;
  tensor.rows = ROWS;
  tensor.cols = WIDTH;
  tensor.row_stride = STRIDE;
  return tensor;
}

static emaudit_steering *steering_for(const emaudit_probe *probe, const emaudit_steering_options *options) {
  emaudit_steering *steering = NULL;
  EXPECT(OK, emaudit_steering_new(probe, options, &steering, &error));
  CHECK(steering != NULL);
  return steering;
}

static int same(const float *a, const float *b, size_t count) {
  return memcmp(a, b, count * sizeof *a) == 0;
}

/* h - strength * alpha * v, element by element; what lies between the rows stays. */
static void test_subtract(const emaudit_probe *probe, const float *v) {
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  options.alpha = 0.5f;
  emaudit_steering *steering = steering_for(probe, &options);
  float before[ROWS * STRIDE], after[ROWS * STRIDE];
  fill_rows(before, ROWS, STRIDE, STRIDE);
  memcpy(after, before, sizeof after);
  const float strengths[ROWS] = {1.0f, 2.0f, 0.0f, -1.0f};
  uint8_t status[ROWS];
  emaudit_steer_report report = EMAUDIT_STEER_REPORT_INIT;
  const emaudit_tensor rows = f32_rows(after);
  EXPECT(OK, emaudit_steering_apply(steering, &rows, strengths, status, &report, &error));
  for (size_t i = 0; i < ROWS * STRIDE; ++i) {
    const size_t row = i / STRIDE, col = i % STRIDE;
    if (col >= WIDTH) {
      CHECK(same(&after[i], &before[i], 1));
      continue;
    }
    const double edit = (double)strengths[row] * 0.5 * (double)v[col];
    const double exact = (double)before[i] - edit;
    CHECK(fabs((double)after[i] - exact) <= (fabs((double)before[i]) + fabs(edit)) * 0x1p-22);
  }
  CHECK(same(after + 2 * STRIDE, before + 2 * STRIDE, WIDTH));
  CHECK(report.rows == ROWS && report.gated == 0 && report.limited == 0 && report.nonfinite == 0);
  CHECK(report.touched >= 3 && report.largest_dose > 0.0f);
  CHECK(status[0] == EMAUDIT_ROW_OK && status[1] == EMAUDIT_ROW_OK && status[3] == EMAUDIT_ROW_OK);
  emaudit_steering_free(steering);
}

/* In one pass: the scores are those of the rows as they were, the edit is that of apply. */
static void test_one_pass(const emaudit_probe *probe) {
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_PROJECT_OUT;
  emaudit_steering *steering = steering_for(probe, &options);
  float one[ROWS * STRIDE], two[ROWS * STRIDE], expected[ROWS], scores[ROWS];
  fill_rows(one, ROWS, WIDTH, STRIDE);
  fill_rows(two, ROWS, WIDTH, STRIDE);
  const emaudit_tensor first = f32_rows(one), second = f32_rows(two);
  EXPECT(OK, emaudit_probe_score(probe, &first, EMAUDIT_UNIT_ALIGNED_SD, expected, NULL, &error));
  EXPECT(OK, emaudit_steering_apply(steering, &first, NULL, NULL, NULL, &error));
  EXPECT(OK, emaudit_steering_score_and_apply(steering, &second, EMAUDIT_UNIT_ALIGNED_SD, scores, NULL,
                                              NULL, NULL, &error));
  CHECK(same(scores, expected, ROWS));
  for (size_t row = 0; row < ROWS; ++row) {
    CHECK(same(one + row * STRIDE, two + row * STRIDE, WIDTH));
  }
  emaudit_steering_free(steering);
}

/* A gate between the scores edits exactly the rows above it. */
static void test_gate(const emaudit_probe *probe) {
  float data[ROWS * STRIDE], before[ROWS * STRIDE], scores[ROWS];
  fill_rows(data, ROWS, STRIDE, STRIDE);
  memcpy(before, data, sizeof before);
  const emaudit_tensor rows = f32_rows(data);
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_ALIGNED_SD, scores, NULL, &error));
  float lowest = scores[0], highest = scores[0];
  for (size_t i = 1; i < ROWS; ++i) {
    lowest = fminf(lowest, scores[i]);
    highest = fmaxf(highest, scores[i]);
  }
  CHECK(highest - lowest > 1e-3f);
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  options.has_gate = 1;
  options.gate = lowest + (highest - lowest) / 2.0f;
  emaudit_steering *steering = steering_for(probe, &options);
  uint8_t status[ROWS];
  emaudit_steer_report report = EMAUDIT_STEER_REPORT_INIT;
  EXPECT(OK, emaudit_steering_apply(steering, &rows, NULL, status, &report, &error));
  uint64_t gated = 0;
  for (size_t i = 0; i < ROWS; ++i) {
    const int open = scores[i] > options.gate;
    gated += open ? 0u : 1u;
    CHECK(status[i] == (open ? EMAUDIT_ROW_OK : EMAUDIT_ROW_GATED));
    CHECK(same(data + i * STRIDE, before + i * STRIDE, WIDTH) == !open);
  }
  CHECK(gated > 0 && gated < ROWS && report.gated == gated && report.touched == ROWS - gated);
  emaudit_steering_free(steering);
}

/* Clamp brings every score down to the ceiling, and a dose limit shortens an edit that is too large. */
static void test_clamp_and_limit(const emaudit_probe *probe) {
  float data[ROWS * STRIDE], scores[ROWS];
  fill_rows(data, ROWS, WIDTH, STRIDE);
  const emaudit_tensor rows = f32_rows(data);
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_CLAMP;
  options.ceiling = -1.0f;
  emaudit_steering *steering = steering_for(probe, &options);
  EXPECT(OK, emaudit_steering_apply(steering, &rows, NULL, NULL, NULL, &error));
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_ALIGNED_SD, scores, NULL, &error));
  for (size_t i = 0; i < ROWS; ++i) {
    CHECK(scores[i] <= -0.999f);
  }
  emaudit_steering_free(steering);

  emaudit_steering_options limited = EMAUDIT_STEERING_OPTIONS_INIT;
  limited.operation = EMAUDIT_OPERATION_SUBTRACT;
  limited.alpha = 100.0f;
  limited.has_dose_limit = 1;
  limited.dose_limit = 0.25f;
  steering = steering_for(probe, &limited);
  uint8_t status[ROWS];
  emaudit_steer_report report = EMAUDIT_STEER_REPORT_INIT;
  EXPECT(OK, emaudit_steering_apply(steering, &rows, NULL, status, &report, &error));
  CHECK(report.limited == ROWS && report.largest_dose > 0.2f && report.largest_dose < 0.2501f);
  CHECK(status[0] == EMAUDIT_ROW_LIMITED);
  emaudit_steering_free(steering);
}

/* A bad row is flagged and untouched, the others are steered, and the report is written. */
static void test_non_finite(const emaudit_probe *probe) {
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  emaudit_steering *steering = steering_for(probe, &options);
  float data[ROWS * STRIDE], before[ROWS * STRIDE], scores[ROWS];
  fill_rows(before, ROWS, STRIDE, STRIDE);
  before[STRIDE + 9] = NAN;
  memcpy(data, before, sizeof data);
  const emaudit_tensor rows = f32_rows(data);
  uint8_t status[ROWS];
  emaudit_steer_report report = EMAUDIT_STEER_REPORT_INIT;
  EXPECT(NON_FINITE, emaudit_steering_score_and_apply(steering, &rows, EMAUDIT_UNIT_ALIGNED_SD, scores, NULL,
                                                      status, &report, &error));
  for (size_t i = 0; i < ROWS; ++i) {
    CHECK(status[i] == (i == 1 ? EMAUDIT_ROW_NON_FINITE : EMAUDIT_ROW_OK));
    CHECK(isnan(scores[i]) == (i == 1));
    CHECK(same(data + i * STRIDE, before + i * STRIDE, WIDTH) == (i == 1));
  }
  CHECK(report.rows == ROWS && report.nonfinite == 1 && report.touched == ROWS - 1);
  CHECK(report.largest_dose > 0.0f);
  emaudit_steering_free(steering);
}

void test_steer(void) {
  emaudit_directions *directions = open_fixture("specific.safetensors");
  float v[WIDTH];
  EXPECT(OK, emaudit_directions_copy_vectors(directions, LAYER, v, NULL, WIDTH, &error));
  emaudit_directions_free(directions);
  emaudit_probe *probe = probe_fixture("specific.safetensors");
  test_subtract(probe, v);
  test_one_pass(probe);
  test_gate(probe);
  test_clamp_and_limit(probe);
  test_non_finite(probe);
  emaudit_probe_free(probe);
}

static void refuse_options(const emaudit_probe *probe, emaudit_steering_options options) {
  emaudit_steering *untouched = NULL;
  EXPECT(INVALID_ARGUMENT, emaudit_steering_new(probe, &options, &untouched, &error));
  CHECK(untouched == NULL);
}

static void test_bad_options(const emaudit_probe *probe) {
  emaudit_steering_options good = EMAUDIT_STEERING_OPTIONS_INIT;
  refuse_options(probe, good); /* no operation */
  good.operation = EMAUDIT_OPERATION_SUBTRACT;
  emaudit_steering_options bad = good;
  bad.operation = 4;
  refuse_options(probe, bad);
  bad = good;
  bad.alpha = NAN;
  refuse_options(probe, bad);
  bad = good;
  bad.has_gate = 2;
  refuse_options(probe, bad);
  bad = good;
  bad.has_gate = 1;
  bad.gate = NAN;
  refuse_options(probe, bad);
  bad = good;
  bad.has_dose_limit = 1;
  bad.dose_limit = -1.0f;
  refuse_options(probe, bad);
  bad = good;
  bad.reserved = 1;
  refuse_options(probe, bad);
  bad = good;
  bad.struct_size = sizeof bad - 4;
  refuse_options(probe, bad);
  emaudit_steering *steering = NULL;
  EXPECT(INVALID_ARGUMENT, emaudit_steering_new(probe, NULL, &steering, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_new(NULL, &good, &steering, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_new(probe, &good, NULL, &error));
}

/* Refused before the first write: the rows and every output stay as they were. */
static void test_bad_calls(const emaudit_steering *steering) {
  float data[ROWS * STRIDE], before[ROWS * STRIDE];
  fill_rows(data, ROWS, WIDTH, STRIDE);
  memcpy(before, data, sizeof before);
  const emaudit_tensor rows = f32_rows(data);
  const float strengths[ROWS] = {1.0f, 1.0f, 1.0f, INFINITY};
  uint8_t status[ROWS] = {77, 77, 77, 77};
  emaudit_steer_report report = EMAUDIT_STEER_REPORT_INIT;
  report.rows = 77;
  EXPECT(INVALID_ARGUMENT, emaudit_steering_apply(steering, &rows, strengths, status, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_apply(steering, &rows, data, status, &report, &error));
  EXPECT(INVALID_ARGUMENT,
         emaudit_steering_apply(steering, &rows, NULL, (uint8_t *)data, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_apply(NULL, &rows, NULL, status, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_apply(steering, NULL, NULL, status, &report, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steering_score_and_apply(steering, &rows, EMAUDIT_UNIT_RAW, NULL, NULL,
                                                            status, &report, &error));
  emaudit_tensor wide = rows;
  wide.cols = WIDTH + 1;
  EXPECT(WIDTH_MISMATCH, emaudit_steering_apply(steering, &wide, NULL, status, &report, &error));
  report.struct_size = 4;
  EXPECT(INVALID_ARGUMENT, emaudit_steering_apply(steering, &rows, NULL, status, &report, &error));
  CHECK(status[0] == 77 && status[3] == 77 && report.rows == 77);
  CHECK(same(data, before, WIDTH) && same(data + 3 * STRIDE, before + 3 * STRIDE, WIDTH));
}

void test_steer_refusals(void) {
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  emaudit_probe *untested = probe_fixture("good.safetensors");
  emaudit_steering *steering = NULL;
  EXPECT(NOT_SPECIFIC, emaudit_steering_new(untested, &options, &steering, &error));
  CHECK(steering == NULL);
  options.allow_nonspecific = 1;
  emaudit_steering_free(steering_for(untested, &options));
  emaudit_probe_free(untested);

  emaudit_probe *probe = probe_fixture("specific.safetensors");
  options.allow_nonspecific = 0;
  steering = steering_for(probe, &options);
  test_bad_options(probe);
  emaudit_probe_free(probe); /* the steering handle lives on */
  test_bad_calls(steering);
  emaudit_tensor none = EMAUDIT_TENSOR_INIT;
  none.dtype = EMAUDIT_DTYPE_F32;
  none.cols = WIDTH;
  EXPECT(OK, emaudit_steering_apply(steering, &none, NULL, NULL, NULL, &error));
  emaudit_steering_free(steering);
}
