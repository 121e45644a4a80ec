// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The functions of emaudit.h as one table, so that every wrapper is written once for both modes: linked, where
// the compiler resolves the table, and loaded (EMAUDIT_DYNAMIC), where dynamic.hpp fills it.
#ifndef EMAUDIT_FUNCTIONS_HPP
#define EMAUDIT_FUNCTIONS_HPP

#include "../emaudit.h"

// Units of both modes may be linked into one program: their types and functions have different names.
#ifdef EMAUDIT_DYNAMIC
#define EMAUDIT_LINKAGE loaded
#else
#define EMAUDIT_LINKAGE linked
#endif

/// Calls X(name) for every emaudit_name of emaudit.h, in its order.
#define EMAUDIT_FUNCTIONS(X)    \
  X(abi_version)                \
  X(version)                    \
  X(status_name)                \
  X(error_status)               \
  X(error_message)              \
  X(error_free)                 \
  X(kernel_list)                \
  X(kernel_name)                \
  X(kernel_from_name)           \
  X(directions_open)            \
  X(directions_from_bytes)      \
  X(directions_free)            \
  X(directions_trusted_comment) \
  X(directions_get_info)        \
  X(directions_get_layers)      \
  X(directions_get_identity)    \
  X(directions_check_model)     \
  X(directions_get_layer_info)  \
  X(directions_get_threshold)   \
  X(directions_copy_vectors)    \
  X(probe_new)                  \
  X(probe_free)                 \
  X(probe_get_info)             \
  X(probe_score)                \
  X(probe_score_all)            \
  X(probe_error_bound)          \
  X(steering_new)               \
  X(steering_free)              \
  X(steering_apply)             \
  X(steering_score_and_apply)   \
  X(steering_check_landed)      \
  X(probe_to_device)            \
  X(device_probe_free)          \
  X(device_probe_error_bound)   \
  X(probe_score_device)         \
  X(steer_device)               \
  X(score_and_steer_device)     \
  X(drift_new)                  \
  X(drift_free)                 \
  X(drift_push)                 \
  X(drift_get_report)           \
  X(drift_reset)                \
  X(monitor_new)                \
  X(monitor_free)               \
  X(monitor_watch)              \
  X(monitor_push)               \
  X(monitor_get_verdict)        \
  X(monitor_reset)              \
  X(audit_new)                  \
  X(audit_free)                 \
  X(audit_watch)                \
  X(audit_push)                 \
  X(audit_get_verdict)          \
  X(log_open)                   \
  X(log_free)                   \
  X(log_append)                 \
  X(log_get_info)               \
  X(probe_slot_new)             \
  X(probe_slot_replace)         \
  X(probe_slot_acquire)         \
  X(probe_slot_free)            \
  X(steering_slot_new)          \
  X(steering_slot_replace)      \
  X(steering_slot_acquire)      \
  X(steering_slot_free)

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {
namespace detail {

struct Functions {
#define EMAUDIT_FUNCTION_MEMBER(name) decltype(&::emaudit_##name) name;
  EMAUDIT_FUNCTIONS(EMAUDIT_FUNCTION_MEMBER)
#undef EMAUDIT_FUNCTION_MEMBER
};

#ifndef EMAUDIT_DYNAMIC

#define EMAUDIT_FUNCTION_ADDRESS(name) &::emaudit_##name,
inline constexpr Functions linked_functions{EMAUDIT_FUNCTIONS(EMAUDIT_FUNCTION_ADDRESS)};
#undef EMAUDIT_FUNCTION_ADDRESS

/// The table, never null.
constexpr const Functions *functions() noexcept { return &linked_functions; }

#endif

}  // namespace detail
}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#ifdef EMAUDIT_DYNAMIC
#include "dynamic.hpp"
#endif

#endif  // EMAUDIT_FUNCTIONS_HPP
