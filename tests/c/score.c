/* Scores against numbers computed here in double, and every way a score is refused. */
#include "check.h"

enum { ROWS = 5, STRIDE = WIDTH + 6 };

static emaudit_tensor f32_rows(float *data, size_t rows) {
  emaudit_tensor tensor = EMAUDIT_TENSOR_INIT;
  tensor.dtype = EMAUDIT_DTYPE_F32;
  tensor.data = data;
  tensor.rows = rows;
  tensor.cols = WIDTH;
  return tensor;
}

static double norm_of(const float *row) {
  double sum = 0.0;
  for (size_t i = 0; i < WIDTH; ++i) {
    sum += (double)row[i] * (double)row[i];
  }
  return sqrt(sum);
}

static void score_with(const emaudit_directions *directions, uint32_t kernel, double sigma) {
  emaudit_probe_options options = EMAUDIT_PROBE_OPTIONS_INIT;
  options.kernel = kernel;
  emaudit_probe *probe = NULL;
  EXPECT(OK, emaudit_probe_new(directions, LAYER, &options, &probe, &error));
  float data[ROWS * STRIDE];
  fill_rows(data, ROWS, WIDTH, STRIDE);
  emaudit_tensor rows = f32_rows(data, ROWS);
  rows.row_stride = STRIDE;
  float raw[ROWS], z[ROWS];
  uint8_t status[ROWS];
  memset(status, 0xff, sizeof status);
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_RAW, raw, NULL, &error));
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_ALIGNED_SD, z, status, &error));
  for (size_t i = 0; i < ROWS; ++i) {
    const float *row = data + i * STRIDE;
    const double exact = exact_raw(directions, LAYER, row);
    double bound = 0.0;
    EXPECT(OK, emaudit_probe_error_bound(probe, norm_of(row), &bound, &error));
    CHECK(bound > 0.0 && bound < 1e-3);
    CHECK(fabs((double)raw[i] - exact) <= bound);
    CHECK(fabs((double)z[i] - exact / sigma) <= bound / sigma + fabs(exact / sigma) * 0x1p-24);
    CHECK(status[i] == EMAUDIT_ROW_OK);
  }
  emaudit_probe_free(probe);
}

/* bfloat16 and binary16 of numbers that both hold exactly must score as in float32. */
static void score_half(const emaudit_probe *probe) {
  float wide[WIDTH];
  uint16_t bf16[WIDTH], f16[WIDTH];
  for (size_t i = 0; i < WIDTH; ++i) {
    wide[i] = i % 3 == 0 ? 1.0f : -2.0f;
    bf16[i] = i % 3 == 0 ? 0x3f80 : 0xc000;
    f16[i] = i % 3 == 0 ? 0x3c00 : 0xc000;
  }
  emaudit_tensor rows = f32_rows(wide, 1);
  float expected = 0.0f, score = 0.0f;
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_RAW, &expected, NULL, &error));
  rows.dtype = EMAUDIT_DTYPE_BF16;
  rows.data = bf16;
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_RAW, &score, NULL, &error));
  CHECK(memcmp(&score, &expected, sizeof score) == 0);
  rows.dtype = EMAUDIT_DTYPE_F16;
  rows.data = f16;
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_RAW, &score, NULL, &error));
  CHECK(memcmp(&score, &expected, sizeof score) == 0);
}

static void score_non_finite(const emaudit_probe *probe) {
  float data[ROWS * WIDTH], good[ROWS], scores[ROWS];
  uint8_t status[ROWS];
  fill_rows(data, ROWS, WIDTH, WIDTH);
  emaudit_tensor rows = f32_rows(data, ROWS);
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_ALIGNED_SD, good, NULL, &error));
  data[1 * WIDTH + WIDTH - 1] = NAN; /* in the tail of the vector loop */
  data[3 * WIDTH] = -INFINITY;
  EXPECT(NON_FINITE, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_ALIGNED_SD, scores, status, &error));
  for (size_t i = 0; i < ROWS; ++i) {
    const int bad = i == 1 || i == 3;
    CHECK(status[i] == (bad ? EMAUDIT_ROW_NON_FINITE : EMAUDIT_ROW_OK));
    CHECK(bad ? isnan(scores[i]) : memcmp(&scores[i], &good[i], sizeof good[i]) == 0);
  }
}

void test_score(void) {
  emaudit_directions *directions = open_fixture("good.safetensors");
  emaudit_layer_info layer = EMAUDIT_LAYER_INFO_INIT;
  EXPECT(OK, emaudit_directions_get_layer_info(directions, LAYER, &layer, &error));
  uint32_t kernels[8];
  size_t count = 0;
  EXPECT(OK, emaudit_kernel_list(kernels, 8, &count, &error));
  for (size_t i = 0; i < count; ++i) {
    score_with(directions, kernels[i], layer.sigma);
  }
  score_with(directions, EMAUDIT_KERNEL_DEFAULT, layer.sigma);
  emaudit_directions_free(directions);
  emaudit_probe *probe = probe_fixture("good.safetensors");
  score_half(probe);
  score_non_finite(probe);
  emaudit_probe_free(probe);
}

