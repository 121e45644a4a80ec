/* Checks real activations through the C interface:
 *
 *   demo_check DIRECTIONS.safetensors ACTIVATIONS.bin SCORES.bin LAYER KERNEL
 *
 * ACTIVATIONS.bin: u32 rows, u32 cols, then rows * cols float32. SCORES.bin: u32 n, then n float32, the z
 * scores of those rows with KERNEL (a name such as avx512). All little-endian.
 *
 * The forced kernel must give the same bits; the default kernel must stay within the documented bound of the
 * score computed here in double; subtracting the direction in place must move every row by it and nothing
 * else. Prints a summary and exits with 0 only when all of it holds. */
#include "emaudit.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct matrix {
  size_t rows, cols;
  float *data;
};

struct layer {
  float *direction, *unit;
  double offset, sigma, norm;
};

static void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("demo_check: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  exit(1);
}

/* `error` by address: the order in which arguments are evaluated is open, and the call fills it. */
static void require(emaudit_status status, emaudit_error *const *error, const char *what) {
  if (status != EMAUDIT_STATUS_OK) {
    fail("%s: %s: %s", what, emaudit_status_name(status), emaudit_error_message(*error));
  }
}

static void *allocate(size_t count, size_t size) {
  void *memory = calloc(count == 0 ? 1 : count, size);
  if (memory == NULL) {
    fail("out of memory");
  }
  return memory;
}

