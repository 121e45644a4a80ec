// A unit that loads the library (argv[1]), in one program with linked_unit.cpp, which is linked with it.
#define EMAUDIT_DYNAMIC
#include "emaudit.hpp"

#include <cstdio>
#include <cstring>

const char *linked_version();

int main(int argc, char **argv) {
  if (argc != 2 || !emaudit::load(argv[1])) {
    return 1;
  }
  const bool same = std::strcmp(emaudit::version(), linked_version()) == 0;
  const bool own = emaudit::version() != linked_version();  // two libraries, two strings
  std::printf("%s: both modes\n", same && own ? "ok" : "failed");
  return same && own ? 0 : 1;
}
