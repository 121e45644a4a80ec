/* Trusted keys: what is signed with them opens, everything else is refused, each with its own status. */
#include "check.h"

/* A whole file as text; the caller frees it. */
static char *read_text(const char *name, size_t *size) {
  FILE *file = fopen(fixture(name), "rb");
  CHECK(file != NULL);
  CHECK(fseek(file, 0, SEEK_END) == 0);
  const long end = ftell(file);
  CHECK(end > 0 && fseek(file, 0, SEEK_SET) == 0);
  *size = (size_t)end;
  char *text = malloc(*size + 1);
  CHECK(text != NULL && fread(text, 1, *size, file) == *size);
  text[*size] = '\0';
  fclose(file);
  return text;
}

static void test_signed(emaudit_open_options *options) {
  emaudit_directions *directions = NULL;
  emaudit_directions_info info = EMAUDIT_DIRECTIONS_INFO_INIT;
  options->mode = EMAUDIT_MODE_MAPPED;
  EXPECT(OK, emaudit_directions_open(fixture("signed.safetensors"), options, &directions, &error));
  EXPECT(OK, emaudit_directions_get_info(directions, &info, &error));
  CHECK(info.trusted == 1 && info.verified == 1);
  CHECK(strcmp(emaudit_directions_trusted_comment(directions), "version 7") == 0);
  emaudit_directions_free(directions);
  options->mode = EMAUDIT_MODE_COPIED;

  directions = open_fixture("signed.safetensors"); /* without a key nobody looks at the signature */
  EXPECT(OK, emaudit_directions_get_info(directions, &info, &error));
  CHECK(info.trusted == 0);
  CHECK(strcmp(emaudit_directions_trusted_comment(directions), "") == 0);
  emaudit_directions_free(directions);
  CHECK(strcmp(emaudit_directions_trusted_comment(NULL), "") == 0);
}

static void test_signed_bytes(emaudit_open_options options) {
  size_t size = 0, signature_size = 0;
  char *bytes = read_text("signed.safetensors", &size);
  char *signature = read_text("signed.safetensors.minisig", &signature_size);
  emaudit_directions *directions = NULL;
  EXPECT(UNSIGNED,
         emaudit_directions_from_bytes((const uint8_t *)bytes, size, &options, &directions, &error));
  options.signature = (const uint8_t *)signature;
  options.signature_len = signature_size;
  EXPECT(OK, emaudit_directions_from_bytes((const uint8_t *)bytes, size, &options, &directions, &error));
  emaudit_directions_free(directions);
  /* A signature given goes before the one beside the file, here none. */
  EXPECT(BAD_SIGNATURE,
         emaudit_directions_open(fixture("specific.safetensors"), &options, &directions, &error));
  bytes[size - 1] = (char)(bytes[size - 1] ^ 1);
  EXPECT(BAD_SIGNATURE,
         emaudit_directions_from_bytes((const uint8_t *)bytes, size, &options, &directions, &error));
  options.trusted_key = NULL;
  EXPECT(INVALID_ARGUMENT,
         emaudit_directions_from_bytes((const uint8_t *)bytes, size, &options, &directions, &error));
  free(signature);
  free(bytes);
}

void test_trust(void) {
  size_t size = 0;
  char *key = read_text("key.pub", &size);
  char *stranger = read_text("stranger.pub", &size);
  emaudit_open_options options = EMAUDIT_OPEN_OPTIONS_INIT;
  emaudit_directions *directions = NULL;
  options.trusted_key = key;
  test_signed(&options);
  test_signed_bytes(options);
  EXPECT(UNSIGNED, emaudit_directions_open(fixture("good.safetensors"), &options, &directions, &error));
  options.trusted_key = stranger;
  EXPECT(UNTRUSTED_KEY, emaudit_directions_open(fixture("signed.safetensors"), &options, &directions, &error));
  options.trusted_key = "a note";
  EXPECT(INVALID_ARGUMENT,
         emaudit_directions_open(fixture("signed.safetensors"), &options, &directions, &error));
  /* A caller of the first version has no such members: its struct ends before them. */
  options.struct_size = (uint32_t)offsetof(emaudit_open_options, trusted_key);
  EXPECT(OK, emaudit_directions_open(fixture("signed.safetensors"), &options, &directions, &error));
  emaudit_directions_free(directions);
  CHECK(directions != NULL && strcmp(emaudit_status_name(EMAUDIT_STATUS_UNTRUSTED_KEY), "UNTRUSTED_KEY") == 0);
  free(stranger);
  free(key);
}