static uint32_t read_u32(FILE *file, const char *path) {
  unsigned char b[4];
  if (fread(b, 1, 4, file) != 4) {
    fail("%s ends early", path);
  }
  return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

/* A matrix whose header is rows and cols, or a vector (one column) whose header is its length. */
static struct matrix read_matrix(const char *path, int has_cols) {
  FILE *file = fopen(path, "rb");
  if (file == NULL) {
    fail("cannot open %s: %s", path, strerror(errno));
  }
  struct matrix matrix;
  matrix.rows = read_u32(file, path);
  matrix.cols = has_cols ? read_u32(file, path) : 1;
  if (matrix.rows == 0 || matrix.cols == 0 || matrix.rows > SIZE_MAX / 4 / matrix.cols) {
    fail("%s has an impossible size", path);
  }
  matrix.data = allocate(matrix.rows * matrix.cols, sizeof(float));
  for (size_t i = 0; i < matrix.rows * matrix.cols; ++i) {
    const uint32_t bits = read_u32(file, path);
    memcpy(&matrix.data[i], &bits, sizeof bits);
  }
  if (fgetc(file) != EOF) {
    fail("%s is longer than it says", path);
  }
  fclose(file);
  return matrix;
}

static emaudit_directions *open_mapped(const char *path, emaudit_directions_info *info) {
  emaudit_open_options options = EMAUDIT_OPEN_OPTIONS_INIT;
  options.mode = EMAUDIT_MODE_MAPPED;
  emaudit_directions *directions = NULL;
  emaudit_error *error = NULL;
  require(emaudit_directions_open(path, &options, &directions, &error), &error, path);
  require(emaudit_directions_get_info(directions, info, &error), &error, "info");
  if (info->verified != 1) {
    fail("the directions are not verified");
  }
  return directions;
}

static struct layer read_layer(const emaudit_directions *directions, uint32_t number, size_t width) {
  emaudit_layer_info info = EMAUDIT_LAYER_INFO_INIT;
  emaudit_error *error = NULL;
  require(emaudit_directions_get_layer_info(directions, number, &info, &error), &error, "layer");
  struct layer layer = {allocate(width, sizeof(float)), allocate(width, sizeof(float)), 0.0, info.sigma, 0.0};
  float *mean = allocate(width, sizeof(float));
  require(emaudit_directions_copy_vectors(directions, number, layer.direction, mean, width, &error), &error,
          "vectors");
  double squares = 0.0;
  for (size_t i = 0; i < width; ++i) {
    squares += (double)layer.direction[i] * (double)layer.direction[i];
  }
  layer.norm = sqrt(squares);
  for (size_t i = 0; i < width; ++i) {
    layer.unit[i] = (float)((double)layer.direction[i] / layer.norm);
    layer.offset += (double)mean[i] * (double)layer.unit[i];
  }
  free(mean);
  return layer;
}

static emaudit_probe *probe_for(const emaudit_directions *directions, uint32_t layer, uint32_t kernel) {
  emaudit_probe_options options = EMAUDIT_PROBE_OPTIONS_INIT;
  options.kernel = kernel;
  emaudit_probe *probe = NULL;
  emaudit_error *error = NULL;
  require(emaudit_probe_new(directions, layer, &options, &probe, &error), &error, "probe");
  return probe;
}

static emaudit_tensor tensor_of(const struct matrix *rows) {
  emaudit_tensor tensor = EMAUDIT_TENSOR_INIT;
  tensor.dtype = EMAUDIT_DTYPE_F32;
  tensor.data = rows->data;
  tensor.rows = rows->rows;
  tensor.cols = rows->cols;
  return tensor;
}

static float *score(const emaudit_probe *probe, const struct matrix *rows) {
  float *scores = allocate(rows->rows, sizeof(float));
  const emaudit_tensor tensor = tensor_of(rows);
  emaudit_error *error = NULL;
  require(emaudit_probe_score(probe, &tensor, EMAUDIT_UNIT_ALIGNED_SD, scores, NULL, &error), &error, "score");
  return scores;
}

static void check_bits(const emaudit_probe *probe, const struct matrix *rows, const struct matrix *expected) {
  float *scores = score(probe, rows);
  for (size_t i = 0; i < rows->rows; ++i) {
    if (memcmp(&scores[i], &expected->data[i], sizeof(float)) != 0) {
      fail("row %zu: the forced kernel gives %.9g, expected %.9g", i, (double)scores[i],
           (double)expected->data[i]);
    }
  }
  free(scores);
}

/* The largest difference from the double-precision score, as a share of the documented bound. */
static double check_bound(const emaudit_probe *probe, const struct matrix *rows, const struct layer *layer) {
  float *scores = score(probe, rows);
  double worst = 0.0;
  for (size_t i = 0; i < rows->rows; ++i) {
    const float *row = rows->data + i * rows->cols;
    double raw = -layer->offset, squares = 0.0, bound = 0.0;
    for (size_t k = 0; k < rows->cols; ++k) {
      raw += (double)row[k] * (double)layer->unit[k];
      squares += (double)row[k] * (double)row[k];
    }
    emaudit_error *error = NULL;
    require(emaudit_probe_error_bound(probe, sqrt(squares), &bound, &error), &error, "bound");
    const double allowed = (bound + fabs(raw) * 0x1p-24) / layer->sigma;
    const double found = fabs((double)scores[i] - raw / layer->sigma);
    if (!(found <= allowed)) {
      fail("row %zu: off by %g, the bound is %g", i, found, allowed);
    }
    worst = fmax(worst, found / allowed);
  }
  free(scores);
  return worst;
}

static void check_moved(const struct matrix *after, const float *before, const struct layer *layer) {
  for (size_t i = 0; i < after->rows * after->cols; ++i) {
    const double edit = (double)layer->direction[i % after->cols];
    const double exact = (double)before[i] - edit;
    const double allowed = (fabs((double)before[i]) + fabs(edit)) * 0x1p-23 + 1e-45;
    if (!(fabs((double)after->data[i] - exact) <= allowed)) {
      fail("row %zu: element %zu is %.9g after subtracting, %.9g is right", i / after->cols, i % after->cols,
           (double)after->data[i], exact);
    }
  }
}

/* Subtracts the direction in place; every z falls by |v| / sigma. Gives the fall. */
static double check_subtract(const emaudit_probe *probe, const struct matrix *rows, const struct layer *layer,
                             int specific) {
  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  options.allow_nonspecific = specific ? 0 : 1;
  emaudit_steering *steering = NULL;
  emaudit_error *error = NULL;
  require(emaudit_steering_new(probe, &options, &steering, &error), &error, "steering");
  float *original = allocate(rows->rows * rows->cols, sizeof(float));
  memcpy(original, rows->data, rows->rows * rows->cols * sizeof(float));
  float *before = score(probe, rows);
  const emaudit_tensor tensor = tensor_of(rows);
  emaudit_steer_report report = EMAUDIT_STEER_REPORT_INIT;
  require(emaudit_steering_apply(steering, &tensor, NULL, NULL, &report, &error), &error, "subtract");
  if (report.rows != rows->rows || report.touched != rows->rows || !(report.largest_dose > 0.0f)) {
    fail("the report does not say that every row was steered");
  }
  check_moved(rows, original, layer);
  float *after = score(probe, rows);
  const double fall = layer->norm / layer->sigma;
  for (size_t i = 0; i < rows->rows; ++i) {
    const double found = (double)before[i] - (double)after[i];
    if (!(fabs(found - fall) <= 1e-3 * (fall + fabs((double)before[i])))) {
      fail("row %zu: z fell by %g, %g is right", i, found, fall);
    }
  }
  free(after);
  free(before);
  free(original);
  emaudit_steering_free(steering);
  return fall;
}

static uint32_t kernel_of(const emaudit_probe *probe) {
  emaudit_probe_info info = EMAUDIT_PROBE_INFO_INIT;
  emaudit_error *error = NULL;
  require(emaudit_probe_get_info(probe, &info, &error), &error, "probe info");
  return info.kernel;
}

static uint32_t parse_layer(const char *text) {
  char *end = NULL;
  const unsigned long number = strtoul(text, &end, 10);
  if (end == text || *end != '\0' || number > UINT32_MAX) {
    fail("`%s` is no layer", text);
  }
  return (uint32_t)number;
}

int main(int argc, char **argv) {
  if (argc != 6) {
    fprintf(stderr, "usage: %s DIRECTIONS.safetensors ACTIVATIONS.bin SCORES.bin LAYER KERNEL\n", argv[0]);
    return 2;
  }
  struct matrix rows = read_matrix(argv[2], 1);
  struct matrix expected = read_matrix(argv[3], 0);
  const uint32_t number = parse_layer(argv[4]);
  emaudit_directions_info info = EMAUDIT_DIRECTIONS_INFO_INIT;
  emaudit_directions *directions = open_mapped(argv[1], &info);
  if (rows.cols != info.width || rows.rows != expected.rows) {
    fail("%zu x %zu activations and %zu scores do not fit a width of %u", rows.rows, rows.cols, expected.rows,
         (unsigned)info.width);
  }
  struct layer layer = read_layer(directions, number, rows.cols);
  uint32_t kernel = 0;
  emaudit_error *error = NULL;
  require(emaudit_kernel_from_name(argv[5], &kernel, &error), &error, argv[5]);
  emaudit_probe *forced = probe_for(directions, number, kernel);
  emaudit_probe *standard = probe_for(directions, number, EMAUDIT_KERNEL_DEFAULT);
  emaudit_directions_free(directions);

  check_bits(forced, &rows, &expected);
  printf("forced kernel %s: %zu scores, all bits equal\n", argv[5], rows.rows);
  const double share = check_bound(standard, &rows, &layer);
  printf("default kernel %s: largest error %.3f of the documented bound\n",
         emaudit_kernel_name(kernel_of(standard)), share);
  const double fall = check_subtract(standard, &rows, &layer, info.causal == EMAUDIT_SPECIFICITY_SPECIFIC);
  printf("subtracted in place: every z fell by %.4f\n", fall);

  emaudit_probe_free(standard);
  emaudit_probe_free(forced);
  free(layer.direction);
  free(layer.unit);
  free(expected.data);
  free(rows.data);
  puts("demo_check: ok");
  return 0;
}
