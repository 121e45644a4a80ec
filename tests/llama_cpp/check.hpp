// Checks that say where they failed, and count.
#ifndef CHECK_HPP
#define CHECK_HPP

#include <cstdio>
#include <cstdlib>

inline int checks = 0;

#define CHECK(condition)                                                            \
  do {                                                                              \
    ++checks;                                                                       \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);  \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (false)

inline int checked(const char *what) {
  std::printf("ok: %s, %d checks\n", what, checks);
  return checks > 0 ? 0 : 1;
}

#endif  // CHECK_HPP
