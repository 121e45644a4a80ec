/* Opening, describing and identifying direction files. */
#include "check.h"

void test_versions(void) {
  CHECK(emaudit_abi_version() == EMAUDIT_ABI_VERSION);
  CHECK(strchr(emaudit_version(), '.') != NULL);
  CHECK(strcmp(emaudit_status_name(EMAUDIT_STATUS_OK), "OK") == 0);
  CHECK(strcmp(emaudit_status_name(EMAUDIT_STATUS_PANIC), "PANIC") == 0);
  CHECK(strcmp(emaudit_status_name(12345), "UNKNOWN") == 0);
  CHECK(emaudit_error_status(NULL) == EMAUDIT_STATUS_OK && emaudit_error_message(NULL)[0] == '\0');
  emaudit_error_free(NULL);
  emaudit_directions_free(NULL);
  emaudit_probe_free(NULL);
  emaudit_steering_free(NULL);
  emaudit_monitor_free(NULL);

  uint32_t kernels[8] = {0};
  size_t count = 0;
  EXPECT(OK, emaudit_kernel_list(NULL, 0, &count, &error));
  CHECK(count >= 2 && count <= 8); /* scalar and portable run everywhere */
  EXPECT(OK, emaudit_kernel_list(kernels, 8, &count, &error));
  for (size_t i = 0; i < count; ++i) {
    uint32_t number = 0;
    EXPECT(OK, emaudit_kernel_from_name(emaudit_kernel_name(kernels[i]), &number, &error));
    CHECK(number == kernels[i]);
  }
  uint32_t untouched = 77;
  EXPECT(KERNEL_UNAVAILABLE, emaudit_kernel_from_name("abacus", &untouched, &error));
  CHECK(untouched == 77);
  EXPECT(INVALID_ARGUMENT, emaudit_kernel_from_name(NULL, &untouched, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_kernel_list(kernels, 8, NULL, &error));
  CHECK(strcmp(emaudit_kernel_name(99), "unknown") == 0);
}

static void refuse(emaudit_status wanted, const char *name) {
  emaudit_directions *untouched = (emaudit_directions *)&checks_done;
  emaudit_error *error = NULL;
  const emaudit_status got = emaudit_directions_open(fixture(name), NULL, &untouched, &error);
  check_status(__FILE__, __LINE__, name, wanted, got, error);
  CHECK(untouched == (emaudit_directions *)&checks_done); /* written only on OK */
  emaudit_error_free(error);
}

static unsigned char *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  CHECK(file != NULL);
  CHECK(fseek(file, 0, SEEK_END) == 0);
  const long end = ftell(file);
  CHECK(end > 0 && fseek(file, 0, SEEK_SET) == 0);
  *size = (size_t)end;
  unsigned char *bytes = malloc(*size);
  CHECK(bytes != NULL && fread(bytes, 1, *size, file) == *size);
  fclose(file);
  return bytes;
}

