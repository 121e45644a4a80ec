/* Rows on a device: refused with its own status where there is none; with a driver, checked and enqueued. The test that
 * puts a recorded driver in the place of NVIDIA's looks at what was asked of it. */
#include "check.h"

enum { ROWS = 3 };

static void *at(uintptr_t address) { return (void *)address; }

static emaudit_tensor rows_at(uintptr_t address, uint32_t dtype) {
  emaudit_tensor tensor = EMAUDIT_TENSOR_INIT;
  tensor.dtype = dtype;
  tensor.data = at(address);
  tensor.rows = ROWS;
  tensor.cols = WIDTH;
  return tensor;
}

static void test_calls(const emaudit_device_probe *device, const emaudit_steering *steering) {
  float *const scores = at(0x20000), *const strengths = at(0x30000);
  uint8_t *const status = at(0x40000);
  void *const stream = at(0x40);
  const emaudit_tensor f32 = rows_at(0x10000, EMAUDIT_DTYPE_F32), f16 = rows_at(0x10000, EMAUDIT_DTYPE_F16),
                       bf16 = rows_at(0x10000, EMAUDIT_DTYPE_BF16);
  EXPECT(OK, emaudit_probe_score_device(device, &f32, EMAUDIT_UNIT_RAW, scores, NULL, stream, &error));
  EXPECT(OK, emaudit_steer_device(device, steering, &f16, NULL, status, stream, &error));
  EXPECT(OK, emaudit_score_and_steer_device(device, steering, &bf16, EMAUDIT_UNIT_ALIGNED_SD, scores, strengths,
                                            status, stream, &error));

  /* Refused: nothing of it reaches the driver. */
  emaudit_tensor bad = f32;
  bad.cols = WIDTH + 1;
  EXPECT(WIDTH_MISMATCH, emaudit_probe_score_device(device, &bad, EMAUDIT_UNIT_RAW, scores, NULL, stream, &error));
  bad = f32;
  bad.data = at(0x10002);
  EXPECT(INVALID_ARGUMENT, emaudit_probe_score_device(device, &bad, EMAUDIT_UNIT_RAW, scores, NULL, stream, &error));
  bad.data = NULL;
  EXPECT(INVALID_ARGUMENT, emaudit_probe_score_device(device, &bad, EMAUDIT_UNIT_RAW, scores, NULL, stream, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_probe_score_device(device, &f32, 9, scores, NULL, stream, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_probe_score_device(device, &f32, EMAUDIT_UNIT_RAW, NULL, NULL, stream, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_probe_score_device(NULL, &f32, EMAUDIT_UNIT_RAW, scores, NULL, stream, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steer_device(device, steering, &f32, NULL, NULL, stream, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_steer_device(device, NULL, &f32, NULL, status, stream, &error));
  /* A status inside the rows. */
  EXPECT(INVALID_ARGUMENT, emaudit_steer_device(device, steering, &f32, NULL, at(0x10010), stream, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_score_and_steer_device(device, steering, &f32, EMAUDIT_UNIT_RAW, scores, scores,
                                                          status, stream, &error));
  bad = f32;
  bad.rows = 0;
  EXPECT(OK, emaudit_steer_device(device, steering, &bad, NULL, NULL, stream, &error));
}

void test_device(void) {
  emaudit_probe *probe = probe_fixture("specific.safetensors");
  emaudit_device_probe *device = NULL;
  EXPECT(INVALID_ARGUMENT, emaudit_probe_to_device(NULL, &device, &error));
  EXPECT(INVALID_ARGUMENT, emaudit_probe_to_device(probe, NULL, &error));
  emaudit_error *error = NULL;
  const emaudit_status made = emaudit_probe_to_device(probe, &device, &error);
  if (made == EMAUDIT_STATUS_DEVICE_UNAVAILABLE || made == EMAUDIT_STATUS_INVALID_ARGUMENT) {
    /* No driver, or one whose context nobody has made current. */
    CHECK(device == NULL && strlen(emaudit_error_message(error)) > 20);
    emaudit_error_free(error);
    emaudit_probe_free(probe);
    return;
  }
  CHECK(made == EMAUDIT_STATUS_OK && device != NULL);

  double on_device = 0.0, on_host = 0.0;
  EXPECT(OK, emaudit_device_probe_error_bound(device, 10.0, &on_device, &error));
  EXPECT(OK, emaudit_probe_error_bound(probe, 10.0, &on_host, &error));
  CHECK(on_device > 0.0 && on_device < 100.0 * on_host);
  EXPECT(INVALID_ARGUMENT, emaudit_device_probe_error_bound(device, -1.0, &on_device, &error));

  emaudit_steering_options options = EMAUDIT_STEERING_OPTIONS_INIT;
  options.operation = EMAUDIT_OPERATION_SUBTRACT;
  emaudit_steering *steering = NULL, *other = NULL;
  EXPECT(OK, emaudit_steering_new(probe, &options, &steering, &error));
  emaudit_probe *another = probe_fixture("specific.safetensors");
  EXPECT(OK, emaudit_steering_new(another, &options, &other, &error));
  /* What was made from the probe does not need it. */
  emaudit_probe_free(probe);
  test_calls(device, steering);
  const emaudit_tensor rows = rows_at(0x10000, EMAUDIT_DTYPE_F32);
  EXPECT(INVALID_ARGUMENT, emaudit_steer_device(device, other, &rows, NULL, at(0x40000), NULL, &error));
  emaudit_device_probe_free(device);
  emaudit_device_probe_free(NULL);
  emaudit_steering_free(steering);
  emaudit_steering_free(other);
  emaudit_probe_free(another);
}