/* Each of these must be refused before anything is written. */
void test_score_refusals(void) {
  emaudit_probe *probe = probe_fixture("good.safetensors");
  float data[2 * WIDTH + 1], scores[2] = {7.0f, 7.0f};
  uint8_t status[2] = {77, 77};
  fill_rows(data, 2, WIDTH, WIDTH);
  const emaudit_tensor good = f32_rows(data, 2);
  emaudit_tensor rows = good;
#define SCORE(wanted, tensor, unit, out) \
  EXPECT(wanted, emaudit_probe_score(probe, tensor, unit, out, status, &error))
  rows.cols = WIDTH - 1;
  SCORE(WIDTH_MISMATCH, &rows, EMAUDIT_UNIT_RAW, scores);
  rows = good;
  rows.dtype = 0;
  SCORE(INVALID_ARGUMENT, &rows, EMAUDIT_UNIT_RAW, scores);
  rows = good;
  rows.struct_size = 8;
  SCORE(INVALID_ARGUMENT, &rows, EMAUDIT_UNIT_RAW, scores);
  rows = good;
  rows.data = NULL;
  SCORE(INVALID_ARGUMENT, &rows, EMAUDIT_UNIT_RAW, scores);
  rows = good;
  rows.data = (char *)data + 1;
  SCORE(INVALID_ARGUMENT, &rows, EMAUDIT_UNIT_RAW, scores);
  rows = good;
  rows.row_stride = WIDTH - 1;
  SCORE(INVALID_ARGUMENT, &rows, EMAUDIT_UNIT_RAW, scores);
  rows = good;
  rows.row_stride = SIZE_MAX / 2;
  SCORE(INVALID_ARGUMENT, &rows, EMAUDIT_UNIT_RAW, scores);
  SCORE(INVALID_ARGUMENT, NULL, EMAUDIT_UNIT_RAW, scores);
  SCORE(INVALID_ARGUMENT, &good, 0, scores);
  SCORE(INVALID_ARGUMENT, &good, 3, scores);
  SCORE(INVALID_ARGUMENT, &good, EMAUDIT_UNIT_RAW, NULL);
  SCORE(INVALID_ARGUMENT, &good, EMAUDIT_UNIT_RAW, data + 3); /* overlaps the rows */
  EXPECT(INVALID_ARGUMENT, emaudit_probe_score(NULL, &good, EMAUDIT_UNIT_RAW, scores, status, &error));
  CHECK(status[0] == 77 && status[1] == 77);
  CHECK(memcmp(scores, (float[]){7.0f, 7.0f}, sizeof scores) == 0);

  rows = f32_rows(NULL, 0); /* no rows: every pointer is ignored */
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_RAW, NULL, NULL, &error));
  double bound = 0.0;
  EXPECT(INVALID_ARGUMENT, emaudit_probe_error_bound(probe, NAN, &bound, &error));
  emaudit_probe_free(probe);
}

static emaudit_probe *probe_with(const emaudit_directions *directions, uint32_t layer, uint32_t kernel) {
  emaudit_probe_options options = EMAUDIT_PROBE_OPTIONS_INIT;
  options.kernel = kernel;
  emaudit_probe *probe = NULL;
  EXPECT(OK, emaudit_probe_new(directions, layer, &options, &probe, &error));
  return probe;
}

enum { TOGETHER = 11 }; /* more than the library takes at once, and not a multiple of it */

