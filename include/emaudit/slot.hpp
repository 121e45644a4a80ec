// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Slots: replace the probe or the steering that threads are using, without a lock on their path.
#ifndef EMAUDIT_SLOT_HPP
#define EMAUDIT_SLOT_HPP

#include "steering.hpp"

namespace emaudit {
inline namespace EMAUDIT_LINKAGE {

/// A place that holds a probe: requests acquire the probe of the moment while another thread replaces it.
class ProbeSlot {
 public:
  static Result<ProbeSlot> make(const Probe &probe) {
    emaudit_probe_slot *handle = nullptr;
    return detail::run<ProbeSlot>(
        [&](const detail::Functions &f, emaudit_error **e) { return f.probe_slot_new(probe.get(), &handle, e); },
        [&] { return ProbeSlot(handle); });
  }

  /// The probe of this moment, for all of a request. No lock, no waiting; allocates only at a thread's first call.
  Probe acquire() const noexcept {
    emaudit_probe *probe = nullptr;
    (void)detail::functions()->probe_slot_acquire(get(), &probe, nullptr);
    return Probe(probe);
  }

  /// Whoever acquires from now on gets this probe; who holds the one before keeps it.
  Result<void> replace(const Probe &probe) const {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.probe_slot_replace(get(), probe.get(), e);
    });
  }

  const emaudit_probe_slot *get() const noexcept { return handle_.get(); }

 private:
  explicit ProbeSlot(emaudit_probe_slot *handle) noexcept : handle_(handle) {}

  detail::Handle<emaudit_probe_slot> handle_;
};

/// A place that holds a steering, as ProbeSlot holds a probe.
class SteeringSlot {
 public:
  static Result<SteeringSlot> make(const Steering &steering) {
    emaudit_steering_slot *handle = nullptr;
    return detail::run<SteeringSlot>(
        [&](const detail::Functions &f, emaudit_error **e) {
          return f.steering_slot_new(steering.get(), &handle, e);
        },
        [&] { return SteeringSlot(handle); });
  }

  /// The steering of this moment, for all of a request. No lock, no waiting; allocates only at a thread's first
  /// call.
  Steering acquire() const noexcept {
    emaudit_steering *steering = nullptr;
    (void)detail::functions()->steering_slot_acquire(get(), &steering, nullptr);
    return Steering(steering);
  }

  /// Whoever acquires from now on gets this steering; who holds the one before keeps it.
  Result<void> replace(const Steering &steering) const {
    return detail::run([&](const detail::Functions &f, emaudit_error **e) {
      return f.steering_slot_replace(get(), steering.get(), e);
    });
  }

  const emaudit_steering_slot *get() const noexcept { return handle_.get(); }

 private:
  explicit SteeringSlot(emaudit_steering_slot *handle) noexcept : handle_(handle) {}

  detail::Handle<emaudit_steering_slot> handle_;
};

}  // namespace EMAUDIT_LINKAGE
}  // namespace emaudit

#endif  // EMAUDIT_SLOT_HPP
