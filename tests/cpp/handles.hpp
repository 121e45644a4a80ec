// What the C++ tests share. Two units of one program include emaudit.hpp, so a function that is not inline, or a
// type that differs, fails to link.
#ifndef EMAUDIT_TESTS_HANDLES_HPP
#define EMAUDIT_TESTS_HANDLES_HPP

#include "emaudit.hpp"

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);  \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

constexpr std::size_t width = 67;
constexpr std::uint32_t layer = 3;

// Defined in the other unit: a handle made there is used and freed here.
emaudit::Result<emaudit::Probe> probe_of_file(const std::string &path);
std::size_t count_kernels();

#endif