/* Several probes at once give the bits of each alone: good rows, then two that are not finite. */
static void score_all_with(const emaudit_directions *directions, uint32_t kernel) {
  emaudit_probe *first = probe_with(directions, LAYER, kernel);
  emaudit_probe *other = probe_with(directions, OTHER_LAYER, kernel);
  const emaudit_probe *probes[TOGETHER];
  for (size_t k = 0; k < TOGETHER; ++k) {
    probes[k] = k % 3 == 1 ? other : first;
  }
  float data[ROWS * STRIDE], together[ROWS * TOGETHER], alone[ROWS];
  uint8_t status[ROWS];
  fill_rows(data, ROWS, WIDTH, STRIDE);
  emaudit_tensor rows = f32_rows(data, ROWS);
  rows.row_stride = STRIDE;
  const uint32_t unit = EMAUDIT_UNIT_ALIGNED_SD;
  for (int broken = 0; broken < 2; ++broken) {
    memset(status, 0xff, sizeof status);
    if (broken) {
      data[1 * STRIDE + WIDTH - 1] = NAN;
      data[3 * STRIDE] = -INFINITY;
      EXPECT(NON_FINITE, emaudit_probe_score_all(probes, TOGETHER, &rows, unit, together, status, &error));
    } else {
      EXPECT(OK, emaudit_probe_score_all(probes, TOGETHER, &rows, unit, together, status, &error));
    }
    for (size_t k = 0; k < TOGETHER; ++k) {
      if (broken) {
        EXPECT(NON_FINITE, emaudit_probe_score(probes[k], &rows, unit, alone, NULL, &error));
      } else {
        EXPECT(OK, emaudit_probe_score(probes[k], &rows, unit, alone, NULL, &error));
      }
      for (size_t i = 0; i < ROWS; ++i) {
        const int bad = broken && (i == 1 || i == 3);
        const float score = together[i * TOGETHER + k];
        CHECK(status[i] == (bad ? EMAUDIT_ROW_NON_FINITE : EMAUDIT_ROW_OK));
        CHECK(bad ? isnan(score) : isfinite(score) && memcmp(&score, &alone[i], sizeof score) == 0);
      }
    }
  }
  emaudit_probe_free(other);
  emaudit_probe_free(first);
}

void test_score_all(void) {
  emaudit_directions *directions = open_fixture("good.safetensors");
  uint32_t kernels[8];
  size_t count = 0;
  EXPECT(OK, emaudit_kernel_list(kernels, 8, &count, &error));
  CHECK(count >= 2);
  for (size_t i = 0; i < count; ++i) {
    score_all_with(directions, kernels[i]);
  }
  emaudit_directions_free(directions);
}

