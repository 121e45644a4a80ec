/* Checks of the C tests: each one counts, the first that fails ends the program with its line. */
#ifndef EMAUDIT_TESTS_CHECK_H
#define EMAUDIT_TESTS_CHECK_H

#include "emaudit.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern unsigned checks_done;

#define CHECK(condition)                                                        \
  do {                                                                          \
    ++checks_done;                                                              \
    if (!(condition)) {                                                         \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);   \
      exit(1);                                                                  \
    }                                                                           \
  } while (0)

/* Calls with an error pointer named `error` in scope of the macro; requires exactly that status. */
#define EXPECT(wanted, call)                                                    \
  do {                                                                          \
    emaudit_error *error = NULL;                                                \
    emaudit_status got = (call);                                                \
    check_status(__FILE__, __LINE__, #call, EMAUDIT_STATUS_##wanted, got, error); \
    emaudit_error_free(error);                                                  \
  } while (0)

void check_status(const char *file, int line, const char *call, emaudit_status wanted,
                  emaudit_status got, const emaudit_error *error);

/* A path inside the fixture directory; valid until the next call. */
const char *fixture(const char *name);

/* Opens a good fixture or ends the program. */
emaudit_directions *open_fixture(const char *name);

/* A probe for the layer the fixtures were made for, with the default kernel. */
emaudit_probe *probe_fixture(const char *name);

/* The numbers every fixture shares with tests/c_abi/fixture.rs. */
enum { WIDTH = 67, LAYER = 3, OTHER_LAYER = 1, N_LAYERS = 6, VOCABULARY = 1000 };
#define SEQUENCES 400u
#define RATE 0.01

/* Deterministic values in about -2..2; a prime period, so that no two rows are equal. */
void fill_rows(float *rows, size_t count, size_t cols, size_t stride);

/* Raw score of one row in double, from the vectors of the file: (row - mean) . u, where u is the direction
 * divided by its norm and rounded to float32. */
double exact_raw(const emaudit_directions *directions, uint32_t layer, const float *row);

void test_versions(void);
void test_open(void);
void test_trust(void);
void test_info(void);
void test_identity(void);
void test_structs(void);
void test_score(void);
void test_score_refusals(void);
void test_score_all(void);
void test_score_all_refusals(void);
void test_uncalibrated(void);
void test_steer(void);
void test_steer_refusals(void);
void test_monitor(void);
void test_drift(void);
void test_audit(void);
void test_landing(void);
void test_slot(void);
void test_log(void);
void test_device(void);

#endif
