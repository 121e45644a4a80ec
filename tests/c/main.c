/* Runs every C test against the fixtures in argv[1]. */
#include "check.h"

unsigned checks_done = 0;

static const char *fixtures = ".";

void check_status(const char *file, int line, const char *call, emaudit_status wanted,
                  emaudit_status got, const emaudit_error *error) {
  ++checks_done;
  const int sentence = error != NULL && emaudit_error_message(error)[0] != '\0';
  if (got == wanted && sentence == (got != EMAUDIT_STATUS_OK) && emaudit_error_status(error) == got) {
    return;
  }
  fprintf(stderr, "%s:%d: %s gave %s (%s), wanted %s\n", file, line, call, emaudit_status_name(got),
          emaudit_error_message(error), emaudit_status_name(wanted));
  exit(1);
}

const char *fixture(const char *name) {
  static char path[4096];
  const int length = snprintf(path, sizeof path, "%s/%s", fixtures, name);
  CHECK(length > 0 && (size_t)length < sizeof path);
  return path;
}

emaudit_directions *open_fixture(const char *name) {
  emaudit_directions *directions = NULL;
  EXPECT(OK, emaudit_directions_open(fixture(name), NULL, &directions, &error));
  CHECK(directions != NULL);
  return directions;
}

emaudit_probe *probe_fixture(const char *name) {
  emaudit_directions *directions = open_fixture(name);
  emaudit_probe *probe = NULL;
  EXPECT(OK, emaudit_probe_new(directions, LAYER, NULL, &probe, &error));
  emaudit_directions_free(directions); /* the probe keeps it */
  return probe;
}

void fill_rows(float *rows, size_t count, size_t cols, size_t stride) {
  for (size_t row = 0; row < count; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const size_t step = (row * cols + col) * 31u % 251u;
      rows[row * stride + col] = (float)step / 64.0f - 1.953125f;
    }
  }
}

double exact_raw(const emaudit_directions *directions, uint32_t layer, const float *row) {
  float direction[WIDTH], mean[WIDTH];
  EXPECT(OK, emaudit_directions_copy_vectors(directions, layer, direction, mean, WIDTH, &error));
  double squares = 0.0, score = 0.0;
  for (size_t i = 0; i < WIDTH; ++i) {
    squares += (double)direction[i] * (double)direction[i];
  }
  for (size_t i = 0; i < WIDTH; ++i) {
    const double unit = (double)(float)((double)direction[i] / sqrt(squares));
    score += ((double)row[i] - (double)mean[i]) * unit;
  }
  return score;
}

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s FIXTURES\n", argv[0]);
    return 2;
  }
  fixtures = argv[1];
  test_versions();
  test_open();
  test_trust();
  test_info();
  test_identity();
  test_structs();
  test_score();
  test_score_refusals();
  test_score_all();
  test_score_all_refusals();
  test_uncalibrated();
  test_steer();
  test_steer_refusals();
  test_monitor();
  test_drift();
  test_audit();
  test_landing();
  test_slot();
  test_log();
  test_device();
  printf("ok: %u checks\n", checks_done);
  return 0;
}