/* Each of these must be refused before anything is written. */
void test_score_all_refusals(void) {
  emaudit_directions *directions = open_fixture("good.safetensors");
  emaudit_probe *scalar = probe_with(directions, LAYER, EMAUDIT_KERNEL_SCALAR);
  emaudit_probe *other = probe_with(directions, OTHER_LAYER, EMAUDIT_KERNEL_SCALAR);
  emaudit_probe *portable = probe_with(directions, LAYER, EMAUDIT_KERNEL_PORTABLE);
  emaudit_probe *uncalibrated = probe_fixture("uncalibrated.safetensors");
  const emaudit_probe *good[2] = {scalar, other}, *null[2] = {scalar, NULL}, *mixed[2] = {scalar, portable};
  emaudit_probe *narrow = probe_fixture("narrow.safetensors");
  const emaudit_probe *widths[2] = {scalar, narrow};
  const emaudit_probe *raw_only[2] = {uncalibrated, uncalibrated};
  const emaudit_probe *misaligned[2] = {scalar, (const emaudit_probe *)(const void *)((const char *)other + 1)};
  float data[2 * WIDTH], before[2 * WIDTH], scores[4] = {7.0f, 7.0f, 7.0f, 7.0f};
  uint8_t status[2] = {77, 77};
  fill_rows(data, 2, WIDTH, WIDTH);
  memcpy(before, data, sizeof data);
  const emaudit_tensor rows = f32_rows(data, 2);
  emaudit_tensor wrong = rows;
#define ALL(wanted, probes, count, tensor, unit, out, statuses) \
  EXPECT(wanted, emaudit_probe_score_all(probes, count, tensor, EMAUDIT_UNIT_##unit, out, statuses, &error))
  ALL(INVALID_ARGUMENT, good, 0, &rows, RAW, scores, status);
  ALL(INVALID_ARGUMENT, NULL, 0, &rows, RAW, scores, status);
  ALL(INVALID_ARGUMENT, NULL, 2, &rows, RAW, scores, status);
  ALL(INVALID_ARGUMENT, good, SIZE_MAX, &rows, RAW, scores, status);
  ALL(INVALID_ARGUMENT, null, 2, &rows, RAW, scores, status);
  ALL(INVALID_ARGUMENT, misaligned, 2, &rows, RAW, scores, status);
  ALL(INVALID_ARGUMENT, mixed, 2, &rows, RAW, scores, status);
  ALL(NOT_CALIBRATED, raw_only, 2, &rows, ALIGNED_SD, scores, status);
  ALL(WIDTH_MISMATCH, widths, 2, &rows, RAW, scores, status);
  ALL(INVALID_ARGUMENT, good, 2, NULL, RAW, scores, status);
  ALL(INVALID_ARGUMENT, good, 2, &rows, RAW, NULL, status);
  EXPECT(INVALID_ARGUMENT, emaudit_probe_score_all(good, 2, &rows, 3, scores, status, &error));
  wrong.cols = WIDTH - 1;
  ALL(WIDTH_MISMATCH, good, 2, &wrong, RAW, scores, status);
  wrong = rows;
  wrong.rows = SIZE_MAX / 2 + 2; /* times two probes it would wrap to 2 */
  ALL(INVALID_ARGUMENT, good, 2, &wrong, RAW, scores, status);
  wrong = rows;
  wrong.data = NULL;
  ALL(INVALID_ARGUMENT, good, 2, &wrong, RAW, scores, status);
  ALL(INVALID_ARGUMENT, good, 2, &rows, RAW, data + 2 * WIDTH - 1, status); /* the first score is the last element */
  ALL(INVALID_ARGUMENT, good, 2, &rows, RAW, scores, (uint8_t *)data);
  ALL(INVALID_ARGUMENT, good, 2, &rows, RAW, scores, (uint8_t *)&scores[3]); /* the last score of the second probe */
  ALL(INVALID_ARGUMENT, good, 2, &rows, RAW, (float *)(void *)good, status);
  ALL(INVALID_ARGUMENT, good, 2, &rows, RAW, scores, (uint8_t *)&good[1]);
  CHECK(good[0] == scalar && good[1] == other && memcmp(data, before, sizeof data) == 0);
  CHECK(status[0] == 77 && status[1] == 77);
  CHECK(memcmp(scores, (float[]){7.0f, 7.0f, 7.0f, 7.0f}, sizeof scores) == 0);

  emaudit_error *sentence = NULL;
  CHECK(emaudit_probe_score_all(null, 2, &rows, EMAUDIT_UNIT_RAW, scores, status, &sentence) != EMAUDIT_STATUS_OK);
  CHECK(strstr(emaudit_error_message(sentence), "probes[1] is NULL") != NULL);
  emaudit_error_free(sentence);
  ALL(OK, raw_only, 2, &rows, RAW, scores, status);
  wrong = f32_rows(NULL, 0); /* no rows: the arrays for them are ignored */
  ALL(OK, good, 2, &wrong, RAW, NULL, NULL);
  emaudit_probe_free(narrow);
  emaudit_probe_free(uncalibrated);
  emaudit_probe_free(portable);
  emaudit_probe_free(other);
  emaudit_probe_free(scalar);
  emaudit_directions_free(directions);
}

/* Without calibration there are raw scores, and nothing that needs the spread of aligned ones. */
void test_uncalibrated(void) {
  emaudit_probe *probe = probe_fixture("uncalibrated.safetensors");
  emaudit_probe *calibrated = probe_fixture("good.safetensors");
  float data[2 * WIDTH], before[2 * WIDTH], scores[2] = {7.0f, 7.0f}, expected[2];
  uint8_t status[2] = {77, 77};
  fill_rows(data, 2, WIDTH, WIDTH);
  memcpy(before, data, sizeof data);
  const emaudit_tensor rows = f32_rows(data, 2);
  EXPECT(NOT_CALIBRATED, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_ALIGNED_SD, scores, status, &error));
  CHECK(scores[0] == 7.0f && scores[1] == 7.0f && status[0] == 77 && status[1] == 77);
  EXPECT(OK, emaudit_probe_score(probe, &rows, EMAUDIT_UNIT_RAW, scores, NULL, &error));
  EXPECT(OK, emaudit_probe_score(calibrated, &rows, EMAUDIT_UNIT_RAW, expected, NULL, &error));
  CHECK(memcmp(scores, expected, sizeof scores) == 0);

  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_CLAMP;
  options.allow_nonspecific = 1;
  emaudit_steering *steering = NULL;
  EXPECT(NOT_CALIBRATED, emaudit_steering_new(probe, &options, &steering, &error));
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  options.alpha = 1.0f;
  EXPECT(OK, emaudit_steering_new(probe, &options, &steering, &error));
  scores[0] = scores[1] = 7.0f;
  EXPECT(NOT_CALIBRATED, emaudit_steering_score_and_apply(steering, &rows, EMAUDIT_UNIT_ALIGNED_SD, scores, NULL,
                                                          status, NULL, &error));
  CHECK(scores[0] == 7.0f && status[0] == 77 && memcmp(data, before, sizeof data) == 0);
  EXPECT(OK, emaudit_steering_score_and_apply(steering, &rows, EMAUDIT_UNIT_RAW, scores, NULL, status, NULL, &error));
  CHECK(memcmp(scores, expected, sizeof scores) == 0 && memcmp(data, before, sizeof data) != 0);
  emaudit_monitor_options watch = EMAUDIT_MONITOR_OPTIONS_INIT;
  watch.aggregation = EMAUDIT_AGGREGATION_MEAN;
  watch.rate = 0.01;
  emaudit_monitor *monitor = NULL;
  EXPECT(RATE_UNSUPPORTED, emaudit_monitor_new(probe, &watch, &monitor, &error));
  emaudit_steering_free(steering);
  emaudit_probe_free(calibrated);
  emaudit_probe_free(probe);
}
