// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The implementations of the arithmetic.
#ifndef EMAUDIT_KERNEL_HPP
#define EMAUDIT_KERNEL_HPP

#include "result.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// An implementation of the arithmetic.
enum class Kernel : std::uint32_t {
  best = EMAUDIT_KERNEL_DEFAULT,
  scalar = EMAUDIT_KERNEL_SCALAR,
  portable = EMAUDIT_KERNEL_PORTABLE,
  avx2 = EMAUDIT_KERNEL_AVX2,
  avx512 = EMAUDIT_KERNEL_AVX512,
};

/// Name of a kernel, such as "avx2".
inline const char *name(Kernel kernel) noexcept {
  const detail::Functions *const functions = detail::functions_if_any();
  return functions != nullptr ? functions->kernel_name(static_cast<std::uint32_t>(kernel)) : "unknown";
}

/// The kernels this CPU can run, slowest first, so the best is the last.
inline Result<std::vector<Kernel>> kernels() {
  std::vector<std::uint32_t> numbers;
  return detail::run<std::vector<Kernel>>(
      [&](const detail::Functions &f, emaudit_error **e) {
        std::size_t count = 0;
        const emaudit_status status = f.kernel_list(nullptr, 0, &count, e);
        if (status != EMAUDIT_STATUS_OK) {
          return status;
        }
        numbers.resize(count);
        return f.kernel_list(numbers.data(), numbers.size(), &count, e);
      },
      [&] {
        std::vector<Kernel> list;
        for (const std::uint32_t number : numbers) {
          list.push_back(static_cast<Kernel>(number));
        }
        return list;
      });
}

/// The kernel of that name, such as "avx2"; it may still be unavailable here.
inline Result<Kernel> kernel_from_name(const char *kernel_name) {
  std::uint32_t number = 0;
  return detail::run<Kernel>(
      [&](const detail::Functions &f, emaudit_error **e) { return f.kernel_from_name(kernel_name, &number, e); },
      [&] { return static_cast<Kernel>(number); });
}
inline Result<Kernel> kernel_from_name(const std::string &kernel_name) {
  return kernel_from_name(kernel_name.c_str());
}

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_KERNEL_HPP
