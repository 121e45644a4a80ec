/* Says what a direction file is for: audit_c FILE */
#include <emaudit.h>
#include <stdio.h>

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s FILE\n", argv[0]);
    return 2;
  }
  emaudit_directions *directions = NULL;
  emaudit_error *error = NULL;
  if (emaudit_directions_open(argv[1], NULL, &directions, &error) != EMAUDIT_STATUS_OK) {
    fprintf(stderr, "%s\n", emaudit_error_message(error));
    emaudit_error_free(error);
    return 1;
  }
  emaudit_model_identity model = EMAUDIT_MODEL_IDENTITY_INIT;
  emaudit_directions_info info = EMAUDIT_DIRECTIONS_INFO_INIT;
  const int read = emaudit_directions_get_identity(directions, &model, NULL) == EMAUDIT_STATUS_OK &&
                   emaudit_directions_get_info(directions, &info, NULL) == EMAUDIT_STATUS_OK;
  if (read) {
    printf("emaudit %s: %s, width %u, %u layers\n", emaudit_version(), model.architecture, (unsigned)info.width,
           (unsigned)info.layer_count);
  }
  emaudit_directions_free(directions);
  return read ? 0 : 1;
}