static void test_bytes(void) {
  size_t size = 0;
  unsigned char *bytes = read_file(fixture("good.safetensors"), &size);
  emaudit_directions *directions = NULL;
  EXPECT(OK, emaudit_directions_from_bytes(bytes, size, NULL, &directions, &error));
  memset(bytes, 0xa5, size); /* the handle owns a copy */
  emaudit_directions_info info = EMAUDIT_DIRECTIONS_INFO_INIT;
  EXPECT(OK, emaudit_directions_get_info(directions, &info, &error));
  CHECK(info.width == WIDTH);
  emaudit_directions_free(directions);
  free(bytes);
  /* Nothing to read: the pointer is ignored, and nothing is no direction file. */
  EXPECT(NOT_A_DIRECTION_FILE, emaudit_directions_from_bytes(NULL, 0, NULL, &directions, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_directions_from_bytes(NULL, 8, NULL, &directions, &error));
}

static void test_options(void) {
  emaudit_directions *directions = NULL;
  emaudit_directions_info info = EMAUDIT_DIRECTIONS_INFO_INIT;
  emaudit_open_options options = EMAUDIT_OPEN_OPTIONS_INIT;
  options.mode = EMAUDIT_MODE_MAPPED;
  EXPECT(OK, emaudit_directions_open(fixture("good.safetensors"), &options, &directions, &error));
  EXPECT(OK, emaudit_directions_get_info(directions, &info, &error));
  CHECK(info.verified == 1);
  emaudit_directions_free(directions);

  options.expected_digest = info.digest;
  EXPECT(OK, emaudit_directions_open(fixture("good.safetensors"), &options, &directions, &error));
  emaudit_directions_free(directions);
  info.digest[31] ^= 1;
  EXPECT(DIGEST_MISMATCH,
         emaudit_directions_open(fixture("good.safetensors"), &options, &directions, &error));

  emaudit_open_options unverified = EMAUDIT_OPEN_OPTIONS_INIT;
  unverified.skip_verify = 1;
  EXPECT(OK, emaudit_directions_open(fixture("flipped.safetensors"), &unverified, &directions, &error));
  EXPECT(OK, emaudit_directions_get_info(directions, &info, &error));
  CHECK(info.verified == 0);
  emaudit_directions_free(directions);

  unverified.skip_verify = 2;
  EXPECT(INVALID_ARGUMENT,
         emaudit_directions_open(fixture("good.safetensors"), &unverified, &directions, &error));
  options.mode = 7;
  EXPECT(INVALID_ARGUMENT,
         emaudit_directions_open(fixture("good.safetensors"), &options, &directions, &error));
}

void test_open(void) {
  emaudit_directions_free(open_fixture("good.safetensors"));
  refuse(EMAUDIT_STATUS_TRUNCATED, "truncated.safetensors");
  refuse(EMAUDIT_STATUS_DIGEST_MISMATCH, "flipped.safetensors");
  refuse(EMAUDIT_STATUS_NOT_A_DIRECTION_FILE, "text.safetensors");
  refuse(EMAUDIT_STATUS_NOT_A_DIRECTION_FILE, "empty.safetensors");
  refuse(EMAUDIT_STATUS_IO, "absent.safetensors");
  emaudit_directions *directions = NULL;
  EXPECT(INVALID_ARGUMENT, emaudit_directions_open(NULL, NULL, &directions, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_directions_open(fixture("good.safetensors"), NULL, NULL, &error));
  CHECK(emaudit_directions_open(NULL, NULL, NULL, NULL) == EMAUDIT_STATUS_INVALID_ARGUMENT);
  test_bytes();
  test_options();
}

static void test_layers(const emaudit_directions *directions) {
  uint32_t layers[4] = {99, 99, 99, 99};
  size_t count = 0;
  EXPECT(OK, emaudit_directions_get_layers(directions, layers, 1, &count, &error));
  CHECK(count == 2 && layers[0] == OTHER_LAYER && layers[1] == 99);
  EXPECT(OK, emaudit_directions_get_layers(directions, layers, 4, &count, &error));
  CHECK(count == 2 && layers[1] == LAYER && layers[2] == 99);

  emaudit_layer_info layer = EMAUDIT_LAYER_INFO_INIT;
  EXPECT(OK, emaudit_directions_get_layer_info(directions, LAYER, &layer, &error));
  CHECK(layer.layer == LAYER && layer.sequences == SEQUENCES && layer.sigma > 0.0);
  CHECK(layer.threshold_count > 0);
  for (uint32_t i = 0; i < layer.threshold_count; ++i) {
    emaudit_threshold threshold = EMAUDIT_THRESHOLD_INIT;
    EXPECT(OK, emaudit_directions_get_threshold(directions, LAYER, i, &threshold, &error));
    CHECK(threshold.aggregation >= EMAUDIT_AGGREGATION_MEAN && threshold.horizon > 0);
    CHECK(threshold.rate > 0.0 && threshold.rate < 1.0);
  }
  emaudit_threshold threshold = EMAUDIT_THRESHOLD_INIT;
  EXPECT(INVALID_ARGUMENT, emaudit_directions_get_threshold(directions, LAYER, layer.threshold_count,
                                                            &threshold, &error));
  EXPECT(LAYER_NOT_FOUND, emaudit_directions_get_layer_info(directions, 2, &layer, &error));
}

static void test_vectors(const emaudit_directions *directions) {
  float vectors[2 * WIDTH];
  EXPECT(OK, emaudit_directions_copy_vectors(directions, LAYER, vectors, NULL, WIDTH, &error));
  EXPECT(WIDTH_MISMATCH,
         emaudit_directions_copy_vectors(directions, LAYER, vectors, NULL, WIDTH + 1, &error));
  EXPECT(LAYER_NOT_FOUND, emaudit_directions_copy_vectors(directions, 2, vectors, NULL, WIDTH, &error));
  EXPECT(INVALID_ARGUMENT,
         emaudit_directions_copy_vectors(directions, LAYER, vectors, vectors + 5, WIDTH, &error));
  emaudit_probe *probe = NULL;
  EXPECT(LAYER_NOT_FOUND, emaudit_probe_new(directions, 2, NULL, &probe, &error));
  CHECK(probe == NULL);
}

void test_info(void) {
  emaudit_directions *directions = open_fixture("good.safetensors");
  emaudit_directions_info info = EMAUDIT_DIRECTIONS_INFO_INIT;
  EXPECT(OK, emaudit_directions_get_info(directions, &info, &error));
  CHECK(info.width == WIDTH && info.layer_count == 2 && info.verified == 1);
  CHECK(info.causal == EMAUDIT_SPECIFICITY_UNTESTED && info.content == EMAUDIT_SPECIFICITY_UNTESTED);
  CHECK(info.site == EMAUDIT_SITE_RESID_POST && info.pooling == EMAUDIT_POOLING_LAST_PROMPT);
  CHECK(info.estimator == EMAUDIT_ESTIMATOR_MEAN_DIFFERENCE);
  CHECK(info.contrast == EMAUDIT_CONTRAST_ADAPTER_MINUS_BASE);
  EXPECT(INVALID_ARGUMENT, emaudit_directions_get_info(NULL, &info, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_directions_get_info(directions, NULL, &error));
  test_layers(directions);
  test_vectors(directions);
  emaudit_directions_free(directions);

  directions = open_fixture("specific.safetensors");
  EXPECT(OK, emaudit_directions_get_info(directions, &info, &error));
  CHECK(info.causal == EMAUDIT_SPECIFICITY_SPECIFIC && info.content == EMAUDIT_SPECIFICITY_SPECIFIC);
  emaudit_directions_free(directions);
}

void test_identity(void) {
  emaudit_directions *directions = open_fixture("good.safetensors");
  emaudit_model_identity model = EMAUDIT_MODEL_IDENTITY_INIT;
  EXPECT(OK, emaudit_directions_get_identity(directions, &model, &error));
  CHECK(strcmp(model.architecture, "llama") == 0 && model.hidden_size == WIDTH);
  CHECK(model.n_layers == N_LAYERS && model.vocab_size == VOCABULARY);
  CHECK(strlen(model.tokenizer_digest) == 64 && model.name[0] != '\0');

  uint32_t match = 0;
  EXPECT(OK, emaudit_directions_check_model(directions, &model, &match, &error));
  CHECK(match == EMAUDIT_IDENTITY_EXACT);
  emaudit_model_identity variant = model;
  variant.quantization = "f16";
  EXPECT(OK, emaudit_directions_check_model(directions, &variant, &match, &error));
  CHECK(match == EMAUDIT_IDENTITY_VARIANT);
  variant.quantization = model.quantization;
  variant.weights_digest = NULL;
  EXPECT(OK, emaudit_directions_check_model(directions, &variant, &match, &error));
  CHECK(match == EMAUDIT_IDENTITY_VARIANT);

  match = 77;
  emaudit_model_identity other = model;
  other.architecture = "qwen2";
  EXPECT(MODEL_MISMATCH, emaudit_directions_check_model(directions, &other, &match, &error));
  other = model;
  other.vocab_size += 1;
  EXPECT(MODEL_MISMATCH, emaudit_directions_check_model(directions, &other, &match, &error));
  other = model;
  other.site = EMAUDIT_SITE_FINAL_NORM;
  EXPECT(MODEL_MISMATCH, emaudit_directions_check_model(directions, &other, &match, &error));
  other.site = 0; /* must be stated */
  EXPECT(INVALID_ARGUMENT, emaudit_directions_check_model(directions, &other, &match, &error));
  other = model;
  other.architecture = NULL;
  EXPECT(INVALID_ARGUMENT, emaudit_directions_check_model(directions, &other, &match, &error));
  other = model;
  other.architecture = "\xff\xfe";
  EXPECT(INVALID_ARGUMENT, emaudit_directions_check_model(directions, &other, &match, &error));
  CHECK(match == 77);
  emaudit_directions_free(directions);
}

/* A struct of a version to come. */
struct future_options {
  emaudit_probe_options known;
  uint32_t unknown[2];
};

struct future_info {
  emaudit_probe_info known;
  uint32_t unknown[2];
};

void test_structs(void) {
  emaudit_directions *directions = open_fixture("good.safetensors");
  emaudit_probe *probe = NULL;
  struct future_options future = {EMAUDIT_PROBE_OPTIONS_INIT, {0, 0}};
  future.known.struct_size = sizeof future;
  EXPECT(OK, emaudit_probe_new(directions, LAYER, &future.known, &probe, &error));

  struct future_info info = {EMAUDIT_PROBE_INFO_INIT, {5, 6}};
  info.known.struct_size = sizeof info;
  EXPECT(OK, emaudit_probe_get_info(probe, &info.known, &error));
  CHECK(info.known.width == WIDTH && info.known.layer == LAYER && info.known.kernel != EMAUDIT_KERNEL_DEFAULT);
  CHECK(info.known.struct_size == sizeof info && info.unknown[0] == 0 && info.unknown[1] == 0);
  emaudit_probe_free(probe);

  probe = NULL;
  future.unknown[1] = 1; /* asks for something this library does not know */
  EXPECT(INVALID_ARGUMENT, emaudit_probe_new(directions, LAYER, &future.known, &probe, &error));
  emaudit_probe_options options = EMAUDIT_PROBE_OPTIONS_INIT;
  options.kernel = 99;
  EXPECT(INVALID_ARGUMENT, emaudit_probe_new(directions, LAYER, &options, &probe, &error));
  const uint32_t wrong[] = {0, 3, sizeof options - 1, 1u << 20};
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; ++i) {
    emaudit_probe_options sized = EMAUDIT_PROBE_OPTIONS_INIT;
    sized.struct_size = wrong[i];
    EXPECT(INVALID_ARGUMENT, emaudit_probe_new(directions, LAYER, &sized, &probe, &error));
  }
  CHECK(probe == NULL);
  emaudit_directions_free(directions);
}
